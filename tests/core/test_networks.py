"""How a module's convolutions lie in memory: faster where nothing depends on it, else as before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion import models
from companion.core.networks import channels_last
from companion.core.seeds import Key

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Views(nn.Module):
    """Takes for granted that the channels of a map lie behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.conv(x).view(len(x), -1))
        return out


def test_a_narrow_strided_convolution_is_left_as_it_is() -> None:
    """oneDNN's gradient of its weights, channels last, writes beyond their end (AVX2)."""
    for width, last in ((4, False), (8, True)):
        module = models.build(f"resnet8:norm=none,width={width}", (1, 8, 8), 10)
        channels_last(module, torch.zeros(2, 1, 8, 8))
        weight = module.get_parameter("stage1.0.conv1.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last) == last


def test_convolutions_are_read_channels_last_and_compute_the_same() -> None:
    module = models.build("resnet8:width=8", (3, 8, 8), 10, Key("test", "last")).eval()
    with torch.no_grad():
        before = module(X)
        found = channels_last(module, X[:2])
        assert found is module
        assert found(X).shape == before.shape and torch.allclose(found(X), before, atol=1e-5)
    weights = [p for p in module.parameters() if p.ndim == 4 and min(p.shape) > 1]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_a_network_that_relies_on_the_order_in_memory_stays_as_it_is() -> None:
    for module, x in ((Views(), X), (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), X)):
        kept = {n: p.stride() for n, p in module.named_parameters()}
        channels_last(module, x[:2])(x)
        assert kept == {n: p.stride() for n, p in module.named_parameters()}
