"""Symmetries of the layers that people use: what theory says can move is found, and comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rebasin_derive import gap, shaken
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.rebasin import Matching, Spec, activation_matching, derive, weight_matching
from companion.rebasin.derive import _derived
from companion.rebasin.proof import Chaotic

IMAGE = torch.randn(2, 3, 8, 8, generator=Key("symmetries").generator())


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with Key("symmetries").seeded():
        yield


def comes_back(module: nn.Module, spec: Spec) -> bool:
    """True if units put into a random order are found again, all of them."""
    a = snapshot(module)
    b = spec.permute(a, spec.random(Key("planted").generator()))
    assert gap(module, spec) < 10 * spec.tolerance
    c = weight_matching(spec, a, b, starts=5).apply(module, b)
    return all(torch.equal(a[k], c[k]) for k in a)


class Sequences(nn.Module):
    """A recurrent network that reads out every step."""

    def __init__(self, kind: str, packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(5, 8, **options)
        width = options.get("proj_size") or 8
        self.out = nn.Linear(width * (1 + bool(options.get("bidirectional"))), 3)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([6, 4, 3])
        y, _ = self.rnn(pack_padded_sequence(x, lengths) if self.packed else x)
        out: Tensor = self.out(pad_packed_sequence(y)[0] if self.packed else y)
        return out


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [8]),
        ({"num_layers": 3}, [8, 8, 8]),
        ({"num_layers": 2, "bidirectional": True, "batch_first": True}, [8] * 4),
        ({"num_layers": 2, "bidirectional": True, "packed": True}, [8] * 4),
        ({"num_layers": 2, "bias": False}, [8, 8]),
    ],
    ids=str,
)
def test_recurrent_layers(kind: str, options: dict[str, Any], sizes: list[int]) -> None:
    """A group for each layer and direction: equal initial states tie nothing."""
    module = shaken(Sequences(kind, **options))
    spec = derive(module, torch.randn(6, 3, 5))
    assert [g.size for g in spec.groups.values()] == sizes
    assert not spec.held
    assert comes_back(module, spec)


def test_projections_of_an_lstm_have_units_of_their_own() -> None:
    module = shaken(Sequences("LSTM", num_layers=2, proj_size=4))
    spec = derive(module, torch.randn(6, 3, 5))
    assert sorted(g.size for g in spec.groups.values()) == [4, 4, 8, 8]
    assert comes_back(module, spec)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_loop_of_ones_own(cell: Any) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = cell(5, 7), cell(7, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            state, other = None, None
            for step in x:
                state = self.one(step, state)
                h = state[0] if isinstance(state, tuple) else state
                other = self.two(h, other)
            out: Tensor = self.out(other[0] if isinstance(other, tuple) else other)
            return out

    module = shaken(Loop())
    spec = derive(module, torch.randn(4, 3, 5))
    assert sorted(g.size for g in spec.groups.values()) == [6, 7]
    assert comes_back(module, spec)


class Concatenated(nn.Module):
    def __init__(self, norm: nn.Module, *widths: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(3, w, 3, padding=1) for w in widths)
        self.norm, self.out = norm, nn.Conv2d(sum(widths), 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([part(x) for part in self.parts], 1)
        out: Tensor = self.out(F.relu(self.norm(both)))
        return out


@pytest.mark.parametrize(
    ("groups", "widths", "sizes"),
    [
        (4, (8, 8), [2, 4, 2, 4]),
        (6, (8, 4, 12), [2, 4, 4, 3, 4]),
        (4, (4, 12), [4, 3, 4]),
        # One group on the seam: its channels stay in their part, in any order there.
        (4, (6, 10), [4, 2, 2, 2, 4]),
        (1, (6, 10), [6, 10]),
    ],
    ids=str,
)
def test_group_norm_over_a_concatenation(
    groups: int, widths: tuple[int, ...], sizes: list[int]
) -> None:
    module = shaken(Concatenated(nn.GroupNorm(groups, sum(widths)), *widths))
    spec = derive(module, IMAGE)
    assert sorted(g.size for g in spec.groups.values()) == sorted(sizes)
    assert not spec.held
    assert comes_back(module, spec)


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Conv2d(8, 12, 3, groups=4), [2, 3, 4]),
        (nn.ConvTranspose2d(8, 12, 3, groups=4), [2, 3, 4]),
        (nn.Conv2d(8, 24, 3, groups=8), [3, 8]),
        (nn.Conv2d(8, 8, 3, groups=8), [8]),
        (nn.ConvTranspose2d(8, 8, 2, 2, groups=8), [8]),
        (nn.ConvTranspose2d(8, 16, 2, 2, groups=8, bias=False), [2, 8]),
    ],
    ids=str,
)
def test_grouped_convolutions(layer: nn.Module, sizes: list[int]) -> None:
    """Groups in any order; in each of them what it reads, and what it makes."""
    made = int(getattr(layer, "out_channels", 0))
    module = shaken(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), layer, nn.Tanh(), nn.Conv2d(made, 2, 1))
    )
    spec = derive(module, IMAGE)
    assert sorted(g.size for g in spec.groups.values()) == sizes
    assert not spec.held
    assert comes_back(module, spec)


class GroupedQueries(nn.Module):
    """Attention in which several query heads share keys and values."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.inside = style, nn.Linear(5, 12)
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 8), nn.Linear(12, 8)
        self.o, self.out = nn.Linear(24, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inside(x))
        n, t, _ = x.shape
        k, v = (f(x).view(n, t, 2, 4).transpose(1, 2) for f in (self.k, self.v))
        if self.style == "groups":
            q = self.q(x).view(n, t, 2, 3, 4)
            score = torch.einsum("ntghd,ngsd->nghts", q, k).softmax(-1)
            y = torch.einsum("nghts,ngsd->ntghd", score, v)
        else:
            q = self.q(x).view(n, t, 6, 4).transpose(1, 2)
            if self.style == "expand":
                k, v = (z[:, :, None].expand(n, 2, 3, t, 4).reshape(n, 6, t, 4) for z in (k, v))
            if self.style == "repeat":
                k, v = (z.repeat_interleave(3, 1) for z in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.style == "sdpa")
            y = y.transpose(1, 2)
        x = x + self.o(y.reshape(n, t, 24))
        out: Tensor = self.out(x.mean(1))
        return out


