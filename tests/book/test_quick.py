"""What `make book` found on digits, by the values behind its verdicts.

The chapters' recipes are trained there once; nothing is trained here. A verdict may hang on how a
processor rounds; each of these values is far from where it would.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parents[2] / "build" / "quick" / "book" / "extra" / "results.json"


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """Claim -> the number that its verdict rests on."""
    if not RESULTS.exists():
        pytest.skip("the real book is not built: `make book` builds it")
    chapters = json.loads(RESULTS.read_text(encoding="utf-8"))["chapters"]
    return {c["claim"]["id"]: c["value"] for one in chapters.values() for c in one["claims"]}


@pytest.mark.parametrize(
    ("claim", "holds", "what"),
    [
        ("C01", lambda v: v < 2, "points: LeNet-300-100 is stable from the start"),
        ("C02", lambda v: v > 5, "points: the noisy perceptron is not"),
        ("C04", lambda v: v < -0.7, "rank correlation: the later the fork, the lower the barrier"),
        ("C10", lambda v: v == 1, "tickets rewound to the start are stable and matching"),
        ("C12", lambda v: v > 2, "points: a new initialisation under the mask is worse"),
        ("R01", lambda v: v > 30, "points: independent perceptrons have a barrier"),
        ("R02", lambda v: v < 0.1, "nats: weight matching takes it away"),
        ("R10", lambda v: v > 1, "points: from narrow ones not quite"),
        ("A03", lambda v: v > 0.9, "independent networks: no layer's features are connected"),
        ("A11", lambda v: v < 0.05, "after matching they are"),
        ("B01", lambda v: v > 0.1, "nats: the residual network has a barrier"),
        ("B10", lambda v: v < 0.5, "random changes of a layer do less harm"),
        ("B17", lambda v: v < 0.1, "of the whole network, too"),
        ("G02", lambda v: v > 0.1, "nats: a GPT is unstable at the start"),
        ("G03", lambda v: v < 0.03, "nats: and stable before half of training"),
        ("G07", lambda v: v > 0, "nats: rotations lower the barrier of a GPT further"),
        ("L02", lambda v: v < 0.5, "early copies go down on two sides of a ridge"),
        ("L03", lambda v: v > 0.5, "late ones on one mountainside"),
        ("L13", lambda v: v < 1e-9, "the barrier is the weighted curvature"),
    ],
)
def test_the_quick_run_shows(
    values: dict[str, Any], claim: str, holds: Callable[[float], bool], what: str
) -> None:
    assert holds(values[claim]), f"{claim} = {values[claim]}; {what}"
