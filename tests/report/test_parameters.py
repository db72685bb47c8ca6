"""A chapter's parameters under plain papermill: names and types."""

from __future__ import annotations

import math
from typing import Any

import pytest

from companion.core.errors import BadParameter
from companion.report import parameters


def notebook(**injected: Any) -> dict[str, Any]:
    """What `globals()` is in a notebook after its parameters cell, and papermill's."""
    cells = [
        "",
        "steps: int | None = None\nlr: float = 0.1\nks: list[int] | None = None\nname: str = 'x'",
        "%matplotlib inline",
    ]
    namespace: dict[str, Any] = {}
    exec(compile(cells[1], "cell", "exec", dont_inherit=True), namespace)
    return {
        **namespace,
        "In": cells,
        "Out": {},
        "math": math,
        "_private": 1,
        "quit": exit,
        **injected,
    }


def test_good_values_come_back_with_their_types() -> None:
    values = parameters.check(notebook(steps=5, lr=1, ks=[0, 2]))
    assert values == {"steps": 5, "lr": 1.0, "ks": [0, 2], "name": "x"}
    assert isinstance(values["lr"], float)


@pytest.mark.parametrize(
    ("injected", "words"),
    [
        ({"stps": 5}, ["'stps'", "Did you mean 'steps'"]),
        ({"steps": "many"}, ["steps", "'many'", "int"]),
        ({"steps": 2.5}, ["steps", "float", "int"]),
        ({"steps": True}, ["steps", "bool"]),
        ({"lr": "1e-3"}, ["lr", "0.001"]),
        ({"lr": None}, ["lr", "NoneType"]),
        ({"ks": 3}, ["ks", "-y"]),
        ({"ks": [0, "x"]}, ["ks"]),
        ({"name": 3}, ["name", "str"]),
    ],
)
def test_bad_values_are_refused(injected: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(BadParameter) as caught:
        parameters.check(notebook(**injected))
    for word in words:
        assert word in str(caught.value)


def test_the_values_are_there_in_any_cell() -> None:
    later = notebook(lr=1, study=object(), found=[1, 2])  # names that check would refuse
    assert parameters.values(later) == {"steps": None, "lr": 1.0, "ks": None, "name": "x"}
    with pytest.raises(BadParameter, match="steps"):
        parameters.values(notebook(steps="many"))


def test_changed_lists_what_differs_from_the_parameters_cell() -> None:
    assert parameters.changed(notebook()) == {}
    assert parameters.changed(notebook(lr=0.2, ks=[1])) == {"lr": 0.2, "ks": [1]}


def test_without_the_source_every_value_counts_as_changed() -> None:
    assert set(parameters.changed({**notebook(), "In": []})) == {"steps", "lr", "ks", "name"}