@pytest.mark.parametrize("style", ["expand", "repeat", "sdpa", "groups"])
def test_grouped_query_attention(style: str) -> None:
    """Groups of queries, the heads in each, units of queries and keys, units of values."""
    module = shaken(GroupedQueries(style))
    spec = derive(module, torch.randn(2, 4, 5))
    inner = sorted(g.size for g in spec.groups.values() if g.within)
    assert inner == [3, 4, 4] and not spec.held
    assert sorted(g.size for g in spec.groups.values() if not g.within) == [2, 12]
    assert comes_back(module, spec)


class FusedHeads(nn.Module):
    """Queries, keys and values that alternate from head to head, as in GPT-NeoX and BLOOM."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.inside, self.qkv = style, nn.Linear(5, 12), nn.Linear(12, 36)
        self.o, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inside(x))
        n, t, _ = x.shape
        y = self.qkv(x)
        if self.style == "chunk":
            q, k, v = y.view(n, t, 3, 12).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = (y.view(n, t, 3, 3, 4)[..., i, :].transpose(1, 2) for i in range(3))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 12)
        out: Tensor = self.out((x + self.o(y)).mean(1))
        return out


@pytest.mark.parametrize("style", ["chunk", "rows"])
def test_fused_projections_that_alternate(style: str) -> None:
    module = shaken(FusedHeads(style))
    spec = derive(module, torch.randn(2, 4, 5))
    assert sorted(g.size for g in spec.groups.values()) == [3, 4, 4, 12]
    assert not spec.held and spec.views
    assert comes_back(module, spec)


class Experts(nn.Module):
    """Experts stacked in tensors, run in many ways."""

    def __init__(self, style: str, bias: bool) -> None:
        super().__init__()
        self.style = style
        self.inside, self.gate, self.out = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 2)
        self.up, self.down = nn.Parameter(torch.randn(4, 14, 5)), nn.Parameter(torch.randn(4, 5, 7))
        self.shift = nn.Parameter(torch.randn(4, 14)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inside(x))
        scores = self.gate(x).softmax(-1)
        if self.style == "all":
            h = torch.einsum("nd,ehd->neh", x, self.up)
            h = self.gated(h if self.shift is None else h + self.shift)
            y = torch.einsum("neh,edh,ne->nd", h, self.down, scores)
        elif self.style == "some":
            weight, chosen = scores.topk(2, -1)
            y = torch.zeros_like(x)
            for e in range(4):
                rows, at = torch.where(chosen == e)
                h = x[rows] @ self.up[e].T
                h = self.gated(h if self.shift is None else h + self.shift[e])
                y = y.index_add(0, rows, (h @ self.down[e].T) * weight[rows, at][:, None])
        elif self.style == "one":  # a switch: rows of one expert
            weight, chosen = scores.max(-1)
            h = torch.bmm(self.up.index_select(0, chosen), x[:, :, None])[:, :, 0]
            h = self.gated(h if self.shift is None else h + self.shift.index_select(0, chosen))
            y = torch.bmm(self.down.index_select(0, chosen), h[:, :, None])[:, :, 0]
            y = y * weight[:, None]
        elif self.style in ("one-hot", "scattered", "picked", "rows chosen"):
            y = self.everywhere(x, scores)
        else:
            weight, chosen = scores.topk(2, -1)
            at = chosen.flatten()
            h = torch.bmm(self.up[at], x.repeat_interleave(2, 0)[:, :, None])[:, :, 0]
            h = self.gated(h if self.shift is None else h + self.shift[at])
            y = torch.bmm(self.down[at], h[:, :, None])[:, :, 0] * weight.flatten()[:, None]
            y = y.view(-1, 2, 5).sum(1)
        out: Tensor = self.out(x + y)
        return out

    def everywhere(self, x: Tensor, scores: Tensor) -> Tensor:
        """All experts on all rows, or on the rows that each of them chooses."""
        rows = x.expand(4, -1, -1)
        if self.style == "rows chosen":
            weight, at = scores.T.topk(3, -1)
            rows = x[at]
        h = torch.bmm(rows, self.up.mT)
        h = self.gated(h if self.shift is None else h + self.shift[:, None])
        made = torch.bmm(h, self.down.mT)
        if self.style == "rows chosen":
            made = (made * weight[..., None]).flatten(0, 1)
            return torch.zeros_like(x).index_add(0, at.flatten(), made)
        if self.style == "picked":
            weight, chosen = scores.max(-1)
            return made[chosen, torch.arange(len(x))] * weight[:, None]
        if self.style == "one-hot":
            gates = F.one_hot(scores.argmax(-1), 4).to(x)
        else:
            weight, chosen = (scores + self.gate.bias).topk(2, -1)
            gates = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        return torch.einsum("end,ne->nd", made, gates)

    def gated(self, h: Tensor) -> Tensor:
        gates, units = h.chunk(2, -1)
        return gates.sigmoid() * units


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "style", ["all", "some", "rows", "one", "one-hot", "scattered", "picked", "rows chosen"]
)
def test_stacked_experts(style: str, bias: bool) -> None:
    """The order of experts, and an order of its units for each of them."""
    module = Experts(style, bias)
    spec = derive(module, torch.randn(9, 3))
    (experts,) = (g for g in spec.groups.values() if g.size == 4)
    (inner,) = (g for g in spec.groups.values() if g.within)
    assert inner.size == 7 and inner.within == experts.name
    assert not spec.held
    assert comes_back(module, spec)


def test_an_expert_that_was_not_run_stays() -> None:
    """Layers stacked in one tensor, of which the example runs two: the third is not known."""

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 6, 6))
            self.v = nn.Parameter(torch.randn(3, 6, 6))
            self.inside, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inside(x)
            for i in range(2):
                x = x + torch.tanh(x @ self.w[i]) @ self.v[i]
            out: Tensor = self.out(x)
            return out

    module = shaken(Stacked())
    spec = derive(module, torch.randn(5, 4))
    assert sorted(g.size for g in spec.groups.values()) == [6, 6, 6]
    assert "not run on the example" in " ".join(spec.held.values())
    a = snapshot(module)
    b = spec.permute(a, spec.random(Key("x").generator()))
    assert torch.equal(a["w"][2], b["w"][2]) and not torch.equal(a["w"][1], b["w"][1])


class Between(nn.Module):
    def __init__(
        self, before: nn.Module, middle: Callable[[Tensor], Tensor], after: nn.Module
    ) -> None:
        super().__init__()
        self.before, self.middle, self.after = before, middle, after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(torch.tanh(self.middle(torch.relu(self.before(x)))))
        return out


def resized(mode: str, **how: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, scale_factor=2, mode=mode, **how)


def unpooled(dims: int) -> Callable[[Tensor], Tensor]:
    def middle(x: Tensor) -> Tensor:
        y, at = getattr(F, f"max_pool{dims}d")(x, 2, return_indices=True)
        out: Tensor = getattr(F, f"max_unpool{dims}d")(y, at, 2)
        return out

    return middle


ROWS = torch.tensor([2, 0, 1])
PLACES = ROWS[:, None].expand(3, 8)
SIGNAL, VOLUME, TABLE = torch.randn(3, 3, 16), torch.randn(2, 1, 6, 6, 6), torch.randn(3, 5)
GRID = torch.rand(2, 4, 4, 2, dtype=torch.float64)
CARRIED: dict[str, tuple[int, Any, int]] = {
    "nearest 1d": (1, resized("nearest"), 8),
    "nearest-exact 1d": (1, resized("nearest-exact"), 8),
    "linear": (1, resized("linear"), 8),
    "unpool 1d": (1, unpooled(1), 8),
    "circular": (1, lambda x: F.pad(x, (1, 1), mode="circular"), 8),
    "reflect": (1, lambda x: F.pad(x, (1, 1), mode="reflect"), 8),
    "windows": (1, lambda x: x.unfold(2, 3, 2).mean(-1), 8),
    "spectrum": (1, lambda x: torch.fft.irfft(torch.fft.rfft(x)), 8),
    "rolled": (1, lambda x: x.roll(2, -1).flip(-1), 8),
    "running sum": (1, lambda x: x.cumsum(-1), 8),
    "gather": (1, lambda x: x.gather(2, torch.tensor([3, 1]).expand(3, 8, 2)), 8),
    "nearest": (2, resized("nearest"), 8),
    "nearest-exact": (2, resized("nearest-exact"), 8),
    "bilinear": (2, resized("bilinear", align_corners=True), 8),
    "bilinear antialias": (2, resized("bilinear", antialias=True), 8),
    "bicubic": (2, resized("bicubic"), 8),
    "bicubic antialias": (2, resized("bicubic", antialias=True), 8),
    "area": (2, lambda x: F.interpolate(x, size=(3, 3), mode="area"), 8),
    "pixel shuffle": (2, nn.PixelShuffle(2), 2),
    "pixel unshuffle": (2, nn.PixelUnshuffle(2), 32),
    "channel shuffle": (2, nn.ChannelShuffle(2), 8),
    "unpool": (2, unpooled(2), 8),
    "unfold and fold": (2, lambda x: F.fold(F.unfold(x, 3), x.shape[-2:], 3), 8),
    "grid": (2, lambda x: F.grid_sample(x, GRID.to(x), align_corners=False), 8),
    "rotated": (2, lambda x: x.rot90(1, (2, 3)), 8),
    "adaptive": (2, nn.AdaptiveMaxPool2d(2), 8),
    "lp pool": (2, nn.LPPool2d(2, 2), 8),
    "trilinear": (3, resized("trilinear"), 8),
    "nearest 3d": (3, resized("nearest-exact"), 8),
    "unpool 3d": (3, unpooled(3), 8),
    "index_select": (0, lambda x: x.index_select(0, ROWS), 8),
    "rows": (0, lambda x: x[ROWS], 8),
    "mask": (0, lambda x: x[torch.tensor([True, False, True])], 8),
    "index_add": (0, lambda x: torch.zeros_like(x).index_add(0, ROWS, x[ROWS]), 8),
    "index_copy": (0, lambda x: torch.zeros_like(x).index_copy(0, ROWS, x), 8),
    "index_put": (0, lambda x: torch.zeros_like(x).index_put((ROWS,), x, accumulate=True), 8),
    "scatter": (0, lambda x: torch.zeros_like(x).scatter(0, PLACES, x), 8),
    "scatter_add": (0, lambda x: torch.zeros_like(x).scatter_add(0, PLACES, x), 8),
    "scatter_reduce": (0, lambda x: x.scatter_reduce(0, PLACES, x, "amax"), 8),
    "repeat": (0, lambda x: x.repeat_interleave(torch.tensor([2, 1, 1]), 0), 8),
    "stack": (0, lambda x: torch.stack([x, -x], 1).flatten(0, 1), 8),
    "assigned": (0, lambda x: _assigned(x), 8),
    "narrow": (0, lambda x: x.narrow(1, 2, 6), 6),
    "pairs": (0, lambda x: torch.cat([x, x[:, ::2] * x[:, 1::2]], 1)[:, 4:], 8),
    "tile": (0, lambda x: x.tile(2, 1), 8),
    "distances": (0, lambda x: torch.cat([x, torch.cdist(x, x)], 1)[:, :8], 8),
    "sorted rows": (0, lambda x: x.sort(0).values, 8),
    "median": (0, lambda x: x - x.median(1, keepdim=True).values, 8),
    "largest": (0, lambda x: x - x.topk(2, 1).values.sum(1, keepdim=True), 8),
    "maximum": (0, lambda x: x - x.max(1, keepdim=True).values, 8),
    "normalised": (0, lambda x: F.normalize(x, dim=1), 8),
    "einsum": (0, lambda x: torch.einsum("nc,mc,md->nd", x, x, x), 8),
}


def _assigned(x: Tensor) -> Tensor:
    out = torch.zeros(4, 8).to(x)
    for i, row in enumerate(x):
        out[i] = row
    out[3] = x.sum(0)
    return out


@pytest.mark.parametrize("name", CARRIED)
def test_channels_go_along(name: str) -> None:
    dims, middle, width = CARRIED[name]
    layer = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d][dims]
    example = [TABLE, SIGNAL, IMAGE, VOLUME][dims]
    ends: Any = ((5, 8), (width, 2)) if dims == 0 else ((example.shape[1], 8, 1), (width, 2, 1))
    module = shaken(Between(layer(*ends[0]), middle, layer(*ends[1])))
    spec = derive(module, example)
    moved = sum(
        g.size * (spec.groups[g.within].size if g.within else 1) for g in spec.groups.values()
    )
    assert moved >= {"narrow": 6, "pixel shuffle": 2, "pairs": 4}.get(name, 8)
    if name not in ("narrow", "pairs"):
        assert not spec.held
    assert comes_back(module, spec)


def test_bags_and_bilinear_layers() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.pair = nn.EmbeddingBag(11, 6), nn.Bilinear(6, 6, 4)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bag(x)
            out: Tensor = self.out(torch.tanh(self.pair(y, y)))
            return out

    module = shaken(Bags())
    spec = derive(module, torch.arange(8).reshape(2, 4))
    assert [g.size for g in spec.groups.values()] == [6, 4] and not spec.held
    assert comes_back(module, spec)


def test_an_operation_without_a_rule_is_named() -> None:
    module = Between(nn.Linear(5, 4), lambda x: torch.linalg.matrix_exp(x), nn.Linear(4, 2))
    spec = derive(module, 0.1 * torch.randn(4, 5))
    assert not spec.groups
    assert "no rule for the operation linalg_matrix_exp" in spec.held["before.weight[0]"]


class Half(nn.Module):
    """Computes in float32 whatever comes, and takes nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("expected Float")
        return x * self.weight


