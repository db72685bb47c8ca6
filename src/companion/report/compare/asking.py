"""The order in which questions are asked, what a budget has room for, and what stands in the way.

Cheap questions come first. What a question costs is work: seconds of CPU time, which do not depend
on what else the machine does. How long that takes is told by the questions before, of which both is
known, and is told anew before each. A question is left out only where half of its estimate does not
fit; one that takes longer than there is time is stopped between two points of its path.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from companion.core import deadline
from companion.core.errors import CompanionError, OutOfTime
from companion.report.compare.case import Case, plain
from companion.report.compare.questions import Question, asked
from companion.report.compare.value import ANSWERED, IMPOSSIBLE, INVALID, NOT_ASKED, Answer, Json

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
Clock = Callable[[], float]

AT_FIRST = 1.0
"""Seconds as whose weight the estimates before the first measurement count."""

SLACK = 2.0
"""An estimate is taken to be right up to this factor: what is cheaper has been asked before, so
trying costs nobody anything."""


class Asking:
    """The questions to a case, asked one by one.

    Arguments:
        case: networks and data.
        seconds: for all questions together; None: as long as it takes.
        progress: gets a line before each question.
        clock: seconds, from any start.
        work: likewise, of CPU time of this process and its threads.
    """

    def __init__(
        self,
        case: Case,
        seconds: float | None = None,
        progress: Progress | None = None,
        clock: Clock = time.monotonic,
        work: Clock = time.process_time,
    ):
        self.case, self.progress, self.clock, self.work = case, progress, clock, work
        self.end = None if seconds is None else clock() + seconds
        self.questions = asked(case)
        self.answers: dict[str, Answer] = {}
        self._expected = self._taken = AT_FIRST  # work, of questions that look at data
        self._worked = self._waited = AT_FIRST  # work of all questions, and how long it took

    def all(self) -> tuple[Answer, ...]:
        """Every answer, in the order of the report."""
        while waiting := [q for q in self.questions if q.name not in self.answers]:
            names = {q.name for q in waiting}
            ready = [q for q in waiting if not names.intersection((*q.after, *q.needs))]
            question = min(ready, key=self.cost)
            self.answers[question.name] = self.ask(question, waiting)
        return tuple(self.answers[q.name] for q in self.questions)

    def left(self) -> float:
        """Seconds of the budget."""
        return float("inf") if self.end is None else self.end - self.clock()

    def cost(self, question: Question) -> float:
        """Work of a question in seconds, as far as is known; 0 where it cannot be asked."""
        if self.obstacle(question):
            return 0.0
        try:
            return question.cost(self.case) * self._taken / self._expected
        except Exception:  # a network that cannot run: asking says so
            return 0.0

    def takes(self, *questions: Question) -> float:
        """Seconds until they are answered, at the pace of this machine so far."""
        return sum(map(self.cost, questions)) * self._waited / self._worked

    def obstacle(self, question: Question) -> tuple[str, str] | None:
        """Status and reason of a question that has no answer, whatever the time."""
        case = self.case
        if (question.module and case.module is None) or (question.data and not case.splits):
            return IMPOSSIBLE, case.why or "there are no data"
        if question.gated and case.splits:
            ends = self.answers.get("ends")
            if ends is not None and ends.status in (IMPOSSIBLE, INVALID):
                return ends.status, ends.why
            if case.found.get("gates"):
                return INVALID, "; ".join(case.found["gates"])
        for name in question.needs:
            if name in self.answers and not self.answers[name].answered:
                return self.answers[name].status, f"it follows {name}, and {self.answers[name].why}"
        return None

    def ask(self, question: Question, waiting: Sequence[Question]) -> Answer:
        """One answer."""
        about = (question.name, question.title)
        obstacle = self.obstacle(question)
        if obstacle:
            return Answer(*about, *obstacle)
        command, expected, left = question.command(self.case), self.takes(question), self.left()
        if expected > SLACK * max(left, 0):
            why = f"about {_seconds(expected)}, {_seconds(max(left, 0))} left"
            return Answer(*about, NOT_ASKED, why, command=command)
        if self.progress is not None:
            rest = self.takes(*waiting)
            number = len(self.questions) - len(waiting) + 1
            self.progress(
                f"[{number}/{len(self.questions)}] {question.title} (about {_seconds(expected)}; "
                f"all that is left: about {_seconds(rest)})"
            )
        begun, before = self.clock(), self.work()
        values: Json = {}
        try:
            with deadline.until(None if self.end is None else time.monotonic() + left):
                values = plain(question.ask(self.case))
            status, why = ANSWERED, ""
            if question.gated and values.get("valid") is False:
                status, why = INVALID, _failed(values)
        except OutOfTime:
            status, why = NOT_ASKED, f"stopped after {_seconds(self.clock() - begun)}, at the limit"
        except CompanionError as e:
            status, why = IMPOSSIBLE, str(e)
        except Exception as e:  # whatever a network of the user's does
            log.debug("%s failed", question.name, exc_info=True)
            status, why = IMPOSSIBLE, f"it failed: {type(e).__name__}: {e}"
        took, work = self.clock() - begun, self.work() - before
        self._waited += took
        self._worked += work
        if status == ANSWERED and question.data:
            self._expected += question.cost(self.case)
            self._taken += work
        return Answer(*about, status, why, took, command, values, work)


def _failed(values: Json) -> str:
    """The gates that failed, of a line or of layers."""
    line = values["layers"]["full"] if "layers" in values else values["barrier"]
    bad = [g for g in line["gates"] if g["passed"] is False]
    return "; ".join(f"{g['name']} FAIL: {g['detail']}" for g in bad)


def _seconds(value: float) -> str:
    """``8 s``, ``3 min``."""
    return f"{value:.0f} s" if value < 100 else f"{value / 60:.0f} min"
