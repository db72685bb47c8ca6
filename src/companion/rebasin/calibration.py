"""Calibration as a control: how much of a barrier is a wrong temperature, and how sure is a model?

A network between two others is often right and too unsure of it, since its logits shrink; matching
and REPAIR then lower the loss although no decision changes. One number, the softmax temperature,
fitted on data that the caller chooses, takes that part away. Also here: calibration error and
reliability, the ensemble of logits, and a shifted label prior, which merged networks are to be
compared with.

Source: Guo et al. 2017 (temperature); Git Re-Basin, Figures 5, 11 and 13; our chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor, nn

from companion.connectivity import BN_EXAMPLES, Curve, Walker, classification, grid
from companion.connectivity.walk import Scored, sizes_of
from companion.core.errors import BadParameter
from companion.core.losses import is_label
from companion.core.theta import Theta
from companion.data import Split

RANGE = 1e4
"""A fitted temperature is between 1/RANGE and RANGE times the spread of the logits."""


def _pair(logits: Tensor, y: Tensor, what: str = "logits") -> Tensor:
    """``logits`` in float64, after the check that (N, K) and (N,) class indices fit together."""
    if logits.ndim != 2 or logits.shape[1] < 2 or len(logits) == 0:
        raise BadParameter(f"{what}: shape (N, K), K of 2 or more, expected; got {logits.shape}.")
    if y.shape != logits.shape[:1] or y.dtype != torch.int64:
        raise BadParameter(
            f"y: int64 ({len(logits)},) expected, one class for each row of {what}; "
            f"got {y.dtype} {tuple(y.shape)}."
        )
    if not bool(((y >= 0) & (y < logits.shape[1])).all()):
        raise BadParameter(
            f"y: classes 0 to {logits.shape[1] - 1} expected, the columns of {what}."
        )
    if not bool(torch.isfinite(logits).all()):
        raise BadParameter(f"{what}: they hold NaN or infinite values.")
    return logits.detach().double()


def nll(logits: Tensor, y: Tensor, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of ``softmax(logits / temperature)``, in nats, in float64."""
    return float(F.cross_entropy(logits.double() / temperature, y))


def temperature(logits: Tensor, y: Tensor) -> float:
    """The temperature T > 0 at which ``softmax(logits / T)`` has the lowest loss on ``y``.

    The loss is convex in 1/T, and its derivative there is the mean over examples of the expected
    minus the true logit; T is the root of that. Where there is none, because every example is right
    (T towards 0) or the logits say nothing (T towards infinity), the end of the range is returned,
    :data:`RANGE` times below or above the logits' own spread.

    Arguments:
        logits: (N, K), any float type.
        y: (N,) int64 classes.

    Raises:
        BadParameter: shapes that do not fit, classes out of range, logits that are not finite.

    Source: Guo et al. 2017, Section 4.2; our chapter 2.
    """
    z = _pair(logits, y)
    z = z - z.mean(1, keepdim=True)
    spread = float(z.square().mean().sqrt())
    if spread == 0:
        return 1.0
    true = z.gather(1, y[:, None]).mean()

    def slope(log_t: float) -> float:
        """Of the loss, against 1/T."""
        return float((torch.softmax(z * math.exp(-log_t), 1) * z).sum(1).mean() - true)

    # 1 is always in the range, so that fitting never does worse than not fitting.
    low = min(0.0, math.log(spread / RANGE))
    high = max(0.0, math.log(spread * RANGE))
    if slope(low) <= 0:  # the loss still falls where the softmax is sharpest
        return math.exp(low)
    if slope(high) >= 0:
        return math.exp(high)
    return math.exp(float(brentq(slope, low, high, xtol=1e-12)))


@dataclass(frozen=True)
class CalibratedCurve:
    """The line between two networks, with a temperature fitted at each point.

    Arguments:
        curve: loss at the fitted temperatures, and error; its height is the barrier that
            calibration leaves.
        plain: the same points at temperature 1; its errors are those of ``curve``.
        temperatures: one for each alpha. NaN where the logits are not finite: the loss there is
            infinite, as on any curve.
    """

    curve: Curve
    plain: Curve
    temperatures: tuple[float, ...]


