"""Weight matching: permutations of B that bring its weights close to A's, without data.

Maximises ``<A, P(B)>``, the sum over parameters of their inner products, which is the same as to
minimise the distance ``|A - P(B)|``. Finding the best P is NP-hard (Lemma 1); Algorithm 1 solves
one group at a time exactly, as a linear assignment with all others fixed, until nothing rises. Ours
solves them nearly at first, while what is fixed is still wrong.
As a function of one group alone the objective is a sum over :class:`Term` s, one for each block
with that group: row i of A's block times row p[i] of B's.
Source: Git Re-Basin (Ainsworth et al. 2023), Section 3.2 and Appendix A.7; our chapter 2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.core.errors import BadParameter, one_of
from companion.core.seeds import Key
from companion.core.theta import Theta
from companion.rebasin.assignment import assign_again, assign_nested
from companion.rebasin.matching import Matching
from companion.rebasin.spec import Permutations, Spec, View

EPSILON = 0.03
"""Of the auctions in the first passes (:func:`companion.rebasin.assignment.assign_again`)."""

THIN = 16
"""Columns up to which terms are gathered into one product: biases and norm scales have one each,
and adding n x n outer products one by one costs more than multiplying them together."""

ROOM = 0.25
"""Of the size of both networks: what gains may take that are kept between passes."""

ROOM_AT_LEAST = 1 << 26
"""Bytes that they may take in any case."""

LARGE = 1 << 24
"""Numbers of a tensor above which its sums are made in pieces: their float64 copies would be the
largest things there are."""


def objective(spec: Spec, a: Theta, b: Theta, perms: Permutations | None = None) -> float:
    """``<A, P(B)>``: the sum of inner products over the spec's objective, in float64.

    Arguments:
        a, b: state dicts.
        perms: for B, default none.
    """
    total = 0.0
    for t in spec.objective:
        total += dot(a[t], b[t] if perms is None else spec.permute_tensor(b[t], t, perms))
    return total


def bound(theta_a: Theta, theta_b: Theta, spec: Spec) -> float:
    """What ``<A, P(B)>`` cannot exceed for any P: the sum of ``|A| |B|`` over tensors.

    Raises:
        BadParameter: the networks do not fit the spec, or hold NaN or infinite values.
    """
    size_a, size_b = checked_norms(spec, theta_a, "A"), checked_norms(spec, theta_b, "B")
    return sum(size_a[t] * size_b[t] for t in spec.objective)


def weight_matching(
    spec: Spec,
    a: Theta,
    b: Theta,
    *,
    starts: int = 1,
    key: Key = Key("rebasin"),  # noqa: B008 - an immutable value
    start: Permutations | None = None,
    max_passes: int = 100,
    rtol: float = 1e-9,
    begin: str = "anchored",
    order: str = "forward",
    epsilon: float = EPSILON,
) -> Matching:
    """Algorithm 1: coordinate descent over the groups until none improves, solved exactly.

    Gains are sums in float64, one tensor at a time. A step is taken only if the objective rises by
    more than ``rtol`` of its upper bound, so the descent ends (Lemma 2). A group is solved again
    only if one that shares a tensor with it has changed since.

    Three defaults are not the paper's, which begins at the identity, visits groups in random order
    and solves each exactly (``begin="identity", order="random", epsilon=0``). While the
    permutations around a group are still wrong, their tensors are noise in its gains; only what is
    tied to the input, the output or to groups solved before says something. A first pass by those
    tensors alone recovers planted permutations at once where the paper's needs several passes
    (ResNet-50) or gets stuck (issue 8 of the original repository: 16 of 100, here 100). On trained
    networks, ten pairs of three-layer perceptrons on digits, both end at the same share of the
    bound (0.300 and 0.299), and the forward order takes fewer passes than the random one (17 and
    21). And until no group rises by them, assignments are taken from an auction: solving them
    exactly against tensors that are out of order takes longer and ends lower. The result is never
    below the identity, which is where the descent begins if it is better than that first pass.

    Arguments:
        a, b: state dicts of one architecture, on any devices and of any floating dtypes; they are
            not changed, and neither is ``start``.
        starts: how many descents, of which the best counts: the first from ``start`` or ``begin``,
            the others from random permutations.
        key: of random orders and random starts.
        start: permutations to begin at, in place of ``begin``.
        max_passes: over all groups, at most.
        begin: "anchored" (above) or "identity".
        order: in which groups are visited: "forward" as the network runs, or "random", another
            order in every pass.
        epsilon: of these auctions, in standard deviations of the gains. 0: all are solved exactly.

    Returns:
        permutations for B. ``details``: for every start its objective, passes and whether it
        ended by itself; for the best one the objective after every pass.

    Raises:
        BadParameter: the networks do not fit the spec, or hold NaN or infinite values; an option
            has no such value.
    """
    clock = time.perf_counter()
    if starts < 1 or max_passes < 1:
        raise BadParameter(f"starts, max_passes: at least 1 each, got {starts} and {max_passes}.")
    if not 0 <= rtol < 1:
        raise BadParameter(f"rtol must lie in [0, 1), got {rtol}.")
    if not 0 <= epsilon < math.inf:
        raise BadParameter(f"epsilon must be finite and not below 0, got {epsilon}.")
    one_of("begin", begin, ("anchored", "identity"))
    one_of("order", order, ("random", "forward"))
    most = bound(a, b, spec)
    tol = rtol * most
    if start is not None:
        spec.check(start)
    before = objective(spec, a, b)
    plan = families_of(spec)
    best: tuple[float, dict[str, Tensor], list[float]] | None = None
    log = []
    for n in range(starts):
        own = key.fold("start", n)
        if n == 0 and start is None:
            state, value = Descent(spec, a, b, spec.identity()), before
            if begin == "anchored":
                anchored = _one_pass(spec, a, b, plan, anchored=True, epsilon=epsilon)
                if (reached := anchored.product(anchored.now)) > before:
                    state, value = anchored, reached
        else:
            there = start if n == 0 and start is not None else spec.random(own.generator())
            state = Descent(spec, a, b, there)
            value = state.product(state.now)
        history = [value]
        state.epsilon = epsilon
        todo, exact = set(range(len(plan))), not epsilon
        # Nothing to gain: an optimum of every group, or the bound itself.
        while not (ended := (exact and not todo) or most - value <= tol):
            if len(history) > max_passes:
                break
            if not todo:  # what no auction decided is an optimum already
                exact, state.epsilon = True, 0.0
                todo = {k for k, family in enumerate(plan) if family.outer in state.rough}
            visit: Sequence[int] = range(len(plan))
            if order == "random":
                visit = own.fold("pass", len(history) - 1).permutation(len(plan)).tolist()
            for k in visit:
                if k in todo:
                    todo.discard(k)
                    rise = state.improve(plan[k], tol)
                    if rise:
                        value += rise
                        todo |= plan[k].neighbours | (set() if plan[k].linear else {k})
            history.append(value)
        if len(history) > 1:  # steps were summed up; what is reported is the objective itself
            value = state.product(state.now)
        log.append({"objective": value, "passes": len(history) - 1, "converged": ended})
        if best is None or value > best[0]:
            best = (value, state.perms, history)
    assert best is not None
    value, perms, history = best
    return Matching(
        spec,
        perms,
        "weights",
        value,
        before,
        most,
        passes=len(history) - 1,
        starts=starts,
        seconds=time.perf_counter() - clock,
        details={"starts": log, "history": history, "begin": begin, "order": order},
    )


def _one_pass(
    spec: Spec,
    a: Theta,
    b: Theta,
    plan: Sequence[FamilyTerms],
    *,
    anchored: bool,
    epsilon: float = 0.0,
) -> Descent:
    """Every family once, forward, by the tensors whose other families have been visited.

    Of these, those that make its units; and, if ``anchored``, those that read them as well, but
    none that depend on where the family itself is now, which says nothing yet.
    """
    state = Descent(spec, a, b, spec.identity())
    state.epsilon = epsilon
    for k, family in enumerate(plan):
        known = {t for t, others in family.others.items() if all(j < k for j in others)}
        known -= family.twice if anchored else family.readers
        terms = {g: tuple(t for t in ts if t.tensor in known) for g, ts in family.terms.items()}
        found = state.best(family, terms, 0.0)
        if found is not None:
            state.take(family, found[0], state.stepped(family, found[0]))
    return state


def greedy(spec: Spec, a: Theta, b: Theta) -> Matching:
    """One pass from the input to the output: the baseline that weight matching improves on.

    Each group is matched by the tensors that make its units (the rows of its layer's weights, its
    biases and norms) as far as their other groups have been matched before, and never looked at
    again, as in OT-Fusion and FedMA. Source: Appendix A.7; our chapter 2.

    Raises:
        BadParameter: the networks do not fit the spec, or hold NaN or infinite values.
    """
    clock = time.perf_counter()
    most = bound(a, b, spec)
    state = _one_pass(spec, a, b, families_of(spec), anchored=False)
    return Matching(
        spec,
        state.perms,
        "greedy",
        state.product(state.now),
        objective(spec, a, b),
        most,
        passes=1,
        seconds=time.perf_counter() - clock,
    )


def checked_norms(spec: Spec, theta: Theta, name: str) -> dict[str, float]:
    """The norm of every entry of the objective; refuses what is no finite point of the spec."""
    missing = [t for t in spec.objective if t not in theta]
    if missing:
        raise BadParameter(
            f"network {name} does not fit the spec: missing {', '.join(missing[:5])}. Both "
            "networks must be the architecture that the spec was derived from."
        )
    for t, axes in spec.axes.items():
        if t not in theta:
            continue  # a buffer or a second name of a tied tensor: not needed here
        view = spec.views.get(t)
        shape = view.shape if view else tuple(sum(map(spec.length, axis)) for axis in axes)
        if tuple(theta[t].shape) != shape:
            raise BadParameter(
                f"network {name}: {t} has shape {tuple(theta[t].shape)}, the spec {shape}."
            )
    found = {}
    for t in spec.objective:
        x = theta[t].detach()
        if not x.is_floating_point():
            raise BadParameter(f"network {name}: {t} is {x.dtype}; only real numbers can match.")
        x = x.to(sums_on(x))
        found[t] = float(torch.linalg.vector_norm(x, dtype=torch.float64))
        if not math.isfinite(found[t]):
            raise BadParameter(f"network {name}: {t} holds NaN or infinite values; it diverged.")
    return found


class Descent:
    """State of the coordinate descent: permutations, permuted B, and gains that are kept."""

    def __init__(self, spec: Spec, a: Theta, b: Theta, perms: Permutations):
        self.spec, self.a = spec, a
        self.perms = {n: p.detach().cpu().clone() for n, p in perms.items()}
        self.stay = spec.identity()
        self.epsilon = 0.0
        self.rough: set[str] = set()  # families whose last assignment an auction made
        self.price: dict[str, Tensor] = {}  # of B's units where they are now
        self.kept: dict[str, tuple[frozenset[Term], Tensor]] = {}  # gains, summed over terms
        size = sum(x.numel() * x.element_size() for n in spec.objective for x in (a[n], b[n]))
        self.room = max(size * ROOM, ROOM_AT_LEAST)
        moved = any(not torch.equal(self.perms[n], p) for n, p in self.stay.items())
        self.now = {
            t: spec.permute_tensor(b[t], t, self.perms) if moved else b[t] for t in spec.objective
        }

    def best(
        self, family: FamilyTerms, terms: Mapping[str, tuple[Term, ...]], tol: float
    ) -> tuple[dict[str, Tensor], float] | None:
        """The best step for one family, relative to where it is, and what ``terms`` gain by it.

        None if that is not above ``tol``.
        """
        outer = self._gains(family, terms[family.outer])
        self.rough.discard(family.outer)
        if not family.inner:
            if outer is None:
                return None
            here = float(outer.trace())
            price = self.price.get(family.outer)
            # No assignment exceeds the columns' maxima, nor what the rows have at any prices.
            if price is None:
                tops = [outer.amax(1).sum(), outer.amax(0).sum()]
            else:
                tops = [(outer - price).amax(1).sum() + price.sum()]
            if min(map(float, tops)) - here <= tol:
                return None
            p, price, exact = assign_again(outer, price, self.epsilon)
            if not exact:
                self.rough.add(family.outer)
            rise = float(outer[torch.arange(len(p)), p].sum()) - here
            if family.linear:
                self.price[family.outer] = price
            return ({family.outer: p}, rise) if rise > tol else None
        grams = {g: gains_of(terms[g], self.a, self.now) for g in family.inner}
        known = {g: m for g, m in grams.items() if m is not None}
        units = self.spec.groups[family.outer].size
        here = sum(float(m.trace()) for m in (outer, *known.values()) if m is not None)
        p, inner, value = assign_nested(outer, known, units)
        if value - here <= tol:
            return None
        step = {g: inner.get(g, self.stay[g]) for g in family.inner}
        return {family.outer: p, **step}, value - here

    def _gains(self, family: FamilyTerms, terms: Sequence[Term]) -> Tensor | None:
        """Gains of the outer units: those kept, and what is missing of ``terms``.

        They are kept where there is room, for they are most of the work: a late step moves a few
        units, and changes the gains of others by as many columns of a product.
        """
        done, total = self.kept.pop(family.outer, (frozenset(), None))
        if total is not None:
            self.room += total.nbytes
        more = gains_of([t for t in terms if t not in done], self.a, self.now)
        if total is not None and more is not None:
            more += total
        total = total if more is None else more
        if total is not None and family.linear and not family.inner and total.nbytes <= self.room:
            self.room -= total.nbytes
            self.kept[family.outer] = (done.union(terms), total)
        return total

    def _follow(self, step: Mapping[str, Tensor], moved: Mapping[str, Tensor], outer: str) -> None:
        """Bring the kept gains of another family to where a step moves the tensors they sum over.

        Only the positions that move count; where they are not those of one other axis, the gains
        are dropped.
        """
        terms, total = self.kept[outer]
        relative = {**self.stay, **step}
        changes = []
        for term in terms:
            if term.tensor not in moved:
                continue
            at = [
                (dim, (index != torch.arange(len(index))).nonzero().flatten())
                for dim, axis in enumerate(self.spec.axes[term.tensor])
                if any(f in step for block in axis for f in block)
                for index in (self.spec.index(axis, relative),)
            ]
            if len(at) != 1 or at[0][0] == term.dim:
                del self.kept[outer]
                self.room += total.nbytes
                return
            changes.append((term, *at[0]))
        for term, dim, places in changes:
            x, old, new = (theta[term.tensor] for theta in (self.a, self.now, moved))
            device = sums_on(x)
            pieces = max(1, math.ceil(x.numel() / x.shape[dim] * len(places) / (LARGE // 4)))
            for part in places.tensor_split(pieces) if len(places) else ():
                change = term.rows(new, device, (dim, part))
                change = change - term.rows(old, device, (dim, part))
                total.addmm_(term.rows(x, device, (dim, part)), change.T)

    def stepped(self, family: FamilyTerms, step: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that a step of one family moves, moved along the axes that hold it."""
        relative = {**self.stay, **step}
        out = {}
        for t in family.others:
            out[t] = self.spec.lay_out(self.now[t], t)
            for dim, axis in enumerate(self.spec.axes[t]):
                if any(f in step for block in axis for f in block):
                    whole = len(axis) == 1 and len(axis[0]) == 1
                    p = relative[str(axis[0][0])] if whole else self.spec.index(axis, relative)
                    out[t] = out[t].index_select(dim, p.to(out[t].device))
            out[t] = self.spec.put_back(out[t], t)
        return out

    def product(self, tensors: Mapping[str, Tensor]) -> float:
        """``<A, tensors>`` over the given entries, in float64."""
        return sum(dot(self.a[t], x) for t, x in tensors.items())

    def take(
        self, family: FamilyTerms, step: Mapping[str, Tensor], moved: dict[str, Tensor]
    ) -> None:
        """Make the step."""
        for outer in [name for name in self.kept if name != family.outer]:
            self._follow(step, moved, outer)
        self.now.update(moved)
        p = step[family.outer]
        if family.outer in self.kept:  # its columns are units of B where they are now
            total = self.kept[family.outer][1]
            places = (p != torch.arange(len(p))).nonzero().flatten().to(total.device)
            there = total.index_select(1, p.to(total.device)[places])
            total.index_copy_(1, places, there)
        self.perms[family.outer] = self.perms[family.outer][p]
        if family.outer in self.price:
            self.price[family.outer] = self.price[family.outer][p]
        for g in family.inner:
            self.perms[g] = self.perms[g][p].gather(1, step[g])

    def improve(self, family: FamilyTerms, tol: float) -> float:
        """Solve one family; step if the objective rises by more than ``tol``. Returns the rise."""
        found = self.best(family, family.terms, tol)
        if found is None:
            return 0.0
        step, rise = found
        moved = self.stepped(family, step)
        if not family.linear:  # the assignment saw the other axes as they were: look again
            rise = self.product(moved) - self.product({t: self.now[t] for t in family.others})
            if rise <= tol:
                return 0.0
        self.take(family, step, moved)
        return rise


