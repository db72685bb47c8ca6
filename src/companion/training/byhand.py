"""A training step of a small network on a CPU without the bookkeeping around its kernels.

A step of a perceptron with a hundred units a layer is mostly that: modules that are called, a graph
that is recorded and walked, an optimiser that looks for its tensors. Here the kernels that PyTorch
would call are called by hand, in its order, so every bit of the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from companion.core.losses import IGNORED

# The modules, which torch.optim hides behind functions of their names.
_sgd, _adam = (import_module(f"torch.optim.{name}") for name in ("sgd", "adam"))

_MEAN = 1  # of ATen's losses: the mean over the batch


Layer: TypeAlias = tuple[Tensor, Tensor]
"""The weight and the bias of a linear layer."""


def perceptron(module: nn.Module) -> list[Layer]:
    """The layers of a network that is ``Linear (ReLU Linear)*`` on flattened inputs, in order.

    Empty for every other network: one with norms, hooks, parametrizations, layers that are used
    twice, without biases or not trained.
    """
    leaves = [m for m in module.modules() if type(m) is not nn.Sequential]
    kinds = [type(m) for m in leaves]
    layers = [m for m in leaves if isinstance(m, nn.Linear)]
    if kinds != [nn.Flatten, nn.Linear, *[nn.ReLU, nn.Linear] * (len(layers) - 1)]:
        return []
    tensors = [t for m in layers for t in (m.weight, m.bias)]
    watched = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if (
        repr(leaves[0]) != repr(nn.Flatten())
        or any(getattr(m, hooks) for m in module.modules() for hooks in watched)
        or any(t is None or not t.requires_grad or t._backward_hooks for t in tensors)
        or len({id(t) for t in tensors}) < len(tensors)
    ):
        return []
    return [(m.weight, m.bias) for m in layers]


@torch.no_grad()
def gradients(layers: Sequence[Layer], x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The mean cross-entropy of :func:`perceptron` layers, and the gradients of all parameters.

    Arguments:
        x: examples (B, ...).
        y: classes (B,).

    Returns:
        loss, in nats, and of each layer in turn the gradients of its weight and of its bias.
    """
    aten = torch.ops.aten
    inputs, out = [], x.flatten(1)
    for i, (weight, bias) in enumerate(layers):
        out = out.relu_() if i else out
        inputs.append(out)
        out = torch.addmm(bias, out, weight.t())
    log_p = torch.log_softmax(out, 1)
    loss, total = aten.nll_loss_forward.default(log_p, y, None, _MEAN, IGNORED)
    one = torch.ones_like(loss)
    back = aten.nll_loss_backward.default(one, log_p, y, None, _MEAN, IGNORED, total)
    back = aten._log_softmax_backward_data.default(back, log_p, 1, log_p.dtype)
    found: list[Tensor] = []
    for i in reversed(range(len(layers))):
        found += [back.sum(0), back.t().mm(inputs[i])]
        if i:
            back = aten.threshold_backward.default(back.mm(layers[i][0]), inputs[i], 0)
    return loss, found[::-1]


def step_of(optimizer: torch.optim.SGD | torch.optim.Adam) -> Callable[[], None]:
    """``optimizer.step``, fused, for parameters that all have a gradient or never one.

    The first step is the optimiser's own, which makes its state.
    """
    sgd = isinstance(optimizer, torch.optim.SGD)
    names = ("momentum_buffer",) if sgd else ("exp_avg", "exp_avg_sq", "step")
    # Each group, what is moved, and what the function of torch.optim takes but gradients and lr.
    lists: list[tuple[dict[str, Any], list[nn.Parameter], list[Any], dict[str, Any]]] = []

    def begin() -> None:
        for group in optimizer.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            own = [[optimizer.state[p].get(name) for p in moved] for name in names]
            options = {"foreach": False, "fused": True}
            options |= {k: group[k] for k in ("weight_decay", "maximize")}
            if sgd:
                options |= {k: group[k] for k in ("momentum", "dampening", "nesterov")}
            else:
                own.insert(2, [])  # the largest squares, which amsgrad keeps
                options |= {k: group[k] for k in ("eps", "amsgrad", "decoupled_weight_decay")}
                options["beta1"], options["beta2"] = group["betas"]
            lists.append((group, moved, own, options))

    update = _sgd.sgd if sgd else _adam.adam

    @torch.no_grad()
    def step() -> None:
        for group, moved, own, options in lists:
            update(moved, [p.grad for p in moved], *own, lr=group["lr"], **options)
        if not lists:
            optimizer.step()
            begin()

    return step
