"""REPAIR: planted statistics, exact fusing, both forms, BatchNorm, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from companion import data, models
from companion.connectivity import Walker
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import layout, snapshot, with_aliases
from companion.data import Split
from companion.models import ChannelLayerNorm
from companion.rebasin.repair import (
    Comoments,
    Copy,
    Moments,
    Repaired,
    averaged,
    correction,
    even_batches,
    fuse,
    repair,
    repair_many,
    reset_batchnorm,
)
from companion.training import Recipe, Run, State, advance, build

DIGITS = data.load("digits")
X = DIGITS.train.head(400).x

Theta = dict[str, Tensor]


def seeded(*label: int | str) -> torch.Generator:
    return Key("test", "repair", *label).generator()


def theta(module: nn.Module, *label: int | str) -> Theta:
    """A point of the module's weight space with everything moved, norms and buffers included."""
    g = seeded(*label)
    out = {}
    for name, v in module.state_dict().items():
        if not v.is_floating_point():
            out[name] = v.clone()
        elif "var" in name:
            out[name] = 0.5 + torch.rand(v.shape, generator=g)
        else:
            # Nothing of the module's own init, which is another in every process.
            noise = torch.randn(v.shape, generator=g, dtype=v.dtype)
            if v.ndim > 1:
                out[name] = noise * (2 / v[0].numel()) ** 0.5
            else:
                out[name] = 0.3 * noise + (1 if name.endswith("weight") else 0)
    return out


def net(spec: str) -> nn.Module:
    return models.build(spec, DIGITS.in_shape, DIGITS.classes, Key("test", "repair", spec))


