"""Zhou et al. 2023: are the features of two networks linearly connected where the networks are?

What chapter 3 runs, measures, judges and draws (of its second page: what both share). ::

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
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from companion import models
from companion.core.errors import BadParameter
from companion.core.pool import one_thread
from companion.core.stats import Interval, clustered, over_pairs
from companion.core.theta import snapshot
from companion.experiments.aligned import Method, pairs_of
from companion.experiments.budget import Plan
from companion.experiments.featured import (
    Featured,
    Scope,
    after_first,
    looks_of,
    mean_gap,
    rank_correlation,
    ratios,
    survey,
)
from companion.experiments.instability import THRESHOLD, copy
from companion.experiments.pairs import Pair
from companion.features import MODES, Spectrum, feature_spectra, sites
from companion.features import weight_spectra as spectra_of_weights
from companion.papers.rebasin import Setting, setting
from companion.report import claims, figures, page, plots, provenance, recorded
from companion.report.claims import Need, Statistic
from companion.report.recorded import Record
from companion.report.words import MISSING, Values, counted, listed, said
from companion.training import Recipe, build, check_fit, load_weights

COPIES, INDEPENDENT = "spawned", "independent"
WEIGHTS, ACTIVATIONS = "weight matching", "activation matching"
START, TRAINED = "at initialisation", "trained"
SHARE = 1 / 32
"""Of training, after which the paper's copies part: 5 of 160 epochs."""

THREE = (COPIES, INDEPENDENT, WEIGHTS)
"""The kinds of pairs of the main network that figures with a panel each show."""

SHORT = {
    COPIES: "copies",
    INDEPENDENT: "independent",
    WEIGHTS: "matched",
    ACTIVATIONS: "activations",
}
"""Kind of pair -> how the names of its numbers begin in the chapters."""

K = TypeVar("K")
Key: TypeAlias = tuple[str, str]
"""Network (the recipe's name for it) and kind of pair."""

Item: TypeAlias = tuple[Pair, Method | None]
"""A pair, and the method that brings B to A."""

Number: TypeAlias = Callable[[Featured], float]
Layers: TypeAlias = Callable[[Featured], Mapping[str, float]]
"""A number of a pair, and one of each of its layers."""


def called(net: str) -> str:
    """A network's name for people, with the width of a perceptron, which sets ours apart."""
    try:
        name, widths = models.title(net), models.describe(net).get("widths", ())
    except BadParameter:  # a record may have the name already
        return net
    return f"{widths[0]}-wide {name}" if len(set(widths)) == 1 else name


def kind(condition: str) -> str:
    """What a kind of pair is called on the page."""
    return "copies" if condition == COPIES else condition


# ---- design and experiments