def test_a_forward_that_takes_nothing_but_float32() -> None:
    module = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), Half(), nn.Linear(16, 2))
    spec = derive(module, TABLE)
    assert [g.size for g in spec.groups.values()] == [16]
    assert spec.tolerance == 1e-4 and "float32" in spec.notes[0]
    a = snapshot(module)
    b = spec.permute(a, spec.random(Key("planted").generator()))
    c = weight_matching(spec, a, b).apply(module, b)
    assert all(torch.equal(a[k], c[k]) for k in a)
    with pytest.raises(BadParameter, match="expected Float"):
        derive(nn.Sequential(nn.Linear(5, 16), Half(), nn.Linear(15, 2)), TABLE)


def test_units_that_alternate_are_found_by_their_activations() -> None:
    module = shaken(FusedHeads("chunk"))
    spec = derive(module, torch.randn(2, 4, 5))
    a = snapshot(module)
    b = spec.permute(a, spec.random(Key("planted").generator()))
    c = activation_matching(spec, module, a, b, torch.randn(60, 4, 5)).apply(module, b)
    assert all(torch.equal(a[k], c[k]) for k in a)


def test_a_matching_of_alternating_units_is_kept_in_a_file(tmp_path: Path) -> None:
    module = shaken(FusedHeads("chunk"))
    spec = derive(module, torch.randn(2, 4, 5))
    a = snapshot(module)
    found = weight_matching(spec, a, spec.permute(a, spec.random(Key("x").generator())))
    found.save(tmp_path / "m.safetensors")
    again = Matching.load(tmp_path / "m.safetensors", derive(module, torch.randn(2, 4, 5)))
    assert all(torch.equal(p, again.perms[g]) for g, p in found.perms.items())
    with pytest.raises(BadParameter, match="other layers or sizes"):
        Matching.load(tmp_path / "m.safetensors", replace(spec, views={}))