def conv(
    norm: Callable[[int], nn.Module] = lambda c: nn.Identity(), bias: bool = True
) -> nn.Module:
    """Two convolutions and a head on 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=bias), norm(12), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1, bias=bias), norm(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def outputs(module: nn.Module, point: Mapping[str, Tensor], x: Tensor) -> Tensor:
    module = copy.deepcopy(module).eval()
    module.load_state_dict(point)
    with torch.no_grad():
        return module(x)


def features(module: nn.Module, point: Mapping[str, Tensor], x: Tensor, layer: str) -> Tensor:
    """Outputs of a layer, (channels, values) float64, read in the plainest way."""
    module = copy.deepcopy(module).eval()
    module.load_state_dict(point)
    seen: list[Tensor] = []
    at = module.get_submodule(layer)
    at.register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    with torch.no_grad():
        module(x)
    dim = -1 if isinstance(at, nn.Linear) or type(at) is nn.LayerNorm else 1
    return seen[0].movedim(dim, 0).flatten(1).double()


def std(x: Tensor) -> Tensor:
    return x.std(1, correction=0)


# ---- statistics


def test_moments_join_batches_of_any_size_and_keep_their_digits() -> None:
    x = 1e4 + torch.randn(3, 1000, generator=seeded("m"), dtype=torch.float64)
    y = 0.5 * x + torch.randn(3, 1000, generator=seeded("n"), dtype=torch.float64)
    m, c = Moments(), Comoments()
    for a, b in zip(x.split([1, 700, 299], 1), y.split([1, 700, 299], 1), strict=True):
        alone = m.add(a)
        c.add(a, b)
        torch.testing.assert_close(alone.mean, a.mean(1))
    torch.testing.assert_close(m.mean, x.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(m.std, std(x), rtol=1e-9, atol=0)
    want = torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in zip(x, y, strict=True)])
    torch.testing.assert_close(c.correlation, want, rtol=1e-9, atol=0)


def test_a_constant_channel_keeps_its_scale_and_gets_its_mean() -> None:
    one = torch.ones(3, dtype=torch.float64)
    spread = torch.tensor([2.0, 0.0, 1e-9], dtype=torch.float64)
    scale, shift = correction(5 * one, 3 * one, 4 * one, spread)
    assert scale.tolist() == [1.5, 1.0, 1.0]
    assert shift.tolist() == [-1.0, 1.0, 1.0]
    # Constant in both ends but not in between: made constant.
    assert correction(one, 0 * one, one, one)[0].tolist() == [0.0, 0.0, 0.0]


def test_batches_are_equal_and_never_single() -> None:
    assert [len(p) for p in even_batches(torch.zeros(1001, 2), 500)] == [334, 334, 333]
    assert [len(p) for p in even_batches(torch.zeros(5, 2), 2)] == [3, 2]


# ---- nothing to repair


@pytest.mark.parametrize("form", ["forward", "closed"])
@pytest.mark.parametrize(
    "module",
    [
        net("mlp:widths=12-8"),
        net("mlp:widths=12-8,norm=layer"),
        conv(),
        conv(lambda c: nn.GroupNorm(2, c)),
        net("resnet8:width=4,norm=layer"),
    ],
)
def test_a_network_merged_with_itself_stays_as_it_is(module: nn.Module, form: str) -> None:
    a = theta(module, 1)
    got = repair(module, a, a, X, form=form, alpha=0.3)
    assert got.scale and set(got.scale) == set(got.shift)
    for name, scale in got.scale.items():
        assert (scale - 1).abs().max() < 1e-6, name
        assert got.shift[name].abs().max() < 1e-6, name
    assert list(got.before.values()) == pytest.approx([1.0] * len(got.before), abs=1e-6)
    torch.testing.assert_close(outputs(module, got.theta, X), outputs(module, a, X))


@pytest.mark.parametrize("form", ["forward", "closed"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_at_the_ends_it_is_the_end(alpha: float, form: str) -> None:
    module = net("mlp:widths=12-8")
    a, b = theta(module, 1), theta(module, 2)
    got = repair(module, a, b, X, alpha=alpha, form=form)
    torch.testing.assert_close(
        outputs(module, got.theta, X), outputs(module, b if alpha else a, X), rtol=1e-4, atol=1e-5
    )


# ---- planted statistics


def test_one_hidden_layer_gets_its_targets_and_both_forms_agree_there() -> None:
    module = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    a, b = theta(module, 1), theta(module, 2)
    x = 0.5 + 2 * torch.randn(3000, 6, generator=seeded("x"))
    alpha = 0.3
    fa, fb = features(module, a, x, "0"), features(module, b, x, "0")
    mean = (1 - alpha) * fa.mean(1) + alpha * fb.mean(1)
    spread = (1 - alpha) * std(fa) + alpha * std(fb)
    merged = features(module, averaged(module, (a, b), (1 - alpha, alpha)), x, "0")
    assert (std(merged) / spread).max() < 0.99  # they do collapse
    got = {f: repair(module, a, b, x, alpha=alpha, form=f) for f in ("forward", "closed")}
    for r in got.values():
        assert list(r.scale) == ["0"]
        at = features(module, r.theta, x, "0")
        torch.testing.assert_close(at.mean(1), mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(std(at), spread, rtol=1e-5, atol=0)
        assert r.before["0"] == pytest.approx(float((std(merged) / spread).mean()), abs=1e-6)
        assert r.after["0"] == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(
        got["closed"].scale["0"], got["forward"].scale["0"], rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        got["closed"].shift["0"], got["forward"].shift["0"], rtol=1e-4, atol=1e-5
    )


def test_the_spread_is_interpolated_not_the_variance() -> None:
    # One unit, spread 1 in A and 3 in B, correlation 1: the line itself has spread 2.
    module = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    a, b = theta(module, 1), theta(module, 1)
    a["0.weight"], b["0.weight"] = torch.tensor([[1.0]]), torch.tensor([[3.0]])
    got = repair(module, a, b, torch.randn(100, 1, generator=seeded("s")), form="forward")
    assert float(got.scale["0"]) == pytest.approx(1, abs=1e-6)


def test_the_closed_form_is_the_formula() -> None:
    module = net("mlp:widths=12-8")
    a, b = theta(module, 1), theta(module, 2)
    alpha, name = 0.4, "layer2.linear"
    fa, fb = features(module, a, X, name), features(module, b, X, name)
    line = (1 - alpha) * fa + alpha * fb  # its variance is the formula, written out
    want = ((1 - alpha) * std(fa) + alpha * std(fb)) / std(line)
    got = repair(module, a, b, X, alpha=alpha, form="closed", batch=150)
    torch.testing.assert_close(got.scale[name], want, rtol=1e-4, atol=0)
    torch.testing.assert_close(got.shift[name], (1 - want) * line.mean(1), rtol=1e-3, atol=1e-5)


def test_features_that_the_next_layer_overwrites_are_read_before() -> None:
    # In float64 nothing has to be converted, so what is held for B could be what ReLU left of it.
    layers = [nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)]
    module = nn.Sequential(*layers).double()
    apart = nn.Sequential(layers[0], nn.ReLU(), layers[2])
    a, b = theta(module, 1), theta(module, 2)
    x = torch.randn(50, 4, generator=seeded("over"), dtype=torch.float64)
    got, want = (repair(m, a, b, x, form="closed") for m in (module, apart))
    torch.testing.assert_close(got.scale["0"], want.scale["0"])


def test_forward_meets_every_target_in_one_batch_or_in_as_many_passes_as_layers() -> None:
    module = conv()
    a, b = theta(module, 1), theta(module, 2)

    def off(**options: Any) -> float:
        r = repair(module, a, b, X, **options)
        gaps = []
        for name in ("0", "4"):
            fa, fb, at = (features(module, t, X, name) for t in (a, b, r.theta))
            gaps.append(float((std(at) / (std(fa) / 2 + std(fb) / 2) - 1).abs().max()))
            gaps.append(float((at.mean(1) - fa.mean(1) / 2 - fb.mean(1) / 2).abs().max()))
        return max(gaps)

    assert off(batch=400) < 1e-5
    assert 1e-4 < off(batch=20) < 0.1  # REPAIR's single pass: close
    assert off(batch=20, passes=2) < 1e-5


@pytest.mark.parametrize("form", ["forward", "closed"])
def test_of_three_networks_targets_are_weighted_means(form: str) -> None:
    module = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    thetas, shares = [theta(module, n) for n in range(3)], (0.5, 0.2, 0.3)
    x = 0.5 + 2 * torch.randn(3000, 6, generator=seeded("x"))
    ends = [features(module, t, x, "0") for t in thetas]
    mean = sum(w * f.mean(1) for w, f in zip(shares, ends, strict=True))
    spread = sum(w * std(f) for w, f in zip(shares, ends, strict=True))
    got = repair_many(module, thetas, x, shares, form=form)
    at = features(module, got.theta, x, "0")
    torch.testing.assert_close(at.mean(1), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(std(at), spread, rtol=1e-5, atol=0)
    assert got.before["0"] < 0.9 and got.summary()["alpha"] == list(shares)
    two = repair(module, thetas[0], thetas[1], x, alpha=0.5, form=form).theta
    again = repair_many(module, thetas[:2], x, form=form).theta
    assert all(torch.equal(v, again[n]) for n, v in two.items())
    for bad in ((0.5, 0.5), (0.5, 0.6, 0.1), (2.0, -0.5, -0.5)):
        with pytest.raises(BadParameter, match="needed are two networks or more"):
            repair_many(module, thetas, x, bad)


# ---- fusing


def explicit(scale: Tensor, shift: Tensor) -> Callable[..., Tensor]:
    """A forward hook that corrects the outputs of a layer."""

    def hook(m: nn.Module, args: Any, out: Tensor) -> Tensor:
        last = isinstance(m, nn.Linear) or type(m) is nn.LayerNorm
        wide = [-1] if last else [-1, *[1] * (out.ndim - 2)]
        return out * scale.float().view(wide) + shift.float().view(wide)

    return hook


@pytest.mark.parametrize(
    "module",
    [
        net("mlp:widths=12-8,norm=layer"),
        conv(lambda c: nn.GroupNorm(2, c)),
        net("resnet8:width=4,norm=layer"),
    ],
)
def test_fused_weights_do_what_explicit_corrections_do(module: nn.Module) -> None:
    a, b = theta(module, 1), theta(module, 2)
    got = repair(module, a, b, X)
    assert any(float((s - 1).abs().max()) > 0.05 for s in got.scale.values())
    hooked = copy.deepcopy(module)
    for name, scale in got.scale.items():
        hooked.get_submodule(name).register_forward_hook(explicit(scale, got.shift[name]))
    want = outputs(hooked, averaged(module, (a, b), (0.5, 0.5)), X)
    torch.testing.assert_close(outputs(module, got.theta, X), want, rtol=1e-4, atol=1e-4)
    assert got.theta.keys() == module.state_dict().keys()


def test_fusing_leaves_other_entries_alone_and_keeps_types() -> None:
    module = conv().half()
    a = snapshot(module)
    two = torch.full((12,), 2.0, dtype=torch.float64)
    out = fuse(a, {"0": (two, two)})
    assert torch.equal(out["0.weight"], 2 * a["0.weight"])
    assert torch.equal(out["0.bias"], 2 * a["0.bias"] + 2)
    assert {k for k in a if out[k] is not a[k]} == {"0.weight", "0.bias"}
    assert all(v.dtype == torch.float16 for v in out.values())


# ---- which layers


def test_what_cannot_take_a_correction_is_skipped_and_says_why() -> None:
    got = repair(net("resnet8:width=4,norm=layer"), *_pair("resnet8:width=4,norm=layer"), X)
    assert "stem.norm" in got.scale
    assert "no bias" in got.skipped["stem.conv"]
    assert "logits" in got.skipped["head"]
    assert "head" not in got.scale and "head" in got.after
    assert {*got.scale, *got.skipped} == set(got.before)


def _pair(spec: str) -> tuple[Theta, Theta]:
    module = net(spec)
    return theta(module, 1), theta(module, 2)


def test_named_layers_alone_are_corrected_and_the_logits_can_be() -> None:
    spec = "mlp:widths=12-8"
    got = repair(net(spec), *_pair(spec), X, layers=["head", "layer1.linear"])
    assert list(got.scale) == ["layer1.linear", "head"]
    assert got.skipped == {"layer2.linear": "not among the layers that were asked for"}
    assert got.after["head"] == pytest.approx(1, abs=1e-5)
    assert got.after["layer2.linear"] < 0.99


class Twice(nn.Module):
    """One layer in two places, and two layers that share a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(4, 6), nn.Linear(6, 6)
        self.tied, self.other, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(self.first(x).relu()).relu()).relu()
        return self.head(self.other(self.tied(x).relu()).relu())


