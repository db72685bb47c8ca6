"""REPAIR: give the units of a merged network the mean and spread that they have in its ends.

The average of two aligned units that correlate by rho has less variance than either, sigma^2 (1 +
rho) / 2 at the midpoint, and the loss of each layer adds to that of the ones before, until the
logits are nearly constant: *variance collapse*. The cure is one scale and one shift for each
channel, found from unlabelled data and written back into weights and biases, so the architecture
stays. Where BatchNorm keeps running statistics, estimating them again does the same.

Source: REPAIR (Jordan, Sedghi, Saukh, Entezari, Neyshabur, ICLR 2023); for BatchNorm also Git
Re-Basin, Appendix A.3.3; our chapter 2. Read top to bottom: :mod:`companion.rebasin.moments` says
which layers there are and streams their statistics, :func:`repair` decides and writes back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from companion.core import codec
from companion.core.errors import BadParameter, one_of
from companion.core.theta import Theta, affine, check_theta, layout
from companion.rebasin.moments import Copy, Layer, Moments, batches, correction, measure

FORMS = ("forward", "closed")
"""``forward``: the merged network is run, with its corrections. ``closed``: a formula in the
statistics of the two ends, without a forward pass of the merged network."""

Corrections = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> (scale, shift), float64, shape (channels,) each."""


