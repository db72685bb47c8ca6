"""What the checks of the two conditions bring back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from companion.core.errors import BadParameter
from companion.features.values import Stat

L = TypeVar("L", "ReluAdditivity", "LayerCommutativity")


@dataclass(frozen=True)
class ReluAdditivity:
    """One ReLU, on what A and B feed it: X and Y.

    Arguments:
        name: of the site.
        size: units (times positions) of one sample.
        distance: alpha -> Dist_sigma of each sample: of ``relu((1 - alpha) X + alpha Y)`` and
            ``(1 - alpha) relu(X) + alpha relu(Y)``. Undefined where one of the two is all zeros.
        whole: alpha -> the same with the features of all samples as one vector.
        opposite: percent of all X and Y, unit by unit, that are one above and one below zero. Weak
            additivity for every alpha is the same as: none.
    """

    name: str
    size: int
    distance: Mapping[float, Stat]
    whole: Mapping[float, float]
    opposite: float


@dataclass(frozen=True)
class Additivity:
    """Weak additivity of every ReLU, in the order they compute.

    Arguments:
        alphas: weight of B.
        n: samples.
        bn: ``own``: BatchNorm with each network's own running statistics; ``none`` without any.
    """

    layers: tuple[ReluAdditivity, ...]
    alphas: tuple[float, ...]
    n: int
    bn: str

    def layer(self, name: str) -> ReluAdditivity:
        """The ReLU called ``name``.

        Raises:
            BadParameter: there is none.
        """
        return _named(self.layers, name)


@dataclass(frozen=True)
class LayerCommutativity:
    """One linear or convolutional layer.

    Arguments:
        name, kind: of the site.
        com: Dist_com, of ``W_A H_A + W_B H_B`` and ``W_A H_B + W_B H_A``, where H are the layer's
            inputs in either network, over all samples, as one vector.
        weights, inputs: Dist_W and Dist_H, of the weights and of the inputs. All without biases.
    """

    name: str
    kind: str
    com: float
    weights: float
    inputs: float

    @property
    def ratio(self) -> float:
        """Dist_com over the smaller of Dist_W and Dist_H (claim A7).

        NaN where that is 0 or undefined: the inputs of a first layer are the same in both networks,
        so it commutes whatever its weights, and says nothing.
        """
        least = min(self.weights, self.inputs)
        return self.com / least if least > 0 and not math.isnan(self.com) else math.nan


@dataclass(frozen=True)
class Commutativity:
    """Commutativity of every linear and convolutional layer; ``n`` and ``bn`` as there."""

    layers: tuple[LayerCommutativity, ...]
    n: int
    bn: str

    def layer(self, name: str) -> LayerCommutativity:
        """The layer called ``name``.

        Raises:
            BadParameter: there is none.
        """
        return _named(self.layers, name)


def _named(layers: Sequence[L], name: str) -> L:
    for layer in layers:
        if layer.name == name:
            return layer
    raise BadParameter(
        f"layer {name!r} was not measured. Measured: {', '.join(x.name for x in layers)}."
    )
