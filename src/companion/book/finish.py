"""What an executed notebook needs to become a page.

papermill leaves two parameter cells, timestamps and paths; the figures' captions, alt texts and
data sit in the metadata of outputs, where Jupyter Book does not look. One pass over the cells puts
that right.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from companion.book.download import standalone
from companion.book.layout import Book, BookError
from companion.book.parameters import declared, substituted, table
from companion.book.polish import lead
from companion.book.prose import Caption, captions, fill, give, merged, places
from companion.core.locations import data_root, runs_root
from companion.core.locks import WAITING
from companion.report import tables
from companion.report.figures import dark, label
from companion.report.recorded import Record
from companion.training import Recipe

#: Keys that papermill and nbclient put into metadata: times, paths, durations.
_NOISE = ("papermill", "execution")
_LITERAL = (type(None), bool, int, float, str, list, tuple, dict)
_LEAD = re.compile(r"^<!-- lead: (\S+) -->$", re.M)


@dataclass
class Page:
    """A chapter, ready to be staged."""

    chapter: str
    notebook: Any
    download: Any = None  # the same as a notebook of its own, which runs without the repository
    files: dict[str, bytes] = field(default_factory=dict)  # beside the chapter: files/<chapter>/...
    dark: dict[str, bytes] = field(default_factory=dict)  # figure -> the same in dark colours
    parameters: dict[str, Any] = field(default_factory=dict)  # name -> value used, where literal
    values: dict[str, Any] = field(default_factory=dict)  # what page.fill gave
    claims: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] | None = None
    recorded: list[Record] = field(default_factory=list)  # what ships beside the run
    seconds: float | None = None  # that the chapter took, with what the run store had already


def finish(book: Book, profile: str, chapter: str, notebook: Any) -> Page:
    """Turn papermill's output into a page.

    Arguments:
        book: its root is cut out of every path that a cell printed.
        profile: the one the notebook ran with.
        notebook: executed, of nbformat 4. It is changed in place.

    Returns:
        The page: its parameters as a table, with the cell that sets them folded below; figures with
        caption, label, alt text and download links; solutions of exercises folded; no timestamps,
        no paths of this machine.

    Raises:
        BookError: Two figures of the chapter have the same name; a figure or table without a
            caption, or a caption without either; a placeholder in the text that nobody filled.
    """
    page = Page(chapter, notebook)
    values = notebook.metadata.get("papermill", {}).get("parameters", {})
    page.seconds = notebook.metadata.get("papermill", {}).get("duration")
    for noise in (*_NOISE, "jupytext", "widgets"):
        notebook.metadata.pop(noise, None)
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in _tags(c)]
    for cell in notebook.cells:
        for noise in _NOISE:
            cell.metadata.pop(noise, None)
        if "parameters" in _tags(cell):
            where = f"chapters/{chapter}.md"
            cell.source = substituted(cell.source, values, where)  # papermill can still set them
            known = {name: p.default for name, p in declared(cell.source, where).items()}
            page.parameters = {k: v for k, v in known.items() if isinstance(v, _LITERAL)}
        if cell.cell_type == "code":
            cell.outputs = list(_tidy(cell.outputs, book))
    _texts(page, notebook, book)
    page.download = standalone(book, chapter, notebook)
    notebook.cells = [
        part
        for folded in _solutions(notebook.cells)
        for cell in _shown(page, folded, book, profile)
        for part in _figures(page, cell)
    ]
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    _add_data(page, profile)
    return page


def _tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _tidy(outputs: Iterable[Any], book: Book) -> Iterator[Any]:
    """Outputs without paths of this machine; a stream that came in pieces is one again.

    Without lines, too, in which a chapter says that it waits for another to train what both want.
    """
    last = None
    for output in outputs:
        if output.output_type == "stream":
            output.text = re.sub(rf"^.*; {WAITING}\n?", "", output.text, flags=re.M)
            if not output.text:
                continue
            if last is not None and last.name == output.name:
                last.text = _scrub(last.text + output.text, book)
                continue
            output.text = _scrub(output.text, book)
            last = output
        else:
            last = None
            for mime, content in output.get("data", {}).items():
                if mime.startswith("text/") and isinstance(content, str):
                    output.data[mime] = _scrub(content, book)
        yield output


def _scrub(text: str, book: Book) -> str:
    """Replace folders of this machine by what they mean; number no kernel."""
    text = re.sub(r"\S*[/\\]ipykernel_\d+[/\\]\d+\.py", "<cell>", text)
    root = book.root.resolve()
    names = {str(root): ".", sys.prefix: "<python>", str(Path.home()): "~"}
    for folder, variable in ((data_root(), "COMPANION_DATA"), (runs_root(), "COMPANION_RUNS")):
        if not folder.is_relative_to(root):
            names[str(folder)] = f"${variable}"
    for path in sorted(names, key=len, reverse=True):
        if len(path) > 1:  # a home folder of "/" is in every path
            text = re.sub(re.escape(path) + r"(?![\w.-])", names[path], text)
    return text


def _texts(page: Page, notebook: Any, book: Book) -> None:
    """Fill the placeholders of the Markdown, and give figures and tables their captions."""
    at = places(book, page.chapter)
    shown = [
        (output, output["metadata"]["companion"])
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "companion" in output.get("metadata", {})
    ]
    values = merged((entry["values"] for _, entry in shown if "values" in entry), at(""))
    page.values = values
    page.provenance = next((e["provenance"] for _, e in shown if "provenance" in e), None)
    blocks = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source, found = captions(cell.source, at)
            cell.source = fill(cell.source, values, at)
            blocks += found
        elif cell.cell_type == "code":  # the values themselves are not for readers
            filled = [output for output, entry in shown if "values" in entry]
            cell.outputs = [o for o in cell.outputs if not any(o is f for f in filled)]
    drawn = [entry["figure"] for _, entry in shown if "figure" in entry]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _led(cell.source, {f["name"] for f in drawn}, blocks, at)
    notebook.cells = [c for c in notebook.cells if c.cell_type != "markdown" or c.source.strip()]
    alone = give(
        drawn,
        [entry["table"] for _, entry in shown if "table" in entry],
        blocks,
        values,
        at,
    )
    if alone:
        raise BookError(f"{alone[0].where}: no figure or table is called {alone[0].name!r}.")
    for output, entry in shown:
        if table := entry.get("table"):
            html = tables.html(table["columns"], table["rows"], table["caption"])
            output["data"]["text/html"] = html


def _markdown(source: str) -> Any:
    import nbformat

    return nbformat.v4.new_markdown_cell(source)


def _solutions(cells: Iterable[Any]) -> Iterator[Any]:
    """The cells, with each solution folded: the cell of that tag, and the paragraph after it."""
    open_ = False
    for cell in cells:
        if open_ and cell.cell_type != "markdown":
            yield _markdown("</details>")
            open_ = False
        if "solution" in _tags(cell):
            yield _markdown('<details class="companion-solution"><summary>Solution</summary>')
            open_ = True
        elif open_:
            said, _, rest = cell.source.lstrip().partition("\n\n")
            cell.source = f"{said}\n\n</details>\n\n{rest}"
            open_ = False
        yield cell
    if open_:
        yield _markdown("</details>")


def _shown(page: Page, cell: Any, book: Book, profile: str) -> Iterator[Any]:
    """The cell as a reader meets it: what it shows first, its folded code below.

    Each fold says what is inside of it.
    """
    import nbformat

    tags = _tags(cell)
    if "parameters" in tags:
        yield _markdown(table(book, profile, page.chapter, cell.source, _used(page)))
        yield _fold(cell, "hide-input", "the cell that sets them")
        return
    outputs = cell.get("outputs", [])
    what = next((word for kind, word in _KINDS.items() if _has(outputs, kind)), "")
    last = _has(outputs, "rerun")
    if "hide-input" in tags:
        if outputs:
            note = "# what the cell below shows"
            shown = nbformat.v4.new_code_cell(note, metadata={"tags": ["remove-input"]})
            shown.outputs, cell.outputs = outputs, []
            yield shown
        yield _fold(cell, "hide-input", f"the code of this {what}" if what else "the code")
    elif "hide-output" in tags:
        yield _fold(cell, "hide-output", f"the {what}" if what else "the output")
    else:
        yield cell
    if last:
        yield _markdown(DOWNLOAD.format(name=f"{page.chapter}.ipynb"))


def _used(page: Page) -> dict[str, Any]:
    """What the page's main network was trained with, whoever chose it."""
    made = page.provenance or {}
    main = next((made[name] for name in _MAIN if name in made), None)
    if not main:
        return {}
    recipe: dict[str, Any] = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
    recipe |= main
    return recipe | {"unstable": recipe.get("net"), "stable": made.get("gentle", {}).get("net")}


