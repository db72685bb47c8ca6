"""Git Re-Basin (Ainsworth et al. 2023): what chapter 2 trains, measures, draws and judges.

:func:`design` turns the chapter's parameters into a :class:`Study`, whose experiments run when they
are first looked at. Each claim of ``data/claims.yaml`` is one function of a study (:data:`CLAIMS`);
``show_*`` draws a figure, ``*_values`` are the numbers of its caption and of the prose around it.
:mod:`companion.papers.merging` does the same for networks made of several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from companion import data, models
from companion.connectivity import Plane, plane
from companion.core import stats
from companion.core.errors import BadParameter
from companion.core.pool import one_thread
from companion.core.stats import Interval
from companion.core.theta import Theta
from companion.data import Dataset
from companion.experiments.aligned import (
    EXTRAS,
    Aligned,
    Method,
    align,
    failures,
    independent,
    interval,
    lines_of,
    pairs_of,
    permuted,
    trend,
)
from companion.experiments.budget import Plan
from companion.experiments.pairs import Evaluation, Pair
from companion.rebasin import Spec, chain, derive
from companion.report import claims, figures, page, plots, provenance, recorded, tables
from companion.report.claims import Statistic
from companion.training import Fork, Recipe, Run, build, check_fit, load_weights

Results: TypeAlias = Mapping[str, Sequence[Aligned]]
"""Method -> one result a pair."""

Value: TypeAlias = Callable[[Aligned], float]
Need: TypeAlias = tuple[bool, str]
"""Whether a premise of a claim is fulfilled, and what to say if it is not."""

Cell: TypeAlias = tuple[str, float, float, int]
"""Optimiser, learning rate, weight decay, width: a cell of the map of settings."""

NAMES = {
    "naive": "as they are",
    "random": "random permutation",
    "greedy": "one greedy pass",
    "weights": "weight matching",
    "activations": "activation matching",
    "ste": "straight-through",
    "steepest": "steepest descent",
}
"""What figures and tables call the methods, in their order."""

RATES = {"sgd": (0.01, 0.03, 0.1), "adam": (3e-4, 1e-3, 1e-2)}
LIMIT = 2.0
"""Points of error: a barrier below it counts as none."""


# ---- what is trained


@dataclass(frozen=True)
class Setting:
    """Networks, their pairs, and how they are measured: what both pages of chapter 2 share.

    Arguments:
        images: the dataset.
        net: of a recipe, with ``{width}`` in place of the width.
        base: the recipe of every network, but for its width.
        width: of the main experiment.
        pairs: number of pairs of independent networks.
        max_error: of gate G0, percent.
    """

    images: Dataset
    net: str
    base: Recipe
    width: int
    pairs: int
    evaluation: Evaluation
    max_error: float
    device: str
    workers: int

    def at_width(self, width: int, **changed: Any) -> Recipe:
        """The recipe at another width."""
        return replace(self.base, net=self.net.replace("{width}", str(width)), **changed)

    @property
    def main(self) -> Recipe:
        """The recipe of the main experiment."""
        return self.at_width(self.width)

    @property
    def is_mlp(self) -> bool:
        """Whether the networks are perceptrons."""
        return self.net.startswith("mlp")

    @property
    def several(self) -> Need:
        """A claim about pairs needs two."""
        return self.pairs >= 2, "one pair decides nothing"

    @property
    def scale(self) -> str:
        """What the verdicts rest on, in one line."""
        main = self.main
        hardware = "CPU" if self.device == "cpu" else provenance.record()["gpu"]["name"]
        name = self.net.replace("{width}", str(self.width))
        if models.has_batchnorm(main.net):
            name += f", BatchNorm {self.evaluation.bn}"
        return (
            f"{self.images.label}, {name}, {main.optimizer} {main.lr:g}, T = {main.steps}, "
            f"{self.pairs} pairs, {hardware}"
        )

    def named(self, width: int) -> str:
        """The network of this width, for people."""
        found = models.title(self.at_width(width).net)
        return f"{found} of {width} units a layer" if self.is_mlp else found

    def words(self) -> dict[str, float | str]:
        """What captions and prose say of the whole page."""
        mode = self.evaluation.bn
        normed = f", BatchNorm {mode}" if models.has_batchnorm(self.main.net) else ""
        return {
            "data": self.images.label,
            "network": self.named(self.width) + normed,
            "steps": self.main.steps,
            "pairs": counted(self.pairs, "pair"),
            "spread": "95 % interval" if self.pairs > 3 else "their range, lowest to highest",
        }

    def align(
        self,
        pairs: Sequence[Pair],
        methods: Sequence[Method | str] = ("naive", "weights"),
        **how: Any,
    ) -> dict[str, list[Aligned]]:
        """:func:`companion.experiments.aligned.align` as this page measures."""
        whole: dict[str, Any] = {
            "evaluation": self.evaluation,
            "max_error": self.max_error,
            "device": self.device,
            "workers": self.workers,
        }
        return align(pairs, methods, **(whole | how))

    def provenance(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a reader needs to repeat the page's run."""
        return provenance.record(
            dataset={"name": self.images.label, "sha256": self.images.fingerprint},
            recipe=self.main.identity(),
            parameters=dict(given),
            device=self.device,
        )


