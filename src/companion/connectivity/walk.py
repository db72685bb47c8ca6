"""The one engine that walks weight space: combine networks, evaluate every point on every split.

Segments, planes, layer subsets and, later, random directions are all affine combinations of a few
anchor networks over a subset of entries; they differ only in anchors, weights and subset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from companion.connectivity import statistics
from companion.connectivity.batches import default_batch
from companion.core import deadline
from companion.core.effective import effective
from companion.core.errors import BadParameter, one_of, whole
from companion.core.losses import IGNORED, is_label
from companion.core.networks import HALF, at_least_single, private
from companion.core.numerics import exact_evaluation
from companion.core.theta import (
    Theta,
    affine,
    check_integers,
    check_is_theta,
    check_theta,
    layout,
    without_aliases,
)
from companion.data import Split, head_of

BN_MODES = ("interpolate", "reestimate", "batch")
"""What BatchNorm does at a point of the path: use the running statistics interpolated like weights;
use statistics re-estimated at that point on un-augmented training data (reset, cumulative average);
use the statistics of each evaluation batch. InstanceNorm that keeps running statistics has the same
modes; in ``batch`` it uses those of each example, as in training."""

BN_EXAMPLES = 2000
"""Training inputs that ``reestimate`` averages over at a point, unless told otherwise.

All 50,000 images of CIFAR-10 at every point cost more than the training of a small network. For
ResNets on CIFAR-10 the first 2,000 give the same barriers to 0.2 points and 0.003 nats, 5,000 to
0.05 points (measured once, our chapter 1)."""

Scored = tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]
"""Summed loss in nats, number of errors, number of predictions."""

Score = Callable[[torch.Tensor, torch.Tensor], Scored]
"""(outputs, targets) -> (summed loss in nats, number of errors, number of predictions)."""

_PROBE = 8  # examples on which two networks' whole numbers are compared


def predictions(
    outputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every prediction its cross-entropy (nats), whether it is wrong, and whether it counts.

    Arguments:
        outputs: logits (N, K); of a text (N, L, K) or (N * L, K): every position is a prediction.
        targets: class indices (N,) or (N, L). Those of -100 do not count. Outputs that are not
            finite, so that there is no loss, are wrong, whatever their largest is said to be.

    Returns:
        float64, boolean and boolean, shape (N,) or (N * L,) each.

    Raises:
        BadParameter: a target that the outputs have no place for; other shapes.
    """
    flat = outputs.ndim == 2 and len(outputs) == targets.numel()  # places of all windows in a row
    if outputs.ndim < 2 or (outputs.shape[:-1] != targets.shape and not flat):
        want = ", ".join([*map(str, targets.shape), "classes"])
        raise BadParameter(
            f"labels: for labels of shape {tuple(targets.shape)} logits ({want}) are needed, and "
            f"the network puts out {tuple(outputs.shape)}."
        )
    outputs, targets = outputs.flatten(0, -2), targets.flatten()
    exact = outputs if outputs.dtype == torch.float64 else outputs.float()
    try:
        losses = F.cross_entropy(exact, targets, reduction="none", ignore_index=IGNORED).double()
    except IndexError as e:
        raise BadParameter(
            f"labels: {e} The network puts out {outputs.shape[-1]} values, for labels from 0 to "
            f"{outputs.shape[-1] - 1}; {IGNORED} is left out."
        ) from e
    wrong = (outputs.argmax(1) != targets) | ~losses.isfinite()
    labelled = is_label(targets)
    return losses, wrong & labelled, labelled


def classification(outputs: torch.Tensor, targets: torch.Tensor) -> Scored:
    """Cross-entropy and top-1 errors of :func:`predictions`, summed."""
    losses, wrong, labelled = predictions(outputs, targets)
    return losses.sum(), wrong.sum(), labelled.sum()


def sizes_of(splits: Mapping[str, Split]) -> dict[str, int]:
    """Split -> examples with a label, or of a text windows with one."""
    return {n: int(is_label(s.y).view(len(s), -1).any(1).sum()) for n, s in splits.items()}


def _precision(given: nn.Module, own: nn.Module) -> Iterator[str]:
    """A note if the copy that is measured has another precision than the network given."""
    kinds = {
        (str(a.dtype).removeprefix("torch."), str(b.dtype).removeprefix("torch."))
        for a, b in zip(given.parameters(), own.parameters(), strict=True)
        if a.dtype != b.dtype
    }
    for have, want in sorted(kinds):
        yield f"weights in {have} are measured in {want}"


@torch.no_grad()
def _is_refused(module: nn.Module, example: torch.Tensor) -> bool:
    """Whether a network in float64 does not take an example in float32."""
    kinds = {p.dtype for p in module.parameters()}
    if torch.float64 not in kinds or example.dtype != torch.float32:
        return False
    try:
        module(example)
    except RuntimeError:
        return True
    return False


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


def has_batchnorm(module: nn.Module) -> bool:
    """True if the network keeps running statistics, so that a BatchNorm mode has to be named.

    InstanceNorm may keep them, too.
    """
    return bool(statistics.running(module))


