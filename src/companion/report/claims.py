"""Reported against reproduced: claims as data, one rule for every verdict, one table to show them.

``data/claims.yaml`` holds what the papers claim. A chapter computes a statistic and hands it over::

    from companion.report import claims

    CLAIMS = {"C01": c01, "C02": c02}  # each takes the study and returns a Statistic
    verdicts = claims.verdicts(CLAIMS, study)
    claims.show(verdicts, scale="digits, MLP 64-100x5-10, 3 inits x 3 pairs, CPU")

:func:`judge` is the only place where a number becomes a word. The table's contents also travel in
the metadata of the cell's output, from where the book collects the front page's scoreboard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from companion.core import closing, codec
from companion.core.errors import BadParameter, CompanionError, NotMeasured
from companion.report import page
from companion.report.claims_file import EVIDENCE, KINDS, Claim, papers, registry
from companion.report.page import as_html as escape

if TYPE_CHECKING:
    from companion.core.stats import Interval  # not imported: it takes torch along

__all__ = [
    "Claim",
    "Need",
    "Statistic",
    "Verdict",
    "again",
    "headline",
    "judge",
    "papers",
    "registry",
    "show",
    "statistic",
    "table",
    "tally",
    "verdicts",
]

S = TypeVar("S")
Need: TypeAlias = tuple[bool, str]

_OURS = ("D", "E")  # shown as ours, never as the paper's
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": lambda value, limit: value < limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    ">=": lambda value, limit: value >= limit,
}

NOT_TESTABLE = "not testable at this scale"

#: Verdict -> the sign beside it. The word is always there: colour and sign only repeat it.
SIGNS = {
    "reproduced": "✓",
    "not reproduced": "✗",
    "undetermined": "≈",
    "reported": "•",
    NOT_TESTABLE: "○",
}


class Recorded(Protocol):
    """What the table needs of a record (:class:`companion.report.recorded.Record`)."""

    @property
    def name(self) -> str:
        """Of the file."""

    @property
    def family(self) -> str:
        """Profiles that share a column."""

    @property
    def short(self) -> str:
        """The scale, in a few words."""

    @property
    def verdicts(self) -> Mapping[str, Verdict]:
        """Claim id to verdict."""


@dataclass(frozen=True)
class Verdict:
    """The outcome for one claim: a word of :data:`SIGNS`, and the number it rests on.

    Arguments:
        n: pairs, or whatever the statistic counts.
        clusters: how many of them are independent (networks that share an initialisation are not).
    """

    claim: Claim
    verdict: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None
    detail: str = ""
    note: str = ""
    clusters: int | None = field(default=None, metadata=codec.OMIT_DEFAULT)


@dataclass(frozen=True)
class Statistic:
    """What a claim's function computes: the arguments of :func:`judge`.

    Arguments:
        value: what the claim's ``statistic`` describes, in its ``unit``, alone or with its
            interval; a truth value for ``op: "true"``; None if it was not measured.
        interval: low and high end of a confidence interval.
        n: how many samples it rests on.
        detail: shown under the value.
        note: shown under the verdict: a caveat, or why it was not testable.
        testable: False if this scale cannot answer the question, whatever came out.
    """

    value: float | Interval | None
    interval: tuple[float, float] | None = None
    n: int | None = None
    detail: str = ""
    note: str = ""
    testable: bool = True


def statistic(
    value: float | Interval | None, *needs: Need, n: int | None = None, detail: str = ""
) -> Statistic:
    """A statistic that stands for something only where all its needs are met.

    Arguments:
        value, n, detail: as :class:`Statistic`.
        needs: whether each is met, and what the note says if it is not.
    """
    lacking = [why for met, why in needs if not met]
    return Statistic(value, n=n, detail=detail, note="; ".join(lacking), testable=not lacking)


def verdicts(functions: Mapping[str, Callable[[S], Statistic]], study: S) -> list[Verdict]:
    """Compute and judge the claims of a paper, in order.

    While a recording is closed, a claim whose function lacks something measured becomes "not
    testable", and the others are judged. Otherwise an error is an error.

    Arguments:
        functions: claim id -> the function that computes its statistic.
        study: what each of them is given.
    """
    found = []
    for id, function in functions.items():
        try:
            got = function(study)
        except Exception as error:
            lacks = isinstance(error, NotMeasured | BadParameter)
            if not closing.active() or (isinstance(error, CompanionError) and not lacks):
                raise
            # Any other error may come of what is missing, or be a mistake: it is named.
            named = "" if isinstance(error, NotMeasured) else f" ({type(error).__name__}: {error})"
            got = Statistic(None, note=closing.WHY + named)
        found.append(
            judge(
                id,
                got.value,
                interval=got.interval,
                n=got.n,
                detail=got.detail,
                note=got.note,
                testable=got.testable,
            )
        )
    return found


def judge(
    id: str,
    statistic: float | Interval | None,
    *,
    n: int | None = None,
    interval: tuple[float, float] | None = None,
    detail: str = "",
    note: str = "",
    testable: bool = True,
) -> Verdict:
    """Turn a statistic into a verdict by the claim's rule. Nothing else in the project does.

    With an interval, the whole interval has to lie on one side of the threshold; where it straddles
    it, the verdict is "undetermined". A statistic that is NaN is undetermined too: no valid number.
    An interval of one independent sample has no width, and tests nothing.

    Arguments:
        id: The claim, such as ``"C01"``.
        statistic: What the claim's ``statistic`` describes, in its ``unit``, alone or with its
            interval; a truth value for ``op: "true"``; None if it was not measured.
        n: How many samples the statistic rests on; by default the interval's own n.
        interval: Low and high end of a confidence interval.
        detail: Shown under the value, such as ``"all 3 initialisations"``.
        note: Shown under the verdict: a caveat, or why it was not testable.
        testable: False if this scale cannot answer the question, whatever came out.

    Returns:
        The verdict: reproduced, not reproduced, undetermined, reported (the rule is ``report``:
        shown, not judged) or not testable at this scale.

    Raises:
        BadParameter: An unknown claim, or an interval that does not contain the statistic.
    """
    claims = registry()
    if id not in claims:
        raise BadParameter(f"claim {id!r} is not in data/claims.yaml. It has: {', '.join(claims)}.")
    claim = claims[id]
    given: Any = statistic  # a number of any library, or an interval
    clusters = getattr(given, "clusters", None)
    if hasattr(given, "low"):
        if interval is not None:
            raise BadParameter(f"{id}: give the interval once, in the statistic or as interval=.")
        interval, n = (given.low, given.high), given.n if n is None else n
        given = given.value
    value = None if given is None else float(given)
    if clusters == 1 and claim.test["op"] != "report":
        testable, note = False, note or "one sample has no interval"
    if interval is not None:
        interval = (float(interval[0]), float(interval[1]))
        if value is not None and not math.isnan(value) and not interval[0] <= value <= interval[1]:
            raise BadParameter(f"{id}: the statistic {value} lies outside its interval {interval}.")
    if value is None or not testable:
        word = NOT_TESTABLE
    elif claim.test["op"] == "report":
        word = "reported"
    else:
        word = _apply(claim.test, value, interval)
    return Verdict(claim, word, value, interval, n, detail, note, clusters)


def again(verdict: Verdict, dataset: str = "") -> Verdict:
    """A verdict of another time, from its statistic and by the rule as it is now.

    Arguments:
        dataset: the name it was measured on; one that the claim is not about cannot test it.
    """
    claim = registry()[verdict.claim.id]
    other = bool(dataset) and not claim.takes(dataset)
    single = verdict.clusters == 1 and claim.test["op"] != "report"
    found = judge(
        verdict.claim.id,
        verdict.value,
        n=verdict.n,
        interval=verdict.interval,
        detail=verdict.detail,
        note=claim.about if other else verdict.note,
        testable=verdict.verdict != NOT_TESTABLE and not other and not single,
    )
    return replace(found, clusters=verdict.clusters)


def show(verdicts: Sequence[Verdict], *, scale: str, recorded: Sequence[Recorded] = ()) -> None:
    """Display the table of reported against reproduced, and hand the verdicts to the book.

    Arguments:
        verdicts: What :func:`judge` returned, in the order of the table.
        scale: What the numbers rest on: dataset, network, samples, hardware.
        recorded: What :func:`companion.report.recorded.load` returned; it fills the last column.

    Raises:
        BadParameter: No verdicts, no scale, or one claim twice.
    """
    if not verdicts or not scale.strip():
        raise BadParameter("claims.show needs at least one verdict, and a scale in words.")
    ids = [v.claim.id for v in verdicts]
    if len(set(ids)) < len(ids):
        raise BadParameter(f"claims.show: a claim is listed twice in {', '.join(ids)}.")
    lines = [f"{v.claim.id}: {v.verdict} ({_measured(v) or 'not measured'})" for v in verdicts]
    from companion.models import in_words

    html = table(verdicts, caption=f"Scale: {in_words(scale)}", recorded=recorded)
    page.emit(
        {"text/html": html, "text/plain": "\n".join(lines)},
        {"claims": [{**codec.to_json(v), "scale": scale} for v in verdicts]},
    )


def table(
    verdicts: Iterable[Verdict],
    *,
    caption: str,
    links: Mapping[str, str] | None = None,
    recorded: Sequence[Recorded] = (),
) -> str:
    """The table as HTML: claim, reported (and where), reproduced here, verdict, recorded.

    Arguments:
        verdicts: The rows.
        caption: Plain text above the table.
        links: Claim id to address; the ids of the rows become links.
        recorded: Records of any chapters, in one column; each value says its name and dataset.
    """
    verdicts = list(verdicts)
    names = papers()
    profiles = list(dict.fromkeys(r.family for r in recorded))
    heads = ["Claim", "Reported", "Reproduced here", "Verdict"]
    if profiles:  # several in one column: each entry says its name
        heads += [f"Recorded, profile {escape(profiles[0])}" if len(profiles) == 1 else "Recorded"]
    rows, tags = [], set()
    for v in verdicts:
        claim = v.claim
        name = escape(claim.id)
        if links and claim.id in links:
            name = f'<a href="{escape(links[claim.id])}">{name}</a>'
        kind = "verdict-" + v.verdict.replace(" ", "-")
        reported, tag = _reported(claim, names)
        tags |= tag
        here = escape(_measured(v) or "—") + _small(v.detail)
        text = escape(claim.text)
        if claim.kind != "empirical":
            text += _small({"theorem": "no experiment", "ours": "our own question"}[claim.kind])
        rows.append(
            f'<tr id="claim-{escape(claim.id)}" data-verdict="{escape(v.verdict)}" '
            f'data-kind="{claim.kind}" data-paper="{escape(names[claim.paper])}">'
            f'<th scope="row">{name} <span class="claim-text">{text}</span></th>'
            f"<td>{reported}</td>"
            f"<td>{here}{_small('rule: ' + claim.rule)}{_changed(claim)}</td>"
            f'<td class="verdict {kind}"><span aria-hidden="true">'
            f"{SIGNS[v.verdict]}</span> {escape(v.verdict)}{_small(v.note)}</td>"
            + (f'<td class="recorded">{_recorded(claim.id, recorded)}</td>' if profiles else "")
            + "</tr>"
        )
    key = "; ".join(f"[{t}] {words}" for t, words in EVIDENCE.items() if t in tags)
    foot = (
        f'<p class="claims-key">Where the reported values were read: {escape(key)}.</p>'
        if key
        else ""
    )
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    return (
        f'<div class="companion-scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="companion-claims"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{foot}"
    )


def tally(verdicts: Iterable[Verdict]) -> str:
    """One sentence: ``13 claims: 8 reproduced, 1 not reproduced, 4 not testable at this scale.``"""
    words = [v.verdict for v in verdicts]
    return f"{len(words)} claim{'s' * (len(words) != 1)}: {_counts(words)}."


def headline(verdicts: Iterable[Verdict]) -> str:
    """What held, as Markdown: what the papers measured first, theorems and our questions apart.

    It also says how many of the verdicts rest on three independent samples or fewer.
    """
    verdicts = list(verdicts)
    parts = []
    for kind, name in KINDS.items():
        words = [v.verdict for v in verdicts if v.claim.kind == kind]
        if words:
            parts.append(f"{name[0].upper() + name[1:]} ({len(words)}): {_counts(words)}.")
    decided = [v for v in verdicts if v.verdict in ("reproduced", "not reproduced")]
    small = sum(1 for v in decided if v.clusters is not None and v.clusters <= 3)
    few = (
        f"{small} of the {len(decided)} verdicts that are decided rest on three independent "
        "samples or fewer; their intervals are as wide as that makes them."
    )
    return " ".join([f"**{parts[0]}**", *parts[1:], *([few] if small else [])]) if parts else ""


def _counts(words: Sequence[str]) -> str:
    return ", ".join(f"{words.count(word)} {word}" for word in SIGNS if word in words)


def _apply(test: Mapping[str, Any], value: float, interval: tuple[float, float] | None) -> str:
    """The verdict of a rule that can pass or fail."""
    if math.isnan(value):
        return "undetermined"
    op = test["op"]
    if op == "true":
        return "reproduced" if value else "not reproduced"

    def passes(x: float) -> bool:
        if op == "between":
            return bool(test["low"] <= x <= test["high"])
        return _COMPARE[op](x, test["value"])

    ends = [passes(x) for x in interval or (value, value)]
    if op == "between" and interval and not any(ends):
        # Both ends outside: the band may still lie inside the interval.
        ends = [False, interval[0] < test["low"] and interval[1] > test["high"]]
    if all(ends):
        return "reproduced"
    return "undetermined" if any(ends) else "not reproduced"


def _measured(v: Verdict) -> str:
    """``1.2 [0.8, 1.7] points, n = 9``; empty if nothing was measured."""
    if v.value is None:
        return ""
    if v.claim.test["op"] == "true":
        text = "no valid value" if math.isnan(v.value) else ("yes" if v.value else "no")
    else:
        text = _number(v.claim, v.value)
        if v.interval is not None:
            text += f" [{', '.join(_number(v.claim, x) for x in v.interval)}]"
        if v.claim.unit:
            text += f" {v.claim.unit}"
    return text + (f", n\u00a0=\u00a0{v.n}" if v.n is not None else "")


def _number(claim: Claim, x: float) -> str:
    if math.isnan(x):
        return "no valid value"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    return claim.format.format(x).replace("-", "−")


def _recorded(id: str, records: Sequence[Recorded]) -> str:
    """One cell: verdict, value and scale of each record that judged the claim."""
    parts = []
    for record in records:
        if v := record.verdicts.get(id):
            parts.append(
                f'<div class="verdict verdict-{v.verdict.replace(" ", "-")}">'
                f'<span aria-hidden="true">{SIGNS[v.verdict]}</span> {escape(v.verdict)}</div>'
                + escape(_measured(v) or "—")
                + _small(record.short)
            )
    return "".join(parts) or "—"


def _reported(claim: Claim, names: Mapping[str, str]) -> tuple[str, set[str]]:
    """The cell of the reported value, and the evidence tags it uses."""
    if claim.evidence == "U":
        return "—" + _small("no value that we could verify"), set()
    paper = "ours, not the paper's" if claim.evidence in _OURS else names[claim.paper]
    source = ", ".join(part for part in (paper, claim.where) if part)
    return escape(claim.reported) + _small(f"{source} [{claim.evidence}]"), {claim.evidence}


def _changed(claim: Claim) -> str:
    """Folded: after what the rule was changed, and from what."""
    if not claim.changed:
        return ""
    return (
        '<details class="claim-note"><summary>The rule was changed.</summary>'
        f"{escape(claim.changed)}</details>"
    )


def _small(text: str) -> str:
    return f'<small class="claim-note">{escape(text)}</small>' if text else ""
