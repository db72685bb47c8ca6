"""Forward passes that begin at the first changed layer."""

from __future__ import annotations

import torch
from torch import nn


def first_uses(module: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Entry -> when a forward pass of ``example`` first reads it; entries never read are left out."""
    raise NotImplementedError
