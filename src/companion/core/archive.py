"""The run store as one file, to carry it elsewhere: ``companion runs export`` and ``import``.

A plain tar of ``<64 hex>/<file>``: of each entry its identity, its manifest and the files that the
manifest lists. An import believes nothing: every member has to be a regular file of an entry, every
key has to be the digest of its identity, an object that names its kind, every file has to match its
checksum, and all of it is read once before the first byte is written. What the store has already
stays as it is. Neither side holds more than one file of the store in memory, an import not even
that. An export takes no lock, so it works on a store that may only be read.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from companion.core import files
from companion.core.errors import BadParameter, CompanionError, CorruptEntry
from companion.core.runs import Entry, Store, digest

_MEMBER = re.compile(r"([0-9a-f]{64})/([A-Za-z0-9_][A-Za-z0-9_.-]*)")
_SMALL = 10_000_000  # bytes of an identity or a manifest, at most
_BLOCK = 1 << 20  # bytes read at once
_HEAD = ("identity.json", "manifest.json")


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
        CorruptEntry: an entry is not as it was written, or its identity is not what its key says.
    """
    if path.exists():
        raise BadParameter(f"{path} exists; give another name, or remove it.")
    count, written, size = 0, 0, 0
    try:
        with files.whole(path) as working, tarfile.open(working, "w") as tar:
            for entry in entries:
                for number, (name, data) in enumerate(_members(entry)):
                    member = tarfile.TarInfo(f"{entry.key}/{name}")  # no owner, no time
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                    size += len(data)
                    written += number >= len(_HEAD)
                count += 1
    except CompanionError:
        raise
    except OSError as error:
        raise BadParameter(f"{path} cannot be written ({error.strerror or error}).") from error
    return Moved(count, written, size)


def _members(entry: Entry) -> Iterator[tuple[str, bytes]]:
    """The members of one entry, as one moment had them: without a lock, so another try may help."""
    if digest(entry.identity) != entry.key:
        raise CorruptEntry(
            f"run store: {entry.path}: identity.json is not what its key says, so no store would "
            "take it from an archive. The command that made it mends it; `companion runs gc` "
            "removes it."
        )
    while True:
        listed = entry.files()
        try:
            # An entry that is replaced while it is read is read again, so all of it is held.
            content = {name: entry._read(name) for name in sorted(listed)}
        except KeyError:
            continue  # taken out meanwhile
        if entry.files() == listed:
            break
    records = {
        name: {"sha256": listed[name]["sha256"], "bytes": len(content[name])} for name in content
    }
    for name, value in zip(
        _HEAD, (entry.identity, {"key": entry.key, "files": records}), strict=True
    ):
        yield name, json.dumps(value).encode()
    yield from content.items()


def read_archive(path: Path, store: Store) -> Moved:
    """Add the entries of an archive to a store; files that are here already stay as they are.

    Raises:
        BadParameter: no such file.
        CorruptEntry: not an archive of :func:`write_archive`, or damaged; nothing was written.
        StoreUnwritable: no space, or no permission; the files written so far are whole.
    """
    try:
        with path.open("rb") as raw, tarfile.open(fileobj=_Careful(raw), mode="r:") as tar:
            entries = _checked(tar, path, store)
            done = size = kept = 0
            for entry, records in entries:
                with entry.lock():
                    present = entry.files()
                    for name, record in records.items():
                        if name in present:
                            kept += 1
                            continue
                        member = tar.getmember(f"{entry.key}/{name}")
                        entry._put(name, record, _same(tar, member, record, path))
                        done, size = done + 1, size + member.size
            return Moved(len(entries), done, size, kept)
    except CompanionError:
        raise
    except OSError as error:
        raise BadParameter(f"{path} cannot be read ({error.strerror or error}).") from error
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError) as error:
        raise _refused(path, str(error) or "it declares what no file can hold") from error


class _Careful(io.RawIOBase):
    """An archive's bytes, for tarfile: nothing is asked for that no honest header asks for."""

    def __init__(self, raw: IO[bytes]):
        self.raw = raw

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.raw.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.raw.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _SMALL:
            raise tarfile.ReadError(f"a header declares {size:,} bytes")
        return self.raw.read(size)


def _refused(path: Path, why: str) -> CorruptEntry:
    return CorruptEntry(
        f"{path} is not a whole archive of `companion runs export` ({why}). Nothing was imported "
        "from it."
    )


def _blocks(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    """A member, a block at a time."""
    stream, left = tar.extractfile(member), member.size
    assert stream is not None  # a regular file
    while left:
        block = stream.read(min(left, _BLOCK))
        if not block:
            raise tarfile.ReadError(f"{member.name} ends early")
        left -= len(block)
        yield block


def _same(
    tar: tarfile.TarFile, member: tarfile.TarInfo, record: dict[str, Any], path: Path
) -> Iterator[bytes]:
    """A member's blocks; at the end an error, if they are not those that were checked."""
    total = hashlib.sha256()
    for block in _blocks(tar, member):
        total.update(block)
        yield block
    if total.hexdigest() != record["sha256"]:
        raise _refused(path, f"{member.name} changed while it was read")


def _checked(
    tar: tarfile.TarFile, path: Path, store: Store
) -> list[tuple[Entry, dict[str, dict[str, Any]]]]:
    """Read the whole archive once; its entries, if every byte is as an export wrote it."""
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    most = path.stat().st_size
    for member in tar:
        match = _MEMBER.fullmatch(member.name)
        if not member.isreg() or member.issparse() or match is None:
            raise _refused(path, f"it holds {member.name!r}, which is no file of an entry")
        if not 0 <= member.size <= most - member.offset_data:
            raise _refused(path, f"{member.name} is said to have {member.size:,} bytes")
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
        return json.loads(b"".join(_blocks(tar, members[name])))

    try:
        identity, manifest = map(document, _HEAD)
        if not isinstance(identity, dict) or not isinstance(identity.get("kind"), str):
            raise ValueError("its identity is no object that names its kind")
        if digest(identity) != key:
            raise ValueError("its identity is not what its key says")
        records = {str(n): dict(r) for n, r in manifest["files"].items()}
        if set(records) != set(members) - set(_HEAD):
            raise ValueError("its files are not those of its manifest")
        for name, record in records.items():
            total = hashlib.sha256()
            for block in _blocks(tar, members[name]):
                total.update(block)
            if (total.hexdigest(), members[name].size) != (record["sha256"], record["bytes"]):
                raise ValueError(f"{name} does not match its checksum")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _refused(path, f"entry {key[:12]}: {error}") from error
    return Entry(store, identity, key), records
