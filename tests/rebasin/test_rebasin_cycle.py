"""Triangles of matchings: consistent ones have no defect, and every unit astray is counted."""

from __future__ import annotations

import itertools

import pytest
import torch

from companion.core.errors import BadParameter
from companion.rebasin import Group, Spec, chain, triangle_defect

SPEC = chain(20, 24, 16, 5)
HEADS = Spec({"heads": Group("heads", 6), "units": Group("units", 4, "heads")}, {}, ())


def through_a_frame(spec: Spec, count: int, seed: int) -> dict[tuple[int, int], dict]:
    """Pairwise permutations that all lead through a common order, so they agree."""
    g = torch.Generator().manual_seed(seed)
    into = [spec.random(g) for _ in range(count)]
    return {
        (i, j): spec.compose(into[j], spec.inverse(into[i]))
        for i, j in itertools.combinations(range(count), 2)
    }


@pytest.mark.parametrize("spec", [SPEC, HEADS])
def test_no_defect_by_way_of_a_common_frame(spec: Spec) -> None:
    pairs = through_a_frame(spec, 4, 0)
    assert triangle_defect(spec, pairs) == 0
    turned = {(j, i): spec.inverse(p) for (i, j), p in pairs.items()}
    assert triangle_defect(spec, turned) == 0


def test_two_units_exchanged_in_one_pair() -> None:
    pairs = through_a_frame(SPEC, 3, 1)
    p = pairs[0, 2]["0"].clone()
    p[[3, 5]] = p[[5, 3]]
    pairs[0, 2] = {**pairs[0, 2], "0": p}
    assert triangle_defect(SPEC, pairs) == 2 / 40


def test_units_inside_of_an_exchanged_one_count() -> None:
    pairs = through_a_frame(HEADS, 3, 2)
    heads = pairs[1, 2]["heads"].clone()
    heads[[0, 1]] = heads[[1, 0]]
    pairs[1, 2] = {**pairs[1, 2], "heads": heads}
    assert triangle_defect(HEADS, pairs) == (2 + 2 * 4) / (6 + 24)


def test_three_matched_networks_are_needed() -> None:
    pairs = through_a_frame(SPEC, 3, 3)
    with pytest.raises(BadParameter, match="at least three networks, got 2"):
        triangle_defect(SPEC, {(0, 1): pairs[0, 1]})
    with pytest.raises(BadParameter, match="networks 1 and 2 are not matched"):
        triangle_defect(SPEC, {k: p for k, p in pairs.items() if k != (1, 2)})
