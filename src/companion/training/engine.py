"""From wanted states to stored states: what exists is loaded, what is missing is trained once.

Arguments that recur: ``store`` is a :class:`companion.core.runs.Store` (None: the default one),
``device`` a torch device name, ``workers`` the number of processes (0 = one per core; CPU only).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from companion import data as datasets
from companion.core import closing, deadline, slurm
from companion.core.errors import (
    BadParameter,
    CompanionError,
    CorruptData,
    CorruptEntry,
    StoreUnwritable,
    one_of,
)
from companion.core.pool import resolve_workers, run_all
from companion.core.runs import Entry, Store
from companion.core.theta import snapshot
from companion.data import Dataset
from companion.training import byhand, engines, loop, replicas
from companion.training.loop import State
from companion.training.masking import load_mask
from companion.training.recipe import Job, Recipe, Run, lineage

log = logging.getLogger("companion")

RESUME_EVERY_S = 20.0
"""A kill loses at most this many seconds of training (and never a stored checkpoint)."""

_STATE = re.compile(r"state-(\d+)\.safetensors")
_RESUME = "resume.safetensors"
_MADE_BY = "made-by.json"


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def entry_of(run: Run, data: Dataset, device: str | torch.device, store: Store) -> Entry:
    """The store's entry of ``run``."""
    return store.entry(run.identity(data.fingerprint, torch.device(device).type))


def _names(step: int) -> tuple[str, str]:
    return f"state-{step:08d}.safetensors", f"weights-{step:08d}.safetensors"


def _files(entry: Entry) -> set[str]:
    try:
        found = set(entry.files())
        with contextlib.suppress(StoreUnwritable):
            entry.mend()
        return found
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
    except KeyError:  # discarded by another process just now
        return None
    except (CorruptEntry, CorruptData, BadParameter) as e:
        log.warning("%s; it is discarded and made again", e)
        entry.remove(name)
        return None


def _origin(run: Run, data: Dataset, device: torch.device, store: Store) -> State:
    """The state a run starts from: its init, or its parent's state at k; perturbed, or masked."""
    if run.fork is None:
        start = State(0, snapshot(loop.build(run, data, device)))
    else:
        fork = run.fork
        parent = load_state(fork.parent, fork.step, store=store, device=str(device))
        step = fork.step if fork.schedule == "continue" else 0
        momentum = parent.optimizer if fork.optimizer == "restore" else {}
        start = State(step, parent.theta, momentum)
    if run.perturb is not None:
        start.theta = loop.perturbed(run, start.theta, loop.build(run, data, device))
    if run.mask is not None:
        mask = load_mask(run.mask, store=store, device=str(device))
        start = loop.pruned(start, mask, loop.build(run, data, torch.device("cpu")))
    return start


def _latest(entry: Entry, before: int) -> State | None:
    """The stored full state nearest below or at step ``before``."""
    steps = [(int(m[1]), m[0]) for n in _files(entry) if (m := _STATE.fullmatch(n))]
    usable = sorted((s, n) for s, n in steps if s <= before)
    state = None
    while usable and state is None:
        state = _read(entry, usable.pop()[1])
    if _RESUME in _files(entry):
        resumed = _read(entry, _RESUME)
        if resumed and resumed.step <= before and (not state or resumed.step > state.step):
            state = resumed
    return state


@dataclass
class _Work:
    """A job that holds its entry's lock: what is missing of it, and where its training starts.

    ``made``: how what is stored of it was trained, on a GPU.
    """

    job: Job
    entry: Entry
    missing: set[int]
    state: State
    made: Mapping[str, Any] = field(default_factory=dict)

    def save(self, reached: State) -> None:
        """Store a wanted state, or one to resume from."""
        if reached.step not in self.missing:
            self.entry.write_tensors(_RESUME, reached.tensors())
            return
        state_name, weights_name = _names(reached.step)
        if reached.step in self.job.states:
            self.entry.write_tensors(state_name, reached.tensors())
        else:
            self.entry.write_tensors(weights_name, reached.tensors(full=False))


def _begin(job: Job, data: Dataset, where: torch.device, store: Store) -> _Work | None:
    """The work that ``job`` needs; None if all its states exist. Its entry must be locked."""
    entry = entry_of(job.run, data, where, store)
    missing = _missing(entry, job)
    if not missing:
        return None
    state = _latest(entry, min(missing)) or _origin(job.run, data, where, store)
    work = _Work(job, entry, missing, state, _made_by(entry))
    if state.step in missing:
        work.save(state)
    return work


