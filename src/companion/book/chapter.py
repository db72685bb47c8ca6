"""A chapter's code cells, read from its text without Jupyter.

jupytext reads the same files when the book is built; this reader exists for machines that record
results and have no notebook tools, and knows what chapters use: fenced ``{code-cell}`` blocks at
the left margin, with options as ``:key: value`` lines or as a YAML block. A test compares the two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from companion.core import plainyaml
from companion.core.errors import BadParameter

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


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


def cells(text: str, where: str) -> list[Cell]:
    """The code cells of a MyST notebook, in order.

    Arguments:
        text: the whole file.
        where: its name, for messages.

    Raises:
        BadParameter: a cell that is not closed, or options that are not YAML.
    """
    found: list[Cell] = []
    lines = text.splitlines()
    number = 0
    if lines and lines[0].rstrip() == "---":  # the header
        number = 1 + next((i for i in range(1, len(lines)) if lines[i].rstrip() == "---"), 0)
    while number < len(lines):
        opened = _FENCE.fullmatch(lines[number])
        number += 1
        if not opened or (opened[1][0] == "`" and "`" in opened[2]):
            continue
        closing = re.compile(rf" {{0,3}}{re.escape(opened[1][0])}{{{len(opened[1])},}}[ \t]*")
        start = number
        while number < len(lines) and not closing.fullmatch(lines[number]):
            number += 1
        if opened[2].strip().startswith("{code-cell}"):
            if number == len(lines):
                raise BadParameter(f"{where}, line {start}: the code cell is never closed.")
            found.append(_cell(lines[start:number], start, f"{where}, line {start}"))
        number += 1
    return found


def _cell(body: list[str], start: int, where: str) -> Cell:
    """Options apart from code. ``start`` counts lines of the file before the body."""
    skip, options = 0, ""
    if body and body[0].startswith("---"):
        ends = (i for i in range(1, len(body)) if body[i].startswith("---"))
        stop = next(ends, len(body))
        skip, options = stop + 1, "\n".join(body[1:stop])
    else:
        first = next((i for i, line in enumerate(body) if line.strip()), len(body))
        if first < len(body) and body[first].lstrip().startswith(":") and first == 0:
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
