"""Finding the rotation of the residual stream that brings B close to A, with heads and MLP units.

With heads and units in place the best Q is closed form (orthogonal Procrustes: one SVD); with Q in
place the heads and units of every layer are linear assignments. :func:`rotation_matching` goes back
and forth between the two, by weights alone; each half-step is exact, so the objective never falls.
:func:`activation_rotation` reads Q off the streams of both networks on the same tokens.
Source: Theus et al. 2025; our chapter 5.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from companion.connectivity.batches import examples_a_pass
from companion.core import deadline
from companion.core.errors import BadParameter, one_of
from companion.core.numerics import exact_evaluation
from companion.core.theta import Theta, check_theta
from companion.data import Split
from companion.rebasin.activations import Sums, activation_matching
from companion.rebasin.assignment import assign, assign_nested, prices
from companion.rebasin.descent import State, device_of, dot
from companion.rebasin.folding import Folding
from companion.rebasin.rotation import (
    HEADS,
    Rotation,
    check_rotation,
    polar,
    procrustes,
    transform,
)
from companion.rebasin.spec import Permutations
from companion.rebasin.terms import Family, Term, families
from companion.rebasin.weights import norms


def rotation_matching(
    folding: Folding,
    a: Theta,
    b: Theta,
    *,
    heads: str = "permuted",
    start: Tensor | None = None,
    max_iterations: int = 100,
    rtol: float = 1e-7,
) -> Rotation:
    """Rotation of the stream and matching of heads and units in turn, by weights alone.

    Maximises ``<A, T(B)>``, the sum of inner products of all weights that read or write the stream:
    the best Q is closed form, then every layer's heads and units are an exact assignment. The
    first Q comes from the embeddings, positions, head and output biases alone: they touch no head
    or unit that would have to be matched first. The result is never below doing nothing.

    Arguments:
        a, b: folded state dicts (:meth:`companion.rebasin.folding.Folding.apply`), not changed.
        heads: one of :data:`HEADS`; pairs of heads are compared by what they gain at their best.
        start: a Q to begin at in place of the first one.
        max_iterations: of both half-steps.
        rtol: an iteration that gains less than this share of
            the bound is the last.

    Raises:
        BadParameter: the networks do not fit, or hold NaN or infinite values.
    """
    clock = time.perf_counter()
    one_of("heads", heads, HEADS)
    if max_iterations < 1 or not 0 <= rtol < 1:
        raise BadParameter(
            f"max_iterations, rtol: at least 1, and in [0, 1); got {max_iterations} and {rtol}."
        )
    problem = _Problem(folding, a, b, heads)
    q = problem.anchored() if start is None else check_rotation(start, folding.width)
    best = problem.solve(q, max_iterations, rtol)
    if best.objective < problem.before:
        eye = torch.eye(folding.width, dtype=torch.float64)
        best = problem.solve(eye, max_iterations, rtol)
    return best.rotation(problem, "weights", time.perf_counter() - clock)


@dataclass(frozen=True, eq=False)
class _Found:
    """Where an alternation ended."""

    stream: Tensor
    perms: Permutations
    inner: Mapping[str, Tensor]
    history: tuple[float, ...]
    converged: bool

    @property
    def objective(self) -> float:
        return self.history[-1]

    def rotation(self, problem: _Problem, method: str, seconds: float) -> Rotation:
        return Rotation(
            problem.folding,
            self.stream.cpu(),
            self.perms,
            {g: r.cpu() for g, r in self.inner.items()},
            method,
            problem.heads,
            self.objective,
            problem.before,
            problem.bound,
            self.history,
            (len(self.history) - 1) // 2,
            self.converged,
            seconds,
        )


class _Problem:
    """Two folded networks, and the two half-steps of the alternation."""

    def __init__(self, folding: Folding, a: Theta, b: Theta, heads: str):
        self.folding, self.heads = folding, heads
        check_theta(folding.module, a, "A")
        check_theta(folding.module, b, "B")
        self.objective = folding.spec.objective
        size_a, size_b = norms(folding.spec, a, "A"), norms(folding.spec, b, "B")
        self.bound = sum(size_a[t] * size_b[t] for t in self.objective)
        self.a = {t: a[t].detach().to(device_of(a[t])).double() for t in self.objective}
        self.b = {t: b[t].detach().to(device_of(b[t])).double() for t in self.objective}
        self.before = self.value(self.b)
        whole = families(folding.spec)
        self.stream = next(f for f in whole if f.outer == folding.stream)
        self.layers = families(folding.units)
        self.stay = folding.units.identity()
        self.prices: dict[str, Tensor] = {}  # of B's units: they make the next assignment faster
        units = folding.units
        for t, axes in units.axes.items():
            if sum(map(units.moves, axes)) > 1:
                raise BadParameter(
                    f"rotation: {t} joins two groups of units; only layers that are coupled by the "
                    "residual stream alone can be solved at once."
                )

    def turnable(self, family: Family) -> tuple[str, ...]:
        """The groups whose units may be turned: those inside of heads, if that was asked for.

        With a single head the spec has no heads, and its units are groups of their own.
        """
        if self.heads == "permuted":
            return ()
        if family.inner:
            return family.inner
        attention = {w.rpartition(".")[0] for w in self.folding.parts.writers if ".attn." in w}
        return (family.outer,) if family.outer.startswith(tuple(attention)) else ()

    def value(self, moved: Theta) -> float:
        return sum(dot(self.a[t], moved[t]) for t in self.objective)

    def moved(self, q: Tensor | None, perms: Any = None, inner: Any = None) -> dict[str, Tensor]:
        return transform(self.folding, self.b, q, perms, inner)

    def gram(self, terms: tuple[Term, ...], moved: Theta) -> Tensor | None:
        state = State(self.folding.units, self.a, moved, self.stay)
        return state.gram(terms)

    def anchored(self) -> Tensor:
        """Q by the tensors that hold no heads and no units."""
        units = self.folding.units
        free = tuple(
            t for t in self.stream.terms[self.folding.stream] if t.tensor not in units.axes
        )
        gain = self.gram(free, self.b)
        assert gain is not None  # the token embedding is always among them
        return procrustes(gain)

    def turn(self, perms: Permutations, inner: Mapping[str, Tensor]) -> Tensor:
        """The best Q with heads and units in place."""
        gain = self.gram(self.stream.terms[self.folding.stream], self.moved(None, perms, inner))
        assert gain is not None
        return procrustes(gain)

    def match(self, q: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The best heads and units with the stream in place."""
        moved = self.moved(q)
        perms: dict[str, Tensor] = {}
        inner: dict[str, Tensor] = {}
        for family in self.layers:
            outer = self.gram(family.terms[family.outer], moved)
            turnable = self.turnable(family)
            if not family.inner and not turnable:
                assert outer is not None
                price = self.prices.get(family.outer)
                p = perms[family.outer] = assign(outer, price)
                self.prices[family.outer] = prices(outer, p, price)
                continue
            if turnable == (family.outer,):
                assert outer is not None
                perms[family.outer] = self.stay[family.outer]
                inner[family.outer] = turned_heads(None, {family.outer: outer}, 1)[1][family.outer]
                continue
            grams = {g: self.gram(family.terms[g], moved) for g in family.inner}
            known = {g: m for g, m in grams.items() if m is not None}
            heads = self.folding.spec.groups[family.outer].size
            if not turnable:
                perms[family.outer], orders, _ = assign_nested(outer, known, heads)
                perms.update(orders)
            else:
                perms[family.outer], turns = turned_heads(outer, known, heads)
                inner.update(turns)
                perms |= {g: self.stay[g] for g in family.inner}
        return perms, inner

    def solve(self, q: Tensor, max_iterations: int, rtol: float) -> _Found:
        history, ended = [], False
        perms, inner = self.match(q)
        history.append(self.value(self.moved(q, perms, inner)))
        for _ in range(max_iterations):
            deadline.stop_if_passed()
            new = self.turn(perms, inner)
            first = self.value(self.moved(new, perms, inner))
            more = self.match(new)
            second = self.value(self.moved(new, *more))
            if not second - history[-1] > rtol * self.bound:
                ended = True
                break
            q, (perms, inner) = new, more
            history += [first, second]
        return _Found(q, perms, inner, tuple(history), ended)


