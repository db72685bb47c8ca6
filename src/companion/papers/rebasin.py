"""Git Re-Basin (Ainsworth et al. 2023): what chapter 2 trains, measures, draws and judges.

:func:`design` turns the chapter's parameters into a :class:`Study`, whose experiments run when they
are first looked at. :data:`CLAIMS` judge it, ``show_*`` draw it, :func:`values` says it in words.
:mod:`companion.papers.merging` does the same for networks made of several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from companion import data, models
from companion.connectivity import Plane, plane, segment
from companion.core import closing
from companion.core.errors import BadParameter
from companion.core.pool import one_thread
from companion.core.seeds import Key
from companion.core.stats import Interval, clustered, over_pairs
from companion.core.theta import Theta
from companion.data import Dataset
from companion.experiments import aligned, measurement
from companion.experiments.aligned import Aligned, Method, independent, interval, pairs_of
from companion.experiments.budget import Plan
from companion.experiments.pairs import Evaluation, Pair
from companion.rebasin import Matching, Spec, chain, derive, weight_matching
from companion.rebasin.repair import repair
from companion.report import claims, figures, plots, provenance, recorded, tables
from companion.report.claims import Need, Statistic, statistic
from companion.report.words import MISSING, Values, counted, listed, said, untested
from companion.training import Fork, Recipe, Run, build, check_fit, load_weights

Results: TypeAlias = Mapping[str, Sequence[Aligned]]
"""Method -> one result a pair."""

Value: TypeAlias = Callable[[Aligned], float]
Maybe: TypeAlias = Interval | None

Cell: TypeAlias = tuple[str, float, float, int]
"""Optimiser, learning rate, weight decay, width: a cell of the map of settings."""

NAMES = {
    "naive": "as they are",
    "random": "random permutation",
    "greedy": "one greedy pass",
    "weights": "weight matching",
    "authors": "… with the paper's solver",
    "activations": "activation matching",
    "ste": "straight-through",
    "steepest": "steepest descent",
}
"""What figures and tables call the methods, in their order."""

MAP_WIDTHS = (32, 64, 128)
RATES = {"sgd": (0.01, 0.1), "adam": (1e-3, 1e-2)}
LIMIT = 2.0
"""Points of error: a barrier below it counts as none (the stability margin of chapter 1)."""

EPOCHS = 25
"""Times that networks see their data until nothing is left of the loss barrier: paper, Fig. 3."""


# ---- what is trained


@dataclass(frozen=True)
class Setting:
    """Networks, their pairs, and how they are measured: what both pages of chapter 2 share.

    Arguments:
        images: the dataset.
        net: of a recipe, with ``{width}`` in place of the width.
        main: the recipe of the main experiment; others differ in their width.
        width: of the main experiment.
        pairs: number of pairs of independent networks.
        max_error: of a trained network, percent.
    """

    images: Dataset
    net: str
    main: Recipe
    width: int
    pairs: int
    evaluation: Evaluation
    max_error: float
    device: str
    workers: int

    def at_width(self, width: int, **changed: Any) -> Recipe:
        """The recipe at another width."""
        return replace(self.main, net=self.net.replace("{width}", str(width)), **changed)

    @property
    def is_mlp(self) -> bool:
        """Whether the networks are perceptrons."""
        return self.net.startswith("mlp")

    @property
    def trained(self) -> Need:
        """Whether the networks saw their data as often as what is left in the loss asks for."""
        epochs = self.main.steps * self.main.batch / len(self.images.train)
        short = f"the networks saw their data {epochs:.0f} times, and the loss needs {EPOCHS} times"
        return epochs >= EPOCHS, short

    @property
    def normed(self) -> str:
        """What BatchNorm does on a line, if the networks have it: the end of an enumeration."""
        return (
            f", BatchNorm {self.evaluation.bn}" if models.may_have_batchnorm(self.main.net) else ""
        )

    @property
    def scale(self) -> str:
        """What the verdicts rest on, in one line."""
        main = self.main
        hardware = provenance.hardware(self.device)
        return (
            f"{self.images.label}, {self.net.replace('{width}', str(self.width))}{self.normed}, "
            f"{main.optimizer} {main.lr:g}, T = {main.steps}, {self.pairs} pairs, {hardware}"
        )

    def named(self, width: int) -> str:
        """The network of this width, for people."""
        found = models.title(self.at_width(width).net)
        return f"{found} of {width} units a layer" if self.is_mlp else found

    def words(self) -> Values:
        """What captions and prose say of the whole page."""
        return {
            "data": self.images.label,
            "network": self.named(self.width) + self.normed,
            "steps": self.main.steps,
            "pairs": counted(self.pairs, "pair"),
            "spread": "90 % interval",
        }

    def align(self, pairs: Sequence[Pair], **how: Any) -> dict[str, list[Aligned]]:
        """:func:`companion.experiments.aligned.align` as this page measures."""
        own = ("evaluation", "max_error", "device", "workers")
        return aligned.align(pairs, **({name: getattr(self, name) for name in own} | how))

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
    pairs: int,
    points: int,
    train_examples: int | None,
    test_examples: int | None,
    max_error: float,
    bn: str | None,
    device: str,
    workers: int,
    **recipe: Any,
) -> Setting:
    """The networks that a page's parameters ask for; what is None follows from the dataset.

    On a GPU and colour images: ResNet-20 with LayerNorm over channels, the paper's. Elsewhere: the
    paper's perceptron, on ``digits`` with SGD, on larger data with Adam and from Flax's default
    initialisation (half the variance of the default here), which the paper's code uses.

    Arguments:
        recipe: fields of the :class:`companion.training.Recipe`.

    Raises:
        BadParameter: no pair, a network without ``{width}``, what the dataset cannot serve.
    """
    where = str(data.resolve_device(device))
    images = data.load(dataset, where)
    colour = images.in_shape[0] == 3 and where != "cpu"
    own: dict[str, Any]
    if colour if net is None else not net.startswith("mlp"):
        own = {"steps": 12_000, "lr": 0.1, "weight_decay": 5e-4, "schedule": "cosine"}
        own |= {"augment": "flip+crop4" if min(images.in_shape[1:]) > 8 else "none"}
        steps = recipe.get("steps")
        own |= {"warmup": min(400, (own["steps"] if steps is None else steps) // 10)}
        net = "resnet20:width={width},norm=layer" if net is None else net
        width = 64 if width is None else width
    elif dataset == "digits":
        own = {"steps": 500, "batch": 48, "lr": 0.1, "schedule": "step", "milestones": (0.85,)}
    else:
        own = {"steps": 3000, "batch": 128, "optimizer": "adam", "lr": 1e-3}
    if net is None:
        net = "mlp:widths={width}x3" + ("" if dataset == "digits" else ",init=lecun")
    width = 512 if width is None else width
    if pairs < 1 or "{width}" not in net:
        raise BadParameter("pairs: 1 or more; net: a name with {width} in it.")
    own |= {name: value for name, value in recipe.items() if value is not None}
    main = Recipe(net=net.replace("{width}", str(width)), data=dataset, **own)
    bn = bn or ("reestimate" if models.may_have_batchnorm(main.net) else "interpolate")
    few = 500 if dataset == "digits" else 10_000
    examples = few if train_examples is None else train_examples
    evaluation = Evaluation(points, bn, examples, test_examples)
    check_fit(main, images)
    return Setting(images, net, main, width, pairs, evaluation, max_error, where, workers)


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
    def fork_at(self) -> int:
        """The step at which late copies leave their networks: half-way."""
        return max(1, self.main.steps // 2)

    @property
    def cells(self) -> dict[Cell, list[Pair]]:
        """The map of settings, of perceptrons: optimiser, rate, decay, width -> pairs.

        A setting is a decay and a width; each has initialisations of its own, under all rates.
        """
        n = self.map_pairs if self.is_mlp else 0
        return {
            (opt, rate, decay, width): pairs_of(
                self.at_width(width, optimizer=opt, lr=rate, weight_decay=decay), n, first=i * n
            )
            for opt, rates in RATES.items()
            for rate in rates
            for i, (decay, width) in enumerate(product((0.0, 1e-3), MAP_WIDTHS))
            if n
        }

    @property
    def asked(self) -> dict[str, tuple[list[Pair], dict[str, Any]]]:
        """All that this page trains and measures: name -> pairs, and how.

        A late copy leaves its network half-way and sees the data in another order. The many pairs
        of time and of the map have a coarser line on fewer images. Where a barrier is expected to
        be left, on the narrowest and on the youngest networks, the paper's solver is asked, too.
        """
        both = pairs_of(self.main, self.pairs)
        late = []
        for a in (pair.a for pair in both):
            name, fork = f"{a.order}/late", Fork(a, self.fork_at, optimizer="restore")
            late.append(Pair(a, Run(self.main, order=name, augment=name, fork=fork)))
        decayed = self.at_width(self.widths[-1], weight_decay=self.wide_decay)
        strong = pairs_of(decayed, self.pairs if self.wide_decay else 0)
        few = min(self.evaluation.train_examples or 500, 500)
        coarse = replace(self.evaluation, points=13, train_examples=few, test_examples=2000)
        short: dict[str, Any] = {"evaluation": coarse}
        whole: dict[str, Any] = {"extras": aligned.EXTRAS}
        both_solvers = {"methods": ("naive", "weights", "authors")}
        widths = {
            f"width {w}": (
                pairs_of(self.at_width(w), self.pairs),
                whole | (both_solvers if w == self.widths[0] else {}),
            )
            for w in self.widths
        }
        steps = {
            f"step {s}": (
                pairs_of(self.main, self.pairs, step=s),
                short | (both_solvers if s in self.looks[:2] else {}),
            )
            for s in self.looks
        }
        return {
            "first": (both, whole),
            "others": (both, {"methods": self.methods}),
            **widths,
            **steps,
            "late": (late, {}),
            "decayed": (strong, {"methods": ("naive",), "extras": ("temperature",)}),
            "map": ([pair for group in self.cells.values() for pair in group], short),
        }

    def plans(self) -> list[Plan]:
        """What is asked, for the budget of this page."""
        return [self.tasks(*self.asked)]

    def tasks(self, *names: str) -> list[aligned.MatchedLine]:
        """What is measured under these names."""
        whole = {"evaluation": self.evaluation}
        asked = (self.asked[name] for name in names)
        return [t for pairs, how in asked for t in aligned.lines_of(pairs, **(whole | how))]

    def found(self, name: str, **more: Any) -> dict[str, list[Aligned]]:
        """What was measured of that which is asked under this name; empty if it is left out."""
        pairs, how = self.asked[name]
        return self.align(pairs, **how, **more) if pairs else {}

    def needs(self, names: str) -> list[Need]:
        """Whether this run has what a claim needs, and what to say if not; names by spaces."""
        mlp, normed = self.is_mlp, models.may_have_batchnorm(self.main.net)
        wide, resnet = mlp and self.width >= 512, self.net.startswith("resnet20")
        plain = not normed or self.evaluation.bn == "interpolate"
        ste = any(m.name == "ste" for m in self.methods)
        own = (
            "BatchNorm's statistics are re-estimated on the line, which is REPAIR's own correction"
        )
        cut = "converged" in names and self.cut_short
        known = {
            "pairs": (self.pairs >= 2, "one pair decides nothing"),
            "mlp": (mlp, "the claim is about perceptrons"),
            "wide": (wide, "the claim is about perceptrons of 512 units a layer"),
            "MNIST": (self.main.data == "mnist", "the claim is about MNIST"),
            "CIFAR": (self.main.data.startswith("cifar10"), "the claim is about CIFAR-10"),
            "trained": self.trained,
            "ste": (ste, "no straight-through estimator in this run"),
            "converged": (not cut, "the search was cut short: its last step was its best"),
            "steepest": (mlp, "asked of perceptrons only"),
            "narrow": (len(self.widths) >= 2, "one width is not narrower than another"),
            "widths": (len(self.widths) >= 4, "a rank correlation needs four widths or more"),
            "looks": (len(self.looks) >= 4, "a rank correlation needs four steps or more"),
            "decay": (self.wide_decay > 0, "no networks with strong weight decay in this run"),
            "map": (bool(self.cells), "no map of settings in this run"),
            "resnet": (resnet and 64 in self.widths, "the claim is about ResNet-20, width 64"),
            "32x": (resnet and 512 in self.widths, "asks for ResNet-20 of 32 times the width"),
            "batch": (normed, "no BatchNorm"),
            "layer": (not normed, "no LayerNorm"),
            "plain": (plain, own),
        }
        return [known[name] for name in names.split()]

    @property
    def cut_short(self) -> bool:
        """Whether a straight-through search ended while it still found better orders."""
        searches = (r.matching.get("details") for r in self.lines.get("ste", []))
        return any(d["best"] == d["held out"][-1][0] for d in searches if d)

    # ---- the experiments

    @cached_property
    def first(self) -> Results:
        """The main pairs as they are and after weight matching, with temperature and REPAIR.

        All that is asked of these networks is measured now: a step that is asked for later would
        have them trained once more.
        """
        if not closing.active():
            tasks = self.tasks("first", "others", "late", *(f"step {s}" for s in self.looks))
            measurement.run(tasks, device=self.device, workers=self.workers, label="matching")
        return self.found("first")

    @cached_property
    def lines(self) -> Results:
        """The main pairs under every method."""
        return {**self.first, **self.found("others")}

    @cached_property
    def by_width(self) -> Mapping[int, Results]:
        """Width -> as they are and after weight matching."""
        return {w: self.found(f"width {w}") for w in self.widths}

    @cached_property
    def by_step(self) -> Mapping[int, Results]:
        """Step of training -> the same; networks pass that err less than half-way to guessing."""
        return {s: self.found(f"step {s}", max_error=max(self.max_error, 50)) for s in self.looks}

    @cached_property
    def late(self) -> Results:
        """Networks and their late copies: of one valley without any matching."""
        return self.found("late")

    @cached_property
    def decayed(self) -> Results:
        """The widest networks with strong weight decay; empty if left out."""
        return self.found("decayed")

    @cached_property
    def map(self) -> Mapping[Cell, Results]:
        """Every cell of the map of settings; the main networks say what error is normal."""
        cells, n = list(self.cells), self.map_pairs
        found = self.found("map", reference_error=self.normal_error) if cells else {}
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
        pair = self.first["naive"][0].pair
        return load_weights(pair.a, device=self.device), load_weights(pair.b, device=self.device)

    @cached_property
    def plane(self) -> Plane:
        """Test error on the plane through A, B and pi(B), first pair, weight matching."""
        moved = aligned.permuted(self.first["weights"][0], device=self.device)
        with one_thread():  # a small network: threads would only wait for each other
            few = {"test": self.images.test.head(1000)}
            return plane(self.module, *self.networks(), moved, few, points=13)

    @cached_property
    @one_thread()  # as for the plane
    def hidden(self) -> list[dict[str, bool]]:
        """For each A of the main pairs: solver -> whether it finds it again in random order."""
        out = []
        spec = derive(self.module, self.images.test.x[:2])
        for number, result in enumerate(self.first["naive"]):
            a, key = load_weights(result.pair.a, device=self.device), Key("planted", number)
            order = spec.random(key.generator())
            b = spec.permute(a, spec.inverse(order))
            how: Any = {"begin": "identity", "order": "random", "epsilon": 0.0}
            theirs = weight_matching(spec, a, b, key=key, **how)
            found = {"ours": weight_matching(spec, a, b), "the paper's": theirs}
            out.append(
                {n: all(m.perms[g].equal(order[g]) for g in order) for n, m in found.items()}
            )
        return out

    @cached_property
    @one_thread()  # as for the plane
    def matched(self) -> list[tuple[Pair, Theta, Theta, Matching]]:
        """Of each valid main pair A, B, and once more what weight matching finds."""
        out: list[tuple[Pair, Theta, Theta, Matching]] = []
        for result in self.first["weights"]:
            if result.valid:
                pair = result.pair
                a, b = (load_weights(run, device=self.device) for run in (pair.a, pair.b))
                found = aligned.match(result.method, self.module, a, b, self.images)
                out.append((pair, a, b, found))
        return out

    @cached_property
    @one_thread()
    def initial(self) -> list[tuple[float, float]]:
        """Test loss barrier of the initialisations of A and B: as they are, and in the order that
        weight matching finds at the end of training."""
        few, out = {"test": self.images.test.head(2000)}, []
        for pair, _, _, found in self.matched:
            device = self.images.train.x.device
            a, b = (build(run, self.images, device).state_dict() for run in (pair.a, pair.b))
            moved = found.spec.permute(b, found.perms)
            naive, matched = (
                segment(self.module, a, end, few, points=13).height("test", "loss", "linear")
                for end in (b, moved)
            )
            out.append((naive, matched))
        return out

    @cached_property
    @one_thread()
    def spread(self) -> list[tuple[float, float]]:
        """Standard deviation of the midpoint's features, as a share of what lies between A's and
        B's, mean over layers: after weight matching, and after REPAIR on top."""
        x, out = self.images.train.head(self.evaluation.train_examples or 10_000).x, []
        for _, a, b, found in self.matched:
            mended = repair(self.module, a, found.spec.permute(b, found.perms), x)
            names = mended.scale or mended.before  # BatchNorm is reset, and nothing corrected
            before, after = (
                float(np.nanmean([shares[n] for n in names]))
                for shares in (mended.before, mended.after)
            )
            out.append((before, after))
        return out

    # ---- what needs no training

    @cached_property
    def counterexample(self) -> Mapping[str, float]:
        """Order of B's units -> error half-way between the networks of App. A.6, percent."""
        (spec, a, b), out = counterexample(), {}
        for orders in product(([0, 1], [1, 0]), repeat=2):
            moved = spec.permute(b, dict(zip("01", map(torch.tensor, orders), strict=True)))
            out[f"{orders[0]}, {orders[1]}"] = wrong({n: (a[n] + moved[n]) / 2 for n in a})
        return out

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Network of Table 1 -> exponent of its number of permutations, rounded down by layer."""
        vgg16 = [64, 64, 128, 128, *[256] * 3, *[512] * 6, 4096, 4096]
        return {"MLP": exponent([512] * 3), "VGG-16": exponent(vgg16)}

    @cached_property
    def tied(self) -> tuple[float, int]:
        """ResNet-50 by its own spec: exponent of the count, and the number of permutations."""
        from torchvision.models import resnet50  # seconds, which other chapters need not wait

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
    ste_batch: int,
    **common: Any,
) -> Study:
    """The study that the chapter's parameters ask for; refused before anything trains.

    Arguments:
        widths, looks: see :class:`Study`; None: the dataset's own, and four steps up to T.
        ste_steps, ste_lr, ste_batch: of the straight-through estimator; 0 steps leave it out.
        common: as :func:`setting` takes them.

    Raises:
        BadParameter: what :func:`setting` refuses, at any of the widths.
    """
    shared = setting(**common)
    steps, examples = shared.main.steps, shared.evaluation.train_examples
    if widths is None:
        widths = [32, 64, 128, 256] if shared.is_mlp else [16, 32]
    if looks is None:
        looks = [max(1, round(steps * share)) for share in (0.03, 0.1, 0.3)]
    methods = [
        Method("authors"),
        Method("activations", examples=examples),
        *([Method("ste", steps=ste_steps, lr=ste_lr, batch=ste_batch)] if ste_steps else []),
        Method("greedy"),
        Method("random"),
        *([Method("steepest", examples=examples)] if shared.is_mlp else []),
    ]
    study = Study(
        **vars(shared),
        widths=tuple(sorted({*widths, shared.width})),
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
    one, other = [1.0, 0.0], [0.0, 1.0]
    layers = {
        "0.weight": ([[-1.0, 0.0], [0.0, -1.0]], [[1.0, 0.0], [0.0, 1.0]]),
        "1.weight": ([[-1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, -1.0]]),
        "2.weight": ([[-1.0, -1.0]], [[-1.0, -1.0]]),
        **dict.fromkeys(("0.bias", "1.bias"), (one, other)),
    }
    a, b = ({name: torch.tensor(both[i]) for name, both in layers.items()} for i in (0, 1))
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


def exponent(sizes: Iterable[int]) -> int:
    """Exponent of the number of orders, layer by layer and rounded down, as Table 1 counts."""
    return sum(math.floor(math.lgamma(n + 1) / math.log(10)) for n in sizes)


# ---- statistics

Of: TypeAlias = Callable[[Study], Any]


def height(split: str = "test", metric: str = "error", definition: str = "mean", **o: Any) -> Value:
    """Of a result: the barrier, in points of error or nats of loss."""
    return lambda r: r.barrier.height(split, metric, definition, **o)


ERROR, LOSS = height(), height("test", "loss")
NONE = 0.02
"""Nats of test loss: a barrier up to it counts as none."""


def calibrated(r: Aligned) -> float:
    """Test loss barrier with a temperature fitted at each point of the line."""
    return r.calibrated.height("test", "loss") if r.calibrated else math.nan


def repaired(r: Aligned) -> float:
    """Test loss of the midpoint after REPAIR, above the mean of the ends."""
    assert r.repaired is not None
    return r.repaired["test"].loss - float(np.mean(r.barrier.curve.ends("test", "loss")))


def left(r: Aligned) -> float:
    """Share of the distance between A and B that is left after matching."""
    return r.distances["after"] / r.distances["before"]


def in_map(study: Study, metric: str = "error") -> dict[Cell, float]:
    """Cell of the map whose networks trained -> mean barrier after matching."""
    found = {c: interval(g["weights"], height(metric=metric)) for c, g in study.map.items()}
    return {cell: v.value for cell, v in there(found).items()}


def there(rows: Mapping[Any, Maybe]) -> dict[Any, Interval]:
    """The rows that have a valid pair."""
    return {name: v for name, v in rows.items() if v is not None}


def along(found: Mapping[int, Results], method: str, value: Value = ERROR) -> dict[int, Interval]:
    """Width or step -> mean over pairs, where one is valid."""
    return there({x: interval(results[method], value) for x, results in found.items()})


def early(study: Study, method: str = "weights") -> tuple[int, Interval] | tuple[None, None]:
    """The first step at which two pairs or more are valid, and their barrier after matching."""
    asked = {step: results for step, results in study.by_step.items() if method in results}
    found = along(asked, method).items()
    return next(((step, v) for step, v in found if v.n >= 2), (None, None))


# ---- the claims


def difference(s: Study, one: str, other: str, value: Value = Aligned.midpoint) -> Maybe:
    """Pair by pair, the value under one method minus that under the other."""
    both = zip(s.lines[one], s.lines[other], strict=True)
    return over_pairs(value(a) - value(b) for a, b in both if a.valid and b.valid)


def rank(found: Mapping[int, Results]) -> Maybe:
    """Rank correlation of a width or a step and a pair's test loss barrier after matching."""
    return aligned.trend({x: g["weights"] for x, g in found.items()}, LOSS)


