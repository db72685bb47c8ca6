"""The optimisers, written out for many replicas at once: a few kernels for all weights of all.

The weights of M replicas are the rows of one tensor (:mod:`companion.training.stack`), and
SGD, Adam and AdamW act on each weight alone, so one elementwise operation on that tensor is M
independent optimisers. The formulas and their order are those of ``torch.optim`` (its documentation
pages for SGD, Adam, AdamW). Everything that depends on the step comes out of a table on the device,
made ahead: no number travels from the host during training, which a CUDA graph would not allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from companion.training.recipe import Recipe

_EPS = 1e-8  # torch.optim's default; no recipe changes it


def slots(recipe: Recipe) -> tuple[str, ...]:
    """Names of the optimiser's tensors that are as large as the weights, as torch.optim's."""
    if recipe.optimizer == "sgd":
        return ("momentum_buffer",) if recipe.momentum else ()
    return ("exp_avg", "exp_avg_sq")


def coefficients(recipe: Recipe, first: int, stop: int, taken: Sequence[int]) -> Tensor:
    """What the steps ``first`` to ``stop - 1`` multiply with, float64, on the CPU.

    Arguments:
        taken: per replica, how many steps its optimiser took before (Adam corrects its averages
            by them); a fork that resets the optimiser has 0.

    Returns:
        shape (stop - first, K, R): K numbers a step, for R = 1 replica if all are alike.
        sgd: lr. adam: lr / (1 - beta1^t) and sqrt(1 - beta2^t). adamw: also 1 - lr * decay.
    """
    rates = [recipe.learning_rate(step) for step in range(first, stop)]
    if recipe.optimizer == "sgd":
        return torch.tensor(rates, dtype=torch.float64).view(-1, 1, 1)
    counts = sorted(set(taken)) if len(set(taken)) == 1 else list(taken)
    b1, b2 = recipe.betas
    table = [
        [
            [lr / (1 - b1 ** (count + i + 1)) for count in counts],
            [math.sqrt(1 - b2 ** (count + i + 1)) for count in counts],
        ]
        + ([[1 - lr * recipe.weight_decay for _ in counts]] if recipe.optimizer == "adamw" else [])
        for i, lr in enumerate(rates)
    ]
    return torch.tensor(table, dtype=torch.float64)


@torch.no_grad()
def update(
    recipe: Recipe,
    theta: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    row: Tensor,
    decayed: Tensor | None = None,
) -> None:
    """One step of all replicas, in place; ``grad`` is used up.

    Arguments:
        theta, grad: (M, P) weights and their gradients.
        state: :func:`slots` -> (M, P), zeros for a fresh optimiser.
        row: (K, R), this step's of :func:`coefficients`, on the device.
        decayed: (P,) boolean, the weights that decay; None: all.
    """
    decay = recipe.weight_decay
    if recipe.optimizer == "adamw":
        if decay:
            shrunk = row[2, :, None]
            theta.mul_(shrunk if decayed is None else torch.where(decayed, shrunk, 1.0))
    elif decay:
        grad.add_(theta if decayed is None else theta * decayed, alpha=decay)
    if recipe.optimizer == "sgd":
        direction = grad
        if recipe.momentum:
            # torch.optim starts with a copy of the gradient: what zero momentum plus it gives.
            momentum = state["momentum_buffer"]
            momentum.mul_(recipe.momentum).add_(grad)
            direction = grad.add_(momentum, alpha=recipe.momentum) if recipe.nesterov else momentum
        theta.addcmul_(direction, row[0, :, None], value=-1)
        return
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(grad, 1 - recipe.betas[0])
    square.mul_(recipe.betas[1]).addcmul_(grad, grad, value=1 - recipe.betas[1])
    root = square.sqrt().div_(row[1, :, None]).add_(_EPS)
    theta.addcmul_(mean.div(root), row[0, :, None], value=-1)
