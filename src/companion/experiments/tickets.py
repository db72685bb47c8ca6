"""Lottery tickets over stored runs: iterative magnitude pruning with rewinding, and its controls.

Algorithm 2 of Frankle et al. 2020: train W_0 to W_k and on to W_T; prune the 20 % of the weights
with the lowest magnitudes; rewind the others to W_k, train them, and again. Level n is what is left
after n rounds, level 0 the dense network. Every subnetwork is a run under a mask that names how it
was made, so copies of it are forked, trained and compared like those of any other network, and
round 9 after round 6 trains three more. What the next level is pruned from has the same SGD noise
at every level, as in open_lth, so barriers along a chain are those of pruning alone. ::

    search = Search(recipe=recipe, ks=(0, 100), levels=(0, 3, 6, 9), kinds=("imp", "random"))
    found = find_tickets(search)
    found.error("imp", 9, 100), found.matching("imp", 9, 100), found.stable("imp", 9, 100)

Explained in our chapter on lottery tickets.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Unpack

import torch

from companion import data as datasets
from companion.connectivity import gates
from companion.connectivity.gates import Gate
from companion.core import closing, codec
from companion.core.errors import BadParameter, one_of, whole
from companion.core.masks import Mask, alive, masked
from companion.core.runs import Store
from companion.core.seeds import Key
from companion.core.stats import Interval, clustered
from companion.data import Dataset
from companion.experiments import measurement
from companion.experiments.budget import Plan
from companion.experiments.instability import (
    Instability,
    Sample,
    check_design,
    copy,
    trunk,
)
from companion.experiments.measurement import Json, Measurement, Where, key_of
from companion.experiments.methods import Method, match, weights_of
from companion.experiments.pairs import (
    Evaluation,
    NullControl,
    Pair,
    PairBarrier,
    PairResult,
    check_noise,
    check_null,
    measure_pairs,
)
from companion.tickets import (
    Pruning,
    carry,
    magnitude,
    prunable,
    prune,
    random_like,
    snip,
    synflow,
)
from companion.tickets.masks import whole as whole_mask
from companion.training import Job, MaskRecipe, Recipe, Run, build, load_mask, load_weights

CONTROLS = ("one-shot", "random", "reinit", "permuted", "magnitude", "snip", "synflow")
"""What IMP is compared with, at the same density and the same k.

``one-shot``: one round from the dense network to the density of the level. ``random``: a random
mask with as many weights in each tensor as IMP leaves there. ``reinit``: IMP's mask on a new
initialisation. ``permuted``: that mask carried to the new initialisation by the permutation that
matches the two dense networks (Adnan et al. 2025). ``magnitude``, ``snip``, ``synflow``: one pass
at W_k, before any training if k is 0."""

KINDS = ("imp", *CONTROLS)
"""Kinds of subnetworks: IMP's own, and :data:`CONTROLS`."""

PAPERS = Pruning()
"""20 % a round of all weights together, as the paper prunes."""

WEIGHTS = Method("weights")
"""How the two dense networks of ``permuted`` are matched."""

SYNFLOW_STEPS = 100
"""Small steps in which SynFlow prunes to its density (Tanaka et al. 2020)."""

SNIP_EXAMPLES = 100
"""Training examples that SNIP looks at: ten a class of ten classes, as Lee et al. 2019 do."""


# ---- how masks are made


@dataclass(frozen=True)
class Pruned(MaskRecipe):
    """A trained network's weights of lowest magnitude gone: a round of IMP, or one shot.

    Arguments:
        run: trained to T, dense or under the mask before this one.
        pruning: scope, and what is left alone.
        density: share of the weights that is left.
    """

    RULE = "pruned"

    run: Run
    pruning: Pruning
    density: float

    def details(self, fingerprint: str, device: str) -> Json:
        return {
            "run": self.run.key(fingerprint, device),
            "scope": self.pruning.scope,
            "skip": list(self.pruning.skip),
        }

    def jobs(self) -> list[Job]:
        return [Job(self.run, weights=(self.run.last_step,))]

    def make(self, data: Dataset, store: Store) -> Mask:
        device = str(data.train.x.device)
        theta = load_weights(self.run, store=store, device=device)
        before = _mask_before(self.run, self.pruning, theta, data, store)
        score = magnitude(theta, list(before))
        return prune(score, before, self.density, self.pruning.scope)


