"""Barriers of layers: which sets of groups move, and the loop that measures them all."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from companion.data import Dataset, Split
from companion.layerwise.values import LayerBarriers, Sweep
from companion.theta import Theta


def sweep(
    module: nn.Module,
    a: Theta,
    b: Theta,
    data: Dataset | Mapping[str, Split],
    settings: Sweep | None = None,
    *,
    bn_data: Split | None = None,
    classes: int | None = None,
    max_error: float | None = None,
    same_noise: bool = False,
    batch: int | None = None,
    fast: bool = True,
) -> LayerBarriers:
    """Barriers of single layers, and of any sets of layers, between networks A and B.

    Arguments:
        module: the architecture; a, b: state dicts of it.
        data: where to measure (all of it; ``settings.train_examples`` is for stored pairs).
        settings: what to measure, see :class:`Sweep`.
        bn_data, classes, max_error, same_noise: as :func:`companion.connectivity.barrier`.
        batch: images a forward pass, at most.
        fast: False evaluates every point from the input on, with the plain
            :class:`companion.connectivity.Walker`: the same numbers to 1e-6, slower.

    Raises:
        BadParameter: a group that fits no layer, a window larger than the network, or networks
            that do not fit the module.

    Source: Adilova et al. 2024, Sections 3 and 5.1; our chapter 4.
    """
    raise NotImplementedError