class _Collector:
    """A score for the walker that keeps the logits of one point of the path."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def __call__(self, outputs: Tensor, targets: Tensor) -> Scored:
        if outputs.ndim < 2 or outputs.shape[:-1] != targets.shape:
            raise BadParameter(
                "calibration needs logits (N, K), or of a text (N, L, K); the network puts out "
                f"{tuple(outputs.shape)}."
            )
        self.rows.append(outputs.flatten(0, -2))
        return classification(outputs, targets)

    def take(self, splits: Mapping[str, Split]) -> dict[str, Tensor]:
        """The logits of what each split has labels of, float64; they came in its order."""
        whole = torch.cat(self.rows).double()
        self.rows.clear()
        parts = whole.split([s.y.numel() for s in splits.values()])
        labelled = (is_label(s.y).flatten() for s in splits.values())
        return {n: z[where] for n, z, where in zip(splits, parts, labelled, strict=True)}


def calibrated_curve(
    module: nn.Module,
    a: Theta,
    b: Theta,
    fit: Split,
    evaluate: Mapping[str, Split],
    *,
    points: int = 31,
    bn: str = "interpolate",
    bn_data: Split | None = None,
    bn_examples: int | None = BN_EXAMPLES,
    temperature_at: float | None = None,
) -> CalibratedCurve:
    """Loss and error from network A to network B, the temperature fitted anew at each point.

    Of a text, every position is a prediction. All logits of a point are held in float64 at a time
    (tokens × vocabulary × 8 bytes): give parts of a text, such as ``split.head(100)``.

    Arguments:
        module: the architecture.
        a, b: state dicts of it, B permuted or not.
        fit: what the temperature is fitted on: a held-out part, or the training data.
        evaluate: name -> where to measure, e.g. ``{"test": …}``; may hold ``fit`` itself too.
        points, bn: as :func:`companion.connectivity.segment`.
        bn_data: what mode ``reestimate`` averages over (default: a split called ``train``, or
            ``fit``); bn_examples: how many inputs of it (None: all).
        temperature_at: use this temperature everywhere instead of fitting one.

    Returns:
        a :class:`CalibratedCurve`.

    Raises:
        BadParameter: networks that do not fit the module, empty splits, outputs that are no logits.

    Source: a control of ours; temperature from Guo et al. 2017; our chapter 2.
    """
    if temperature_at is not None and not (0 < temperature_at < math.inf):
        raise BadParameter(f"temperature_at: {temperature_at!r} must be above 0 and finite.")
    steps = grid(points)
    splits = dict(evaluate)
    where = next((name for name, split in splits.items() if split is fit), "")
    if not where:
        where = "fit" if "fit" not in splits else "fit " + " ".join(splits)
        splits[where] = fit
    logits = _Collector()
    average = bn_data if bn_data is not None else splits.get("train", fit)
    walker = Walker(module, splits, bn=bn, bn_data=average, bn_examples=bn_examples, score=logits)
    labels = {name: split.y[is_label(split.y)] for name, split in splits.items()}
    losses, found = [], []

    def fit_here() -> None:
        z = logits.take(splits)
        fine = all(bool(torch.isfinite(v).all()) for v in z.values())
        t = temperature_at or (temperature(z[where], labels[where]) if fine else math.nan)
        found.append(t)
        losses.append({n: nll(z[n], labels[n], t) if fine else math.inf for n in evaluate})

    measured = walker.walk((a, b), steps, each=fit_here)

    def curve(loss: Mapping[str, tuple[float, ...]]) -> Curve:
        errors = {n: tuple(m[n].error for m in measured) for n in evaluate}
        values = {n: {"loss": loss[n], "error": errors[n]} for n in evaluate}
        sizes = sizes_of(evaluate)
        alphas = tuple(alpha for _, alpha in steps)
        return Curve(alphas, values, walker.bn, sizes, walker.bn_examples)

    return CalibratedCurve(
        curve({n: tuple(v[n] for v in losses) for n in evaluate}),
        curve({n: tuple(m[n].loss for m in measured) for n in evaluate}),
        tuple(found),
    )


def _checked(p: Tensor, y: Tensor, bins: int) -> Tensor:
    p = _pair(p, y, "probabilities")
    off = float((p.sum(1) - 1).abs().max())
    if float(p.min()) < 0 or off > 1e-3:
        raise BadParameter(
            "probabilities: each row must be 0 or more and sum to 1; these look like logits "
            "(use .softmax(1)) or counts."
        )
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise BadParameter(f"bins: {bins!r} must be a whole number of 1 or more.")
    return p


def _bin_sums(p: Tensor, bins: int, values: Tensor) -> Tensor:
    """Sums of ``values`` over the bins of ``p``: (0, 1/bins], …; 0 itself is in the first."""
    edges = torch.arange(1, bins, dtype=torch.float64, device=p.device) / bins
    zero = torch.zeros(bins, dtype=torch.float64, device=p.device)
    return zero.index_add_(0, torch.bucketize(p.contiguous(), edges), values)


def ece(probabilities: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error of the top label: mean |accuracy - confidence| over bins.

    Arguments:
        probabilities: (N, K), rows that sum to 1.
        y: (N,) int64 classes.
        bins: of equal width over [0, 1]; each counts by its share of the examples.

    Returns:
        from 0 to 1.

    Source: Guo et al. 2017, equation 3; our chapter 2.
    """
    p = _checked(probabilities, y, bins)
    top, label = p.max(1)
    gap = (label == y).double() - top
    return float(_bin_sums(top, bins, gap).abs().sum()) / len(p)


