"""Files that appear whole or not at all: written beside their place, flushed, and renamed.

with files.whole(path) as working:
    figure.savefig(working)
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from companion.core.errors import BadParameter

TEMPORARY = ".tmp-"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to; at the end of the block that file takes the place of ``path``.

    After an error, a full disk or Ctrl-C nothing is left of it, and what was at ``path`` stays.
    What a kill leaves goes with the next call. What is no regular file, such as ``/dev/stdout``, is
    written as it is, and through a link the file changes, not the link.

    Raises:
        OSError: it cannot be written.
    """
    if not _replaceable(path):
        yield path
        return
    target = Path(os.path.realpath(path))
    for left in target.parent.glob(f"{TEMPORARY}*-{glob.escape(_short(target))}"):
        remove_abandoned(left)
    with replacing(target) as working:
        yield working


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """:func:`whole` for a folder of our own: whatever is at ``path``, a link too, is replaced."""
    working = path.with_name(f"{TEMPORARY}{uuid4().hex}-{_short(path)}")
    try:
        with working.open("xb") as held:
            hold(held)  # while it is written; a kill lets go
            yield working
            with working.open("rb+") as written:
                os.fsync(written.fileno())
            if path.is_file() and not path.is_symlink():
                shutil.copymode(path, working)
            working.replace(path)
    except BaseException:
        with suppress(OSError):  # a read-only file system refuses even to look for it
            working.unlink()
        raise


def _short(path: Path) -> str:
    """So much of a file's name that a longer one is still a name."""
    return path.name.encode()[:120].decode(errors="ignore")


def write(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Make ``content``, in pieces or not, the file ``path``, whole or not at all.

    Raises as :func:`whole`.
    """
    with whole(path) as working, working.open("wb") as file:
        for piece in [content] if isinstance(content, bytes) else content:
            file.write(piece)


def check(path: Path, option: str) -> None:
    """Refuse a file that :func:`whole` could not write now. Nothing is left, nothing changed.

    Arguments:
        option: what the message calls it, such as ``--json``.

    Raises:
        BadParameter: no such folder, no permission, a read-only file or file system, a folder.
    """
    try:
        if not path.parent.is_dir():
            where = f"{path.parent} to write {path.name} to"
            raise BadParameter(f"{option}: there is no folder {where}.")
        if path.is_dir():
            raise BadParameter(f"{option}: {path} is a folder; the name of a file is needed.")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(0, "it may only be read")
        if _replaceable(path):
            target = Path(os.path.realpath(path))
            probe = target.with_name(f"{TEMPORARY}{uuid4().hex}-probe")
            probe.touch(exist_ok=False)
            probe.unlink()
    except OSError as e:
        raise BadParameter(f"{option}: {path} cannot be written ({e.strerror or e}).") from e


def remove_abandoned(path: Path) -> bool:
    """Remove what a killed :func:`whole` left, unless a process is writing it. True if gone."""
    with suppress(OSError), path.open("rb") as found:
        if hold(found):
            path.unlink()
    return not path.exists()


def _replaceable(path: Path) -> bool:
    """Whether a file of this name can be put in place of what is there: not of a device, a pipe."""
    stream = str(path) in ("/dev/stdout", "/dev/stderr") or path.is_relative_to("/dev/fd")
    return not stream and (path.is_file() or not path.exists())


def hold(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed; False if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: then what a kill leaves stays
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
