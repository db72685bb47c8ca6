"""Instability analysis: from which step on do copies under different SGD noise stay connected?

Algorithm 1 of Frankle et al. 2020: train W_0 to W_k; train copies of W_k to the end under different
SGD noise; measure the barrier between the copies. k is the fork step, T the last one. ::

    recipe = Recipe(net="mlp:widths=100x5", data="digits", steps=2000, batch=60, lr=0.08, ...)
    found = analyse(recipe, ks=[0, 50, 200])
    found.interval(0), found.verdict(0), found.onset()

Explained in our chapter 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, Unpack

from companion import data as datasets
from companion.connectivity import Barrier
from companion.connectivity.gates import Gate
from companion.core import closing
from companion.core.errors import BadParameter, NotMeasured, one_of, whole, within
from companion.core.runs import Store
from companion.core.stats import Interval, clustered
from companion.experiments.budget import Plan
from companion.experiments.measurement import Where
from companion.experiments.pairs import (
    Evaluation,
    NullControl,
    Pair,
    PairBarrier,
    PairResult,
    check_noise,
    check_null,
    measure_pairs,
)
from companion.models import has_dropout
from companion.training import Fork, MaskRecipe, Recipe, Run, check_fit

NOISE = ("both", "order", "augment", "perturb")
"""What differs between copies: the data order, augmentation (with dropout), or both. ``perturb``:
neither, but one weight of W_k, which is moved before the first step (claim C26)."""

THRESHOLD = 2.0
"""Points of error below which the paper calls a network stable (its Section 3)."""

THRESHOLDS = {"error": THRESHOLD, "loss": 0.03}
"""Metric -> the barrier below which a network is called stable: points of error, or nats of loss.
The paper has no threshold for a loss; 0.03 nats a prediction, ours, raises perplexity by 3 %."""


def threshold_of(metric: str, threshold: float | None = None) -> float:
    """``threshold``, or the one of the metric.

    Raises:
        BadParameter: the metric is not known, or the threshold is no number from 0 on.
    """
    one_of("metric", metric, THRESHOLDS)
    within("threshold", threshold, 0, 1e6)
    return THRESHOLDS[metric] if threshold is None else threshold


def trunk(recipe: Recipe, init: int | str) -> Run:
    """The run that trains W_0 to W_k; ``init`` labels W_0 and the trunk's own noise."""
    return Run(recipe, init=init, order=f"{init}/trunk", augment=f"{init}/trunk")


def copy(
    recipe: Recipe,
    init: int | str,
    k: int,
    number: int,
    *,
    noise: str = "both",
    optimizer: Literal["reset", "restore"] = "reset",
    schedule: Literal["continue", "restart"] = "continue",
    mask: MaskRecipe | None = None,
) -> Run:
    """Copy ``number`` of W_k. Copies of the same init and number see the same noise at every k.

    With a ``mask``, of the subnetwork ``mask * W_k``.
    """
    one_of("noise", noise, NOISE)
    own, shared = f"{init}/{number}", f"{init}/shared"
    return Run(
        recipe,
        init=init,
        order=own if noise in ("both", "order") else shared,
        augment=own if noise in ("both", "augment") else shared,
        perturb=own if noise == "perturb" else None,
        fork=Fork(trunk(recipe, init), k, optimizer, schedule),
        mask=mask,
    )


@dataclass(frozen=True)
class Sample:
    """One pair of copies: its init, its k, the copies' numbers, and what was measured."""

    init: int
    k: int
    copies: tuple[int, int]
    result: PairResult