def test_layers_that_run_twice_and_tied_ones_are_left_and_refused_by_name() -> None:
    module = Twice()
    ties = layout(module).ties
    a, b = (with_aliases(theta(module, i), ties) for i in (1, 2))
    x = torch.randn(50, 4, generator=seeded("t"))
    got = repair(module, a, b, x)
    assert list(got.scale) == ["first"] and "shared" not in got.before
    assert "runs 2 times" in got.skipped["shared"]
    with pytest.raises(BadParameter, match="'shared' cannot be corrected: it runs 2 times"):
        repair(module, a, b, x, layers=["first", "shared"])
    assert "tied" in got.skipped["other"] and "tied" in got.skipped["tied"]
    assert got.theta["other.weight"] is got.theta["tied.weight"]
    with pytest.raises(BadParameter, match=r"'tied' cannot be corrected.*tied to another"):
        repair(module, a, b, x, layers=["tied"])


def test_positions_of_sequences_count_as_samples_of_a_channel() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2))
    a, b = theta(module, 1), theta(module, 2)
    x = torch.randn(60, 7, 3, generator=seeded("q"))
    got = repair(module, a, b, x)
    assert list(got.scale) == ["0", "1"] and got.scale["0"].shape == (5,)
    at = features(module, got.theta, x, "1")
    want = std(features(module, a, x, "1")) / 2 + std(features(module, b, x, "1")) / 2
    torch.testing.assert_close(std(at), want, rtol=1e-4, atol=0)


