# ruff: noqa: E501 - the grammar is a table
"""Networks drawn from a grammar of layers: their specs hold, and what was permuted comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rebasin_derive import gap, shaken
from torch import Tensor, nn
from torch.nn import functional as F

from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.rebasin import derive, weight_matching

W = 8
"""Units of every hidden layer. Images are (N, W, 6, 6), sequences (N, 4, W), tables (N, W)."""


class Step(nn.Module):
    """One production: layers, and how they are used. Keeps the shape of what goes through."""

    def __init__(self, use: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.use, self.layers = use, nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, *self.layers.values())


def lin(a: int = W, b: int = W) -> nn.Module:
    return nn.Linear(a, b)


def conv(a: int = W, b: int = W, k: int = 1, **options: Any) -> nn.Module:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


def attend(x: Tensor, layers: Sequence[nn.Module], heads: int) -> Tensor:
    q, k, v, o = layers
    n, t, _ = x.shape
    queries = q(x).view(n, t, 4, 2).transpose(1, 2)
    keys, values = (f(x).view(n, t, heads, 2).transpose(1, 2) for f in (k, v))
    y = F.scaled_dot_product_attention(queries, keys, values, enable_gqa=heads < 4)
    return x + o(y.transpose(1, 2).reshape(n, t, W))


def fused(x: Tensor, qkv: nn.Module, o: nn.Module) -> Tensor:
    n, t, _ = x.shape
    q, k, v = qkv(x).view(n, t, 4, 6).transpose(1, 2).chunk(3, -1)
    return x + o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, W))


def several(kind: str, layers: int, both: bool) -> nn.Module:
    return getattr(nn, kind)(W, W // (1 + both), layers, batch_first=True, bidirectional=both)


ANYWHERE: dict[str, Callable[[], Step]] = {
    "relu": lambda: Step(lambda x: torch.relu(x) + 0.1 * x),
    "gelu": lambda: Step(F.gelu),
}
FLAT: dict[str, Callable[[], Step]] = {
    "linear": lambda: Step(lambda x, f: torch.tanh(f(x)), f=lin()),
    "wide": lambda: Step(lambda x, f, g: g(torch.relu(f(x))), f=lin(W, 12), g=lin(12, W)),
    "residual": lambda: Step(lambda x, f: x + torch.tanh(f(x)), f=lin()),
    "gate": lambda: Step(lambda x, f: x * torch.sigmoid(f(x)), f=lin()),
    "glu": lambda: Step(lambda x, f: F.glu(f(x)), f=lin(W, 2 * W)),
    "concat": lambda: Step(
        lambda x, f, g: g(torch.cat([x, torch.tanh(f(x))], -1)), f=lin(W, 5), g=lin(W + 5, W)
    ),
    "parts": lambda: Step(
        lambda x, f, g: g(torch.cat([y.relu() for y in f(x).split([5, 7], -1)][::-1], -1)),
        f=lin(W, 12), g=lin(12, W),
    ),
    "layer norm": lambda: Step(lambda x, f: f(x), f=nn.LayerNorm(W)),
    "blocks": lambda: Step(
        lambda x, f, g: g((f(x).unflatten(-1, (4, 3)) ** 2).sum(-1)), f=lin(W, 12), g=lin(4, W)
    ),
    "turned": lambda: Step(
        lambda x, f, g: g(f(x).unflatten(-1, (4, 3)).transpose(-1, -2).flatten(-2)),
        f=lin(W, 12), g=lin(12, W),
    ),
    "tied": lambda: Step(lambda x, f: torch.tanh(f(torch.tanh(f(x)))), f=lin()),
    "stacked": lambda: Step(
        lambda x, f, g, h: h(torch.stack([f(x), g(x)], -2).tanh().flatten(-2)),
        f=lin(), g=lin(), h=lin(2 * W, W),
    ),
    "sum over heads": lambda: Step(
        lambda x, f, g: g(f(x).unflatten(-1, (3, 4)).softmax(-2).sum(-1)), f=lin(W, 12), g=lin(3, W)
    ),
}  # fmt: skip
GRAMMAR: dict[str, dict[str, Callable[[], Step]]] = {
    "table": {**ANYWHERE, **FLAT},
    "sequence": {
        **ANYWHERE, **FLAT,
        "attention": lambda: Step(lambda x, *f: attend(x, f, 4), q=lin(), k=lin(), v=lin(), o=lin()),
        "shared keys": lambda: Step(
            lambda x, *f: attend(x, f, 2), q=lin(), k=lin(W, 4), v=lin(W, 4), o=lin()
        ),
        "fused": lambda: Step(fused, f=lin(W, 24), o=lin()),
        "lstm": lambda: Step(lambda x, f: f(x)[0], f=several("LSTM", 1, False)),
        "gru": lambda: Step(lambda x, f: f(x)[0], f=several("GRU", 2, False)),
        "rnn": lambda: Step(lambda x, f: f(x)[0], f=several("RNN", 2, True)),
        "conv": lambda: Step(
            lambda x, f: x + f(x.transpose(1, 2)).transpose(1, 2), f=nn.Conv1d(W, W, 3, padding=1)
        ),
        "mha": lambda: Step(lambda x, f: x + f(x, x, x)[0], f=nn.MultiheadAttention(W, 2, batch_first=True)),
    },
    "image": {
        **ANYWHERE,
        "conv": lambda: Step(lambda x, f: torch.tanh(f(x)), f=conv(k=3)),
        "residual": lambda: Step(lambda x, f, g: x + g(torch.relu(f(x))), f=conv(), g=conv()),
        "bottleneck": lambda: Step(lambda x, f, g: g(F.silu(f(x))), f=conv(W, 6), g=conv(6, W)),
        "concat": lambda: Step(lambda x, f, g: g(torch.cat([x, f(x)], 1)), f=conv(W, 4), g=conv(12, W)),
        "depth-wise": lambda: Step(lambda x, f: f(x), f=conv(k=3, groups=W)),
        "grouped": lambda: Step(lambda x, f: f(x), f=conv(groups=2)),
        "transposed": lambda: Step(lambda x, f: f(x)[..., :6, :6], f=nn.ConvTranspose2d(W, W, 2)),
        "batch norm": lambda: Step(lambda x, f: f(x), f=nn.BatchNorm2d(W)),
        "group norm": lambda: Step(lambda x, f: f(x), f=nn.GroupNorm(2, W)),
        "norm of both": lambda: Step(
            lambda x, f, g, h: h(g(torch.cat([x, f(x)], 1))), f=conv(), g=nn.GroupNorm(4, 2 * W), h=conv(2 * W, W)
        ),
        "shuffle": lambda: Step(lambda x: F.channel_shuffle(x, 2)),
        "pixels": lambda: Step(lambda x, f: f(F.pixel_unshuffle(F.interpolate(x, scale_factor=2), 2)), f=conv(4 * W, W)),
        "up": lambda: Step(lambda x: F.max_pool2d(F.interpolate(x, scale_factor=2, mode="bilinear"), 2)),
        "squeeze": lambda: Step(lambda x, f: x * f(x.mean((2, 3), keepdim=True)).sigmoid(), f=conv()),
    },
}  # fmt: skip


class Drawn(nn.Module):
    def __init__(self, kind: str, names: list[str]) -> None:
        super().__init__()
        image = kind == "image"
        self.inside = nn.Conv2d(3, W, 1) if image else nn.Linear(5, W)
        self.steps = nn.ModuleList(GRAMMAR[kind][name]() for name in names)
        self.out = nn.Linear(W * 36 if image else W, 3)
        self.image = image

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        for step in self.steps:
            x = step(x)
        out: Tensor = self.out(x.flatten(1) if self.image else x)
        return out


EXAMPLES = {"table": (6, 5), "sequence": (3, 4, 5), "image": (2, 3, 6, 6)}
sentences = st.sampled_from(sorted(GRAMMAR)).flatmap(
    lambda kind: st.tuples(
        st.just(kind), st.lists(st.sampled_from(sorted(GRAMMAR[kind])), min_size=1, max_size=5)
    )
)


def holds_and_comes_back(kind: str, names: list[str], seed: int) -> None:
    with Key("drawn", seed).seeded():
        module = Drawn(kind, names)
        example = torch.randn(EXAMPLES[kind])
    spec = derive(module, example)
    shaken(module)
    assert gap(module, spec, seed) < 1e-8
    assert spec.groups, f"the layers' units can move; {spec.held}"
    assert not any("no rule" in why for why in spec.held.values())
    a = snapshot(module)
    b = spec.permute(a, spec.random(Key("drawn", seed).generator()))
    found = weight_matching(spec, a, b, starts=8)
    c = found.apply(module, b)
    # Or an optimum that is as good: weights whose units cannot be told apart.
    assert all(torch.equal(a[k], c[k]) for k in a) or found.share > 1 - 1e-12, (
        f"{found.share:.4f} of the bound; {spec}"
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sentences, st.integers(0, 99))
def test_networks_of_a_grammar(sentence: tuple[str, list[str]], seed: int) -> None:
    holds_and_comes_back(*sentence, seed)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(sentences, st.integers(0, 9999))
def test_many_networks_of_a_grammar(sentence: tuple[str, list[str]], seed: int) -> None:
    holds_and_comes_back(*sentence, seed)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, steps in GRAMMAR.items() for name in steps]
)
def test_each_production_alone(kind: str, name: str) -> None:
    holds_and_comes_back(kind, [name], 0)
