"""Barriers between stored runs: measured once, many at a time, kept in the run store.

The bridge between training and connectivity. Every experiment that trains pairs and asks for the
barrier between them (forks, independent inits, checkpoints along training) goes through
:func:`measure`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from companion.core.errors import BadParameter, CorruptEntry, one_of
from companion.core.pool import run_all
from companion.core.runs import Entry, Store
from companion.core.theta import cosine_distance, distance, layout
from companion.data import Augmentation, Dataset, Split
from companion.data.augmentation import draw
from companion.models import has_dropout
from companion.training import (
    Job,
    Run,
    build,
    entry_of,
    load_state,
    load_weights,
    made_by,
    train,
    train_one,
)

log = logging.getLogger("companion")

SEMANTICS = 1
"""Raised by hand when a measurement of the same networks would give other numbers."""


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
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise BadParameter(
                    f"{name}: {value!r} must be a whole number of 1 or more, or null."
                )

    def splits(self, data: Dataset) -> dict[str, Split]:
        """The un-augmented train split and the test split, or the asked parts of them."""
        whole = len(data.train) + len(data.test)
        return {
            "train": data.train.head(self.train_examples or whole),
            "test": data.test.head(self.test_examples or whole),
        }

    def walker(self, module: nn.Module, splits: Mapping[str, Split], data: Dataset) -> Walker:
        """What measures single points as the lines of pairs are measured."""
        return Walker(module, splits, bn=self.bn, bn_data=data.train, bn_examples=self.bn_examples)

    def identity(self, net: str) -> dict[str, Any]:
        """Everything that determines the numbers of a network called ``net``, for the store."""
        return {
            "semantics": SEMANTICS,
            "points": self.points,
            "bn": self.bn,
            "train": self.train_examples,
            "test": self.test_examples,
            **averaging(net, self.bn_examples),
        }


def averaging(net: str, bn_examples: int | None) -> dict[str, Any]:
    """The part of a store key that says what BatchNorm averages over: of networks that may have it.

    Arguments:
        net: of a recipe; bn_examples: as :class:`Evaluation` has it.
    """
    return {"bn_examples": bn_examples} if models.has_batchnorm(net) else {}


@dataclass(frozen=True)
class Pair:
    """Two stored networks to compare, and the state both come from.

    Arguments:
        a, b: the runs; step: at which step of them (None = T).
        start: run and step of W_k, the state they share; None for independent networks.
    """

    a: Run
    b: Run
    step: int | None = None
    start: tuple[Run, int] | None = None

    @property
    def at(self) -> int:
        """The step both networks are taken at."""
        return self.a.last_step if self.step is None else self.step

    def jobs(self) -> list[Job]:
        """What has to be trained before the pair can be measured."""
        out = [Job(self.a, weights=(self.at,)), Job(self.b, weights=(self.at,))]
        out.append(Job(_root(self.a), weights=(0,)))
        if self.start:
            run, step = self.start
            out.append(Job(run, weights=() if step else (0,), states=(step,) if step else ()))
        return out


def _root(run: Run) -> Run:
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
    mode = evaluation.bn if models.has_batchnorm(pair.a.recipe.net) else "none"
    curve = Curve(alphas, dict.fromkeys(splits, unknown), mode, sizes)
    # Gate G0 comes first, where it is asked again under other bounds.
    gates = (Gate("G0 quality", False, closing.WHY), _MISSING)
    ends, guess = (math.nan, math.nan), guessing(splits["test"])
    found = Barrier({mode: curve}, mode, gates, math.nan, data.classes, ends, guess)
    shared = ("a_start", "b_start", "start_init") if pair.start else ()
    names = ("ab", "cosine", "a_init", "b_init", *shared)
    nowhere = dict.fromkeys(splits, Measure(math.nan, math.nan)) if pair.start else {}
    return PairResult(found, dict.fromkeys(names, math.nan), nowhere)


def _measure(item: tuple[Pair, Evaluation, Store, str]) -> dict[str, Any]:
    pair, evaluation, store, device = item
    data = datasets.load(pair.a.recipe.data, device)

    def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
        return load_weights(run, step, store=store, device=device)

    module = build(pair.a, data, torch.device(device))
    names = layout(module).parameters
    a, b = weights(pair.a, pair.at), weights(pair.b, pair.at)
    splits = evaluation.splits(data)
    found = barrier(
        module,
        a,
        b,
        splits,
        points=evaluation.points,
        bn=evaluation.bn,
        bn_data=data.train,
        bn_examples=evaluation.bn_examples,
        classes=data.classes,
        same_noise=pair.a == pair.b,
    )
    init = weights(_root(pair.a), 0)
    distances = {
        "ab": distance(a, b, names),
        "cosine": cosine_distance(a, b, names),
        "a_init": distance(a, init, names),
        "b_init": distance(b, weights(_root(pair.b), 0), names),
    }
    start: dict[str, Any] = {}
    if pair.start:
        w_k = weights(*pair.start)
        distances |= {
            "a_start": distance(a, w_k, names),
            "b_start": distance(b, w_k, names),
            "start_init": distance(w_k, init, names),
        }
        at = evaluation.walker(module, splits, data).at(w_k)
        start = codec.to_json(at)
    return {"barrier": codec.to_json(found), "distances": distances, "start": start}


def entry_of_pair(pair: Pair, evaluation: Evaluation, store: Store, device: str) -> Entry:
    """The store's entry of what was measured of a pair."""
    data = datasets.load(pair.a.recipe.data, device)

    def key(run: Run) -> str:
        return entry_of(run, data, device, store).key

    return store.entry(
        {
            "kind": "pair",
            "evaluation": evaluation.identity(pair.a.recipe.net),
            "a": key(pair.a),
            "b": key(pair.b),
            "step": pair.at,
            "start": [key(pair.start[0]), pair.start[1]] if pair.start else None,
        }
    )


