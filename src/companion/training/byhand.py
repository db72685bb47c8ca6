"""A training step of a small network on a CPU without the bookkeeping around its kernels.

A step of a perceptron with a hundred units a layer is mostly that: modules that are called, a graph
that is recorded and walked, an optimiser that looks for its tensors. Here the kernels that PyTorch
would call are called by hand, in its order, so every bit of the result is the same; and for several
networks of one recipe at once, each with its own batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from companion.core.losses import IGNORED

# The modules, which torch.optim hides behind functions of their names.
_sgd, _adam = (import_module(f"torch.optim.{name}") for name in ("sgd", "adam"))

_MEAN, _SUM = 1, 2  # of ATen's losses: the mean over the batch, and the sum

TOGETHER = 6
"""How many small networks share a step: more gain little, and would wait for each other's end."""


Layer: TypeAlias = tuple[Tensor, Tensor]
"""The weights (R, out, in) and biases (R, 1, out) of a linear layer of R networks."""


def perceptron(module: nn.Module) -> list[nn.Linear]:
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
    return layers


def at_once(module: nn.Module) -> int:
    """How many networks of this architecture are best trained together (:func:`stacked`).

    Above 60,000 weights the kernels are all of a step: there is nothing to share.
    """
    few = sum(p.numel() for p in module.parameters()) <= 60_000
    return TOGETHER if few and perceptron(module) else 1


@torch.no_grad()
def stacked(modules: Sequence[nn.Module]) -> list[Layer]:
    """The layers of R perceptrons; from now on their parameters are views of these stacks.

    Empty if they are no perceptrons.
    """
    found = []
    for layers in zip(*(perceptron(m) for m in modules), strict=True):
        pair = []
        for name in ("weight", "bias"):
            own = [getattr(layer, name) for layer in layers]
            one = own[0].data[None] if len(own) == 1 else torch.stack([p.data for p in own])
            for p, part in zip(own, one, strict=True):
                p.data = part
            pair.append(one)
        found.append((pair[0], pair[1][:, None]))
    return found


@torch.no_grad()
def gradients(layers: Sequence[Layer], x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The mean cross-entropies of R :func:`stacked` perceptrons, and their gradients.

    Arguments:
        x: examples of each network (R, B, ...).
        y: classes (R, B), each a label.

    Returns:
        losses (R,), in nats, and of each layer in turn the gradients of its weights (R, out, in)
        and of its biases (R, out).
    """
    aten, batch = torch.ops.aten, y.shape[1]
    inputs, out = [], x.flatten(2)
    for i, (weight, bias) in enumerate(layers):
        out = out.relu_() if i else out
        inputs.append(out)
        out = torch.baddbmm(bias, out, weight.mT)
    log_p = torch.log_softmax(out, 2)
    each = [
        aten.nll_loss_forward.default(p, t, None, _MEAN, IGNORED)
        for p, t in zip(log_p, y, strict=True)
    ]
    rows, total = log_p.flatten(0, 1), each[0][1]
    share = torch.ones_like(total) / batch  # the mean's, of every example
    back = aten.nll_loss_backward.default(share, rows, y.flatten(), None, _SUM, IGNORED, total)
    back = aten._log_softmax_backward_data.default(back, rows, 1, rows.dtype).view_as(log_p)
    found: list[Tensor] = []
    for i in reversed(range(len(layers))):
        found += [back.sum(1), back.mT.bmm(inputs[i])]
        if i:
            back = aten.threshold_backward.default(back.bmm(layers[i][0]), inputs[i], 0)
    return torch.stack([loss for loss, _ in each]), found[::-1]


def steady(layers: Sequence[Layer], x: Tensor, y: Tensor) -> bool:
    """Whether each of R networks gets the bits here that it would get alone.

    Kernels for stacked matrices may round by their number. Those of the CPUs that we have seen do
    not; a promise of equal bits asks before it relies on that.
    """
    losses, grads = gradients(layers, x, y)
    for r in range(len(x)):
        mine = [(w[r : r + 1], b[r : r + 1]) for w, b in layers]
        loss, alone = gradients(mine, x[r : r + 1], y[r : r + 1])
        pairs = zip([losses, *grads], [loss, *alone], strict=True)
        if not all(torch.equal(of_all[r], own[0]) for of_all, own in pairs):
            return False
    return True


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
    first = inspect.unwrap(type(optimizer).step)  # what it is wrapped in imports the compiler

    @torch.no_grad()
    def step() -> None:
        for group, moved, own, options in lists:
            update(moved, [p.grad for p in moved], *own, lr=group["lr"], **options)
        if not lists:
            first(optimizer)
            begin()

    return step