@dataclass(frozen=True)
class Repaired:
    """A merged network whose channels have the spread that they ought to have.

    Arguments:
        theta: the repaired state dict, of the same architecture, on A's device.
        scale, shift: corrected layer -> what its channels were multiplied by, and what was then
            added; float64, shape (channels,). They are part of ``theta`` already.
        before, after: layer -> standard deviation in the merged network as a share of its target
            ``(1 - alpha) s_A + alpha s_B``, mean over channels (:func:`collapse`); ``before``: of
            the plain interpolation, ``after``: of ``theta``. NaN: a layer without a channel that
            varies in an end.
        reset: BatchNorm layers whose running statistics were estimated again.
        skipped: layer that was neither corrected nor reset -> why.
        form: one of :data:`FORMS`.
        alpha: the position between A and B.
        samples: inputs that the statistics are of.
    """

    theta: Theta
    scale: Mapping[str, torch.Tensor]
    shift: Mapping[str, torch.Tensor]
    before: Mapping[str, float]
    after: Mapping[str, float]
    reset: tuple[str, ...]
    skipped: Mapping[str, str]
    form: str
    alpha: float
    samples: int

    def summary(self) -> dict[str, Any]:
        """Everything but the weights, JSON-able; a share that is no number is None."""
        return {
            "form": self.form,
            "alpha": self.alpha,
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


def merge(module: nn.Module, a: Theta, b: Theta, alpha: float) -> dict[str, torch.Tensor]:
    """``(1 - alpha) A + alpha B`` with every entry of the state dict, those of integers from A."""
    lay = layout(module)
    moved = affine(
        (a, {k: v.to(a[k].device) for k, v in b.items() if k in a}),
        (1 - alpha, alpha),
        lay.floating,
    )
    whole = dict(moved) | {n: a[n].clone() for n in lay.integers}
    return whole | {alias: whole[name] for alias, name in lay.ties.items()}


def _checked(
    module: nn.Module, a: Theta, b: Theta, inputs: torch.Tensor, alpha: float, batch: int | None
) -> list[torch.Tensor]:
    """The batches, after everything that can be refused before the first forward pass was."""
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not 0 <= alpha <= 1:
        raise BadParameter(
            f"alpha: {alpha!r} must be a number from 0 (network A) to 1 (network B)."
        )
    check_theta(module, a, "A")
    check_theta(module, b, "B")
    return batches(inputs, batch)


def _chosen(
    layers: Mapping[str, Layer], names: Sequence[str] | None
) -> tuple[list[str], dict[str, str]]:
    """Which layers to correct, in the order of the forward pass, and why not the others."""
    refused = {n: layer.refused for n, layer in layers.items() if layer.refused}
    if names is None:
        logits = "its outputs are the network's own (the logits)"
        skipped = refused | {n: logits for n, v in layers.items() if v.last and n not in refused}
        return [n for n in layers if n not in skipped], skipped
    if isinstance(names, str):
        raise BadParameter(f"layers: a list of layer names is needed, got the text {names!r}.")
    for name in names:
        if one_of("layer", name, layers) in refused:
            raise BadParameter(f"layer {name!r} cannot be corrected: {refused[name]}.")
    left = "not among the layers that were asked for"
    return [n for n in layers if n in names], {
        n: refused.get(n, left) for n in layers if n not in names
    }


def _shares(
    found: Mapping[str, Moments], targets: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """Layer -> mean over channels of std / target std, where there is a target to compare with."""
    out = {}
    for name, (_, std) in targets.items():
        alive = std > 0
        ratio = found[name].std[alive] / std[alive]
        out[name] = float(ratio.mean()) if len(ratio) else math.nan
    return out


def _targets(
    of_a: Mapping[str, Moments], of_b: Mapping[str, Moments], alpha: float
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (mean, std): both interpolated linearly; the std, not the variance."""
    for end, found in (("A", of_a), ("B", of_b)):
        for name, m in found.items():
            if not bool(torch.isfinite(m.mean).all() and torch.isfinite(m.std).all()):
                raise BadParameter(
                    f"network {end}: layer {name!r} puts out NaN or infinite values on these "
                    "inputs."
                )

    def mix(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (1 - alpha) * x + alpha * y

    return {n: (mix(of_a[n].mean, of_b[n].mean), mix(of_a[n].std, of_b[n].std)) for n in of_a}


def collapse(
    module: nn.Module,
    a: Theta,
    b: Theta,
    inputs: torch.Tensor,
    *,
    alpha: float = 0.5,
    batch: int | None = None,
) -> dict[str, float]:
    """How much variance collapses between A and B: 1 is none, 0 a network of constants.

    Arguments:
        module: the architecture.
        a, b: state dicts, B permuted to A (or not, to compare).
        inputs: (N, …), unlabelled, on the device to compute on.
        alpha: where to look.
        batch: inputs a forward pass, at most.

    Returns:
        layer -> standard deviation of its outputs in the interpolated network divided by the
        interpolated standard deviation, mean over channels; in the order of the forward pass.

    Raises:
        BadParameter: as :func:`repair`.

    Source: REPAIR, Section 3 (variance collapse); our chapter 2.
    """
    parts = _checked(module, a, b, inputs, alpha, batch)
    net = Copy(module, parts[0])
    of_a, of_b = (net.moments(theta, parts) for theta in (a, b))
    return _shares(net.moments(merge(module, a, b, alpha), parts), _targets(of_a, of_b, alpha))


def reset_batchnorm(
    module: nn.Module, theta: Theta, inputs: torch.Tensor, batch: int | None = None
) -> dict[str, torch.Tensor]:
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
    check_theta(module, theta, "to reset")
    parts = batches(inputs, batch)
    net = Copy(module, parts[0])
    if not net.norms:
        raise BadParameter(
            "reset_batchnorm: the network has no BatchNorm with running statistics; "
            "repair() corrects other networks."
        )
    return net.reestimated(theta, parts)


def _forward(
    net: Copy,
    theta: Theta,
    parts: Sequence[torch.Tensor],
    targets: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    passes: int,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Corrections from running the merged network: in the first pass, as BatchNorm would in
    training, every batch is corrected by its own statistics while those of all data add up; in
    further passes by what the pass before found."""
    known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for _ in range(passes):
        found = {name: Moments() for name in targets}

        def hook(
            name: str,
            x: torch.Tensor,
            found: dict[str, Moments] = found,
            known: Corrections = known,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            mine = found[name].add(x)
            return known[name] if known else correction(*targets[name], mine.mean, mine.std)

        with net.batch_statistics():
            net.run(theta, parts, list(targets), hook)
        known = {n: correction(*targets[n], m.mean, m.std) for n, m in found.items()}
    return known


def fuse(theta: Theta, corrections: Corrections) -> dict[str, torch.Tensor]:
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


def repair(
    module: nn.Module,
    a: Theta,
    b: Theta,
    inputs: torch.Tensor,
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
    too, so there the function is A's or B's only without BatchNorm).

    Arguments:
        module: the architecture, not changed.
        a, b: state dicts, B already permuted to A.
        inputs: (N, …), N >= 2, unlabelled training data on the device to compute on.
        alpha: position, 0 = A, 1 = B.
        layers: names of those to correct. None: every layer that can take a scale and a shift for
            each channel into itself (linear, convolution and norm layers with weight and bias),
            but not one whose output is the network's. ``()``: BatchNorm only.
        form: one of :data:`FORMS`.
        batch: inputs a forward pass, at most; in ``forward`` also what a batch's own statistics are
            of. With all inputs in one batch the targets are met exactly.
        passes: over the data in ``forward``. 1 is REPAIR's; after as many as there are layers the
            targets are met exactly whatever the batch.

    Returns:
        a :class:`Repaired`.

    Raises:
        BadParameter: state dicts or inputs that do not fit, NaN in them or in features; a named
            layer that is unknown or cannot be corrected; a layer that runs more than once in a
            forward pass; nothing to correct.

    Source: REPAIR (ICLR 2023), Section 4 and its notebooks, which add up batch variances where we
    take the variance of all data; the closed form is theirs too; our chapter 2.
    """
    one_of("form", form, FORMS)
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise BadParameter(f"passes: {passes!r} must be a whole number of 1 or more.")
    parts = _checked(module, a, b, inputs, alpha, batch)
    net = Copy(module, parts[0])
    names, skipped = _chosen(net.layers, layers)
    for name in names:
        if net.layers[name].runs > 1:
            raise BadParameter(
                f"layer {name!r} runs {net.layers[name].runs} times in a forward pass, and one "
                "correction cannot fit them all: leave it out by naming the others in layers=."
            )
    if not names and not net.norms:
        why = "; ".join(f"{n}: {w}" for n, w in list(skipped.items())[:3])
        raise BadParameter(f"repair: no layer can be corrected, and no BatchNorm be reset ({why}).")
    of_a, of_b, rho = measure(net, a, b, parts, correlated=names if form == "closed" else ())
    targets = _targets(of_a, of_b, alpha)
    merged = merge(module, a, b, alpha)
    wanted = {n: targets[n] for n in names}
    if form == "forward":
        found = _forward(net, merged, parts, wanted, passes) if wanted else {}
    else:
        found = {}
        for name, (mean, std) in wanted.items():
            s_a, s_b = (1 - alpha) * of_a[name].std, alpha * of_b[name].std
            predicted = (s_a**2 + s_b**2 + 2 * s_a * s_b * rho[name]).clamp(min=0).sqrt()
            found[name] = correction(mean, std, mean, predicted)
    theta = fuse(merged, found)
    reset = tuple(n for n, layer in net.layers.items() if layer.module in net.norms)
    if net.norms:
        theta = net.reestimated(theta, parts)
    return Repaired(
        theta,
        {n: c[0] for n, c in found.items()},
        {n: c[1] for n, c in found.items()},
        _shares(net.moments(merged, parts), targets),
        _shares(net.moments(theta, parts), targets),
        reset,
        {n: why for n, why in skipped.items() if n not in reset},
        form,
        alpha,
        sum(map(len, parts)),
    )