class Walker:
    """Evaluates points of weight space on data that stays on the device.

    A point is a set of weights that layers compute with: where they compute them from others first
    (weight norm, pruning masks and other parametrizations), :attr:`module` and :attr:`layout` are
    those of the network of effective weights (:mod:`companion.core.effective`). Half precision is
    measured in float32.

    Arguments:
        module: the architecture; copied, never changed.
        splits: name -> data, e.g. ``{"train": …, "test": …}``, on the device to compute on.
        bn: one of :data:`BN_MODES`; ``none`` is what a network without running statistics has,
            ``batch`` one whose BatchNorm keeps none.
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
        own = private(module, example, narrow=False)
        if _is_refused(own, example):  # as its weights are of another precision, perhaps
            own = private(module, example)
        self._space = effective(own)
        self.module = self._space.module.requires_grad_(False)
        self.layout = layout(self.module)
        self.notes = (*_precision(module, own), *self._space.notes)
        """What was done to the networks before they were measured, for the user."""
        anew = "batch" if statistics.of_each_batch(self.module) else "none"
        self.bn = bn if has_batchnorm(self.module) else anew
        average = bn_data if bn_data is not None else self.splits.get("train")
        if self.bn == "reestimate" and average is None:
            raise BadParameter(
                "a network with BatchNorm is measured in all three modes, and re-estimating its "
                "statistics needs bn_data=, or a split called 'train'."
            )
        self.batch = batch or default_batch(self.module, device, self.bn, example)
        self._average: Collection[torch.Tensor] = ()
        self._averaged = 0
        if self.bn == "reestimate" and average is not None:
            chosen = head_of(average.x, bn_examples)
            self._average, self._averaged = self._cut(chosen), len(chosen)
        self.score = score
        self.device = device
        self._entries = {
            k: v for k, v in self.module.state_dict().items() if isinstance(v, torch.Tensor)
        }

    @property
    def apart(self) -> int | None:
        """Examples a batch, if some BatchNorm keeps no statistics and normalises each by itself."""
        return self.batch if statistics.of_each_batch(self.module) else None

    @property
    def each_batch(self) -> bool:
        """Whether the size of a batch is a part of what is measured."""
        return self.bn == "batch" or self.apart is not None

    def enter(self, theta: Theta, name: str) -> Theta:
        """A state dict of the given architecture as a point of the space that is walked.

        Arguments:
            name: what messages call the network.

        Raises:
            BadParameter: it is no finite point of this network's weight space.
        """
        check_is_theta(theta, name)
        found = self._space.enter(check_theta(self._space.of(theta), theta, name))
        if any(v.dtype in HALF for v in found.values()):
            found = {n: at_least_single(v) for n, v in found.items()}
        return found

    def load(self, theta: Theta) -> None:
        """Put a (partial) state dict into the private copy of the network.

        Of a tied tensor with both its names, the first name's value counts.
        """
        for name, value in without_aliases(theta, self.layout.ties).items():
            self._entries[name].copy_(value)

    @property
    def bn_examples(self) -> int | None:
        """Inputs behind the re-estimated statistics at a point; None in the other modes."""
        return self._averaged or None

    def _cut(self, values: torch.Tensor) -> Collection[torch.Tensor]:
        # Of equal size, give or take one: BatchNorm averages batches, and refuses a batch of one.
        return values.tensor_split(-(-len(values) // self.batch))

    def batches(self, split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets, as they go through the network."""
        return zip(self._cut(split.x), self._cut(split.y), strict=True)

    def _reestimate(self) -> None:
        with statistics.cumulative(statistics.running(self.module)):
            for x in self._average:
                self.module(x)

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
            for m in statistics.running(self.module):
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
                if not count:
                    raise BadParameter(
                        f"split {name!r}: no example has a label to measure by; all are {IGNORED}."
                    )
                mean = loss / count
                # A loss that overflowed is no number; as NaN, max() would quietly pass over it.
                found[name] = Measure(math.inf if math.isnan(mean) else mean, 100 * wrong / count)
            out.append(found)
        return out

    def at(self, theta: Theta) -> dict[str, Measure]:
        """Loss and error of ``theta``, on every split."""
        self.load(self._space.enter(theta))
        return self.here()

    def check_line(self, anchors: Sequence[Theta]) -> None:
        """Refuse networks that differ in whole numbers they compute by: nothing lies between.

        Arguments:
            anchors: of :meth:`enter`, on the device.

        Raises:
            BadParameter: the message names the entries.
        """
        check_integers(anchors, self.layout, self._few)

    @exact_evaluation()
    @torch.no_grad()
    def _few(self, theta: Theta) -> torch.Tensor:
        """Loss and errors of a network on the first few examples."""
        self.load(theta)
        x, y = next(self.batches(next(iter(self.splits.values())).head(_PROBE)))
        loss, wrong, _ = self.score(self.module(x), y)
        return torch.stack([loss.double(), wrong.double()])

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
            BadParameter: an anchor that is no finite point of this network's weight space; whole
                numbers that differ between anchors and matter.
        """
        entered = [self.enter(t, "ABCDEFGH"[number]) for number, t in enumerate(anchors)]
        on_device = [{k: v.to(self.device) for k, v in t.items()} for t in entered]
        self.check_line(on_device)
        moving = tuple(names) if names is not None else self.layout.floating
        self.load(on_device[0] if rest is None else self.enter(rest, "at rest"))
        sums = []
        for row in weights:
            deadline.stop_if_passed()
            self.load(affine(on_device, row, moving))
            for m in statistics.running(self.module):
                if m.running_var is not None:  # beyond the anchors of a plane it can fall below 0
                    m.running_var.clamp_(min=0)
            sums.append(self._sums())
            if each is not None:
                each()
        return self._read(sums)
