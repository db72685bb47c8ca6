"""Statistics of batches that norms keep, or take anew: which norms, and estimating them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm


def running(module: nn.Module) -> list[_NormBase]:
    """The norms whose running statistics eval mode uses: BatchNorm and InstanceNorm that track."""
    return [
        m
        for m in module.modules()
        if isinstance(m, _NormBase)
        and m.running_mean is not None
        and (m.track_running_stats or not isinstance(m, _InstanceNorm))
    ]


def of_each_batch(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms without running statistics, which normalise each batch by itself.

    What such a network computes depends on what else is in a batch, so the size of a batch is part
    of every number (:data:`companion.connectivity.batches.STATISTICS`).
    """
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is None]


@contextmanager
def cumulative(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Inside, ``norms`` are reset and average what they see: every batch, every run, equally.

    Each normalises a batch by the batch's own statistics (InstanceNorm each example by its own).
    """
    before = [(m.momentum, m.track_running_stats) for m in norms]
    runs: Counter[nn.Module] = Counter()

    def share(norm: Any, args: Any) -> None:
        # PyTorch's cumulative average. Its own way to ask for it, momentum=None, reads a counter
        # from the device, a wait for every norm and batch, and InstanceNorm does not know it.
        runs[norm] += 1
        norm.momentum = 1 / runs[norm]

    hooks = [m.register_forward_pre_hook(share, prepend=True) for m in norms]
    for m in norms:
        m.track_running_stats = True
        m.reset_running_stats()
        m.train()
    try:
        yield
    finally:
        for m, (momentum, tracks), hook in zip(norms, before, hooks, strict=True):
            m.momentum, m.track_running_stats = momentum, tracks
            m.eval()
            hook.remove()
