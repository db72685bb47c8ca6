"""Weight matching: permutations of B that bring its weights close to A's, without data.

Maximises ``<A, P(B)>``, the sum over parameters of their inner products, which is the same as to
minimise the distance ``|A - P(B)|``. Finding the best P is NP-hard (Lemma 1); Algorithm 1 solves
one group at a time exactly, as a linear assignment with all others fixed, until nothing rises.
Source: Git Re-Basin (Ainsworth et al. 2023), Section 3.2 and Appendix A.7; our chapter 2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from companion.core.errors import BadParameter, one_of
from companion.core.seeds import Key
from companion.core.theta import Theta
from companion.rebasin.descent import State, device_of, dot
from companion.rebasin.matching import Matching
from companion.rebasin.spec import Permutations, Spec
from companion.rebasin.terms import Family, families


def norms(spec: Spec, theta: Theta, name: str) -> dict[str, float]:
    """The norm of every entry of the objective; refuses what is no finite point of the spec.

    Arguments:
        theta: a state dict.
        name: what messages call it.

    Raises:
        BadParameter: an entry is missing, has another shape, or is not finite.
    """
    missing = [t for t in spec.objective if t not in theta]
    if missing:
        raise BadParameter(
            f"network {name} does not fit the spec: missing {', '.join(missing[:5])}. Both "
            "networks must be the architecture that the spec was derived from."
        )
    for t, axes in spec.axes.items():
        if t not in theta:
            continue  # a buffer or a second name of a tied tensor: not needed here
        shape = tuple(sum(spec.length(block) for block in axis) for axis in axes)
        if tuple(theta[t].shape) != shape:
            raise BadParameter(
                f"network {name}: {t} has shape {tuple(theta[t].shape)}, the spec {shape}."
            )
    found = {}
    for t in spec.objective:
        x = theta[t].detach()
        if not x.is_floating_point():
            raise BadParameter(f"network {name}: {t} is {x.dtype}; only real numbers can match.")
        x = x.to(device_of(x))
        found[t] = float(torch.linalg.vector_norm(x, dtype=torch.float64))
        if not math.isfinite(found[t]):
            raise BadParameter(f"network {name}: {t} holds NaN or infinite values; it diverged.")
    return found


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
) -> Matching:
    """Algorithm 1: coordinate descent over the groups, each solved exactly, until none improves.

    Gains are sums in float64, one tensor at a time. A step is taken only if the objective rises by
    more than ``rtol`` of its upper bound, so the descent ends (Lemma 2). A group is solved again
    only if one that shares a tensor with it has changed since.

    Two defaults are not the paper's, which begins at the identity and visits groups in random order
    (``begin="identity", order="random"``). While the permutations around a group are still wrong,
    their tensors are noise in its gains; only what is tied to the input, the output or to groups
    solved before says something. A first pass by those tensors alone recovers planted permutations
    at once where the paper's needs several passes (ResNet-50) or gets stuck (issue 8 of the
    original repository: 16 of 100, here 100). On trained networks, ten pairs of three-layer
    perceptrons on digits, both end at the same share of the bound (0.300 and 0.299), and the
    forward order takes fewer passes than the random one (17 and 21). The result is never below the
    identity, which is where the descent begins if it is better than that first pass.

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

    Returns:
        permutations for B. ``details``: for every start its objective, passes and whether it
        ended by itself; for the best one the objective after every pass.

    Raises:
        BadParameter: the networks do not fit the spec, or hold NaN or infinite values.
    """
    clock = time.perf_counter()
    if starts < 1 or max_passes < 1:
        raise BadParameter(f"starts, max_passes: at least 1 each, got {starts} and {max_passes}.")
    if not 0 <= rtol < 1:
        raise BadParameter(f"rtol must lie in [0, 1), got {rtol}.")
    one_of("begin", begin, ("anchored", "identity"))
    one_of("order", order, ("random", "forward"))
    size_a, size_b = norms(spec, a, "A"), norms(spec, b, "B")
    bound = sum(size_a[t] * size_b[t] for t in spec.objective)
    if start is not None:
        spec.check(start)
    before = objective(spec, a, b)
    plan = families(spec)
    best: tuple[float, dict[str, Tensor], list[float]] | None = None
    log: list[dict[str, Any]] = []
    for n in range(starts):
        own = key.fold("start", n)
        if n == 0 and start is None:
            state, value = _first(spec, a, b, plan, before, begin)
        else:
            there = start if n == 0 and start is not None else spec.random(own.generator())
            state = State(spec, a, b, there)
            value = state.product(state.now)
        history, ended = _descend(state, value, plan, bound, own, max_passes, rtol, order)
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
        bound,
        passes=len(history) - 1,
        starts=starts,
        seconds=time.perf_counter() - clock,
        details={"starts": log, "history": history, "begin": begin, "order": order},
    )


def _first(
    spec: Spec, a: Theta, b: Theta, plan: Sequence[Family], before: float, begin: str
) -> tuple[State, float]:
    """Where the first descent begins: after one anchored pass, unless the identity is better."""
    if begin == "anchored":
        state = _one_pass(spec, a, b, plan, anchored=True)
        value = state.product(state.now)
        if value > before:
            return state, value
    return State(spec, a, b, spec.identity()), before


def _one_pass(spec: Spec, a: Theta, b: Theta, plan: Sequence[Family], *, anchored: bool) -> State:
    """Every family once, forward, by the tensors whose other families have been visited.

    Of these, those that make its units; and, if ``anchored``, those that read them as well, but
    none that depend on where the family itself is now, which says nothing yet.
    """
    state = State(spec, a, b, spec.identity())
    for k, family in enumerate(plan):
        known = {t for t, others in family.others.items() if all(j < k for j in others)}
        known -= family.twice if anchored else family.readers
        terms = {g: tuple(t for t in ts if t.tensor in known) for g, ts in family.terms.items()}
        found = state.best(family, terms, 0.0)
        if found is not None:
            state.take(family, found[0], state.stepped(family, found[0]))
        if anchored:
            step = None if found is None else found[0][family.outer]
            state.keep(family, terms[family.outer], step)
    return state


def _descend(
    state: State,
    value: float,
    plan: Sequence[Family],
    bound: float,
    key: Key,
    max_passes: int,
    rtol: float,
    order: str,
) -> tuple[list[float], bool]:
    """One descent from ``value``. Returns that and the objective after each pass; if it ended."""
    tol = rtol * bound
    history = [value]
    todo = set(range(len(plan)))
    for n in range(max_passes):
        if not todo or bound - value <= tol:
            return history, True  # nothing to gain: that is the bound, or an optimum of every group
        if order == "random":
            visit = key.fold("pass", n).permutation(len(plan)).tolist()
        else:
            visit = list(range(len(plan)))
        for k in visit:
            if k not in todo:
                continue
            todo.discard(k)
            rise = state.improve(plan[k], tol)
            if rise:
                value += rise
                todo |= plan[k].neighbours
                if not plan[k].linear:
                    todo.add(k)
        history.append(value)
    return history, not todo or bound - value <= tol


def greedy(spec: Spec, a: Theta, b: Theta) -> Matching:
    """One pass from the input to the output: the baseline that weight matching improves on.

    Each group is matched by the tensors that make its units (the rows of its layer's weights, its
    biases and norms) as far as their other groups have been matched before, and never looked at
    again, as in OT-Fusion and FedMA. Source: Appendix A.7; our chapter 2.

    Raises:
        BadParameter: the networks do not fit the spec, or hold NaN or infinite values.
    """
    clock = time.perf_counter()
    size_a, size_b = norms(spec, a, "A"), norms(spec, b, "B")
    bound = sum(size_a[t] * size_b[t] for t in spec.objective)
    state = _one_pass(spec, a, b, families(spec), anchored=False)
    return Matching(
        spec,
        state.perms,
        "greedy",
        state.product(state.now),
        objective(spec, a, b),
        bound,
        passes=1,
        seconds=time.perf_counter() - clock,
    )
