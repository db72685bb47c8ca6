"""Pruning masks as values: which weights of a network are there.

A ``Mask`` names the tensors that may be pruned and says of each weight whether it is kept. Tensors
it does not name (biases, norms) are whole. In the run store a weight takes one bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch

from companion.core.errors import BadParameter, CorruptData
from companion.core.theta import Theta

Mask: TypeAlias = Mapping[str, torch.Tensor]
"""Name in the state dict -> boolean tensor of its shape, True where the weight is kept."""


def alive(mask: Mask) -> dict[str, tuple[int, int]]:
    """Weights kept, and weights in all, of each tensor."""
    return {name: (int(kept.sum()), kept.numel()) for name, kept in mask.items()}


def density(mask: Mask) -> float:
    """Share of the weights kept, of all that may be pruned. In [0, 1]; of no weights it is 1."""
    counts = alive(mask).values()
    total = sum(n for _, n in counts)
    return sum(kept for kept, _ in counts) / total if total else 1.0


def masked(theta: Theta, mask: Mask) -> dict[str, torch.Tensor]:
    """``mask * theta``: copies with exactly +0 where a weight is pruned, every other bit as it was.

    Arguments:
        theta: a state dict; entries that the mask does not name are the same tensors.

    Raises:
        BadParameter: the mask names a tensor that is not there, or has another shape.
    """
    for name, kept in mask.items():
        if name not in theta or theta[name].shape != kept.shape:
            there = f"shape {tuple(theta[name].shape)}" if name in theta else "no such tensor"
            raise BadParameter(
                f"mask: {name} has shape {tuple(kept.shape)}, the network {there}. "
                "Mask and network must be of one architecture."
            )
    zero = {name: torch.zeros((), dtype=theta[name].dtype) for name in mask}
    return {
        name: torch.where(mask[name].to(v.device), v, zero[name].to(v.device))
        if name in mask
        else v
        for name, v in theta.items()
    }


def pack(mask: Mask) -> dict[str, torch.Tensor]:
    """A mask as tensors of one bit a weight, for safetensors: ``bits/…`` and ``shape/…``."""
    out = {}
    for name, kept in mask.items():
        bits = np.packbits(kept.cpu().numpy().reshape(-1))
        out[f"bits/{name}"] = torch.from_numpy(bits)
        out[f"shape/{name}"] = torch.tensor(kept.shape, dtype=torch.int64)
    return out


def unpack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of :func:`pack`; entries of other names are ignored.

    Raises:
        CorruptData: bits without a shape, or too few of them.
    """
    out = {}
    for key, bits in tensors.items():
        kind, _, name = key.partition("/")
        if kind != "bits":
            continue
        shape = [int(n) for n in tensors.get(f"shape/{name}", torch.tensor([-1]))]
        count = math.prod(shape)
        if bits.dtype != torch.uint8 or count < 0 or bits.numel() != -(-count // 8):
            raise CorruptData(f"mask: {name} is not what was packed.")
        flat = np.unpackbits(bits.numpy(), count=count).astype(bool)
        out[name] = torch.from_numpy(flat).reshape(shape)
    return out
