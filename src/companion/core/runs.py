"""The content-addressed store of runs and measurements.

An entry is named by the SHA-256 of its identity: canonical JSON of everything that determines its
content. It is a folder ``<root>/<2 hex>/<64 hex>/`` of ``identity.json``; ``manifest.json``, file
-> {sha256, bytes} (and "file", its name on disk, once it was replaced); ``….safetensors``;
``….json``.

Every file is written under a temporary name, flushed and renamed, and only then listed in the
manifest, itself replaced atomically: a kill at any moment leaves the last consistent state. Loads
verify the checksum. Only safetensors and JSON are ever read; nothing is unpickled. Inside the store
no link is followed: what is read, written or deleted lies below its root. Reading takes no lock.
Source: our design; the idea of hashing hyperparameters without their defaults is open_lth's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from companion.core import closing, files, locations, locks
from companion.core.errors import (
    BadParameter,
    Busy,
    CompanionError,
    CorruptEntry,
    StoreUnreadable,
    StoreUnwritable,
)

_TEMPORARY = files.TEMPORARY
_KEY = re.compile(r"[0-9a-f]{64}")
_LOCKS = ".locks"
_OWN = ("identity.json", "manifest.json")  # of each entry
_OLD_S = 3600.0  # a file this old belongs to no writer at work
_NO_JSON = (ValueError, RecursionError)  # what parsing raises, at any depth

Current = Callable[[Mapping[str, Any]], bool]
Garbage = tuple[Path, str]
"""What may go, and why."""


def canonical_json(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII, NaN refused. Equal values, equal text."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _write_atomically(path: Path, content: bytes | Iterable[bytes]) -> None:
    parts = [content] if isinstance(content, bytes) else content
    size = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            _remove(path)
        with files.replacing(path) as working, working.open("wb") as f:
            for part in parts:
                size += len(part)
                f.write(part)
    except CompanionError:  # of whoever gives the parts
        raise
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
            raise StoreUnwritable(
                f"run store: no space left to write {size / 1e6:.1f} MB to {path.parent} "
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


def _unreadable(path: Path, e: OSError) -> StoreUnreadable:
    return StoreUnreadable(f"run store: {path} cannot be read ({e.strerror or e}).")


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise StoreUnreadable(
            f"run store: {path} is a symbolic link, and inside the store none is followed. Put "
            "what it points to in its place, or remove it."
        )


def _open(path: Path) -> IO[bytes]:
    """A file of the store, opened to read. It is a regular file, and no link.

    Raises:
        FileNotFoundError: nothing is there. IsADirectoryError: something else than a file.
        StoreUnreadable: no permission, a link, a disk that fails.
    """
    try:
        # Not blocking: a pipe in place of a file would wait for ever.
        how = os.O_NOFOLLOW | os.O_NONBLOCK
        f = open(path, "rb", opener=lambda name, flags: os.open(name, flags | how))  # noqa: SIM115 - the caller closes it
    except NotADirectoryError as e:
        raise FileNotFoundError(*e.args) from e
    except (FileNotFoundError, IsADirectoryError):
        raise
    except OSError as e:
        _refuse_link(path)
        raise _unreadable(path, e) from e
    if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
        f.close()
        raise IsADirectoryError(errno.EISDIR, "not a file", str(path))
    return f


def _content(path: Path) -> bytes:
    """The bytes of a file of the store. Raises as :func:`_open`."""
    with _open(path) as f:
        try:
            return f.read()
        except OSError as e:
            raise _unreadable(path, e) from e


def _listing(folder: Path) -> list[Path]:
    """What is in a folder of the store, in order; nothing if there is no such folder."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise _unreadable(folder, e) from e


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; others may be doing so, too.

    Raises:
        StoreUnwritable: no permission.
    """
    while os.path.lexists(path):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            continue
        except OSError as e:
            raise _unwritable(path, e) from e


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
    def lock(self, *, wait: bool = True) -> Iterator[None]:
        """Exclusive across processes (and hosts, as far as the file system locks).

        Whoever locks an entry is about to make it, which is refused while a recording is closed.
        Whoever has to wait says so, and for whom.

        Raises:
            StoreUnwritable: no permission, no space.
            Busy: another process has it, and ``wait`` is false.
        """
        what = f"an entry of the kind {self.identity.get('kind')!r}"
        closing.refuse_work([self], what)
        self._refuse_links()
        with ExitStack() as stack:
            try:
                path, said = self.store.lock_of(self.key), f"{self.path.name[:12]}, {what},"
                stack.enter_context(locks.held(path, said, wait=wait))
            except CompanionError:
                raise
            except OSError as e:
                raise _unwritable(self.store.root, e) from e
            yield

    def _refuse_links(self) -> None:
        for path in (self.store.root / _LOCKS, self.path.parent, self.path):
            _refuse_link(path)

    def files(self) -> dict[str, dict[str, Any]]:
        """The manifest: file name -> {"sha256": hex, "bytes": int}. Empty if nothing is stored.

        Raises:
            CorruptEntry: there is one, but not as it was written.
            StoreUnreadable: no permission, or a link in its place.
        """
        self._refuse_links()
        path = self.path / "manifest.json"
        try:
            files = dict(json.loads(_content(path))["files"])
            for name, record in files.items():
                str(record["sha256"]), int(record["bytes"])
                if Path(record.get("file", name)).name != record.get("file", name):
                    raise ValueError(name)
        except FileNotFoundError:
            return {}
        except (*_NO_JSON, TypeError, KeyError, AttributeError, IsADirectoryError) as e:
            raise CorruptEntry(f"run store: {path} is unreadable") from e
        return files

    def __contains__(self, name: str) -> bool:
        return name in self.files()

    def mend(self) -> None:
        """Write the file of the identity again where an entry is there and that file is damaged."""
        self._refuse_links()
        if not self.path.is_dir():
            return
        try:
            right = digest(json.loads(_content(self.path / _OWN[0]))) == self.key
        except (FileNotFoundError, IsADirectoryError, *_NO_JSON):
            right = False
        if not right:
            self._write_identity()

    def _write_identity(self) -> None:
        path = self.path / _OWN[0]
        pretty = json.dumps(self.identity, indent=1, sort_keys=True, allow_nan=False)
        _write_atomically(path, pretty.encode())

    def _write(self, name: str, content: bytes) -> None:
        record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        self._put(name, record, content)

    def _put(self, name: str, facts: Mapping[str, Any], content: bytes | Iterable[bytes]) -> None:
        """Store a file of which ``sha256`` and ``bytes`` are known."""
        self._refuse_links()
        if not (self.path / _OWN[0]).is_file():
            self._write_identity()
        files = self.files()
        old = files.get(name)
        record = {"sha256": facts["sha256"], "bytes": facts["bytes"]}
        if old:  # its bytes stay as they are until the manifest names the new ones
            record["file"] = f"{record['sha256'][:16]}-{name}"
        _write_atomically(self._place(name, record), content)
        self._publish({**files, name: record})
        if old and self._place(name, old) != self._place(name, record):
            _remove(self._place(name, old))

    def _place(self, name: str, record: Mapping[str, Any]) -> Path:
        return self.path / str(record.get("file", name))

    def _publish(self, files: Mapping[str, Any]) -> None:
        text = json.dumps({"key": self.key, "files": files}, indent=1, sort_keys=True)
        _write_atomically(self.path / _OWN[1], text.encode())

    def _read(self, name: str) -> bytes:
        last: Mapping[str, Any] | None = None
        while True:
            record = self.files().get(name)
            if record is None:
                raise KeyError(f"{name} is not in entry {self.key[:12]}")
            try:
                content = _content(self._place(name, record))
            except (FileNotFoundError, IsADirectoryError):
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
        raw = self._read(name)
        try:
            loaded = load_bytes(raw)
            return {name: loaded[name] for name in _order(raw)}
        except (SafetensorError, *_NO_JSON, KeyError, TypeError, AttributeError) as e:
            raise CorruptEntry(f"run store: {self.path / name} is no safetensors file") from e

    def write_json(self, name: str, value: Any) -> None:
        """Store a JSON value as ``name`` (``….json``)."""
        self._write(name, json.dumps(value, allow_nan=False).encode())

    def read_json(self, name: str) -> Any:
        """Load a JSON value after verifying its checksum. Raises as :meth:`read_tensors`."""
        raw = self._read(name)
        try:
            return json.loads(raw)
        except _NO_JSON as e:
            raise CorruptEntry(f"run store: {self.path / name} is no JSON file") from e

    def remove(self, name: str) -> None:
        """Take one file out of the entry. Nothing happens if it is not there."""
        files = self.files()
        if name in files:
            self._publish({k: v for k, v in files.items() if k != name})
            _remove(self._place(name, files[name]))

    def discard(self) -> None:
        """Remove the whole entry, at once: no reader meets half of it, nor a kill.

        Raises:
            StoreUnwritable: no permission.
        """
        self._refuse_links()
        going = self.path.with_name(f"{_TEMPORARY}{uuid4().hex}")
        try:
            self.path.rename(going)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as e:
            raise _unwritable(self.path, e) from e
        _remove(going)

    def damage(self) -> list[CorruptEntry]:
        """What of this entry is not as it was written.

        Raises:
            StoreUnreadable: that cannot be seen, for want of permission, or for a link.
        """
        found = []
        try:
            for name in list(self.files()):
                try:
                    self._read(name)
                except KeyError:
                    pass  # taken out while we read
                except CorruptEntry as e:
                    found.append(e)
        except CorruptEntry as e:
            return [e]
        try:
            written = json.loads(_content(self.path / _OWN[0]))
            if digest(written) != self.key:
                why = f"run store: {self.path}: identity.json is not what its key says"
                found.append(CorruptEntry(why))
        except StoreUnreadable:
            raise
        except (OSError, *_NO_JSON):
            found.append(CorruptEntry(f"run store: {self.path}: identity.json is unreadable"))
        return found

    def verify(self) -> list[str]:
        """The problems of this entry, one line each; empty if every byte is as it was written."""
        try:
            return [str(e) for e in self.damage()]
        except StoreUnreadable as e:
            return [str(e)]

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

    def lock_of(self, key: str) -> Path:
        """The lock file of an entry."""
        return self.root / _LOCKS / f"{key}.lock"

    def _folders(self, prefix: str = "") -> Iterator[Path]:
        """Every folder that is named as an entry, from ``prefix`` on, and lies where it would."""
        if self.root.exists() and not self.root.is_dir():
            raise StoreUnreadable(
                f"run store: {self.root} is a file; point COMPANION_RUNS at a folder."
            )
        for shard in self._shards():
            if not shard.name.startswith(prefix[:2]):
                continue
            for path in _listing(shard):
                named = _KEY.fullmatch(path.name) and path.name[:2] == shard.name
                if (
                    named
                    and path.name.startswith(prefix)
                    and path.is_dir()
                    and not path.is_symlink()
                ):
                    yield path

    def _shards(self) -> list[Path]:
        return [
            path
            for path in _listing(self.root)
            if re.fullmatch("[0-9a-f]{2}", path.name) and path.is_dir() and not path.is_symlink()
        ]

    def links(self) -> list[Path]:
        """Symbolic links where the store has its entries; none of them is followed."""
        inside = [path for shard in self._shards() for path in _listing(shard)]
        below = [path for folder in self._folders() for path in _listing(folder)]
        return [path for path in (*_listing(self.root), *inside, *below) if path.is_symlink()]

    def entries(self) -> Iterator[Entry]:
        """Every entry, in the order of their keys; one without a readable identity has {}."""
        for path in self._folders():
            if (entry := self._at(path)) is not None:
                yield entry

    def _at(self, path: Path) -> Entry | None:
        """The entry of a folder of :meth:`_folders`; None without any identity."""
        try:
            identity = json.loads(_content(path / _OWN[0]))
        except FileNotFoundError:
            return None
        except (OSError, *_NO_JSON):
            identity = {}
        return Entry(self, identity if isinstance(identity, dict) else {}, path.name)

    def find(self, prefix: str) -> Entry:
        """The one entry whose key starts with ``prefix`` (4 hex digits or more).

        Raises:
            BadParameter: none, or more than one.
        """
        found = map(self._at, self._folders(prefix))
        matches = [entry for entry in found if entry is not None]
        if len(prefix) < 4 or len(matches) != 1:
            some = ", ".join(e.key[:12] for e in matches[:5]) or "none"
            raise BadParameter(
                f"run key {prefix!r}: give at least 4 hex digits that fit one entry of "
                f"{self.root} (found: {some}). `companion runs list` shows them."
            )
        return matches[0]

    def garbage(self, is_current: Current, min_age_s: float = _OLD_S) -> list[Garbage]:
        """What may go, as (path, why): leftovers of killed writes and deletions, unlisted files,
        entries that ``is_current(identity)`` says no code would ask for any more, corrupt entries,
        and locks that nobody holds.

        Files younger than ``min_age_s`` seconds may belong to a writer at work and are spared. What
        cannot be read is spared, too: it may be whole.
        """
        found: list[Garbage] = []
        for shard in self._shards():
            left = [p for p in _listing(shard) if p.name.startswith(_TEMPORARY)]
            found += [(p, "left by a killed deletion") for p in left if not p.is_symlink()]
        for path in self._folders():
            found += self._garbage_of(path, is_current, min_age_s)
        for path in _listing(self.root / _LOCKS):
            if path.suffix == ".lock" and not path.is_symlink() and locks.is_free(path):
                found.append((path, "a lock that nobody holds"))
        return found

    def _garbage_of(self, path: Path, is_current: Current, min_age_s: float) -> list[Garbage]:
        """Of one entry's folder."""
        horizon = time.time() - min_age_s

        def is_old(path: Path) -> bool:
            try:
                return path.lstat().st_mtime < horizon
            except FileNotFoundError:  # a writer renamed it just now
                return False

        try:
            inside = _listing(path)
            entry = self._at(path)
            if entry is None:
                return [(path, "left by a killed write or deletion")] if is_old(path) else []
            if not is_current(entry.identity):
                return [(path, "made by an older version of the code")]
            if entry.damage():
                return [(path, "corrupt")]
            listed = {entry._place(n, r).name for n, r in entry.files().items()}
        except (StoreUnreadable, CorruptEntry):  # the second: replaced while we looked
            return []
        if not listed and all(is_old(p) for p in inside):
            return [(path, "left by a killed write or deletion")]
        return [
            (
                p,
                "left by a killed write"
                if p.name.startswith(_TEMPORARY)
                else "not listed in the manifest",
            )
            for p in inside
            if p.name not in listed | set(_OWN) and not p.is_symlink() and is_old(p)
        ]

    def clear(
        self, found: Iterable[Garbage], is_current: Current, min_age_s: float = _OLD_S
    ) -> list[Garbage]:
        """Remove what :meth:`garbage` found, if it still is garbage once its entry is locked.

        Returns:
            what is still there, and why. An entry that a process is at work on stays.
        """
        left = []
        for path, _ in found:
            try:
                why = self._clear(path, is_current, min_age_s)
            except (Busy, StoreUnwritable, StoreUnreadable) as e:
                why = str(e)
            if why or os.path.lexists(path):
                left.append((path, why or "another process made it again"))
        return left

    def _clear(self, path: Path, is_current: Current, min_age_s: float) -> str:
        """Remove one thing; or say why not."""
        if path.parent == self.root / _LOCKS:
            return "" if locks.remove_free(path) else "a process holds it"
        whole = path.parent.parent == self.root  # an entry, or what a deletion left of one
        if whole and path.name.startswith(_TEMPORARY):
            _remove(path)
            return ""
        folder = path if whole else path.parent
        entry = Entry(self, {}, folder.name)
        with entry.lock(wait=False):
            if not os.path.lexists(path):
                return ""
            if path not in dict(self._garbage_of(folder, is_current, min_age_s)):
                return "it has changed, and counts again"
            entry.discard() if whole else _remove(path)
        return ""