def setting(
    *,
    dataset: str,
    net: str | None,
    width: int | None,
    steps: int | None,
    optimizer: str | None,
    lr: float | None,
    batch: int | None,
    weight_decay: float | None,
    pairs: int,
    points: int,
    train_examples: int | None,
    test_examples: int | None,
    max_error: float,
    bn: str | None,
    precision: str,
    device: str,
    workers: int,
) -> Setting:
    """The networks that a page's parameters ask for; what is None follows from the dataset.

    On a GPU and colour images: ResNet-20 with LayerNorm over channels, the paper's. Elsewhere: the
    paper's perceptron, on ``digits`` with SGD, on larger data with Adam and from Flax's default
    initialisation (half the variance of the default here), which the paper's code uses.

    Raises:
        BadParameter: no pair, a network without ``{width}``, what the dataset cannot serve.
    """
    where = str(data.resolve_device(device))
    images = data.load(dataset, where)
    colour = images.in_shape[0] == 3 and where != "cpu"
    if colour if net is None else not net.startswith("mlp"):
        crop = "flip+crop4" if min(images.in_shape[1:]) > 8 else "none"
        base = Recipe(
            net="resnet20:norm=layer",
            data=dataset,
            steps=12_000,
            lr=0.1,
            weight_decay=5e-4,
            schedule="cosine",
            warmup=400,
            augment=crop,
        )
        net, width = net or "resnet20:width={width},norm=layer", width or 64
    elif dataset == "digits":
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
    net = net or "mlp:widths={width}x3" + ("" if dataset == "digits" else ",init=lecun")
    if pairs < 1 or "{width}" not in net:
        raise BadParameter("pairs: 1 or more; net: a name with {width} in it.")
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
    width = width or 512
    if models.has_batchnorm(net.replace("{width}", str(width))):
        bn = bn or "reestimate"
    examples = train_examples or (500 if dataset == "digits" else 10_000)
    evaluation = Evaluation(points, bn or "interpolate", examples, test_examples)
    found = Setting(images, net, base, width, pairs, evaluation, max_error, where, workers)
    check_fit(found.main, images)
    return found


