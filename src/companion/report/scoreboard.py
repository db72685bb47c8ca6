"""What held, at a glance: a row a paper, a mark a claim; a mark leads to its row of all claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from companion.report.claims import NOT_TESTABLE, SIGNS, Recorded, Verdict
from companion.report.claims_file import KINDS, papers
from companion.report.page import as_html as escape

#: Kind of a claim -> the word under which its marks stand.
_KINDS = {"empirical": "from experiments", "theorem": "theorems", "ours": "our own questions"}


def html(
    verdicts: Sequence[Verdict], recorded: Sequence[Recorded], links: Mapping[str, str]
) -> str:
    """The board.

    Arguments:
        verdicts: of this run, in the order of the claims.
        recorded: records of any chapters; each name is a line below the marks of this run, with
            the claims that it could test.
        links: claim id -> address of its row.
    """
    names = papers()
    rows = []
    for paper in dict.fromkeys(v.claim.paper for v in verdicts):
        own = [v for v in verdicts if v.claim.paper == paper]
        lines = {"this run": own, **_recorded(own, recorded)}
        cells = "".join(
            f'<div class="board-line"><span class="board-scale">{escape(name)}</span>'
            f'<span class="board-marks">{_groups(found, links, name)}</span></div>'
            for name, found in lines.items()
        )
        rows.append(f'<tr><th scope="row">{escape(names[paper])}</th><td>{cells}</td></tr>')
    label = "One row a paper, one mark a claim"
    below = " Below this run: what was recorded on other data and machines." if recorded else ""
    return (
        f'<div class="companion-scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="companion-board"><caption>{label}; every mark leads to its claim.{below}'
        "</caption>"
        '<thead><tr><th scope="col">Paper</th><th scope="col">Claims</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{_key()}"
    )


def _recorded(
    verdicts: Sequence[Verdict], recorded: Sequence[Recorded]
) -> dict[str, list[Verdict]]:
    """Name of a record -> what it says of these claims; records of one name share a line."""
    found: dict[str, list[Verdict]] = {}
    for record in recorded:
        own = [record.verdicts[v.claim.id] for v in verdicts if v.claim.id in record.verdicts]
        if tested := [v for v in own if v.verdict != NOT_TESTABLE]:
            found.setdefault(record.name, []).extend(tested)
    return found


def _groups(verdicts: Sequence[Verdict], links: Mapping[str, str], where: str) -> str:
    """The marks of one line, kind by kind."""
    parts = []
    for kind in KINDS:
        marks = [_mark(v, links, where) for v in verdicts if v.claim.kind == kind]
        if marks:
            parts.append(
                f'<span class="board-kind kind-{kind}" role="group" '
                f'aria-label="{_KINDS[kind]}">{"".join(marks)}</span>'
            )
    return "".join(parts)


def _mark(verdict: Verdict, links: Mapping[str, str], where: str) -> str:
    claim = verdict.claim
    says = escape(f"{claim.id}, {verdict.verdict}: {claim.text}" + f" ({where})")
    kind = "verdict-" + verdict.verdict.replace(" ", "-")
    return (
        f'<a class="verdict-mark {kind}" href="{escape(links[claim.id])}" title="{says}" '
        f'aria-label="{says}">{SIGNS[verdict.verdict]}</a>'
    )


def _key() -> str:
    signs = ", ".join(f"{sign} {word}" for word, sign in SIGNS.items())
    kinds = "Without a frame: drawn from experiments; square: a theorem, a construction or a count"
    return (
        f'<p class="claims-key">{escape(signs)}. {kinds}; round: a question or a control of our '
        "own.</p>"
    )