def _clock() -> Callable[[int], bool]:
    """When to keep a resume point: where one takes c > 1 seconds to write, every 20 c seconds.

    At the deadline, too; then the next step, once all of it is stored, ends in OutOfTime.
    """
    last, cost, saved = time.monotonic(), 0.0, False

    def tick(_: int) -> bool:
        nonlocal last, cost, saved
        now = time.monotonic()
        if saved:
            deadline.stop_if_passed()
            last, cost, saved = now, now - last, False
        if now - last < RESUME_EVERY_S * max(1.0, cost) and not deadline.passed():
            return False
        last, saved = now, True
        return True

    return tick


def train_one(
    job: Job,
    *,
    store: Store | None = None,
    device: str = "cpu",
    like: Mapping[str, Any] | None = None,
) -> None:
    """Make every state of ``job`` exist in the store. Returns at once if they do.

    Arguments:
        like: on a GPU, train as this record of :func:`made_by` says, to get the same bits.

    Raises:
        BadParameter: the recipe does not fit its dataset (checked before the first step).
        Diverged: the loss is not finite.
        StoreUnwritable: no space, or no permission.
        OutOfTime: see :mod:`companion.core.deadline`; the next call goes on from here.
    """
    _train_together(([job], store or Store(), device, like or {}))


def made_by(run: Run, *, store: Store | None = None, device: str = "cpu") -> dict[str, Any]:
    """How the stored ``run`` was trained on a GPU: engine, replicas at once, GPU; else {}.

    ``seconds`` is what ``steps`` steps of all replicas took, from the last start or resumption on,
    with everything that is not training (compiling, saving checkpoints) in it.
    """
    store, where = store or Store(), datasets.resolve_device(device)
    return _made_by(entry_of(run, datasets.load(run.recipe.data, where), where, store))


def _made_by(entry: Entry) -> dict[str, Any]:
    try:
        return dict(entry.read_json(_MADE_BY)) if _MADE_BY in _files(entry) else {}
    except KeyError:
        return {}
    except CorruptEntry as e:
        log.warning("%s; it is discarded", e)
        entry.remove(_MADE_BY)
        return {}


def _train_together(item: tuple[Sequence[Job], Store, str, Mapping[str, Any]]) -> None:
    """:func:`train_one` for jobs of one recipe, on one device: on a GPU as replicas."""
    jobs, store, device, like = item
    with engines.using(str(like.get("wish", "auto"))):  # of whoever asked, on another machine, too
        _train_alike(jobs, store, device, like)


def _train_alike(jobs: Sequence[Job], store: Store, device: str, like: Mapping[str, Any]) -> None:
    where, recipe = datasets.resolve_device(device), jobs[0].run.recipe
    data = datasets.load(recipe.data, str(where))
    todo = {entry_of(job.run, data, where, store).key: job for job in jobs}
    todo = {k: j for k, j in todo.items() if _missing(entry_of(j.run, data, where, store), j)}
    if not todo:
        return
    loop.check_fit(recipe, data)
    module = loop.build(jobs[0].run, data, where)
    engine = "loop"
    if _on_gpu(where):
        engine = _engine(recipe, module, data, where, str(like.get("engine", "auto")))
    with contextlib.ExitStack() as locks:
        # (step, length of the trace, last step, width so far) -> runs to train together
        groups: dict[tuple[int, int, int, int], list[_Work]] = {}
        for key in sorted(todo):  # in one order everywhere: nobody waits in a circle
            locks.enter_context(entry_of(todo[key].run, data, where, store).lock())
        for job in todo.values():
            if work := _begin(job, data, where, store):
                width = int(like.get("replicas", 0)) or _width_so_far(work, engine)
                at = (work.state.step, len(work.state.trace), max(work.missing), width)
                groups.setdefault(at, []).append(work)
        for (_, _, stop, width), group in groups.items():
            # Trained like another run, it is to have its bits, which no other engine gives.
            _train_group(group, stop, data, module, engine, width, only="replicas" in like)


