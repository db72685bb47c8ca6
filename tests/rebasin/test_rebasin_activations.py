"""Activation matching: planted permutations come back, and only one batch is ever held."""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from companion import models
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.data import Split
from companion.rebasin.activations import PAIR_STATISTICS, Look, Sums, activation_matching, looks
from companion.rebasin.derive import derive
from companion.rebasin.repair import repair
from companion.rebasin.spec import ActivationSite, Spec, chain
from companion.rebasin.ste import straight_through


class Residual(nn.Module):
    """A residual network that calls functions, not modules: its sites are numbered."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.up = nn.ModuleList(nn.Conv2d(12, 10, 3, padding=1) for _ in range(2))
        self.down = nn.ModuleList(nn.Conv2d(10, 12, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        for up, down in zip(self.up, self.down, strict=True):
            x = F.relu(x + down(F.relu(up(x))))
        return self.head(x.mean((2, 3)))


class Flat(nn.Module):
    """ReLU after the flattening: units are blocks of 16 positions there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 3, padding=1, stride=2)
        self.head = nn.Linear(9 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.conv(x).flatten(1)))


class Joined(nn.Module):
    """Two layers side by side, one activation: the second one's block starts at 7."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 7, 3), nn.Conv2d(3, 11, 3)
        self.head = nn.Linear(18, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3)))


class Attention(nn.Module):
    """Heads, whose units move inside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 24)
        self.layer = nn.TransformerEncoderLayer(24, 4, 20, dropout=0.0, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x.flatten(1, 2))).mean(1))


