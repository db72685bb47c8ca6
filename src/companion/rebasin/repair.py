"""REPAIR: give the units of a merged network the mean and spread that they have in its ends.

The average of two aligned units that correlate by rho has less variance than either, sigma^2 (1 +
rho) / 2 at the midpoint, and the loss of each layer adds to that of the ones before, until the
logits are nearly constant: *variance collapse*. The cure is one scale and one shift for each
channel, found from unlabelled data and written back into weights and biases, so the architecture
stays. Where BatchNorm keeps running statistics, estimating them again does the same. Statistics
are over all inputs and positions of a channel, in float64, one batch of features at a time.

Source: REPAIR (Jordan, Sedghi, Saukh, Entezari, Neyshabur, ICLR 2023); for BatchNorm also Git
Re-Basin, Appendix A.3.3; our chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from companion.connectivity import statistics
from companion.connectivity.batches import examples_a_pass
from companion.core import codec, deadline
from companion.core.effective import effective
from companion.core.errors import BadParameter, one_of
from companion.core.networks import private
from companion.core.numerics import exact_evaluation
from companion.core.theta import (
    Theta,
    affine,
    check_integers,
    check_theta,
    layout,
    with_aliases,
)
from companion.data import Split

FORMS = ("forward", "closed")
"""``forward``: the merged network is run, with its corrections. ``closed``: a formula in the
statistics of the two ends, without a forward pass of the merged network."""

Channelwise = tuple[Tensor, Tensor]
"""(scale, shift), or (mean, standard deviation): float64, shape (channels,) each."""

Hook = Callable[[str, Tensor], Channelwise | None]
"""(layer, its outputs (channels, values) in float64) -> (scale, shift) to apply, or None."""


@dataclass(frozen=True)
class Repaired:
    """A merged network whose channels have the spread that they ought to have.

    Arguments:
        theta: the repaired state dict, of the same architecture, on A's device.
        scale, shift: corrected layer -> what its channels were multiplied by, and what was then
            added; float64, shape (channels,). They are part of ``theta`` already.
        before, after: layer -> standard deviation in the merged network as a share of its target
            (``(1 - alpha) s_A + alpha s_B``), mean over channels: 1 is
            no variance collapse, 0 a network of constants. ``before``: of the plain interpolation,
            ``after``: of ``theta``. NaN: a layer without a channel that
            varies in an end.
        reset: BatchNorm (and InstanceNorm) layers whose running statistics were estimated again.
        skipped: layer that was neither corrected nor reset -> why.
        form: one of :data:`FORMS`.
        alpha: the position between A and B; of :func:`repair_many` the weights.
        samples: inputs that the statistics are of.
    """

    theta: Theta
    scale: Mapping[str, Tensor]
    shift: Mapping[str, Tensor]
    before: Mapping[str, float]
    after: Mapping[str, float]
    reset: tuple[str, ...]
    skipped: Mapping[str, str]
    form: str
    alpha: float | tuple[float, ...]
    samples: int

    def summary(self) -> dict[str, Any]:
        """Everything but the weights, JSON-able; a share that is no number is None."""
        return {
            "form": self.form,
            "alpha": codec.to_json(self.alpha),
            "samples": self.samples,
            "corrected": list(self.scale),
            "reset": list(self.reset),
            "skipped": dict(self.skipped),
            "before": codec.to_json(self.before, null=True),
            "after": codec.to_json(self.after, null=True),
        }

    def __str__(self) -> str:
        def worst(shares: Mapping[str, float]) -> str:
            numbers = {n: v for n, v in shares.items() if not math.isnan(v)}
            if not numbers:
                return "no layer varies"
            name = min(numbers, key=lambda n: numbers[n])
            return f"{numbers[name]:.2f} ({name})"

        return (
            f"{len(self.scale)} layers corrected, {len(self.reset)} BatchNorms reset, "
            f"{len(self.skipped)} layers left; lowest share of the target spread "
            f"{worst(self.before)} before, {worst(self.after)} after"
        )


def repair(
    module: nn.Module,
    a: Theta,
    b: Theta,
    inputs: Tensor | DataLoader[Any],
    *,
    alpha: float = 0.5,
    layers: Sequence[str] | None = None,
    form: str = "forward",
    batch: int | None = None,
    passes: int = 1,
) -> Repaired:
    """The network at ``alpha`` between A and B, with every channel's mean and spread put right.

    Targets are, for each channel over all inputs and positions, mu* = (1 - alpha) mu_A + alpha mu_B
    and s* = (1 - alpha) s_A + alpha s_B (standard deviations, not variances). ``forward`` measures
    the merged network with the corrections of the layers before in place and scales by s* / s.
    ``closed`` predicts its variance, (1-alpha)^2 s_A^2 + alpha^2 s_B^2 + 2 alpha (1-alpha) s_A s_B
    rho, with rho the correlation of the channel in A with the same channel in B, and its mean, mu*.

    A channel that is constant in the merged network keeps its scale and gets its mean. Where the
    network has BatchNorm, its statistics are estimated again on the same inputs (at alpha 0 and 1
    too, so there the function is A's or B's only without BatchNorm). Which axis of a layer's
    outputs is that of its channels is observed: a scale and a shift in weight and bias act on it.
    Where layers compute their weights from others (weight norm, pruning masks), between A and B is
    between these weights; the result is stored as A is.

    Arguments:
        module: the architecture, not changed.
        a, b: state dicts, B already permuted to A.
        inputs: (N, …), N >= 2, unlabelled training data on the device to compute on.
        alpha: position, 0 = A, 1 = B.
        layers: names of those to correct. None: every layer that can take a scale and a shift for
            each channel into itself (linear, convolution and norm layers with weight and bias),
            but not one whose output is the network's, nor one that runs several times, which one
            correction cannot fit. ``()``: BatchNorm only.
        form: one of :data:`FORMS`.
        batch: inputs a forward pass, at most; in ``forward`` also what a batch's own statistics are
            of. With all inputs in one batch the targets are met exactly.
        passes: over the data in ``forward``. 1 is REPAIR's; after as many as there are layers the
            targets are met exactly whatever the batch.

    Returns:
        a :class:`Repaired`.

    Raises:
        BadParameter: state dicts or inputs that do not fit, NaN in them or in features; a named
            layer that is unknown or cannot be corrected; nothing to correct; a merged weight that
            a parametrization cannot hold.

    Source: REPAIR (ICLR 2023), Section 4 and its notebooks, which add up batch variances where we
    take the variance of all data; the closed form is theirs too; our chapter 2.
    """
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not 0 <= alpha <= 1:
        raise BadParameter(
            f"alpha: {alpha!r} must be a number from 0 (network A) to 1 (network B)."
        )
    shares = (1 - alpha, alpha)
    found = repair_many(
        module, (a, b), inputs, shares, layers=layers, form=form, batch=batch, passes=passes
    )
    return replace(found, alpha=alpha)


def repair_many(
    module: nn.Module,
    thetas: Sequence[Theta],
    inputs: Tensor | DataLoader[Any],
    weights: Sequence[float] | None = None,
    *,
    layers: Sequence[str] | None = None,
    form: str = "forward",
    batch: int | None = None,
    passes: int = 1,
) -> Repaired:
    """The weighted mean of networks, with every channel's mean and spread put right.

    As :func:`repair`, of any number: a channel's targets are the weighted means of its means and of
    its standard deviations in the networks. ``closed`` predicts the variance sum_ij w_i w_j s_i s_j
    rho_ij.

    Arguments:
        module: the architecture, not changed.
        thetas: state dicts, two or more, in one order of units.
        weights: of each network in the mean, 0 or more, to the sum 1; None: equal ones.
        inputs, layers, form, batch, passes: as of :func:`repair`.

    Returns:
        a :class:`Repaired`; its ``alpha`` has the weights.

    Raises:
        BadParameter: as of :func:`repair`; weights that are none.

    Source: REPAIR (ICLR 2023), Section 4, which has two networks; the mean over more is ours.
    """
    one_of("form", form, FORMS)
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise BadParameter(f"passes: {passes!r} must be a whole number of 1 or more.")
    shares = tuple(weights) if weights is not None else (1 / len(thetas),) * len(thetas)
    fits = len(shares) == len(thetas) > 1 and all(0 <= w <= 1 for w in shares)
    if not fits or not math.isclose(sum(shares), 1):
        raise BadParameter(
            f"weights: {list(shares)} for {len(thetas)} networks; needed are two networks or more, "
            "and as many numbers of 0 or more to the sum 1."
        )
    named = [check_theta(module, t, _letter(i)) for i, t in enumerate(thetas)]
    parts = even_batches(inputs, batch)
    space = effective(module)
    ends = [space.enter(t) for t in named]
    net = Copy(space.module, parts[0])
    net.check_line(ends, parts[0])
    names, skipped = _chosen(net.layers, layers)
    if not names and not net.norms:
        why = "; ".join(f"{n}: {w}" for n, w in list(skipped.items())[:3])
        raise BadParameter(f"repair: no layer can be corrected, and no BatchNorm be reset ({why}).")
    known = [net.moments(t, parts) for t in ends]
    targets = _targets(known, shares)
    merged = _mean(space.module, ends, shares)
    wanted = {n: targets[n] for n in names}
    if form == "forward":
        found = _forward(net, merged, parts, wanted, passes) if wanted else {}
    else:
        found = _closed(net, ends, parts, wanted, known, shares)
    theta = fuse(merged, found)
    reset = tuple(n for n, layer in net.layers.items() if layer.module in net.norms)
    if net.norms:
        theta = net.reestimated(theta, parts)
    return Repaired(
        space.leave(theta),
        scale={n: scale for n, (scale, _) in found.items()},
        shift={n: shift for n, (_, shift) in found.items()},
        before=_shares(net.moments(merged, parts), targets),
        after=_shares(net.moments(theta, parts), targets),
        reset=reset,
        skipped={n: why for n, why in skipped.items() if n not in reset},
        form=form,
        alpha=shares,
        samples=sum(map(len, parts)),
    )


def _letter(number: int) -> str:
    """What messages call a network."""
    return chr(65 + number)


def _closed(
    net: Copy,
    ends: Sequence[Theta],
    parts: Sequence[Tensor],
    targets: Mapping[str, Channelwise],
    known: Sequence[Mapping[str, Moments]],
    shares: Sequence[float],
) -> dict[str, Channelwise]:
    """Corrections from the moments of the networks and the correlations between each two."""
    spreads = {n: [w * m[n].std for w, m in zip(shares, known, strict=True)] for n in targets}
    variances = {n: sum(s**2 for s in own) for n, own in spreads.items()}
    for i, j in combinations(range(len(ends)), 2):
        rho = net.correlations(ends[i], ends[j], parts, list(targets))
        for n, own in spreads.items():
            variances[n] = variances[n] + 2 * own[i] * own[j] * rho[n]
    return {
        n: correction(mean, std, mean, torch.as_tensor(variances[n]).clamp(min=0).sqrt())
        for n, (mean, std) in targets.items()
    }


def _forward(
    net: Copy,
    theta: Theta,
    parts: Sequence[Tensor],
    targets: Mapping[str, Channelwise],
    passes: int,
) -> dict[str, Channelwise]:
    """Corrections from running the merged network.

    In the first pass, as BatchNorm would in training, every batch is corrected by its own
    statistics while those of all data add up; in further passes by what the pass before found.
    """
    known: dict[str, Channelwise] = {}
    for _ in range(passes):
        found = {name: Moments() for name in targets}

        def hook(name: str, x: Tensor, found: Any = found, known: Any = known) -> Channelwise:
            mine = found[name].add(x)
            return known[name] if known else correction(*targets[name], mine.mean, mine.std)

        with net.batch_statistics():
            net.run(theta, parts, list(targets), hook)
        known = {n: correction(*targets[n], m.mean, m.std) for n, m in found.items()}
    return known


def reset_batchnorm(
    module: nn.Module, theta: Theta, inputs: Tensor, batch: int | None = None
) -> dict[str, Tensor]:
    """``theta`` with BatchNorm's running statistics estimated again: reset, cumulative average.

    The numbers are those of the walker's mode ``reestimate`` on the same inputs. REPAIR found the
    reset itself necessary for stability, and augmented training images to work somewhat better than
    plain ones.

    Arguments:
        module: the architecture, not changed.
        theta: a state dict of it, not changed.
        inputs: (N, …), unlabelled training data, on the device to compute on.
        batch: inputs a forward pass, at most; the data is cut into batches of equal size.

    Returns:
        a new state dict on ``theta``'s device.

    Raises:
        BadParameter: the network keeps no running statistics; ``theta`` does not fit the module;
            fewer than two inputs.

    Source: REPAIR, Section 4; Git Re-Basin, Appendix A.3.3; our chapter 2.
    """
    theta = check_theta(module, theta, "to reset")
    parts = even_batches(inputs, batch)
    net = Copy(module, parts[0])
    if not net.norms:
        raise BadParameter(
            "reset_batchnorm: the network has no BatchNorm with running statistics; "
            "repair() corrects other networks."
        )
    return net.reestimated(theta, parts)


def _chosen(
    layers: Mapping[str, Layer], names: Sequence[str] | None
) -> tuple[list[str], dict[str, str]]:
    """Which layers to correct, in the order of the forward pass, and why not the others."""
    left = "not among the layers that were asked for"
    if names is None:
        names = [n for n, layer in layers.items() if not layer.refused and not layer.last]
        left = "its outputs are the network's own (the logits)"
    if isinstance(names, str):
        raise BadParameter(f"layers: a list of layer names is needed, got the text {names!r}.")
    for name in names:
        if why := layers[one_of("layer", name, layers)].refused:
            raise BadParameter(f"layer {name!r} cannot be corrected: {why}.")
    skipped = {n: layer.refused or left for n, layer in layers.items() if n not in names}
    return [n for n in layers if n in names], skipped


def _shares(found: Mapping[str, Moments], targets: Mapping[str, Channelwise]) -> dict[str, float]:
    """Layer -> mean over channels of std / target std, where there is a target to compare with."""
    out = {}
    for name, (_, std) in targets.items():
        alive = std > 0
        ratio = found[name].std[alive] / std[alive]
        out[name] = float(ratio.mean()) if len(ratio) else math.nan
    return out


def _targets(
    known: Sequence[Mapping[str, Moments]], shares: Sequence[float]
) -> dict[str, Channelwise]:
    """Layer -> (mean, std): weighted means of both; of the std, not of the variance."""
    for number, found in enumerate(known):
        for name, m in found.items():
            if not bool(torch.isfinite(m.mean).all() and torch.isfinite(m.std).all()):
                raise BadParameter(
                    f"network {_letter(number)}: layer {name!r} puts out NaN or infinite values on "
                    "these inputs."
                )

    def mean(name: str, what: str) -> Tensor:
        values: list[Tensor] = [
            w * getattr(m[name], what) for w, m in zip(shares, known, strict=True)
        ]
        return sum(values[1:], values[0])

    return {n: (mean(n, "mean"), mean(n, "std")) for n in known[0]}


def averaged(
    module: nn.Module, thetas: Sequence[Theta], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The weighted mean of networks, every entry of the state dict; integers from the first.

    Between the weights that layers compute with, where these are computed from what is stored
    (:mod:`companion.core.effective`).

    Arguments:
        thetas: state dicts of ``module``, in one order of units.
        weights: one a network; they sum to 1.

    Raises:
        BadParameter: whole numbers that differ; a merged weight that a parametrization cannot hold.
    """
    space = effective(module)
    entered = [space.enter(theta) for theta in thetas]
    check_integers(entered, layout(space.module))
    return space.leave(_mean(space.module, entered, weights))