def _stored(item: tuple[Pair, Evaluation, Store, str]) -> dict[str, Any]:
    entry = entry_of_pair(*item)
    if known := _known(entry, "pair.json"):
        return known  # without a lock, so that a read-only store serves what it has
    with entry.lock():
        value = _known(entry, "pair.json")
        if value is None:
            value = _measure(item)
            entry.write_json("pair.json", value)
        return value


def _is_measured(entry: Entry) -> bool:
    try:
        return "pair.json" in entry
    except CorruptEntry:  # whoever reads it says so
        return False


def _known(entry: Entry, name: str) -> dict[str, Any] | None:
    try:
        return entry.read_json(name) if name in entry else None
    except CorruptEntry as e:
        log.warning("%s; it is discarded and measured again", e)
        entry.discard()
        return None


def measure(
    pairs: Sequence[Pair],
    evaluation: Evaluation | None = None,
    *,
    reference_error: float | None = None,
    max_error: float | None = None,
    store: Store | None = None,
    device: str = "cpu",
    workers: int = 0,
    label: str = "barriers",
) -> list[PairResult]:
    """Train what is missing, then measure every pair, in that order.

    Arguments:
        reference_error: percent, for gate G0. Default: the median error of all ends of this call,
            which is the recipe's own normal error. Ends above half the error of guessing fail all
            the same, or a call whose runs are all dead would pass (of text: ends that are no better
            than always saying the commonest token).
        max_error: percent; an end at or below it passes gate G0 whatever the reference.

    Raises:
        as :func:`companion.training.train`.
    """
    store, evaluation = store or Store(), evaluation or Evaluation()
    where = str(datasets.resolve_device(device))
    # What was measured needs no weights: a store may hold the numbers alone.
    missing = [p for p in pairs if not _is_measured(entry_of_pair(p, evaluation, store, where))]
    if missing and closing.active():
        closing.lacks([entry_of_pair(p, evaluation, store, where) for p in missing])
        known = iter(
            measure(
                [p for p in pairs if p not in missing],
                evaluation,
                reference_error=reference_error,
                max_error=max_error,
                store=store,
                device=where,
            )
        )
        return [_missing(p, evaluation, where) if p in missing else next(known) for p in pairs]
    train(
        [job for pair in missing for job in pair.jobs()], store=store, device=where, workers=workers
    )
    items = [(pair, evaluation, store, where) for pair in pairs]
    raw = run_all(_stored, items, workers=workers, device=where, label=label)
    found = [codec.from_json(Barrier, r["barrier"]) for r in raw]
    if reference_error is None:
        reference_error = normal_error(found)
    return [
        PairResult(
            f.judged(reference_error=reference_error, max_error=max_error),
            r["distances"],
            codec.from_json(dict[str, Measure], r["start"]),
        )
        for f, r in zip(found, raw, strict=True)
    ]


