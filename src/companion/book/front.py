"""The pages around the chapters: their markers take what the run found.

A marker is a comment on a line of its own in a page's Markdown. The pages may also say
``{{01_instability.wall_first}}``: any value that a chapter fills into its own text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from companion.book.finish import Page
from companion.book.layout import BookError
from companion.book.polish import number
from companion.book.prose import fill
from companion.core import codec
from companion.report import claims, scoreboard, walk
from companion.report.compare.verdicts import THRESHOLDS
from companion.report.page import as_html as escape
from companion.report.page import as_text
from companion.report.recorded import hardware

CLAIMS = "claims.html"
"""The page with the long table, to which the marks lead."""


def complete(name: str, text: str, pages: Sequence[Page], profile: str) -> str:
    """A page's text with what the run says in place of its markers and placeholders.

    Raises:
        BookError: one claim is judged in two chapters, or a placeholder that no chapter fills.
    """
    text = marked(text, pages, profile)
    values = {
        f"{page.chapter}.{name}": value for page in pages for name, value in page.values.items()
    }
    return _filled(name, text, values)


def marked(text: str, pages: Sequence[Page], profile: str) -> str:
    """The text with what the run says in place of its markers."""
    for marker, made in MARKERS.items():
        if marker in text:
            text = text.replace(marker, made(pages, profile))
    return text


def _filled(name: str, text: str, values: dict[str, Any]) -> str:
    """Placeholders ``{{chapter.name}}``; a paragraph that asks for a chapter that the book lacks is
    left out, so that a book of some chapters reads, too."""
    known = {key.partition(".")[0] for key in values}
    paragraphs = []
    for paragraph in text.split("\n\n"):
        asked = set(re.findall(r"\{\{\s*(\w+)\.\w+", paragraph))
        if asked <= known:
            paragraphs.append(paragraph)
    return fill("\n\n".join(paragraphs), values, lambda line: f"{name}.md")


def verdicts(pages: Sequence[Page]) -> tuple[list[claims.Verdict], dict[str, str]]:
    """The verdicts of all chapters, and claim id -> chapter."""
    found: list[claims.Verdict] = []
    chapters: dict[str, str] = {}
    for page in pages:
        for entry in page.claims:
            verdict = codec.from_json(claims.Verdict, entry, f"{page.chapter}, claims")
            if verdict.claim.id in chapters:
                raise BookError(
                    f"{page.chapter}: {verdict.claim.id} is judged in another chapter too."
                )
            found.append(verdict)
            chapters[verdict.claim.id] = page.chapter
    return found, chapters


def _board(pages: Sequence[Page], profile: str) -> str:
    """The headline and the scoreboard."""
    found, _ = verdicts(pages)
    if not found:
        return ""
    records = [record for page in pages for record in page.recorded]
    links = {v.claim.id: f"{CLAIMS}#claim-{v.claim.id}" for v in found}
    return f"{claims.headline(found)}\n\n{scoreboard.html(found, records, links)}\n"


def _table(pages: Sequence[Page], profile: str) -> str:
    """The long table, and what is recorded."""
    found, chapters = verdicts(pages)
    if not found:
        return ""
    records = [record for page in pages for record in page.recorded]
    links = {id: f"chapters/{chapter}.html#claim-{id}" for id, chapter in chapters.items()}
    table = claims.table(
        found,
        caption=f"Profile {profile}; what each chapter trained stands above its own table",
        links=links,
        recorded=records,
    )
    lines = "\n".join(
        f"- `{r.profile}`, {as_text(r.title)}: {claims.tally(r.verdicts.values())}" for r in records
    )
    before = (
        f"Recorded before, at other scales:\n\n{lines}"
        if records
        else "Nothing is recorded at a larger scale yet: every verdict is of this run."
    )
    return f"{claims.headline(found)}\n\n{table}\n\n{before}\n"


def _provenance(pages: Sequence[Page], profile: str) -> str:
    """One row a chapter: what computed it, when its records were made, and with which versions."""
    rows = []
    for page in pages:
        if (made := page.provenance) is None:
            continue
        code = made.get("code") or {}
        commit = str(code.get("commit", ""))[:10] + ("*" if code.get("changed") else "")
        data = made.get("dataset") or {}
        cells = (
            str(data.get("name", "") if isinstance(data, dict) else data) or "—",
            commit or "—",
            hardware(made),
            f"Python {made.get('python')}, torch {made.get('packages', {}).get('torch')}",
            "—" if page.seconds is None else f"{page.seconds:.0f}",
        )
        link = f'<a href="chapters/{escape(page.chapter)}.html">Chapter {number(page.chapter)}</a>'
        rows.append((link, [escape(cell) for cell in cells]))
    heads = ("Chapter", "Data", "Commit", "Hardware", "Versions", "Seconds")
    return _html_table(escape(f"Profile {profile}"), heads, rows)


def readme(text: str, pages: Sequence[Page], profile: str) -> str:
    """README's text with its table of what held, from the run.

    Raises:
        BookError: the text lacks the two comments between which the table stands.
    """
    found, _ = verdicts(pages)
    words = [word for word in claims.SIGNS if word in {v.verdict for v in found}]
    rows = [f"| paper | {' | '.join(words)} |", "|---" * (len(words) + 1) + "|"]
    for paper, name in claims.papers().items():
        own = [v.verdict for v in found if v.claim.paper == paper]
        if own:
            counts = " | ".join(str(own.count(word) or "") for word in words)
            rows.append(f"| {name} | {counts} |")
    table = "\n".join(rows)
    parts = re.split(r"(<!-- /?held -->)", text)
    if [parts[i : i + 1] for i in (1, 3)] != [["<!-- held -->"], ["<!-- /held -->"]]:
        raise BookError("README.md lacks <!-- held --> and <!-- /held -->, where its table stands.")
    parts[2] = f"\n\n{claims.headline(found)} (Profile `{profile}`.)\n\n{table}\n\n"
    return "".join(parts)


def _figure(pages: Sequence[Page], chapter: str, name: str) -> Any:
    """The data of a figure; None if the book lacks it."""
    for page in pages:
        if page.chapter == chapter:
            return next((f["data"] for f in page.figures if f["name"] == name), None)
    return None


def _walk(pages: Sequence[Page], profile: str) -> str:
    """Chapter 1's planes and lines, a case for each fork step."""
    planes = _figure(pages, "01_instability", "plane")
    if not planes:
        return ""
    cases = [walk.Case(k, one, 1, 2, one["line"]) for k, one in planes.items()]
    return walk.html(cases, name="forks", switch="Copies part at step", names=("W₀", "A", "B"))


