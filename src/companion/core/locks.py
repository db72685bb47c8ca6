"""Locks between processes, that say for whom one waits.

Whoever holds a lock has written into its file who it is; the file goes when the lock does. A killed
process holds nothing.
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from companion.core import deadline
from companion.core.errors import Busy

log = logging.getLogger("companion")

WAITING = "waiting for it to finish"
"""How the line ends in which a process says that it waits."""

QUIET_S = 1.0
"""Whoever waits longer says so."""

_worker_of = ""  # of a worker process: who started it


@contextmanager
def held(path: Path, what: str, *, wait: bool = True) -> Iterator[None]:
    """Inside, no other process holds the lock file ``path``.

    Arguments:
        path: its folder is made.
        what: it is about, for messages.
        wait: whether to wait for another process, or to raise.

    Raises:
        Busy: another process has it. OutOfTime: the deadline passed while waiting.
        OSError: the lock cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=QUIET_S if wait else 0)
    except Timeout:
        said = f"{what} is being worked on by {holder(path)}"
        if not wait:
            raise Busy(f"{said}.") from None
        log.warning("%s; %s", said, WAITING)
        while not lock.is_locked:
            deadline.stop_if_passed()
            with suppress(Timeout):
                lock.acquire(timeout=1.0)
    try:
        with suppress(OSError):  # no space for a name is no reason to stop
            path.write_text(me(), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is ours: whoever waits on it looks again
        lock.release()


def remove_free(path: Path) -> bool:
    """Remove a lock file that no process holds; True if it is gone."""
    lock = FileLock(path)
    with suppress(OSError, Timeout):
        lock.acquire(timeout=0)
        with suppress(OSError):
            path.unlink()
        lock.release()
    return not path.exists()


def is_free(path: Path) -> bool:
    """Whether no process holds the lock file; False if it cannot be opened."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (OSError, Timeout):
        return False
    lock.release()
    return True


def me() -> str:
    """This process in words: its number, its machine, its command."""
    if _worker_of:
        return f"process {os.getpid()}, a worker of {_worker_of}"
    path = Path(sys.argv[0] or "python")
    name = path.parent.name if path.name == "__main__.py" else path.name  # of python -m
    command = shlex.join([name, *sys.argv[1:]])
    command = command if len(command) <= 80 else f"{command[:80]}…"
    return f"process {os.getpid()} on {socket.gethostname()} ({command})"


def work_for(parent: str) -> None:
    """Say in :func:`me` that this process is a worker of ``parent``."""
    global _worker_of
    _worker_of = parent


def holder(path: Path) -> str:
    """Who holds a lock, in words."""
    with suppress(OSError, UnicodeDecodeError):
        if text := path.read_text(encoding="utf-8"):
            return text
    return "another process"
