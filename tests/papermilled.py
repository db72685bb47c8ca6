"""A chapter of this repository, run, and what its cells handed to the book.

Chapter 1 under plain papermill (:func:`run`), as a reader runs it; all else in the test's own
process (:func:`run_here`), which saves a kernel and its import of torch. (`make book` runs every
chapter under papermill.)
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib
import nbformat
import papermill
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from PIL import Image
from traitlets.config import Config

from companion import data
from companion.book import notebooks, recording
from companion.book.finish import finish
from companion.book.layout import Book
from companion.core.runs import Store
from companion.data.sources import _read_digits
from companion.experiments.measurement import kinds
from companion.report import claims, provenance
from companion.report.figures import _published as published

ROOT = Path(__file__).parents[1]


def build(chapter: str, folder: Path) -> Path:
    """The chapter's notebook, as `make notebooks` writes it, in ``folder``."""
    for name in ("chapters", "_toc.yml", "_config.yml"):
        (folder / name).symlink_to(ROOT / name)
    return notebooks.build(Book(folder), chapter)


def notebook_of(chapter: str) -> Any:
    """A fixture: the chapter's notebook, in a folder of the test's module."""

    @pytest.fixture(scope="module")
    def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return build(chapter, tmp_path_factory.mktemp("book"))

    return source


def run(source: Path, folder: Path, **parameters: Any) -> Any:
    """The executed notebook."""
    out = folder / "out.ipynb"
    papermill.execute_notebook(
        source, out, parameters=parameters, kernel_name="python3", progress_bar=False
    )
    return nbformat.read(out, as_version=4)


def run_here(source: Path, only_design: bool = False, **parameters: Any) -> Any:
    """The notebook executed in this process. What a cell raises is raised.

    ``only_design``: as far as the cell that makes the study of the parameters; nothing trains.
    """
    notebook = nbformat.read(source, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if only_design:
        calls = ("parameters.values(", "parameters.check(")
        ends = [n for call in calls for n, cell in enumerate(cells) if call in cell.source]
        cells = cells[: ends[0] + 1]
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    try:
        with matplotlib.rc_context(), patch.dict(published, clear=True):
            for cell in cells:
                with capture_output() as said:
                    done = shell.run_cell(cell.source, store_history=True)
                done.raise_error()
                shown = [(out.data, out.metadata or {}) for out in said.outputs]
                printed = said.stdout
                if done.result is not None:  # the shell's own hook prints it, too
                    assert shell.display_formatter is not None
                    shown.append(shell.display_formatter.format(done.result))
                    printed = re.sub(r"^Out\[\d+\]: .*", "", printed, flags=re.S | re.M)
                texts = [nbformat.v4.new_output("stream", text=printed)] if printed else []
                cell.outputs = texts + [
                    nbformat.v4.new_output("display_data", found, metadata=about)
                    for found, about in shown
                ]
                if "parameters" in cell.metadata.get("tags", []):
                    shell.user_ns.update(parameters)
    finally:
        InteractiveShell.clear_instance()
    return notebook


def entries(notebook: Any, kind: str) -> list[Any]:
    """What the chapter handed to the book."""
    found = [
        output["metadata"]["companion"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "companion" in output.get("metadata", {})
    ]
    return [entry[kind] for entry in found if kind in entry]


def figures(notebook: Any) -> dict[str, Any]:
    """Name to data of the figures that this run drew, in their order; recorded ones left out."""
    drawn = {figure["name"]: figure["data"] for figure in entries(notebook, "figure")}
    return {name: data for name, data in drawn.items() if "recorded" not in name}


def judged(notebook: Any) -> dict[str, Any]:
    """The chapter's verdicts by claim."""
    (verdicts,) = entries(notebook, "claims")
    return {v["claim"]["id"]: v for v in verdicts}


def values(notebook: Any) -> dict[str, Any]:
    """What fills the placeholders of the prose."""
    return {k: v for entry in entries(notebook, "values") for k, v in entry.items()}


def printed(notebook: Any) -> str:
    """What its cells printed."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.get("text", "") for o in outputs)


def filled(notebook: Any, chapter: str) -> str:
    """The page's Markdown with its captions and numbers; fails on what nobody filled."""
    cells = finish(Book(ROOT), "quick", chapter, notebook).notebook.cells
    return "\n".join(c.source for c in cells if c.cell_type == "markdown").replace("\\", "")


def pictures(folder: Path, number: int) -> str:
    """The name of a data set of one's own: ``number`` coloured digits of three classes."""
    digits = _read_digits(folder)
    for i in range(number):
        home = folder / "pictures" / f"class{digits.train_y[i] % 3}"
        home.mkdir(parents=True, exist_ok=True)
        grey = digits.train_x[i, 0] * 15
        Image.fromarray(grey).convert("RGB").save(home / f"{i}.png")
    return f"images:{folder / 'pictures'}"


GOLDEN = ROOT / "tests" / "book" / "golden"


def check_golden(chapter: str, notebook: Any) -> None:
    """The verdicts of a tiny run are those of before: a move of code changes no number.

    Numbers are compared on the kind of machine that wrote the file, as another processor or torch
    rounds otherwise; which claims are judged, everywhere. After a change that is meant to change
    them: ``COMPANION_GOLDEN=write``, and say in the commit which and why.
    """
    facts, kernels = provenance.record(), torch.backends.cpu.get_cpu_capability()
    found = {
        "where": [facts["packages"]["torch"], facts["cpu"]["name"], kernels],
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


def check_page(chapter: str, notebook: Any, **parameters: Any) -> Any:
    """What every page ends with: its claims, all judged, as before; the command, with what was
    given and no more; the record of the run, which is returned."""
    check_golden(chapter, notebook)
    claimed = {c.id for c in claims.registry().values() if c.chapter == chapter}
    assert set(judged(notebook)) == claimed
    (command,) = entries(notebook, "rerun")
    assert f"-p steps {parameters['steps']}" in command
    for name in {"dataset", "lr", "precision"} - set(parameters):
        assert f"-p {name}" not in command
    (record,) = entries(notebook, "provenance")
    images = data.load(parameters.get("dataset", "digits"))
    assert record["dataset"]["sha256"] == images.fingerprint
    return record


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
