"""The loss that networks are trained with, of images and of text."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of what is not to be predicted, PyTorch's ``ignore_index``: left out of every mean."""


def is_label(targets: Tensor) -> Tensor:
    """Where there is something to predict; boolean, of the shape of ``targets``."""
    return targets != IGNORED


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats: of (N, K) and (N,), or of (N, L, K) and (N, L)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def mean_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """:func:`mean_loss` of each of M networks: of (M, N, K) and (M, N), shape (M,)."""
    each = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    out: Tensor = each.unflatten(0, (len(logits), -1)).mean(1)
    return out
