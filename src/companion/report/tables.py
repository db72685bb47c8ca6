"""A plain table in a notebook that stays a table on the page: HTML with header cells and a caption.

MyST-NB renders Markdown outputs without table support, so chapters call :func:`show`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from companion.core.errors import BadParameter
from companion.report import page
from companion.report.page import as_html as escape


def show(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    name: str,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Display a table; wide ones scroll on a small screen.

    Arguments:
        columns: headers, shape (columns,).
        rows: values, shape (rows, columns), shown by ``str``. The first value of a row is its
            header.
        name: of the ``{caption}`` block in the chapter's Markdown.
        values: numbers and strings for the placeholders of that block; they come before those of
            :func:`companion.report.page.fill`.

    Raises:
        BadParameter: a row of another length.
    """
    if any(len(row) != len(columns) for row in rows):
        raise BadParameter(f"table {name!r}: a row needs as many values as there are columns.")
    text = "\n".join("\t".join(map(str, row)) for row in [columns, *rows])
    cells = [[*map(str, row)] for row in rows]
    entry: dict[str, Any] = {"name": name, "columns": list(columns), "rows": cells}
    if values:
        entry["values"] = page.fillable(values, f"table {name!r}, values")
    page.emit(
        {"text/html": html(columns, cells, name), "text/plain": text},
        {"table": entry},
    )


def html(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """The table as HTML; everything is plain text, numbers below zero with a true minus sign."""

    def cell(value: str) -> str:
        return escape(re.sub(r"(?<![\w.-])-(?=\.?\d)", "−", value))

    head = "".join(f'<th scope="col">{escape(c)}</th>' if c else "<td></td>" for c in columns)
    body = "".join(
        f'<tr><th scope="row">{cell(first)}</th>'
        + "".join(f"<td>{cell(value)}</td>" for value in rest)
        + "</tr>"
        for first, *rest in rows
    )
    title = escape(caption)
    return (
        f'<div class="companion-scroll" tabindex="0" role="region" aria-label="{title}">'
        f'<table class="companion-table"><caption>{title}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