@dataclass(frozen=True)
class Reliability:
    """How often a stated probability comes true.

    Arguments:
        centres: middle of each bin.
        confidence: mean probability stated in it.
        fraction: share of its (example, class) pairs that are true. NaN, as the confidence, in an
            empty bin.
        counts: number of its pairs.
    """

    centres: tuple[float, ...]
    confidence: tuple[float, ...]
    fraction: tuple[float, ...]
    counts: tuple[int, ...]


def reliability(probabilities: Tensor, y: Tensor, bins: int = 15) -> Reliability:
    """The reliability curve over all class probabilities, not over the top label alone.

    Every (example, class) pair is one statement. The paper's code counts a probability that lies on
    the edge of two bins in both; here it is in the lower one.

    Arguments:
        probabilities: (N, K), rows that sum to 1.
        y: (N,) int64 classes.
        bins: of equal width over [0, 1]; the paper's are 15 (Figure 11) and 10 (Figure 13).

    Source: Git Re-Basin, Figures 5, 11 and 13; our chapter 2.
    """
    p = _checked(probabilities, y, bins)
    true = F.one_hot(y, p.shape[1]).double().flatten()
    stated = p.flatten()
    ones = torch.ones_like(stated)
    counts, confidence, hits = (_bin_sums(stated, bins, v) for v in (ones, stated, true))
    return Reliability(
        tuple((i + 0.5) / bins for i in range(bins)),
        tuple((confidence / counts).tolist()),
        tuple((hits / counts).tolist()),
        tuple(int(c) for c in counts.tolist()),
    )


def prior_shift(logits: Tensor, train_prior: Tensor, test_prior: Tensor) -> Tensor:
    """Logits of a model trained under one label prior, corrected for another by Bayes' rule.

    log p(class | x) changes by log(test prior / train prior), up to a constant. The control that
    merging networks of differently biased data has to beat: one such network, re-biased.

    Arguments:
        logits: (N, K).
        train_prior, test_prior: (K,) probabilities or counts of the classes.

    Returns:
        (N, K), of the logits' type; rows are shifted, not normalised.

    Raises:
        BadParameter: shapes that do not fit; a prior that is not above 0 for every class.

    Source: Bayes' rule; the comparison is from REPAIR's replication of Git Re-Basin's Figure 5; our
    chapter 2.
    """
    shift = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
    for name, prior, sign in (("train_prior", train_prior, -1), ("test_prior", test_prior, 1)):
        if prior.shape != shift.shape or not bool((prior > 0).all() and prior.isfinite().all()):
            raise BadParameter(
                f"{name}: ({len(shift)},) numbers above 0 expected, one for each class."
            )
        p = prior.to(shift)
        shift += sign * (p / p.sum()).log()
    return (logits.double() + shift).to(logits.dtype)


def ensemble_logprobs(logits: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The ensemble of models as the paper has it: a weighted mean of their log-probabilities.

    Arguments:
        logits: one (N, K) for each model.
        weights: that sum to 1 (default: equal).

    Returns:
        (N, K) float64 log-probabilities, normalised again: the logarithm of the models' geometric
        mean.

    Raises:
        BadParameter: no model, shapes that differ, weights that do not sum to 1.

    Source: Git Re-Basin, Figure 5 and its code (logit ensembling); our chapter 2.
    """
    if not logits or any(z.shape != logits[0].shape or z.ndim != 2 for z in logits):
        raise BadParameter("ensemble: a list of logits (N, K) of one shape is needed.")
    shares = [1 / len(logits)] * len(logits) if weights is None else list(weights)
    if len(shares) != len(logits) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise BadParameter(
            f"weights: {len(logits)} numbers that sum to 1 are needed, one for each model; "
            f"got {shares}."
        )
    mixed = torch.stack(
        [w * z.double().log_softmax(1) for w, z in zip(shares, logits, strict=True)]
    )
    return mixed.sum(0).log_softmax(1)
