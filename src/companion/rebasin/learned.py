"""Learned matching of GPT networks: descent on the loss of the line, over transformations of B.

:mod:`companion.rebasin.rotation` looks at weights only. Here its result is where a search begins
that looks at text: latent matrices are projected to rotations of the stream, to permutations of
heads and units, and to rotations inside of heads; each step takes the gradient of the loss at a
point between A and the moved B. ::

    found = learned_rotation(folding, a, b, train)            # B learns
    found = learned_rotation(folding, a, b, train, both=True)  # A and B do

A rotation is the Cayley transform of the latent's antisymmetric part, and its gradient is exact.
A permutation is the best assignment of its latent, and its gradient goes straight through, as in
:mod:`companion.rebasin.ste`. Source: Theus et al. 2025 (one end learns, alpha from [0.4, 0.6],
tokens that no text holds left out); Li and Shen 2026 (both ends learn); our chapter 5.

Whatever lines two moved ends can reach, one can. The moves are linear in the weights and keep the
function, so between ``S(A)`` and ``T(B)`` lies ``S`` of the line from A to ``S^-1 T(B)``, point by
point the same functions. Both ends learning is another way to search, and the result is written
as one transformation of B, ``S^-1 T``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from companion.core import codec, deadline
from companion.core.errors import BadParameter, whole
from companion.core.losses import is_label, mean_loss
from companion.core.networks import private
from companion.core.numerics import exact_evaluation
from companion.core.seeds import Key
from companion.core.theta import Theta, check_theta
from companion.data import Split
from companion.rebasin.assignment import assign_again
from companion.rebasin.folding import HEAD, Folding
from companion.rebasin.rotation import Problem, Rotation, pairs, rotation_matching, transform
from companion.rebasin.spec import Permutations
from companion.rebasin.ste import endless, parted

ALPHAS = (0.4, 0.6)
"""Between which points of the line a step looks: Theus et al.'s."""

PLACES = 5.0
"""Times ``lr``: the step of the latents of permutations, along their gradient over the largest RMS
so far. (Adam would move all entries alike, and units without anything to gain change places.)"""

EPSILON = 1e-12
"""Beside the size of a gradient that it is divided by."""


@dataclass(frozen=True, eq=False)
class Move:
    """What one end does: heads and units permuted, then turned inside of heads, then the stream.

    Arguments:
        stream: (D, D).
        perms: group -> (n, n), of the groups that are permuted.
        inner: group -> (heads, d, d), of those that are turned.
        prices: of the last assignments, which make the next ones faster (of latents).
    """

    stream: Tensor
    perms: Mapping[str, Tensor]
    inner: Mapping[str, Tensor]
    prices: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(cls, problem: Problem, moved: Theta) -> Move:
        """Latents to learn, float32: no turn, and the gains of matching A's units with ``moved``'s.

        As in Algorithm 2 of Git Re-Basin a unit leaves its place the sooner the more another one is
        like it. With identities in place of gains, units without anything to gain change places.
        """
        folding = problem.folding
        spec, perms, inner = folding.units, {}, {}
        wide = {k: v.double() for k, v in moved.items()}
        at = next(iter(wide.values())).device
        for family in problem.layers:
            count = spec.groups[family.outer].size
            turns = problem.turnable(family)
            for g in turns:
                size = spec.groups[g].size
                inner[g] = torch.zeros(1 if g == family.outer else count, size, size, device=at)
            if family.outer not in turns:
                found = (problem.gram(family.terms[g], wide) for g in (family.outer, *family.inner))
                tables = [pairs(gram, count) for gram in found if gram is not None]
                gain = torch.stack([t.diagonal(dim1=2, dim2=3).sum(2) for t in tables]).sum(0)
                perms[family.outer] = (gain / gain.diagonal().mean()).float()
        width = folding.width
        return cls(torch.zeros(width, width, device=at), perms, inner)

    def projected(self) -> Move:
        """Of latents: the rotations and permutations that they stand for."""
        return Move(
            turned(self.stream, fixed=True),
            {g: self._permuted(g, x) for g, x in self.perms.items()},
            {g: turned(x) for g, x in self.inner.items()},
        )

    def order(self, group: str) -> Tensor:
        """The permutation that a latent stands for, as indices (n,)."""
        latent = self.perms[group].detach()
        p, self.prices[group], _ = assign_again(latent, self.prices.get(group))
        return p

    def _permuted(self, group: str, latent: Tensor) -> Tensor:
        return permuted(self.order(group), latent)

    def on(self, folding: Folding, theta: Theta) -> dict[str, Tensor]:
        """A folded network, moved; with gradients. As :func:`companion.rebasin.transform`."""
        units, out = folding.units, dict(theta)
        for name, axes in units.axes.items():
            out[name] = units.lay_out(out[name], name)
            for dim, axis in enumerate(axes):
                if units.moves(axis):
                    x = out[name].movedim(dim, 0)
                    parts = [
                        self._block(block, x[start : start + units.length(block)])
                        for start, block in units.blocks(axis)
                    ]
                    out[name] = torch.cat(parts).movedim(0, dim)
            out[name] = units.put_back(out[name], name)
        for use in folding.spec.uses[folding.stream]:
            x = out[use.tensor].movedim(use.dim, 0)
            out[use.tensor] = torch.tensordot(self.stream, x, 1).movedim(0, use.dim)
        return out

    def _block(self, block: tuple[str | int, ...], x: Tensor) -> Tensor:
        for factor in block:  # an outer group comes first
            if factor in self.perms:
                p = self.perms[str(factor)]
                x = torch.tensordot(p, x.unflatten(0, (len(p), -1)), 1).flatten(0, 1)
            elif factor in self.inner:
                t = self.inner[str(factor)]
                x = torch.einsum("hij,hj...->hi...", t, x.unflatten(0, t.shape[:2])).flatten(0, 1)
        return x


