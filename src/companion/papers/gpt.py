"""A GPT, forked, matched and looked at by layers: chapter 5's runs, claims and figures.

The language model of Adilova et al. 2024, forked as in Frankle et al. 2020, matched by permutations
(Verma and Elbayad 2024) and by rotations of the residual stream (Theus et al. 2025). ::

    study = design(dataset="pydoc?window=32")
    study.forks.interval(0, metric="loss")  # run when it is first asked for
    claims.verdicts(CLAIMS, study)

A barrier of a layer is the larger of two: either network may be the host that keeps its other
layers. Explained in our chapter 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from companion import data, layerwise
from companion.connectivity import Curve
from companion.core import stats
from companion.core.errors import BadParameter, NotMeasured
from companion.core.pool import one_thread
from companion.core.runs import Store
from companion.core.stats import Interval
from companion.core.theta import layout
from companion.data import Dataset, Split
from companion.data.text import save_windows, tokenizer
from companion.experiments import instability
from companion.experiments.aligned import Aligned, Method, align, lines_of, placed
from companion.experiments.aligned import interval as over_pairs
from companion.experiments.budget import Plan
from companion.experiments.instability import (
    THRESHOLDS,
    Instability,
    analyse,
    copy,
    plan_forks,
    trunk,
)
from companion.experiments.layers import LayerSweep, sweep_pairs
from companion.experiments.pairs import Evaluation, Pair
from companion.features import Features, features
from companion.layerwise import LayerBarriers, Sweep
from companion.models import parameter_count
from companion.report import figures, plots, provenance, recorded, tables
from companion.report.claims import Statistic
from companion.report.recorded import Record
from companion.training import Recipe, Run, build, load_weights, throughput
from companion.training.speed import Throughput

CHAPTER = "05_gpt"
STABLE = THRESHOLDS["loss"]
WALL = 0.1
"""Nats: where a pair has no higher barrier, there is none to take away, or to compare with."""
NEAR = 0.05
"""Nats: a layer as close as this to the least that it could show costs nothing."""
EMBEDDING = "transformer.wte"
OUTPUT = "lm_head"

NONE = "no valid pair"
PAIRS = {"same": "same initialisation, other order", "different": "different initialisations"}
"""What two networks share -> the same for people."""

WAYS = {
    "naive": "as trained",
    "units": "units and heads permuted",
    "weights": "… and the stream permuted",
    "folded": "LayerNorm folded, nothing moved",
    "rotated": "units and heads permuted, stream rotated",
    "rotated-heads": "… and rotated inside of heads",
}
"""Method of matching -> the same for people, and in figures and records."""

TURNED = ("naive", "rotated")
"""Those that copies which fork at 0 are compared by."""

Values: TypeAlias = dict[str, float | str]
Swept: TypeAlias = dict[str, list[LayerBarriers]]
"""Kind of pair, of :data:`PAIRS` -> one result a pair."""


# ---- the design


@dataclass(frozen=True, eq=False)
class Study:
    """The experiments of chapter 5. Each runs, once, when it is first looked at.

    Arguments:
        recipe: of the GPT.
        text: the dataset.
        module: the architecture, on the device.
        blocks: its groups of layers: embedding, positions, blocks, last norm.
        ks: fork steps, sorted, 0 first.
        looks: checkpoints of the heat map, T last.
        inits: initialisations; two networks of each.
        neighbours: groups in a sliding window.
        evaluation: how pairs are measured.
        max_error: percent; a network up to it counts as trained in any case.
        device: where.
        workers: processes on a CPU; 0: one a core.
    """

    recipe: Recipe
    text: Dataset
    module: nn.Module
    blocks: tuple[str, ...]
    ks: tuple[int, ...]
    looks: tuple[int, ...]
    inits: int
    neighbours: int
    evaluation: Evaluation
    max_error: float | None
    device: str
    workers: int

    # What is trained

    @property
    def steps(self) -> int:
        """T."""
        return self.recipe.steps

    @property
    def late(self) -> int:
        """The last fork step."""
        return self.ks[-1]

    def twins(self, step: int | None = None, k: int = 0) -> list[Pair]:
        """One pair an initialisation: two copies that fork at step k, looked at after ``step``."""

        def one(init: int, number: int) -> Run:
            return copy(self.recipe, init, k, number, optimizer="restore")

        starts = [(trunk(self.recipe, i), k) for i in range(self.inits)]
        return [Pair(one(i, 1), one(i, 2), step, start) for i, start in enumerate(starts)]

    def strangers(self, step: int | None = None) -> list[Pair]:
        """As many pairs of the same networks, with different initialisations in each: a cycle."""
        return [
            Pair(copy(self.recipe, i, 0, 1), copy(self.recipe, (i + 1) % self.inits, 0, 2), step)
            for i in range(self.inits)
        ]

    def plans(self) -> list[Plan]:
        """All that is measured, for :func:`companion.report.page.budget`."""
        alone, ends = self._alone(), (*self.twins(), *self.strangers())
        at = [p for step in self.looks for p in (*self.twins(step), *self.strangers(step))]
        lines = lines_of(self.strangers(), [Method(name) for name in WAYS], self.evaluation)
        turned = [Method(name) for name in TURNED]
        shape: Any = {"inits": self.inits, "copies": 2}
        return [
            plan_forks(self.recipe, self.ks, self.evaluation, optimizer="restore", **shape),
            [LayerSweep(pair, alone) for pair in at],
            [LayerSweep(p, s) for s in self._finer() for p in ends],
            [*lines, *lines_of(self.twins(), turned, self.evaluation)],
        ]

    def _finer(self) -> tuple[Sweep, Sweep, Sweep]:
        """By part, by module, and by groups of blocks, at the end of training."""
        alone, kinds = self._alone(), ("single", "shallow", "deep", "window")
        return (
            replace(alone, by="part"),
            replace(alone, by="module"),
            replace(alone, kinds=kinds, window=self.neighbours),
        )

    # What is measured

    @cached_property
    def along(self) -> dict[int, Swept]:
        """Training step -> kind of pair -> barriers of blocks. All networks are trained here.

        Before the end they may be untrained; at the end they have to have learnt.
        """
        pairs = [p for step in self.looks for p in (*self.twins(step), *self.strangers(step))]
        found = iter(sweep_pairs(pairs, self._alone(), **self._where))
        each = {
            step: {
                kind: [next(found).judged(max_error=100.0) for _ in range(self.inits)]
                for kind in PAIRS
            }
            for step in self.looks
        }
        ends = {"same": self.twins(self.steps), "different": self.strangers(self.steps)}
        each[self.steps] = {
            kind: sweep_pairs(made, self._alone(), **self._judged) for kind, made in ends.items()
        }
        return each

    @cached_property
    def forks(self) -> Instability:
        """Copies that fork at every k, as in chapter 1; a copy goes on with the moments of Adam."""
        self._train_first()
        return analyse(
            self.recipe,
            self.ks,
            inits=self.inits,
            copies=2,
            optimizer="restore",
            evaluation=self.evaluation,
            **self._judged,
        )

    @cached_property
    def parts(self) -> Swept:
        """Barriers of attention, MLP and norms of each block, at the end of training."""
        return self._swept(self._finer()[0])

    @cached_property
    def modules(self) -> Swept:
        """Barriers of the paper's layers, single modules, at the end of training."""
        return self._swept(self._finer()[1])

    @cached_property
    def groups(self) -> Swept:
        """Barriers of blocks alone, of the first and the last n, and of windows of neighbours."""
        return self._swept(self._finer()[2])

    @cached_property
    def matched(self) -> dict[str, list[Aligned]]:
        """Way of :data:`WAYS` -> the pairs of different initialisations, B brought to A."""
        return self._aligned(self.strangers(), WAYS)

    @cached_property
    def turned_twins(self) -> dict[str, list[Aligned]]:
        """The same for copies that fork at 0, as trained and with the stream rotated."""
        return self._aligned(self.twins(), TURNED)

    @cached_property
    def streams(self) -> dict[str, list[Features]]:
        """Condition -> the residual stream of each pair, and of the network half-way."""
        self._train_first()
        looked = self.text.test.head(min(self.windows, 32))

        def of(pair: Pair) -> Features:
            a, b = self.weights(pair.a), self.weights(pair.b)
            more: Any = {"layers": self.places, "alphas": (0.5,), "per": "position"}
            return features(self.module, a, b, looked, **more)

        groups = self.twins(k=self.late), self.twins(), self.strangers()
        with one_thread():  # as every measurement of the pool
            return {
                name: [of(pair) for pair in pairs]
                for name, pairs in zip(self.conditions, groups, strict=True)
            }

    @cached_property
    def speed(self) -> Throughput:
        """Of one training process."""
        return throughput(self.recipe, device=self.device, data=self.text)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the windows that everything is measured on; they are kept in the store."""
        return save_windows(self.shown, Store())

    @property
    def shown(self) -> Split:
        """The windows that everything is measured on."""
        return self.text.test.head(self.windows)

    def read(self, tokens: torch.Tensor) -> str:
        """Tokens of shape (T,) as text, in one line."""
        return " ".join(tokenizer(self.recipe.data).decode(tokens).split())

    def weights(self, run: Run) -> dict[str, torch.Tensor]:
        """A trained network, on the device."""
        found = load_weights(run, self.steps, device=self.device)
        return {name: value.to(self.device) for name, value in found.items()}

    def _swept(self, settings: Sweep) -> Swept:
        self._train_first()
        made = {"same": self.twins(), "different": self.strangers()}
        return {kind: sweep_pairs(pairs, settings, **self._judged) for kind, pairs in made.items()}

    def _aligned(self, pairs: Sequence[Pair], ways: Iterable[str]) -> dict[str, list[Aligned]]:
        self._train_first()
        return align(pairs, [Method(name) for name in ways], self.evaluation, **self._judged)

    def _train_first(self) -> None:
        """With every checkpoint that is looked at: else networks would be trained twice."""
        with suppress(NotMeasured):  # of a recording that is closed
            _ = self.along

    def _alone(self) -> Sweep:
        return Sweep(
            by="block",
            kinds=("single",),
            points=1,
            train_examples=self.evaluation.train_examples,
            test_examples=self.windows,
        )

    @property
    def _where(self) -> dict[str, Any]:
        return {"device": self.device, "workers": self.workers}

    @property
    def _judged(self) -> dict[str, Any]:
        return {"max_error": self.max_error, **self._where}

    # What the page says of it

    @property
    def windows(self) -> int:
        """Windows of the test text that everything is measured on."""
        return self.evaluation.test_examples or len(self.text.test)

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output matrix, too."""
        return "lm_head.weight" in layout(self.module).ties

    @property
    def conditions(self) -> tuple[str, str, str]:
        """The pairs whose features are compared, from most to least shared."""
        same = PAIRS["same"].partition(",")[0]
        return f"{same}, k = {self.late}", f"{same}, k = 0", PAIRS["different"]

    @property
    def places(self) -> list[str]:
        """Where features are looked at: after each block and the last norm, and the logits."""
        skipped = (EMBEDDING, "transformer.wpe", OUTPUT)
        return [*(b for b in self.blocks if b not in skipped), OUTPUT]

    def short(self, label: str) -> str:
        """A group's name for a figure: block 1 attention."""
        words = {
            EMBEDDING: "embedding = output" if self.tied else "embedding",
            "transformer.wpe": "positions",
            "transformer.ln_f": "last norm",
            OUTPUT: "output",
        }
        if label in words or not label.startswith("transformer.h."):
            return words.get(label, label)
        number, *rest = label.removeprefix("transformer.h.").split(".")
        named = {"attn": "attention", "mlp": "MLP"}
        return " ".join([f"block {int(number) + 1}", *(named.get(r, r) for r in rest)])

    @property
    def network(self) -> str:
        """The network, for people."""
        shape: Any = getattr(self.module, "config", None)
        if shape is None:
            return self.recipe.net
        return f"GPT of {shape.n_layer} layers, width {shape.n_embd}"

    @property
    def scale(self) -> str:
        """What the numbers rest on, in a line."""
        hardware = "CPU" if self.device == "cpu" else provenance.record()["gpu"]["name"]
        networks = f"{self.inits} initialisations × 2 copies"
        return f"{self.text.label}, {self.network}, T = {self.steps}, {networks}, {hardware}"

    def record(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The provenance of the page."""
        return provenance.record(
            dataset={"name": self.text.label, "sha256": self.text.fingerprint},
            network=self.recipe.identity(),
            evaluation_windows=self.digest,
            parameters=parameters,
            device=self.device,
        )


def design(
    *,
    dataset: str = "pydoc?window=32",
    net: str | None = None,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    ks: Sequence[int] | None = None,
    inits: int = 3,
    looks: Sequence[int] | None = None,
    neighbours: int = 2,
    points: int = 11,
    windows: int = 96,
    train_windows: int = 24,
    max_error: float | None = None,
    precision: str = "float32",
    device: str = "auto",
    workers: int = 0,
) -> Study:
    """The recipe, the fork steps, and what is measured. Nothing is trained.

    Its arguments are the chapter's parameters; None: the network's own.

    Raises:
        BadParameter, MissingData, DeviceUnavailable: whatever is wrong with them.

    Source: Adilova et al. 2024 for the network of 12 layers; the one of 4 is ours.
    """
    device = str(data.resolve_device(device))
    text = data.load(dataset, device)
    if text.text is None:
        raise BadParameter(
            f"dataset: {dataset} holds images. This chapter needs a text: pydoc, wikitext2, "
            "wikitext103 or text:PATH."
        )
    wide = device != "cpu" and dataset.startswith("wikitext")  # the paper's size
    recipe = Recipe(
        net="gpt:layers=12,width=768,heads=12,bias=false,dropout=0.2" if wide else "gpt",
        data=dataset,
        steps=15_000 if wide else 640,
        batch=200 if wide else 16,
        optimizer="adamw",
        betas=(0.9, 0.95),
        lr=0.002 if wide else 0.003,
        weight_decay=1e-3,
        weight_decay_on="matrices",  # not on norms and embeddings
        schedule="onecycle",
        warmup=300 if wide else 60,
        div=100,  # from lr / 100 …
        final_div=0.05,  # … to lr / 5
        augment="shift",  # of the windows' starts
    )
    changed = {"net": net, "steps": steps, "batch": batch, "lr": lr, "precision": precision}
    recipe = replace(recipe, warmup=min(recipe.warmup, (steps or recipe.steps) // 10))
    recipe = replace(recipe, **{k: v for k, v in changed.items() if v is not None})  # type: ignore[arg-type]  # each value has its field's type
    last = recipe.steps
    for name, value, least in (
        ("inits", inits, 2),
        ("neighbours", neighbours, 1),
        ("windows", windows, 1),
        ("train_windows", train_windows, 1),
    ):
        if value < least:
            raise BadParameter(f"{name}: {value} must be {least} or more.")
    grid = sorted({0, round(last / 8), round(3 * last / 8)} if ks is None else {0, *ks})
    if len(grid) < 2:
        raise BadParameter("ks: give a fork step above 0, such as [300].")
    shares = (0, 0.1, 0.5, 0.8, 1)
    places = sorted({*([round(last * s) for s in shares] if looks is None else looks), last})
    if not all(0 <= step <= last for step in places):
        raise BadParameter(f"looks: {places} must be steps from 0 to T = {last}.")
    instability.check_design(recipe, grid, inits=inits, copies=2, device=device)
    module = build(copy(recipe, 0, 0, 1), text, torch.device(device))
    blocks = tuple(layerwise.layer_groups(module, "block", text.test.x[:2]))
    if neighbours > len(blocks):
        raise BadParameter(f"neighbours: {neighbours} groups, but {recipe.net} has {len(blocks)}.")
    return Study(
        recipe=recipe,
        text=text,
        module=module,
        blocks=blocks,
        ks=tuple(grid),
        looks=tuple(places),
        inits=inits,
        neighbours=neighbours,
        evaluation=Evaluation(points=points, train_examples=train_windows, test_examples=windows),
        max_error=max_error,
        device=device,
        workers=workers,
    )


# ---- statistics that claims and figures share


def over(values: Iterable[float]) -> Interval | None:
    """Mean and interval over pairs; None without any finite number."""
    good = [v for v in values if np.isfinite(v)]
    return stats.clustered(good, range(len(good))) if good else None


def valid(results: Sequence[LayerBarriers]) -> list[LayerBarriers]:
    """The pairs that passed every gate."""
    return [one for one in results if one.valid]


def heights(results: Sequence[LayerBarriers]) -> list[float]:
    """The whole network's test loss barrier, of each valid pair."""
    return [one.full_height("test") for one in valid(results)]


def worst(one: LayerBarriers) -> dict[str, float]:
    """Group -> the larger of the barriers with either host."""
    return one.worst("single", "test")


def largest(one: LayerBarriers) -> tuple[str, float, float]:
    """The group with the largest barrier, that barrier, and it over the whole network's."""
    value, label = max((v, k) for k, v in worst(one).items())
    full = one.full_height()
    return label, value, value / full if full > 0 else math.inf


def floor(one: LayerBarriers) -> float:
    """The least that a layer can show, in nats: half of what the two networks differ by.

    A barrier is measured from the mean of both, and the worse of them, the host, lies above it.
    """
    first, second = one.ends["test"]["loss"]
    return abs(first - second) / 2


def near_floor(results: Sequence[LayerBarriers]) -> list[bool]:
    """Of every layer of every valid pair: whether averaging it costs nothing."""
    return [abs(v - floor(one)) <= NEAR for one in valid(results) for v in worst(one).values()]


def of_group(results: Sequence[LayerBarriers], label: str) -> Interval | None:
    """One group's barrier, mean over valid pairs; None without any, or without such a group."""
    return over([worst(one)[label] for one in valid(results) if label in worst(one)])


def height(result: Aligned) -> float:
    """The test loss barrier of a matched pair."""
    return result.barrier.height("test", "loss")


def left(study: Study) -> dict[str, Interval]:
    """Way of :data:`WAYS` -> the barrier that it leaves, mean over valid pairs."""
    found = {name: over_pairs(results, height) for name, results in study.matched.items()}
    return {name: v for name, v in found.items() if v is not None}


def nearer(study: Study) -> dict[str, Interval]:
    """Way -> the distance of A and B after it, over that before; LayerNorm folded in both."""

    def share(one: Aligned) -> float:
        return one.distances["after"] / one.distances["before"]

    found = {name: over_pairs(results, share) for name, results in study.matched.items()}
    return {name: v for name, v in found.items() if v is not None}


def by_pair(study: Study, *ways: str) -> list[float]:
    """The barrier that the best of some ways leaves, pair by pair: NaN where none is valid."""
    each = [[height(r) if r.valid else math.nan for r in study.matched[way]] for way in ways]
    return [float(v) for v in np.fmin.reduce(each)]


def ratio(some: Sequence[float], others: Sequence[float]) -> Interval | float | None:
    """Ratio of the means over the pairs valid in both; an interval if all denominators are > 0."""
    both = np.array([(x, y) for x, y in zip(some, others, strict=True) if math.isfinite(x + y)])
    if not len(both) or both[:, 1].mean() <= 0:
        return None

    def of(rows: Any) -> float:
        top, bottom = both[rows.astype(int)].mean(0)
        return float(top / bottom)

    rows = np.arange(len(both), dtype=float)
    if both[:, 1].min() <= 0:
        return of(rows)
    return stats.clustered(list(rows), range(len(both)), statistic=of)


def gaps(study: Study) -> dict[str, list[float]]:
    """Condition -> gap over baseline, median over the stream, pair by pair: NaN if not valid."""
    return {
        name: [
            float(np.median([layer.ratio(0.5) for layer in one.layers[:-1]])) if good else math.nan
            for one, good in zip(results, _passed(study)[name], strict=True)
        ]
        for name, results in study.streams.items()
    }


def _passed(study: Study) -> dict[str, list[bool]]:
    found = (
        [s.result.barrier.valid for s in study.forks.at(study.late)],
        [one.valid for one in study.modules["same"]],
        [one.valid for one in study.modules["different"]],
    )
    return dict(zip(study.conditions, found, strict=True))


def continued(study: Study, way: str, count: int = 30) -> dict[str, str]:
    """How A, the average with B, and B go on after the first test window, by the likeliest token.

    Arguments:
        way: how B of the first pair of :meth:`Study.strangers` is brought to A, of :data:`WAYS`.
    """
    found = placed(study.matched[way][0], device=study.device)
    mixed = {name: torch.lerp(v, found.b[name].to(v), 0.5) for name, v in found.a.items()}
    said = {}
    for who, theta in (("A", found.a), ("half-way", mixed), ("B", found.b)):
        found.module.eval().load_state_dict(theta)
        x = start = study.shown.x[:1]
        with torch.no_grad():
            for _ in range(count):
                logits = found.module(x[:, -start.shape[1] :])
                x = torch.cat([x, logits[:, -1:].argmax(-1)], 1)
        said[who] = study.read(x[0, start.shape[1] :])
    return said


# ---- one function a claim


def statistic(value: float | Interval | None, *needs: tuple[bool, str], **more: Any) -> Statistic:
    """A statistic and what it lacks: each need is (whether it is fulfilled, what to say if not)."""
    lacking = [why for fulfilled, why in needs if not fulfilled]
    return Statistic(value, testable=not lacking, note="; ".join(lacking), **more)


def _two(study: Study) -> tuple[bool, str]:
    return len(valid(study.modules["different"])) >= 2, "one pair decides nothing"


def _walled(study: Study) -> tuple[bool, str]:
    there = [v for v in by_pair(study, "naive") if not math.isnan(v)]
    return bool(there) and min(there) > WALL, "a pair has no barrier to take away"


def _nats(study: Study, *ways: str) -> str:
    found = left(study)
    said = [f"{WAYS[w]} {found[w].value:.2f}" if w in found else f"{WAYS[w]}: {NONE}" for w in ways]
    return ", ".join(said)


def _untrained(study: Study) -> list[float]:
    """The whole network's barrier at step 0, different initialisations; [] if not looked at."""
    return heights(study.along[0]["different"]) if 0 in study.looks else []


def b13(study: Study) -> Statistic:
    """The largest module's barrier over the whole network's, different initialisations."""
    apart, start = valid(study.modules["different"]), _untrained(study)
    tops = [value / one.full_height() for one in apart for value in worst(one).values()]
    untied = [max(v for k, v in worst(o).items() if k not in (EMBEDDING, OUTPUT)) for o in apart]
    compared = "a pair has no barrier of the whole network to compare with"
    each = [(study.short(largest(o)[0]), largest(o)[1], o.full_height()) for o in apart]
    return statistic(
        over([largest(one)[2] for one in apart]),
        _two(study),
        (min(heights(apart), default=0) > WALL, compared),
        detail="largest module: "
        + ", ".join(f"{name} {value:.2f} of {whole:.2f} nats" for name, value, whole in each)
        + f"; floor by pair: {', '.join(f'{floor(o):.2f}' for o in apart)} nats"
        + f"; layers above 10 % of the whole: {sum(v > 0.1 for v in tops)} of {len(tops)}"
        + f"; without the embedding: {', '.join(f'{v:.2f}' for v in untied)} nats"
        + (f"; whole network at step 0 {max(start):.1g}" if start else ""),
    )


def g01(study: Study) -> Statistic:
    """The largest barrier before training, different initialisations."""
    start = _untrained(study)
    return statistic(
        max(start, default=None),
        (bool(start), "step 0 is not among the looks"),
        n=len(start),
        detail=f"lowest {min(start):.1g}" if start else "",
    )


def g02(study: Study) -> Statistic:
    """The barrier between copies that fork at 0."""
    some = study.inits >= 2, "one initialisation decides nothing"
    return statistic(study.forks.interval(0, "test", "loss"), some)


def g03(study: Study) -> Statistic:
    """The barrier between copies that fork at the last k."""
    first = study.forks.interval(0, "test", "loss")
    return statistic(
        study.forks.interval(study.late, "test", "loss"),
        (first is not None and first.value > WALL, "there was no barrier at k = 0"),
        (study.late <= study.steps / 2, "the last fork step lies behind half of training"),
        detail=f"k = {study.late} of {study.steps}",
    )


def g04(study: Study) -> Statistic:
    """The barrier of different initialisations over that of the same one."""
    full, same = (heights(study.modules[kind]) for kind in ("different", "same"))
    each = [
        [one.full_height() if one.valid else math.nan for one in study.modules[kind]]
        for kind in ("different", "same")
    ]
    there = bool(same) and np.mean(same) > 0
    return statistic(
        ratio(*each),
        _two(study),
        (bool(there), "copies of one initialisation have no barrier"),
        detail=f"{np.mean(full):.2f} against {np.mean(same):.2f} nats" if full and same else "",
    )


def g05(study: Study) -> Statistic:
    """The barrier with heads and units permuted over the naive one."""
    naive = by_pair(study, "naive")
    return statistic(
        ratio(by_pair(study, "units"), naive),
        _two(study),
        _walled(study),
        detail=f"{_nats(study, 'units', 'naive')} nats; n = {int(np.isfinite(naive).sum())}",
    )


def g06(study: Study) -> Statistic:
    """The barrier with the stream permuted as well over that with heads and units alone."""
    caveat = "Theirs: by activations, a masked model; this is no refutation"
    return statistic(
        ratio(by_pair(study, "weights"), by_pair(study, "units")),
        _two(study),
        _walled(study),
        detail=f"{_nats(study, 'weights', 'units')} nats. {caveat}",
    )


def g07(study: Study) -> Statistic:
    """The barrier with the stream rotated over that of the best permutation."""
    rotated, permuted = ("rotated", "rotated-heads"), ("units", "weights")
    return statistic(
        ratio(by_pair(study, *rotated), by_pair(study, *permuted)),
        _two(study),
        _walled(study),
        detail=f"{_nats(study, *rotated, *permuted)} nats",
    )


def g08(study: Study) -> Statistic:
    """The barrier with the stream rotated over the naive one."""
    rotated = by_pair(study, "rotated", "rotated-heads")
    control = ratio(rotated, by_pair(study, "folded"))
    shown = "none" if control is None else f"{getattr(control, 'value', control):.0%}"
    return statistic(
        ratio(rotated, by_pair(study, "naive")),
        _two(study),
        _walled(study),
        detail=f"of the folded networks' barrier, nothing moved: {shown}",
    )


def g09(study: Study) -> Statistic:
    """Gap over baseline in the stream of copies that fork late, where it is below that at k = 0.

    A pair that is no closer than the same initialisation's at k = 0 counts as 1: not connected.
    """
    stream, late = gaps(study), study.forks.interval(study.late, "test", "loss")
    closer = [
        gap if gap < first else math.nan if math.isnan(gap + first) else 1.0
        for gap, first in zip(*(stream[name] for name in study.conditions[:2]), strict=True)
    ]
    means = {name: np.nanmean(v) for name, v in stream.items() if np.isfinite(v).any()}
    return statistic(
        over(closer),
        (
            late is not None and late.value < STABLE,
            f"copies that fork at k = {study.late} are not connected",
        ),
        detail="; ".join(f"{name} {v:.2f}" for name, v in means.items()),
    )


CLAIMS: dict[str, Callable[[Study], Statistic]] = {
    "B13": b13,
    "G01": g01,
    "G02": g02,
    "G03": g03,
    "G04": g04,
    "G05": g05,
    "G06": g06,
    "G07": g07,
    "G08": g08,
    "G09": g09,
}


# ---- tables, and figures with what their captions say


def _said(value: float | Interval | None, form: str = "{:.2f}") -> str:
    """A number for a sentence."""
    number = value.value if isinstance(value, Interval) else value
    if number is None or not math.isfinite(number):
        return NONE
    return form.format(number).replace("-", "−")


def _of(study: Study) -> Values:
    """What every caption may say."""
    return {
        "network": study.network,
        "data": study.text.label,
        "T": study.steps,
        "inits": study.inits,
        "late": study.late,
        "neighbours": study.neighbours,
    }


def text_values(study: Study) -> Values:
    """What the caption of ``gpt-text`` says."""
    facts = study.text.text
    assert facts is not None  # design() refused anything else
    return _of(study) | {
        "tokenizer": {"bpe": "byte-pair encoding", "gpt2": "GPT-2's own"}.get(
            facts.tokenizer, facts.tokenizer
        ),
        "vocabulary": facts.vocabulary,
        "evaluated_on": facts.evaluated_on,
        "windows": min(study.windows, len(study.text.test)),
        "digest": study.digest,
    }


def show_text(study: Study) -> None:
    """How much text there is, and how much of it is measured on."""
    facts, text = study.text.text, study.text
    assert facts is not None  # design() refused anything else
    shown = [min(study.evaluation.train_examples or len(text.train), len(text.train))]
    shown += [min(study.windows, len(text.test))]
    rows = [
        ("tokens", f"{facts.train.tokens:,}", f"{facts.test.tokens:,}"),
        ("bytes a token", *(f"{t.bytes_per_token:.2f}" for t in (facts.train, facts.test))),
        (f"windows of {text.test.window} tokens", f"{len(text.train):,}", f"{len(text.test):,}"),
        ("of these for measuring", *shown),
    ]
    columns = ["", "training text", "test text"]
    tables.show(columns, rows, name="gpt-text", values=text_values(study))


def _ends(study: Study, metric: str) -> list[float]:
    """What the trained networks reach on the test text.

    Raises:
        BadParameter: none trained.
    """
    found = [v for o in valid(study.along[study.steps]["same"]) for v in o.ends["test"][metric]]
    if not found:
        raise BadParameter(
            "no pair trained: all failed the check that a network has learnt. More steps, or "
            "another lr?"
        )
    return found


def trained_values(study: Study) -> Values:
    """What the caption of ``gpt-trained`` says."""
    start = study.along[0]["same"] if 0 in study.looks else []
    losses = [v for one in valid(start) for v in one.ends["test"]["loss"]]
    said = f". Loss at step 0: {np.mean(losses):.2f} nats" if losses else ""
    return _of(study) | {"at_start": said}


def show_trained(study: Study) -> None:
    """Network, training, speed, and what the networks reach."""
    losses, errors, facts = _ends(study, "loss"), _ends(study, "error"), study.text.text
    assert facts is not None  # design() refused anything else
    per_byte = np.mean(losses) / facts.test.bytes_per_token / math.log(2)
    speed = study.speed
    tokens = study.recipe.batch * (study.text.test.window or 0)
    rows = [
        ("network", f"{study.network}: {parameter_count(study.module):,} parameters"),
        ("training", f"{study.steps:,} steps of {tokens:,} tokens"),
        (
            "speed, one training process",
            f"{speed.tokens_per_second:,.0f} tokens a second ({speed.device}, {speed.precision})",
        ),
        ("test loss (nats a token)", f"{min(losses):.3f} to {max(losses):.3f}"),
        ("the same in bits a byte, mean", f"{per_byte:.2f}"),
        ("wrong next tokens (%)", f"{min(errors):.1f} to {max(errors):.1f}"),
    ]
    tables.show(["", "value"], rows, name="gpt-trained", values=trained_values(study))


def fork_barriers(study: Study, split: str = "test") -> dict[int, Interval]:
    """Fork step -> the loss barrier between copies, mean over pairs; steps that have a pair."""
    found = {k: study.forks.interval(k, split, "loss") for k in study.ks}
    return {k: v for k, v in found.items() if v is not None}


def instability_values(study: Study) -> Values:
    """What the caption of ``gpt-instability`` says."""
    found = fork_barriers(study).items()
    return _of(study) | {
        "stable": f"{STABLE:g}",
        "barriers": ", ".join(f"{_said(v, '{:.3f}')} at k = {k}" for k, v in found) or NONE,
    }


def show_instability(study: Study) -> None:
    """The loss barrier against the fork step, and the rise of the test loss on the line."""

    def above(curve: Curve) -> Curve:
        return replace(curve, values={"test": {"loss": tuple(curve.excess("test", "loss"))}})

    rises = {
        f"k = {k}": [
            above(s.result.barrier.curve) for s in study.forks.at(k) if s.result.barrier.valid
        ]
        for k in study.ks
    }
    fig, axes = plots.grid(2, width=9.6, height=4.0)
    drawn = {
        "k": plots.against_k(
            axes[0],
            {split: fork_barriers(study, split) for split in ("test", "train")},
            steps=study.steps,
            threshold=STABLE,
            meaning="nats: our line",
            ylabel="loss barrier (nats a token)",
        ),
        "rise": plots.lines(axes[1], rises, metric="loss"),
    }
    axes[1].axhline(0, color="#555555", linewidth=0.6)
    axes[1].set_ylabel("rise of the test loss (nats)")
    figures.publish(fig, "gpt-instability", data=drawn, values=instability_values(study))


def matching_values(study: Study) -> Values:
    """What the caption of ``gpt-matching`` says."""
    return _of(study) | {
        "barriers": "; ".join(f"{WAYS[n]} {_said(v)}" for n, v in left(study).items()) or NONE
    }


def show_matching(study: Study) -> None:
    """What each way of matching leaves of the barrier, and the lines."""
    found = left(study)
    fig, axes = plots.grid(2, width=10.4, height=4.4, width_ratios=(1.1, 1))
    drawn: dict[str, Any] = {
        "barriers": plots.conditions(
            axes[0],
            {WAYS[name]: v for name, v in found.items()},
            threshold=None,
            xlabel="test loss barrier (nats)",
            form="{:.2f}",
            colours=[f"C{number}" for number in range(len(found))],
        )
    }
    axes[0].axvline(0, color="#555555", linewidth=0.6)
    matched = study.matched
    drawn["line"] = plots.lines(
        axes[1],
        {WAYS[n]: [r.barrier.curve for r in matched[n] if r.valid] for n in found},
        metric="loss",
        xlabel="α, from A (0) to B, moved (1)",
    )
    plots.legend(fig, 2, below=True)
    figures.publish(fig, "gpt-matching", data=drawn, values=matching_values(study))


def maps(study: Study) -> dict[str, dict[str, list[float]]]:
    """Kind of pair -> whole network first, then every block -> mean barrier at each checkpoint."""

    def rows(kind: str) -> dict[str, list[float]]:
        found = [study.along[step][kind] for step in study.looks]
        out = {"whole network": [float(np.mean(heights(r) or [np.nan])) for r in found]}
        for label in study.blocks:
            each = [[worst(one)[label] for one in valid(r)] for r in found]
            out[study.short(label)] = [float(np.mean(v or [np.nan])) for v in each]
        return out

    return {kind: rows(kind) for kind in PAIRS}


def heatmap_values(study: Study) -> Values:
    """What the caption of ``gpt-heatmap`` says."""
    words = []
    for kind, rows in maps(study).items():
        whole = rows.pop("whole network")[-1]
        value, name = max((values[-1], name) for name, values in rows.items())
        words.append(
            f"{PAIRS[kind]}: whole network {_said(whole)}, largest of the blocks {name} with "
            f"{_said(value)}"
        )
    return _of(study) | {"at_the_end": "; ".join(words)}


def show_heatmap(study: Study) -> None:
    """Barriers of the whole network and of every block while it trains."""
    found = maps(study)
    rows = len(study.blocks) + 1
    fig, axes = plots.grid(2, width=10.4, height=1.0 + 0.36 * rows, sharey=True)
    plots.heat(axes, found, list(study.looks), label="test loss barrier (nats)")
    for ax, kind in zip(axes, found, strict=True):
        ax.set(title=PAIRS[kind], xlabel=f"training step (of {study.steps})")
    drawn = {"T": study.steps, "steps": study.looks, **found}
    figures.publish(fig, "gpt-heatmap", data=drawn, values=heatmap_values(study))


def parts_values(study: Study) -> Values:
    """What the caption of ``gpt-parts`` says."""
    words, floors = [], []
    for kind, results in study.parts.items():
        each = [f"{study.short(largest(o)[0])} {_said(largest(o)[1])}" for o in valid(results)]
        words += [f"{PAIRS[kind]}: {', '.join(each)}"] if each else []
        floors += [_said(floor(one)) for one in valid(results)]
    return _of(study) | {"largest": "; ".join(words) or NONE, "floors": ", ".join(floors) or NONE}


def show_parts(study: Study) -> None:
    """A dot for each part of a block and pair, the least it can show, and the whole network."""
    count = len(study.parts["same"][0].groups)
    fig, axes = plots.grid(2, width=10.4, height=1.4 + 0.22 * count, sharey=True)
    drawn: dict[str, Any] = {}
    for ax, (kind, results) in zip(axes, study.parts.items(), strict=True):
        good = valid(results)
        ax.set_title(PAIRS[kind])
        if not good:
            continue
        named = [{study.short(k): v for k, v in worst(one).items()} for one in good]
        drawn[kind] = plots.dots(ax, named, heights(good), xlabel="test loss barrier (nats)")
        drawn[kind] |= {"defaults": [one.heights("single") for one in good]}
        drawn[kind] |= {"floors": [floor(one) for one in good]}
        for number, one in enumerate(good):
            ax.axvline(floor(one), color=f"C{number % 7}", linestyle=":", linewidth=1)
    plots.legend(fig, study.inits)
    figures.publish(fig, "gpt-parts", data=drawn, values=parts_values(study))


def cumulative(study: Study, kind: str, of: str) -> list[list[float]]:
    """Barriers of the first (``shallow``) or last (``deep``) 1, 2, … groups, or of windows."""
    return [list(one.worst(of, "test").values()) for one in valid(study.groups[kind])]


def identity(study: Study) -> float:
    """How far all groups together are from the whole network, at most: it should be nothing."""
    return max(
        abs(row.half("test", "loss") - one.select("full")[0].half("test", "loss"))
        for results in study.groups.values()
        for one in results
        for kind in ("shallow", "deep")
        for row in one.select(kind)
        if len(row.groups) == len(one.groups)
    )


def _starts(study: Study) -> list[str]:
    """The first group of each window."""
    names = [study.short(label).partition(" =")[0] for label in study.blocks]
    return names[: len(names) - study.neighbours + 1]


def groups_values(study: Study) -> Values:
    """What the caption of ``gpt-groups`` says."""
    words = []
    for kind in PAIRS:
        if found := cumulative(study, kind, "window"):
            mean = np.mean(found, axis=0)
            where = _starts(study)[int(np.argmax(mean))]
            words.append(f"{PAIRS[kind]}: {where} and what follows, {_said(float(mean.max()))}")
    return _of(study) | {
        "groups": len(study.blocks),
        "peaks": "; ".join(words) or NONE,
        "identity": f"{identity(study):.1e}",
    }


def show_groups(study: Study) -> None:
    """Barriers of more and more groups from either end, and of windows of neighbours."""
    numbers, places = range(1, len(study.blocks) + 1), range(1, len(_starts(study)) + 1)
    fig, axes = plots.grid(2, width=10.4, height=4.2, sharey=True)
    drawn: dict[str, Any] = {}
    looks = [("first", "shallow", numbers, 0), ("last", "deep", numbers, 0)]
    looks += [("windows", "window", places, 1)]
    words = {"first": "the first n", "last": "the last n", "windows": "neighbours"}
    for shift, kind in enumerate(PAIRS):
        for number, (name, of, x, at) in enumerate(looks):
            if curves := cumulative(study, kind, of):
                label = f"{words[name]}, {PAIRS[kind]}"
                colour = (0 if name == "windows" else number) + 2 * shift
                found = plots.band(axes[at], list(x), curves, label, colour)
                drawn.setdefault(kind, {})[name] = found
    for ax in axes:
        ax.axhline(0, color="#555555", linewidth=0.6)
        if drawn:
            ax.legend(fontsize=8)
    axes[0].set(xlabel="number of groups averaged, n", ylabel="test loss barrier (nats)")
    axes[1].set_xticks(list(places), _starts(study), rotation=30, ha="right")
    axes[1].set_xlabel(f"first of {study.neighbours} neighbouring groups")
    figures.publish(fig, "gpt-groups", data=drawn, values=groups_values(study))


def features_values(study: Study) -> Values:
    """What the caption of ``gpt-features`` says."""
    means = {name: _stream(study, name) for name in study.conditions}
    words = [f"{name}: {_said(float(np.median(v[:-1])))}" for name, v in means.items() if len(v)]
    looked = min(study.windows, 32, len(study.text.test))
    return _of(study) | {
        "positions": f"{looked * (study.text.test.window or 0):,}",
        "medians": "; ".join(words) or NONE,
    }


def _stream(study: Study, name: str) -> Any:
    """Gap over baseline after each block, mean over the valid pairs of a condition."""
    curves = _curves(study, name)
    return np.mean(curves, axis=0) if curves else np.array([])


def _curves(study: Study, name: str) -> list[list[float]]:
    results = zip(study.streams[name], _passed(study)[name], strict=True)
    return [[layer.ratio(0.5) for layer in one.layers] for one, good in results if good]


def show_features(study: Study) -> None:
    """How linearly the residual stream is connected, after each block."""
    fig, ax = plt.subplots(figsize=(7.6, 4.0))
    at = list(range(len(study.places)))
    drawn = {
        name: plots.band(ax, at, curves, name, number)
        for number, name in enumerate(study.conditions)
        if (curves := _curves(study, name))
    }
    named = ["logits" if p == OUTPUT else study.short(p) for p in study.places]
    ax.set_xticks(at, named, rotation=30, ha="right")
    ax.axhline(1, color="#555555", linewidth=0.6)
    ax.set(ylabel="gap at the middle / baseline", yscale="log", xlabel="residual stream after")
    if drawn:
        ax.legend()
    shown = {"places": [study.short(p) for p in study.places], **drawn}
    figures.publish(fig, "gpt-features", data=shown, values=features_values(study))


def records() -> list[Record]:
    """What was recorded of this chapter on other machines or texts."""
    return recorded.load(CHAPTER)


def _drawn(record: Record, figure: str) -> Any:
    return record.data["figures"][figure]["data"]


def recorded_values(found: Sequence[Record]) -> Values:
    """What the caption of ``gpt-recorded`` says."""
    words = []
    for record in found:
        ends = [
            f"{_said(_drawn(record, 'gpt-heatmap')[kind]['whole network'][-1])} nats ({title})"
            for kind, title in PAIRS.items()
        ]
        words.append(f"{record.title}: whole network {' and '.join(ends)}")
    return {"titles": " ".join(f"{r.title}." for r in found), "ends": "; ".join(words)}


def show_recorded(found: Sequence[Record]) -> None:
    """The heat map of every record that has it; nothing without one."""
    held = [r for r in found if "gpt-heatmap" in r.data["figures"]]
    if not held:
        return
    panels = {
        f"{r.name}: {PAIRS[kind]}\n{r.dataset}, {r.data['date']}": (
            _drawn(r, "gpt-heatmap")[kind],
            _drawn(r, "gpt-heatmap")["steps"],
        )
        for r in held
        for kind in PAIRS
    }
    fig, axes = plots.grid(2 * len(held), width=10.4, height=4.2)
    plots.heat(
        axes,
        {title: rows for title, (rows, _) in panels.items()},
        {title: steps for title, (_, steps) in panels.items()},
        label="test loss barrier (nats)",
    )
    for ax, title in zip(axes, panels, strict=True):
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("training step")
    drawn = {r.name: _drawn(r, "gpt-heatmap") for r in held}
    figures.publish(fig, "gpt-recorded", data=drawn, values=recorded_values(held))


# ---- sentences that depend on the outcome, and numbers of the prose


def stream_sentence(study: Study) -> str:
    """Whether permuting the stream helps."""
    found = left(study)
    if not {"units", "weights"} <= found.keys():
        return "This run cannot say whether permuting the stream, too, helps."
    helps = found["weights"].value < found["units"].value
    return (
        f"Permuting the stream as well {'helps' if helps else 'does not help'} here: it leaves "
        f"{_said(found['weights'])} nats."
    )


def embedding_sentence(study: Study) -> str:
    """Whether a single group costs more than averaging everything."""
    good = valid(study.groups["different"])
    if not good:
        return "This run has no valid pair to say it of."
    named = dict.fromkeys(study.short(largest(one)[0]) for one in good)
    names = ", ".join(
        n.replace("embedding = output", "the embedding (also the output)") for n in named
    )
    alone = over([largest(one)[1] for one in good])
    whole = over(heights(good))
    if np.mean([largest(one)[2] for one in good]) <= 1:
        return f"No group alone costs as much as the whole; the largest is that of {names}."
    return (
        f"Averaging nothing but {names} costs {_said(alone)} nats, more than averaging everything "
        f"({_said(whole)})."
    )


def features_sentence(study: Study) -> str:
    """What the features of early and late forks say beside their barriers."""
    late, first, _ = (_stream(study, name) for name in study.conditions)
    if not (len(late) and len(first)):
        return "This run lacks a valid pair of one of the two kinds."
    found = fork_barriers(study)
    return (
        f"Copies that fork at step 0 reach {_said(float(np.median(first[:-1])))}, with a barrier "
        f"of {_said(found.get(0))} nats; those that fork at step {study.late} reach "
        f"{_said(float(np.median(late[:-1])))}, with {_said(found.get(study.late))}."
    )


def values(study: Study) -> Values:
    """The numbers and sentences of the chapter's prose."""
    forks, found, near = fork_barriers(study), left(study), nearer(study)
    loss = float(np.mean(_ends(study, "loss")))
    whole = {kind: over(heights(study.modules[kind])) for kind in PAIRS}
    floors = [near for kind in PAIRS for near in near_floor(study.parts[kind])]
    twins = {n: over_pairs(r, height) for n, r in study.turned_twins.items()}
    start = forks.get(0)
    first = next(label for label in study.blocks if label.startswith("transformer.h."))
    dots = {f"left_{name.replace('-', '_')}": _said(found.get(name)) for name in WAYS}
    return _of(study) | dots | {
        "sample": study.read(study.shown.x[0])[:160],
        "window": study.text.test.window or 0,
        "loss": f"{loss:.2f}",
        "choices": f"{math.exp(loss):.0f}",
        "first_k": _said(start),
        "factor": _said(math.exp(start.value) if start else None),
        "late_k": _said(forks.get(study.late), "{:.3f}"),
        "late_share": f"{study.late / study.steps:.0%}",
        "whole_same": _said(whole["same"]),
        "whole_different": _said(whole["different"]),
        "embedding_same": _said(of_group(study.groups["same"], EMBEDDING)),
        "embedding_different": _said(of_group(study.groups["different"], EMBEDDING)),
        "first_block": _said(of_group(study.groups["different"], first)),
        "near_units": _said(near.get("units"), "{:.0%}"),
        "near_rotated": _said(near.get("rotated"), "{:.0%}"),
        "twins_naive": _said(twins["naive"]),
        "twins_rotated": _said(twins["rotated"]),
        "dots": len(floors),
        "dots_near": sum(floors),
        "near": f"{NEAR:g}",
        "stable": f"{STABLE:g}",
        "stream_sentence": stream_sentence(study),
        "embedding_sentence": embedding_sentence(study),
        "features_sentence": features_sentence(study),
    }  # fmt: skip


def record_values(found: Sequence[Record], name: str = "cpu-wikitext2") -> Values:
    """What the prose says of a record, or that it has no such number."""
    nothing = dict.fromkeys(["naive", "units", "weights", "rotated", "embedding", "first"])
    numbers: dict[str, float | None] = nothing
    for record in found:
        if record.name == name:
            barriers = _drawn(record, "gpt-matching")["barriers"]
            embedded = _drawn(record, "gpt-heatmap")["different"]
            forked = _drawn(record, "gpt-instability")["k"]["test"]
            ways = {way: barriers.get(WAYS[way], {}).get("mean") for way in nothing if way in WAYS}
            embedding = embedded.get("embedding = output", [None])[-1]
            numbers = {**ways, "embedding": embedding, "first": forked["mean"][0]}
    return {
        f"record_{key}": "not recorded" if value is None else _said(value)
        for key, value in numbers.items()
    }
