"""The LLFC cosine: A, B and the networks between them in one pass, and how their features compare.

For each batch the features of A and B are held, and those of an interpolated network are compared
with them as they appear and dropped. What is kept is three inner products a sample for the pair and
three for each alpha, in float64: every cosine and coefficient follows from those, since the
interpolated feature is a combination of F_A and F_B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import nn

from companion.connectivity import BN_EXAMPLES, Score, Walker, classification, has_batchnorm
from companion.connectivity.batches import fitting
from companion.core import deadline
from companion.core.codec import OMIT_DEFAULT
from companion.core.errors import BadParameter, one_of, whole
from companion.core.numerics import exact_evaluation
from companion.core.theta import Theta, affine
from companion.data import Split
from companion.features.taps import (
    Examples,
    Layered,
    Site,
    Taps,
    checked,
    examples_of,
    rates,
    scored,
    sites,
)

MODES = ("interpolate", "reestimate")
"""What BatchNorm does, at the ends too: use the running statistics, interpolated like weights; or
statistics estimated again at that point (:data:`companion.connectivity.BN_MODES`). Statistics of
evaluation batches are no option: a feature would depend on its neighbours."""

PER = ("sample", "position")
LOW, HIGH = 0.05, 0.95

_CHUNK = {"cpu": 1 << 17}
"""Numbers of each network that are in float64 at a time: little, so that they stay in the cache."""
_ROOM = 1 << 27
"""Bytes that the features of A and B may take on a CPU."""

_PAIR = ((0, 0), (0, 1), (1, 1))
_BETWEEN = ((2, 2), (2, 0), (2, 1))


@dataclass(frozen=True)
class Stat:
    """One quantity over samples.

    Arguments:
        mean, std: std is the population's, over samples.
        n: samples that count.
        median, low, high: low and high are the 5 % and 95 % quantiles.
        undefined: samples that do not count: a feature is zero, or not finite, and has no angle.
            With ``n = 0`` all numbers are NaN.
    """

    mean: float
    std: float
    n: int
    median: float
    low: float
    high: float
    undefined: int = 0

    @classmethod
    def of(cls, values: torch.Tensor) -> Stat:
        """Of one number a sample, NaN where it is undefined."""
        flat = values.detach().double().flatten()
        good = flat[torch.isfinite(flat)]
        undefined = flat.numel() - good.numel()
        if not good.numel():
            return cls(math.nan, math.nan, 0, math.nan, math.nan, math.nan, undefined)
        ordered = good.sort().values
        low, median, high = (_quantile(ordered, q) for q in (LOW, 0.5, HIGH))
        mean, std = float(good.mean()), float(good.std(correction=0))
        return cls(mean, std, good.numel(), median, low, high, undefined)


def _quantile(ordered: torch.Tensor, q: float) -> float:
    """Linear between neighbours (torch.quantile refuses more than 16 million values)."""
    at = q * (len(ordered) - 1)
    i = int(at)
    j = min(i + 1, len(ordered) - 1)
    below, above = float(ordered[i]), float(ordered[j])
    return below + (at - i) * (above - below)


@dataclass(frozen=True)
class LayerFeatures:
    """How linearly the features of one site are connected.

    F_alpha is the feature of the network ``(1 - alpha) A + alpha B``, and F_int the interpolated
    feature ``(1 - alpha) F_A + alpha F_B``, both flattened to one vector a sample.

    Arguments:
        name, kind: of the site.
        size: numbers in one sample's feature.
        baseline: 1 - cos(F_A, F_B).
        gap: alpha -> 1 - cos(F_alpha, F_int), cosine with its sign: from 0 to 2.
        c: alpha -> ``<F_alpha, F_int> / |F_alpha|^2``, the c of Definition 2.
        twin: alpha -> ``<F_alpha, F_int> / |F_int|^2``, what the released code calls the
            coefficient; c times twin is cos^2, sample by sample.

    Source: Zhou et al. 2023, Definition 2, Figures 2 to 4 and Appendix B.2; our chapter 3.
    """

    name: str
    kind: str
    size: int
    baseline: Stat
    gap: Mapping[float, Stat]
    c: Mapping[float, Stat]
    twin: Mapping[float, Stat]

    def ratio(self, alpha: float = 0.5) -> float:
        """Mean gap over mean baseline; NaN where A and B have parallel features."""
        base = self.baseline.mean
        return self.gap[alpha].mean / base if base > 0 else math.nan


@dataclass(frozen=True)
class Features(Layered[LayerFeatures]):
    """The features of two networks and of those between them, layer by layer.

    Arguments:
        layers: in the order they compute.
        alphas: 0 = A, 1 = B (the paper writes it the other way
            round; it matters to nobody who uses a symmetric set).
        n: samples (or positions) behind each layer.
        per: ``sample`` or ``position``.
        bn: the BatchNorm mode of every network here, the ends included; ``none`` without any.
        predictions: behind each error.
        errors, losses: ``a``, ``b`` -> percent, nats.
        path, path_loss: alpha -> of the network with interpolated weights.
        mixture, mixture_loss: alpha -> of the mixed logits ``(1 - alpha) f(A) + alpha f(B)``.
        bn_examples: in mode ``reestimate``, the inputs whose statistics each network has.
    """

    layers: tuple[LayerFeatures, ...]
    alphas: tuple[float, ...]
    n: int
    per: str
    bn: str
    predictions: int
    errors: Mapping[str, float]
    losses: Mapping[str, float]
    path: Mapping[float, float]
    path_loss: Mapping[float, float]
    mixture: Mapping[float, float]
    mixture_loss: Mapping[float, float]
    bn_examples: int | None = field(default=None, metadata=OMIT_DEFAULT)

    @property
    def bound(self) -> float:
        """Err_A + Err_B in percent, which Lemma 1 puts above the error of the path."""
        return self.errors["a"] + self.errors["b"]


def compared(products: torch.Tensor, alphas: Sequence[float]) -> tuple[torch.Tensor, ...]:
    """What inner products (3 + 3 alphas, samples) say of each sample; NaN where it is undefined.

    Rows: <A,A>, <A,B>, <B,B>; then for each alpha <F,F>, <F,A>, <F,B> of that network's F. Returns
    the baseline (samples,), and gap, c and twin (alphas, samples), see :class:`LayerFeatures`.
    """

    def where(good: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.where(good, values, torch.nan)

    (aa, ab, bb), between = products[:3], products[3:].unflatten(0, (-1, 3))
    rows = []
    for alpha, (ff, fa, fb) in zip(alphas, between, strict=True):
        # lerp is exact where its ends are equal, so A = B gives 0 and not rounding errors.
        fi = torch.lerp(fa, fb, alpha)
        ii = torch.lerp(torch.lerp(aa, ab, alpha), torch.lerp(ab, bb, alpha), alpha)
        good = (ff > 0) & (ii > 0)
        gap = where(good, 1 - fi / (ff * ii).sqrt()).clamp(0, 2)
        rows.append((gap, where(good, fi / ff), where(good, fi / ii)))
    baseline = where((aa > 0) & (bb > 0), 1 - ab / (aa * bb).sqrt()).clamp(0, 2)
    return baseline, *(torch.stack(values) for values in zip(*rows, strict=True))


class Products:
    """Inner products of rows in float64, through buffers that are reused.

    No float64 copy of a whole feature map is made: it would take longer to write than to use.
    """

    def __init__(self, device: torch.device):
        self._size = _CHUNK.get(device.type, 1 << 24)
        self._buffers = torch.empty(3, self._size, dtype=torch.float64, device=device)
        self._product = torch.empty(self._size, dtype=torch.float64, device=device)

    def add(
        self, out: torch.Tensor, tensors: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Write ``sum(tensors[i] * tensors[j])`` of each row into ``out`` (pairs, rows).

        ``tensors``: up to three of shape (rows, …), equal shapes; ``pairs``: the (i, j).
        """
        rows = len(tensors[0])
        size = tensors[0][:1].numel()
        step, width = max(1, self._size // size), min(size, self._size)
        for start in range(0, rows, step):
            parts = [t[start : start + step].flatten(1) for t in tensors]
            count = len(parts[0])
            total = out[:, start : start + count]
            for column in range(0, size, width):
                used = count * min(width, size - column)
                wide = [
                    b[:used].view(count, -1).copy_(p[:, column : column + width])
                    for b, p in zip(self._buffers, parts, strict=False)
                ]
                product = self._product[: wide[0].numel()].view_as(wide[0])
                for row, (i, j) in zip(total, pairs, strict=True):
                    found = torch.mul(wide[i], wide[j], out=product).sum(1)
                    row.copy_(found if column == 0 else row + found)


class _Between(Walker):
    """The walker, as the maker of networks on the segment."""

    @exact_evaluation()
    @torch.no_grad()
    def network(self, a: Theta, b: Theta, alpha: float) -> Theta:
        """``(1 - alpha) A + alpha B`` with its BatchNorm statistics settled; at the ends A or B."""
        theta = dict(b if alpha == 1 else a)
        if 0 < alpha < 1:
            theta.update(affine((a, b), (1 - alpha, alpha), self.layout.floating))
        if self.bn == "reestimate":
            self.load(theta)
            self._reestimate()
            theta.update({n: self._entries[n].clone() for n in self.layout.buffers})
        return theta


def _check_positions(x: torch.Tensor, at: Sequence[Site]) -> None:
    """Refuse ``per="position"`` where there are no positions. ``x``: the inputs."""
    if x.ndim != 2 or x.is_floating_point():
        raise BadParameter(
            "per: 'position' is for token networks, with integer inputs (N, L); these have shape "
            f"{tuple(x.shape)} and type {str(x.dtype).removeprefix('torch.')}. Use 'sample'."
        )
    for site in at:
        if len(site.shape) < 2 or site.shape[0] != x.shape[1]:
            raise BadParameter(
                f"per: 'position' needs features (N, {x.shape[1]}, …), but {site.name} puts out "
                f"(N, {', '.join(map(str, site.shape))}). Name other layers, or use 'sample'."
            )


def _batch(batch: int | None, walker: Walker, at: Sequence[Site]) -> int:
    """Inputs a forward pass: as many as the walker takes, if the features of A and B have room."""
    if (chosen := whole("batch", batch, 1, "None")) is not None:
        return chosen
    if walker.apart is not None:
        return walker.batch  # BatchNorm takes statistics of it
    item = max((p.element_size() for p in walker.module.parameters()), default=4)
    each = 2 * item * sum(math.prod(s.shape) for s in at if not s.same)
    return fitting(walker.batch, each, walker.device, _ROOM)


def features(
    module: nn.Module,
    a: Theta,
    b: Theta,
    split: Examples,
    *,
    layers: Sequence[str] | None = None,
    alphas: Sequence[float] = (0.25, 0.5, 0.75),
    bn: str = "interpolate",
    bn_data: Examples | None = None,
    bn_examples: int | None = BN_EXAMPLES,
    batch: int | None = None,
    per: str = "sample",
    score: Score = classification,
) -> Features:
    """Compare the features of A, B and the networks ``(1 - alpha) A + alpha B``, at every layer.

    Arguments:
        module: the architecture; copied, never changed.
        a, b: state dicts of it.
        split: inputs (N, …) and targets (N,), on the device to compute on; for token networks
            integer inputs (N, L) and targets (N, L).
        layers: see :func:`companion.features.sites`.
        alphas: from 0 (A) to 1 (B). The paper writes alpha A + (1 - alpha) B.
        bn: one of :data:`MODES`, for all networks; ignored without BatchNorm.
        bn_data: inputs that ``reestimate`` averages over: training data, not augmented.
        bn_examples: how many of them; None: all.
        batch: inputs a forward pass (default: what suits the network and its feature maps).
        per: ``sample``: one vector an input, flattened; ``position``: for token networks, one
            vector a token.
        score: how outputs (rows, classes) and targets (rows,) become loss and errors.

    Raises:
        BadParameter: see the arguments; or a state dict that does not fit.

    Source: Zhou et al. 2023, Definition 2 and Figures 2 to 4; our chapter 3.
    """
    weights = rates(alphas)
    one_of("bn", bn, MODES)
    one_of("per", per, PER)
    split = examples_of(split)
    a, b = checked(module, {"A": a, "B": b}, split)
    if bn == "reestimate" and bn_data is None and has_batchnorm(module):
        raise BadParameter(
            "bn: re-estimating BatchNorm's statistics needs bn_data=, training data that is not "
            "augmented; or use bn='interpolate'."
        )
    data = {"test": cast(Split, split)}
    average = cast(Split | None, bn_data)
    walker = _Between(module, data, bn=bn, bn_data=average, bn_examples=bn_examples, score=score)
    at = sites(walker.module, split.x[:2], layers)
    if per == "position":
        _check_positions(split.x, at)
    size = _batch(batch, walker, at)
    kinds = {k: v.dtype for k, v in walker.module.state_dict().items()}
    own = walker.layout.floating + walker.layout.integers
    a, b = walker.enter(a, "A"), walker.enter(b, "B")
    a, b = ({k: t[k].to(walker.device, kinds[k]) for k in own} for t in (a, b))
    walker.check_line((a, b))
    networks = [walker.network(a, b, t) for t in (0.0, 1.0, *weights)]
    with Taps(walker.module, [s for s in at if not s.same]) as taps:
        tables, scores = _stream(taps, networks, split, size, weights, per, score)

    found: dict[str, LayerFeatures] = {}
    for site in at:
        if site.same:
            one = found[site.same]
            stats = (one.baseline, one.gap, one.c, one.twin)
        else:
            baseline, *rest = compared(tables[site.name], weights)
            gap, c, twin = (
                {t: Stat.of(v) for t, v in zip(weights, values, strict=True)} for values in rest
            )
            stats = (Stat.of(baseline), gap, c, twin)
        shape = site.shape[1:] if per == "position" else site.shape
        found[site.name] = LayerFeatures(site.name, site.kind, math.prod(shape), *stats)
    rows = scores.tolist()
    # A loss that overflowed is no number; as NaN, max() would quietly pass over it.
    losses = [math.inf if math.isnan(loss) else loss / count for loss, _, count in rows]
    errors = [100 * wrong / count for _, wrong, count in rows]
    path, mixture = slice(2, 2 + len(weights)), slice(2 + len(weights), None)
    return Features(
        layers=tuple(found.values()),
        alphas=weights,
        n=next(iter(tables.values())).shape[1],
        per=per,
        bn=walker.bn,
        bn_examples=walker.bn_examples,
        predictions=int(rows[0][2]),
        errors=dict(zip("ab", errors, strict=False)),
        losses=dict(zip("ab", losses, strict=False)),
        path=dict(zip(weights, errors[path], strict=True)),
        path_loss=dict(zip(weights, losses[path], strict=True)),
        mixture=dict(zip(weights, errors[mixture], strict=True)),
        mixture_loss=dict(zip(weights, losses[mixture], strict=True)),
    )


@torch.inference_mode()
def _stream(
    taps: Taps,
    networks: Sequence[Theta],
    split: Examples,
    size: int,
    alphas: tuple[float, ...],
    per: str,
    score: Score,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The pass: A, B and the networks between them on every batch.

    Returns site -> the inner products that :func:`compared` reads; and summed loss, errors and
    predictions (…, 3) of A, B, the networks between and the mixtures.
    """
    first, second, *between = networks
    device = split.x.device
    each = split.x.shape[1] if per == "position" else 1
    shape = (3 + 3 * len(alphas), len(split) * each)
    tables = {
        s.name: torch.full(shape, torch.nan, dtype=torch.float64, device=device) for s in taps.sites
    }
    scores = torch.zeros(2 + 2 * len(alphas), 3, dtype=torch.float64, device=device)
    products = Products(device)

    def vectors(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1) if per == "position" else x

    ends: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = {}
    bands: Mapping[str, torch.Tensor] = {}
    start = 0

    def compare(number: int, name: str, feature: torch.Tensor) -> None:
        rows = bands[name][3 * number : 3 * number + 3]
        products.add(rows, (*ends[name], vectors(feature)), _BETWEEN)

    parts = -(-len(split) // size)
    for x, y in zip(split.x.tensor_split(parts), split.y.tensor_split(parts), strict=True):
        deadline.stop_if_passed()
        (of_a, out_a), (of_b, out_b) = (taps.use(theta).run(x) for theta in (first, second))
        ends = {name: (vectors(of_a[name]), vectors(of_b[name])) for name in tables}
        bands = {name: t[:, start : start + len(x) * each] for name, t in tables.items()}
        start += len(x) * each
        for name, pair in ends.items():
            products.add(bands[name][:3], pair, _PAIR)
        outputs = [out_a, out_b]
        for number, theta in enumerate(between, start=1):
            outputs.append(taps.use(theta).run(x, partial(compare, number))[1])
        # In float64 a mixture of logits keeps their order: Lemma 1 holds on counts.
        outputs += [(1 - t) * out_a.double() + t * out_b.double() for t in alphas]
        for row, output in zip(scores, outputs, strict=True):
            loss, wrong, count = scored(score, output, y)
            row += torch.stack([torch.as_tensor(v).to(row) for v in (loss, wrong, count)])
    return tables, scores
