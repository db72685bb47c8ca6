"""Barriers between stored runs: measured once, many at a time, kept in the run store.

The bridge between training and connectivity. Every experiment that trains pairs and asks for the
barrier between them (forks, independent inits, checkpoints along training) goes through
:func:`measure_pairs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import nn

from companion import data as datasets
from companion import models
from companion.connectivity import (
    BN_EXAMPLES,
    BN_MODES,
    Barrier,
    Curve,
    Measure,
    Walker,
    barrier,
    check_bn_examples,
    grid,
)
from companion.connectivity.gates import Gate, guessing, noise_independence, null_control
from companion.core import closing, codec
from companion.core.errors import one_of, whole, within
from companion.core.runs import Entry, Store
from companion.core.theta import Theta, cosine_distance, distance, layout
from companion.data import Augmentation, Dataset, Split
from companion.data.augmentation import draw_epoch
from companion.experiments import measurement
from companion.experiments.measurement import EVALUATION, Json, Measurement, Where, ends, key_of
from companion.models import has_dropout
from companion.training import (
    Job,
    Run,
    build,
    entry_of,
    load_mask,
    load_state,
    load_weights,
    made_by,
    mask_entry,
    train_one,
    write_mask,
)


@dataclass(frozen=True)
class Evaluation:
    """How pairs are measured.

    Arguments:
        points: of the alpha grid, odd.
        bn: headline BatchNorm mode.
        train_examples, test_examples: how many images or windows stand for each split (None = all
            of them): always the same ones, :meth:`companion.data.Split.head`.
        bn_examples: how many training inputs BatchNorm's mode ``reestimate`` averages over at a
            point (None = all of them).
    """

    points: int = 31
    bn: str = "interpolate"
    train_examples: int | None = None
    test_examples: int | None = None
    bn_examples: int | None = BN_EXAMPLES

    def __post_init__(self) -> None:
        grid(self.points)
        one_of("bn", self.bn, BN_MODES)
        check_bn_examples(self.bn_examples)
        for name in ("train_examples", "test_examples"):
            whole(name, getattr(self, name), 1, "null")

    def splits(self, data: Dataset) -> dict[str, Split]:
        """The un-augmented train split and the test split, or the asked parts of them."""
        whole = len(data.train) + len(data.test)
        return {
            "train": data.train.head(self.train_examples or whole),
            "test": data.test.head(self.test_examples or whole),
        }

    def keywords(self, data: Dataset) -> dict[str, Any]:
        """What every function that measures a line takes as keywords."""
        average = {"bn_data": data.train, "bn_examples": self.bn_examples}
        return {"points": self.points, "bn": self.bn, **average}

    def walker(self, module: nn.Module, splits: Mapping[str, Split], data: Dataset) -> Walker:
        """What measures single points as the lines of pairs are measured."""
        return Walker(module, splits, bn=self.bn, bn_data=data.train, bn_examples=self.bn_examples)

    def points_of(self, net: str) -> int:
        """Networks on a line, all BatchNorm modes of a network called ``net`` counted."""
        return self.points * (len(BN_MODES) if models.may_have_batchnorm(net) else 1)

    def identity(self, net: str) -> dict[str, Any]:
        """Everything that determines the numbers of a network called ``net``, for the store."""
        return {
            "semantics": EVALUATION,
            "points": self.points,
            "bn": self.bn,
            "train": self.train_examples,
            "test": self.test_examples,
            **averaging(net, self.bn_examples),
        }


def averaging(net: str, bn_examples: int | None) -> dict[str, Any]:
    """The part of a store key that says what BatchNorm averages over: of networks that may have it.

    Arguments:
        net: of a recipe.
        bn_examples: as :class:`Evaluation` has it.
    """
    return {"bn_examples": bn_examples} if models.may_have_batchnorm(net) else {}


@dataclass(frozen=True)
class Pair:
    """Two stored networks to compare, and the state both come from.

    Arguments:
        a, b: the runs.
        step: at which step of them (None = T).
        start: run and step of W_k, the state they share; None for independent networks.
    """

    a: Run
    b: Run
    step: int | None = None
    start: tuple[Run, int] | None = None

    def equal_on_purpose(self, a: Theta, b: Theta) -> bool:
        """One run twice, or two networks of one init at step 0: no need to be distinct."""
        equal = self.at == 0 and all(torch.equal(v, b[n]) for n, v in a.items())
        return self.a == self.b or equal

    @property
    def at(self) -> int:
        """The step both networks are taken at."""
        return self.a.last_step if self.step is None else self.step

    def identity(self, device: str) -> Json:
        """Which networks these are, for the store."""
        return {"a": key_of(self.a, device), "b": key_of(self.b, device), "step": self.at}

    def jobs(self) -> list[Job]:
        """What has to be trained before its barrier and its distances can be measured."""
        out = [*jobs_of(self), Job(root_of(self.a), weights=(0,))]
        if self.start:
            run, step = self.start
            out.append(Job(run, weights=() if step else (0,), states=(step,) if step else ()))
        return out


def jobs_of(pair: Pair) -> list[Job]:
    """What has to be trained before the two networks can be looked at."""
    return [Job(pair.a, weights=(pair.at,)), Job(pair.b, weights=(pair.at,))]


def root_of(run: Run) -> Run:
    """The run that ``run`` comes from in the end, which began at an initialisation."""
    while run.fork:
        run = run.fork.parent
    return run


@dataclass(frozen=True)
class PairResult:
    """What was measured of a pair.

    Arguments:
        barrier: with its gates.
        distances: Euclidean, of the parameters: ``ab``; ``a_init``, ``b_init`` (from W_0); with a
            start also ``a_start``, ``b_start`` (from W_k) and ``start_init``. ``cosine`` is
            1 - cos(A, B).
        start: loss and error of W_k per split; empty without a start.
    """

    barrier: Barrier
    distances: dict[str, float]
    start: dict[str, Measure]

    @property
    def measured(self) -> bool:
        """False for what stands in for a pair that is missing while a recording is closed."""
        return all(g.name != _MISSING.name for g in self.barrier.gates)


_MISSING = Gate("measured", False, closing.WHY)


def _missing(pair: Pair, evaluation: Evaluation, device: str) -> PairResult:
    """What stands in for a pair that is not measured: no number of it is valid."""
    data = datasets.load(pair.a.recipe.data, device)
    splits = evaluation.splits(data)
    alphas = tuple(b for _, b in grid(evaluation.points))
    unknown = dict.fromkeys(("loss", "error"), (math.nan,) * len(alphas))
    sizes = {name: len(split) for name, split in splits.items()}
    mode = evaluation.bn if models.may_have_batchnorm(pair.a.recipe.net) else "none"
    curve = Curve(alphas, dict.fromkeys(splits, unknown), mode, sizes)
    # Quality comes first, where it is checked again under other bounds.
    gates = (Gate("G0 quality", False, closing.WHY), _MISSING)
    ends, guess = (math.nan, math.nan), guessing(splits["test"])
    found = Barrier({mode: curve}, mode, gates, math.nan, data.classes, ends, guess)
    shared = ("a_start", "b_start", "start_init") if pair.start else ()
    names = ("ab", "cosine", "a_init", "b_init", *shared)
    nowhere = dict.fromkeys(splits, Measure(math.nan, math.nan)) if pair.start else {}
    return PairResult(found, dict.fromkeys(names, math.nan), nowhere)


@dataclass(frozen=True)
class PairBarrier(Measurement):
    """The barrier between the networks of a pair, their distances, and where they started."""

    KIND = "pair"
    SEMANTICS = None
    FILE = "pair.json"

    pair: Pair
    evaluation: Evaluation

    def identity(self, device: str) -> Json:
        start = self.pair.start
        return {
            "evaluation": self.evaluation.identity(self.pair.a.recipe.net),
            **self.pair.identity(device),
            "start": [key_of(start[0], device), start[1]] if start else None,
        }

    def jobs(self) -> list[Job]:
        return self.pair.jobs()

    @property
    def points(self) -> int:
        return self.evaluation.points_of(self.pair.a.recipe.net) + 4

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        return f"{ends(identity)}, {identity['evaluation']['points']} points"

    def measure(self, store: Store, device: str) -> object:
        pair, evaluation = self.pair, self.evaluation
        data = datasets.load(pair.a.recipe.data, device)

        def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
            return load_weights(run, step, store=store, device=device)

        module = build(pair.a, data, torch.device(device))
        names = layout(module).parameters
        a, b = weights(pair.a, pair.at), weights(pair.b, pair.at)
        splits = evaluation.splits(data)
        how = evaluation.keywords(data) | {"same_noise": pair.a == pair.b}
        found = barrier(module, a, b, splits, classes=data.classes, **how)
        init = weights(root_of(pair.a), 0)
        distances = {
            "ab": distance(a, b, names),
            "cosine": cosine_distance(a, b, names),
            "a_init": distance(a, init, names),
            "b_init": distance(b, weights(root_of(pair.b), 0), names),
        }
        start: Mapping[str, Measure] = {}
        if pair.start:
            w_k = weights(*pair.start)
            distances |= {
                "a_start": distance(a, w_k, names),
                "b_start": distance(b, w_k, names),
                "start_init": distance(w_k, init, names),
            }
            start = evaluation.walker(module, splits, data).at(w_k)
        return {"barrier": found, "distances": distances, "start": start}


def measure_pairs(
    pairs: Sequence[Pair],
    evaluation: Evaluation | None = None,
    *,
    reference_error: float | None = None,
    max_error: float | None = None,
    label: str = "barriers",
    **where: Unpack[Where],
) -> list[PairResult]:
    """Train what is missing, then measure every pair, in that order.

    Arguments:
        reference_error: percent, normal. Default: the median error of all ends of this call,
            which is the recipe's own normal error. Ends above half the error of guessing fail all
            the same, or a call whose runs are all dead would pass (of text: ends that are no better
            than always saying the commonest token).
        max_error: percent; an end at or below it counts as trained whatever the reference.

    Raises:
        as :func:`companion.training.train`.
    """
    within("max_error", max_error, 0, 100)
    within("reference_error", reference_error, 0, 100)
    evaluation = evaluation or Evaluation()
    device = str(datasets.resolve_device(where.get("device", "cpu")))
    tasks = [PairBarrier(pair, evaluation) for pair in pairs]
    raw: Sequence[Json | None]
    if closing.active():
        raw = measurement.stored(tasks, where.get("store") or Store(), device)
    else:
        raw = measurement.run(tasks, label=label, **where)
    known = [None if r is None else codec.from_json(Barrier, r["barrier"]) for r in raw]
    if reference_error is None:
        reference_error = normal_error([f for f in known if f])
    out = []
    for pair, r, found in zip(pairs, raw, known, strict=True):
        if r is None or found is None:
            out.append(_missing(pair, evaluation, device))
            continue
        judged = found.judged(reference_error=reference_error, max_error=max_error)
        start = codec.from_json(dict[str, Measure], r["start"])
        out.append(PairResult(judged, r["distances"], start))
    return out


def normal_error(found: Sequence[Barrier]) -> float | None:
    """The median error of all ends, in percent: what is normal for them. None without any.

    If most runs are dead, so is their median: G0 then asks for half the error of guessing; of text,
    for less than that of always saying the commonest token.
    """
    ends = sorted(e for f in found for e in f.errors)
    if found and found[0].guess is not None:
        return ends[len(ends) // 2]
    guessing = 100 * (1 - 1 / found[0].classes) if found else 0.0
    return min(ends[len(ends) // 2], guessing / 2 / 1.5) if ends else None


_FAILED = "failed.json"


@dataclass(frozen=True)
class NullControl(Measurement):
    """The null control of a run: trained once more under the same noise, it comes out the same."""

    KIND = "null"
    SEMANTICS = None
    FILE = "gate.json"

    run: Run
    evaluation: Evaluation

    def identity(self, device: str) -> Json:
        known = self.evaluation.identity(self.run.recipe.net)
        return {"evaluation": known, "run": key_of(self.run, device)}

    def jobs(self) -> list[Job]:
        return [Job(self.run, weights=(self.run.last_step,))]

    @property
    def trains(self) -> tuple[int, ...]:
        return (self.run.last_step - self.run.first_step,)

    def file_of(self, value: Json) -> str:
        # One that failed is run again, but whoever closes the recording has to know of it.
        return self.FILE if value["passed"] else _FAILED

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        return f"null control of {identity['run'][:12]}"

    def measure(self, store: Store, device: str) -> object:
        return _null(self.run, self.evaluation, store, device)


def check_null(
    run: Run,
    evaluation: Evaluation | None = None,
    *,
    store: Store | None = None,
    device: str = "cpu",
) -> Gate:
    """The null control: train ``run`` once more from its start, with the same noise, and compare.

    The stored copy may come from another process; both must agree in every bit, and the barrier
    between them must be exactly 0. A control that passed is kept in the store and not run again.
    """
    store, where = store or Store(), str(datasets.resolve_device(device))
    task = NullControl(run, evaluation or Evaluation())
    if not closing.active():
        (value,) = measurement.run([task], store=store, device=where, label="null control")
        return codec.from_json(Gate, value)
    entry = task.entry(store, where)
    known = measurement.stored_value(entry, task.FILE) or measurement.stored_value(entry, _FAILED)
    if known is None:
        closing.lacks([entry])
        return Gate("G1 null control", None, closing.WHY)
    return codec.from_json(Gate, known)


class _Again(Store):
    """The same store under other keys: nothing that was trained before is found in it."""

    def entry(self, identity: Mapping[str, Any]) -> Entry:
        return super().entry({**identity, "again": True})


def _null(run: Run, evaluation: Evaluation, store: Store, device: str) -> Gate:
    data = datasets.load(run.recipe.data, device)
    first = load_weights(run, store=store, device=device)
    # Entries of their own in the same store: a second copy that was stopped goes on, too.
    fresh = _Again(store.root)
    used = [entry_of(run, data, device, fresh)]
    if run.fork:  # the start is shared: copy W_k, do not train it again
        parent, step = run.fork.parent, run.fork.step
        name = f"state-{step:08d}.safetensors"
        used.append(entry_of(parent, data, device, fresh))
        if name not in used[1]:
            state = load_state(parent, step, store=store, device=device)
            used[1].write_tensors(name, state.tensors())
    if run.mask:  # made before, too: of runs that need not be trained again
        used.append(mask_entry(run.mask, fresh, device))
        write_mask(used[-1], load_mask(run.mask, store=store, device=device))
    # On a GPU kernels may depend on the engine and on how many replicas there are at once.
    how = made_by(run, store=store, device=device)
    train_one(Job(run, weights=(run.last_step,)), store=fresh, device=device, like=how)
    second = load_weights(run, store=fresh, device=device)
    for entry in used:  # the next control trains anew
        entry.discard()
    module = build(run, data, torch.device(device))
    how = evaluation.keywords(data) | {"points": 3, "same_noise": True, "max_error": 100.0}
    found = barrier(module, first, second, evaluation.splits(data), **how)
    worst = max(found.height(s, m) for s in ("train", "test") for m in ("error", "loss"))
    return null_control(first, second, layout(module).floating, worst)


def check_noise(runs: Sequence[Run], *, device: str = "cpu", most: int = 200) -> Gate:
    """Whether noise is independent: data orders of ``runs``, first epochs of each, ``most`` in all.

    Where more labels tell their augmentation apart than their order (``noise="augment"``), copies
    share orders on purpose: the draws of augmentation and dropout are compared as well.
    """
    data = datasets.load(runs[0].recipe.data, device)
    labels = sorted({str(run.order): run.order_key() for run in runs}.items())
    n = len(data.train)
    per_run = max(
        1, min(most // max(len(labels), 1), 1 + runs[0].last_step * runs[0].recipe.batch // n)
    )
    orders = {
        f"order {label} epoch {epoch}": key.fold("epoch", epoch).permutation(n)
        for label, key in labels[:most]
        for epoch in range(per_run)
    }
    drawn = sorted({str(run.augment): run for run in runs}.items())
    draws = {
        f"draws {label} epoch {epoch}": _drawn(run, epoch, data)
        for label, run in drawn[:most]
        for epoch in range(max(1, min(per_run, most // len(drawn))))
        if len(drawn) > len(labels)
    }
    return noise_independence(orders, draws)


def _drawn(run: Run, epoch: int, data: Dataset) -> bytes:
    """What ``run`` draws in an epoch besides its order: flips, crops, shifts, seeds of dropout."""
    augmentation = Augmentation.parse(run.recipe.augment)
    made = draw_epoch(augmentation, run.augment_key(), epoch, len(data.train), data.train.window)
    found = [t.numpy().tobytes() for t in made.tensors() if t is not None]
    if has_dropout(run.recipe.net):
        first = epoch * (len(data.train) // run.recipe.batch)
        found.append(repr(run.dropout_key().fold(first).seed()).encode())
    return b"".join(found)