def _mask_before(
    run: Run, pruning: Pruning, theta: Mapping[str, torch.Tensor], data: Dataset, store: Store
) -> Mask:
    if run.mask is not None:
        return load_mask(run.mask, store=store, device=str(data.train.x.device))
    names = prunable(build(run, data, torch.device("cpu")), pruning.skip)
    return whole_mask(names, theta)


@dataclass(frozen=True)
class Shuffled(MaskRecipe):
    """A random mask that keeps as many weights of each tensor as another one.

    Arguments:
        of: the other one.
        density: its density.
        label: of the random choice.
    """

    RULE = "random"

    of: MaskRecipe
    density: float
    label: int | str

    def details(self, fingerprint: str, device: str) -> Json:
        of = self.of.key(fingerprint, device)
        return {"of": of, "label": self.label}

    def jobs(self) -> list[Job]:
        return self.of.jobs()

    def make(self, data: Dataset, store: Store) -> Mask:
        of = load_mask(self.of, store=store, device=str(data.train.x.device))
        return random_like(of, Key("random mask", self.label))


@dataclass(frozen=True)
class Carried(MaskRecipe):
    """A mask carried to another network by the permutation that matches the two dense networks.

    Arguments:
        of: the mask.
        density: its density.
        source: the dense network that it was found in.
        target: the dense network that it is carried to.
        method: of matching.
    """

    RULE = "carried"
    SEMANTICS = 2  # since 2, weight matching begins with auctions

    of: MaskRecipe
    density: float
    source: Run
    target: Run
    method: Method = WEIGHTS

    def details(self, fingerprint: str, device: str) -> Json:
        return {
            "of": self.of.key(fingerprint, device),
            "source": self.source.key(fingerprint, device),
            "target": self.target.key(fingerprint, device),
            "method": self.method.identity(),
        }

    def jobs(self) -> list[Job]:
        dense = (self.source, self.target)
        return [*self.of.jobs(), *(Job(run, weights=(run.last_step,)) for run in dense)]

    def make(self, data: Dataset, store: Store) -> Mask:
        device = str(data.train.x.device)
        of = load_mask(self.of, store=store, device=device)
        here, there = (
            weights_of(run, run.last_step, store, device) for run in (self.target, self.source)
        )
        found = match(self.method, build(self.target, data, data.train.x.device), here, there, data)
        return carry(of, lambda theta: found.spec.permute(theta, found.perms))


@dataclass(frozen=True)
class OnePass(MaskRecipe):
    """The weights of lowest score at one state of a dense run gone, without training for it.

    Arguments:
        run: dense.
        step: at which it is looked at; 0 is its initialisation.
        score: ``magnitude``, ``snip`` or ``synflow``.
        pruning: scope, and what is left alone.
        density: share of the weights that is left.
    """

    RULE = "one pass"

    run: Run
    step: int
    score: str
    pruning: Pruning
    density: float

    def details(self, fingerprint: str, device: str) -> Json:
        return {
            "run": self.run.key(fingerprint, device),
            "step": self.step,
            "score": self.score,
            "scope": self.pruning.scope,
            "skip": list(self.pruning.skip),
        }

    def jobs(self) -> list[Job]:
        return [Job(self.run, weights=(self.step,))]

    def make(self, data: Dataset, store: Store) -> Mask:
        where, scope = data.train.x.device, self.pruning.scope
        theta = load_weights(self.run, self.step, store=store, device=str(where))
        module = build(self.run, data, where)
        mask = whole_mask(prunable(module, self.pruning.skip), theta)
        names = list(mask)
        if self.score == "synflow":
            for step in range(1, SYNFLOW_STEPS + 1):
                score = synflow(module, masked(theta, mask), names, data.in_shape)
                mask = prune(score, mask, self.density ** (step / SYNFLOW_STEPS), scope)
            return mask
        if self.score == "snip":
            few = data.train.head(min(SNIP_EXAMPLES, len(data.train)))
            return prune(snip(module, theta, names, few), mask, self.density, scope)
        return prune(magnitude(theta, names), mask, self.density, scope)


# ---- chains