@dataclass(frozen=True)
class Instability:
    """The outcome of :func:`analyse`: all pairs, and the statistics the paper draws from them."""

    recipe: Recipe
    ks: tuple[int, ...]
    samples: tuple[Sample, ...] = field(repr=False)

    @property
    def metric(self) -> str:
        """The default of every ``metric`` here: ``loss`` for text, ``error`` for images."""
        return self.samples[0].result.barrier.metric if self.samples else "error"

    def at(self, k: int) -> list[Sample]:
        """The pairs forked at step k."""
        return [s for s in self.samples if s.k == k]

    def values(
        self,
        k: int,
        split: str = "test",
        metric: str | None = None,
        definition: str = "mean",
        bn: str | None = None,
    ) -> list[tuple[int, float]]:
        """(init, barrier) of every valid pair forked at k; ``bn``: None, the headline mode.

        While a recording is closed, none unless all pairs at k are measured: an interval over the
        inits that happened to come first would look narrower than it is.
        """
        if not self.measured(k):
            return []
        pairs = [
            (s.init, s.result.barrier.height(split, metric, definition, bn=bn)) for s in self.at(k)
        ]
        return [(init, v) for init, v in pairs if not math.isnan(v)]

    @property
    def modes(self) -> tuple[str, ...]:
        """The BatchNorm modes that were measured; ``("none",)`` without BatchNorm."""
        return tuple(self._measured.curves) if self.samples else ()

    @property
    def headline(self) -> str:
        """The BatchNorm mode of the headline; ``none`` without BatchNorm."""
        return self._measured.bn if self.samples else "none"

    @property
    def _measured(self) -> Barrier:
        """The first barrier that is measured; only closing a recording misses any."""
        there = [s.result for s in self.samples if s.result.measured]
        return (there or [self.samples[0].result])[0].barrier

    def interval(
        self,
        k: int,
        split: str = "test",
        metric: str | None = None,
        definition: str = "mean",
        bn: str | None = None,
    ) -> Interval | None:
        """Mean barrier at k with its interval, clustered by init; None if no pair is valid."""
        found = self.values(k, split, metric, definition, bn)
        return clustered([v for _, v in found], [i for i, _ in found]) if found else None

    def measured(self, k: int) -> bool:
        """Whether all pairs forked at k are measured; only closing a recording misses any."""
        return all(s.result.measured for s in self.at(k))

    def invalid(self) -> list[Sample]:
        """Pairs that failed a gate."""
        return [s for s in self.samples if not s.result.barrier.valid]

    def verdict(
        self, k: int, split: str = "test", threshold: float | None = None, metric: str | None = None
    ) -> str:
        """``stable`` if the whole interval is below the threshold, ``unstable`` if it is not below
        anywhere, ``undetermined`` if it straddles it or rests on one init only, whose interval has
        no width; ``invalid`` without a valid pair. Threshold: default :data:`THRESHOLDS`."""
        metric = metric or self.metric
        limit = threshold_of(metric, threshold)
        interval = self.interval(k, split, metric)
        if interval is None:
            return "invalid"
        if interval.clusters < 2:
            return "undetermined"
        if interval.high < limit:
            return "stable"
        return "unstable" if interval.low >= limit else "undetermined"

    def onset(
        self, split: str = "test", threshold: float | None = None, metric: str | None = None
    ) -> Interval:
        """The fork step from which on the network is stable, and what the verdicts leave open.

        Returns:
            value: the smallest k of the grid from which on the mean barrier stays below the
            threshold. low: the smallest from which on no k is ``unstable``. high: the smallest from
            which on all are ``stable``. Each is infinite where the grid has no such k.

        Raises:
            NotMeasured: while a recording is closed, if pairs are missing at a k.
        """
        if missing := [k for k in self.ks if not self.measured(k)]:
            raise NotMeasured(f"the onset: pairs at k = {missing} are {closing.WHY}.")
        metric = metric or self.metric
        limit = threshold_of(metric, threshold)
        means = [self.interval(k, split, metric) for k in self.ks]
        words = [self.verdict(k, split, limit, metric) for k in self.ks]

        def first(holds: Sequence[bool]) -> float:
            return next((k for i, k in enumerate(self.ks) if all(holds[i:])), math.inf)

        return Interval(
            first([mean is not None and mean.value < limit for mean in means]),
            first([word != "unstable" for word in words]),
            first([word == "stable" for word in words]),
            len(self.at(self.ks[0])),
            len({s.init for s in self.samples}),
        )


