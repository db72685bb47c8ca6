"""Features of stored networks, measured once and stored; and what they say of connectivity.

What :mod:`companion.experiments.aligned` is for lines, this is for features: runs are trained if
they are missing, B is brought to A by a :class:`Method`, the line between them passes the gates of
every other line, and the instruments of :mod:`companion.features` look at both ends and between. ::

    found = examine([(pair, None), (pair, Method("weights"))], Scope(), device="cpu")
    found[1].barrier.height(), found[1].gaps(), found[1].lemma().violations

The statistics leave out the first linear map: its output is linear in the weights, so it is
linearly connected for any two networks. Explained in our chapter 3; Zhou et al. 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, Unpack

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from companion import data as datasets
from companion.connectivity import (
    BN_EXAMPLES,
    Barrier,
    barrier,
    check_bn_examples,
    grid,
    has_batchnorm,
)
from companion.connectivity.batches import default_batch
from companion.core import codec
from companion.core.errors import BadParameter, one_of
from companion.core.numerics import exact_evaluation
from companion.core.runs import Store
from companion.core.stats import Interval, auc, clustered, spearman
from companion.core.theta import Theta
from companion.data import Dataset, Split
from companion.experiments.aligned import clusters
from companion.experiments.instability import THRESHOLD
from companion.experiments.measurement import Json, Measurement, Where, ends, run
from companion.experiments.methods import Method, match, weights_of
from companion.experiments.pairs import Pair, averaging, jobs_of, normal_error
from companion.features import (
    MODES,
    Additivity,
    Commutativity,
    Features,
    LayerFeatures,
    Spectrum,
    Stitching,
    commutativity,
    feature_spectra,
    features,
    stitch,
    weak_additivity,
    weight_spectra,
)
from companion.features.conditions import measurable
from companion.training import Job, build

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

PARTS = ("additivity", "commutativity", "stitching", "spectra")
"""What may be measured besides the features: the two conditions of Theorem 1, the stitching test,
and the singular values of the weights and features of A and of B as it was trained. A condition
that is about nothing in a network (additivity, without a ReLU) is left out."""


@dataclass(frozen=True)
class Scope:
    """What of a pair is measured, and on which data.

    Arguments:
        layers: names or patterns, as :func:`companion.features.sites` takes them; None: all.
            Statistics over layers leave out the first that is measured, so name the network's first
            linear map, too.
        alphas: of the features between A and B; 0 is A, as everywhere in this book.
        points: of the error's line, odd.
        bn: modes, the first one for the headline; those of :data:`MODES`.
        parts: of :data:`PARTS`.
        test_examples: how many test images (None: all).
        bn_examples: training images that ``reestimate`` averages over (None: all).
        batch: images at a time (None: by itself).
    """

    layers: tuple[str, ...] | None = None
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    points: int = 25
    bn: tuple[str, ...] = MODES
    parts: tuple[str, ...] = ("additivity", "commutativity", "stitching")
    test_examples: int | None = None
    bn_examples: int | None = BN_EXAMPLES
    batch: int | None = None

    def __post_init__(self) -> None:
        grid(self.points)
        check_bn_examples(self.bn_examples)
        for part in self.parts:
            one_of("part", part, PARTS)
        for mode in self.bn:
            one_of("bn", mode, MODES)
        if not self.bn:
            raise BadParameter(f"bn: give at least one of {', '.join(MODES)}.")

    def identity(self) -> dict[str, Any]:
        """What determines the numbers, for the store.

        ``bn_examples`` counts for networks with BatchNorm only: the store's entry adds it.
        """
        known = codec.to_json(self)
        del known["batch"], known["bn_examples"]
        return known

    def split(self, data: Dataset) -> Split:
        """The test images, or the first of them."""
        return data.test.head(self.test_examples or len(data.test))


@dataclass(frozen=True)
class Lemma:
    """Lemma 1 on one pair: errors along alpha, in percent, and the bound.

    Arguments:
        alphas: the line's grid, shape (points,).
        mixture: error of the mixed logits (1 - alpha) f(A) + alpha f(B): Lemma 1's own object.
        path: error of the network with interpolated weights, which it bounds if LLFC holds.
        bound: Err_A + Err_B.
        examples: images behind each error, so that errors can be compared as counts.
    """

    alphas: tuple[float, ...]
    mixture: tuple[float, ...]
    path: tuple[float, ...]
    bound: float
    examples: int

    def _excess(self, errors: Sequence[float]) -> list[int]:
        """Images above the bound, a whole number at each alpha."""
        limit = round(self.bound * self.examples / 100)
        return [round(e * self.examples / 100) - limit for e in errors]

    @property
    def violations(self) -> int:
        """At how many alphas the mixed logits are wrong more often than the bound: it must be 0."""
        return sum(e > 0 for e in self._excess(self.mixture))

    @property
    def mixed_excess(self) -> float:
        """How far the error of the mixed logits rises above the bound at most, in points."""
        return 100 * max(self._excess(self.mixture)) / self.examples

    @property
    def images_above(self) -> int:
        """How many images more than the bound the interpolated network gets wrong at most."""
        return max(self._excess(self.path))


@dataclass(frozen=True)
class Featured:
    """What was measured of a pair under one way of bringing B to A.

    Arguments:
        pair, method: which.
        barrier: of the test error and loss on the line from A to B (or pi(B)), with its gates.
        features: BatchNorm mode -> the features; one entry ``none`` without BatchNorm.
        mixture: error (%) of the mixed logits on the line's grid.
        examples: images behind it.
        additivity, commutativity, stitching: if they were asked for.
        spectra: ``a`` and ``b`` -> singular values of weights and features, if asked for.
    """

    pair: Pair
    method: Method
    barrier: Barrier
    features: Mapping[str, Features] = field(repr=False)
    mixture: tuple[float, ...] = field(repr=False)
    examples: int
    additivity: Additivity | None = field(default=None, repr=False)
    commutativity: Commutativity | None = field(default=None, repr=False)
    stitching: Stitching | None = field(default=None, repr=False)
    spectra: Mapping[str, tuple[Spectrum, ...]] = field(default_factory=dict, repr=False)

    @property
    def valid(self) -> bool:
        """True if no gate failed."""
        return self.barrier.valid

    @property
    def modes(self) -> tuple[str, ...]:
        """The BatchNorm modes, headline first."""
        return tuple(self.features)

    def look(self, bn: str | None = None) -> Features:
        """The features under a BatchNorm mode; None: the headline's. A network without BatchNorm
        has one answer to every mode.

        Raises:
            BadParameter: a mode that was not measured.
        """
        if self.modes == ("none",) and bn in MODES:
            return self.features["none"]
        return self.features[one_of("bn", bn or self.modes[0], self.modes)]

    def layers(self, bn: str | None = None) -> tuple[LayerFeatures, ...]:
        """The sites, each feature once: a residual block puts out what its last ReLU does."""
        out: dict[tuple[object, ...], LayerFeatures] = {}
        for x in self.look(bn).layers:
            out.setdefault((x.size, x.baseline, *x.gap.values(), *x.c.values()), x)
        return tuple(out.values())

    def height(self, bn: str | None = None) -> float:
        """The test error barrier above the straight line between the errors of the ends (points);
        NaN if a gate failed. The paper defines no barrier; this is chapter 1's.

        Raises:
            BadParameter: a BatchNorm mode that was not measured.
        """
        mode = self.look(bn).bn if bn is not None else None
        return self.barrier.height("test", "error", "linear", bn=mode)

    def gaps(self, alpha: float = 0.5, bn: str | None = None) -> dict[str, float]:
        """Layer -> E[1 - cos_alpha]."""
        return {x.name: x.gap[alpha].mean for x in self.layers(bn)}

    def baselines(self, bn: str | None = None) -> dict[str, float]:
        """Layer -> E[1 - cos(A, B)]."""
        return {x.name: x.baseline.mean for x in self.layers(bn)}

    def ratios(self, alpha: float = 0.5, bn: str | None = None) -> dict[str, float]:
        """Layer -> E[1 - cos_alpha] / E[1 - cos(A, B)]."""
        return {x.name: x.ratio(alpha) for x in self.layers(bn)}

    def coefficients(self, alpha: float = 0.5, bn: str | None = None) -> dict[str, float]:
        """Layer -> median over samples of the paper's coefficient c, which is the ratio of lengths
        below times the cosine."""
        return {x.name: x.c[alpha].median for x in self.layers(bn)}

    def lengths(self, alpha: float = 0.5, bn: str | None = None) -> dict[str, float]:
        """Layer -> |F_int| / |F_alpha|, from the medians of c and its twin, whose quotient is the
        square of it; NaN where either is 0."""
        pairs = {x.name: (x.c[alpha].median, x.twin[alpha].median) for x in self.layers(bn)}
        return {
            n: math.sqrt(c / twin) if c * twin > 0 else math.nan for n, (c, twin) in pairs.items()
        }

    def lemma(self) -> Lemma:
        """Lemma 1 along the line. BatchNorm's statistics are interpolated, so that both ends are A
        and B themselves; with statistics estimated again they would be other networks."""
        curves = self.barrier.curves
        curve = curves["interpolate"] if "interpolate" in curves else curves["none"]
        path = tuple(curve.values["test"]["error"])
        bound = self.mixture[0] + self.mixture[-1]
        return Lemma(tuple(curve.alphas), self.mixture, path, bound, self.examples)


def mean_gap(found: Featured, alpha: float = 0.5, bn: str | None = None) -> float:
    """E[1 - cos_alpha], averaged over layers after the first; NaN if a gate failed."""
    values = [v for v in list(found.gaps(alpha, bn).values())[1:] if not math.isnan(v)]
    return sum(values) / len(values) if values and found.valid else math.nan


@dataclass(frozen=True)
class FeaturesOfPair(Measurement):
    """The features of A, of what a method makes of B, and between them."""

    KIND = "features"
    SEMANTICS = 2  # since 2, weight matching begins with auctions

    pair: Pair
    method: Method
    scope: Scope

    def identity(self, device: str) -> Json:
        bn = averaging(self.pair.a.recipe.net, self.scope.bn_examples)
        return {
            "scope": self.scope.identity() | bn,
            "method": self.method.identity(),
            **self.pair.identity(device),
        }

    def jobs(self) -> list[Job]:
        return jobs_of(self.pair)

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        return f"{ends(identity)}, features, units matched by {identity['method']['name']}"

    def measure(self, store: Store, device: str) -> object:
        scope, pair = self.scope, self.pair
        data = datasets.load(pair.a.recipe.data, device)
        module = build(pair.a, data, torch.device(device))
        a, b = (weights_of(r, pair.at, store, device) for r in (pair.a, pair.b))
        naive = self.method.name == "naive"
        moved = dict(b) if naive else match(self.method, module, a, b, data).apply(module, b)
        split = scope.split(data)
        modes = scope.bn if has_batchnorm(module) else scope.bn[:1]
        average: dict[str, Any] = {"bn_data": data.train, "bn_examples": scope.bn_examples}
        how = {"classes": data.classes, "same_noise": pair.equal_on_purpose(a, b), **average}
        line = barrier(module, a, moved, {"test": split}, points=scope.points, bn=modes[0], **how)
        where: dict[str, Any] = {"layers": scope.layers, "batch": scope.batch}
        seen = [
            features(module, a, moved, split, alphas=scope.alphas, bn=m, **average, **where)
            for m in modes
        ]
        out: Json = {
            "barrier": line,
            "features": {f.bn: f for f in seen},
            "mixture": mixed(module, a, moved, split, line.curve.alphas),
            "examples": len(split),
        }
        relus, linears = measurable(module, split)
        if "additivity" in scope.parts and relus:
            out["additivity"] = weak_additivity(
                module, a, moved, split, alphas=scope.alphas, batch=scope.batch
            )
        if "commutativity" in scope.parts and linears:
            out["commutativity"] = commutativity(module, a, moved, split, batch=scope.batch)
        if "stitching" in scope.parts:
            out["stitching"] = stitch(module, a, moved, split, **where)
        if "spectra" in scope.parts:
            out["spectra"] = {
                name: (
                    *weight_spectra(module, theta),
                    *feature_spectra(module, theta, split, layers=scope.layers),
                )
                for name, theta in (("a", a), ("b", b))
            }
        return out


@exact_evaluation()
@torch.inference_mode()
def mixed(
    module: nn.Module, a: Theta, b: Theta, split: Split, alphas: Sequence[float]
) -> list[float]:
    """Error (%) of the mixed logits (1 - alpha) f(A) + alpha f(B) at each alpha.

    Arguments:
        a, b: state dicts of ``module``.
        split: images and labels, on the device to compute on.

    Source: Zhou et al. 2023, Lemma 1: such a mixture is wrong only where A or B is.
    """
    module = module.eval()
    wrong = torch.zeros(len(alphas), dtype=torch.int64, device=split.x.device)
    size = default_batch(module, split.x.device, "none")
    for x, y in zip(split.x.split(size), split.y.split(size), strict=True):
        # In float64 a mixture keeps the order of two logits that both have, so Lemma 1 is exact.
        f_a, f_b = (functional_call(module, dict(t), (x,)).double() for t in (a, b))
        for i, alpha in enumerate(alphas):
            wrong[i] += (((1 - alpha) * f_a + alpha * f_b).argmax(1) != y).sum()
    return [100 * w / len(split) for w in wrong.tolist()]


def looks_of(
    pairs: Sequence[tuple[Pair, Method | str | None]], scope: Scope | None = None
) -> list[FeaturesOfPair]:
    """What :func:`examine` measures with these arguments, for a budget."""
    return [
        FeaturesOfPair(pair, m if isinstance(m, Method) else Method(m or "naive"), scope or Scope())
        for pair, m in pairs
    ]


def examine(
    pairs: Sequence[tuple[Pair, Method | str | None]],
    scope: Scope | None = None,
    *,
    reference_error: float | None = None,
    max_error: float | None = None,
    **where: Unpack[Where],
) -> list[Featured]:
    """Train what is missing, bring B to A, and measure the features of every pair.

    Arguments:
        pairs: each with the method that brings B to A; None, or ``naive``: as it is.
        scope: what is measured.
        reference_error, max_error: percent, of trained ends; by default the reference is the median
            error of all ends of this call that have the same recipe.

    Returns:
        one :class:`Featured` an item, in their order; one that failed a gate is not ``valid``, and
        has no barrier.

    Raises:
        BadParameter: layers that do not exist; what training and matching refuse.

    Source: Zhou et al. 2023, Figures 2 to 7 and Tables 2 and 3; our chapter 3.
    """
    tasks = looks_of(pairs, scope)
    values = run(tasks, label="features", **where)
    lines = [codec.from_json(Barrier, value["barrier"]) for value in values]
    out = []
    for task, value, line in zip(tasks, values, lines, strict=True):
        recipe = task.pair.a.recipe
        alike = [x for t, x in zip(tasks, lines, strict=True) if t.pair.a.recipe == recipe]
        normal = normal_error(alike) if reference_error is None else reference_error

        def part(name: str, kind: type[T], value: Json = value) -> T | None:
            return codec.from_json(kind, value[name]) if name in value else None

        out.append(
            Featured(
                task.pair,
                task.method,
                line.judged(reference_error=normal, max_error=max_error),
                codec.from_json(dict[str, Features], value["features"]),
                codec.from_json(tuple[float, ...], value["mixture"]),
                value["examples"],
                part("additivity", Additivity),
                part("commutativity", Commutativity),
                part("stitching", Stitching),
                part("spectra", dict[str, tuple[Spectrum, ...]]) or {},
            )
        )
    return out


def survey(
    groups: Mapping[K, Sequence[tuple[Pair, Method | str | None]]],
    scope: Scope | None = None,
    **how: Any,
) -> dict[K, list[Featured]]:
    """:func:`examine` for many groups of pairs at once, so that no process waits between them.

    Arguments:
        groups: any label -> items of :func:`examine`.
        how: its keywords.

    Returns:
        label -> one :class:`Featured` an item.
    """
    found = iter(examine([item for items in groups.values() for item in items], scope, **how))
    return {label: [next(found) for _ in items] for label, items in groups.items()}


# --- statistics over pairs: those whose gates failed count nowhere


def after_first(values: Mapping[str, float]) -> dict[str, float]:
    """Layer -> value, without the first site that was measured."""
    return dict(list(values.items())[1:])


@dataclass(frozen=True)
class Ratios:
    """R = E[1 - cos_alpha] / E[1 - cos(A, B)] over the layers of one pair (claim A02).

    Arguments:
        median: over the layers, the largest over the alphas.
        near: share of the layers with R of at most a quarter at every alpha.
    """

    median: float
    near: float


def ratios(found: Featured, bn: str | None = None) -> Ratios:
    """:class:`Ratios` of a pair. Layers without a ratio (parallel features) are left out."""
    seen = found.look(bn)
    rows = np.asarray([[x.ratio(t) for t in seen.alphas] for x in found.layers(bn)[1:]])
    rows = rows.reshape(-1, len(seen.alphas))
    rows = rows[np.isfinite(rows).all(1)]
    if not len(rows):
        return Ratios(math.nan, math.nan)
    return Ratios(float(np.median(rows, 0).max()), float((rows <= 0.25).all(1).mean()))


def over_pairs(found: Sequence[Featured], value: Callable[[Featured], float]) -> Interval | None:
    """Mean and interval of ``value`` over the valid pairs; None without one."""
    good = [f for f in found if f.valid and math.isfinite(value(f))]
    if not good:
        return None
    return clustered([value(f) for f in good], clusters([f.pair for f in good]))


def averaged(
    found: Sequence[Featured], value: Callable[[Featured], Mapping[str, float]]
) -> dict[str, float]:
    """Layer -> mean of ``value`` over the valid pairs, of one network."""
    good = [value(f) for f in found if f.valid]
    return {n: float(np.mean([g[n] for g in good])) for n in good[0]} if good else {}


def rank_correlation(
    found: Mapping[int, Sequence[Featured]],
    x: Callable[[int, Featured], float],
    y: Callable[[int, Featured], float],
    least: int = 4,
) -> Interval | None:
    """Spearman's rank correlation of two numbers along a grid: each pair's own, and its interval.

    Arguments:
        found: number of the grid (fork step, width) -> pairs, the same in the same order.
        x, y: of (number, pair).
        least: fewest numbers at which a pair has to be valid to count.
    """
    values, pairs = [], []
    for column in zip(*found.values(), strict=True):
        good = [(k, f) for k, f in zip(found, column, strict=True) if f.valid]
        if len(good) < least:
            continue
        rank = spearman([x(k, f) for k, f in good], [y(k, f) for k, f in good])
        values.append(0.0 if math.isnan(rank) else rank)
        pairs.append(good[0][1].pair)
    return clustered(values, clusters(pairs)) if values else None


def _lengths(f: Featured) -> dict[str, float]:
    """How far a feature's length is from that of the interpolated feature, as a |log|."""
    return {n: abs(math.log(v)) for n, v in f.lengths().items()}


