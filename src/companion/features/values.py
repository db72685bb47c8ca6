"""What a measurement of features brings back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from companion.core.codec import OMIT_DEFAULT
from companion.core.errors import BadParameter

LOW, HIGH = 0.05, 0.95


@dataclass(frozen=True)
class Stat:
    """One quantity over samples.

    Arguments:
        mean, std: std is the population's, over samples.
        n: samples that count.
        median, low, high: low and high are the 5 % and 95 % quantiles.
        undefined: samples that do not count: a feature is zero, or not finite, and has no angle.
            With ``n = 0`` all numbers are NaN.
    """

    mean: float
    std: float
    n: int
    median: float
    low: float
    high: float
    undefined: int = 0

    @classmethod
    def of(cls, values: torch.Tensor) -> Stat:
        """Of one number a sample, NaN where it is undefined."""
        flat = values.detach().double().flatten()
        good = flat[torch.isfinite(flat)]
        undefined = flat.numel() - good.numel()
        if not good.numel():
            return cls(math.nan, math.nan, 0, math.nan, math.nan, math.nan, undefined)
        ordered = good.sort().values
        low, median, high = (_quantile(ordered, q) for q in (LOW, 0.5, HIGH))
        mean, std = float(good.mean()), float(good.std(correction=0))
        return cls(mean, std, good.numel(), median, low, high, undefined)


def _quantile(ordered: torch.Tensor, q: float) -> float:
    """Linear between neighbours (torch.quantile refuses more than 16 million values)."""
    at = q * (len(ordered) - 1)
    i = int(at)
    j = min(i + 1, len(ordered) - 1)
    below, above = float(ordered[i]), float(ordered[j])
    return below + (at - i) * (above - below)


@dataclass(frozen=True)
class LayerFeatures:
    """How linearly the features of one site are connected.

    F_alpha is the feature of the network ``(1 - alpha) A + alpha B``, and F_int the interpolated
    feature ``(1 - alpha) F_A + alpha F_B``, both flattened to one vector a sample.

    Arguments:
        name, kind: of the site.
        size: numbers in one sample's feature.
        baseline: 1 - cos(F_A, F_B).
        gap: alpha -> 1 - cos(F_alpha, F_int), cosine with its sign: from 0 to 2.
        c: alpha -> ``<F_alpha, F_int> / |F_alpha|^2``, the c of Definition 2.
        twin: alpha -> ``<F_alpha, F_int> / |F_int|^2``, what the released code calls the
            coefficient; c times twin is cos^2, sample by sample.

    Source: Zhou et al. 2023, Definition 2, Figures 2 to 4 and Appendix B.2; our chapter 3.
    """

    name: str
    kind: str
    size: int
    baseline: Stat
    gap: Mapping[float, Stat]
    c: Mapping[float, Stat]
    twin: Mapping[float, Stat]

    def ratio(self, alpha: float = 0.5) -> float:
        """Mean gap over mean baseline; NaN where A and B have parallel features."""
        base = self.baseline.mean
        return self.gap[alpha].mean / base if base > 0 else math.nan


@dataclass(frozen=True)
class Features:
    """The features of two networks and of those between them, layer by layer.

    Arguments:
        layers: in the order they compute.
        alphas: 0 = A, 1 = B (the paper writes it the other way
            round; it matters to nobody who uses a symmetric set).
        n: samples (or positions) behind each layer.
        per: ``sample`` or ``position``.
        bn: the BatchNorm mode of every network here, the ends included; ``none`` without any.
        predictions: behind each error.
        errors, losses: ``a``, ``b`` -> percent, nats.
        path, path_loss: alpha -> of the network with interpolated weights.
        mixture, mixture_loss: alpha -> of the mixed logits ``(1 - alpha) f(A) + alpha f(B)``.
        bn_examples: in mode ``reestimate``, the inputs whose statistics each network has.
    """

    layers: tuple[LayerFeatures, ...]
    alphas: tuple[float, ...]
    n: int
    per: str
    bn: str
    predictions: int
    errors: Mapping[str, float]
    losses: Mapping[str, float]
    path: Mapping[float, float]
    path_loss: Mapping[float, float]
    mixture: Mapping[float, float]
    mixture_loss: Mapping[float, float]
    bn_examples: int | None = field(default=None, metadata=OMIT_DEFAULT)

    def layer(self, name: str) -> LayerFeatures:
        """The site called ``name``.

        Raises:
            BadParameter: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise BadParameter(
            f"layer {name!r} was not measured. Measured: {', '.join(x.name for x in self.layers)}."
        )

    @property
    def bound(self) -> float:
        """Err_A + Err_B in percent, which Lemma 1 puts above the error of the path."""
        return self.errors["a"] + self.errors["b"]

    def slack(self, of: str = "mixture") -> dict[float, float]:
        """Alpha -> how far an error stays below :attr:`bound`, in points, from whole counts.

        Arguments:
            of: ``mixture``, where it is never negative (a convex combination of logits is wrong
                only where one of the two is), or ``path``, where it may be if LLFC fails.

        Source: Zhou et al. 2023, Lemma 1.
        """
        if of not in ("mixture", "path"):
            raise BadParameter(f"of: {of!r} must be 'mixture' or 'path'.")
        both = sum(self._count(e) for e in self.errors.values())
        return {
            alpha: 100 * (both - self._count(error)) / self.predictions
            for alpha, error in getattr(self, of).items()
        }

    def _count(self, error: float) -> int:
        return round(error * self.predictions / 100)
