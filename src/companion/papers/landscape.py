"""Singh et al. 2024, "Landscaping Linear Mode Connectivity": a ridge, or one mountainside?

Why is there a barrier between two copies of a network, or none? Copies of chapter 1's network are
looked at while they train: loss, slope and curvature at both ends of the line and half-way, for the
whole network and layer by layer, and the logits. Only the paper's abstract could be read: the
formulas are ours, and so are most of the claims. ::

    study = design(dataset="digits")
    study.geometry[0, 2000]  # copies that part at step 0, at the last step; one an initialisation
    claims.verdicts(CLAIMS, study)

Explained in our chapter 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from companion.connectivity import gates
from companion.core import stats
from companion.core.errors import BadParameter
from companion.core.stats import Interval, clustered
from companion.data import Dataset, Split
from companion.experiments.budget import Plan
from companion.experiments.instability import THRESHOLD, copy, trunk
from companion.experiments.landscape import (
    Bending,
    Bent,
    Gap,
    Geometry,
    Survey,
    bend_pairs,
    bends_of,
    decompose_pairs,
    gaps_of,
    survey_pairs,
    surveys_of,
)
from companion.experiments.layers import LayerSweep, sweep_pairs
from companion.experiments.methods import Method
from companion.experiments.pairs import Evaluation, Pair
from companion.landscape import (
    PREDICTORS,
    LogitGap,
    Surface,
    path_curvature,
    predictions,
    towards,
    weighted_curvature,
)
from companion.layerwise import Sweep
from companion.models import title
from companion.papers import instability
from companion.papers.forked import Forked
from companion.report import figures, plots, provenance, tables
from companion.report.claims import Need, Statistic, statistic
from companion.report.words import MISSING, Values, listed, said
from companion.training import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHAPTER = "06_landscape"

CALLED = {
    "distance": "squared distance alone",
    "angle": "angle alone",
    "curvature": "curvature at the ends",
    "taylor": "second order (both ends)",
    "cubic": "cubic (slopes alone)",
    "quintic": "quintic (slopes and curvatures)",
}
"""What may foretell a barrier -> the same for people; the first two know nothing of the loss."""

HALF = "weights"
"""How units are matched where networks of different initialisations are compared."""


# The design


@dataclass(frozen=True, eq=False)
class Study(Forked):
    """The chapter's experiment. A property that trains or measures does so once, when first read.

    Arguments:
        recipe: of the network, chapter 1's noisy one.
        images: the dataset.
        ks: fork steps, sorted.
        inits: independent W_0; of each W_k two copies are made.
        looks: steps of training at which copies are compared; the last is T.
        evaluation: how many images stand for a split, and the points of a line.
        bending: how curves between copies are trained; None: left out.
        device, workers: see :mod:`companion.training`.
    """

    recipe: Recipe
    images: Dataset
    ks: tuple[int, ...]
    inits: int
    looks: tuple[int, ...]
    evaluation: Evaluation
    bending: Bending | None
    device: str
    workers: int

    @property
    def drop(self) -> int | None:
        """The last step before the learning rate drops for the first time; None: it never does."""
        if self.recipe.schedule != "step" or not self.recipe.milestones:
            return None
        return round(self.recipe.milestones[0] * self.steps)

    @property
    def high(self) -> tuple[int, ...]:
        """The steps looked at with the full learning rate, after the last fork."""
        return tuple(step for step in self.looks if self.last < step <= (self.drop or 0))

    @property
    def before(self) -> int | None:
        """The last of them; None: there is none."""
        return max(self.high, default=None)

    @property
    def grid(self) -> list[tuple[int, int]]:
        """Every fork step, with each step at which its copies are compared."""
        return [(k, step) for k in self.ks for step in self.looks if step > k]

    def pairs(self, k: int, step: int) -> list[Pair]:
        """Copies 1 and 2 of W_k at a step of their training, one pair an initialisation."""
        out = []
        for init in range(self.inits):
            a, b = (copy(self.recipe, init, k, number) for number in (1, 2))
            out.append(Pair(a, b, step, start=(trunk(self.recipe, init), k)))
        return out

    @property
    def strangers(self) -> list[Pair]:
        """Finished networks of different initialisations, every pair of them."""
        firsts = [copy(self.recipe, init, 0, 1) for init in range(self.inits)]
        return [Pair(a, b) for a, b in combinations(firsts, 2)]

    # What is trained and measured

    def _survey(self, step: int) -> Survey:
        """Layers are looked at after the last step only."""
        how = self.evaluation
        return Survey(
            points=how.points,
            by="module" if step == self.steps else None,
            bn=how.bn,
            train_examples=how.train_examples,
            test_examples=how.test_examples,
        )

    @property
    def _single(self) -> Sweep:
        how = self.evaluation
        return Sweep(
            kinds=("single",),
            points=1,
            rest="a",
            bn=how.bn,
            train_examples=how.train_examples,
            test_examples=how.test_examples,
        )

    @property
    def _gap(self) -> Gap:
        return Gap(examples=self.evaluation.train_examples, bn=self.evaluation.bn)

    @property
    def _gaps(self) -> list[tuple[str, Pair, Method | None]]:
        """What the logits of a pair are told apart by, the pair, and how its units are matched."""
        ends = {f"part at k = {k}": self.pairs(k, self.steps) for k in (self.first, self.last)}
        copies = [(name, pair, None) for name, pairs in ends.items() for pair in pairs]
        other = [("other initialisations", pair, None) for pair in self.strangers]
        return [*other, *((MATCHED, pair, Method(HALF)) for pair in self.strangers), *copies]

    @property
    def _where(self) -> dict[str, Any]:
        return {"device": self.device, "workers": self.workers}

    @cached_property
    def geometry(self) -> dict[tuple[int, int], list[Geometry]]:
        """Fork step and step of training -> what lies between the copies, one an initialisation."""
        late = [key for key in self.grid if key[1] == self.steps]
        early = [key for key in self.grid if key[1] != self.steps]
        found: dict[tuple[int, int], list[Geometry]] = {}
        for keys in (early, late):  # what is asked first trains: all steps that are looked at
            if keys:
                pairs = [pair for key in keys for pair in self.pairs(*key)]
                each = iter(survey_pairs(pairs, self._survey(keys[0][1]), **self._where))
                found |= {key: [next(each) for _ in range(self.inits)] for key in keys}
        return {key: found[key] for key in self.grid}

    @cached_property
    def foretold(self) -> dict[tuple[int, int], list[dict[str, float]]]:
        """Fork step and step of training -> what may foretell the barrier, each name of
        :data:`CALLED` with its number, one mapping an initialisation."""
        known = {
            key: [{**one.controls(), **one.predictions()} for one in found]
            for key, found in self.geometry.items()
        }
        return {key: [{n: one[n] for n in CALLED} for one in of] for key, of in known.items()}

    @cached_property
    def layers(self) -> dict[int, list[dict[str, float]]]:
        """Fork step -> layer -> its train loss barrier after the last step, one an init."""
        _ = self.geometry
        out = {}
        for k in self.ks:
            found = sweep_pairs(
                self.pairs(k, self.steps), self._single, max_error=100.0, **self._where
            )
            singles = [one.heights("single", "train", "loss") for one in found]
            out[k] = [{name: both["a"] for name, both in one.items()} for one in singles]
        return out

    @cached_property
    def gaps(self) -> dict[str, list[LogitGap]]:
        """Kind of pair -> what its logits make of the barrier, one a pair."""
        _ = self.geometry
        asked = self._gaps
        measured = decompose_pairs([(p, m) for _, p, m in asked], self._gap, **self._where)
        out: dict[str, list[LogitGap]] = {}
        for (name, *_), gap in zip(asked, measured, strict=True):
            out.setdefault(name, []).append(gap)
        return out

    @cached_property
    def bends(self) -> list[Bent]:
        """A curve between the copies of each W_0, one an initialisation; empty if left out."""
        _ = self.geometry
        pairs = self.pairs(self.first, self.steps)
        return bend_pairs(pairs, self.bending, **self._where) if self.bending else []

    def plans(self) -> list[Plan]:
        """All of the above, for :func:`companion.report.page.budget`."""
        looks = [surveys_of(self.pairs(k, step), self._survey(step)) for k, step in self.grid]
        ends = [pair for k in self.ks for pair in self.pairs(k, self.steps)]
        pairs = [(pair, method) for _, pair, method in self._gaps]
        bends = [bends_of(self.pairs(self.first, self.steps), self.bending)]
        return [
            *looks,
            [LayerSweep(pair, self._single) for pair in ends],
            gaps_of(pairs, self._gap),
            *(bends if self.bending else []),
        ]

    # What the page says of it

    @property
    def scale(self) -> str:
        """What the numbers rest on, in a line."""
        hardware = provenance.hardware(self.device)
        return (
            f"{self.images.label}, {title(self.recipe.net)}, T = {self.steps}, {self.inits} inits, "
            f"one pair of copies each, {len(self.grid)} forks and steps, {hardware}"
        )

    def words(self) -> Values:
        """What captions and prose say of the whole page."""
        return {
            "network": title(self.recipe.net),
            "data": self.images.label,
            "T": self.steps,
            "first": self.first,
            "last": self.last,
            "inits": self.inits,
            "drop": MISSING if self.drop is None else self.drop,
            "before": MISSING if self.before is None else self.before,
            "points": self.evaluation.points,
            "images": f"{min(len(self.images.train), self.evaluation.train_examples or 10**9):,}",
        }

    def provenance(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a reader needs to repeat the page's run."""
        return provenance.record(
            dataset={"name": self.images.label, "sha256": self.images.fingerprint},
            network=self.recipe.identity(),
            parameters=dict(given),
            device=self.device,
        )