def test_the_axis_of_a_channel_layer_norm_is_the_channels() -> None:
    module = conv(ChannelLayerNorm)
    assert {n: v.axis for n, v in Copy(module, X).layers.items()} == {
        "0": 1, "1": 1, "4": 1, "5": 1, "9": -1,
    }  # fmt: skip


class TokenNorm(nn.LayerNorm):
    """A LayerNorm under another name, as CLIP has it: channels are last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class EitherNorm(nn.LayerNorm):
    """ConvNeXt's: channels are last, or at axis 1, as it is told."""

    def __init__(self, width: int, first: bool):
        super().__init__(width)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)
        return super().forward(x)


class OwnNorm(nn.Module):
    """One that is no subclass of any norm."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / (x.std(1, keepdim=True) + 1e-3)
        return self.weight[:, None] * x + self.bias[:, None]


class ActiveNorm(nn.GroupNorm):
    """With an activation inside, as timm has it: a scale does not come out as one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Sequence(nn.Module):
    """Tokens (N, 6, 6): as many as they have channels, so that shapes do not tell them apart."""

    def __init__(self, norm: nn.Module, back: bool = False):
        super().__init__()
        self.embed, self.norm, self.head, self.back = nn.Linear(4, 6), norm, nn.Linear(36, 3), back

    def inside(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.embed(x)))  # type: ignore[no-any-return]  # a module returns Any

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.inside(x)).flatten(1))  # type: ignore[no-any-return]  # a module returns Any