def gains_of(terms: Sequence[Term], a: Theta, b: Theta) -> Tensor | None:
    """Gains of all pairs of rows: what unit i of A gets from unit j of B. Float64."""
    total: Tensor | None = None
    thin: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}

    def add(x: Tensor, y: Tensor) -> Tensor:
        if total is None:
            return x @ y.T
        if total.device == x.device:
            return total.addmm_(x, y.T)
        return total.add_((x @ y.T).to(total.device))

    for term in terms:
        device = sums_on(a[term.tensor])
        whole = [theta[term.tensor] for theta in (a, b)]
        if whole[0].numel() > LARGE and whole[0].dim() == 2:
            across = 1 - term.dim
            size = max(1, LARGE // 4 // whole[0].shape[term.dim])
            for x, y in zip(*(t.split(size, across) for t in whole), strict=True):
                total = add(term.rows(x, device), term.rows(y, device))
            continue
        x, y = (term.rows(t, device) for t in whole)
        if x.shape[1] <= THIN:
            thin.setdefault(device, []).append((x, y))
        else:
            total = add(x, y)
    for pairs in thin.values():
        total = add(*(torch.cat(part, 1) for part in zip(*pairs, strict=True)))
    return total


def sums_on(x: Tensor) -> torch.device:
    """Where sums over ``x`` are done: its own device, but the CPU for one without float64."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def dot(x: Tensor, y: Tensor) -> float:
    device = sums_on(x)
    if x.numel() > LARGE and x.dim():
        size = max(1, LARGE // 4 // math.prod(x.shape[1:]))
        return sum(dot(*part) for part in zip(x.split(size), y.split(size), strict=True))
    x = x.detach().to(device).double().reshape(-1)
    return float(x.dot(y.detach().to(device).double().reshape(-1)))


@dataclass(frozen=True)
class Term:
    """A block of one axis, seen as rows to be matched."""

    tensor: str
    dim: int
    start: int
    sizes: tuple[int, ...]  # of its factors
    front: tuple[int, ...]  # those that make up the rows; the others stay, and join the columns
    view: View | None = None  # of the tensor

    def rows(self, x: Tensor, device: torch.device, at: tuple[int, Tensor] | None = None) -> Tensor:
        """The block as a float64 matrix, (units, everything else). Copied only where it has to.

        ``at``: another dimension, and the positions of it that count.
        """
        x = x.detach()
        if self.view is not None:
            x = self.view.lay_out(x)
        if at is not None:
            x = x.index_select(at[0], at[1].to(x.device))
        x = x.narrow(self.dim, self.start, math.prod(self.sizes)).movedim(self.dim, 0)
        x = x.to(device)
        if len(self.sizes) > 1:
            x = x.unflatten(0, self.sizes)
            rest = [d for d in range(x.dim()) if d not in self.front]
            x = x.permute(*self.front, *rest)
        n = math.prod(self.sizes[f] for f in self.front)
        if x.dim() > 1 and len(self.front) == 1 and math.prod(x.shape[2:]) == 1:
            return x.reshape(x.shape[:2]).double()  # a transposed matrix stays a view of one
        if x.dtype != torch.float64:
            # One pass for both: the axes into row-major order, and the numbers into float64.
            x = torch.empty(x.shape, dtype=torch.float64, device=device).copy_(x)
        return x.reshape(n, -1)


@dataclass(frozen=True)
class FamilyTerms:
    """An outer group, its inner groups, and where in the objective they occur."""

    outer: str
    inner: tuple[str, ...]
    # Group -> its blocks. An inner group's have outer and inner units as rows; the outer group's
    # are those without inner units.
    terms: Mapping[str, tuple[Term, ...]]
    # Tensors that it moves along two axes, or by two factors of one block. The objective is
    # quadratic there, and a term is its linear part with the family where it is now.
    twice: frozenset[str]
    # Tensor that it moves -> the other families that move it.
    others: Mapping[str, frozenset[int]]
    # Tensors that take the units in and do not make them: weights with the family on another axis
    # than the first, that are not of the layer it is named after.
    readers: frozenset[str]

    @property
    def linear(self) -> bool:
        """True if the gain of an assignment is by how much the objective rises."""
        return not self.twice

    @property
    def neighbours(self) -> frozenset[int]:
        """Families whose best permutation depends on this one's."""
        return frozenset().union(*self.others.values())


def families_of(spec: Spec) -> tuple[FamilyTerms, ...]:
    """The families of ``spec`` in forward order, with all places where the objective sees them."""
    owner = {g: k for k, names in enumerate(spec.families) for g in names}
    movers = {
        t: {
            owner[f] for axis in spec.axes.get(t, ()) for block in axis for f in block if f in owner
        }
        for t in spec.objective
    }
    out = []
    for k, (outer, *inner) in enumerate(spec.families):
        others = {t: frozenset(by - {k}) for t, by in movers.items() if k in by}
        terms: dict[str, list[Term]] = {g: [] for g in (outer, *inner)}
        twice, readers = set(), set()
        for t in others:
            dims = set()
            for dim, axis in enumerate(spec.axes[t]):
                for start, block in spec.blocks(axis):
                    at = [i for i, f in enumerate(block) if f in inner]
                    fronts: list[tuple[int, ...]] = [(block.index(outer), i) for i in at]
                    fronts = fronts or [(i,) for i, f in enumerate(block) if f == outer]
                    for front in fronts:
                        dims.add(dim)
                        term = Term(t, dim, start, spec.sizes(block), front, spec.views.get(t))
                        terms[str(block[front[-1]])].append(term)
                    if len(fronts) > 1 or (fronts and len(dims) > 1):
                        twice.add(t)
            if max(dims) and t.rpartition(".")[0] != outer:
                readers.add(t)
        mine = {g: tuple(found) for g, found in terms.items()}
        sets = (frozenset(twice), others, frozenset(readers))
        out.append(FamilyTerms(outer, tuple(inner), mine, *sets))
    return tuple(out)
