"""Two networks that differ in every entry, of every kind, and data for them: for feature tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from companion import data, models
from companion.core.seeds import Key
from companion.core.theta import snapshot

DIGITS = data.load("digits")
Theta = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and targets of any shape and type: tokens, float64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def labelled(self) -> Examples:
        return self


class Tokens(nn.Module):
    """(N, L) integers to logits (N, L, K)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.relu, self.head = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.up(self.embed(x))))


NETS: dict[str, Any] = {
    "mlp": lambda: models.build("mlp:widths=12x2", DIGITS.in_shape, 10),
    "batch norm": lambda: models.build("resnet8:norm=batch,width=2", DIGITS.in_shape, 10),
    "group norm": lambda: models.build("resnet8:norm=group,width=4", DIGITS.in_shape, 10),
    "vgg": lambda: models.build("vgg11:width=2", DIGITS.in_shape, 10),
    "tokens": Tokens,
}


def split_of(name: str, examples: int) -> Any:
    """Test images, or tokens."""
    if name != "tokens":
        return DIGITS.test.head(examples)
    draw = Key("test", "tokens").generator()
    return Examples(*(torch.randint(11, (20, 5), generator=draw) for _ in range(2)))


def pair_of(make: Any, label: str = "pair") -> tuple[nn.Module, Theta, Theta]:
    """A module, and two networks with BatchNorm statistics of their own."""
    ends = []
    for number in range(2):
        with Key("test", label, number).seeded():
            module = make().train()
        if make is not Tokens:
            module(DIGITS.train.head(50).x * (1 + number))
        ends.append(snapshot(module))
    return make(), ends[0], ends[1]