def normal_error(found: Sequence[Barrier]) -> float | None:
    """The median error of all ends, in percent: gate G0's reference. None without any.

    If most runs are dead, so is their median: G0 then asks for half the error of guessing; of text,
    for less than that of always saying the commonest token.
    """
    ends = sorted(e for f in found for e in f.errors)
    if found and found[0].guess is not None:
        return ends[len(ends) // 2]
    guessing = 100 * (1 - 1 / found[0].classes) if found else 0.0
    return min(ends[len(ends) // 2], guessing / 2 / 1.5) if ends else None


_FAILED = "failed.json"


def entry_of_null(run: Run, evaluation: Evaluation, store: Store, device: str) -> Entry:
    """The store's entry of the null control of a run."""
    key = entry_of(run, datasets.load(run.recipe.data, device), device, store).key
    known = evaluation.identity(run.recipe.net)
    return store.entry({"kind": "null", "evaluation": known, "run": key})


def check_null(
    run: Run,
    evaluation: Evaluation | None = None,
    *,
    store: Store | None = None,
    device: str = "cpu",
) -> Gate:
    """Gate G1: train ``run`` once more from its start, with the same noise, and compare.

    The stored copy may come from another process; both must agree in every bit, and the barrier
    between them must be exactly 0. A control that passed is kept in the store and not run again.
    """
    store, evaluation = store or Store(), evaluation or Evaluation()
    device = str(datasets.resolve_device(device))
    data = datasets.load(run.recipe.data, device)
    entry = entry_of_null(run, evaluation, store, device)
    if known := _known(entry, "gate.json"):
        return codec.from_json(Gate, known)
    if closing.active():
        if failed := _known(entry, _FAILED):
            return codec.from_json(Gate, failed)
        closing.lacks([entry])
        return Gate("G1 null control", None, closing.WHY)
    with entry.lock():
        if known := _known(entry, "gate.json"):
            return codec.from_json(Gate, known)
        gate = _null(run, evaluation, data, store, device)
        # One that failed is run again, but whoever closes the recording has to know of it.
        entry.write_json("gate.json" if gate.passed else _FAILED, codec.to_json(gate))
        return gate


class _Again(Store):
    """The same store under other keys: nothing that was trained before is found in it."""

    def entry(self, identity: Mapping[str, Any]) -> Entry:
        return super().entry({**identity, "again": True})


def _null(run: Run, evaluation: Evaluation, data: Dataset, store: Store, device: str) -> Gate:
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
    # On a GPU kernels may depend on the engine and on how many replicas there are at once.
    how = made_by(run, store=store, device=device)
    train_one(Job(run, weights=(run.last_step,)), store=fresh, device=device, like=how)
    second = load_weights(run, store=fresh, device=device)
    for entry in used:  # the next control trains anew
        entry.discard()
    module = build(run, data, torch.device(device))
    found = barrier(
        module,
        first,
        second,
        evaluation.splits(data),
        points=3,
        bn=evaluation.bn,
        bn_data=data.train,
        bn_examples=evaluation.bn_examples,
        same_noise=True,
        max_error=100.0,
    )
    worst = max(found.height(s, m) for s in ("train", "test") for m in ("error", "loss"))
    return null_control(first, second, layout(module).floating, worst)


def check_noise(runs: Sequence[Run], *, device: str = "cpu", most: int = 200) -> Gate:
    """Gate G3 over the data orders of ``runs``: the first epochs of each, ``most`` in all.

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
    made = draw(augmentation, run.augment_key(), epoch, len(data.train), data.train.window)
    found = [t.numpy().tobytes() for t in made.tensors() if t is not None]
    if has_dropout(run.recipe.net):
        first = epoch * (len(data.train) // run.recipe.batch)
        found.append(repr(run.dropout_key().fold(first).seed()).encode())
    return b"".join(found)
