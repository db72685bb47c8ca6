"""What the benchmarks share: contenders take turns, every time is kept, and where it was measured.

A time belongs to a machine that also does other things. So contenders take turns, the first place
rotates, a turn that other programs disturbed is thrown away and taken again, ratios are taken
within a repeat, and the table shows their median, lowest and highest. (Disturbed turns do not only
blur the result. Two threads that wait for each other at every small matrix product become many
times slower when one of them has to share its core: that would flatter whoever uses one thread.)
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from companion.report import provenance

BUSY = 0.1
"""Share of the cores that other programs may use before and after a turn that counts."""


def busy(seconds: float = 0.4) -> float:
    """Share of all cores in use while this process sleeps; 0 where the system does not say."""

    def read() -> tuple[int, int]:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # all, and idle or waiting for a disk

    if not Path("/proc/stat").exists():
        return 0.0
    total, idle = read()
    time.sleep(seconds)
    total_then, idle_then = read()
    return 1 - (idle_then - idle) / max(total_then - total, 1)


class Patience:
    """How long a benchmark waits, in all, for a quiet machine; 0 seconds: it does not look."""

    def __init__(self, seconds: float):
        self.look = seconds > 0
        self.until = time.monotonic() + seconds

    def quiet(self) -> bool:
        """True if nothing else runs now."""
        return not self.look or busy() < BUSY

    def wait(self) -> None:
        """Return once nothing else runs, or the patience is over."""
        while self.look and time.monotonic() < self.until and not self.quiet():
            time.sleep(1)

    @property
    def over(self) -> bool:
        """True if there is no time left to take turns again."""
        return not self.look or time.monotonic() >= self.until


@dataclass
class Contender:
    """One way to do the work.

    Arguments:
        name: short, for the table; what: one line.
        work: does it, and returns how many units (steps, points of a path) it did.
        before: called before each turn, not timed.
    """

    name: str
    what: str
    work: Callable[[], int]
    before: Callable[[], object] = lambda: None
    units: int = 0
    seconds: list[float] = field(default_factory=list)
    discarded: int = 0
    disturbed: int = 0

    def turn(self, patience: Patience) -> None:
        """Do the work once and keep the time; again if others were at work before or after."""
        while True:
            self.before()
            patience.wait()
            calm = patience.quiet()
            start = time.perf_counter()
            self.units = self.work()
            took = time.perf_counter() - start
            calm = calm and patience.quiet()
            if calm or patience.over:
                self.seconds.append(took)
                self.disturbed += not calm
                return
            self.discarded += 1

    def to_json(self) -> dict[str, Any]:
        """Name, what it is, units a turn, seconds of each turn, median units a second."""
        rate = self.units / statistics.median(self.seconds)
        return {
            "name": self.name,
            "what": self.what,
            "units": self.units,
            "seconds": [round(s, 4) for s in self.seconds],
            "per_second": round(rate, 2),
            "turns_discarded": self.discarded,
            "turns_disturbed": self.disturbed,
        }


def alternate(contenders: Sequence[Contender], repeats: int, patience: Patience) -> None:
    """Give every contender ``repeats`` turns; who starts rotates."""
    for number in range(repeats):
        for place in range(len(contenders)):
            contender = contenders[(number + place) % len(contenders)]
            contender.turn(patience)
            print(f"  {contender.name}: {contender.seconds[-1]:.2f} s", file=sys.stderr)


def ratio(ours: Contender, other: Contender, extra: Contender | None = None) -> dict[str, float]:
    """How many times faster ``ours`` is than ``other``, within each repeat: median, low, high.

    The seconds of ``extra``, if any, are added to ours: what it costs to get ready.
    """
    ready = extra.seconds if extra else [0.0] * len(ours.seconds)
    speed = [
        (ours.units / (mine + more)) / (other.units / theirs)
        for mine, more, theirs in zip(ours.seconds, ready, other.seconds, strict=True)
    ]
    found = {"median": statistics.median(speed), "low": min(speed), "high": max(speed)}
    return {name: round(value, 3) for name, value in found.items()}


def machine() -> dict[str, Any]:
    """Hardware and versions. Call it first: it also says what the load was before."""
    found = provenance.record()
    found["packages"].pop("transformers", None)
    found["os"] = f"{platform.system()} {platform.machine()}"
    found["date"] = datetime.date.today().isoformat()
    if hasattr(os, "getloadavg"):
        found["load_average"] = round(os.getloadavg()[0], 2)
    return found


def write(path: Path, value: dict[str, Any]) -> None:
    """Write a result as JSON that reads well in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"written to {path}", file=sys.stderr)
