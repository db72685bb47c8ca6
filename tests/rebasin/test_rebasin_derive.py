"""The derived spec: right for the networks we know, proven, refused where it must be."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from companion import models
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.rebasin import activation_matching, rules
from companion.rebasin.derive import derive
from companion.rebasin.proof import Subject, Unproven, check_equal, output_gap
from companion.rebasin.spec import Spec

IMAGE = torch.randn(2, 3, 32, 32, generator=Key("test").generator())


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Networks drawn by a test are the same every time."""
    with Key("test").seeded():
        yield


def gap(module: nn.Module, spec: Spec, seed: int = 0) -> float:
    """How much random permutations change the outputs, in float64, as a share of their size."""
    net = Subject(module, spec.example, snapshot(module))
    before = net.run()
    perms = spec.random(Key("test", seed).generator())
    net.load(spec.permute(snapshot(module), perms))
    return output_gap(before, net.run())


def shaken(module: nn.Module) -> nn.Module:
    """No two entries equal, so that a wrong permutation shows."""
    with torch.no_grad():
        for i, p in enumerate([*module.parameters(), *module.buffers()]):
            if p.is_floating_point():
                noise = torch.rand(p.shape, generator=Key("shaken", i).generator())
                p.add_(0.1 + 0.2 * noise)
    return module


def blocks(spec: Spec, name: str) -> list[list[tuple[str | int, ...]]]:
    return [list(axis) for axis in spec.axes[name]]


@pytest.mark.parametrize(
    ("net", "groups"),
    [
        ("mlp:widths=32x3", 3),
        ("mlp:widths=16x2,norm=layer", 2),
        ("mlp:widths=16x2,norm=batch", 2),
        ("lenet-300-100", 2),
        ("resnet20", 12),
        ("resnet20:norm=layer", 12),
        ("resnet20:norm=none", 12),
        ("resnet20:shortcut=conv3x3", 12),
        ("resnet8:norm=group,groups=1", 6),
        ("resnet18:width=8", 12),
        ("vgg16:norm=layer,width=8", 13),
        ("vgg11:norm=none,width=8", 8),
    ],
)
def test_our_networks(net: str, groups: int) -> None:
    module = shaken(models.build(net, (3, 32, 32), 10))
    spec = derive(module, IMAGE)
    assert len(spec.groups) == groups
    assert not spec.held
    assert gap(module, spec) < 1e-8
    assert set(spec.sites) == set(spec.groups)


def test_counts_of_the_paper() -> None:
    """Table 1 rounds the digits of every layer down before it adds them: 3 x 1166 = 3498."""
    mlp = derive(models.build("mlp:widths=512x3", (1, 28, 28), 10), torch.randn(1, 1, 28, 28))
    assert 3 * math.floor(math.lgamma(513) / math.log(10)) == 3498
    assert mlp.log10_count() == pytest.approx(3499.62, abs=0.01)
    resnet20 = derive(models.build("resnet20:norm=layer", (3, 32, 32), 10), IMAGE)
    assert math.floor(resnet20.log10_count()) == 551


@pytest.mark.parametrize(
    ("name", "groups", "size"),
    [
        ("resnet18", 12, 64),
        ("vgg11", 10, 64),
        ("vgg16_bn", 15, 64),
        ("mobilenet_v2", 25, 64),
        ("densenet121", 120, 64),
        ("squeezenet1_0", 25, 64),
        ("efficientnet_b0", 40, 64),
    ],
)
def test_torchvision(name: str, groups: int, size: int) -> None:
    module = getattr(torchvision.models, name)(weights=None)
    if name.startswith("vgg"):  # the flatten in front of it counts, not its 100 million weights
        module.classifier[0] = nn.Linear(512 * 7 * 7, 32)
        module.classifier[3] = nn.Linear(32, 4096)
    spec = derive(module, torch.randn(1, 3, size, size))
    assert len(spec.groups) == groups
    assert not spec.held
    buffers = [n for n in spec.axes if "running" in n]
    assert ("bn" in name or name.startswith(("resnet", "mobile", "dense", "eff"))) == bool(buffers)
    assert not set(buffers) & set(spec.objective)


def test_resnet50_ties_its_streams() -> None:
    module = torchvision.models.resnet50(weights=None)
    spec = derive(module, torch.randn(1, 3, 64, 64))
    assert len(spec.groups) == 37
    assert math.floor(spec.log10_count()) == 25638
    stream = blocks(spec, "layer3.0.downsample.0.weight")[0]
    assert all(blocks(spec, f"layer3.{i}.conv3.weight")[0] == stream for i in range(6)), (
        "everything added into a stream shares its permutation"
    )


