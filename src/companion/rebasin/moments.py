"""The layers of a network that scale channels, and streamed statistics of what they put out.

What :mod:`companion.rebasin.repair` measures with. Statistics are over all inputs and positions of
a channel, in float64, and no more than the features of one batch are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from companion.connectivity.batches import examples_a_pass
from companion.core import deadline
from companion.core.errors import BadParameter
from companion.core.numerics import exact_evaluation
from companion.core.theta import Theta, layout
from companion.rebasin.trace import private

Hook = Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]
"""(layer, its outputs (channels, values) in float64) -> (scale, shift) to apply, or None."""


class Moments:
    """Mean and standard deviation (population) of each channel, batch by batch.

    Batches are joined by the sums of squares about their own means (Chan et al.), which loses no
    digits where the mean is large beside the spread.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    @property
    def std(self) -> torch.Tensor:
        """float64, shape (channels,)."""
        return (self.squares / max(self.count, 1)).sqrt()

    def add(self, x: torch.Tensor) -> Moments:
        """Take in a batch, shape (channels, values); returns the moments of that batch alone."""
        mine = Moments()
        mine.count, mine.mean = x.shape[1], x.mean(1)
        mine.squares = (x - mine.mean[:, None]).square().sum(1)
        if self.count == 0:
            self.mean, self.squares = mine.mean, mine.squares
        else:
            gap, weight = mine.mean - self.mean, mine.count / (self.count + mine.count)
            self.mean = self.mean + gap * weight
            self.squares = self.squares + mine.squares + gap**2 * self.count * weight
        self.count += mine.count
        return mine


class Comoments:
    """Covariance of each channel of A with the same channel of B, batch by batch."""

    def __init__(self) -> None:
        self.x, self.y = Moments(), Moments()
        self.products = torch.zeros(())

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in a batch of both, shapes (channels, values)."""
        count, at_x, at_y = self.x.count, self.x.mean, self.y.mean
        mine, other = self.x.add(x), self.y.add(y)
        own = ((x - mine.mean[:, None]) * (y - other.mean[:, None])).sum(1)
        gap = (mine.mean - at_x) * (other.mean - at_y) * (count * mine.count / self.x.count)
        self.products = self.products + own + gap

    @property
    def correlation(self) -> torch.Tensor:
        """float64, shape (channels,), from -1 to 1; 0 where a channel is constant."""
        scale = (self.x.squares * self.y.squares).sqrt()
        return torch.where(scale > 0, self.products / scale, 0.0).clamp(-1, 1)


def correction(
    target_mean: torch.Tensor, target_std: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift) that take channels of mean and std to their targets, shapes (channels,).

    A channel that is constant, up to what rounding makes of a constant, keeps its scale.
    """
    dead = (std <= 1e-12 * mean.abs()) | (std <= 1e-6 * target_std)
    scale = torch.where(dead, 1.0, target_std / torch.where(dead, 1.0, std))
    return scale, target_mean - scale * mean


@dataclass(frozen=True)
class Layer:
    """A module that scales channels.

    Arguments:
        module: itself, in the private copy of the network.
        axis: of its channels in its outputs.
        runs: how often it runs in a forward pass.
        last: whether the network's outputs are its own.
        refused: why a scale and a shift for each channel cannot be written into it, or ``""``.
    """

    module: nn.Module
    axis: int
    runs: int
    last: bool
    refused: str


def _axis(module: nn.Module) -> int | None:
    """Where the channels of a module's outputs are; None: no module that scales channels."""
    if isinstance(module, nn.Linear):
        return -1
    if isinstance(module, nn.LayerNorm):
        # Subclasses norm feature maps over their channels: ours, and torchvision's LayerNorm2d.
        return -1 if type(module) is nn.LayerNorm else 1
    return 1 if isinstance(module, _ConvNd | nn.GroupNorm | _BatchNorm) else None