class Scribbler(nn.Module):
    """Writes over its activation once it has been used."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        h = F.relu(self.one(x if shift is None else x + shift))
        y = self.two(h)
        h.fill_(1.0)
        return y


def small(seed: int = 1) -> tuple[nn.Module, Spec]:
    with Key("small", seed).seeded():
        module = Scribbler()
    spec = chain(6, 16, 3, names=["one", "two"])
    return module, dataclasses.replace(
        spec, sites={"one": ActivationSite("", "relu", 0, -1, 0, ("one",))}
    )


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=Key("noise", seed).generator())


def made(name: str) -> nn.Module:
    own = {"residual": Residual, "flat": Flat, "joined": Joined, "attention": Attention}
    if name in own:
        with Key("init").seeded():
            return own[name]()
    return models.build(name, (3, 8, 8), 4, Key("init"))


def planted(spec: Spec, theta: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """A permuted network, and the permutations that bring it back."""
    perms = spec.random(Key("planted").generator())
    return spec.permute(theta, perms), spec.inverse(perms)


NETWORKS = (
    "mlp:widths=40x3",
    "resnet20:width=4,norm=layer",
    "resnet20:width=4,norm=batch",
    "residual",
    "flat",
    "joined",
    "attention",
)


@pytest.mark.parametrize("name", NETWORKS)
def test_planted_permutations_come_back(name: str) -> None:
    module = made(name)
    inputs = noise(24, 3, 8, 8)
    spec = derive(module, inputs[:2])
    a = module.state_dict()
    b, back = planted(spec, a)
    for statistic in PAIR_STATISTICS:
        found = activation_matching(spec, module, a, b, inputs, statistic=statistic, batch=10)
        assert found.details is not None and found.details["no site"] == []
        for group, p in back.items():
            assert torch.equal(found.perms[group], p), (statistic, group)
        assert found.share == pytest.approx(1, abs=1e-6)
        assert found.share_before < 0.9
        assert found.method == "activations" and found.passes == 1


def test_the_stream_is_read_behind_its_last_block() -> None:
    spec = derive(made("residual"), noise(2, 3, 8, 8))
    site = spec.sites["stem"]
    assert (site.op, site.nth) == ("relu", 4)  # 0 the stem, then two a block


@pytest.mark.parametrize("name", ["mlp:widths=9x2", "flat", "joined"])
def test_objective_is_what_all_features_at_once_give(name: str) -> None:
    a, b = made(name), made(name)
    with torch.no_grad(), Key("other").seeded():
        for p in b.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    inputs = noise(30, 3, 8, 8)
    spec = derive(a, inputs[:2])

    def features(module: nn.Module) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        if name == "flat":
            kept["conv"] = (
                F.relu(module.get_submodule("conv")(inputs)).permute(0, 2, 3, 1).reshape(-1, 9)
            )
        elif name == "joined":
            for layer in ("left", "right"):
                out = F.relu(module.get_submodule(layer)(inputs)).permute(0, 2, 3, 1)
                kept[layer] = out.reshape(-1, out.shape[-1])
        else:
            x = module.get_submodule("flatten")(inputs)
            for layer in ("layer1", "layer2"):
                x = kept[f"{layer}.linear"] = module.get_submodule(layer)(x)
        return {n: x.detach().double() for n, x in kept.items()}

    fa, fb = features(a), features(b)
    args = (spec, a, a.state_dict(), b.state_dict(), inputs)
    found = activation_matching(*args, batch=7)
    rows = (found.details or {})["groups"]
    for group, x in fa.items():
        y = fb[group]
        want = float((x * y[:, found.perms[group]]).sum()) / len(x)
        assert rows[group]["objective"] == pytest.approx(want, rel=1e-6)
        assert rows[group]["before"] == pytest.approx(float((x * y).sum()) / len(x), rel=1e-6)
        assert rows[group]["bound"] == pytest.approx(float(x.norm() * y.norm()) / len(x), rel=1e-6)
        assert rows[group]["samples"] == len(x)
    assert found.objective == pytest.approx(sum(r["objective"] for r in rows.values()))
    assert found.before <= found.objective <= found.bound

    found = activation_matching(*args, statistic="correlation", batch=7)
    rows = (found.details or {})["groups"]
    for group, x in fa.items():
        pairs = torch.cat([x, fb[group][:, found.perms[group]]], 1)
        table = torch.corrcoef(pairs.T).nan_to_num(0)[: x.shape[1], x.shape[1] :]
        assert rows[group]["objective"] == pytest.approx(float(table.trace()), rel=1e-5)


def test_batches_do_not_matter() -> None:
    a, b = (
        made("resnet20:width=4,norm=layer"),
        models.build("resnet20:width=4,norm=layer", (3, 8, 8), 4, Key("init", 2)),
    )
    inputs = noise(23, 3, 8, 8)
    spec = derive(a, inputs[:2])
    for statistic in PAIR_STATISTICS:
        first, *others = (
            activation_matching(
                spec, a, a.state_dict(), b.state_dict(), given, statistic=statistic, batch=batch
            )
            for given, batch in (
                (inputs, 500),
                (inputs, 4),
                (Split(inputs, torch.zeros(23, dtype=torch.int64)), 10),
                ([(x,) for x in inputs.split(6)], 1),
                (list(inputs.split(9)), 1),
            )
        )
        for other in others:
            assert other.objective == pytest.approx(first.objective, rel=1e-6)
            assert all(torch.equal(first.perms[g], p) for g, p in other.perms.items())


def test_only_one_batch_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made("mlp:widths=12x3")
    inputs = noise(40, 3, 8, 8)
    spec = derive(module, inputs[:2])
    held: list[weakref.ref[torch.Tensor]] = []
    peaks, sizes = [], []
    real = Look.samples

    def samples(self: Look, out: torch.Tensor) -> torch.Tensor:
        x = real(self, out).clone()
        held.append(weakref.ref(x))
        peaks.append(sum(r() is not None for r in held))
        sizes.append(len(x))
        return x

    monkeypatch.setattr(Look, "samples", samples)
    theta = module.state_dict()
    activation_matching(spec, module, theta, theta, inputs, batch=5)
    assert len(held) == 2 * 3 * 9  # networks, groups, batches and the trial of the sites
    assert max(sizes) == 5
    assert max(peaks) <= 4  # one batch of A's three, and the one of B that is being added
    assert not any(r() is not None for r in held)


def test_an_activation_that_is_overwritten_later() -> None:
    module, spec = small()
    a = module.state_dict()
    b, back = planted(spec, a)
    for statistic in PAIR_STATISTICS:
        found = activation_matching(spec, module, a, b, noise(50, 6), statistic=statistic)
        assert torch.equal(found.perms["one"], back["one"])


def test_forward_with_two_arguments() -> None:
    module, spec = small()
    a = module.state_dict()
    b, back = planted(spec, a)
    batches = [(noise(9, 6, seed=i), noise(9, 6, seed=i + 50)) for i in range(4)]
    found = activation_matching(spec, module, a, b, batches)
    assert torch.equal(found.perms["one"], back["one"])


def test_units_that_do_not_respond() -> None:
    module, spec = small()
    a = {k: v.clone() for k, v in module.state_dict().items()}
    for unit, value in ((2, -1.0), (5, -1.0), (9, 3.3)):  # two dead ones, and a constant
        a["one.weight"][unit], a["one.bias"][unit] = 0, value
    b, back = planted(spec, a)
    with torch.no_grad():
        found = activation_matching(
            spec, module, a, b, noise(60, 6) + 100, statistic="correlation", batch=7
        )
    assert found.bound <= 13
    found = activation_matching(spec, module, a, b, noise(60, 6), statistic="correlation", batch=7)
    assert found.bound == 13
    assert found.objective == pytest.approx(13, abs=1e-5)
    live = [i for i in range(16) if i not in (2, 5, 9)]
    assert torch.equal(found.perms["one"][live], back["one"][live])
    everything = activation_matching(spec, module, a, b, noise(60, 6), batch=7)
    assert everything.perms["one"][9] == back["one"][9]  # moments see a constant


def test_correlations_survive_a_large_mean() -> None:
    """Activations around 1e4 with spread 1: a difference of float32 squares would hold nothing."""
    sums = Sums(centred=True)
    x = noise(600, 5) + 1e4
    for part in x.split(50):
        sums.add(part, part.flip(1))
    table, bound = sums.gain()
    assert bound == 5
    want = torch.corrcoef(x.double().T).flip(1)
    assert torch.allclose(table, want, atol=1e-5)


def test_a_group_without_a_site_stays() -> None:
    module, spec = small()
    spec = dataclasses.replace(spec, sites={})
    a = module.state_dict()
    b, _ = planted(spec, a)
    found = activation_matching(spec, module, a, b, noise(9, 6))
    assert torch.equal(found.perms["one"], torch.arange(16))
    assert found.details is not None and found.details["no site"] == ["one"]
    assert math.isnan(found.share), "nothing was matched: that is not a perfect match"


def test_nothing_of_the_callers_changes() -> None:
    module = made("resnet20:width=4,norm=batch").train()
    inputs = noise(12, 3, 8, 8)
    spec = derive(module, inputs[:2])
    a = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in module.state_dict().items()}
    b, _ = planted(spec, module.state_dict())
    kept = [{k: v.detach().clone() for k, v in t.items()} for t in (a, b, module.state_dict())]
    fused = torch.backends.mha.get_fastpath_enabled()
    found = activation_matching(spec, module, a, b, inputs)
    assert module.training and not any(m._forward_hooks for m in module.modules())
    for theta, copy in zip((a, b, module.state_dict()), kept, strict=True):
        assert all(torch.equal(theta[k], v) for k, v in copy.items())
    assert all(v.grad is None for v in a.values())
    assert torch.backends.mha.get_fastpath_enabled() == fused
    again = activation_matching(spec, module, a, b, inputs)
    assert all(torch.equal(found.perms[g], p) for g, p in again.perms.items())


def test_half_precision_weights() -> None:
    module, spec = small()
    a = {k: v.half() for k, v in module.state_dict().items()}
    b, back = planted(spec, a)
    found = activation_matching(spec, module, a, b, noise(50, 6))
    assert torch.equal(found.perms["one"], back["one"])


def test_bad_input() -> None:
    module, spec = small()
    a = module.state_dict()
    x = noise(9, 6)

    def refused(match: str, **changed: object) -> None:
        given: dict[str, Any] = {"spec": spec, "a": a, "b": a, "inputs": x}
        given |= {"statistic": "moment", "batch": 4} | changed
        with pytest.raises(BadParameter, match=match):
            activation_matching(
                given["spec"], module, given["a"], given["b"], given["inputs"],
                statistic=given["statistic"], batch=given["batch"],
            )  # fmt: skip

    refused("inputs: there are none", inputs=x[:0])
    refused("inputs: there are none", inputs=[])
    refused("inputs: a split, a tensor", inputs=7)
    refused("inputs: the first member holds no tensor", inputs=[("text",)])
    refused("single number", inputs=torch.tensor(1.0))
    refused("batch: 0 must be", batch=0)
    refused("Did you mean 'correlation'", statistic="corelation")
    refused("network A: the activations of 'one' hold NaN", inputs=torch.full((9, 6), torch.nan))
    refused("network B: two.weight has shape", b={**a, "two.weight": a["two.weight"][:, :5]})
    refused("network A: one.bias holds NaN", a={**a, "one.bias": a["one.bias"] * torch.nan})
    huge = {**a, "one.weight": a["one.weight"] * 1e38, "one.bias": a["one.bias"] + 1e38}
    refused("network B: the activations of 'one' hold NaN or infinite", b=huge, inputs=x * 100)
    for statistic in PAIR_STATISTICS:
        late = torch.cat([x, torch.full((1, 6), torch.inf)])
        refused("activations of 'one' hold NaN", inputs=late, statistic=statistic)
    site = ActivationSite("", "gelu", 0, -1, 0, ("one",))
    lost = dataclasses.replace(spec, sites={"one": site})
    refused("'one': operation 'gelu' number 0 of the network itself did not come by", spec=lost)
    site = ActivationSite("", "relu", 0, -3, 0, ("one",))
    refused("does not fit the spec", spec=dataclasses.replace(spec, sites={"one": site}))


def test_a_path_taken_only_once_is_noticed() -> None:
    class Moody(Scribbler):
        def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x) if len(x) > 3 else self.two(self.one(x).tanh())

    _, spec = small()
    module = Moody()
    a = module.state_dict()
    activation_matching(spec, module, a, a, noise(8, 6), batch=4)
    with pytest.raises(BadParameter, match="took another path"):
        activation_matching(spec, module, a, a, noise(9, 6), batch=4)


def test_units_of_another_layer_are_noticed() -> None:
    """A site that names an operation of the right shape, but the wrong one."""
    module = made("mlp:widths=16x2")
    x = noise(9, 3, 8, 8)
    spec = derive(module, x[:2])
    one, two = spec.sites.items()
    crossed = dataclasses.replace(
        spec,
        sites={
            n: dataclasses.replace(s, block=(n,)) for (n, _), (_, s) in ((one, two), (two, one))
        },
    )
    a = module.state_dict()
    with pytest.raises(BadParameter, match=r"'layer2.linear': .*'layer1.relu' does not show its"):
        activation_matching(crossed, module, a, a, x)


def test_attention_taken_apart_on_another_device() -> None:
    """Where a spec was derived, attention may be many operations, and here one."""
    module = made("attention")
    x = noise(24, 3, 8, 8)
    with sdpa_kernel(SDPBackend.MATH):
        spec = derive(module, x[:2])
    site = next(s for s in spec.sites.values() if s.module == "layer.self_attn")
    assert site != derive(module, x[:2]).sites["layer.self_attn"]
    a = module.state_dict()
    b, back = planted(spec, a)
    found = activation_matching(spec, module, a, b, x)
    assert all(torch.equal(found.perms[g], p) for g, p in back.items())


def test_a_block_of_two_families_is_not_guessed() -> None:
    """Where two free groups share one block, neither can be matched alone there."""
    spec = chain(6, 4, 4, 3)
    site = ActivationSite("", "relu", 0, -1, 0, ("0", "1"))
    assert looks(dataclasses.replace(spec, sites={"0": site, "1": site})) == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_and_data_of_different_precision(dtype: torch.dtype) -> None:
    """A half-precision network and float32 images: every method that looks at data works."""
    module = made("mlp:widths=12x2").to(dtype)
    inputs = noise(80, 3, 8, 8)
    spec = derive(module, inputs[:2])
    a = {k: v.clone() for k, v in module.state_dict().items()}
    b, perms = planted(spec, a)
    found = activation_matching(spec, module, a, b, inputs)
    assert all(torch.equal(found.perms[g], p) for g, p in perms.items())
    split = Split(inputs, torch.zeros(80, dtype=torch.int64))
    straight_through(spec, module, a, b, split, steps=1, batch=20)
    merged = repair(module, a, dict(found.apply(module, b)), inputs).theta
    assert {v.dtype for v in merged.values()} == {dtype}