def resnet(study: Study, norm: str, **mode: Any) -> Statistic:
    """ResNet-20 of width 64, with BatchNorm or LayerNorm: error barrier after matching."""
    here, normed, several = study.needs(f"resnet {norm} pairs")
    group = study.by_width[64]["weights"] if here[0] and normed[0] else []
    return statistic(interval(group, height(**mode)), here, normed, several)


def too(study: Study, opt: str, bad: float, good: float) -> Statistic:
    """Share of the map's settings where matching fails at one learning rate, minus at another."""
    cells = in_map(study)
    one, other = (
        [cells.get(c, math.nan) for c in study.map if c[:2] == (opt, rate)] for rate in (bad, good)
    )
    found = aligned.failures(one, other)
    enough = found is not None and found.n >= 5
    few = (enough, "fewer than five settings trained at both rates")
    return statistic(found, *study.needs("map"), few)


def r01(study: Study) -> Statistic:
    """The error barrier as the networks are, and how much of the way to guessing it is."""
    guess = 100 * (1 - 1 / study.images.classes)
    naive = study.lines["naive"]
    way = interval(naive, lambda r: 100 * ERROR(r) / (guess - float(np.mean(r.barrier.errors))))
    detail = f"{told(way, '{:.0f}')} % of the way to guessing"
    return statistic(interval(naive, ERROR), *study.needs("pairs"), detail=detail)