def fusible(name: str, module: nn.Module, entries: set[str], tied: set[str]) -> str:
    """Why a scale and a shift for each channel cannot be written into a layer, ``""`` if they can.

    Arguments:
        name: its path.
        entries: names in the state dict.
        tied: those that share their tensor.
    """
    if isinstance(module, _BatchNorm):
        if module.running_mean is None:
            return "BatchNorm without running statistics: each batch is normalised by itself"
        return "BatchNorm: its running statistics are estimated again instead"
    if isinstance(module, _ConvTransposeNd):
        return "transposed convolutions are not supported"
    if getattr(module, "weight", None) is None:
        return "it has no weight to take the scale"
    if getattr(module, "bias", None) is None:
        return "it has no bias to take the shift"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return "its weight has a value for each position, not for each channel"
    own = {f"{name}.weight", f"{name}.bias"}
    if not own <= entries:
        return "its weight or bias is computed from other tensors (a parametrisation)"
    if own & tied:
        return "its weight or bias is tied to another layer's"
    return ""


def batches(inputs: torch.Tensor, batch: int | None) -> list[torch.Tensor]:
    """``inputs`` in the fewest batches of at most ``batch``, of equal size give or take one.

    None: :func:`companion.connectivity.batches.examples_a_pass`.

    Raises:
        BadParameter: no tensor of two or more inputs, NaN in it, or a batch below 2.
    """
    if not isinstance(inputs, torch.Tensor) or inputs.ndim < 2 or len(inputs) < 2:
        what = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise BadParameter(f"inputs: a tensor (N, …) with N of 2 or more is needed, got {what}.")
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        raise BadParameter("inputs: they hold NaN or infinite values.")
    batch = examples_a_pass(inputs) if batch is None else batch
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 2:
        raise BadParameter(f"batch: {batch!r} must be a whole number of 2 or more.")
    # Never a batch of one: it has no spread, and BatchNorm refuses it.
    parts = min(-(-len(inputs) // batch), len(inputs) // 2)
    return list(inputs.tensor_split(parts))


class Copy:
    """A private copy of a network in eval mode, and its layers in the order in which they run.

    Arguments:
        module: copied, never changed.
        example: a batch of its inputs, on the device to compute on.
    """

    def __init__(self, module: nn.Module, example: torch.Tensor):
        self.module = private(module, example)
        self.norms = [
            m
            for m in self.module.modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None
        ]
        for m in self.norms:
            m.momentum = None  # PyTorch's cumulative average
        self._names = {m: n for n, m in self.module.named_modules()}
        self.layers = self._find(example[:2])

    @torch.no_grad()
    def _find(self, example: torch.Tensor) -> dict[str, Layer]:
        """Run the network once and see which layers put out what."""
        seen: dict[nn.Module, list[torch.Tensor]] = {}

        def look(module: nn.Module, args: Any, out: Any) -> None:
            seen.setdefault(module, []).append(out)

        watched = [m for m in self._names if _axis(m) is not None]
        hooks = [m.register_forward_hook(look) for m in watched]
        try:
            final = self.module(example)
        finally:
            for h in hooks:
                h.remove()
        # By memory, so that a view of a layer's outputs still counts as its outputs. All features
        # are alive here, so none of them can lie where another one was.
        ends = {
            t.untyped_storage().data_ptr()
            for t in pytree.tree_leaves(final)
            if isinstance(t, torch.Tensor)
        }
        lay = layout(self.module)
        entries = set(self.module.state_dict())
        tied = set(lay.ties) | set(lay.ties.values())
        found = {}
        for module, outs in seen.items():
            name, axis = self._names[module], _axis(module)
            assert axis is not None
            last = any(o.untyped_storage().data_ptr() in ends for o in outs)
            found[name] = Layer(module, axis, len(outs), last, fusible(name, module, entries, tied))
        return found

    @torch.no_grad()
    def load(self, theta: Theta) -> None:
        """Put a state dict into the copy."""
        state = self.module.state_dict()
        for name, value in theta.items():
            state[name].copy_(value)

    @exact_evaluation()
    @torch.no_grad()
    def run(
        self,
        theta: Theta,
        parts: Iterable[torch.Tensor],
        names: Sequence[str] = (),
        hook: Hook | None = None,
    ) -> None:
        """Load ``theta`` and run it on each batch, ``hook`` seeing the outputs of layers ``names``.

        What the hook returns is applied to the outputs before the network goes on.
        """
        self.load(theta)

        def attach(name: str) -> Any:
            layer = self.layers[name]

            def call(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor | None:
                assert hook is not None
                # A copy even where it is float64 already: the next layer may write in place.
                x = out.movedim(layer.axis, 0).flatten(1).to(torch.float64, copy=True)
                found = hook(name, x)
                if found is None:
                    return None
                shape = [1] * out.ndim
                shape[layer.axis] = -1
                scale, shift = (v.to(out.dtype).view(shape) for v in found)
                return out * scale + shift

            return layer.module.register_forward_hook(call)

        hooks = [attach(name) for name in names]
        try:
            for part in parts:
                deadline.stop_if_passed()
                self.module(part)
        finally:
            for h in hooks:
                h.remove()

    @contextmanager
    def batch_statistics(self) -> Iterator[Self]:
        """Inside, BatchNorm normalises each batch by itself, as in training."""
        for m in self.norms:
            m.train()
        try:
            yield self
        finally:
            for m in self.norms:
                m.eval()

    @property
    def measured(self) -> list[str]:
        """Layers that run once, whose outputs therefore have one mean and one spread."""
        return [n for n, layer in self.layers.items() if layer.runs == 1]

    def moments(self, theta: Theta, parts: Sequence[torch.Tensor]) -> dict[str, Moments]:
        """Layer -> moments of its outputs in network ``theta``, for each of :attr:`measured`."""
        found = {n: Moments() for n in self.measured}

        def hook(name: str, x: torch.Tensor) -> None:
            found[name].add(x)

        self.run(theta, parts, self.measured, hook)
        return found

    def reestimated(self, theta: Theta, parts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """``theta`` with running statistics that are cumulative averages over ``parts``."""
        self.load(theta)
        for m in self.norms:
            m.reset_running_stats()
        fresh = {n: v for n, v in theta.items() if not self._is_statistic(n)}
        with self.batch_statistics():
            self.run(fresh, parts)
        state = self.module.state_dict()
        return {
            n: state[n].to(v.device, copy=True) if self._is_statistic(n) else v
            for n, v in theta.items()
        }

    def _is_statistic(self, entry: str) -> bool:
        owner, _, what = entry.rpartition(".")
        stands = what in ("running_mean", "running_var", "num_batches_tracked")
        return stands and self.module.get_submodule(owner) in self.norms


def measure(
    net: Copy, a: Theta, b: Theta, parts: Sequence[torch.Tensor], correlated: Sequence[str] = ()
) -> tuple[Mapping[str, Moments], Mapping[str, Moments], Mapping[str, torch.Tensor]]:
    """Moments of the layers of A and of B, and correlations of channels of layers ``correlated``.

    Returns:
        layer -> moments in A; the same in B; layer -> correlation of each channel of A with the
        same channel of B, float64, shape (channels,).
    """
    of_a, of_b = net.moments(a, parts), net.moments(b, parts)
    both = {n: Comoments() for n in correlated}
    held: dict[str, torch.Tensor] = {}

    def keep(name: str, x: torch.Tensor) -> None:
        held[name] = x

    def join(name: str, x: torch.Tensor) -> None:
        both[name].add(held.pop(name), x)

    for part in parts if correlated else ():
        net.run(a, [part], correlated, keep)
        net.run(b, [part], correlated, join)
    return of_a, of_b, {n: c.correlation for n, c in both.items()}
