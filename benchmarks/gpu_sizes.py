"""How long the records of a GPU's few minutes may train, from the speed that was just measured.

A record that does not reach its end is worth little, so each is sized to its slot: the number of
training steps T is what fits with a factor of two to spare. Everything here is arithmetic on plain
values: no torch, nothing is run. What is recorded is the table :data:`DESIGNS`.

Words: *M* networks of one recipe train side by side; a *step* here is one step of all M of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import comb
from typing import Any

SPARE = 2.0
"""A record has to be done in this fraction (one over it) of the time that its slot leaves."""
START_S = 20.0
"""Imports, the device's context, data, captured steps: what each record pays before it trains."""
GAIN = 1.25
"""Another engine than `auto`'s own choice has to reach this many times its T to be taken."""

AUTO = {"lenet": "vmap", "resnet20": "graphs", "vgg16": "graphs", "gpt": "loop"}
"""What `--gpu-engine auto` trains the benchmark's networks with."""


@dataclass(frozen=True)
class Rate:
    """Seconds of one step of M networks together, and seconds until the first step."""

    step_s: float
    ready_s: float = 0.0


@dataclass(frozen=True)
class Speeds:
    """What a device does in a second, as measured, or as estimated beforehand.

    Arguments:
        rates: (network, engine) -> M -> rate.
        failed: (network, engine) that raised an error; they are not chosen.
        image_s: network -> seconds to evaluate one image at one point of a line.
        again_s: the same to re-estimate BatchNorm's statistics from one image.
        measured: whether any of it comes from this device.
    """

    rates: Mapping[tuple[str, str], Mapping[int, Rate]]
    image_s: Mapping[str, float]
    again_s: Mapping[str, float] = field(default_factory=dict)
    failed: frozenset[tuple[str, str]] = frozenset()
    measured: bool = False

    def step_s(self, net: str, engine: str, copies: int) -> float | None:
        """Seconds of one step of ``copies`` networks; None if nothing is known of that engine.

        Between two numbers that were measured: on the straight line between them, but with vmap,
        which pads its groups, as long as the larger one. Beyond the largest, as if one group ran
        after the other.
        """
        known = self.rates.get((net, engine))
        if not known or (net, engine) in self.failed:
            return None
        larger = [m for m in known if m >= copies]
        if larger:
            above = min(larger)
            smaller = [m for m in known if m < copies]
            if engine == "vmap" or not smaller:
                return known[above].step_s
            below = max(smaller)
            share = (copies - below) / (above - below)
            return (1 - share) * known[below].step_s + share * known[above].step_s
        most = max(known)
        return known[most].step_s * copies / most

    def ready_s(self, net: str, engine: str) -> float:
        """Seconds until the first step: capturing, or compiling."""
        return max((r.ready_s for r in self.rates.get((net, engine), {}).values()), default=0.0)


# Estimated before anything ran on a GPU. Only what `auto` uses: nothing is known of the others.
GUESS = Speeds(
    rates={
        ("lenet", "vmap"): {1: Rate(0.25e-3), 9: Rate(0.35e-3), 27: Rate(0.6e-3)},
        ("resnet20", "graphs"): {1: Rate(1.2e-3), 4: Rate(2.3e-3), 9: Rate(3e-3), 27: Rate(8e-3)},
        ("vgg16", "graphs"): {1: Rate(2.5e-3), 9: Rate(12e-3), 27: Rate(36e-3)},
        ("gpt", "loop"): {1: Rate(34e-3)},
    },
    image_s={"lenet": 0.2e-6, "resnet20": 3e-6, "vgg16": 20e-6, "gpt": 300e-6},
    again_s={"resnet20": 3e-6, "vgg16": 20e-6},
)