@pytest.mark.slow
def test_vit() -> None:
    module = torchvision.models.vit_b_16(weights=None)
    spec = derive(module, torch.randn(1, 3, 224, 224))
    # the stream; in each of 12 layers the heads, units of q and k, units of v, units of the MLP
    assert len(spec.groups) == 1 + 12 * 4
    name = "encoder.layers.encoder_layer_3.self_attention"
    q, k, v = blocks(spec, f"{name}.in_proj_weight")[0]
    assert q == k and q[0] == v[0] and q[1] != v[1]
    assert spec.groups[str(q[1])].within == q[0]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def test_gpt2() -> None:
    module = shaken(gpt2())
    spec = derive(module, torch.arange(16).reshape(2, 8))
    assert len(spec.groups) == 1 + 2 * 4
    assert gap(module, spec) < 1e-8
    # the embedding and the head are one tensor: both names move, one counts
    assert spec.axes["lm_head.weight"] == spec.axes["transformer.wte.weight"]
    assert ("lm_head.weight" in spec.objective) + ("transformer.wte.weight" in spec.objective) == 1
    heads = blocks(spec, "transformer.h.1.attn.c_proj.weight")[0][0]
    assert [spec.groups[str(h)].size for h in heads] == [4, 8]
    assert spec.groups[str(heads[1])].within == heads[0]


