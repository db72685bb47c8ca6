"""Who works on what, among machines that share a file system and nothing else.

A worker has one file, which it touches every few seconds; what it claims is a hard link to that
file. ``link`` either makes the name or finds it there, on a local disk and on NFS of any version,
whether or not the server keeps locks. So two workers never hold one claim. (The store's own locks,
:mod:`companion.core.locks`, are ``flock``: held by the kernel on one machine; on NFSv4, and on
NFSv3 with its lock daemon, Linux hands them to the server; mounted with ``nolock``, or on file
systems that lock locally, such as Lustre with ``localflock``, they hold on one machine only. They
guard an entry while it is written; claims decide who trains.)

A claim whose worker is dead goes to who comes next. On the same kernel that is known at once: the
worker's file is locked while it lives. Elsewhere a file that nobody touched for ``stale`` seconds,
on the clock of the one who looks, is a dead worker's; clocks of two machines are never compared.
Whoever was taken for dead and wakes up computes the same bits once more, and nothing worse: files
of the store appear whole.

Claims have generations, so that two who take over from the same dead worker cannot both succeed:
the first is ``NAME.1``, whoever takes over makes ``NAME.2``, and the highest one holds.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from companion.core import files
from companion.core.errors import StoreUnwritable, WorkerLost

STALE_S = 180.0
"""Seconds without a sign of life after which a worker counts as dead. NFS shows another machine a
time of change up to a minute late, so less than two minutes are for local disks."""

DEATHS = 3
"""So many workers may die on one piece of work; then it is given up, and said so."""


def boot() -> str:
    """Names the running kernel: equal on two machines only if they are one."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


class Claims:
    """The claims that one worker makes below ``folder``.

    Arguments:
        folder: of the claims; shared by all workers, made if it is missing.
        who: the worker. Whoever comes back under the same name (a requeued task) inherits at once.
        stale: see :data:`STALE_S`; equal for all workers.
        log: file that says what the worker did, for messages.
    """

    def __init__(self, folder: Path, who: str, stale: float = STALE_S, log: str = ""):
        self.folder, self.who, self.stale = folder, who, stale
        self._about = {"who": who, "boot": boot(), "pid": os.getpid(), "log": log}
        self._mine: Path | None = None
        self._seen: dict[tuple[str, int], tuple[int, float]] = {}  # (claim, inode) -> (beat, since)
        self._over = threading.Event()

    def __enter__(self) -> Claims:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mine = self.folder / f"{files.TEMPORARY}{uuid4().hex}-worker"
        self._held = self._mine.open("xb")
        self._about["locked"] = files.hold(self._held)
        self._held.write(json.dumps(self._about).encode())
        self._held.flush()
        os.fsync(self._held.fileno())
        threading.Thread(target=self._beat, name="companion-heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self._over.set()
        self._held.close()
        if self._mine is not None:
            with suppress(OSError):
                self._mine.unlink()

    def _beat(self) -> None:
        while not self._over.wait(self.stale / 12):
            if self._mine is not None:
                with suppress(OSError):
                    os.utime(self._mine)  # without a time: the server's clock

    def _path(self, name: str, generation: int) -> Path:
        return self.folder / f"{name}.{generation}"

    def _top(self, name: str) -> tuple[int, int]:
        """Generation and inode of the claim that holds; (0, 0) without one."""
        for generation in range(DEATHS, 0, -1):
            with suppress(OSError):
                return generation, self._path(name, generation).stat().st_ino
        return 0, 0

    @contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Inside, ``name`` is ours if the value is true; else another worker has it.

        Raises:
            WorkerLost: :data:`DEATHS` workers died on it.
        """
        mine = self._take(name)
        try:
            yield mine is not None
        finally:
            if mine is not None:
                for generation in range(1, mine + 1):  # ours last: until then it holds
                    with suppress(OSError):
                        self._path(name, generation).unlink()

    def _take(self, name: str) -> int | None:
        assert self._mine is not None, "claims are made inside of `with`"
        top, inode = self._top(name)
        if top:
            worker = self._dead(self._path(name, top))
            if worker is None:
                return None
            if top >= DEATHS:
                raise WorkerLost(
                    f"{DEATHS} workers died on it, most often because the machine ran out of "
                    f"memory; the last was {worker.get('who')}."
                )
        path = self._path(name, top + 1)
        try:
            os.link(self._mine, path)
        except FileExistsError:
            # The answer of a server may be lost, and the link asked for once more.
            if not (path.exists() and path.samefile(self._mine)):
                return None
        except OSError as e:
            raise StoreUnwritable(
                f"{self.folder} takes no hard links ({e.strerror or e}), which workers on several "
                "machines claim their jobs by. Point COMPANION_RUNS at another file system."
            ) from e
        if self._top(name)[0] == top + 1 and (not top or self._is(name, top, inode)):
            return top + 1
        with suppress(OSError):  # somebody came between looking and linking
            path.unlink()
        return None

    def _is(self, name: str, generation: int, inode: int) -> bool:
        with suppress(OSError):
            return self._path(name, generation).stat().st_ino == inode
        return False

    def _dead(self, path: Path) -> dict[str, Any] | None:
        """The worker that holds a claim, if it is dead."""
        try:
            with path.open("rb+") as f:
                stat, about = os.fstat(f.fileno()), dict(json.load(f))
                if about["boot"] == self._about["boot"] and about["locked"]:
                    return about if files.hold(f) else None
        except (OSError, ValueError):  # released just now
            return None
        if about["who"] == self.who:
            return about
        beat, since = self._seen.get((path.name, stat.st_ino), (0, 0.0))
        if beat != stat.st_mtime_ns:
            self._seen[path.name, stat.st_ino] = stat.st_mtime_ns, time.monotonic()
            return None
        return about if time.monotonic() - since > self.stale else None