def turned(latent: Tensor, *, fixed: bool = False) -> Tensor:
    """The rotation that a latent stands for, batched: ``(1 - S/2)^-1 (1 + S/2)``, S = X - X^T.

    That is Cayley's transform, which is exp(S) for small S, at a third of its cost.

    Arguments:
        latent: (…, d, d).
        fixed: the all-ones direction keeps its place: X is projected to its complement first.
    """
    if fixed:
        latent = latent - latent.mean(-1, keepdim=True)
        latent = latent - latent.mean(-2, keepdim=True)
    half = (latent - latent.mT) / 2
    one = torch.eye(latent.shape[-1], dtype=latent.dtype, device=latent.device)
    found: Tensor = torch.linalg.solve(one - half, one + half)
    return found


def permuted(p: Tensor, latent: Tensor) -> Tensor:
    """The matrix of the permutation p (n,), with the gradient of the latent (n, n) behind it."""
    hard = F.one_hot(p.to(latent.device), len(p)).to(latent.dtype)
    return hard + (latent - latent.detach())


@exact_evaluation()
def learned_rotation(
    folding: Folding,
    a: Theta,
    b: Theta,
    train: Split,
    *,
    both: bool = False,
    steps: int = 200,
    batch: int = 256,
    lr: float = 1e-2,
    alphas: tuple[float, float] = ALPHAS,
    start: Rotation | None = None,
    held_out: Split | None = None,
    judge_every: int = 10,
    key: Key = Key("learned"),  # noqa: B008 - an immutable value
) -> Rotation:
    """Descend on the loss between A and B over rotations and permutations of B, or of both.

    The candidate with the lowest loss half-way on held-out text is kept, the start among them: on
    that text the result is never above where it began.

    Arguments:
        folding: of :func:`companion.rebasin.fold`.
        a, b: folded state dicts. Neither is changed.
        train: tokens, un-augmented, on the device to compute on. Labels of -100 are left out.
        both: A learns a transformation, too; what is returned is B's relative to A's.
        steps: of Adam, on all latent matrices.
        batch: windows a step, of a new permutation every epoch.
        lr: of Adam.
        alphas: each step is at an alpha drawn uniformly from between these, which lie in [0, 1].
        start: where to begin. None: :func:`companion.rebasin.rotation_matching` with heads turned
            inside, where tokens that ``train`` does not hold are left out of the objective.
        held_out: what candidates are judged on. None: a keyed fifth of ``train``, at most ten
            batches, which no step then uses.
        judge_every: steps from one candidate to the next; the last is always one.
        key: of the batches, of the held-out part and of the alphas.

    Returns:
        a :class:`companion.rebasin.Rotation` for B, ``method`` ``learned``. ``objective`` is that
        of the weights, which was not what was maximised; ``iterations`` are the steps.
        ``details``: ``loss`` of each step's batch; ``held out``: [step, loss half-way] of each
        candidate; ``best``: the step of the one that was kept.

    Raises:
        BadParameter: a parameter out of range, too little text, or networks that do not fit.
        OutOfTime: the time limit was reached.

    Source: Theus et al. 2025; Li and Shen 2026; our chapter 5.
    """
    clock = time.perf_counter()
    for name, count in (("steps", steps), ("batch", batch), ("judge_every", judge_every)):
        whole(name, count, 1)
    if not (math.isfinite(lr) and lr > 0 and 0 <= alphas[0] <= alphas[1] <= 1):
        raise BadParameter(
            f"lr, alphas: above 0, and two in order in [0, 1]; got {lr!r} and {alphas!r}."
        )
    rest, judges = parted(train.labelled(), held_out, batch, key)
    device = train.x.device
    a, b = (
        {n: x.detach().to(device) for n, x in check_theta(folding.module, theta, end).items()}
        for theta, end in ((a, "A"), (b, "B"))
    )
    if start is None:
        start = rotation_matching(folding, _read(folding, a, train), b, heads="rotated")
    problem = Problem(folding, a, b, start.heads)
    module = private(folding.module, train.x)
    moved = start.apply(b, check_outputs=False)
    ends = [Move.begin(problem, theta) for theta in (moved, a)[: 1 + both]]
    turns = [x.requires_grad_() for end in ends for x in (end.stream, *end.inner.values())]
    places = [x.requires_grad_() for end in ends for x in end.perms.values()]
    largest = [torch.zeros((), device=device) for _ in places]  # gradient so far
    optimizers = torch.optim.Adam(turns, lr), torch.optim.SGD(places, PLACES * lr)
    generator, batches = key.fold("alphas").generator(), endless(rest, batch, key)
    losses: list[Tensor] = []
    judged: list[tuple[int, float]] = []
    for step in range(steps + 1):
        deadline.stop_if_passed()
        if step % judge_every == 0 or step == steps:
            this = _relative(start, ends)
            value = _half_way(module, a, transform(folding, b, *this), judges)
            if not judged or value < min(v for _, v in judged):
                best, found = step, this
            judged.append((step, value))
        if step == steps:
            break
        x, y = next(batches)
        alpha = float(torch.empty(()).uniform_(*alphas, generator=generator))
        with torch.enable_grad():
            two = ends[0].projected().on(folding, moved)
            one = ends[1].projected().on(folding, a) if both else a
            theta = {n: torch.lerp(one[n], v, alpha) for n, v in two.items()}
            loss = mean_loss(functional_call(module, theta, (x,)), y)
            grads = torch.autograd.grad(loss, [*turns, *places])
        losses.append(loss.detach())
        for latent, grad in zip(turns, grads, strict=False):
            latent.grad = grad
        for k, (latent, grad) in enumerate(zip(places, grads[len(turns) :], strict=True)):
            largest[k] = torch.maximum(largest[k], grad.square().mean().sqrt())
            latent.grad = grad / (largest[k] + EPSILON)
        for optimizer in optimizers:
            optimizer.step()
    stream, perms, inner = found
    history = [problem.value(problem.moved(stream, perms, inner))]
    return replace(
        problem.rotation("learned", clock, (stream, perms, inner, history, False)),
        iterations=steps,
        details=codec.to_json({"loss": losses, "held out": judged, "best": best}),
    )