MATCHED = "other initialisations, units matched"


def design(
    *,
    dataset: str = "digits",
    net: str | None = None,
    steps: int | None = None,
    ks: Sequence[int] | None = None,
    lr: float | None = None,
    batch: int | None = None,
    inits: int = 3,
    looks: Sequence[float] = (0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.85, 1.0),
    bends: int = 1,
    bend_steps: int = 400,
    points: int = 31,
    train_examples: int | None = 10_000,
    test_examples: int | None = None,
    bn: str = "interpolate",
    precision: str = "float32",
    device: str = "auto",
    workers: int = 0,
) -> Study:
    """Chapter 1's network, and when its copies are looked at. Nothing is trained.

    The arguments are the chapter's parameters; None stands for chapter 1's own.

    Raises:
        BadParameter, MissingData, DeviceUnavailable: whatever is wrong with them.
    """
    if inits < 2:
        raise BadParameter(f"inits: {inits} must be 2 or more, for pairs of different ones.")
    one = instability.design(
        dataset=dataset,
        unstable=net,
        steps=steps,
        ks=ks,
        lr=lr,
        batch=batch,
        inits=inits,
        copies=2,
        points=points,
        train_examples=train_examples,
        test_examples=test_examples,
        bn=bn,
        precision=precision,
        device=device,
        workers=workers,
    )
    if not looks or any(not 0 < share <= 1 for share in looks):
        raise BadParameter(f"looks: {list(looks)} must hold shares of training, above 0 up to 1.")
    if bends < 0:
        raise BadParameter(f"bends: {bends} must be 0 (no curves) or more.")
    taken = {max(1, round(share * one.steps)) for share in looks} | {one.steps}
    return Study(
        recipe=one.noisy,
        images=one.images,
        ks=one.ks,
        inits=inits,
        looks=tuple(sorted(taken)),
        evaluation=one.evaluation,
        bending=Bending(
            bends=bends,
            steps=bend_steps,
            batch=one.noisy.batch,
            lr=one.noisy.lr / 4,
            bn=bn,
            train_examples=train_examples,
            test_examples=test_examples,
        )
        if bends
        else None,
        device=one.device,
        workers=workers,
    )


