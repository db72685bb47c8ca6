"""Barriers of layers: which sets of groups move, and what is made of their measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from companion.connectivity import Barrier, Curve, Measure, barrier, grid, has_batchnorm
from companion.connectivity.barrier import gated
from companion.connectivity.paths import splits_of
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import Layout, Theta, check_theta, distance
from companion.data import Dataset, Split
from companion.layerwise.groups import Groups, layer_groups, matching
from companion.layerwise.values import LayerBarriers, Row, Sweep
from companion.layerwise.walk import LayerWalker, Path

_FEW = 256  # images of the gate that asks for symmetry
_EXAMPLES = 2  # images of the pass that tells the order of the layers


@dataclass(frozen=True)
class _Set:
    """Groups that move together: a row of the result for each default network."""

    kind: str
    label: str
    groups: tuple[str, ...]
    draw: int | None = None


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
    walker = LayerWalker(
        module,
        splits,
        bn=settings.bn,
        bn_data=bn_data,
        bn_examples=settings.bn_examples,
        batch=batch,
    )
    walker.chosen = batch is not None
    for theta, name in ((a, "A"), (b, "B")):
        check_theta(walker.module, theta, name)
    example = next(iter(splits.values())).x[:_EXAMPLES]
    groups = layer_groups(walker.module, settings.by, example)
    sets = list(_sets(groups, settings))

    # One path for all sets that move the same entries of the same network.
    paths: dict[tuple[frozenset[str], str, int | None], Path] = {}
    wanted = []
    for chosen in sets:
        names = _names(chosen, groups, walker.layout)
        for rest in settings.rests:
            whole = len(names) == len(walker.layout.floating) and chosen.draw is None
            key = (frozenset(names), "a" if whole else rest, chosen.draw)
            if key not in paths:
                end = _direction(chosen, names, key[1], a, b, walker.layout, settings)
                paths[key] = Path(key[1], names, _weights(settings, key[1]), end)
            wanted.append((chosen, rest, key))
    ends = [Path("a", walker.layout.floating, ((1.0, 0.0), (0.0, 1.0)))]  # the networks themselves
    measured, method = walker.measure(a, b, [*ends, *paths.values()], fast=fast)
    found = dict(zip(paths, measured[1:], strict=True))

    sizes = {name: len(s) for name, s in splits.items()}
    rows = tuple(
        Row(
            chosen.kind,
            chosen.label,
            chosen.groups,
            rest,
            chosen.draw,
            distance(a, b, _parameters(paths[key].names, walker.layout)),
            Curve(settings.alphas, _values(found[key]), walker.bn, sizes, walker.bn_examples),
        )
        for chosen, rest, key in wanted
    )
    full = _full(
        module, a, b, splits, walker, measured[0], rows, settings, bn_data, same_noise, max_error,
        classes or (data.classes if isinstance(data, Dataset) else None),
    )  # fmt: skip
    at_ends = {
        split: {m: (v[0], v[1]) for m, v in values.items()}
        for split, values in _values(measured[0]).items()
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


def _names(chosen: _Set, groups: Groups, spec: Layout) -> tuple[str, ...]:
    """The entries of a set, in the layout's order. ``full`` is every entry, grouped or not."""
    if chosen.kind == "full":
        names = set(spec.floating)
    else:
        names = {name for label in chosen.groups for name in groups[label]}
    if chosen.draw is not None:
        names &= set(spec.parameters)
    return tuple(name for name in spec.floating if name in names)


def _parameters(names: Sequence[str], spec: Layout) -> list[str]:
    own = set(spec.parameters)
    return [name for name in names if name in own]


def _weights(settings: Sweep, rest: str) -> tuple[tuple[float, float], ...]:
    rows = [(0.5, 0.5)] if settings.points == 1 else grid(settings.points)
    return tuple(rows if rest == "a" else [(second, first) for first, second in rows])


def _direction(
    chosen: _Set,
    names: tuple[str, ...],
    rest: str,
    a: Theta,
    b: Theta,
    spec: Layout,
    settings: Sweep,
) -> Callable[[], Theta] | None:
    """Where a random direction ends; None for the other network."""
    if chosen.draw is None:
        return None
    parts = [list(names)]
    if settings.match == "layer":
        own = set(names)
        parts = [[n for n in layer if n in own] for layer in spec.groups.values()]
    key = Key("layerwise", settings.seed, "direction", chosen.kind, chosen.label, rest, chosen.draw)
    return partial(random_end, a if rest == "a" else b, a, b, parts, key)


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


def _values(measured: Sequence[Mapping[str, Measure]]) -> dict[str, dict[str, tuple[float, ...]]]:
    return {
        split: {
            "loss": tuple(m[split].loss for m in measured),
            "error": tuple(m[split].error for m in measured),
        }
        for split in measured[0]
    }


def _full(
    module: nn.Module,
    a: Theta,
    b: Theta,
    splits: Mapping[str, Split],
    walker: LayerWalker,
    ends: Sequence[Mapping[str, Measure]],
    rows: Sequence[Row],
    settings: Sweep,
    bn_data: Split | None,
    same_noise: bool,
    max_error: float | None,
    classes: int | None,
) -> Barrier:
    """The whole network's barrier with the gates of :func:`companion.connectivity.barrier`.

    Without BatchNorm the curve is known already; with it, all three modes have to be measured.
    """
    if has_batchnorm(module):
        return barrier(
            module,
            a,
            b,
            splits,
            points=max(3, settings.points),
            bn=settings.bn,
            bn_data=bn_data,
            bn_examples=settings.bn_examples,
            classes=classes,
            max_error=max_error,
            same_noise=same_noise,
        )
    smallest = min(splits, key=lambda s: len(splits[s]))
    # Whether a mixture of A with itself is A shows on any images; a few are enough.
    few = Split(splits[smallest].x[:_FEW], splits[smallest].y[:_FEW])
    plain = LayerWalker(module, {smallest: few}, batch=walker.batch)
    mixed, itself = plain.walk((a, a), [(2 / 3, 1 / 3), (1.0, 0.0)])
    return gated(
        {"none": rows[0].curve},
        "none",
        a,
        b,
        walker.layout,
        splits,
        ends,
        abs(mixed[smallest].loss - itself[smallest].loss),
        classes=classes,
        max_error=max_error,
        same_noise=same_noise,
    )
