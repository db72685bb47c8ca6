"""Ctrl-C and a closed terminal, while a chapter trains in workers of its own: nothing goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import toybook

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
CHAPTER = """\
---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A chapter that trains for hours

```{code-cell} python
:tags: [parameters]

steps: int = 200000
```

```{code-cell} python
from companion.experiments.instability import analyse
from companion.training import Recipe

recipe = Recipe(net="mlp:widths=64x4", data="digits", steps=steps)
analyse(recipe, [0], inits=1, copies=2, device="cpu", workers=2)
```
"""
MAKE = ["make", "-f", str(toybook.ROOT / "Makefile"), "book"]
RECORD = [sys.executable, "-m", "companion", "record", "01_toy", "--profile", "quick"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A book of that chapter, set up as far as `make book` would: its Python is ours."""
    made = toybook.make(tmp_path / "book", CHAPTER)
    (made / "chapters/profiles/other/01_toy.yaml").write_text("steps: 300000\n")
    (made / "src").symlink_to(toybook.ROOT / "src")
    for name in ("data/claims.yaml", "requirements.lock", "pyproject.toml"):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_bytes((toybook.ROOT / name).read_bytes())
    python = made / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (made / ".venv/.ready").touch()
    return made


def until(condition: Callable[[], object], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.1)


def alive(store: Path) -> list[int]:
    """Processes with this run store, whatever session they are in."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and os.fsencode(store) in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has just ended, or is another user's
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "number"),
    [(MAKE, signal.SIGINT), (MAKE, signal.SIGHUP), (RECORD, signal.SIGHUP)],
    ids=["make book, Ctrl-C", "make book, terminal closed", "record, terminal closed"],
)
def test_it_ends_with_one_line_and_all_of_its_processes(
    root: Path, tmp_path: Path, words: list[str], number: signal.Signals
) -> None:
    store = tmp_path / "runs-of-this-test"

    def as_in_a_terminal() -> None:  # whoever runs the tests may ignore these; a child inherits it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    call = subprocess.Popen(
        words,
        cwd=root,
        env={**os.environ, "COMPANION_RUNS": str(store), "MAKEFLAGS": ""},
        start_new_session=True,
        preexec_fn=as_in_a_terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: call.poll() or len([p for p in store.glob(".locks/*") if p.read_text()]) == 2)
        assert call.poll() is None, call.communicate()
        os.killpg(call.pid, number)  # as a terminal sends it: to make, and to what it runs
        _, said = call.communicate(timeout=600)
        until(lambda: not alive(store), 60)
    finally:
        for pid in {*alive(store), *([call.pid] if call.poll() is None else [])}:
            os.kill(pid, signal.SIGKILL)
    of_make = ("make: ", "make[", "01_toy (quick): running")
    lines = [x for x in said.splitlines() if not x.startswith(of_make)]
    assert len(lines) == 1 and lines[0].startswith("Interrupted. What is finished is "), said
    # make ends by the signal itself, as a shell expects of it.
    assert call.returncode == (-number if words is MAKE else 128 + number), said
    assert not list((root / "build/quick").glob("executed/*")), "half a result is left"
    assert not (root / "data/recorded").exists()
