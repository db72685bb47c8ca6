"""What the numbers mean: thresholds, each with its reason, and the findings that follow from them.

A verdict is *yes* or *no* where the whole 95 % interval over the examples lies on one side of a
threshold, else *undetermined*; of networks that failed a gate nothing is said. Thresholds are the
book's, and marked where they are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from companion.report.compare.value import (
    INVALID,
    NO,
    NOT_ASKED,
    UNDETERMINED,
    YES,
    Answer,
    Finding,
    Json,
)


@dataclass(frozen=True)
class Threshold:
    """A number that decides, and why it is this one.

    Arguments:
        yes: up to here (or from here on) the verdict is yes.
        no: from here on (or up to here) it is no; between the two nothing is decided.
        rule: in words, as it stands beside a verdict.
        reason: where it comes from.
        chapter: the page of the book that explains it.
    """

    yes: float
    no: float
    rule: str
    reason: str
    chapter: str


THRESHOLDS: Mapping[str, Threshold] = {
    "error": Threshold(
        *(2.0, 2.0, "an error barrier of at most 2 percentage points"),
        "the margin within which Frankle et al. 2020 call networks stable",
        "01_instability",
    ),
    "loss": Threshold(
        *(0.03, 0.03, "a loss barrier of at most 0.03 nats"),
        "of language models, which err at most positions: the line of our claim G03 (ours)",
        "05_gpt",
    ),
    "moved": Threshold(
        *(0.05, 0.5, "at most 5 % of the units change their place (no: more than half)"),
        "in one order units stay; of independent networks nearly all move (ours)",
        "02_git_rebasin",
    ),
    "cosine": Threshold(
        *(0.5, 0.1, "the matrices of both have a cosine of at least ½ (no: less than a tenth)"),
        "independent matrices are at right angles, and training turns them little (ours)",
        "02_git_rebasin",
    ),
    "layer": Threshold(
        *(0.5, 0.1, "one layer alone makes half of the barrier (no: less than a tenth)"),
        "a tenth is claim B02's line for a layer without a barrier, the half is ours",
        "04_layerwise",
    ),
    "features": Threshold(
        *(
            0.25,
            0.5,
            "at the output E[1 − cos½] is at most ¼ of E[1 − cos(A, B)] (no: more than half)",
        ),
        "¼ is claim A02's line for linearly connected features, the half is ours",
        "03_llfc",
    ),
    "merge": Threshold(
        *(0.0, 0.0, "better than the better of them, by more than the error of the examples"),
        "a merge that is no better than one of its ends is not worth its making",
        "02_git_rebasin",
    ),
    "triangle": Threshold(
        *(0.05, 0.25, "at most 5 % of the units come elsewhere by way of a third network"),
        "0 where all are one network in other orders, 1 − 1/n of n units at random (ours)",
        "02_git_rebasin",
    ),
}
"""By name; those of barriers by the metric that is judged."""

PARALLEL = 1e-9
"""Features with a smaller 1 - cos are the same, up to rounding."""

UNITS = {"error": ("points of error", "{:.2f}"), "loss": ("nats", "{:.4f}")}


def decided(value: float, margin: float, threshold: Threshold) -> str:
    """The verdict on a number that is known up to ``margin``: three-valued.

    NaN is undetermined. Where ``yes`` is above ``no``, large numbers are a yes.
    """
    sign = -1 if threshold.yes > threshold.no else 1
    value, yes, no = sign * value, sign * threshold.yes, sign * threshold.no
    if value + margin <= yes:
        return YES
    return NO if value - margin > no else UNDETERMINED


def all_low(heights: Iterable[tuple[float, float]], metric: str) -> str:
    """The verdict on barriers together: no if one is high, yes if all are low.

    Arguments:
        heights: of each line its height and half the width of that's 95 % interval.
        metric: ``error`` or ``loss``, whose threshold counts.
    """
    said = [decided(*one, THRESHOLDS[metric]) for one in heights]
    return NO if NO in said else YES if set(said) == {YES} else UNDETERMINED


def findings(names: Sequence[str], answers: Iterable[Answer]) -> tuple[Finding, ...]:
    """The verdict on networks, line by line."""
    by = {a.name: a for a in answers}
    if len(names) > 2:
        return (
            _all_connected(by, "pairs"),
            _agree(by),
            _all_connected(by, "matched_pairs"),
            _merge(by, "merged_c2m3" if _said(by, "merged_c2m3") else "merged_many"),
        )
    return (
        _same(by),
        _start(by),
        _connected(by),
        _matched(by),
        _layers(by),
        _features(by),
        _merge(by, "merged"),
    )


def _said(answers: Mapping[str, Answer], name: str) -> bool:
    return name in answers and answers[name].answered


def _silent(
    question: str, threshold: str, answers: Mapping[str, Answer], *names: str
) -> Finding | None:
    """The finding where no answer says anything; None where one does."""
    if any(_said(answers, name) for name in names):
        return None
    first = next((answers[n] for n in names if n in answers), None)
    why = "it was not asked" if first is None else first.why
    status = "not asked" if first is None else first.status
    verdict = UNDETERMINED if status == INVALID else NOT_ASKED
    said = {INVALID: "INVALID", NOT_ASKED: "Not asked"}.get(status, "Could not be asked")
    sentence = f"{said}: {why}" + ("" if why.endswith((".", ".)")) else ".")
    return Finding(question, verdict, sentence, THRESHOLDS[threshold].rule, names)


def _number(value: float, metric: str, margin: float | None = None) -> str:
    unit, form = UNITS[metric]
    text = form.format(value).replace("-", "−")
    more = "" if margin is None else f" ± {form.format(margin)}"
    return f"{text}{more} {unit}"


@dataclass(frozen=True)
class _Height:
    """A barrier as it is judged."""

    value: float
    margin: float
    metric: str
    split: str

    @property
    def verdict(self) -> str:
        return decided(self.value, self.margin, THRESHOLDS[self.metric])

    def __str__(self) -> str:
        return f"{_number(self.value, self.metric, self.margin)} on {self.split} data"


def _height(answer: Answer | None, ends: Answer | None) -> _Height | None:
    if answer is None or not answer.answered or "heights" not in answer.values or ends is None:
        return None
    split, metric = ends.values["split"], ends.values["metric"]
    value = answer.values["heights"][split][metric]["mean"]
    if value is None:
        return None
    return _Height(value, answer.values["margin"][split][metric], metric, split)


def _metric(answers: Mapping[str, Answer]) -> str:
    ends = answers.get("ends")
    return str(ends.values["metric"]) if ends is not None and ends.answered else "error"


def _same(answers: Mapping[str, Answer]) -> Finding:
    question, rule = "Same network?", "equal weights, bit for bit, in any order of their units"
    weights, matched = answers["weights"], answers.get("matched")
    if not weights.answered:
        return Finding(question, NOT_ASKED, f"Could not be asked: {weights.why}.", rule)
    found = weights.values
    because = ("weights",)
    if "equal tensors" not in found:
        return Finding(question, NO, found["apart"], rule, because)
    if found["equal tensors"] == found["tensors"]:
        return Finding(question, YES, "All weights are equal, bit for bit.", rule, because)
    far = (
        f"The weights are {found['distance']:.4g} apart, {_share(found['relative'])} of their "
        f"norm; {found['equal tensors']} of {found['tensors']} tensors are equal."
    )
    if matched is None or not matched.answered:
        return Finding(
            question, UNDETERMINED, f"{far} Whether in another order was not asked.", rule, because
        )
    if matched.values["equal"]:
        sentence = "B is A with its units in another order, bit for bit."
        return Finding(question, YES, sentence, rule, ("weights", "matched"))
    return Finding(question, NO, far, rule, ("weights", "matched"))


def _start(answers: Mapping[str, Answer]) -> Finding:
    """By the units that matching moves, or, where there are none to count, by the angle."""
    question, weights, matched = "Same start?", answers["weights"], answers.get("matched")
    if matched is not None and matched.answered and "moved" in matched.values["matching"]:
        moved, rule = matched.values["matching"]["moved"], THRESHOLDS["moved"]
        sentence = f"Matching by weights moves {_share(moved)} of the units."
        return Finding(question, decided(moved, 0.0, rule), sentence, rule.rule, ("matched",))
    rule = THRESHOLDS["cosine"]
    found = weights.values.get("cosine of matrices")
    if found is None:
        why = weights.values.get("apart", "There is no angle between the weights.")
        return Finding(question, NOT_ASKED, why, rule.rule, ("weights",))
    cosine = f"{found:.3f}".replace("-", "−")
    sentence = f"The matrices of A and B have a cosine of {cosine}, 0 being at random."
    return Finding(question, decided(found, 0.0, rule), sentence, rule.rule, ("weights",))


def _share(value: float | None) -> str:
    if value is None:
        return "no share"
    return f"{value:.0%}".replace("%", " %")


def _line(
    question: str, answers: Mapping[str, Answer], names: Sequence[str], words: str
) -> Finding:
    """A finding of the lowest of some lines: one that is low suffices."""
    metric = _metric(answers)
    threshold = THRESHOLDS[metric]
    silent = _silent(question, metric, answers, *names)
    if silent:
        return silent
    heights = {n: _height(answers.get(n), answers.get("ends")) for n in names}
    known = {n: h for n, h in heights.items() if h is not None}
    if not known:
        sentence = "Could not be asked: there are no data to measure a barrier on."
        return Finding(question, NOT_ASKED, sentence, threshold.rule, tuple(names))
    order = (YES, UNDETERMINED, NO)
    name, best = min(known.items(), key=lambda e: (order.index(e[1].verdict), e[1].value))
    sentence = words.format(height=best, by=_BY[name])
    return Finding(question, best.verdict, sentence, threshold.rule, tuple(known))


_BY = {"barrier": "", "matched": "weights", "activation_matched": "activations"}


def _connected(answers: Mapping[str, Answer]) -> Finding:
    return _line("Same basin?", answers, ["barrier"], "The straight line rises by {height}.")


def _matched(answers: Mapping[str, Answer]) -> Finding:
    return _line(
        "Connected after matching?",
        answers,
        ["matched", "activation_matched"],
        "With B brought to A by {by} the line rises by {height}.",
    )


def _layers(answers: Mapping[str, Answer]) -> Finding:
    question, threshold = "Does one layer make the barrier?", THRESHOLDS["layer"]
    silent = _silent(question, "layer", answers, "layers")
    if silent:
        return silent
    whole = _height(answers.get("barrier"), answers.get("ends"))
    if whole is not None and whole.verdict == YES:
        return Finding(
            question, NO, "There is no barrier to speak of.", threshold.rule, ("barrier", "layers")
        )
    ends, found = answers["ends"], answers["layers"].values
    split = ends.values["split"]
    heights = found["heights"]
    (full,) = heights["full"][split]["loss"].values()
    total = next(iter(full.values()))
    single = {
        label: max(v for v in both.values() if v is not None)
        for label, both in heights["single"][split]["loss"].items()
    }
    ranked = sorted(single, key=lambda label: -single[label])
    share = single[ranked[0]] / total if total > 0 else math.nan
    first = ", ".join(f"{n} {_number(single[n], 'loss')}" for n in ranked[:3])
    sentence = (
        f"Half-way the whole network's {split} loss is {_number(total, 'loss')} above its ends, "
        f"single layers' at most: {first}."
    )
    return Finding(question, decided(share, 0.0, threshold), sentence, threshold.rule, ("layers",))


def _features(answers: Mapping[str, Answer]) -> Finding:
    question, threshold = "Are features linearly connected?", THRESHOLDS["features"]
    silent = _silent(question, "features", answers, "features")
    if silent:
        return silent
    (found,) = answers["features"].values["features"].values()
    ratios = {
        layer["name"]: layer["gap"]["0.5"]["mean"] / layer["baseline"]["mean"]
        for layer in found["layers"]
        if _apart(layer["baseline"]["mean"]) and layer["gap"]["0.5"]["mean"] is not None
    }
    if not ratios:
        sentence = "All features of A and B are parallel: there is nothing to compare."
        return Finding(question, UNDETERMINED, sentence, threshold.rule, ("features",))
    names = list(ratios)
    last, middle = names[-1], names[(len(names) - 1) // 2]
    sentence = (
        f"Between the network half-way and the features half-way lies {ratios[last]:.2f} of what "
        f"lies between A and B at the output ({last}), {ratios[middle]:.2f} in the middle "
        f"({middle})."
    )
    verdict = decided(ratios[last], 0.0, threshold)
    return Finding(question, verdict, sentence, threshold.rule, ("features",))


def _apart(value: object) -> bool:
    """Whether 1 - cos is more than rounding: the features of one network twice are parallel."""
    return isinstance(value, int | float) and value > PARALLEL


def _merge(answers: Mapping[str, Answer], name: str) -> Finding:
    question, threshold = "Is a merge worth it?", THRESHOLDS["merge"]
    silent = _silent(question, "merge", answers, name)
    if silent:
        return silent
    ends, found = answers["ends"].values, answers[name].values
    if not all(ends["trained"].values()):
        bad = ", ".join(n for n, ok in ends["trained"].items() if not ok)
        sentence = f"INVALID: {bad} failed a gate."
        return Finding(question, UNDETERMINED, sentence, threshold.rule, ("ends", name))
    metric, split = ends["metric"], ends["split"]
    chosen, best = found["chosen"], found["best end"]
    one, rows = found["against"][chosen], found["networks"]
    above, margin = one["above"][metric], one["margin"][metric]
    verdict = decided(above, margin, threshold)
    how = "above" if above >= 0 else "below"
    unit, form = ("%", "{:.2f}") if metric == "error" else ("nats", "{:.4f}")
    values = {
        n: f"{form.format(rows[n][split][metric])} {unit}" for n in (chosen, best, "ensemble")
    }
    sentence = (
        f"The merge with the lowest training loss ({chosen}) has a {split} {metric} of "
        f"{values[chosen]}, {_number(abs(above), metric, margin)} {how} the better end ({best}, "
        f"{values[best]}); their ensemble has {values['ensemble']}."
    )
    if verdict == UNDETERMINED:
        sentence += " Neither better nor worse, as far as these examples tell."
    return Finding(question, verdict, sentence, threshold.rule, ("ends", name))


# --- three and more


def _all_connected(answers: Mapping[str, Answer], name: str) -> Finding:
    question = "Same basin, all of them?" if name == "pairs" else "Connected after matching?"
    metric = _metric(answers)
    threshold = THRESHOLDS[metric]
    silent = _silent(question, metric, answers, name)
    if silent:
        return silent
    found = answers[name].values
    n = len(found["names"])
    letters = [chr(65 + i) for i in range(n)]
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    heights = {
        f"{letters[i]} and {letters[j]}": _Height(
            found["heights"][i][j], found["margins"][i][j], metric, found["split"]
        )
        for i, j in pairs
        if found["heights"][i][j] is not None
    }
    because = ("ends", name)
    if not heights:
        return Finding(
            question, UNDETERMINED, "INVALID: no pair passed its gates.", threshold.rule, because
        )
    verdicts = [h.verdict for h in heights.values()]
    low = verdicts.count(YES)
    lost = len(pairs) - len(heights)
    verdict = all_low([(h.value, h.margin) for h in heights.values()], metric)
    verdict = UNDETERMINED if lost and verdict == YES else verdict
    worst = max(heights, key=lambda k: heights[k].value)
    sentence = (
        f"{low} of {len(pairs)} lines are low; the highest is that of {worst}, {heights[worst]}."
    )
    sentence += f" {lost} INVALID." if lost else ""
    return Finding(question, verdict, sentence, threshold.rule, because)


def _agree(answers: Mapping[str, Answer]) -> Finding:
    question, threshold = "Do the matchings agree?", THRESHOLDS["triangle"]
    silent = _silent(question, "triangle", answers, "triangle")
    if silent:
        return silent
    found: Json = dict(answers["triangle"].values)
    sentence = f"By way of a third network {_share(found['defect'])} of the units come elsewhere."
    if _said(answers, "merged_c2m3"):
        agreed = _share(answers["merged_c2m3"].values["defect"])
        sentence += f" In the one order that C2M3 finds for all of them it is {agreed}."
    verdict = decided(found["defect"], 0.0, threshold)
    return Finding(question, verdict, sentence, threshold.rule, ("triangle",))
