"""The matching methods: what the store calls them, and what it takes to add one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from companion.cli import rebasin as command
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.experiments.aligned import MatchedLine, align, pairs_of
from companion.experiments.methods import METHOD_KINDS, Method, Problem, offered, register
from companion.experiments.pairs import Evaluation
from companion.rebasin import (
    Matching,
    activation_matching,
    learned_rotation,
    straight_through,
    weight_matching,
)
from companion.training import Recipe

CHANGED: dict[str, Any] = {
    "starts": 3,
    "statistic": "correlation",
    "examples": 50,
    "steps": 7,
    "batch": 32,
    "lr": 0.1,
    "label": "other",
}
STARTS = ({"starts": 1, "label": 0}, {"starts": 3, "label": "other"})
TRAINED: tuple[dict[str, Any], dict[str, Any]] = (
    {"steps": 200, "batch": 256, "lr": 0.01, "label": 0},
    {"steps": 7, "batch": 32, "lr": 0.1, "label": "other"},
)
NOTHING: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
IDENTITIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "naive": NOTHING,
    "weights": STARTS,
    "authors": ({"label": 0}, {"label": "other"}),
    "activations": (
        {"statistic": "moment", "examples": None},
        {"statistic": "correlation", "examples": 50},
    ),
    "ste": TRAINED,
    "greedy": NOTHING,
    "random": ({"label": 0}, {"label": "other"}),
    "steepest": ({"examples": None, "label": 0}, {"examples": 50, "label": "other"}),
    "units": STARTS,
    "folded": NOTHING,
    "rotated": NOTHING,
    "rotated-heads": NOTHING,
    "rotated-activations": ({"examples": None}, {"examples": 50}),
    "learned": TRAINED,
    "learned-both": TRAINED,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_the_store_knows_a_method_by_what_it_always_did(name: str) -> None:
    """Entries that exist were stored under these: one that changes loses what is measured."""
    default, changed = IDENTITIES[name]
    assert Method(name).identity() == {"name": name} | default
    assert Method(name, **CHANGED).identity() == {"name": name} | changed


def test_every_method_is_among_them() -> None:
    assert list(METHOD_KINDS) == list(IDENTITIES)


def test_a_default_has_one_value() -> None:
    """Of a method, of the instrument behind it, and of the command line."""
    for instrument, names in (
        (weight_matching, ("starts",)),
        (activation_matching, ("statistic",)),
        (straight_through, ("steps", "lr")),
        (learned_rotation, ("steps", "batch", "lr")),
    ):
        for name in names:
            default = inspect.signature(instrument).parameters[name].default
            assert default == getattr(Method(), name), (instrument, name)
    text = inspect.getsource(command)
    assert "DEFAULT.starts" in text and "DEFAULT.steps" in text


def shown() -> str:
    """The help of ``companion rebasin``, of the methods that there are now."""
    app = typer.Typer()
    app.command()(importlib.reload(command).align_networks)
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    return " ".join(result.stdout.replace("│", " ").split())


@pytest.fixture
def toy() -> Iterator[str]:
    """One more method, as one function."""
    known = dict(METHOD_KINDS)

    @register("backwards", "label", about="the last unit first")
    def _backwards(method: Method, problem: Problem) -> Matching:
        perms = {n: p.flip(0) for n, p in problem.spec.identity().items()}
        return Matching(problem.spec, perms, "backwards", 0.0, 0.0, 1.0, passes=1)

    yield "backwards"
    METHOD_KINDS.clear()
    METHOD_KINDS.update(known)
    importlib.reload(command)


def test_a_method_is_one_function(toy: str, store: Store) -> None:
    """The command line offers and explains it, ``align`` carries it out, the store keys it."""
    assert toy in offered() and toy in offered("label") and toy not in offered("starts")
    assert "greedy (one pass from the input on), backwards (the last unit first). For" in shown()
    recipe = Recipe(net="mlp:widths=16x2", data="digits", steps=20, batch=64, lr=0.1)
    few = Evaluation(points=3, train_examples=100, test_examples=50)
    pairs, ways = pairs_of(recipe, 1), [Method("naive"), Method(toy, label=5)]
    found = align(pairs, ways, few, max_error=100.0, store=store, workers=1)
    (result,), (naive,) = found[toy], found["naive"]
    assert result.matching["method"] == toy and result.matching["moved"] == 1
    assert result.distances["after"] != naive.distances["after"]
    stored = {e.identity["method"]["name"]: e for e in store.entries() if "method" in e.identity}
    assert stored[toy].identity["method"] == {"name": toy, "label": 5}
    task = MatchedLine(pairs[0], ways[1], few)
    assert task.entry(store, "cpu").key == stored[toy].key
    other = replace(task, method=Method(toy, label=6))
    assert other.entry(store, "cpu").key != stored[toy].key


def test_a_name_and_an_option_are_registered_once() -> None:
    with pytest.raises(BadParameter, match="there already"):
        register("weights")
    with pytest.raises(BadParameter, match="no option"):
        register("new", "strats")
    assert "new" not in METHOD_KINDS
