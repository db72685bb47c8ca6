"""The landscape between stored runs: local geometry, logits, bent paths; measured once and stored.

    found = survey_pairs([Pair(run, other, step) for step in steps], Survey())
    found[0].barrier(), found[0].predictions(), found[0].controls()

Nothing here asks whether the networks are trained: the landscape along training is the question,
and a half-trained pair has one, too. Barriers are of the loss at ½, above the straight line between
the ends, and signed. Explained in our chapter 6.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import nn

from companion import data as datasets
from companion.connectivity import BN_EXAMPLES, Curve, Walker, check_bn_examples, grid, segment
from companion.core import codec
from companion.core.errors import BadParameter, one_of, whole
from companion.core.runs import Store
from companion.core.seeds import Key
from companion.core.theta import Theta, distance, layout
from companion.data import Split
from companion.experiments.measurement import Json, Measurement, Where, ends, key_of, run
from companion.experiments.methods import Method, match, weights_of
from companion.experiments.pairs import Evaluation, Pair, averaging, jobs_of, root_of
from companion.landscape import (
    SURFACE_MODES,
    Blocks,
    Estimate,
    Local,
    LogitGap,
    Surface,
    bend_path,
    cos_of_branches,
    fit_bend,
    layer_predictions,
    logit_gap,
    moved,
    path_curvature,
    predictions,
    top_eigenvalues,
    towards,
    weighted_curvature,
)
from companion.landscape.bends import KINDS
from companion.landscape.local import in_type
from companion.layerwise import layer_groups
from companion.models import may_have_batchnorm
from companion.training import Job, build


@dataclass(frozen=True)
class Survey:
    """What is measured of the line between two networks.

    Arguments:
        points: of the losses on the line, odd.
        inside: of the slopes and curvatures on it, odd, both ends included.
        step: of central differences at both ends, as a share of the line.
        by: layer blocks, as :func:`companion.layerwise.layer_groups` takes it; None: none.
        bn: what BatchNorm does, one of :data:`companion.landscape.SURFACE_MODES`.
        train_examples, test_examples: as :class:`companion.experiments.pairs.Evaluation`.
    """

    points: int = 31
    inside: int = 3
    step: float = 0.01
    by: str | int | None = "module"
    bn: str = "interpolate"
    train_examples: int | None = None
    test_examples: int | None = None

    def __post_init__(self) -> None:
        grid(self.points)
        grid(self.inside)
        one_of("bn", self.bn, SURFACE_MODES)
        self.evaluation  # noqa: B018  checks its fields
        if not 0 < self.step < 1:
            raise BadParameter(f"step: {self.step!r} must lie between 0 and 1.")

    @property
    def evaluation(self) -> Evaluation:
        """Which examples stand for each split."""
        return Evaluation(train_examples=self.train_examples, test_examples=self.test_examples)

    def identity(self, net: str) -> Json:
        """What determines the numbers of a network called ``net``, for the store."""
        known: Json = codec.to_json(self)
        return known if may_have_batchnorm(net) else {k: v for k, v in known.items() if k != "bn"}


@dataclass(frozen=True)
class Geometry:
    """The line between two networks, to second order; everything in float64.

    Arguments:
        curve: losses and errors on both splits.
        locals: loss, slope and curvature along Δ at evenly spaced points from A to B, on train, by
            Hessian-vector products.
        stepped: the same at A and at B by central differences, which see the kinks of ReLUs, too.
        blocks: of layers, at A and at B along Δ, on train; () without.
        distances: Euclidean, of the parameters: ``ab``, ``a_init``, ``b_init``, and with a start
            ``a_start``, ``b_start``.
        cosines: of the angle between the ways to A and to B: from ``init`` (if both have the same)
            and from ``start``, of a pair that has one.
    """

    curve: Curve
    locals: tuple[Local, ...]
    stepped: tuple[Local, Local]
    blocks: tuple[Blocks, ...]
    distances: Mapping[str, float]
    cosines: Mapping[str, float]

    @property
    def a(self) -> Local:
        """At A, along Δ."""
        return self.locals[0]

    @property
    def b(self) -> Local:
        """At B, along Δ: away from A."""
        return self.locals[-1]

    @property
    def middle(self) -> Local:
        """Half-way."""
        return self.locals[len(self.locals) // 2]

    def mid(self, split: str = "train") -> float:
        """Loss half-way."""
        losses = self.curve.values[split]["loss"]
        return losses[len(losses) // 2]

    def mean_end(self, split: str = "train") -> float:
        """Mean loss of A and B."""
        return sum(self.curve.ends(split, "loss")) / 2

    def barrier(self, split: str = "train") -> float:
        """The loss half-way above the mean of both ends, signed, in nats."""
        return self.mid(split) - self.mean_end(split)

    def predictions(self, *, kinks: bool = False) -> dict[str, float]:
        """What the ends lead to expect of the barrier on train, by predictor.

        Arguments:
            kinks: from :attr:`stepped` instead of the derivatives at the ends.
        """
        return predictions(*(self.stepped if kinks else (self.a, self.b)))

    def controls(self) -> dict[str, float]:
        """What a predictor has to beat: ``distance``, ‖Δ‖²; ``angle``, minus the cosine at init."""
        angle = {"angle": -self.cosines["init"]} if "init" in self.cosines else {}
        return {"distance": self.distances["ab"] ** 2, **angle}

    def curvatures(self, split: str = "train") -> tuple[float, ...]:
        """f'' at the points of the curve, from its losses: with the kinks of ReLUs."""
        return path_curvature(self.curve.alphas, self.curve.values[split]["loss"])

    def identity(self, split: str = "train") -> tuple[float, float]:
        """The barrier as weighted curvature of the losses, and its relative error."""
        found = weighted_curvature(self.curve.alphas, self.curvatures(split))
        true = self.barrier(split)
        return found, abs(found - true) / abs(true) if true else abs(found)

    def end(self, which: str = "a") -> Blocks:
        """The blocks at A or at B.

        Raises:
            BadParameter: none were measured.
        """
        one_of("end", which, ("a", "b"))
        if not self.blocks:
            raise BadParameter("blocks: none were measured; ask for a Survey with by='module'.")
        return self.blocks["ab".index(which)]

    def cross_share(self, which: str = "a") -> float:
        """Share of the curvature along Δ that is between layers."""
        return self.end(which).cross_share

    def layers(self, which: str = "a") -> dict[str, float]:
        """Layer -> the barrier that is expected of it alone, the others at ``which``; Δ leads from
        A to B, so at B the step is back."""
        here, there = self.end(which), self.locals[-1 if which == "a" else 0].loss
        return layer_predictions(here if which == "a" else here.reversed(), there)


@dataclass(frozen=True)
class SurveyOfPair(Measurement):
    """The local geometry of a pair."""

    KIND = "landscape"

    pair: Pair
    survey: Survey

    def identity(self, device: str) -> Json:
        start = self.pair.start
        return {
            "survey": self.survey.identity(self.pair.a.recipe.net),
            **self.pair.identity(device),
            "start": [key_of(start[0], device), start[1]] if start else None,
        }

    def jobs(self) -> list[Job]:
        return self.pair.jobs()

    @property
    def points(self) -> int:
        # A Hessian-vector product takes about as long as five evaluations.
        return self.survey.points + 5 * self.survey.inside

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        return f"{ends(identity)}, slopes and curvatures"

    def measure(self, store: Store, device: str) -> object:
        pair = self.pair
        data = datasets.load(pair.a.recipe.data, device)
        module = build(pair.a, data, torch.device(device))
        a, b = (weights_of(r, pair.at, store, device) for r in (pair.a, pair.b))
        inits = [weights_of(root_of(r), 0, store, device) for r in (pair.a, pair.b)]
        start = weights_of(*pair.start, store, device) if pair.start else None
        bases = {"init": (inits[0], inits[1])} | ({"start": (start, start)} if start else {})
        parts = self.survey.evaluation.splits(data)
        return geometry(module, a, b, parts, self.survey, bases)


def geometry(
    module: nn.Module,
    a: Theta,
    b: Theta,
    splits: Mapping[str, Split],
    how: Survey | None = None,
    bases: Mapping[str, tuple[Theta, Theta]] | None = None,
) -> Geometry:
    """The local geometry of the line between any two networks.

    Arguments:
        module: the architecture.
        a, b: state dicts of it.
        splits: where to measure; derivatives are of the first one.
        how: what is measured; its numbers of examples count for stored pairs only.
        bases: name -> where A and B come from.

    Raises:
        BadParameter: networks that do not fit the module.
    """
    how = how or Survey()
    names, first = layout(module).parameters, next(iter(splits.values()))
    delta, start, end = towards(module, a, b), _double(a), _double(b)
    wide = {name: in_type(split, torch.float64) for name, split in splits.items()}
    exact = copy.deepcopy(module).double()
    walker = Walker(exact, wide, bn=how.bn)
    curve = segment(exact, start, end, wide, points=how.points, walker=walker)
    surface = Surface(module, first, bn=how.bn)
    found = [surface.local(moved(start, delta, t), delta) for _, t in grid(how.inside)]
    near = [surface.differences(theta, delta, how.step) for theta in (a, b)]
    blocks: list[Blocks] = []
    if how.by is not None:
        groups = layer_groups(module, how.by, first.x[:2])
        blocks = [surface.blocks(theta, delta, groups) for theta in (a, b)]
    distances, cosines = {"ab": distance(a, b, names)}, {}
    for name, (of_a, of_b) in (bases or {}).items():
        ways = {"a": distance(a, of_a, names), "b": distance(b, of_b, names)}
        distances |= {f"{which}_{name}": way for which, way in ways.items()}
        if min(ways.values()) > 0 and distance(of_a, of_b, names) == 0:
            cosines[name] = cos_of_branches(a, b, of_a, names)
    return Geometry(curve, tuple(found), (near[0], near[1]), tuple(blocks), distances, cosines)


def _double(theta: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: v.double() if v.is_floating_point() else v for n, v in theta.items()}


def surveys_of(pairs: Sequence[Pair], survey: Survey | None = None) -> list[SurveyOfPair]:
    """What :func:`survey_pairs` measures with these arguments, for a budget."""
    return [SurveyOfPair(pair, survey or Survey()) for pair in pairs]


def survey_pairs(
    pairs: Sequence[Pair], survey: Survey | None = None, **where: Unpack[Where]
) -> list[Geometry]:
    """Train what is missing, then measure the local geometry of every pair, in that order.

    Raises:
        as :func:`companion.training.train`.
    """
    raw = run(surveys_of(pairs, survey), label="landscape", **where)
    return [codec.from_json(Geometry, value) for value in raw]


@dataclass(frozen=True)
class Gap:
    """Where a barrier is taken apart at the logits.

    Arguments:
        alpha: between 0 and 1.
        split: ``train`` or ``test``.
        examples: how many of it (None: all), those of :meth:`companion.data.Split.head`.
        bn, bn_examples: as :class:`companion.connectivity.Walker` takes them.
    """

    alpha: float = 0.5
    split: str = "train"
    examples: int | None = None
    bn: str = "interpolate"
    bn_examples: int | None = BN_EXAMPLES

    def __post_init__(self) -> None:
        one_of("split", self.split, ("train", "test"))
        whole("examples", self.examples, 1, "null for all")
        check_bn_examples(self.bn_examples)
        if not 0 < self.alpha < 1:
            raise BadParameter(f"alpha: {self.alpha!r} must lie between 0 and 1.")

    def identity(self, net: str) -> Json:
        """What determines the numbers of a network called ``net``, for the store."""
        known: Json = codec.to_json(self)
        if not may_have_batchnorm(net):
            del known["bn"], known["bn_examples"]
        return known


@dataclass(frozen=True)
class GapOfPair(Measurement):
    """The barrier of a pair at the logits, B as a method leaves it."""

    KIND = "logits"
    SEMANTICS = 2  # since 2, weight matching begins with auctions

    pair: Pair
    method: Method
    gap: Gap

    def identity(self, device: str) -> Json:
        return {
            "gap": self.gap.identity(self.pair.a.recipe.net),
            "method": self.method.identity(),
            **self.pair.identity(device),
        }

    def jobs(self) -> list[Job]:
        return jobs_of(self.pair)

    @property
    def points(self) -> int:
        return 3

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        name = identity["method"]["name"]
        return f"{ends(identity)}, logits at {identity['gap']['alpha']:g}, units matched by {name}"

    def measure(self, store: Store, device: str) -> object:
        pair, gap = self.pair, self.gap
        data = datasets.load(pair.a.recipe.data, device)
        module = build(pair.a, data, torch.device(device))
        a, b = (weights_of(r, pair.at, store, device) for r in (pair.a, pair.b))
        if self.method.name != "naive":
            b = dict(match(self.method, module, a, b, data).apply(module, b))
        split = data.train if gap.split == "train" else data.test
        how = {"bn": gap.bn, "bn_data": data.train, "bn_examples": gap.bn_examples}
        part = split.head(gap.examples or len(split))
        return logit_gap(module, a, b, part, alpha=gap.alpha, **how)


def gaps_of(
    pairs: Sequence[tuple[Pair, Method | str | None]], gap: Gap | None = None
) -> list[GapOfPair]:
    """What :func:`decompose_pairs` measures with these arguments, for a budget."""
    return [
        GapOfPair(pair, m if isinstance(m, Method) else Method(m or "naive"), gap or Gap())
        for pair, m in pairs
    ]


def decompose_pairs(
    pairs: Sequence[tuple[Pair, Method | str | None]],
    gap: Gap | None = None,
    **where: Unpack[Where],
) -> list[LogitGap]:
    """Train what is missing, bring B to A, and take every pair's barrier apart at the logits.

    Arguments:
        pairs: each with the method that brings B to A; None, or ``naive``: as it is.

    Raises:
        as :func:`companion.training.train`.
    """
    raw = run(gaps_of(pairs, gap), label="logits", **where)
    return [codec.from_json(LogitGap, value) for value in raw]


@dataclass(frozen=True)
class Bending:
    """How a bent path is trained and looked at.

    Arguments:
        kind, bends, steps, batch, lr, momentum: as :func:`companion.landscape.fit_bend`.
        label: of its random choices.
        points: of both paths, odd.
        at: where on both paths the largest eigenvalue of the Hessian is measured.
        sharp_examples: training examples that it is of (None: all).
        bn: what BatchNorm does on both paths. Eigenvalues are of batch statistics, unless it is
            ``interpolate``.
        train_examples, test_examples, bn_examples: as :class:`Evaluation`. The path is trained on
            all training examples.
    """

    kind: str = "bezier"
    bends: int = 1
    steps: int = 1000
    batch: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    label: int | str = 0
    points: int = 31
    at: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    sharp_examples: int | None = 500
    bn: str = "reestimate"
    train_examples: int | None = None
    test_examples: int | None = None
    bn_examples: int | None = BN_EXAMPLES

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        self.evaluation  # noqa: B018  checks its fields
        whole("sharp_examples", self.sharp_examples, 1, "null for all")

    @property
    def evaluation(self) -> Evaluation:
        """How losses on the paths are measured."""
        return Evaluation(
            self.points, self.bn, self.train_examples, self.test_examples, self.bn_examples
        )

    def identity(self, net: str) -> Json:
        """What determines the numbers of a network called ``net``, for the store."""
        known: Json = codec.to_json(self)
        del known["bn"], known["bn_examples"]
        if may_have_batchnorm(net):
            known |= {"bn": self.bn, **averaging(net, self.bn_examples)}
        return known


@dataclass(frozen=True)
class Bent:
    """A straight and a bent path between the same networks.

    Arguments:
        line, bend: losses and errors along them.
        lengths: Euclidean, of the parameters: of the line and of the bend.
        at: where the sharpness was measured.
        line_sharpness, bend_sharpness: the largest eigenvalue of the Hessian on train there, with
            the bound on its error.
    """

    line: Curve
    bend: Curve
    lengths: tuple[float, float]
    at: tuple[float, ...]
    line_sharpness: tuple[Estimate, ...]
    bend_sharpness: tuple[Estimate, ...]


@dataclass(frozen=True)
class BendOfPair(Measurement):
    """A bent path between the networks of a pair."""

    KIND = "bend"

    pair: Pair
    bending: Bending

    def identity(self, device: str) -> Json:
        known = self.bending.identity(self.pair.a.recipe.net)
        return {"bending": known, **self.pair.identity(device)}

    def jobs(self) -> list[Job]:
        return jobs_of(self.pair)

    @property
    def trains(self) -> tuple[int, ...]:
        return (self.bending.steps,)

    @property
    def points(self) -> int:
        return 2 * self.bending.points

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        return f"{ends(identity)}, a path with {identity['bending']['bends']} bends"

    def measure(self, store: Store, device: str) -> object:
        pair, how = self.pair, self.bending
        data = datasets.load(pair.a.recipe.data, device)
        module = build(pair.a, data, torch.device(device))
        a, b = (weights_of(r, pair.at, store, device) for r in (pair.a, pair.b))
        chosen = {n: getattr(how, n) for n in ("kind", "bends", "steps", "batch", "lr", "momentum")}
        key = Key("landscape", "bend", how.label)
        path = fit_bend(module, a, b, data.train, key=key, **chosen)
        splits = how.evaluation.splits(data)
        walked = how.evaluation.keywords(data)
        line = segment(
            *(module, a, b, splits),
            points=how.points,
            walker=how.evaluation.walker(module, splits, data),
        )
        bent = bend_path(module, path, splits, **walked)
        part = data.train.head(how.sharp_examples or len(data.train))
        mode = "interpolate" if how.bn == "interpolate" else "batch"
        surface = Surface(module, part, bn=mode)
        start, delta = _double(a), towards(module, a, b)
        names = layout(module).parameters
        sharp = [
            [_sharpness(surface, theta, key) for theta in points]
            for points in (
                [moved(start, delta, t) for t in how.at],
                [path.at(t) for t in how.at],
            )
        ]
        return Bent(
            line,
            bent,
            (distance(a, b, names), path.length(names)),
            how.at,
            *(tuple(row) for row in sharp),
        )


def _sharpness(surface: Surface, theta: Mapping[str, torch.Tensor], key: Key) -> Estimate:
    found = top_eigenvalues(surface, theta, 1, key=key.fold("start"), tolerance=1e-2)
    return Estimate(found.values[0], found.errors[0])


def bends_of(pairs: Sequence[Pair], bending: Bending | None = None) -> list[BendOfPair]:
    """What :func:`bend_pairs` measures with these arguments, for a budget."""
    return [BendOfPair(pair, bending or Bending()) for pair in pairs]


def bend_pairs(
    pairs: Sequence[Pair], bending: Bending | None = None, **where: Unpack[Where]
) -> list[Bent]:
    """Train what is missing, and a bent path between the networks of every pair.

    Raises:
        as :func:`companion.training.train`, and :func:`companion.landscape.fit_bend`.
    """
    raw = run(bends_of(pairs, bending), label="bent paths", **where)
    return [codec.from_json(Bent, value) for value in raw]
