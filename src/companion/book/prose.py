"""What a run puts into a chapter's Markdown: placeholders, and the captions of figures and tables.

    The line peaks at {{peak:.0f}} %, that of the {{network}} at {{other:.0f}} %.

    :::{caption} line
    :alt: Test error against the position on the line, with a peak of {{peak:.0f}} %.
    Test error on the line between the copies of the {{network}}.
    :::

Values come from :func:`companion.report.page.fill`, and for one caption from ``values=`` of
:func:`companion.report.figures.publish`. Nothing is filled inside code and formulas. A caption
block is taken out of the text and given to the figure or table of its name; with the option
``:optional:`` it may be without one, as where the figure is drawn only if there are records.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from companion.book.chapter import scan
from companion.book.layout import Book, BookError
from companion.report.page import as_text

_OPEN = re.compile(r"(:{3,})\s*\{caption\}\s*(.*?)\s*")
_INSIDE = r"(?:(?!\n[ \t]*\n).)+?"  # of one paragraph
_TOKEN = re.compile(
    rf"(?P<code>(?<![`\\])(?P<ticks>`+)(?!`){_INSIDE}(?<!`)(?P=ticks)(?!`)|<!--.*?-->)"
    r"|(?P<math>(?<!\\)\$\$.+?\$\$"
    rf"|(?<![\\$])\$(?![\s$]){_INSIDE}(?<![\s\\])\$"
    r"|\\begin\{(?P<env>\w+\*?)\}.*?\\end\{(?P=env)\})"
    r"|\{\{(?P<asked>[^\n]*?)\}\}",
    re.DOTALL,
)
_ASKED = re.compile(r"\s*((?:\w+\.)?[A-Za-z_]\w*)\s*(?::([^{}]*?))?\s*")
_ODD = {"nan": "no valid value", "inf": "∞", "-inf": "−∞"}  # as page.fillable writes them

At = Callable[[str], str]


class Unfilled(BookError):
    """A placeholder whose value nobody gave."""


@dataclass(frozen=True)
class Caption:
    """A ``{caption}`` block, not yet filled.

    Arguments:
        name: of its figure or table.
        text, alt: its texts; alt is "" if there is none.
        optional: whether there need be no such figure.
        where: file and line, for messages.
    """

    name: str
    text: str
    alt: str
    optional: bool
    where: str


def places(book: Book, chapter: str) -> At:
    """Where in the chapter's source a line of its text stands, for messages."""
    lines = [line.strip() for line in book.source(chapter).read_text(encoding="utf-8").splitlines()]
    where = f"chapters/{chapter}.md"

    def at(line: str) -> str:
        found = line.strip()
        if not found:
            return where
        spot = f"line {1 + lines.index(found)}" if found in lines else repr(found)
        return f"{where}, {spot}"

    return at


def captions(text: str, at: At) -> tuple[str, list[Caption]]:
    """Take the caption blocks out of Markdown.

    Arguments:
        text: Markdown; code cells may stand in it.
        at: from :func:`places`.

    Returns:
        the text without them, and the blocks in order.

    Raises:
        BookError: a block without a name or a text, or one that is never closed.
    """
    rest: list[str] = []
    found: list[Caption] = []
    lines = list(scan(text))
    number = 0
    while number < len(lines):
        fenced, line = lines[number]
        number += 1
        opened = None if fenced else _OPEN.fullmatch(line)
        if opened is None:
            rest.append(line)
            continue
        end = next(
            (i for i in range(number, len(lines)) if lines[i][1].strip() == opened[1]), len(lines)
        )
        body = [one for _, one in lines[number:end]]
        number = end + 1
        if end == len(lines):
            raise BookError(f"{at(line)}: the caption block is never closed.")
        found.append(_caption(opened[2], body, at(line)))
    return "\n".join(rest), found


def _caption(name: str, body: list[str], where: str) -> Caption:
    """A block's parts; an option goes on in lines that are indented."""
    options: dict[str, str] = {}
    last = ""
    while body and (option := re.fullmatch(r":(\w+):\s*(.*)|(\s+\S.*)", body[0])):
        if option[3] and not last:
            break
        last = option[1] or last
        words = (option[2] or option[3] or "").strip()
        options[last] = f"{options.get(last, '')} {words}".strip()
        body = body[1:]
    text = "\n".join(body).strip()
    if unknown := set(options) - {"alt", "optional"}:
        raise BookError(f"{where}: a caption block has no option {', '.join(sorted(unknown))!r}.")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) or not text:
        raise BookError(f"{where}: a caption block needs a figure's or table's name, and a text.")
    return Caption(name, text, options.get("alt", ""), "optional" in options, where)


