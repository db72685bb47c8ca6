"""Masks as values: one bit a weight, exact zeros, and refusals that say what is wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.core.errors import BadParameter, CorruptData
from companion.core.masks import alive, density, masked, pack, unpack

shapes = st.lists(st.integers(0, 5), min_size=0, max_size=4)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(min_size=1, max_size=6), shapes, max_size=3), st.integers(0, 99))
def test_a_packed_mask_comes_back_and_takes_a_bit_a_weight(named: object, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    assert isinstance(named, dict)
    mask = {name: torch.rand(shape, generator=draw) < 0.4 for name, shape in named.items()}
    packed = pack(mask)
    again = unpack({**packed, "theta/other": torch.zeros(3)})
    assert list(again) == list(mask)
    assert all(torch.equal(again[n], m) and m.dtype == torch.bool for n, m in mask.items())
    bits = sum(v.numel() for k, v in packed.items() if k.startswith("bits/"))
    assert bits == sum(-(-m.numel() // 8) for m in mask.values())
    total = sum(m.numel() for m in mask.values())
    kept = sum(int(m.sum()) for m in mask.values())
    assert density(mask) == (kept / total if total else 1.0)
    assert {n: a for n, (a, _) in alive(mask).items()} == {n: int(m.sum()) for n, m in mask.items()}


def test_masked_weights_are_plus_zero_and_the_others_keep_every_bit() -> None:
    theta = {"w": torch.tensor([-1.0, -0.0, 3.0, float("inf")]), "b": torch.ones(2)}
    found = masked(theta, {"w": torch.tensor([False, True, True, False])})
    assert found["b"] is theta["b"]
    bits = found["w"].view(torch.int32)
    assert bits.tolist() == torch.tensor([0.0, -0.0, 3.0, 0.0]).view(torch.int32).tolist()
    assert theta["w"].tolist() == [-1.0, -0.0, 3.0, float("inf")]


def test_a_mask_that_does_not_fit_is_refused() -> None:
    theta = {"w": torch.ones(3)}
    with pytest.raises(BadParameter, match=r"w has shape \(2,\), the network shape \(3,\)"):
        masked(theta, {"w": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(BadParameter, match="the network no such tensor"):
        masked(theta, {"v": torch.ones(3, dtype=torch.bool)})


def test_bits_that_were_not_packed_are_corrupt() -> None:
    packed = pack({"w": torch.ones(9, dtype=torch.bool)})
    for wrong in (
        {"bits/w": packed["bits/w"]},
        {**packed, "bits/w": packed["bits/w"][:1]},
        {**packed, "bits/w": packed["bits/w"].float()},
    ):
        with pytest.raises(CorruptData, match="w is not what was packed"):
            unpack(wrong)
