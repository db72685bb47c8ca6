"""Many small jobs at once: one-thread processes that keep every core busy.

A small network's training step is too short to use several threads, so a run gets one thread and
the machine runs as many at once as it has cores. Every job computes with one thread wherever it
runs, so results do not depend on the number of workers. The pool is joblib's loky: it survives
dead workers, is reused between calls, and works inside notebooks.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from joblib import Parallel, cpu_count, delayed
from joblib.externals.loky import process_executor
from tqdm import tqdm

from companion.core import closing, deadline, locations
from companion.core.errors import BadParameter

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
) -> list[R]:
    """``[work(item) for item in items]``, in that order, on ``workers`` processes.

    Arguments:
        work: a function that can be imported (it travels by name); it may raise.
        items: picklable values.
        workers: 0 = one per core. A GPU has one owner: with a CUDA device jobs run here, in turn.
        label: shown beside the progress bar, when the error stream is a terminal.

    Raises:
        the first error of any job; jobs not yet started are dropped, what was stored stays.
        OutOfTime: see :mod:`companion.core.deadline`; the jobs at work store where they are.
    """
    count = min(resolve_workers(workers), len(items))
    bar: Any = tqdm(total=len(items), desc=label, disable=not sys.stderr.isatty() or not items)
    roots = {
        "COMPANION_DATA": str(locations.data_root()),
        "COMPANION_RUNS": str(locations.runs_root()),
    }
    end = deadline.current()
    out: list[R] = []
    with bar:
        if count <= 1 or torch.device(device).type != "cpu" or closing.active():
            for item in items:
                deadline.stop_if_passed()
                with one_thread():
                    out.append(work(item))
                bar.update()
            return out
        with Parallel(
            count, backend="loky", inner_max_num_threads=1, return_as="generator"
        ) as pool:
            for result in pool(delayed(_call)(work, item, roots, end) for item in items):
                out.append(result)
                bar.update()
    return out