def remains(study: Study, method: str, needs: str = "pairs wide") -> Statistic:
    """Share that a method leaves of the barrier, of the error or of the loss, whichever is more."""
    both = [
        (before, after)
        for before, after in zip(study.lines["naive"], study.lines.get(method, []), strict=False)
        if before.valid and after.valid and ERROR(before) > LIMIT
    ]
    found = over_pairs(max(of(b) / of(a) for of in (ERROR, LOSS)) for a, b in both)
    detail = "; ".join(
        f"{told(over_pairs(of(b) for _, b in both), form)} of "
        f"{told(over_pairs(of(a) for a, _ in both), form)} {unit}"
        for of, form, unit in ((ERROR, "{:.2f}", "points"), (LOSS, "{:.3f}", "nats"))
    )
    some = (bool(both), "no barrier to take away")
    return statistic(found, *study.needs(needs), some, detail=detail if both else "")


def highest(found: Sequence[Maybe]) -> Maybe:
    """Of several intervals the one that reaches highest; None if one is missing."""
    there = [v for v in found if v is not None]
    return max(there, key=lambda v: v.high) if len(there) == len(found) else None


def r05(study: Study) -> Statistic:
    """MNIST: test loss barrier after weight and after activation matching."""
    found = [interval(study.lines[method], LOSS) for method in ("weights", "activations")]
    detail = f"weights {told(found[0], '{:.3f}')}, activations {told(found[1], '{:.3f}')}"
    return statistic(highest(found), *study.needs("MNIST wide trained pairs"), detail=detail)


