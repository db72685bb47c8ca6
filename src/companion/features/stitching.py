"""The stitching test: can the rest of B go on from A's features? No adapter is trained.

    found = stitch(net, a, b, test)
    found.row("layer2.relu").error            # of B whose layer2.relu puts out what A's does
    found.worst()                             # over all sites, above the worse of the two networks

Stitched at the input the network is B itself; stitched at its output it is A, to the last bit
(:attr:`Stitching.closed`). Source: Zhou et al. 2023, App. B.4, Tables 2 and 3; our chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from companion.connectivity import Measure, Score, classification
from companion.core.errors import BadParameter, one_of
from companion.core.losses import IGNORED
from companion.core.theta import Theta
from companion.features.taps import (
    Examples,
    Site,
    Taps,
    batches,
    checked,
    examples_of,
    named,
    no_output,
    own_statistics,
    scored,
    sites,
    tapped,
)

INPUT = "input"
"""The row of the default network itself: nothing is replaced."""

DEFAULTS = ("a", "b")


@dataclass(frozen=True)
class Stitched:
    """One network made of two.

    Arguments:
        name, kind: of the site whose output is the other network's; :data:`INPUT` for none.
        default: the network that keeps all the rest, ``b`` (the paper's) or ``a``.
        wrong: number of errors.
        cut: nothing of the default network's beginning gets past the site, as in a chain, or after
            a whole residual block. Inside a block the shortcut goes around, and even networks
            that have nothing in common can fit there.
        loss, error: nats, percent.
    """

    name: str
    kind: str
    default: str
    wrong: int
    cut: bool
    loss: float
    error: float


@dataclass(frozen=True)
class Stitching:
    """Every site of two networks stitched together, in the order they compute.

    Arguments:
        rows: for each default network one at :data:`INPUT`, then one a site.
        ends: ``a``, ``b`` -> loss and error of the network itself.
        outputs: names of the sites that put out what the network returns.
        n: predictions.
        bn: ``own``: BatchNorm with each network's own running statistics; ``none`` without any.
    """

    rows: tuple[Stitched, ...]
    ends: Mapping[str, Measure]
    outputs: tuple[str, ...]
    n: int
    bn: str

    @property
    def defaults(self) -> tuple[str, ...]:
        """The default networks that were asked for."""
        return tuple(dict.fromkeys(r.default for r in self.rows))

    def select(self, default: str | None = None) -> tuple[Stitched, ...]:
        """The rows of one default network, the first if None; the input's row comes first.

        Raises:
            BadParameter: it was not measured.
        """
        default = one_of("default", default or self.defaults[0], self.defaults)
        return tuple(r for r in self.rows if r.default == default)

    def row(self, name: str, default: str | None = None) -> Stitched:
        """The row of one site.

        Raises:
            BadParameter: there is none.
        """
        return named(self.select(default), name, "site", "stitched")

    def worst(
        self, metric: str = "error", default: str | None = None, *, cuts: bool = False
    ) -> float:
        """The largest value over the sites, minus the worse of A and B (claims A09 and A10).

        In points of error, or nats for ``loss``; never below 0 where the output is a site.

        Arguments:
            cuts: only sites that nothing goes around, see :attr:`Stitched.cut`. The paper's layers
                are such: of a ResNet the stem, the blocks and the head.
        """
        one_of("metric", metric, ("error", "loss"))
        worse: float = max(getattr(end, metric) for end in self.ends.values())
        rows = [r for r in self.select(default) if r.cut or not cuts]
        top: float = max(getattr(r, metric) for r in rows)
        return top - worse

    @property
    def closed(self) -> bool:
        """Both ends of every row of sites are the networks themselves, exactly.

        Nothing replaced is the default network, the output replaced is the other one: loss and
        error, bit for bit. False if it is not so, or if no site puts out the network's output.
        """
        good = bool(self.outputs)
        for default in self.defaults:
            other = "a" if default == "b" else "b"
            wanted = [(INPUT, default), *((name, other) for name in self.outputs)]
            for name, network in wanted:
                row, end = self.row(name, default), self.ends[network]
                good &= (row.loss, row.error) == (end.loss, end.error)
        return good


def stitch(
    module: nn.Module,
    a: Theta,
    b: Theta,
    split: Examples,
    *,
    layers: Sequence[str] | None = None,
    default: str = "b",
    batch: int | None = None,
    score: Score = classification,
) -> Stitching:
    """Loss and error of B with the output of one site replaced by A's, for every site.

    A runs once a batch, its features are held until the batch is done; B runs once for every site.
    Replaced is what the site puts out and nothing else: in a residual block the shortcut still
    carries B's features around a stitched convolution, while after a whole block nothing of B's
    beginning is left. BatchNorm uses the running statistics that belong to its own network.

    Arguments:
        a, b: state dicts of ``module``.
        split: data, on the device to compute on.
        layers: as for :func:`companion.features.sites`; default its default, which ends with the
            network's output.
        default: the network that keeps the rest, ``b``, ``a`` or ``both`` in turn.
        batch: samples a forward pass.
        score: how outputs become loss and error.

    Raises:
        BadParameter: networks that do not fit, no data, unknown layers, targets that do not fit.

    Source: Zhou et al. 2023, App. B.4, Tables 2 and 3 (claims A09, A10); our chapter 3.
    """
    one_of("default", default, (*DEFAULTS, "both"))
    split = examples_of(split)
    a, b = checked(module, {"A": a, "B": b}, split)
    found = sites(module, split.x[:2], layers)
    bases = ("b", "a") if default == "both" else (default,)
    networks = {"a": tapped(module, a, found, split.x), "b": tapped(module, b, found, split.x)}
    # (default network, site) -> summed loss, errors, predictions; on the device until the end.
    sums: dict[tuple[str, str], Tensor] = {}

    def add(key: tuple[str, str], output: Tensor, y: Tensor) -> None:
        parts = (torch.as_tensor(v) for v in scored(score, output, y))
        more = torch.stack([v.to(output.device, torch.float64) for v in parts])
        sums[key] = sums[key] + more if key in sums else more

    with networks["a"], networks["b"], torch.inference_mode():
        for x, y in batches(module, split, batch, found):
            seen: dict[str, tuple[dict[str, Tensor], Tensor]] = {}
            for name, taps in networks.items():
                if name in bases and len(bases) == 1:
                    seen[name] = ({}, taps.run(x, no_output)[1])  # nobody needs its features
                else:
                    seen[name] = taps.run(x)
                add((name, INPUT), seen[name][1], y)
            for base in bases:
                features = seen["a" if base == "b" else "b"][0]
                for site, output in _stitched(networks[base], found, features, x):
                    add((base, site), output, y)
    ends = {n: Measure(*_means(sums[n, INPUT])[:2]) for n in DEFAULTS}
    cuts, ended = _places(networks["a"], found, split.x[:8])
    rows = []
    for base in bases:
        places = [(INPUT, INPUT, INPUT), *((s.name, s.kind, s.same or s.name) for s in found)]
        for name, kind, measured in places:
            loss, error, wrong = _means(sums[base, measured])
            cut = name == INPUT or measured in cuts
            rows.append(Stitched(name, kind, base, wrong, cut, loss, error))
    n = int(sums[bases[0], INPUT][2])
    return Stitching(tuple(rows), ends, ended, n, own_statistics(module))


def _stitched(
    taps: Taps, found: Sequence[Site], features: Mapping[str, Tensor], x: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Outputs of the network with each site's feature in turn; sites that are one run once."""
    for site in found:
        if site.same:
            continue

        def replaced(name: str, output: Tensor, wanted: str = site.name) -> Tensor | None:
            # What follows may write into it; taps made a copy then, and nobody reads it again.
            return features[name] if name == wanted else None

        yield site.name, taps.run(x, replaced)[1]


def _places(taps: Taps, found: Sequence[Site], x: Tensor) -> tuple[frozenset[str], tuple[str, ...]]:
    """Sites that nothing goes around, and sites whose output is the network's.

    Tried out: with a cut's feature as it was, other inputs leave the output as it was; with
    something else in the place of the output, the network returns just that.
    """
    cuts, ended = set(), []
    with taps:
        features, output = taps.run(x)
        for name, other in _stitched(taps, found, features, torch.zeros_like(x)):
            if torch.equal(other, output):
                cuts.add(name)
        for site in found:
            wanted = site.same or site.name

            def marked(name: str, output: Tensor, wanted: str = wanted) -> Tensor | None:
                return torch.full_like(output, math.pi) if name == wanted else None

            other = taps.run(x, marked)[1]
            if other.shape[1:] == site.shape and bool((other == other.new_tensor(math.pi)).all()):
                ended.append(site.name)
    return frozenset(cuts), tuple(ended)


def _means(sums: Tensor) -> tuple[float, float, int]:
    """Loss, error in percent, errors."""
    loss, wrong, count = sums.tolist()
    if not count:
        raise BadParameter(f"split: no example has a label to measure by; all are {IGNORED}.")
    # A loss that overflowed is no number; as NaN, max() would quietly pass over it.
    return math.inf if math.isnan(loss) else loss / count, 100 * wrong / count, int(wrong)