def _read(folding: Folding, theta: Theta, text: Split) -> dict[str, Tensor]:
    """A network without the rows of tokens that the text does not hold."""
    out = dict(theta)
    for name in (f"{folding.parts.tables[0]}.weight", f"{HEAD}.weight"):
        there = torch.zeros(len(out[name]), 1, dtype=torch.bool, device=text.x.device)
        there[text.x.unique()] = True
        out[name] = out[name] * there
    return out


@torch.no_grad()
def _relative(
    start: Rotation, ends: list[Move]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """B's whole transformation relative to A's: what :func:`companion.rebasin.transform` takes."""
    units = start.folding.units
    stream, perms = start.stream.double(), dict(start.perms)
    inner = {g: t.double() for g, t in start.inner.items()}
    first, *other = ends
    for end, back in ((first, False), *((end, True) for end in other)):
        q = turned(end.stream.double(), fixed=True).cpu()
        p = units.identity() | {g: end.order(g) for g in end.perms}
        t = {g: turned(x.double()).cpu() for g, x in end.inner.items()}
        if back:  # p, then t, undone: the inverse of p, then of t in the order of heads before p
            p = units.inverse(p)
        for g, x in t.items():
            order = _heads(units.groups[g].within, p, len(x))
            inner[g] = (x.mT @ inner[g])[order] if back else x @ inner[g][order]
        stream = (q.mT if back else q) @ stream
        perms = units.compose(perms, p)
    return stream, perms, inner


def _heads(outer: str | None, perms: Permutations, count: int) -> Tensor:
    return torch.arange(count) if outer is None else perms[outer]


@torch.no_grad()
def _half_way(
    module: torch.nn.Module, a: Theta, b: Theta, batches: list[tuple[Tensor, Tensor]]
) -> float:
    """The mean loss half-way over fixed batches; infinite where it is no number."""
    theta = {
        n: torch.lerp(x, b[n].to(x), 0.5) if x.is_floating_point() else x for n, x in a.items()
    }
    total = labels = 0.0
    for x, y in batches:
        count = float(is_label(y).sum())
        total += float(mean_loss(functional_call(module, theta, (x,)), y)) * count
        labels += count
    return total / labels if math.isfinite(total) else math.inf
