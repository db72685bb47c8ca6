"""What a record says under the rules of today."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from companion.core import codec
from companion.report import claims, recorded

CHAPTER = "01_instability"


@pytest.fixture
def kept(tmp_path: Path) -> recorded.Record:
    """A record whose claims were judged when an interval was the range of three samples."""
    source = Path(__file__).resolve().parents[2] / "data/recorded" / CHAPTER / "cpu-mnist.json"
    data = json.loads(source.read_text())
    known = claims.registry()
    old = [
        claims.Verdict(known["C04"], "reproduced", -0.9, (-0.95, -0.85), 3),
        claims.Verdict(known["C08"], "reproduced", 60.0, (31.0, 80.0), 3),
        claims.Verdict(replace(known["C07"], statistic="another one"), "reproduced", 0.5),
    ]
    data["claims"] = codec.to_json(old)
    path = tmp_path / "data/recorded" / CHAPTER / "old.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data))
    (record,) = recorded.load(CHAPTER, tmp_path)
    return record


def test_a_range_of_three_becomes_an_interval(kept: recorded.Record) -> None:
    """31, 69 and 80 points: their range clears 30, Student's t does not."""
    found = kept.verdicts["C08"]
    assert found.clusters == 3
    assert found.interval is not None and found.interval[0] < 30 < found.interval[1]
    assert found.value == 60.0


def test_a_statistic_that_is_another_one_today_was_not_measured(kept: recorded.Record) -> None:
    assert "C07" not in kept.verdicts
