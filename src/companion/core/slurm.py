"""Jobs on a cluster: the engine that :func:`companion.core.pool.run_all` hands its jobs to.

    with using("slurm:partition=main,time=60,tasks=32"):
        analyse(...)        # whatever this trains and measures, tasks of an array do

The jobs go as a plan into a queue in the run store (:mod:`companion.core.plans`). ``submitit``
submits an array of ``companion work QUEUE``; all that travels are that command line and the plan.
This process then watches the workers' notes. Run again, the same command finds its plan, and the
array that is at work on it. What every worker makes is in the run store, so whoever asked reads it
there; on a CPU the bits are those of one process. With the engine ``queue`` nothing is submitted:
it waits for workers that somebody starts, on any machine that sees the store.

The choice travels with a context variable; without one ``COMPANION_ENGINE`` says it.
"""

from __future__ import annotations

import dataclasses
import getpass
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from companion.core import deadline, locations, plans
from companion.core.claims import STALE_S
from companion.core.errors import BadParameter, JobsFailed, WorkerLost, one_of
from companion.core.plans import Outcome, Plan, Queue
from companion.core.signals import Terminated

T = TypeVar("T")
R = TypeVar("R")

ENGINES = ("local", "queue", "slurm")

STOPPED = 75
"""Exit code of a worker whose time was up: its script requeues the task."""

_TRIES = 3  # arrays in a row that end without one more job done
_LOOK_S = 5.0  # between two looks at a plan, at most


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Where jobs are done, when not here.

    Arguments:
        kind: ``slurm``, or ``queue``: workers are started by hand.
        partition, account, qos, constraint: as Slurm knows them; empty: its default.
        time: minutes that a task may take. A worker stops before, and its task is requeued.
        tasks: of an array, at most.
        jobs: a task has about so many at least; fewer jobs make a smaller array.
        cpus: of a task. On each works a process of its own, with one thread.
        gpus: of a task, 0 or 1; with one the devices are those of the cluster, and no GPU has to be
            where the command is typed.
        memory: gigabytes of a task; 0: the partition's default.
        replicas: networks of one recipe that a GPU trains at once.
        idle: seconds that workers wait for another plan before they go.
        stale: see :data:`companion.core.claims.STALE_S`.
        requeues: see :data:`companion.core.plans.REQUEUES`.
    """

    kind: str = "slurm"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time: int = 60
    tasks: int = 16
    jobs: int = 4
    cpus: int = 1
    gpus: int = 0
    memory: float = 0.0
    replicas: int = 8
    idle: float = 60.0
    stale: float = STALE_S
    requeues: int = plans.REQUEUES

    def __str__(self) -> str:
        given = ",".join(
            f"{f.name}={value:g}" if isinstance(value, float) else f"{f.name}={value}"
            for f in dataclasses.fields(self)
            if f.name != "kind" and (value := getattr(self, f.name)) != f.default
        )
        return f"{self.kind}:{given}" if given else self.kind

    @property
    def margin(self) -> float:
        """Seconds before the end of its time at which a worker stops."""
        return min(120.0, self.time * 60 / 4)

    def size(self, jobs: int) -> int:
        """Tasks of the array for so many jobs."""
        return max(1, min(self.tasks, -(-jobs // (self.jobs * self.cpus))))


def parse(text: str) -> Engine | None:
    """The engine that ``text`` asks for, such as ``slurm:partition=main,time=60``; None: local.

    Raises:
        BadParameter: an unknown engine or option, a value out of range.
    """
    kind, colon, rest = text.strip().partition(":")
    one_of("--engine", kind, ENGINES)
    if kind == "local":
        if colon:
            raise BadParameter("--engine: local has no options; see --workers.")
        return None
    fields = {f.name: f.type for f in dataclasses.fields(Engine) if f.name != "kind"}
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = (x.strip() for x in part.partition("="))
        one_of(f"--engine {kind}", name, fields)
        read = {"int": int, "float": float, "str": str}[str(fields[name])]
        try:
            if not equals or not value:
                raise ValueError
            values[name] = read(value)
        except ValueError:
            wanted = {int: "a whole number", float: "a number", str: "text"}[read]
            raise BadParameter(f"--engine: {part!r} needs {wanted}, as {name}=…") from None
        least = {"time": 1, "tasks": 1, "jobs": 1, "cpus": 1, "replicas": 1, "stale": 1}
        if read is not str and not least.get(name, 0) <= values[name] < 1e6:
            raise BadParameter(f"--engine: {name} must be {least.get(name, 0)} or more.")
        if name == "gpus" and values[name] > 1:
            raise BadParameter("--engine: a task works on one GPU; more tasks use more of them.")
    return Engine(kind=kind, **values)


_engine: ContextVar[Engine | str | None] = ContextVar("companion_cluster", default="")


@contextmanager
def using(text: str | None) -> Iterator[None]:
    """Inside, jobs go to this engine (see :func:`parse`); None: to whatever an outer one says."""
    if text is None:
        yield
        return
    token = _engine.set(parse(text))
    try:
        yield
    finally:
        _engine.reset(token)


def asked_for() -> Engine | None:
    """The engine asked for here, or by ``COMPANION_ENGINE``; None: this machine."""
    engine = _engine.get()
    return parse(locations.engine()) if isinstance(engine, str) else engine


def elsewhere() -> bool:
    """Whether the GPUs of the jobs are another machine's, and none has to be here."""
    engine = asked_for()
    return engine is not None and engine.gpus > 0