@dataclass(frozen=True)
class Chain:
    """The levels of one initialisation, rewound to one k, and the controls beside them.

    Arguments:
        recipe: its ``steps`` is T.
        init: labels W_0.
        k: the step that each level is rewound to.
        pruning: how much in a round, and among which weights.
        optimizer: what a rewound network starts with: ``reset``, or ``restore``, the momentum that
            the dense one had at k.
    """

    recipe: Recipe
    init: int | str = 0
    k: int = 0
    pruning: Pruning = PAPERS
    optimizer: Literal["reset", "restore"] = "reset"

    @property
    def fresh(self) -> str:
        """Labels the new initialisation of ``reinit`` and ``permuted``."""
        return f"{self.init}/fresh"

    def mask(self, level: int, kind: str = "imp") -> MaskRecipe | None:
        """How the mask of a level is made; None at level 0, which is dense.

        Raises:
            BadParameter: a negative level, an unknown kind.
        """
        one_of("kind", kind, KINDS)
        whole("level", level, 0)
        if not level:
            return None
        density = self.pruning.density(level)
        if kind in ("magnitude", "snip", "synflow"):
            return OnePass(trunk(self.recipe, self.init), self.k, kind, self.pruning, density)
        if kind in ("imp", "one-shot"):
            before = self.run(level - 1 if kind == "imp" else 0)
            return Pruned(before, self.pruning, density)
        of = self.mask(level)
        assert of is not None
        if kind == "random":
            return Shuffled(of, density, self.init)
        if kind == "reinit":
            return of
        return Carried(of, density, self.run(0), self.run(0, "reinit"))

    def run(self, level: int, kind: str = "imp", number: int = 1) -> Run:
        """The training of a level: ``mask * W_k``, from k to T.

        Arguments:
            number: which sample of SGD noise; what the next level is pruned from is number 1.
        """
        mask = self.mask(level, kind)
        init = self.fresh if kind in ("reinit", "permuted") else self.init
        return copy(self.recipe, init, self.k, number, optimizer=self.optimizer, mask=mask)


@dataclass(frozen=True, kw_only=True)
class Search:
    """What :func:`find_tickets` trains and measures.

    Arguments:
        recipe: its ``steps`` is T.
        ks: steps to rewind to.
        levels: which are measured; the chain trains all up to the last.
        kinds: of :data:`KINDS`.
        control_levels: levels of all kinds but ``imp``; None: all of ``levels``. Level 0 is dense
            and has no controls.
        inits: independent initialisations, each with a chain of its own for every k.
        copies: of each subnetwork under different SGD noise, 2 or more.
        pruning: see :class:`companion.tickets.Pruning`.
        optimizer: see :class:`Chain`.
        chains: measure the barriers from each level of IMP to the one before and to the dense one.
    """

    recipe: Recipe
    ks: tuple[int, ...] = (0,)
    levels: tuple[int, ...] = (0, 3, 6, 9)
    kinds: tuple[str, ...] = ("imp", "random", "reinit")
    control_levels: tuple[int, ...] | None = None
    inits: int = 3
    copies: int = 2
    pruning: Pruning = PAPERS
    optimizer: Literal["reset", "restore"] = "reset"
    chains: bool = True

    def __post_init__(self) -> None:
        for name in ("levels", "control_levels"):
            levels = getattr(self, name)
            for level in levels or ():
                whole(name, level, 0)
            if levels is not None:
                object.__setattr__(
                    self, name, tuple(sorted({*levels, 0} if name == "levels" else {*levels} - {0}))
                )
        for kind in self.kinds:
            one_of("kinds", kind, KINDS)
        object.__setattr__(self, "ks", tuple(sorted(set(self.ks))))
        one_of("optimizer", self.optimizer, ("reset", "restore"))
        if not set(self.control_levels or ()) <= set(self.levels):
            raise BadParameter(
                f"control_levels: {self.control_levels} must be among levels {self.levels}."
            )

    def levels_of(self, kind: str) -> tuple[int, ...]:
        """The levels at which a kind is measured."""
        if kind == "imp":
            return self.levels
        chosen = self.levels if self.control_levels is None else self.control_levels
        return tuple(level for level in chosen if level)

    def density(self, level: int) -> float:
        """Share of the weights left at a level."""
        return self.pruning.density(level)

    def chains_at(self, k: int) -> list[Chain]:
        """One chain an init, rewound to step k."""
        return [
            Chain(self.recipe, init, k, self.pruning, self.optimizer) for init in range(self.inits)
        ]


