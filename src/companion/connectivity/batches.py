"""One policy for how many examples go through a network at a time.

Sums over examples do not care, beyond rounding, so speed and memory decide: :func:`default_batch`
where a network is evaluated, :func:`examples_a_pass` where gradients or statistics are collected,
and :func:`fitting` on top where features are kept. Only where a batch's own statistics are the
result (BatchNorm's modes ``reestimate`` and ``batch``, REPAIR) is the size a part of what is
measured, and fixed: :data:`STATISTICS`.
"""

from __future__ import annotations

import torch
from torch import nn

from companion.connectivity import statistics

STATISTICS = 500
"""Examples behind the statistics of one batch, on every device: with another size the numbers would
mean something else."""

TOKENS = 8192
"""In one pass over windows of text of which activations are kept, at most."""

_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 30}
"""Bytes of the logits of one pass over windows of text. They are the largest tensor there is, and
the loss makes two more of their size. On a CPU so few stay in the cache (a GPT of width 64 reads
a third more tokens a second than with four times as many)."""


def default_batch(
    module: nn.Module, device: torch.device, bn: str, example: torch.Tensor | None = None
) -> int:
    """Examples a forward pass: what the cache of a core or the width of a GPU asks for.

    On a CPU 128 where the network convolves, whose feature maps then stay in the cache (a curve of
    ResNet-20 takes two thirds of the time it takes with 500), else 500; on a GPU 2,500. Where
    BatchNorm takes statistics of the batches themselves :data:`STATISTICS`.

    Of text, as many windows as keep the logits (B, L, K) small; one ``example`` (1, L) tells K.
    """
    if bn not in ("none", "interpolate") or statistics.of_each_batch(module):
        return STATISTICS
    if example is not None and not example.is_floating_point():
        with torch.no_grad():
            logits = module(example)
        if isinstance(logits, torch.Tensor) and logits.numel():
            size = 4 * logits.numel() // len(example)
            return max(1, _LOGITS["cuda" if device.type == "cuda" else "cpu"] // size)
    if device.type == "cuda":
        return 2500
    return 128 if any(isinstance(m, nn.Conv2d) for m in module.modules()) else 500


def examples_a_pass(x: torch.Tensor) -> int:
    """:data:`STATISTICS` images; of windows (N, L) int64 as many as have :data:`TOKENS` tokens.

    At least two, as one has no spread. The logits of a window are L times those of an image.
    """
    if x.is_floating_point() or x.dim() != 2:
        return STATISTICS
    return max(2, TOKENS // x.shape[1])


def room(device: torch.device, on_cpu: int) -> int:
    """Bytes that what is kept of one pass may take: ``on_cpu``, or a quarter of a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory // 4)
    return on_cpu


def fitting(batch: int, each: int, device: torch.device, on_cpu: int) -> int:
    """``batch``, or as many as have :func:`room` where ``each`` bytes of an example are kept."""
    return max(1, min(batch, room(device, on_cpu) // max(each, 1)))
