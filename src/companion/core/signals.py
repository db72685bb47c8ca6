"""A request to end, whoever makes it: SIGTERM and a closed terminal take the path of Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """A signal asked this process to end. ``number`` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise :class:`Terminated`; what is ignored (nohup) stays so.

    Only the main thread can do that; elsewhere nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise Terminated(number)

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):  # Windows has no SIGHUP
            old = signal.getsignal(number)
            if old != signal.SIG_IGN:
                before[number] = old
                signal.signal(number, end)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def exit_code(error: KeyboardInterrupt) -> int:
    """What a shell expects of a process that ended so: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + int(error.number if isinstance(error, Terminated) else signal.SIGINT)
