"""A few of the kills of `make soak`, and how a command with workers ends, whoever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soak

from companion.core import locks

TESTS = Path(soak.__file__).parent
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(tmp_path: Path) -> None:
    """0 wrong, 0 lost, 0 left behind; two workers at the end have the bits of one.

    The sixth round is the one that kills a training with workers.
    """
    done = subprocess.run(
        [sys.executable, str(TESTS / "soak.py"), "6", str(tmp_path), "3"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == [] and found["kills"] == 6
    assert (found["wrong"], found["lost"], found["left behind"], found["tracebacks"]) == (0,) * 4


@pytest.fixture
def at_work(tmp_path: Path, runs_root: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that trains with two workers, both at work on an entry."""
    words = "instability --net mlp:widths=64x4 --data digits --steps 100000 --ks 0 --inits 1"
    done = subprocess.Popen(
        [sys.executable, "-m", "companion", *words.split(), "--copies", "2", "--workers", "2"],
        env={**os.environ, "COMPANION_RUNS": str(runs_root)},
        start_new_session=True,
        # Whoever runs the tests in the background ignores Ctrl-C, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: len([p for p in runs_root.glob(".locks/*") if p.read_text()]) == 2)
    yield done
    done.kill()
    done.wait()
    until(lambda: not soak.session(done.pid))


def until(condition: Any) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGKILL", "a worker"])
def test_no_worker_outlives_its_command(
    at_work: subprocess.Popen[str], how: str, runs_root: Path
) -> None:
    assert len(soak.workers_of(at_work.pid)) == 2
    holders = [p.read_text() for p in runs_root.glob(".locks/*")]
    assert all(f"a worker of process {at_work.pid} on " in text for text in holders)
    assert all("(companion instability --net" in text for text in holders)
    if how == "a worker":
        os.kill(soak.workers_of(at_work.pid)[0], signal.SIGKILL)
    elif how == "SIGINT":  # as a terminal sends it: to all of them
        os.killpg(at_work.pid, signal.SIGINT)
    else:
        at_work.send_signal(signal.Signals[how])
    _, said = at_work.communicate(timeout=600)
    until(lambda: not soak.session(at_work.pid))
    code = {"SIGTERM": 143, "SIGINT": 130, "SIGKILL": -9, "a worker": 1}[how]
    assert at_work.returncode == code
    if how != "SIGKILL":  # whose victim says nothing
        (line,) = said.strip().splitlines()
        word = "worker process was killed" if how == "a worker" else "Interrupted."
        assert word in line and "the same command continues from there" in line
    assert not list(Path("/dev/shm").glob(f"joblib*_{at_work.pid}_*"))
    assert all(locks.is_free(p) for p in runs_root.glob(".locks/*"))
