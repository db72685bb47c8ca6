"""Slope and curvature of the loss, along any direction, at any point of weight space.

Derivatives are exact (autograd, twice) and in float64 unless asked otherwise. ::

    surface = Surface(net, data.train)
    surface.local(a, towards(net, a, b))        # loss, f'(0), f''(0) of f(t) = L(a + t (b - a))
    surface.blocks(a, towards(net, a, b), groups).cross_share

With ReLUs the loss has kinks. The second derivative is that between the kinks; what they add shows
on longer steps only (:meth:`Surface.differences`, or :func:`companion.landscape.path_curvature` of
the losses on a path), and :func:`companion.landscape.weighted_curvature` tells how much it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from companion.connectivity import Score, Walker, classification
from companion.core import deadline
from companion.core.effective import only_plain
from companion.core.errors import BadParameter, one_of
from companion.core.numerics import exact_evaluation
from companion.core.theta import Theta, check_theta, flatten, without_aliases
from companion.data import Split
from companion.landscape.directions import Direction, moved, restricted, unflattened

SURFACE_MODES = ("interpolate", "batch")
"""What BatchNorm does: use running statistics, which move along a direction that names them; or
those of each batch, which follow the weights. Re-estimated statistics have no derivative here."""


@dataclass(frozen=True)
class Local:
    """The loss along a direction, to second order: f(0), f'(0) and f''(0), in nats (per step)."""

    loss: float
    slope: float
    curvature: float


@dataclass(frozen=True)
class Blocks:
    """The same, layer block by layer block: P_l keeps what a direction moves in block l.

    Arguments:
        labels: of the blocks.
        loss: at the point.
        slopes: g · P_l Δ.
        matrix: Δᵀ P_l H P_m Δ; the diagonal is the curvature of each block alone.
        squares: ‖P_l Δ‖², parameters only.
    """

    labels: tuple[str, ...]
    loss: float
    slopes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    squares: tuple[float, ...]

    @property
    def local(self) -> Local:
        """All blocks together."""
        return Local(self.loss, sum(self.slopes), sum(map(sum, self.matrix)))

    def reversed(self) -> Blocks:
        """Along -Δ."""
        return replace(self, slopes=tuple(-s for s in self.slopes))

    @property
    def cross(self) -> float:
        """The part of the curvature that is between blocks: the sum off the diagonal."""
        return self.local.curvature - sum(row[i] for i, row in enumerate(self.matrix))

    @property
    def cross_share(self) -> float:
        """:attr:`cross` as a share of the whole curvature."""
        return self.cross / self.local.curvature


def in_type(data: Split, dtype: torch.dtype) -> Split:
    """``data`` with inputs of another floating-point type; tokens stay as they are."""
    x = data.x.to(dtype) if data.x.is_floating_point() else data.x
    return cast(Split, _Cast(x, data.y))