# ---- what is measured


@dataclass(frozen=True)
class MaskCheck(Measurement):
    """Gate G4 of one sparse run: its pruned weights are 0, it was rewound, its masks are nested."""

    KIND = "subnetwork"

    run: Run

    def identity(self, device: str) -> Json:
        return {"run": key_of(self.run, device)}

    def jobs(self) -> list[Job]:
        return [Job(self.run, weights=(self.run.first_step, self.run.last_step))]

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        return f"weights left in {identity['run'][:12]}, and whether its mask holds"

    def measure(self, store: Store, device: str) -> object:
        run = self.run

        def weights(of: Run, step: int) -> dict[str, torch.Tensor]:
            return load_weights(of, step, store=store, device=device)

        chain: list[MaskRecipe] = []
        mask = run.mask
        while mask is not None:
            chain.insert(0, mask)
            mask = mask.run.mask if isinstance(mask, Pruned) else None
        levels = [load_mask(m, store=store, device=device) for m in chain]
        start = replace(run, mask=None, fork=None) if run.fork is None else run.fork.parent
        per_tensor = any(isinstance(m, Pruned) and m.pruning.scope == "layer" for m in chain)
        gate = gates.masks(
            weights(run, run.last_step),
            levels,
            rewound=weights(run, run.first_step),
            start=weights(start, run.fork.step if run.fork else 0),
            keep=chain[-1].density ** (1 / len(chain)),
            slack=len(levels[-1]) if per_tensor else 1,
        )
        return {"gate": gate, "kept": alive(levels[-1])}


@dataclass(frozen=True)
class Subnetwork:
    """A kind of subnetwork at one level, of one initialisation, rewound to one k.

    Arguments:
        kind, level, k, init: which.
        noise: its copies under different SGD noise, pair by pair.
        kept: tensor -> weights left and weights in all; empty for the dense network.
        previous: from the solution of the level before to this one; of IMP only.
        dense: from the dense solution to this one; of IMP only.
    """

    kind: str
    level: int
    k: int
    init: int
    noise: tuple[Sample, ...]
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    previous: PairResult | None = None
    dense: PairResult | None = None

    def errors(self, split: str = "test") -> dict[int, float]:
        """Number of a copy -> its error in percent, whether or not it passes the gates."""
        found: dict[int, float] = {}
        for sample in self.noise:
            ends = sample.result.barrier.curve.ends(split, "error")
            found |= dict(zip(sample.copies, ends, strict=True))
        return found