def check_design(
    recipe: Recipe,
    ks: Sequence[int],
    *,
    inits: int = 3,
    copies: int = 3,
    noise: str = "both",
    device: str = "cpu",
) -> tuple[int, ...]:
    """Refuse, before anything trains, a design that cannot be run; return its k, sorted.

    Raises:
        BadParameter: a k outside 0 … T - 1, no init, fewer than two copies, noise that is unknown
            or that the recipe does not have, a network or batch that does not fit the data.
        MissingData, DeviceUnavailable: as they say.
    """
    grid = tuple(sorted(set(ks)))
    if not grid:
        raise BadParameter("ks: give at least one fork step.")
    for k in grid:
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < recipe.steps:
            raise BadParameter(
                f"ks: {k!r} must be a step from 0 to {recipe.steps - 1} (T = {recipe.steps})."
            )
    whole("inits", inits, 1, most=1000)
    whole("copies", copies, 2, most=1000)
    one_of("noise", noise, NOISE)
    if noise == "augment" and recipe.augment == "none" and not has_dropout(recipe.net):
        raise BadParameter(
            "noise: 'augment' needs a recipe with augmentation: set augment, such as crop1 or "
            "flip+crop4 (for text: shift), or dropout in the network."
        )
    check_fit(recipe, datasets.load(recipe.data, str(datasets.resolve_device(device))))
    return grid


class Copies(TypedDict, total=False):
    """How copies of W_k are made; defaults and meaning as those of :func:`analyse`."""

    inits: int
    copies: int
    noise: str
    optimizer: Literal["reset", "restore"]
    schedule: Literal["continue", "restart"]


def _pairs(
    recipe: Recipe, k: int, step: int | None = None, inits: int = 3, copies: int = 3, **how: Any
) -> list[tuple[int, tuple[int, int], Pair]]:
    """Init, numbers of the copies, and the pair at ``step``, of all pairs of copies of W_k."""
    out = []
    for init in range(inits):
        made = {n: copy(recipe, init, k, n, **how) for n in range(1, copies + 1)}
        out += [
            (init, (p, q), Pair(made[p], made[q], step, start=(trunk(recipe, init), k)))
            for p, q in itertools.combinations(made, 2)
        ]
    return out


def _strangers(recipe: Recipe, inits: int) -> list[Pair]:
    firsts = [copy(recipe, init, 0, 1) for init in range(inits)]
    return [Pair(a, b) for a, b in itertools.combinations(firsts, 2)]


def plan_forks(
    recipe: Recipe,
    ks: Sequence[int],
    evaluation: Evaluation,
    *,
    controls: bool = True,
    **how: Unpack[Copies],
) -> Plan:
    """What :func:`analyse` would train and measure with the same arguments, for a budget."""
    pairs = [pair for k in sorted(set(ks)) for *_, pair in _pairs(recipe, k, **how)]
    again = [NullControl(pair.a, evaluation) for pair in pairs[:1] if controls]
    return [*(PairBarrier(pair, evaluation) for pair in pairs), *again]


def plan_independent(recipe: Recipe, evaluation: Evaluation, *, inits: int = 3) -> Plan:
    """The same for :func:`independent_inits`."""
    return [PairBarrier(pair, evaluation) for pair in _strangers(recipe, inits)]


def plan_through_training(
    recipe: Recipe,
    k: int,
    steps: Sequence[int],
    evaluation: Evaluation,
    *,
    inits: int = 3,
    copies: int = 2,
) -> Plan:
    """The same for :func:`through_training`."""
    found = (one for step in steps for one in _pairs(recipe, k, step, inits, copies))
    return [PairBarrier(pair, evaluation) for *_, pair in found]