class Functional(nn.Module):
    """No modules but linear layers: functional ReLU, a residual, a flatten, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.other = nn.Conv2d(3, 4, 3, padding=1)
        self.mix = nn.Conv2d(10, 5, 1)
        self.back = nn.Conv2d(5, 10, 1)
        self.fc = nn.Linear(10 * 16, 7)
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.conv(x)), self.other(x).sigmoid()], dim=1)
        both = both + self.back(torch.relu(self.mix(both)))
        out: Tensor = self.out(F.gelu(self.fc(F.max_pool2d(both, 8).flatten(1))))
        return out


def test_functional_network() -> None:
    module = shaken(Functional())
    spec = derive(module, IMAGE)
    assert [spec.groups[n].size for n in ("conv", "other", "mix", "fc")] == [6, 4, 5, 7]
    assert blocks(spec, "mix.weight")[1] == [("conv",), ("other",)]
    assert blocks(spec, "back.weight")[0] == [("conv",), ("other",)]
    assert blocks(spec, "fc.weight")[1] == [("conv", 16), ("other", 16)]
    assert spec.sites["mix"].op == "relu"
    assert gap(module, spec) < 1e-8


class Attention(nn.Module):
    """Three ways to write one attention layer."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.embed = nn.Linear(5, 12)
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        n, t, c = x.shape
        if self.style == "chunk":
            q, k, v = (y.view(n, t, 3, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        elif self.style == "stack":
            q, k, v = self.qkv(x).reshape(n, t, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            both = self.qkv(x).view(n, t, 3, 3, 4)
            q, k, v = (both[:, :, i].transpose(1, 2) for i in range(3))
        if self.style == "einsum":
            score = torch.einsum("nhtd,nhsd->nhts", q, k).softmax(-1)
            y = torch.einsum("nhts,nhsd->nhtd", score, v)
        elif self.style == "matmul":
            y = ((q * 0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, c))
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.mark.parametrize("style", ["chunk", "stack", "einsum", "matmul"])
def test_attention_heads_and_units_inside_heads(style: str) -> None:
    module = shaken(Attention(style))
    spec = derive(module, torch.randn(2, 4, 5))
    q, k, v = blocks(spec, "qkv.weight")[0]
    assert q == k and q[0] == v[0] and q[1] != v[1], "heads are shared, units of v are their own"
    assert blocks(spec, "proj.weight")[1] == [v]
    assert spec.groups[str(v[1])].within == v[0]
    assert gap(module, spec) < 1e-8


class Norms(nn.Module):
    def __init__(self, norm: nn.Module, shape: tuple[int, ...] = (8,)) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        return out


@pytest.mark.parametrize(
    ("norm", "sizes"),
    [
        (nn.BatchNorm2d(8), [8]),
        (nn.BatchNorm2d(8, track_running_stats=False), [8]),
        (nn.GroupNorm(1, 8), [8]),
        (nn.GroupNorm(8, 8), [8]),
        (nn.GroupNorm(2, 8), [2, 4]),
        (nn.InstanceNorm2d(8, affine=True), [8]),
        (nn.LayerNorm([8, 30, 30]), [8]),
        (nn.LayerNorm([30, 30]), [8]),
        (nn.PReLU(8), [8]),
        (nn.Conv2d(8, 8, 1, groups=8), [8]),
        (nn.Conv2d(8, 8, 1, groups=2), [2, 4, 4]),
    ],
    ids=str,
)
def test_norms_and_grouped_convolutions(norm: nn.Module, sizes: list[int]) -> None:
    module = shaken(Norms(norm))
    spec = derive(module, IMAGE)
    assert [g.size for g in spec.groups.values()] == sizes
    assert gap(module, spec) < 1e-8
    if not sizes:
        assert "grouped convolution (2 groups) in norm" in spec.held["conv.weight[0]"]


class Recurrent(nn.Module):
    """One weight whose two axes are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.step, self.say = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 6, dtype=x.dtype)
        for t in range(x.shape[1]):
            state = torch.tanh(self.read(x[:, t]) + self.step(state))
        out: Tensor = self.say(state)
        return out


def test_one_permutation_on_both_axes() -> None:
    module = shaken(Recurrent())
    spec = derive(module, torch.randn(2, 3, 4))
    assert spec.axes["step.weight"][0] == spec.axes["step.weight"][1]
    assert len(spec.groups) == 1
    assert gap(module, spec) < 1e-8


def test_lstm_gates_share_the_hidden_units() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.say = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.say(self.lstm(x)[0][:, -1])
            return out

    module = shaken(Net())
    spec = derive(module, torch.randn(2, 3, 4))
    (group,) = spec.groups
    assert blocks(spec, "lstm.weight_hh_l0") == [[(group,)] * 4, [(group,)]]
    assert gap(module, spec) < 1e-8


class Between(nn.Module):
    """Something between two linear layers."""

    def __init__(self, middle: Any, units: int = 8) -> None:
        super().__init__()
        self.middle = middle
        self.a, self.b, self.c = nn.Linear(4, units), nn.Linear(units, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.relu(self.b(self.middle(torch.relu(self.a(x))))))
        return out


@pytest.mark.parametrize(
    ("middle", "size"),
    [
        (lambda h: h.cumsum(-1), 0),
        (lambda h: h.flip(-1), 0),
        (lambda h: torch.fft.fft(h).real, 0),
        (lambda h: h * torch.arange(8.0, dtype=h.dtype), 0),
        (lambda h: h * torch.full((8,), 3.0, dtype=h.dtype), 8),
        (lambda h: h[:, torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])], 0),
        (lambda h: h.sort(-1).values, 8),
        (lambda h: h - h.amax(-1, keepdim=True), 8),
        (lambda h: h / (1 + h.norm(dim=-1, keepdim=True)), 8),
        (lambda h: h.softmax(-1), 8),
        (lambda h: F.pad(h[:, :4], (0, 4)), 4),
        (lambda h: torch.cat([h[:, 4:], h[:, :4]], -1), 4),
        (lambda h: h.view(-1, 2, 4).sum(1).repeat(1, 2), 4),
    ],
    ids=range(13),
)
def test_what_lies_between(middle: Any, size: int) -> None:
    """Where order matters the units stay, and the layer after it still moves."""
    module = shaken(Between(middle))
    spec = derive(module, 3 * torch.randn(16, 4))
    assert "b" in spec.groups
    mine = [g.size for n, g in spec.groups.items() if n != "b"]
    assert size in (mine or [0])
    assert gap(module, spec) < 1e-8


def test_what_leaves_pytorch_is_refused_by_name() -> None:
    module = Between(lambda h: torch.from_numpy(np.cumsum(h.numpy(), -1)))
    with pytest.raises(Unproven, match=r"units of a\b.*outside of PyTorch"):
        derive(module, torch.randn(3, 4))


def test_a_random_forward_is_refused() -> None:
    module = Between(lambda h: h + torch.rand_like(h))
    with pytest.raises(Unproven, match="other outputs for the same input"):
        derive(module, torch.randn(3, 4))


def test_an_output_that_does_not_react_proves_nothing() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.relu(self.a(x))).mul(0) + 1
            return out

    with pytest.raises(Unproven, match="does not react"):
        derive(Deaf(), torch.randn(3, 4))


def test_a_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof is no formality: with a false rule for cumsum it names the layer."""
    monkeypatch.setitem(rules.RULES, "cumsum", rules.pointwise)
    with pytest.raises(Unproven, match=r"units of a changes"):
        derive(Between(lambda h: h.cumsum(-1)), torch.randn(3, 4))


class Argmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


def test_forward_that_fails() -> None:
    with pytest.raises(BadParameter, match=r"fails on the example of shape \(3, 5\)"):
        derive(Between(lambda h: h), torch.randn(3, 5))
    with pytest.raises(BadParameter, match="no floating-point tensor"):
        derive(nn.Sequential(nn.Linear(4, 2), Argmax()), torch.randn(3, 4))


def test_the_network_is_left_as_it_was() -> None:
    module = models.build("resnet8", (3, 32, 32), 10).train()
    before = snapshot(module)
    derive(module, IMAGE)
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_parameters_that_are_not_read_are_refused_or_held() -> None:
    """Another task's head would see reordered units without knowing."""
    module = Between(lambda h: h)
    module.register_parameter("spare", nn.Parameter(torch.randn(9, 9)))
    with pytest.raises(BadParameter, match=r"does not read spare.*unread=\"hold\""):
        derive(module, torch.randn(3, 4))
    spec = derive(module, torch.randn(3, 4), unread="hold")
    assert "spare" not in spec.axes and "does not read it" in spec.held["spare"]


class Answers(nn.Module):
    """Several outputs, one of them called logits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.boxes, self.labels = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.a(x))
        kind = namedtuple("kind", "logits boxes")
        return {"kind": kind(self.labels(h), [self.boxes(h)]), "past_key_values": (h,)}


def test_every_output_counts() -> None:
    """Not only the logits; but what a network hands on to itself is no output."""
    module = shaken(Answers())
    spec = derive(module, torch.randn(3, 4))
    assert list(spec.groups) == ["a"]
    assert gap(module, spec) < 1e-8


def test_named_arguments() -> None:
    module = Between(lambda h: h)
    spec = derive(module, {"x": torch.randn(3, 4)})
    assert len(spec.groups) == 2
    theta = snapshot(module)
    check_equal(module, theta, spec.permute(theta, spec.random(Key("x").generator())), spec)


class Masked(nn.Module):
    """A mask of minus infinity, and one of zeros and ones, as buffers."""

    keep: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.5)
        self.head = nn.Linear(8, 2)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))
        self.register_buffer("keep", torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x, src_mask=self.mask) * self.keep[:, None]
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (Masked(), torch.randn(2, 5, 8)),
        (Between(lambda h: h, 4), torch.rand(3, 4).add(0.1)),
    ],
    ids=["masks", "logarithm"],
)
def test_what_must_not_be_shaken(module: nn.Module, example: Tensor) -> None:
    if isinstance(module, Between):
        module = nn.Sequential(Log(), module)
    spec = derive(module, example)
    assert spec.groups and not spec.held


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert bool((x > 0).all())
        return x.log()


def test_a_branch_on_the_data_is_noted() -> None:
    module = Between(lambda h: h.cumsum(-1) if bool((h > 1e6).any()) else h)
    spec = derive(module, torch.randn(3, 4))
    assert len(spec.groups) == 2
    assert "reads a number out of its data" in spec.notes[0] and "note:" in str(spec)


@pytest.mark.parametrize(
    ("middle", "size"),
    [
        (nn.Hardswish(), 8),
        (nn.LogSigmoid(), 8),
        (nn.GLU(), 4),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), 8),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), 8),
        (nn.RReLU(), 8),
    ],
    ids=["hardswish", "logsigmoid", "glu", "weight norm", "spectral norm", "rrelu"],
)
def test_more_of_torch_nn(middle: nn.Module, size: int) -> None:
    out = nn.Linear(4 if isinstance(middle, nn.GLU) else 8, 2)
    module = nn.Sequential(nn.Linear(4, 8), middle, nn.Tanh(), out)
    spec = derive(module, torch.randn(3, 4))
    assert size in [g.size for g in spec.groups.values()]
    assert gap(module, spec) < 1e-8


def test_pixel_shuffle_moves_blocks_of_channels() -> None:
    module = nn.Sequential(nn.Conv2d(3, 20, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(5, 2, 3))
    spec = derive(module, IMAGE)
    assert [g.size for g in spec.groups.values()] == [5]
    assert blocks(spec, "0.weight")[0] == [("0", 4)]
    assert gap(module, spec) < 1e-8


def test_networks_without_weights_to_look_at() -> None:
    with pytest.raises(BadParameter, match="meta device"):
        derive(nn.Linear(3, 2, device="meta"), torch.randn(1, 3))
    with pytest.raises(BadParameter, match="lazy layers"):
        derive(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), torch.randn(1, 3))


def test_a_site_holds_still_on_its_other_axes() -> None:
    """A mixing layer: units of tokens and of channels move; no site has both."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.tokens = nn.Linear(5, 6), nn.Linear(4, 7)
            self.back, self.head = nn.Linear(7, 4), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.embed(x))
            y = torch.relu(self.tokens(x.transpose(1, 2)))
            out: Tensor = self.head((x + self.back(y).transpose(1, 2)).mean(1))
            return out

    module = shaken(Mixer())
    spec = derive(module, torch.randn(3, 4, 5))
    assert set(spec.groups) == {"embed", "tokens"}
    assert "tokens" not in spec.sites, "wherever its units are, those of embed move too"
    theta = snapshot(module)
    perms = spec.random(Key("mix").generator())
    moved = spec.permute(theta, spec.inverse(perms))
    found = activation_matching(spec, module, theta, moved, torch.randn(50, 4, 5))
    assert torch.equal(found.perms["embed"], perms["embed"])
    assert found.details is not None and found.details["no site"] == ["tokens"]


def test_lstm_activations_are_found_in_float32() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.say = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.say(self.lstm(x)[0][:, -1])
            return out

    module = shaken(Net())
    spec = derive(module, torch.randn(2, 3, 4))
    perms = spec.random(Key("lstm").generator())
    theta = snapshot(module)
    moved = spec.permute(theta, spec.inverse(perms))
    found = activation_matching(spec, module, theta, moved, torch.randn(60, 3, 4))
    assert all(torch.equal(found.perms[g], perms[g]) for g in spec.groups)


def test_half_precision_inside_is_proven_as_far_as_it_reaches() -> None:
    spec = derive(Between(lambda h: h.float().double()), torch.randn(3, 4))
    assert spec.tolerance == 1e-4 and len(spec.groups) == 2


def test_check_equal_sees_a_permutation_that_is_none() -> None:
    module = Between(lambda h: h)
    spec = derive(module, torch.randn(3, 4))
    theta = snapshot(module)
    right = spec.permute(theta, spec.random(Key("x").generator()))
    assert check_equal(module, theta, right, spec) < 1e-8
    wrong = {**right, "a.bias": theta["a.bias"]}
    with pytest.raises(Unproven, match="not the same function"):
        check_equal(module, theta, wrong, spec)


STEPS = ("linear", "relu", "norm", "residual", "concat", "gate", "split", "heads", "tied")


class Grown(nn.Module):
    """A network of random pieces."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps, width = steps, 4
        layers: list[nn.Module] = []
        for step in steps:
            if step in ("linear", "split"):
                new = 12 if step == "linear" else width
                layers.append(nn.Linear(width, new))
                width = new
            elif step == "concat":
                layers.append(nn.Linear(width, 4))
                width += 4
            elif step == "norm":
                layers.append(nn.LayerNorm(width))
            elif step in ("residual", "gate", "tied"):
                layers.append(nn.Linear(width, width))
            elif step == "heads":
                layers.append(nn.Linear(width, 12))
                width = 12
            else:
                layers.append(nn.Identity())
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for step, layer in zip(self.steps, self.layers, strict=True):
            if step == "relu":
                x = torch.relu(x)
            elif step == "residual":
                x = x + torch.tanh(layer(x))
            elif step == "concat":
                x = torch.cat([x, layer(x)], dim=-1)
            elif step == "gate":
                x = x * torch.sigmoid(layer(x))
            elif step == "split":
                y = layer(x)
                half = y.shape[-1] // 2
                x = torch.cat([torch.tanh(y[:, half:]), y[:, :half].relu()], dim=-1)
            elif step == "heads":
                y = layer(x).view(len(x), 3, 4)
                x = ((y @ y.transpose(1, 2)).softmax(-1) @ y).reshape(len(x), 12)
            elif step == "tied":
                x = torch.tanh(layer(torch.tanh(layer(x))))
            else:
                x = layer(x)
        out: Tensor = self.head(x)
        return out


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=6), st.integers(0, 99))
def test_any_composition_is_proven(steps: list[str], seed: int) -> None:
    with Key("grown", seed).seeded():
        module = Grown(steps)
    spec = derive(module, torch.randn(3, 4, generator=Key("grown").generator()))
    assert gap(shaken(module), spec, seed) < 1e-8
    if "linear" in steps:
        assert spec.groups, "a plain hidden layer can always be permuted"
