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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from companion import data, layerwise
from companion.connectivity import Barrier, Curve
from companion.core import stats
from companion.core.errors import BadParameter, NotMeasured
from companion.core.pool import one_thread
from companion.core.runs import Store
from companion.core.stats import Interval, over_pairs
from companion.core.theta import layout
from companion.data import Dataset, Split
from companion.data.dataset import TextFacts
from companion.data.text import save_windows, tokenizer
from companion.experiments import instability
from companion.experiments.aligned import Aligned, align, interval, lines_of, placed
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
from companion.experiments.methods import Method
from companion.experiments.pairs import Evaluation, Pair
from companion.experiments.published import along, checkpoints
from companion.features import Features, features
from companion.layerwise import LayerBarriers, Sweep
from companion.models import parameter_count
from companion.papers.forked import Forked
from companion.report import figures, page, plots, provenance, tables
from companion.report.claims import Need, Statistic, statistic
from companion.report.recorded import Record
from companion.report.words import Values, listed, said
from companion.training import Recipe, Run, build, load_weights, throughput

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
    "learned": "… and learned, B moves",
    "learned-both": "… and learned, both move",
}
"""Method of matching -> the same for people, and in figures and records."""

LEARNED = ("learned", "learned-both")
"""Those that look at text; they begin where ``rotated-heads`` ends."""

PERMUTED = ("units", "weights")
"""Those that permute; which of them is the better one is decided on the training text."""

ALONG = ("naive", "weights", "rotated")
"""Those that published trainings are compared by."""

TURNED = ("naive", "rotated")
"""Those that copies which fork at 0 are compared by."""

Swept: TypeAlias = dict[str, list[LayerBarriers]]
"""Kind of pair, of :data:`PAIRS` -> one result a pair."""


# ---- the design