def _matching(pages: Sequence[Page], profile: str) -> str:
    """Chapter 2's plane: B as it is, and after matching."""
    plane = _figure(pages, "02_git_rebasin", "rebasin-plane")
    if not plane:
        return ""
    cases = [
        walk.Case("B as it is", plane, 0, 1, plane["line"]),
        walk.Case("B's units in A's order", plane, 0, 2, plane["line matched"]),
    ]
    return walk.html(
        cases, name="matching", switch="put B's units in A's order", names=("A", "B", "π(B)")
    )


def _thresholds(pages: Sequence[Page], profile: str) -> str:
    """What a report's verdicts are held to, from the one place that has the numbers."""
    heads = ("What", "Yes means", "Why this number", "Chapter")
    here = {page.chapter for page in pages}
    rows = []
    for name, one in THRESHOLDS.items():
        chapter = f"Chapter {number(one.chapter)}"
        link = f'<a href="chapters/{escape(one.chapter)}.html">{chapter}</a>'
        cells = [escape(one.rule), escape(one.reason), link if one.chapter in here else chapter]
        rows.append((escape(name), cells))
    return _html_table("The rules of a report", heads, rows)


def _html_table(title: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table whose cells are HTML already; of a row the first is its header."""
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, cells in rows
    )
    return (
        f'<div class="companion-scroll" tabindex="0" role="region" aria-label="{title}">'
        f'<table class="companion-table"><caption>{title}</caption><thead><tr>'
        + "".join(f'<th scope="col">{head}</th>' for head in heads)
        + f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


MARKERS: dict[str, Callable[[Sequence[Page], str], str]] = {
    "<!-- scoreboard -->": _board,
    "<!-- claims -->": _table,
    "<!-- provenance -->": _provenance,
    "<!-- walk -->": _walk,
    "<!-- matching -->": _matching,
    "<!-- thresholds -->": _thresholds,
}
