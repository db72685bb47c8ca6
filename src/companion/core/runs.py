"""The content-addressed store of runs and measurements.

An entry is named by the SHA-256 of its identity: canonical JSON of everything that determines its
content. It is a folder ``<root>/<2 hex>/<64 hex>/`` of ``identity.json``; ``manifest.json``, file
-> {sha256, bytes} (and "file", its name on disk, once it was replaced); ``….safetensors``;
``….json``.

Every file is written under a temporary name, flushed and renamed, and only then listed in the
manifest, itself replaced atomically: a kill at any moment leaves the last consistent state. Loads
verify the checksum. Only safetensors and JSON are ever read; nothing is unpickled. Source: our
design; the idea of hashing hyperparameters without their defaults is open_lth's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from companion.core import closing, locations
from companion.core.errors import BadParameter, CorruptEntry, StoreUnwritable

_TEMPORARY = ".tmp-"


def canonical_json(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII, NaN refused. Equal values, equal text."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{_TEMPORARY}{uuid4().hex}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as e:
        with suppress(OSError):  # a read-only file system refuses even to look for it
            temporary.unlink()
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
            raise StoreUnwritable(
                f"run store: no space left to write {len(content) / 1e6:.1f} MB to {path.parent} "
                f"({e.strerror}; {free / 1e6:.1f} MB free). Nothing half-written was left. Free "
                "some space (`companion runs gc` removes what no longer counts) or point "
                "COMPANION_RUNS at another disk, and run the same command again: it continues "
                "where it stopped."
            ) from e
        raise _unwritable(path.parent, e) from e


def _unwritable(folder: Path, e: OSError) -> StoreUnwritable:
    return StoreUnwritable(
        f"run store: {folder} cannot be written ({e.strerror or e}). "
        "Point COMPANION_RUNS at a folder of your own."
    )


def _order(raw: bytes) -> list[str]:
    """Names of a safetensors file as they were written; of one without that note, by position."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    noted = header.pop("__metadata__", {}).get("order")
    if noted is not None:
        return [str(name) for name in json.loads(noted)]
    return sorted(header, key=lambda name: header[name]["data_offsets"])


