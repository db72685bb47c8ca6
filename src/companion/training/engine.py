"""From wanted states to stored states: what exists is loaded, what is missing is trained once.

Arguments that recur: ``store`` is a :class:`companion.runs.Store` (None: the default one),
``device`` a torch device name, ``workers`` the number of processes (0 = one per core; CPU only).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from companion import data as datasets
from companion import deadline
from companion.data import Dataset
from companion.errors import BadParameter, CorruptEntry
from companion.pool import run_all
from companion.runs import Entry, Store
from companion.theta import snapshot
from companion.training import loop
from companion.training.loop import State
from companion.training.recipe import Run

log = logging.getLogger("companion")

RESUME_EVERY_S = 20.0
"""A kill loses at most this many seconds of training (and never a stored checkpoint)."""

_RESUME = "resume.safetensors"


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

    def parents(self) -> Job | None:
        """The job that must be done before this one."""
        fork = self.run.fork
        return Job(fork.parent, states=(fork.step,)) if fork else None


def entry_of(run: Run, data: Dataset, device: str | torch.device, store: Store) -> Entry:
    """The store's entry of ``run``."""
    return store.entry(run.identity(data.fingerprint, torch.device(device).type))


def _names(step: int) -> tuple[str, str]:
    return f"state-{step:08d}.safetensors", f"weights-{step:08d}.safetensors"


def _files(entry: Entry) -> set[str]:
    try:
        return set(entry.files())
    except CorruptEntry as e:
        log.warning("%s; the entry is discarded and made again", e)
        entry.discard()
        return set()


def _missing(entry: Entry, job: Job) -> set[int]:
    have = _files(entry)
    return {s for s in job.states if _names(s)[0] not in have} | {
        s for s in job.weights if have.isdisjoint(_names(s))
    }


def _read(entry: Entry, name: str) -> State | None:
    try:
        return State.from_tensors(entry.read_tensors(name))
    except CorruptEntry as e:
        log.warning("%s; it is discarded and made again", e)
        entry.remove(name)
        return None


def _origin(run: Run, data: Dataset, device: torch.device, store: Store) -> State:
    """The state a run starts from: its init, or its parent's state at k."""
    if run.fork is None:
        return State(0, snapshot(loop.build(run, data, device)))
    fork = run.fork
    parent = load_state(fork.parent, fork.step, store=store, device=str(device))
    step = fork.step if fork.schedule == "continue" else 0
    return State(step, parent.theta, parent.optimizer if fork.optimizer == "restore" else {})


def _latest(entry: Entry, before: int) -> State | None:
    """The stored full state nearest below or at step ``before``."""
    steps = [(int(n[6:14]), n) for n in _files(entry) if n.startswith("state-")]
    usable = sorted((s, n) for s, n in steps if s <= before)
    state = None
    while usable and state is None:
        state = _read(entry, usable.pop()[1])
    if _RESUME in _files(entry):
        resumed = _read(entry, _RESUME)
        if resumed and resumed.step <= before and (not state or resumed.step > state.step):
            state = resumed
    return state


def train_one(job: Job, *, store: Store | None = None, device: str = "cpu") -> None:
    """Make every state of ``job`` exist in the store. Returns at once if they do.

    Raises:
        BadParameter: the recipe does not fit its dataset (checked before the first step).
        Diverged: the loss is not finite.
        StoreUnwritable: no space, or no permission.
        OutOfTime: see :mod:`companion.deadline`; the next call goes on from here.
    """
    store, where = store or Store(), datasets.resolve_device(device)
    data = datasets.load(job.run.recipe.data, str(where))
    entry = entry_of(job.run, data, where, store)
    if not _missing(entry, job):
        return
    loop.check_fit(job.run.recipe, data)
    with entry.lock():
        missing = _missing(entry, job)
        if not missing:
            return
        state = _latest(entry, min(missing)) or _origin(job.run, data, where, store)
        full = set(job.states)

        def save(reached: State) -> None:
            if reached.step in missing:
                state_name, weights_name = _names(reached.step)
                if reached.step in full:
                    entry.write_tensors(state_name, reached.tensors())
                else:
                    entry.write_tensors(weights_name, reached.tensors(full=False))
            else:
                entry.write_tensors(_RESUME, reached.tensors())
                deadline.check()

        if state.step in missing:
            save(state)
        last = time.monotonic()

        def tick(_: int) -> bool:
            nonlocal last
            if time.monotonic() - last < RESUME_EVERY_S and not deadline.passed():
                return False
            last = time.monotonic()
            return True

        stop = max(missing)
        if stop > state.step:
            reached = loop.advance(
                job.run, state, stop, data, checkpoints=missing - {stop}, save=save, tick=tick
            )
            save(reached)
        entry.remove(_RESUME)


def _train(item: tuple[Job, Store, str]) -> None:
    job, store, device = item
    train_one(job, store=store, device=device)


def merge(jobs: Iterable[Job]) -> list[Job]:
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


def train(
    jobs: Sequence[Job],
    *,
    store: Store | None = None,
    device: str = "cpu",
    workers: int = 0,
    label: str = "training",
) -> None:
    """Make every state of every job exist, many runs at once; parents before the copies they fork.

    The longest runs start first. Ctrl-C or a kill loses at most :data:`RESUME_EVERY_S` seconds of
    each run at work; the same call then goes on from there with the same bits. Raises as
    :func:`train_one`; a first cheap pass over all jobs refuses what does not fit before any trains.
    """
    store = store or Store()
    where = str(datasets.resolve_device(device))
    generations: list[list[Job]] = []
    wave = merge(jobs)
    while wave:
        generations.append(wave)
        wave = merge(p for job in wave if (p := job.parents()))
    for recipe in {job.run.recipe for wave in generations for job in wave}:
        loop.check_fit(recipe, datasets.load(recipe.data, where))
    for wave in reversed(generations):
        todo = [
            job
            for job in wave
            if _missing(
                entry_of(job.run, datasets.load(job.run.recipe.data, where), where, store), job
            )
        ]
        todo.sort(key=lambda j: j.run.first_step - max((*j.weights, *j.states), default=0))
        run_all(
            _train, [(j, store, where) for j in todo], workers=workers, device=where, label=label
        )


def load_state(run: Run, step: int, *, store: Store | None = None, device: str = "cpu") -> State:
    """The full state of ``run`` at ``step`` on the CPU; trained first if it is not stored."""
    return _load(run, step, Job(run, states=(step,)), (0,), store, device)


def load_weights(
    run: Run, step: int | None = None, *, store: Store | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """The state dict of ``run`` at ``step`` (None = T) on the CPU; trained first if not stored.

    A stored copy that fails its checksum is reported in the log, discarded and made again.
    """
    step = run.last_step if step is None else step
    return _load(run, step, Job(run, weights=(step,)), (1, 0), store, device).theta


def _load(
    run: Run, step: int, job: Job, kinds: tuple[int, ...], store: Store | None, device: str
) -> State:
    store, where = store or Store(), datasets.resolve_device(device)
    entry = entry_of(run, datasets.load(run.recipe.data, where), where, store)
    for _ in range(3):
        train_one(job, store=store, device=device)
        for kind in kinds:
            name = _names(step)[kind]
            if name in _files(entry) and (state := _read(entry, name)):
                return state
    raise CorruptEntry(
        f"run store: {entry.path} was written three times and never read back as written. "
        "The disk may be failing; point COMPANION_RUNS at another one."
    )
