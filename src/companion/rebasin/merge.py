"""MergeMany: bring any number of networks into one order of units, and average them.

Each network in turn is matched with the mean of all others, until none moves. As every network has
one permutation into the common frame, the permutations between any two of them agree with those by
way of a third; matching pairs one by one gives no such guarantee. ``method="c2m3"`` also looks for
a frame by Frank-Wolfe steps of all networks and layers at once. Source: Git Re-Basin (Ainsworth et
al. 2023), Appendix A.10, Algorithm 3, Table 3 and Figure 13; C2M3 (Crisostomi et al. 2024), Section
3; our chapter 2.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from companion.core.effective import computed_from
from companion.core.errors import BadParameter, one_of
from companion.core.seeds import Key
from companion.core.theta import Theta, affine, is_continuous
from companion.rebasin.matching import Found
from companion.rebasin.spec import Permutations, Spec
from companion.rebasin.universe import check_plain, frank_wolfe
from companion.rebasin.weights import bound, checked_norms, weight_matching


@dataclass(frozen=True)
class Merged(Found):
    """Networks in one order of units, and their mean.

    Arguments:
        spec: of the architecture.
        perms: for each network, in the order they were given, into the common frame.
        theta: the mean in that frame: floating-point entries averaged, others from the first.
        objective: the sum over all pairs of ``<P_i(theta_i), P_j(theta_j)>``. To raise it is to
            lower the distances of the networks from their mean.
        before: the same, nothing permuted.
        history: the objective before, then after every pass; it never falls.
        bound: what it cannot exceed.
        passes: over all networks.
        seconds: of wall-clock time.
        method: ``passes`` or ``c2m3``.
    """

    spec: Spec
    perms: tuple[dict[str, torch.Tensor], ...]
    theta: Theta
    objective: float
    before: float
    history: tuple[float, ...]
    bound: float
    passes: int
    seconds: float
    method: str = "passes"

    SUMMARY = (
        *("networks", "method", "objective", "before", "bound", "share"),
        *("passes", "history", "seconds"),
    )

    @property
    def networks(self) -> int:
        """How many there are."""
        return len(self.perms)

    def between(self, i: int, j: int) -> dict[str, torch.Tensor]:
        """Permutations that bring network ``j`` into the order of network ``i``'s own units.

        They lead through the common frame, so they are consistent: j to i to k is j to k.

        Arguments:
            i, j: positions in the list of networks.
        """
        return self.spec.compose(self.perms[j], self.spec.inverse(self.perms[i]))


def merge_many(
    spec: Spec,
    thetas: Sequence[Theta],
    *,
    key: Key = Key("rebasin", "merge"),  # noqa: B008 - an immutable value
    max_passes: int = 100,
    rtol: float = 1e-9,
    method: str = "passes",
    start: Merged | None = None,
) -> Merged:
    """Algorithm 3: match each network with the mean of the others until no permutation changes.

    In every pass the networks come in another random order; each match starts from where the
    network is and moves it only if its inner product with the mean of the others rises by more than
    ``rtol`` of its bound. So the objective rises with every change, and the loop ends. Where
    depends on which network and which layer came first. ``c2m3`` goes on by Frank-Wolfe steps from
    half-way between there and no order at all, then by passes, and keeps what is higher: it costs a
    few times as much, and never ends lower.

    Arguments:
        thetas: at least two state dicts of one architecture; they are not changed.
        key: of the orders.
        max_passes: over all networks, at most.
        method: ``passes`` or ``c2m3``.
        start: of ``c2m3``: what ``passes`` found of these networks. None: it is sought first.

    Returns:
        one set of permutations for each network, and the mean.

    Raises:
        BadParameter: fewer than two networks, or one does not fit the spec or the first network,
            holds NaN or infinite values, or stores what its weights are computed from; ``c2m3`` of
            networks with units inside of others (attention heads, GroupNorm).
    """
    clock = time.perf_counter()
    one_of("method", method, ("passes", "c2m3"))
    count = len(thetas)
    if count < 2:
        raise BadParameter(f"merging takes at least two networks, got {count}.")
    if max_passes < 1:
        raise BadParameter(f"max_passes must be at least 1, got {max_passes}.")
    if start is not None and (method != "c2m3" or start.networks != count):
        raise BadParameter(f"start: of c2m3, and of as many networks; got {start.networks}.")
    if stored := computed_from(thetas[0]):
        raise BadParameter(
            f"merging takes the mean of weights, but {', '.join(stored[:3])} are what weights are "
            "computed from: the mean of these is another network. Store the networks without "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)."
        )
    if method == "c2m3":
        check_plain(spec)
    for i, theta in enumerate(thetas):
        _same(thetas[0], theta, i + 1)
        checked_norms(spec, theta, str(i + 1))
    how: Any = {"max_passes": max_passes, "rtol": rtol}
    if start is None:
        perms, history = _passes(spec, thetas, [spec.identity() for _ in thetas], key, how)
    else:
        perms, history = list(start.perms), list(start.history)
    if method == "c2m3":
        further = frank_wolfe(spec, thetas, perms)
        again, more = _passes(spec, thetas, further, key.fold("c2m3"), how)
        if more[-1] > history[-1]:
            perms, history = again, history + [x for x in more if x > history[-1]]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    return Merged(
        spec,
        tuple(perms),
        _mean(spec, thetas, perms),
        history[-1],
        history[0],
        tuple(history),
        sum(bound(thetas[i], thetas[j], spec) for i, j in pairs),
        len(history) - 1,
        time.perf_counter() - clock,
        method,
    )


def _passes(
    spec: Spec, thetas: Sequence[Theta], start: Sequence[Permutations], key: Key, how: Any
) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Algorithm 3 from ``start``: permutations, and the objective before and after each pass."""
    count = len(thetas)
    perms = [dict(p) for p in start]
    total = _total(spec, thetas, perms)
    squares = sum(_square(theta[t] for t in spec.objective) for theta in thetas)
    history = [(_square(total.values()) - squares) / 2]
    waiting = set(range(count))
    while waiting and len(history) <= how["max_passes"]:
        passes = len(history) - 1
        for i in key.fold("pass", passes).permutation(count).tolist():
            if i not in waiting:
                continue
            waiting.discard(i)
            now = {t: spec.permute_tensor(thetas[i][t], t, perms[i]) for t in spec.objective}
            others = {t: (x - now[t].to(x.device).double()) / (count - 1) for t, x in total.items()}
            own = key.fold("match", passes, i)
            found = weight_matching(spec, others, thetas[i], key=own, start=perms[i], **how)
            if all(torch.equal(p, perms[i][g]) for g, p in found.perms.items()):
                continue
            perms[i] = dict(found.perms)
            for t, x in total.items():
                x += spec.permute_tensor(thetas[i][t], t, perms[i]).to(x.device).double()
                x -= now[t].to(x.device).double()
            waiting = set(range(count)) - {i}  # the mean of their others has changed
        total = _total(spec, thetas, perms)  # anew, so that rounding does not add up over passes
        history.append((_square(total.values()) - squares) / 2)
    return perms, history


