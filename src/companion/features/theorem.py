"""Networks built so that the theorem behind LLFC applies to them exactly, and controls that miss.

Theorem 1 of Zhou et al.: if the ReLUs are weakly additive on what two networks feed them and every
layer commutes with the networks' features, then all features are linearly connected, with c = 1.
Trained networks meet both conditions roughly. Here are two that meet them to the last bit ::

    built = exact((20, 64, 48, 10))             # networks A and B, and the data they agree on
    found = theorem1(built)                     # distances, 1 - cos and c - 1 of every layer
    exact((20, 64, 48, 10), commuting=False)    # the same with one condition broken

How: some units of every hidden layer *move* (differ between A and B). With ``S`` the span of
``h_A(x) - h_B(x)`` over the data, rows of ``W_A - W_B`` are orthogonal to ``S``, so that
``(W_A - W_B)(H_A - H_B) = 0``; the biases' difference is free, since a bias is the weight of a
feature that is one in both. What a unit sees of ``S`` is scaled down until A and B agree, on all
the data, on when it is on. They remain far apart: moving units are scaled by a half to two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import Theta, affine
from companion.models.images import mlp

_HALVINGS = 40
"""How often a step is halved before it is given up; then it is 0."""


@dataclass(frozen=True, eq=False)
class Built:
    """Two networks and the data on which they meet the conditions, all float64.

    Arguments:
        module: the architecture, :func:`companion.models.images.mlp`.
        a, b: state dicts of it.
        x: the data, shape (N, inputs).
    """

    module: nn.Module
    a: Theta
    b: Theta
    x: Tensor


@dataclass(frozen=True)
class LayerCheck:
    """One layer of two built networks. The largest value over samples and alphas, unless said.

    Arguments:
        name: of the linear layer.
        additivity: Dist_sigma of the ReLU after it; None for the last layer, which has none.
        commutativity: Dist_com over the whole set. The first layer's is 0 for any two networks.
        weights, inputs: Dist_W and Dist_H, of the layer's weights and of its inputs; NaN where
            one of the two is all zeros.
        gap: ``|1 - cos|`` of feature of the mixture and mixture of features, before and after ReLU.
        c: ``|c - 1|``, likewise.
        baseline: mean ``1 - cos`` of A's and B's features, after the ReLU if there is one. Where it
            is 0, the rest says nothing.
    """

    name: str
    additivity: float | None
    commutativity: float
    weights: float
    inputs: float
    gap: float
    c: float
    baseline: float


@dataclass(frozen=True)
class Theorem:
    """What :func:`theorem1` found.

    Arguments:
        layers: in order of execution.
        alphas: where the mixtures were.
        samples: rows of the data.
        undefined: pairs (sample, layer) left out of ``gap`` and ``c``,
            since one of their features is all zeros.
    """

    layers: tuple[LayerCheck, ...]
    alphas: tuple[float, ...]
    samples: int
    undefined: int

    @property
    def conditions(self) -> float:
        """The largest of Dist_sigma and Dist_com over all layers."""
        return max(max(r.additivity or 0.0, r.commutativity) for r in self.layers)

    @property
    def gap(self) -> float:
        """The largest ``|1 - cos|``."""
        return max(r.gap for r in self.layers)

    @property
    def c(self) -> float:
        """The largest ``|c - 1|``."""
        return max(r.c for r in self.layers)


def exact(
    widths: Sequence[int],
    x: Tensor | None = None,
    *,
    samples: int = 256,
    moving: float = 0.5,
    additive: bool = True,
    commuting: bool = True,
    key: Key | None = None,
) -> Built:
    """Two fully connected ReLU networks that meet the conditions of Theorem 1 on given data.

    Arguments:
        widths: inputs, units of each hidden layer (two or more each), outputs.
        x: data, shape (N, inputs). Default: ``samples`` standard normal vectors.
        moving: share of each hidden layer's units that differ between the networks, in (0, 1); at
            least one unit moves, and at least one does not.
        additive: False: units take no care to be on together, weak additivity fails.
        commuting: False: ``W_A - W_B`` is drawn freely, commutativity fails after the first layer.
        key: of the randomness.

    Raises:
        BadParameter: widths or data that make no such network.

    Source: Zhou et al. 2023, Definitions 3 and 4 and Theorem 1; the construction is ours. Our
    chapter 3.
    """
    widths = _checked(widths, x, moving)
    key = key or Key("theorem")
    draw = key.generator()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    data = normal(samples, widths[0]) if x is None else x.detach().cpu().double()
    at_a = at_b = data
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for number, units in enumerate(widths[1:], start=1):
        size = at_a.shape[1]
        inside = _span(at_a - at_b)
        rows = [normal(units, size) / size**0.5 for _ in range(3)]
        along, across = rows[0] @ inside @ inside.T, rows[1] - rows[1] @ inside @ inside.T
        change = rows[2] - rows[2] @ inside @ inside.T if commuting else rows[2]
        shift = normal(units)
        if number == len(widths) - 1:  # no ReLU follows, so nothing has to agree
            w_a, w_b = along + across, along + across + change
            b_a, b_b = normal(units), shift
            name = "head"
        else:
            b_a = -_gap(across @ at_a.T)
            moves = key.fold("moves", number).permutation(units) < min(
                max(round(moving * units), 1), units - 1
            )
            scale = torch.where(moves, torch.exp2(2 * torch.rand(units, generator=draw) - 1), 1.0)
            scale = scale.double()
            step = moves.double()
            for attempt in range(_HALVINGS + 1):
                w_a = across + step[:, None] * along
                w_b = scale[:, None] * across + step[:, None] * (along + change)
                b_b = scale * b_a + step * shift
                together = (at_a @ w_a.T + b_a) * (at_b @ w_b.T + b_b) >= 0
                apart = ~together.all(0)
                if not additive or not bool(apart.any()):
                    break
                step = torch.where(apart, step / 2 if attempt < _HALVINGS - 1 else 0.0, step)
            at_a, at_b = F.relu(at_a @ w_a.T + b_a), F.relu(at_b @ w_b.T + b_b)
            name = f"layer{number}.linear"
        for theta, weight, bias in ((a, w_a, b_a), (b, w_b, b_b)):
            theta[f"{name}.weight"], theta[f"{name}.bias"] = weight.clone(), bias.clone()
    module = mlp((widths[0], 1, 1), widths[-1], widths=tuple(widths[1:-1])).double()
    return Built(module.requires_grad_(False).eval(), a, b, data)


def theorem1(built: Built, alphas: Sequence[float] = (0.25, 0.5, 0.75)) -> Theorem:
    """Measure both conditions, and what follows from them, in every layer of two built networks.

    Plain float64 algebra on stored features, apart from the instruments of this package, so that
    these can be tried on networks whose answer is known.

    Arguments:
        alphas: of the mixtures ``(1 - alpha) A + alpha B``.

    Raises:
        BadParameter: no alpha.

    Source: Zhou et al. 2023, Theorem 1 (claim A08): induction over layers from ``W_m H_m =
    (1 - alpha) W_A H_A + alpha W_B H_B - alpha (1 - alpha) (W_A - W_B)(H_A - H_B)``, where ``W_m``
    and ``H_m`` are the mixtures. Our chapter 3.
    """
    alphas = tuple(float(v) for v in alphas)
    if not alphas:
        raise BadParameter("alphas: there is none.")
    names = [n.removesuffix(".weight") for n in built.a if n.endswith(".weight")]
    mixtures = [affine((built.a, built.b), (1 - v, v), tuple(built.a)) for v in alphas]
    at_a = at_b = built.x
    at_mix = [built.x for _ in alphas]
    out, undefined = [], 0
    for name in names:
        w_a, w_b = built.a[f"{name}.weight"], built.b[f"{name}.weight"]
        own = at_a @ w_a.T + at_b @ w_b.T
        crossed = at_b @ w_a.T + at_a @ w_b.T
        commutativity = float(_distance(own.flatten(), crossed.flatten()))
        dist_w = float(_distance(w_a.flatten(), w_b.flatten()))
        dist_h = float(_distance(at_a.flatten(), at_b.flatten()))
        at_a, at_b = _linear(at_a, built.a, name), _linear(at_b, built.b, name)
        at_mix = [_linear(h, m, name) for h, m in zip(at_mix, mixtures, strict=True)]
        looks = [(at_a, at_b, at_mix)]
        additivity = None
        if name != names[-1]:
            additivity = 0.0
            for v in alphas:
                whole = F.relu((1 - v) * at_a + v * at_b)
                parts = (1 - v) * F.relu(at_a) + v * F.relu(at_b)
                # Where one side is all zeros and the other is not, they are infinitely far apart.
                apart = _distance(whole, parts).nan_to_num(nan=0.0)
                additivity = max(additivity, float(apart.max()))
            at_a, at_b, at_mix = F.relu(at_a), F.relu(at_b), [F.relu(h) for h in at_mix]
            looks.append((at_a, at_b, at_mix))
        gap = c = 0.0
        for one, other, mixed in looks:
            for v, found in zip(alphas, mixed, strict=True):
                wanted = (1 - v) * one + v * other
                dot = (found * wanted).sum(1)
                square, norm = found.square().sum(1), wanted.norm(dim=1)
                live = (square > 0) & (norm > 0)
                undefined += int((~live).sum())
                cosine = dot[live] / (square[live].sqrt() * norm[live])
                if bool(live.any()):
                    gap = max(gap, float((1 - cosine).abs().max()))
                    c = max(c, float((dot[live] / square[live] - 1).abs().max()))
        baseline = float((1 - F.cosine_similarity(at_a, at_b, dim=1)).mean())
        out.append(LayerCheck(name, additivity, commutativity, dist_w, dist_h, gap, c, baseline))
    return Theorem(tuple(out), alphas, len(built.x), undefined)


def _checked(widths: Sequence[int], x: Tensor | None, moving: float) -> tuple[int, ...]:
    widths = tuple(widths)
    if len(widths) < 3 or any(isinstance(w, bool) or not isinstance(w, int) for w in widths):
        raise BadParameter(
            f"widths: {widths} must be whole numbers: inputs, one hidden layer or more, outputs."
        )
    if min(widths[0], widths[-1]) < 1 or min(widths[1:-1]) < 2:
        raise BadParameter(f"widths: {widths}; hidden layers need 2 units or more, ends 1.")
    if not 0 < moving < 1:
        raise BadParameter(f"moving: {moving} must be above 0 and below 1.")
    if x is not None:
        if x.ndim != 2 or x.shape[1] != widths[0] or not len(x):
            raise BadParameter(
                f"x: shape {tuple(x.shape)}, but data for these widths are (N, {widths[0]})."
            )
        if not bool(torch.isfinite(x).all()):
            raise BadParameter("x: it holds NaN or infinite values.")
    return widths


def _span(rows: Tensor) -> Tensor:
    """Orthonormal columns that span the rows, shape (size, rank); rank 0 if all are 0."""
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    # Units that do not move differ by rounding alone, which is no direction.
    floor = 1e-12 * float(rows.abs().max().clamp(min=1.0)) * max(rows.shape) ** 0.5
    kept: Tensor = basis[sizes > floor].T
    return kept


def _gap(values: Tensor) -> Tensor:
    """For each row the middle of the widest gap between neighbours in its central half."""
    n = values.shape[1]
    ordered = values.sort(1).values[:, n // 4 : max(n - n // 4, n // 4 + 1)]
    if ordered.shape[1] < 2:
        return ordered[:, 0] - 1.0
    widest = ordered.diff(dim=1).argmax(1, keepdim=True)
    return ((ordered.gather(1, widest) + ordered.gather(1, widest + 1)) / 2)[:, 0]


def _distance(u: Tensor, v: Tensor) -> Tensor:
    """``|u - v|^2 / (|u| |v|)`` over the last axis; NaN where both are zeros."""
    found: Tensor = (u - v).square().sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))
    return found


def _linear(h: Tensor, theta: Theta, name: str) -> Tensor:
    return F.linear(h, theta[f"{name}.weight"], theta[f"{name}.bias"])
