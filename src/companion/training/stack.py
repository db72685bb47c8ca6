"""M networks of one architecture as a few tensors: what many replicas on one device are made of.

The trainable weights of replica m are row m of one tensor ``theta`` (M, P), its gradients row m of
another, and the network sees views into them. So the bfloat16 copy of all weights is one, a
checkpoint of all replicas is one transfer, and SGD, Adam and AdamW, which act on each weight alone,
are a few kernels (:func:`update`). Their formulas and their order are those of ``torch.optim`` (its
documentation pages). What depends on the step comes out of a table on the device, made ahead: no
number travels from the host during training, which a CUDA graph would not allow. Buffers
(BatchNorm's statistics) are one (M, ...) tensor a name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from companion.core import theta as weights
from companion.training.loop import State, decayed
from companion.training.recipe import Recipe

_ALIGN = 64  # elements: every tensor starts at a multiple of 128 bytes or more, in bfloat16 too
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Place:
    """Where one trainable tensor lies in a row: ``start``, its shape, and its memory format.

    ``cast``: bf16 training reads it in bfloat16 (weights and biases of linear maps and
    convolutions, as autocast does).
    """

    name: str
    start: int
    shape: tuple[int, ...]
    channels_last: bool
    cast: bool

    def view(self, flat: Tensor) -> Tensor:
        """The tensor inside ``flat`` (..., P): a view of shape (..., *shape)."""
        part = flat.narrow(-1, self.start, math.prod(self.shape))
        if self.channels_last:
            out, channels, height, width = self.shape
            return part.unflatten(-1, (out, height, width, channels)).movedim(-1, -3)  # type: ignore[no-any-return]  # untyped in torch
        return part.view(*part.shape[:-1], *self.shape)


def row_places(module: nn.Module, channels_last: bool) -> tuple[tuple[Place, ...], int]:
    """Where each trainable tensor lies in a row, in ``torch.optim``'s order, and P."""
    linear = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
        for name, _ in layer.named_parameters(recurse=False)
    }
    found, at = [], 0
    for name, p in module.named_parameters():
        if p.requires_grad:
            last = channels_last and p.ndim == 4
            found.append(Place(name, at, tuple(p.shape), last, name in linear))
            at += -(-p.numel() // _ALIGN) * _ALIGN
    return tuple(found), at


def _rows(values: Sequence[Tensor]) -> Tensor:
    """As ``torch.stack``, but every row starts at an aligned address."""
    size = values[0].numel()
    room = values[0].new_zeros(len(values), max(-(-size // _ALIGN), 1) * _ALIGN)
    out = room[:, :size].view(len(values), *values[0].shape)
    for row, value in zip(out, values, strict=True):
        row.copy_(value)
    return out


class Stack:
    """The states of M replicas on a device.

    Arguments:
        module: the architecture, on the device to train on.
        recipe: its optimiser says which tensors there are beside the weights.
        states: M states at one step.
        dense: buffers without gaps between replicas, for ``vmap``.
    """

    def __init__(
        self, module: nn.Module, recipe: Recipe, states: Sequence[State], *, dense: bool = False
    ):
        self.first = states[0].step
        self.layout = weights.layout(module)
        self.names = [k for k, v in module.state_dict().items() if isinstance(v, Tensor)]
        example = next(module.parameters())
        self.device, dtype = example.device, example.dtype
        self.places, size = row_places(module, self.device.type == "cuda")
        # A BatchNorm with a fixed momentum never reads how many batches it saw: we count on the
        # host, and save a kernel a layer and step.
        self.counters = {
            f"{prefix}.{_COUNTER}" if prefix else _COUNTER
            for prefix, layer in module.named_modules()
            if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None
        }

        def blank() -> Tensor:
            return torch.zeros(len(states), size, dtype=dtype, device=self.device)

        self.theta, self.grad = blank(), blank()
        self.half: Tensor | None = None
        if recipe.precision == "bf16":
            self.half = torch.zeros_like(self.theta, dtype=torch.bfloat16)
        self.state = {slot: blank() for slot in slots(recipe)}
        self.masks = [s.mask for s in states]
        self.kept: Tensor | None = None
        if any(self.masks):
            self.kept = torch.ones_like(self.theta)
        self.decayed: Tensor | None = None
        if recipe.weight_decay_on != "all":
            self.decayed = torch.zeros(size, dtype=torch.bool, device=self.device)
            chosen = decayed(recipe, module)
            for place in self.places:
                place.view(self.decayed).fill_(place.name in chosen)
        self.adaptive = recipe.optimizer != "sgd"
        self.taken = [int(s.optimizer["0.step"]) if "0.step" in s.optimizer else 0 for s in states]
        for m, state in enumerate(states):
            for index, place in enumerate(self.places):
                place.view(self.theta[m]).copy_(state.theta[place.name])
                if self.kept is not None and place.name in state.mask:
                    place.view(self.kept[m]).copy_(state.mask[place.name])
                for slot, flat in self.state.items():
                    if (value := state.optimizer.get(f"{index}.{slot}")) is not None:
                        place.view(flat[m]).copy_(value)
        # Under vmap BatchNorm writes through a reshape, which of padded rows would be a copy.
        rows = torch.stack if dense else _rows
        trained = {place.name for place in self.places}
        self.buffers = {
            name: rows([s.theta[name].to(self.device) for s in states])
            for name in self.names
            if name not in trained and name not in self.layout.ties
        }

    def __len__(self) -> int:
        return len(self.theta)

    def source(self, place: Place) -> Tensor:
        """What the network reads: the weights, or their bfloat16 copy."""
        return self.half if self.half is not None and place.cast else self.theta

    def mutable(self) -> list[Tensor]:
        """Every tensor that a training step changes and the next one reads."""
        return [self.theta, *self.state.values(), *self.buffers.values()]

    def moving(self) -> dict[str, Tensor]:
        """The buffers the network gets, (M, ...) each."""
        return {k: v for k, v in self.buffers.items() if k not in self.counters}

    def states(self, step: int, traces: Sequence[Tensor]) -> list[State]:
        """Copies on the CPU, as :func:`companion.training.advance` makes them.

        Arguments:
            step: the step reached.
            traces: the losses so far, of as many replicas
                (the first ones) as are wanted.
        """
        theta = self.theta.cpu()
        slot_values = {slot: value.cpu() for slot, value in self.state.items()}
        buffers = {name: value.cpu() for name, value in self.buffers.items()}
        by_name = {place.name: place for place in self.places}
        done = step - self.first

        def own(tensor: Tensor) -> Tensor:
            return tensor.clone(memory_format=torch.contiguous_format)

        out = []
        for m in range(len(traces)):
            values: dict[str, Tensor] = {}
            for name in self.names:
                first = self.layout.ties.get(name, name)
                if first in by_name:
                    values[name] = own(by_name[first].view(theta[m]))
                else:
                    extra = done if first in self.counters else 0
                    values[name] = buffers[first][m] + extra if extra else own(buffers[first][m])
            optimizer: dict[str, Tensor] = {}
            for index, place in enumerate(self.places):
                if self.adaptive:
                    optimizer[f"{index}.step"] = torch.tensor(float(self.taken[m] + done))
                for slot, value in slot_values.items():
                    optimizer[f"{index}.{slot}"] = own(place.view(value[m]))
            out.append(State(step, values, optimizer, traces[m].clone(), self.masks[m]))
        return out


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