@dataclass(frozen=True)
class Tickets:
    """What :func:`find_tickets` found, and the statistics that the paper draws from it.

    ``kind`` is one of :data:`KINDS`; of level 0, which is dense, only ``imp`` is there.
    """

    search: Search
    subnetworks: tuple[Subnetwork, ...] = field(repr=False)

    def at(self, kind: str, level: int, k: int) -> list[Subnetwork]:
        """One an init; empty if it was not measured."""
        asked = (kind, level, k)
        return [s for s in self.subnetworks if (s.kind, s.level, s.k) == asked]

    def instability(self, kind: str, level: int) -> Instability:
        """Algorithm 1 of the paper for a kind at a level, over all k."""
        found = [s for s in self.subnetworks if (s.kind, s.level) == (kind, level)]
        samples = tuple(sample for s in found for sample in s.noise)
        return Instability(self.search.recipe, self.search.ks, samples)

    def stable(self, kind: str, level: int, k: int, threshold: float | None = None) -> str:
        """``stable``, ``unstable``, ``undetermined`` or ``invalid``, as ``Instability.verdict``."""
        return self.instability(kind, level).verdict(k, "test", threshold)

    def errors(self, kind: str, level: int, k: int, split: str = "test") -> list[tuple[int, float]]:
        """(init, error in percent, mean over its copies) of every init, dead networks included."""
        means = [
            (s.init, statistics.fmean(s.errors(split).values())) for s in self.at(kind, level, k)
        ]
        return [(init, mean) for init, mean in means if not math.isnan(mean)]

    def error(self, kind: str, level: int, k: int, split: str = "test") -> Interval | None:
        """Mean error in percent, with its interval over inits; None if nothing was measured."""
        return _interval(self.errors(kind, level, k, split))

    def excess(
        self, kind: str, level: int, k: int, over: str = "dense", split: str = "test"
    ) -> Interval | None:
        """Points of error above another network of the same init and k.

        Arguments:
            over: ``dense``, or a kind at the same level.
        """
        one_of("over", over, ("dense", *KINDS))
        other = dict(self.errors(*(("imp", 0) if over == "dense" else (over, level)), k, split))
        mine = self.errors(kind, level, k, split)
        return _interval([(init, e - other[init]) for init, e in mine if init in other])

    def tolerance(self, k: int) -> float:
        """Points of error that a matching subnetwork may lose: one standard deviation of the dense
        copies, as in the paper's Section 4, and 0.2 at least, as in its Section 4.4."""
        dense = [e for s in self.at("imp", 0, k) for e in s.errors().values()]
        return max(0.2, statistics.stdev(dense) if len(dense) > 1 else 0.0)

    def matching(self, kind: str, level: int, k: int, tolerance: float | None = None) -> str:
        """Whether it trains to the error of the dense network, by the interval of :meth:`excess`.

        Arguments:
            tolerance: points; default :meth:`tolerance`.

        Returns:
            ``matching`` if the whole interval is at most the tolerance, ``not matching`` if it is
            above it everywhere, else ``undetermined``, as with one init.
        """
        limit = self.tolerance(k) if tolerance is None else tolerance
        found = self.excess(kind, level, k)
        if found is None or found.clusters < 2:
            return "undetermined"
        if found.high <= limit:
            return "matching"
        return "not matching" if found.low > limit else "undetermined"

    def successive_values(self, level: int, k: int, split: str = "test") -> list[tuple[int, float]]:
        """(init, barrier) from IMP's solution of the level before to that of this level."""
        return _heights([(s.init, s.previous) for s in self.at("imp", level, k)], split)

    def to_dense_values(self, level: int, k: int, split: str = "test") -> list[tuple[int, float]]:
        """(init, barrier) from the dense solution to IMP's of this level."""
        return _heights([(s.init, s.dense) for s in self.at("imp", level, k)], split)

    def successive(self, level: int, k: int, split: str = "test") -> Interval | None:
        """Mean of :meth:`successive_values`; None if no pair is valid."""
        return _interval(self.successive_values(level, k, split))

    def to_dense(self, level: int, k: int, split: str = "test") -> Interval | None:
        """Mean of :meth:`to_dense_values`; None if no pair is valid."""
        return _interval(self.to_dense_values(level, k, split))


def _interval(values: Sequence[tuple[int, float]]) -> Interval | None:
    return clustered([v for _, v in values], [i for i, _ in values]) if values else None


def _heights(
    results: Sequence[tuple[int, PairResult | None]], split: str
) -> list[tuple[int, float]]:
    heights = [(init, r.barrier.height(split)) for init, r in results if r is not None]
    return [(init, height) for init, height in heights if not math.isnan(height)]


@dataclass(frozen=True)
class _Wanted:
    """A :class:`Subnetwork` to be. ``along``: pairs from the level before, and from dense."""

    chain: Chain
    kind: str
    level: int
    copies: tuple[tuple[int, int], ...]
    noise: tuple[Pair, ...]
    along: tuple[Pair, ...]

    @property
    def first(self) -> Run:
        return self.chain.run(self.level, self.kind)


def _wanted(search: Search) -> list[_Wanted]:
    numbers = tuple(itertools.combinations(range(1, search.copies + 1), 2))
    out = []
    for k in search.ks:
        for chain in search.chains_at(k):
            for kind in dict.fromkeys(("imp", *search.kinds)):
                for level in search.levels_of(kind):
                    copies = {n: chain.run(level, kind, n) for n in range(1, search.copies + 1)}
                    # Dense copies are those of chapter 1, with what it measures of them.
                    start = None if level else (trunk(search.recipe, chain.init), k)
                    noise = tuple(Pair(copies[p], copies[q], start=start) for p, q in numbers)
                    along: tuple[Pair, ...] = ()
                    if search.chains and kind == "imp" and level:
                        others = (chain.run(level - 1), chain.run(0))
                        along = tuple(Pair(other, copies[1]) for other in others)
                    out.append(_Wanted(chain, kind, level, numbers, noise, along))
    return out