@dataclass(frozen=True)
class Study(Setting):
    """The experiments of chapter 2. Each runs, once, when it is first looked at.

    Arguments:
        widths: of the sweep, the main one among them.
        looks: steps at which pairs are compared.
        wide_decay: weight decay of the temperature control; 0 leaves it out.
        map_pairs: pairs in each cell of the map of settings; 0 leaves it out.
        methods: besides the line as it is and weight matching.
    """

    widths: tuple[int, ...]
    looks: tuple[int, ...]
    wide_decay: float
    map_pairs: int
    methods: tuple[Method, ...]

    @property
    def short(self) -> Evaluation:
        """A coarser line on fewer images, for the many pairs of time and of the map."""
        few = min(self.evaluation.train_examples or 500, 500)
        return replace(self.evaluation, points=13, train_examples=few, test_examples=2000)

    @property
    def both(self) -> list[Pair]:
        """The pairs of the main experiment."""
        return pairs_of(self.main, self.pairs)

    def pairs_at(self, width: int) -> list[Pair]:
        """Pairs of another width."""
        return pairs_of(self.at_width(width), self.pairs)

    @property
    def fork_at(self) -> int:
        """The step at which late copies leave their networks: half-way."""
        return max(1, self.base.steps // 2)

    @property
    def late_pairs(self) -> list[Pair]:
        """A network and a copy that leaves it half-way and sees the data in another order."""
        found = []
        for n in range(0, 2 * self.pairs, 2):
            fork = Fork(independent(self.main, n), self.fork_at, optimizer="restore")
            copy = Run(self.main, order=f"{n}/late", augment=f"{n}/late", fork=fork)
            found.append(Pair(independent(self.main, n), copy))
        return found

    @property
    def decayed_pairs(self) -> list[Pair]:
        """The widest networks, trained with strong weight decay."""
        recipe = self.at_width(self.widths[-1], weight_decay=self.wide_decay)
        return pairs_of(recipe, self.pairs if self.wide_decay else 0)

    @property
    def cells(self) -> dict[Cell, list[Pair]]:
        """The map of settings, of perceptrons: optimiser, rate, decay, width -> pairs."""
        if not (self.map_pairs and self.is_mlp):
            return {}
        keys: list[Cell] = [
            (opt, rate, decay, w)
            for opt, rates in RATES.items()
            for rate in rates
            for decay in (0.0, 1e-3)
            for w in (32, 128)
        ]
        return {
            (opt, rate, decay, w): pairs_of(
                self.at_width(w, optimizer=opt, lr=rate, weight_decay=decay), self.map_pairs
            )
            for opt, rate, decay, w in keys
        }

    def plans(self) -> list[Plan]:
        """All that this page trains and measures, for its budget."""
        both, short = self.both, {"evaluation": self.short}
        asked: list[tuple[list[Pair], dict[str, Any]]] = [
            (both, {"extras": EXTRAS}),
            (both, {"methods": self.methods}),
            *((self.pairs_at(w), {"extras": EXTRAS}) for w in self.widths),
            *((pairs_of(self.main, self.pairs, step=s), short) for s in self.looks),
            (self.late_pairs, {}),
            (self.decayed_pairs, {"extras": ("temperature",)}),
            ([p for group in self.cells.values() for p in group], short),
        ]
        whole = {"evaluation": self.evaluation}
        return [lines_of(pairs, **(whole | how)) for pairs, how in asked]

    # ---- the experiments

    @cached_property
    def first(self) -> Results:
        """The main pairs as they are and after weight matching, with temperature and REPAIR."""
        return self.align(self.both, extras=EXTRAS)

    @cached_property
    def lines(self) -> Results:
        """The main pairs under every method."""
        return {**self.first, **self.align(self.both, self.methods)}

    @cached_property
    def by_width(self) -> Mapping[int, Results]:
        """Width -> as they are and after weight matching."""
        return {w: self.align(self.pairs_at(w), extras=EXTRAS) for w in self.widths}

    @cached_property
    def by_step(self) -> Mapping[int, Results]:
        """Step of training -> the same; networks pass that err less than half-way to guessing."""
        how: dict[str, Any] = {"evaluation": self.short, "max_error": max(self.max_error, 50.0)}
        return {s: self.align(pairs_of(self.main, self.pairs, step=s), **how) for s in self.looks}

    @cached_property
    def late(self) -> Results:
        """Networks and their late copies: of one valley without any matching."""
        return self.align(self.late_pairs)

    @cached_property
    def decayed(self) -> Results:
        """The widest networks with strong weight decay; empty if left out."""
        pairs = self.decayed_pairs
        return self.align(pairs, extras=("temperature",)) if pairs else {}

    @cached_property
    def map(self) -> Mapping[Cell, Results]:
        """Every cell of the map of settings; the main networks say what error is normal."""
        cells = self.cells
        if not cells:
            return {}
        found = self.align(
            [p for group in cells.values() for p in group],
            evaluation=self.short,
            reference_error=self.normal_error,
        )
        n = self.map_pairs
        return {
            cell: {m: group[i * n : (i + 1) * n] for m, group in found.items()}
            for i, cell in enumerate(cells)
        }

    @property
    def normal_error(self) -> float:
        """Median test error of the main networks, percent."""
        return float(np.median([e for r in self.first["naive"] for e in r.barrier.errors]))

    @cached_property
    def module(self) -> nn.Module:
        """The network of the main experiment."""
        return build(independent(self.main, 0), self.images, self.images.train.x.device)

    def networks(self) -> tuple[Theta, Theta]:
        """State dicts of A and B, the first pair, as they were trained."""
        a, b = (load_weights(r, device=self.device) for r in (self.both[0].a, self.both[0].b))
        return a, b

    @cached_property
    def plane(self) -> Plane:
        """Test error on the plane through A, B and pi(B), first pair, weight matching."""
        moved = permuted(self.first["weights"][0], device=self.device)
        with one_thread():  # a small network: threads would only wait for each other
            few = {"test": self.images.test.head(1000)}
            return plane(self.module, *self.networks(), moved, few, points=15)

    # ---- what needs no training

    @cached_property
    def counterexample(self) -> Mapping[str, float]:
        """Order of B's units -> error half-way between the networks of App. A.6, percent."""
        spec, a, b = counterexample()
        orders = [torch.tensor([0, 1]), torch.tensor([1, 0])]
        return {
            f"{p.tolist()}, {q.tolist()}": wrong(mix(a, spec.permute(b, {"0": p, "1": q}), 0.5))
            for p in orders
            for q in orders
        }

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Network of Table 1 -> exponent of its number of permutations, rounded down by layer."""
        vgg16 = [64, 64, 128, 128, *[256] * 3, *[512] * 6, 4096, 4096]
        return {
            name: exponent(g.size for g in chain(1, *sizes, 1).groups.values())
            for name, sizes in (("MLP", [512] * 3), ("VGG-16", vgg16))
        }

    @cached_property
    def tied(self) -> tuple[float, int]:
        """ResNet-50 by its own spec: exponent of the count, and the number of permutations."""
        from torchvision.models import resnet50  # here: it imports for 1.5 s

        spec = derive(resnet50(), torch.zeros(2, 3, 32, 32))
        return spec.log10_count(), len(spec.groups)


def design(
    *,
    widths: list[int] | None,
    looks: list[int] | None,
    wide_decay: float,
    map_pairs: int,
    ste_steps: int,
    ste_lr: float,
    **common: Any,
) -> Study:
    """The study that the chapter's parameters ask for; refused before anything trains.

    Arguments:
        widths, looks: see :class:`Study`; None: the dataset's own, and four steps up to T.
        ste_steps, ste_lr: of the straight-through estimator; 0 steps leave it out.
        common: as :func:`setting` takes them.

    Raises:
        BadParameter: what :func:`setting` refuses, at any of the widths.
    """
    main = setting(**common)
    resnet = main.base.net.startswith("resnet20")
    if widths is None:
        widths = [16, 32] if resnet else [32, 64, 128, 256]
    steps = main.base.steps
    if looks is None:
        looks = [max(1, round(steps * share)) for share in (0.03, 0.1, 0.3)]
    examples = main.evaluation.train_examples
    methods = [
        Method("activations", examples=examples),
        *([Method("ste", steps=ste_steps, lr=ste_lr)] if ste_steps else []),
        Method("greedy"),
        Method("random"),
        *([Method("steepest", examples=examples)] if main.is_mlp else []),
    ]
    study = Study(
        **vars(main),
        widths=tuple(sorted({*widths, main.width})),
        looks=tuple(sorted({*looks, steps})),
        wide_decay=wide_decay,
        map_pairs=map_pairs,
        methods=tuple(methods),
    )
    for width in study.widths:
        check_fit(study.at_width(width), study.images)
    return study


def counterexample() -> tuple[Spec, dict[str, Tensor], dict[str, Tensor]]:
    """Two networks of one function that no permutation connects, and their spec.

    Both say yes where x1 < 0 and x2 > 0. A asks for x2 in its first layer and for x1 in its second,
    B the other way round. Source: Git Re-Basin, App. A.6.
    """

    def network(signs: list[list[float]], b1: list[float], b2: list[float]) -> dict[str, Tensor]:
        one, two = (torch.diag(torch.tensor(s)) for s in signs)
        biases = {"0.bias": torch.tensor(b1), "1.bias": torch.tensor(b2)}
        last = torch.tensor([[-1.0, -1.0]])
        return {"0.weight": one, "1.weight": two, "2.weight": last, **biases}

    a = network([[-1.0, -1.0], [-1.0, 1.0]], [1.0, 0.0], [1.0, 0.0])
    b = network([[1.0, 1.0], [1.0, -1.0]], [0.0, 1.0], [0.0, 1.0])
    return chain(2, 2, 2, 1), a, b


def wrong(theta: Theta, act: Callable[[Tensor], Tensor] = torch.relu) -> float:
    """Error of a network of :func:`counterexample` on the square [-1, 1] x [-1, 1], percent."""
    axis = (torch.arange(400) + 0.5) / 200 - 1
    x = square = torch.cartesian_prod(axis, axis)
    for layer in "01":
        x = act(x @ theta[f"{layer}.weight"].T + theta[f"{layer}.bias"])
    yes = (x @ theta["2.weight"].T)[:, 0] >= 0
    truth = (square[:, 0] < 0) & (square[:, 1] > 0)
    return 100 * float((yes != truth).float().mean())


def mix(a: Theta, b: Theta, alpha: float) -> dict[str, Tensor]:
    """The point of the line from a to b."""
    return {n: (1 - alpha) * a[n] + alpha * b[n] for n in a}


def exponent(sizes: Iterable[int]) -> int:
    """Exponent of the number of orders, layer by layer and rounded down, as Table 1 counts."""
    return sum(math.floor(math.lgamma(n + 1) / math.log(10)) for n in sizes)


# ---- statistics


def height(split: str = "test", metric: str = "error", definition: str = "mean", **o: Any) -> Value:
    """Of a result: the barrier, in points of error or nats of loss."""
    return lambda r: r.barrier.height(split, metric, definition, **o)


def calibrated(r: Aligned) -> float:
    """Test loss barrier with a temperature fitted at each point of the line."""
    return r.calibrated.height("test", "loss") if r.calibrated else math.nan


def lifted(r: Aligned) -> float:
    """Test loss of the midpoint above the mean of its ends."""
    return r.midpoint() - float(np.mean(r.barrier.curve.ends("test", "loss")))


def repaired(r: Aligned) -> float:
    """The same after REPAIR."""
    assert r.repaired is not None
    return r.repaired["test"].loss - float(np.mean(r.barrier.curve.ends("test", "loss")))


def left(r: Aligned) -> float:
    """Share of the distance between A and B that is left after matching."""
    return r.distances["after"] / r.distances["before"]


def over_pairs(values: Iterable[float]) -> Interval | None:
    """Mean and interval of one number a pair; None without any."""
    good = [float(v) for v in values if not math.isnan(v)]
    return stats.clustered(good, range(len(good))) if good else None


def statistic(
    value: float | Interval | None, *needs: Need, n: int | None = None, detail: str = ""
) -> Statistic:
    """What a claim is judged by, or why this run cannot judge it: the needs that are not met."""
    lacking = [why for met, why in needs if not met]
    return Statistic(value, None, n, detail, "; ".join(lacking), not lacking)


def _most(group: Sequence[Aligned], value: Value, *needs: Need) -> Statistic:
    """The largest value over valid pairs."""
    found = [value(r) for r in group if r.valid]
    return statistic(
        max(found, default=None), *needs, n=len(found) if found else None, detail="largest pair"
    )


def _difference(study: Study, one: str, other: str, value: Value) -> Interval | None:
    """Pair by pair: the value under one method minus that under the other."""
    both = zip(study.lines[one], study.lines[other], strict=True)
    return over_pairs([value(a) - value(b) for a, b in both if a.valid and b.valid])


def _perceptrons(study: Study) -> Need:
    return study.is_mlp, "the claim is about perceptrons"


def _wide(study: Study) -> Need:
    named = "the claim is about perceptrons of 512 units a layer"
    return study.is_mlp and study.width >= 512, named


def _estimator(study: Study) -> Need:
    return "ste" in study.lines, "no straight-through estimator in this run"


def in_cell(study: Study, cell: Cell, value: Value) -> float:
    """Mean of a cell of the map over its valid pairs after matching; NaN without one."""
    group = [r for r in study.map[cell]["weights"] if r.valid]
    return float(np.mean([value(r) for r in group])) if group else math.nan


def _too(study: Study, opt: str, bad: float, good: float) -> Statistic:
    """Share of the map's settings where matching fails at one learning rate, minus at another."""
    settings = list(dict.fromkeys((d, w) for _, _, d, w in study.map))
    one, other = (
        [in_cell(study, (opt, rate, d, w), height()) for d, w in settings] for rate in (bad, good)
    )
    found = failures(one, other)
    enough = found is not None and found.n >= 3
    return statistic(
        found,
        (bool(study.map), "no map of settings in this run"),
        (enough, "fewer than three settings trained at both rates"),
    )


def early(study: Study) -> dict[int, Interval]:
    """Step -> mean test error barrier after matching, where two pairs or more are valid."""
    found = {s: interval(g["weights"], height()) for s, g in study.by_step.items()}
    return {s: v for s, v in found.items() if v is not None and v.n >= 2}


def _resnet(study: Study, *, batchnorm: bool) -> Statistic:
    has = models.has_batchnorm(study.main.net)
    here = study.net.startswith("resnet20") and 64 in study.widths
    named = (here, "the claim is about ResNet-20, width 64")
    norm = (has == batchnorm, "no BatchNorm" if batchnorm else "no LayerNorm")
    mode = {"bn": "reestimate"} if batchnorm else {}
    found = None
    if here and norm[0]:
        found = interval(study.by_width[64]["weights"], height(**mode))
    return statistic(found, named, norm, study.several)


# ---- one function a claim


def r01(study: Study) -> Statistic:
    """Before matching: the smallest test error barrier over pairs."""
    found = [height()(r) for r in study.lines["naive"] if r.valid]
    least, n = min(found, default=None), len(found) if found else None
    return statistic(least, study.several, n=n, detail="smallest pair")


def r02(study: Study) -> Statistic:
    """After weight matching: the largest test error barrier over pairs."""
    return _most(study.lines["weights"], height(), study.several, _wide(study))


def r03(study: Study) -> Statistic:
    """After activation matching: the same."""
    return _most(study.lines["activations"], height(), study.several, _wide(study))


def r04(study: Study) -> Statistic:
    """After the straight-through estimator: the same."""
    group = study.lines.get("ste", [])
    return _most(group, height(), _estimator(study), study.several, _wide(study))


def r05(study: Study) -> Statistic:
    """MNIST: the largest test loss barrier over pairs and both ways of matching."""
    both = zip(study.lines["weights"], study.lines["activations"], strict=True)
    worst = [
        max(height("test", "loss")(r) for r in pair) for pair in both if all(r.valid for r in pair)
    ]
    mnist = (study.base.data == "mnist", "the claim is about MNIST")
    needs = (mnist, _wide(study), study.several)
    return statistic(max(worst, default=None), *needs, n=len(worst))


def r06(study: Study) -> Statistic:
    """Test loss at the midpoint, activation matching minus weight matching."""
    found = _difference(study, "activations", "weights", Aligned.midpoint)
    return statistic(found, study.several, _perceptrons(study))


def r07(study: Study) -> Statistic:
    """Test loss at the midpoint, straight-through minus the better of the other two."""
    three = zip(*(study.lines.get(n, []) for n in ("ste", "weights", "activations")), strict=False)
    found = over_pairs(
        [
            s.midpoint() - min(w.midpoint(), a.midpoint())
            for s, w, a in three
            if s.valid and w.valid and a.valid
        ]
    )
    return statistic(found, _estimator(study), study.several)


def r08(study: Study) -> Statistic:
    """Test loss at the midpoint minus that of the better end, after weight matching."""
    found = interval(study.lines["weights"], lambda r: r.midpoint() - r.best_end())
    return statistic(found, study.several, _perceptrons(study))


def r09(study: Study) -> Statistic:
    """Rank correlation of width and a pair's test loss barrier after matching."""
    number = len(study.widths)
    found = trend({w: g["weights"] for w, g in study.by_width.items()}, height("test", "loss"))
    needs = (number >= 4, "a rank correlation needs four widths or more")
    return statistic(found, needs, study.several, detail=f"{number} widths")


def r10(study: Study) -> Statistic:
    """Test error barrier of the narrowest network after matching."""
    found = interval(study.by_width[study.widths[0]]["weights"], height())
    needs = (len(study.widths) >= 2, "one width is not narrower than another")
    return statistic(found, needs, study.several, detail=f"width {study.widths[0]}")


def r11(study: Study) -> Statistic:
    """Rank correlation of the step and a pair's test loss barrier after matching."""
    number = len(study.looks)
    found = trend({s: g["weights"] for s, g in study.by_step.items()}, height("test", "loss"))
    needs = (number >= 4, "a rank correlation needs four steps or more")
    return statistic(found, needs, study.several, detail=f"{number} steps")


def r21(study: Study) -> Statistic:
    """Wide networks as they are: test loss barrier with a temperature fitted at each point."""
    found = interval(study.decayed["naive"], calibrated) if study.decayed else None
    needs = (bool(study.decayed), "no networks with strong weight decay in this run")
    return statistic(found, needs, study.several, detail=f"width {study.widths[-1]}")


def r22(study: Study) -> Statistic:
    """Test loss at the midpoint, one greedy pass minus weight matching."""
    return statistic(_difference(study, "greedy", "weights", Aligned.midpoint), study.several)


def r23(study: Study) -> Statistic:
    """SGD: share of settings that fail at its lowest rate minus that at its highest."""
    return _too(study, "sgd", min(RATES["sgd"]), max(RATES["sgd"]))


def r24(study: Study) -> Statistic:
    """Adam: share of settings that fail at its highest rate minus that at its lowest."""
    return _too(study, "adam", max(RATES["adam"]), min(RATES["adam"]))


def r25(study: Study) -> Statistic:
    """Share of the trained cells of the map that keep a barrier of 2 points or more."""
    found = [v for c in study.map if not math.isnan(v := in_cell(study, c, height()))]
    share = float(np.mean([v >= LIMIT for v in found])) if found else None
    return statistic(share, (bool(study.map), "no map of settings in this run"), n=len(found))


def r26(study: Study) -> Statistic:
    """The counterexample: lowest error half-way, over the four orders of B's units."""
    return statistic(min(study.counterexample.values()), n=4)


def r27(study: Study) -> Statistic:
    """Table 1: whether MLP and VGG-16 have the paper's exponents."""
    right = study.counts == {"MLP": 3498, "VGG-16": 35160}
    return statistic(right, detail=", ".join(f"{k} {v}" for k, v in study.counts.items()))


def r28(study: Study) -> Statistic:
    """Table 1: the exponent of ResNet-50, with the orders tied that have to be."""
    count, permutations = study.tied
    return statistic(count, detail=f"{permutations} permutations")


def r29(study: Study) -> Statistic:
    """Test error barrier after the permutation in whose direction the loss falls most steeply."""
    found = interval(study.lines["steepest"], height()) if study.is_mlp else None
    return statistic(found, (study.is_mlp, "asked of perceptrons only"), study.several)


def r30(study: Study) -> Statistic:
    """Share of the distance that weight matching leaves."""
    return statistic(interval(study.lines["weights"], left), study.several)


def r31(study: Study) -> Statistic:
    """A network and its late copy, nothing matched: the largest test error barrier."""
    found = [height()(r) for r in study.late["naive"] if r.valid]
    return statistic(max(found, default=None), study.several, n=len(found) if found else None)


def r32(study: Study) -> Statistic:
    """Test error barrier after a random permutation minus before."""
    return statistic(_difference(study, "random", "naive", height()), study.several)


def r33(study: Study) -> Statistic:
    """Share of the midpoint's excess loss that REPAIR takes away, narrowest network."""
    found = [
        1 - repaired(r) / lifted(r)
        for r in study.by_width[study.widths[0]]["weights"]
        if r.valid and lifted(r) > 0.05
    ]
    free = not models.has_batchnorm(study.main.net) or study.evaluation.bn == "interpolate"
    why = "BatchNorm's statistics are re-estimated on the line, which is REPAIR's own correction"
    return statistic(
        over_pairs(found),
        (len(found) >= 2, "too small a barrier at the midpoint of the narrowest network"),
        (free, why),
        study.several,
        detail=f"width {study.widths[0]}",
    )


def r34(study: Study) -> Statistic:
    """ResNet-20 with BatchNorm, width 64: barrier with the statistics estimated again."""
    return _resnet(study, batchnorm=True)


def r35(study: Study) -> Statistic:
    """ResNet-20 with LayerNorm, width 64: barrier after matching."""
    return _resnet(study, batchnorm=False)


def r36(study: Study) -> Statistic:
    """Early in training: barrier after matching at the first step that can be judged."""
    found = early(study)
    first = min(found, default=None)
    return statistic(
        None if first is None else found[first],
        (first is not None, "at no step two valid pairs"),
        study.several,
        detail=f"step {first} of {study.base.steps}",
    )


CLAIMS: dict[str, Callable[[Study], Statistic]] = {
    f.__name__.upper(): f
    for f in (
        *(r01, r02, r03, r04, r05, r06, r07, r08, r09, r10, r11, r21, r22, r23, r24, r25),
        *(r26, r27, r28, r29, r30, r31, r32, r33, r34, r35, r36),
    )
}


# ---- figures, and the numbers of their captions


def said(value: Interval | float | None, form: str = "{:.1f}") -> str:
    """A number in words that also say that there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "no valid pair"
    number = value.value if isinstance(value, Interval) else value
    text = form.format(number)
    return (form.format(0.0) if float(text.rstrip("%")) == 0 else text).replace("-", "−")


def counted(n: int, thing: str) -> str:
    """``one pair``, ``3 pairs``."""
    return f"one {thing}" if n == 1 else f"{n} {thing}s"


def _told(points: Mapping[int, Interval], form: str = "{:.2f}") -> str:
    """A curve for an alternative text."""
    return ", ".join(f"{x}: {said(v, form)}" for x, v in points.items()) or "no valid pair"


def _series(found: Mapping[int, Results], value: Value, method: str) -> dict[int, Interval]:
    points = {x: interval(results[method], value) for x, results in found.items()}
    return {x: v for x, v in points.items() if v is not None}


def show_swap() -> None:
    """A drawing: two hidden units change places, wires and all."""
    fig, axes = plots.grid(2, height=2.6)
    colours = list(figures.OKABE_ITO.values())
    ends = [(0, [0.5, 1.5, 2.5]), (2, [1.0, 2.0])]
    titles = {"before": [0, 1, 2, 3], "units 2 and 3 swapped": [0, 2, 1, 3]}
    for ax, (title, order) in zip(axes, titles.items(), strict=True):
        for place, unit in enumerate(order):
            for x, rows in ends:
                for y in rows:
                    ax.plot([1, x], [place, y], color=colours[unit], linewidth=1.2)
            ax.plot(1, place, "o", markersize=17, color=colours[unit])
            ax.text(1, place, "abcd"[unit], ha="center", va="center", color="white", weight="bold")
            ax.annotate(str(place + 1), (1, place), xytext=(-4, 12), textcoords="offset points")
        for x, rows in ends:
            ax.plot([x] * len(rows), rows, "o", markersize=11, color="#555555")
        ax.set(title=title, xlim=(-0.2, 2.2), ylim=(3.6, -0.7))
        ax.set_axis_off()
    figures.publish(fig, "rebasin-swap")


def plane_values(study: Study) -> dict[str, float | str]:
    """The highest test error on either line of the plane, percent."""
    return {
        f"peak_{name}": max(study.first[name][0].barrier.curve.values["test"]["error"])
        for name in ("naive", "weights")
    }


def show_plane(study: Study) -> None:
    """Test error on the plane through A, B and pi(B)."""
    page.fill(**plane_values(study))
    fig, axes = plots.grid(1, columns=1, height=4.8)
    drawn = plots.planes(
        axes, {"": study.plane}, names=("A", "B", "π(B)"), segments=((0, 1), (0, 2))
    )
    figures.publish(fig, "rebasin-plane", data=drawn[""])


def line_values(study: Study) -> dict[str, float | str]:
    """Barriers of every method, what is left of the distance, and how the two compare."""
    out: dict[str, float | str] = {}
    for name in NAMES:
        group = study.lines.get(name, [])
        out[f"{name}_points"] = said(interval(group, height()))
        out[f"{name}_nats"] = said(interval(group, height("test", "loss")), "{:.2f}")
        out[f"{name}_middle"] = said(interval(group, lambda r: r.midpoint("test", "error")))
        out[f"{name}_left"] = said(interval(group, lambda r: 100 * left(r)), "{:.0f}")
    near, low = (
        {n: interval(study.lines[n], v) for n in ("weights", "activations")}
        for v in (left, height("test", "loss"))
    )
    if any(v is None for v in (*near.values(), *low.values())):
        out["closer"] = "No pair was valid under both, so which one it is stays open."
    else:
        (d_w, d_a), (l_w, l_a) = ([v.value for v in x.values() if v] for x in (near, low))
        out["closer"] = (
            "Here the order that leaves B farther away has the lower barrier: which way B lies "
            "matters more than how far."
            if (d_w - d_a) * (l_w - l_a) < 0
            else "Here the order that brings B closer does not have the higher barrier."
        )
    out["failed_lines"] = sum(not r.valid for group in study.lines.values() for r in group)
    out["all_lines"] = sum(map(len, study.lines.values()))
    return out


def show_lines(study: Study) -> None:
    """Test error and loss on the line from A to B, as they are and after matching."""
    page.fill(**line_values(study))
    shown = ("naive", "weights", "activations")
    groups = {NAMES[n]: [r.barrier.curve for r in study.lines[n] if r.valid] for n in shown}
    fig, axes = plots.grid(2)
    drawn = {
        f"test {metric}": plots.lines(ax, groups, metric=metric, xlabel="α, from A (0) to π(B) (1)")
        for ax, metric in zip(axes, ("error", "loss"), strict=True)
    }
    plots.legend(fig, columns=3)
    figures.publish(fig, "rebasin-line", data=drawn)


def show_methods(study: Study) -> None:
    """The table of all methods."""
    columns: dict[str, Value] = {
        "test error (points)": height(),
        "… above the straight line between the ends": height(definition="linear"),
        "train error (points)": height("train"),
        "test loss (nats)": height("test", "loss"),
        "train loss (nats)": height("train", "loss"),
    }
    rows = [
        [
            text,
            *(str(interval(study.lines[n], of) or "no valid pair") for of in columns.values()),
            said(interval(study.lines[n], left), "{:.2f}"),
        ]
        for n, text in NAMES.items()
        if n in study.lines
    ]
    tables.show(["units of B", *columns, "distance left"], rows, name="rebasin-methods")


def _sweep(
    found: Mapping[int, Results], name: str, xlabel: str, rows: Mapping[str, Any], **o: Any
) -> None:
    """Test error barrier before and after (left), loss barrier after (right), against a number.

    Arguments:
        rows: label -> (method, options of :func:`height`), for both panels.
    """
    fig, axes = plots.grid(2)
    drawn = {}
    for ax, metric, unit in zip(axes, ("error", "loss"), ("points", "nats"), strict=True):
        series = {
            label: _series(found, height(of.get("split", "test"), metric, bn=of.get("bn")), method)
            if metric == "error" or method != "naive"
            else {}
            for label, (method, of) in rows.items()
        }
        ylabel = f"{metric} barrier ({unit})"
        look = {"xlabel": xlabel, "ylabel": ylabel, **o}
        drawn[metric] = plots.sweep(ax, series, axis="log", **look)
        ax.set_ylim(bottom=0)
    plots.legend(fig, columns=3)
    figures.publish(fig, name, data=drawn["error"] | {"loss": drawn["loss"]})


def width_values(study: Study) -> dict[str, float | str]:
    """The ends of the sweep over widths, and both curves in words."""
    after, before = (_series(study.by_width, height(), m) for m in ("weights", "naive"))
    loss = _series(study.by_width, height("test", "loss"), "weights")
    narrow, wide = study.widths[0], study.widths[-1]
    return {
        "narrowest": narrow,
        "widest": wide,
        "narrow_points": said(after.get(narrow)),
        "wide_points": said(after.get(wide)),
        "width_before": _told(before, "{:.1f}"),
        "width_after": _told(after, "{:.1f}"),
        "width_loss": _told(loss),
    }


def show_width(study: Study) -> None:
    """Barrier against width."""
    page.fill(**width_values(study))
    rows: dict[str, Any] = {
        "as they are, test": ("naive", {}),
        "weight matching, test": ("weights", {}),
    }
    if models.has_batchnorm(study.main.net) and study.evaluation.bn != "interpolate":
        rows["weight matching, statistics interpolated, test"] = ("weights", {"bn": "interpolate"})
    _sweep(study.by_width, "rebasin-width", "width", rows)


def time_values(study: Study) -> dict[str, float | str]:
    """The first step that can be judged, and the curve in words."""
    found = early(study)
    first = min(found, default=None)
    loss = _series(study.by_step, height("test", "loss"), "weights")
    return {
        "earliest": "none" if first is None else first,
        "early_points": said(None if first is None else found[first]),
        "time_after": _told(_series(study.by_step, height(), "weights"), "{:.1f}"),
        "time_loss": _told(loss),
    }


def show_time(study: Study) -> None:
    """Barrier in the course of training."""
    page.fill(**time_values(study))
    total = study.base.steps
    rows: dict[str, Any] = {
        "as they are, test": ("naive", {}),
        "weight matching, test": ("weights", {}),
        "weight matching, train": ("weights", {"split": "train"}),
    }
    label = "step of training, and its share"
    _sweep(study.by_step, "rebasin-time", label, rows, total=total)


def map_values(study: Study) -> dict[str, float | str]:
    """How many cells trained, and in how many of them matching fails."""
    found = {c: in_cell(study, c, height()) for c in study.map}
    good = {c: v for c, v in found.items() if not math.isnan(v)}
    return {
        "map_cells": len(found),
        "map_trained": len(good),
        "map_failed": sum(v >= LIMIT for v in good.values()),
        "map_pairs": counted(study.map_pairs, "pair"),
        "normal_error": study.normal_error if found else 0.0,
        "map_told": "; ".join(
            f"{o} {r:g}, decay {d:g}, width {w}: {said(v)}" for (o, r, d, w), v in good.items()
        ),
    }


def show_map(study: Study) -> None:
    """Barrier after matching by optimiser, learning rate, weight decay and width."""
    page.fill(**map_values(study))
    if not study.map:
        return
    columns = list(dict.fromkeys((o, r) for o, r, _, _ in study.map))
    settings = list(dict.fromkeys((d, w) for _, _, d, w in study.map))
    rows: dict[str, dict[str, list[float]]] = {
        metric: {
            f"width {w}, decay {d:g}": [
                in_cell(study, (o, r, d, w), height("test", metric)) for o, r in columns
            ]
            for d, w in settings
        }
        for metric in ("error", "loss")
    }
    fig, axes = plots.grid(1, columns=1, height=3.4)
    plots.heat(
        axes,
        {"": rows["error"]},
        [f"{o}\n{r:g}" for o, r in columns],
        label="test error barrier (points)",
        form="{:.1f}",
        missing="INVALID",
        apart=False,
    )
    axes[0].set_xlabel("optimiser and learning rate")
    named = [f"{o} {r:g}" for o, r in columns]
    figures.publish(fig, "rebasin-map", data={"columns": named, **rows})


def control_values(study: Study) -> dict[str, float | str]:
    """What controls leave of the loss barrier, in words."""
    decayed = interval(study.decayed["naive"], calibrated) if study.decayed else None
    naive, matched = (interval(study.first[m], calibrated) for m in ("naive", "weights"))
    late = interval(study.late["naive"], height())
    return {
        "fork_at": study.fork_at,
        "late_points": said(late),
        "naive_calibrated": said(naive, "{:.2f}"),
        "weights_calibrated": said(matched, "{:.2f}"),
        "weights_repaired": said(interval(study.first["weights"], repaired), "{:.2f}"),
        "wide_decay": f"{study.wide_decay:g}",
        "decayed_nats": said(decayed, "{:.2f}") if study.decayed else "not measured",
    }


def show_controls(study: Study) -> None:
    """Error barriers of all orders; what a temperature and REPAIR leave of the loss barrier."""
    page.fill(**control_values(study))
    loss = height("test", "loss")
    naive, matched = study.first["naive"], study.first["weights"]
    error_rows = {text: interval(study.lines.get(n, []), height()) for n, text in NAMES.items()}
    error_rows["late copy, as it is"] = interval(study.late["naive"], height())
    loss_rows = {
        "as they are": interval(naive, loss),
        "… temperature fitted": interval(naive, calibrated),
        "weight matching": interval(matched, loss),
        "… temperature fitted ": interval(matched, calibrated),
        "… midpoint after REPAIR": interval(matched, repaired),
    }
    shown = [{k: v for k, v in rows.items() if v is not None} for rows in (error_rows, loss_rows)]
    fig, axes = plots.grid(2, height=4.2)
    drawn = {
        "error": plots.conditions(axes[0], shown[0]),
        "loss": plots.conditions(
            axes[1], shown[1], threshold=None, xlabel="test loss barrier (nats)", form="{:.2f}"
        ),
    }
    figures.publish(fig, "rebasin-controls", data=drawn)


def show_recorded(records: Sequence[recorded.Record]) -> None:
    """Barrier against width and against time in every record that has it."""
    for name, xlabel in (("rebasin-width", "width"), ("rebasin-time", "step of training")):
        runs = recorded.curves(records, name)
        told = "; ".join(f"{r.title}: {recorded.extremes(r, name, name[8:])}" for r in records)
        page.fill(**{f"recorded_{name[8:]}": told})
        if runs:
            label = "test error barrier (points)"
            fig, drawn = plots.panels(runs, xlabel=xlabel, ylabel=label, threshold=None)
            figures.publish(fig, f"recorded-{name}", data=drawn)


def record_values(records: Sequence[recorded.Record]) -> dict[str, float | str]:
    """What the two MNIST records say about the initialisation; empty without them."""
    found = {r.name: r.verdicts for r in records}
    if not {"cpu-mnist", "cpu-mnist-kaiming"} <= set(found):
        return {"initialisation": ""}
    flax, he = (found[n]["R05"].value for n in ("cpu-mnist", "cpu-mnist-kaiming"))
    return {
        "initialisation": "The networks of the two MNIST records differ in their initialisation "
        "alone. From Flax's default (weights of variance 1 / fan-in; the paper's code uses Flax) "
        "the worst test loss barrier after weight or activation matching is "
        f"{said(flax, '{:.3f}')} nats; from He's, of twice that variance, {said(he, '{:.3f}')}."
    }


def closing_values(study: Study, verdicts: Sequence[Any]) -> dict[str, float | str]:
    """How sure the verdicts are, and which of them this run could not reach."""
    pairs = study.pairs
    if pairs == 1:
        sure = "One pair has no interval, and decides no claim about pairs."
    elif pairs <= 3:
        sure = (
            f"Intervals are over pairs; with {pairs}, they reach from the lowest pair to the "
            "highest. So a claim about a sign is decided as soon as all pairs agree, which by "
            f"chance alone they do, in each direction, one time in {2**pairs}: such a verdict is a "
            "hint, not a proof."
        )
    else:
        sure = f"Intervals are 95 % bootstrap intervals over {pairs} pairs."
    untested = [v for v in verdicts if v.verdict == claims.NOT_TESTABLE]
    said_why = "; ".join(f"{v.claim.id} ({v.note or 'not measured'})" for v in untested)
    before, after = (interval(study.lines[m], height()) for m in ("naive", "weights"))
    most = ""
    if before is not None and after is not None:
        half = after.value < before.value / 2
        most = f"The order of units is {'most' if half else 'not most'} of this wall."
    return {
        "sure": sure,
        "untested": said_why or "none",
        "most": most,
        "one_image": 100 / len(study.images.test),
        "ste_steps": max((m.steps for m in study.methods if m.name == "ste"), default=0),
    }
