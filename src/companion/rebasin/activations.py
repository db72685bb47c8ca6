"""Activation matching: permutations of B that bring its units' responses to data close to A's.

Each group of units is matched on its own, where the spec says its activations are
(:attr:`companion.rebasin.spec.Spec.sites`), by one linear assignment over the table of all pairs'
inner products ``C = sum_x z_A(x) z_B(x)^T``. Nothing is iterated, and no features are kept: a batch
goes through A, then through B, adds its products to the tables, and is gone.
Source: Git Re-Basin (Ainsworth et al. 2023), Section 3.1; our chapter 2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from companion.connectivity.batches import examples_a_pass
from companion.core import deadline
from companion.core.errors import BadParameter, one_of
from companion.core.numerics import exact_evaluation
from companion.core.theta import Theta, check_theta
from companion.data import Split
from companion.rebasin.assignment import assign, assign_nested
from companion.rebasin.matching import Matching
from companion.rebasin.sites import Keep, Look, Watch, find, looks, taken_apart
from companion.rebasin.spec import Spec
from companion.rebasin.trace import private

STATISTICS = ("moment", "correlation")
"""``moment``: the un-centred second moment E[z_A z_B^T] (the paper's: with it the matching is the
least-squares one). ``correlation``: Pearson's, in which every unit counts alike."""

LIVE = 1e-10
"""A unit whose variance is below this share of its second moment does not respond to the data: that
is rounding in float32. Its correlations are 0."""

PROBE = 8
"""Samples with which sites are tried."""

Inputs = Split | Tensor | Sequence[Any]


