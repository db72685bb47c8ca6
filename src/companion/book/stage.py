"""Put a complete Jupyter Book source tree together: pages, figures, results, styles, MathJax.

MathJax: the site has to read from a disk without network, so the CDN is out; its 2 MB do not belong
in git. The package sphinx-mathjax-offline ships MathJax 3.2.2 byte for byte as npm does, so it is a
dependency of the book like any other, and what a page can ask for is copied from it: 2 MB of 24 (in
parts: the file that has all of them has a menu, too, a third of its size), and not below
``_static/``, where Jupyter Book 1 makes a script tag of every .js. (MathML at build time would need
no script at all, but its layout depends on the reader's fonts, and the converters know less LaTeX.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import nbformat

from companion.book.finish import Page, finish
from companion.book.front import complete, marked
from companion.book.front import readme as front_readme
from companion.book.layout import Book, BookError
from companion.book.notebooks import read
from companion.book.shown import shown
from companion.report import recorded
from companion.report.figures import label

#: Where the front page takes the scoreboard.
MARKER = "<!-- scoreboard -->"


def stage(book: Book, profile: str) -> Path:
    """Write ``build/<profile>/book``, the tree that Jupyter Book builds, and return its folder.

    Files that did not change keep their time stamps, so that Sphinx does not read them again; what
    no longer belongs to the book is removed.

    Raises:
        BookError: A page of ``_toc.yml`` does not exist or was not executed, a chapter is not in
            ``_toc.yml``, one claim is judged in two chapters, or the front page lacks the marker.
    """
    pages = [_page(book, profile, chapter) for chapter in _chapters(book)]
    files: dict[str, bytes] = {}
    for page in pages:
        for cell in page.notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = marked(cell.source, pages, profile)
        files[f"chapters/{page.chapter}.ipynb"] = (nbformat.writes(page.notebook) + "\n").encode()
        download = nbformat.writes(page.download) + "\n"
        files[f"taken/chapters/{page.chapter}.ipynb"] = download.encode()
        for name, content in page.files.items():
            files[f"chapters/files/{page.chapter}/{name}"] = content
        for name, content in page.dark.items():
            files[f"extra/dark/{page.chapter}/{label(name)}.svg"] = content
    for name in book.pages():
        if not name.startswith("chapters/"):
            files[f"{name}.md"] = _text(book, name)
    front, *around = (n for n in book.pages() if not n.startswith("chapters/"))
    if any(page.claims for page in pages) and MARKER not in files[f"{front}.md"].decode():
        raise BookError(f"the front page has no line {MARKER}, where the scoreboard goes.")
    for name in (front, *around):
        text, more = shown(book, name, files[f"{name}.md"].decode())
        text = complete(name, text, pages, profile)
        files |= more
        files[f"{name}.md"] = text.encode()
    for name in ("_config.yml", "_toc.yml", "references.bib"):
        path = book.root / name
        if not path.is_file():
            raise BookError(f"{name} is missing from the root of the book.")
        files[name] = path.read_bytes()
    for path in sorted((book.root / "book").glob("*")):
        files[f"_static/{path.name}"] = path.read_bytes()
    files["extra/results.json"] = _results(pages, profile)
    files |= {f"extra/mathjax/{name}": path.read_bytes() for name, path in _mathjax()}
    _write(book.staged(profile), files)
    return book.staged(profile)


def readme(book: Book, profile: str) -> list[Path]:
    """Renew what README.md shows of a run: its table, and the picture of chapter 1's planes.

    Raises:
        BookError: as :func:`stage`, or README.md has no place for the table.
    """
    pages = [_page(book, profile, chapter) for chapter in _chapters(book)]
    path = book.root / "README.md"
    files = {path: front_readme(path.read_text(encoding="utf-8"), pages, profile).encode()}
    for page in pages:
        if page.chapter == "01_instability":
            files[book.root / "book" / "plane.svg"] = page.files["plane.svg"]
            files[book.root / "book" / "plane-dark.svg"] = page.dark["plane"]
    for path, content in files.items():
        path.write_bytes(content)
    return list(files)


def _chapters(book: Book) -> list[str]:
    """The chapters in the order of the table of contents, which has to have all of them."""
    listed = [p.removeprefix("chapters/") for p in book.pages() if p.startswith("chapters/")]
    for chapter in listed:
        if chapter not in book.chapters():
            raise BookError(f"_toc.yml lists chapters/{chapter}, but there is no such chapter.")
    if missing := sorted(set(book.chapters()) - set(listed)):
        raise BookError(f"_toc.yml does not list {', '.join('chapters/' + c for c in missing)}.")
    return listed


def _page(book: Book, profile: str, chapter: str) -> Page:
    path = book.executed(profile, chapter)
    if not path.is_file():
        raise BookError(
            f"{path.relative_to(book.root)} is missing: the chapter was not executed, or it failed."
        )
    page = finish(book, profile, chapter, read(path))
    page.recorded = recorded.load(chapter, book.root)
    return page


def _text(book: Book, name: str) -> bytes:
    path = book.root / f"{name}.md"
    if not path.is_file():
        raise BookError(f"_toc.yml lists {name}, but there is no {name}.md.")
    return path.read_bytes()


def _results(pages: list[Page], profile: str) -> bytes:
    """What the chapters found, for programs: parameters, verdicts, provenance."""
    document = {
        "profile": profile,
        "chapters": {
            page.chapter: {
                "parameters": page.parameters,
                "claims": page.claims,
                "figures": [figure["name"] for figure in page.figures],
                "provenance": page.provenance,
                "recorded": [
                    {k: v for k, v in record.data.items() if k not in ("figures", "tables")}
                    for record in page.recorded
                ],
            }
            for page in pages
        },
    }
    return (json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n").encode()


def _mathjax() -> Iterator[tuple[str, Path]]:
    """The files of MathJax that a page can ask for, by their name below ``mathjax/``."""
    spec = find_spec("sphinx-mathjax-offline")
    if spec is None or not spec.submodule_search_locations:
        raise BookError("sphinx-mathjax-offline is not installed: pip install -r requirements.lock")
    root = Path(spec.submodule_search_locations[0]) / "static" / "mathjax"
    parts = ("startup.js", "core.js", "input/tex.js", "output/chtml.js", "a11y/assistive-mml.js")
    for pattern in (*parts, "output/chtml/fonts/**/*", "input/tex/extensions/*.js"):
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                yield path.relative_to(root).as_posix(), path


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Make ``folder`` hold exactly ``files``, apart from Jupyter Book's own ``_build``."""
    if folder.is_dir():
        for path in sorted(folder.rglob("*"), reverse=True):
            name = path.relative_to(folder).as_posix()
            if name.split("/")[0] == "_build":
                continue
            if path.is_file() and name not in files:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