@dataclass(frozen=True, eq=False)
class _Cast:
    """Data in another floating-point type; :class:`companion.data.Split` holds float32 only."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


class Surface:
    """The loss of one architecture on fixed data, as a function of its weights.

    Arguments:
        module: the architecture; copied, never changed.
        data: where the loss is measured, on the device to compute on: a :class:`Split`, or
            anything with ``x``, ``y`` and a length.
        bn: one of :data:`SURFACE_MODES`.
        dtype: to compute in. float32 takes half the memory and a third to half the time.
        batch: examples a pass, at most; default as :class:`companion.connectivity.Walker`.
        score: how outputs become a loss, as the walker takes it; its loss is differentiated.

    Raises:
        BadParameter: another BatchNorm mode.
    """

    def __init__(
        self,
        module: nn.Module,
        data: Split,
        *,
        bn: str = "interpolate",
        dtype: torch.dtype = torch.float64,
        batch: int | None = None,
        score: Score = classification,
    ):
        one_of("bn", bn, SURFACE_MODES)
        only_plain(module)
        self.data = in_type(data, dtype)
        own = copy.deepcopy(module).to(dtype)
        self.walker = Walker(own, {"data": self.data}, bn=bn, batch=batch, score=score)
        self.layout, self.dtype, self.device = self.walker.layout, dtype, self.walker.device
        self.module = copy.deepcopy(self.walker.module)
        for m in self.module.modules():
            if isinstance(m, _BatchNorm) and m.running_mean is not None:
                # PyTorch's own has no derivative with respect to running statistics.
                forward = _by_running if bn == "interpolate" else _by_batch
                m.forward = partial(forward, m)  # type: ignore[method-assign]  # on purpose

    def loss(self, theta: Theta) -> float:
        """Mean loss at ``theta``, in nats."""
        return self.walker.at(theta)["data"].loss

    @exact_evaluation()
    def gradient(self, theta: Theta) -> Direction:
        """The gradient of the loss, over the parameters."""
        leaves, rest = self._point(theta, self.layout.parameters)
        total, seen = {n: torch.zeros_like(v) for n, v in leaves.items()}, 0
        for loss, count in self._losses(leaves, rest):
            seen += count
            for out, part in zip(total.values(), _grad(loss, leaves), strict=True):
                out += part
        return {n: v / seen for n, v in total.items()}

    def hessian(
        self, theta: Theta, names: Sequence[str] | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Multiplication by the Hessian at ``theta``, of flat vectors.

        Arguments:
            names: entries that count (default: the parameters), in the order of the vector.

        Returns:
            vector (P,) -> vector (P,), in the type of the surface.
        """
        leaves, rest = self._point(theta, names or self.layout.parameters)
        sizes = [v.numel() for v in leaves.values()]

        @exact_evaluation()
        def times(vector: Tensor) -> Tensor:
            parts = vector.to(self.device, self.dtype).split(sizes)
            v = dict(zip(leaves, parts, strict=True))
            out, seen = torch.zeros(sum(sizes), dtype=self.dtype, device=self.device), 0
            for loss, count in self._losses(leaves, rest):
                seen += count
                slope = _along(_grad(loss, leaves, again=True), leaves, v)
                for total, part in zip(out.split(sizes), _grad(slope, leaves), strict=True):
                    total += part.flatten()
            return out / seen

        return times

    def hessian_times(self, theta: Theta, v: Direction) -> Direction:
        """``H v``, over the parameters."""
        names = self.layout.parameters
        whole = {n: v[n] if n in v else torch.zeros_like(theta[n]) for n in names}
        return unflattened(self.hessian(theta)(flatten(whole, names)), theta, names)

    def local(self, theta: Theta, direction: Direction) -> Local:
        """Loss, slope and curvature along a direction at ``theta``."""
        loss, slopes, matrix = self._forms(theta, [direction])
        return Local(loss, slopes[0], matrix[0][0])

    def blocks(
        self, theta: Theta, direction: Direction, groups: Mapping[str, Sequence[str]]
    ) -> Blocks:
        """Slope and curvature of each layer block, and the curvature between blocks.

        Arguments:
            groups: label -> entries, as :func:`companion.layerwise.layer_groups` gives them. A
                block that the direction does not move is left out.
        """
        parts = {label: restricted(direction, names) for label, names in groups.items()}
        parts = {label: part for label, part in parts.items() if part}
        loss, slopes, matrix = self._forms(theta, list(parts.values()))
        own = [restricted(part, self.layout.parameters) for part in parts.values()]
        squares = tuple(sum(float((v.double() ** 2).sum()) for v in p.values()) for p in own)
        return Blocks(tuple(parts), loss, tuple(slopes), tuple(map(tuple, matrix)), squares)

    def differences(self, theta: Theta, direction: Direction, step: float = 1e-3) -> Local:
        """The same as :meth:`local` by central differences of the loss, kinks on the way included.

        Arguments:
            step: in units of the direction.
        """
        start = {n: v.double() if v.is_floating_point() else v for n, v in theta.items()}
        low, at, high = (self.loss(moved(start, direction, t)) for t in (-step, 0.0, step))
        return Local(at, (high - low) / (2 * step), (high - 2 * at + low) / step**2)

    def _point(
        self, theta: Theta, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The entries to differentiate by, and the others."""
        check_theta(self.walker.module, theta, "theta")
        there = {
            n: v.detach().to(self.device, self.dtype if v.is_floating_point() else v.dtype)
            for n, v in without_aliases(theta, self.layout.ties).items()
        }
        leaves = {n: there.pop(n).clone().requires_grad_() for n in names}
        return leaves, there

    def _losses(
        self, leaves: Mapping[str, Tensor], rest: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, int]]:
        """Of each batch the summed loss, with its graph, and the number of predictions."""
        for x, y in self.walker.batches(self.data):
            deadline.stop_if_passed()
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                outputs = functional_call(self.module, {**rest, **leaves}, (x,))
            loss, _, count = self.walker.score(outputs, y)
            yield loss, int(count)

    @exact_evaluation()
    def _forms(
        self, theta: Theta, directions: Sequence[Direction]
    ) -> tuple[float, list[float], list[list[float]]]:
        """Loss, slopes (K,), and the curvatures (K, K) between K directions."""
        moving = [n for n in self.layout.floating if any(n in d for d in directions)]
        known = {n for d in directions for n in d}
        if known - set(moving):
            raise BadParameter(f"direction: {min(known - set(moving))} is no entry of the network.")
        leaves, rest = self._point(theta, moving)
        there = [
            {n: v.detach().to(self.device, self.dtype) for n, v in d.items()} for d in directions
        ]
        count = len(directions)
        slopes = torch.zeros(count, dtype=torch.float64, device=self.device)
        matrix = torch.zeros(count, count, dtype=torch.float64, device=self.device)
        value, seen = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for loss, number in self._losses(leaves, rest):
            value, seen = value + loss.detach(), seen + number
            grads = _grad(loss, leaves, again=True)
            for i, d in enumerate(there):
                slope = _along(grads, leaves, d)
                slopes[i] += slope.detach()
                row = dict(zip(leaves, _grad(slope, leaves, keep=i < count - 1), strict=True))
                for j, other in enumerate(there):
                    matrix[i, j] += sum((row[n].double() * v).sum() for n, v in other.items())
        matrix = (matrix + matrix.T) / 2  # symmetric but for rounding
        return float(value / seen), (slopes / seen).tolist(), (matrix / seen).tolist()


def _grad(
    value: Tensor, leaves: Mapping[str, Tensor], *, again: bool = False, keep: bool = False
) -> Sequence[Tensor]:
    """The gradient; zeros where ``value`` does not depend on a leaf, or on none."""
    if not value.requires_grad:
        return [torch.zeros_like(v) for v in leaves.values()]
    return torch.autograd.grad(
        value,
        list(leaves.values()),
        create_graph=again,
        retain_graph=again or keep,
        allow_unused=True,
        materialize_grads=True,
    )


def _along(grads: Sequence[Tensor], leaves: Iterable[str], d: Mapping[str, Tensor]) -> Tensor:
    """The slope along ``d``: a number, with its graph."""
    parts = [(g * d[n].view_as(g)).sum() for n, g in zip(leaves, grads, strict=True) if n in d]
    return torch.stack(parts).sum()


def _by_running(norm: Any, x: Tensor) -> Tensor:
    """BatchNorm by its running statistics, differentiable with respect to them."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.affine:
        shift = shift + norm.bias
    return torch.addcmul(shift.view(shape), x, scale.view(shape))


def _by_batch(norm: Any, x: Tensor) -> Tensor:
    """BatchNorm by the statistics of the batch; leaves the running ones alone."""
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
