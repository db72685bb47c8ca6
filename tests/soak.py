"""Kills without end: commands on one store are killed in the middle, and nothing is lost by it.

    python tests/soak.py KILLS FOLDER [SEED]

Each round starts one thing that the store is used for (training with and without workers,
publishing, discarding, clearing up, exporting, importing), often another beside it, and sends the
first a signal at some moment: SIGKILL, SIGTERM, SIGINT, or SIGKILL to one of its workers. After
each round every entry is whole, what was acknowledged is there, no process is left, and the other
command has ended well. At the end the commands run once more without a kill: their numbers are
those of a run that nobody disturbed, with one worker, bit for bit; after a clean-up no file is left
that is not listed.

`make soak` runs a thousand; `tests/core/test_soak.py` a few. Answers as JSON on the last line.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from companion.cli import app
from companion.core import archive
from companion.core.files import TEMPORARY
from companion.core.runs import Entry, Store
from companion.training import engine

WORDS = "--net mlp:widths=16 --data digits --batch 60 --steps 300 --ks 0,100 --inits 1 --copies 2"
TRAIN = ["instability", *WORDS.split(), "--points", "3", "--max-error", "100"]
TENSORS = 3000  # numbers in a published file


class Soak:
    """One store, and what is known of it.

    Arguments:
        folder: all of it lies there.
        seed: of what happens when.
    """

    def __init__(self, folder: Path, seed: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rng = folder, random.Random(seed)
        self.store, self.undisturbed = Store(folder / "store"), Store(folder / "undisturbed")
        self.archive, self.log = folder / "undisturbed.tar", folder / "log.txt"
        self.found: Counter[str] = Counter()
        self.problems: list[str] = []
        self.pids: set[int] = set()

    # --- what is done to the store, each in a process of its own

    def train(self, workers: int = 1, store: Store | None = None) -> None:
        os.environ["COMPANION_RUNS"] = str((store or self.store).root)
        out = self.folder / f"{(store or self.store).root.name}.json"
        command(*TRAIN, "--workers", workers, "--json", out)

    def train_with_workers(self) -> None:
        self.train(2)

    def publish(self) -> None:
        entry, said = self.published(), self.folder / "acknowledged"
        turn = int(said.read_text()) if said.exists() else 0
        while True:
            turn += 1
            with entry.lock():
                entry.write_tensors("x.safetensors", {"x": torch.full((TENSORS,), float(turn))})
                entry.write_json(f"{turn % 5}.json", turn)
                entry.remove(f"{(turn + 2) % 5}.json")
            said.with_suffix(".new").write_text(str(turn))
            said.with_suffix(".new").replace(said)

    def published(self) -> Entry:
        return self.store.entry({"kind": "published"})

    def discard(self) -> None:
        for entry in list(self.store.entries()):
            if entry.identity.get("kind") in ("pair", "null"):
                entry.discard()

    def clear(self) -> None:
        os.environ["COMPANION_RUNS"] = str(self.store.root)
        command("runs", "gc", "--yes")

    def export(self) -> None:
        target = self.folder / "exported.tar"
        target.unlink(missing_ok=True)
        archive.write_archive(self.store.entries(), target)

    def import_(self) -> None:
        archive.read_archive(self.archive, self.store)

    # --- rounds

    def begin(self) -> None:
        """What nobody disturbs, with one worker."""
        assert ended(fork(lambda: self.train(1, self.undisturbed), self.log)) == 0
        archive.write_archive(self.undisturbed.entries(), self.archive)

    def round(self, number: int) -> None:
        acts: dict[Callable[[], None], float] = {  # and about how long each takes, in seconds
            self.train: 2.0,
            self.publish: 0.3,
            self.discard: 0.02,
            self.clear: 0.4,
            self.export: 0.1,
            self.import_: 0.3,
        }
        act = self.rng.choice(list(acts))
        span = acts[act]
        if number % 20 == 5:
            act, span = self.train_with_workers, 5.0
        victim = fork(act, self.log)
        self.pids.add(victim)
        beside = self.rng.choice([None, self.train, self.import_, self.export, self.clear])
        other = beside and fork(beside, self.log)
        while act == self.train_with_workers and not (is_over(victim) or workers_of(victim)):
            time.sleep(0.05)  # on a busy machine they may take longer than anything else
        end = time.monotonic() + self.rng.uniform(0, span)
        while time.monotonic() < end and not is_over(victim):
            time.sleep(0.001)
        self.kill(victim)
        self.found["kills"] += 1
        self.found[act.__name__] += 1
        ended(victim)
        if beside and other and ended(other) != 0:
            self.problems.append(f"round {number}: {beside.__name__} beside {act.__name__} failed")
        self.nobody_is_left(victim, act.__name__)
        self.look(f"round {number}, {act.__name__}")

    def kill(self, pid: int) -> None:
        workers = workers_of(pid)
        if workers and self.rng.random() < 0.3:
            pid = self.rng.choice(workers)
            self.found["of workers"] += 1
            os.kill(pid, signal.SIGKILL)
            return
        number = self.rng.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], [6, 2, 2])[0]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def nobody_is_left(self, pid: int, what: str) -> None:
        end = time.monotonic() + 60
        while (left := session(pid)) and time.monotonic() < end:
            time.sleep(0.05)
        if left:
            self.found["left behind"] += len(left)
            self.problems.append(f"{what}: {len(left)} processes are left")
            for one in left:
                os.kill(one, signal.SIGKILL)

    def look(self, what: str) -> None:
        """Every entry is whole, and what was acknowledged is there."""
        for entry in self.store.entries():
            for line in entry.verify():
                self.found["wrong"] += 1
                self.problems.append(f"{what}: {line}")
        said = self.folder / "acknowledged"
        if said.exists():
            values = set(self.published().read_tensors("x.safetensors")["x"].tolist())
            if len(values) != 1 or min(values) < int(said.read_text()):
                self.found["lost"] += 1
                self.problems.append(f"{what}: {values} where {said.read_text()} was acknowledged")

    def finish(self) -> dict[str, Any]:
        """Run it all to its end, compare, and clear up."""
        assert ended(fork(self.train_with_workers, self.log)) == 0
        assert ended(fork(self.export, self.log)) == 0
        wanted, got = contents(self.undisturbed), contents(self.store)
        for key, files in wanted.items():
            if files != got.get(key):
                self.found["lost" if key not in got else "wrong"] += 1
                self.problems.append(f"{key[:12]}: not as it is undisturbed")
        ours, theirs = (self.folder / f"{name}.json" for name in ("store", "undisturbed"))
        if json.loads(ours.read_text())["pairs"] != json.loads(theirs.read_text())["pairs"]:
            self.found["wrong"] += 1
            self.problems.append("the numbers are not those of one worker")
        self.store.clear(self.store.garbage(lambda _: True, -1.0), lambda _: True, -1.0)
        listed = {
            entry._place(name, record)
            for entry in self.store.entries()
            for name, record in entry.files().items()
        }
        own = {e.path / n for e in self.store.entries() for n in ("identity.json", "manifest.json")}
        left = {p for p in self.store.root.rglob("*") if p.is_file()} - listed - own
        left |= set(self.folder.glob(f"{TEMPORARY}*"))
        shared = {p for pid in self.pids for p in Path("/dev/shm").glob(f"joblib*_{pid}_*")}
        for path in (*left, *shared):
            self.found["left behind"] += 1
            self.problems.append(f"left behind: {path}")
        said = self.log.read_text(errors="replace")
        self.found["tracebacks"] = said.count("Traceback")
        keys = ("wrong", "lost", "left behind")
        return {**dict.fromkeys(keys, 0), **self.found, "problems": self.problems[:20]}


def command(*words: object) -> None:
    """A command line of ours, in this process; it exits with its code."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    print(done.output, flush=True)
    if done.exit_code:
        raise SystemExit(done.exit_code)


