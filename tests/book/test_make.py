"""What make does again, and what at once: the Makefile, with a python that only takes notes."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("01_one", "02_two", "03_three")

# `python -m companion.book STEP …`: a line in the log, and the file that the step is to write.
# While MEET is set, a chapter runs until another one does, too.
PYTHON = """#!/bin/bash
set -eu
step=$3; chapter=${@: -1}
echo "$step $chapter" >> log
case $step in
  notebooks) out=build/notebooks/$chapter.ipynb ;;
  execute)
    out=build/quick/executed/$chapter.ipynb
    touch running-$chapter
    for _ in $(seq ${MEET:-0}); do
      [ $(ls running-* | wc -l) -lt 2 ] || break
      sleep 0.05
    done
    ls running-* | wc -l >> at-once
    [ -z "${MEET:-}" ] && rm running-$chapter
    ;;
  *) exit 0 ;;
esac
mkdir -p $(dirname $out); touch $out
"""


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A tree that make takes for this repository, with everything older than what make writes."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    source = "src/companion"
    files = [f"chapters/{page}.md" for page in PAGES]
    files += [f"{source}/core/runs.py", f"{source}/cli/runs.py", "data/claims.yaml"]
    files += [f"{source}/book/{name}.py" for name in ("notebooks", "parameters", "site")]
    files += ["requirements.lock", "pyproject.toml", "index.md", "_config.yml", "_toc.yml"]
    files += ["references.bib", "data/recorded/one.json", ".venv/bin/python", ".venv/.ready"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(PYTHON if name.endswith("python") else "")
    (tmp_path / ".venv/bin/python").chmod(0o755)
    past = time.time() - 1000
    for path in [*tmp_path.rglob("*"), tmp_path]:
        os.utime(path, (past, past))
    os.utime(tmp_path / ".venv/.ready", (past + 1, past + 1))
    return tmp_path


def _make(book: Path, *words: str, **environment: str) -> list[str]:
    """What `make book` did, in order of the first letters."""
    log = book / "log"
    log.write_text("")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "VENV"}
    subprocess.run(
        ["make", "book", *words],
        cwd=book,
        env={**clean, **environment},
        check=True,
        capture_output=True,
        timeout=600,
    )
    return sorted(log.read_text().split("\n")[:-1])


def _after(book: Path, *changed: str) -> list[str]:
    for name in changed:
        path, later = book / name, time.time() + 1
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (later, later))
    done, past = _make(book), time.time() - 10
    for path in book.rglob("*"):  # the next change is later than all of this
        os.utime(path, (past, past))
    return done


def test_a_second_make_book_does_nothing_and_a_change_only_what_depends_on_it(book: Path) -> None:
    site = ["html quick", "stage quick"]
    executed, made = ([f"{step} {page}" for page in PAGES] for step in ("execute", "notebooks"))
    assert _make(book) == [*executed, *site[:1], *made, *site[1:]]
    assert _make(book) == []
    changed = sorted(["notebooks 02_two", "execute 02_two", *site])
    assert _after(book, "chapters/02_two.md") == changed
    assert _after(book, "index.md", "src/companion/book/site.py") == site
    assert _after(book, "src/companion/cli/runs.py") == [], "no page can see the command line"
    assert _after(book, "src/companion/core/runs.py") == sorted([*executed, *site])


@pytest.mark.parametrize("words, most", [([], 2), (["JOBS=1"], 1)])
def test_two_chapters_run_at_once_unless_told_otherwise(
    book: Path, words: list[str], most: int
) -> None:
    meet = {"MEET": "400"} if most > 1 else {}
    _make(book, *words, **meet)
    at_once = [int(n) for n in (book / "at-once").read_text().split()]
    assert len(at_once) == len(PAGES) and max(at_once) >= most
    assert most > 1 or max(at_once) == 1


def test_a_gpu_has_one_chapter_at_a_time(book: Path) -> None:
    makefile = book / "Makefile"
    makefile.write_text(makefile.read_text() + "$(info jobs $(JOBS))\n")
    for profile, jobs in {"quick": "2", "gpu": "1"}.items():
        done = subprocess.run(
            ["make", "help", f"PROFILE={profile}"], cwd=book, capture_output=True, text=True
        )
        assert f"jobs {jobs}\n" in done.stdout
