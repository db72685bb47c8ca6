"""The one engine that walks weight space: combine networks, evaluate every point on every split.

Segments, planes, layer subsets and, later, random directions are all affine combinations of a few
anchor networks over a subset of entries; they differ only in anchors, weights and subset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from companion.connectivity.batches import default_batch
from companion.core import deadline
from companion.core.errors import BadParameter, one_of, whole
from companion.core.networks import HALF, private
from companion.core.numerics import exact_evaluation
from companion.core.theta import Theta, affine, check_theta, layout, without_aliases
from companion.data import Split, head_of

BN_MODES = ("interpolate", "reestimate", "batch")
"""What BatchNorm does at a point of the path: use the running statistics interpolated like weights;
use statistics re-estimated at that point on un-augmented training data (reset, cumulative average);
use the statistics of each evaluation batch."""

BN_EXAMPLES = 2000
"""Training inputs that ``reestimate`` averages over at a point, unless told otherwise.

All 50,000 images of CIFAR-10 at every point cost more than the training of a small network. For
ResNets on CIFAR-10 the first 2,000 give the same barriers to 0.2 points and 0.003 nats, 5,000 to
0.05 points (measured once, our chapter 1)."""

Score = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, int]]
"""(outputs, targets) -> (summed loss in nats, number of errors, number of predictions)."""


def classification(
    outputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Cross-entropy of logits (N, K) and top-1 errors against class indices (N,).

    Of a text, logits are (N, L, K) and targets (N, L): every position is a prediction.
    """
    outputs, targets = outputs.flatten(0, -2), targets.flatten()
    exact = outputs if outputs.dtype == torch.float64 else outputs.float()
    loss = F.cross_entropy(exact, targets, reduction="none").double().sum()
    return loss, (outputs.argmax(1) != targets).sum(), len(targets)


@dataclass(frozen=True)
class Measure:
    """Mean loss (nats) and error (percent) of one network on one split."""

    loss: float
    error: float


def check_bn_examples(value: int | None) -> None:
    """Refuse a number of inputs for ``reestimate`` that is none.

    Raises:
        BadParameter: not None, and not a whole number of 2 or more.
    """
    whole("bn_examples", value, 2, "null for all")


def wide(value: torch.Tensor, own: torch.Tensor) -> torch.dtype:
    """The type that an entry is mixed in: the network's own where it is stored in half of that."""
    return own.dtype if value.dtype in HALF else value.dtype


def has_batchnorm(module: nn.Module) -> bool:
    """True if the network keeps running statistics, so that a BatchNorm mode has to be named."""
    return any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in module.modules())


