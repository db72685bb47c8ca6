"""What the checks of the two conditions bring back: values, with JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from companion.core.errors import BadParameter
from companion.features.values import Stat, plain, stats_from_json, stats_to_json

L = TypeVar("L", "ReluAdditivity", "LayerCommutativity")


@dataclass(frozen=True)
class ReluAdditivity:
    """One ReLU, on what A and B feed it: X and Y.

    Arguments:
        name: of the site; size: units (times positions) of one sample.
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

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values; :meth:`from_json` is the inverse."""
        return {
            "name": self.name,
            "size": self.size,
            "distance": stats_to_json(self.distance),
            "whole": {repr(float(k)): plain(v) for k, v in self.whole.items()},
            "opposite": self.opposite,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ReluAdditivity:
        """The inverse of :meth:`to_json`."""
        return cls(
            value["name"],
            value["size"],
            stats_from_json(value["distance"]),
            {float(k): float(v) for k, v in value["whole"].items()},
            value["opposite"],
        )


@dataclass(frozen=True)
class Additivity:
    """Weak additivity of every ReLU, in the order they compute.

    Arguments:
        alphas: weight of B; n: samples.
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

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values; :meth:`from_json` is the inverse."""
        return {
            "layers": [x.to_json() for x in self.layers],
            "alphas": list(self.alphas),
            "n": self.n,
            "bn": self.bn,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Additivity:
        """The inverse of :meth:`to_json`."""
        found = tuple(ReluAdditivity.from_json(x) for x in value["layers"])
        return cls(found, tuple(value["alphas"]), value["n"], value["bn"])


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

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values; :meth:`from_json` is the inverse."""
        found = {k: plain(getattr(self, k)) for k in ("com", "weights", "inputs")}
        return {"name": self.name, "kind": self.kind, **found}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerCommutativity:
        """The inverse of :meth:`to_json`."""
        found = (float(value[k]) for k in ("com", "weights", "inputs"))
        return cls(value["name"], value["kind"], *found)


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

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values; :meth:`from_json` is the inverse."""
        return {"layers": [x.to_json() for x in self.layers], "n": self.n, "bn": self.bn}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Commutativity:
        """The inverse of :meth:`to_json`."""
        found = tuple(LayerCommutativity.from_json(x) for x in value["layers"])
        return cls(found, value["n"], value["bn"])


def _named(layers: Sequence[L], name: str) -> L:
    for layer in layers:
        if layer.name == name:
            return layer
    raise BadParameter(
        f"layer {name!r} was not measured. Measured: {', '.join(x.name for x in layers)}."
    )
