"""A real Slurm of one node: arrays, requeueing, preemption, killed workers, cancelling.

Started here by root where Debian's packages are installed (``.ci/run`` does that); else skipped.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import onenode
import pytest
from commands import run, same

from companion.core import slurm
from companion.core.errors import JobsFailed
from companion.core.plans import Plan, Queue
from companion.core.runs import Store
from companion.training import Fork, Job, Recipe, Run, load_weights, train

WHY_NOT = onenode.why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

QUICK = Recipe(net="mlp:widths=8", data="digits", steps=60, batch=60)
LONG = Recipe(net="mlp:widths=8", data="digits", steps=8_000, batch=60)
"""Some seconds: there is time to be stopped in."""


@pytest.fixture(scope="module")
def node() -> Iterator[Path]:
    with onenode.running() as conf:
        yield conf


@pytest.fixture(autouse=True)
def at_the_cluster(node: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a user of that Slurm; at the end nothing of the test's is left there."""
    pytest.importorskip("submitit")
    src = str(Path(slurm.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", src)
    monkeypatch.setenv("SLURM_CONF", str(node))
    monkeypatch.setattr(slurm, "_LOOK_S", 0.5)  # of those who ask here
    yield
    subprocess.run(["scancel", "-u", "root", "--signal=KILL", "--full"], check=False)
    subprocess.run(["scancel", "-u", "root"], check=False)


def copies(recipe: Recipe, count: int) -> list[Job]:
    trunk = Run(recipe, order="trunk")
    runs = [Run(recipe, order=n, fork=Fork(trunk, 20)) for n in range(count)]
    return [Job(run, weights=(recipe.steps,)) for run in runs]


def alone(recipe: Recipe, count: int) -> list[Job]:
    return [Job(Run(recipe, order=n), weights=(recipe.steps,)) for n in range(count)]


def only_queue() -> Queue:
    """Once it is there."""
    until(lambda: list((Store().root / ".work").glob("*/plans/*/plan.jsonl")))
    (folder,) = (Store().root / ".work").iterdir()
    return Queue(folder)


def outcomes(queue: Queue) -> dict[int, str]:
    """Job -> the worker that did it, of the newest plan."""
    plan = Plan(max((queue.folder / "plans").iterdir()))
    return {job: end.worker for job, end in plan.look().items()}


def output(queue: Queue) -> str:
    return "".join(path.read_text() for path in sorted((queue.folder / "logs").glob("*_log.out")))


def until(said: Callable[[], object], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


class Asking(threading.Thread):
    """``train(jobs)`` with an engine, beside the test; ``join`` raises what it raised."""

    def __init__(self, jobs: list[Job], engine: str):
        super().__init__(daemon=True)
        self.jobs, self.engine = jobs, engine
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with slurm.using(self.engine):
                train(self.jobs)
        except BaseException as e:
            self.error = e

    def end(self, seconds: float = 600) -> None:
        self.join(seconds)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def assert_as_alone(jobs: list[Job], folder: Path) -> None:
    """The bits are those of one process that nobody stopped."""
    store = Store(folder)
    train(jobs, store=store, workers=1)
    for job in jobs:
        assert same(load_weights(job.run, store=store), load_weights(job.run))


def test_an_array_makes_the_bits_of_one_process_and_names_what_failed(tmp_path):
    """Two waves, two tasks of two processes; one run diverges, and the others go on."""
    good = copies(QUICK, 6)
    bad = Job(Run(Recipe(**{**QUICK.identity(), "lr": 1e30}), init=7), weights=(60,))
    engine = "slurm:time=5,tasks=2,jobs=1,idle=0"
    with slurm.using(engine), pytest.raises(JobsFailed) as failed:
        train([*good, bad])
    text = str(failed.value)
    assert "1 of 8 failed, the others are done" in text and "init 7, order 0: " in text
    log = Path(re.search(r"(/\S+_log\.out)\)", text)[1])
    assert "not finite" in log.read_text() or "diverged" in log.read_text().lower()
    queue = only_queue()
    workers = outcomes(queue)
    assert len(workers) == 8 and all(re.fullmatch(r"\d+_[01]_0", w) for w in workers.values())
    assert not list((queue.folder / "logs").rglob("*.pkl"))  # nothing pickled is left, or was run
    assert_as_alone(good, tmp_path / "alone")


def test_the_command_line_gives_the_numbers_of_this_machine(tmp_path, monkeypatch):
    words = "--net mlp:widths=8 --data digits --steps 60 --batch 60 --ks 0,20 --inits 1 --copies 2"
    words = ["instability", *words.split(), "--points", "3", "--max-error", "100"]
    engine = ["--engine", "slurm:time=5,tasks=2,jobs=1,idle=20"]
    run(*words, *engine, "--json", tmp_path / "there.json")
    monkeypatch.setenv("COMPANION_RUNS", str(tmp_path / "alone"))
    run(*words, "--workers", "1", "--json", tmp_path / "here.json")
    there, here = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("there", "here"))
    assert [there[key] for key in ("pairs", "ks")] == [here[key] for key in ("pairs", "ks")]
    monkeypatch.undo()


def test_preempted_and_killed_workers_lose_nothing(tmp_path):
    """One task gets the signal of a preemption, stops with exit code 75 and is requeued; another
    one's worker is killed (no memory, say), and its job taken over from where it was."""
    wanted = alone(LONG, 2)
    asking = Asking(wanted, "slurm:time=5,tasks=2,jobs=1,idle=0")
    queue = only_queue()
    until(lambda: output(queue).count(" job ") == 2)
    claims = next((queue.folder / "plans").iterdir()) / "claims"
    held = {p.name: json.loads(p.read_text()) for p in claims.glob("?.1")}
    assert {about["who"].split("_")[1] for about in held.values()} == {"0", "1"}
    array = next(iter(held.values()))["who"].split("_")[0]
    first = next(about for about in held.values() if about["who"].split("_")[1] == "0")
    subprocess.run(["scancel", "--signal=USR2", f"{array}_0"], check=True)  # as submitit does
    until(lambda: "stopped; what it had in hand" in output(queue))
    second = next(about for about in held.values() if about is not first)
    os.kill(second["pid"], signal.SIGKILL)
    asking.end()
    assert set(outcomes(queue)) == {0, 1}
    assert len(re.findall(r"job \d: ", output(queue))) >= 4  # both were begun again
    assert_as_alone(wanted, tmp_path / "alone")


def test_ctrl_c_cancels_and_a_closed_terminal_does_not(request):
    """A closed terminal leaves the array at work; the same command attaches to it."""
    text = "--net mlp:widths=8 --data digits --steps 200000 --batch 60 --ks 0 --inits 1 --copies 2"
    words = [sys.executable, "-m", "companion", "instability", *text.split()]
    words += ["--engine", "slurm:time=5,tasks=1,idle=0"]

    def command() -> subprocess.Popen[str]:
        quiet, pipe = subprocess.DEVNULL, subprocess.PIPE
        begun = subprocess.Popen(
            words,
            stdin=quiet,
            stdout=quiet,
            stderr=pipe,
            text=True,
            # A shell's background ignores Ctrl-C, and whatever it starts inherits that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        request.addfinalizer(begun.kill)
        return begun

    def tasks() -> str:
        ask = ["squeue", "-h", "-o", "%T"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout

    one = command()
    until(lambda: " job " in output(only_queue()))
    one.send_signal(signal.SIGTERM)
    assert "goes on; the same command attaches" in one.communicate(timeout=600)[1]
    assert one.returncode == 143 and "RUNNING" in tasks()
    two = command()
    (plan,) = only_queue().plans()
    assert "is at work already, with 1 tasks" in two.stderr.readline()
    time.sleep(1)  # not while it writes that line: people read it first
    two.send_signal(signal.SIGINT)
    assert "is cancelled" in two.communicate(timeout=600)[1] and two.returncode == 130
    until(lambda: "RUNNING" not in tasks())
    assert plan.over and len(list((only_queue().folder / "plans").iterdir())) == 1
