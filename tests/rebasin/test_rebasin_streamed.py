"""Matching networks that stay in their files: the same permutations, from tensors read anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from companion.core.fitting import Lazy
from companion.core.reading import read_weights
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.rebasin import derive, weight_matching, weights


@pytest.mark.parametrize("large", [1 << 24, 40])
def test_the_same_permutations_and_in_pieces(tmp_path, monkeypatch, large):
    from safetensors.torch import save_file

    ends = []
    for name in "ab":
        with Key("streamed", name).seeded():
            module = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 3))
        ends.append(snapshot(module))
        save_file(ends[-1], tmp_path / f"{name}.safetensors")
    spec = derive(module, torch.randn(2, 9))
    inside = weight_matching(spec, *ends)
    monkeypatch.setattr(weights, "LARGE", large)
    a, b = (read_weights(str(tmp_path / f"{n}.safetensors")).tensors for n in "ab")
    assert isinstance(a, Lazy)
    found = weight_matching(spec, a, b)
    assert all(torch.equal(found.perms[n], p) for n, p in inside.perms.items())
    assert found.objective == pytest.approx(inside.objective, rel=1e-12)
    moved = found.apply(module, b)
    assert isinstance(moved, Lazy)
    assert all(torch.equal(moved[n], v) for n, v in inside.apply(module, ends[1]).items())
