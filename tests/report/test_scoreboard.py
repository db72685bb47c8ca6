"""The scoreboard: a mark for each claim, under its paper, its scale and its kind."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from companion.report import claims, scoreboard


@dataclass(frozen=True)
class Recorded:
    name: str
    verdicts: dict[str, claims.Verdict]
    family: str = "gpu"
    short: str = "somewhere"
    extra: list[int] = field(default_factory=list)


def test_every_claim_has_its_mark_which_leads_to_its_row():
    here = [
        claims.judge("C01", 0.3, n=9, interval=(0.1, 0.6)),
        claims.judge("C02", 4.0, n=9, interval=(1.0, 6.0)),  # our own question
        claims.judge("R01", None, note="not run"),
    ]
    record = {"C01": claims.judge("C01", 9.0, n=9, interval=(8.0, 10.0))}
    untold = {"R01": claims.judge("R01", None, note="not run")}
    links = {id: f"claims.html#claim-{id}" for id in ("C01", "C02", "R01")}
    text = scoreboard.html(here, [Recorded("far", record), Recorded("near", untold)], links)
    marks = re.findall(r'<a class="verdict-mark (\S+)" href="(\S+)" title="(.*?)".*?>(.)</a>', text)
    assert [(kind, link) for kind, link, _, _ in marks] == [
        ("verdict-reproduced", "claims.html#claim-C01"),
        ("verdict-undetermined", "claims.html#claim-C02"),
        ("verdict-not-reproduced", "claims.html#claim-C01"),  # as recorded
        ("verdict-not-testable-at-this-scale", "claims.html#claim-R01"),
    ]
    assert [sign for *_, sign in marks] == ["✓", "≈", "✗", "○"]
    assert marks[2][2].endswith("(far)") and marks[0][2].startswith("C01, reproduced: ")
    assert text.count("<tr>") == 3  # the heads, and two papers
    assert ">near<" not in text  # a record that tests nothing has no line
    assert re.search(r'kind-ours"[^>]*><a class="verdict-mark verdict-undetermined', text)
