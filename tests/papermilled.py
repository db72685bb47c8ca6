"""A chapter of this repository under plain papermill, and what its cells handed to the book."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import papermill

from companion.book import notebooks
from companion.book.layout import Book

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
