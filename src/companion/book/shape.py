"""The shape of a chapter: how long it is, how much of its code is visible, how much it explains."""

from __future__ import annotations

import re
from dataclasses import dataclass

from companion.book.chapter import cells, scan

LINES = 600
VISIBLE = 0.6
WORDS = 4

_HIDDEN = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
_APART = {"parameters", "solution"}  # a table on the page; folded for the reader's sake


@dataclass(frozen=True)
class Shape:
    """What is counted of a chapter.

    Arguments:
        lines: of its source.
        code: lines of code in its cells, without blank ones, without the parameters, which the page
            has as a table, and without solutions of exercises.
        visible: those in cells that a reader sees without a click.
        words: of its prose and captions.
        longest: lines of its longest cell.
    """

    lines: int
    code: int
    visible: int
    words: int
    longest: int

    def problems(self) -> list[str]:
        """What is not as it should be, in words."""
        found = []
        if self.lines > LINES:
            found.append(f"{self.lines} lines, {LINES} at most")
        if self.visible < VISIBLE * self.code:
            seen = f"{self.visible} of {self.code} lines of code visible"
            found.append(f"{seen}, {VISIBLE:.0%} needed")
        if self.words < WORDS * self.code:
            found.append(f"{self.words} words for {self.code} lines of code, {WORDS} a line needed")
        return found

    def __str__(self) -> str:
        code = max(self.code, 1)
        return (
            f"{self.lines} lines; {self.code} of code, {self.visible / code:.0%} visible, longest "
            f"cell {self.longest}; {self.words} words, {self.words / code:.1f} a line of code"
        )


def shape(text: str, where: str) -> Shape:
    """Count a chapter's source; ``where`` is its name, for messages."""
    counted = [
        (sum(bool(line.strip()) for line in cell.source.splitlines()), not _HIDDEN & {*cell.tags})
        for cell in cells(text, where)
        if not _APART & {*cell.tags}
    ]
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    prose = "\n".join(line for fenced, line in scan(body) if not fenced)
    plain = re.sub(r"\$\$.*?\$\$", "", prose, flags=re.DOTALL)
    marks = re.compile(r"\s*(:::|```|\([\w-]+\)=$)")  # directives and labels
    written = [line for line in plain.splitlines() if not marks.match(line)]
    return Shape(
        lines=len(text.splitlines()),
        code=sum(number for number, _ in counted),
        visible=sum(number for number, seen in counted if seen),
        words=len(re.findall(r"\S*\w\S*", "\n".join(written))),
        longest=max((number for number, _ in counted), default=0),
    )