def turned_heads(
    outer: Tensor | None, grams: Mapping[str, Tensor], heads: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The best permutation of heads, and an orthogonal matrix for each group inside of each head.

    As :func:`companion.rebasin.assignment.assign_nested`, with a Procrustes problem for every pair
    of heads in place of an assignment: a pair gains the sum of singular values of its table.

    Returns:
        p, int64 (heads,); group -> orthogonal (heads, d, d), those of pairs (i, p[i]).
    """
    device = next(iter(grams.values())).device
    gain = torch.zeros(heads, heads, dtype=torch.float64, device=device)
    if outer is not None:
        gain += outer
    pairs = {}
    for name, gram in grams.items():
        d = len(gram) // heads
        pairs[name] = gram.reshape(heads, d, heads, d).transpose(1, 2)
        gain += torch.linalg.svdvals(pairs[name]).sum(-1)
    p = assign(gain)
    at = torch.arange(heads)
    return p, {name: polar(x[at, p]) for name, x in pairs.items()}


def activation_rotation(
    folding: Folding,
    a: Theta,
    b: Theta,
    inputs: Split | Tensor,
    *,
    heads: str = "permuted",
) -> Rotation:
    """Q from the normalised streams of both networks on the same tokens; heads and units as well.

    Q is the Procrustes solution over all tokens and all places where the stream is read, heads and
    units are matched by their activations, which a rotation of the stream does not change. Nothing
    is iterated. With ``heads="rotated"`` the turns inside of heads, which activations do not
    determine without their outputs, come from the weights, with Q and the order of heads in place.

    Arguments:
        a, b: folded state dicts.
        inputs: tokens, a split or int64 (N, L).
        heads: one of :data:`HEADS`.

    Returns:
        a :class:`Rotation`, whose objective is that of the weights, so that it can be compared with
        :func:`rotation_matching`'s; it was not what was maximised, and may be below ``before``.

    Raises:
        BadParameter: the networks do not fit, or there are no inputs.
    """
    clock = time.perf_counter()
    one_of("heads", heads, HEADS)
    x = inputs.x if isinstance(inputs, Split) else inputs
    if x.dim() != 2 or not len(x):
        raise BadParameter(f"inputs: tokens of shape (N, L) are needed, got {tuple(x.shape)}.")
    problem = _Problem(folding, a, b, heads)
    q = procrustes(_streams(folding, a, b, x))
    found = activation_matching(folding.units, folding.module, a, b, x)
    perms, inner = dict(found.perms), {}
    if heads == "rotated":
        inner = _turns_inside(problem, q, perms)
    value = problem.value(problem.moved(q, perms, inner))
    done = _Found(q, perms, inner, (value,), True)
    return done.rotation(problem, "activations", time.perf_counter() - clock)


def _turns_inside(problem: _Problem, q: Tensor, perms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The best turns inside of heads with the stream and the order of heads in place."""
    inner: dict[str, Tensor] = {}
    found = [(f, g) for f in problem.layers for g in problem.turnable(f)]
    perms |= {g: problem.stay[g] for _, g in found}
    moved = problem.moved(q, perms)
    for family, g in found:
        gram = problem.gram(family.terms[g], moved)
        if gram is not None:
            heads = problem.folding.spec.groups[family.outer].size if g != family.outer else 1
            at, d = torch.arange(heads), len(gram) // heads
            inner[g] = polar(gram.reshape(heads, d, heads, d).transpose(1, 2)[at, at])
    return inner


@exact_evaluation()
@torch.no_grad()
def _streams(folding: Folding, a: Theta, b: Theta, x: Tensor) -> Tensor:
    """Inner products of all pairs of coordinates of A's and B's stream, float64 (D, D)."""
    nets = []
    for theta in (a, b):
        own = copy.deepcopy(folding.module).to(x.device).eval()
        own.load_state_dict(dict(theta))
        nets.append(own)
    kept: list[dict[str, Tensor]] = [{}, {}]

    def keep(where: dict[str, Tensor], name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            where[name] = out.detach().flatten(0, -2)

        return hook

    for net, where in zip(nets, kept, strict=True):
        for name in folding.parts.readers:
            net.get_submodule(name).register_forward_hook(keep(where, name))
    sums = Sums(centred=False)
    for part in x.split(examples_a_pass(x)):
        deadline.stop_if_passed()
        for net in nets:
            net(part)
        for name in folding.parts.readers:
            sums.add(kept[0][name], kept[1][name])
    return sums.cross / sums.count