def analyse(
    recipe: Recipe,
    ks: Sequence[int],
    *,
    inits: int = 3,
    copies: int = 3,
    noise: str = "both",
    optimizer: Literal["reset", "restore"] = "reset",
    schedule: Literal["continue", "restart"] = "continue",
    evaluation: Evaluation | None = None,
    max_error: float | None = None,
    controls: bool = True,
    store: Store | None = None,
    device: str = "cpu",
    workers: int = 0,
) -> Instability:
    """Instability of W_k for every k (Algorithm 1), on ``inits`` × all pairs of ``copies``.

    Arguments:
        recipe: how the network trains; its ``steps`` is T.
        ks: fork steps, each in 0 … T - 1.
        inits: number of independent W_0.
        copies: of each W_k, 2 or more (3 give 3 pairs).
        noise: what differs between copies, one of :data:`NOISE`.
        optimizer: what a copy starts with, ``reset`` (fresh) or ``restore`` (the trunk's momentum).
        schedule: ``continue``, or ``restart`` for the control of Fig. 4 (all T steps again).
        evaluation, max_error: how barriers are measured, and the error of a trained network.
        controls: train one copy a second time (the null control) and check that the data orders
            or, where copies differ in these alone, the draws of augmentation and dropout are
            independent; both are recorded with every barrier.
        store, device, workers: see :mod:`companion.training`.

    Raises:
        BadParameter: before any training: a k outside the run, fewer than two copies, …
        Diverged: a copy diverged.

    Returns:
        an :class:`Instability`; pairs that fail a gate are in it, and count nowhere.
    """
    grid = check_design(recipe, ks, inits=inits, copies=copies, noise=noise, device=device)
    how: dict[str, Any] = {"noise": noise, "optimizer": optimizer, "schedule": schedule}
    design = [(k, *one) for k in grid for one in _pairs(recipe, k, None, inits, copies, **how)]
    where: Where = {"store": store, "device": device, "workers": workers}
    pairs = [pair for *_, pair in design]
    results = measure_pairs(pairs, evaluation, max_error=max_error, label="instability", **where)
    if controls:
        runs = [r for pair in pairs for r in (pair.a, pair.b)]
        checks: list[Gate] = [
            check_null(pairs[0].a, evaluation, store=store, device=device),
            check_noise(runs, device=device),
        ]
        results = [PairResult(r.barrier.recorded(checks), r.distances, r.start) for r in results]
    samples = [Sample(i, k, c, r) for (k, i, c, _), r in zip(design, results, strict=True)]
    return Instability(recipe, grid, tuple(samples))


def independent_inits(
    recipe: Recipe,
    *,
    inits: int = 3,
    evaluation: Evaluation | None = None,
    max_error: float | None = None,
    **where: Unpack[Where],
) -> list[PairResult]:
    """Control: barriers between copies of different inits, every pair of ``inits`` (claim C08)."""
    pairs, label = _strangers(recipe, inits), "independent inits"
    return measure_pairs(pairs, evaluation, max_error=max_error, label=label, **where)


def through_training(
    recipe: Recipe,
    k: int,
    steps: Sequence[int],
    *,
    inits: int = 3,
    copies: int = 2,
    evaluation: Evaluation | None = None,
    **where: Unpack[Where],
) -> dict[int, list[tuple[int, PairResult]]]:
    """Barriers between copies of W_k along their training, not only at T (App. C).

    Arguments:
        steps: where to look, each above k and at most T.

    Returns:
        step -> (init, result) of every pair. Half-trained networks have high errors, so all that
        is asked of them is to be better than half-way to guessing (of text: than always saying the
        commonest token); before that they count as INVALID.
    """
    for step in steps:
        if not k < step <= recipe.steps:
            raise BadParameter(
                f"steps: {step} must lie above k = {k} and at most at T = {recipe.steps}."
            )
    design = [(step, *one) for step in steps for one in _pairs(recipe, k, step, inits, copies)]
    device = str(datasets.resolve_device(where.get("device", "cpu")))
    text = datasets.load(recipe.data, device).kind == "text"
    results = measure_pairs(
        [pair for *_, pair in design],
        evaluation,
        reference_error=100.0 if text else None,  # of text: no bound but guessing
        max_error=None if text else 50.0,
        label="through training",
        **where,
    )
    out: dict[int, list[tuple[int, PairResult]]] = {s: [] for s in steps}
    for (step, init, *_), result in zip(design, results, strict=True):
        out[step].append((init, result))
    return out
