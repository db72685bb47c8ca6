"""Layer-wise linear mode connectivity (Adilova et al. 2024): chapter 4's runs, claims and figures.

:func:`design` turns the chapter's parameters into a :class:`Study`, whose experiments run when they
are first looked at. :mod:`companion.papers.federated` has the page on federated learning.

Wherever one number stands for "the largest layer" of several pairs, it is the mean over pairs of
each pair's largest; the largest of the layers' means is smaller, for it is not always the same one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from companion import data, models
from companion.connectivity import Walker, gates
from companion.core import closing
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.stats import Interval, over_pairs
from companion.core.theta import flatten, layout
from companion.data import Dataset
from companion.experiments import measurement, subspaces
from companion.experiments.budget import Plan
from companion.experiments.instability import copy
from companion.experiments.layers import LayerSweep, sweep_pairs
from companion.experiments.pairs import Evaluation, Pair
from companion.layerwise import LayerBarriers, Sweep, layer_groups
from companion.report import figures, page, plots, provenance, tables
from companion.report.claims import Need, Statistic, statistic
from companion.report.recorded import Record
from companion.report.words import MISSING, Values, listed, said
from companion.training import Recipe, build, check_fit

CHAPTER = "04_layerwise"

SMALL = 0.1
"""Nats: a pair whose whole network has no higher barrier than this has none to compare with."""

DIRECTIONS = {
    "inside": "inside ({0} dimensions)",
    "outside": "outside, its null space",
    "inside, views": "span of the views ({1} dimensions)",
    "towards B": "towards the other network",
    "away from B": "away from it, as released",
}
"""Kind of direction -> what the figure calls it; the numbers are dimensions of the spans."""


# ---- linear networks

Matrix = NDArray[np.float64]


def losses(
    first: Sequence[Matrix], second: Sequence[Matrix], moving: set[int], x: Matrix, y: Matrix
) -> Matrix:
    """Squared loss of a deep linear network while some of its layers go from first to second.

    Arguments:
        first, second: matrices of the two networks.
        moving: places of the layers that move.
        x, y: inputs and targets, shape (N, d).

    Returns:
        the loss at 21 points of the segment.
    """
    out = []
    for alpha in np.linspace(0, 1, 21):
        f = x
        for i, (w, v) in enumerate(zip(first, second, strict=True)):
            f = f @ ((1 - alpha) * w + alpha * v if i in moving else w)
        out.append(((f - y) ** 2).sum(1).mean())
    return np.array(out)


def second_differences(networks: int = 20, layers: int = 4) -> tuple[list[float], list[float]]:
    """Is the loss convex? The smallest second difference along segments of random linear networks.

    Returns:
        one number a segment on which a single layer moves, and one a segment on which all do.

    Source: Adilova et al. 2024, Theorem 4.1.
    """
    rng = np.random.default_rng(0)
    single: list[float] = []
    joint: list[float] = []
    for _ in range(networks):
        x, y = rng.normal(size=(50, 4)), rng.normal(size=(50, 4))
        first, second = ([rng.normal(size=(4, 4)) / 2 for _ in range(layers)] for _ in "AB")
        for moving in (*({i} for i in range(layers)), set(range(layers))):
            least = float(np.diff(losses(first, second, moving, x, y), 2).min())
            (single if len(moving) == 1 else joint).append(least)
    return single, joint


A, B = (0.5, 2.0), (2.0, 0.5)
"""Two networks of two linear layers with one unit each; both have loss 0."""


def toy(a: Any, b: Any) -> Any:
    """Loss of the two layers a and b, which should multiply to one (the paper's Fig. 3)."""
    return (a * b - 1) ** 2


def minimal() -> dict[str, tuple[float, float]]:
    """What is averaged in the example -> its barrier, and the same by hand."""
    (a1, b1), (a2, b2) = A, B
    a, b = (a1 + a2) / 2, (b1 + b2) / 2
    return {
        "whole network": (toy(a, b), 0.31640625),
        "layer 1 of A": (toy(a, b1), 2.25),
        "layer 2 of A": (toy(a1, b), 0.140625),
        "layer 1 of B": (toy(a, b2), 0.140625),
        "layer 2 of B": (toy(a2, b), 2.25),
    }


# ---- what is trained


def residual(images: Dataset, device: str, steps: int | None, precision: str, **own: Any) -> Recipe:
    """The recipe of the residual network; ``own`` are fields of its own, None: the dataset's.

    The paper's ResNet-18 without norms for colour images on a GPU, a narrow one elsewhere. A ResNet
    with BatchNorm is trained as in chapter 1: both chapters then speak of the same networks.
    """
    found = _changed(_standard(images, device), steps, precision, **own)
    if found.net.startswith("resnet") and models.may_have_batchnorm(found.net):
        found = replace(found, schedule="step", milestones=(32 / 63, 48 / 63), warmup=0)
        found = replace(found, weight_decay=1e-4)
    return found


OWN: dict[str, dict[str, Any]] = {
    "mobilenet": {"schedule": "step", "milestones": (0.5, 0.75), "lr": 0.1, "batch": 128}
    | {"warmup": 0},
    "vit": {"batch": 128, "lr": 0.005, "weight_decay": 0.0},
}
"""Networks that the paper trains by a recipe of their own: what differs from the others'. FedBABU's
for MobileNet; of the ViT's we could read the learning rate, the batch and the decay."""


def own_recipe(recipe: Recipe) -> Recipe:
    """The recipe as the paper has it for this network, where it has one."""
    return replace(recipe, **OWN.get(recipe.net.partition(":")[0], {}))


def wide(images: Dataset, device: str) -> bool:
    """Whether networks have the paper's size."""
    return images.in_shape[0] == 3 and device != "cpu"


def _standard(images: Dataset, device: str) -> Recipe:
    size = wide(images, device)
    crop = images.in_shape[0] == 3 and min(images.in_shape[1:]) > 8
    return Recipe(
        net="resnet18" if size else "resnet18:width=12",
        data=images.name,
        steps=23_400 if size else 800,
        batch=64 if size else 32,
        lr=0.05 if size else 0.03,
        schedule="cosine",
        warmup=100 if size else 80,
        weight_decay=5e-4,
        augment="flip+crop4" if crop else "crop1",
    )


def _changed(recipe: Recipe, steps: int | None, precision: str, **own: Any) -> Recipe:
    if steps is not None:
        own |= {"steps": steps, "warmup": min(recipe.warmup and 100, steps // 10)}
    own = {k: v for k, v in own.items() if v is not None}
    return replace(recipe, precision=precision, **own)


def pairs_of(recipe: Recipe, count: int, step: int | None = None) -> list[Pair]:
    """One pair an initialisation: two copies that part at step 0."""
    return [Pair(copy(recipe, i, 0, 1), copy(recipe, i, 0, 2), step=step) for i in range(count)]


def fitting(recipe: Recipe, asked: Sweep) -> Sweep:
    """What is asked of a network: with BatchNorm its statistics are re-estimated at every point."""
    return replace(asked, bn="reestimate") if models.may_have_batchnorm(recipe.net) else asked


@dataclass(frozen=True)
class Study:
    """The experiments of chapter 4. Each runs, once, when it is first looked at.

    Arguments:
        residual, convolutional, perceptron: the three networks that are compared.
        gentle: the residual one with a smaller learning rate and larger batches; empty: left out.
        variants: other networks, for the question what gives a layer a barrier.
        places: steps at which the residual network is looked at, 0 and T among them.
        inits: pairs.
        sets: what is measured between two networks: groups and random directions, too, or single
            layers alone.
        max_error: percent, for the check that both networks trained.
    """

    images: Dataset
    residual: Recipe
    convolutional: Recipe
    perceptron: Recipe
    gentle: tuple[Recipe, ...]
    variants: tuple[Recipe, ...]
    places: tuple[int, ...]
    inits: int
    sets: Sweep
    max_error: float
    device: str
    workers: int

    @property
    def recipes(self) -> tuple[Recipe, Recipe, Recipe]:
        """The three networks that are compared."""
        return self.residual, self.convolutional, self.perceptron

    @property
    def few(self) -> int:
        """Pairs where a question is ours and not the paper's."""
        return min(self.inits, 2)

    @property
    def together(self) -> bool:
        """Whether groups of layers and random directions are measured."""
        return "window" in self.sets.kinds

    @property
    def alone(self) -> Sweep:
        """Single layers, and nothing else."""
        return replace(self.sets, kinds=("single",), draws=0)

    @property
    def middle(self) -> int:
        """The step of the middle column of the heat map."""
        return self.places[len(self.places) // 2]

    @property
    def little(self) -> Recipe:
        """The small network whose training is kept step by step."""
        steps = max(2, self.residual.steps // 2)
        return replace(self.perceptron, net="mlp:widths=16x3", steps=steps, batch=32)

    @property
    def evaluation(self) -> Evaluation:
        """How a pair is measured, for the budget."""
        return Evaluation(points=3, train_examples=self.sets.train_examples)

    @property
    def scale(self) -> str:
        """What the verdicts rest on, in one line."""
        hardware = provenance.hardware(self.device)
        nets = f"{self.residual.net}, {self.convolutional.net} and {self.perceptron.net}"
        steps = f"T = {self.residual.steps}"
        return f"{self.images.label}, {nets}, {steps}, {self.inits} pairs, {hardware}"

    def words(self) -> Values:
        """What captions and prose say of the whole page."""
        return {
            "data": self.images.label,
            "residual": called(self.residual.net),
            "plain": called(self.convolutional.net),
            "perceptron": called(self.perceptron.net),
            "little": called(self.little.net),
            "T": self.residual.steps,
            "pairs": f"{self.inits} pair{'s' * (self.inits != 1)}",
            "window": self.sets.window,
            "draws": self.sets.draws,
            "allowed": f"{self.max_error:g}",
        }

    def provenance(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a reader needs to repeat the page's run."""
        return provenance.record(
            dataset={"name": self.images.label, "sha256": self.images.fingerprint},
            residual=self.residual.identity(),
            plain=self.convolutional.identity(),
            parameters=dict(given),
            device=self.device,
        )

    def plans(self) -> list[Plan]:
        """All sweeps of the page, for its budget."""
        late = [task for recipe in self.recipes for task in self._late(recipe)]
        others = [
            LayerSweep(pair, fitting(recipe, self.alone))
            for recipe in (*self.gentle, *self.variants)
            for pair in pairs_of(recipe, self.few)
        ]
        return [[*self._early, *late, *others]]

    @property
    def _early(self) -> list[LayerSweep]:
        """The sweeps of the residual network before the end of training."""
        sets = fitting(self.residual, self.alone)
        points = [p for s in self.places[:-1] for p in pairs_of(self.residual, self.inits, s)]
        return [LayerSweep(pair, sets) for pair in points]

    def _late(self, recipe: Recipe) -> list[LayerSweep]:
        """The sweeps of one of the three networks at the end."""
        sets = fitting(recipe, self.sets)
        return [LayerSweep(pair, sets) for pair in pairs_of(recipe, self.inits)]

    @cached_property
    def along(self) -> Mapping[int, list[LayerBarriers]]:
        """Step -> the pairs of the residual network there, half-trained ones among them."""
        ends, early = self.ends[self.residual], [task.pair for task in self._early]
        found = [*self._swept(self.residual, early, self.alone), *ends]
        judged = iter([one.judged(max_error=100.0) for one in found])
        return {s: [next(judged) for _ in range(self.inits)] for s in self.places}

    @cached_property
    def ends(self) -> Mapping[Recipe, list[LayerBarriers]]:
        """The pairs of all three networks at the end of training.

        The residual one is swept along training now, too: a step that is asked for later would have
        it trained once more.
        """
        allowed = {"max_error": self.max_error}
        if not closing.active():
            how: dict[str, Any] = {"device": self.device, "workers": self.workers}
            measurement.run([*self._early, *self._late(self.residual)], **how, label="layers")
        return {
            r: self._swept(r, pairs_of(r, self.inits), self.sets, **allowed) for r in self.recipes
        }

    @cached_property
    def regimes(self) -> Mapping[Recipe, list[LayerBarriers]]:
        """Other widths, and a gentle training: single layers alone."""
        allowed = dict.fromkeys(self.gentle, self.max_error)
        allowed |= dict.fromkeys(self.variants, max(self.max_error, 30.0))
        return {
            recipe: self._swept(recipe, pairs_of(recipe, self.few), self.alone, max_error=most)
            for recipe, most in allowed.items()
        }

    def _swept(
        self, recipe: Recipe, pairs: Sequence[Pair], sets: Sweep, **limit: Any
    ) -> list[LayerBarriers]:
        where: dict[str, Any] = {"device": self.device, "workers": self.workers}
        return sweep_pairs(pairs, fitting(recipe, sets), **where, **limit)

    @cached_property
    def linear(self) -> tuple[list[float], list[float]]:
        """See :func:`second_differences`."""
        return second_differences()

    @cached_property
    def example(self) -> dict[str, tuple[float, float]]:
        """See :func:`minimal`."""
        return minimal()

    @cached_property
    def noise(self) -> tuple[dict[str, list[float]], list[tuple[int, int]]]:
        """Steps of one length from network A of the small pairs, in several kinds of direction.

        Returns:
            kind of direction -> the mean rise of the test loss, one a pair; and for each pair the
            dimensions of the span of its training, and of that of views of its last step.
        """
        recipe = self.little
        count = min(50, recipe.steps)
        module = build(copy(recipe, 0, 0, 1), self.images, torch.device(self.device))
        names = layout(module).parameters
        walker = Walker(module, {"test": self.images.test})
        kinds: dict[str, list[float]] = {kind: [] for kind in DIRECTIONS}
        ranks = []
        for init in range(self.inits):
            taken = [
                subspaces.snapshots(copy(recipe, init, 0, n), self.images, count) for n in (1, 2)
            ]
            start, (a, b) = taken[0][0], (one[-1] for one in taken)
            towards = subspaces.difference(b, a, names) / 2
            length = float(towards.norm())
            basis = subspaces.span(
                [subspaces.difference(s, start, names) for one in taken for s in one[1:]]
            )
            views = subspaces.span([flatten(s, names) for s in (a, b)])  # all that views would hold
            inside, outside = subspaces.noise(basis, 20, length, Key("chapter 4", "noise", init))
            in_views, _ = subspaces.noise(views, 20, length, Key("chapter 4", "views", init))
            ranks.append((len(basis), len(views)))
            moved = (inside, outside, in_views, towards[None], -towards[None])
            for kind, directions in zip(DIRECTIONS, moved, strict=True):
                rises = subspaces.rises(walker, a, directions, names)["test"]
                kinds[kind].append(float(np.mean(rises)))
        return kinds, ranks

    # ---- what the results say

    def good(self, recipe: Recipe) -> list[LayerBarriers]:
        """The valid pairs of one network at the end."""
        return [one for one in self.ends[recipe] if one.valid]

    @property
    def deep(self) -> list[LayerBarriers]:
        """The valid pairs of the residual network.

        Raises:
            BadParameter: none trained.
        """
        found = self.good(self.residual)
        if not found:
            raise BadParameter(
                f"no pair of {self.residual.net} trained: all {self.inits} failed the check that "
                "both networks have learnt. More steps, or another lr?"
            )
        return found

    @property
    def windows(self) -> dict[str, list[float]]:
        """Window of neighbouring layers of the residual network -> its barrier, one a pair."""
        each = [one.worst("window", "train") for one in self.deep]
        return {name: [one[name] for one in each] for name in each[0]}

    def shares(self, step: int) -> float:
        """The largest layer's barrier over the whole network's at a step, mean over pairs."""
        return float(np.mean([largest(one) for one in self.along[step]]))


def design(
    *,
    dataset: str,
    net: str | None,
    plain: str | None,
    others: list[str] | None,
    steps: int | None,
    lr: float | None,
    batch: int | None,
    inits: int,
    looks: int,
    checkpoints: list[int] | None,
    together: bool,
    controls: bool,
    window: int,
    draws: int,
    max_error: float,
    train_examples: int,
    test_examples: int | None,
    precision: str,
    device: str,
    workers: int,
) -> Study:
    """The study that the chapter's parameters ask for; refused before anything trains.

    The parameters are explained in the chapter's cell; what is None follows from the dataset.

    Raises:
        BadParameter: what a parameter cannot be, or the dataset cannot serve.
    """
    where = str(data.resolve_device(device))
    images = data.load(dataset, where)
    counts = {"inits": (inits, 1), "looks": (looks, 2), "draws": (draws, 1), "window": (window, 1)}
    for name, (value, least) in counts.items():
        if value < least:
            raise BadParameter(f"{name}: {value} must be {least} or more.")
    size, start = wide(images, where), _standard(images, where)
    main = residual(images, where, steps, precision, net=net, lr=lr, batch=batch)
    longer = start.steps if size else 1200  # the plain network learns more slowly
    small = "vgg11:norm=none" if size else "vgg11:norm=none,width=8"
    convolutional = _changed(
        own_recipe(replace(start, net=plain or small, steps=longer)), steps, precision, batch=batch
    )
    perceptron = replace(
        start,
        net="mlp:widths=100x5",
        steps=longer if steps is None else steps,
        lr=0.08 if dataset == "digits" else 0.03,
        batch=60,
        warmup=0,
        weight_decay=0.0,
        precision=precision,
    )
    if others is None:
        others = [] if size else ["resnet18:width=8", "vgg11:norm=none,width=16"]
    variants = [
        own_recipe(replace(main if re.match("(.*resnet|vit)", name) else convolutional, net=name))
        for name in others
    ]
    # As many epochs with a tenth of the learning rate and twice the batch; for networks of the
    # paper's size, the second of the two regimes that its released folders are named after.
    gentle = replace(
        main,
        lr=0.001 if size else main.lr / 10,
        batch=256 if size else 2 * main.batch,
        steps=max(2, main.steps // (4 if size else 2)),
        warmup=main.warmup // 2,
    )
    quieter = (gentle,) if controls else ()
    for recipe in (main, convolutional, perceptron, *quieter, *variants):
        check_fit(recipe, images)
    last = main.steps
    if checkpoints is None:
        checkpoints = [round(last * share) for share in np.linspace(0, 1, looks)]
    places = sorted({0, *checkpoints, last})
    if places[0] < 0 or places[-1] > last:
        raise BadParameter(f"checkpoints: {checkpoints} must be steps from 0 to {last}.")
    layers = len(layer_groups(build(copy(main, 0, 0, 1), images, torch.device("cpu"))))
    if window > layers:
        raise BadParameter(f"window: {window} layers, but {main.net} has {layers}.")
    sets = Sweep(
        kinds=("single", "shallow", "deep", "window") if together else ("single",),
        points=1,
        window=window,
        draws=draws if together else 0,
        train_examples=train_examples,
        test_examples=test_examples,
    )
    return Study(
        images=images,
        residual=main,
        convolutional=convolutional,
        perceptron=perceptron,
        gentle=quieter,
        variants=tuple(variants),
        places=tuple(places),
        inits=inits,
        sets=sets,
        max_error=max_error,
        device=where,
        workers=workers,
    )


# ---- numbers of one pair, and over pairs


def worst(one: LayerBarriers, split: str = "train", metric: str = "loss") -> dict[str, float]:
    """Layer -> the larger of the barriers with either host."""
    return one.worst("single", split, metric)


def top(one: LayerBarriers, split: str = "train", metric: str = "loss") -> float:
    """The barrier of the worst layer."""
    return max(worst(one, split, metric).values())


def largest(one: LayerBarriers, split: str = "train", metric: str = "loss") -> float:
    """The worst layer's barrier over the whole network's."""
    full = one.full_height(split, metric)
    return top(one, split, metric) / full if full > 0 else math.inf


def against_random(one: LayerBarriers, kind: str) -> float:
    """The rise of the loss in random directions over that towards the other network.

    Both summed over layers and hosts (``single``), or of the whole network (``full``). The random
    one may be 0 or less, so this share has a mean where its inverse has none.
    """
    rises = one.rises(kind, "train")
    towards = sum(r.averaging for r in rises)
    return sum(r.mean for r in rises) / towards if towards > 0 else math.nan


def hump(one: LayerBarriers) -> float:
    """The mean barrier of the middle third of the windows minus that of the first and the last.

    As a share of the whole network's barrier; NaN without a window in the middle.
    """
    heights = list(one.worst("window", "train").values())
    third = len(heights) // 3
    middle, ends = heights[third : len(heights) - third], [heights[0], heights[-1]]
    if len(heights) < 3:
        return math.nan
    return float(np.mean(middle) - np.mean(ends)) / one.full_height("train")


def mean(values: Sequence[float]) -> float | None:
    """Of several numbers; None without any."""
    return float(np.mean(values)) if len(values) else None


def barriers(results: Sequence[LayerBarriers], split: str = "train") -> list[float]:
    """The whole network's barrier of each valid pair."""
    return [one.full_height(split) for one in results if one.valid]


def worst_layers(results: Sequence[LayerBarriers]) -> str:
    """Which layers are the worst, one a pair, each named once."""
    names = [max(found, key=lambda n: found[n]) for found in map(worst, results)]
    return ", ".join(dict.fromkeys(names))


def cumulative(one: LayerBarriers, kind: str) -> list[float]:
    """The barrier of the first (``shallow``) or the last (``deep``) 1, 2, … layers together."""
    return list(one.worst(kind, "train").values())


def _four(one: LayerBarriers) -> float:
    """The costliest of the first or last one to four layers."""
    return max(max(cumulative(one, kind)[:4]) for kind in ("shallow", "deep"))


def ratio(study: Study, kind: str) -> Interval | None:
    """The rise of the loss in one kind of direction over that outside of the training space."""
    kinds, _ = study.noise
    return over_pairs(i / o for i, o in zip(kinds[kind], kinds["outside"], strict=True) if o > 0)


def specials(study: Study, recipe: Recipe) -> list[float]:
    """Share of the layers in which the step towards the other network is the worse one, a pair."""
    return [
        float(np.mean([r.averaging > r.mean for r in one.rises("single", "train")]))
        for one in study.good(recipe)
    ]


# ---- one function a claim


def trained(results: Sequence[LayerBarriers]) -> Need:
    """Whether networks were trained to their end: early on layers have barriers that go."""
    wrong = np.mean([e for one in results for e in one.ends["train"]["error"]] or [100.0])
    why = f"training was cut short: {wrong:.0f} % error on training images"
    return bool(wrong <= gates.UNLEARNED), why


def walled(results: Sequence[LayerBarriers]) -> Need:
    """Whether every pair has a barrier that those of its layers can be compared with."""
    high = min(barriers(results), default=0.0) > SMALL
    return high, "a pair has no barrier of the whole network to compare with"


def _two(results: Sequence[LayerBarriers]) -> Need:
    return len(results) >= 2, "one pair decides nothing"


def _grouped(study: Study) -> Need:
    return study.together, "groups of layers and random directions were left out of this run"


def _layers(results: Sequence[LayerBarriers]) -> str:
    return f"largest layer / whole network: {', '.join(f'{largest(one):.0%}' for one in results)}"


def b01(study: Study) -> Statistic:
    """The barrier of the residual network at the end."""
    ends, before = barriers(study.deep), barriers(study.along[0])
    at_start = max((abs(v) for v in before), default=math.nan)
    net = study.residual.net
    norms = {"none": "no", "layer": "LayerNorm", "batch": "BatchNorm", "group": "GroupNorm"}
    norm = str(models.describe(net).get("norm", "none"))
    about = f"the claim is about a network without norms, this one has {norms[norm]}"
    return statistic(
        over_pairs(ends),
        (at_start < 1e-4, "the networks differ at initialisation"),
        ("resnet" in net, "the claim is about a residual network"),
        (norm == "none", about),
        _two(study.deep),
        detail=f"all pairs: {', '.join(f'{v:.2f}' for v in ends)}; "
        f"at initialisation {at_start:.1g}",
    )


def b02(study: Study) -> Statistic:
    """The largest layer's barrier over the whole network's, for the residual network."""
    deep = study.deep
    needs = (trained(deep), walled(deep), _two(deep))
    return statistic(over_pairs(map(largest, deep)), *needs, detail=_layers(deep))


def b03(study: Study) -> Statistic:
    """The largest layer's barrier of the test error, over the whole network's."""
    deep = study.deep
    whole = np.mean([one.full_height("test", "error") for one in deep])
    layer = np.mean([top(one, "test", "error") for one in deep])
    detail = f"whole network {whole:.1f} points, largest layer {layer:.1f}"
    value = over_pairs(largest(one, "test", "error") for one in deep)
    return statistic(value, trained(deep), walled(deep), _two(deep), detail=detail)


def b04(study: Study) -> Statistic:
    """How far the last step of a cumulative curve is from the whole network's barrier."""
    found = [
        abs(row.half("train", "loss") - one.select("full")[0].half("train", "loss"))
        for results in study.ends.values()
        for one in results
        for kind in ("shallow", "deep")
        for row in one.select(kind)
        if len(row.groups) == len(one.groups)
    ]
    count = sum(map(len, study.ends.values()))
    return statistic(max(found, default=math.nan), _grouped(study), n=count)


def b05(study: Study) -> Statistic:
    """The windows in the middle against those at the ends."""
    deep = study.deep
    value = over_pairs(map(hump, deep)) if study.together else None
    inner = not study.together or len(study.windows) > 2, "no window lies in the middle"
    return statistic(value, _grouped(study), walled(deep), _two(deep), inner)


def b06(study: Study) -> Statistic:
    """The costliest of the first or last one to four layers, over the whole network."""
    deep = study.deep
    found = deep if study.together else []
    value = over_pairs(_four(one) / one.full_height("train") for one in found)
    return statistic(value, _grouped(study), walled(deep), _two(deep))


def b07(study: Study) -> Statistic:
    """The whole network's barrier over the sum of its layers'."""
    deep = study.deep
    value = over_pairs([one.additivity("train").ratio for one in deep])
    return statistic(value, trained(deep), walled(deep), _two(deep))


def b08(study: Study) -> Statistic:
    """The smallest second difference along segments of one layer in linear networks."""
    single, joint = study.linear
    shown = min(joint) < -1e-6, "no joint path that is not convex was found"
    return statistic(min(single), shown, n=len(single), detail=f"all layers: {min(joint):.1e}")


def b09(study: Study) -> Statistic:
    """The largest deviation of the minimal example from the numbers that were found by hand."""
    return statistic(max(abs(found - known) for found, known in study.example.values()))


def _random(study: Study, kind: str, detail: str) -> Statistic:
    """The rise of the loss in random directions over that towards the other network."""
    if not study.together:
        return statistic(None, _grouped(study), _two(study.deep))
    found = [against_random(one, kind) for one in study.deep]
    return statistic(
        over_pairs(found),
        _two(study.deep),
        walled(study.deep),
        (not any(map(math.isnan, found)), "in a pair no layer costs anything"),
        detail=detail,
    )


def b10(study: Study) -> Statistic:
    """As :func:`_random`, over single layers."""
    each = {r.net: specials(study, r) for r in study.recipes if study.together}
    told = "; ".join(f"{net} {np.mean(v):.0%}" for net, v in each.items() if v)
    detail = f"{study.sets.draws} draws; layers with the larger rise towards the other: {told}"
    return _random(study, "single", detail)


def b11(study: Study) -> Statistic:
    """The barrier after a gentle training over that after the standard one."""
    low = [v for recipe in study.gentle for v in barriers(study.regimes[recipe])]
    high = barriers(study.deep)[: len(low)]
    return statistic(
        float(np.mean(low) / np.mean(high)) if low else None,
        walled(study.deep),
        (bool(study.gentle), "the controls were left out of this run"),
        n=len(low),
        detail=f"{np.mean(low):.2f} against {np.mean(high):.2f} nats" if low else "",
    )


def b12(study: Study) -> Statistic:
    """As B02, for the plain convolutional network."""
    found = study.good(study.convolutional)
    return statistic(
        over_pairs(map(largest, found)),
        ("vgg" in study.convolutional.net, "the plain network is no VGG"),
        trained(found),
        walled(found),
        (len(found) >= 2, "fewer than two valid pairs"),
        detail=_layers(found),
    )


def b16(study: Study) -> Statistic:
    """The rise of the test loss inside the space that training used, over that outside of it."""
    views = ratio(study, "inside, views")
    detail = f"span of the views: {views.value:.1f} times" if views else ""
    return statistic(ratio(study, "inside"), _two(study.deep), detail=detail)


def b17(study: Study) -> Statistic:
    """As :func:`_random`, of the whole network at once."""
    return _random(study, "full", f"{study.sets.draws} draws, spread over all weights alike")


def b18(_: Study) -> Statistic:
    """Not tested: there is no transformer for images here."""
    return statistic(None, (False, "no profile of this book trains a transformer for images"))


def b19(_: Study) -> Statistic:
    """Not tested: there is no MobileNet here."""
    return statistic(None, (False, "no profile of this book trains a MobileNet"))


_ALL = (b01, b02, b03, b04, b05, b06, b07, b08, b09, b10, b11, b12, b16, b17, b18, b19)

CLAIMS: dict[str, Callable[[Study], Statistic]] = {f.__name__.upper(): f for f in _ALL}


# ---- figures, and the numbers of their captions and of the prose around them


def called(net: str) -> str:
    """What people call a network; that a plain one has no norms goes without saying."""
    return re.sub(r" \(norm none\)|, norm none|norm none, ", "", models.title(net))


def show_toy(study: Study) -> None:
    """The landscape of the minimal example, and three segments in it."""
    whole, one, two, *_ = (found for found, _ in study.example.values())
    page.fill(toy_whole=f"{whole:.3f}", toy_one=f"{one:.2f}", toy_two=f"{two:.3f}")
    (a1, b1), (a2, b2) = A, B
    line = np.linspace(0.2, 2.6, 121)
    grid_a, grid_b = np.meshgrid(line, line)
    loss = toy(grid_a, grid_b)
    fig, (ax,) = plots.grid(1, height=5.0)
    levels = [0, 0.02, 0.1, 0.3, 0.7, 1.5, 3, 6, 12, 36]
    filled = ax.contourf(grid_a, grid_b, np.sqrt(loss), levels=np.sqrt(levels), cmap=plots.MAP)
    ax.plot(line, 1 / line, color=figures.ON_LIGHT, linewidth=1, linestyle="--")
    red = "#d55e00"
    for ends, style, label in (
        ((A, B), "-", "both layers"),
        ((A, (a2, b1)), "--", "layer 1 of A"),
        ((A, (a1, b2)), ":", "layer 2 of A"),
    ):
        xs, ys = zip(*ends, strict=True)
        ax.plot(xs, ys, style, color=red, linewidth=2, label=label)
        ax.plot(np.mean(xs), np.mean(ys), "o", color=red, markeredgecolor=figures.ON_DARK)
    for name, point in (("A", A), ("B", B)):
        ax.plot(*point, "s", color=red, markeredgecolor=figures.ON_DARK, markersize=8)
        at = ax.annotate(name, point, xytext=(7, 7), textcoords="offset points", fontweight="bold")
        at.set_color(figures.ON_LIGHT)  # on yellow in the dark, too
    ax.set(xlabel="layer 1, a", ylabel="layer 2, b", xlim=(0.2, 2.6), ylim=(0.2, 2.6))
    ax.set_aspect("equal")
    ax.grid(visible=False)
    plots.legend(fig, columns=3)
    bar = fig.colorbar(filled, ax=ax, shrink=0.85, label="loss (ab − 1)²")
    bar.set_ticks(list(np.sqrt(levels)), labels=[f"{v:g}" for v in levels])
    drawn = {"a": line[::4], "b": line[::4], "loss": loss[::4, ::4]}
    figures.publish(fig, "toy", data=drawn)


def show_layers(study: Study) -> None:
    """Single layers of the three networks against the whole."""
    shares = []
    for short, recipe in zip(("residual", "plain", "perceptron"), study.recipes, strict=True):
        good = study.good(recipe)
        share = over_pairs(map(largest, good))
        shares += [] if share is None else [share.value]
        numbers = {
            "whole": said(mean(barriers(good))),
            "layer": said(mean([top(one) for one in good])),
            "share": said(share, "{:.0%}"),
            "which": worst_layers(good) or "none",
        }
        page.fill(**{f"{short}_{name}": text for name, text in numbers.items()})
    low = sum(share <= 0.2 for share in shares)
    if low and low < len(shares):
        answer = "In some networks a layer alone has a good part of the wall, in others none has."
    elif low:
        answer = "In none of these networks is there a layer that makes the wall."
    else:
        answer = "In each of these networks some layer alone has a good part of the wall."
    page.fill(answer=answer)
    fig, axes = plots.grid(3, columns=3, height=4.8)
    drawn = {}
    for ax, recipe in zip(axes, study.recipes, strict=True):
        ax.set_title(called(recipe.net), fontsize=10)
        if good := study.good(recipe):
            drawn[recipe.net] = plots.dots(ax, [worst(one) for one in good], barriers(good))
    plots.legend(fig, study.inits)
    figures.publish(fig, "layers", data=drawn)


def show_groups(study: Study) -> None:
    """The first k and the last k layers together, and windows of neighbours."""
    deep = study.deep
    sums = [one.additivity("train").total for one in deep]
    page.fill(sum_layers=said(mean(sums)))
    for name, recipe in zip(("whole", "plain", "perceptron"), study.recipes, strict=True):
        times = over_pairs(one.additivity("train").ratio for one in study.good(recipe))
        page.fill(**{f"{name}_times": said(times, "{:.1f}")})
    if not study.together:
        names = ("window_first", "window_last", "window_peak", "window_most", "four")
        nothing = "Groups of layers were left out of this run."
        page.fill(**dict.fromkeys(names, MISSING), where=nothing)
        return
    windows = study.windows
    means = [float(np.mean(v)) for v in windows.values()]
    at, last = int(np.argmax(means)), len(means) - 1
    share = at / max(last, 1)
    nearer = "middle" if 1 / 3 <= share <= 2 / 3 else "last third of them"
    nearer = "first third of them" if share < 1 / 3 else nearer
    page.fill(
        window_first=said(means[0]),
        window_last=said(means[-1]),
        window_peak=list(windows)[at],
        window_most=said(means[at]),
        four=said(mean([_four(one) for one in deep])),
        where=f"Counted from the input, the costliest is window {at + 1} of {last + 1}: in the "
        f"{nearer}.",
    )
    counts = list(range(1, len(deep[0].groups) + 1))
    fig, axes = plots.grid(2, height=4.0, sharey=True)
    drawn = {
        kind: plots.band(axes[0], counts, [cumulative(one, kind) for one in deep], label, number)
        for number, (kind, label) in enumerate((("shallow", "the first k"), ("deep", "the last k")))
    }
    axes[0].set(
        xlabel="number of layers averaged, k",
        ylabel="train loss barrier (nats)",
        title="more and more layers",
    )
    each = np.transpose(list(windows.values())).tolist()
    label = f"{study.sets.window} neighbours"
    drawn["windows"] = plots.band(axes[1], list(range(1, len(windows) + 1)), each, label, 2)
    drawn["windows"]["layers"] = list(windows)
    title = f"always {study.sets.window} layers"
    axes[1].set(xlabel="first layer of the window", title=title)
    for ax, text in zip(axes, ("", "the whole network"), strict=True):
        plots.dashed(ax, float(np.mean(barriers(deep))), text=text)
        ax.locator_params(axis="x", integer=True)
        ax.axhline(0, color="#555555", linewidth=0.6)
    plots.legend(fig, columns=3)
    figures.publish(fig, "cumulative", data=drawn)


def show_sums(study: Study) -> None:
    """The whole network's barrier against the sum of its layers'."""
    rows = []
    for recipe in study.recipes:
        sums = [one.additivity("train") for one in study.good(recipe)]
        numbers = ([a.full for a in sums], [a.total for a in sums], [a.ratio for a in sums])
        rows.append((called(recipe.net), *(over_pairs(v) or "—" for v in numbers)))
    columns = ("network", "whole network (nats)", "sum over the layers (nats)", "whole / sum")
    tables.show(columns, rows, name="sums")


WHOLE = "whole network"


def maps(study: Study) -> dict[str, dict[str, list[float]]]:
    """Split -> whole network, and every layer -> its barrier at each step, mean over pairs."""
    out = {}
    for split in ("train", "test"):
        each = [[worst(one, split) for one in study.along[s]] for s in study.places]
        out[split] = {
            WHOLE: [float(np.mean(barriers(study.along[s], split))) for s in study.places]
        }
        for label in study.deep[0].groups:
            out[split][label] = [float(np.mean([one[label] for one in found])) for found in each]
    return out


def show_time(study: Study) -> None:
    """Whole network and layers along training, as lines."""
    last, found = study.residual.steps, maps(study)
    looks = {"first": study.places[1], "middle": study.middle, "end": last}
    shares = {name: study.shares(step) for name, step in looks.items()}
    column = {name: row[-1] for name, row in found["train"].items() if name != WHOLE}
    heaviest = max(column, key=lambda name: column[name])
    story = "The layers' share of the wall does not shrink in this training."
    if shares["end"] < shares["first"]:
        story = "Layers lose their barriers while the network gains its own: how long one trains "
        story += "is part of the answer."
    page.fill(
        first=looks["first"],
        middle=looks["middle"],
        **{f"share_{name}": said(share, "{:.0%}") for name, share in shares.items()},
        whole_start=said(found["train"][WHOLE][0]),
        whole_end=said(found["train"][WHOLE][-1]),
        top_end=said(mean([top(one) for one in study.along[last]])),
        heaviest=heaviest,
        heaviest_end=said(column[heaviest]),
        story=story,
    )
    fig, axes = plots.grid(2, height=3.8, sharey=True)
    drawn: dict[str, Any] = {}
    for ax, (split, rows) in zip(axes, found.items(), strict=True):
        for number, (name, row) in enumerate(rows.items()):
            if name != WHOLE:
                label = "one layer, mean over pairs" if number == 1 else None
                ax.plot(study.places, row, color="#999999", linewidth=0.9, label=label)
        along = [study.along[s] for s in study.places]
        both = {
            WHOLE: [barriers(pairs, split) for pairs in along],
            "worst layer of each pair": [[top(one, split) for one in pairs] for pairs in along],
        }
        drawn[split] = {
            label: plots.band(ax, study.places, np.transpose(values).tolist(), label, number)
            for number, (label, values) in enumerate(both.items())
        }
        ax.axhline(0, color="#555555", linewidth=0.6)
        ax.set(title=f"{split} images", xlabel=f"training step (of {last})")
    axes[0].set_ylabel("loss barrier (nats)")
    plots.legend(fig, columns=3)
    figures.publish(fig, "layerwise-time", data=drawn)


def show_heatmap(study: Study) -> None:
    """The same on training images, with a number for each layer and step."""
    found = maps(study)
    fig, axes = plots.grid(1, height=0.8 + 0.31 * len(found["train"]))
    plots.heat(axes, {"train": found["train"]}, study.places, label="train loss barrier (nats)")
    axes[0].set_xlabel(f"training step (of {study.residual.steps})")
    data = {"T": study.residual.steps, "steps": study.places, **found}
    figures.publish(fig, "heatmap", data=data)


def settings(study: Study) -> dict[str, list[LayerBarriers]]:
    """Network and training, in words -> its valid pairs: what the question why is asked of."""
    main, last = called(study.residual.net), study.residual.steps
    steps = [s for s in dict.fromkeys((study.places[1], study.middle, last)) if s in study.along]
    out = {f"{main}, step {s} of {last}": study.along[s] for s in steps}
    for recipe in study.gentle:
        rate = f"learning rate {recipe.lr:g} and batches of {recipe.batch}"
        out[f"{called(recipe.net)}, {rate}"] = study.regimes[recipe]
    for recipe in study.recipes[1:]:
        out[f"{called(recipe.net)}, T = {recipe.steps}"] = study.ends[recipe]
    for recipe in study.variants:
        normed = ", BatchNorm re-estimated" if models.may_have_batchnorm(recipe.net) else ""
        out[f"{called(recipe.net)}, T = {recipe.steps}{normed}"] = study.regimes[recipe]
    return {name: [one for one in found if one.valid] for name, found in out.items()}


def show_regimes(study: Study) -> None:
    """The largest layer's share of the wall in every setting, and a table of the rest."""
    shares = {name: over_pairs(100 * largest(o) for o in s) for name, s in settings(study).items()}
    gentle = [one for r in study.gentle for one in study.regimes[r] if one.valid]
    page.fill(
        regimes=listed({f"{name}:": share for name, share in shares.items()}, "{:.0f}%"),
        gentle_share=said(over_pairs(map(largest, gentle)), "{:.0%}"),
        gentle_whole=said(mean(barriers(gentle))),
    )
    rows = {name: share for name, share in shares.items() if share is not None}
    fig, axes = plots.grid(1, height=0.9 + 0.42 * len(rows), width=plots.WIDEST)
    label = "worst layer's barrier, % of the whole network's"
    drawn = plots.conditions(axes[0], rows, threshold=10, xlabel=label, form="{:.0f}")
    figures.publish(fig, "layerwise-regimes", data=drawn)


def show_settings(study: Study) -> None:
    """Errors and barriers behind the shares."""
    rows = []
    for name, good in settings(study).items():
        errors = [e for one in good for e in one.ends["test"]["error"]]
        numbers = [over_pairs(barriers(good)), over_pairs(map(top, good))]
        shown = [said(mean(errors), "{:.1f}"), *numbers, worst_layers(good)]
        rows.append([name, len(good), *(shown if good else ["no valid pair"] * 4)])
    columns = ["network", "pairs", "test error (%)", "whole network (nats)"]
    tables.show([*columns, "worst layer (nats)", "which, by pair"], rows, name="settings")


def show_directions(study: Study) -> None:
    """The rise of the loss towards the other network and in random directions, layer by layer."""
    if not study.together:
        page.fill(
            **dict.fromkeys(("full_towards", "full_random", "counted", "random_share"), MISSING)
        )
        return
    whole = [r for one in study.deep for r in one.rises("full", "train")]
    each = {f"{called(r.net)}:": mean(specials(study, r)) for r in study.recipes}
    page.fill(
        counted=listed(each, "{:.0%}"),
        random_share=said(over_pairs(against_random(o, "single") for o in study.deep), "{:.0%}"),
        full_towards=said(mean([r.averaging for r in whole])),
        full_random=said(mean([r.mean for r in whole])),
    )
    shown = [recipe for recipe in study.recipes if study.good(recipe)]
    fig, axes = plots.grid(len(shown), columns=3, height=4.6)
    drawn = {}
    for ax, recipe in zip(axes, shown, strict=True):
        rises = [r for one in study.good(recipe) for r in one.rises("single", "train")]
        layers = study.good(recipe)[0].groups
        towards = [float(np.mean([r.averaging for r in rises if r.label == n])) for n in layers]
        random = [float(np.mean([r.mean for r in rises if r.label == n])) for n in layers]
        rows = [-i for i in range(len(layers))]
        ax.plot(towards, rows, "o", label="towards the other network", markersize=5)
        ax.plot(random, rows, "^", label="random direction", markersize=5)
        ax.set_yticks(rows, list(layers))
        ax.tick_params(axis="y", labelsize=8)
        ax.set_xscale("symlog", linthresh=0.01)
        ax.set_xlim(right=2.5 * max(towards + random))
        ax.set_title(called(recipe.net), fontsize=10)
        ax.set_xlabel("rise of train loss (nats)\nlinear below 0.01", fontsize=9)
        drawn[recipe.net] = dict(zip(layers, zip(towards, random, strict=True), strict=True))
    plots.legend(fig, columns=2)
    figures.publish(fig, "directions", data=drawn)


def show_noise(study: Study) -> None:
    """Five kinds of direction, all steps of one length."""
    kinds, (ranks, *_) = study.noise
    found = {DIRECTIONS[kind].format(*ranks): over_pairs(v) for kind, v in kinds.items()}
    rises = {name: v for name, v in found.items() if v is not None}
    told = "Noise outside of the space that training used hurts more than noise in it."
    if np.mean(kinds["inside"]) > np.mean(kinds["outside"]):
        told = "Noise in the space that training used hurts more than noise outside of it."
    page.fill(
        noise=listed(rises, "{:.2f} nats"),
        noise_times=said(ratio(study, "inside"), "{:.1f}"),
        noise_told=told,
        rank=ranks[0],
        rank_views=ranks[1],
    )
    fig, axes = plots.grid(1, height=3.2)
    label = "rise of the test loss (nats)"
    drawn = plots.conditions(axes[0], rises, threshold=None, xlabel=label, form="{:.2f}")
    figures.publish(fig, "subspaces", data=drawn)


def show_recorded(records: Sequence[Record]) -> None:
    """The heat maps of recorded runs."""
    kept = [r for r in records if "heatmap" in r.data["figures"]]
    if not kept:
        return
    drawn = {r.name: r.data["figures"]["heatmap"]["data"] for r in kept}
    fig, axes = plots.grid(len(kept), width=6.4 * min(len(kept), 2), height=7.4)
    trained_on = {name: one["train"] for name, one in drawn.items()}
    steps = {name: one["steps"] for name, one in drawn.items()}
    plots.heat(axes, trained_on, steps, label="train loss barrier (nats)")
    for ax, record in zip(axes, kept, strict=True):
        where = f"{record.data['hardware']}, {record.data['date']}"
        ax.set_title(f"{record.name}: {record.dataset}\n{where}", fontsize=9)
        ax.set_xlabel("training step")
    values = {
        "recorded": " ".join(f"{record.title}." for record in kept),
        "recorded_ends": listed({f"{n}:": rows[WHOLE][-1] for n, rows in trained_on.items()}),
    }
    figures.publish(fig, "layerwise-recorded", data=drawn, values=values)