# Numbers that claims and figures share; every list has one value an initialisation


def over_inits(values: Sequence[float]) -> Interval:
    """Mean and interval over initialisations."""
    return clustered(list(values), range(len(values)))


def barriers(study: Study, k: int, step: int) -> list[float]:
    """The train loss barrier at ½ above the mean of the ends, with its sign, in nats."""
    return [one.barrier() for one in study.geometry[k, step]]


def walls(study: Study, k: int) -> Interval:
    """The train error barrier after the last step, in points: are the copies connected?"""
    return over_inits([one.curve.height("train") for one in study.geometry[k, study.steps]])


def descents(study: Study, k: int) -> list[tuple[float, float]]:
    """Shares of their train loss that the midpoint and the ends lose, from T/20 after the fork on;
    empty if nothing was looked at between there and T."""
    enough = k + study.steps / 20
    start = min((step for step in study.looks if step >= enough), default=study.steps)
    if start == study.steps:
        return []
    both = zip(study.geometry[k, start], study.geometry[k, study.steps], strict=True)
    return [
        (1 - late.mid() / early.mid(), 1 - late.mean_end() / early.mean_end())
        for early, late in both
    ]


def along(study: Study, k: int, value: Callable[[Geometry], float]) -> dict[int, Interval]:
    """Step of training -> a number of the copies that part at k."""
    steps = [step for at, step in study.grid if at == k]
    return {step: over_inits([value(one) for one in study.geometry[k, step]]) for step in steps}


def at_the_end(study: Study, value: Callable[[Geometry], float]) -> dict[int, Interval]:
    """Fork step -> a number of its copies after the last step."""
    return {k: over_inits([value(one) for one in study.geometry[k, study.steps]]) for k in study.ks}


def angle(one: Geometry, base: str = "init") -> float:
    """The angle between A and B seen from W_0 (``init``) or from W_k (``start``), in degrees; where
    k is 0 both are the same."""
    return math.degrees(math.acos(max(-1.0, min(1.0, one.cosines.get(base, one.cosines["init"])))))


def trend(study: Study, value: Callable[[Geometry], float]) -> list[float]:
    """Spearman's rank correlation of k and a number of the finished copies."""
    each = zip(*(study.geometry[k, study.steps] for k in study.ks), strict=True)
    return [stats.spearman(study.ks, [value(one) for one in row]) for row in each]


def _points(
    study: Study, name: str, init: int, ends: bool = False
) -> tuple[list[float], list[float]]:
    """What a prediction says and what is measured, for all forks and steps of an initialisation, or
    for those of the last step."""
    keys = [key for key in study.grid if key[1] == study.steps or not ends]
    measured = [study.geometry[key][init].barrier() for key in keys]
    return [study.foretold[key][init][name] for key in keys], measured


def ranks(study: Study, name: str, *, ends: bool = False) -> list[float]:
    """Rank correlation of a prediction with the measured barrier over forks and steps."""
    return [stats.spearman(*_points(study, name, init, ends)) for init in range(study.inits)]


def stepped(study: Study, name: str) -> list[float]:
    """The same from slopes and curvatures by small steps, which see the kinks of ReLUs."""
    out = []
    for init in range(study.inits):
        found = [study.geometry[key][init] for key in study.grid]
        told = [one.predictions(kinks=True)[name] for one in found]
        out.append(stats.spearman(told, [one.barrier() for one in found]))
    return out


def beyond(study: Study, name: str) -> list[float]:
    """The same, with what the squared distance tells taken out."""
    given = [_points(study, "distance", init)[0] for init in range(study.inits)]
    points = [_points(study, name, init) for init in range(study.inits)]
    both = zip(points, given, strict=True)
    return [stats.partial_spearman(*mine, theirs) for mine, theirs in both]


def slope(study: Study, name: str) -> float:
    """Slope of log barrier against log prediction, where both are above 0; 1 is the right scale."""
    points = [_points(study, name, init) for init in range(study.inits)]
    both = [pair for of in points for pair in zip(*of, strict=True) if min(pair) > 0]
    if len(both) < 3:
        return math.nan
    x, y = np.log(both).T
    return float(np.polyfit(x, y, 1)[0])


def leads(study: Study, name: str) -> list[float]:
    """By how much a prediction's rank correlation exceeds that of the squared distance alone."""
    both = zip(ranks(study, name), ranks(study, "distance"), strict=True)
    return [mine - theirs for mine, theirs in both]


def by_layer(study: Study, k: int) -> list[dict[str, tuple[float, float, float]]]:
    """Layer -> measured barrier, predicted barrier, and the layer's squared distance."""
    found = zip(study.layers[k], study.geometry[k, study.steps], strict=True)
    out = []
    for measured, one in found:
        predicted, blocks = one.layers("a"), one.end("a")
        squares = dict(zip(blocks.labels, blocks.squares, strict=True))
        out.append({n: (v, predicted[n], squares[n]) for n, v in measured.items()})
    return out


def layer_ranks(study: Study) -> dict[int, list[tuple[float, float]]]:
    """Fork step -> rank correlations over layers with the measured barrier: of the prediction, and
    of the layer's squared distance alone."""
    out: dict[int, list[tuple[float, float]]] = {}
    for k in study.ks:
        for layers in by_layer(study, k):
            measured, predicted, lengths = zip(*layers.values(), strict=True)
            both = stats.spearman(predicted, measured), stats.spearman(lengths, measured)
            out.setdefault(k, []).append(both)
    return out