class Sums:
    """Sums over samples of the products of all pairs of units of A and B; nothing else is kept.

    Products within a batch are made in the activations' own precision (at least float32), sums
    over batches in float64.

    Arguments:
        centred: also keep what correlations need. Activations are then counted from the mean of
            the first batch, so that little is lost when the means are subtracted in the end.
    """

    def __init__(self, centred: bool):
        self.centred = centred
        self.count = 0
        self.cross = torch.zeros(())
        self.squares: list[Tensor] = []
        self.totals: list[Tensor] = []
        self.origins: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in one batch: the samples of A and of B, each of shape (samples, units)."""
        if self.centred:
            if not self.origins:
                self.origins = [x.mean(0, keepdim=True) for x in (a, b)]
            a, b = a - self.origins[0], b - self.origins[1]
        new = [_wide(a.T @ b)]
        new += [_wide(torch.linalg.vector_norm(x, dim=0)).square() for x in (a, b)]
        if self.centred:
            new += [_wide(x.sum(0)) for x in (a, b)]
        if not self.count:
            self.cross, self.squares, self.totals = new[0], new[1:3], new[3:]
        else:
            for old, more in zip((self.cross, *self.squares, *self.totals), new, strict=True):
                old += more
        self.count += len(a)

    def finite(self, network: int) -> bool:
        """True if no activation of network 0 (A) or 1 (B) was NaN or infinite."""
        return bool(torch.isfinite(self.squares[network]).all())

    def gain(self) -> tuple[Tensor, float]:
        """The table to be matched, float64 (units, units), and what no assignment can exceed.

        For moments the bound is Cauchy-Schwarz's, for correlations the number of units that respond
        to the data at all.
        """
        if not self.centred:
            a, b = (float(s.sum()) / self.count for s in self.squares)
            return self.cross / self.count, math.sqrt(a * b)
        means = [t / self.count for t in self.totals]
        covariance = self.cross / self.count - torch.outer(*means)
        scales, live = [], []
        for square, mean, origin in zip(self.squares, means, self.origins, strict=True):
            variance = (square / self.count - mean.square()).clamp(min=0)
            responds = variance > LIVE * (variance + (mean + _wide(origin[0])).square())
            live.append(int(responds.sum()))
            scales.append(torch.where(responds, variance, math.inf).rsqrt())
        return (covariance * torch.outer(*scales)).clamp(-1, 1), float(min(live))


class _Add(Watch):
    """Network B: adds its samples, and those kept of A, to the sums, and drops both."""

    def __init__(self, module: nn.Module, wanted: Sequence[Look], first: Keep, centred: bool):
        super().__init__(module, wanted)
        self.first = first
        self.sums = {look: Sums(centred) for look in wanted}

    def found(self, look: Look, out: Tensor) -> None:
        kept = self.first.kept.pop(look, None)
        if kept is not None:
            self.sums[look].add(kept, look.samples(out))


@exact_evaluation()
def activation_matching(
    spec: Spec,
    module: nn.Module,
    a: Theta,
    b: Theta,
    inputs: Inputs,
    *,
    statistic: str = "moment",
    batch: int | None = None,
) -> Matching:
    """Match units that respond alike to the same data: one linear assignment for each group.

    Of a feature map every position is a sample. Heads and the units inside of them are matched
    together, exactly. Networks run in eval mode, on the device of ``inputs``, as copies.

    Arguments:
        spec: of ``module``.
        module: the architecture.
        a, b: state dicts of it, not changed.
        inputs: a split; a tensor, shape (N, …); or a sequence whose members are the arguments of
            one forward pass each, a tuple or a single tensor. No labels are needed. The paper takes
            the whole training set, un-augmented; a part of it will often do.
        statistic: one of :data:`STATISTICS`.
        batch: samples a forward pass, for a split or a tensor; None: what suits them.

    Returns:
        permutations for B. ``objective``, ``before`` and ``bound`` are sums over groups of means
        over samples. ``details``: for every group its own objective, before, bound and number of
        samples; and ``no site``, the groups whose activations the spec does not know how to find,
        which stay in place. Units that respond to no input, in A and in B, are matched with each
        other in no particular order.

    Raises:
        BadParameter: no inputs, an unknown statistic, networks that are no finite points of this
            architecture, an activation that is NaN or infinite, or units that are not where the
            spec says (it is tried first, see :mod:`companion.rebasin.sites`).

    Source: Git Re-Basin (Ainsworth et al. 2023), Section 3.1, equation 1; our chapter 2.
    """
    begin = time.perf_counter()
    one_of("statistic", statistic, STATISTICS)
    batches, probe, sample = _batches(inputs, batch)
    wanted = looks(spec)
    own = [_loaded(module, theta, name, sample) for theta, name in ((a, "A"), (b, "B"))]
    first = Keep(own[0], wanted)
    second = _Add(own[1], wanted, first, statistic == "correlation")
    with torch.no_grad():
        attention = find(spec, first, own[1], a, probe)
        own[1].load_state_dict(dict(b), strict=False)
        for args in batches:
            deadline.stop_if_passed()
            with taken_apart(attention):
                first.forward(args)
                missed = first.missed()
                if not missed:
                    second.forward(args)
                    missed = [*first.kept]
            if missed:
                raise BadParameter(
                    f"{missed[0]} did not come by. The network took another path than before."
                )
    for look, sums in second.sums.items():
        for network, name in enumerate("AB"):
            if not sums.finite(network):
                raise BadParameter(
                    f"network {name}: the activations of {look.group!r} hold NaN or infinite "
                    "values. The inputs do, or the network diverged."
                )
    return _solve(spec, second.sums, statistic, begin)


def _solve(spec: Spec, sums: Mapping[Look, Sums], statistic: str, begin: float) -> Matching:
    """One assignment for every family of groups."""
    perms, log = spec.identity(), {}
    blind = []
    for outer, *inner in spec.families:
        # Without a sample (an expert that no input reached) a site says nothing.
        mine = {look.group: s for look, s in sums.items() if look.outer == outer and s.count}
        blind += [g for g in (outer, *inner) if g not in mine and (g != outer or not mine)]
        if not mine:
            continue
        gains, bounds = {}, {}
        for group, found in mine.items():
            gains[group], bounds[group] = found.gain()
        if any(g != outer for g in mine):
            within = {g: gain for g, gain in gains.items() if g != outer}
            units = spec.groups[outer].size
            p, orders, value = assign_nested(gains.get(outer), within, units)
            perms.update(orders)
        else:
            p = assign(gains[outer])
            at = torch.arange(len(p))
            value = float(gains[outer].cpu()[at, p].sum())
        perms[outer] = p
        log[outer] = {
            "objective": value,
            "before": sum(float(g.trace()) for g in gains.values()),
            "bound": sum(bounds.values()),
            "samples": max(s.count for s in mine.values()),
        }
    objective, before, bound = (
        sum(float(row[k]) for row in log.values()) for k in ("objective", "before", "bound")
    )
    return Matching(
        spec,
        perms,
        "activations",
        objective,
        before,
        bound,
        passes=1,
        seconds=time.perf_counter() - begin,
        details={"statistic": statistic, "groups": log, "no site": blind},
    )


def _batches(
    inputs: Inputs, batch: int | None
) -> tuple[Iterator[tuple[Any, ...]], tuple[Any, ...], Tensor]:
    """Arguments of the forward passes, a few to try sites with, and a tensor of them."""
    if batch is not None and batch < 1:
        raise BadParameter(f"batch: {batch} must be 1 or more.")
    if isinstance(inputs, Split):
        inputs = inputs.x
    if isinstance(inputs, str) or not isinstance(inputs, Tensor | Sequence):
        raise BadParameter(
            f"inputs: a split, a tensor or a sequence of forward arguments is needed, got "
            f"{type(inputs).__name__}."
        )
    if isinstance(inputs, Tensor) and inputs.dim() == 0:
        raise BadParameter("inputs: a tensor of shape (N, …) is needed, got a single number.")
    if len(inputs) == 0:
        raise BadParameter("inputs: there are none. Activation matching needs at least one sample.")
    if isinstance(inputs, Tensor):
        batch = batch or examples_a_pass(inputs)
        return ((x,) for x in inputs.split(batch)), (inputs[: min(batch, PROBE)],), inputs
    tensors = (x for x in pytree.tree_leaves(inputs[0]) if isinstance(x, Tensor))
    found = next(tensors, None)
    if found is None:
        raise BadParameter("inputs: the first member holds no tensor.")
    first = inputs[0] if isinstance(inputs[0], tuple) else (inputs[0],)
    return (x if isinstance(x, tuple) else (x,) for x in inputs), first, found


def _loaded(module: nn.Module, theta: Theta, name: str, sample: Tensor) -> nn.Module:
    """A copy of the network with other weights, in eval mode."""
    check_theta(module, theta, name)
    own = private(module, sample)
    # Second names of tied tensors may be missing: they are the same memory.
    own.load_state_dict(dict(theta), strict=False)
    return own


def _wide(x: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()