def r07(study: Study) -> Statistic:
    """Test loss at the midpoint, straight-through minus each of the other two."""
    here = "ste" in study.lines
    found = [difference(study, "ste", n) if here else None for n in ("weights", "activations")]
    detail = f"− weights {told(found[0], '{:.3f}')}, − activations {told(found[1], '{:.3f}')}"
    needs = study.needs("ste converged pairs")
    return statistic(highest(found), *needs, detail=detail if here else "")


def r25(study: Study) -> Statistic:
    """Share of the trained cells of the map that keep a barrier of 2 points or more."""
    found = [v >= LIMIT for v in in_map(study).values()]
    share = float(np.mean(found)) if found else None
    return statistic(share, *study.needs("map"), n=len(found))


def r33(study: Study) -> Statistic:
    """Share of the midpoint's excess loss that REPAIR takes away, where a barrier is left."""
    left_at = along(study.by_width, "weights")
    widths = [w for w, v in left_at.items() if v.value > LIMIT]
    groups = [study.by_width[w]["weights"] for w in widths]
    rows = [
        [
            (r.midpoint() - float(np.mean(r.barrier.curve.ends("test", "loss"))), repaired(r))
            for r in pair
            if r.valid
        ]
        for pair in zip(*groups, strict=True)
    ]
    sums = np.array([np.sum(row, axis=0) for row in rows if row])
    numbers = range(len(sums))  # of the pairs: one is left out at a time
    found = None
    if len(sums):
        found = clustered(
            list(map(float, numbers)),
            numbers,
            statistic=lambda i: 1 - float(np.divide(*sums[i.astype(int)].sum(axis=0)[::-1])),
        )
    some = (bool(widths), "no width keeps a barrier of 2 points")
    detail = f"widths {', '.join(map(str, widths))}" if widths else ""
    return statistic(found, some, *study.needs("plain pairs"), detail=detail)


