"""What an experiment costs, before it runs: the runs and pairs that are missing, and a speed.

A plan lists exactly the pairs that an analysis will measure, so counting them counts what the run
store does not have yet; :func:`probe` takes a handful of steps on this device. The product is an
estimate, for planning a GPU's time: read it as "minutes or hours", not as a promise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from companion import data as datasets
from companion.connectivity import BN_MODES
from companion.core.errors import CorruptEntry
from companion.core.pool import one_thread, resolve_workers
from companion.core.runs import Entry, Store
from companion.core.theta import layout, snapshot
from companion.experiments.pairs import Evaluation, Pair, entry_of_null, entry_of_pair
from companion.training import Job, Recipe, Run, State, advance, build, entry_of, merge

_PROBE_S = 0.5  # seconds of the last call of a recipe, at least


@dataclass(frozen=True)
class Plan:
    """What one analysis trains and measures.

    Arguments:
        pairs: those to measure; what they need is trained.
        again: runs that are trained a second time (the null control, gate G1).
        jobs: what is trained for measurements that are not barriers of pairs, such as pairs that
            are matched first. Counted as missing while their states are, measured or not.
    """

    pairs: tuple[Pair, ...] = ()
    again: tuple[Run, ...] = ()
    jobs: tuple[Job, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Counts of one recipe; ``missing_*`` is what the run store does not have yet."""

    recipe: Recipe
    runs: int
    steps: int
    pairs: int
    missing_runs: int
    missing_steps: int
    missing_pairs: int


@dataclass(frozen=True)
class Speed:
    """Seconds of one training step, and of measuring one pair, in one process."""

    step: float
    pair: float


Probe: TypeAlias = Callable[[Recipe], Speed]


def count(
    plans: Sequence[Plan], evaluation: Evaluation, *, store: Store | None = None, device: str
) -> list[Cost]:
    """Runs, steps and pairs of all plans together; what two plans share counts once.

    Returns:
        one :class:`Cost` a recipe, in the order of the plans.
    """
    store, where = store or Store(), str(datasets.resolve_device(device))
    # Two ways to ask for one measurement (step T, or the end) are one entry.
    pairs = {
        (entry := entry_of_pair(pair, evaluation, store, where)).key: (pair, entry)
        for plan in plans
        for pair in plan.pairs
    }
    missing = [pair for pair, entry in pairs.values() if "pair.json" not in _files(entry)]
    again = {
        run: "gate.json" not in _files(entry_of_null(run, evaluation, store, where))
        for plan in plans
        for run in plan.again
    }
    asked = [job for plan in plans for job in plan.jobs]
    needed = {job.run: job for job in _jobs(missing, asked)}
    totals: dict[Recipe, list[int]] = {}
    for job in _jobs([pair for pair, _ in pairs.values()], asked):
        steps = _stop(job) - job.run.first_step
        if not steps:  # an init: built, not trained
            continue
        row = totals.setdefault(job.run.recipe, [0] * 6)
        left = job.run in needed and not _is_trained(needed[job.run], store, where)
        row[0] += 1 + (job.run in again)
        row[1] += steps * (1 + (job.run in again))
        row[3] += left + again.get(job.run, False)
        row[4] += steps * (left + again.get(job.run, False))
    for pair, entry in pairs.values():
        row = totals.setdefault(pair.a.recipe, [0] * 6)
        row[2] += 1
        row[5] += "pair.json" not in _files(entry)
    return [Cost(recipe, *row) for recipe, row in totals.items()]


def _jobs(pairs: Sequence[Pair], others: Sequence[Job]) -> list[Job]:
    """What the pairs and the others need, with the trunks that copies leave; one job a run."""
    wave = jobs = [*(job for pair in pairs for job in pair.jobs()), *others]
    while wave := [parent for job in wave if (parent := job.parents())]:
        jobs = jobs + wave
    return merge(jobs)


def _stop(job: Job) -> int:
    return max((*job.weights, *job.states), default=job.run.first_step)


def _files(entry: Entry) -> set[str]:
    """What the entry holds; one that is corrupt will be made again, so it holds nothing."""
    try:
        return set(entry.files())
    except CorruptEntry:
        return set()


def _is_trained(job: Job, store: Store, device: str) -> bool:
    """Whether the store has the job's last state; resume points in between are not looked into."""
    data = datasets.load(job.run.recipe.data, device)
    files = _files(entry_of(job.run, data, device, store))
    return any(f"{kind}-{_stop(job):08d}.safetensors" in files for kind in ("weights", "state"))


def probe(recipe: Recipe, evaluation: Evaluation, device: str) -> Speed:
    """Time a few steps and one point of a path on this device. Nothing is stored."""
    where = datasets.resolve_device(device)
    data = datasets.load(recipe.data, str(where))
    run = Run(recipe, init="probe", order="probe", augment="probe")

    def wait() -> float:
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return time.perf_counter()

    with one_thread():
        module = build(run, data, where)
        state = State(0, snapshot(module))
        most = min(10, recipe.steps)
        advance(run, state, most, data, module=module)  # warm-up: kernels, caches
        spent = 0.0
        # Longer and longer calls, until what a call costs by itself no longer counts.
        while not spent or (spent < _PROBE_S and most < recipe.steps):
            most = min(4 * most, recipe.steps) if spent else most
            start = wait()
            advance(run, state, most, data, module=module)
            spent = wait() - start
        step = spent / most
        splits = evaluation.splits(data)
        walker = evaluation.walker(module, splits, data)
        walker.at(state.theta)
        start = wait()
        walker.at(state.theta)
        point = wait() - start
    modes = len(BN_MODES) if layout(module).buffers else 1
    return Speed(step, point * (evaluation.points * modes + 4))


def estimate(costs: Sequence[Cost], speeds: Probe, *, device: str, workers: int) -> list[float]:
    """Seconds that are left, one number a cost.

    On a CPU as many processes work as ``workers`` says; a GPU works through runs in turn.
    """
    at_once = resolve_workers(workers) if datasets.resolve_device(device).type == "cpu" else 1
    out = []
    for cost in costs:
        if not (cost.missing_steps or cost.missing_pairs):
            out.append(0.0)
            continue
        speed = speeds(cost.recipe)
        work = cost.missing_steps * speed.step + cost.missing_pairs * speed.pair
        out.append(work / at_once)
    return out
