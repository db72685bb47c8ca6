"""The run store as one file, to carry it elsewhere: ``companion runs export`` and ``import``.

A plain tar of ``<64 hex>/<file>``: of each entry its identity, its manifest and the files that the
manifest lists. An import believes nothing: every member has to be a regular file of an entry, every
key has to be the digest of its identity, every file has to match its checksum, and all of it is
read once before the first byte is written. What the store has already stays as it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from companion.core.errors import BadParameter, CorruptEntry, StoreUnwritable
from companion.core.runs import Entry, Store, digest

_MEMBER = re.compile(r"([0-9a-f]{64})/([A-Za-z0-9_][A-Za-z0-9_.-]*)")
_SMALL = 10_000_000  # bytes of an identity or a manifest, at most


@dataclass(frozen=True)
class Moved:
    """What an export or import did: entries, files and bytes moved, and files that were here."""

    entries: int
    files: int
    bytes: int
    kept: int = 0


def chosen_entries(
    store: Store, kinds: Collection[str] = (), keys: Iterable[str] = ()
) -> list[Entry]:
    """The entries of these kinds (none: all), or with these keys (prefixes; none: all)."""
    entries = [store.find(key) for key in keys] or list(store.entries())
    return [e for e in entries if not kinds or e.identity.get("kind") in kinds]


def write_archive(entries: Iterable[Entry], path: Path) -> Moved:
    """Write entries to a new archive; it appears whole or not at all.

    Raises:
        BadParameter: the file exists, or cannot be written.
        CorruptEntry: an entry is not as it was written.
    """
    if path.exists():
        raise BadParameter(f"{path} exists; give another name, or remove it.")
    working = path.with_name(f".tmp-{uuid4().hex}-{path.name}")
    count, files, size = 0, 0, 0
    try:
        with tarfile.open(working, "w") as tar:
            for entry in entries:
                with entry.lock():  # a run at work on it waits
                    content = {name: entry._read(name) for name in sorted(entry.files())}
                records = {
                    name: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)}
                    for name, c in content.items()
                }
                head = {
                    "identity.json": entry.identity,
                    "manifest.json": {"key": entry.key, "files": records},
                }
                whole = {name: json.dumps(value).encode() for name, value in head.items()} | content
                for name, data in whole.items():
                    member = tarfile.TarInfo(f"{entry.key}/{name}")  # no owner, no time
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                    size += len(data)
                count, files = count + 1, files + len(content)
        with working.open("rb") as written:
            os.fsync(written.fileno())
        working.replace(path)
    except OSError as error:
        raise BadParameter(f"{path} cannot be written ({error.strerror or error}).") from error
    finally:
        with suppress(OSError):
            working.unlink()
    return Moved(count, files, size)


def read_archive(path: Path, store: Store) -> Moved:
    """Add the entries of an archive to a store; files that are here already stay as they are.

    Raises:
        BadParameter: no such file.
        CorruptEntry: not an archive of :func:`write_archive`, or damaged; nothing was written.
        StoreUnwritable: no space, or no permission; the files written so far are whole.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            entries = _checked(tar, path, store)
            files = size = kept = 0
            for entry, records in entries:
                with entry.lock():
                    present = entry.files()
                    for name, record in records.items():
                        if name in present:
                            kept += 1
                            continue
                        content = _read(tar, tar.getmember(f"{entry.key}/{name}"))
                        if hashlib.sha256(content).hexdigest() != record["sha256"]:
                            raise _refused(path, f"{name} of {entry.key[:12]} changed while read")
                        entry._write(name, content)
                        files, size = files + 1, size + len(content)
            return Moved(len(entries), files, size, kept)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        if isinstance(error, StoreUnwritable):
            raise
        raise BadParameter(f"{path} cannot be read ({error.strerror}).") from error
    except (tarfile.TarError, EOFError) as error:
        raise _refused(path, str(error)) from error


def _refused(path: Path, why: str) -> CorruptEntry:
    return CorruptEntry(
        f"{path} is not a whole archive of `companion runs export` ({why}). Nothing was imported "
        "from it."
    )


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    content = stream.read() if stream else b""
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} ends early")
    return content


def _checked(
    tar: tarfile.TarFile, path: Path, store: Store
) -> list[tuple[Entry, dict[str, dict[str, Any]]]]:
    """Read the whole archive once; its entries, if every byte is as an export wrote it."""
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        match = _MEMBER.fullmatch(member.name)
        if not member.isreg() or member.issparse() or match is None:
            raise _refused(path, f"it holds {member.name!r}, which is no file of an entry")
        key, name = match.groups()
        if name in members.setdefault(key, {}):
            raise _refused(path, f"it holds {member.name!r} twice")
        members[key][name] = member
    return [_entry(tar, path, store, key, m) for key, m in members.items()]


def _entry(
    tar: tarfile.TarFile, path: Path, store: Store, key: str, members: dict[str, tarfile.TarInfo]
) -> tuple[Entry, dict[str, dict[str, Any]]]:
    def document(name: str) -> Any:
        if name not in members or members[name].size > _SMALL:
            raise ValueError(f"{name} is missing or too large")
        return json.loads(_read(tar, members[name]))

    try:
        identity, manifest = document("identity.json"), document("manifest.json")
        if digest(identity) != key:
            raise ValueError("its identity is not what its key says")
        records = {str(n): dict(r) for n, r in manifest["files"].items()}
        if set(records) != set(members) - {"identity.json", "manifest.json"}:
            raise ValueError("its files are not those of its manifest")
        for name, record in records.items():
            if hashlib.sha256(_read(tar, members[name])).hexdigest() != record["sha256"]:
                raise ValueError(f"{name} does not match its checksum")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _refused(path, f"entry {key[:12]}: {error}") from error
    return Entry(store, identity, key), records