def queue_of(engine: Engine) -> Queue:
    """The queue of an engine in the default run store: one for each set of options."""
    text = re.sub(r"[^A-Za-z0-9.=_-]+", "_", str(engine).replace(",", "-"))
    return Queue(locations.runs_root() / ".work" / text[:120])


def command(engine: Engine, queue: Queue) -> list[str]:
    """The command line of a worker."""
    places = {"COMPANION_DATA": locations.data_root(), "COMPANION_RUNS": locations.runs_root()}
    kept = [f"{name}={path}" for name, path in places.items()]
    kept += [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if "PYTHONPATH" in os.environ else []
    words = ["env", *kept, sys.executable, "-m", "companion", "work", str(queue.folder)]
    words += f"--idle {engine.idle:g} --stale {engine.stale:g}".split()
    words += [] if engine.requeues == plans.REQUEUES else ["--requeues", str(engine.requeues)]
    limit = 60 * engine.time - engine.margin
    return words + (["--time-limit", f"{limit:g}"] if engine.kind == "slurm" else [])


def describe(engine: Engine, jobs: int) -> list[str]:
    """What would be submitted for so many jobs, a line each."""
    line = shlex.join(command(engine, queue_of(engine)))
    if engine.kind == "queue":
        return [f"{jobs} jobs into the queue; workers are started by hand: {line}"]
    n = engine.size(jobs)
    place = ", ".join(
        f"{k} {v}"
        for k in ("partition", "account", "qos", "constraint")
        if (v := getattr(engine, k))
    )
    memory = f", {engine.memory:g} GB" if engine.memory else ""
    return [
        f"one array of {n} tasks for {jobs} jobs, about {-(-jobs // n)} a task; each task: "
        f"{engine.time} min, {engine.cpus} CPUs, {engine.gpus} GPUs{memory}; "
        f"{place or 'the default partition'}",
        f"each task runs: {line}",
    ]


def check(engine: Engine) -> None:
    """Refuse what cannot be submitted from this machine.

    Raises:
        BadParameter: no Slurm here, or no submitit.
    """
    if engine.kind != "slurm":
        return
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise BadParameter(
            "--engine slurm: there is no sbatch here. Type the command where you submit from, or "
            "use --engine queue and start the workers by hand; --dry-run needs no Slurm."
        )
    if importlib.util.find_spec("submitit") is None:
        raise BadParameter("--engine slurm: submitit is missing: pip install 'companion[slurm]'.")


def run_all(
    engine: Engine,
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    after: Sequence[Sequence[int]] = (),
    named: Callable[[T], str] = lambda item: "",
    label: str = "",
) -> list[R]:
    """As :func:`companion.core.pool.run_all`, by workers elsewhere.

    Raises:
        BadParameter: as :func:`check`; something that cannot travel.
        JobsFailed: some failed; all others are done.
        WorkerLost: arrays end and nothing more is done.
        OutOfTime: the deadline of this process passed. The array goes on.
    """
    check(engine)
    queue = queue_of(engine)
    plan, numbers = queue.add(list(plans.jobs_of(work, items, after, named)))
    watch = _Watch(engine, queue, plan, numbers, label)
    watch.wait()
    if failed := watch.failed():
        raise JobsFailed(_said(failed, [named(item) for item in items], label))
    return [work(item) for item in items]  # which finds it in the store


def _said(failed: Sequence[tuple[int, Outcome]], names: Sequence[str], label: str) -> str:
    lines = [
        f"  {names[i] or f'job {end.job}'}: {end.why} (worker {end.worker}{', ' * bool(end.log)}"
        f"{end.log})"
        for i, end in failed[:10]
    ]
    rest = [f"  and {len(failed) - 10} more"] if len(failed) > 10 else []
    return "\n".join(
        [
            f"{label or 'jobs'}: {len(failed)} of {len(names)} failed, the others are done and "
            "stored. The same command tries these again:",
            *lines,
            *rest,
        ]
    )


class _Watch:
    """Waits for a plan: submits workers where there are none, and says how far they are."""

    def __init__(
        self, engine: Engine, queue: Queue, plan: Plan, numbers: Sequence[int], label: str
    ):
        self.engine, self.queue, self.plan, self.numbers = engine, queue, plan, numbers
        self.label, self.said = label or "jobs", time.monotonic()
        self.state: Counter[str] = Counter()

    def left(self) -> int:
        return sum(n not in self.plan.outcomes for n in self.numbers)

    def failed(self) -> list[tuple[int, Outcome]]:
        """(place among what was asked for, how it ended)."""
        found = ((i, self.plan.outcomes[n]) for i, n in enumerate(self.numbers))
        return [(i, end) for i, end in found if end.why]

    def wait(self) -> None:
        """Return once every job has ended."""
        bar: Any = tqdm(total=len(self.numbers), desc=self.label, disable=not sys.stderr.isatty())
        try:
            with bar:
                self._wait(bar)
            self.plan.end()
        except Terminated:  # a closed terminal, a kill: nobody said that the work should stop
            self.say(f"{self._arrays()} goes on; the same command attaches to it")
            raise
        except KeyboardInterrupt:
            self._interrupted()
            raise

    def _wait(self, bar: Any) -> None:
        pause, asked, lost, before = 0.2, 0.0, 0, -1
        while True:
            self.plan.look()
            left = self.left()
            bar.update(len(self.numbers) - left - bar.n)
            if not left:
                return
            deadline.stop_if_passed()
            now = time.monotonic()
            if now - asked > min(30.0, 4 * pause) and self.engine.kind == "slurm":
                first, asked, live = not asked, now, self.live()
                self.plan.look()  # what they noted before they went
                left = self.left()
                if live == 0 and left:
                    lost = lost + 1 if left == before else 1
                    before = left
                    if lost > _TRIES:
                        raise WorkerLost(self._lost(left))
                    self.submit(left)
                elif live and left and first:
                    self.say(f"{self._arrays()} is at work already, with {live} tasks")
            self._say(bar, left)
            time.sleep(pause)
            pause = min(_LOOK_S, 1.2 * pause)

    def submit(self, jobs: int) -> None:
        """Submit an array of workers."""
        import submitit

        engine, logs = self.engine, self.queue.folder / "logs"
        line = shlex.join(command(engine, self.queue))

        class Executor(submitit.SlurmExecutor):  # runs our line, not a pickled function
            @property
            def _submitit_command_str(self) -> str:
                return line

        executor = Executor(folder=logs)
        place = {k: getattr(engine, k) for k in ("partition", "account", "qos", "constraint")}
        executor.update_parameters(
            **{k: v for k, v in place.items() if v},
            **({"mem": f"{round(engine.memory * 1024)}MB"} if engine.memory else {}),
            **({"gpus_per_node": engine.gpus} if engine.gpus else {}),
            job_name="companion",
            time=engine.time,
            ntasks_per_node=engine.cpus,
            cpus_per_task=1,
            signal_delay_s=round(engine.margin / 2),
            array_parallelism=engine.tasks,
            # Before its time is up a worker ends with this code, and its task begins again.
            teardown=[
                "code=$?",
                f'[ $code = {STOPPED} ] && scontrol requeue "$SLURM_JOB_ID"',
                "exit $code",
            ],
            additional_parameters={"requeue": True},
        )
        one = submitit.helpers.CommandFunction([line])
        tasks = executor.submit_array([one] * engine.size(jobs))
        array = str(tasks[0].job_id).partition("_")[0]
        (self.queue.folder / "arrays").mkdir(exist_ok=True)
        (self.queue.folder / "arrays" / array).touch()
        for left in (*logs.glob("*.pkl"), *(logs / "after_submission").glob("*")):
            left.unlink(missing_ok=True)
        self.say(f"array {array}: {len(tasks)} tasks for {self.left()} jobs; logs in {logs}")

    def arrays(self) -> list[str]:
        """Numbers of the arrays that were submitted for this queue."""
        with suppress(OSError):
            return sorted(p.name for p in (self.queue.folder / "arrays").iterdir())
        return []

    def live(self) -> int | None:
        """Tasks of our arrays that wait or run; None if Slurm does not answer."""
        ask = ["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%F %T"]
        try:
            found = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        ours, rows = set(self.arrays()), [line.split() for line in found.stdout.splitlines()]
        self.state = Counter(row[1].lower() for row in rows if row and row[0] in ours)
        for gone in ours - {row[0] for row in rows if row}:
            (self.queue.folder / "arrays" / gone).unlink(missing_ok=True)
        return sum(self.state.values())

    def _arrays(self) -> str:
        return f"array {', '.join(self.arrays())}" if self.arrays() else "the queue"

    def _lost(self, left: int) -> str:
        logs = self.queue.folder / "logs"
        newest = max(logs.glob("*_log.err"), key=lambda p: p.stat().st_mtime, default=None)
        end = newest.read_text(errors="replace").strip().splitlines()[-3:] if newest else []
        return (
            f"{self.label}: {_TRIES} arrays ended and {left} of {len(self.numbers)} jobs are still "
            f"not done. What the last one said ({newest or logs}): {' | '.join(end) or 'nothing'}. "
            "What is finished is stored; the same command continues from there."
        )

    def _say(self, bar: Any, left: int) -> None:
        tasks = ", ".join(f"{n} {state}" for state, n in sorted(self.state.items()))
        bar.set_postfix_str(f"tasks: {tasks or 'none'}" if self.engine.kind == "slurm" else "")
        if bar.disable and time.monotonic() - self.said > 60:
            done = len(self.numbers) - left
            self.say(f"{done} of {len(self.numbers)} jobs done; tasks: {tasks or 'none'}")

    def say(self, text: str) -> None:
        """A line on the error stream: standard output belongs to results."""
        self.said = time.monotonic()
        tqdm.write(f"{self.label}: {text}", file=sys.stderr)

    def _interrupted(self) -> None:
        """Ctrl-C: cancel the arrays, unless the user says that they should go on."""
        if self.engine.kind != "slurm" or not self.arrays():
            return
        with suppress(EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                print(f"Cancel {self._arrays()}? [Y/n] ", end="", file=sys.stderr, flush=True)
                if sys.stdin.readline().strip().lower().startswith("n"):
                    self.say(f"{self._arrays()} goes on; the same command attaches to it")
                    return
        said = self._arrays()
        subprocess.run(["scancel", *self.arrays()], check=False, capture_output=True)
        self.plan.end()
        self.say(f"{said} is cancelled")
