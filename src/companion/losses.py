"""The loss that networks are trained with, of images and of text."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats: of (N, K) and (N,), or of (N, L, K) and (N, L)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
