"""What a record says under the rules of today."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from companion.core import codec
from companion.core.stats import from_range
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


def test_the_bars_of_an_old_figure_become_intervals_too(kept: recorded.Record) -> None:
    drawn = kept.data["figures"]["instability"]["data"]
    series = next(s for label, s in drawn.items() if label.startswith("mlp"))
    (_, curves), *_ = recorded.curves([kept], "instability").values()
    bars = curves["six-layer perceptron, test"][0]
    asked = from_range(*(series[name][0] for name in ("mean", "low", "high", "pairs")))
    assert bars == asked and bars.low < series["low"][0] < series["high"][0] < bars.high
    for claim in kept.data["claims"]:
        claim["clusters"] = 3  # as it is written today
    (_, curves), *_ = recorded.curves([kept], "instability").values()
    assert curves["six-layer perceptron, test"][0].low == series["low"][0]
