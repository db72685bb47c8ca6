"""The table of families says what is derived today, and nothing is held without a good reason."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import report

ROOT = Path(__file__).resolve().parents[2]
ROWS = json.loads((ROOT / "benchmarks/results/families.json").read_text())["rows"]

REASONS = {
    # Rotary positions: a pair of units has an angle of its own; linear biases: a head has a slope.
    "meets constants that differ along it": "Llama Mistral Mixtral Qwen Gemma Phi Falcon Pythia eva",
    "meets constants that differ along it, made by arange": "BLOOM",
    # What is left of channels that are cut apart and dealt out again: single ones.
    "pieces are stacked": "shufflenet",
}
"""Why theory holds units in place, and in which families."""


@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_held_that_can_move(name: str) -> None:
    row = ROWS[name]
    assert "why" not in row and row["groups"] > 0
    for reason in row["held"]:
        assert any(word in name for word in REASONS[reason].split()), reason


@pytest.mark.parametrize(
    "name",
    [
        "torchvision: resnet18",
        "transformers: Llama, grouped queries",
        "transformers: Pythia (GPT-NeoX)",
        "transformers: Mixtral",
        "transformers: T5",
    ],
)
def test_the_table_is_that_of_today(name: str) -> None:
    fresh = families.row(families.FAMILIES[name])
    assert {k: v for k, v in fresh.items() if k != "seconds"} == {
        k: v for k, v in ROWS[name].items() if k != "seconds"
    }


def test_every_family_has_its_row() -> None:
    assert set(ROWS) == set(families.FAMILIES)
    text = (ROOT / "families.md").read_text()
    assert all(f"| {name} |" in text for name in ROWS)
    assert report.render_families(text, ROOT / "benchmarks/results") == text