@pytest.mark.parametrize(
    ("norm", "axis"),
    [
        (lambda: nn.LayerNorm(6), -1),
        (lambda: TokenNorm(6), -1),
        (lambda: EitherNorm(6, first=False), -1),
        (lambda: EitherNorm(6, first=True), 1),
        (lambda: ChannelLayerNorm(6), 1),
        (lambda: OwnNorm(6), 1),
        (lambda: nn.GroupNorm(2, 6), 1),
        (lambda: nn.InstanceNorm1d(6, affine=True), 1),
    ],
)
def test_the_axis_of_a_norm_is_the_one_its_weight_acts_on(
    norm: Callable[[], nn.Module], axis: int
) -> None:
    module = Sequence(norm())
    a, b = theta(module, "axis", 1), theta(module, "axis", 2)
    x = torch.randn(80, 6, 4, generator=seeded("axis"))
    assert Copy(module, x).layers["norm"].axis == axis
    got = repair(module, a, b, x, batch=80)
    assert list(got.scale) == ["embed", "norm"]

    @torch.no_grad()
    def spread(state: Any) -> Tensor:
        module.load_state_dict(state)
        rows = module.inside(x).movedim(axis, -1).flatten(0, -2)
        return rows.double().std(0, unbiased=False)

    want = (spread(a) + spread(b)) / 2
    torch.testing.assert_close(spread(got.theta), want, rtol=1e-4, atol=1e-6)
    assert got.after["norm"] == pytest.approx(1, abs=1e-4)


def test_a_norm_whose_outputs_do_not_follow_its_weight_is_left() -> None:
    x = torch.randn(80, 6, 4, generator=seeded("left"))
    for norm, why in (
        (ActiveNorm(2, 6), "not scaled and shifted as its weight and bias are"),
        (nn.RMSNorm(6), "no bias"),
        (nn.InstanceNorm1d(6), "no weight"),
    ):
        module = Sequence(norm)
        got = repair(module, theta(module, "left", 1), theta(module, "left", 2), x)
        assert list(got.scale) == ["embed"] and why in got.skipped["norm"]


