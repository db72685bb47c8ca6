"""Input that no machine can serve, or that is no number: one line, before any work, nothing kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import NET, run

from companion.book import parameters
from companion.book.layout import Book
from companion.core.errors import BadParameter, Busy, within
from companion.core.runs import Store
from companion.papers import gpt, llfc, merging, rebasin

HUGE = "1" + "0" * 20
INSTABILITY = [
    "instability",
    "--net",
    "mlp:widths=4",
    "--data",
    "digits",
    "--steps",
    "3",
    "--ks",
    "0",
    "--points",
    "3",
]
BARRIER = ("barrier", "A", "A", "--model", NET, "--data", "digits")
REBASIN = ("rebasin", "A", "A", "-o", "OUT", "--model", NET)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*INSTABILITY, "--steps", HUGE], "steps: 100,000,000,000,000,000,000 is too large"),
        ([*INSTABILITY, "--batch", HUGE], "batch: 100,000,000,000,000,000,000 is too large"),
        ([*INSTABILITY, "--copies", HUGE], "copies: 100,000,000,000,000,000,000 is too large"),
        ([*INSTABILITY, "--inits", HUGE], "inits: 100,000,000,000,000,000,000 is too large"),
        ([*INSTABILITY, "--inits", "-1"], "inits: -1 must be a whole number of 1 or more"),
        ([*INSTABILITY, "--lr", "0"], "lr: 0 trains nothing"),
        ([*INSTABILITY, "--lr", "nan"], "lr: nan must be finite"),
        ([*INSTABILITY, "--max-error", "nan"], "--max-error: nan must be a number from 0 to 100"),
        ([*INSTABILITY, "--threshold", "nan"], "--threshold: nan must be a number from 0"),
        ([*INSTABILITY, "--threshold", "inf"], "--threshold: inf must be a number from 0"),
        ([*INSTABILITY, "--threshold", "-1"], "--threshold: -1 must be a number from 0"),
        ([*INSTABILITY, "--net", "mlp:widths=9999999x3"], "not enough memory on this machine"),
        ([*INSTABILITY, "--points", "1000000001"], "points: 1,000,000,001 is too large"),
        ([*BARRIER, "--points", "1000000001"], "points: 1,000,000,001 is too large"),
        ([*BARRIER, "--max-error", "inf"], "--max-error: inf must be a number from 0 to 100"),
        ([*BARRIER, "--max-error", "-1"], "--max-error: -1 must be a number from 0 to 100"),
        ([*BARRIER[:3], "--model", "mlp:widths=9999999x3", "--data", "digits"], "enough memory"),
        ([*REBASIN, "--in-shape", "1,8,8", "--classes", HUGE], "--classes: 100,000,000"),
        ([*REBASIN, "--in-shape", "1,8,8", "--classes", "-4"], "--classes: -4 must be a whole"),
        ([*REBASIN, "--in-shape", f"{HUGE},8,8", "--classes", "9"], "--in-shape: 6,400,000,000"),
        ([*REBASIN, "--data", "digits", "--starts", HUGE], "--starts: 100,000,000,000"),
        (["layers", *BARRIER[1:], "--draws", HUGE], "draws: 100,000,000,000"),
        (["layers", *BARRIER[1:], "--window", "0"], "window: 0 must be a whole number of 1"),
        (["features", *BARRIER[1:], "--examples", "0"], "--examples: 0 must be 1 or more"),
    ],
)
def test_one_line_before_any_work(
    words: list[str], said: str, nets: Any, tmp_path: Path, store: Store
) -> None:
    places = {"A": str(nets["a"]), "OUT": str(tmp_path / "out.safetensors")}
    done = run(*(places.get(word, word) for word in words), code=2)
    line = done.output.strip().splitlines()[-1]
    assert line.startswith("Error: ") and said in line
    assert not store.root.exists() and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 101.0])
def test_a_share_in_percent(value: float) -> None:
    with pytest.raises(BadParameter, match="x: .* must be a number from 0 to 100"):
        within("x", value, 0, 100)
    assert within("x", None, 0, 100) is None and within("x", 0.0, 0, 100) == 0.0


@pytest.mark.parametrize(
    "design",
    [
        lambda: rebasin.setting(**SETTING | {"width": 0}),
        lambda: rebasin.setting(**SETTING | {"net": ""}),
        lambda: rebasin.setting(**SETTING | {"train_examples": 0}),
        lambda: rebasin.setting(**SETTING | {"net": "resnet8:width={width}", "steps": 0}),
    ],
)
def test_zero_and_empty_are_no_defaults(design: Any) -> None:
    """``x or default`` took them for "not given"."""
    with pytest.raises(BadParameter):
        design()


SETTING: dict[str, Any] = {
    "dataset": "digits",
    "net": None,
    "width": None,
    "pairs": 1,
    "points": 3,
    "bn": None,
    "train_examples": None,
    "test_examples": None,
    "max_error": None,
    "device": "cpu",
    "workers": 1,
}


def test_no_parameter_is_replaced_for_being_zero() -> None:
    """Of what a chapter's ``design`` takes, nothing is read as ``x or default``."""
    import inspect
    import re

    for module in (gpt, llfc, merging, rebasin):
        for name in ("design", "setting"):
            if made := getattr(module, name, None):
                source = inspect.getsource(made)
                taken = set(inspect.signature(made).parameters)
                found = re.findall(
                    r"\b(\w+) or (?!more|fewer|less)",
                    source.partition('"""')[2].partition('"""')[2],
                )
                assert not taken & set(found) - {"bn"}, f"{module.__name__}.{name}"


def test_values_inside_of_values_are_refused() -> None:
    known = parameters.declared("ks: list[int] = [0, 50]\nn: int | None = None\n", "x")
    for values in ({"ks": [[0, 50], [1]]}, {"ks": {"a": 1}}, {"n": {"a": [1]}}, {"n": [[1]]}):
        with pytest.raises(BadParameter, match="values inside of values"):
            parameters.check(values, known, "-p")
    parameters.check({"ks": [1, 2]}, known, "-p")


def test_two_builds_of_one_book(tmp_path: Path) -> None:
    book = Book(tmp_path)
    with book.building("quick", "01_toy"):
        with pytest.raises(Busy, match=r"01_toy \(quick\) is being worked on by process \d+ on"):
            with book.building("quick", "01_toy"):
                raise AssertionError("two at once")
        with book.building("quick", "02_other"), book.building("gpu", "01_toy"):
            pass  # make -j
    with book.building("quick", "01_toy"):
        pass
    assert list((tmp_path / "build/quick").iterdir()) == []
