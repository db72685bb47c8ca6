"""Augmentation as a value: which flip and which shift a sample gets is a function of a key.

    augmenter = Augmenter(dataset.train, Augmentation.parse("flip+crop4"), dataset.black)
    draws = augmenter.draw(key, epoch)   # once an epoch, on the CPU: a flip and a shift per SAMPLE
    x = augmenter.batch(rows, draws)     # every step, on the device: one gather

Draws belong to samples, not to positions in a batch: sample 17 is augmented in the same way in
epoch 3 wherever the data order puts it. So order and augmentation are two noise sources that can be
held fixed one at a time; with one stream of random numbers for both they cannot. Source: our
chapter 1 ("SGD noise is a value"); the noise itself: Frankle et al. 2020, section 2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from companion.data.dataset import Split
from companion.errors import BadParameter
from companion.seeds import Key


@dataclass(frozen=True)
class Augmentation:
    """Random horizontal flips, and random crops of the image padded with black.

    Args:
        flip: mirror left-right with probability 1/2.
        pad: pixels of padding on each side; the crop is one of ``(2 pad + 1)**2``, all equally
            likely. 0: no crops.
    """

    flip: bool = False
    pad: int = 0

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise BadParameter(f"augmentation: padding of {self.pad} pixels; at least 0 is needed.")

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Read ``"none"``, ``"flip"``, ``"crop4"``, ``"flip+crop4"`` (any number of pixels).

        ``str()`` gives the canonical spelling back.

        Raises:
            BadParameter: the text is none of these.
        """
        flip, pad = False, 0
        for part in () if text == "none" else text.split("+"):
            if part == "flip" and not flip:
                flip = True
            elif (match := re.fullmatch(r"crop([1-9]\d*)", part)) and not pad:
                pad = int(match.group(1))
            else:
                raise BadParameter(
                    f"augmentation: {text!r} is not known. Allowed: none, flip, crop4, flip+crop4 "
                    "(the number is the padding in pixels, at least 1)."
                )
        return cls(flip, pad)

    def __str__(self) -> str:
        parts = ["flip"] * self.flip + [f"crop{self.pad}"] * (self.pad > 0)
        return "+".join(parts) or "none"


@dataclass(frozen=True, eq=False)
class Draws:
    """One epoch of randomness, indexed by sample: (n,) each, or None where nothing is drawn.

    Args:
        flip: bool, mirror the sample.
        top, left: int64 in ``0 … 2 pad``, the crop's corner in the padded image; ``pad``: centred.
    """

    flip: Tensor | None = None
    top: Tensor | None = None
    left: Tensor | None = None

    def of(self, rows: Tensor) -> Draws:
        """Those of the samples ``rows``, in that order and shape."""
        flip, top, left = (None if t is None else t[rows] for t in (self.flip, self.top, self.left))
        return Draws(flip, top, left)


def draw(augmentation: Augmentation, key: Key, epoch: int, n: int) -> Draws:
    """The flips and crops of ``n`` samples in one epoch, on the CPU, out of ``(key, epoch)``.

    Flips and the two offsets have their own keys: adding crops leaves the flips as they were.

    Args:
        augmentation: what to draw.
        key: the run's augmentation key.
        epoch: counts from 0.
        n: number of samples.
    """
    flip = top = left = None
    if augmentation.flip:
        top_bits = (key.fold("flip", epoch).words(n) >> np.uint64(63)).astype(bool)
        flip = torch.from_numpy(top_bits)
    if augmentation.pad:
        places = 2 * augmentation.pad + 1
        top = key.fold("top", epoch).integers(n, places)
        left = key.fold("left", epoch).integers(n, places)
    return Draws(flip, top, left)


class Augmenter:
    """Batches of augmented images, gathered on the device of the split.

    Args:
        split: N images; a copy padded by ``augmentation.pad`` is made once, on the same device.
        augmentation: what to draw.
        black: (C, 1, 1), the padding: :attr:`companion.data.Dataset.black`.

    Raises:
        BadParameter: the padding is as large as the image, so a crop could show nothing of it.
    """

    def __init__(self, split: Split, augmentation: Augmentation, black: Tensor):
        n, channels, height, width = split.x.shape
        pad = augmentation.pad
        if pad >= min(height, width):
            raise BadParameter(
                f"augmentation: crop{pad} on {height}x{width} images could show padding only. "
                f"Allowed here: crop1 to crop{min(height, width) - 1}."
            )
        self.augmentation = augmentation
        self._x = split.x
        if pad:
            shape = (n, channels, height + 2 * pad, width + 2 * pad)
            padded = black.to(split.x).expand(shape).clone()
            padded[:, :, pad:-pad, pad:-pad] = split.x
            # (N, C, 2p+1, 2p+1, H, W): all crops of all images, as strides into the padded copy.
            self._crops = padded.unfold(2, height, 1).unfold(3, width, 1)

    def draw(self, key: Key, epoch: int) -> Draws:
        """The flips and crops of all samples in one epoch: a pure function of ``(key, epoch)``.

        :func:`draw`, moved to the device, once an epoch, so no step waits for it.

        Args:
            key: the run's augmentation key.
            epoch: counts from 0.
        """
        device = self._x.device
        made = draw(self.augmentation, key, epoch, len(self._x))
        flip, top, left = (
            None if t is None else t.to(device) for t in (made.flip, made.top, made.left)
        )
        return Draws(flip, top, left)

    def batch(self, rows: Tensor, draws: Draws) -> Tensor:
        """The augmented images of ``rows``, shape (B, C, H, W), float32, a new tensor.

        Args:
            rows: (B,) int64 sample indices, on the split's device.
            draws: this epoch's, from :meth:`draw`.
        """
        return self.pick(rows, draws.of(rows))

    def pick(self, rows: Tensor, draws: Draws) -> Tensor:
        """As :meth:`batch`, but ``draws`` are of the rows: entry i belongs to ``rows[i]``."""
        if draws.top is not None and draws.left is not None:
            x = self._crops[rows, :, draws.top, draws.left]
        else:
            x = self._x[rows]
        if draws.flip is not None:
            # where, not a masked assignment: that would wait for the device to count the rows.
            x = torch.where(draws.flip[:, None, None, None], x.flip(3), x)
        return x
