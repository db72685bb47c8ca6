"""Zhou et al. 2023: are the features of two networks linearly connected where the networks are?

What chapter 3 and its second page (the two conditions) run, measure, judge and draw. ::

    study = design(dataset="digits", **parameters)
    study.found[study.main.net, "spawned"]  # trained and measured when it is first asked for
    a02(study)  # the statistic of a claim

Two kinds of networks: perceptrons of several widths, whose pairs are independent and then matched,
and networks whose copies part early in training. Of both, independent pairs are the control.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from companion import data, models
from companion.core.errors import BadParameter
from companion.core.pool import one_thread
from companion.core.stats import Interval
from companion.core.theta import snapshot
from companion.data import Dataset
from companion.experiments.aligned import Method, pairs_of
from companion.experiments.budget import Plan
from companion.experiments.featured import (
    STATISTICS,
    Featured,
    Lemma,
    Scope,
    Separation,
    after_first,
    averaged,
    comparable,
    looks_of,
    mean_gap,
    over_pairs,
    rank_correlation,
    ratios,
    separation,
    survey,
)
from companion.experiments.instability import THRESHOLD, copy
from companion.experiments.pairs import Evaluation, Pair
from companion.features import Spectrum, Theorem, exact, feature_spectra, sites, theorem1
from companion.features import weight_spectra as spectra_of_weights
from companion.report import claims, figures, page, plots, provenance, recorded, tables
from companion.report.claims import Need, Statistic, Verdict, statistic
from companion.report.recorded import Record
from companion.training import Recipe, build, check_fit, load_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COPIES, INDEPENDENT = "spawned", "independent"
WEIGHTS, ACTIVATIONS = "weight matching", "activation matching"
START, TRAINED = "at initialisation", "trained"
SHARE = 1 / 32
"""Of training, after which the paper's copies part: 5 of 160 epochs."""

Key = tuple[str, str]
"""Network (the recipe's name for it) and kind of pair."""

Item = tuple[Pair, Method | str | None]
"""A pair, and the method that brings B to A."""

_KINDS = {COPIES: "copies"}


def called(net: str) -> str:
    """A network's name for people, with the width of a perceptron, which sets ours apart."""
    try:
        name, widths = models.title(net), models.describe(net).get("widths", ())
    except BadParameter:  # a record may have the name already
        return net
    return f"{widths[0]}-wide {name}" if len(set(widths)) == 1 else name


def kind(condition: str) -> str:
    """What a kind of pair is called on the page."""
    return _KINDS.get(condition, condition)


def titled(title: str) -> str:
    """The title of a panel as it was recorded, ``net · condition``, in words on two lines."""
    net, _, condition = title.partition(" · ")
    return f"{called(net)}\n{kind(condition)}" if condition else called(net)


# ---- design and experiments