def _additivity(f: Featured) -> dict[str, float]:
    return {x.name: x.distance[0.5].median for x in f.additivity.layers} if f.additivity else {}


def _commutativity(f: Featured, relative: bool = False) -> dict[str, float]:
    layers = f.commutativity.layers if f.commutativity else ()
    return {x.name: x.ratio if relative else x.com for x in layers}


STATISTICS: Mapping[str, Callable[[Featured], Mapping[str, float]]] = {
    "E[1 − cos½]": lambda f: f.gaps(),
    "E[1 − cos(A, B)]": lambda f: f.baselines(),
    "R, their ratio": lambda f: f.ratios(),
    "|log of the lengths’ ratio|": _lengths,
    "Dist_σ": _additivity,
    "Dist_com": _commutativity,
    "Dist_com / min(Dist_W, Dist_H)": lambda f: _commutativity(f, relative=True),
}
"""Numbers of one layer of one pair that may tell connected pairs from others."""


@dataclass(frozen=True)
class Separation:
    """How well one number tells unconnected pairs from connected ones: areas under ROC curves.

    1 separates perfectly, 1/2 is chance, and below 1/2 the connected ones have the larger number.

    Arguments:
        pooled: hidden layers of all pairs thrown together: one threshold for all layers.
        worst: the smallest area of a single hidden layer: a threshold for each layer.
        output: of the last layer alone; NaN for a number that it does not have.
        pairs: unconnected, connected, of those that this number was measured of.
    """

    pooled: float
    worst: float
    output: float
    pairs: tuple[int, int]