class Walker:
    """Evaluates points of weight space on data that stays on the device.

    Arguments:
        module: the architecture; copied, never changed.
        splits: name -> data, e.g. ``{"train": …, "test": …}``, on the device to compute on.
        bn: one of :data:`BN_MODES`; ``none`` is what a network without running statistics has.
        bn_data: what ``reestimate`` averages over; default ``splits["train"]``.
        bn_examples: how many inputs of it, those of :meth:`companion.data.Split.head`; None: all.
        batch: examples a forward pass, at most; default :func:`default_batch`. ``batch`` mode
            statistics are of as many: a split is cut into the fewest batches of equal size.
        score: how outputs become loss and error; default :func:`classification`.
    """

    def __init__(
        self,
        module: nn.Module,
        splits: Mapping[str, Split],
        *,
        bn: str = "interpolate",
        bn_data: Split | None = None,
        bn_examples: int | None = BN_EXAMPLES,
        batch: int | None = None,
        score: Score = classification,
    ):
        one_of("bn", bn, BN_MODES)
        check_bn_examples(bn_examples)
        if not splits or any(len(s) == 0 for s in splits.values()):
            raise BadParameter("connectivity: there is no data to evaluate on.")
        self.splits = dict(splits)
        example = next(iter(self.splits.values())).x[:1]
        device = example.device
        self.module = private(module, example, narrow=False)
        self.layout = layout(self.module)
        self.bn = bn if has_batchnorm(self.module) else "none"
        average = bn_data if bn_data is not None else self.splits.get("train")
        if self.bn == "reestimate" and average is None:
            raise BadParameter(
                "a network with BatchNorm is measured in all three modes, and re-estimating its "
                "statistics needs bn_data=, or a split called 'train'."
            )
        self.batch = batch or default_batch(self.module, device, self.bn, example)
        self._average: tuple[torch.Tensor, ...] = ()
        if self.bn == "reestimate" and average is not None:
            self._average = self._cut(head_of(average.x, bn_examples))
        self.score = score
        self.device = device
        self._entries = {
            k: v for k, v in self.module.state_dict().items() if isinstance(v, torch.Tensor)
        }

    def load(self, theta: Theta) -> None:
        """Put a (partial) state dict into the private copy of the network.

        Of a tied tensor with both its names, the first name's value counts.
        """
        for name, value in without_aliases(theta, self.layout.ties).items():
            self._entries[name].copy_(value)

    @property
    def bn_examples(self) -> int | None:
        """Inputs behind the re-estimated statistics at a point; None in the other modes."""
        return sum(map(len, self._average)) or None

    def _cut(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Of equal size, give or take one: BatchNorm averages batches, and refuses a batch of one.
        return values.tensor_split(-(-len(values) // self.batch))

    def batches(self, split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets, as they go through the network."""
        return zip(self._cut(split.x), self._cut(split.y), strict=True)

    def _norms(self) -> list[_BatchNorm]:
        return [m for m in self.module.modules() if isinstance(m, _BatchNorm)]

    def _reestimate(self) -> None:
        norms = self._norms()
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.reset_running_stats()
            m.train()
        for seen, x in enumerate(self._average, start=1):
            for m in norms:
                # PyTorch's cumulative average. Its own way to ask for it, momentum=None, reads a
                # counter from the device: a wait for every norm and batch.
                m.momentum = 1 / seen
            self.module(x)
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
            m.eval()

    def here(self) -> dict[str, Measure]:
        """Loss and error of the network as loaded, on every split."""
        return self._read([self._sums()])[0]

    @exact_evaluation()
    @torch.inference_mode()
    def _sums(self) -> torch.Tensor:
        """Summed loss, errors and predictions of each split, (splits, 3) float64 on the device.

        Nothing here waits for the device: a path is queued as a whole and read once.
        """
        if self.bn == "reestimate":
            self._reestimate()
        if self.bn == "batch":
            for m in self._norms():
                m.train()
        out = torch.zeros(len(self.splits), 3, dtype=torch.float64, device=self.device)
        for row, split in zip(out, self.splits.values(), strict=True):
            for x, y in self.batches(split):
                part, errors, n = self.score(self.module(x), y)
                row[0] += part
                row[1] += errors
                row[2] += n
        return out

    def _read(self, sums: Sequence[torch.Tensor]) -> list[dict[str, Measure]]:
        """Means of what :meth:`_sums` found, in one transfer."""
        out = []
        for point in torch.stack(list(sums)).tolist() if sums else []:
            found = {}
            for name, (loss, wrong, count) in zip(self.splits, point, strict=True):
                mean = loss / count
                # A loss that overflowed is no number; as NaN, max() would quietly pass over it.
                found[name] = Measure(math.inf if math.isnan(mean) else mean, 100 * wrong / count)
            out.append(found)
        return out

    def at(self, theta: Theta) -> dict[str, Measure]:
        """Loss and error of ``theta``, on every split."""
        self.load(theta)
        return self.here()

    def walk(
        self,
        anchors: Sequence[Theta],
        weights: Iterable[Sequence[float]],
        *,
        names: Sequence[str] | None = None,
        rest: Theta | None = None,
        each: Callable[[], None] | None = None,
    ) -> list[dict[str, Measure]]:
        """Measure ``sum_i w_i anchors[i]`` for every ``w`` of ``weights``.

        Arguments:
            anchors: state dicts, each checked against the module.
            weights: rows of ``len(anchors)`` numbers that sum to one.
            names: entries that move (default: all floating-point entries of the layout).
            rest: where the other entries stay (default: at the first anchor).
            each: called after every point, such as to take what a score has kept of it.

        Raises:
            BadParameter: an anchor that is no finite point of this network's weight space.
        """
        anchors = [
            check_theta(self.module, theta, "ABCDEFGH"[number])
            for number, theta in enumerate(anchors)
        ]
        own = self._entries
        on_device = [{k: v.to(self.device, wide(v, own[k])) for k, v in t.items()} for t in anchors]
        moving = tuple(names) if names is not None else self.layout.floating
        self.load(rest if rest is not None else on_device[0])
        sums = []
        for row in weights:
            deadline.stop_if_passed()
            self.load(affine(on_device, row, moving))
            for m in self._norms():
                if m.running_var is not None:  # beyond the anchors of a plane it can fall below 0
                    m.running_var.clamp_(min=0)
            sums.append(self._sums())
            if each is not None:
                each()
        return self._read(sums)