@dataclass(frozen=True)
class Study:
    """The networks of one run of the chapter, and what is measured between them.

    Arguments:
        images: the dataset.
        main: recipe of the widest matched network.
        template: its network, with ``{width}`` for the width.
        widths: all, in rising order.
        trees: recipes of networks that are only copied.
        fork: share of training after which copies part.
        ks: fork steps of the first of them, or of ``main``.
        pairs: of each kind.
        scope: what is measured of each.
        train_examples: images for activation matching.
        max_error: percent, of gate G0.
        device, workers: where, and in how many processes.
    """

    images: Dataset
    main: Recipe
    template: str
    width: int
    widths: tuple[int, ...]
    trees: tuple[Recipe, ...]
    fork: float
    ks: tuple[int, ...]
    pairs: int
    scope: Scope
    train_examples: int
    max_error: float
    device: str
    workers: int

    def at_width(self, width: int) -> Recipe:
        """The recipe of the matched network at another width."""
        return replace(self.main, net=self.template.replace("{width}", str(width)))

    @property
    def both(self) -> tuple[int, ...]:
        """The widths at which everything is measured: a quarter of the main one, and that one."""
        return tuple(w for w in (self.width // 4, self.width) if w in self.widths)

    @property
    def swept(self) -> Recipe:
        """The recipe whose fork step is varied."""
        return self.trees[0] if self.trees else self.main

    @property
    def forks(self) -> dict[Recipe, int]:
        """Recipe -> the step at which its copies part."""
        return {r: round(r.steps * self.fork) for r in (self.main, *self.trees)}

    @property
    def started(self) -> list[str]:
        """The networks that are copied."""
        return [r.net for r in (self.main, *self.trees)]

    @property
    def matched(self) -> dict[str, Method | None]:
        """How B is brought to A: not at all, and by each method."""
        return {
            INDEPENDENT: None,
            WEIGHTS: Method("weights"),
            ACTIVATIONS: Method("activations", examples=self.train_examples),
        }

    def copies(self, recipe: Recipe, k: int) -> list[Pair]:
        """Pairs of copies that part at step k, each with the momentum it had there."""
        ends = [
            [copy(recipe, i, k, number, optimizer="restore") for number in (1, 2)]
            for i in range(self.pairs)
        ]
        return [Pair(a, b) for a, b in ends]

    def plans(self, *, sweeps: bool = True) -> list[Plan]:
        """What is measured, for the budget; without ``sweeps`` no fork steps and other widths."""
        tasks = looks_of([item for items in self._whole().values() for item in items], self.scope)
        if sweeps:
            rest = (*self._others().values(), *self._forked().values())
            lines = replace(self.scope, parts=())
            tasks += looks_of([item for items in rest for item in items], lines)
        return [tasks]

    @property
    def evaluation(self) -> Evaluation:
        """How a pair is measured, for the budget."""
        return Evaluation(points=self.scope.points, train_examples=self.train_examples)

    @cached_property
    def found(self) -> dict[Key, list[Featured]]:
        """Network, kind of pair -> its pairs, of which everything is measured."""
        return self._survey(self._whole())

    @cached_property
    def narrower(self) -> dict[Key, list[Featured]]:
        """The matched network at the other widths: features and the line only."""
        return self._survey(self._others(), parts=())

    @cached_property
    def along(self) -> dict[int, list[Featured]]:
        """Fork step -> pairs of copies that part there: features and the line only."""
        own, seen = self.forks[self.swept], self._survey(self._forked(), parts=())
        return {k: self.found[self.swept.net, COPIES] if k == own else seen[k] for k in self.ks}

    @cached_property
    def spectra(self) -> dict[tuple[int, str], tuple[Spectrum, Spectrum]]:
        """Width, when -> singular values of a middle matrix, and of a middle layer's features."""
        few, out = self.images.train.head(2000), {}
        for w in dict.fromkeys((min(self.widths), self.width)):
            run = pairs_of(self.at_width(w), 1)[0].a
            module = build(run, self.images, torch.device(self.device))
            # By name: a stored state dict need not have the module's order.
            matrices = [n for n, p in module.named_parameters() if p.ndim > 1]
            inner = matrices[len(matrices) // 2].removesuffix(".weight")
            ends = {START: snapshot(module), TRAINED: load_weights(run, device=self.device)}
            for when, theta in ends.items():
                with one_thread():
                    theta = {n: v.to(self.device) for n, v in theta.items()}
                    at = [s.name for s in sites(module, few.x[:2]) if not s.same]
                    at = [n for n in at if n != "output"]
                    where = (at[len(at) // 2],)
                    (seen,) = feature_spectra(module, theta, few, layers=where, centred=True)
                    (held,) = spectra_of_weights(module, theta, names=(inner,))
                    out[w, when] = (held, seen)
        return out

    def _whole(self) -> dict[Key, list[Item]]:
        groups: dict[Key, list[Item]] = {
            (r.net, COPIES): [(p, None) for p in self.copies(r, k)] for r, k in self.forks.items()
        }
        for r in self.trees:
            groups[r.net, INDEPENDENT] = [(p, None) for p in pairs_of(r, self.pairs)]
        for w in self.both:
            groups |= self._at(w)
        return groups

    def _others(self) -> dict[Key, list[Item]]:
        others = [w for w in self.widths if w not in self.both]
        return {key: items for w in others for key, items in self._at(w).items()}

    def _forked(self) -> dict[int, list[Item]]:
        own = self.forks[self.swept]
        return {k: [(p, None) for p in self.copies(self.swept, k)] for k in self.ks if k != own}

    def _independent(self, width: int) -> list[Pair]:
        return pairs_of(self.at_width(width), self.pairs)

    def _at(self, width: int) -> dict[Key, list[Item]]:
        net, pairs = self.at_width(width).net, self._independent(width)
        return {(net, c): [(p, method) for p in pairs] for c, method in self.matched.items()}

    def _survey(self, groups: Mapping[Any, Any], **changed: Any) -> dict[Any, list[Featured]]:
        scope = replace(self.scope, **changed)
        how = {"max_error": self.max_error, "device": self.device, "workers": self.workers}
        return survey(groups, scope, **how) if groups else {}

    # ---- what several claims and figures read

    @cached_property
    def good(self) -> dict[Key, list[Featured]]:
        """:attr:`found`, the valid pairs of each."""
        return {key: [f for f in results if f.valid] for key, results in self.found.items()}

    @cached_property
    def apart(self) -> list[Featured]:
        """The valid independent pairs of networks that are copied, not linearly connected."""
        return [f for n in self.started for f in self.good[n, INDEPENDENT] if wall(f)]

    @cached_property
    def forked(self) -> dict[str, list[Featured]]:
        """Network -> its valid pairs of copies that are linearly connected."""
        return {n: [f for f in self.good[n, COPIES] if not wall(f)] for n in self.started}

    @cached_property
    def connected(self) -> list[Featured]:
        """All pairs of :attr:`forked`."""
        return [f for n in self.started for f in self.forked[n]]

    @cached_property
    def joined(self) -> dict[Key, list[Featured]]:
        """Matched network, method -> its valid pairs that are linearly connected after matching."""
        nets = dict.fromkeys((self.main.net, self.at_width(self.both[0]).net))
        keys = [(n, c) for n in nets for c in (WEIGHTS, ACTIVATIONS)]
        return {key: [f for f in self.good[key] if not wall(f)] for key in keys}

    @cached_property
    def by_width(self) -> dict[str, dict[int, list[Featured]]]:
        """Kind of pair -> width -> pairs."""
        every = {**self.found, **self.narrower}
        return {c: {w: every[self.at_width(w).net, c] for w in self.widths} for c in self.matched}

    @cached_property
    def all_pairs(self) -> list[Featured]:
        """Every valid pair that was measured, once."""
        own = self.forks[self.swept]  # which are among the found ones
        parted = [results for k, results in self.along.items() if k != own]
        groups = (*self.found.values(), *self.narrower.values(), *parted)
        return [f for results in groups for f in results if f.valid]

    @property
    def panels(self) -> list[Key]:
        """Networks and kinds of pairs in the order of figures and tables."""
        kinds = (COPIES, *self.matched)
        return [(n, c) for n in self.started for c in kinds if (n, c) in self.found]

    @property
    def scale(self) -> str:
        """What the numbers rest on, in words."""
        nets = ", ".join(map(called, self.started))
        hardware = "CPU" if self.device == "cpu" else provenance.record()["gpu"]["name"]
        return f"{self.images.label}, {nets}, {self.pairs} pairs of each kind, {hardware}"


def design(
    *,
    dataset: str,
    net: str | None,
    width: int | None,
    widths: list[int] | None,
    steps: int | None,
    optimizer: str | None,
    lr: float | None,
    batch: int | None,
    weight_decay: float | None,
    spawned: list[str] | None,
    spawned_steps: int | None,
    fork: float | None,
    pairs: int,
    points: int,
    max_error: float,
    train_examples: int | None,
    test_examples: int | None,
    precision: str,
    device: str,
    workers: int,
    ks: list[int] | None = None,
) -> Study:
    """The study that the chapter's parameters ask for; what is None follows from the dataset.

    Raises:
        BadParameter: a value that cannot be, before anything is trained; MissingData: no dataset.
    """
    where = str(data.resolve_device(device))
    images = data.load(dataset, where)
    colour = images.in_shape[0] == 3 and where != "cpu"
    small = min(images.in_shape[1:]) <= 8
    digits = dataset == "digits"
    if colour if net is None else not net.startswith("mlp"):
        base = Recipe(
            net="resnet20:norm=layer",
            data=dataset,
            steps=12_000,
            lr=0.1,
            weight_decay=5e-4,
            schedule="cosine",
            warmup=400,
            augment="none" if small else "flip+crop4",
        )
        net = net or "resnet20:width={width},norm=layer"
        width, widths = width or 64, [16, 32] if widths is None else widths
    elif digits:
        base = Recipe(
            net="mlp",
            data=dataset,
            steps=500,
            batch=48,
            lr=0.1,
            schedule="step",
            milestones=(0.85,),
        )
    else:
        base = Recipe(net="mlp", data=dataset, steps=3000, batch=128, optimizer="adam", lr=1e-3)
    net = net or ("mlp:widths={width}x3" + ("" if digits else ",init=lecun"))
    width, widths = width or 512, [32, 128] if widths is None else widths
    fork = fork if fork is not None else 1 / 8 if digits else 1 / 32
    if pairs < 1 or "{width}" not in net or not 0 <= fork < 1:
        raise BadParameter(
            "pairs: 1 or more; net: a name with {width} in it; fork: a share of training, from 0 "
            "to below 1."
        )
    given: dict[str, Any] = {
        "steps": steps,
        "optimizer": optimizer,
        "lr": lr,
        "batch": batch,
        "weight_decay": weight_decay,
        "precision": precision,
    }
    base = replace(base, warmup=min(base.warmup, (steps or base.steps) // 10))
    base = replace(base, **{k: v for k, v in given.items() if v is not None})
    main = replace(base, net=net.replace("{width}", str(width)))

    photos = images.in_shape[0] == 3 and not small  # on any device
    branch = Recipe(
        net="vgg16" if colour else "vgg11:width=8",
        data=dataset,
        steps=spawned_steps or (12_000 if colour else 400),
        batch=128 if photos else 48,
        lr=0.1 if colour else 0.03,
        schedule="step",
        milestones=(0.5, 0.75),
        weight_decay=1e-4,
        augment="flip+crop4" if photos else "crop1",
        precision=precision,
    )
    if spawned is None:
        narrow = ["vgg11:width=8", "resnet8:width=8"] if digits else []
        spawned = ["vgg16", "resnet20"] if colour else narrow
    # ResNets take a larger step than narrow VGGs
    trees = tuple(
        replace(branch, net=n, lr=0.1 if n.startswith("resnet") else branch.lr) for n in spawned
    )
    swept = trees[0] if trees else main
    last = swept.steps
    if ks is None:
        ks = [0, round(last / 128), round(last / 32), round(last / 8), last // 2]
    ks = sorted({*ks, round(last * fork)})
    if not all(0 <= k < last for k in ks):
        raise BadParameter(f"ks: {ks} must be steps from 0 to {last - 1} (T = {last}).")
    study = Study(
        images=images,
        main=main,
        template=net,
        width=width,
        widths=tuple(sorted({*widths, width})),
        trees=trees,
        fork=fork,
        ks=tuple(ks),
        pairs=pairs,
        scope=Scope(points=points, test_examples=test_examples),
        train_examples=train_examples or (500 if digits else 10_000),
        max_error=max_error,
        device=where,
        workers=workers,
    )
    for recipe in (*map(study.at_width, study.widths), *trees):
        check_fit(recipe, images)
    return study


# ---- numbers of one pair, and of several


def wall(found: Featured) -> bool:
    """Whether the pair's error barrier is above chapter 1's 2 points."""
    return found.height() > THRESHOLD


def height(found: Featured) -> float:
    """The pair's test error barrier in points."""
    return found.height()


def last(values: Mapping[str, float]) -> float:
    """Of the output, the last layer."""
    return list(values.values())[-1]


def mean(values: Iterable[float]) -> float:
    """Of the finite ones; NaN of none."""
    finite = [v for v in values if math.isfinite(v)]
    return float(np.mean(finite)) if finite else math.nan


def largest(values: Iterable[float]) -> float | None:
    """None of nothing; NaN if one is NaN, which no order would hide."""
    every = list(values)
    return float(np.max(every)) if every else None


def near_one(found: Featured, bn: str | None = None) -> float:
    """Share of the layers whose median c lies between 0.8 and 1.25 (A04)."""
    values = after_first(found.coefficients(bn=bn)).values()
    return float(np.mean([0.8 <= c <= 1.25 for c in values]))


def hidden_ratios(found: Featured) -> list[float]:
    """R of the layers between the first and the output."""
    return list(after_first(found.ratios()).values())[:-1]


def places(found: Featured) -> list[Any]:
    """Where networks were stitched: the sites that nothing goes around, each once (in a residual
    block the shortcut would)."""
    assert found.stitching is not None
    once = {"input", *found.gaps(), *found.stitching.outputs}
    return [r for r in found.stitching.select() if r.cut and r.name in once]


def stitched(found: Featured) -> dict[str, float]:
    """Site -> test error (%) of B with A's output there."""
    return {r.name: r.error for r in places(found)}


def above(found: Featured) -> list[float]:
    """Stitched error minus that of the worse network, in points, for every site."""
    assert found.stitching is not None
    worse = max(end.error for end in found.stitching.ends.values())
    return [r.error - worse for r in places(found)[1:]]


def middle(found: Featured) -> float:
    """Median of :func:`above` over the middle third of the sites (A10)."""
    values = above(found)
    third = len(values) // 3
    return float(np.median(values[third : len(values) - third]))


def hardest(found: Featured) -> tuple[float, str]:
    """Points above the worse end, and where; the output's own row is A."""
    assert found.stitching is not None
    inner = [
        (points, row.name)
        for points, row in zip(above(found), places(found)[1:], strict=True)
        if row.name not in found.stitching.outputs
    ]
    return max(inner)


def additivity(found: Featured) -> dict[str, float]:
    """ReLU -> median Dist_sigma at alpha = 1/2."""
    assert found.additivity is not None
    return {x.name: x.distance[0.5].median for x in found.additivity.layers}


def opposite(found: Featured) -> float:
    """Percent of a ReLU's inputs whose sign differs between A and B, mean over ReLUs."""
    assert found.additivity is not None
    return mean(x.opposite for x in found.additivity.layers)


DISTANCES: Mapping[str, Callable[[Any], float]] = {
    "Dist_com": lambda x: x.com,
    "Dist_W": lambda x: x.weights,
    "Dist_H": lambda x: x.inputs,
}


def distances(found: Featured, of: str) -> dict[str, float]:
    """Layer -> distance, after the first layer, whose inputs are the images themselves."""
    assert found.commutativity is not None
    return {x.name: DISTANCES[of](x) for x in found.commutativity.layers[1:]}


def commuting(found: Featured) -> float:
    """Share of the layers after the first in which Dist_com is a tenth of the others or less."""
    assert found.commutativity is not None
    return float(np.mean([x.ratio <= 0.1 for x in found.commutativity.layers[1:]]))


def relative(found: Featured) -> float:
    """Median over the layers after the first of Dist_com over the smaller of the others."""
    assert found.commutativity is not None
    return float(np.median([x.ratio for x in found.commutativity.layers[1:]]))


# ---- claims


def _said(values: Mapping[str, float], form: str = "{:.0%}") -> str:
    return ", ".join(f"{k} {form.format(v)}" for k, v in values.items())


def _statistic(
    study: Study, value: float | Interval | None, *needs: Need, **more: Any
) -> Statistic:
    """A claim's statistic, which needs two pairs at least."""
    return statistic(value, *needs, (study.pairs >= 2, "one pair decides nothing"), **more)


def _walls(study: Study) -> Need:
    return bool(study.apart), "independent pairs are connected, too"


def _copied(study: Study) -> Need:
    return bool(study.connected), "no pair of copies is connected"


def _contrast(study: Study) -> list[str]:
    """Networks with connected copies and independent pairs."""
    return [
        n
        for n in study.started
        if study.good[n, COPIES] and study.good[n, INDEPENDENT] and study.forked[n]
    ]


def _comparable(study: Study) -> Need:
    return bool(_contrast(study)), "no network with connected and independent pairs"


def _far_and_near(
    study: Study, net: str, value: Callable[[Featured], Mapping[str, float]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Layer -> mean over independent pairs, and over connected copies."""
    return averaged(study.good[net, INDEPENDENT], value), averaged(study.forked[net], value)


def _over(above: Mapping[str, float], below: Mapping[str, float]) -> dict[str, float]:
    """Layer -> quotient; NaN where both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {n: float(np.divide(above[n], below[n])) for n in above}


def _shares(study: Study, value: Callable[[Featured], float]) -> dict[str, float]:
    """Of each connected group, the mean over pairs; by name."""
    groups = {f"{called(n)}, copies": study.forked[n] for n in study.started}
    groups |= {f"{called(n)}, {c}": fs for (n, c), fs in study.joined.items()}
    return {k: mean(map(value, fs)) for k, fs in groups.items() if fs}


def heights_at_the_papers_share(study: Study) -> dict[str, list[float]]:
    """Network -> barriers of copies that part after 1/32 of training, as far as there are any."""
    early = min(study.ks, key=lambda k: abs(k - study.swept.steps * SHARE))
    groups = [(r, study.forks[r], study.found[r.net, COPIES]) for r in study.trees]
    if study.trees:
        groups.append((study.swept, early, study.along[early]))
    out = {}
    for recipe, k, found in groups:
        valid = [f.height() for f in found if f.valid]
        if abs(k / recipe.steps - SHARE) <= 0.005 and valid:
            out[called(recipe.net)] = valid
    return out


def a01(study: Study) -> Statistic:
    """Test error barrier of copies that part after the paper's share of training, the largest."""
    found = heights_at_the_papers_share(study)
    heights = {n: max(values) for n, values in found.items()}
    own = {
        called(r.net): max(f.height() for f in good)
        for r in study.trees
        if (good := study.good[r.net, COPIES])
    }
    return _statistic(
        study,
        largest(heights.values()),
        (bool(study.trees), "no convolutional network was copied"),
        (bool(heights), "no valid copies that part after 3 % of training"),
        n=sum(map(len, found.values())),
        detail=f"copies part after 1/32 of training, the paper's share: "
        f"{_said(heights, '{:.1f}')}; after {study.fork:.1%}: {_said(own, '{:.1f}')}",
    )


def a02(study: Study) -> Statistic:
    """Whether every connected pair of copies has R of at most 1/4, and 1/2 in most layers."""
    seen = [ratios(f) for f in study.connected]
    return _statistic(
        study,
        all(r.holds for r in seen),
        _copied(study),
        n=len(seen),
        detail=f"copies that part after {study.fork:.1%} of training; largest median "
        f"{max((r.median for r in seen), default=math.nan):.2f}, fewest layers "
        f"{min((r.low for r in seen), default=math.nan):.0%}",
    )


def a03(study: Study) -> Statistic:
    """Share of layers whose gap is 3 times larger for independent pairs; smallest over networks."""
    farther = {}
    for n in _contrast(study):
        far, near = _far_and_near(study, n, lambda f: after_first(f.gaps()))
        farther[called(n)] = float(np.mean([far[layer] >= 3 * near[layer] for layer in far]))
    value = min(farther.values(), default=None)
    return _statistic(study, value, _comparable(study), _walls(study), detail=_said(farther))


def a04(study: Study) -> Statistic:
    """Share of the layers with c near 1, the smallest over connected kinds of pairs."""
    found = _shares(study, near_one)
    return _statistic(study, min(found.values(), default=None), detail=_said(found))


def a05(study: Study) -> Statistic:
    """Error of the interpolated network above Err_A + Err_B, the largest over connected pairs."""
    every = study.all_pairs
    low = [f.lemma() for f in every if not wall(f)]
    broken = sum(f.lemma().violations for f in every)
    high = max((f.lemma().excess for f in every if wall(f)), default=math.nan)
    return _statistic(
        study,
        max((x.excess for x in low), default=None),
        n=len(low),
        detail=f"0.2 points are {0.2 * low[0].examples / 100 if low else math.nan:.1f} images; "
        f"above it: {sum(x.excess > 0.2 for x in low)} of the pairs; mixed logits exceed it at "
        f"{broken} of {len(every) * study.scope.points} points; unconnected pairs by up to "
        f"{high:.0f} points",
    )


def a06(study: Study) -> Statistic:
    """Median Dist_sigma of copies over that of independent pairs, the largest over ReLUs."""
    found = {}
    for n in _contrast(study):
        far, near = _far_and_near(study, n, additivity)
        if (most := largest(_over(near, far).values())) is not None:
            found[called(n)] = most
    value, detail = largest(found.values()), _said(found, "{:.2f}")
    return _statistic(study, value, _comparable(study), _walls(study), detail=detail)


def a07(study: Study) -> Statistic:
    """Share of the layers that commute, the smallest over networks and kinds of connected pairs."""
    found = _shares(study, commuting)
    return _statistic(study, min(found.values(), default=None), detail=_said(found))


BUILT: Mapping[str, tuple[bool, bool]] = {
    "both conditions": (True, True),
    "not additive": (False, True),
    "not commuting": (True, False),
}
"""Pairs of networks built for Theorem 1: whether they are weakly additive, and commute."""


def prove(widths: Sequence[int] = (20, 64, 48, 10)) -> dict[str, Theorem]:
    """Theorem 1 on built networks, in float64."""
    return {
        title: theorem1(exact(widths, additive=additive, commuting=commuting))
        for title, (additive, commuting) in BUILT.items()
    }


def a08(study: Study) -> Statistic:
    """The larger of |1 − cos| and |c − 1| on networks built to meet both conditions."""
    found = prove()
    one = found["both conditions"]
    met = one.conditions < 1e-20 and one.layers[-1].baseline > 0.01
    return Statistic(
        max(one.gap, one.c),
        detail=f"with one condition broken: {found['not additive'].gap:.2g} and "
        f"{found['not commuting'].gap:.2g}",
        note="" if met else "the networks miss a condition, or are one network",
        testable=met,
    )


def a09(study: Study) -> Statistic:
    """Stitched error above the worse end, the largest over layers of connected copies."""
    most = {called(n): max(max(above(f)) for f in fs) for n, fs in study.forked.items() if fs}
    pairs = (*study.connected, *study.apart)
    exactly = all(f.stitching is not None and f.stitching.closed for f in pairs)
    return _statistic(
        study,
        max(most.values(), default=0) if exactly else math.inf,
        _copied(study),
        n=len(study.connected),
        detail=f"{_said(most, '{:.1f}')}; last layer: {'exactly A' if exactly else 'NOT A'}",
    )


def a10(study: Study) -> Statistic:
    """The same in the middle third of the layers of independent pairs, the smallest."""
    walls = {
        called(n): min(map(middle, fs))
        for n in study.started
        if (fs := [f for f in study.good[n, INDEPENDENT] if wall(f)])
    }
    value, detail = min(walls.values(), default=None), _said(walls, "{:.0f}")
    return _statistic(study, value, _walls(study), n=len(study.apart), detail=detail)


def a11(study: Study) -> Statistic:
    """Whether matching leaves a tenth of the barrier, and A02's rule holds after it only."""
    left, turned = {}, []
    for n, c in study.joined:
        before = over_pairs(study.found[n, INDEPENDENT], height)
        after = over_pairs(study.found[n, c], height)
        if before and after:
            if before.value > 0:
                left[f"{called(n)}, {c}"] = max(after.value, 0) / before.value
            turned.append(
                not any(ratios(f).holds for f in study.good[n, INDEPENDENT])
                and all(ratios(f).holds for f in study.good[n, c])
            )
    return _statistic(
        study,
        bool(left) and max(left.values()) <= 0.1 and all(turned),
        (bool(left), "no valid pair"),
        (study.template.startswith("mlp"), "asked of perceptrons"),
        _walls(study),
        detail=f"barrier left: {_said(left, '{:.1%}')}; A02 only after matching: {sum(turned)} of "
        f"{len(turned)}",
    )


def a12(study: Study) -> Statistic:
    """Mean Dist_com after matching over that before, the largest over layers and methods."""
    left = {}
    for n, c in study.joined:
        first, then = (
            averaged(study.good[n, k], lambda f: distances(f, "Dist_com")) for k in (INDEPENDENT, c)
        )
        if first and then and (most := largest(_over(then, first).values())) is not None:
            left[f"{called(n)}, {c}"] = most
    return _statistic(study, largest(left.values()), detail=_said(left, "{:.2f}"))


def along_the_fork(study: Study) -> Interval | None:
    """Rank correlation of barrier and features over fork steps, mean over pairs."""
    return rank_correlation(study.along, lambda k, f: f.height(), lambda k, f: mean_gap(f))


def a13(study: Study) -> Statistic:
    """Rank correlation of a pair's barrier and its mean E[1 − cos½] over fork steps."""
    return _statistic(
        study,
        along_the_fork(study),
        (len(study.ks) >= 4, "fewer than four fork steps"),
        detail=f"{called(study.swept.net)}, {len(study.ks)} fork steps",
    )


def along_the_width(study: Study) -> list[Interval | None]:
    """Rank correlation with width after weight matching, of the barrier and of the median R."""
    wide, least = study.by_width[WEIGHTS], min(4, len(study.widths))
    return [
        rank_correlation(wide, lambda w, f: w, value, least=least)
        for value in (lambda w, f: f.height(), lambda w, f: ratios(f).median)
    ]


def a14(study: Study) -> Statistic:
    """The weaker of the two rank correlations with width."""
    barrier, ratio = along_the_width(study)
    gone = None if barrier is None or ratio is None else max(barrier, ratio, key=lambda v: v.high)
    return _statistic(
        study,
        gone,
        (len(study.widths) >= 3, "fewer than three widths"),
        detail=""
        if gone is None
        else f"barrier {barrier}, median R {ratio}; widths {list(study.widths)}",
    )


CLAIMS: dict[str, Callable[[Study], Statistic]] = {
    "A01": a01,
    "A02": a02,
    "A03": a03,
    "A04": a04,
    "A05": a05,
    "A09": a09,
    "A10": a10,
    "A11": a11,
    "A13": a13,
    "A14": a14,
}
"""The claims of chapter 3."""

CONDITIONS: dict[str, Callable[[Study], Statistic]] = {
    "A06": a06,
    "A07": a07,
    "A08": a08,
    "A12": a12,
}
"""The claims of its second page, about the two conditions of Theorem 1."""


# ---- figures and tables: each has a function of its own for the numbers of its caption

Values = dict[str, float | str]

_BETWEEN = "A and B"
_PIECES = {"conv": "convolution", "norm": "normalisation", "relu": "ReLU", "linear": ""}


def place(name: str) -> str:
    """A layer's name for people: ``layer2.relu`` is "layer 2, ReLU", ``head`` the output."""
    if name == "head":
        return "output"
    if not (found := re.match(r"(layer|stage|stem)(\d*)(?:\.(\d+))?\.(.+)$", name)):
        return name
    where = {"layer": "layer", "stage": "block", "stem": "stem"}[found[1]]
    number = f" {found[2]}" if found[2] else ""
    number += f".{int(found[3]) + 1}" if found[3] and int(found[3]) else ""
    side = "shortcut " if found[4].startswith("shortcut.") else ""
    piece = found[4].removeprefix("shortcut.")
    what = re.match(r"([a-z]+)(\d*)$", piece)
    said = _PIECES.get(what[1], what[1]) + (f" {what[2]}" if what[2] else "") if what else piece
    return f"{where}{number}" + (f", {side}{said}" if said else "")


def _publish(fig: Figure, name: str, *, data: Mapping[str, Any], values: Values) -> None:
    """Publish a figure; the numbers of its caption are the page's, too, all but what is told."""
    figures.publish(fig, name, data=data, values=values)
    page.fill(**{k: v for k, v in values.items() if k not in ("told", "network")})


def basics(study: Study) -> Values:
    """What both pages say about their pairs."""
    return {
        "pairs": study.pairs,
        "spread": "95 % interval over pairs" if study.pairs > 3 else "lowest and highest pair",
        "data": study.images.label,
        "train_images": len(study.images.train),
        "test_images": len(study.images.test),
        "pixels": " × ".join(map(str, study.images.in_shape[1:])),
        "network": called(study.main.net),
        "fork": study.fork,
        "connected": THRESHOLD,
    }


def origin(study: Study, given: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a run of either page; ``given``: the parameters that were set."""
    return provenance.record(
        dataset={"name": study.images.label, "sha256": study.images.fingerprint},
        recipe=study.main.identity(),
        spawned=[r.identity() for r in study.trees],
        parameters=dict(given),
        device=study.device,
    )


def _told(study: Study, form: str, *values: Callable[[Featured], float]) -> str:
    """For an alternative text: numbers of every network and kind of pair, means over pairs."""
    return "; ".join(
        f"{called(n)}, {kind(c)}: " + form.format(*(mean(map(v, study.good[n, c])) for v in values))
        for n, c in study.panels
        if study.good[n, c]
    )


Curves = Mapping[str, Sequence[Mapping[str, float]]]
"""Label -> a number of each layer, for each pair."""


def _by_layer(
    name: str,
    panels: Mapping[str, tuple[str, Curves]],
    *,
    values: Values,
    ylabel: str,
    log: bool = True,
    band: tuple[float, float] | None = None,
    plain: Sequence[str] = (),
) -> None:
    """Curves over the layers, a panel each: key of the data -> title and curves."""
    fig, axes = plots.grid(len(panels), columns=3, height=3.8, sharey=True)
    drawn = {}
    for ax, (key, (title, curves)) in zip(axes, panels.items(), strict=True):
        if band:
            ax.axhspan(*band, color="#999999", alpha=0.25, linewidth=0)
        worded = {
            label: [{place(n): v for n, v in one.items()} for one in group]
            for label, group in curves.items()
        }
        drawn[key] = plots.by_layer(ax, worded, log=log, plain=plain)
        ax.set_title(title, fontsize=10)
    if not log:
        axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel(ylabel)
    plots.legend(fig)
    _publish(fig, name, data=drawn, values=values)


def _by_network(
    study: Study, value: Callable[[Featured], Mapping[str, float]]
) -> Mapping[str, tuple[str, Curves]]:
    """A panel for each network, a curve for each kind of pair."""
    out = {}
    for n in study.started:
        groups = {kind(c): study.good.get((n, c), []) for c in (COPIES, *study.matched)}
        out[called(n)] = called(n), {c: list(map(value, pairs)) for c, pairs in groups.items()}
    return out


def _of_main(study: Study, **values: Callable[[Featured], float]) -> Values:
    """Numbers of the main network, ``copies_…``, ``independent_…`` and so on: means over pairs."""
    net = study.main.net
    return {"network": called(net)} | {
        f"{short}_{what}": mean(map(value, study.good[net, c]))
        for c, short in _SHORT.items()
        for what, value in values.items()
    }


_SHORT = {
    COPIES: "copies",
    INDEPENDENT: "independent",
    WEIGHTS: "matched",
    ACTIVATIONS: "activations",
}


def stitching_values(study: Study) -> Values:
    """Of llfc-stitching: the highest stitched error of each network and kind of pair."""
    most = {"stitched": lambda f: max(stitched(f).values())}
    return _of_main(study, **most) | {"told": _told(study, "at most {:.1f}", *most.values())}


def show_stitching(study: Study) -> None:
    """Test error of B with one layer's output from A, layer by layer (the paper's Tables 2, 3)."""
    values, label = stitching_values(study), "test error, stitched (%)"
    panels = _by_network(study, stitched)
    _by_layer("llfc-stitching", panels, values=values, ylabel=label, log=False)


THREE = (COPIES, INDEPENDENT, WEIGHTS)
"""The kinds of pairs of the main network that figures with a panel each show."""


def arrows(study: Study) -> dict[str, dict[str, float]]:
    """Kind of pair -> angles (degrees) and a length at the output of the main network.

    ``between``: the angle of the two networks' features; ``off``: of the averaged network's
    feature from the average of the two; ``length``: of that average over the averaged network's.
    """
    out = {}
    for c in THREE:
        if pairs := study.good[study.main.net, c]:
            gaps = [last(f.baselines()) for f in pairs], [last(f.gaps()) for f in pairs]
            cosines = (min(max(1 - mean(gap), -1), 1) for gap in gaps)
            between, off = (math.degrees(math.acos(x)) for x in cosines)
            length = mean(last(f.lengths()) for f in pairs)
            out[kind(c)] = {"between": between, "off": off, "length": length}
    return out


def arrows_values(study: Study) -> Values:
    """Of llfc-arrows: the angles and lengths in words."""
    found = arrows(study)
    said = (
        f"{c}: {v['between']:.0f} degrees between A and B, {v['off']:.0f} off the average, "
        f"{v['length']:.1f} times too short"
        for c, v in found.items()
    )
    off = {f"{_SHORT[c]}_off": found.get(kind(c), {}).get("off", math.nan) for c in THREE}
    ends = _of_main(study, length=lambda f: last(f.lengths()))
    return ends | off | {"told": "; ".join(said)}


def show_arrows(study: Study) -> None:
    """Features of A, B, their average, and that of the averaged network, as arrows to scale."""
    found = arrows(study)
    fig, axes = plots.grid(len(found), columns=3, height=3.1, sharex=True, sharey=True)
    for ax, (pairs, one) in zip(axes, found.items(), strict=True):
        half, off = math.radians(one["between"] / 2), math.radians(one["off"])
        x, y = math.sin(half), math.cos(half)
        length = y / one["length"]
        between = (length * math.sin(off), length * math.cos(off))
        for label, end, colour in (
            ("A and B", (-x, y), "C0"),
            ("", (x, y), "C0"),
            ("average of the two", (0.0, y), "black"),
            ("the averaged network", between, "C1"),
        ):
            look = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", end, (0, 0), arrowprops=look)
            ax.plot([], [], color=colour, label=label)
        ax.set(title=pairs, xlim=(-0.8, 0.8), ylim=(0, 1.1), aspect="equal")
        ax.set_axis_off()
    plots.legend(fig)
    _publish(fig, "llfc-arrows", data=found, values=arrows_values(study))


def _three(
    study: Study, curves: Mapping[str, Callable[[Featured], Mapping[str, float]]]
) -> Mapping[str, tuple[str, Curves]]:
    """A panel for each of three kinds of pairs of the main network."""
    out = {}
    for c in THREE:
        pairs = study.good[study.main.net, c]
        heading = f"{kind(c)}\nbarrier {mean(map(height, pairs)):.1f} points"
        drawn = {label: list(map(value, pairs)) for label, value in curves.items()}
        out[f"{study.main.net} · {c}"] = (heading, drawn)
    return out


def layers_values(study: Study) -> Values:
    """Of llfc-layers: barriers, and how far features are off, of each panel."""
    return _of_main(
        study,
        wall=height,
        most=lambda f: max(after_first(f.gaps()).values()),
        output=lambda f: last(f.gaps()),
        between=lambda f: last(f.baselines()),
    )


def show_layers(study: Study) -> None:
    """E[1 − cos½] by layer, beside E[1 − cos(A, B)] (the paper's Figs. 2 to 4, one network)."""
    curves = {
        _BETWEEN: lambda f: after_first(f.baselines()),
        "α = ½": lambda f: after_first(f.gaps()),
    }
    how: dict[str, Any] = {"values": layers_values(study), "ylabel": "E[1 − cos]"}
    _by_layer("llfc-layers", _three(study, curves), plain=(_BETWEEN,), **how)


def rows(study: Study) -> dict[str, tuple[Interval, Interval]]:
    """Network and kind of pair -> R, median over the hidden layers, and at the output."""
    out = {}
    small = study.at_width(study.both[0]).net
    narrow = [(small, c) for c in study.matched if small != study.main.net]
    for n, c in (*study.panels, *narrow):
        pairs = study.found[n, c]
        barrier = over_pairs(pairs, height)
        hidden = over_pairs(pairs, lambda f: float(np.median(hidden_ratios(f))))
        output = over_pairs(pairs, lambda f: last(f.ratios()))
        if barrier and hidden and output:
            out[f"{called(n)}, {kind(c)} ({barrier.value:.1f} points)"] = (hidden, output)
    return out


def low_anyway(study: Study) -> tuple[float, int]:
    """Share of the hidden layers of independent, unconnected pairs of the matched networks that
    have R of at most a half, and the number of these pairs."""
    groups = study.by_width[INDEPENDENT].values()
    apart = [f for found in groups for f in found if f.valid and wall(f)]
    return mean(float(np.mean([v <= 0.5 for v in hidden_ratios(f)])) for f in apart), len(apart)


def ratios_values(study: Study) -> Values:
    """Of llfc-ratios: each row in words, and how often R is small without connectivity."""
    share, pairs = low_anyway(study)
    told = "; ".join(f"{n}: {a.value:.2f} and {b.value:.2f}" for n, (a, b) in rows(study).items())
    return {"told": told, "low_anyway": share, "apart": pairs}


def show_ratios(study: Study) -> None:
    """R in hidden layers (left) and at the output (right) of every network and kind of pair."""
    found, drawn = rows(study), {}
    fig, axes = plots.grid(2, height=0.42 * len(found) + 1.2, sharey=True)
    for i, (ax, name) in enumerate(zip(axes, ("hidden layers, median", "output"), strict=True)):
        points = {n: pair[i] for n, pair in found.items()}
        how: dict[str, Any] = {"threshold": 0.5, "form": "{:.2f}", "from_zero": False}
        drawn[name] = plots.conditions(ax, points, xlabel=f"R, {name}", **how)
    axes[1].set_xscale("log")
    _publish(fig, "llfc-ratios", data=drawn, values=ratios_values(study))


def coefficient_values(study: Study) -> Values:
    """Of llfc-coefficient: c at the output, and how much too short the averaged network's is."""
    told = _told(study, "{:.2f}", lambda f: last(f.coefficients()))
    ends = _of_main(study, c=lambda f: last(f.coefficients()), length=lambda f: last(f.lengths()))
    return ends | {"told": told}


def show_coefficient(study: Study) -> None:
    """The coefficient c, median over images, layer by layer (App. B.2 of the paper)."""
    panels = _by_network(study, lambda f: after_first(f.coefficients()))
    values, label = coefficient_values(study), "coefficient c at α = ½"
    _by_layer("llfc-coefficient", panels, values=values, ylabel=label, band=(0.8, 1.25))


def _lemmas(study: Study) -> tuple[list[Lemma], list[Lemma]]:
    """Of the first independent pair, if one is valid, as it is and after weight matching."""
    net = study.main.net
    one, two = ([f.lemma() for f in study.good[net, c][:1]] for c in (INDEPENDENT, WEIGHTS))
    return one, two


def lemma_values(study: Study) -> Values:
    """Of llfc-lemma: the bound and the largest errors of one pair; violations over all lines."""
    one, two = _lemmas(study)
    return {
        "network": called(study.main.net),
        "bound": mean(x.bound for x in one),
        "mixture": mean(max(x.mixture) for x in one),
        "path": mean(max(x.path) for x in one),
        "path_matched": mean(max(x.path) for x in two),
        "violations": sum(f.lemma().violations for f in study.all_pairs),
        "lines": len(study.all_pairs),
    }


def show_lemma(study: Study) -> None:
    """Lemma 1 on one independent pair: its bound, the mixed outputs, and networks on the line."""
    fig, (ax,) = plots.grid(1, height=3.6)
    one, two = _lemmas(study)
    curves = [("mixed outputs of A and B", x, x.mixture) for x in one]
    curves += [("averaged network", x, x.path) for x in one]
    curves += [("averaged network, after weight matching", x, x.path) for x in two]
    drawn: dict[str, Any] = {"bound": [x.bound for x in one]}
    for number, (label, lemma, errors) in enumerate(curves):
        plots.dashed(ax, lemma.bound, text="" if number else "error of A plus error of B")
        drawn[label] = plots.band(ax, lemma.alphas, [errors], label, number)
    ax.set(ylim=(0, None), xlim=(0, 1), xlabel="α, from A (0) to B (1)", ylabel="test error (%)")
    if curves:
        ax.legend(loc="upper left")
    _publish(fig, "llfc-lemma", data=drawn, values=lemma_values(study))


def along_steps(study: Study, value: Callable[[Featured], float]) -> dict[int, Interval]:
    """Fork step -> mean over valid pairs and its interval."""
    points = {k: over_pairs(results, value) for k, results in study.along.items()}
    return {k: v for k, v in points.items() if v is not None}


def fork_values(study: Study) -> Values:
    """Of llfc-fork: the first and the last step in numbers, all of them in words."""
    heights, gaps = along_steps(study, height), along_steps(study, mean_gap)
    shared = [k for k in study.ks if k in heights and k in gaps]
    said = [f"k = {k}: {heights[k].value:.1f} points, {gaps[k].value:.3f}" for k in shared]
    out: Values = {"told": "; ".join(said) or "no valid pair", "steps": len(study.ks)}
    for name, k in (("first", min(shared, default=-1)), ("last", max(shared, default=-1))):
        ends = (points[k].value if k in shared else math.nan for points in (heights, gaps))
        out |= dict(zip((name, f"{name}_barrier", f"{name}_gap"), (k, *ends), strict=True))
    return out | {"swept": called(study.swept.net)}


def show_fork(study: Study) -> None:
    """Barrier (left) and E[1 − cos½] over layers (right) against the fork step."""
    modes = study.along[study.ks[0]][0].modes
    name = called(study.swept.net)
    labels = {
        m: f"{name}{'' if m == modes[0] else ', BatchNorm estimated again'}, test" for m in modes
    }
    fig, axes = plots.grid(2, height=3.9)
    series: list[dict[str, dict[int, Interval]]] = [{}, {}]
    for mode, label in labels.items():
        series[0][label] = along_steps(study, partial(Featured.height, bn=mode))
        series[1][label] = along_steps(study, partial(mean_gap, bn=mode))
    how: dict[str, Any] = {"steps": study.swept.steps, "threshold": None}
    drawn = plots.against_k(axes[0], series[0], ylabel="test error barrier (points)", **how)
    drawn["gap"] = plots.against_k(
        axes[1], series[1], ylabel="E[1 − cos½], mean over layers", **how
    )
    plots.dashed(axes[0], THRESHOLD, text=f"{THRESHOLD:g} points: connected")
    if any(series[1].values()):  # some pair is valid
        axes[1].set_yscale("log")
    plots.legend(fig, columns=2)
    _publish(fig, "llfc-fork", data=drawn, values=fork_values(study))


def by_width(
    study: Study, condition: str, value: Callable[[Featured], float]
) -> dict[int, Interval]:
    """Width -> mean over valid pairs and its interval."""
    points = {w: over_pairs(fs, value) for w, fs in study.by_width[condition].items()}
    return {w: v for w, v in points.items() if v is not None}


def width_values(study: Study) -> Values:
    """Of llfc-width: barrier and median R at every width, in words."""
    parts = []
    for c in study.matched:
        heights = by_width(study, c, height)
        medians = by_width(study, c, lambda f: ratios(f).median)
        said = [
            f"{h.value:.2f} points and R {medians[w].value:.2f} at {w}" for w, h in heights.items()
        ]
        parts.append(f"{c}: " + ", ".join(said))
    after = by_width(study, WEIGHTS, height)
    return {
        "told": "; ".join(parts),
        "narrow": min(study.widths),
        "wide": study.width,
        "narrow_barrier": after[min(after)].value if after else math.nan,
        "wide_barrier": after[max(after)].value if after else math.nan,
    }


def show_width(study: Study) -> None:
    """Barrier (left) and the median of R (right) against width, before and after matching."""
    fig, axes = plots.grid(2, height=3.9)
    seen = [
        {f"{c}, test": by_width(study, c, value) for c in study.matched}
        for value in (height, lambda f: ratios(f).median)
    ]
    drawn = plots.sweep(axes[0], seen[0], xlabel="width", ylabel="test error barrier (points)")
    drawn["R"] = plots.sweep(axes[1], seen[1], xlabel="width", ylabel="R, median over layers")
    axes[0].set_yscale("symlog", linthresh=1)
    for ax in axes:
        ax.set_ylim(bottom=0)
    plots.legend(fig)
    _publish(fig, "llfc-width", data=drawn, values=width_values(study))


def rank_values(study: Study) -> Values:
    """Of llfc-rank: effective ranks of the narrow and of the wide network, and what they say."""
    found, out = study.spectra, {}
    for size, w in (("narrow", min(study.widths)), ("wide", study.width)):
        for when, at in (("start", START), ("trained", TRAINED)):
            for what, one in zip(("weights", "features"), found[w, at], strict=True):
                out[f"{size}_{what}_{when}"] = one.effective_rank
                out[f"{size}_{what}_full"] = len(one.values)
    told = "; ".join(
        f"width {w}, {when}: effective rank {a.effective_rank:.0f} of {len(a.values)} (weights), "
        f"{b.effective_rank:.0f} of {len(b.values)} (features)"
        for (w, when), (a, b) in found.items()
    )
    (held, seen), (first, before) = found[study.width, TRAINED], found[study.width, START]
    return {
        "told": told,
        "of_weights": place(held.name.removesuffix(".weight")),
        "of_features": place(seen.name),
        "weights_low": _low(held, first),
        "features_low": _low(seen, before),
        **out,
    }


def _low(trained: Spectrum, start: Spectrum) -> str:
    """Whether a matrix is of low rank, by half of its dimensions, and where it came from."""
    share = trained.effective_rank / len(trained.values)
    kept = trained.effective_rank / start.effective_rank
    word = "of low rank" if share <= 0.5 else "not of low rank"
    return (
        f"{word}: {share:.0%} of the dimensions count, {kept:.0%} of what counted before training"
    )


def show_rank(study: Study) -> None:
    """Singular values of a middle matrix and of a middle layer's features (Figs. 20 to 22)."""
    values = rank_values(study)
    fig, axes = plots.grid(2, height=3.6)
    drawn = {}
    for i, (ax, what) in enumerate(zip(axes, ("weights", "features"), strict=True)):
        series = {f"width {w}, {when}": s[i].profile for (w, when), s in study.spectra.items()}
        drawn[what] = plots.spectrum(ax, series)
        ax.set_title(f"{what} of {values[f'of_{what}']}", fontsize=10)
    plots.legend(fig)
    _publish(fig, "llfc-rank", data=drawn, values=values)


# ---- the second page: two conditions and a theorem


def show_theorem(proved: Mapping[str, Theorem]) -> None:
    """Theorem 1 on built networks, as a table."""
    tables.show(
        [
            "networks",
            "largest distance from the conditions",
            "largest |1 − cos|",
            "largest |c − 1|",
            "E[1 − cos(A, B)] at the output",
        ],
        [
            (n, f"{t.conditions:.1e}", f"{t.gap:.1e}", f"{t.c:.1e}", f"{t.layers[-1].baseline:.2f}")
            for n, t in proved.items()
        ],
        name="llfc-theorem",
        values={"samples": proved["both conditions"].samples},
    )


def additivity_values(study: Study) -> Values:
    """Of llfc-additivity: units with opposite signs in the main network, and all means."""
    form = "{:.3f}, and {:.0f} % of units with opposite signs"
    told = _told(study, form, lambda f: mean(additivity(f).values()), opposite)
    return _of_main(study, opposite=opposite) | {"told": told}


def show_additivity(study: Study) -> None:
    """Weak additivity of every ReLU, median over images (the paper's Figs. 5 and 6)."""
    values, panels = additivity_values(study), _by_network(study, additivity)
    _by_layer("llfc-additivity", panels, values=values, ylabel="Dist_σ at α = ½")


def commutativity_values(study: Study) -> Values:
    """Of llfc-commutativity: Dist_com over the smaller of the two others, median over layers."""
    far = {"weights": lambda f: mean(distances(f, "Dist_W").values())}
    told = _told(study, "{:.2f}", relative)
    return _of_main(study, relative=relative, **far) | {"told": told}


def show_commutativity(study: Study) -> None:
    """Dist_com beside the distances of weights and inputs, layer by layer (Figs. 7, 16 to 19)."""
    panels = _three(study, {d: partial(distances, of=d) for d in DISTANCES})
    values = commutativity_values(study)
    _by_layer("llfc-commutativity", panels, values=values, ylabel="distance")


def factors(study: Study) -> dict[str, dict[str, float]]:
    """Method -> distance -> what matching leaves of it, mean over layers of the main network."""
    out: dict[str, dict[str, float]] = {}
    for c in (WEIGHTS, ACTIVATIONS):
        for d in ("Dist_W", "Dist_H", "Dist_com"):
            first, then = (
                averaged(study.good[study.main.net, key], partial(distances, of=d))
                for key in (INDEPENDENT, c)
            )
            left = mean(_over(then, first).values()) if first and then else math.nan
            out.setdefault(c, {})[d] = left
    return out


def show_factors(study: Study) -> None:
    """The two factors of equation 9 and their product: what is left of each after matching."""
    found = factors(study)
    words = {
        "Dist_W": "the weights’ distance, Dist_W",
        "Dist_H": "the inputs’ distance, Dist_H",
        "Dist_com": "that of their product, Dist_com",
    }
    tables.show(
        ["left after", *found],
        [(said, *(f"{one[d]:.0%}" for one in found.values())) for d, said in words.items()],
        name="llfc-factors",
        values={"network": called(study.main.net)},
    )


def separations(study: Study) -> dict[str, Separation]:
    """Name of a number -> how well it tells unconnected from connected pairs of the perceptrons."""
    copied = {r.net for r in study.trees}
    pairs = [f for (n, _), fs in study.good.items() if n not in copied for f in fs]
    return {s: separation(comparable(pairs), value) for s, value in STATISTICS.items()}


def separation_values(study: Study) -> Values:
    """Of llfc-separation: how many pairs of each side there are, and how the ratio does."""
    found = separations(study)
    ratio = found["R, their ratio"]
    ranked = sorted(
        (s for s in found if not math.isnan(found[s].pooled)), key=lambda s: -found[s].pooled
    )
    return {
        "unconnected_pairs": ratio.pairs[0],
        "connected_pairs": ratio.pairs[1],
        "ratio_pooled": ratio.pooled,
        "ratio_output": ratio.output,
        "best": ranked[0] if ranked else "none",
        "best_pooled": found[ranked[0]].pooled if ranked else math.nan,
    }


def show_separation(study: Study) -> None:
    """Areas under ROC curves of every number, as a table."""
    areas = {s: (x.pooled, x.worst, x.output) for s, x in separations(study).items()}
    tables.show(
        ["number", "hidden layers, together", "hidden layers, the worst one", "output"],
        [(s, *("—" if math.isnan(v) else f"{v:.2f}" for v in row)) for s, row in areas.items()],
        name="llfc-separation",
    )
    page.fill(**separation_values(study))


# ---- records, and what the run found in words


def recorded_panels(record: Record) -> dict[str, dict[str, Any]]:
    """The panels of llfc-layers as they were recorded, the kinds and curves that are drawn."""
    kept = (record.data["figures"].get("llfc-layers") or {}).get("data") or {}
    out = {}
    for panel, one in kept.items():
        if panel.rpartition(" · ")[2] in THREE:
            curves = {k: v for k, v in one.items() if k in (_BETWEEN, "α = ½")}
            out[panel] = {"layers": [place(n) for n in one.get("layers", [])], **curves}
    return out


def show_records(records: Sequence[Record]) -> None:
    """Features layer by layer, and barriers along the fork step, as they were recorded."""
    kept = {record.name: panels for record in records if (panels := recorded_panels(record))}
    every = [(name, panel, one) for name, panels in kept.items() for panel, one in panels.items()]
    if every:
        fig, axes = plots.grid(len(every), columns=3, height=3.6, sharey=True)
        for ax, (name, panel, one) in zip(axes, every, strict=True):
            plots.redraw(ax, one, plain=(_BETWEEN,))
            ax.set_title(f"{name}\n{titled(panel)}", fontsize=8)
        for ax in axes[::3]:
            ax.set_ylabel("E[1 − cos]")
        plots.legend(fig)
        titles = " ".join(f"{record.title}." for record in records)
        figures.publish(fig, "llfc-recorded-layers", data=kept, values={"titles": titles})
    runs = recorded.curves(records, "llfc-fork")
    runs = {k: run for k, run in runs.items() if max(map(len, run[1].values())) > 1}
    if runs:  # one fork step is no curve
        fig, drawn = plots.panels(runs, threshold=None, ylabel="test error barrier (points)")
        values = {"told": forks_sentence(records)}
        figures.publish(fig, "llfc-recorded-fork", data=drawn, values=values)


def width_sentence(record: Record) -> str:
    """Barriers of a record at its narrowest and widest, before and after weight matching."""
    kept = (record.data["figures"].get("llfc-width") or {}).get("data") or {}
    before, after = (kept.get(f"{c}, test") or {"k": []} for c in (INDEPENDENT, WEIGHTS))
    if not before["k"] or before["k"] != after["k"]:
        return f"no barrier along the width in {record.name}"
    return f"in {record.name} " + " and ".join(
        f"from {before['mean'][i]:.1f} to {after['mean'][i]:.1f} points at width {before['k'][i]}"
        for i in (0, -1)
    )


def forks_sentence(records: Sequence[Record]) -> str:
    """The highest barrier along the fork step in every record that has several steps."""
    said = []
    for record in records:
        for _, series in recorded.curves([record], "llfc-fork").values():
            points = next(iter(series.values()))
            if len(points) > 1:
                most = max(v.value for v in points.values())
                said.append(f"{most:.1f} points at most over {len(points)} steps in {record.name}")
    return "; ".join(said) or "nothing is recorded"


def records_values(records: Sequence[Record]) -> Values:
    """What the records say about matching, and about copies along the fork step."""
    return {
        "recorded_widths": "; ".join(map(width_sentence, records)) or "nothing is recorded",
        "recorded_forks": forks_sentence(records),
    }


def worst_places(study: Study) -> str:
    """Where connected copies are stitched worst, by network."""
    peaks = {n: max(map(hardest, fs)) for n, fs in study.forked.items() if fs}
    said = (
        f"{called(n)}, {place(name)}: {points:.1f} points" for n, (points, name) in peaks.items()
    )
    return "; ".join(said) or "no pair of copies is connected"


def batchnorm(study: Study) -> str:
    """Barriers of independent networks with BatchNorm, interpolated and estimated again."""
    parts = []
    for r in study.trees:
        pairs = study.found[r.net, INDEPENDENT]
        if len(pairs[0].modes) > 1:
            one, two = (
                over_pairs(pairs, partial(Featured.height, bn=mode))
                for mode in ("interpolate", "reestimate")
            )
            if one and two:
                parts.append(
                    f"{called(r.net)}: {one.value:.0f} points with interpolated statistics, "
                    f"{two.value:.0f} with statistics estimated again"
                )
    return "; ".join(parts) or "no network here has BatchNorm"


def words(verdicts: Sequence[Verdict]) -> Values:
    """The verdict of each claim under its id, and which this run could not test, and why."""
    lacking = [v for v in verdicts if v.verdict == claims.NOT_TESTABLE]
    said = "; ".join(f"{v.claim.id} ({v.note or 'not measured'})" for v in lacking)
    known: Values = {v.claim.id.lower(): v.verdict for v in verdicts}
    return known | {"untested": said or "all of this page's claims could be tested"}


def findings(study: Study, verdicts: Sequence[Verdict]) -> Values:
    """Numbers and short sentences for the end of chapter 3."""
    heights = [h for values in heights_at_the_papers_share(study).values() for h in values]
    excess = [f.lemma().excess for f in study.all_pairs if not wall(f)]  # of connected pairs
    over = [points for points in excess if points > 0]
    return {
        "worst_places": worst_places(study),
        "batchnorm": batchnorm(study),
        "exceeding": len(over),
        "exceeding_most": max(over, default=0.0),
        "lemma_pairs": len(excess),
        "fork_rank": str(along_the_fork(study) or "not measured"),
        "one_image": 100 / len(study.images.test),
        "papers_height": max(heights, default=math.nan),
        **words(verdicts),
    }
