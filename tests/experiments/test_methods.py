"""The matching methods: what the store calls them."""

from __future__ import annotations

import pytest

from companion.experiments.matchers import Method

CHANGED = {
    "starts": 3,
    "statistic": "correlation",
    "examples": 50,
    "steps": 7,
    "batch": 32,
    "lr": 0.1,
    "label": "other",
}
STARTS = ({"starts": 1, "label": 0}, {"starts": 3, "label": "other"})
NOTHING: tuple[dict[str, object], dict[str, object]] = ({}, {})
IDENTITIES = {
    "naive": NOTHING,
    "weights": STARTS,
    "activations": (
        {"statistic": "moment", "examples": None},
        {"statistic": "correlation", "examples": 50},
    ),
    "ste": (
        {"steps": 200, "batch": 256, "lr": 0.01, "label": 0},
        {"steps": 7, "batch": 32, "lr": 0.1, "label": "other"},
    ),
    "greedy": NOTHING,
    "random": ({"label": 0}, {"label": "other"}),
    "steepest": ({"examples": None, "label": 0}, {"examples": 50, "label": "other"}),
    "units": STARTS,
    "folded": NOTHING,
    "rotated": NOTHING,
    "rotated-heads": NOTHING,
    "rotated-activations": ({"examples": None}, {"examples": 50}),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_the_store_knows_a_method_by_what_it_always_did(name: str) -> None:
    """Entries that exist were stored under these: one that changes loses what is measured."""
    default, changed = IDENTITIES[name]
    assert Method(name).identity() == {"name": name} | default
    assert Method(name, **CHANGED).identity() == {"name": name} | changed  # type: ignore[arg-type]
