"""Scenarios that need processes of their own: kills, limits, rights. Run as a script, JSON out.

    python tests/processes.py SCENARIO… FOLDER

Importing torch takes seconds, forking takes none: every scenario forks, kills its children and
looks at what they left. The tests start this once and read the answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from companion import data
from companion.cli import app
from companion.core.errors import CompanionError
from companion.core.runs import Store
from companion.training import Job, Recipe, Run, engine, entry_of, train_one


def child(work: Callable[[], object]) -> int:
    """Fork, run ``work``, leave without any clean-up. Returns the child's id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def killed_writes(folder: Path) -> dict[str, Any]:
    """A writer that adds and replaces files is killed 25 times; the entry must stay whole."""
    entry = Store(folder).entry({"kind": "killed"})
    entry.write_tensors("kept.safetensors", {"x": torch.zeros(1)})
    problems, values = [], []

    def write() -> None:
        turn = 0
        while True:
            turn += 1
            entry.write_tensors("kept.safetensors", {"x": torch.full((20_000,), float(turn))})
            entry.write_json(f"{turn % 5}.json", {"turn": turn})
            entry.remove(f"{(turn + 2) % 5}.json")

    rng = random.Random(0)
    for _ in range(25):
        pid = child(write)
        time.sleep(rng.uniform(0.002, 0.04))
        kill(pid)
        problems += entry.verify()
        found = entry.read_tensors("kept.safetensors")["x"]
        values.append(len(set(found.tolist())))
    return {"problems": problems, "values_in_a_file": max(values)}