_MAIN = ("recipe", "network", "noisy", "residual")  # what pages call it in their provenance
DOWNLOAD = (
    '<p class="companion-download"><a href="../_sources/chapters/{name}" download="{name}">'
    "Download this page as a notebook</a>: it runs outside of the book's repository, too; its "
    "first cell gets the package.</p>"
)
_KINDS = {"figure": "figure", "claims": "table", "table": "table"}  # emitted -> for people


def _has(outputs: Iterable[Any], kind: str) -> bool:
    return any(kind in output.get("metadata", {}).get("companion", {}) for output in outputs)


def _fold(cell: Any, tag: str, inside: str) -> Any:
    """The cell, folded by a tag of MyST-NB, with words on the fold."""
    cell.metadata["tags"] = list(dict.fromkeys([*_tags(cell), tag]))
    prompts = {"code_prompt_show": f"Show {inside}", "code_prompt_hide": f"Hide {inside}"}
    cell.metadata["mystnb"] = {**cell.metadata.get("mystnb", {}), **prompts}
    return cell


def _led(text: str, drawn: set[str], blocks: list[Caption], at: Callable[[str], str]) -> str:
    """``<!-- lead: NAME -->`` becomes the place of a page's best figure, before it is explained;
    :mod:`companion.book.polish` puts a copy there. A figure that this run did not draw leaves none.

    Raises:
        BookError: no caption of the chapter has this name.
    """

    def place(found: re.Match[str]) -> str:
        if found[1] not in {block.name for block in blocks}:
            raise BookError(f"{at(found[0])}: no figure is called {found[1]!r}.")
        return lead(label(found[1])) if found[1] in drawn else ""

    return _LEAD.sub(place, text)


