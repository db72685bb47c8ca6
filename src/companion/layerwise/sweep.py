"""Barriers of layers: which sets of groups move, and what their curves say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from companion.connectivity import (
    BN_EXAMPLES,
    BN_MODES,
    Barrier,
    Curve,
    barrier,
    check_bn_examples,
    grid,
    has_batchnorm,
)
from companion.connectivity.barrier import gated, splits_of, values_of
from companion.connectivity.walk import sizes_of
from companion.core import codec
from companion.core.errors import BadParameter, one_of, whole
from companion.core.seeds import Key
from companion.core.theta import Layout, Theta, distance
from companion.data import Dataset, Split
from companion.layerwise.groups import Groups, layer_groups, matching
from companion.layerwise.replay import LayerWalker, Path

KINDS = ("single", "shallow", "deep", "random", "window")
"""``single``: each group alone. ``shallow``: the first, the first two, … ``deep``: the last, the
last two, … ``random``: the same in random orders. ``window``: ``window`` neighbours at a time."""

DEFINITIONS = ("networks", "mean", "linear")
"""What a height is measured from. ``networks``: the value at alpha = ½ minus the mean of the two
whole networks, with its sign: Definition 2 of Adilova et al. 2024. ``mean`` and ``linear``: the
largest excess over the ends of *this* segment, as :meth:`companion.connectivity.Curve.height`
defines it; one end is the default network, the other is it with the group replaced."""

_FEW = 256  # images of the gate that asks for symmetry


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
        one_of("rest", self.rest, ("a", "b", "both"))
        one_of("match", self.match, ("group", "layer"))
        one_of("bn", self.bn, BN_MODES)
        if self.points != 1:
            grid(self.points)
        for field, least in (("window", 1), ("orders", 1), ("draws", 0)):
            whole(field, getattr(self, field), least, most=10_000)
        check_bn_examples(self.bn_examples)
        for field in ("train_examples", "test_examples"):
            whole(field, getattr(self, field), 1, "null")

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
class Parts:
    """Is the full barrier more than its parts? (claim B07)

    Arguments:
        full: barrier of the whole network at ½.
        total: sum over layers of the positive single-layer barriers, each the larger of the two
            defaults'.
    """

    full: float
    total: float

    @property
    def ratio(self) -> float:
        """Full over total; infinite if no layer has a barrier."""
        return self.full / self.total if self.total else math.inf


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
        self, row: Row, split: str = "test", metric: str = "loss", definition: str = "networks"
    ) -> float:
        """The barrier of one row, in nats or points; NaN if a gate failed.

        Arguments:
            definition: one of :data:`DEFINITIONS`.

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
        return row.curve.height(split, metric, definition)

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

    def additivity(self, split: str = "test", metric: str = "loss") -> Parts:
        """The full barrier against the sum of the single layers' (kind ``single`` is needed)."""
        total = sum(max(v, 0.0) for v in self.worst("single", split, metric).values())
        return Parts(self.full_height(split, metric), total if self.valid else math.nan)

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
            first, *others = (r.half(split, metric) - base for r in (towards[label, rest], *draws))
            out.append(Rise(label, rest, first, tuple(others)))
        return tuple(out)

    def all_heights(self) -> dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]:
        """Kind -> split -> metric -> label -> default network -> height."""
        kinds = [k for k in ("full", *KINDS, "subset") if self.select(k)]
        return {
            kind: {s: {m: self.heights(kind, s, m) for m in self.ends[s]} for s in self.splits}
            for kind in kinds
        }

    def judged(
        self, *, reference_error: float | None = None, max_error: float | None = None
    ) -> LayerBarriers:
        """These with quality checked again, see :meth:`companion.connectivity.Barrier.judged`."""
        full = self.full.judged(reference_error=reference_error, max_error=max_error)
        return replace(self, full=full)


