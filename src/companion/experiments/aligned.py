"""Barriers between networks before and after their units are matched: measured once, stored.

What :mod:`companion.experiments.pairs` is for copies, this is for permutations: runs are trained if
they are missing, B is brought to A by a :class:`Method`, and the line between A and pi(B) passes
the gates of every other line. ::

    pairs = [Pair(Run(recipe, init=0, order=0), Run(recipe, init=1, order=1)), ...]
    found = align(pairs, [Method("naive"), Method("weights")])
    interval(found["weights"], lambda r: r.barrier.height("test", "loss"))

Merging many networks and networks of biased data are in :mod:`companion.experiments.merged`.
Explained in our chapter 2; Git Re-Basin (Ainsworth et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from companion import data as datasets
from companion.connectivity import Barrier, Curve, Measure, Walker, barrier
from companion.core import codec
from companion.core.errors import BadParameter, one_of
from companion.core.runs import Store
from companion.core.stats import Interval, clustered, spearman
from companion.core.theta import Theta, distance, layout
from companion.data import Dataset
from companion.experiments.measurement import Json, Measurement, ends, run
from companion.experiments.methods import Method, Placed, match, place, spec_of, weights_of
from companion.experiments.pairs import Evaluation, Pair, jobs_of, normal_error
from companion.rebasin.calibration import calibrated_curve
from companion.rebasin.repair import repair
from companion.training import Job, Recipe, Run, build

__all__ = [
    "EXTRAS",
    "Aligned",
    "MatchedLine",
    "Method",
    "Placed",
    "align",
    "clusters",
    "independent",
    "interval",
    "lines_of",
    "match",
    "pairs_of",
    "permuted",
    "place",
    "placed",
    "spec_of",
]

EXTRAS = ("temperature", "repair")
"""What may be measured besides the line: it with a temperature fitted at every point, on the test
images; its midpoint after REPAIR."""


@dataclass(frozen=True)
class Aligned:
    """What was measured of a pair under one method.

    Arguments:
        pair, method: which.
        barrier: of the line from A to pi(B), with its gates.
        distances: Euclidean, of the parameters: ``before`` (A to B), ``after`` (A to pi(B)); where
            the method folds LayerNorm, both are of the folded networks.
        matching: :meth:`companion.rebasin.Matching.summary`, or that of a
            :class:`companion.rebasin.rotation.Rotation`; empty for ``naive``.
        calibrated: the line with a temperature fitted at every point, if it was asked for; fitted
            on the test images it is read on, so at most what a temperature can repair.
        repaired: split -> the midpoint after REPAIR, if it was asked for.
    """

    pair: Pair
    method: Method
    barrier: Barrier
    distances: Mapping[str, float]
    matching: Mapping[str, Any] = field(default_factory=dict, repr=False)
    calibrated: Curve | None = field(default=None, repr=False)
    repaired: Mapping[str, Measure] | None = None

    @property
    def valid(self) -> bool:
        """True if no gate failed."""
        return self.barrier.valid

    def midpoint(self, split: str = "test", metric: str = "loss") -> float:
        """The value at alpha = 1/2; NaN if a gate failed."""
        values = self.barrier.curve.values[split][metric]
        return values[len(values) // 2] if self.valid else math.nan

    def best_end(self, split: str = "test", metric: str = "loss") -> float:
        """The lower value of the two ends; NaN if a gate failed."""
        return min(self.barrier.curve.ends(split, metric)) if self.valid else math.nan

    def chosen(self, split: str = "test", metric: str = "loss", by: str = "train") -> float:
        """The value where the loss on split ``by`` is lowest; NaN if a gate failed.

        Chosen on the split it is read on, it could be no worse than an end: the ends are on the
        grid.
        """
        values = self.barrier.curve.values
        losses = values[by]["loss"]
        at = min(range(len(losses)), key=lambda i: losses[i])
        return values[split][metric][at] if self.valid else math.nan


@dataclass(frozen=True)
class MatchedLine(Measurement):
    """The line between A and what a method makes of B.

    Arguments:
        on: name of the dataset to measure on; None: the one A was trained on.
    """

    KIND = "aligned"
    SEMANTICS = 2  # since 2, weight matching begins with auctions

    pair: Pair
    method: Method
    evaluation: Evaluation
    extras: tuple[str, ...] = ()
    on: str | None = None

    def dataset(self, device: str) -> Dataset:
        """What the networks are measured on."""
        return datasets.load(self.on or self.pair.a.recipe.data, device)

    def identity(self, device: str) -> Json:
        return {
            "evaluation": self.evaluation.identity(self.pair.a.recipe.net),
            "method": self.method.identity(),
            "extras": list(self.extras),
            "on": self.dataset(device).fingerprint,
            **self.pair.identity(device),
        }

    def jobs(self) -> list[Job]:
        return jobs_of(self.pair)

    @property
    def points(self) -> int:
        return self.evaluation.points_of(self.pair.a.recipe.net)

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        return f"{ends(identity)}, units matched by {identity['method']['name']}"

    def measure(self, store: Store, device: str) -> object:
        data, pair, evaluation = self.dataset(device), self.pair, self.evaluation
        module = build(pair.a, data, torch.device(device))
        a: Theta
        a, b = (weights_of(r, pair.at, store, device) for r in (pair.a, pair.b))
        here = place(self.method, module, a, b, data)
        module, a, moved = here.module, here.a, here.b
        names = layout(module).parameters
        splits = evaluation.splits(data)
        how = evaluation.keywords(data)
        same = pair.a == pair.b
        line = barrier(module, a, moved, splits, classes=data.classes, same_noise=same, **how)
        out: Json = {
            "barrier": line,
            "distances": {
                "before": distance(a, here.before, names),
                "after": distance(a, moved, names),
            },
            "matching": here.summary,
        }
        if "temperature" in self.extras:
            # Fitted on the test images themselves, so at most what a temperature can repair: one
            # number for hundreds of images flatters every point alike. On other images it is
            # ill-posed: a network without an error there has no best temperature but 0, and an
            # infinite loss at its first error elsewhere.
            test = splits["test"]
            fitted = calibrated_curve(module, a, moved, test, {"test": test}, **how)
            out["calibrated"] = fitted.curve
        if "repair" in self.extras:
            part = data.train.head(self.method.examples or len(data.train))
            mended = repair(module, a, moved, part.x, alpha=0.5)
            out["repaired"] = Walker(module, splits, bn="interpolate").at(mended.theta)
        return out


def lines_of(
    pairs: Sequence[Pair],
    methods: Sequence[Method | str] = ("naive", "weights"),
    evaluation: Evaluation | None = None,
    *,
    extras: Sequence[str] = (),
    on: str | None = None,
) -> list[MatchedLine]:
    """What :func:`align` measures with these arguments, method by method, for a budget."""
    chosen = [Method(m) if isinstance(m, str) else m for m in methods]
    if len({m.name for m in chosen}) < len(chosen):
        raise BadParameter(f"methods: one is given twice in {[m.name for m in chosen]}.")
    for extra in extras:
        one_of("extra", extra, EXTRAS)
    return [
        MatchedLine(pair, method, evaluation or Evaluation(), tuple(extras), on)
        for method in chosen
        for pair in pairs
    ]


def align(
    pairs: Sequence[Pair],
    methods: Sequence[Method | str] = ("naive", "weights"),
    evaluation: Evaluation | None = None,
    *,
    extras: Sequence[str] = (),
    on: str | None = None,
    reference_error: float | None = None,
    max_error: float | None = None,
    store: Store | None = None,
    device: str = "cpu",
    workers: int = 0,
    label: str = "matching",
) -> dict[str, list[Aligned]]:
    """Train what is missing, match B to A by every method, and measure every line.

    Arguments:
        pairs: networks of one architecture each; ``start`` of a pair is not looked at.
        methods: names or :class:`Method` s, each name once.
        extras: of :data:`EXTRAS`, measured with every method.
        on: dataset to measure on, such as ``digits`` for pairs trained on parts of it; default:
            the one A was trained on.
        reference_error, max_error: of trained ends, as in
            :func:`companion.experiments.pairs.measure_pairs`.

    Returns:
        method name -> one :class:`Aligned` a pair, in the pairs' order.

    Raises:
        BadParameter: a method twice, an unknown extra; what training and matching refuse.
    """
    tasks = lines_of(pairs, methods, evaluation, extras=extras, on=on)
    raw = run(tasks, store=store, device=device, workers=workers, label=label)
    lines = [codec.from_json(Barrier, r["barrier"]) for r in raw]
    if reference_error is None:
        reference_error = normal_error(lines)
    out: dict[str, list[Aligned]] = {m if isinstance(m, str) else m.name: [] for m in methods}
    for task, line, r in zip(tasks, lines, raw, strict=True):
        out[task.method.name].append(
            Aligned(
                task.pair,
                task.method,
                line.judged(reference_error=reference_error, max_error=max_error),
                r["distances"],
                r["matching"],
                codec.from_json(Curve, r["calibrated"]) if "calibrated" in r else None,
                codec.from_json(dict[str, Measure], r["repaired"]) if "repaired" in r else None,
            )
        )
    return out


def independent(recipe: Recipe, number: int) -> Run:
    """Run ``number`` of a recipe: its init and its SGD noise are its own."""
    return Run(recipe, init=number, order=str(number), augment=str(number))


def pairs_of(
    recipe: Recipe,
    count: int,
    *,
    step: int | None = None,
    other: Recipe | None = None,
    first: int = 0,
) -> list[Pair]:
    """``count`` pairs of independent runs that share no network: 0 and 1, 2 and 3, ….

    Arguments:
        step: at which they are taken (None: T).
        other: the recipe of B, if it is not A's.
        first: number of the first pair; pairs of other numbers share nothing with them.
    """
    return [
        Pair(independent(recipe, 2 * i), independent(other or recipe, 2 * i + 1), step=step)
        for i in range(first, first + count)
    ]


def placed(found: Aligned, *, store: Store | None = None, device: str = "cpu") -> Placed:
    """The networks of a measured pair where they were measured, matched again, the same outcome."""
    store, where = store or Store(), str(datasets.resolve_device(device))
    data = datasets.load(found.pair.a.recipe.data, where)
    module = build(found.pair.a, data, torch.device(where))
    a, b = (weights_of(r, found.pair.at, store, where) for r in (found.pair.a, found.pair.b))
    return place(found.method, module, a, b, data)


def permuted(found: Aligned, *, store: Store | None = None, device: str = "cpu") -> Theta:
    """pi(B) of a measured pair (see :func:`placed`); B itself for ``naive``."""
    return placed(found, store=store, device=device).b


# ---- statistics: pairs whose gates failed count nowhere


def interval(results: Sequence[Aligned], value: Callable[[Aligned], float]) -> Interval | None:
    """Mean and interval of ``value`` over the valid pairs; None without one.

    Pairs that share a network are not independent: chains of them are one cluster.
    """
    good = [r for r in results if r.valid and not math.isnan(value(r))]
    if not good:
        return None
    return clustered([value(r) for r in good], clusters([r.pair for r in good]))


def clusters(pairs: Sequence[Pair]) -> list[int]:
    """A label for every pair: equal for pairs that share a network, directly or by a chain."""
    labels = list(range(len(pairs)))
    ends = [{(p.a.init, p.a.order), (p.b.init, p.b.order)} for p in pairs]
    changed = True
    while changed:
        changed = False
        for i in range(len(pairs)):
            for j in range(i):
                if ends[i] & ends[j] and labels[i] != labels[j]:
                    labels[i] = labels[j] = min(labels[i], labels[j])
                    changed = True
    return labels


def trend(
    found: Mapping[int, Sequence[Aligned]], value: Callable[[Aligned], float], least: int = 4
) -> Interval | None:
    """Spearman's rank correlation of a number and a pair's value: mean and interval over pairs.

    A rank correlation of means has no interval, and few points give a strong one by chance; here
    every pair has its own. A pair whose value never changes has no trend: 0.

    Arguments:
        found: number (width, step) -> results, the same pairs in the same order under each.
        value: of a result, such as its loss barrier.
        least: fewest numbers at which a pair has to be valid to count.

    Returns:
        None if no pair counts.
    """
    values: list[float] = []
    pairs: list[Pair] = []
    for results in zip(*found.values(), strict=True):
        each = [(x, value(r)) for x, r in zip(found, results, strict=True) if r.valid]
        each = [(x, v) for x, v in each if not math.isnan(v)]
        if len(each) < least:
            continue
        rank = spearman([x for x, _ in each], [v for _, v in each])
        values.append(0.0 if math.isnan(rank) else rank)
        pairs.append(results[0].pair)
    return clustered(values, clusters(pairs)) if values else None


def failures(bad: Sequence[float], good: Sequence[float], limit: float = 2.0) -> Interval | None:
    """Share of settings that fail in one condition minus the share that fails in the other.

    Arguments:
        bad, good: a barrier for each setting under both conditions; NaN where nothing is valid,
            and a setting that has one counts in neither share.
        limit: a barrier of as much or more is a failure.

    Returns:
        difference and interval, each setting a cluster of its own; None without a setting.
    """
    both = [
        float(b >= limit) - float(g >= limit)
        for b, g in zip(bad, good, strict=True)
        if not (math.isnan(b) or math.isnan(g))
    ]
    return clustered(both, range(len(both))) if both else None