def _figures(page: Page, cell: Any) -> Iterator[Any]:
    """The cell, and after each figure its download links; what it published goes to the page.

    Jupyter Book takes a caption from the cell's metadata, so a cell that shows more is split.
    """
    import nbformat

    if cell.cell_type != "code":
        yield cell
        return
    groups: list[tuple[list[Any], dict[str, Any] | None]] = [([], None)]
    for output in cell.outputs:
        found = output.get("metadata", {}).pop("companion", {})
        page.claims += found.get("claims", [])
        figure = found.get("figure")
        # The caption would go to every picture and every Markdown text of the cell.
        shown = [o for o in groups[-1][0] if o.output_type != "stream"]
        if shown and output.output_type != "stream" and (figure or groups[-1][1]):
            groups.append(([], None))
        outputs, known = groups[-1]
        outputs.append(output)
        groups[-1] = (outputs, figure or known)
    for i, (outputs, figure) in enumerate(groups):
        part = cell
        if i:
            # Not empty: Jupyter Book drops a code cell without code, outputs and all.
            note = "# one more output of the cell above"
            part = nbformat.v4.new_code_cell(note, metadata={"tags": ["remove-input"]})
        part.outputs = outputs
        if figure is None:
            yield part
            continue
        part.metadata["mystnb"] = {
            **part.metadata.get("mystnb", {}),
            "figure": {"caption": figure["caption"], "name": label(figure["name"])},
            "image": {**part.metadata.get("mystnb", {}).get("image", {}), "alt": figure["alt"]},
        }
        yield part
        yield _downloads(page, figure, outputs)


def _downloads(page: Page, figure: dict[str, Any], outputs: list[Any]) -> Any:
    """Keep the figure and its data as files, and link them in one line."""
    name = figure["name"]
    if any(name == other["name"] for other in page.figures):
        raise BookError(f"{page.chapter}: two figures are called {name!r}.")
    page.figures.append(figure)
    svg = next(o.data["image/svg+xml"] for o in outputs if "image/svg+xml" in o.get("data", {}))
    page.files[f"{name}.svg"] = svg.encode()
    page.dark[name] = dark(svg).encode()
    links = [f"{{download}}`figure (SVG) <files/{page.chapter}/{name}.svg>`"]
    if figure.get("data") is not None:
        links.insert(0, f"{{download}}`data (JSON) <files/{page.chapter}/{name}.json>`")
    line = f":::{{div}} companion-downloads\n{' · '.join(links)}\n:::"
    return _markdown(line)


def _add_data(page: Page, profile: str) -> None:
    """The numbers behind each figure, with what a reader needs to place them."""
    for figure in page.figures:
        if figure.get("data") is not None:
            document = {
                "chapter": page.chapter,
                "profile": profile,
                "figure": figure["name"],
                "caption": figure["caption"],
                "parameters": page.parameters,
                "provenance": page.provenance,
                "data": figure["data"],
            }
            text = json.dumps(document, indent=1, ensure_ascii=False, default=str)
            page.files[f"{figure['name']}.json"] = (text + "\n").encode()