def speeds(document: Mapping[str, Any] | None) -> Speeds:
    """The measured speeds, from what ``engine.py`` and ``pair_cost.py`` wrote.

    A network of which nothing was measured keeps its estimate; one of which something was has only
    what was measured.
    """
    if document is None:
        return GUESS
    rates: dict[tuple[str, str], dict[int, Rate]] = {}
    failed = set()
    for row in document.get("rows", []):
        which = (str(row["net"]), str(row["engine"]))
        if "error" in row or not row.get("finite", True):
            failed.add(which)
        elif row.get("deterministic", True) and row.get("steps_per_second_each"):
            # One replica after the other: a step of M of them takes M times as long.
            one_by_one = which[1].startswith("loop")
            count = 1 if one_by_one else int(row["replicas"])
            rate = Rate(1 / float(row["steps_per_second_each"]), float(row.get("ready_s", 0)))
            rates.setdefault(which, {})[count] = rate
    # An engine that trains 9 at once and fails at 27 is still an engine.
    failed -= set(rates)
    seen = {net for net, _ in (*rates, *failed)}
    guessed = {which: found for which, found in GUESS.rates.items() if which[0] not in seen}
    costs = document.get("pairs", {}).items()
    image_s = {net: float(cost["image_s"]) for net, cost in costs}
    again_s = {net: float(cost["reestimated_image_s"]) for net, cost in costs}
    return Speeds(
        rates={**guessed, **rates},
        image_s={**GUESS.image_s, **image_s},
        again_s={**GUESS.again_s, **again_s},
        failed=frozenset(failed),
        measured=bool(rates),
    )


@dataclass(frozen=True)
class Load:
    """What a record trains of one network.

    Arguments:
        net: the network of the engine's benchmark that it is like.
        copies: M, how many train at once.
        rounds: how many such groups train for all T steps, one after the other.
        cost: seconds of a step as a multiple of the benchmark's network.
    """

    net: str
    copies: int
    rounds: float
    cost: float = 1.0


@dataclass(frozen=True)
class Pairs:
    """What a record measures on lines between networks.

    Arguments:
        net: as in :class:`Load`; count: pairs; points: of a line.
        images: evaluated at each point, train and test together.
        modes: ways to treat BatchNorm, each a line of its own; 1 without BatchNorm.
        reestimated: images from which statistics are estimated anew at each point of one mode.
        point_s: seconds that a point costs however few images it has.
    """

    net: str
    count: int
    points: int
    images: int
    modes: int = 1
    reestimated: int = 0
    point_s: float = 0.005

    def seconds(self, known: Speeds) -> float:
        """All of them together."""
        point = self.modes * (self.images * known.image_s[self.net] + self.point_s)
        point += self.reestimated * known.again_s.get(self.net, 0.0)
        return self.count * self.points * point


@dataclass(frozen=True)
class Design:
    """One record: what it runs, and what that costs.

    Arguments:
        stage: its name in the table.
        chapter, profile, name: of ``companion record``.
        settings: ``NAME=VALUE`` beside T and the fork steps.
        engines: that may train all of it instead of `auto`, if they are clearly faster.
        least, most: bounds of T; below the first it is left out.
        shares: fork steps as shares of T; none: the chapter's own.
        limit_s: its slot; least_s: in a shorter one it is not begun.
        fixed_s: what is neither a step nor a pair, such as matching.
        tiny: settings that make it so small that only its running counts, beside ``settings``.
    """

    stage: str
    chapter: str
    profile: str
    name: str
    settings: tuple[str, ...]
    loads: tuple[Load, ...]
    pairs: tuple[Pairs, ...]
    least: int
    most: int
    limit_s: float
    shares: tuple[float, ...] = ()
    # Not vmap, whose grouped convolutions are measured in float32; perceptrons get it from `auto`.
    engines: tuple[str, ...] = ("graphs", "compile", "loop-compile", "loop")
    fixed_s: float = 0.0
    least_s: float = 45.0
    tiny: tuple[str, ...] = ()

    @property
    def trial(self) -> Trial:
        """The record with its ``tiny`` settings."""
        merged = dict(setting.split("=", 1) for setting in (*self.settings, *self.tiny))
        return Trial(
            self.stage, self.chapter, self.profile, tuple(f"{k}={v}" for k, v in merged.items())
        )


@dataclass(frozen=True)
class Trial:
    """A record that only has to run, or with ``dry`` to be prepared."""

    stage: str
    chapter: str
    profile: str
    settings: tuple[str, ...]
    dry: bool = False


@dataclass(frozen=True)
class Sized:
    """A design with its T: the settings for ``-p``, the engine (None: auto), seconds expected."""

    steps: int
    settings: tuple[str, ...]
    engine: str | None
    expected_s: float
    measured: bool = False


