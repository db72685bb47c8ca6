"""Plans: many small jobs as lines of JSON, and the workers that take them one by one.

A queue is a folder that all machines see, ``<store>/.work/<name>/``::

    plans/<time>-<digest>/plan.jsonl      a job a line: what it needs, function, its argument
    plans/<time>-<digest>/done/<worker>   what that worker finished, a line a job, only appended to
    plans/<time>-<digest>/stops/<job>     a dot for each time that it was stopped before its end
    plans/<time>-<digest>/claims/         who is at work on what (:mod:`companion.core.claims`)
    logs/  arrays/                        of the workers (:mod:`companion.core.slurm`)

So files and folders grow with the number of workers, not of jobs, and to see what is done costs
what has been written since one last looked. A job is a function of this package, by name, and its
argument (:mod:`companion.core.travel`); what it makes it puts into the run store. A job that fails
is noted with its message and the others go on; what needs it fails, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from companion.core import deadline, files, travel
from companion.core.claims import STALE_S, Claims
from companion.core.errors import (
    BadParameter,
    CompanionError,
    CorruptData,
    OutOfTime,
    StoreUnwritable,
    WorkerLost,
)

log = logging.getLogger("companion")

_LOOK_S = 1.0
"""How often a worker looks what others have finished."""

_PLAN, _OVER = "plan.jsonl", "over"

REQUEUES = 50
"""So many times a job may be stopped (its worker's time is up, or it is preempted) and go on from
where it is. Once more, and it is given up, and said so: a measurement that takes longer than a task
begins anew each time, for ever."""


@dataclass(frozen=True)
class Work:
    """One job.

    Arguments:
        function: of this package, see :func:`companion.core.travel.name_of`.
        item: its argument, on the wire.
        about: it in words, for messages.
        after: numbers of the jobs of the plan that have to be done before; all lower than its own.
    """

    function: str
    item: Any
    about: str = ""
    after: tuple[int, ...] = ()

    def line(self) -> str:
        return json.dumps([list(self.after), self.about, self.function, self.item])

    @staticmethod
    def read(line: bytes | str) -> Work:
        try:
            after, about, function, item = json.loads(line)
            return Work(str(function), item, str(about), tuple(map(int, after)))
        except (ValueError, TypeError) as e:
            raise CorruptData(f"plan: a line is not a job ({e}).") from e

    def run(self) -> Any:
        return travel.function(self.function)(travel.from_wire(self.item))


@dataclass(frozen=True)
class Outcome:
    """How a job ended. ``why``: nothing if it is done. ``log``: the file of the worker's output."""

    job: int
    worker: str
    seconds: float
    why: str = ""
    log: str = ""


@dataclass
class Plan:
    """A plan's folder, and what is known of its jobs.

    Arguments:
        folder: of the plan.
        outcomes: number of a job -> how it ended, as of the last :meth:`look`.
    """

    folder: Path
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    _offsets: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[bytes]:
        """The jobs, unread."""
        return (self.folder / _PLAN).read_bytes().splitlines()

    @property
    def over(self) -> bool:
        """Whether whoever asked for it no longer waits."""
        return (self.folder / _OVER).exists()

    def end(self) -> None:
        """Nobody waits for it any more: workers leave it alone."""
        with contextlib.suppress(OSError):
            (self.folder / _OVER).touch()

    def look(self) -> dict[int, Outcome]:
        """Read what the workers have written since the last look."""
        with contextlib.suppress(FileNotFoundError):
            for path in (self.folder / "done").iterdir():
                start = self._offsets.get(path.name, 0)
                with path.open("rb") as f:  # opened anew: NFS then asks the server
                    f.seek(start)
                    text = f.read()
                whole = text[: text.rfind(b"\n") + 1]
                self._offsets[path.name] = start + len(whole)
                for line in whole.splitlines():
                    with contextlib.suppress(ValueError, TypeError):  # a kill in the middle of it
                        found = Outcome(*json.loads(line))
                        if found.job not in self.outcomes or not found.why:
                            self.outcomes[found.job] = found
        return self.outcomes


@dataclass(frozen=True)
class Queue:
    """A folder of plans, first come, first served."""

    folder: Path

    def plans(self) -> list[Plan]:
        """Those that somebody waits for, the oldest first."""
        with contextlib.suppress(FileNotFoundError):
            found = sorted((self.folder / "plans").iterdir())
            return [p for f in found if (f / _PLAN).is_file() and not (p := Plan(f)).over]
        return []

    def add(self, jobs: Sequence[Work]) -> tuple[Plan, list[int]]:
        """A plan for ``jobs``, or one that has them all already and is being worked on.

        Returns:
            the plan, and the numbers that the jobs have in it, in their order.
        """
        self._tidy()
        lines = [job.line() for job in jobs]
        keys = [_key(line) for line in lines]
        for plan in self.plans():
            numbers = {_key(line): n for n, line in enumerate(plan.lines())}
            if all(key in numbers for key in keys):
                return plan, [numbers[key] for key in keys]
        name = f"{time.time_ns():020d}-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:12]}"
        folder = self.folder / "plans" / name
        try:
            (folder / "done").mkdir(parents=True)
            files.write(folder / _PLAN, "".join(f"{line}\n" for line in lines).encode())
        except OSError as e:
            raise StoreUnwritable(f"plan: {folder} cannot be written ({e.strerror or e}).") from e
        return Plan(folder), list(range(len(lines)))

    def _tidy(self) -> None:
        """Remove plans that have been over for an hour; who still reads one does so within it."""
        for mark in (self.folder / "plans").glob(f"*/{_OVER}"):
            with contextlib.suppress(OSError):
                if time.time() - mark.stat().st_mtime > 3600:
                    shutil.rmtree(mark.parent)


def _key(line: bytes | str) -> str:
    """Names what a line asks for, wherever it stands."""
    job = json.loads(line)
    return hashlib.sha256(json.dumps(job[2:]).encode()).hexdigest()


class Worker:
    """One process that takes jobs from plans until nothing is left, or its time is up.

    Arguments:
        who: names it among all; the same after a requeue.
        stale: see :data:`companion.core.claims.STALE_S`.
        requeues: see :data:`REQUEUES`.
        log: the file of its output.
        say: takes a line for that file.
    """

    def __init__(
        self,
        who: str,
        *,
        stale: float = STALE_S,
        requeues: int = REQUEUES,
        log: str = "",
        say: Callable[[str], None] = lambda text: None,
    ):
        self.who, self.stale, self.requeues = who, stale, requeues
        self.log, self.say = log, say

    def serve(self, queue: Queue, idle: float = 0.0) -> int:
        """Work through all plans of a queue; then wait ``idle`` seconds for another one.

        Returns:
            the number of jobs done here.

        Raises:
            OutOfTime: as :meth:`work_through`.
        """
        done, left, quiet = 0, set[Path](), time.monotonic()
        while True:
            plans = [plan for plan in queue.plans() if plan.folder not in left]
            for plan in plans:
                done += self.work_through(plan)
                left.add(plan.folder)
                quiet = time.monotonic()
            if not plans:
                if time.monotonic() - quiet >= idle:
                    return done
                deadline.stop_if_passed()
                time.sleep(min(_LOOK_S, idle))

    def work_through(self, plan: Plan) -> int:
        """Do what is left of one plan, and wait for what others have in hand, in case they die.

        Raises:
            OutOfTime: the deadline passed; what was at work is stored, and its claim given back.
            StoreUnwritable: no space, no permission.
        """
        lines = plan.lines()
        start = zlib.crc32(self.who.encode()) * len(lines) >> 32  # each at another place
        waiting = [*range(start, len(lines)), *range(start)]
        patience = max(1.5 * self.stale, 2 * _LOOK_S)
        done, moved = 0, time.monotonic()
        with Claims(plan.folder / "claims", self.who, self.stale, self.log) as claims:
            while waiting:
                looked, later = 0.0, []
                for number in waiting:
                    deadline.stop_if_passed()
                    if time.monotonic() - looked > _LOOK_S:
                        plan.look()
                        if plan.over:
                            return done
                        looked = time.monotonic()
                    if number in plan.outcomes:
                        moved = time.monotonic()
                    elif self._attempt(plan, claims, number, lines[number]):
                        done, moved = done + 1, time.monotonic()
                    elif number not in plan.outcomes:
                        later.append(number)
                if len(later) == len(waiting):
                    if time.monotonic() - moved > patience:
                        break  # others have them, and live
                    time.sleep(_LOOK_S)
                waiting = later
        return done

    def _attempt(self, plan: Plan, claims: Claims, number: int, line: bytes) -> bool:
        """Do a job, if that is ours to do now."""
        begun = time.monotonic()
        job = Work.read(line)
        ends = [plan.outcomes.get(n) for n in job.after]
        if None in ends:
            return False
        try:
            if any(end and end.why for end in ends):
                raise BadParameter("what it starts from failed.")
            with claims.take(str(number)) as ours:
                if not ours:
                    return False
                self.say(f"job {number}: {job.about or job.function}")
                self._run(plan, number, job)
                self._note(plan, Outcome(number, self.who, time.monotonic() - begun))
        except (OutOfTime, StoreUnwritable):
            raise
        except Exception as error:
            known = isinstance(error, CompanionError)
            self.say(f"job {number} failed: {'' if known else traceback.format_exc()}{error}")
            why = str(error) if known else f"{type(error).__name__}: {error}"
            took = time.monotonic() - begun
            self._note(plan, Outcome(number, self.who, took, why or "it failed.", self.log))
        return True

    def _run(self, plan: Plan, number: int, job: Work) -> None:
        """Run a job that has not been stopped too often."""
        stops = plan.folder / "stops" / str(number)
        count = stops.stat().st_size if stops.exists() else 0
        if count > self.requeues:
            raise WorkerLost(
                f"it was stopped {count} times, at the end of a worker's time or by a signal, and "
                "did not end. If it only needs longer: more time a task, or more requeues."
            )
        try:
            job.run()
        except OutOfTime:
            with contextlib.suppress(OSError):
                stops.parent.mkdir(exist_ok=True)
                with stops.open("ab") as f:
                    f.write(b".")
            raise

    def _note(self, plan: Plan, outcome: Outcome) -> None:
        plan.outcomes[outcome.job] = outcome
        values = [outcome.job, outcome.worker, round(outcome.seconds, 3), outcome.why, outcome.log]
        try:
            with (plan.folder / "done" / self.who).open("ab") as f:
                f.write(b"\n" + json.dumps(values).encode() + b"\n")  # after half a line, too
        except OSError as e:
            raise StoreUnwritable(
                f"plan: {plan.folder / 'done'} cannot be written ({e.strerror or e})."
            ) from e


def jobs_of(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    after: Sequence[Sequence[int]] = (),
    named: Callable[[Any], str] = lambda item: "",
) -> Iterator[Work]:
    """``work(item)`` for every item, as jobs. Raises as :func:`companion.core.travel.to_wire`."""
    function = travel.name_of(work)
    for number, item in enumerate(items):
        needs = tuple(after[number]) if after else ()
        yield Work(function, travel.to_wire(item), named(item), needs)