def cross(study: Study, k: int) -> list[float]:
    """Share of the pairs of different layers in ΔᵀHΔ, the mean of both ends, after T."""
    both = ((one.cross_share("a"), one.cross_share("b")) for one in study.geometry[k, study.steps])
    return [float(np.mean(pair)) for pair in both]


def over_strangers(study: Study, values: Sequence[float]) -> Interval:
    """Mean over pairs of different initialisations, with an interval over networks."""
    return stats.over_networks(list(values), list(combinations(range(study.inits), 2)))


# Toys: losses of a few weights, for which all is known


class _Toy(nn.Module):
    """A loss of a few weights as a network whose output is the loss, whatever goes in."""

    def __init__(self, weights: int, formula: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(weights, dtype=torch.float64))
        self.formula = formula

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.formula(self.weights).expand(len(x))


def _itself(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The score of a toy: its output is the loss, and nothing is ever wrong."""
    return outputs.sum(), torch.zeros(()), len(targets)


@dataclass(frozen=True)
class Toy:
    """A segment in a landscape of a few weights.

    Arguments:
        a, b: its ends.
        formula: the loss.
        exact: the barrier at ½, by hand.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    formula: Callable[[torch.Tensor], torch.Tensor]
    exact: float


def _product(w: torch.Tensor) -> torch.Tensor:
    return (w[0] * w[1] - 1) ** 2


def _two_units(w: torch.Tensor) -> torch.Tensor:
    """Two ReLU units (incoming weights, outgoing weights) that should output their input."""
    x = torch.tensor([1.0, -1.0], dtype=w.dtype)
    return ((w[2:, None] * torch.relu(w[:2, None] * x)).sum(0) - x).square().mean()


TOYS = {
    "a bowl": Toy((1.0, 0.0), (0.0, 2.0), lambda w: w[0] ** 2 + 2 * w[1] ** 2, -2.25),
    "across a saddle": Toy((1.0, 1.0), (-1.0, 2.0), lambda w: w[1] ** 2 - w[0] ** 2, 0.75),
    "(ab − 1)², two sides of the summit": Toy((1.0, 1.0), (-1.0, -1.0), _product, 1.0),
    "(ab − 1)², one side": Toy((0.5, 2.0), (2.0, 0.5), _product, 0.31640625),
    "two units that change places": Toy(
        (1.0, -1.0, 1.0, -1.0), (-1.0, 1.0, -1.0, 1.0), _two_units, 1.0
    ),
}
"""Name -> a segment. Along each the loss is a polynomial of the fourth degree at most."""


def toys() -> dict[str, dict[str, float]]:
    """Toy -> the barrier as it is (``exact``) and measured, by curvature, and as foretold."""
    out = {}
    for name, toy in TOYS.items():
        net, one = (
            _Toy(len(toy.a), toy.formula),
            Split(torch.zeros(1, 1, 1, 1), torch.zeros(1).long()),
        )
        surface = Surface(net, one, score=_itself)
        a, b = ({"weights": torch.tensor(end, dtype=torch.float64)} for end in (toy.a, toy.b))
        alphas = [i / 12 for i in range(13)]
        losses = [
            surface.loss({"weights": torch.lerp(a["weights"], b["weights"], t)}) for t in alphas
        ]
        at_a, at_b = (surface.local(theta, towards(net, a, b)) for theta in (a, b))
        out[name] = {
            "exact": toy.exact,
            "measured": losses[6] - (losses[0] + losses[-1]) / 2,
            "identity": weighted_curvature(alphas, path_curvature(alphas, losses)),
            **predictions(at_a, at_b),
        }
    return out


# Claims: what each needs to be testable, and its statistic

_NEEDS: dict[str, tuple[Callable[[Study], bool], str]] = {
    "init": (lambda s: s.first == 0, "the grid has no k = 0"),
    "grid": (lambda s: len(s.ks) >= 4, "a rank correlation needs four k or more"),
    "wall": (
        lambda s: walls(s, s.first).low >= THRESHOLD,
        "between copies that part at the smallest k there is no certain barrier",
    ),
    "joined": (
        lambda s: walls(s, s.last).high < THRESHOLD,
        "copies that part at the largest k do not certainly end connected",
    ),
    "points": (
        lambda s: len(s.grid) >= 10,
        "too few forks and steps to rank: ten are needed",
    ),
    "drop": (
        lambda s: s.before is not None,
        "no step was looked at between the last fork and the drop of the learning rate",
    ),
    "bends": (lambda s: s.bending is not None, "curves were left out of this run"),
    "pairs": (lambda s: s.inits >= 3, "two initialisations make one pair"),
}


def _needs(study: Study, *names: str) -> list[Need]:
    return [(met(study), why) for met, why in (_NEEDS[name] for name in names)]


def _trained(study: Study) -> Need:
    """Whether the copies came to the end of their training."""
    ends = [one.curve.ends("train") for k in study.ks for one in study.geometry[k, study.steps]]
    error = float(np.mean(ends))
    told = f"the networks end with {error:.0f} % error on their own training images"
    return error <= gates.UNLEARNED, f"training was cut short: {told}"


def _trend(study: Study, value: Callable[[Geometry], float], detail: str = "") -> Statistic:
    """A rank correlation with k, one an initialisation."""
    found = trend(study, value)
    return statistic(
        over_inits(found),
        *_needs(study, "grid"),
        _trained(study),
        (not any(map(math.isnan, found)), "what is the same at every k has no trend"),
        detail=detail,
    )


def l01(study: Study) -> Statistic:
    """Rank correlation of k and the barrier of finished copies."""
    each = at_the_end(study, lambda one: one.barrier())
    return _trend(
        study,
        lambda one: one.barrier(),
        listed({f"k = {k}:": v for k, v in each.items()}, "{:.3f}"),
    )


def _descent(study: Study, k: int, *needs: Need) -> Statistic:
    found = descents(study, k)
    middle, ends = np.mean(found, axis=0) if found else (math.nan, math.nan)
    return statistic(
        over_inits([mine / theirs for mine, theirs in found]) if found else None,
        _trained(study),
        *needs,
        (bool(found), "no step was looked at between a twentieth of training and its end"),
        detail=f"k = {k}: the midpoint loses {middle:.0%} of its loss, the ends {ends:.0%}",
    )


def l02(study: Study) -> Statistic:
    """How far the midpoint goes down with the ends, for copies that part at the start."""
    return _descent(study, study.first, *_needs(study, "init", "wall"))


def l03(study: Study) -> Statistic:
    """The same for copies that part late."""
    return _descent(study, study.last, *_needs(study, "joined"))


def l04(study: Study) -> Statistic:
    """Rank correlation of k and the angle between the ways of the two copies."""
    seen = {
        base: [angle(one, base) for k in ends for one in study.geometry[k, study.steps]]
        for base, ends in (("init", (study.first, study.last)), ("start", (study.last,)))
    }
    half = len(seen["init"]) // 2
    told = [np.mean(seen["init"][:half]), np.mean(seen["init"][half:]), np.mean(seen["start"])]
    return _trend(
        study,
        angle,
        f"{told[0]:.0f}° at k = {study.first}, {told[1]:.0f}° at k = {study.last}; seen from the "
        f"fork {told[2]:.0f}°",
    )


def l05(study: Study) -> Statistic:
    """Rank correlation of k and the distance of finished copies."""
    each = at_the_end(study, lambda one: one.distances["ab"])
    return _trend(
        study,
        lambda one: one.distances["ab"],
        listed({f"k = {k}:": v for k, v in each.items()}, "{:.1f}"),
    )


def _predicts(study: Study, name: str) -> Statistic:
    """The lead of a prediction over the distance, over all forks and steps."""
    mine, theirs = (np.mean(ranks(study, one)) for one in (name, "distance"))
    given = np.mean(beyond(study, name))
    return statistic(
        over_inits(leads(study, name)),
        *_needs(study, "points"),
        _trained(study),
        detail=f"rank correlation {mine:.2f}, of the squared distance {theirs:.2f}; given the "
        f"distance {given:.2f}",
    )


def l06(study: Study) -> Statistic:
    """The lead of the second-order prediction over the distance."""
    return _predicts(study, "taylor")


def _layer_ranks(study: Study) -> list[tuple[float, float]]:
    """Means over an initialisation's pairs: of the prediction, and of the distance."""
    each = zip(*layer_ranks(study).values(), strict=True)
    return [tuple(np.mean(pairs, axis=0)) for pairs in each]


def _layers(study: Study, value: Callable[[float, float], float]) -> Statistic:
    found = _layer_ranks(study)
    mine, theirs = np.mean(found, axis=0)
    layers = len(study.layers[study.first][0])
    return statistic(
        over_inits([value(*both) for both in found]),
        _trained(study),
        (layers >= 4, f"{layers} layers are too few to rank"),
        detail=f"rank correlation {mine:.2f}, of the squared distance {theirs:.2f}",
    )


def l07(study: Study) -> Statistic:
    """The lead of the layers' prediction over the layers' distances."""
    return _layers(study, lambda mine, theirs: mine - theirs)


def l08(study: Study) -> Statistic:
    """The rank correlation of the layers' prediction itself."""
    return _layers(study, lambda mine, theirs: mine)


def l09(study: Study) -> Statistic:
    """The lead of the quintic over the distance."""
    return _predicts(study, "quintic")


def while_high(study: Study) -> list[float]:
    """The barrier of late copies, mean over the steps with the full learning rate; empty: none."""
    looks = [barriers(study, study.last, step) for step in study.high]
    return [float(np.mean(each)) for each in zip(*looks, strict=True)]


def l10(study: Study) -> Statistic:
    """The barrier of late copies before the learning rate drops."""
    found = while_high(study)
    looks = {f"step {s}:": over_inits(barriers(study, study.last, s)) for s in study.high}
    return statistic(
        over_inits(found) if found else None,
        *_needs(study, "drop", "joined"),
        detail=f"k = {study.last}; {listed(looks, '{:.3f}')}",
    )


def l11(study: Study) -> Statistic:
    """The barrier of the same copies at the end."""
    return statistic(
        over_inits(barriers(study, study.last, study.steps)),
        *_needs(study, "drop", "joined"),
        detail=f"k = {study.last}, step {study.steps}",
    )


def annealed(study: Study) -> list[float]:
    """What averaging takes off the loss before the drop, over what annealing does."""
    if study.before is None:
        return []
    both = (study.geometry[study.last, step] for step in (study.before, study.steps))
    return [-a.barrier() / (a.mean_end() - b.mean_end()) for a, b in zip(*both, strict=True)]


def l12(study: Study) -> Statistic:
    """The share of annealing that averaging two branches stands for."""
    found = annealed(study)
    return statistic(over_inits(found) if found else None, *_needs(study, "drop", "joined"))


def l13(study: Study) -> Statistic:
    """The largest relative error of the curvature identity."""
    errors = []
    for one in (g for group in study.geometry.values() for g in group):
        losses = one.curve.values["train"]["loss"]
        by_curvature, _ = one.identity()
        scale = max(abs(one.barrier()), 0.01 * (max(losses) - min(losses)))
        errors.append(abs(by_curvature - one.barrier()) / scale)
    return statistic(max(errors), n=len(errors))


def l14(study: Study) -> Statistic:
    """Share of cross terms at the first k, minus that at the last."""
    both = zip(cross(study, study.first), cross(study, study.last), strict=True)
    return statistic(
        over_inits([early - late for early, late in both]),
        *_needs(study, "init", "wall", "joined"),
        detail=listed({f"k = {k}:": float(np.mean(cross(study, k))) for k in study.ks}),
    )


def l15(study: Study) -> Statistic:
    """Share of cross terms at the last k."""
    return statistic(over_inits(cross(study, study.last)), *_needs(study, "joined"))


def l16(study: Study) -> Statistic:
    """The smallest share of images that carries half of a barrier."""
    gaps = study.gaps["other initialisations"]
    return statistic(
        over_strangers(study, [gap.share(0.5) for gap in gaps]),
        *_needs(study, "pairs"),
        (all(gap.barrier > 0 for gap in gaps), "a pair has no barrier"),
    )


def l17(study: Study) -> Statistic:
    """The departure of the logits from linear after matching, over that before."""
    naive, matched = study.gaps["other initialisations"], study.gaps[MATCHED]
    found = [
        after.deviation / before.deviation for before, after in zip(naive, matched, strict=True)
    ]
    heights = [np.mean([gap.barrier for gap in gaps]) for gaps in (naive, matched)]
    return statistic(
        over_strangers(study, found),
        *_needs(study, "pairs"),
        (heights[1] < heights[0], "matching did not lower the barrier"),
        detail=f"barrier {heights[0]:.2f} before, {heights[1]:.2f} after, in nats",
    )


def l18(study: Study) -> Statistic:
    """The largest error of the decomposition at the logits."""
    errors = [abs(gap.residual) for gaps in study.gaps.values() for gap in gaps]
    return statistic(max(errors), n=len(errors))


def l19(study: Study) -> Statistic:
    """The train error barrier along the curves."""
    found = [one.bend.height("train") for one in study.bends]
    line = [one.line.height("train") for one in study.bends]
    return statistic(
        over_inits(found) if found else None,
        *_needs(study, "bends", "init", "wall"),
        detail=f"on the straight line {np.mean(line):.1f} points" if line else "",
    )


def l20(study: Study) -> Statistic:
    """The largest eigenvalue half-way along the curves, over that of their ends."""
    found = [_middle_over_ends([top.value for top in one.bend_sharpness]) for one in study.bends]
    wall = over_inits([one.bend.height("train") for one in study.bends]) if study.bends else None
    return statistic(
        over_inits(found) if found else None,
        *_needs(study, "bends"),
        (wall is not None and wall.high < THRESHOLD, "the loss is not certainly low on the curves"),
    )


def _middle_over_ends(values: Sequence[float]) -> float:
    return values[len(values) // 2] / ((values[0] + values[-1]) / 2)


def l21(_: Study) -> Statistic:
    """The largest error of any formula on a toy for which it is exact."""
    errors = []
    for name, found in toys().items():
        exact = ["measured", "identity", "quintic"]
        exact += ["taylor"] if name in ("a bowl", "across a saddle") else []
        errors += [abs(found[formula] - found["exact"]) for formula in exact]
    return statistic(max(errors), n=len(TOYS))


_ALL = (
    *(l01, l02, l03, l04, l05, l06, l07, l08, l09, l10, l11),
    *(l12, l13, l14, l15, l16, l17, l18, l19, l20, l21),
)
CLAIMS: dict[str, Callable[[Study], Statistic]] = {f.__name__.upper(): f for f in _ALL}
"""Claim id -> its statistic, in the order of the table."""


# Figures and tables, and the values of their captions


def _series(points: Mapping[int, Interval], form: str = "{:.2f}") -> str:
    """For an alternative text: ``0.64 at 0, 0.02 at 200``."""
    return ", ".join(f"{said(v, form)} at {k}" for k, v in points.items())


def _over_steps(ax: Axes, curves: Mapping[str, Mapping[int, Interval]], ylabel: str) -> Any:
    """Curves over steps of training; of two steps that lie close, the later has its number."""
    steps = sorted({step for points in curves.values() for step in points})
    near = {a: "" for a, b in pairwise(steps) if b < 1.35 * a}
    xlabel = "step of training (log axis)"
    return plots.sweep(ax, curves, xlabel=xlabel, ylabel=ylabel, ticks=near, axis="log")


def show_descent(study: Study) -> None:
    """Loss of the ends and of the midpoint while copies train, for an early and a late fork."""
    fig, axes = plots.grid(2, height=3.9, sharey=True)
    drawn: dict[str, Any] = {}
    told: Values = {}
    for ax, name, k in zip(axes, ("early", "late"), (study.first, study.last), strict=True):
        curves = {
            "the two copies, mean": along(study, k, lambda one: one.mean_end()),
            "half-way between them": along(study, k, lambda one: one.mid()),
        }
        drawn[f"k = {k}"] = _over_steps(ax, curves, "train loss (nats)")
        ax.set(yscale="log", title=f"copies part at k = {k}")
        told |= {f"ends_{name}": _series(curves["the two copies, mean"])}
        told |= {f"middle_{name}": _series(curves["half-way between them"])}
    plots.legend(fig, 2)
    figures.publish(fig, "descent", data=drawn, values=told)


def show_apart(study: Study) -> None:
    """Angle and distance of finished copies against the fork step."""
    from_fork = at_the_end(study, lambda one: angle(one, "start"))
    angles = {
        "seen from the initial weights": at_the_end(study, angle),
        "seen from the fork": from_fork,
    }
    lengths = {
        "between the copies": at_the_end(study, lambda one: one.distances["ab"]),
        "from the initial weights": at_the_end(study, lambda one: one.distances["a_init"]),
    }
    fig, axes = plots.grid(2, height=3.9)
    look: dict[str, Any] = {"steps": study.steps, "threshold": None}
    drawn = {
        "angle": plots.against_k(axes[0], angles, ylabel="angle (degrees)", **look),
        "distance": plots.against_k(axes[1], lengths, ylabel="Euclidean distance", **look),
    }
    told = {
        "angles": _series(angles["seen from the initial weights"], "{:.0f}"),
        "fork_angles": _series(from_fork, "{:.0f}"),
        "lengths": _series(lengths["between the copies"], "{:.1f}"),
    }
    figures.publish(fig, "apart", data=drawn, values=told)


def show_predictors(study: Study) -> None:
    """What is foretold against what is measured, for all forks and steps."""
    shown = ("distance", "taylor", "quintic")
    fig, axes = plots.grid(len(shown), columns=3, height=3.6)
    drawn = {}
    for ax, name in zip(axes, shown, strict=True):
        groups: dict[str, list[tuple[float, float]]] = {f"k = {k}": [] for k in study.ks}
        for key, found in study.geometry.items():
            both = zip(study.foretold[key], found, strict=True)
            groups[f"k = {key[0]}"] += [(told[name], one.barrier()) for told, one in both]
        unit = "squared distance" if name == "distance" else "predicted barrier (nats)"
        drawn[name] = plots.scatter(
            ax, groups, xlabel=unit, ylabel="measured barrier (nats)", equal=name != "distance"
        )
        ax.set_title(CALLED[name], fontsize=10)
    plots.legend(fig, len(study.ks))
    told = {f"rank_{name}": said(float(np.mean(ranks(study, name)))) for name in CALLED}
    figures.publish(fig, "predictors", data=drawn, values=told)


def show_ranks(study: Study) -> None:
    """How well each prediction ranks the barriers, with the distance and the angle beside them."""
    rows = [
        (
            words,
            over_inits(ranks(study, name)),
            "" if name == "distance" else over_inits(beyond(study, name)),
            said(float(np.mean(ranks(study, name, ends=True)))),
            said(float(np.mean(stepped(study, name)))) if name in PREDICTORS else "",
            said(slope(study, name)) if name in PREDICTORS else "",
        )
        for name, words in CALLED.items()
    ]
    columns = ["predicted by", "all forks and steps", "given the squared distance"]
    columns += ["last step only", "all, by small steps", "slope, log–log"]
    tables.show(columns, rows, name="ranks")


def show_annealing(study: Study) -> None:
    """The barrier while copies train, and where the learning rate drops."""
    late = study.ks[1:]
    curves = {f"k = {k}": along(study, k, lambda one: one.barrier()) for k in late}
    fig, (ax,) = plots.grid(1, height=3.8, width=7.4)
    drawn = _over_steps(ax, curves, "train loss barrier at ½ (nats)")
    plots.dashed(ax, 0.0)
    plots.legend(fig, len(late))
    figures.publish(
        fig, "annealing", data=drawn, values={"late": _series(curves[f"k = {study.last}"])}
    )


def show_layers(study: Study) -> None:
    """Barriers of single layers, measured and foretold; and what layers do together."""
    fig, axes = plots.grid(3, columns=3, height=3.9)
    drawn: dict[str, Any] = {}
    for ax, k in zip(axes, (study.first, study.last), strict=False):
        found = by_layer(study, k)
        named = {
            word: [{layer: row[place] for layer, row in one.items()} for one in found]
            for place, word in enumerate(("measured", "predicted"))
        }
        drawn[f"k = {k}"] = plots.by_layer(ax, named, ylabel="train loss barrier (nats)", log=False)
        ax.set_title(f"copies part at k = {k}", fontsize=10)
        ax.legend(fontsize=9)
    shares = {"layers together": {k: over_inits(cross(study, k)) for k in study.ks}}
    drawn["cross"] = plots.sweep(
        axes[2],
        shares,
        xlabel="fork step k",
        ylabel="share between layers in the curvature",
        axis="log",
    )
    plots.dashed(axes[2], 0.0)
    figures.publish(
        fig, "landscape-layers", data=drawn, values={"shares": _series(shares["layers together"])}
    )


def show_examples(study: Study) -> None:
    """Which share of the images carries which share of the barrier."""
    fig, (ax,) = plots.grid(1, height=3.8, width=7.4)
    drawn = {}
    kinds = {name: gaps for name, gaps in study.gaps.items() if min(g.barrier for g in gaps) > 0}
    for number, (name, gaps) in enumerate(kinds.items()):
        parts = [np.sort(np.asarray(gap.parts))[::-1] for gap in gaps]
        heaped = [np.cumsum(part) / part.sum() for part in parts]
        images = (np.arange(len(heaped[0])) + 1) / len(heaped[0])
        every = max(1, len(images) // 40)
        curves = [list(one[::every]) for one in heaped]
        drawn[name] = plots.band(ax, list(images[::every]), curves, name, number)
    plots.dashed(ax, 0.5)
    ax.set(xlabel="share of the training images, costliest first", ylabel="share of the barrier")
    ax.set(xlim=(0, 1), ylim=(0, None))
    ax.legend()
    figures.publish(fig, "examples", data=drawn)


def show_logits(study: Study) -> None:
    """The parts of the barrier at the logits, by kind of pair."""
    rows = []
    for name, gaps in study.gaps.items():
        columns = [
            [gap.deviation for gap in gaps],
            [gap.partition - gap.target for gap in gaps],
            [-gap.ensemble for gap in gaps],
            [gap.barrier for gap in gaps],
        ]
        rows.append([name, *(said(float(np.mean(v)), "{:.3f}") for v in columns)])
    names = [
        "pairs",
        "departure of the logits",
        "its cost (nats)",
        "gain of averaging logits (nats)",
    ]
    tables.show([*names, "barrier (nats)"], rows, name="logits")


def show_bends(study: Study) -> None:
    """Loss and largest curvature on the straight line and on a trained curve; nothing without."""
    if not study.bends:
        return
    fig, axes = plots.grid(2, height=3.9)
    xlabel = "position, from copy A (0) to copy B (1)"
    curves = {
        "straight line": [one.line for one in study.bends],
        "Bézier curve": [one.bend for one in study.bends],
    }
    drawn: dict[str, Any] = {
        "loss": plots.lines(axes[0], curves, split="train", metric="loss", xlabel=xlabel)
    }
    sharp = {
        "straight line": [one.line_sharpness for one in study.bends],
        "Bézier curve": [one.bend_sharpness for one in study.bends],
    }
    for number, (name, found) in enumerate(sharp.items()):
        tops = [[top.value for top in one] for one in found]
        drawn[name] = plots.band(axes[1], study.bends[0].at, tops, name, number)
    axes[1].set(xlabel=xlabel, ylabel="largest eigenvalue of the Hessian", xlim=(0, 1))
    axes[1].set_ylim(bottom=0)
    peaks = {
        name: float(np.mean([max(one.values["train"]["loss"]) for one in each]))
        for name, each in curves.items()
    }
    figures.publish(fig, "bends", data=drawn, values={"peaks": listed(peaks)})


def show_toys() -> None:
    """The toys: the barrier as it is, and what each formula makes of it."""
    found = toys()
    columns = {"exact": "by hand", "identity": "from its curvature", "taylor": CALLED["taylor"]}
    columns |= {"curvature": CALLED["curvature"], "quintic": CALLED["quintic"]}
    rows = [[name, *(said(one[key], "{:.4g}") for key in columns)] for name, one in found.items()]
    tables.show(["landscape", *columns.values()], rows, name="toys")


# Sentences that depend on the outcome, and numbers of the prose


def values(study: Study) -> Values:
    """The numbers and sentences of the chapter's prose."""
    early, late = (descents(study, k) for k in (study.first, study.last))
    losses: Values = {}
    for name, found in (("early", early), ("late", late)):
        means = np.mean(found, axis=0) if found else [None, None]
        losses |= {
            f"{name}_middle": said(means[0], "{:.0%}"),
            f"{name}_ends": said(means[1], "{:.0%}"),
        }
    ends = [over_inits(barriers(study, k, study.steps)) for k in (study.first, study.last)]
    scale = [
        np.mean([one["taylor"] for one in study.foretold[k, study.steps]])
        for k in (study.first, study.last)
    ]
    before = None if study.before is None else over_inits(barriers(study, study.last, study.before))
    pairs = layer_ranks(study)
    mine, theirs = np.mean([both for rows in pairs.values() for both in rows], axis=0)
    naive, matched = study.gaps["other initialisations"], study.gaps[MATCHED]
    annealing, high = annealed(study), while_high(study)
    start = next(key for key in study.grid if key[0] == study.first)
    halves = {
        name: float(np.mean([gap.share(0.5) for gap in gaps]))
        for name, gaps in study.gaps.items()
        if min(gap.barrier for gap in gaps) > 0
    }
    ways = [bend / line for line, bend in (one.lengths for one in study.bends)]
    return {
        **losses,
        "barrier_first": said(ends[0]),
        "barrier_last": said(ends[1], "{:.3f}"),
        "barrier_before": said(before, "{:.3f}"),
        "barrier_high": said(over_inits(high) if high else None, "{:.3f}"),
        "taylor_first": said(float(scale[0] / ends[0].value), "{:.2f}"),
        "taylor_last": said(float(scale[1] / ends[1].value), "{:.1f}"),
        "annealing_share": said(over_inits(annealing) if annealing else None, "{:.0%}"),
        "layers_rank": said(float(mine)),
        "layers_distance": said(float(theirs)),
        "share_first": said(over_inits(cross(study, study.first)), "{:.0%}"),
        "share_last": said(over_inits(cross(study, study.last)), "{:.0%}"),
        "naive": said(float(np.mean([gap.barrier for gap in naive]))),
        "matched": said(float(np.mean([gap.barrier for gap in matched]))),
        "half_of_barrier": said(float(np.mean([gap.share(0.5) for gap in naive])), "{:.0%}"),
        **{f"rank_{name}": said(float(np.mean(ranks(study, name)))) for name in CALLED},
        **{f"end_{name}": said(float(np.mean(ranks(study, name, ends=True)))) for name in CALLED},
        "halves": listed(halves, "{:.0%}"),
        "blind": math.log(study.images.classes),
        "look": study.looks[0],
        "look_middle": said(over_inits([one.mid() for one in study.geometry[start]])),
        "longer": said(float(np.mean(ways)) if ways else None, "{:.3f}"),
        "ridge_sentence": ridge_sentence(study),
        "predictor_sentence": predictor_sentence(study),
    }


def ridge_sentence(study: Study) -> str:
    """Whether the two pictures are seen."""
    ridge, side = (descents(study, k) for k in (study.first, study.last))
    if not ridge or not side:
        return "This run did not look often enough to tell a ridge from a mountainside."
    low, high = (over_inits([a / b for a, b in found]) for found in (ridge, side))
    if low.high < 0.5 < high.low:
        return (
            "So both pictures are seen: a ridge for the early fork, one mountainside for the late."
        )
    return "The two pictures are not told apart with certainty by these initialisations."


def predictor_sentence(study: Study) -> str:
    """Which of the predictions beats the distance."""
    found = {name: over_inits(leads(study, name)) for name in PREDICTORS}
    ahead = [CALLED[name] for name, lead in found.items() if lead.low > 0]
    if not ahead:
        return "None certainly ranks barriers better than the mere distance of the two does."
    who = "One of them ranks" if len(ahead) == 1 else "Some of them rank"
    return f"{who} barriers certainly better than the mere distance does: {', '.join(ahead)}."