def test_what_is_unknown_is_not_called_impossible() -> None:
    def net(middle: Callable[[Tensor], Tensor]) -> Spec:
        return derive(Between(nn.Linear(5, 4), middle, nn.Linear(4, 2)), 0.1 * torch.randn(4, 5))

    unknown, ordered = (
        net(torch.linalg.matrix_exp).why_none(),
        net(lambda x: x.cumsum(-1)).why_none(),
    )
    assert "no unit is known to move" in unknown and "linalg_matrix_exp" in unknown
    assert "no unit can be reordered" in ordered and "order is seen" in ordered
    alone = derive(nn.Sequential(nn.Linear(5, 2)), torch.randn(3, 5)).why_none()
    assert "no unit can be reordered" in alone and "the input or to the output" in alone


def test_noise_that_makes_a_network_chaotic_is_turned_down() -> None:
    """A map that doubles differences at every step: no proof with noise in the first weight."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out = nn.Linear(5, 6), nn.Linear(6, 2)
            self.times = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            x = self.inside(x)
            for _ in range(60):
                x = (1 + 30 * self.times) * torch.sin(3 * x * (1 + self.times))
            out: Tensor = self.out(x)
            return out

    module = Doubling()
    with torch.no_grad():
        module.times.fill_(-0.66)
    example = torch.randn(3, 5)
    with pytest.raises(Chaotic, match="rounding alone"):
        _derived(module, example, "refuse", nested=True, strength=1.0)
    assert [g.size for g in derive(module, example).groups.values()] == [6]


class Winners(nn.Module):
    """Units that are chosen by their size, and read or kept at the positions where they were."""

    def __init__(self, style: str):
        super().__init__()
        self.style = style
        self.inside, self.beside = nn.Linear(3, 8), nn.Linear(3, 8)
        self.out = nn.Linear(2 if style == "read beside" else 8, 2)
        self.codes = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(x)
        value, at = (self.beside(x) if "beside" in self.style else h).topk(2, 1)
        if self.style == "read beside":
            h = h.gather(1, at)
        elif self.style == "codes":
            h = self.codes[torch.cdist(h, self.codes).argmin(1)]
        elif self.style == "ranks":
            h = h + h.argsort(1).argsort(1)
        elif self.style == "picked alone":
            h = h + self.codes[h[0].argmax(0, keepdim=True)]
        else:
            h = torch.zeros_like(h).scatter(1, at, 1.0 if "beside" in self.style else value) * h
        out: Tensor = self.out(h)
        return out


@pytest.mark.parametrize(
    ("style", "sizes"),
    [
        *(("kept", [8]), ("kept beside", [8]), ("read beside", [8]), ("codes", [8, 8])),
        *(("picked alone", [8]), ("ranks", [])),
    ],
)
def test_units_at_positions_of_the_largest(style: str, sizes: list[int]) -> None:
    module = Winners(style)
    spec = derive(module, torch.randn(9, 3), unread="hold")
    assert sorted(g.size for g in spec.groups.values()) == sizes
    assert not sizes or comes_back(module, spec)
