"""What a sweep is asked for, and what it brings back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from companion.connectivity import BN_EXAMPLES, BN_MODES, Barrier, Curve, check_bn_examples, grid
from companion.core import codec
from companion.core.errors import BadParameter, one_of

KINDS = ("single", "shallow", "deep", "random", "window")
"""``single``: each group alone. ``shallow``: the first, the first two, … ``deep``: the last, the
last two, … ``random``: the same in random orders. ``window``: ``window`` neighbours at a time."""

RESTS = ("a", "b", "both")
DEFINITIONS = ("networks", "mean", "linear")
"""What a height is measured from. ``networks``: the value at alpha = ½ minus the mean of the two
whole networks, with its sign: Definition 2 of Adilova et al. 2024. ``mean`` and ``linear``: the
largest excess over the ends of *this* segment, as :meth:`companion.connectivity.Curve.height`
defines it; one end is the default network, the other is it with the group replaced."""

MATCHES = ("group", "layer")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is measured between two networks. Checked when it is made.

    Arguments:
        by: the layer groups, see :data:`companion.layerwise.groups.By`.
        kinds: which sets of groups move, of :data:`KINDS`.
        subsets: name -> groups (labels or prefixes of them) that move together, as further sets.
        points: of the alpha grid, odd; 3 is the paper's {0, ½, 1}. 1 is ½ alone: half the work, and
            enough for Definition 2, but heights over the segment's own ends are then unknown.
        rest: the network that keeps the other layers: ``a``, ``b``, or ``both`` in turn.
        window: groups in a window, for the kind ``window``.
        orders: random orders, for the kind ``random``.
        draws: random directions for each single group and for the whole network, as long as the
            difference of the two networks there. 0: none. Running statistics do not take part.
        match: lengths of a random direction over several layers. ``group``: one Gaussian direction,
            as long as the whole difference. ``layer``: each layer's part as long as its difference.
        bn: what BatchNorm does, one of :data:`companion.connectivity.BN_MODES`.
        train_examples, test_examples: images that stand for each split (None: all), for stored
            pairs (:func:`companion.experiments.layers.sweep_pairs`) and the command line.
        bn_examples: training inputs that ``bn="reestimate"`` averages over at a point (None: all).
        seed: of the random orders and directions.
    """

    by: str | int | tuple[str, ...] = "module"
    kinds: tuple[str, ...] = ("single", "shallow", "deep")
    subsets: tuple[tuple[str, tuple[str, ...]], ...] = ()
    points: int = 3
    rest: str = "both"
    window: int = 3
    orders: int = 1
    draws: int = 0
    match: str = "group"
    bn: str = "interpolate"
    train_examples: int | None = None
    test_examples: int | None = None
    bn_examples: int | None = BN_EXAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.by, str | int):
            object.__setattr__(self, "by", tuple(self.by))
        pairs = self.subsets.items() if isinstance(self.subsets, Mapping) else self.subsets
        object.__setattr__(self, "subsets", tuple((k, tuple(v)) for k, v in pairs))
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for kind in self.kinds:
            one_of("kinds", kind, KINDS)
        for field, allowed in (("rest", RESTS), ("match", MATCHES), ("bn", BN_MODES)):
            one_of(field, getattr(self, field), allowed)
        if self.points != 1:
            grid(self.points)
        for field, least in (("window", 1), ("orders", 1), ("draws", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadParameter(f"{field}: {value!r} must be a whole number of {least} or more.")
        check_bn_examples(self.bn_examples)
        for field in ("train_examples", "test_examples"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise BadParameter(
                    f"{field}: {value!r} must be a whole number of 1 or more, or null."
                )

    @property
    def rests(self) -> tuple[str, ...]:
        """The default networks, ``("a", "b")`` for ``both``."""
        return ("a", "b") if self.rest == "both" else (self.rest,)

    @property
    def alphas(self) -> tuple[float, ...]:
        """The grid."""
        return (0.5,) if self.points == 1 else tuple(alpha for _, alpha in grid(self.points))

    def identity(self) -> dict[str, Any]:
        """What determines the numbers, for the store; defaults are left out.

        ``bn_examples`` counts for networks with BatchNorm only: the store's entry adds it.
        """
        return {k: v for k, v in codec.changed_fields(self).items() if k != "bn_examples"}


@dataclass(frozen=True)
class Row:
    """The curve of one set of groups.

    Arguments:
        kind: one of :data:`KINDS`, or ``full`` (the whole network) or ``subset``.
        label: the group; ``first 3``, ``last 3``, ``order 1: 3``; ``conv2 … conv4`` for a window;
            the name of a subset; ``full``.
        groups: the labels of the groups that move.
        rest: the default network, ``a`` or ``b``, which all other groups stay at.
        draw: None: towards the other network. A number: in that random direction.
        length: Euclidean distance, of parameters, from one end of the segment to the other.
        curve: loss and error. ``alpha`` counts from A to B whatever the default network is: with
            ``rest="b"`` the network B itself is at alpha = 1. A random direction leaves the default
            network likewise and has gone ``length`` at the other end.
    """

    kind: str
    label: str
    groups: tuple[str, ...]
    rest: str
    draw: int | None
    length: float
    curve: Curve

    def half(self, split: str = "test", metric: str = "error") -> float:
        """The value at alpha = ½."""
        return self.curve.values[split][metric][self.curve.alphas.index(0.5)]


@dataclass(frozen=True)
class Additivity:
    """Is the full barrier more than its parts? (claim B7)

    Arguments:
        full: barrier of the whole network at ½.
        total: sum over layers of the positive
            single-layer barriers, each the larger of the two defaults'; ratio: full / total
            (infinite if no layer has a barrier).
    """

    full: float
    total: float
    ratio: float


@dataclass(frozen=True)
class Rise:
    """How much one layer's average raises the loss, against random directions of equal norm (B10).

    Arguments:
        label, rest: the group and the default network.
        averaging: value at ½ towards the other network, minus the default network's own.
        random: the same for each random direction.
    """

    label: str
    rest: str
    averaging: float
    random: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean rise over the random directions; NaN without any."""
        return sum(self.random) / len(self.random) if self.random else math.nan


@dataclass(frozen=True)
class LayerBarriers:
    """Curves of every set of layers between two networks, with the whole network's barrier.

    Arguments:
        groups: label -> entries, in the order the layers compute.
        rows: one a set of groups, default network and direction.
        full: the barrier of the whole network, gates included: if one failed, heights are NaN.
        ends: split -> metric -> (value of A, value of B).
        method: ``replay``, or ``walker`` where every point was evaluated from the input on.
    """

    groups: Mapping[str, tuple[str, ...]]
    rows: tuple[Row, ...]
    full: Barrier
    ends: Mapping[str, Mapping[str, tuple[float, float]]]
    method: str

    @property
    def valid(self) -> bool:
        """True if no gate failed."""
        return self.full.valid

    @property
    def bn(self) -> str:
        """The BatchNorm mode of every number here, or ``none``."""
        return self.full.bn

    @property
    def splits(self) -> tuple[str, ...]:
        """The data measured on, such as ``("train", "test")``."""
        return tuple(self.ends)

    def select(self, kind: str, *, rest: str | None = None, draws: bool = False) -> tuple[Row, ...]:
        """The rows of one kind, in order; those of random directions only with ``draws``."""
        return tuple(
            r
            for r in self.rows
            if r.kind == kind and rest in (None, r.rest) and (r.draw is not None) == draws
        )

    def height(
        self,
        row: Row,
        split: str = "test",
        metric: str = "loss",
        definition: str = "networks",
        *,
        signed: bool = False,
    ) -> float:
        """The barrier of one row, in nats or points; NaN if a gate failed.

        Arguments:
            definition: one of :data:`DEFINITIONS`.
            signed: for ``mean`` and ``linear``, look between the ends only; see
                :meth:`companion.connectivity.Curve.height`. ``networks`` has its sign always.

        Raises:
            BadParameter: ``mean`` or ``linear`` where only alpha = ½ was measured.
        """
        one_of("definition", definition, DEFINITIONS)
        if not self.valid:
            return math.nan
        if definition == "networks":
            a, b = self.ends[split][metric]
            return row.half(split, metric) - (a + b) / 2
        if len(row.curve.alphas) < 3:
            raise BadParameter(
                f"definition {definition!r} needs the ends of the segment: measure 3 points or "
                "more, not 1."
            )
        return row.curve.height(split, metric, definition, signed=signed)

    def heights(
        self,
        kind: str = "single",
        split: str = "test",
        metric: str = "loss",
        definition: str = "networks",
    ) -> dict[str, dict[str, float]]:
        """Label -> default network (``a``, ``b``) -> barrier, in order."""
        out: dict[str, dict[str, float]] = {}
        for row in self.select(kind):
            out.setdefault(row.label, {})[row.rest] = self.height(row, split, metric, definition)
        return out

    def worst(
        self,
        kind: str = "single",
        split: str = "test",
        metric: str = "loss",
        definition: str = "networks",
    ) -> dict[str, float]:
        """Label -> the larger of the barriers with A and with B as the default network."""
        found = self.heights(kind, split, metric, definition)
        return {label: max(both.values()) for label, both in found.items()}

    def full_height(
        self, split: str = "test", metric: str = "loss", definition: str = "networks"
    ) -> float:
        """The whole network's barrier, defined as those of its layers; NaN if a gate failed."""
        return self.height(self.select("full")[0], split, metric, definition)

    def additivity(self, split: str = "test", metric: str = "loss") -> Additivity:
        """The full barrier against the sum of the single layers' (kind ``single`` is needed)."""
        full = self.full_height(split, metric)
        total = sum(max(v, 0.0) for v in self.worst("single", split, metric).values())
        if not self.valid:
            return Additivity(math.nan, math.nan, math.nan)
        return Additivity(full, total, full / total if total else math.inf)

    def rises(
        self, kind: str = "single", split: str = "test", metric: str = "loss"
    ) -> tuple[Rise, ...]:
        """Averaging against random directions, for each group (``single``) or ``full``.

        NaN if a gate failed. The whole network has one average, which both defaults share; its
        rise is above the default network in question.
        """
        random: dict[tuple[str, str], list[Row]] = {}
        for row in self.select(kind, draws=True):
            random.setdefault((row.label, row.rest), []).append(row)
        towards = {(r.label, r.rest): r for r in self.select(kind)}
        out = []
        for (label, rest), draws in random.items():
            base = self.ends[split][metric]["ab".index(rest)] if self.valid else math.nan
            row = towards[label, rest]
            out.append(
                Rise(
                    label,
                    rest,
                    row.half(split, metric) - base,
                    tuple(d.half(split, metric) - base for d in draws),
                )
            )
        return tuple(out)

    def judged(
        self, *, reference_error: float | None = None, max_error: float | None = None
    ) -> LayerBarriers:
        """These with gate G0 asked again, see :meth:`companion.connectivity.Barrier.judged`."""
        full = self.full.judged(reference_error=reference_error, max_error=max_error)
        return replace(self, full=full)