def test_a_layer_that_runs_three_times_is_left_and_said() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Linear(4, 6), nn.Linear(6, 6)
            self.last = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range(3):
                x = x + F.relu(self.again(x))
            return self.last(x)  # type: ignore[no-any-return]  # a module returns Any

    module = Thrice()
    got = repair(module, theta(module, 1), theta(module, 2), torch.randn(30, 4))
    assert "runs 3 times" in got.skipped["again"] and list(got.scale) == ["first"]


# ---- BatchNorm


def test_the_reset_gives_the_walkers_numbers() -> None:
    spec = "resnet8:width=4,norm=batch"
    module = net(spec)
    a, b = _pair(spec)
    split = Split(X, DIGITS.train.head(400).y)
    walker = Walker(module, {"train": split}, bn="reestimate", batch=150)
    walker.at(averaged(module, (a, b), (0.5, 0.5)))
    got = reset_batchnorm(module, averaged(module, (a, b), (0.5, 0.5)), X, batch=150)
    want = walker.module.state_dict()
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
    # With it the network is REPAIR's: every norm at the spread that its scale says.
    whole = repair(module, a, b, X, batch=150)
    assert whole.scale == {} and len(whole.reset) == 9
    assert all(torch.equal(whole.theta[n], v) for n, v in got.items())
    assert {*whole.reset, *whole.skipped} == set(whole.before)
    assert not {*whole.reset} & {*whole.skipped}
    with pytest.raises(BadParameter, match="running statistics are estimated again"):
        repair(module, a, b, X, layers=["stem.norm"])


def test_biased_convolutions_under_batchnorm_end_with_fresh_statistics() -> None:
    module = conv(nn.BatchNorm2d)
    a, b = theta(module, 1), theta(module, 2)
    got = repair(module, a, b, X)
    assert list(got.scale) == ["0", "4"] and got.reset == ("1", "5")
    again = reset_batchnorm(module, got.theta, X)
    assert all(torch.equal(got.theta[n], v) for n, v in again.items())
    assert {n: got.after[n] for n in ("0", "4")} == pytest.approx({"0": 1, "4": 1}, abs=1e-4)


def test_a_network_without_running_statistics_has_nothing_to_reset() -> None:
    module = conv()
    with pytest.raises(BadParameter, match="no BatchNorm"):
        reset_batchnorm(module, snapshot(module), X)


# ---- on trained networks


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Theta, Theta]:
    """Two deep narrow networks, B's units in A's order by correlation of activations."""
    recipe = Recipe(
        net="mlp:widths=48x6", data="digits", steps=200, batch=60, optimizer="adam", lr=1e-3
    )
    ends = []
    for init in (1, 2):
        run = Run(recipe, init=init, order=init)
        module = build(run, DIGITS, torch.device("cpu"))
        ends.append(advance(run, State(0, snapshot(module)), 200, DIGITS, module=module).theta)
    a, b = ends
    names = [f"layer{i}.linear" for i in range(1, 7)]
    aligned = dict(b)
    for name, after in zip(names, [*names[1:], "head"], strict=True):
        fa, fb = (features(module, t, X, name).relu() for t in (a, b))
        both = torch.corrcoef(torch.cat([fa, fb])).nan_to_num()[: len(fa), len(fa) :]
        order = torch.from_numpy(linear_sum_assignment(both.numpy(), maximize=True)[1])
        for entry in ("weight", "bias"):
            aligned[f"{name}.{entry}"] = aligned[f"{name}.{entry}"][order]
        aligned[f"{after}.weight"] = aligned[f"{after}.weight"][:, order]
    torch.testing.assert_close(outputs(module, aligned, X), outputs(module, b, X))
    return module, a, aligned


