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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from companion.connectivity.batches import examples_a_pass
from companion.core import deadline
from companion.core.errors import BadParameter, one_of
from companion.core.networks import private
from companion.core.numerics import exact_evaluation
from companion.core.seeds import Key
from companion.core.theta import Theta, check_theta, layout, put
from companion.data import Split
from companion.rebasin.assignment import assign_nested
from companion.rebasin.matching import Matching
from companion.rebasin.spec import ActivationSite, Spec
from companion.rebasin.trace import Tracer, taken_apart

PAIR_STATISTICS = ("moment", "correlation")
"""``moment``: the un-centred second moment E[z_A z_B^T] (the paper's: with it the matching is the
least-squares one). ``correlation``: Pearson's, in which every unit counts alike."""

LIVE = 1e-10
"""A unit whose variance is below this share of its second moment does not respond to the data: that
is rounding in float32. Its correlations are 0."""

PROBE = 8
"""Samples with which sites are tried."""

AGREE = 0.02
"""Relative difference up to which two passes show the same units: what half precision needs.
Activations of another operation differ by about their own size."""

Inputs = Split | DataLoader[Any] | Tensor | Sequence[Any]


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
        inputs: a split, or a loader of one; a tensor, shape (N, …); or a sequence whose members
            are the arguments of one forward pass each, a tuple or a single tensor. No labels are
            needed. The paper takes the whole training set, un-augmented; a part will often do.
        statistic: one of :data:`PAIR_STATISTICS`.
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
            spec says, which is tried first.

    Source: Git Re-Basin (Ainsworth et al. 2023), Section 3.1, equation 1; our chapter 2.
    """
    begin = time.perf_counter()
    one_of("statistic", statistic, PAIR_STATISTICS)
    batches, probe, sample = _batches(inputs, batch)
    wanted = looks(spec)
    a, b = check_theta(module, a, "A"), check_theta(module, b, "B")
    first, second = private(module, sample), private(module, sample)
    put(first, a, ties := layout(first).ties)
    both = _Both(first, second, wanted)
    sums = {look: Sums(statistic == "correlation") for look in wanted}
    with torch.no_grad():
        attention = _try_sites(spec, both, a, probe)
        put(second, b, ties)
        for args in batches:
            deadline.stop_if_passed()
            missed = both.run(args, attention, lambda look, x, y: sums[look].add(x, y))
            if missed:
                raise BadParameter(
                    f"{missed[0]} did not come by. The network took another path than before."
                )
    for look, found in sums.items():
        for square, name in zip(found.squares, "AB", strict=False):
            if not bool(torch.isfinite(square).all()):
                raise BadParameter(
                    f"network {name}: the activations of {look.group!r} hold NaN or infinite "
                    "values. The inputs do, or the network diverged."
                )
    return _solve(spec, sums, statistic, begin)


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
        tables = {group: s.gain() for group, s in mine.items()}
        gains = {group: gain for group, (gain, _) in tables.items()}
        whole = gains.get(outer)
        within = {g: gain for g, gain in gains.items() if g != outer}
        p, orders, value = assign_nested(whole, within, spec.groups[outer].size)
        perms |= {outer: p, **orders}
        log[outer] = {
            "objective": value,
            "before": sum(float(g.trace()) for g in gains.values()),
            "bound": sum(most for _, most in tables.values()),
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
    if isinstance(inputs, DataLoader):
        inputs = Split.of(inputs)
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


def _wide(x: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


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


@dataclass(frozen=True)
class Look:
    """An activation, seen as samples of the units of a group."""

    outer: str  # the family it is for
    group: str  # whose units: the outer group, or an inner one (of all outer units, outer first)
    site: ActivationSite
    sizes: tuple[int, ...]  # of the factors of the site's block
    front: tuple[int, ...]  # those that make up the units; the others, and other axes, are samples

    def __str__(self) -> str:
        where = f"of {self.site.module!r}" if self.site.module else "of the network itself"
        return (
            f"activations of {self.group!r}: operation {self.site.op!r} "
            f"number {self.site.nth} {where}"
        )

    def samples(self, out: Tensor) -> Tensor:
        """The activation as a matrix, (samples, units); a view of ``out`` if that is possible."""
        dim, start = self.site.dim, self.site.start
        length = math.prod(self.sizes)
        if out.dim() < -dim or out.shape[dim] < start + length:
            raise BadParameter(
                f"{self} has shape {tuple(out.shape)}, which does not fit the spec. The inputs "
                "must look like those that the spec was derived with."
            )
        x = out.detach()
        if self.site.order is not None:
            x = x.index_select(dim, torch.tensor(self.site.order, device=x.device))
        x = x.narrow(dim, start, length).movedim(dim, -1)
        if len(self.sizes) > 1:
            x = x.unflatten(-1, self.sizes)
            lead = x.dim() - len(self.sizes)
            rest = [lead + i for i in range(len(self.sizes)) if i not in self.front]
            x = x.permute(*range(lead), *rest, *(lead + i for i in self.front))
        x = x.reshape(-1, math.prod(self.sizes[f] for f in self.front))
        return x if x.dtype in (torch.float32, torch.float64) else x.float()


def looks(spec: Spec) -> tuple[Look, ...]:
    """Where to look for each group; groups that have no usable site are not among them."""
    found: dict[tuple[str, str], Look] = {}
    for outer, *inner in spec.families:
        for name in (outer, *inner):
            site = spec.sites.get(name)
            if site is None:
                continue
            named = [f for f in site.block if isinstance(f, str)]
            if sorted(named) != sorted(set(named) & {outer, *inner}) or outer not in named:
                continue  # moved by other families too, or twice by this one: no plain assignment
            within = [f for f in named if f != outer]
            if len(within) > 1:
                continue
            group = within[0] if within else outer
            front = tuple(site.block.index(f) for f in (outer, *within))
            look = Look(outer, group, site, spec.sizes(site.block), front)
            found.setdefault((outer, group), look)
    return tuple(found.values())


class _Both:
    """Two copies of a network that run one after the other on the same batch."""

    def __init__(self, first: nn.Module, second: nn.Module, wanted: Sequence[Look]):
        self.wanted = wanted
        self.first, self.second = (
            _Watch(first, wanted, self._keep),
            _Watch(second, wanted, self._meet),
        )
        self.kept: dict[Look, Tensor] = {}
        self.take: Callable[[Look, Tensor, Tensor], None]

    def _keep(self, look: Look, out: Tensor) -> None:
        x = look.samples(out)
        # A view would change if a later operation writes into the activation.
        own = x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
        self.kept[look] = x if own else x.clone()

    def _meet(self, look: Look, out: Tensor) -> None:
        kept = self.kept.pop(look, None)
        if kept is not None:
            self.take(look, kept, look.samples(out))

    def run(
        self,
        args: tuple[Any, ...],
        attention: bool,
        take: Callable[[Look, Tensor, Tensor], None],
    ) -> list[Look]:
        """Hand the samples of both to ``take`` and drop them. Returns what did not come by."""
        self.take = take
        with taken_apart(attention):
            self.first.forward(args)
            missed = [look for look in self.wanted if look not in self.kept]
            if not missed:
                self.second.forward(args)
                missed = [*self.kept]
        self.kept.clear()
        return missed


class _Watch(Tracer):
    """Hands the activations at the sites to ``found`` as they come by."""

    def __init__(
        self, module: nn.Module, wanted: Sequence[Look], found: Callable[[Look, Tensor], None]
    ):
        super().__init__(module)
        self.found = found
        self._at: dict[tuple[str, str, int], list[Look]] = {}
        for look in wanted:
            site = look.site
            self._at.setdefault((site.module, site.op, site.nth), []).append(look)

    def seen(
        self, func: Any, op: str, nth: int, args: tuple[Any, ...], kwargs: Any, out: Any
    ) -> None:
        for look in self._at.get((self.where, op, nth), ()):
            self.found(look, out[0] if isinstance(out, tuple | list) else out)


def _try_sites(spec: Spec, both: _Both, a: Theta, args: tuple[Any, ...]) -> bool:
    """Whether attention has to be taken apart for the sites to show the units the spec says.

    Which operations a forward pass has depends a little on device and precision (attention is one
    kernel here and a dozen operations there). So the second network gets permuted weights of A,
    and must show the same units in permuted order.
    """
    perms = spec.random(Key("rebasin", "sites").generator())
    net = both.second.module
    put(net, spec.permute(a, perms), layout(net).ties)
    index = {
        look: spec.block_index(tuple(str(look.site.block[f]) for f in look.front), perms)
        for look in both.wanted
    }
    complaints: list[str] = []

    def compare(look: Look, kept: Tensor, got: Tensor) -> None:
        want = kept[:, index[look].to(kept.device)]
        if want.shape != got.shape:
            complaints.append(f"{look} has another shape in another pass.")
        elif bool(torch.isfinite(want).all()):  # others are reported as what they are, later
            off, size = (torch.linalg.vector_norm(x) for x in (got - want, want))
            if not bool(off <= AGREE * size):
                complaints.append(f"{look} does not show its units.")

    for attention in (False, True):
        before = len(complaints)
        missed = both.run(args, attention, compare)
        if missed:
            complaints.insert(before, f"{missed[0]} did not come by.")
        if len(complaints) == before:
            return attention
    raise BadParameter(
        f"{complaints[0]} The network takes another path here than on the example that the spec "
        "was derived with; derive it on this device, with inputs like these."
    )