def plan_tickets(search: Search, evaluation: Evaluation, *, controls: bool = True) -> Plan:
    """What :func:`find_tickets` would train and measure with the same arguments, for a budget."""
    wanted = _wanted(search)
    pairs = [PairBarrier(pair, evaluation) for w in wanted for pair in (*w.noise, *w.along)]
    if not controls:
        return pairs
    masks = [MaskCheck(w.first) for w in wanted if w.level]
    return [*pairs, *masks, NullControl(_control(wanted), evaluation)]


def _control(wanted: Sequence[_Wanted]) -> Run:
    """The run that the null control trains again: the sparsest copy of IMP."""
    return max((w for w in wanted if w.kind == "imp"), key=lambda w: w.level).noise[0].b


def check_search(search: Search, device: str = "cpu") -> None:
    """Refuse, before anything trains, what cannot be run.

    Raises:
        BadParameter: as :func:`companion.experiments.instability.check_design`; a layer to skip
            that is not there; SynFlow for text.
    """
    recipe = search.recipe
    check_design(recipe, search.ks, inits=search.inits, copies=search.copies, device=device)
    data = datasets.load(recipe.data, str(datasets.resolve_device(device)))
    prunable(build(Run(recipe), data, torch.device("cpu")), search.pruning.skip)
    if "synflow" in search.kinds and data.kind == "text":
        raise BadParameter("kinds: synflow puts an image of ones in; it is not for text.")


def find_tickets(
    search: Search,
    evaluation: Evaluation | None = None,
    *,
    controls: bool = True,
    **where: Unpack[Where],
) -> Tickets:
    """Train the chains and the networks beside them, as far as they are missing, and measure them.

    Arguments:
        search: what.
        evaluation: how barriers are measured.
        controls: check the masks (G4), train a sparse copy a second time (G1) and compare the data
            orders (G3); recorded with every barrier.

    Raises:
        BadParameter: before any training, as :func:`check_search`.
        Diverged: a network diverged.

    Returns:
        a :class:`Tickets`. Pairs with an end that is half-way to guessing or worse fail gate G0:
        two dead networks have no barrier, and are not stable.
    """
    store = where.get("store") or Store()
    device = str(datasets.resolve_device(where.get("device", "cpu")))
    check_search(search, device)
    evaluation = evaluation or Evaluation()
    wanted = _wanted(search)
    text = datasets.load(search.recipe.data, device).kind == "text"
    pairs = [pair for w in wanted for pair in (*w.noise, *w.along)]
    # What is normal for a dense network is no bound for a sparse one: its error is the question.
    found = iter(
        measure_pairs(
            pairs,
            evaluation,
            reference_error=100.0 if text else None,
            max_error=None if text else 50.0,
            label="tickets",
            **where,
        )
    )
    checks: list[Gate] = []
    masks: dict[Run, Json | None] = {}
    if controls:
        runs = [run for w in wanted for pair in w.noise for run in (pair.a, pair.b)]
        checks = [
            check_null(_control(wanted), evaluation, store=store, device=device),
            check_noise(runs, device=device),
        ]
        tasks = [MaskCheck(w.first) for w in wanted if w.level]
        if closing.active():
            values: Sequence[Json | None] = measurement.stored(tasks, store, device)
        else:
            values = measurement.run(tasks, label="masks", **where)
        masks = {task.run: value for task, value in zip(tasks, values, strict=True)}
    out = []
    for w in wanted:
        gates_here, kept = list(checks), {}
        if controls and w.level:
            value = masks[w.first]
            if value is None:
                gates_here.append(Gate("G4 masks", None, closing.WHY))
            else:
                gates_here.append(codec.from_json(Gate, value["gate"]))
                kept = {name: (int(a), int(n)) for name, (a, n) in value["kept"].items()}
        mine = [next(found) for _ in (*w.noise, *w.along)]
        mine = [replace(r, barrier=r.barrier.recorded(gates_here)) for r in mine]
        init, k = int(w.chain.init), w.chain.k
        noise = tuple(Sample(init, k, copies, r) for copies, r in zip(w.copies, mine, strict=False))
        previous, dense = mine[len(noise) :] if w.along else (None, None)
        out.append(Subnetwork(w.kind, w.level, k, init, noise, kept, previous, dense))
    return Tickets(search, tuple(out))