def with_ours(study: Study, needs: str, found: Maybe, ours: Maybe, where: str) -> Statistic:
    """An error barrier that the paper's solver leaves; ours in the detail."""
    detail = f"{where}; our solver: {told(ours)}"
    return statistic(found, *study.needs(needs), detail=detail)


def r10(study: Study) -> Statistic:
    """The narrowest networks: barrier after matching with the paper's solver."""
    width = study.widths[0]
    found, ours = (
        interval(study.by_width[width].get(name, []), ERROR) for name in ("authors", "weights")
    )
    return with_ours(study, "narrow pairs", found, ours, f"width {width}")


def r36(study: Study) -> Statistic:
    """Early in training: barrier with the paper's solver at the first step to be judged."""
    first, found = early(study, "authors")
    if first is None or first == study.main.steps:  # the end of training is not early
        return statistic(None, (False, "at no early step two valid pairs"))
    ours = interval(study.by_step[first]["weights"], ERROR)
    return with_ours(study, "pairs", found, ours, f"step {first} of {study.main.steps}")


def r37(study: Study) -> Statistic:
    """ResNet-20 of 32 times the width: loss barrier after matching."""
    wide, layer, several = study.needs("32x layer pairs")
    group = study.by_width[512]["weights"] if wide[0] and layer[0] else []
    return statistic(interval(group, LOSS), wide, layer, several)


