"""``companion tickets``: the numbers of the library, its files, one message for bad input."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch
from commands import NET, run, said
from safetensors.torch import load_file

from companion.cli import tickets as command
from companion.cli.console import INVALID
from companion.cli.options import numbers
from companion.core.masks import alive, masked
from companion.core.runs import Store
from companion.experiments.pairs import Evaluation
from companion.experiments.tickets import KINDS, Search, find_tickets
from companion.tickets import SCOPES, Pruning
from companion.training import Recipe, load_weights

TINY = ("--net", NET, "--data", "digits", "--steps", "60", "--batch", "60", "--workers", "1")
FEW = ("--points", "3", "--inits", "2", "--train-examples", "100", "--test-examples", "200")
WORDS = ("tickets", *TINY, *FEW, "--rewind", "20", "--skip", "head", "--controls", "random")


@pytest.mark.slow
def test_it_prints_and_writes_the_numbers_of_the_library(tmp_path: Path, store: Store) -> None:
    out, picture, ticket = (tmp_path / f"t.{end}" for end in ("json", "svg", "safetensors"))
    first = said(
        *(*WORDS, "--rounds", 2, "--levels", 2, "--json", out, "--plot", picture, "-o", ticket)
    )
    # Of each init a trunk, levels 0 to 2, a second copy of two of them, and of random pruning two;
    # and the null control.
    assert "17 runs: 0 in the store" in first and "17 to train" in first
    recipe = Recipe(net=NET, data="digits", steps=60, batch=60)
    search = Search(
        recipe=recipe,
        ks=(20,),
        levels=(0, 2),
        kinds=("imp", "random"),
        inits=2,
        pruning=Pruning(skip=("head",)),
    )
    found = find_tickets(search, Evaluation(3, "interpolate", 100, 200), store=store, workers=1)
    rows = json.loads(out.read_text())["levels"]
    assert [(r["kind"], r["level"], r["density"]) for r in rows] == [
        ("imp", 0, 1.0),
        ("imp", 2, pytest.approx(0.64)),
        ("random", 2, pytest.approx(0.64)),
    ]
    for row in rows:
        asked = (row["kind"], row["level"], 20)
        error, noise = found.error(*asked), found.instability(*asked[:2]).interval(20)
        assert error is not None and row["error"]["test"]["value"] == error.value
        assert str(error) in first
        assert (row["barrier"]["test"] is None) == (noise is None)
        assert (row["stable"], row["matching"]) == (found.stable(*asked), found.matching(*asked))
        assert row["stable"] in first
    assert "G1 null control pass" in first and "G4" not in first
    assert "weights left (%)" in picture.read_text()

    # What was written is the network of the store, its mask, and what it was trained from.
    chain = search.chains_at(20)[0]
    trained = load_file(ticket)
    mask, start = (load_file(tmp_path / f"t.{n}.safetensors") for n in ("mask", "rewound"))
    assert all(
        torch.equal(v, trained[n]) for n, v in load_weights(chain.run(2), store=store).items()
    )
    assert set(mask) == {"layer1.linear.weight", "layer2.linear.weight"}
    assert all(not bool(trained[n][~kept].any()) for n, kept in mask.items())
    w_k = load_weights(chain.run(0).fork.parent, 20, store=store)  # type: ignore[union-attr]  # k > 0
    assert all(torch.equal(v, start[n]) for n, v in masked(w_k, mask).items())
    kept = {n: list(counts) for n, counts in alive(mask).items()}
    assert rows[1]["weights"][0] == kept
    # It is a network like any other.
    same = said("barrier", ticket, ticket, "--model", NET, "--data", "digits", code=INVALID)
    assert "G0b distinct FAIL" in same  # it loads; with itself it has no barrier

    more = said(*WORDS, "--rounds", 3, "--levels", "2,3")
    assert "9 to train" in more, "level 3, a copy of it and two controls an init; the null control"
    assert "mask: pruned, 51.2% of the weights left" in said("runs", "list", "--kind", "mask")
    listed = said("runs", "list", "--kind", "run")
    assert "fork k=20, mask " in listed
    assert "nothing to remove" in said("runs", "gc", "--dry-run")


@pytest.mark.slow
def test_a_mask_of_older_code_takes_with_it_what_it_was_made_for(store: Store) -> None:
    said(*WORDS, "--rounds", 2, "--levels", 2, "--controls", "")
    (oldest,) = (
        e
        for e in store.entries()
        if e.identity["kind"] == "mask" and e.identity["density"] == 0.8
        if _ends_of(store, e.key) == {"0/1"}
    )
    identity = json.loads((oldest.path / "identity.json").read_text()) | {"semantics": 0}
    (oldest.path / "identity.json").write_text(json.dumps(identity))
    told = said("runs", "gc", "--dry-run")
    gone = [line.split("/")[-1].split()[0] for line in told.splitlines() if "older" in line]
    kinds = sorted(e.identity["kind"] for e in store.entries() if e.key in gone)
    # The level 1 run, the mask pruned from it, its two copies, and what was measured of them.
    assert kinds.count("mask") == 2 and kinds.count("run") == 3
    assert kinds.count("pair") == 3 and kinds.count("subnetwork") == 1


def _ends_of(store: Store, mask: str) -> set[str]:
    """Order labels of the runs under a mask."""
    runs = (e.identity for e in store.entries() if e.identity["kind"] == "run")
    return {r["order"] for r in runs if r.get("mask") == mask}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--rewind 60", "ks: 60 must be a step from 0 to 59"),
        ("--rewind x", "--rewind: 'x' must be whole numbers"),
        ("--rewind ,", "ks: give at least one"),
        ("--rounds 0", "--rounds: 0 must be 1 or more"),
        ("--levels 10", "--levels: 10 must be rounds from 0 to 9"),
        ("--fraction 1", "fraction: 1.0 must lie between 0 and 1"),
        ("--scope layers", "Did you mean 'layer'"),
        ("--skip heads", "'heads' fits no layer. Layers: layer1"),
        ("--controls randon", "--controls: 'randon' is not known. Did you mean 'random'"),
        ("--tolerance nan", "--tolerance"),
        ("--copies 1", "copies: 1"),
        ("--inits 0", "inits: 0"),
        ("--points 4", "points: 4 must be odd"),
        ("--net mlp:width=3", "Did you mean 'widths'"),
        ("-o ticket.pt", "must end in .safetensors"),
        ("--plot t.gif", "must end in .svg"),
    ],
)
def test_bad_input(words: str, expected: str, store: Store) -> None:
    result = run("tickets", *TINY, *words.split(), code=2)
    assert expected in result.stderr
    assert result.stderr.count("Error: ") == 1
    assert not list(store.entries())


def test_its_help_and_defaults_are_those_of_the_library() -> None:
    text = " ".join(run("tickets", "--help", env={"COLUMNS": "200"}).stdout.split())
    assert "Example: companion tickets" in text
    assert all(word in text for word in (*KINDS[1:], *SCOPES))
    options = inspect.signature(command.prune_network).parameters
    for field in dataclasses.fields(Recipe):
        default = options[field.name].default
        if field.name in ("betas", "milestones"):
            assert tuple(numbers(field.name, default, float)) == field.default
        else:
            none = (dataclasses.MISSING, inspect.Parameter.empty)
            assert default == field.default or (field.default, default) == none
    searched = inspect.signature(Search).parameters
    assert all(options[n].default == searched[n].default for n in ("inits", "copies"))
    pruned = inspect.signature(Pruning).parameters
    assert all(options[n].default == pruned[n].default for n in ("fraction", "scope"))
