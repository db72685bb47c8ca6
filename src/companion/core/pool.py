"""Many small jobs at once: one-thread processes that keep every core busy.

A small network's training step is too short to use several threads, so a run gets one thread and
the machine runs as many at once as it has cores. Every job computes with one thread wherever it
runs, so results do not depend on the number of workers. The pool is joblib's loky: it is reused
between calls, and works inside notebooks. A worker that is killed ends the call with one message,
and a worker whose parent is gone ends by itself, whatever took the parent away.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from joblib import Parallel, cpu_count, delayed
from joblib.externals.loky import get_reusable_executor, process_executor
from joblib.externals.loky.backend import resource_tracker
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from companion.core import closing, deadline, locations, locks, slurm
from companion.core.errors import BadParameter, WorkerLost

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread, so sums round alike on any number of workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_workers(workers: int) -> int:
    """Number of processes: ``workers``, or one per usable core if it is 0.

    Raises:
        BadParameter: negative.
    """
    if workers < 0:
        raise BadParameter(f"workers: {workers} must be 0 (one per core) or more.")
    return workers or int(cpu_count())


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@functools.cache
def keep_memory() -> bool:
    """Let this process keep what it frees, where the C library is glibc; True if it does.

    glibc gives blocks of a few megabytes back to the kernel when they are freed, and a training
    step frees all its activations: their pages are then zeroed and mapped again in every step, a
    tenth and more of the time of a small convolutional network. Blocks of 128 MB and more (a whole
    epoch's images) still go back, so that a worker does not grow. The bits stay the same.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library, such as musl
        return False
    return all(
        [set_option(_M_MMAP_THRESHOLD, 1 << 27) == 1, set_option(_M_TRIM_THRESHOLD, 1 << 30) == 1]
    )


_LOOK_S = 0.5
"""How often a worker looks whether its parent is still there."""


def _begin_worker(parent: int, who: str) -> None:
    """What a worker does first: it leaves Ctrl-C, and a terminal that closes, to its parent, and
    ends when that is gone."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    locks.work_for(who)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os._exit(1)  # what is stored stays; locks go with the process

    threading.Thread(target=look, name="companion-parent", daemon=True).start()


def _start_tracker() -> None:
    """Start loky's own process, which clears up behind workers: it outlives a closed terminal.

    It ignores other signals by itself; killed by this one, its successor complains of all that it
    does not know.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP"):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited by what is started
        try:
            resource_tracker.ensure_running()
        finally:
            signal.signal(signal.SIGHUP, before)


def end_workers() -> None:
    """End all workers now, at work or idle; a later call starts others."""
    get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


def _call(work: Callable[[T], R], item: T, roots: dict[str, str], end: float | None) -> R:
    # loky keeps its workers, and with them the environment of the call that started them.
    os.environ.update(roots)
    # It also ends a worker that has grown by 300 MB since its first job, as leaking: here that is a
    # second dataset, kept on purpose, and the next worker would only have to load it again.
    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize
    keep_memory()
    with one_thread(), deadline.until(end):
        deadline.stop_if_passed()
        return work(item)


def run_all(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    workers: int = 0,
    device: str = "cpu",
    label: str = "",
    after: Sequence[Sequence[int]] = (),
    named: Callable[[T], str] = lambda item: "",
) -> list[R]:
    """``[work(item) for item in items]``, in that order, on ``workers`` processes.

    Where an engine was asked for (:mod:`companion.core.slurm`), the workers are a cluster's.

    Arguments:
        work: a function that can be imported (it travels by name); it may raise.
        items: picklable values.
        workers: 0 = one per core. A GPU has one owner: with a CUDA device jobs run here, in turn.
        label: shown beside the progress bar, when the error stream is a terminal.
        after: for each item, which items (by number, lower than its own) must be done before it.
        named: an item in words, for messages about work that is done elsewhere.

    Raises:
        the first error of any job; jobs not yet started are dropped, what was stored stays.
        WorkerLost: a worker was killed.
        OutOfTime: see :mod:`companion.core.deadline`; the jobs at work store where they are.
        on a cluster: see :func:`companion.core.slurm.run_all`.
    """
    engine = slurm.asked_for()
    if engine and items and not closing.active():
        return slurm.run_all(engine, work, items, after=after, named=named, label=label)
    found: dict[int, R] = {}
    bar: Any = tqdm(total=len(items), desc=label, disable=not sys.stderr.isatty() or not items)
    with bar:
        for wave in _waves(len(items), after):
            part = [items[i] for i in wave]
            done = _run_wave(work, part, workers, device, label, bar)
            found |= dict(zip(wave, done, strict=True))
    return [found[i] for i in range(len(items))]


def _waves(count: int, after: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of the items, in groups that need nothing but the groups before them."""
    place: list[int] = []
    for needs in after or [()] * count:
        place.append(1 + max((place[n] for n in needs), default=-1))
    return [[i for i, p in enumerate(place) if p == n] for n in range(max(place, default=-1) + 1)]


def _run_wave(
    work: Callable[[T], R], items: Sequence[T], workers: int, device: str, label: str, bar: Any
) -> list[R]:
    """:func:`run_all` here, for items that need none of each other."""
    count = min(resolve_workers(workers), len(items))
    roots = {
        "COMPANION_DATA": str(locations.data_root()),
        "COMPANION_RUNS": str(locations.runs_root()),
        "COMPANION_ENGINE": "local",
    }
    end = deadline.current()
    out: list[R] = []
    if count <= 1 or torch.device(device).type != "cpu" or closing.active():
        for item in items:
            deadline.stop_if_passed()
            with one_thread():
                out.append(work(item))
            bar.update()
        return out
    _start_tracker()
    try:
        with Parallel(
            count,
            backend="loky",
            inner_max_num_threads=1,
            return_as="generator",
            initializer=_begin_worker,
            initargs=(os.getpid(), locks.me()),
        ) as pool:
            for result in pool(delayed(_call)(work, item, roots, end) for item in items):
                out.append(result)
                bar.update()
    except TerminatedWorkerError as error:
        raise WorkerLost(
            f"{label or 'the work'}: a worker process was killed, most often because the "
            f"machine ran out of memory. Try fewer workers than {count}. What is finished is "
            "stored; the same command continues from there."
        ) from error
    except KeyboardInterrupt:
        end_workers()
        raise
    return out