@dataclass(frozen=True)
class Entry:
    """One entry of a store. Holding one costs nothing and touches no file."""

    store: Store
    identity: Mapping[str, Any]
    key: str

    @property
    def path(self) -> Path:
        """The entry's folder. It exists once something was written."""
        return self.store.root / self.key[:2] / self.key

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Exclusive across processes (and hosts, as far as the file system locks).

        Whoever locks an entry is about to make it, which is refused while a recording is closed.
        """
        closing.refuse_work([self], f"an entry of the kind {self.identity.get('kind')!r}")
        lock = FileLock(self.store.root / ".locks" / f"{self.key}.lock")
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as e:
            raise _unwritable(self.store.root, e) from e
        try:
            yield
        finally:
            lock.release()

    def files(self) -> dict[str, dict[str, Any]]:
        """The manifest: file name -> {"sha256": hex, "bytes": int}. Empty if nothing is stored."""
        path = self.path / "manifest.json"
        try:
            files = dict(json.loads(path.read_bytes())["files"])
            for name, record in files.items():
                str(record["sha256"]), int(record["bytes"])
                if Path(record.get("file", name)).name != record.get("file", name):
                    raise ValueError(name)
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise CorruptEntry(f"run store: {path} is unreadable") from e
        return files

    def __contains__(self, name: str) -> bool:
        return name in self.files()

    def _write(self, name: str, content: bytes) -> None:
        if not (self.path / "identity.json").exists():
            pretty = json.dumps(self.identity, indent=1, sort_keys=True, allow_nan=False)
            _write_atomically(self.path / "identity.json", pretty.encode())
        files = self.files()
        old = files.get(name)
        record: dict[str, Any] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
        if old:  # its bytes stay as they are until the manifest names the new ones
            record["file"] = f"{record['sha256'][:16]}-{name}"
        _write_atomically(self._place(name, record), content)
        self._publish({**files, name: record})
        if old and self._place(name, old) != self._place(name, record):
            self._place(name, old).unlink(missing_ok=True)

    def _place(self, name: str, record: Mapping[str, Any]) -> Path:
        return self.path / str(record.get("file", name))

    def _publish(self, files: Mapping[str, Any]) -> None:
        text = json.dumps({"key": self.key, "files": files}, indent=1, sort_keys=True)
        _write_atomically(self.path / "manifest.json", text.encode())

    def _read(self, name: str) -> bytes:
        last: Mapping[str, Any] | None = None
        while True:
            record = self.files().get(name)
            if record is None:
                raise KeyError(f"{name} is not in entry {self.key[:12]}")
            try:
                content = self._place(name, record).read_bytes()
            except FileNotFoundError:
                content = b""
            if hashlib.sha256(content).hexdigest() == record["sha256"]:
                return content
            if record == last:
                raise CorruptEntry(
                    f"run store: {self._place(name, record)} does not match its checksum "
                    f"({len(content)} bytes on disk, {record['bytes']} written)"
                )
            last = record  # perhaps a writer replaced it just now: look again

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store tensors as ``name`` (``….safetensors``). Shared storage is stored apart.

        The format has no order of its own, so the order of ``tensors`` is stored beside them.

        Raises:
            StoreUnwritable: no space, or no permission; nothing half-written stays.
        """
        flat = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
        self._write(name, save_bytes(flat, {"order": json.dumps(list(flat))}))

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Load tensors to the CPU after verifying their checksum, in the order of writing.

        Raises:
            KeyError: not stored.
            CorruptEntry: stored, but the bytes are not those that were written.
        """
        try:
            raw = self._read(name)
            loaded = load_bytes(raw)
            return {name: loaded[name] for name in _order(raw)}
        except SafetensorError as e:
            raise CorruptEntry(f"run store: {self.path / name} is no safetensors file") from e

    def write_json(self, name: str, value: Any) -> None:
        """Store a JSON value as ``name`` (``….json``)."""
        self._write(name, json.dumps(value, allow_nan=False).encode())

    def read_json(self, name: str) -> Any:
        """Load a JSON value after verifying its checksum. Raises as :meth:`read_tensors`."""
        return json.loads(self._read(name))

    def remove(self, name: str) -> None:
        """Take one file out of the entry. Nothing happens if it is not there."""
        files = self.files()
        if name in files:
            self._publish({k: v for k, v in files.items() if k != name})
            self._place(name, files[name]).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the whole entry, manifest first, so that no reader meets half of it."""
        (self.path / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def verify(self) -> list[str]:
        """The problems of this entry, one line each; empty if every byte is as it was written."""
        problems = []
        try:
            for name in list(self.files()):
                try:
                    self._read(name)
                except KeyError:
                    pass  # taken out while we read
                except CorruptEntry as e:
                    problems.append(str(e))
        except CorruptEntry as e:
            return [str(e)]
        try:
            written = json.loads((self.path / "identity.json").read_bytes())
            if digest(written) != self.key:
                problems.append(f"run store: {self.path}: identity.json is not what its key says")
        except (OSError, ValueError):
            problems.append(f"run store: {self.path}: identity.json is unreadable")
        return problems

    def bytes(self) -> int:
        """Size of the listed files, in bytes."""
        return sum(int(f["bytes"]) for f in self.files().values())


@dataclass(frozen=True)
class Store:
    """A folder of entries. ``Store()`` is the default one (see :mod:`companion.core.locations`)."""

    root: Path

    def __init__(self, root: Path | str | None = None):
        object.__setattr__(self, "root", Path(root) if root is not None else locations.runs_root())

    def entry(self, identity: Mapping[str, Any]) -> Entry:
        """The entry of ``identity`` (JSON-able; NaN refused), whether or not it exists yet."""
        return Entry(self, identity, digest(identity))

    def entries(self) -> Iterator[Entry]:
        """Every entry with a readable identity, in the order of their keys."""
        for path in sorted(self.root.glob("[0-9a-f][0-9a-f]/*/identity.json")):
            try:
                identity = json.loads(path.read_bytes())
            except (OSError, ValueError):
                identity = {}
            yield Entry(self, identity, path.parent.name)

    def find(self, prefix: str) -> Entry:
        """The one entry whose key starts with ``prefix`` (4 hex digits or more).

        Raises:
            BadParameter: none, or more than one.
        """
        matches = [e for e in self.entries() if e.key.startswith(prefix)]
        if len(prefix) < 4 or len(matches) != 1:
            found = ", ".join(e.key[:12] for e in matches[:5]) or "none"
            raise BadParameter(
                f"run key {prefix!r}: give at least 4 hex digits that fit one entry of "
                f"{self.root} (found: {found}). `companion runs list` shows them."
            )
        return matches[0]

    def garbage(self, is_current: Any, min_age_s: float = 3600.0) -> list[tuple[Path, str]]:
        """What may go, as (path, why): leftovers of killed writes, unlisted files, entries that
        ``is_current(identity)`` says no code would ask for any more, corrupt entries.

        Files younger than ``min_age_s`` seconds may belong to a writer at work and are spared.
        """
        found: list[tuple[Path, str]] = []
        horizon = time.time() - min_age_s

        def is_old(path: Path) -> bool:
            try:
                return path.stat().st_mtime < horizon
            except FileNotFoundError:  # a writer renamed it just now
                return False

        for path in sorted(self.root.glob(f"*/*/{_TEMPORARY}*")):
            if is_old(path):
                found.append((path, "left by a killed write"))
        for entry in self.entries():
            if not is_current(entry.identity):
                found.append((entry.path, "made by an older version of the code"))
            elif entry.verify():
                found.append((entry.path, "corrupt"))
            else:
                files = entry.files()
                listed = {entry._place(n, r).name for n, r in files.items()}
                listed |= {"identity.json", "manifest.json"}
                found += [
                    (p, "not listed in the manifest")
                    for p in sorted(entry.path.iterdir())
                    if p.name not in listed and not p.name.startswith(_TEMPORARY) and is_old(p)
                ]
        return found