def r38(study: Study) -> Statistic:
    """CIFAR-10, perceptron: share of the loss barrier that is left."""
    if not study.main.data.startswith("cifar10"):
        return statistic(None, *study.needs("CIFAR"))
    return remains(study, "weights", "CIFAR mlp wide pairs")


def r39(study: Study) -> Statistic:
    """Share of networks that the paper's solver finds again in an order made up by chance."""
    shares = {n: float(np.mean([one[n] for one in study.hidden])) for n in study.hidden[0]}
    return statistic(
        shares["the paper's"], n=len(study.hidden), detail=f"our solver: {shares['ours']:.0%}"
    )


def r41(study: Study) -> Statistic:
    """Initialisations in the order found at the end: loss barrier, and that without it."""
    naive, matched = (over_pairs(one[i] for one in study.initial) for i in (0, 1))
    wall = (naive is not None and naive.low > NONE, "the initialisations have no barrier to remove")
    detail = f"as they are: {told(naive, '{:.3f}')}"
    return statistic(matched, wall, *study.needs("pairs"), detail=detail)


def r42(study: Study) -> Statistic:
    """Spread of the midpoint's features, as a share of what it ought to be."""
    before, after = (over_pairs(one[i] for one in study.spread) for i in (0, 1))
    detail = f"after REPAIR: {told(after, '{:.2f}')}"
    return statistic(before, *study.needs("plain pairs"), detail=detail)


def claim(needs: str, value: Of, detail: Of = lambda s: "") -> Callable[[Study], Statistic]:
    """A claim about one number: what a run has to have for it, how it is computed."""
    return lambda s: statistic(value(s), *s.needs(needs), detail=detail(s))


CLAIMS: dict[str, Callable[[Study], Statistic]] = {
    # Barrier as the networks are, and what is left of it after matching.
    "R01": r01,
    "R02": lambda s: remains(s, "weights"),
    "R03": lambda s: remains(s, "activations"),
    "R04": lambda s: remains(s, "ste", "ste converged pairs wide"),
    "R05": r05,
    # Test loss at the midpoint: of two methods, of three, and above the better end.
    "R06": claim("pairs mlp", lambda s: difference(s, "activations", "weights")),
    "R07": r07,
    "R08": claim(
        "trained pairs mlp",
        lambda s: interval(s.lines["weights"], lambda r: r.midpoint() - r.best_end()),
    ),
    # After matching: loss barrier against width and time, error barrier of the narrowest network.
    "R09": claim("widths pairs", lambda s: rank(s.by_width), lambda s: f"{len(s.widths)} widths"),
    "R10": r10,
    "R11": claim("looks pairs", lambda s: rank(s.by_step), lambda s: f"{len(s.looks)} steps"),
    # Wide networks as they are, with a temperature; one greedy pass.
    "R21": claim(
        "decay pairs",
        lambda s: interval(s.decayed.get("naive", []), calibrated),
        lambda s: f"width {s.widths[-1]}",
    ),
    "R22": claim("pairs", lambda s: difference(s, "greedy", "weights")),
    # The map: SGD at its lowest rate, Adam at its highest, and all cells.
    "R23": lambda s: too(s, "sgd", min(RATES["sgd"]), max(RATES["sgd"])),
    "R24": lambda s: too(s, "adam", max(RATES["adam"]), min(RATES["adam"])),
    "R25": r25,
    # Without training: the best order of the counterexample, and the exponents of Table 1.
    "R26": lambda s: statistic(min(s.counterexample.values()), n=4),
    "R27": lambda s: statistic(
        s.counts == {"MLP": 3498, "VGG-16": 35160},
        detail=", ".join(f"{name} {count}" for name, count in s.counts.items()),
    ),
    "R28": lambda s: statistic(s.tied[0], detail=f"{s.tied[1]} permutations"),
    # Steepest descent; the distance that matching leaves; late copies; a random order; REPAIR.
    "R29": claim("steepest pairs", lambda s: interval(s.lines.get("steepest", []), ERROR)),
    "R30": claim("pairs", lambda s: interval(s.lines["weights"], left)),
    "R31": claim("pairs", lambda s: interval(s.late["naive"], ERROR)),
    "R32": claim("pairs", lambda s: difference(s, "random", "naive", ERROR)),
    "R33": r33,
    # ResNet-20; young networks.
    "R34": lambda s: resnet(s, "batch", bn="reestimate"),
    "R35": lambda s: resnet(s, "layer"),
    "R36": r36,
    # Much wider; CIFAR-10; a planted order; another method; initialisations; what REPAIR mends.
    "R37": r37,
    "R38": r38,
    "R39": r39,
    "R40": lambda s: statistic(None, (False, "OT-Fusion and its networks are not part of this")),
    "R41": r41,
    "R42": r42,
}