def sensible(steps: float) -> int:
    """A round number of steps that is not larger."""
    for above, unit in ((10_000, 1000), (3000, 500), (500, 100), (100, 50), (1, 10)):
        if steps >= above:
            return int(steps // unit * unit)
    return 0


def seconds(design: Design, known: Speeds, engine: str | None) -> tuple[float, float] | None:
    """Seconds a step, and seconds besides, of a whole design; None if a speed is not known."""
    each = besides = 0.0
    for load in design.loads:
        which = engine or AUTO[load.net]
        step = known.step_s(load.net, which, load.copies)
        if step is None:
            return None
        each += step * load.cost * load.rounds
        besides += known.ready_s(load.net, which)
    besides += design.fixed_s + sum(p.seconds(known) for p in design.pairs)
    return each, besides


def size(design: Design, slot_s: float, known: Speeds, choose: bool = False) -> Sized | None:
    """The largest T whose record ends in its slot with a factor of two to spare.

    Arguments:
        design: what to record; slot_s: seconds that it gets, its start included.
        known: speeds; choose: whether another engine than `auto` can be asked for.

    Returns:
        None if even the least T does not fit.
    """
    margin = min(20.0, slot_s / 10)  # `companion record` stops this long before its limit
    free = (slot_s - margin - START_S) / SPARE
    found: list[Sized] = []
    for engine in (None, *(design.engines if choose else ())):
        costs = seconds(design, known, engine)
        if costs is None:
            continue
        each, besides = costs
        steps = sensible(min(design.most, (free - besides) / each))
        if steps < design.least:
            continue
        chosen = [*design.settings, f"steps={steps}"]
        if design.shares:
            forks = sorted({round(steps * share) for share in design.shares})
            chosen.append(f"ks=[{','.join(map(str, forks))}]")
        took = START_S + besides + steps * each
        found.append(Sized(steps, tuple(chosen), engine, round(took, 1), known.measured))
    if not found:
        return None
    best = max(found, key=lambda s: s.steps)
    own = next((s for s in found if s.engine is None), None)
    return best if own is None or best.steps >= GAIN * own.steps else own


# ---- what is recorded

TRAIN_EXAMPLES, TEST_EXAMPLES = 2000, 5000
"""Images that stand for the splits on a line, where a chapter asks how many."""
POINTS, LOOKS = 11, 3
TRAINED = 60
"""Percent of error below which a network of a much shortened schedule counts as trained."""
REESTIMATED = 2000
"""Images that BatchNorm's statistics are re-estimated from (``companion.connectivity``)."""


def instability(
    noisy: str,
    forks: int,
    inits: int,
    copies: int,
    *,
    norm: bool = False,
    controls: bool = False,
    kinds: int = 0,
    images: int = TRAIN_EXAMPLES + TEST_EXAMPLES,
) -> tuple[tuple[Load, ...], tuple[Pairs, ...]]:
    """What chapter 1 trains and measures: Algorithm 1 on two networks, and what belongs to it.

    Arguments:
        noisy: the unstable network; the stable one is LeNet, at three fork steps.
        forks: number of fork steps; inits, copies: of each.
        norm: whether the unstable network has BatchNorm.
        controls: the restarted schedule, the smaller learning rate, and ``kinds`` of noise alone.
        images: evaluated at each point of a line.
    """
    each = inits * comb(copies, 2)
    # A round is what trains at once: the copies of a fork step, then independent networks. One
    # more for trunks and the null control, which train in small groups.
    rounds, count = forks + 2, forks * each + max(inits, 2) + 2 * LOOKS * inits
    if controls:  # at each fork step but the first, at the first, and at the first for each kind
        rounds, count = rounds + forks + kinds, count + (forks + kinds) * each
    loads = (Load(noisy, inits * copies, rounds), Load("lenet", inits * copies, 3 + 1))
    modes, again = (3, REESTIMATED) if norm else (1, 0)
    return loads, (
        Pairs(noisy, count, POINTS, images, modes, again),
        Pairs("lenet", 3 * each, POINTS, images),
    )


_HEADS = (f"train_examples={TRAIN_EXAMPLES}", f"test_examples={TEST_EXAMPLES}")
_MEASURED = (f"points={POINTS}", f"looks={LOOKS}", *_HEADS)
_CIFAR = instability("resnet20", 4, 3, 2, norm=True, images=1000 + 3000)
_MNIST = instability("lenet", 4, 3, 3, controls=True)

DESIGNS = (
    Design(
        stage="01 ResNet-20",
        chapter="01_instability",
        profile="gpu",
        name="gpu-cifar10-jpeg",
        settings=(
            "dataset=cifar10-jpeg",
            "inits=3",
            "copies=2",
            "controls=false",
            # All three modes are measured; the headline is that of the other records.
            "bn=interpolate",
            # A line of a ResNet, in three modes, costs more than the networks at its ends.
            f"points={POINTS}",
            f"looks={LOOKS}",
            "train_examples=1000",
            "test_examples=3000",
            f"max_error={TRAINED}",
        ),
        loads=_CIFAR[0],
        pairs=_CIFAR[1],
        least=1500,
        # At 160 s of training others still find room beside it in ten minutes.
        most=3500,
        fixed_s=12,  # pictures are decoded once
        shares=(0, 0.01, 0.03, 0.1),
        limit_s=570,
        tiny=(
            "steps=60",
            "ks=[0,20]",
            "inits=2",
            "points=3",
            "looks=2",
            "train_examples=500",
            "test_examples=500",
        ),
    ),
    Design(
        stage="01 MNIST",
        chapter="01_instability",
        profile="paper-mnist",
        name="gpu-mnist",
        settings=_MEASURED,
        loads=_MNIST[0],
        pairs=_MNIST[1],
        # The paper's length is the point of it: rather none than a short one.
        least=12_000,
        most=24_000,
        shares=(0, 1 / 240, 1 / 48, 1 / 12),
        limit_s=300,
        tiny=(
            "steps=200",
            "ks=[0,20]",
            "inits=2",
            "copies=2",
            "points=3",
            "looks=2",
            "train_examples=500",
            "test_examples=500",
        ),
    ),
    Design(
        stage="03 MNIST",
        chapter="03_llfc",
        profile="paper-mnist",
        name="gpu-mnist",
        settings=("widths=[128,256]", "pairs=3"),
        # Three widths of one perceptron, and copies that part at four fork steps.
        loads=(Load("lenet", 6, 6, 1.5),),
        pairs=(Pairs("lenet", 40, 9, 20_000),),
        least=6000,
        most=30_000,
        shares=(0, 0.01, 0.1),
        limit_s=260,
        fixed_s=10,
        tiny=("steps=100", "ks=[0,20]", "widths=[32]", "pairs=2"),
    ),
    Design(
        stage="02 MNIST",
        chapter="02_git_rebasin",
        profile="paper-mnist",
        name="gpu-mnist",
        # The paper's recipe and length; what needs many more networks is left out.
        settings=(
            "widths=[64,128,256]",
            "wide_decay=0",
            "map_pairs=0",
            "ste_steps=0",
            f"points={POINTS}",
            "train_examples=10000",
        ),
        # Batches of 500 instead of 60. Ten networks of each width, and five copies half as long.
        loads=(Load("lenet", 10, 1.5, 5), Load("lenet", 10, 3, 1.5)),
        pairs=(Pairs("lenet", 120, POINTS, 60_000),),
        least=12_000,
        most=12_000,
        limit_s=330,
        fixed_s=20,
        tiny=(
            "steps=100",
            "looks=[10]",
            "width=64",
            "widths=[32]",
            "pairs=2",
            "points=3",
            "train_examples=500",
            "test_examples=500",
        ),
    ),
    Design(
        stage="05 GPT",
        chapter="05_gpt",
        profile="gpu",
        name="gpu-wikitext2",
        settings=(
            "net=gpt:layers=6,width=384,heads=6,bias=false,dropout=0.2",
            "windows=96",
            "train_windows=24",
        ),
        # The benchmark's network has ten times the weights; this one is bound by launches.
        loads=(Load("gpt", 1, 9, 0.25),),
        pairs=(Pairs("gpt", 60, 11, 20),),
        least=300,
        most=1500,
        shares=(0, 1 / 8, 3 / 8),
        # It has dropout, and with dropout only a loop trains.
        engines=("loop-compile",),
        limit_s=240,
        tiny=(
            "steps=24",
            "ks=[0,6]",
            "windows=8",
            "train_windows=4",
            "max_error=100",
            "net=gpt:layers=2,width=64,heads=2,bias=false,dropout=0.2",
        ),
    ),
    Design(
        stage="04 ResNet-18",
        chapter="04_layerwise",
        profile="gpu",
        name="gpu-cifar10-jpeg",
        # Half the width: all layers of the full one are evaluated longer than a slot lasts.
        settings=(
            "dataset=cifar10-jpeg",
            "net=resnet18:width=32",
            "plain=vgg11:norm=none,width=32",
            "inits=2",
            "looks=3",
            "draws=1",
            *_HEADS,
            f"max_error={TRAINED}",
        ),
        # Batches of 64 for both networks, of 256 for the gentle recipe.
        loads=(Load("vgg16", 4, 1, 0.45), Load("vgg16", 4, 1, 1.2)),
        pairs=(Pairs("vgg16", 450, 1, 2500),),
        least=600,
        most=23_000,
        limit_s=300,
        fixed_s=8,
        tiny=(
            "steps=40",
            "net=resnet18:width=8",
            "plain=vgg11:norm=none,width=8",
            "looks=2",
            "max_error=100",
            "lr=0.01",
            "train_examples=500",
            "test_examples=500",
        ),
    ),
    Design(
        stage="02 ResNet-20 LayerNorm",
        chapter="02_git_rebasin",
        profile="gpu",
        name="gpu-cifar10-jpeg",
        settings=(
            "dataset=cifar10-jpeg",
            "width=64",
            "widths=[16]",
            f"points={POINTS}",
            *_HEADS,
            f"max_error={TRAINED}",
        ),
        # LayerNorm over channels costs more than BatchNorm; 4 times the width, 16 times the work.
        loads=(Load("resnet20", 6, 1, 1.5), Load("vgg16", 6, 1, 2.5)),
        # Three pairs, each by four methods; 1.5 times VGG-16's evaluation.
        pairs=(Pairs("resnet20", 12, POINTS, 7000), Pairs("vgg16", 12, POINTS, 10_500)),
        least=1200,
        most=12_000,
        limit_s=300,
        fixed_s=8,
        tiny=(
            "steps=60",
            "points=3",
            "width=16",
            "widths=[8]",
            "pairs=2",
            "train_examples=500",
            "test_examples=500",
        ),
    ),
)
"""The records, the most valuable first."""

SLOW = 300.0
"""Seconds that a stage of a rehearsal may take: it has to end on a machine that is busy, too."""

TINY = (
    Design(
        stage="01 digits",
        chapter="01_instability",
        profile="quick",
        name="rehearsal",
        settings=(
            "unstable=mlp:widths=8",
            "stable=mlp:widths=4x2",
            "inits=2",
            "copies=2",
            "controls=false",
            "points=5",
            "looks=2",
            "train_examples=50",
            "test_examples=50",
            "device=cpu",
            "workers=1",
        ),
        loads=(Load("lenet", 4, 12),),
        pairs=(Pairs("lenet", 20, 5, 100),),
        least=20,
        most=40,
        shares=(0, 0.25),
        limit_s=SLOW,
        least_s=10,
    ),
    Design(
        stage="02 digits",
        chapter="02_git_rebasin",
        profile="quick",
        name="rehearsal",
        settings=(
            "net=mlp:widths={width}x2",
            "width=16",
            "widths=[4,8]",
            "pairs=2",
            "wide_decay=0",
            "map_pairs=0",
            "ste_steps=0",
            "points=3",
            "train_examples=50",
            "test_examples=50",
            "device=cpu",
            "workers=1",
        ),
        loads=(Load("lenet", 4, 3),),
        pairs=(Pairs("lenet", 20, 3, 100),),
        least=20,
        most=40,
        limit_s=SLOW,
        least_s=10,
    ),
)
"""The same on a CPU, so small that only its running counts."""

TRIALS = (
    Trial(
        "03_llfc",
        "03_llfc",
        "quick",
        (
            *("net=mlp:widths={width}x2", "width=8", "widths=[4]", "spawned=[]"),
            *("steps=20", "device=cpu", "workers=1"),
        ),
        dry=True,
    ),
)
"""For the rehearsal: prepared up to the point where they would begin to train."""
