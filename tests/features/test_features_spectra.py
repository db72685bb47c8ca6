"""Singular values of weights and features: against whole matrices, planted ranks and angles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reread import reread
from torch import Tensor, nn
from toypairs import DIGITS, Examples

from companion import models
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.features.spectra import Spectrum, feature_spectra, principal_angles, weight_spectra

TEST = DIGITS.test.head(60)


def built(spec: str, label: int = 0) -> nn.Module:
    module = models.build(spec, DIGITS.in_shape, 10, Key("test", "spectra", label)).train()
    module(DIGITS.train.head(50).x)
    return module.eval()


def test_weights_are_matrices_of_outputs_against_the_rest() -> None:
    module = built("resnet8:width=4")
    theta = snapshot(module)
    found = {x.name: x for x in weight_spectra(module, theta)}
    assert set(found) == {n for n, p in module.named_parameters() if p.ndim > 1}
    for name, x in found.items():
        matrix = theta[name].double().flatten(1).numpy()
        assert (x.rows, x.columns) == matrix.shape
        wanted = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(x.values, wanted, rtol=1e-10, atol=1e-13)
    some = weight_spectra(module, theta, names=["stage2", "head"])
    assert [x.name for x in some] == [n for n in found if n.startswith(("stage2", "head"))]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("spec", ["mlp:widths=80x5", "resnet8:width=4,norm=batch"])
def test_features_give_what_the_whole_matrix_gives(spec: str, centred: bool) -> None:
    module = built(spec)
    found = feature_spectra(module, snapshot(module), TEST, centred=centred, batch=13)
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(m: nn.Module, args: Any, out: Tensor) -> None:
            seen[name] = out.clone()

        return hook

    hooks = [m.register_forward_hook(note(n)) for n, m in module.named_modules() if n]
    with torch.no_grad():
        module(TEST.x)
    for h in hooks:
        h.remove()
    assert found[-1].name == "head" and len(found) > 4
    for x in found:
        out = seen[x.name].double()
        matrix = out.movedim(1, -1).reshape(-1, out.shape[1])
        if centred:
            matrix = matrix - matrix.mean(0)
        wanted = np.linalg.svd(matrix.numpy(), compute_uv=False)
        assert (x.rows, x.columns) == tuple(matrix.shape), x.name
        assert len(x.values) == min(matrix.shape), "80 units and 60 samples: 60 values"
        # A second moment knows values down to 1e-8 of the largest; single precision is the rest.
        np.testing.assert_allclose(x.values, wanted, rtol=1e-5, atol=1e-5 * wanted[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 10**6), st.booleans())
def test_a_planted_rank_is_found(rank: int, batch: int, seed: int, centred: bool) -> None:
    """Features of rank r in 12 channels, on a mean far from zero."""
    draw = Key("test", seed).generator()
    x = torch.randn(40, 12, generator=draw, dtype=torch.float64)
    low = torch.randn(12, rank, generator=draw, dtype=torch.float64)
    low = low @ torch.randn(rank, 12, generator=draw, dtype=torch.float64)
    module = nn.Sequential(nn.Linear(12, 12)).double()
    theta = {"0.weight": low, "0.bias": 100 * torch.ones(12, dtype=torch.float64)}
    split = Examples(x, torch.zeros(40, dtype=torch.int64))
    (found,) = feature_spectra(module, theta, split, centred=centred, batch=batch)
    wanted = rank if centred else rank + 1  # the mean is a direction of its own
    assert found.profile[wanted - 1] > 1e-6
    assert max(found.profile[wanted:], default=0) < 1e-6
    (weight,) = weight_spectra(module, theta)
    assert max(weight.profile[rank:], default=0) < 1e-12


def test_token_sequences_have_their_channels_last() -> None:
    module = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7))
    draw = Key("test", "tokens").generator()
    split = Examples(*(torch.randint(7, (20, 4), generator=draw) for _ in range(2)))
    found = feature_spectra(module, snapshot(module), split)
    assert [(x.rows, x.columns) for x in found] == [(80, 6), (80, 6), (80, 7)]
    other = feature_spectra(module, snapshot(module), split, channels=1)
    assert [(x.rows, x.columns) for x in other] == [(120, 4), (120, 4), (140, 4)]
    conv = nn.Sequential(nn.Conv1d(3, 5, 2), nn.BatchNorm1d(5))
    (one, two) = feature_spectra(
        conv, snapshot(conv), Examples(torch.randn(9, 3, 8, generator=draw), torch.zeros(9))
    )
    assert (one.rows, one.columns) == (two.rows, two.columns) == (63, 5)


def spectrum(*values: float) -> Spectrum:
    return Spectrum("x", "weight", len(values), len(values), values)


def test_ranks_of_known_profiles() -> None:
    equal = spectrum(2, 2, 2, 0, 0)
    assert equal.effective_rank == pytest.approx(3)
    assert equal.stable_rank == pytest.approx(3)
    assert (equal.leading(0.3), equal.leading(0.6), equal.leading(1.0)) == (1, 2, 3)
    assert equal.profile == (1, 1, 1, 0, 0)
    one = spectrum(7, 0)
    assert one.effective_rank == one.stable_rank == one.leading() == 1
    none = spectrum(0, 0)
    assert math.isnan(none.effective_rank) and math.isnan(none.stable_rank)
    assert none.leading() == 0 and none.profile == (0, 0)
    with pytest.raises(BadParameter, match="share: 0"):
        one.leading(0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9), st.floats(1e-3, 1e3))
def test_ranks_are_ordered_and_blind_to_scale(values: list[float], scale: float) -> None:
    x = spectrum(*sorted(values, reverse=True))
    bound = len(values) * (1 + 1e-9)
    assert 1 - 1e-9 <= x.stable_rank <= x.effective_rank * (1 + 1e-9)
    assert x.effective_rank <= bound
    y = spectrum(*(scale * v for v in x.values))
    assert y.effective_rank == pytest.approx(x.effective_rank)
    assert y.stable_rank == pytest.approx(x.stable_rank)
    assert 1 <= x.leading(0.5) <= x.leading(0.9) <= len(values)
    assert reread(x) == x


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 30.0, 90.0])
def test_planted_angles(degrees: float) -> None:
    """One leading direction of the inputs is turned; those of the outputs are not."""
    module = nn.Linear(6, 5, bias=False).double()
    strong = torch.diag(torch.tensor([9.0, 8.0, 1.0, 0.5, 0.1], dtype=torch.float64))
    strong = torch.cat([strong, torch.zeros(5, 1, dtype=torch.float64)], 1)
    angle = math.radians(degrees)
    turn = torch.eye(6, dtype=torch.float64)
    turn[1, 1] = turn[5, 5] = math.cos(angle)
    turn[1, 5], turn[5, 1] = math.sin(angle), -math.sin(angle)
    (found,) = principal_angles(module, {"weight": strong}, {"weight": strong @ turn}, k=2)
    assert found.k == 2 and found.name == "weight"
    assert found.left == pytest.approx((0, 0), abs=1e-9)
    assert found.right == pytest.approx((0, degrees), rel=1e-6, abs=1e-9)
    assert reread(found) == found


def test_angles_of_a_whole_space_and_messages() -> None:
    module = built("mlp:widths=8")
    a, b = snapshot(module), snapshot(built("mlp:widths=8", 1))
    found = principal_angles(module, a, b, k=50)
    assert [x.k for x in found] == [8, 8]
    assert found[0].left == pytest.approx([0] * 8, abs=1e-4), "all of the outputs' space"
    assert found[0].right[-1] > 10
    same = principal_angles(module, a, a, k=3)
    assert max(max(x.left + x.right) for x in same) < 1e-5
    with pytest.raises(BadParameter, match="k: 0"):
        principal_angles(module, a, b, k=0)
    with pytest.raises(BadParameter, match="network B"):
        principal_angles(module, a, {**b, "head.bias": b["head.bias"] * math.nan})
    with pytest.raises(BadParameter, match="fits no layer"):
        weight_spectra(module, a, names=["nowhere"])
    with pytest.raises(BadParameter, match="no weight"):
        weight_spectra(nn.BatchNorm1d(3), snapshot(nn.BatchNorm1d(3)))
    with pytest.raises(BadParameter, match="no data"):
        feature_spectra(module, a, Examples(TEST.x[:0], TEST.y[:0]))