# ---- figures


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
            ax.text(
                1,
                place,
                "abcd"[unit],
                ha="center",
                va="center",
                color=figures.ON_DARK,
                weight="bold",
            )
            ax.annotate(str(place + 1), (1, place), xytext=(-4, 12), textcoords="offset points")
        for x, rows in ends:
            ax.plot([x] * len(rows), rows, "o", markersize=11, color="#555555")
        ax.set(title=title, xlim=(-0.2, 2.2), ylim=(3.6, -0.7))
        ax.set_axis_off()
    figures.publish(fig, "rebasin-swap")


def show_plane(study: Study) -> None:
    """Test error on the plane through A, B and pi(B)."""
    fig, axes = plots.grid(1, columns=1, height=4.8)
    drawn = plots.planes(
        axes, {"": study.plane}, names=("A", "B", "π(B)"), segments=((0, 1), (0, 2))
    )
    lines = {  # of the pair that spans the plane
        name: study.first[key][0].barrier.curve.values["test"]["error"]
        for name, key in (("line", "naive"), ("line matched", "weights"))
    }
    figures.publish(fig, "rebasin-plane", data={**drawn[""], **lines})


def show_lines(study: Study) -> None:
    """Test error and loss on the line from A to B, as they are and after matching."""
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
        "test error (points)": ERROR,
        "… above the straight line between the ends": height(definition="linear"),
        "train error (points)": height("train"),
        "test loss (nats)": LOSS,
        "train loss (nats)": height("train", "loss"),
    }
    rows = [
        [
            text,
            *(str(interval(study.lines[n], of) or NO_PAIR) for of in columns.values()),
            told(interval(study.lines[n], left), "{:.2f}"),
        ]
        for n, text in NAMES.items()
        if n in study.lines
    ]
    tables.show(["units of B", *columns, "distance left"], rows, name="rebasin-methods")


def show_sweep(study: Study, by: Literal["width", "time"]) -> None:
    """Test error barrier before and after matching, and loss barrier after it, along a sweep."""
    found, xlabel, total = study.by_width, "width", 0
    rows: dict[str, tuple[str, dict[str, str]]] = {
        "as they are, test": ("naive", {}),
        "weight matching, test": ("weights", {}),
    }
    if by == "time":
        found, xlabel, total = study.by_step, "step of training, and its share", study.main.steps
        rows["weight matching, train"] = ("weights", {"split": "train"})
    elif models.may_have_batchnorm(study.main.net) and study.evaluation.bn != "interpolate":
        rows["weight matching, statistics interpolated, test"] = ("weights", {"bn": "interpolate"})
    fig, axes = plots.grid(2)
    drawn = {}
    for ax, metric, unit in zip(axes, ("error", "loss"), ("points", "nats"), strict=True):
        series = {
            label: along(found, method, height(metric=metric, **of))
            if metric == "error" or method != "naive"
            else {}
            for label, (method, of) in rows.items()
        }
        ylabel = f"{metric} barrier ({unit})"
        drawn[metric] = plots.sweep(
            ax, series, xlabel=xlabel, ylabel=ylabel, total=total, axis="log"
        )
        ax.set_ylim(bottom=0)
    plots.legend(fig, columns=3)
    figures.publish(fig, f"rebasin-{by}", data=drawn["error"] | {"loss": drawn["loss"]})


def show_map(study: Study) -> None:
    """Barrier after matching by optimiser, learning rate, weight decay and width."""
    if not study.map:
        return
    rows: dict[str, dict[str, list[float]]] = {"error": {}, "loss": {}}
    for metric, table in rows.items():
        found = in_map(study, metric)
        for cell in study.map:
            row = table.setdefault(f"width {cell[3]}, decay {cell[2]:g}", [])
            row.append(found.get(cell, math.nan))
    columns = [f"{opt} {rate:g}" for opt, rate in dict.fromkeys(cell[:2] for cell in study.map)]
    fig, axes = plots.grid(1, columns=1, height=3.4)
    plots.heat(
        axes,
        {"": rows["error"]},
        [column.replace(" ", "\n") for column in columns],
        label="test error barrier (points)",
        form="{:.1f}",
        missing="INVALID",
        apart=False,
    )
    axes[0].set_xlabel("optimiser and learning rate")
    figures.publish(fig, "rebasin-map", data={"columns": columns, **rows})


def show_controls(study: Study) -> None:
    """Error barriers of all orders; what a temperature and REPAIR leave of the loss barrier."""
    naive, matched = study.first["naive"], study.first["weights"]
    error = {text: interval(study.lines.get(n, []), ERROR) for n, text in NAMES.items()}
    error["late copy, as it is"] = interval(study.late["naive"], ERROR)
    loss = {
        "as they are": interval(naive, LOSS),
        "… temperature fitted": interval(naive, calibrated),
        "weight matching": interval(matched, LOSS),
        "… temperature fitted ": interval(matched, calibrated),
        "… midpoint after REPAIR": interval(matched, repaired),
    }
    fig, axes = plots.grid(2, height=4.2)
    drawn = {"error": plots.conditions(axes[0], there(error))}
    drawn["loss"] = plots.conditions(
        axes[1], there(loss), threshold=None, xlabel="test loss barrier (nats)", form="{:.2f}"
    )
    figures.publish(fig, "rebasin-controls", data=drawn)


def show_recorded(records: Sequence[recorded.Record]) -> None:
    """Barrier against width and against time in every record that has it."""
    label = "test error barrier (points)"
    for by, xlabel in (("width", "width"), ("time", "step of training")):
        if runs := recorded.curves(records, name := f"rebasin-{by}"):
            ends = "; ".join(f"{r.title}: {recorded.extremes(r, name, by)}" for r in records)
            fig, drawn = plots.panels(runs, xlabel=xlabel, ylabel=label, threshold=None)
            values = {f"recorded_{by}": ends}
            figures.publish(fig, f"recorded-{name}", data=drawn, values=values)


# ---- the numbers of the captions and of the prose

NO_PAIR = "no valid pair"