def _same(first: Theta, theta: Theta, number: int) -> None:
    """Refuse a network with other entries or shapes than the first."""
    missing, extra = [t for t in first if t not in theta], [t for t in theta if t not in first]
    if missing or extra:
        raise BadParameter(
            f"network {number} differs from network 1: missing {missing[:5] or 'none'}, not in "
            f"network 1 {extra[:5] or 'none'}. All must be the same architecture."
        )
    for t, x in theta.items():
        if x.shape != first[t].shape:
            raise BadParameter(
                f"network {number}: {t} has shape {tuple(x.shape)}, in network 1 "
                f"{tuple(first[t].shape)}."
            )


def _total(
    spec: Spec, thetas: Sequence[Theta], perms: Sequence[Permutations]
) -> dict[str, torch.Tensor]:
    """The sum of all networks in the common frame, over the objective's entries, in float64."""
    out = {t: torch.zeros_like(thetas[0][t], dtype=torch.float64) for t in spec.objective}
    for t, total in out.items():
        for theta, own in zip(thetas, perms, strict=True):
            total += spec.permute_tensor(theta[t].detach(), t, own).to(total.device)
    return out


def _square(values: Iterable[torch.Tensor]) -> float:
    norms = (float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64)) for x in values)
    return sum(x**2 for x in norms)


def _mean(
    spec: Spec, thetas: Sequence[Theta], perms: Sequence[Permutations]
) -> dict[str, torch.Tensor]:
    """Floating-point entries averaged in the common frame, one entry at a time."""
    out = {}
    weights = [1 / len(thetas)] * len(thetas)
    for name, like in thetas[0].items():
        moved: list[Theta] = [
            {name: spec.permute_tensor(t[name].detach(), name, own).to(like.device)}
            for t, own in zip(thetas, perms, strict=True)
        ]
        if is_continuous(like):
            out[name] = affine(moved, weights, (name,))[name]
        else:
            out[name] = moved[0][name].clone()
    return out
