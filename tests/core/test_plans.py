"""Plans, claims and workers: every job once, whoever dies; the same bits as in one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import everykind
import pytest
from commands import run, said, same

from companion.core import claims as claims_module
from companion.core import deadline, locks, plans, pool, slurm, travel
from companion.core.claims import DEATHS, Claims
from companion.core.errors import (
    BadParameter,
    CorruptData,
    JobsFailed,
    OutOfTime,
    WorkerLost,
)
from companion.core.plans import Queue, Work, Worker
from companion.core.runs import Store
from companion.training import Fork, Job, Recipe, Run, load_weights, train

RECIPE = Recipe(net="mlp:widths=8", data="digits", steps=40, batch=60)


def jobs(recipe: Recipe = RECIPE, count: int = 2, fork: int = 10) -> list[Job]:
    """Copies of one trunk: two waves."""
    trunk = Run(recipe, order="trunk")
    copies = [Run(recipe, order=n, fork=Fork(trunk, fork)) for n in range(count)]
    return [Job(run, weights=(recipe.steps,)) for run in copies]


def served(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Workers of these names take what a ``queue`` asks for, one after the other, in its place."""

    def submit(self: slurm._Watch, *_: object) -> None:
        for name in names or ("one",):
            with slurm.using("local"):
                Worker(name, stale=1).serve(self.queue)

    monkeypatch.setattr(slurm._Watch, "_say", submit)


# ---- what travels


def test_every_kind_of_measurement_and_training_travels(store, monkeypatch):
    """As JSON, and comes back equal; so what another machine makes has the key asked for here."""
    found = set()

    class Enough(Exception):
        pass

    def there_and_back(engine, work, items, after, named, label):
        text = json.dumps([travel.to_wire(item) for item in items], allow_nan=False)
        again = [travel.from_wire(data) for data in json.loads(text)]
        assert again == list(items) and all(named(item) for item in items)
        assert travel.function(travel.name_of(work)) is work
        if isinstance(items[0][0], list):
            return [None] * len(items)  # as if trained
        found.update(item[0].KIND for item in items)
        raise Enough

    monkeypatch.setenv("COMPANION_ENGINE", "queue")
    monkeypatch.setattr(slurm, "run_all", there_and_back)
    for ask in everykind.ASKED.values():
        with pytest.raises(Enough):
            ask(store)
    assert found == set(everykind.ASKED)


def test_only_values_of_this_package_travel_and_only_they_are_read():
    with pytest.raises(BadParameter, match="a set cannot travel"):
        travel.to_wire({1, 2})
    with pytest.raises(BadParameter, match="not of this package"):
        travel.name_of(subprocess.run)
    for name in ("os:system", "companion.core.runs:os.system", "companion.core.nothing:A"):
        with pytest.raises(CorruptData):
            travel.function(name)
        with pytest.raises(CorruptData):
            travel.from_wire({name: {}})
    with pytest.raises(CorruptData, match="not of this version"):
        travel.from_wire({"companion.training.recipe:Recipe": {"depth": 3}})


# ---- which engine


def test_workers_are_told_how_often_a_job_may_be_stopped(runs_root):
    engine = slurm.parse("slurm:requeues=3")
    assert engine and "--requeues 3" in " ".join(slurm.command(engine, slurm.queue_of(engine)))


def test_an_engine_is_a_name_with_options():
    engine = slurm.parse("slurm:partition=long,time=90,tasks=4,cpus=2,memory=1.5")
    assert engine == slurm.parse(str(engine)) and engine.size(1000) == 4 and engine.size(9) == 2
    assert slurm.parse("local") is None and str(slurm.parse("slurm")) == "slurm"
    for text, message in {
        "slrum": "Did you mean 'slurm'?",
        "slurm:tme=3": "Did you mean 'time'?",
        "slurm:time=soon": "a whole number",
        "slurm:tasks=0": "1 or more",
        "slurm:gpus=2": "one GPU",
        "local:tasks=3": "no options",
    }.items():
        with pytest.raises(BadParameter, match=message.replace("?", r"\?")):
            slurm.parse(text)