@dataclass(frozen=True, eq=False)
class Study(Forked):
    """The experiments of chapter 5. Each runs, once, when it is first looked at.

    Arguments:
        recipe: of the GPT.
        text: the dataset.
        facts: how it became tokens.
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
        trainings: folders of published ones, each with a folder for each step.
        published_text: the text that these are measured on, by name.
        learning_steps: of the learned ways of matching.
    """

    recipe: Recipe
    text: Dataset
    facts: TextFacts
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
    trainings: tuple[Path, ...] = ()
    published_text: str = ""
    learning_steps: int = 20

    # What is trained

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

    @property
    def ways(self) -> list[Method]:
        """:data:`WAYS` as methods."""
        how: dict[str, Any] = {"steps": self.learning_steps, "batch": 8, "lr": 0.003}
        return [Method(way, **how) if way in LEARNED else Method(way) for way in WAYS]

    def plans(self) -> list[Plan]:
        """All that is measured, for :func:`companion.report.page.budget`."""
        alone, *finer = self._sweeps.values()
        ends = (*self.twins(), *self.strangers())
        lines = lines_of(self.strangers(), self.ways, self.evaluation)
        shape: Any = {"inits": self.inits, "copies": 2, "optimizer": "restore"}
        return [
            plan_forks(self.recipe, self.ks, self.evaluation, **shape),
            [LayerSweep(pair, alone) for pair in self._looked],
            [LayerSweep(pair, sweep) for sweep in finer for pair in ends],
            [*lines, *lines_of(self.twins(), TURNED, self.evaluation)],
        ]

    @property
    def _looked(self) -> list[Pair]:
        return [p for step in self.looks for p in (*self.twins(step), *self.strangers(step))]

    @property
    def _sweeps(self) -> dict[str, Sweep]:
        """Along training, and at its end by part, by module, and by groups of blocks."""
        alone = Sweep(
            by="block",
            kinds=("single",),
            points=1,
            train_examples=self.evaluation.train_examples,
            test_examples=self.windows,
        )
        together = ("single", "shallow", "deep", "window")
        return {
            "blocks": alone,
            "parts": replace(alone, by="part"),
            "modules": replace(alone, by="module"),
            "groups": replace(alone, kinds=together, window=self.neighbours),
        }

    # What is measured

    @cached_property
    def along(self) -> dict[int, Swept]:
        """Training step -> kind of pair -> barriers of blocks. All networks are trained here.

        Before the end they may be untrained; at the end they have to have learnt.
        """
        where: Any = {"device": self.device, "workers": self.workers}
        found = iter(sweep_pairs(self._looked, self._sweeps["blocks"], **where))
        each = {
            step: {
                kind: [next(found).judged(max_error=100.0) for _ in range(self.inits)]
                for kind in PAIRS
            }
            for step in self.looks
        }
        return each | {self.steps: self._at_the_end("blocks")}

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
        self._train_first()
        return self._at_the_end("parts")

    @cached_property
    def modules(self) -> Swept:
        """Barriers of the paper's layers, single modules, at the end of training."""
        self._train_first()
        return self._at_the_end("modules")

    @cached_property
    def groups(self) -> Swept:
        """Barriers of blocks alone, of the first and the last n, and of windows of neighbours."""
        self._train_first()
        return self._at_the_end("groups")

    @cached_property
    def matched(self) -> dict[str, list[Aligned]]:
        """Way of :data:`WAYS` -> the pairs of different initialisations, B brought to A."""
        self._train_first()
        return align(self.strangers(), self.ways, self.evaluation, **self._judged)

    @cached_property
    def turned_twins(self) -> dict[str, list[Aligned]]:
        """The same for copies that fork at 0, as trained and with the stream rotated."""
        self._train_first()
        return align(self.twins(), TURNED, self.evaluation, **self._judged)

    @cached_property
    def streams(self) -> dict[str, list[Features]]:
        """Condition -> the residual stream of each pair, and of the network half-way."""
        self._train_first()
        looked = self.text.test.head(min(self.windows, 32))

        def of(pair: Pair) -> Features:
            a, b = self.weights(pair.a), self.weights(pair.b)
            more: Any = {"layers": self.places, "alphas": (0.5,), "per": "position"}
            return features(self.module, a, b, looked, **more)

        groups = self.twins(k=self.last), self.twins(), self.strangers()
        with one_thread():  # as every measurement of the pool
            return {
                name: [of(pair) for pair in pairs]
                for name, pairs in zip(self.conditions, groups, strict=True)
            }

    @cached_property
    def published(self) -> list[dict[int, dict[str, Barrier]]]:
        """For each pair of published trainings step -> naive and one-shot matching -> barrier."""
        if not self.trainings:
            return []
        ends, name = (
            list(zip(self.trainings[::2], self.trainings[1::2], strict=False)),
            self.published_text,
        )
        if "tokenizer=" not in name:
            home = next(iter(checkpoints(self.trainings[0]).values()))
            name += f"{'&' if '?' in name else '?'}tokenizer={home.absolute()}"
        text = data.load(name, self.device)
        how: Any = {"evaluation": self.evaluation, "max_error": self.max_error}
        return [along(a, b, text, methods=ALONG, **how) for a, b in ends]

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

    def _at_the_end(self, by: str) -> Swept:
        made = {"same": self.twins(), "different": self.strangers()}
        return {k: sweep_pairs(p, self._sweeps[by], **self._judged) for k, p in made.items()}

    def _train_first(self) -> None:
        """With every checkpoint that is looked at: else networks would be trained twice."""
        with suppress(NotMeasured):  # of a recording that is closed
            _ = self.along

    @property
    def _judged(self) -> dict[str, Any]:
        return {"max_error": self.max_error, "device": self.device, "workers": self.workers}

    # What the page says of it

    @property
    def windows(self) -> int:
        """Windows of the test text that everything is measured on."""
        return self.evaluation.test_examples or len(self.text.test)

    @property
    def conditions(self) -> tuple[str, str, str]:
        """The pairs whose features are compared, from most to least shared."""
        same = PAIRS["same"].partition(",")[0]
        return f"{same}, k = {self.last}", f"{same}, k = 0", PAIRS["different"]

    @property
    def places(self) -> list[str]:
        """Where features are looked at: after each block and the last norm, and the logits."""
        skipped = (EMBEDDING, "transformer.wpe", OUTPUT)
        return [*(b for b in self.blocks if b not in skipped), OUTPUT]

    def short(self, label: str) -> str:
        """A group's name for a figure: block 1 attention."""
        tied = "lm_head.weight" in layout(self.module).ties
        words = {
            EMBEDDING: "embedding = output" if tied else "embedding",
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
        hardware = provenance.hardware(self.device)
        networks = f"{self.inits} initialisations × 2 copies"
        return f"{self.text.label}, {self.network}, T = {self.steps}, {networks}, {hardware}"

    def words(self) -> Values:
        """What prose and captions say of the design."""
        return {
            "network": self.network,
            "data": self.text.label,
            "T": self.steps,
            "inits": self.inits,
            "late": self.last,
            "late_share": said(self.last / self.steps, "{:.0%}"),
            "neighbours": self.neighbours,
            "groups": len(self.blocks),
            "window": self.text.test.window or 0,
            "sample": self.read(self.shown.x[0])[:160],
            "stable": f"{STABLE:g}",
            "near": f"{NEAR:g}",
            "learning_steps": self.learning_steps,
        }

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
    published: str = "",
    published_text: str = "wikitext2?window=128",
    learning_steps: int = 20,
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
    last = recipe.steps if steps is None else steps
    recipe = replace(recipe, warmup=min(recipe.warmup, last // 10))
    recipe = replace(recipe, **{k: v for k, v in changed.items() if v is not None})  # type: ignore[arg-type]  # each value has its field's type
    last = recipe.steps
    for name, value, least in (
        ("inits", inits, 2),
        ("neighbours", neighbours, 1),
        ("windows", windows, 1),
        ("train_windows", train_windows, 1),
        ("learning_steps", learning_steps, 1),
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
    trainings: list[Path] = []
    if published:
        root = Path(published).expanduser()
        trainings = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        if len(trainings) < 2:
            raise BadParameter(
                f"published: {root} needs two folders or more, one for each training, such as "
                "seed1 and seed2, with folders step0, step1000, … in them."
            )
        for training in trainings:
            checkpoints(training)
    return Study(
        recipe=recipe,
        text=text,
        facts=text.text,
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
        trainings=tuple(trainings),
        published_text=published_text,
        learning_steps=learning_steps,
    )


# ---- statistics that claims and figures share


def valid(results: Sequence[LayerBarriers]) -> list[LayerBarriers]:
    """The pairs that passed every check."""
    return [one for one in results if one.valid]


def heights(results: Sequence[LayerBarriers]) -> list[float]:
    """The whole network's test loss barrier, of each valid pair."""
    return [one.full_height() for one in valid(results)]


def largest(one: LayerBarriers) -> tuple[str, float, float]:
    """The group with the largest barrier, that barrier, and it over the whole network's."""
    value, label = max((v, k) for k, v in one.worst().items())
    full = one.full_height()
    return label, value, value / full if full > 0 else math.inf


def floor(one: LayerBarriers) -> float:
    """The least that a layer can show, in nats: half of what the two networks differ by.

    A barrier is measured from the mean of both, and the worse of them, the host, lies above it.
    """
    first, second = one.ends["test"]["loss"]
    return abs(first - second) / 2


def _cycle(count: int) -> list[tuple[int, int]]:
    """The initialisations of each pair of :meth:`Study.strangers`; two make one pair, twice."""
    return [(i, (i + 1) % count) if count > 2 else (0, 0) for i in range(count)]


def over_inits(values: Sequence[float]) -> Interval | None:
    """Mean over the pairs of :meth:`Study.strangers`, in order; NaN: a pair that is not valid.

    Each initialisation has part in two of them, and the interval is over initialisations.
    """
    pairs = zip(values, _cycle(len(values)), strict=True)
    rows = [(v, inits) for v, inits in pairs if math.isfinite(v)]
    if not rows:
        return None
    return stats.over_networks([v for v, _ in rows], [inits for _, inits in rows])


def of_group(results: Sequence[LayerBarriers], label: str) -> Interval | None:
    """One group's barrier, mean over valid pairs; None without any, or without such a group."""
    return over_pairs(one.worst()[label] for one in valid(results) if label in one.worst())


def fork_barriers(study: Study, split: str = "test") -> dict[int, Interval]:
    """Fork step -> the loss barrier between copies, mean over pairs; steps that have a pair."""
    found = {k: study.forks.interval(k, split, "loss") for k in study.ks}
    return {k: v for k, v in found.items() if v is not None}


def height(result: Aligned, split: str = "test") -> float:
    """The loss barrier of a matched pair; NaN if it is not valid."""
    return result.barrier.height(split, "loss")


def nearer(result: Aligned) -> float:
    """The distance of A and B after matching over that before; LayerNorm folded in both."""
    return result.distances["after"] / result.distances["before"]


def left(study: Study, value: Callable[[Aligned], float] = height) -> dict[str, Interval]:
    """Way of :data:`WAYS` -> the barrier it leaves, or another value; mean over valid pairs."""
    found = {
        name: over_inits([value(r) if r.valid else math.nan for r in results])
        for name, results in study.matched.items()
    }
    return {name: v for name, v in found.items() if v is not None}


def by_pair(study: Study, way: str, split: str = "test") -> list[float]:
    """The barrier that a way leaves, pair by pair: NaN where a pair is not valid."""
    return [height(result, split) for result in study.matched[way]]


def better(study: Study, ways: Sequence[str]) -> str:
    """The way that leaves the least on the training text, mean over pairs."""

    def least(way: str) -> float:
        found = over_inits(by_pair(study, way, "train"))
        return found.value if found else math.inf

    return min(ways, key=least)


def ratio(
    some: Sequence[float], others: Sequence[float], *, copies: bool = False
) -> Interval | None:
    """Ratio of the means over the pairs valid in both; None where the lower one is not positive.

    Arguments:
        some: of the pairs of :func:`over_inits`.
        others: of the same pairs, or with ``copies`` of one pair an initialisation, in order.
    """
    count = len(some)
    both = np.array([*some, *others])
    rows = [i for i in range(2 * count) if math.isfinite(both[i] + both[(i + count) % len(both)])]
    cycle = _cycle(count)
    parts = [*cycle, *([(i, i) for i in range(count)] if copies and count > 2 else cycle)]

    def of(kept: Any) -> float:
        at = kept.astype(int)
        above, below = both[at[at < count]], both[at[at >= count]]
        if not len(above) or not len(below) or below.mean() <= 0:
            return math.nan
        return float(above.mean() / below.mean())

    if not rows or math.isnan(of(np.array(rows))):
        return None
    found = stats.over_networks(rows, [parts[i] for i in rows], statistic=of)
    return replace(found, n=len(rows) // 2)


def ratios(study: Study) -> dict[str, list[list[float]]]:
    """Condition -> for each pair gap over baseline at every place; [] if the pair is not valid."""
    passed = (
        [s.result.barrier.valid for s in study.forks.at(study.last)],
        [one.valid for one in study.modules["same"]],
        [one.valid for one in study.modules["different"]],
    )
    return {
        name: [
            [layer.ratio(0.5) for layer in one.layers] if good else []
            for one, good in zip(study.streams[name], found, strict=True)
        ]
        for name, found in zip(study.conditions, passed, strict=True)
    }


def gaps(study: Study) -> dict[str, list[float]]:
    """Condition -> gap over baseline, median over the stream, pair by pair: NaN if not valid."""
    return {
        name: [float(np.median(one[:-1])) if one else math.nan for one in pairs]
        for name, pairs in ratios(study).items()
    }


def typical(study: Study) -> dict[str, float]:
    """Condition -> gap over baseline, mean over valid pairs, then the median over the stream."""
    found = {name: [one for one in pairs if one] for name, pairs in ratios(study).items()}
    return {n: float(np.median(np.mean(v, axis=0)[:-1])) for n, v in found.items() if v}


def maps(study: Study) -> dict[str, dict[str, list[float]]]:
    """Kind of pair -> whole network first, then every block -> mean barrier at each checkpoint."""

    def rows(kind: str) -> dict[str, list[float]]:
        found = [study.along[step][kind] for step in study.looks]
        out = {"whole network": [float(np.mean(heights(r) or [np.nan])) for r in found]}
        for label in study.blocks:
            each = [[one.worst()[label] for one in valid(r)] for r in found]
            out[study.short(label)] = [float(np.mean(v or [np.nan])) for v in each]
        return out

    return {kind: rows(kind) for kind in PAIRS}


def continued(study: Study, way: str, count: int = 30) -> dict[str, str]:
    """How A, the average with B, and B go on after the first test window, by the likeliest token.

    Arguments:
        way: how B of the first pair of :meth:`Study.strangers` is brought to A, of :data:`WAYS`.
    """
    found = placed(study.matched[way][0], device=study.device)
    mixed = {name: torch.lerp(v, found.b[name].to(v), 0.5) for name, v in found.a.items()}
    spoken = {}
    for who, theta in (("A", found.a), ("half-way", mixed), ("B", found.b)):
        found.module.eval().load_state_dict(theta)
        x = start = study.shown.x[:1]
        with torch.no_grad():
            for _ in range(count):
                logits = found.module(x[:, -start.shape[1] :])
                x = torch.cat([x, logits[:, -1:].argmax(-1)], 1)
        spoken[who] = study.read(x[0, start.shape[1] :])
    return spoken


# ---- one function a claim


def _two(study: Study) -> Need:
    return len(valid(study.modules["different"])) >= 2, "one pair decides nothing"


def _three(study: Study) -> Need:
    return study.inits >= 3, "two initialisations make one pair of different ones"


def _matching(study: Study, some: str, others: str, detail: str) -> Statistic:
    """The barrier that one way leaves over that of another."""
    there = [v for v in by_pair(study, "naive") if not math.isnan(v)]
    return statistic(
        ratio(by_pair(study, some), by_pair(study, others)),
        _two(study),
        _three(study),
        (bool(there) and min(there) > WALL, "a pair has no barrier to take away"),
        detail=detail,
    )


def _nats(study: Study, *ways: str) -> str:
    found = left(study)
    return ", ".join(
        f"{WAYS[w]} {found[w].value:.2f}" if w in found else f"{WAYS[w]}: {NONE}" for w in ways
    )


def _whole(results: Sequence[LayerBarriers]) -> list[float]:
    """The whole network's barrier pair by pair: NaN where a pair is not valid."""
    return [one.full_height() if one.valid else math.nan for one in results]


def _untrained(study: Study) -> list[float]:
    """The same at step 0, different initialisations; [] if not looked at."""
    return _whole(study.along[0]["different"]) if 0 in study.looks else []


def b13(study: Study) -> Statistic:
    """The largest module's barrier over the whole network's, different initialisations."""
    apart, start = valid(study.modules["different"]), _untrained(study)
    tops = [value / one.full_height() for one in apart for value in one.worst().values()]
    untied = [max(v for k, v in o.worst().items() if k not in (EMBEDDING, OUTPUT)) for o in apart]
    compared = "a pair has no barrier of the whole network to compare with"
    each = [(study.short(largest(o)[0]), largest(o)[1], o.full_height()) for o in apart]
    return statistic(
        over_inits([largest(o)[2] if o.valid else math.nan for o in study.modules["different"]]),
        _two(study),
        _three(study),
        (min(heights(apart), default=0) > WALL, compared),
        detail="largest module: "
        + ", ".join(f"{name} {value:.2f} of {whole:.2f} nats" for name, value, whole in each)
        + f"; floor by pair: {', '.join(f'{floor(o):.2f}' for o in apart)} nats"
        + f"; layers above 10 % of the whole: {sum(v > 0.1 for v in tops)} of {len(tops)}"
        + f"; without the embedding: {', '.join(f'{v:.2f}' for v in untied)} nats"
        + (f"; whole network at step 0 {max(start):.1g}" if start else ""),
    )


def g01(study: Study) -> Statistic:
    """The barrier before training, different initialisations."""
    start = _untrained(study)
    looked = bool(start), "step 0 is not among the looks"
    detail = f"from {min(start):.1g} to {max(start):.1g}" if start else ""
    return statistic(over_inits(start), looked, _three(study), detail=detail)


def g02(study: Study) -> Statistic:
    """The barrier between copies that fork at 0."""
    some = study.inits >= 2, "one initialisation decides nothing"
    return statistic(study.forks.interval(0, "test", "loss"), some)


def g03(study: Study) -> Statistic:
    """The barrier between copies that fork at the last k."""
    first = study.forks.interval(0, "test", "loss")
    return statistic(
        study.forks.interval(study.last, "test", "loss"),
        (first is not None and first.value > WALL, "there was no barrier at k = 0"),
        (study.last <= study.steps / 2, "the last fork step lies behind half of training"),
        detail=f"k = {study.last} of {study.steps}",
    )


def g04(study: Study) -> Statistic:
    """The barrier of different initialisations over that of the same one."""
    different, same = (_whole(study.modules[kind]) for kind in ("different", "same"))
    full, there = (over_inits(values) for values in (different, same))
    return statistic(
        ratio(different, same, copies=True),
        _two(study),
        _three(study),
        (there is not None and there.value > 0, "copies of one initialisation have no barrier"),
        detail=f"{said(full)} against {said(there)} nats",
    )


def g05(study: Study) -> Statistic:
    """The barrier with heads and units permuted over the naive one."""
    n = int(np.isfinite(by_pair(study, "naive")).sum())
    detail = f"{_nats(study, 'units', 'naive')} nats; n = {n}"
    return _matching(study, "units", "naive", detail)


def g06(study: Study) -> Statistic:
    """The barrier with the stream permuted as well over that with heads and units alone."""
    caveat = "Theirs: by activations, a masked model; this is no refutation"
    detail = f"{_nats(study, 'weights', 'units')} nats. {caveat}"
    return _matching(study, "weights", "units", detail)


def g07(study: Study) -> Statistic:
    """The barrier with the stream rotated over that of the better permutation."""
    permuted = better(study, PERMUTED)
    detail = f"{_nats(study, 'rotated', *PERMUTED)} nats; better on the training text: "
    return _matching(study, "rotated", permuted, detail + WAYS[permuted])


def g08(study: Study) -> Statistic:
    """The barrier with the stream rotated over the naive one."""
    control = ratio(by_pair(study, "rotated"), by_pair(study, "folded"))
    detail = f"of the folded networks' barrier, nothing moved: {said(control, '{:.0%}', 'none')}"
    return _matching(study, "rotated", "naive", detail)


def g09(study: Study) -> Statistic:
    """Gap over baseline in the stream of copies that fork late, where it is below that at k = 0.

    A pair that is no closer than the same initialisation's at k = 0 counts as 1: not connected.
    """
    stream, late = gaps(study), study.forks.interval(study.last, "test", "loss")
    closer = [
        gap if gap < first else math.nan if math.isnan(gap + first) else 1.0
        for gap, first in zip(*(stream[name] for name in study.conditions[:2]), strict=True)
    ]
    means = {name: np.nanmean(v) for name, v in stream.items() if np.isfinite(v).any()}
    connected = late is not None and late.value < STABLE
    return statistic(
        over_pairs(closer),
        (connected, f"copies that fork at k = {study.last} are not connected"),
        detail="; ".join(f"{name} {v:.2f}" for name, v in means.items()),
    )


CLAIMS: dict[str, Callable[[Study], Statistic]] = {
    f.__name__.upper(): f for f in (b13, g01, g02, g03, g04, g05, g06, g07, g08, g09)
}


# ---- tables and figures, with what their captions say


def show_text(study: Study) -> None:
    """How much text there is, and how much of it is measured on."""
    facts, text = study.facts, study.text
    examples = min(study.evaluation.train_examples or len(text.train), len(text.train))
    windows = min(study.windows, len(text.test))
    rows = [
        ("tokens", f"{facts.train.tokens:,}", f"{facts.test.tokens:,}"),
        ("bytes a token", *(f"{t.bytes_per_token:.2f}" for t in (facts.train, facts.test))),
        (f"windows of {text.test.window} tokens", f"{len(text.train):,}", f"{len(text.test):,}"),
        ("of these for measuring", examples, windows),
    ]
    tokenizers = {"bpe": "byte-pair encoding", "gpt2": "GPT-2's own"}
    values = {
        "tokenizer": tokenizers.get(facts.tokenizer, facts.tokenizer),
        "vocabulary": facts.vocabulary,
        "evaluated_on": facts.evaluated_on,
        "windows": windows,
        "digest": study.digest,
    }
    tables.show(["", "training text", "test text"], rows, name="gpt-text", values=values)


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


def show_trained(study: Study) -> None:
    """Network, training, speed, and what the networks reach."""
    losses, errors = _ends(study, "loss"), _ends(study, "error")
    per_byte = np.mean(losses) / study.facts.test.bytes_per_token / math.log(2)
    speed = throughput(study.recipe, device=study.device, data=study.text)
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
    untrained = valid(study.along[0]["same"]) if 0 in study.looks else []
    start = [v for one in untrained for v in one.ends["test"]["loss"]]
    values = {"at_start": f". Loss at step 0: {np.mean(start):.2f} nats" if start else ""}
    tables.show(["", "value"], rows, name="gpt-trained", values=values)


def show_instability(study: Study) -> None:
    """The loss barrier against the fork step, and the rise of the test loss on the line."""

    def above(curve: Curve) -> Curve:
        return replace(curve, values={"test": {"loss": tuple(curve.excess("test", "loss"))}})

    lines = {k: [s.result.barrier for s in study.forks.at(k)] for k in study.ks}
    rises = {f"k = {k}": [above(b.curve) for b in found if b.valid] for k, found in lines.items()}
    found = {split: fork_barriers(study, split) for split in ("test", "train")}
    fig, axes = plots.grid(2, height=4.0)
    drawn = {
        "k": plots.against_k(
            axes[0],
            found,
            steps=study.steps,
            threshold=STABLE,
            meaning="nats: our line",
            ylabel="loss barrier (nats a token)",
        ),
        "rise": plots.lines(axes[1], rises, metric="loss"),
    }
    axes[1].axhline(0, color="#555555", linewidth=0.6)
    axes[1].set_ylabel("rise of the test loss (nats)")
    words = ", ".join(f"{said(v, '{:.3f}')} at k = {k}" for k, v in found["test"].items())
    figures.publish(fig, "gpt-instability", data=drawn, values={"barriers": words or NONE})


def show_matching(study: Study) -> None:
    """What each way of matching leaves of the barrier, and the lines."""
    found = {WAYS[name]: _bare(v) for name, v in left(study).items()}
    lines = {
        WAYS[name]: [r.barrier.curve for r in results if r.valid]
        for name, results in study.matched.items()
        if WAYS[name] in found
    }
    fig, axes = plots.grid(2, height=4.4, width_ratios=(1.1, 1))
    drawn: dict[str, Any] = {
        "barriers": plots.conditions(
            axes[0],
            found,
            threshold=None,
            xlabel="test loss barrier (nats)",
            form="{:.2f}",
            colours=[f"C{number}" for number in range(len(found))],
        )
    }
    axes[0].axvline(0, color="#555555", linewidth=0.6)
    xlabel = "α, from A (0) to B, moved (1)"
    drawn["line"] = plots.lines(axes[1], lines, metric="loss", xlabel=xlabel)
    plots.legend(fig, 2, below=True)
    values = {"barriers": listed(found, missing=NONE)}
    figures.publish(fig, "gpt-matching", data=drawn, values=values)


def _bare(v: Interval) -> Interval:
    """Without bars where one pair gives none."""
    return v if math.isfinite(v.low) else replace(v, low=v.value, high=v.value)


def show_published(study: Study) -> None:
    """The barrier between published trainings against the training step; a note without any."""
    if not study.trainings:
        page.text(
            "*No published training is at hand on this page.* To see one here, put checkpoints of "
            "two seeds on the disk, `DIR/seed1/step0`, `DIR/seed1/step1000`, …, `DIR/seed2/step0`, "
            "…, each a folder of `transformers` with its `tokenizer.json` (PolyPythias: `hf "
            "download EleutherAI/pythia-14m-seed1 --revision step1000 --local-dir "
            "DIR/seed1/step1000`), and run the page with `-p published DIR`."
        )
        return
    steps = sorted({step for found in study.published for step in found})
    series = {
        WAYS[way]: {
            step: _bare(v)
            for step in steps
            if (
                v := over_pairs(
                    f[step][way].height("test", "loss") for f in study.published if step in f
                )
            )
        }
        for way in ALONG
    }
    fig, (ax,) = plots.grid(1, columns=1, width=7.6, height=4.0)
    drawn = plots.against_k(
        ax,
        series,
        steps=steps[-1],
        threshold=STABLE,
        meaning="nats: our line",
        xlabel="training step (log axis, 0 set apart), and its share",
        ylabel="test loss barrier (nats a token)",
    )
    every = -(-len(steps) // 12)  # labels; a published training has many steps
    names = [tick.get_text() for tick in ax.get_xticklabels()]
    ax.set_xticks(ax.get_xticks()[::every], names[::every])
    last = {name: found[steps[-1]] for name, found in series.items() if steps[-1] in found}
    values = {
        "trainings": ", ".join(p.name for p in study.trainings),
        "pairs": len(study.published),
        "text": study.published_text,
        "steps": len(steps),
        "barriers": listed(last, missing=NONE),
    }
    figures.publish(fig, "gpt-published", data=drawn, values=values)


def _each(words: Mapping[str, str]) -> str:
    """Kind of pair -> what is said of it, in one sentence; kinds without anything are left out."""
    return "; ".join(f"{PAIRS[kind]}: {text}" for kind, text in words.items() if text) or NONE


def show_heatmap(study: Study) -> None:
    """Barriers of the whole network and of every block while it trains."""
    found = maps(study)
    fig, axes = plots.grid(2, height=1.36 + 0.36 * len(study.blocks), sharey=True)
    plots.heat(axes, found, list(study.looks), label="test loss barrier (nats)")
    words = {}
    for ax, (kind, rows) in zip(axes, found.items(), strict=True):
        ax.set(title=PAIRS[kind], xlabel=f"training step (of {study.steps})")
        (_, whole), *each = [(name, values[-1]) for name, values in rows.items()]
        value, name = max((value, name) for name, value in each)
        words[kind] = (
            f"whole network {said(whole)}, largest of the blocks {name} with {said(value)}"
        )
    drawn = {"T": study.steps, "steps": study.looks, **found}
    figures.publish(fig, "gpt-heatmap", data=drawn, values={"at_the_end": _each(words)})


def show_parts(study: Study) -> None:
    """A dot for each part of a block and pair, the least it can show, and the whole network."""
    count = len(study.parts["same"][0].groups)
    fig, axes = plots.grid(2, height=1.4 + 0.22 * count, sharey=True)
    drawn: dict[str, Any] = {}
    words: dict[str, str] = {}
    floors: list[str] = []
    for ax, (kind, results) in zip(axes, study.parts.items(), strict=True):
        ax.set_title(PAIRS[kind])
        if not (good := valid(results)):
            continue
        named = [{study.short(k): v for k, v in one.worst().items()} for one in good]
        drawn[kind] = plots.dots(ax, named, heights(good), xlabel="test loss barrier (nats)")
        least = [floor(one) for one in good]
        drawn[kind] |= {"defaults": [one.heights("single") for one in good], "floors": least}
        for number, value in enumerate(least):
            ax.axvline(value, color=f"C{number % 7}", linestyle=":", linewidth=1)
        tops = [largest(one) for one in good]
        words[kind] = ", ".join(f"{study.short(label)} {said(top)}" for label, top, _ in tops)
        floors += map(said, least)
    plots.legend(fig, study.inits)
    values = {"largest": _each(words), "floors": ", ".join(floors) or NONE}
    figures.publish(fig, "gpt-parts", data=drawn, values=values)


def show_groups(study: Study) -> None:
    """Barriers of more and more groups from either end, and of windows of neighbours."""
    first = [study.short(label).partition(" =")[0] for label in study.blocks]
    first = first[: len(first) - study.neighbours + 1]
    numbers, places = range(1, len(study.blocks) + 1), range(1, len(first) + 1)
    fig, axes = plots.grid(2, height=4.2, sharey=True)
    drawn: dict[str, Any] = {}
    words: dict[str, str] = {}
    for shift, (kind, results) in enumerate(study.groups.items()):
        for name, said_so, of, x, ax, colour in (
            ("first", "the first n", "shallow", numbers, axes[0], 0),
            ("last", "the last n", "deep", numbers, axes[0], 1),
            ("windows", "neighbours", "window", places, axes[1], 0),
        ):
            if curves := [list(one.worst(of, "test").values()) for one in valid(results)]:
                label = f"{said_so}, {PAIRS[kind]}"
                found = plots.band(ax, list(x), curves, label, colour + 2 * shift)
                drawn.setdefault(kind, {})[name] = found
        if kind in drawn:  # the windows come last
            top = int(np.argmax(found["mean"]))
            words[kind] = f"{first[top]} and what follows, {said(float(found['mean'][top]))}"
    for ax in axes:
        ax.axhline(0, color="#555555", linewidth=0.6)
        if drawn:
            ax.legend(fontsize=8)
    axes[0].set(xlabel="number of groups averaged, n", ylabel="test loss barrier (nats)")
    axes[1].set_xticks(list(places), first, rotation=30, ha="right")
    axes[1].set_xlabel(f"first of {study.neighbours} neighbouring groups")
    off = [  # all groups together are the whole network
        abs(row.half("test", "loss") - one.select("full")[0].half("test", "loss"))
        for results in study.groups.values()
        for one in results
        for row in (*one.select("shallow"), *one.select("deep"))
        if len(row.groups) == len(one.groups)
    ]
    values = {"peaks": _each(words), "identity": f"{max(off):.1e}"}
    figures.publish(fig, "gpt-groups", data=drawn, values=values)


def show_features(study: Study) -> None:
    """How linearly the residual stream is connected, after each block."""
    fig, (ax,) = plots.grid(1, columns=1, width=7.6, height=4.0)
    at = list(range(len(study.places)))
    drawn: dict[str, Any] = {"places": [study.short(p) for p in study.places]}
    for number, (name, pairs) in enumerate(ratios(study).items()):
        if good := [one for one in pairs if one]:
            drawn[name] = plots.band(ax, at, good, name, number)
    named = ["logits" if p == OUTPUT else study.short(p) for p in study.places]
    ax.set_xticks(at, named, rotation=30, ha="right")
    ax.axhline(1, color="#555555", linewidth=0.6)
    ax.set(ylabel="gap at the middle / baseline", yscale="log", xlabel="residual stream after")
    if len(drawn) > 1:
        ax.legend()
    looked = min(study.windows, 32, len(study.text.test))
    values = {
        "positions": f"{looked * (study.text.test.window or 0):,}",
        "medians": listed({f"{n}:": v for n, v in typical(study).items()}, missing=NONE),
    }
    figures.publish(fig, "gpt-features", data=drawn, values=values)


# ---- records


def _drawn(record: Record, figure: str) -> Any:
    return record.data["figures"][figure]["data"]


def show_recorded(found: Sequence[Record]) -> None:
    """The heat map of every record that has it; nothing without one."""
    held = [r for r in found if "gpt-heatmap" in r.data["figures"]]
    if not held:
        return
    drawn = {r.name: _drawn(r, "gpt-heatmap") for r in held}
    panels = {
        f"{r.name}: {PAIRS[kind]}\n{r.dataset}, {r.data['date']}": (drawn[r.name], kind)
        for r in held
        for kind in PAIRS
    }
    fig, axes = plots.grid(len(panels), height=4.2)
    rows = {title: one[kind] for title, (one, kind) in panels.items()}
    steps = {title: one["steps"] for title, (one, _) in panels.items()}
    plots.heat(axes, rows, steps, label="test loss barrier (nats)")
    for ax, title in zip(axes, panels, strict=True):
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("training step")
    ends = {
        r.title: " and ".join(
            f"{said(drawn[r.name][kind]['whole network'][-1])} nats ({title})"
            for kind, title in PAIRS.items()
        )
        for r in held
    }
    values = {
        "titles": " ".join(f"{title}." for title in ends),
        "ends": "; ".join(f"{title}: whole network {text}" for title, text in ends.items()),
    }
    figures.publish(fig, "gpt-recorded", data=drawn, values=values)


# ---- sentences that depend on the outcome, and numbers of the prose


def stream_sentence(study: Study) -> str:
    """Whether permuting the stream helps."""
    found = left(study)
    if not {"units", "weights"} <= found.keys():
        return "This run cannot say whether permuting the stream, too, helps."
    helps = "helps" if found["weights"].value < found["units"].value else "does not help"
    return f"Permuting the stream as well {helps} here: it leaves {said(found['weights'])} nats."


def embedding_sentence(study: Study) -> str:
    """Whether a single group costs more than averaging everything."""
    good = valid(study.groups["different"])
    if not good:
        return "This run has no valid pair to say it of."
    tops = [largest(one) for one in good]
    named = ", ".join(dict.fromkeys(study.short(label) for label, _, _ in tops))
    named = named.replace("embedding = output", "the embedding (also the output)")
    if np.mean([share for _, _, share in tops]) <= 1:
        return f"No group alone costs as much as the whole; the largest is that of {named}."
    alone, whole = over_pairs(value for _, value, _ in tops), over_pairs(heights(good))
    return (
        f"Averaging nothing but {named} costs {said(alone)} nats, more than averaging everything "
        f"({said(whole)})."
    )


def features_sentence(study: Study) -> str:
    """What the features of early and late forks say beside their barriers."""
    found, forks = typical(study), fork_barriers(study)
    late, first, _ = study.conditions
    if not {late, first} <= found.keys():
        return "This run lacks a valid pair of one of the two kinds."
    return (
        f"Copies that fork at step 0 reach {said(found[first])}, with a barrier of "
        f"{said(forks.get(0), missing=NONE)} nats; those that fork at step {study.last} reach "
        f"{said(found[late])}, with {said(forks.get(study.last), missing=NONE)}."
    )


def values(study: Study) -> Values:
    """The numbers and sentences of the chapter's prose that the results say."""
    forks, found, near = fork_barriers(study), left(study), left(study, nearer)
    loss = float(np.mean(_ends(study, "loss")))
    above = [
        abs(value - floor(one))
        for results in study.parts.values()
        for one in valid(results)
        for value in one.worst().values()
    ]
    first = next(label for label in study.blocks if label.startswith("transformer.h."))
    same, different = study.groups["same"], study.groups["different"]
    start = forks.get(0)
    numbers: dict[str, float | Interval | None] = {
        "loss": loss,
        "first_k": start,
        "factor": math.exp(start.value) if start else None,
        "whole_same": over_pairs(heights(study.modules["same"])),
        "whole_different": over_pairs(heights(study.modules["different"])),
        "embedding_same": of_group(same, EMBEDDING),
        "embedding_different": of_group(different, EMBEDDING),
        "first_block": of_group(different, first),
        **{f"twins_{way}": interval(r, height) for way, r in study.turned_twins.items()},
        **{f"left_{way.replace('-', '_')}": found.get(way) for way in WAYS},
    }
    return {
        **{name: said(value, missing=NONE) for name, value in numbers.items()},
        "choices": f"{math.exp(loss):.0f}",
        "late_k": said(forks.get(study.last), "{:.3f}", NONE),
        "near_units": said(near.get("units"), "{:.0%}", NONE),
        "near_rotated": said(near.get("rotated"), "{:.0%}", NONE),
        "dots": len(above),
        "dots_near": sum(v <= NEAR for v in above),
        "stream_sentence": stream_sentence(study),
        "embedding_sentence": embedding_sentence(study),
        "features_sentence": features_sentence(study),
    }


def record_values(found: Sequence[Record], name: str = "cpu-wikitext2") -> Values:
    """What the prose says of a record, or that it has no such number."""
    numbers: dict[str, float | None] = {}
    for record in found:
        if record.name == name:
            barriers = _drawn(record, "gpt-matching")["barriers"]
            blocks = _drawn(record, "gpt-heatmap")["different"]
            forks = _drawn(record, "gpt-instability")["k"]["test"]
            numbers = {way: barriers.get(title, {}).get("mean") for way, title in WAYS.items()}
            numbers |= {"embedding": blocks.get("embedding = output", [None])[-1]}
            numbers |= {"first": forks["mean"][0]}
    told = ("naive", "units", "weights", "rotated", "embedding", "first")
    return {f"record_{key}": said(numbers.get(key), missing="not recorded") for key in told}
