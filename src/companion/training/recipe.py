"""What a training run is, as values: recipe, noise, fork, and the states wanted of it.

Their JSON is the run's identity.
Source: Frankle et al. 2020, Algorithm 1 and Table 1; our chapter 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from companion import models
from companion.core import codec
from companion.core.errors import BadParameter, one_of, whole
from companion.core.runs import digest
from companion.core.seeds import Key
from companion.data import Augmentation, canonical_data

if TYPE_CHECKING:
    from companion.core.masks import Mask
    from companion.core.runs import Store
    from companion.data import Dataset

SEMANTICS = 1
"""Raised by hand when a recipe would train to other weights: old runs then no longer count."""

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "cosine", "onecycle")
PRECISIONS = ("float32", "bf16")
DECAYED = ("all", "matrices")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train one network, except for its randomness. Checked when it is made.

    Arguments:
        net: a name with options of :func:`companion.models.build`, e.g. ``"resnet20:width=8"``.
        data: a name of :func:`companion.data.load`; of a text, options that are defaults are left
            out, so that one dataset is one identity.
        steps: T, the exact number of optimiser steps.
        batch: examples a step. An epoch is ``floor(N / batch)`` full batches of a new
            permutation.
        optimizer: ``sgd`` (with ``momentum``, ``nesterov``), ``adam``, ``adamw`` (``betas``).
        lr: peak learning rate.
        weight_decay: as the optimiser defines it (L2 in the gradient for sgd and adam).
        weight_decay_on: ``all`` parameters, or ``matrices``: weights of two or more dimensions that
            are no embeddings, so neither norms nor biases. An embedding is a layer
            ``nn.Embedding``: one that a network keeps as a bare ``nn.Parameter`` decays. Of a
            network for text the head decays where it is untied; tied, it is the embedding.
        schedule: ``constant``; ``step``: times ``gamma`` at each of ``milestones`` (fractions of
            T, or steps if above 1); ``cosine``: to 0 at T; ``onecycle``: PyTorch's OneCycleLR with
            cosine annealing, whose rising part is ``warmup``.
        warmup: steps of linear warm-up from 0 (for ``onecycle``: of its rising part).
        div, final_div: ``onecycle`` starts at ``lr/div`` and ends at ``lr/div/final_div``.
        augment: ``none``, ``flip``, ``crop4``, ``flip+crop4`` …, for text ``shift``: see
            :class:`companion.data.Augmentation`.
        precision: ``float32``, or ``bf16`` (autocast; weights stay float32).
    """

    net: str
    data: str
    steps: int
    batch: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    weight_decay_on: str = "all"
    schedule: str = "constant"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup: int = 0
    div: float = 25.0
    final_div: float = 1e4
    augment: str = "none"
    precision: str = "float32"

    def __post_init__(self) -> None:
        for field in ("net", "data", "augment"):
            if not isinstance(value := getattr(self, field), str):
                raise BadParameter(f"{field}: text is needed, got {value!r}.")
        object.__setattr__(self, "net", models.canonical(self.net))
        object.__setattr__(self, "data", canonical_data(self.data))
        object.__setattr__(self, "augment", str(Augmentation.parse(self.augment)))
        for field in ("milestones", "betas"):
            value = getattr(self, field)
            numbers = value if isinstance(value, tuple | list) else (None,)
            if any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers):
                raise BadParameter(f"{field}: a list of numbers is needed, got {value!r}.")
            object.__setattr__(self, field, tuple(float(v) for v in value))
        for field in ("lr", "momentum", "weight_decay", "gamma", "div", "final_div"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise BadParameter(
                    f"{field}: a number is needed, got {value!r} ({type(value).__name__}). "
                    "In YAML write 1.0e-3 or 0.001; 1e-3 is read as text."
                )
            object.__setattr__(self, field, float(value))
            if not math.isfinite(value) or value < 0:
                raise BadParameter(f"{field}: {value!r} must be finite and not negative.")
        for field, least in (("steps", 1), ("batch", 1), ("warmup", 0)):
            whole(field, getattr(self, field), least)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, PRECISIONS)
        one_of("weight_decay_on", self.weight_decay_on, DECAYED)
        if not self.weight_decay:  # no decay is no decay: one identity
            object.__setattr__(self, "weight_decay_on", "all")
        if self.schedule == "step" and not self.milestones:
            raise BadParameter("schedule: 'step' needs milestones, e.g. (0.5, 0.75).")
        if self.schedule != "step" and self.milestones:
            raise BadParameter(f"milestones: only schedule 'step' has them, not {self.schedule!r}.")
        if any(not 0 < m < self.steps for m in self.milestones):
            raise BadParameter(
                f"milestones: {self.milestones} must lie between 0 and T = {self.steps} "
                "(up to 1 they are fractions of T)."
            )
        if self.warmup >= self.steps:
            raise BadParameter(f"warmup: {self.warmup} steps of warm-up in a run of {self.steps}.")
        if not (0 <= self.momentum < 1):
            raise BadParameter(f"momentum: {self.momentum} must be in [0, 1).")
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum > 0):
            raise BadParameter("nesterov: needs optimizer 'sgd' and a momentum above 0.")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise BadParameter(f"betas: {self.betas} must be two numbers in [0, 1).")
        if not (self.div > 0 and self.final_div > 0):
            raise BadParameter(f"div, final_div: {self.div}, {self.final_div} must be above 0.")

    def identity(self) -> dict[str, Any]:
        """The fields that differ from their defaults, so a new field keeps old hashes."""
        return codec.changed_fields(self)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step ``step`` (0-based). Closed form, so a fork needs no replay."""
        t, total = step, self.steps
        if self.schedule == "onecycle":
            low, end = self.lr / self.div, self.lr / self.div / self.final_div
            rise = max(self.warmup - 1, 0)
            if t <= rise:
                start, stop, done = low, self.lr, t / rise if rise else 1.0
            else:
                start, stop, done = self.lr, end, (t - rise) / max(total - 1 - rise, 1)
            return stop + (start - stop) / 2 * (1 + math.cos(math.pi * done))
        if t < self.warmup:
            return self.lr * (t + 1) / self.warmup
        if self.schedule == "step":
            # The margin is for fractions: 0.55 * 100 is a little more than 55 in floating point.
            marks = [m if m > 1 else m * total - 1e-6 for m in self.milestones]
            return self.lr * self.gamma ** sum(t >= m for m in marks)
        if self.schedule == "cosine":
            done = (t - self.warmup) / max(total - self.warmup, 1)
            return self.lr / 2 * (1 + math.cos(math.pi * done))
        return self.lr


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """A :class:`Recipe` from untyped values (JSON, YAML), with a message for unknown names."""
    known = [f.name for f in dataclasses.fields(Recipe)]
    for name in values:
        one_of("recipe field", name, known)
    if absent := [name for name in ("net", "data", "steps") if name not in values]:
        raise BadParameter(f"recipe: {', '.join(absent)} must be given.")
    typed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Recipe(**typed)


@dataclass(frozen=True)
class Fork:
    """Where a copy leaves its parent.

    Arguments:
        parent: the run whose state at ``step`` the copy starts from.
        step: k.
        optimizer: ``reset`` starts momentum at zero (Algorithm 1 acts on weights; open_lth does
            so), ``restore`` goes on with the parent's.
        schedule: ``continue`` trains the T - k steps that are left, from position k of schedule and
            data; ``restart`` trains all T steps again (the control of Frankle et al., Fig. 4).
    """

    parent: Run
    step: int
    optimizer: Literal["reset", "restore"] = "reset"
    schedule: Literal["continue", "restart"] = "continue"


@dataclass(frozen=True)
class Run:
    """One training run: a recipe, the labels of its randomness, and where it forks from.

    ``init``, ``order`` and ``augment`` name samples of three independent noise sources: same
    labels, same bits; different labels, independent draws. A forked run inherits its init. Dropout
    belongs to ``augment``. With a ``mask`` it trains a subnetwork: it starts from the mask times
    its init (or its parent's weights at k), and pruned weights stay exactly 0. ``perturb`` names a
    single weight that is moved before the first step (:func:`companion.training.loop.perturbed`);
    None: none is.
    """

    recipe: Recipe
    init: int | str = 0
    order: int | str = 0
    augment: int | str = 0
    fork: Fork | None = None
    mask: MaskRecipe | None = None
    perturb: int | str | None = None

    def __post_init__(self) -> None:
        for name in ("init", "order", "augment", "perturb"):
            label = getattr(self, name)
            if name == "perturb" and label is None:
                continue
            if isinstance(label, bool) or not isinstance(label, int | str):
                raise BadParameter(f"{name}: a whole number or text is needed, got {label!r}.")
        if self.mask is not None:
            self._check_mask(self.mask)
        if self.fork is None:
            return
        parent, k = self.fork.parent, self.fork.step
        one_of("fork optimizer", self.fork.optimizer, ("reset", "restore"))
        one_of("fork schedule", self.fork.schedule, ("continue", "restart"))
        if isinstance(k, bool) or not isinstance(k, int):
            raise BadParameter(f"fork at k = {k!r}: a whole number is needed.")
        if not parent.first_step <= k <= parent.last_step:
            raise BadParameter(
                f"fork at k = {k}: the run it leaves has steps {parent.first_step} "
                f"to {parent.last_step}."
            )
        if self.fork.schedule == "continue" and k >= self.recipe.steps:
            raise BadParameter(f"fork at k = {k}: no step is left of T = {self.recipe.steps}.")
        if parent.recipe.net != self.recipe.net:
            raise BadParameter(
                f"fork: the copy's network {self.recipe.net!r} is not its parent's "
                f"{parent.recipe.net!r}."
            )
        object.__setattr__(self, "init", parent.init)
        if k == 0 and parent.fork is None and parent.mask is None and parent.perturb is None:
            # A fork at step 0 is a run from the same init: one identity, trained once.
            object.__setattr__(self, "fork", None)

    def _check_mask(self, mask: MaskRecipe) -> None:
        if self.perturb is not None:
            raise BadParameter("perturb: not under a mask; the weight moved could be a pruned one.")
        for job in mask.jobs():
            for field in ("net", "data"):
                there, here = getattr(job.run.recipe, field), getattr(self.recipe, field)
                if there != here:
                    raise BadParameter(
                        f"mask: it comes from the {field} {there!r}, the run has {here!r}. "
                        "Both must be the same."
                    )

    @property
    def first_step(self) -> int:
        """The step its first state has."""
        return self.fork.step if self.fork and self.fork.schedule == "continue" else 0

    @property
    def last_step(self) -> int:
        """T."""
        return self.recipe.steps

    def identity(self, fingerprint: str, device: str) -> dict[str, Any]:
        """Everything that determines the bits of the run. ``device`` is ``cpu`` or ``cuda``."""
        out: dict[str, Any] = {
            "kind": "run",
            "semantics": SEMANTICS,
            "recipe": self.recipe.identity(),
            "init": self.init,
            "order": self.order,
            "data": fingerprint,
            "device": device,
        }
        if self.recipe.augment != "none" or models.has_dropout(self.recipe.net):
            out["augment"] = self.augment
        if models.is_own(self.recipe.net):  # the name alone does not say what it builds
            out["source"] = models.source_digest(self.recipe.net)
        if self.perturb is not None:
            out["perturb"] = self.perturb
        if self.fork:
            out["fork"] = {
                "parent": self.fork.parent.identity(fingerprint, device),
                "step": self.fork.step,
                "optimizer": self.fork.optimizer,
                "schedule": self.fork.schedule,
            }
        if self.mask is not None:  # how it is made stands in its own entry
            out["mask"] = self.mask.key(fingerprint, device)
        return out

    def key(self, fingerprint: str, device: str) -> str:
        """The name of its entry in the store: the digest of :meth:`identity`, 64 hex digits."""
        return digest(self.identity(fingerprint, device))

    def init_key(self) -> Key:
        """Seeds the initial weights."""
        return Key("init", self.init)

    def order_key(self) -> Key:
        """Folded with the epoch, gives that epoch's permutation."""
        return Key("order", self.order)

    def augment_key(self) -> Key:
        """Folded with the epoch, gives every sample's flip and crop, or shift, in that epoch."""
        return Key("augment", self.augment)

    def perturb_key(self) -> Key:
        """Gives the weight that is moved at the start, and which way."""
        return Key("perturb", self.perturb or 0)

    def dropout_key(self) -> Key:
        """Folded with the step, gives what the network itself draws in that step.

        Of a network of the user's own nobody knows beforehand whether it draws anything. Its key
        comes from a label that is in :meth:`identity` in any case.
        """
        own = models.is_own(self.recipe.net) and self.recipe.augment == "none"
        return (self.order_key() if own else self.augment_key()).fold("dropout")


@dataclass(frozen=True)
class Job:
    """States wanted of a run.

    Arguments:
        run: which run.
        weights: steps whose state dict is wanted; ``T`` is ``run.last_step``.
        states: steps whose full state is wanted (optimiser included), to fork from.
    """

    run: Run
    weights: tuple[int, ...] = ()
    states: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for step in (*self.weights, *self.states):
            if not self.run.first_step <= step <= self.run.last_step:
                raise BadParameter(
                    f"checkpoint at step {step}: the run has steps "
                    f"{self.run.first_step} to {self.run.last_step}."
                )

    def parents(self) -> list[Job]:
        """The jobs that must be done before this one: of the run it forks, and for its mask."""
        fork, mask = self.run.fork, self.run.mask
        start = [Job(fork.parent, states=(fork.step,))] if fork else []
        return start + (mask.jobs() if mask else [])


class MaskRecipe(ABC):
    """How a pruning mask is made, as a picklable value; a subclass is a frozen dataclass.

    The mask itself is made when the first run needs it, and kept under :meth:`key`, one bit a
    weight. So a run under a mask is known, and can be counted, before anything is trained.

    Class attributes:
        RULE: its name in the store.
        SEMANTICS: raised by hand when the same rule would give another mask.
        rules: every subclass that was imported, by its rule.

    A subclass has a field ``density``: the share of the weights that is left.
    """

    RULE: ClassVar[str]
    SEMANTICS: ClassVar[int] = 1
    rules: ClassVar[dict[str, type[MaskRecipe]]] = {}
    density: float

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.rules[cls.RULE] = cls

    @abstractmethod
    def details(self, fingerprint: str, device: str) -> dict[str, Any]:
        """Everything besides the rule's name and semantics that determines the mask, JSON-able.

        Runs are named by :meth:`Run.key`, other masks by :meth:`key`.
        """

    @abstractmethod
    def jobs(self) -> list[Job]:
        """What has to be trained first: runs of one network on one dataset, one at least."""

    @abstractmethod
    def make(self, data: Dataset, store: Store) -> Mask:
        """The mask. What :meth:`jobs` names is trained if it is missing."""

    def identity(self, fingerprint: str, device: str) -> dict[str, Any]:
        """Its identity in the store. Arguments as :meth:`Run.identity`."""
        return {
            "kind": "mask",
            "semantics": self.SEMANTICS,
            "rule": self.RULE,
            "density": self.density,
            "data": fingerprint,
            "device": device,
            **self.details(fingerprint, device),
        }

    def key(self, fingerprint: str, device: str) -> str:
        """The name of its entry: the digest of how it is made, 64 hex digits."""
        return _mask_key(self, fingerprint, device)


@functools.lru_cache(maxsize=4096)
def _mask_key(mask: MaskRecipe, fingerprint: str, device: str) -> str:
    # The key of a run that was pruned ten times goes back through ten masks: once each.
    return digest(mask.identity(fingerprint, device))


def merge_jobs(jobs: Iterable[Job]) -> list[Job]:
    """One job a run, with the union of the wanted states, in first-seen order."""
    merged: dict[Run, Job] = {}
    for job in jobs:
        old = merged.get(job.run, Job(job.run))
        merged[job.run] = Job(
            job.run,
            tuple(sorted({*old.weights, *job.weights})),
            tuple(sorted({*old.states, *job.states})),
        )
    return list(merged.values())


def lineage(jobs: Iterable[Job]) -> list[list[Job]]:
    """``jobs`` and all that they descend from, one a run, in waves.

    Each wave needs nothing but the waves before it, and a run is in the earliest that it can be:
    what may be trained side by side is.
    """
    every = wave = merge_jobs(jobs)
    while wave := merge_jobs(parent for job in wave for parent in job.parents()):
        every = every + wave
    number: dict[Run, int] = {}

    def place(run: Run) -> int:
        if run not in number:
            number[run] = 1 + max((place(p.run) for p in Job(run).parents()), default=-1)
        return number[run]

    waves: dict[int, list[Job]] = {}
    for job in merge_jobs(every):
        waves.setdefault(place(job.run), []).append(job)
    return [waves[n] for n in sorted(waves)]
