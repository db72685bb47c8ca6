"""A barrier taken apart at the logits: exactly, and example by example.

Let z_lin = (1-α) z_A + α z_B mix the logits of the two networks, and E = z(θ_α) - z_lin be what the
mixed weights do instead. With LSE the log-sum-exp over classes, the barrier of the cross-entropy is

    B(α) = mean over examples of D - J - E_y,    D = LSE(z_lin + E) - LSE(z_lin),
    J = (1-α) LSE(z_A) + α LSE(z_B) - LSE(z_lin) ≥ 0.

E is the failure of layerwise linear feature connectivity (LLFC) at the output: if it holds there
exactly, E = 0 and B = -J ≤ 0. J is what an ensemble of the two would gain. Softmax does not see a
shift of all logits of an example, so E is centred over classes: then D and E_y mean something each.

Source: H. Bae, "LMC Barriers are Logit Linearization Gaps" (2026, under review), and ours; our
chapter 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from companion.connectivity import Walker, classification
from companion.connectivity.walk import Scored
from companion.core.errors import BadParameter
from companion.core.losses import is_label
from companion.core.theta import Theta
from companion.data import Split


@dataclass(frozen=True)
class LogitGap:
    """A barrier of the loss at one α, above the straight line, and what it is made of, in nats.

    Arguments:
        alpha: of B.
        bn: BatchNorm mode.
        barrier: measured from the losses.
        partition: mean D, of the centred E.
        ensemble: mean J, the gain of mixing logits.
        target: mean E_y, of the centred E: what the true class's logit gains.
        deviation: root mean square of ‖E‖ (centred) over that of ‖z_lin‖ (centred).
        lower, upper: bounds on the barrier by convexity, with the probabilities at z_lin and at α.
        parts: D - J - E_y of each example (of a text: mean over its positions).
    """

    alpha: float
    bn: str
    barrier: float
    partition: float
    ensemble: float
    target: float
    deviation: float
    lower: float
    upper: float
    parts: tuple[float, ...]

    @property
    def residual(self) -> float:
        """What D - J - E_y lacks to be the barrier: rounding."""
        return abs(self.partition - self.ensemble - self.target - self.barrier)

    def share(self, of: float = 0.8) -> float:
        """The smallest share of examples that together have ``of`` of the barrier.

        NaN if there is none: half of the examples may be better off in the middle.
        """
        if self.barrier <= 0:
            return math.nan
        wanted, have = of * sum(self.parts), 0.0
        for number, part in enumerate(sorted(self.parts, reverse=True), start=1):
            have += part
            if have >= wanted:
                return number / len(self.parts)
        return 1.0


def logit_gap(
    module: nn.Module, a: Theta, b: Theta, data: Split, *, alpha: float = 0.5, **how: Any
) -> LogitGap:
    """Take the barrier between A and B at α apart, on the logits.

    Arguments:
        module: the architecture; its outputs are logits (N, K), or (N, L, K) of a text.
        a, b: state dicts of it.
        data: where to measure.
        alpha: between 0 and 1.
        how: keywords of :class:`companion.connectivity.Walker`, such as ``bn``.

    Raises:
        BadParameter: α is an end, or outside.
    """
    if not 0 < alpha < 1:
        raise BadParameter(f"alpha: {alpha!r} must lie between 0 and 1, the ends of the path.")
    batches: list[torch.Tensor] = []
    points: list[torch.Tensor] = []

    def keep(outputs: torch.Tensor, y: torch.Tensor) -> Scored:
        batches.append(outputs.double())
        return classification(outputs, y)

    def gather() -> None:
        points.append(torch.cat(batches))
        batches.clear()

    walker = Walker(module, {"data": data}, score=keep, **how)
    walker.walk((a, b), [(1.0, 0.0), (1 - alpha, alpha), (0.0, 1.0)], each=gather)
    if not bool((kept := is_label(data.y)).all()):
        points = [z.flatten(0, -2)[kept.flatten()] for z in points]
        return decomposed(points, data.y[kept], alpha, walker.bn)
    return decomposed(points, data.y, alpha, walker.bn)


@torch.no_grad()
def decomposed(
    points: Sequence[torch.Tensor], y: torch.Tensor, alpha: float, bn: str = "none"
) -> LogitGap:
    """The same of logits that are there already.

    Arguments:
        points: logits of A, of the mixed weights and of B, (N, K) or (N, L, K).
        y: (N,) or (N, L).
    """
    per_example = y.shape
    z_a, z_mid, z_b = (z.double().flatten(0, -2) for z in points)
    rows = torch.arange(y.numel(), device=y.device)
    label = y.flatten()

    def lse(z: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(z, -1)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return lse(z) - z[rows, label]

    lin = (1 - alpha) * z_a + alpha * z_b
    e = z_mid - lin
    e = e - e.mean(-1, keepdim=True)
    d = lse(lin + e) - lse(lin)
    j = (1 - alpha) * lse(z_a) + alpha * lse(z_b) - lse(lin)
    e_y = e[rows, label]
    barrier = (loss(z_mid) - (1 - alpha) * loss(z_a) - alpha * loss(z_b)).mean()
    lower = ((lin.softmax(-1) * e).sum(-1) - e_y - j).mean()
    upper = ((z_mid.softmax(-1) * e).sum(-1) - e_y).mean()
    size = (lin - lin.mean(-1, keepdim=True)).square().sum(-1).mean().sqrt()
    parts = (d - j - e_y).view(per_example)
    parts = parts.flatten(1).mean(1) if parts.dim() > 1 else parts
    deviation = float(e.square().sum(-1).mean().sqrt() / size) if float(size) else math.inf
    return LogitGap(
        alpha,
        bn,
        float(barrier),
        float(d.mean()),
        float(j.mean()),
        float(e_y.mean()),
        deviation,
        float(lower),
        float(upper),
        tuple(parts.tolist()),
    )
