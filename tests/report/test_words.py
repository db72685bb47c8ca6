"""Numbers in words."""

from __future__ import annotations

import math

import pytest

from companion.core.stats import Interval
from companion.report import claims, words


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (1.234, "{:.2f}", "1.23"),
        (-1.234, "{:.1f}", "−1.2"),
        (-0.001, "{:.2f}", "0.00"),
        (-0.001, "{:.0%}", "0 %"),
        (0.125, "{:.1%}", "12.5 %"),
        (1e-20, "{:.0e}", "1e−20"),
        (Interval(2.0, 1.0, 3.0, 3, 3), "{:.0f}", "2"),
        (math.nan, "{:.2f}", "no valid value"),
        (-math.inf, "{:.2f}", "−∞"),
        (None, "{:.2f}", "not measured"),
    ],
)
def test_a_number_is_said(value, form, text):
    assert words.said(value, form) == text


def test_several_numbers_in_one_sentence():
    assert (
        words.listed({"naive": 6.2, "matched": None}, "{:.1f}") == "naive 6.2; matched not measured"
    )
    assert words.listed({}, missing="no pair") == "no pair"
    assert [words.counted(n, "pair") for n in (1, 3)] == ["one pair", "3 pairs"]


def test_untested_claims_are_named_with_their_reason():
    first, second = claims.judge("C01", None, note="no norm"), claims.judge("C02", None)
    assert words.untested([first, second]) == "C01 (no norm); C02 (not measured)"
    assert words.untested([claims.judge("C02", 50.0)]) == "nothing"
    values = words.judged([first, claims.judge("C02", 50.0)])
    assert (
        values["c02"] in ("reproduced", "not reproduced") and values["untested"] == "C01 (no norm)"
    )
