"""The barrier between two networks: a segment that has passed its gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from companion.connectivity import gates
from companion.connectivity.gates import Gate
from companion.connectivity.paths import Curve, grid, segment, splits_of
from companion.connectivity.walk import BN_EXAMPLES, BN_MODES, Measure, Walker, has_batchnorm
from companion.core.codec import OMIT_DEFAULT
from companion.core.errors import one_of
from companion.core.theta import Layout, Theta, distance, layout
from companion.data import Dataset, Split


@dataclass(frozen=True)
class Barrier:
    """Curves under each BatchNorm mode, the headline mode, and the gates they passed or failed.

    Arguments:
        curves: mode -> curve; one entry ``none`` for networks without running statistics.
        bn: the headline mode.
        gates: outcomes of G0, G0b, G2, G5 and of the controls that were :meth:`recorded` (G1, G3).
        distance: Euclidean distance of the two networks' parameters.
        classes: number of classes, for gate G0's default.
        errors: of the two networks themselves, in percent, as gate G0 saw them. Where only some
            layers move, the ends of the curve are other networks.
        guess: of a text, the error of always saying its commonest token (gate G0); else None.
    """

    curves: Mapping[str, Curve]
    bn: str
    gates: tuple[Gate, ...]
    distance: float
    classes: int
    errors: tuple[float, float]
    guess: float | None = field(default=None, metadata=OMIT_DEFAULT)

    @property
    def valid(self) -> bool:
        """True if no gate failed."""
        return all(g.passed is not False for g in self.gates)

    def gate(self, name: str) -> Gate:
        """The gate called ``name``, such as ``"G1"``. KeyError if it was not asked."""
        for gate in self.gates:
            if gate.name.split()[0] == name:
                return gate
        raise KeyError(f"{name} is not among the gates {[g.name for g in self.gates]}")

    @property
    def metric(self) -> str:
        """What barriers of these data are spoken of in: ``loss`` for text, ``error`` for images."""
        return "error" if self.guess is None else "loss"

    @property
    def curve(self) -> Curve:
        """The curve under the headline mode."""
        return self.curves[self.bn]

    def height(
        self,
        split: str = "test",
        metric: str | None = None,
        definition: str = "mean",
        *,
        bn: str | None = None,
        signed: bool = False,
    ) -> float:
        """The barrier (points of error, or nats), or NaN if a gate failed. See :class:`Curve`.

        Arguments:
            metric: ``error`` or ``loss``; None: :attr:`metric`.
        """
        if not self.valid:
            return math.nan
        metric = metric or self.metric
        return self.curves[bn or self.bn].height(split, metric, definition, signed=signed)

    def judged(
        self, *, reference_error: float | None = None, max_error: float | None = None
    ) -> Barrier:
        """This barrier with gate G0 asked again under other bounds.

        An experiment knows what error is normal for its recipe only after all ends are measured.
        """
        bounds = {"reference": reference_error, "max_error": max_error, "guess": self.guess}
        first = gates.quality(self.errors, self.classes, **bounds)
        return replace(self, gates=(first, *self.gates[1:]))

    def recorded(self, controls: Sequence[Gate]) -> Barrier:
        """This barrier with the outcomes of controls of the whole experiment (G1, G3)."""
        return replace(self, gates=(*self.gates, *controls))

    def __str__(self) -> str:
        failed = [str(g) for g in self.gates if g.passed is False]
        if failed:
            return "INVALID (" + "; ".join(failed) + ")"
        average = self.curve.bn_examples
        named = "" if self.bn == "none" else f", BatchNorm {self.bn}"
        named += "" if average is None else f" on {average:,} inputs"
        form, unit = (".4f", "nats") if self.metric == "loss" else (".2f", "points")
        heights = [f"{s} {self.height(s):{form}} {unit}" for s in self.curve.values]
        return f"barrier {', '.join(heights)}{named}"


def barrier(
    module: nn.Module,
    a: Theta,
    b: Theta,
    data: Dataset | Mapping[str, Split],
    *,
    points: int = 31,
    groups: Sequence[str] | None = None,
    rest: str = "a",
    bn: str = "interpolate",
    bn_data: Split | None = None,
    bn_examples: int | None = BN_EXAMPLES,
    classes: int | None = None,
    max_error: float | None = None,
    same_noise: bool = False,
) -> Barrier:
    """The error and loss barrier between networks A and B, gates included.

    Arguments:
        module: the architecture.
        a, b: state dicts of it.
        data, points, groups, rest: as :func:`segment`.
        bn: the headline BatchNorm mode; all three are measured where the network has BatchNorm.
        bn_data, bn_examples: as :class:`Walker` takes them.
        classes: number of classes, for the default of gate G0 (default: the dataset's own,
            or one more than the largest label).
        max_error: percent, for gate G0 (:func:`companion.connectivity.gates.quality`), on the
            split ``test`` (or the last one).
        same_noise: the two are a null control and may be equal.

    Returns:
        a :class:`Barrier`; one that fails a gate prints as INVALID and its heights are NaN.

    Source: Frankle et al. 2020, Section 2 (instability); our chapter 1.
    """
    one_of("bn", bn, BN_MODES)
    splits = splits_of(data)
    if isinstance(data, Dataset):
        classes = classes or data.classes
    modes = [bn, *(m for m in BN_MODES if m != bn)] if has_batchnorm(module) else [bn]
    curves: dict[str, Curve] = {}
    for mode in modes:
        walker = Walker(module, splits, bn=mode, bn_data=bn_data, bn_examples=bn_examples)
        curve = segment(module, a, b, data, points=points, groups=groups, rest=rest, walker=walker)
        curves[curve.bn] = curve
        if mode == bn:
            ends = walker.walk((a, b), [(1.0, 0.0), (0.0, 1.0)])
            mixed = walker.walk((a, a), [grid(points)[points // 3]])[0]
            self_gap = max(abs(mixed[s].loss - ends[0][s].loss) for s in splits)
    return gated(
        curves,
        bn if bn in curves else "none",
        a,
        b,
        layout(module),
        splits,
        ends,
        self_gap,
        classes=classes,
        max_error=max_error,
        same_noise=same_noise,
    )


def gated(
    curves: Mapping[str, Curve],
    headline: str,
    a: Theta,
    b: Theta,
    entries: Layout,
    splits: Mapping[str, Split],
    ends: Sequence[Mapping[str, Measure]],
    self_gap: float,
    *,
    classes: int | None = None,
    max_error: float | None = None,
    same_noise: bool = False,
) -> Barrier:
    """The barrier of curves that are measured already: the one place where all gates are asked.

    Arguments:
        headline: the BatchNorm mode that is reported.
        entries: the layout of the network.
        ends: what was measured of A and of B, split -> measure.
        self_gap: as :func:`companion.connectivity.gates.symmetry` takes it.
        curves, splits: as of :func:`barrier`; so is what is not named here.
    """
    held_out = "test" if "test" in splits else list(splits)[-1]
    if classes is None:
        classes = 1 + max(int(s.y.max()) for s in splits.values())
    errors = (ends[0][held_out].error, ends[1][held_out].error)
    average = curves["reestimate"].bn_examples if "reestimate" in curves else None
    names = entries.parameters
    found = (
        *gates.of_ends(a, b, names, errors, classes, splits[held_out], max_error, same_noise),
        gates.symmetry(a, b, entries.floating, self_gap),
        gates.batchnorm(headline, list(curves), average),
    )
    guess = gates.guessing(splits[held_out])
    return Barrier(curves, headline, found, distance(a, b, names), classes, errors, guess)
