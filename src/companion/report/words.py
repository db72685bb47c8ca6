"""Numbers and verdicts in words, for the sentences and captions that a run fills."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from companion.core.stats import Interval
from companion.report.claims import NOT_TESTABLE, Verdict

Values: TypeAlias = dict[str, float | str]
"""What fills the placeholders of a page or a caption, by name."""

MISSING = "not measured"


def said(value: float | Interval | None, form: str = "{:.2f}", missing: str = MISSING) -> str:
    """A number as a sentence has it: a true minus sign, no minus before a zero, ``12 %``.

    Arguments:
        value: of an interval its value is said; None: there is no number.
        form: Python's format of it.
        missing: what is said for None.
    """
    number = value.value if isinstance(value, Interval) else value
    if number is None:
        return missing
    if math.isnan(number):
        return "no valid value"
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    text = form.format(number)
    if not set(text) & set("123456789"):
        text = text.lstrip("-")
    return text.replace("-", "−").replace("%", " %")


def listed(
    values: Mapping[str, float | Interval | None], form: str = "{:.2f}", missing: str = MISSING
) -> str:
    """``the naive line 6.20; matched 0.31``; what is missing for a mapping without an entry."""
    return "; ".join(f"{k} {said(v, form, missing)}" for k, v in values.items()) or missing


def counted(n: int, thing: str) -> str:
    """``one pair``, ``3 pairs``."""
    return f"one {thing}" if n == 1 else f"{n} {thing}s"


def untested(verdicts: Iterable[Verdict]) -> str:
    """The claims that a run could not test, each with the reason; ``nothing`` if all were."""
    lacking: Sequence[Verdict] = [v for v in verdicts if v.verdict == NOT_TESTABLE]
    return "; ".join(f"{v.claim.id} ({v.note or MISSING})" for v in lacking) or "nothing"


def judged(verdicts: Sequence[Verdict]) -> Values:
    """For a page: the verdict of each claim under its id in small letters, and ``untested``."""
    return {"untested": untested(verdicts), **{v.claim.id.lower(): v.verdict for v in verdicts}}
