"""A chapter's text, read without Jupyter: which of its lines are prose, and its code cells.

jupytext reads the same files when the book is built; this reader exists for machines that record
results and have no notebook tools, and knows what chapters use: fenced ``{code-cell}`` blocks at
the left margin, with options as ``:key: value`` lines or as a YAML block. A test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from companion.core import plainyaml
from companion.core.errors import BadParameter

_FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*(\{[\w:-]+\})?([^`]*)")
_CELL = re.compile(r"(`{3,}|~{3,})\s*\{code-cell\}.*")
_VERBATIM = {"code-cell", "code", "code-block", "math", "literalinclude", "raw"}


@dataclass(frozen=True)
class Cell:
    """One code cell.

    Arguments:
        source: its code.
        line: the line of the file its code starts at, from 1.
        options: such as ``{"tags": ["parameters"]}``.
    """

    source: str
    line: int
    options: dict[str, Any]

    @property
    def tags(self) -> list[str]:
        """The cell's tags."""
        return list(self.options.get("tags") or [])


def scan(text: str) -> Iterator[tuple[int, str]]:
    """Each line of Markdown, and where it stands.

    Returns:
        0 for prose, also inside of a note; for a block of code or of a formula, its fences too, the
        number of its first line, from 1; -1 for such a block inside of a note, and for a note's
        fences.
    """
    verbatim, opened = "", 0
    notes: list[str] = []  # fences of prose; what ends one looks like the start of a bare fence
    for number, line in enumerate(text.split("\n"), 1):
        fence = _FENCE.fullmatch(line)
        bare = fence and not fence[2] and not fence[3].strip()
        if verbatim:
            yield opened, line
            if fence and bare and fence[1].startswith(verbatim):
                verbatim = ""
        elif not fence:
            yield 0, line
        elif bare and notes and fence[1].startswith(notes[-1]):
            notes.pop()
            yield -1, line
        elif fence[2] and fence[2][1:-1] not in _VERBATIM:
            notes.append(fence[1])
            yield -1, line
        else:
            verbatim, opened = fence[1], -1 if notes else number
            yield opened, line


def cells(text: str, where: str) -> list[Cell]:
    """The code cells of a MyST notebook, in order.

    Arguments:
        text: the whole file.
        where: its name, for messages.

    Raises:
        BadParameter: a cell that is not closed, or options that are not YAML.
    """
    blocks: dict[int, list[str]] = {}
    for opened, line in scan(text):
        blocks.setdefault(opened, []).append(line)
    found = []
    for number, (first, *body) in blocks.items():
        if number > 0 and (fence := _CELL.fullmatch(first)):
            if not body or not re.fullmatch(rf"\s*{fence[1]}{fence[1][0]}*\s*", body[-1]):
                raise BadParameter(f"{where}, line {number}: the code cell is never closed.")
            found.append(_cell(body[:-1], number, f"{where}, line {number}"))
    return found


def _cell(body: list[str], start: int, where: str) -> Cell:
    """Options apart from code. ``start`` counts lines of the file before the body."""
    skip, options = 0, ""
    if body and body[0].startswith("---"):
        ends = (i for i in range(1, len(body)) if body[i].startswith("---"))
        stop = next(ends, len(body))
        skip, options = stop + 1, "\n".join(body[1:stop])
    else:
        while skip < len(body) and body[skip].lstrip().startswith(":"):
            skip += 1
        options = "\n".join(line.lstrip()[1:] for line in body[:skip])
    if skip < len(body) and not body[skip].strip():
        skip += 1
    try:
        values = plainyaml.parse(options) or {}
    except yaml.YAMLError as error:
        raise BadParameter(f"{where}: the cell's options are not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise BadParameter(f"{where}: the cell's options have to be lines of `:name: value`.")
    return Cell("\n".join(body[skip:]), start + skip + 1, values)
