"""Rotations of the residual stream of a folded GPT network, with heads and MLP units permuted.

The symmetries of a transformer are more than permutations. In folded coordinates
(:mod:`companion.rebasin.folding`) the whole stream may be turned by any orthogonal Q that keeps
the all-ones direction; so may, inside a head, queries and keys together, and values. ::

    folding = fold(module, x)
    a, b = folding.apply(theta_a), folding.apply(theta_b)
    found = rotation_matching(folding, a, b)      # or activation_rotation(…, inputs)
    moved = found.apply(b)                        # B's function, close to A

With heads and units in place the best Q is closed form (orthogonal Procrustes: one SVD); with Q in
place the heads and units of every layer are linear assignments. Each half-step is exact, so the
objective never falls. Source: Theus et al. 2025 (generalised linear mode connectivity for
transformers); Schönemann 1966 for the Procrustes problem; our chapter 5.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from companion.connectivity.batches import examples_a_pass
from companion.core import deadline
from companion.core.errors import BadParameter, one_of
from companion.core.networks import private
from companion.core.numerics import exact_evaluation
from companion.core.theta import Theta, check_theta, layout, put
from companion.data import Split
from companion.rebasin.activations import Sums, activation_matching
from companion.rebasin.assignment import assign_again, assign_nested, assign_units
from companion.rebasin.folding import Folding, check_same
from companion.rebasin.matching import Found
from companion.rebasin.spec import Permutations
from companion.rebasin.weights import FamilyTerms, Term, bound, dot, families_of, gains_of, sums_on

HEADS = ("permuted", "rotated")
"""What may be done inside a head: its units are permuted; or queries and keys are turned by one
orthogonal matrix, and values by another."""


Ended = tuple[Tensor, Permutations, Mapping[str, Tensor], list[float], bool]
"""Where an alternation ended: the stream's Q, permutations, turns inside of heads, history, and
whether it ended by itself."""


@dataclass(frozen=True, eq=False)
class Rotation(Found):
    """What brings a folded network B close to a folded network A.

    Arguments:
        folding: the architecture.
        stream: orthogonal, float64 (D, D), on the CPU; keeps the all-ones direction: the new stream
            is ``stream @ old``.
        perms: of heads and units (:attr:`companion.rebasin.folding.Folding.units`), made first.
        inner: group inside of heads -> orthogonal, float64 (heads, d, d), made after ``perms``;
            empty if inner units are only permuted.
        method: ``weights``, ``activations`` or ``learned``.
        heads: one of :data:`HEADS`.
        objective: ``<A, T(B)>`` over the weights at this transformation T.
        before: nothing done.
        bound: what it cannot exceed, ``|A| |B|`` tensor by tensor.
        history: the objective from the beginning, after every half-step.
        iterations: of both half-steps.
        converged: the last one gained nothing.
        seconds: of wall-clock time.
        details: what else the method has to say, JSON-able.
    """

    folding: Folding = field(repr=False)
    stream: Tensor = field(repr=False)
    perms: Permutations = field(repr=False)
    inner: Mapping[str, Tensor] = field(repr=False)
    method: str
    heads: str
    objective: float
    before: float
    bound: float
    history: tuple[float, ...] = field(repr=False)
    iterations: int
    converged: bool
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)

    SUMMARY = (
        *("method", "heads", "objective", "before", "bound", "share", "share_before", "turned"),
        *("iterations", "converged", "history", "seconds"),
    )

    @property
    def turned(self) -> float:
        """How far the stream is turned: 1 - trace(Q) / D, 0 for no turn, about 1 for any one."""
        return 1 - float(self.stream.trace()) / len(self.stream)

    def summary(self) -> dict[str, Any]:
        """As of every result; ``details`` where there are any."""
        return super().summary() | ({"details": self.details} if self.details else {})

    def apply(self, theta: Theta, *, check_outputs: bool = True) -> dict[str, Tensor]:
        """B in A's coordinates.

        Arguments:
            theta: B, folded. Sums are done in float64, results have its dtype.
            check_outputs: run B and the result on the example, in float64 throughout, and refuse
                if they differ.

        Returns:
            a new state dict of the folded architecture.

        Raises:
            BadParameter: ``theta`` is none of the folded architecture. Unproven: outputs differ.
        """
        theta = check_theta(self.folding.module, theta, "B")
        wide = transform(self.folding, theta, self.stream, self.perms, self.inner)
        if check_outputs:
            module = self.folding.module
            check_same(module, theta, module, wide, self.folding.spec.example)
        return {k: v.to(theta[k].dtype) for k, v in wide.items()}


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
        rtol: an iteration that gains less than this share of the bound is the last.

    Raises:
        BadParameter: the networks do not fit, or hold NaN or infinite values.
    """
    clock = time.perf_counter()
    one_of("heads", heads, HEADS)
    if max_iterations < 1 or not 0 <= rtol < 1:
        raise BadParameter(
            f"max_iterations, rtol: at least 1, and in [0, 1); got {max_iterations} and {rtol}."
        )
    problem = Problem(folding, a, b, heads)
    # The tensors that hold no heads and no units.
    free = [t for t in problem.stream if t.tensor not in folding.units.axes]
    q = problem.turn(problem.b, free) if start is None else check_rotation(start, folding.width)
    best = problem.solve(q, max_iterations, rtol)
    if best[3][-1] < problem.before:
        best = problem.solve(torch.eye(folding.width, dtype=torch.float64), max_iterations, rtol)
    return problem.rotation("weights", clock, best)


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
    problem = Problem(folding, a, b, heads)
    q = procrustes(_streams(folding, a, b, x))
    found = activation_matching(folding.units, folding.module, a, b, x)
    perms, inner = dict(found.perms), {}
    turnable = [(f, g) for f in problem.layers for g in problem.turnable(f)]
    perms |= {g: problem.stay[g] for _, g in turnable}
    moved = problem.moved(q, perms)
    for family, g in turnable:
        gram = problem.gram(family.terms[g], moved)
        if gram is not None:
            heads_here = folding.spec.groups[family.outer].size if g != family.outer else 1
            at = torch.arange(heads_here)
            inner[g] = polar(pairs(gram, heads_here)[at, at])
    history = [problem.value(problem.moved(q, perms, inner))]
    return problem.rotation("activations", clock, (q, perms, inner, history, True))


