"""The straight-through estimator: permutations of B learned so that the midpoint's loss is low.

Which permutation gives the best network half-way is a discrete question. Algorithm 2 answers it by
gradient descent on free weights t that start at A: each step projects t onto the permutations of B
(weight matching, t in A's place), takes the gradient of the loss at the midpoint of A and that
permuted B, and moves t by it, as if the permuted B had been t itself.
Source: Git Re-Basin (Ainsworth et al. 2023), Section 3.3 and Appendix A.9; our chapter 2.

Two things differ from the authors' code. It kept a reference to the best permutation, which later
steps overwrote, so it returned the last one; here the best one is a copy. And it judged
"best" on a single minibatch; here all candidates are judged on the same held-out data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from companion.connectivity import statistics
from companion.core import codec, deadline
from companion.core.effective import effective
from companion.core.errors import BadParameter
from companion.core.losses import is_label, mean_loss
from companion.core.networks import private
from companion.core.numerics import exact_evaluation
from companion.core.seeds import Key
from companion.core.theta import Theta, affine, check_theta, layout, put, without_aliases
from companion.data import Split
from companion.rebasin.matching import Matching
from companion.rebasin.spec import Spec
from companion.rebasin.weights import objective, weight_matching

MeanLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> mean loss, a number with a gradient."""


STEPS = 200
"""Optimiser steps, unless told otherwise. The authors take 250 epochs."""


@exact_evaluation()
def straight_through(
    spec: Spec,
    module: nn.Module,
    a: Theta,
    b: Theta,
    train: Split | DataLoader[Any],
    *,
    steps: int = STEPS,
    batch: int = 500,
    lr: float = 1e-2,
    momentum: float = 0.9,
    held_out: Split | None = None,
    judge_every: int = 10,
    key: Key = Key("ste"),  # noqa: B008 - an immutable value
    max_passes: int = 100,
    score: MeanLoss = mean_loss,
) -> Matching:
    """Algorithm 2: search the permutation with the lowest loss half-way between A and B.

    The first candidate is weight matching itself, so on the held-out loss the result is never
    worse than it. Integer buffers are A's, BatchNorm uses batch statistics throughout the search
    (see :class:`Midpoint`), dropout is off. Computes on the device of ``train``.

    Arguments:
        spec: of ``module``.
        module: the architecture.
        a, b: state dicts of it. None is changed.
        train: data of the steps, un-augmented. Labels of -100 are left out, here and in
            ``held_out``.
        steps: of momentum SGD on the free weights (authors: 250 epochs).
        batch: examples a step, of a new permutation every epoch (authors: 1000 for MLPs, 500 for
            VGG-16); all of them if ``train`` is smaller.
        lr, momentum: of SGD; the authors' values, for thousands of steps. The permutation changes
            only once t has moved far enough, so a short search wants a longer step.
        held_out: what candidates are judged on. None: a keyed fifth of ``train``, at most ten
            batches, which no step then uses.
        judge_every: steps from one candidate to the next. The last projection is always one.
        key: of the batches, of the held-out part, and of the visiting orders in projections.
        max_passes: of each projection; each starts from the one before.
        score: (outputs, targets) -> mean loss.

    Returns:
        permutations for B. ``objective``, ``before`` and ``bound`` are weight matching's, at these
        permutations; ``passes`` is the number of steps made. ``details``: ``loss`` of every step's
        batch at the midpoint; ``held out``: [step, loss] of every candidate; ``best``: the step of
        the one that was kept; ``weight matching``: the first one's loss; ``stopped``: the step
        at which the free weights were no longer finite, or None.

    Raises:
        BadParameter: a parameter out of range, too little data, or a network that is no finite
            point of this architecture.
        OutOfTime: the time limit was reached.

    Source: Git Re-Basin (Ainsworth et al. 2023), Section 3.3 and Appendix A.9; our chapter 2.
    """
    begin = time.perf_counter()
    for name, whole in (("steps", steps), ("batch", batch), ("judge_every", judge_every)):
        if isinstance(whole, bool) or not isinstance(whole, int) or whole < 1:
            raise BadParameter(f"{name}: {whole!r} must be a whole number of 1 or more.")
    if not (math.isfinite(lr) and lr > 0):
        raise BadParameter(f"lr: {lr!r} must be finite and above 0.")
    if not 0 <= momentum < 1:
        raise BadParameter(f"momentum: {momentum!r} must lie in [0, 1).")
    a, b = check_theta(module, a, "A"), check_theta(module, b, "B")
    train, judges = parted(Split.of(train).labelled(), held_out, batch, key)
    device = train.x.device
    a, b = ({n: x.detach().to(device) for n, x in theta.items()} for theta in (a, b))
    middle = Midpoint(module, a, train.x, score)
    # Entry of the objective -> its first name, if its tensor is tied.
    learnt = {
        n: first for n in spec.objective if (first := middle.ties.get(n, n)) in middle.trainable
    }
    # Half-precision networks: small steps would be lost in rounding.
    free = {n: a[n].to(torch.promote_types(a[n].dtype, torch.float32), copy=True) for n in learnt}
    speed = {n: torch.zeros_like(x) for n, x in free.items()}
    projected = weight_matching(spec, a, b, max_passes=max_passes)
    before, bound = projected.before, projected.bound
    judged: list[tuple[int, float]] = []
    losses: list[Tensor] = []
    stopped = None
    batches = endless(train, batch, key)
    for step in range(steps + 1):
        deadline.stop_if_passed()
        if step:
            how: Any = {"key": key.fold("project", step), "max_passes": max_passes}
            how["epsilon"] = 0.0  # little has changed since
            projected = weight_matching(spec, {**a, **free}, b, start=projected.perms, **how)
        now = spec.permute(b, projected.perms)
        if step % judge_every == 0 or step == steps:
            value = middle.loss(now, judges)
            if not judged or value < min(v for _, v in judged):
                best, perms = step, {n: p.clone() for n, p in projected.perms.items()}
            judged.append((step, value))
        if step == steps:
            break
        loss, slope = middle.gradient(now, *next(batches), list(learnt.values()))
        losses.append(loss)
        # Straight through: the midpoint moves by half of what t moves, as if t were the permuted B.
        for n, x in free.items():
            g = slope.get(learnt[n])
            if g is not None:
                speed[n].mul_(momentum).add_(g.to(x.dtype), alpha=0.5)
                x.sub_(speed[n], alpha=lr)
        if not all(bool(torch.isfinite(x).all()) for x in free.values()):
            stopped = step + 1
            break
    return Matching(
        spec,
        perms,
        "ste",
        objective(spec, a, b, perms),
        before,
        bound,
        passes=len(losses),
        seconds=time.perf_counter() - begin,
        details=codec.to_json(
            {
                "loss": losses,
                "held out": judged,
                "best": best,
                "weight matching": judged[0][1],
                "stopped": stopped,
            }
        ),
    )