def give(
    figures: Sequence[dict[str, Any]],
    tables: Sequence[dict[str, Any]],
    blocks: Iterable[Caption],
    values: Mapping[str, Any],
    at: At,
    *,
    missing: str | None = None,
) -> list[Caption]:
    """Give figures and tables the captions and alternative texts of their blocks.

    Arguments:
        figures, tables: what :func:`companion.report.figures.publish` and
            :func:`companion.report.tables.show` handed to the book; changed in place.
        blocks: from :func:`captions`.
        values: from :func:`merged`; a figure's own come first.
        at: from :func:`places`.
        missing: the text in place of one whose values nobody gave; None: that is an error.

    Returns:
        the blocks that belong to nothing here, without those that are optional.

    Raises:
        BookError: two blocks of one name, a figure or table without a caption or with two, or a
            figure without an alternative text.
    """
    known: dict[str, Caption] = {}
    for block in blocks:
        if known.setdefault(block.name, block) is not block:
            raise BookError(f"{block.where}: a second caption for {block.name!r}.")
    left = dict(known)
    for entry in (*figures, *tables):
        what = f"the {'table' if 'rows' in entry else 'figure'} {entry.get('name')!r}"
        own = {**values, **entry.pop("values", {})}
        given = known.get(entry.get("name", ""))
        if given is None:
            raise BookError(
                f"{at('')}: {what} has no caption. Write a block :::{{caption}} {entry['name']} "
                "after its cell."
            )
        if left.pop(given.name, None) is None:
            raise BookError(f"{given.where}: two figures or tables are called {given.name!r}.")
        texts = {"caption": given.text} | ({} if "rows" in entry else {"alt": given.alt})
        for name, text in texts.items():
            if not text:
                raise BookError(f"{given.where}: {what} needs an alternative text, a line :alt:.")
            markup = name == "caption" and "rows" not in entry
            try:
                entry[name] = " ".join(fill(text, own, at, markup=markup).split())
            except Unfilled:
                if missing is None:
                    raise
                entry[name] = missing
    return [block for block in left.values() if not block.optional]


def merged(entries: Iterable[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """The values of all ``page.fill`` of a chapter.

    Raises:
        BookError: one name with two values.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        for name, value in entry.items():
            if found.setdefault(name, value) != value:
                raise BookError(
                    f"{where}: page.fill gives {name!r} twice: {found[name]!r} and {value!r}."
                )
    return found


def fill(text: str, values: Mapping[str, Any], at: At, *, markup: bool = True) -> str:
    """The text with values for its placeholders.

    Arguments:
        text: Markdown.
        values: from :func:`merged`.
        at: from :func:`places`.
        markup: whether the text is read as Markdown afterwards: then strings are escaped.

    Raises:
        Unfilled: a placeholder without a value.
        BookError: a format that does not fit its value, a placeholder inside a formula, or braces
            that are no placeholder.
    """
    parts = [""]
    prose: list[str] = []
    for fenced, line in [*scan(text), (True, "")]:
        if not fenced:
            prose.append(line)
            continue
        if prose:
            parts.append(_filled("\n".join(prose) + "\n", values, at, markup))
            prose = []
        parts.append(f"{line}\n")
    return "".join(parts)[:-2]


def _filled(text: str, values: Mapping[str, Any], at: At, markup: bool) -> str:
    def replace(found: re.Match[str]) -> str:
        start = text.rfind("\n", 0, found.start()) + 1
        if found["code"]:
            return found[0]
        if found["math"]:
            for asked in re.findall(r"\{\{(.*?)\}\}", found[0]):
                name = _ASKED.fullmatch(asked)
                if name and (name[1] in values or name[2]):
                    line = found[0][: found[0].index(asked)].count("\n")
                    raise BookError(
                        f"{at(text[start:].splitlines()[line])}: {{{{{asked}}}}} stands inside a "
                        "formula, where nothing is filled. Write it outside of the dollars."
                    )
            return found[0]
        where = f"{at(text[start:].splitlines()[0])}: {found[0]}"
        asked = _ASKED.fullmatch(found["asked"])
        if not asked:
            raise BookError(f"{where} is no placeholder: {{{{name}}}} or {{{{name:.1f}}}}.")
        if asked[1] not in values:
            raise Unfilled(f"{where}: nobody gives {asked[1]!r} (page.fill).")
        value = values[asked[1]]
        try:
            shown = _shown(value, asked[2] or "", markup)
        except ValueError as error:
            raise BookError(f"{where}: the format does not fit {value!r} ({error}).") from error
        if markup and not text[start : found.start()].strip():
            item = re.match(r"\d{1,9}(?=[.)](\s|$))", shown + text[found.end() :])
            if item and item.end() <= len(shown):  # "3. " would open a list
                shown = f"{item[0]}\\{shown[item.end() :]}"
        return shown

    return _TOKEN.sub(replace, text)


def _shown(value: Any, spec: str, markup: bool) -> str:
    if value in _ODD:
        return _ODD[value]
    shown = format(value, spec)
    if not isinstance(value, str):
        return shown.replace("-", "−")
    return as_text(shown) if markup else " ".join(shown.split())