def _mean(
    module: nn.Module, thetas: Sequence[Theta], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The same of networks of effective weights."""
    lay, (a, *others) = layout(module), thetas
    there = [{k: v.to(a[k].device) for k, v in b.items() if k in a} for b in others]
    mixed = affine((a, *there), weights, lay.floating)
    return with_aliases({**mixed, **{n: a[n].clone() for n in lay.integers}}, lay.ties)


def fuse(theta: Theta, corrections: Mapping[str, Channelwise]) -> dict[str, Tensor]:
    """A new state dict with ``scale`` and ``shift`` of each layer in its weight and bias.

    ``y -> scale * y + shift`` after a layer is ``weight * scale`` and ``bias * scale + shift`` in
    it: along the first axis of a linear or convolution weight, entry by entry of a norm's.
    """
    out = dict(theta)
    for name, (scale, shift) in corrections.items():
        weight, bias = theta[f"{name}.weight"], theta[f"{name}.bias"]
        scale, shift = scale.to(weight.device), shift.to(weight.device)
        rows = scale.view(-1, *[1] * (weight.ndim - 1))
        out[f"{name}.weight"] = (weight.double() * rows).to(weight.dtype)
        out[f"{name}.bias"] = (bias.double() * scale + shift).to(bias.dtype)
    return out


class Moments:
    """Mean and standard deviation (population) of each channel, batch by batch.

    Batches are joined by the sums of squares about their own means (Chan et al.), which loses no
    digits where the mean is large beside the spread.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    @property
    def std(self) -> Tensor:
        """float64, shape (channels,)."""
        return (self.squares / max(self.count, 1)).sqrt()

    def add(self, x: Tensor) -> Moments:
        """Take in a batch, shape (channels, values); returns the moments of that batch alone."""
        mine = Moments()
        mine.count, mine.mean = x.shape[1], x.mean(1)
        mine.squares = (x - mine.mean[:, None]).square().sum(1)
        if self.count == 0:
            self.mean, self.squares = mine.mean, mine.squares
        else:
            gap, weight = mine.mean - self.mean, mine.count / (self.count + mine.count)
            self.mean = self.mean + gap * weight
            self.squares = self.squares + mine.squares + gap**2 * self.count * weight
        self.count += mine.count
        return mine


class Comoments:
    """Covariance of each channel of A with the same channel of B, batch by batch."""

    def __init__(self) -> None:
        self.x, self.y = Moments(), Moments()
        self.products = torch.zeros(())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in a batch of both, shapes (channels, values)."""
        count, at_x, at_y = self.x.count, self.x.mean, self.y.mean
        mine, other = self.x.add(x), self.y.add(y)
        own = ((x - mine.mean[:, None]) * (y - other.mean[:, None])).sum(1)
        gap = (mine.mean - at_x) * (other.mean - at_y) * (count * mine.count / self.x.count)
        self.products = self.products + own + gap

    @property
    def correlation(self) -> Tensor:
        """float64, shape (channels,), from -1 to 1; 0 where a channel is constant."""
        scale = (self.x.squares * self.y.squares).sqrt()
        return torch.where(scale > 0, self.products / scale, 0.0).clamp(-1, 1)


def correction(target_mean: Tensor, target_std: Tensor, mean: Tensor, std: Tensor) -> Channelwise:
    """(scale, shift) that take channels of mean and std to their targets, shapes (channels,).

    A channel that is constant, up to what rounding makes of a constant, keeps its scale.
    """
    dead = (std <= 1e-12 * mean.abs()) | (std <= 1e-6 * target_std)
    scale = torch.where(dead, 1.0, target_std / torch.where(dead, 1.0, std))
    return scale, target_mean - scale * mean


@dataclass(frozen=True)
class Layer:
    """A module that scales channels, in the private copy of the network."""

    module: nn.Module
    axis: int | None  # of the channels in its outputs; None: not known
    runs: int  # in one forward pass
    last: bool  # the network's outputs are its own
    refused: str  # why a scale and a shift cannot be written into it, or ""


_LAYERS = (nn.Linear, _ConvNd, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)


def _scales(module: nn.Module) -> bool:
    """Whether a module may scale channels: a layer of torch's or a class made of one; or a norm
    of somebody's own, which has a weight and a bias of one axis."""
    if isinstance(module, _LAYERS):
        return True
    own = {n: p.ndim for n, p in module.named_parameters(recurse=False)}
    return own == {"weight": 1, "bias": 1} and next(module.children(), None) is None


def _known_axis(module: nn.Module) -> int | None:
    """Where torch's own classes have their channels."""
    if type(module) in (nn.Linear, nn.LayerNorm, nn.RMSNorm):
        return -1
    return 1 if isinstance(module, _ConvNd | nn.GroupNorm | _NormBase) else None


def _observed_axis(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> int | None:
    """The axis of the outputs that a scale and a shift in weight and bias act on; None: none.

    The class does not tell: a subclass of LayerNorm may norm tokens or feature maps, and one of
    GroupNorm may have an activation inside.
    """
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    own = {n: own[n] for n in ("weight", "bias") if n in own}
    if "weight" not in own or isinstance(module, _ConvTransposeNd):
        return _known_axis(module)
    n = len(own["weight"])
    ramp = torch.arange(1, n + 1, device=out.device, dtype=out.dtype) / n
    size = 1 + out.nan_to_num(0, 0, 0).abs().max()
    scale, shift = 1 + ramp, ramp * size if "bias" in own else 0 * ramp
    own["weight"] = own["weight"] * scale.view(-1, *[1] * (own["weight"].ndim - 1))
    if "bias" in own:
        own["bias"] = own["bias"] * scale + shift
    changed = functional_call(module, own, args, kwargs)
    for axis in range(1, out.ndim):
        if out.shape[axis] == n:
            shape = [n if i == axis else 1 for i in range(out.ndim)]
            wanted = out * scale.view(shape) + shift.view(shape)
            if torch.allclose(changed, wanted, rtol=0, atol=1e-3 * float(size), equal_nan=True):
                return axis if axis < out.ndim - 1 else -1
    return None


def _refusal(name: str, layer: Layer, entries: set[str], tied: set[str]) -> str:
    """Why a scale and a shift for each channel cannot be written into a layer, or ``""``."""
    module = layer.module
    kind = "BatchNorm" if isinstance(module, _BatchNorm) else "InstanceNorm"
    if isinstance(module, _BatchNorm) and module.running_mean is None:
        return "BatchNorm without running statistics: each batch is normalised by itself"
    if statistics.running(module):
        return f"{kind}: its running statistics are estimated again instead"
    if isinstance(module, _ConvTransposeNd):
        return "transposed convolutions are not supported"
    if parametrize.is_parametrized(module):
        return "its weight or bias is computed from other tensors (a parametrisation)"
    if getattr(module, "weight", None) is None:
        return "it has no weight to take the scale"
    if getattr(module, "bias", None) is None:
        return "it has no bias to take the shift"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return "its weight has a value for each position, not for each channel"
    own = {f"{name}.weight", f"{name}.bias"} if name else {"weight", "bias"}
    if not own <= entries:
        return "its weight or bias is computed from other tensors (a parametrisation)"
    if own & tied:
        return "its weight or bias is tied to another layer's"
    if layer.runs > 1:
        return (
            f"it runs {layer.runs} times in a forward pass, and one correction cannot fit them all"
        )
    if layer.axis is None:
        return "its outputs are not scaled and shifted as its weight and bias are"
    return ""


def even_batches(inputs: Tensor | DataLoader[Any], batch: int | None) -> list[Tensor]:
    """``inputs`` in the fewest batches of at most ``batch``, of equal size give or take one."""
    if isinstance(inputs, DataLoader):
        inputs = Split.of(inputs).x
    if not isinstance(inputs, Tensor) or inputs.ndim < 2 or len(inputs) < 2:
        what = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise BadParameter(f"inputs: a tensor (N, …) with N of 2 or more is needed, got {what}.")
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        raise BadParameter("inputs: they hold NaN or infinite values.")
    batch = examples_a_pass(inputs) if batch is None else batch
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 2:
        raise BadParameter(f"batch: {batch!r} must be a whole number of 2 or more.")
    # Never a batch of one: it has no spread, and BatchNorm refuses it.
    parts = min(-(-len(inputs) // batch), len(inputs) // 2)
    return list(inputs.tensor_split(parts))


@contextmanager
def _hooks(calls: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Forward hooks, inside."""
    hooks = [module.register_forward_hook(call) for module, call in calls.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Copy:
    """A private copy of a network in eval mode, and its layers in the order in which they run.

    ``example`` is a batch of its inputs, on the device to compute on.
    """

    def __init__(self, module: nn.Module, example: Tensor):
        self.module = private(module, example)
        self.norms = statistics.running(self.module)
        self.layers = self._find(example[:2])

    @exact_evaluation()
    @torch.no_grad()
    def _find(self, example: Tensor) -> dict[str, Layer]:
        """Run the network once and see which layers put out what, and where their channels are."""
        seen: dict[nn.Module, list[Tensor]] = {}
        axes: dict[nn.Module, int | None] = {}
        looking = True

        def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            nonlocal looking
            if not looking or not isinstance(out, Tensor):
                return
            seen.setdefault(module, []).append(out)
            looking = False
            axes[module] = _observed_axis(module, args, kwargs, out)
            looking = True

        names = {m: n for n, m in self.module.named_modules()}
        hooks = [m.register_forward_hook(look, with_kwargs=True) for m in names if _scales(m)]
        try:
            final = self.module(example)
        finally:
            for hook in hooks:
                hook.remove()
        # By memory, so that a view of a layer's outputs still counts as its outputs. All features
        # are alive here, so none of them can lie where another one was.
        final = [t for t in pytree.tree_leaves(final) if isinstance(t, Tensor)]
        ends = {t.untyped_storage().data_ptr() for t in final}
        lay = layout(self.module)
        entries = set(self.module.state_dict())
        tied = set(lay.ties) | set(lay.ties.values())
        found = {}
        for module, outs in seen.items():
            last = any(o.untyped_storage().data_ptr() in ends for o in outs)
            layer = Layer(module, axes[module], len(outs), last, "")
            why = _refusal(names[module], layer, entries, tied)
            found[names[module]] = replace(layer, refused=why)
        return found

    def check_line(self, ends: Sequence[Theta], example: Tensor) -> None:
        """Refuse networks that differ in whole numbers which they compute by."""

        @torch.no_grad()
        def found(theta: Theta) -> Tensor:
            self.load(theta)
            leaves = pytree.tree_leaves(self.module(example[:8]))
            return torch.cat([t.flatten() for t in leaves if isinstance(t, Tensor)])

        check_integers(ends, layout(self.module), found)

    @torch.no_grad()
    def load(self, theta: Theta) -> None:
        """Put a state dict into the copy."""
        state = self.module.state_dict()
        for name, value in theta.items():
            state[name].copy_(value)

    @exact_evaluation()
    @torch.no_grad()
    def run(
        self,
        theta: Theta,
        parts: Iterable[Tensor],
        names: Sequence[str] = (),
        hook: Hook | None = None,
    ) -> None:
        """Load ``theta`` and run it on each batch, ``hook`` seeing the outputs of layers ``names``.

        What the hook returns is applied to the outputs before the network goes on.
        """
        self.load(theta)

        def attach(name: str) -> Any:
            layer = self.layers[name]

            def call(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
                assert hook is not None and layer.axis is not None
                # A copy even where it is float64 already: the next layer may write in place.
                x = out.movedim(layer.axis, 0).flatten(1).to(torch.float64, copy=True)
                found = hook(name, x)
                if found is None:
                    return None
                shape = [1] * out.ndim
                shape[layer.axis] = -1
                scale, shift = (v.to(out.dtype).view(shape) for v in found)
                return out * scale + shift

            return call

        with _hooks({self.layers[name].module: attach(name) for name in names}):
            for part in parts:
                deadline.stop_if_passed()
                self.module(part)

    @contextmanager
    def batch_statistics(self) -> Iterator[None]:
        """Inside, BatchNorm normalises each batch by itself, as in training."""
        for m in self.norms:
            m.train()
        try:
            yield
        finally:
            for m in self.norms:
                m.eval()

    def moments(self, theta: Theta, parts: Sequence[Tensor]) -> dict[str, Moments]:
        """Layer -> moments of its outputs in network ``theta``, if it runs once."""
        once = [n for n, x in self.layers.items() if x.runs == 1 and x.axis is not None]
        found = {n: Moments() for n in once}

        def hook(name: str, x: Tensor) -> None:
            found[name].add(x)

        self.run(theta, parts, once, hook)
        return found

    def correlations(
        self, a: Theta, b: Theta, parts: Iterable[Tensor], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Layer -> correlation of each channel of A with the same channel of B."""
        both = {n: Comoments() for n in names}
        held: dict[str, Tensor] = {}
        for part in parts if names else ():
            self.run(a, [part], names, held.__setitem__)
            self.run(b, [part], names, lambda name, x: both[name].add(held.pop(name), x))
        return {n: c.correlation for n, c in both.items()}

    def reestimated(self, theta: Theta, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """``theta`` with running statistics that are cumulative averages over ``parts``."""
        self.load(theta)
        fresh = {n: v for n, v in theta.items() if not self._is_statistic(n)}
        with statistics.cumulative(self.norms):
            self.run(fresh, parts)
        state = self.module.state_dict()
        return {
            n: state[n].to(v.device, copy=True) if self._is_statistic(n) else v
            for n, v in theta.items()
        }

    def _is_statistic(self, entry: str) -> bool:
        owner, _, what = entry.rpartition(".")
        stands = what in ("running_mean", "running_var", "num_batches_tracked")
        return stands and self.module.get_submodule(owner) in self.norms