class Midpoint:
    """The network half-way between A and a permuted B: half-way in the weights that layers use.

    Arguments:
        module: the architecture; copied, never changed. In eval mode but for BatchNorm, which uses
            the statistics of each batch: interpolated running statistics let the activations'
            variance collapse at the midpoint (Jordan et al. 2023), and with it the gradient.
        a: network A, on the device to compute on.
        score: the loss.
    """

    def __init__(self, module: nn.Module, a: Theta, inputs: Tensor, score: MeanLoss):
        self.space = effective(private(module, inputs))
        self.module = self.space.module.requires_grad_(False)
        for m in statistics.running(self.module):
            m.train()
        stored, own = layout(self.space.original), layout(self.module)
        self.trainable, self.ties = set(stored.parameters), stored.ties
        self.names, self._moved, self._ties = own.floating, set(own.parameters), own.ties
        self.a, self.score = self.space.enter(a), score
        put(self.module, self.a, self._ties)  # for the integer buffers

    def weights(self, b: Theta) -> dict[str, Tensor]:
        """Half of A and half of ``b``, new tensors. Integer buffers stay in the module's copy."""
        own = self.module.state_dict()
        middle = affine((self.a, self.space.enter(b)), (0.5, 0.5), self.names)
        return {n: x.to(own[n].dtype) for n, x in middle.items()}

    def _loss(self, theta: Theta, x: Tensor, y: Tensor) -> Tensor:
        return self.score(functional_call(self.module, without_aliases(theta, self._ties), (x,)), y)

    def gradient(self, b: Theta, x: Tensor, y: Tensor, names: list[str]) -> tuple[Tensor, Theta]:
        """Loss of one batch, and its gradient at the midpoint with respect to ``names`` of ``b``.

        By the weights that these entries make, as if all of the midpoint were made of ``b``.
        """
        theta = self.weights(b)
        made = [slot.entry for slot in self.space.slots]
        wanted = [n for n in dict.fromkeys((*names, *made)) if n in self._moved]
        with torch.enable_grad():
            leaves = {n: theta[n].requires_grad_() for n in wanted}
            loss = self._loss({**theta, **leaves}, x, y)
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found = {n: g for n, g in zip(wanted, grads, strict=True) if g is not None}
        return loss.detach(), self.space.pulled_back(b, found)

    @torch.no_grad()
    def loss(self, b: Theta, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Mean loss over fixed batches; infinite where it is no number."""
        theta = self.weights(b)
        total = torch.zeros((), device=batches[0][0].device)
        sizes = [len(y) * float(is_label(y).double().mean()) for _, y in batches]
        for (x, y), size in zip(batches, sizes, strict=True):
            total += self._loss(theta, x, y) * size
        mean = float(total) / sum(sizes)
        return mean if math.isfinite(mean) else math.inf


def parted(
    train: Split, held_out: Split | None, batch: int, key: Key
) -> tuple[Split, list[tuple[Tensor, Tensor]]]:
    """What steps are made on, and the batches that candidates are judged on.

    Arguments:
        train, held_out, batch, key: as :func:`straight_through` takes them, labelled.

    Raises:
        BadParameter: too little data.
    """
    if held_out is None:
        if len(train) < 2:
            raise BadParameter(f"train: 2 examples or more are needed, got {len(train)}.")
        order = key.fold("held out").permutation(len(train)).to(train.x.device)
        size = min(max(len(train) // 5, 1), 10 * batch)
        held_out, train = (
            Split(train.x[part], train.y[part]) for part in (order[:size], order[size:])
        )
    for name, split in (("train", train), ("held_out", held_out)):
        if len(split) == 0:
            raise BadParameter(f"{name}: there are no examples.")
    held_out = held_out.labelled().to(train.x.device)
    parts = -(-len(held_out) // batch)  # of equal size, as BatchNorm takes statistics of each
    pairs = zip(held_out.x.tensor_split(parts), held_out.y.tensor_split(parts), strict=True)
    return train, list(pairs)


def endless(split: Split, batch: int, key: Key) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches of a new permutation every epoch, without end."""
    size = min(batch, len(split))
    epoch = 0
    while True:
        order = key.fold("epoch", epoch).permutation(len(split)).to(split.x.device)
        for part in order[: len(order) // size * size].split(size):
            yield split.x[part], split.y[part]
        epoch += 1
