"""A plain table in a notebook that stays a table on the page: HTML with header cells and a caption.

MyST-NB renders Markdown outputs without table support, so chapters call :func:`show`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from companion.core.errors import BadParameter
from companion.report import page


def show(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str) -> None:
    """Display a table; wide ones scroll on a small screen.

    Arguments:
        columns: headers, shape (columns,); rows: values, shape (rows, columns), shown by ``str``.
            The first value of a row is its header.

    Raises:
        BadParameter: a row of another length, or no caption.
    """
    if not caption.strip() or any(len(row) != len(columns) for row in rows):
        raise BadParameter("tables.show needs a caption, and as many values a row as columns.")
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(str(first))}</th>'
        + "".join(f"<td>{escape(str(value))}</td>" for value in rest)
        + "</tr>"
        for first, *rest in rows
    )
    title = escape(caption)
    html = (
        f'<div class="companion-scroll" tabindex="0" role="region" aria-label="{title}">'
        f'<table class="companion-table"><caption>{title}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    text = "\n".join("\t".join(map(str, row)) for row in [columns, *rows])
    entry = {"caption": caption, "columns": list(columns), "rows": [[*map(str, r)] for r in rows]}
    page.emit({"text/html": html, "text/plain": text}, {"table": entry})