def fork(act: Callable[[], None], log: Path) -> int:
    """Run ``act`` in a process with a session of its own; its words go to ``log``."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        act()
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    except KeyboardInterrupt:
        code = 130
    except BaseException as e:
        print(f"{act.__name__}: {type(e).__name__}: {e}", flush=True)
    finally:
        os._exit(code)


def is_over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def session(leader: int) -> list[int]:
    """The processes of a session that are not over."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[3]) == leader:
                found.append(int(folder.name))
    return found


def workers_of(pid: int) -> list[int]:
    """The worker processes of a command."""
    return [p for p in session(pid) if p != pid and b"LokyProcess" in words_of(p)]


def words_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def contents(store: Store) -> dict[str, dict[str, str]]:
    """Key -> file -> SHA-256, of runs and measurements."""
    return {
        entry.key: {name: record["sha256"] for name, record in entry.files().items()}
        for entry in store.entries()
        if entry.identity.get("kind") != "published"
    }


def main(kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    engine.RESUME_EVERY_S = 0.05
    soak = Soak(folder, seed)
    soak.begin()
    for number in range(kills):
        soak.round(number)
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {kills}", end="", file=sys.stderr)
    return soak.finish()


if __name__ == "__main__":
    number, place, *rest = sys.argv[1:]
    answers = main(int(number), Path(place), *map(int, rest))
    print(json.dumps(answers))
    raise SystemExit(bool(answers["problems"]))
