"""Verdicts, the claims file, and what a table says and does not say."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from reread import reread

from companion.core import closing
from companion.core.errors import BadParameter, MissingData
from companion.core.stats import Interval
from companion.report import claims, claims_file

ROOT = Path(__file__).resolve().parents[2]
CHAPTER_1 = ["C01", "C02", "C03", "C04", "C05", "C06", "C07", "C08", "C17", "C23", "C24", "C27"]
ENTRY = {
    "id": "X1",
    "paper": "somebody2020",
    "chapter": "01_x",
    "text": "It holds.",
    "where": "Fig. 1",
    "reported": "less than 1 point",
    "evidence": "N",
    "statistic": "a barrier",
    "rule": "below 2 points",
    "test": {"op": "<", "value": 2.0},
    "unit": "points",
    "profiles": ["quick"],
}


def write(folder: Path, *entries: dict[str, object], papers: object = None) -> Path:
    path = folder / "claims.yaml"
    names = {"somebody2020": "Somebody 2020"} if papers is None else papers
    path.write_text(yaml.safe_dump({"papers": names, "claims": list(entries)}))
    return path


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """judge() on a claim with another test: ``judged({"op": ">", "value": 1}, 2.0)``."""

    def run(test, *args, **options):
        path = write(tmp_path, {**ENTRY, "test": test})
        monkeypatch.setattr(claims, "registry", lambda: claims_file.registry(path))
        return claims.judge("X1", *args, **options)

    return run


@pytest.mark.parametrize(
    ("test", "value", "interval", "word"),
    [
        ({"op": "<", "value": 2}, 1.9, None, "reproduced"),
        ({"op": "<", "value": 2}, 2.0, None, "not reproduced"),
        ({"op": "<=", "value": 2}, 2.0, None, "reproduced"),
        ({"op": ">", "value": 2}, 2.0, None, "not reproduced"),
        ({"op": ">=", "value": 2}, 2.0, None, "reproduced"),
        ({"op": "<", "value": 2}, 1.0, (0.5, 1.9), "reproduced"),
        ({"op": "<", "value": 2}, 1.0, (0.5, 2.1), "undetermined"),
        ({"op": "<", "value": 2}, 3.0, (1.9, 4.0), "undetermined"),
        ({"op": "<", "value": 2}, 3.0, (2.0, 4.0), "not reproduced"),
        ({"op": ">", "value": 2}, 3.0, (2.1, 4.0), "reproduced"),
        ({"op": "between", "low": 1, "high": 3}, 2.0, None, "reproduced"),
        ({"op": "between", "low": 1, "high": 3}, 3.0, (2.0, 3.0), "reproduced"),
        ({"op": "between", "low": 1, "high": 3}, 0.9, None, "not reproduced"),
        ({"op": "between", "low": 1, "high": 3}, 2.0, (1.5, 3.5), "undetermined"),
        ({"op": "between", "low": 1, "high": 3}, 2.0, (0.0, 9.0), "undetermined"),
        ({"op": "between", "low": 1, "high": 3}, 5.0, (4.0, 9.0), "not reproduced"),
        ({"op": "true"}, True, None, "reproduced"),
        ({"op": "true"}, False, None, "not reproduced"),
        ({"op": "report"}, 0.7, None, "reported"),
        ({"op": "<", "value": 2}, None, None, "not testable at this scale"),
        ({"op": "report"}, None, None, "not testable at this scale"),
        ({"op": "<", "value": 2}, math.nan, None, "undetermined"),
        ({"op": "<", "value": 2}, math.inf, None, "not reproduced"),
    ],
)
def test_every_rule_gives_its_verdict(judged, test, value, interval, word):
    assert judged(test, value, interval=interval).verdict == word


def test_an_interval_brings_its_ends_and_its_n(judged):
    found = judged({"op": "<", "value": 2}, Interval(1.0, 0.5, 2.5, n=9, clusters=3))
    assert (found.verdict, found.value, found.interval, found.n) == (
        "undetermined",
        1.0,
        (0.5, 2.5),
        9,
    )
    assert judged({"op": "<", "value": 2}, Interval(1, 0, 1.5, 9, 3), n=27).n == 27


def test_not_testable_keeps_the_number_but_not_the_word(judged):
    found = judged({"op": "<", "value": 2}, 1.0, testable=False, note="too small")
    assert (found.verdict, found.value) == ("not testable at this scale", 1.0)


def test_a_statistic_outside_its_interval_is_a_mistake(judged):
    with pytest.raises(BadParameter, match="outside its interval"):
        judged({"op": "<", "value": 2}, 3.0, interval=(0.0, 1.0))
    with pytest.raises(BadParameter, match="give the interval once"):
        judged({"op": "<", "value": 2}, Interval(1, 0, 2, 9, 3), interval=(0.0, 1.0))


def lacks(study):
    closing.refuse_work(what="a path")
    return claims.Statistic(study)


def broken(study):
    return claims.Statistic({}[study])


def test_each_claim_of_a_paper_is_judged_from_its_function():
    def c01(study):
        return claims.Statistic(study, interval=(0.5, 1.0), n=9, detail="d", note="n")

    def c02(study):
        return claims.Statistic(study, testable=False)

    first, second = claims.verdicts({"C01": c01, "C02": c02}, 0.75)
    assert first == claims.judge("C01", 0.75, interval=(0.5, 1.0), n=9, detail="d", note="n")
    assert second == claims.judge("C02", 0.75, testable=False)
    with pytest.raises(KeyError):
        claims.verdicts({"C01": c01, "C02": broken}, 0.75)
    with pytest.raises(BadParameter, match="C99"):
        claims.verdicts({"C99": c01}, 0.75)


def test_while_a_recording_is_closed_a_claim_that_lacks_something_is_not_testable():
    def wrong(study):
        raise MissingData("no digits")

    functions = {"C01": lacks, "C02": broken, "C03": claims.Statistic}
    with closing.closed({"device": "cpu"}):
        found = claims.verdicts(functions, 0.75)
        with pytest.raises(MissingData):
            claims.verdicts({"C01": wrong}, 0.75)
    assert [v.verdict for v in found][:2] == [claims.NOT_TESTABLE] * 2
    assert found[0].note == closing.WHY and found[0].value is None
    assert found[1].note == f"{closing.WHY} (KeyError: 0.75)"
    assert found[2].value == 0.75 and found[2].verdict != claims.NOT_TESTABLE


def test_an_unknown_claim_is_named():
    with pytest.raises(BadParameter, match=r"'C99' is not in data/claims.yaml.*C01"):
        claims.judge("C99", 1.0)


def test_the_registry_has_chapter_1_and_papers_of_the_bibliography():
    known = claims.registry()
    assert set(CHAPTER_1) <= set(known)
    keys = set(re.findall(r"@\w+\{(\w+),", (ROOT / "references.bib").read_text(encoding="utf-8")))
    assert set(claims_file.papers()) <= keys
    for claim in known.values():
        assert set(claim.profiles) <= {"quick", "gpu", "paper"}, claim.id  # or none, as yet


def test_the_table_tells_what_was_reported_where_and_found(judged):
    found = judged({"op": "<", "value": 2}, 1.0, interval=(0.5, 1.5), n=9, detail="<b>", note="so")
    html = claims.table([found], caption="a caption", links={"X1": "chapters/01_x.html"})
    text = re.sub(r"<[^>]+>", " ", html)
    for words in (
        "less than 1 point",
        "Fig. 1",
        "1.00 [0.50, 1.50] points",
        "✓",
        "reproduced",
        "so",
    ):
        assert words in text
    assert "&lt;b&gt;" in html
    assert 'href="chapters/01_x.html"' in html
    assert html.count('scope="col"') == 4
    assert "reading notes" in text  # what [N] stands for


@pytest.fixture(autouse=True)
def _names(monkeypatch):
    """The table of these tests knows the paper of ENTRY as well as the real ones."""
    names = {**claims_file.papers(), "somebody2020": "Somebody 2020"}
    monkeypatch.setattr(claims, "papers", lambda: names)


def test_a_rule_that_was_changed_says_so_in_the_table() -> None:
    """The reader of a verdict sees that its rule is not the first one."""
    changed = [c for c in claims.registry().values() if c.changed]
    assert {"R16", "A14", "G09", "C03"} <= {c.id for c in changed}
    html = claims.table([claims.judge("R16", None, testable=False)], caption="x")
    assert "<summary>The rule was changed.</summary>After a first run on digits" in html
    kept = claims.table([claims.judge("C24", None, testable=False)], caption="x")
    assert "The rule was changed" not in kept


def test_a_verdict_of_data_that_the_claim_is_not_about_is_none() -> None:
    measured = claims.judge("C01", 15.0, n=3)
    assert claims.again(measured, "mnist").verdict == "not reproduced"
    colour = claims.again(measured, "cifar10-jpeg")
    assert colour.verdict == claims.NOT_TESTABLE and "about digits, mnist" in colour.note
    assert claims.again(measured).verdict == "not reproduced"


def test_an_unverified_value_is_never_printed(judged):
    found = judged({"op": "<", "value": 2}, 1.0)
    unverified = replace(found, claim=replace(found.claim, evidence="U", reported="91.7 %"))
    html = claims.table([unverified], caption="x")
    assert "91.7" not in html
    assert "Somebody" not in re.sub(r"<[^>]*>", " ", html)
    assert "no value that we could verify" in html


@pytest.mark.parametrize("tag", ["D", "E"])
def test_our_own_numbers_are_not_shown_as_the_papers(judged, tag):
    found = judged({"op": "<", "value": 2}, 1.0)
    html = claims.table([replace(found, claim=replace(found.claim, evidence=tag))], caption="x")
    assert "ours, not the paper" in html
    assert "Somebody" not in re.sub(r"<[^>]*>", " ", html)


def test_verdicts_survive_json(judged):
    for value, interval in ((1.0, (0.5, 1.5)), (math.inf, None), (math.nan, None), (None, None)):
        found = judged({"op": "<", "value": 2}, value, interval=interval)
        back = reread(found)
        assert repr(back) == repr(found)


def test_the_tally_counts_in_a_fixed_order(judged):
    yes = judged({"op": "<", "value": 2}, 1.0)
    no = judged({"op": "<", "value": 2}, 3.0)
    assert claims.tally([no, yes, yes]) == "3 claims: 2 reproduced, 1 not reproduced."


def test_the_headline_counts_kinds_apart_and_says_what_rests_on_few(judged, monkeypatch):
    known = {kind: replace(claims.registry()["C01"], kind=kind) for kind in claims_file.KINDS}
    three = Interval(1.0, 0.5, 1.5, 9, 3)
    found = [
        claims.Verdict(known["empirical"], "reproduced", 1.0, n=9, clusters=three.clusters),
        claims.Verdict(known["empirical"], "not reproduced", 1.0, n=9, clusters=9),
        claims.Verdict(known["empirical"], "undetermined", 1.0, n=9, clusters=2),
        claims.Verdict(known["theorem"], "reproduced", 1.0),
        claims.Verdict(known["ours"], "reported", 1.0),
    ]
    assert claims.headline(found) == (
        "**Claims that the papers draw from experiments (3): 1 reproduced, 1 not reproduced, "
        "1 undetermined.** Theorems, constructions and counts (1): 1 reproduced. "
        "Questions and controls of our own (1): 1 reported. 1 of the 3 verdicts that are decided "
        "rest on three independent samples or fewer; their intervals are as wide as that makes "
        "them."
    )
    assert claims.headline([]) == ""


def test_one_independent_sample_decides_nothing(judged):
    one, two = Interval(1.0, 1.0, 1.0, 5, 1), Interval(1.0, 0.9, 1.1, 5, 2)
    found = judged({"op": "<", "value": 2}, one)
    assert (found.verdict, found.note) == (claims.NOT_TESTABLE, "one sample has no interval")
    assert judged({"op": "<", "value": 2}, two).verdict == "reproduced"
    assert judged({"op": "<", "value": 2}, two).clusters == 2
    assert judged({"op": "report"}, one).verdict == "reported"
    assert judged({"op": "<", "value": 2}, one, note="why").note == "why"


def test_a_verdict_of_another_time_is_judged_by_the_rule_of_today(judged):
    found = judged({"op": "<", "value": 2}, Interval(1.0, 0.5, 1.5, 3, 3))
    assert claims.again(found) == found
    now = claims.again(replace(found, verdict="not reproduced", interval=(0.5, 2.5)))
    assert (now.verdict, now.clusters) == ("undetermined", 3)
    assert claims.again(replace(found, clusters=1)).verdict == claims.NOT_TESTABLE


def test_show_refuses_an_empty_scale_and_a_claim_twice(judged):
    found = judged({"op": "<", "value": 2}, 1.0)
    with pytest.raises(BadParameter, match="scale"):
        claims.show([found], scale=" ")
    with pytest.raises(BadParameter, match="twice"):
        claims.show([found, found], scale="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "unknown field colour"),
        ({"rule": None}, "rule is None, not text"),
        ({"text": "  "}, "text is empty"),
        ({"reported": 2.0}, "reported is 2.0, not text. Put it in quotation marks"),
        ({"reported": ""}, "only a claim tagged U"),
        ({"evidence": "Z"}, "evidence 'Z' is not known. Allowed: P, N"),
        ({"paper": "nobody"}, "paper 'nobody' has no short name"),
        ({"profiles": "quick"}, "profiles is a list"),
        ({"format": "{:.3z}"}, "does not format a number"),
        ({"test": {"op": "below", "value": 2}}, "test needs an op out of <, <="),
        ({"test": {"op": True}}, 'write it in quotation marks: op: "true"'),
        ({"test": {"op": "<"}}, "with op '<' takes value"),
        ({"test": {"op": "report", "value": 2}}, "takes nothing else"),
        ({"test": {"op": "<", "value": "2e-3"}}, "test.value is '2e-3', not a number"),
        ({"test": {"op": "between", "low": 3, "high": 1}}, "low is above test.high"),
    ],
)
def test_a_malformed_claim_says_what_and_where(tmp_path, change, message):
    path = write(tmp_path, ENTRY, {**ENTRY, "id": "X2", **change})
    with pytest.raises(BadParameter, match=re.escape(message)) as caught:
        claims_file.registry(path)
    assert "claims.yaml, entry 2 (X2)" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [("claims: []\npapers: {}\nclaims: []\n", "claims"), ("papers: {a: A, a: B}\n", "a")],
)
def test_a_key_that_stands_twice_is_refused_at_every_depth(tmp_path, text, key):
    """PyYAML keeps the last one and says nothing; one paper stood twice in the file that ships."""
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    with pytest.raises(BadParameter, match=f"the key '{key}' stands twice"):
        claims_file.registry(path)


def test_a_malformed_file_says_so(tmp_path):
    path = write(tmp_path, ENTRY, ENTRY)
    with pytest.raises(BadParameter, match="X1 is used twice"):
        claims_file.registry(path)
    path = write(tmp_path, {k: v for k, v in ENTRY.items() if k != "rule"})
    with pytest.raises(BadParameter, match="missing field rule"):
        claims_file.registry(path)
    path.write_text("papers: [")
    with pytest.raises(BadParameter, match="not valid YAML"):
        claims_file.registry(path)
    path.write_text("claims: []")
    with pytest.raises(BadParameter, match="exactly two keys"):
        claims_file.registry(path)
    with pytest.raises(MissingData, match="no claims file"):
        claims_file.registry(tmp_path / "nothing.yaml")
