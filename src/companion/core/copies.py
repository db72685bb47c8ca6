"""Private copies of networks: of any that runs, in the precision that sums over data need."""

from __future__ import annotations

import copy

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)
"""For storing weights. Sums over a dataset are taken in float32 at least."""


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, also of a network that keeps a computed tensor (just pruned, old hooks).

    Such a tensor has a history of gradients, with which ``copy.deepcopy`` refuses it; the copy
    computes its own in its first forward pass.
    """
    memo: dict[int, object] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def private(module: nn.Module, inputs: torch.Tensor, *, narrow: bool = True) -> nn.Module:
    """A copy to run on ``inputs``: on their device, in eval mode, without gradients.

    In their precision where they are real numbers, and at least in float32: half precision is for
    storing weights, not for sums over a dataset.

    Arguments:
        narrow: also take float64 weights to float32 for float32 inputs.
    """
    own = copied(module).to(inputs.device).eval().requires_grad_(False)
    state = (t for t in own.state_dict().values() if isinstance(t, torch.Tensor))
    kinds = {t.dtype for t in state if t.is_floating_point()}
    fits = {inputs.dtype} if narrow else {inputs.dtype, torch.float64}
    if inputs.dtype in (torch.float32, torch.float64) and kinds - fits:
        return in_precision(own, inputs.dtype)
    return in_precision(own, torch.float32) if kinds & {*HALF} else own


def in_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module`` with its real numbers in ``dtype`` and its complex ones in pairs of them.

    ``module.to(dtype)`` would drop the imaginary parts, ``module.double()`` leave them in single.
    """
    pairs = torch.complex128 if dtype == torch.float64 else torch.complex64

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype) if t.is_floating_point() else t.to(pairs) if t.is_complex() else t

    module._apply(cast)
    return module


def at_least_single(tensor: torch.Tensor) -> torch.Tensor:
    """Half-precision numbers in float32; all others as they are."""
    return tensor.float() if tensor.dtype in HALF else tensor
