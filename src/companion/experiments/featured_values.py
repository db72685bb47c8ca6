"""What :func:`companion.experiments.featured.examine` returns for a pair, and what it says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from companion.connectivity import Barrier
from companion.core.errors import one_of
from companion.experiments.methods import Method
from companion.experiments.pairs import Pair
from companion.features import Additivity, Commutativity, Features, Spectrum, Stitching
from companion.features.measure import LayerFeatures

MODES = ("interpolate", "reestimate")
"""BatchNorm on the way between A and B: statistics interpolated as in the paper's code, or
estimated again. A network without BatchNorm has one mode, ``none``."""


@dataclass(frozen=True)
class Lemma:
    """Lemma 1 on one pair: errors along alpha, in percent, and the bound.

    Arguments:
        alphas: the line's grid, shape (points,).
        mixture: error of the mixed logits (1 - alpha) f(A) + alpha f(B): Lemma 1's own object.
        path: error of the network with interpolated weights, which it bounds if LLFC holds.
        bound: Err_A + Err_B.
        examples: images behind each error, so that errors can be compared as counts.
    """

    alphas: tuple[float, ...]
    mixture: tuple[float, ...]
    path: tuple[float, ...]
    bound: float
    examples: int

    def _excess(self, errors: Sequence[float]) -> list[int]:
        """Images above the bound, a whole number at each alpha."""
        limit = round(self.bound * self.examples / 100)
        return [round(e * self.examples / 100) - limit for e in errors]

    @property
    def violations(self) -> int:
        """At how many alphas the mixed logits are wrong more often than the bound: it must be 0."""
        return sum(e > 0 for e in self._excess(self.mixture))

    @property
    def excess(self) -> float:
        """How far the interpolated network's error rises above the bound at most, in points."""
        return 100 * max(self._excess(self.path)) / self.examples


@dataclass(frozen=True)
class Featured:
    """What was measured of a pair under one way of bringing B to A.

    Arguments:
        pair, method: which.
        barrier: of the test error and loss on the line from A to B (or pi(B)), with its gates.
        features: BatchNorm mode -> the features; one entry ``none`` without BatchNorm.
        mixture: error (%) of the mixed logits on the line's grid.
        examples: images behind it.
        additivity, commutativity, stitching: if they were asked for.
        spectra: ``a`` and ``b`` -> singular values of weights and features, if asked for.
    """

    pair: Pair
    method: Method
    barrier: Barrier
    features: Mapping[str, Features] = field(repr=False)
    mixture: tuple[float, ...] = field(repr=False)
    examples: int
    additivity: Additivity | None = field(default=None, repr=False)
    commutativity: Commutativity | None = field(default=None, repr=False)
    stitching: Stitching | None = field(default=None, repr=False)
    spectra: Mapping[str, tuple[Spectrum, ...]] = field(default_factory=dict, repr=False)

    @property
    def valid(self) -> bool:
        """True if no gate failed."""
        return self.barrier.valid

    @property
    def modes(self) -> tuple[str, ...]:
        """The BatchNorm modes, headline first."""
        return tuple(self.features)

    def look(self, bn: str | None = None) -> Features:
        """The features under a BatchNorm mode; None: the headline's. A network without BatchNorm
        has one answer to every mode.

        Raises:
            BadParameter: a mode that was not measured.
        """
        if self.modes == ("none",) and bn in MODES:
            return self.features["none"]
        return self.features[one_of("bn", bn or self.modes[0], self.modes)]

    def layers(self, bn: str | None = None) -> tuple[LayerFeatures, ...]:
        """The sites, each feature once: a residual block puts out what its last ReLU does."""
        out: dict[tuple[object, ...], LayerFeatures] = {}
        for x in self.look(bn).layers:
            out.setdefault((x.size, x.baseline, *x.gap.values(), *x.c.values()), x)
        return tuple(out.values())

    def height(self, bn: str | None = None) -> float:
        """The test error barrier above the straight line between the errors of the ends (points);
        NaN if a gate failed. The paper defines no barrier; this is chapter 1's.

        Raises:
            BadParameter: a BatchNorm mode that was not measured.
        """
        mode = self.look(bn).bn if bn is not None else None
        return self.barrier.height("test", "error", "linear", bn=mode)

    def gaps(self, alpha: float = 0.5, bn: str | None = None) -> dict[str, float]:
        """Layer -> E[1 - cos_alpha]."""
        return {x.name: x.gap[alpha].mean for x in self.layers(bn)}

    def baselines(self, bn: str | None = None) -> dict[str, float]:
        """Layer -> E[1 - cos(A, B)]."""
        return {x.name: x.baseline.mean for x in self.layers(bn)}

    def ratios(self, alpha: float = 0.5, bn: str | None = None) -> dict[str, float]:
        """Layer -> E[1 - cos_alpha] / E[1 - cos(A, B)]."""
        return {x.name: x.ratio(alpha) for x in self.layers(bn)}

    def coefficients(self, alpha: float = 0.5, bn: str | None = None) -> dict[str, float]:
        """Layer -> median over samples of the paper's coefficient c, which is the ratio of lengths
        below times the cosine."""
        return {x.name: x.c[alpha].median for x in self.layers(bn)}

    def lengths(self, alpha: float = 0.5, bn: str | None = None) -> dict[str, float]:
        """Layer -> |F_int| / |F_alpha|, from the medians of c and its twin, whose quotient is the
        square of it; NaN where either is 0."""
        pairs = {x.name: (x.c[alpha].median, x.twin[alpha].median) for x in self.layers(bn)}
        return {
            n: math.sqrt(c / twin) if c * twin > 0 else math.nan for n, (c, twin) in pairs.items()
        }

    def lemma(self) -> Lemma:
        """Lemma 1 along the line. BatchNorm's statistics are interpolated, so that both ends are A
        and B themselves; with statistics estimated again they would be other networks."""
        curves = self.barrier.curves
        curve = curves["interpolate"] if "interpolate" in curves else curves["none"]
        path = tuple(curve.values["test"]["error"])
        bound = self.mixture[0] + self.mixture[-1]
        return Lemma(tuple(curve.alphas), self.mixture, path, bound, self.examples)


def mean_gap(found: Featured, alpha: float = 0.5, bn: str | None = None) -> float:
    """E[1 - cos_alpha], averaged over layers after the first; NaN if a gate failed."""
    values = [v for v in list(found.gaps(alpha, bn).values())[1:] if not math.isnan(v)]
    return sum(values) / len(values) if values and found.valid else math.nan