def comparable(found: Sequence[Featured]) -> list[Featured]:
    """The valid pairs of which every one of :data:`STATISTICS` was measured, so that areas under
    ROC curves are about the same pairs."""
    return [f for f in found if f.valid and all(value(f) for value in STATISTICS.values())]


def separation(
    found: Sequence[Featured], statistic: Callable[[Featured], Mapping[str, float]]
) -> Separation:
    """Areas under the ROC curve of a statistic, over the valid pairs of networks of one depth."""
    good = [f for f in found if f.valid and statistic(f)]
    labels = [f.height() > THRESHOLD for f in good]
    end = list(good[0].gaps())[-1] if good else ""
    by_layer: dict[str, list[tuple[float, bool]]] = {}
    for f, label in zip(good, labels, strict=True):
        first = next(iter(f.gaps()))
        for name, value in statistic(f).items():
            if name != first and not math.isnan(value):
                by_layer.setdefault(name, []).append((value, label))
    areas = {n: auc(*zip(*v, strict=True)) for n, v in by_layer.items()}
    pooled = [item for n, v in by_layer.items() if n != end for item in v]
    hidden = [a for n, a in areas.items() if n != end and not math.isnan(a)]
    return Separation(
        auc(*zip(*pooled, strict=True)) if pooled else math.nan,
        min(hidden, default=math.nan),
        areas.get(end, math.nan),
        (sum(labels), len(labels) - sum(labels)),
    )
