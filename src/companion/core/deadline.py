"""A time limit that long work keeps by itself: it stores where it is, and raises OutOfTime.

Training asks after every step, the pool before every job, a walk in weight space at every point.
The limit travels with a context variable, and with the jobs of the pool to its processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from companion.core.errors import OutOfTime

# On time.monotonic's clock, which is the same in every process of a machine.
_end: ContextVar[float | None] = ContextVar("companion_deadline", default=None)


_asked = False  # of the whole process


def stop_soon() -> None:
    """From now on the time is up for all work of this process, whatever its limit."""
    global _asked
    _asked = True


def current() -> float | None:
    """The deadline, to hand to another process; None: no limit."""
    return _end.get()


@contextmanager
def until(end: float | None) -> Iterator[None]:
    """Inside, work stops at ``end`` on the clock of ``time.monotonic`` (None: no limit)."""
    token = _end.set(end)
    try:
        yield
    finally:
        _end.reset(token)


def passed() -> bool:
    """Whether the time is up."""
    end = _end.get()
    return _asked or (end is not None and time.monotonic() >= end)


def stop_if_passed() -> None:
    """Stop here if the time is up.

    Raises:
        OutOfTime: it is. What was stored before stays.
    """
    if passed():
        raise OutOfTime("the time limit is reached; what is finished is stored.")