def told(value: Interval | float | None, form: str = "{:.1f}") -> str:
    """A number over pairs in words that also say that no pair is valid."""
    return said(value, form, NO_PAIR)


def curve(points: Mapping[int, Interval], form: str = "{:.1f}") -> str:
    """A curve for an alternative text."""
    return ", ".join(f"{x}: {told(v, form)}" for x, v in points.items()) or NO_PAIR


def values(study: Study, verdicts: Sequence[claims.Verdict]) -> Values:
    """All numbers and sentences of the chapter's prose and captions."""
    lines, naive, matched = study.lines, study.first["naive"], study.first["weights"]
    after = along(study.by_width, "weights")
    first, barrier = early(study)
    cells = in_map(study)
    every = [r for group in lines.values() for r in group]
    wall = [v.value for n in ("naive", "weights") if (v := interval(lines[n], ERROR))]
    narrow = study.by_width.get(study.widths[0], {})
    young: Results = study.by_step[first] if first is not None else {}
    read: dict[str, tuple[Value, str]] = {
        "points": (ERROR, "{:.1f}"),
        "nats": (LOSS, "{:.2f}"),
        "middle": (lambda r: r.midpoint("test", "error"), "{:.1f}"),
        "left": (lambda r: 100 * left(r), "{:.0f}"),
    }
    return {
        **study.words(),
        **{
            f"{name}_{what}": told(interval(lines.get(name, []), value), form)
            for name in NAMES
            for what, (value, form) in read.items()
        },
        "most": f"The order of units is {'not ' * (wall[1] >= wall[0] / 2)}most of this wall."
        if len(wall) == 2
        else "",
        "closer": closer(lines),
        "failed_lines": sum(not r.valid for r in every),
        "all_lines": len(every),
        "peak_naive": max(naive[0].barrier.curve.values["test"]["error"]),
        "peak_weights": max(matched[0].barrier.curve.values["test"]["error"]),
        "narrowest": study.widths[0],
        "widest": study.widths[-1],
        "narrow_points": told(after.get(study.widths[0])),
        "wide_points": told(after.get(study.widths[-1])),
        "width_before": curve(along(study.by_width, "naive")),
        "width_after": curve(after),
        "width_loss": curve(along(study.by_width, "weights", LOSS), "{:.2f}"),
        "earliest": first or "none",
        "early_points": told(barrier),
        "time_after": curve(along(study.by_step, "weights")),
        "time_loss": curve(along(study.by_step, "weights", LOSS), "{:.2f}"),
        "map_cells": len(study.map),
        "map_trained": len(cells),
        "map_failed": sum(v >= LIMIT for v in cells.values()),
        "map_pairs": counted(study.map_pairs, "pair"),
        "map_told": listed(
            {f"{o} {r:g}, decay {d:g}, width {w}:": v for (o, r, d, w), v in cells.items()},
            "{:.1f}",
            "",
        ),
        "normal_error": study.normal_error if study.map else 0.0,
        "fork_at": study.fork_at,
        "late_points": told(interval(study.late["naive"], ERROR)),
        "naive_calibrated": told(interval(naive, calibrated), "{:.2f}"),
        "weights_calibrated": told(interval(matched, calibrated), "{:.2f}"),
        "weights_repaired": told(interval(matched, repaired), "{:.2f}"),
        "wide_decay": f"{study.wide_decay:g}",
        "decayed_nats": told(interval(study.decayed["naive"], calibrated), "{:.2f}")
        if study.decayed
        else MISSING,
        "ste_steps": max((m.steps for m in study.methods if m.name == "ste"), default=0),
        "one_image": 100 / len(study.images.test),
        "epochs": study.main.steps * study.main.batch / len(study.images.train),
        "search": search(study),
        "narrow_authors": told(interval(narrow.get("authors", []), ERROR)),
        "early_authors": told(interval(young.get("authors", []), ERROR)),
        **{
            f"{name}_{when}": told(over_pairs(one[i] for one in found), "{:.2f}")
            for name, found in (("initial", study.initial), ("spread", study.spread))
            for i, when in enumerate(("before", "after"))
        },
        "keeps": keeps(verdicts),
        "untested": untested(verdicts),
    }


def keeps(verdicts: Iterable[claims.Verdict]) -> str:
    """Whether young and narrow networks keep a barrier after matching: a sentence."""
    words = {
        "reproduced": "{} networks keep a barrier",
        "not reproduced": "{} networks keep none",
        "undetermined": "whether {} networks keep one, the pairs do not decide",
        claims.NOT_TESTABLE: "{} networks were not judged here",
    }
    kinds = {"R36": "young", "R10": "narrow"}
    word = {v.claim.id: v.verdict for v in verdicts if v.claim.id in kinds}
    text = "; ".join(words[word[id]].format(kind) for id, kind in kinds.items() if id in word)
    return text[:1].upper() + text[1:] + "." * bool(text)


def search(study: Study) -> str:
    """What became of the straight-through search, the end of a sentence."""
    if "ste" not in study.lines:
        return "it was left out this time."
    if study.cut_short:
        return (
            "its last step is its best one: it was still finding better orders when it was stopped."
        )
    return "its best step is not its last one."


def closer(lines: Results) -> str:
    """Whether the order that brings B closer to A is the one with the lower barrier."""
    found = [interval(lines[n], of) for of in (left, LOSS) for n in ("weights", "activations")]
    numbers = [v.value for v in found if v is not None]
    if len(numbers) < len(found):
        return "No pair was valid under both, so which one it is stays open."
    if (numbers[0] - numbers[1]) * (numbers[2] - numbers[3]) < 0:
        return (
            "Here the order that leaves B farther away has the lower barrier: which way B lies "
            "matters more than how far."
        )
    return "Here the order that brings B closer does not have the higher barrier."
