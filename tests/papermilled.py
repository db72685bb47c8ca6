"""A chapter of this repository under plain papermill, and what its cells handed to the book."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import papermill

from companion.book import notebooks, recording
from companion.book.layout import Book
from companion.core.runs import Store
from companion.experiments.measurement import kinds
from companion.report import provenance

ROOT = Path(__file__).parents[1]


def build(chapter: str, folder: Path) -> Path:
    """The chapter's notebook, as `make notebooks` writes it, in ``folder``."""
    for name in ("chapters", "_toc.yml", "_config.yml"):
        (folder / name).symlink_to(ROOT / name)
    return notebooks.build(Book(folder), chapter)


def run(source: Path, folder: Path, **parameters: Any) -> Any:
    """The executed notebook."""
    out = folder / "out.ipynb"
    papermill.execute_notebook(
        source, out, parameters=parameters, kernel_name="python3", progress_bar=False
    )
    return nbformat.read(out, as_version=4)


def entries(notebook: Any, kind: str) -> list[Any]:
    """What the chapter handed to the book."""
    found = [
        output["metadata"]["companion"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "companion" in output.get("metadata", {})
    ]
    return [entry[kind] for entry in found if kind in entry]


GOLDEN = ROOT / "tests" / "book" / "golden"


def check_golden(chapter: str, notebook: Any) -> None:
    """The verdicts of a tiny run are those of before: a move of code changes no number.

    Numbers are compared on the kind of machine that wrote the file, as another processor or torch
    rounds otherwise; which claims are judged, everywhere. After a change that is meant to change
    them: ``COMPANION_GOLDEN=write``, and say in the commit which and why.
    """
    facts = provenance.record()
    found = {
        "where": [facts["packages"]["torch"], facts["cpu"]["name"]],
        "claims": {
            claim["claim"]["id"]: {k: claim[k] for k in ("verdict", "value", "interval", "n")}
            for group in entries(notebook, "claims")
            for claim in group
        },
    }
    path = GOLDEN / f"{chapter}.json"
    if os.environ.get("COMPANION_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    known = json.loads(path.read_text(encoding="utf-8"))
    assert list(found["claims"]) == list(known["claims"])
    if found["where"] == known["where"]:
        assert found == known


def check_budget(chapter: str, store: Store, **parameters: Any) -> None:
    """After a run, the chapter's budget is what the store has: nothing is left, nothing is more."""
    settings = [f"{name}={json.dumps(value)}" for name, value in parameters.items()]
    said: list[str] = []
    asked = recording.prepare(Book(ROOT), chapter, "quick", settings, "x")
    recording.record(asked, dry_run=True, say=said.append)
    assert "nothing is left to compute" in said[-1], said
    planned: Counter[str] = Counter()
    for line in said[:-1]:
        for kind, number in re.findall(r"(\w+) 0 of (\d+)", line.partition("to measure: ")[2]):
            planned[kind] += int(number)
    stored = Counter(str(e.identity["kind"]) for e in store.entries())
    assert planned == Counter({k: n for k, n in stored.items() if k in kinds()})
