"""Noise inside and outside the training space: exact geometry, and snapshots that are copies."""

from __future__ import annotations

import itertools

import pytest
import torch

from companion import data
from companion.connectivity import Walker
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import distance, layout
from companion.experiments import subspaces
from companion.training import Recipe, Run, build

RECIPE = Recipe(net="mlp:widths=8", data="digits", steps=20, batch=32, lr=0.1)


def test_span_counts_dimensions_and_is_orthonormal() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, dtype=torch.float64, generator=g)
    basis = subspaces.span([a, 1e-6 * b, a + b, 0 * a])
    assert basis.shape == (2, 30)
    torch.testing.assert_close(basis @ basis.T, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(subspaces.project(a[None], basis)[0], a)
    with pytest.raises(BadParameter, match="not zero"):
        subspaces.span([0 * a])


def test_noise_has_the_length_asked_for_and_stays_where_it_belongs() -> None:
    g = torch.Generator().manual_seed(1)
    basis = subspaces.span(list(torch.randn(3, 20, dtype=torch.float64, generator=g)))
    found = subspaces.noise(basis, 5, 2.5, Key("test"))
    inside, outside = found
    assert len(basis) == 3
    for rows in found:
        torch.testing.assert_close(rows.norm(dim=1), torch.full((5,), 2.5, dtype=torch.float64))
    torch.testing.assert_close(subspaces.project(inside, basis), inside)
    assert float(subspaces.project(outside, basis).abs().max()) < 1e-12
    again = subspaces.noise(basis, 5, 2.5, Key("test"))
    assert torch.equal(inside, again[0])
    with pytest.raises(BadParameter, match="nothing is outside"):
        subspaces.noise(torch.eye(4, dtype=torch.float64), 1, 1.0, Key("test"))


def test_snapshots_are_copies_of_the_states_along_the_run() -> None:
    """The released notebooks kept views: all their snapshots were the last step."""
    digits = data.load("digits")
    run = Run(RECIPE)
    found = subspaces.snapshots(run, digits, 4)
    assert len(found) == 5
    names = layout(build(run, digits, torch.device("cpu"))).parameters
    steps = [distance(a, b, names) for a, b in itertools.pairwise(found)]
    assert min(steps) > 0
    basis = subspaces.span([subspaces.difference(s, found[0], names) for s in found[1:]])
    assert len(basis) == 4
    with pytest.raises(BadParameter, match="21 of a run with 20"):
        subspaces.snapshots(run, digits, 21)


def test_rises_are_losses_after_minus_before() -> None:
    digits = data.load("digits")
    run = Run(RECIPE)
    module = build(run, digits, torch.device("cpu"))
    start, end = (subspaces.snapshots(run, digits, 1)[i] for i in (0, 1))
    names = layout(module).parameters
    walker = Walker(module, {"test": digits.test})
    towards = subspaces.difference(end, start, names)
    (rise,) = subspaces.rises(walker, start, towards[None], names)["test"]
    assert rise == pytest.approx(walker.at(end)["test"].loss - walker.at(start)["test"].loss)
    with pytest.raises(BadParameter, match="direction has"):
        subspaces.shifted(start, towards[:-1], names)
