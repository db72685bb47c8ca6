"""A plain vision transformer for small images: the family ``vit``."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion.core.errors import BadParameter
from companion.models import options
from companion.models.options import NetworkFamily, Shape

_WAVES = 10_000.0  # the longest wave of the positions, as for sentences (Vaswani et al. 2017)


def positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions of a grid of patches, (rows * columns, width): sines and cosines of the
    column, then of the row, at width / 4 frequencies each."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    count = width // 4
    frequencies = _WAVES ** -(torch.arange(count) / max(count - 1, 1))
    angles = (at.flatten()[:, None] * frequencies for at in (column, row))
    return torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1)


class Patches(nn.Module):
    """The image as a row of patches: (N, C, H, W) → (N, H W / patch², patch² C → width)."""

    def __init__(self, channels: int, patch: int, width: int, grid: tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, patch, patch)
        self.register_buffer("positions", positions(*grid, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x).flatten(2).transpose(1, 2) + self.positions
        return out


class Attention(nn.Module):
    """Self-attention: (N, L, width) → (N, L, width); no biases, as in the papers' script."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads, self.head_width = heads, head_width
        inner = heads * head_width
        self.queries, self.keys, self.values = (
            nn.Linear(width, inner, bias=False) for _ in range(3)
        )
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        each = (self.heads, self.head_width)
        q, k, v = (
            m(x).unflatten(-1, each).transpose(1, 2) for m in (self.queries, self.keys, self.values)
        )
        found = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then the same with an MLP of two layers; (N, L, width)."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, head_width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(up=nn.Linear(width, hidden), gelu=nn.GELU(), down=nn.Linear(hidden, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Mean(nn.Module):
    """The mean over patches: (N, L, width) → (N, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def vit(
    in_shape: Shape,
    classes: int,
    *,
    patch: int = 4,
    width: int = 512,
    layers: int = 6,
    heads: int = 16,
    headwidth: int = 64,
    mlp: int = 1024,
) -> nn.Sequential:
    """A vision transformer without a class token: fixed positions, norms first, mean over patches.

    Arguments:
        in_shape: (C, H, W) of one image; ``patch`` divides H and W.
        classes: number of logits.
        patch: side of a patch, pixels.
        width: of the residual stream, a multiple of 4.
        layers: blocks of attention and MLP.
        heads, headwidth: of the attention; ``heads * headwidth`` need not be ``width``.
        mlp: hidden units of each block's MLP.

    Returns: (N, C, H, W) → logits (N, classes), with children ``patches``, ``block1``, …, ``mean``,
    ``norm`` and ``head``.

    Raises: :class:`BadParameter` if ``patch`` does not divide the image, or 4 the width.

    Source: Beyer et al. 2022 for the architecture; its default size is the network of Fig. 4 of
    Layer-wise Linear Mode Connectivity (Adilova et al. 2024). Our chapter on layer-wise
    connectivity.
    """
    channels, height, breadth = in_shape
    if height % patch or breadth % patch:
        fitting = [str(n) for n in range(1, 33) if math.gcd(height, breadth) % n == 0]
        raise BadParameter(
            f"model 'vit': patch={patch} does not divide an image of {height}x{breadth} pixels. "
            f"Allowed here: {', '.join(fitting)}."
        )
    if width % 4:
        raise BadParameter(f"model 'vit': width={width} is not a multiple of 4, as positions need.")
    grid = (height // patch, breadth // patch)
    net: OrderedDict[str, nn.Module] = OrderedDict(patches=Patches(channels, patch, width, grid))
    for i in range(1, layers + 1):
        net[f"block{i}"] = Block(width, heads, headwidth, mlp)
    net["mean"] = Mean()
    net["norm"] = nn.LayerNorm(width)
    net["head"] = nn.Linear(width, classes)
    return nn.Sequential(net)


FAMILIES = {
    "vit": NetworkFamily(
        "vision transformer for small images, of the size of layer-wise LMC's Fig. 4",
        {
            "patch": options.whole_number(4, "side of a patch in pixels; it divides the image"),
            "width": options.whole_number(512, "of the residual stream, a multiple of 4"),
            "layers": options.whole_number(6, "blocks of attention and MLP"),
            "heads": options.whole_number(16, "heads of attention"),
            "headwidth": options.whole_number(64, "units of each head"),
            "mlp": options.whole_number(1024, "hidden units of each block's MLP"),
            "init": options.INIT,
        },
        vit,
    ),
}
