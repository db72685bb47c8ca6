"""What a weight is worth: its magnitude, or what the loss (SNIP) or the flow (SynFlow) owes to it.

The highest scores stay (:func:`companion.tickets.prune`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from companion.core.errors import BadParameter
from companion.core.losses import mean_loss
from companion.core.theta import Theta, layout, without_aliases
from companion.data import Split

Scores: TypeAlias = Mapping[str, Tensor]
"""Name of a tensor -> one number for each of its weights."""


def magnitude(theta: Theta, names: Sequence[str]) -> dict[str, Tensor]:
    """``|w|``: after training for IMP (Frankle & Carbin 2019), before it as a baseline."""
    return {name: theta[name].detach().abs() for name in names}


def snip(module: nn.Module, theta: Theta, names: Sequence[str], part: Split) -> dict[str, Tensor]:
    """``|w * dL/dw|`` of the mean loss on ``part``: how much the loss feels a weight's removal.

    Arguments:
        module: the architecture, on the device of ``part``.
        theta: where to look, usually the initialisation.
        names: of the weights to score.
        part: some training examples; SNIP takes one batch.

    Source: Lee et al. 2019.
    """
    part = part.labelled()
    net = copy.deepcopy(module).train()  # BatchNorm sees the batch, as in a training step
    return _times_gradient(net, theta, names, lambda call: mean_loss(call(part.x), part.y))


def synflow(
    module: nn.Module, theta: Theta, names: Sequence[str], in_shape: Sequence[int]
) -> dict[str, Tensor]:
    """``|w| * dR/d|w|``, where R is the sum of outputs for an input of ones, all weights positive.

    It sees no data. Meant to be applied in many small steps (Tanaka et al. take 100), each on what
    the one before has left: in one step whole layers may go.

    Arguments:
        module: the architecture.
        theta: where to look, masked by what is pruned already.
        names: of the weights to score.
        in_shape: of one image.

    Raises:
        BadParameter: a network for text, into which no ones can be put.

    Source: Tanaka et al. 2020, Algorithm 1.
    """
    if len(in_shape) != 3:
        raise BadParameter("synflow: it puts an image of ones in; tokens are no numbers.")
    net = copy.deepcopy(module).eval().double()  # products over many layers leave float32
    positive = {n: v.abs().double() if v.is_floating_point() else v for n, v in theta.items()}
    ones = torch.ones(1, *in_shape, dtype=torch.float64, device=next(module.parameters()).device)
    return _times_gradient(net, positive, names, lambda call: call(ones).sum())


def _times_gradient(
    net: nn.Module,
    theta: Theta,
    names: Sequence[str],
    value: Callable[[Callable[[Tensor], Tensor]], Tensor],
) -> dict[str, Tensor]:
    """``|w * dv/dw|`` for a number ``value`` makes of the network as a function."""
    spec, device = layout(net), next(net.parameters()).device
    rest = {n: v.detach().clone().to(device) for n, v in without_aliases(theta, spec.ties).items()}
    leaves = {n: rest[n].requires_grad_() for n in names}

    def call(x: Tensor) -> Tensor:
        out: Tensor = functional_call(net, {**rest, **leaves}, (x,))
        return out

    found = torch.autograd.grad(value(call), list(leaves.values()))
    return {n: (leaves[n].detach() * g).abs() for n, g in zip(leaves, found, strict=True)}
