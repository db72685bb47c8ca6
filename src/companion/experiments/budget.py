"""What an experiment costs, before it runs: the runs and measurements missing, and a speed.

A plan lists exactly what an analysis will measure, so counting it counts what the run store does
not have yet; :func:`probe` takes a handful of steps on this device. The product is an estimate, for
planning a GPU's time: read it as "minutes or hours", not as a promise.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from companion import data as datasets
from companion.core import slurm
from companion.core.errors import CorruptEntry
from companion.core.pool import one_thread, resolve_workers
from companion.core.runs import Entry, Store
from companion.core.theta import snapshot
from companion.experiments.measurement import Measurement
from companion.experiments.pairs import Evaluation
from companion.training import (
    Job,
    Recipe,
    Run,
    State,
    advance,
    build,
    entry_of,
    lineage,
    merge_jobs,
)

_PROBE_S = 0.5  # seconds of the last call of a recipe, at least


Plan: TypeAlias = Sequence[Measurement]
"""What one analysis measures; what has to be trained for it follows."""


@dataclass(frozen=True)
class Count:
    """How many runs are trained, of how many steps in all, and what is measured.

    Arguments:
        measured: kind of measurement -> number.
        points: networks evaluated on all splits for them, as far as they know beforehand.
    """

    runs: int = 0
    steps: int = 0
    measured: Mapping[str, int] = field(default_factory=dict)
    points: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.runs + other.runs,
            self.steps + other.steps,
            Counter(self.measured) + Counter(other.measured),
            self.points + other.points,
        )

    def __bool__(self) -> bool:
        return bool(self.steps or self.measured)


@dataclass(frozen=True)
class Cost:
    """What a recipe costs in all, and the part of it that the run store does not have yet."""

    recipe: Recipe
    whole: Count = Count()
    missing: Count = Count()


@dataclass(frozen=True)
class Speed:
    """Seconds of one training step, and of evaluating one network on all splits."""

    step: float
    point: float


Probe: TypeAlias = Callable[[Recipe], Speed]


def count(plans: Sequence[Plan], *, store: Store | None = None, device: str) -> list[Cost]:
    """Runs, steps and measurements of all plans together; what two plans share counts once.

    Returns:
        one :class:`Cost` a recipe, in the order of the plans.
    """
    store, where = store or Store(), str(datasets.resolve_device(device))
    # Two ways to ask for one measurement (step T, or the end) are one entry.
    entries = {
        (entry := task.entry(store, where)).key: (task, entry) for plan in plans for task in plan
    }
    unknown = {k for k, (task, entry) in entries.items() if task.FILE not in _files(entry)}
    found: list[tuple[Recipe, Count, Count]] = []
    needed = {job.run: job for job in _all_jobs(entries[k][0] for k in unknown)}
    for job in _all_jobs(task for task, _ in entries.values()):
        stop = max((*job.weights, *job.states), default=job.run.first_step)
        if steps := stop - job.run.first_step:  # an init is built, not trained
            left = _steps_left(needed[job.run], store, where) if job.run in needed else 0
            rest = Count(1, left) if left else Count()
            found.append((job.run.recipe, Count(1, steps), rest))
    for key, (task, _) in entries.items():
        own = Count(len(task.trains), sum(task.trains), {task.KIND: 1}, task.points)
        found.append((task.recipe, own, own if key in unknown else Count()))
    costs: dict[Recipe, Cost] = {}
    for recipe, whole, missing in found:
        cost = costs.get(recipe, Cost(recipe))
        costs[recipe] = Cost(recipe, cost.whole + whole, cost.missing + missing)
    return list(costs.values())


def _all_jobs(tasks: Iterable[Measurement]) -> list[Job]:
    """What has to be trained for them: one job a run, with all that copies and masks come from."""
    asked = [job for task in tasks for job in task.jobs()]
    return merge_jobs([*asked, *(job for wave in lineage(asked) for job in wave)])


def _files(entry: Entry) -> set[str]:
    """What the entry holds; one that is corrupt will be made again, so it holds nothing."""
    try:
        return set(entry.files())
    except CorruptEntry:
        return set()


def _steps_left(job: Job, store: Store, device: str) -> int:
    """Steps to train until the store has all of the job's states; resume points do not count."""
    data = datasets.load(job.run.recipe.data, device)
    files = _files(entry_of(job.run, data, device, store))
    whole = {int(name[6:14]) for name in files if name.startswith("state-")}
    known = whole | {int(name[8:16]) for name in files if name.startswith("weights-")}
    missing = {*job.states} - whole | {*job.weights} - known
    if not missing:
        return 0
    return max(missing) - max((s for s in whole if s <= min(missing)), default=job.run.first_step)


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
    return Speed(step, point)


def estimate(costs: Sequence[Cost], speeds: Probe, *, device: str, workers: int) -> list[float]:
    """Estimated seconds remaining, one per cost, to train and to walk along lines.

    Matching, features and sweeps of layers are counted as measurements, but not in the time.

    On a CPU as many processes work as ``workers`` says; a GPU works through runs in turn; on a
    cluster as many as its array has, all of them at once.
    """
    cluster, cpu = slurm.asked_for(), datasets.resolve_device(device).type == "cpu"
    at_once = resolve_workers(workers) if cpu else 1
    if cluster:
        at_once = cluster.tasks * (cluster.cpus if cpu else 1)
    out = []
    for cost in costs:
        speed = speeds(cost.recipe) if cost.missing else Speed(0.0, 0.0)
        seconds = cost.missing.steps * speed.step + cost.missing.points * speed.point
        out.append(seconds / at_once)
    return out


def submitted(costs: Sequence[Cost], how: Evaluation, *, device: str, workers: int) -> list[str]:
    """What the missing part costs and, on a cluster, what is submitted for it; a line each.

    The speed is this machine's, probed for a second or two a recipe; on a cluster whose GPUs are
    not here there is none.
    """
    missing = sum((cost.missing for cost in costs), Count())
    if not missing:
        return ["nothing is left to compute"]
    cluster, lines = slurm.asked_for(), []
    if not (cluster and cluster.gpus):
        speed = partial(probe, evaluation=how, device=device)
        s = sum(estimate(costs, speed, device=device, workers=workers))
        hours = f"{s / 60:.0f} min" if s < 5400 else f"{s / 3600:.1f} h"
        said = f"{s:.0f} s" if s < 90 else hours
        here = " at this machine's speed, without waiting for a place" if cluster else ""
        lines.append(f"estimate: {said} on {device}{here} to train and to walk along lines")
    if cluster:
        lines += slurm.describe(cluster, missing.runs + sum(missing.measured.values()))
    return lines