@dataclass(frozen=True)
class Study(Setting):
    """The networks of one run of the chapter, and what is measured between them.

    Arguments:
        widths: of the matched networks, those of chapter 2, in rising order.
        trees: recipes of networks that are only copied.
        fork: share of training after which copies part.
        ks: fork steps of the first of them, or of ``main``.
    """

    widths: tuple[int, ...]
    trees: tuple[Recipe, ...]
    fork: float
    ks: tuple[int, ...]

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
    def matched(self) -> dict[str, Method | None]:
        """How B is brought to A: not at all, and by each method."""
        return {
            INDEPENDENT: None,
            WEIGHTS: Method("weights"),
            ACTIVATIONS: Method("activations", examples=self.evaluation.train_examples),
        }

    @cached_property
    def _asked(self) -> dict[str, tuple[dict[Any, list[Item]], Scope]]:
        """Survey -> groups of pairs, and what is measured of each."""

        def copies(recipe: Recipe, k: int) -> list[Item]:  # each with the momentum it had at k
            ends = partial(copy, recipe, optimizer="restore")
            return [(Pair(ends(i, k, 1), ends(i, k, 2)), None) for i in range(self.pairs)]

        whole: dict[Any, list[Item]] = {
            (recipe.net, COPIES): copies(recipe, k) for recipe, k in self.forks.items()
        }
        for recipe in self.trees:
            whole[recipe.net, INDEPENDENT] = [(p, None) for p in pairs_of(recipe, self.pairs)]
        others: dict[Any, list[Item]] = {}
        for width in self.widths:
            recipe, groups = self.at_width(width), whole if width in self.both else others
            for c, method in self.matched.items():
                groups[recipe.net, c] = [(p, method) for p in pairs_of(recipe, self.pairs)]
        own = self.forks[self.swept]  # which are among the whole ones
        forks = {k: copies(self.swept, k) for k in self.ks if k != own}
        asked = self.evaluation
        every = Scope(points=asked.points, test_examples=asked.test_examples)
        lines = replace(every, parts=())
        return {"whole": (whole, every), "widths": (others, lines), "forks": (forks, lines)}

    def plans(self) -> list[Plan]:
        """What is measured, for the budget."""
        asked = [(g, scope) for groups, scope in self._asked.values() for g in groups.values()]
        return [[task for g, scope in asked for task in looks_of(g, scope)]]

    def _survey(self, name: str) -> dict[Any, list[Featured]]:
        how = {"max_error": self.max_error, "device": self.device, "workers": self.workers}
        groups, scope = self._asked[name]
        return survey(groups, scope, **how) if groups else {}

    @cached_property
    def found(self) -> dict[Key, list[Featured]]:
        """Network, kind of pair -> its pairs, of which everything is measured."""
        return self._survey("whole")

    @cached_property
    def narrower(self) -> dict[Key, list[Featured]]:
        """The matched network at the other widths: features and the line only."""
        return self._survey("widths")

    @cached_property
    def along(self) -> dict[int, list[Featured]]:
        """Fork step -> pairs of copies that part there: features and the line only."""
        own, seen = self.forks[self.swept], self._survey("forks")
        return {k: self.found[self.swept.net, COPIES] if k == own else seen[k] for k in self.ks}

    @cached_property
    def spectra(self) -> dict[tuple[int, str], list[tuple[Spectrum, Spectrum]]]:
        """Width, when -> for A of every pair, the singular values of the weights of a middle layer,
        chosen by name, and of the features after it."""
        few, device = self.images.train.head(2000), torch.device(self.device)
        out: dict[tuple[int, str], list[tuple[Spectrum, Spectrum]]] = {}
        for w in dict.fromkeys((min(self.widths), self.width)):
            runs = [pair.a for pair in pairs_of(self.at_width(w), self.pairs)]
            for run in runs:
                module = build(run, self.images, device)
                matrices = [n for n, p in module.named_parameters() if p.ndim > 1]
                inner = matrices[len(matrices) // 2].removesuffix(".weight")
                ends = {START: snapshot(module), TRAINED: load_weights(run, device=self.device)}
                at = [s.name for s in sites(module, few.x[:2]) if not s.same]
                at.remove(at[-1])  # the output
                for when, theta in ends.items():
                    with one_thread():
                        theta = {n: v.to(device) for n, v in theta.items()}
                        (seen,) = feature_spectra(
                            module, theta, few, layers=(at[len(at) // 2],), centred=True
                        )
                        (held,) = spectra_of_weights(module, theta, names=(inner,))
                        out.setdefault((w, when), []).append((held, seen))
        return out

    # ---- what several claims and figures read

    @cached_property
    def good(self) -> dict[Key, list[Featured]]:
        """:attr:`found`, the valid pairs of each."""
        return {key: [f for f in results if f.valid] for key, results in self.found.items()}

    @cached_property
    def apart(self) -> list[Featured]:
        """The valid independent pairs of networks that are copied, not linearly connected."""
        return [f for r in self.forks for f in self.good[r.net, INDEPENDENT] if wall(f)]

    @cached_property
    def forked(self) -> dict[str, list[Featured]]:
        """Network -> its valid pairs of copies that are linearly connected."""
        return {r.net: [f for f in self.good[r.net, COPIES] if not wall(f)] for r in self.forks}

    @property
    def connected(self) -> list[Featured]:
        """All pairs of :attr:`forked`."""
        return [f for pairs in self.forked.values() for f in pairs]

    @cached_property
    def joined(self) -> dict[Key, list[Featured]]:
        """Matched network, method -> its valid pairs that are linearly connected after matching."""
        keys = [(self.at_width(w).net, c) for w in self.both[::-1] for c in (WEIGHTS, ACTIVATIONS)]
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
        return [(r.net, c) for r in self.forks for c in kinds if (r.net, c) in self.found]

    @property
    def scale(self) -> str:
        """What the numbers rest on, in words."""
        nets = ", ".join(called(r.net) for r in self.forks)
        hardware = provenance.hardware(self.device)
        return (
            f"{self.images.label}, {nets}, {counted(self.pairs, 'pair')} of each kind, {hardware}"
        )

    def words(self) -> Values:
        """What both pages say about their pairs."""
        return {
            "pairs": self.pairs,
            "spread": "90 % interval over pairs",
            "data": self.images.label,
            "train_images": len(self.images.train),
            "test_images": len(self.images.test),
            "one_image": 100 / len(self.images.test),
            "pixels": " × ".join(map(str, self.images.in_shape[1:])),
            "network": called(self.main.net),
            "fork": self.fork,
            "connected": THRESHOLD,
        }

    def provenance(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a reader needs to repeat the run of either page."""
        return super().provenance(given) | {"spawned": [r.identity() for r in self.trees]}


def design(
    *,
    widths: list[int] | None,
    spawned: list[str] | None,
    spawned_steps: int | None,
    fork: float | None,
    ks: list[int] | None = None,
    **common: Any,
) -> Study:
    """The study that the chapter's parameters ask for; what is None follows from the dataset.

    Arguments:
        common: those of chapter 2, for :func:`companion.papers.rebasin.setting`.

    Raises:
        BadParameter: a value that cannot be, before anything is trained; MissingData: no dataset.
    """
    found = setting(bn="interpolate", **common)
    images, main, digits = found.images, found.main, common["dataset"] == "digits"
    colour = images.in_shape[0] == 3 and found.device != "cpu"
    photos = images.in_shape[0] == 3 and min(images.in_shape[1:]) > 8  # on any device
    fork = fork if fork is not None else 1 / 8 if digits else 1 / 32
    if not 0 <= fork < 1:
        raise BadParameter(f"fork: {fork} must be a share of training, from 0 to below 1.")
    if widths is None:
        widths = [32, 64, 128] if found.is_mlp else [16, 32]
    branch = Recipe(
        net="vgg16" if colour else "vgg11:width=8",
        data=main.data,
        steps=(12_000 if colour else 400) if spawned_steps is None else spawned_steps,
        batch=128 if photos else 48,
        lr=0.1 if colour else 0.03,
        schedule="step",
        milestones=(0.5, 0.75),
        weight_decay=1e-4,
        augment="flip+crop4" if photos else "crop1",
        precision=main.precision,
    )
    if spawned is None:
        narrow = ["vgg11:width=8", "resnet8:width=8"] if digits else []
        spawned = ["vgg16", "resnet20"] if colour else narrow
    # ResNets take a larger step than narrow VGGs
    trees = tuple(
        replace(branch, net=n, lr=0.1 if n.startswith("resnet") else branch.lr) for n in spawned
    )
    last = (trees[0] if trees else main).steps
    if ks is None:
        ks = [0, round(last / 128), round(last / 32), round(last / 8), last // 2]
    ks = sorted({*ks, round(last * fork)})
    if not all(0 <= k < last for k in ks):
        raise BadParameter(f"ks: {ks} must be steps from 0 to {last - 1} (T = {last}).")
    widths = sorted({*widths, found.width})
    study = Study(**vars(found), widths=tuple(widths), trees=trees, fork=fork, ks=tuple(ks))
    for recipe in (*map(study.at_width, study.widths), *trees):
        check_fit(recipe, images)
    return study


# ---- numbers of one pair, and of several


def wall(found: Featured) -> bool:
    """Whether the pair's error barrier is above chapter 1's 2 points."""
    return found.height() > THRESHOLD


def last(values: Mapping[str, float]) -> float:
    """Of the output, the last layer."""
    return list(values.values())[-1]


def mean(values: Iterable[float]) -> float:
    """Of the finite ones; NaN of none."""
    finite = [v for v in values if math.isfinite(v)]
    return float(np.mean(finite)) if finite else math.nan


def intervals(groups: Mapping[K, Sequence[Featured]], value: Number) -> dict[K, Interval]:
    """Group -> mean over its valid pairs and the interval; those without one are left out."""
    found = {k: over_pairs(value(f) for f in pairs if f.valid) for k, pairs in groups.items()}
    return {k: one for k, one in found.items() if one}


def stitched(found: Featured) -> dict[str, float]:
    """Site -> test error (%) of B with A's output there, where nothing goes around it, and each
    site once (in a residual block the shortcut would)."""
    assert found.stitching is not None
    once = {"input", *found.gaps(), *found.stitching.outputs}
    return {r.name: r.error for r in found.stitching.select() if r.cut and r.name in once}


def above(found: Featured) -> dict[str, float]:
    """Site after the input -> stitched error minus that of the worse network, in points."""
    assert found.stitching is not None
    worse = max(end.error for end in found.stitching.ends.values())
    return {name: error - worse for name, error in after_first(stitched(found)).items()}


# ---- claims


def of_pairs(study: Study, value: float | Interval | None, *needs: Need, **more: Any) -> Statistic:
    """A claim's statistic, which needs two pairs at least."""
    return claims.statistic(value, *needs, (study.pairs >= 2, "one pair decides nothing"), **more)


def noted(found: Statistic, why: str) -> Statistic:
    """The statistic with a caveat under its verdict; what it lacks comes first."""
    return replace(found, note="; ".join(filter(None, (found.note, why))))


def walls(study: Study) -> Need:
    """Independent pairs to compare with."""
    return bool(study.apart), "independent pairs are connected, too"


def _copied(study: Study) -> Need:
    return bool(study.connected), "no pair of copies is connected"


def pooled(pairs: Iterable[Featured], value: Number) -> Interval | None:
    """Mean over the valid pairs of several networks, where the value is finite, with its interval:
    a pair that was matched twice is one sample."""
    found = [(f.pair, v) for f in pairs if f.valid and math.isfinite(v := value(f))]
    return clustered([v for _, v in found], [pair for pair, _ in found]) if found else None


def hardest(
    means: Iterable[Interval | None], which: Callable[[Iterable[float]], float]
) -> Interval | None:
    """The smallest (``min``) or largest (``max``) of several means: a rule passes if it does for
    each of them."""
    seen = [x for x in means if x]
    if not seen:
        return None
    value, low, high = (which([getattr(x, end) for x in seen]) for end in ("value", "low", "high"))
    n = next(x.n for x in seen if x.value == value)
    return Interval(value, low, high, n, min(x.clusters for x in seen))


def contrast(
    study: Study, value: Layers, compare: Callable[[list[float], list[float]], float], form: str
) -> Statistic:
    """A number of an independent pair's layers and of those of the connected copies of the same
    number, mean over all pairs."""
    found: dict[str, list[float]] = {}
    for n in study.forked:
        both = zip(study.found[n, INDEPENDENT], study.found[n, COPIES], strict=True)
        layers = [(value(x), value(y)) for x, y in both if x.valid and y.valid and not wall(y)]
        numbers = [compare([far[i] for i in far], [near[i] for i in far]) for far, near in layers]
        if numbers := [v for v in numbers if math.isfinite(v)]:
            found[called(n)] = numbers
    return of_pairs(
        study,
        over_pairs(v for numbers in found.values() for v in numbers),
        (bool(found), "no network with connected and independent pairs"),
        walls(study),
        detail=listed({n: mean(numbers) for n, numbers in found.items()}, form),
    )


LAYERS = 5
"""A share of fewer layers than these decides nothing."""


def share(holds: Callable[[Featured], Iterable[bool]]) -> Number:
    """Share of the layers for which something holds; NaN of fewer than :data:`LAYERS`."""

    def of(found: Featured) -> float:
        layers = list(holds(found))
        return float(np.mean(layers)) if len(layers) >= LAYERS else math.nan

    return of


def least_share(study: Study, holds: Callable[[Featured], Iterable[bool]]) -> Statistic:
    """Share of the layers for which something holds, mean over pairs: of copies, of matched pairs,
    and the smaller of the two."""
    value = share(holds)
    groups = {f"{called(n)}, copies": pairs for n, pairs in study.forked.items()}
    groups |= {f"{called(n)}, {c}": pairs for (n, c), pairs in study.joined.items()}
    seen = {k: pooled(pairs, value) for k, pairs in groups.items() if pairs}
    few = dict.fromkeys(k.rpartition(", ")[0] for k, one in seen.items() if not one)
    kinds = (study.connected, [f for pairs in study.joined.values() for f in pairs])
    return of_pairs(
        study,
        hardest((pooled(pairs, value) for pairs in kinds), min),
        (bool(seen), "no pair is connected"),
        (not seen or any(seen.values()), f"no network with {LAYERS} layers or more"),
        detail=listed({k: one for k, one in seen.items() if one}, "{:.0%}")
        + (f"; not counted, as of fewer than {LAYERS} layers: {', '.join(few)}" if few else ""),
    )


def near(found: Featured) -> float:
    """Share of the layers with R of at most a quarter at every alpha (claims A02, A11, A17)."""
    return ratios(found).near


def copies_at_the_papers_share(study: Study) -> dict[str, list[Featured]]:
    """Network -> valid copies that part after 1/32 of training, as far as there are any."""
    early = min(study.ks, key=lambda k: abs(k - study.swept.steps * SHARE))
    groups = [(r, study.forks[r], study.found[r.net, COPIES]) for r in study.trees]
    if study.trees:
        groups.append((study.swept, early, study.along[early]))
    out = {}
    for recipe, k, found in groups:
        valid = [f for f in found if f.valid]
        if abs(k / recipe.steps - SHARE) <= 0.005 and valid:
            out[called(recipe.net)] = valid
    return out


def not_the_papers(study: Study, *nets: str) -> str:
    """For a note: which networks and data stand in for the paper's own; empty if they are those."""
    theirs = {"VGG-16", "ResNet-20"}
    if study.images.name.partition("-")[0] == "cifar10" and theirs.issuperset(nets):
        return ""
    return (
        f"{', '.join(nets)} on {study.images.label}, {study.swept.steps} steps; the paper has "
        "VGG-16 and ResNet-20 on CIFAR-10, 160 epochs"
    )


def a01(study: Study) -> Statistic:
    """Test error barrier of copies that part after the paper's share of training."""
    found = copies_at_the_papers_share(study)
    own = {called(r.net): pooled(study.good[r.net, COPIES], Featured.height) for r in study.trees}
    heights = {n: pooled(pairs, Featured.height) for n, pairs in found.items()}
    return noted(
        of_pairs(
            study,
            pooled((f for pairs in found.values() for f in pairs), Featured.height),
            (bool(study.trees), "no convolutional network was copied"),
            (bool(found), "no valid copies that part after 3 % of training"),
            detail=f"copies part after 1/32 of training, the paper's share: "
            f"{listed(heights, '{:.1f}')}; after {said(study.fork, '{:.1%}')}: "
            f"{listed(own, '{:.1f}')}",
        ),
        not_the_papers(study, *found),
    )


def a02(study: Study) -> Statistic:
    """Share of the layers with R of at most 1/4 at every alpha, of connected copies."""
    found = {called(n): pooled(pairs, near) for n, pairs in study.forked.items() if pairs}
    alone = pooled(study.apart, near)
    return of_pairs(
        study,
        pooled(study.connected, near),
        _copied(study),
        detail=f"copies that part after {said(study.fork, '{:.1%}')} of training: "
        f"{listed(found, '{:.0%}')}; independent pairs {said(alone, '{:.0%}')}",
    )


def a03(study: Study) -> Statistic:
    """Share of layers whose gap is 3 times larger for independent pairs than for copies."""

    def farther(far: list[float], close: list[float]) -> float:
        layers = [x >= 3 * y for x, y in zip(far, close, strict=True)]
        return float(np.mean(layers)) if len(layers) >= LAYERS else math.nan

    return contrast(study, lambda f: after_first(f.gaps()), farther, "{:.0%}")


def a04(study: Study) -> Statistic:
    """Share of the layers with c near 1, the smaller of copies' and matched pairs'."""
    return least_share(
        study, lambda f: (0.8 <= c <= 1.25 for c in after_first(f.coefficients()).values())
    )


def a05(study: Study) -> Statistic:
    """Error of the mixed logits above Err_A + Err_B, the largest over all pairs and alphas."""
    lemmas = [f.lemma() for f in study.all_pairs]
    low = [f.lemma() for f in study.all_pairs if not wall(f)]
    above_it = sorted((x.images_above for x in low if x.images_above > 0), reverse=True)
    broken = sum(x.violations for x in lemmas)
    return claims.statistic(
        max((x.mixed_excess for x in lemmas), default=None),
        (bool(lemmas), "no valid pair"),
        n=len(lemmas),
        detail=f"above the bound at {broken} of {sum(len(x.alphas) for x in lemmas)} points. Not "
        f"judged, as no mixture: the interpolated network of connected pairs is above it in "
        f"{len(above_it)} of {len(low)}, by {above_it[0] if above_it else 0} of "
        f"{lemmas[0].examples if lemmas else 0} images at most",
    )


def a09(study: Study) -> Statistic:
    """Stitched error above the worse end, the largest over layers, mean over connected copies."""
    groups = {called(n): pairs for n, pairs in study.forked.items() if pairs}
    most = {n: [max(above(f).values()) for f in pairs] for n, pairs in groups.items()}
    pairs = (*study.connected, *study.apart)
    exactly = all(f.stitching is not None and f.stitching.closed for f in pairs)
    found = pooled(study.connected, lambda f: max(above(f).values()))
    told = {n: f"{min(v):.1f} to {max(v):.1f}" for n, v in most.items()}
    return noted(
        of_pairs(
            study,
            found if exactly else math.inf,
            _copied(study),
            detail=f"{'; '.join(f'{n} {v}' for n, v in told.items())}; last layer: "
            f"{'exactly A' if exactly else 'NOT A'}",
        ),
        not_the_papers(study, *groups),
    )


def a10(study: Study) -> Statistic:
    """The same, median over the middle third of the layers, mean over independent pairs."""

    def middle(found: Featured) -> float:
        values = list(above(found).values())
        third = len(values) // 3
        return float(np.median(values[third : len(values) - third]))

    kinds = {called(n): [f for f in study.apart if f.pair.a.recipe.net == n] for n in study.forked}
    found = {n: pooled(pairs, middle) for n, pairs in kinds.items() if pairs}
    return of_pairs(
        study, pooled(study.apart, middle), walls(study), detail=listed(found, "{:.0f}")
    )


def left(
    study: Study, compare: Callable[[Featured, Featured], float]
) -> tuple[Interval | None, dict[str, float]]:
    """What matching leaves: of a pair before and after, mean over pairs; and the mean of each
    network and method."""
    before = {f.pair: f for (_, c), pairs in study.good.items() if c == INDEPENDENT for f in pairs}
    groups = {
        f"{called(n)}, {c}": [f for f in study.good[n, c] if f.pair in before]
        for n, c in study.joined
    }

    def value(found: Featured) -> float:
        return compare(before[found.pair], found)

    every = pooled((f for pairs in groups.values() for f in pairs), value)
    return every, {name: mean(map(value, pairs)) for name, pairs in groups.items() if pairs}


def a11(study: Study) -> Statistic:
    """What matching leaves of the barrier, and of the layers with R above 1/4; the larger."""

    def of(value: Number) -> Callable[[Featured, Featured], float]:
        def share(one: Featured, two: Featured) -> float:
            before = value(one)
            return max(value(two), 0.0) / before if wall(one) and before > 0 else math.nan

        return share

    barrier, told = left(study, of(Featured.height))
    layers, _ = left(study, of(lambda f: 1 - near(f)))
    return of_pairs(
        study,
        hardest((barrier, layers), max),
        (bool(barrier and layers), "no valid pair with a barrier and layers to connect"),
        (study.is_mlp, "asked of perceptrons"),
        walls(study),
        detail=f"barrier left: {listed(told, '{:.1%}')}; layers with R above ¼ left: "
        f"{said(layers, '{:.0%}')}",
    )


def along_the_fork(study: Study) -> Interval | None:
    """Rank correlation of barrier and features over fork steps, mean over the pairs that are not
    connected at every step. The interval covers those with any one step left out."""

    def walled(found: Sequence[Featured]) -> list[bool]:
        return [f.valid and wall(f) for f in found]

    some = [any(column) for column in zip(*map(walled, study.along.values()), strict=True)]
    steps = {k: [f for f, yes in zip(v, some, strict=True) if yes] for k, v in study.along.items()}

    def without(step: int | None) -> Interval | None:
        kept = {k: found for k, found in steps.items() if k != step}
        return rank_correlation(kept, lambda k, f: f.height(), lambda k, f: mean_gap(f))

    whole, fewer = without(None), [x for k in steps if (x := without(k))]
    if not whole:
        return None
    every = [whole, *fewer]
    return replace(whole, low=min(x.low for x in every), high=max(x.high for x in every))


def a13(study: Study) -> Statistic:
    """Rank correlation of a pair's barrier and its mean E[1 − cos½] over fork steps."""
    found = along_the_fork(study)
    return of_pairs(
        study,
        found,
        (len(study.ks) >= 5, "fewer than five fork steps, of which one can be left out"),
        (bool(found), f"no pair with a barrier above {THRESHOLD:g} points at any fork step"),
        detail=f"{called(study.swept.net)}, {len(study.ks)} fork steps",
    )


def a14(study: Study) -> Statistic:
    """Rank correlation with width after weight matching, of the barrier and of the median R; the
    weaker of the two."""
    groups = study.by_width[WEIGHTS]
    along = partial(rank_correlation, groups, lambda w, f: w)
    barrier, ratio = along(lambda w, f: f.height()), along(lambda w, f: ratios(f).median)
    walled = any(f.valid and wall(f) for found in groups.values() for f in found)
    return of_pairs(
        study,
        hardest((barrier, ratio), max) if barrier and ratio else None,
        (len(study.widths) >= 4, "fewer than four widths"),
        (walled, f"no barrier above {THRESHOLD:g} points is left at any width"),
        detail=f"barrier {barrier}, median R {ratio}; widths {list(study.widths)}"
        if barrier and ratio
        else "",
    )


def low_rank(study: Study) -> dict[str, Interval | None]:
    """Weights and features of the widest networks -> effective rank of the trained middle layer
    over that of the same layer at initialisation, mean over networks."""
    start, trained = (study.spectra[study.width, when] for when in (START, TRAINED))
    return {
        what: over_pairs(
            t[i].effective_rank / s[i].effective_rank for s, t in zip(start, trained, strict=True)
        )
        for i, what in enumerate(("weights", "features"))
    }


def a15(study: Study) -> Statistic:
    """Effective rank, trained over initial, of weights and of features; the larger."""
    found = low_rank(study)
    trained = study.spectra[study.width, TRAINED]
    of_all = {
        what: mean(both[i].effective_rank / len(both[i].values) for both in trained)
        for i, what in enumerate(found)
    }
    return of_pairs(
        study,
        hardest(found.values(), max),
        detail=f"{called(study.main.net)}: {listed(found, '{:.0%}')} of the rank at "
        f"initialisation; of all dimensions {listed(of_all, '{:.0%}')}",
    )


def a16(study: Study) -> Statistic:
    """LLFC after straight-through matching: no pair of this page is matched by it."""
    return claims.statistic(
        None,
        (False, "no pair is matched by the straight-through estimator here (chapter 2 runs it)"),
    )


WIDEST = 512
"""Channels of a ResNet-20 of 32 times the usual width."""


def a17(study: Study) -> Statistic:
    """A02's share of layers in ResNet-20s of 32 times the usual width, matched by weights."""
    own = study.main.net.startswith("resnet20") and study.width >= WIDEST
    pairs = study.good[study.main.net, WEIGHTS] if own else []
    return of_pairs(
        study,
        pooled((f for f in pairs if not wall(f)), near),
        (own, f"asked of a ResNet-20 of 32 times the usual width ({WIDEST} channels)"),
    )


def halvings(found: Featured) -> float:
    """How often the output of the averaged network is halved for each layer after the first, beside
    the average of the two outputs: 0 if that is what it is, 1 by the exponentially weighted sum."""
    maps = sum(site.kind == "linear" for site in found.layers())
    length = last(found.lengths())
    return math.log2(length) / (maps - 1) if maps > 1 and length > 0 else math.nan


def a18(study: Study) -> Statistic:
    """Halvings of a feature's length a layer, mean over independent pairs of the widest network."""
    pairs = {c: study.good[study.main.net, c] for c in (INDEPENDENT, COPIES, WEIGHTS)}
    found = {kind(c): pooled(group, halvings) for c, group in pairs.items()}
    return of_pairs(
        study,
        found[INDEPENDENT],
        (study.is_mlp, "asked of perceptrons"),
        detail=listed(found),
    )


CLAIMS = {
    f.__name__.upper(): f
    for f in (a01, a02, a03, a04, a05, a09, a10, a11, a13, a14, a15, a16, a17, a18)
}


# ---- figures

_BETWEEN = "A and B"
_PLACE = r"(layer|stage|stem)(\d*)(?:\.(\d+))?\.(shortcut\.)?([a-z]+(?=\d*$)|.+)(\d*)$"
_WORDS = {"stage": "block", "conv": "convolution", "norm": "normalisation", "relu": "ReLU"}


def place(name: str) -> str:
    """A layer's name for people: ``layer2.relu`` is "layer 2, ReLU", ``head`` the output."""
    if not (found := re.match(_PLACE, name)):
        return "output" if name == "head" else name
    where, number, block, shortcut, piece, which = found.groups("")
    number += f".{int(block) + 1}" if block.strip("0") else ""
    one = ("shortcut" if shortcut else "", _WORDS.get(piece, piece.removesuffix("linear")), which)
    words = (" ".join(filter(None, w)) for w in ((_WORDS.get(where, where), number), one))
    return ", ".join(filter(None, words))


def of_main(study: Study, numbers: Mapping[str, Number]) -> Values:
    """Means over pairs of the main network: ``copies_…``, ``independent_…`` and so on."""
    return {
        f"{short}_{what}": mean(map(value, study.good[study.main.net, c]))
        for c, short in SHORT.items()
        for what, value in numbers.items()
    }


def in_words(study: Study, form: str, *values: Number) -> str:
    """For an alternative text: numbers of every network and kind of pair, means over pairs."""
    return "; ".join(
        f"{called(n)}, {kind(c)}: " + form.format(*(mean(map(v, study.good[n, c])) for v in values))
        for n, c in study.panels
        if study.good[n, c]
    )


Curves: TypeAlias = Mapping[str, Sequence[Mapping[str, float]]]
"""Label -> a number of each layer, for each pair."""


def by_network(study: Study, value: Layers) -> Mapping[str, tuple[str, Curves]]:
    """A panel for each network, a curve for each kind of pair."""
    out = {}
    for n in study.forked:
        groups = {kind(c): study.good.get((n, c), []) for c in (COPIES, *study.matched)}
        out[called(n)] = called(n), {c: list(map(value, pairs)) for c, pairs in groups.items()}
    return out


def by_kind(study: Study, curves: Mapping[str, Layers]) -> Mapping[str, tuple[str, Curves]]:
    """A panel for each of three kinds of pairs of the main network."""
    out = {}
    for c in THREE:
        pairs = study.good[study.main.net, c]
        heading = f"{kind(c)}\nbarrier {mean(f.height() for f in pairs):.1f} points"
        drawn = {label: list(map(value, pairs)) for label, value in curves.items()}
        out[f"{study.main.net} · {c}"] = (heading, drawn)
    return out


def by_layer(
    name: str,
    panels: Mapping[str, tuple[str, Curves]],
    ylabel: str,
    *,
    told: str = "",
    log: bool = True,
    band: tuple[float, float] | None = None,
    plain: Sequence[str] = (),
) -> None:
    """Publish curves over the layers, a panel each: key of the data -> title and curves."""
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
    figures.publish(fig, name, data=drawn, values={"told": told})


def show_stitching(study: Study) -> None:
    """Test error of B with one layer's output from A, layer by layer (the paper's Tables 2, 3)."""
    words = in_words(study, "at most {:.1f}", NUMBERS["stitched"])
    panels, label = by_network(study, stitched), "test error, stitched (%)"
    by_layer("llfc-stitching", panels, label, told=words, log=False)


def show_arrows(study: Study) -> None:
    """Features of A, B, their average, and that of the averaged network, as arrows to scale.

    The numbers are at the output of the main network. ``between``: the angle (degrees) of the two
    networks' features; ``off``: of the averaged network's feature from the average of the two;
    ``length``: of that average over the averaged network's.
    """
    found: dict[str, dict[str, float]] = {}
    for c in THREE:
        if pairs := study.good[study.main.net, c]:
            gaps = [last(f.baselines()) for f in pairs], [last(f.gaps()) for f in pairs]
            cosines = (min(max(1 - mean(gap), -1), 1) for gap in gaps)
            between, off = (math.degrees(math.acos(x)) for x in cosines)
            length = mean(last(f.lengths()) for f in pairs)
            found[kind(c)] = {"between": between, "off": off, "length": length}
    fig, axes = plots.grid(len(found), columns=3, height=3.1, sharex=True, sharey=True)
    words = []
    for ax, (group, one) in zip(axes, found.items(), strict=True):
        half, off = math.radians(one["between"] / 2), math.radians(one["off"])
        x, y = math.sin(half), math.cos(half)
        length = y / one["length"]
        for label, end, colour in (
            ("A and B", (-x, y), "C0"),
            ("", (x, y), "C0"),
            ("average of the two", (0.0, y), "black"),
            ("the averaged network", (length * math.sin(off), length * math.cos(off)), "C1"),
        ):
            look = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", end, (0, 0), arrowprops=look)
            ax.plot([], [], color=colour, label=label)
        ax.set(title=group, xlim=(-0.8, 0.8), ylim=(0, 1.1), aspect="equal")
        ax.set_axis_off()
        words.append(
            f"{group}: {one['between']:.0f} degrees between A and B, {one['off']:.0f} off the "
            f"average, {one['length']:.1f} times too short"
        )
    plots.legend(fig)
    figures.publish(fig, "llfc-arrows", data=found, values={"told": "; ".join(words)})
    nothing = {"off": math.nan}
    page.fill(**{f"{SHORT[c]}_off": found.get(kind(c), nothing)["off"] for c in THREE})


def show_layers(study: Study) -> None:
    """E[1 − cos½] by layer, beside E[1 − cos(A, B)] (the paper's Figs. 2 to 4, one network)."""
    curves: dict[str, Layers] = {
        _BETWEEN: lambda f: after_first(f.baselines()),
        "α = ½": lambda f: after_first(f.gaps()),
    }
    by_layer("llfc-layers", by_kind(study, curves), "E[1 − cos]", plain=(_BETWEEN,))


def show_ratios(study: Study) -> None:
    """R in hidden layers (left) and at the output (right) of every network and kind of pair."""

    def hidden(found: Featured) -> list[float]:
        return list(after_first(found.ratios()).values())[:-1]

    narrow = [(study.at_width(study.both[0]).net, c) for c in study.matched]
    groups = {}
    for n, c in (*study.panels, *narrow):
        if barrier := over_pairs(f.height() for f in study.good[n, c]):
            groups[f"{called(n)}, {kind(c)} ({barrier.value:.1f} points)"] = study.good[n, c]
    sides = {
        "hidden layers, median": intervals(groups, lambda f: float(np.median(hidden(f)))),
        "output": intervals(groups, lambda f: last(f.ratios())),
    }
    shown = [row for row in groups if all(row in side for side in sides.values())]
    fig, axes = plots.grid(2, height=0.42 * len(shown) + 1.2, sharey=True)
    how: dict[str, Any] = {"threshold": 0.5, "form": "{:.2f}", "from_zero": False}
    drawn = {
        name: plots.conditions(ax, {row: side[row] for row in shown}, xlabel=f"R, {name}", **how)
        for ax, (name, side) in zip(axes, sides.items(), strict=True)
    }
    one, two = sides.values()
    if positive := [two[row].value for row in shown if two[row].value > 0]:
        axes[1].set_xscale("log")
        axes[1].set_xlim(left=min(positive) / 3)  # an interval may reach below 0
    words = (f"{row}: {one[row].value:.2f} and {two[row].value:.2f}" for row in shown)
    figures.publish(fig, "llfc-ratios", data=drawn, values={"told": "; ".join(words)})
    # Where R is small without connectivity: independent pairs of the matched networks.
    every = [f for pairs in study.by_width[INDEPENDENT].values() for f in pairs]
    apart = [hidden(f) for f in every if f.valid and wall(f)]
    low = mean(float(np.mean([v <= 0.5 for v in values])) for values in apart)
    page.fill(low_anyway=low, apart=len(apart))


def show_coefficient(study: Study) -> None:
    """The coefficient c, median over images, layer by layer (App. B.2 of the paper)."""
    panels = by_network(study, lambda f: after_first(f.coefficients()))
    words = in_words(study, "{:.2f}", NUMBERS["c"])
    label = "coefficient c at α = ½"
    by_layer("llfc-coefficient", panels, label, told=words, band=(0.8, 1.25))


def show_lemma(study: Study) -> None:
    """Lemma 1 on the first independent pair, if it is valid: its bound, the mixed outputs, and the
    networks on the line as they are and after weight matching."""
    fig, (ax,) = plots.grid(1, height=3.6)
    pairs = (study.good[study.main.net, c][:1] for c in (INDEPENDENT, WEIGHTS))
    one, two = ([f.lemma() for f in first] for first in pairs)
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
    figures.publish(fig, "llfc-lemma", data=drawn)
    excess = [f.lemma().images_above for f in study.all_pairs if not wall(f)]  # of connected pairs
    page.fill(
        bound=mean(x.bound for x in one),
        mixture=mean(max(x.mixture) for x in one),
        path=mean(max(x.path) for x in one),
        path_matched=mean(max(x.path) for x in two),
        violations=sum(f.lemma().violations for f in study.all_pairs),
        lines=len(study.all_pairs),
        lemma_pairs=len(excess),
        exceeding=sum(images > 0 for images in excess),
        exceeding_most=max([0, *excess]),
    )


def show_fork(study: Study) -> None:
    """Barrier (left) and E[1 − cos½] over layers (right) against the fork step."""
    swept, modes = called(study.swept.net), study.along[study.ks[0]][0].modes
    labels = (f"{swept}, test", f"{swept}, BatchNorm estimated again, test")
    heights, gaps = (
        {
            label: intervals(study.along, partial(value, bn=mode))
            for label, mode in zip(labels, modes, strict=False)
        }
        for value in (Featured.height, mean_gap)
    )
    fig, (left, right) = plots.grid(2, height=3.9)
    how: dict[str, Any] = {"steps": study.swept.steps, "threshold": None}
    drawn = plots.against_k(left, heights, ylabel="test error barrier (points)", **how)
    drawn["gap"] = plots.against_k(right, gaps, ylabel="E[1 − cos½], mean over layers", **how)
    plots.dashed(left, THRESHOLD, text=f"{THRESHOLD:g} points: connected")
    shown = [x.value for one in gaps.values() for x in one.values() if x.value > 0]
    if shown:  # some pair is valid; an interval may reach below 0, which a log axis has not
        right.set_yscale("log")
        right.set_ylim(
            min(shown) / 2, 2 * max(x.high for one in gaps.values() for x in one.values())
        )
    plots.legend(fig, columns=2)
    both = {k: (h.value, gaps[labels[0]][k].value) for k, h in heights[labels[0]].items()}
    steps = (f"k = {k}: {height:.1f} points, {gap:.3f}" for k, (height, gap) in both.items())
    words = {"told": "; ".join(steps) or "no valid pair"}
    figures.publish(fig, "llfc-fork", data=drawn, values=words)
    for end, k in (("first", min(both, default=-1)), ("last", max(both, default=-1))):
        height, gap = both.get(k, (math.nan, math.nan))
        page.fill(**{end: k, f"{end}_barrier": height, f"{end}_gap": gap})
    papers = [f.height() for one in copies_at_the_papers_share(study).values() for f in one]
    rank = str(along_the_fork(study) or MISSING)
    page.fill(steps=len(study.ks), swept=swept, fork_rank=rank)
    page.fill(papers_height=max(papers, default=math.nan))


def show_width(study: Study) -> None:
    """Barrier (left) and the median of R (right) against width, before and after matching."""
    heights, medians = (
        {f"{c}, test": intervals(groups, value) for c, groups in study.by_width.items()}
        for value in (Featured.height, lambda f: ratios(f).median)
    )
    fig, (left, right) = plots.grid(2, height=3.9)
    drawn = plots.sweep(left, heights, xlabel="width", ylabel="test error barrier (points)")
    drawn["R"] = plots.sweep(right, medians, xlabel="width", ylabel="R, median over layers")
    left.set_yscale("symlog", linthresh=1)
    for ax in (left, right):
        ax.set_ylim(bottom=0)
    plots.legend(fig)
    words = []
    for label, points in heights.items():
        pairs = ((h.value, medians[label][w].value, w) for w, h in points.items())
        told = ", ".join(f"{h:.2f} points and R {r:.2f} at {w}" for h, r, w in pairs)
        words.append(f"{label.removesuffix(', test')}: {told}")
    figures.publish(fig, "llfc-width", data=drawn, values={"told": "; ".join(words)})
    after = heights[f"{WEIGHTS}, test"]
    for size, w in (("narrow", min(study.widths)), ("wide", study.width)):
        page.fill(**{size: w, f"{size}_barrier": after[w].value if w in after else math.nan})


def show_rank(study: Study) -> None:
    """Singular values of a middle matrix and of a middle layer's features (Figs. 20 to 22)."""
    found, narrow = study.spectra, min(study.widths)
    fig, axes = plots.grid(2, height=3.6)
    drawn: dict[str, Any] = {}
    values: Values = {"networks": study.pairs}

    def rank(w: int, when: str, i: int) -> float:
        return mean(both[i].effective_rank for both in found[w, when])

    for i, (ax, what) in enumerate(zip(axes, ("weights", "features"), strict=True)):
        one = {key: runs[0][i] for key, runs in found.items()}
        for size, w in (("narrow", narrow), ("wide", study.width)):
            values[f"{size}_{what}_start"] = rank(w, START, i)
            values[f"{size}_{what}_trained"] = rank(w, TRAINED, i)
            values[f"{size}_{what}_full"] = len(one[w, TRAINED].values)
        trained = one[study.width, TRAINED]
        values[f"{what}_kept"] = said(low_rank(study)[what], "{:.0%}")
        values[f"of_{what}"] = place(trained.name.removesuffix(".weight"))
        series = {f"width {w}, {when}": s.profile for (w, when), s in one.items()}
        drawn[what] = plots.spectrum(ax, series)
        ax.set_title(f"{what} of {values[f'of_{what}']}", fontsize=10)
    plots.legend(fig)
    words = (
        f"width {w}, {when}: effective rank {rank(w, when, 0):.0f} of {len(runs[0][0].values)} "
        f"(weights), {rank(w, when, 1):.0f} of {len(runs[0][1].values)} (features)"
        for (w, when), runs in found.items()
    )
    figures.publish(fig, "llfc-rank", data=drawn, values={"told": "; ".join(words)})
    page.fill(**values)


# ---- records, and what the run found in words


def _figure(record: Record, name: str) -> dict[str, Any]:
    """What a record's figure was drawn from; empty if it has none."""
    return (record.data["figures"].get(name) or {}).get("data") or {}


def show_records(records: Sequence[Record]) -> None:
    """Features layer by layer, and barriers along the fork step, as they were recorded."""
    kept: dict[str, dict[str, Any]] = {}
    for record in records:
        for panel, one in _figure(record, "llfc-layers").items():
            if panel.rpartition(" · ")[2] in THREE:
                curves = {k: v for k, v in one.items() if k in (_BETWEEN, "α = ½")}
                layers = [place(n) for n in one.get("layers", [])]
                kept.setdefault(record.name, {})[panel] = {"layers": layers, **curves}
    every = [(name, panel, one) for name, panels in kept.items() for panel, one in panels.items()]
    if every:
        fig, axes = plots.grid(len(every), columns=3, height=3.6, sharey=True)
        for ax, (name, panel, one) in zip(axes, every, strict=True):
            plots.redraw(ax, one, plain=(_BETWEEN,))
            net, _, condition = panel.partition(" · ")
            ax.set_title(f"{name}\n{called(net)}\n{kind(condition)}", fontsize=8)
        for ax in axes[::3]:
            ax.set_ylabel("E[1 − cos]")
        plots.legend(fig)
        titles = " ".join(f"{record.title}." for record in records)
        figures.publish(fig, "llfc-recorded-layers", data=kept, values={"titles": titles})
    runs = recorded.curves(records, "llfc-fork")
    runs = {k: run for k, run in runs.items() if max(map(len, run[1].values())) > 1}
    forks = forks_sentence(records)
    if runs:  # one fork step is no curve
        fig, drawn = plots.panels(runs, threshold=None, ylabel="test error barrier (points)")
        figures.publish(fig, "llfc-recorded-fork", data=drawn, values={"told": forks})
    widths = "; ".join(map(width_sentence, records)) or "nothing is recorded"
    page.fill(recorded_forks=forks, recorded_widths=widths)


def width_sentence(record: Record) -> str:
    """Barriers of a record at its narrowest and widest, before and after weight matching."""
    kept = _figure(record, "llfc-width")
    before, after = (kept.get(f"{c}, test") or {"k": []} for c in (INDEPENDENT, WEIGHTS))
    if not before["k"] or before["k"] != after["k"]:
        return f"no barrier along the width in {record.name}"
    return f"in {record.name} " + " and ".join(
        f"from {before['mean'][i]:.1f} to {after['mean'][i]:.1f} points at width {before['k'][i]}"
        for i in (0, -1)
    )


def forks_sentence(records: Sequence[Record]) -> str:
    """The highest barrier along the fork step in every record that has several steps."""
    words = []
    for record in records:
        for _, series in recorded.curves([record], "llfc-fork").values():
            points = next(iter(series.values()))
            if len(points) > 1:
                most = max(v.value for v in points.values())
                words.append(f"{most:.1f} points at most over {len(points)} steps in {record.name}")
    return "; ".join(words) or "nothing is recorded"


NUMBERS: Mapping[str, Number] = {
    "stitched": lambda f: max(stitched(f).values()),
    "length": lambda f: last(f.lengths()),
    "wall": Featured.height,
    "most": lambda f: max(after_first(f.gaps()).values()),
    "output": lambda f: last(f.gaps()),
    "c": lambda f: last(f.coefficients()),
    "halvings": halvings,
}
"""What the text says of each kind of pair of the main network, by the end of its name."""


def findings(study: Study) -> Values:
    """Numbers and short sentences of the page, besides those that its figures fill."""
    worst = []
    for n, pairs in study.forked.items():
        ends = {at for f in pairs if f.stitching for at in f.stitching.outputs}  # where B is A
        points = [(v, at) for f in pairs for at, v in above(f).items() if at not in ends]
        worst += [f"{called(n)}, {place(at)}: {v:.1f} points" for v, at in sorted(points)[-1:]]
    batchnorm = []
    for r in study.trees:
        pairs = study.good[r.net, INDEPENDENT]
        if pairs and len(pairs[0].modes) > 1:
            one, two = (mean(f.height(mode) for f in pairs) for mode in MODES)
            batchnorm.append(
                f"{called(r.net)}: {one:.0f} points with interpolated statistics, {two:.0f} with "
                "statistics estimated again"
            )
    return of_main(study, NUMBERS) | {
        "worst_places": "; ".join(worst) or "no pair of copies is connected",
        "batchnorm": "; ".join(batchnorm) or "no network here has BatchNorm",
    }
