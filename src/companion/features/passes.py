"""What the instruments on features share: checked arguments, loaded copies, batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from companion.connectivity import Score, has_batchnorm
from companion.connectivity.batches import default_batch, fitting
from companion.core import deadline
from companion.core.errors import BadParameter
from companion.core.theta import Theta, check_theta
from companion.features.taps import Examples, Site, Taps


def checked(module: nn.Module, networks: Mapping[str, Theta], split: Examples) -> None:
    """Refuse networks that do not fit the module, and a split without data.

    Arguments:
        networks: what messages call it (``A``) -> state dict.

    Raises:
        BadParameter: see :func:`companion.core.theta.check_theta`; or there is no data.
    """
    for name, theta in networks.items():
        check_theta(module, theta, name)
    if not len(split):
        raise BadParameter("split: there is no data to measure features on.")


def batch_size(batch: int | None) -> int | None:
    """``batch`` if it is a number of samples, or None.

    Raises:
        BadParameter: it is neither.
    """
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise BadParameter(f"batch: {batch!r} must be a whole number of 1 or more, or None.")
    return batch


def rates(alphas: Sequence[float]) -> tuple[float, ...]:
    """Weights of B, as numbers.

    Raises:
        BadParameter: none, one twice, or one outside [0, 1].
    """
    found = tuple(float(t) for t in alphas)
    if not found or len(set(found)) < len(found) or not all(0 <= t <= 1 for t in found):
        raise BadParameter(
            f"alphas: {list(alphas)} must be one or more different numbers from 0 (A) to 1 (B)."
        )
    return found


def own_statistics(module: nn.Module) -> str:
    """The BatchNorm mode where only A and B run, as they are: ``own``; ``none`` without any."""
    return "own" if has_batchnorm(module) else "none"


def tapped(
    module: nn.Module, theta: Theta, found: Sequence[Site], x: Tensor, *, inputs: bool = False
) -> Taps:
    """Taps on a copy of the network, with the weights ``theta``, on the device of ``x``."""
    taps = Taps(copy.deepcopy(module).to(x.device), found, inputs=inputs)
    taps.load(theta)
    return taps


def batches(
    module: nn.Module, split: Examples, batch: int | None, found: Sequence[Site]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, at most ``batch`` at a time.

    Default: as for barriers, and no more than lets the features of two networks at the sites
    ``found`` fit into 256 MB, or a quarter of a GPU.
    """
    device = split.x.device
    if batch_size(batch) is None:
        each = 2 * 4 * sum(math.prod(s.shape) for s in found if not s.same)
        batch = fitting(default_batch(module, device, "none"), each, device, 1 << 28)
    for x, y in zip(split.x.split(batch), split.y.split(batch), strict=True):
        deadline.stop_if_passed()
        yield x, y


def scored(score: Score, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
    """Summed loss, errors and predictions of logits (N, …, K) against targets (N, …).

    Raises:
        BadParameter: outputs and targets do not fit together.
    """
    if output.shape[:-1] != y.shape:
        raise BadParameter(
            f"targets {tuple(y.shape)} do not fit outputs {tuple(output.shape)}: one class index "
            "for each row of logits is needed, (N,) or, for tokens, (N, L)."
        )
    return score(output.flatten(0, -2), y.flatten())


def rows_at_a_time(size: int) -> int:
    """Samples of ``size`` numbers each that are held in float64 at once: 32 MB."""
    return max(1, (1 << 22) // max(size, 1))


def squares(x: Tensor) -> float:
    """Sum of squares, summed in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