def _engine(
    recipe: Recipe, module: torch.nn.Module, data: Dataset, where: torch.device, asked: str
) -> str:
    """The engine that ``asked`` stands for here.

    What a caller asks for by name it gets, or an error. What :func:`companion.training.using` asks
    for is meant for many networks, and one of them may need a simpler engine.
    """
    wish = engines.asked_for()
    if asked != "auto" or wish == "auto":
        return replicas.choose(module, where, asked, data)
    wish = engines.working(recipe, wish)
    while why := replicas.why_not(wish, module, data, recipe.precision):
        log.warning("%s on %s: %s", recipe.net, recipe.data, why)
        wish = engines.fall_back(recipe, wish) or "loop"
    return wish


def _width_so_far(work: _Work, engine: str) -> int:
    """The width that what is stored of a run was computed with, where its bits may depend on it."""
    begun = work.state.step > work.job.run.first_step
    same = engine == "vmap" and work.made.get("engine") == engine
    return int(work.made.get("replicas", 0)) if begun and same else 0


def _train_group(
    group: Sequence[_Work],
    stop: int,
    data: Dataset,
    module: torch.nn.Module,
    engine: str,
    width: int,
    only: bool,
) -> None:
    """Train runs from their states to ``stop`` and store what is missing of them.

    A simpler engine takes over where one fails (a capture, a compiler, a lack of memory), from
    where the runs were when they came in. Not with ``only``, and not where training itself ended:
    a time limit, a loss that is not finite, a full disk.

    Arguments:
        module: of their architecture, to compute with.
        width: compute with so many replicas; 0: with as many as the engine likes.
    """
    recipe, rest = group[0].job.run.recipe, list(group)
    where = data.train.x.device
    while rest:
        if not only and (instead := engines.working(recipe, engine)) != engine:
            engine, width = instead, 0
        # A loop takes one run at a time, or a few small ones, so that each is stored once it ends.
        few = {"loop": 1 if _on_gpu(where) else byhand.at_once(module), "loop-compile": 1}
        part = rest[: few.get(engine) or width or len(rest)]
        try:
            _advance(part, stop, data, module, engine, width)
        except CompanionError:
            raise
        except Exception as error:
            simpler = None if only else engines.fall_back(recipe, engine)
            if simpler is None:
                raise
            first = next(iter(str(error).splitlines()), "")
            log.warning(
                "the engine %r cannot train %s on %s (lr %g, T = %d); %r takes over. %s: %s",
                *(engine, recipe.net, recipe.data, recipe.lr, recipe.steps, simpler),
                *(type(error).__name__, first),
            )
            engine, width = simpler, 0
        else:
            rest = rest[len(part) :]
            continue
        # Here the error is gone, and with its frames what they held of the device's memory.
        if where.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _advance(
    group: Sequence[_Work],
    stop: int,
    data: Dataset,
    module: torch.nn.Module,
    engine: str,
    width: int,
) -> None:
    """:func:`_train_group` with one engine."""
    where, recipe = data.train.x.device, group[0].job.run.recipe
    if engine == "vmap" and not width:
        width = replicas.stacked(len(group), replicas.most_replicas(recipe, data, where))
    width = width or len(group)
    begun, first = time.monotonic(), group[0].state.step
    how: dict[str, Any] = {
        "engine": engine,
        "replicas": max(width, len(group)),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    if stop > first:
        done = replicas.advance_many(
            [w.job.run for w in group],
            [w.state for w in group],
            *(stop, data),
            engine=engine,
            module=module,
            checkpoints={s for w in group for s in w.missing} - {stop},
            # A state that only another run of the group wants is not this one's.
            save=functools.partial(_save_of, group, how if _on_gpu(where) else {}),
            tick=_clock(),
            width=width,
        )
        for work, reached in zip(group, done, strict=True):
            work.save(reached)
    how |= {"steps": stop - first, "seconds": round(time.monotonic() - begun, 3)}
    for work in group:
        # A start that is asked for later says nothing about how the rest was trained.
        if _on_gpu(where) and (stop > first or not work.made):
            work.entry.write_json(_MADE_BY, how)
        work.entry.remove(_RESUME)


def _save_of(group: Sequence[_Work], how: Mapping[str, Any], m: int, reached: State) -> None:
    wanted = any(reached.step in work.missing for work in group)
    if reached.step in group[m].missing or not wanted:
        if how and group[m].made != how:  # whoever goes on from here does it in the same way
            group[m].entry.write_json(_MADE_BY, how)
            group[m].made = dict(how)
        group[m].save(reached)


def _chunks(jobs: Sequence[Job], where: str, at_once: int, workers: int) -> list[list[Job]]:
    """Jobs that train alike (recipe, first and last step), at most so many together."""
    alike: dict[tuple[Recipe, int, int], list[Job]] = {}
    for job in jobs:
        last = max((*job.weights, *job.states), default=0)
        alike.setdefault((job.run.recipe, job.run.first_step, last), []).append(job)
    out = []
    for (recipe, _, _), group in alike.items():
        data, device = datasets.load(recipe.data, where), datasets.resolve_device(where)
        if _on_gpu(device):
            most = at_once or replicas.most_replicas(recipe, data, device)
        elif slurm.asked_for():
            most = 1  # many nodes: each job goes its own way
        else:  # every process has work
            few = byhand.at_once(loop.build(group[0].run, data, device))
            most = min(few, -(-len(group) // workers))
        parts = -(-len(group) // most)
        size = -(-len(group) // parts)  # 28 at most 27 at once: 14 and 14
        out += [group[i : i + size] for i in range(0, len(group), size)]
    return out


def train(
    jobs: Sequence[Job],
    *,
    store: Store | None = None,
    device: str = "cpu",
    workers: int = 0,
    label: str = "training",
    at_once: int = 0,
    engine: str = "auto",
) -> None:
    """Make every state of every job exist, many runs at once; parents before the copies they fork
    and the subnetworks they are pruned to.

    On a CPU every run has a process (:mod:`companion.core.pool`), or a few small ones share it
    (:mod:`companion.training.byhand`); on a GPU jobs of one recipe are trained as replicas
    (:mod:`companion.training.replicas`) with one of its engines, at most ``at_once`` (0: as many as
    fit, see :func:`companion.training.replicas.most_replicas`). Engine ``auto`` is what
    :func:`companion.training.using` says, else the network's own. Where an engine fails, a simpler
    one takes over, and the log says so.

    The longest runs start first. Ctrl-C or a kill loses at most :data:`RESUME_EVERY_S` seconds of
    each run at work; the same call then goes on from there with the same bits. Raises as
    :func:`train_one`; a first cheap pass over all jobs refuses what does not fit before any trains.
    """
    one_of("engine", engine, engines.ENGINES)
    store = store or Store()
    where = str(datasets.resolve_device(device))
    waves = lineage(jobs)
    for recipe in {job.run.recipe for wave in waves for job in wave}:
        loop.check_fit(recipe, datasets.load(recipe.data, where))
    gpu = _on_gpu(torch.device(where))
    how = {"engine": engine, "wish": engines.asked_for()}
    items: list[tuple[Sequence[Job], Store, str, Mapping[str, Any]]] = []
    after: list[list[int]] = []
    place: dict[Run, int] = {}  # the item that trains a run
    for wave in waves:
        todo = []
        for job in wave:
            data = datasets.load(job.run.recipe.data, where)
            if _missing(entry_of(job.run, data, where, store), job):
                todo.append(job)
        todo.sort(key=lambda j: j.run.first_step - max((*j.weights, *j.states), default=0))
        for chunk in _chunks(todo, where, at_once, resolve_workers(workers)):
            parents = {parent.run for job in chunk for parent in job.parents()}
            after.append(sorted({place[run] for run in parents if run in place}))
            place |= {job.run: len(items) for job in chunk}
            items.append((chunk, store, where, how))
    if items:
        closing.refuse_work()
    with engines.using("auto"):  # an engine that fails is not tried again in this call
        count = 1 if gpu else workers
        run_all(
            *(_train_together, items),
            workers=count,
            device=where,
            label=label,
            after=after,
            named=_named,
        )


def _named(item: tuple[Sequence[Job], Store, str, Mapping[str, Any]]) -> str:
    """What an item of :func:`_train_together` trains, in words."""
    run, more = item[0][0].run, len(item[0]) - 1
    fork = f", fork at step {run.fork.step}" if run.fork else ""
    words = f"{run.recipe.net} on {run.recipe.data}, init {run.init}, order {run.order}{fork}"
    return words + (f" and {more} more" if more else "")


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
    # What is made of weights is a measurement too, and would be of this machine.
    closing.refuse_work(what="a checkpoint")
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