def many_writers(folder: Path) -> dict[str, Any]:
    """Three processes write one entry at once, under its lock, as training does."""
    entry = Store(folder).entry({"kind": "many"})

    def write(who: int) -> Callable[[], None]:
        def work() -> None:
            for turn in range(12):
                with entry.lock():
                    entry.write_tensors(f"{who}-{turn}.safetensors", {"x": torch.full((9,), who)})
                    if "shared.json" not in entry:
                        entry.write_json("shared.json", who)

        return work

    pids = [child(write(who)) for who in range(3)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    return {"codes": codes, "files": sorted(entry.files()), "problems": entry.verify()}


def reader_and_writer(folder: Path) -> dict[str, Any]:
    """One process replaces a file without end; what another reads is always one of its values."""
    entry = Store(folder).entry({"kind": "replaced"})
    entry.write_tensors("x.safetensors", {"x": torch.zeros(4000)})

    def write() -> None:
        turn = 0
        while True:
            turn += 1
            entry.write_tensors("x.safetensors", {"x": torch.full((4000,), float(turn))})

    pid = child(write)
    seen, problems = set(), []
    try:
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            values = set(entry.read_tensors("x.safetensors")["x"].tolist())
            seen |= values
            problems += entry.verify()
            if len(values) != 1:
                problems.append(f"{len(values)} values in one file")
    finally:
        kill(pid)
    return {"problems": problems, "seen": len(seen)}


def file_size_limit(folder: Path) -> dict[str, Any]:
    """The operating system refuses files above 64 kB."""
    entry = Store(folder).entry({"kind": "limit"})
    entry.write_json("small.json", 1)
    said: list[str] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    try:
        entry.write_tensors("large.safetensors", {"x": torch.zeros(100_000)})
    except CompanionError as e:
        said = [type(e).__name__, str(e)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = sorted(p.name for p in entry.path.iterdir())
    return {"said": said, "left": left, "problems": entry.verify()}


def no_rights(_: Path) -> dict[str, Any]:
    """A user who may read the store but not write it: reads work, writes say what to do."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Store(folder)
        known, new = store.entry({"kind": "known"}), store.entry({"kind": "new"})
        known.write_json("x.json", 41)
        with known.lock(), new.lock():
            pass
        answers = folder / "answers.json"
        answers.touch()
        inside = [folder, *folder.rglob("*")]
        for path in inside:
            path.chmod(0o555 if path.is_dir() else 0o444)
        answers.chmod(0o666)

        def look() -> None:
            if os.getuid() == 0:
                os.setuid(65_534)  # nobody: root may write everywhere
            said: dict[str, Any] = {"read": known.read_json("x.json")}

            def locked() -> None:
                with known.lock():
                    pass

            for label, attempt in {
                "write": lambda: new.write_json("x.json", 1),
                "replace": lambda: known.write_json("x.json", 1),
                "lock": locked,
            }.items():
                try:
                    attempt()
                    said[label] = ["nothing", ""]
                except Exception as e:
                    said[label] = [type(e).__name__, str(e)]
            answers.write_text(json.dumps(said))

        os.waitpid(child(look), 0)
        for path in inside:
            path.chmod(stat.S_IRWXU)
        return {"folder": name, **json.loads(answers.read_text() or "{}")}


def read_only_store(_: Path) -> dict[str, Any]:
    """A complete store of somebody else: what it has is served, and what is closed is no damage."""
    words = "instability --net mlp:widths=4 --data digits --steps 3 --ks 0 --inits 1 --copies 2"
    asked = [*words.split(), "--points", "3", "--max-error", "100", "--workers", "1"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["COMPANION_RUNS"] = str(folder / "store")
        made = CliRunner().invoke(app, asked)
        assert made.exit_code == 0, made.output
        closed = Store().entry({"kind": "closed"})
        closed.write_json("x.json", 1)
        shutil.rmtree(folder / "store/.locks", ignore_errors=True)
        out = folder / "out"
        out.mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (closed.path / "x.json").chmod(0)
        out.chmod(0o777)

        import scipy.optimize  # noqa: F401 - a Python of root's own is closed to nobody

        def look() -> None:
            if os.getuid() == 0:
                os.setuid(65_534)  # nobody: root may write everywhere
            key = next(e.key for e in Store().entries() if e.identity["kind"] == "run")
            said: dict[str, Any] = {}
            for label, command in {
                "again": asked,
                "list": ["runs", "list"],
                "export": ["runs", "export", str(out / "a.tar"), "--kind", "pair"],
                "barrier": ["barrier", f"run:{key}", f"run:{key}", "--points", "3"],
                "verify": ["runs", "verify"],
                "gc": ["runs", "gc", "--yes"],
            }.items():
                done = CliRunner().invoke(app, command)
                said[label] = [done.exit_code, done.output]
            (out / "answers.json").write_text(json.dumps(said))

        os.waitpid(child(look), 0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(stat.S_IRWXU)
        answers = json.loads((out / "answers.json").read_text())
        return {"first": made.output, "kept": closed.verify(), **answers}


KILLED = Run(
    Recipe(
        net="mlp:widths=16,norm=batch",
        data="digits",
        steps=240,
        batch=60,
        lr=0.05,
        augment="crop1",
        schedule="cosine",
    ),
    init=3,
)


def killed_training(folder: Path) -> dict[str, Any]:
    """A run is killed each time its resume point has moved on by 60 steps, until it is done.

    What it leaves in ``folder`` the test compares with a run that nobody disturbed.
    """
    store, job = Store(folder), Job(KILLED, weights=(KILLED.last_step,), states=(100,))

    def every_tenth(step: int) -> bool:
        time.sleep(0.005)  # else it may be done before anybody has looked
        return step % 10 == 0

    engine._clock = lambda: every_tenth
    entry = entry_of(KILLED, data.load(KILLED.recipe.data), "cpu", store)

    def reached() -> int:
        with contextlib.suppress(KeyError):
            return int(entry.read_tensors("resume.safetensors")["step"])
        return 0

    problems, killed_at = [], [0]
    while True:
        pid = child(lambda: train_one(job, store=store))
        done = 0
        while not done and reached() < killed_at[-1] + 60:
            time.sleep(0.01)
            done, _ = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        kill(pid)
        problems += entry.verify()
        killed_at.append(reached())
    problems += entry.verify()
    return {"problems": problems, "killed_at": killed_at[1:]}


SCENARIOS = {
    f.__name__: f
    for f in (
        killed_writes,
        many_writers,
        reader_and_writer,
        file_size_limit,
        no_rights,
        read_only_store,
        killed_training,
    )
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    *wanted, place = sys.argv[1:]
    answers = {name: SCENARIOS[name](Path(place) / name) for name in wanted}
    print(json.dumps(answers))
