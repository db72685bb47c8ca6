"""Theorem 1 on networks built for it: exact where both conditions hold, and not where one fails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reread import reread
from torch import nn
from torch.nn import functional as F
from toypairs import DIGITS, Examples

from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import affine
from companion.features.measure import features
from companion.features.theorem import Built, exact, theorem1

WIDTHS = (20, 64, 48, 10)
FLAT = DIGITS.train.head(200).x.flatten(1)


def test_claim_a8_both_conditions_give_llfc_with_c_one() -> None:
    found = theorem1(exact(WIDTHS), alphas=(0.1, 0.25, 0.5, 0.75, 0.9))
    assert found.conditions < 1e-24
    assert found.gap < 1e-10 and found.c < 1e-10
    assert found.undefined == 0
    # It is not that nothing differs: networks, features of every layer, outputs.
    assert all(r.weights > 0.03 and r.baseline > 0.01 for r in found.layers)
    assert all(r.inputs > 0.03 for r in found.layers[1:])
    assert found.layers[-1].baseline > 0.1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(2, 24), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 60),
    st.sampled_from([0.1, 0.5, 0.9]),
    st.integers(0, 10**6),
)
def test_any_widths_and_any_data(
    hidden: list[int], inputs: int, outputs: int, samples: int, moving: float, seed: int
) -> None:
    key = Key("test", seed)
    built = exact((inputs, *hidden, outputs), samples=samples, moving=moving, key=key)
    assert built.x.shape == (samples, inputs)
    at_a, at_b = built.x, built.x
    for number in range(1, len(hidden) + 1):  # the definitions themselves
        w_a, w_b = (t[f"layer{number}.linear.weight"] for t in (built.a, built.b))
        assert float(((w_a - w_b) @ (at_a - at_b).T).abs().max()) < 1e-12
        at_a = at_a @ w_a.T + built.a[f"layer{number}.linear.bias"]
        at_b = at_b @ w_b.T + built.b[f"layer{number}.linear.bias"]
        assert float((at_a * at_b).min()) > -1e-12, "on in one network, off in the other"
        at_a, at_b = F.relu(at_a), F.relu(at_b)
    a, b = (built.a["head.weight"], built.b["head.weight"])
    assert float(((a - b) @ (at_a - at_b).T).abs().max()) < 1e-12
    middle = affine((built.a, built.b), (0.5, 0.5), tuple(built.a))
    out = [_run(built, t) for t in (built.a, built.b, middle)]
    torch.testing.assert_close(out[2], (out[0] + out[1]) / 2, rtol=1e-10, atol=1e-10)


def _run(built: Built, theta: object) -> torch.Tensor:
    return torch.func.functional_call(built.module, dict(theta), (built.x,))  # type: ignore[call-overload]  # theta is typed as an object


def test_the_instrument_finds_llfc_exact_too() -> None:
    """Features streamed through the package's one pass, against the same networks."""
    for commuting in (True, False):
        built = exact(WIDTHS, commuting=commuting)
        split = Examples(built.x, torch.zeros(len(built.x), dtype=torch.int64))
        found = features(built.module, built.a, built.b, split, alphas=(0.3, 0.5), batch=100)
        plain = theorem1(built, (0.3, 0.5))
        assert [x.name for x in found.layers if x.kind == "linear"] == [
            x.name for x in plain.layers
        ]
        worst = max(max(abs(s.high), s.mean) for x in found.layers for s in x.gap.values())
        if commuting:
            assert worst < 1e-10
            assert all(
                abs(v - 1) < 1e-10
                for x in found.layers
                for s in x.c.values()
                for v in (s.low, s.mean, s.high)
            )
        else:
            assert 1e-5 < worst <= plain.gap
        head = plain.layers[-1].baseline
        assert found.layer("head").baseline.mean == pytest.approx(head)


def test_given_data_of_real_images() -> None:
    built = exact((64, 96, 96, 96, 10), FLAT)
    found = theorem1(built)
    assert found.gap < 1e-10 and found.c < 1e-10
    assert found.samples == len(FLAT)
    assert torch.equal(built.x, FLAT.double())
    other = theorem1(exact((64, 96, 96, 96, 10), FLAT, key=Key("another")))
    assert other.gap < 1e-10 and other.layers != found.layers
    assert theorem1(exact((64, 96, 96, 96, 10), FLAT)) == found


@pytest.mark.parametrize(("additive", "commuting"), [(False, True), (True, False)])
def test_with_one_condition_broken_llfc_fails(additive: bool, commuting: bool) -> None:
    """Controls: one condition alone is not enough, and the check sees which one is missing."""
    found = theorem1(exact(WIDTHS, additive=additive, commuting=commuting))
    assert found.gap > 1e-4 and found.c > 1e-3
    additivity = max(r.additivity for r in found.layers if r.additivity is not None)
    commutativity = max(r.commutativity for r in found.layers)
    if additive:
        assert additivity < 1e-24 and commutativity > 1e-3
        assert found.layers[0].gap < 1e-10, "the first layer commutes in any two networks"
    else:
        assert additivity > 1e-2 and commutativity < 1e-24
        assert found.layers[0].gap > 1e-4


def test_the_check_agrees_with_the_theorem_on_how_much_is_missing() -> None:
    """Where only the head does not commute, what is missing is alpha (1 - alpha) dW dH."""
    built = exact(WIDTHS)
    b = dict(built.b)
    b["head.weight"] = b["head.weight"] + torch.randn(
        b["head.weight"].shape, dtype=torch.float64, generator=Key("test").generator()
    )
    broken = Built(built.module, built.a, b, built.x)
    assert isinstance(built.module, nn.Sequential)
    below = built.module[:-1]
    hidden = [torch.func.functional_call(below, _hidden(t), (built.x,)) for t in (built.a, b)]
    change = (built.a["head.weight"] - b["head.weight"]) @ (hidden[0] - hidden[1]).T
    for alpha in (0.25, 0.5):
        mixed = affine((built.a, b), (1 - alpha, alpha), tuple(b))
        missing = _run(broken, mixed) - (1 - alpha) * _run(broken, built.a)
        missing = missing - alpha * _run(broken, b)
        torch.testing.assert_close(missing, -alpha * (1 - alpha) * change.T)
    found = theorem1(broken)
    assert found.layers[-1].gap > 1e-3 and found.layers[-2].gap < 1e-10


def _hidden(theta: object) -> dict[str, torch.Tensor]:
    return {k: v for k, v in dict(theta).items() if not k.startswith("head")}  # type: ignore[call-overload]  # theta is typed as an object


def test_json_and_messages() -> None:
    found = theorem1(exact((3, 4, 2), samples=5))
    # The first layer's weights may not differ by anything that is no number.
    assert reread(found) == found
    for widths in ((3, 2), (3, 1, 2), (0, 4, 2), (3, 4.0, 2)):
        with pytest.raises(BadParameter, match="widths"):
            exact(widths)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(BadParameter, match=r"moving: 1\.0"):
        exact(WIDTHS, moving=1.0)
    with pytest.raises(BadParameter, match=r"are \(N, 20\)"):
        exact(WIDTHS, torch.zeros(5, 3))
    with pytest.raises(BadParameter, match="NaN"):
        exact(WIDTHS, torch.full((5, 20), torch.nan))
    with pytest.raises(BadParameter, match="alphas"):
        theorem1(exact((3, 4, 2)), alphas=())
