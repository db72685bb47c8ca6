"""Federated learning with partial averaging: splits, averages, and controls with a known answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from companion import data, models
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.core.seeds import Key
from companion.core.theta import layout
from companion.experiments.federated import (
    Federation,
    assign,
    average,
    client_data,
    federate,
    measure_federations,
    networks,
    shares,
    thirds,
)
from companion.training import Recipe, Run, State, advance, build

RECIPE = Recipe(net="mlp:widths=12x2", data="digits", steps=12, batch=16, lr=0.1)
SMALL = Federation(recipe=RECIPE, clients=3, every=4)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("split", ["iid", "dirichlet:0.1", "dirichlet:12", "classes:2"])
def test_every_image_goes_to_one_client(split: str) -> None:
    digits = data.load("digits")
    parts = shares(split, 10, 5, Key("test"))
    np.testing.assert_allclose(parts.sum(1), 1)
    rows = assign(digits.train.y, parts, Key("rows"))
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(len(digits.train)))


def test_the_pathological_split_gives_two_classes_in_train_and_test() -> None:
    digits = data.load("digits")
    own = client_data(Federation(recipe=RECIPE, clients=5, split="classes:2", every=4), digits, 0)
    seen = [set(one.train.y.tolist()) for one in own]
    assert all(len(s) == 2 for s in seen) and set.union(*seen) == set(range(10))
    assert [set(one.test.y.tolist()) for one in own] == seen


def test_test_images_have_the_classes_of_the_training_images() -> None:
    digits = data.load("digits")
    for one in client_data(replace(SMALL, split="dirichlet:0.1"), digits, 1):
        train = torch.bincount(one.train.y, minlength=10) / len(one.train)
        test = torch.bincount(one.test.y, minlength=10) / len(one.test)
        assert float((train - test).abs().max()) < 0.1


def test_a_low_concentration_is_less_even() -> None:
    even, uneven = (
        np.mean([shares(f"dirichlet:{a}", 10, 5, Key("t", s)).max(1).mean() for s in range(5)])
        for a in (12, 0.1)
    )
    assert even < 0.4 < 0.7 < uneven


def test_averaging_touches_the_named_groups_only() -> None:
    module = models.build("mlp:widths=12x2", (1, 8, 8), 10)
    spec = layout(module)
    g = torch.Generator().manual_seed(0)
    thetas = [
        {k: torch.randn(v.shape, generator=g) for k, v in module.state_dict().items()}
        for _ in range(2)
    ]
    found = average(thetas, [3, 1], spec, ["layer1"])
    expected = 0.75 * thetas[0]["layer1.linear.weight"] + 0.25 * thetas[1]["layer1.linear.weight"]
    for mine, before in zip(found, thetas, strict=True):
        torch.testing.assert_close(mine["layer1.linear.weight"], expected)
        assert torch.equal(mine["head.weight"], before["head.weight"])
    assert all(map(equal, average(thetas, [1, 1], spec, ()), thetas))
    everything = average(thetas, [1, 1], spec, None)
    assert equal(everything[0], everything[1])


def test_without_averaging_a_client_trains_alone() -> None:
    digits = data.load("digits")
    alone = replace(SMALL, averaged=())
    found = federate(alone, 0, digits)
    (own, *_) = client_data(alone, digits, 0)
    run = Run(RECIPE, init="federated 0", order="federated 0/0", augment="federated 0/0")
    start = {k: v.clone() for k, v in build(run, digits, torch.device("cpu")).state_dict().items()}
    assert equal(found["thetas"][0], advance(run, State(0, start), 12, own).theta)


def test_full_averaging_ends_in_one_network_and_partial_in_several() -> None:
    digits = data.load("digits")
    full = federate(SMALL, 0, digits)["thetas"]
    assert equal(full[0], full[1]) and equal(full[0], full[2])
    part = federate(replace(SMALL, averaged=("layer1",)), 0, digits)["thetas"]
    assert torch.equal(part[0]["layer1.linear.weight"], part[1]["layer1.linear.weight"])
    assert not torch.equal(part[0]["head.weight"], part[1]["head.weight"])


def test_an_outcome_is_stored_once_and_read_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = measure_federations([(SMALL, 0)], workers=1)
    monkeypatch.setattr("companion.experiments.federated.federate", None)  # nothing trains again
    (again,) = measure_federations([(SMALL, 0)], workers=1)
    assert again == first and len(first.history) == SMALL.rounds == 3
    assert sum(first.sizes) == len(data.load("digits").train)
    assert 0 <= first.accuracy() <= 100
    nets = networks(first)
    assert len(nets) == 3 and equal(nets[0], nets[1])


def test_the_store_tells_federations_apart(store: Store) -> None:
    (a, b, c) = measure_federations(
        [(SMALL, 0), (SMALL, 1), (replace(SMALL, averaged=()), 0)], workers=1
    )
    assert len({a.entry.key, b.entry.key, c.entry.key}) == 3


def test_the_groups_of_the_chapter() -> None:
    labels = list("abcdefgh")
    groups = thirds(labels)
    parts = [groups["shallow"], groups["middle"], groups["deep"]]
    assert [x for part in parts for x in part or ()] == labels
    assert groups["all"] is None and groups["none"] == () and groups["body"] == tuple("abcdefg")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "even"}, "iid, dirichlet:ALPHA"),
        ({"split": "dirichlet:0"}, "above 0"),
        ({"split": "dirichlet:1.2.3"}, "not known"),
        ({"clients": 1}, "clients"),
        ({"every": 5}, "5 local steps do not divide the 12"),
    ],
)
def test_bad_federations_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(BadParameter, match=words):
        replace(SMALL, **change)  # type: ignore[arg-type]  # a field by name


def test_splits_that_cannot_be_made_are_refused() -> None:
    digits = data.load("digits")
    with pytest.raises(BadParameter, match="less than a batch"):
        client_data(replace(SMALL, clients=120), digits, 0)
    with pytest.raises(BadParameter, match="4 to 10 classes"):
        client_data(replace(SMALL, split="classes:2"), digits, 0)
    with pytest.raises(BadParameter, match="fits no layer"):
        federate(replace(SMALL, averaged=("nose",)), 0, digits)
