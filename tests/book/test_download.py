"""A page as a notebook of its own, where there is a wheel of the package and no repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import papermill
import pytest
from papermilled import ROOT, build, judged

from companion.book import download
from companion.book.layout import Book

CHAPTER = "04b_federated"
TINY = {
    "client_net": "mlp:widths=8x2",
    "client_steps": 4,
    "seeds": 1,
    "pairs": 0,
    "steps": 40,
    "net": "resnet8:width=4,norm=none",
    "device": "cpu",
    "workers": 1,
}


def wheel(folder: Path) -> Path:
    """The package as pip installs it, from a copy of what its build reads; unpacked."""
    pytest.importorskip("setuptools", minversion="77")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "data"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "-w", str(folder), "-q"]
    subprocess.run([*command, "--no-deps", "--no-build-isolation", "--no-index"], check=True)
    (packed,) = folder.glob("*.whl")
    with zipfile.ZipFile(packed) as file:
        file.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_a_downloaded_page_runs_without_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "empty").mkdir()
    source = nbformat.read(build(CHAPTER, tmp_path / "book"), as_version=4)
    notebook = download.standalone(Book(ROOT), CHAPTER, source)
    assert "pip install" in notebook.cells[0].source
    where = nbformat.v4.new_code_cell("import companion; print(companion.__file__)")
    notebook.cells.append(where)
    path = tmp_path / "empty" / "page.ipynb"
    nbformat.write(notebook, path)
    site = wheel(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("COMPANION_DATA", "COMPANION_RUNS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(path.parent)
    papermill.execute_notebook(
        path, "out.ipynb", parameters=TINY, kernel_name="python3", progress_bar=False
    )
    out = nbformat.read("out.ipynb", as_version=4)
    assert out.cells[-1].outputs[0].text.startswith(str(site))
    assert judged(out)["B14"]["claim"]["text"]  # the claims came with the package
    assert (tmp_path / "cache" / "companion" / "runs").is_dir()
    assert [p.name for p in path.parent.iterdir()] in (
        ["page.ipynb", "out.ipynb"],
        ["out.ipynb", "page.ipynb"],
    )


@pytest.mark.parametrize(
    ("text", "plainly"),
    [
        ("As {cite:t}`a2020` and {cite:p}`a2020,b` say", "As Ann (2020) and (Ann, 2020; b) say"),
        ("the {eq}`eq-one`", "the (one)"),
        ("$$ (eq-one)", "\\tag{one}\n$$"),
        ("(a-label)=\nText", "Text"),
        (":::{note}\nText\n:::", "Text"),
        ("[there](04b_federated), [use](../using), [below](a-label)",
         "[there](04b_federated.ipynb), use, below"),
        ("[out](https://example.org/a)", "[out](https://example.org/a)"),
        ("```python\n{cite:t}`a2020`\n```", "```python\n{cite:t}`a2020`\n```"),
        ("<!-- walk -->", ""),
        ('<figure class="lead" data-of="fig-a"></figure>', ""),
    ],
)  # fmt: skip
def test_text_is_what_jupyter_shows(text: str, plainly: str) -> None:
    assert download.plain(text, {"a2020": "Ann (2020)"}, Book(ROOT)) == plainly


def test_pip_gets_the_repository_that_the_citation_names(tmp_path: Path) -> None:
    assert download.requirement(Book(tmp_path)) == "/path/to/the/repository"
    (tmp_path / "CITATION.cff").write_text("repository-code: https://example.org/book\n")
    assert download.requirement(Book(tmp_path)) == "companion @ git+https://example.org/book"