def test_the_engine_asked_for_in_code_hides_the_environment(monkeypatch):
    monkeypatch.setenv("COMPANION_ENGINE", "slurm:tasks=3")
    assert slurm.asked_for().tasks == 3
    with slurm.using("queue"), slurm.using(None):
        assert slurm.asked_for().kind == "queue"
        with slurm.using("local"):
            assert slurm.asked_for() is None and not slurm.elsewhere()


WORDS = [
    "--net",
    "mlp:widths=8",
    "--data",
    "digits",
    "--steps",
    "40",
    "--batch",
    "60",
    "--inits",
    "1",
    "--copies",
    "2",
]


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_submitted_and_needs_no_slurm(runs_root, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    slurm_words = ["--engine", "slurm:partition=long,time=90,tasks=4,jobs=1,memory=2"]
    text = said("instability", *WORDS, "--ks", "0,10", *slurm_words, "--dry-run")
    assert "5 runs: 0 in the store" in text and "estimate:" in text
    assert "one array of 4 tasks for 7 jobs" in text and "90 min" in text and "2 GB" in text
    assert "partition long" in text and f"-m companion work {runs_root}/.work/" in text
    assert "--time-limit 5280" in text  # two minutes before the end
    text = said("tickets", *WORDS, "--rounds", "2", *slurm_words, "--dry-run")
    assert "one array of" in text and not runs_root.exists()
    text = said("instability", *WORDS, "--ks", "0", "--dry-run")
    assert "estimate:" in text and "array" not in text


def test_without_slurm_it_says_so_before_anything_is_trained(runs_root, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    text = said("instability", *WORDS, "--ks", "0", "--engine", "slurm", code=2)
    assert "there is no sbatch here" in text and not runs_root.exists()


def test_gpus_of_a_cluster_need_none_here(store):
    recipe = Recipe(net="mlp:widths=8", data="digits", steps=40, batch=60)
    with slurm.using("queue:gpus=1,replicas=3"):
        from companion import data

        assert str(data.resolve_device("auto")) == "cuda:0"
        assert data.load("digits", "cuda").train.x.device.type == "cpu"
        plan: list = []
        with pytest.MonkeyPatch.context() as m:
            m.setattr(slurm, "run_all", lambda engine, work, items, **more: plan.extend(items))
            train([Job(Run(recipe, order=n), weights=(40,)) for n in range(5)], device="cuda")
    assert sorted(len(item[0]) for item in plan) == [2, 3] and plan[0][2] == "cuda:0"


# ---- claims


def test_a_claim_is_held_by_one_and_given_back(tmp_path):
    with Claims(tmp_path, "a") as a, Claims(tmp_path, "b") as b:
        with a.take("7") as ours, b.take("7") as too:
            assert ours and not too
        with b.take("7") as ours:
            assert ours
    assert not list(tmp_path.iterdir())


DIE = """
    import sys, os, signal
    from pathlib import Path
    from companion.core.claims import Claims
    with Claims(Path(sys.argv[1]), sys.argv[2]) as claims:
        with claims.take("7") as ours:
            assert ours
            os.kill(os.getpid(), signal.SIGKILL)
"""


def die(folder: Path, who: str) -> None:
    """A worker that is killed while it holds the claim ``7``."""
    words = [sys.executable, "-c", textwrap.dedent(DIE), str(folder), who]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL


def test_the_claim_of_a_killed_worker_is_taken_over_at_once_and_by_one(tmp_path):
    die(tmp_path, "dead")
    won = []
    ready = threading.Barrier(8)

    def race(who: str) -> None:
        with Claims(tmp_path, who) as claims:
            ready.wait()
            with claims.take("7") as ours:
                if ours:
                    won.append(who)
                ready.wait()

    racers = [threading.Thread(target=race, args=(f"w{n}",)) for n in range(8)]
    for each in racers:
        each.start()
    for each in racers:
        each.join()
    assert len(won) == 1
    assert not list(tmp_path.glob("7.*"))  # the dead one's, too


def test_work_that_kills_its_workers_is_given_up(tmp_path):
    for n in range(DEATHS):
        die(tmp_path, f"dead-{n}")
    with (
        Claims(tmp_path, "a") as claims,
        pytest.raises(WorkerLost, match=r"3 workers died on it.*dead-2"),
        claims.take("7"),
    ):
        raise AssertionError


def test_a_worker_on_another_machine_is_dead_once_nobody_has_touched_its_file(
    tmp_path, monkeypatch
):
    with Claims(tmp_path, "far", stale=0.6) as far, far.take("7"):
        monkeypatch.setattr(claims_module, "boot", lambda: "another kernel")
        with Claims(tmp_path, "near", stale=0.6) as near:
            deadline_s = time.monotonic() + 1.5
            while time.monotonic() < deadline_s:  # it lives: its file is touched
                with near.take("7") as ours:
                    assert not ours
                time.sleep(0.1)
            far._over.set()  # its heart stands still
            while not ours:
                with near.take("7") as ours:
                    time.sleep(0.05)
            assert time.monotonic() - deadline_s > 0.4


def test_a_requeued_task_inherits_its_own_claims(tmp_path, monkeypatch):
    die(tmp_path, "12_0_0")
    monkeypatch.setattr(claims_module, "boot", lambda: "another kernel")
    with Claims(tmp_path, "12_0_0") as again, again.take("7") as ours:
        assert ours


MOUNTED = """
    import sys
    from pathlib import Path
    from companion.core import locks
    from companion.core.claims import Claims
    from companion.core.errors import Busy
    folder, who = Path(sys.argv[1]), sys.argv[2]
    got = []
    sys.stdin.readline()
    with Claims(folder / "claims", who) as claims:
        for n in range(300):
            with claims.take(str(n)) as ours:
                if ours:
                    done = folder / f"done-{n}"
                    if not done.exists():
                        done.touch()
                        got.append(n)
    print(*got, flush=True)
    with locks.held(folder / "lock", "it"):
        print("held", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.slow
def test_claims_and_locks_hold_between_two_mount_namespaces(tmp_path):
    """As near as one machine comes to two: each sees the folder under another path of its own."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("unshare -m needs root")
    shared = tmp_path / "shared"
    (shared / "claims").mkdir(parents=True)
    script = tmp_path / "mounted.py"
    script.write_text(textwrap.dedent(MOUNTED))
    workers = []
    for name in ("a", "b"):
        view = tmp_path / f"view-{name}"
        view.mkdir()
        line = f"mount --bind {shared} {view} && exec {sys.executable} {script} {view} {name}"
        pipe = subprocess.PIPE
        workers.append(
            subprocess.Popen(
                ["unshare", "-m", "sh", "-c", line], stdin=pipe, stdout=pipe, stderr=pipe, text=True
            )
        )
    try:
        for each in workers:
            each.stdin.write("go\n")
            each.stdin.flush()
        got = [each.stdout.readline() for each in workers]
        if not all(got):
            pytest.skip(f"no mount namespace here: {workers[0].stderr.read()}")
        taken = [int(n) for line in got for n in line.split()]
        assert sorted(taken) == list(range(300))
        time.sleep(0.3)
        lock = shared / "lock"
        assert not locks.is_free(lock)  # held there, seen here
    finally:
        for each in workers:  # both: one may wait for the other's lock
            each.stdin.write("end\n")
            each.stdin.flush()
        for each in workers:
            each.communicate(timeout=600)


# ---- workers


def test_many_workers_make_the_bits_of_one_process(tmp_path, monkeypatch):
    wanted = jobs(count=3)
    alone = Store(tmp_path / "alone")
    train(wanted, store=alone, workers=1)
    served(monkeypatch, "a", "b")
    with slurm.using("queue"):
        train(wanted)
    for job in wanted:
        assert same(load_weights(job.run, store=alone), load_weights(job.run))
    made, there = ({e.key: e.files() for e in s.entries()} for s in (alone, Store()))
    assert made == there


def test_a_job_that_fails_is_named_and_the_others_go_on(monkeypatch, store):
    bad = Recipe(net="mlp:widths=8", data="digits", steps=40, batch=60, lr=1e30)
    served(monkeypatch)
    with (
        slurm.using("queue"),
        pytest.raises(JobsFailed) as failed,
    ):
        train([*jobs(bad), *jobs()], store=store)
    text = str(failed.value)
    assert "3 of 6 failed, the others are done" in text and "worker one" in text
    assert "init 0, order trunk: " in text and text.count("what it starts from failed") == 2
    with slurm.using("local"):
        monkeypatch.setattr(pool, "run_all", None)
        train(jobs(), store=store, workers=1)  # all there: nothing is asked of the pool
    with slurm.using("queue"), pytest.raises(JobsFailed, match="3 of 3 failed"):
        train(jobs(bad), store=store)  # tried again, not remembered


def test_a_stopped_worker_gives_its_claim_back_and_another_goes_on(tmp_path, store):
    """The time is up in the middle of a training; who comes next starts from there."""
    from companion.training import engine

    (job,) = jobs(Recipe(net="mlp:widths=8", data="digits", steps=400, batch=60), 1, fork=0)
    queue = Queue(tmp_path / "queue")
    plan, _ = queue.add(list(plans.jobs_of(engine._train_together, [([job], store, "cpu", {})])))
    asked = iter(range(10**6))
    with pytest.MonkeyPatch.context() as m, pytest.raises(OutOfTime):
        m.setattr(deadline, "passed", lambda: next(asked) > 100)
        Worker("a", stale=1).serve(queue)
    assert not list((plan.folder / "claims").iterdir()) and not plan.look()
    (entry,) = store.entries()
    assert set(entry.files()) == {"resume.safetensors"}
    assert Worker("b", stale=1).serve(queue) == 1
    alone = Store(tmp_path / "alone")
    assert same(load_weights(job.run, store=store), load_weights(job.run, store=alone))


def test_a_job_that_is_stopped_time_and_again_is_given_up_and_the_others_go_on(
    tmp_path, monkeypatch
):
    plan, _ = Queue(tmp_path).add([Work("companion.core.runs:digest", n) for n in range(2)])
    done, ran = Work.run, []

    def endless(job: Work):
        ran.append(job.item)
        if job.item == 0:
            raise OutOfTime("the time is up")
        return done(job)

    monkeypatch.setattr(Work, "run", endless)
    for n in range(3):  # the first time, and twice more
        with pytest.raises(OutOfTime):
            Worker("w", requeues=2, log="w.log").work_through(plan)
        assert ran.count(0) == n + 1 and not plan.look().get(0)
    Worker("w", requeues=2, log="w.log").work_through(plan)
    found = plan.look()
    assert ran.count(0) == 3 and found[0].why.startswith("it was stopped 3 times")
    assert found[0].log == "w.log" and not found[1].why


def test_the_same_jobs_find_their_plan(tmp_path):
    queue = Queue(tmp_path)
    some = [Work("companion.core.runs:digest", n, "", (0,) if n else ()) for n in range(4)]
    plan, numbers = queue.add(some)
    assert numbers == [0, 1, 2, 3]
    again, numbers = queue.add([Work("companion.core.runs:digest", n) for n in (3, 1)])
    assert again.folder == plan.folder and numbers == [3, 1]
    plan.end()
    other, _ = queue.add(some)
    past = time.time() - 4000
    os.utime(plan.folder / "over", (past, past))
    queue.add(some)
    assert not plan.folder.exists() and [p.folder for p in queue.plans()] == [other.folder]


def test_half_a_line_of_a_killed_worker_costs_nothing(tmp_path):
    plan, _ = Queue(tmp_path).add([Work("companion.core.runs:digest", n) for n in range(3)])
    (plan.folder / "done" / "w").write_bytes(b'\n[0,"w",0.1,"",""]\n[1,"w"')
    assert set(plan.look()) == {0}
    assert Worker("w").work_through(plan) == 2
    assert set(plan.look()) == set(plans.Plan(plan.folder).look()) == {0, 1, 2}


def test_the_command_takes_a_queue_or_a_plan(tmp_path):
    plan, _ = Queue(tmp_path).add([Work("companion.core.runs:digest", n) for n in range(3)])
    assert "stopped" in said("work", plan.folder, "--time-limit", "0.001", code=75)
    assert "3 jobs done" in said("work", plan.folder)
    plan.end()
    assert "0 jobs done" in said("work", tmp_path, "--idle", "0")
    assert "there is no folder" in said("work", tmp_path / "x", code=2)


def test_what_needs_another_waits_for_it_here_too(store):
    order: list[int] = []
    pool.run_all(order.append, [2, 0, 1], workers=1, after=[[], [], []])
    pool.run_all(order.append, [10, 11, 12], workers=1, after=[[], [0], []])
    assert order == [2, 0, 1, 10, 12, 11]
    assert run("work", "--help").output