class Problem:
    """Two folded networks, and the two half-steps of the alternation."""

    def __init__(self, folding: Folding, a: Theta, b: Theta, heads: str):
        self.folding, self.heads = folding, heads
        a, b = (check_theta(folding.module, x, n) for x, n in ((a, "A"), (b, "B")))
        self.bound = bound(a, b, folding.spec)
        self.a, self.b = (
            {t: x[t].detach().to(sums_on(x[t])).double() for t in folding.spec.objective}
            for x in (a, b)
        )
        self.before = self.value(self.b)
        whole = families_of(folding.spec)
        self.stream = next(f.terms[f.outer] for f in whole if f.outer == folding.stream)
        self.layers = families_of(folding.units)
        self.stay = folding.units.identity()
        self.prices: dict[str, Tensor] = {}  # of B's units: they make the next assignment faster
        units = folding.units
        for t, axes in units.axes.items():
            if sum(map(units.moves, axes)) > 1:
                raise BadParameter(
                    f"rotation: {t} joins two groups of units; only layers that are coupled by the "
                    "residual stream alone can be solved at once."
                )

    def turnable(self, family: FamilyTerms) -> tuple[str, ...]:
        """The groups whose units may be turned: those inside of heads, if that was asked for.

        With a single head the spec has no heads, and its units are groups of their own.
        """
        if self.heads == "permuted":
            return ()
        if family.inner:
            return family.inner
        attention = {w.rpartition(".")[0] for w in self.folding.parts.writers[::2]}
        return (family.outer,) if family.outer.startswith(tuple(attention)) else ()

    def value(self, moved: Theta) -> float:
        return sum(dot(x, moved[t]) for t, x in self.a.items())

    def moved(self, q: Tensor | None, perms: Any = None, inner: Any = None) -> dict[str, Tensor]:
        return transform(self.folding, self.b, q, perms, inner)

    def gram(self, terms: Sequence[Term], moved: Theta) -> Tensor | None:
        return gains_of(terms, self.a, moved)

    def turn(self, moved: Theta, terms: Sequence[Term]) -> Tensor:
        """The best Q for a B with its heads and units in place."""
        gain = self.gram(terms, moved)
        assert gain is not None  # the token embedding is always among the terms
        return procrustes(gain)

    def match(self, q: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The best heads and units with the stream in place."""
        moved = self.moved(q)
        perms: dict[str, Tensor] = {}
        inner: dict[str, Tensor] = {}
        for family in self.layers:
            name = family.outer
            outer = self.gram(family.terms[name], moved)
            turnable = self.turnable(family)
            grams = {g: self.gram(family.terms[g], moved) for g in family.inner}
            known = {g: m for g, m in grams.items() if m is not None}
            heads = self.folding.spec.groups[name].size
            if turnable == (name,):
                assert outer is not None
                inner[name] = polar(pairs(outer, 1)[0])
            elif turnable:
                perms[name], turns = turned_heads(outer, known, heads)
                inner |= turns
            elif family.inner:
                perms[name], orders, _ = assign_nested(outer, known, heads)
                perms |= orders
            else:
                assert outer is not None
                perms[name], self.prices[name], _ = assign_again(outer, self.prices.get(name))
            perms |= {g: self.stay[g] for g in turnable}
        return perms, inner

    def solve(self, q: Tensor, max_iterations: int, rtol: float) -> Ended:
        """Both half-steps in turn from ``q``, until an iteration gains too little."""
        ended = False
        perms, inner = self.match(q)
        history = [self.value(self.moved(q, perms, inner))]
        for _ in range(max_iterations):
            deadline.stop_if_passed()
            new = self.turn(self.moved(None, perms, inner), self.stream)
            first = self.value(self.moved(new, perms, inner))
            more = self.match(new)
            second = self.value(self.moved(new, *more))
            if not second - history[-1] > rtol * self.bound:
                ended = True
                break
            q, (perms, inner) = new, more
            history += [first, second]
        return q, perms, inner, history, ended

    def rotation(self, method: str, clock: float, ended: Ended) -> Rotation:
        stream, perms, inner, history, converged = ended
        turns = {g: r.cpu() for g, r in inner.items()}
        numbers = (history[-1], self.before, self.bound, tuple(history), (len(history) - 1) // 2)
        seconds = time.perf_counter() - clock
        found = (self.folding, stream.cpu(), perms, turns, method, self.heads)
        return Rotation(*found, *numbers, converged, seconds)


def turned_heads(
    outer: Tensor | None, grams: Mapping[str, Tensor], heads: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The best permutation of heads, and an orthogonal matrix for each group inside of each head.

    As :func:`companion.rebasin.assignment.assign_nested`, with a Procrustes problem for every pair
    of heads in place of an assignment: a pair gains the sum of singular values of its table.
    """
    device = next(iter(grams.values())).device
    gain = torch.zeros(heads, heads, dtype=torch.float64, device=device)
    if outer is not None:
        gain += outer
    tables = {name: pairs(gram, heads) for name, gram in grams.items()}
    for table in tables.values():
        gain += torch.linalg.svdvals(table).sum(-1)
    p = assign_units(gain)
    at = torch.arange(heads)
    return p, {name: polar(x[at, p]) for name, x in tables.items()}


def pairs(gram: Tensor, heads: int) -> Tensor:
    """The table of each pair of heads, (heads, heads, d, d)."""
    d = len(gram) // heads
    return gram.reshape(heads, d, heads, d).transpose(1, 2)


@exact_evaluation()
@torch.no_grad()
def _streams(folding: Folding, a: Theta, b: Theta, x: Tensor) -> Tensor:
    """Inner products of all pairs of coordinates of A's and B's stream, float64 (D, D)."""
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        kept[module] = out.detach().flatten(0, -2)

    nets = []
    for theta in (a, b):
        nets.append(private(folding.module, x))
        put(nets[-1], theta, layout(nets[-1]).ties)
        for name in folding.parts.readers:
            nets[-1].get_submodule(name).register_forward_hook(keep)
    sums = Sums(centred=False)
    for part in x.split(examples_a_pass(x)):
        deadline.stop_if_passed()
        for net in nets:
            net(part)
        for name in folding.parts.readers:
            sums.add(*(kept[net.get_submodule(name)] for net in nets))
    return sums.cross / sums.count


def procrustes(gain: Tensor) -> Tensor:
    """The orthogonal Q with ``Q 1 = 1`` that maximises ``sum_ij gain[i, j] Q[i, j]``.

    On the complement of the all-ones direction it is the orthogonal factor of the gain's polar
    decomposition, from one SVD. Reflections are allowed.

    Arguments:
        gain: float64 (D, D): inner products of coordinate i of A and coordinate j of B.

    Returns:
        float64 (D, D), on the device of ``gain``.

    Raises:
        BadParameter: ``gain`` is not square, or not finite.
    """
    if gain.dim() != 2 or gain.shape[0] != gain.shape[1]:
        raise BadParameter(f"procrustes: a square matrix expected, got {tuple(gain.shape)}.")
    if not bool(torch.isfinite(gain).all()):
        raise BadParameter("procrustes: the gains hold NaN or infinite values.")
    gain = gain.double()
    rest = _complement(len(gain)).to(gain.device)
    q = rest @ polar(rest.T @ gain @ rest) @ rest.T
    return q + 1 / len(gain)


def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal Q with ``Q 1 = 1``, float64 (width, width)."""
    return procrustes(torch.randn(width, width, generator=generator, dtype=torch.float64))


def rotate(folding: Folding, theta: Theta, q: Tensor) -> dict[str, Tensor]:
    """A folded network with its residual stream turned by ``q``: the same function, in float64.

    Arguments:
        theta: a state dict of the folded architecture.
        q: orthogonal (D, D), keeps the all-ones direction.

    Raises:
        BadParameter: ``q`` is no such matrix.
    """
    check_rotation(q, folding.width)
    return transform(folding, theta, q)


def check_rotation(q: Tensor, width: int) -> Tensor:
    """``q`` in float64; refuses what is not orthogonal or turns the all-ones direction."""
    if q.shape != (width, width) or not bool(torch.isfinite(q).all()):
        raise BadParameter(
            f"rotation: {width} x {width} finite numbers are needed, got shape {tuple(q.shape)}"
            f"{'' if q.shape != (width, width) else ' with NaN or infinite ones'}."
        )
    q = q.detach().double()
    one = torch.ones(width, dtype=q.dtype, device=q.device)
    off = max(float((q @ q.T - one.diag()).abs().max()), float((q @ one - one).abs().max()))
    if off > 1e-9:
        raise BadParameter(
            f"rotation: the matrix is off by {off:.2g} from an orthogonal one that keeps the "
            "all-ones direction, which LayerNorm removes. procrustes() and random_rotation() make "
            "such matrices."
        )
    return q


@torch.no_grad()
def transform(
    folding: Folding,
    theta: Theta,
    q: Tensor | None = None,
    perms: Permutations | None = None,
    inner: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A folded network with heads and units permuted, heads turned inside, and the stream turned.

    Arguments:
        theta: a state dict.
        q, perms, inner: as :class:`Rotation` has them; None leaves them out.

    Returns:
        a new state dict, floating-point entries in float64. Nothing is checked here.
    """
    units = folding.units
    out = {k: v.detach().double() if v.is_floating_point() else v for k, v in theta.items()}
    if perms is not None:
        out = {k: units.permute_tensor(v, k, perms) for k, v in out.items()}
    for group, turns in (inner or {}).items():
        for use in units.uses[group]:
            x = units.lay_out(out[use.tensor], use.tensor).clone()
            place = x.narrow(use.dim, use.start, units.length(use.block))
            part = place.movedim(use.dim, 0).unflatten(0, turns.shape[:2])
            new = torch.einsum("hij,hj...->hi...", turns.to(x), part)
            place.copy_(new.flatten(0, 1).movedim(0, use.dim))
            out[use.tensor] = units.put_back(x, use.tensor)
    if q is not None:
        for use in folding.spec.uses[folding.stream]:
            x = out[use.tensor].movedim(use.dim, 0)
            out[use.tensor] = torch.tensordot(q.to(x), x, 1).movedim(0, use.dim)
    return {k: v.contiguous() for k, v in out.items()}


def polar(x: Tensor) -> Tensor:
    """The orthogonal matrix that maximises the inner product with ``x``; batched."""
    u, _, vh = torch.linalg.svd(x)
    found: Tensor = u @ vh
    return found


def _complement(size: int) -> Tensor:
    """An orthonormal basis of the complement of the all-ones direction, (size, size - 1)."""
    # Columns of the Householder reflection that takes the first unit vector there.
    v = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    v[0] += 1
    norm = float(v @ v)
    eye = torch.eye(size, dtype=torch.float64)
    return (eye - (2 / norm) * torch.outer(v, v) if norm else eye)[:, 1:]