@dataclass(frozen=True)
class _Set:
    """Groups that move together: a row of the result for each default network."""

    kind: str
    label: str
    groups: tuple[str, ...]
    draw: int | None = None

    def names(self, groups: Groups, spec: Layout) -> tuple[str, ...]:
        """The entries that move, in the layout's order. ``full`` is every entry, grouped or not."""
        names = {name for label in self.groups for name in groups[label]}
        if self.kind == "full":
            names = set(spec.floating)
        if self.draw is not None:
            names &= set(spec.parameters)
        return tuple(name for name in spec.floating if name in names)


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
        module: the architecture.
        a, b: state dicts of it.
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
    settings = settings or Sweep()
    splits = splits_of(data)
    how: dict[str, Any] = {"bn": settings.bn, "bn_examples": settings.bn_examples}
    how["bn_data"] = bn_data
    walker = LayerWalker(module, splits, batch=batch, **how)
    spec = walker.layout
    a, b = walker.enter(a, "A"), walker.enter(b, "B")
    # Two images are enough to tell the order of the layers.
    groups = layer_groups(walker.module, settings.by, next(iter(splits.values())).x[:2])

    # One path for all sets that move the same entries of the same network.
    paths: dict[tuple[frozenset[str], str, int | None], Path] = {}
    wanted = []
    for chosen in _sets(groups, settings):
        names = chosen.names(groups, spec)
        for rest in settings.rests:
            base = "a" if len(names) == len(spec.floating) and chosen.draw is None else rest
            key = (frozenset(names), base, chosen.draw)
            if key not in paths:
                paths[key] = _path(chosen, names, base, a, b, spec, settings)
            wanted.append((chosen, rest, key))
    networks = Path("a", spec.floating, ((1.0, 0.0), (0.0, 1.0)))
    measured, method = walker.measure(
        a, b, [networks, *paths.values()], fast=fast, adapt=batch is None
    )
    found = dict(zip(paths, measured[1:], strict=True))

    sizes = sizes_of(splits)
    own = set(spec.parameters)
    rows = tuple(
        Row(
            chosen.kind,
            chosen.label,
            chosen.groups,
            rest,
            chosen.draw,
            distance(a, b, [name for name in paths[key].names if name in own]),
            Curve(settings.alphas, values_of(found[key]), walker.bn, sizes, walker.bn_examples),
        )
        for chosen, rest, key in wanted
    )
    judging: dict[str, Any] = {"max_error": max_error, "same_noise": same_noise}
    judging["classes"] = classes or (data.classes if isinstance(data, Dataset) else None)
    if has_batchnorm(module):  # all three modes have to be measured
        full = barrier(module, a, b, splits, points=max(3, settings.points), **how, **judging)
    else:
        smallest = min(splits, key=lambda s: len(splits[s]))
        # Whether a mixture of A with itself is A shows on any images; a few are enough.
        few = Split(splits[smallest].x[:_FEW], splits[smallest].y[:_FEW])
        plain = LayerWalker(module, {smallest: few}, batch=walker.batch)
        mixed, itself = plain.walk((a, a), [(2 / 3, 1 / 3), (1.0, 0.0)])
        gap = abs(mixed[smallest].loss - itself[smallest].loss)
        judging |= {"apart": walker.apart, "notes": walker.notes}
        curves = {walker.bn: rows[0].curve}
        full = gated(curves, walker.bn, a, b, spec, splits, measured[0], gap, **judging)
    at_ends = {
        split: {m: (v[0], v[1]) for m, v in values.items()}
        for split, values in values_of(measured[0]).items()
    }
    return LayerBarriers(groups, rows, full, at_ends, method)


def _sets(groups: Groups, settings: Sweep) -> Iterator[_Set]:
    labels = tuple(groups)
    yield _Set("full", "full", labels)
    count = len(labels)
    for kind in settings.kinds:
        if kind == "single":
            yield from (_Set(kind, label, (label,)) for label in labels)
        elif kind == "shallow":
            yield from (_Set(kind, f"first {k}", labels[:k]) for k in range(1, count + 1))
        elif kind == "deep":
            yield from (_Set(kind, f"last {k}", labels[count - k :]) for k in range(1, count + 1))
        elif kind == "random":
            for order in range(settings.orders):
                places = Key("layerwise", settings.seed, "order", order).permutation(count).tolist()
                for k in range(1, count + 1):
                    chosen = tuple(labels[i] for i in sorted(places[:k]))
                    yield _Set(kind, f"order {order + 1}: {k}", chosen)
        else:
            size = settings.window
            if size > count:
                raise BadParameter(
                    f"window: {size} layers, but the network has {count} groups of them."
                )
            for k in range(count - size + 1):
                ends = dict.fromkeys((labels[k], labels[k + size - 1]))
                yield _Set(kind, " … ".join(ends), labels[k : k + size])
    for name, prefixes in settings.subsets:
        hits = {label for prefix in prefixes for label in matching(groups, prefix)}
        yield _Set("subset", name, tuple(label for label in labels if label in hits))
    for draw in range(settings.draws):
        yield _Set("full", "full", labels, draw)
        yield from (_Set("single", label, (label,), draw) for label in labels)


def _path(
    chosen: _Set,
    names: tuple[str, ...],
    rest: str,
    a: Theta,
    b: Theta,
    spec: Layout,
    settings: Sweep,
) -> Path:
    """From one network to the other, or in a random direction."""
    rows = [(0.5, 0.5)] if settings.points == 1 else grid(settings.points)
    weights = tuple(rows if rest == "a" else [(second, first) for first, second in rows])
    if chosen.draw is None:
        return Path(rest, names, weights)
    parts = [list(names)]
    if settings.match == "layer":
        parts = [[n for n in layer if n in names] for layer in spec.groups.values()]
    key = Key("layerwise", settings.seed, "direction", chosen.kind, chosen.label, rest, chosen.draw)
    return Path(
        rest, names, weights, partial(random_end, a if rest == "a" else b, a, b, parts, key)
    )


def random_end(
    base: Theta, a: Theta, b: Theta, parts: Sequence[Sequence[str]], key: Key
) -> dict[str, torch.Tensor]:
    """``base`` plus a random direction as long as ``b - a``.

    Arguments:
        parts: names of entries; in each part the direction is Gaussian and has the length of the
            difference there.
        key: equal keys, equal directions (torch's CPU generator, whatever the device).

    Returns:
        the entries of all parts.
    """
    generator = key.generator()
    out: dict[str, torch.Tensor] = {}
    for part in parts:
        draws = {n: torch.randn(base[n].shape, generator=generator).double() for n in part}
        length = math.sqrt(sum(float((d**2).sum()) for d in draws.values()))
        scale = distance(a, b, part) / length if length else 0.0
        for name, draw in draws.items():
            moved = base[name].double() + scale * draw.to(base[name].device)
            out[name] = moved.to(base[name].dtype)
    return out
