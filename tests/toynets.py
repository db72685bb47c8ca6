"""Toy networks that read (N, 1, 8, 8) digits or tokens, and examples of any kind for them.

Each has what people write and named networks do not have: functional and in-place ReLUs, layers
that run twice, ties, attributes left behind. A network that is itself the case of one test, as
those in ``rebasin/test_rebasin_derive.py``, stands there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.core.seeds import Key


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and targets of any shape and type."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


class Tokens(nn.Module):
    """(N, L) integers to logits (N, L, K)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.relu, self.head = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.up(self.embed(x))))


def some_tokens() -> Examples:
    """20 windows of 5 tokens for :class:`Tokens`."""
    draw = Key("test", "tokens").generator()
    return Examples(*(torch.randint(11, (20, 5), generator=draw) for _ in range(2)))


class InPlace(nn.Module):
    """A ReLU in place, functional ones, a sum in place, and no module at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 12)
        self.norm = nn.BatchNorm1d(12)
        self.relu = nn.ReLU(inplace=True)
        self.inner = nn.ModuleList([Residual(), Residual()])
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x.flatten(1))))
        for block in self.inner:
            x = block(x)
        return F.log_softmax(self.head(x), 1)


class Residual(nn.Module):
    """A residual block with functional ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 12)
        self.two = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(F.relu(self.one(x)))
        y += x
        return y.relu_()


class Convolutional(nn.Module):
    """No ReLU module: functional ones, in place and not, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.twice = nn.Linear(6 * 16, 6 * 16)
        self.head = nn.Linear(6 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True)
        x = torch.relu(self.norm(self.grouped(x))).flatten(1)
        for _ in range(2):
            x = self.twice(x).relu()
        return self.head(x)


class CalledTwice(nn.Module):
    """In-place and functional ReLUs, a module called twice, an output that is no module's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x.flatten(1)))
        for _ in range(2):
            x = F.relu(self.twice(x), inplace=True) + x
        return 2 * self.head(x)


class TiedUnseen(nn.Module):
    """One weight under two names; the second use does not call its module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.first = nn.Linear(64, 64)
        self.last = nn.Linear(64, 64, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        x = torch.relu(self.inner(x))
        return nn.functional.linear(x, self.last.weight)[:, :10]


class OutOfOrder(nn.Module):
    """What people write: in-place operations, a module called twice, weights used functionally,
    a registration order that is not the order of execution, and several inputs and outputs."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(24, 24)

        def forward(self, x: Tensor, *, scale: float) -> dict[str, Any]:
            y = self.linear(x)
            y += scale * x
            return {"both": (y, x), "name": "pair"}

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 10)
        self.free = nn.Parameter(torch.randn(24, 24) / 5)
        self.twice = OutOfOrder.Pair()
        self.unused = nn.Linear(2, 2)
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(24)
        self.stem = nn.Linear(64, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x.flatten(1)))
        for scale in (0.5, 2.0):
            y, old = self.twice(x, scale=scale)["both"]
            x = self.act(self.norm(y)) + old
        x = x @ self.free.t()
        x.mul_(0.5)
        return self.head(x)


class Remembers(nn.Module):
    """Its head reads what its body left in an attribute during the pass."""

    class Body(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.left = out.detach().clone()
            return out

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.body = Remembers.Body(64, 10)
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.flatten(x)))) + self.body.left


class Autoencoder(nn.Module):
    """An autoencoder with one matrix both ways, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(64, 64, bias=False)
        self.decode = nn.Linear(64, 64, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decode(F.relu(self.encode(x.flatten(1)))))