def test_variance_collapses_with_depth_and_repair_ends_it(
    trained: tuple[nn.Module, Theta, Theta],
) -> None:
    module, a, b = trained
    got = repair(module, a, b, X)
    shares = list(got.before.values())
    assert shares[0] < 0.95 and shares[-1] < 0.6
    assert all(x > y for x, y in itertools.pairwise(shares))
    hidden = [v for n, v in got.after.items() if n != "head"]
    assert hidden == pytest.approx([1.0] * 6, abs=1e-4)
    assert got.after["head"] > 0.8

    def loss(point: Mapping[str, Tensor]) -> float:
        return float(F.cross_entropy(outputs(module, point, DIGITS.test.x), DIGITS.test.y))

    ends = max(loss(a), loss(b))
    plain, forward = loss(averaged(module, (a, b), (0.5, 0.5))), loss(got.theta)
    closed = loss(repair(module, a, b, X, form="closed").theta)
    assert forward - ends < 0.6 * (plain - ends)
    assert closed < plain


def test_the_result_tells_of_itself(trained: tuple[nn.Module, Theta, Theta]) -> None:
    got = repair(*trained[:1], *trained[1:], X, form="closed")
    told = json.loads(json.dumps(got.summary()))
    assert told["form"] == "closed" and told["samples"] == 400 and len(told["corrected"]) == 6
    assert "6 layers corrected" in str(got) and "(head) before" in str(got)


def test_layers_without_any_spread_have_no_share() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    a = {n: torch.zeros_like(v) for n, v in module.state_dict().items()}
    got = repair(module, a, a, torch.randn(10, 2, generator=seeded("z")))
    assert math.isnan(got.before["0"]) and got.summary()["after"]["0"] is None
    assert got.scale["0"].tolist() == [1, 1, 1] and "no layer varies" in str(got)


# ---- nothing mutated, nothing bad accepted


def test_nothing_is_changed() -> None:
    module = conv(nn.BatchNorm2d).train()
    a, b = theta(module, 1), theta(module, 2)
    before, inputs = [copy.deepcopy(v) for v in (snapshot(module), a, b)], X.clone()
    momentum = module[1].momentum  # type: ignore[index]  # Sequential indexed
    for form in ("forward", "closed"):
        assert isinstance(repair(module, a, b, X, form=form), Repaired)

    reset_batchnorm(module, a, X)
    for was, now in zip(before, (module.state_dict(), a, b), strict=True):
        assert all(torch.equal(v, now[n]) for n, v in was.items())
    assert torch.equal(inputs, X)
    assert module.training and module[1].momentum == momentum  # type: ignore[index]  # Sequential indexed
    assert not any(m._forward_hooks for m in module.modules())
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "forwards"}, "form: 'forwards'.*Did you mean 'forward'"),
        ({"alpha": 1.5}, "alpha: 1.5"),
        ({"alpha": math.nan}, "alpha: nan"),
        ({"passes": 0}, "passes: 0"),
        ({"batch": 1}, "batch: 1"),
        ({"layers": ["9"]}, "layer: '9' is not known.*Allowed: 0, 2, 4"),
        ({"layers": ["2"]}, "layer '2' cannot be corrected: it has no bias"),
        ({"layers": "0"}, "a list of layer names"),
        ({"layers": []}, "no layer can be corrected"),
        ({"inputs": torch.zeros(1, 4)}, "N of 2 or more"),
        ({"inputs": [1.0]}, "got list"),
        ({"inputs": torch.full((9, 4), math.nan)}, "inputs: they hold NaN"),
        ({"b": {}}, "network B does not fit"),
        ({"a": {"0.weight": torch.full((5, 4), math.nan)}}, "network A: 0.weight holds NaN"),
        ({"a": {"0.weight": torch.full((5, 4), 3e38)}}, "network A: layer '0' puts out NaN"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    module = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 2)
    )
    a, b = theta(module, 1), theta(module, 2)
    options = dict(options)
    x = options.pop("inputs", 10 * torch.randn(20, 4, generator=seeded("bad")))
    a |= options.pop("a", {})
    b = options.pop("b", b)
    with pytest.raises(BadParameter, match=message):
        repair(module, a, b, x, **options)


def test_a_network_that_cannot_be_corrected_at_all_says_so() -> None:
    spec = "resnet18:width=4"
    with pytest.raises(BadParameter, match=r"no layer can be corrected.*no bias"):
        repair(net(spec), *_pair(spec), X[:20])
