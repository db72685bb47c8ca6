"""The page as a notebook of its own, which runs wherever its package can be installed.

The notebook of the site is written for MyST and lies in a checkout. The reader's has the same cells
and outputs, its text in plain Markdown with the numbers of the run, and a first cell that says how
to get the package. The data of the pages' own parameters come inside Python packages; what the
papers claim and what is recorded travel in the package (``setup.py``).
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from companion.book.chapter import scan
from companion.book.layout import Book, BookError
from companion.core import plainyaml

_TAGS = {"parameters", "solution"}  # the others fold and hide, on the site

NOTE = """\
*This notebook is a page of "{title}". It runs without the book's repository. Numbers in its text
are those of the site's run; what its cells show changes when you run them.*"""

INSTALL = """\
# The book's package; run this cell once.
from importlib.util import find_spec

if find_spec("companion") is None:
    %pip install "{what}"
"""


def standalone(book: Book, chapter: str, notebook: Any) -> Any:
    """A copy of an executed notebook that needs nothing of the book but its package.

    Arguments:
        notebook: with captions and placeholders filled, before it is split for the site.
    """
    import nbformat

    cites = _authors(book.root / "references.bib")
    own = copy.deepcopy(notebook)
    own.cells = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            if text := plain(cell.source, cites, book).strip():
                own.cells.append(nbformat.v4.new_markdown_cell(text))
            continue
        twin = copy.deepcopy(cell)
        twin.metadata = {"tags": [t for t in cell.metadata.get("tags", []) if t in _TAGS]}
        own.cells.append(twin)
        captions = []
        for output in twin.get("outputs", []):
            found = output.get("metadata", {}).pop("companion", {})
            if figure := found.get("figure"):
                captions.append(f"*{plain(figure['caption'], cites, book)}*")
        if captions:
            own.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(captions)))
    config = _yaml(book.root / "_config.yml")
    about = nbformat.v4.new_markdown_cell(NOTE.format(title=config.get("title", "the book")))
    get = nbformat.v4.new_code_cell(INSTALL.format(what=requirement(book)).strip())
    own.cells = [get, about, *own.cells]
    for i, cell in enumerate(own.cells):
        cell["id"] = f"{chapter}-{i}"
    return own


def requirement(book: Book) -> str:
    """What pip installs: the repository of ``CITATION.cff``, else the folder it is asked for."""
    address = _yaml(book.root / "CITATION.cff").get("repository-code")
    return f"companion @ git+{address}" if address else "/path/to/the/repository"


def plain(text: str, cites: dict[str, str], book: Book) -> str:
    """MyST as Markdown that Jupyter shows: no roles, labels, directives and links of the site.

    Arguments:
        cites: BibTeX key -> authors and year.
    """
    return "\n".join(
        line if fenced else _line(line, cites, book)
        for fenced, line in scan(text)
        if fenced or not _MARK.fullmatch(line)
    )


_MARK = re.compile(r"\s*(\([\w-]+\)=|:{3,}.*|<!--.*-->|<figure.*</figure>)\s*")


def _line(line: str, cites: dict[str, str], book: Book) -> str:
    def cite(found: re.Match[str]) -> str:
        names = [cites.get(key.strip(), key) for key in found["keys"].split(",")]
        joined = "; ".join(names)
        if found["kind"] == "t":
            return joined
        return "(" + "; ".join(re.sub(r" \((\w+)\)$", r", \1", name) for name in names) + ")"

    def link(found: re.Match[str]) -> str:
        chapter = found["to"].partition("#")[0]
        if chapter in book.chapters():
            return f"[{found['text']}]({chapter}.ipynb)"
        return found["text"] if not re.match(r"\w+:", found["to"]) else found[0]

    line = re.sub(r"\{cite:(?P<kind>[tp])\}`(?P<keys>[^`]+)`", cite, line)
    line = re.sub(r"\{(?:eq|numref)\}`(?:eq-|fig-)?([^`]+)`", r"(\1)", line)
    line = re.sub(r"^\$\$ \((?:eq-)?([\w-]+)\)$", r"\\tag{\1}\n$$", line)
    return re.sub(r"(?<!!)\[(?P<text>[^\]\[]+)\]\((?P<to>[^)\s]+)\)", link, line)


def _authors(path: Path) -> dict[str, str]:
    """BibTeX key -> ``Frankle et al. (2020)``."""
    if not path.is_file():
        return {}
    from pybtex.database import parse_file

    found = {}
    for key, entry in parse_file(str(path)).entries.items():
        people = [" ".join(p.last_names) for p in entry.persons.get("author", [])]
        who = people[0] if people else key
        if len(people) == 2:
            who = " and ".join(people)
        elif len(people) > 2:
            who += " et al."
        found[key] = f"{who} ({entry.fields.get('year', 'n.d.')})"
    return found


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = plainyaml.parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BookError(f"{path.name} is not valid YAML: {error}") from error
    return found if isinstance(found, dict) else {}
