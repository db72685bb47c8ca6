"""Augmentation as a value: which flip, crop or shift a sample gets is a function of a key.

Draws are made once an epoch, on the CPU, and belong to samples, not to positions in a batch: sample
17 is augmented in the same way in epoch 3 wherever the data order puts it. So order and
augmentation are two noise sources that can be held fixed one at a time; with one stream of random
numbers for both they cannot. Source: our chapter 1 ("SGD noise is a value"); the noise itself:
Frankle et al. 2020, section 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.data.dataset import Split


@dataclass(frozen=True)
class Augmentation:
    """Random horizontal flips and random crops of an image; random shifts of a window of text.

    Arguments:
        flip: mirror left-right with probability 1/2.
        pad: pixels of (black) padding on each side; the crop is one of ``(2 pad + 1)**2``, all
            equally likely. 0: no crops.
        shift: begin a window of L tokens 0 … L - 1 tokens later, all equally likely; behind the
            end of the text comes its beginning.
    """

    flip: bool = False
    pad: int = 0
    shift: bool = False

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise BadParameter(f"augmentation: padding of {self.pad} pixels; at least 0 is needed.")
        if self.shift and (self.flip or self.pad):
            raise BadParameter(
                "augmentation: shift is for text, flip and crop are for images; no data has both."
            )

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Read ``none``, ``flip``, ``crop4``, ``flip+crop4`` (any number of pixels), ``shift``.

        ``str()`` gives the canonical spelling back.

        Raises:
            BadParameter: the text is none of these.
        """
        if text == "shift":
            return cls(shift=True)
        flip, pad = False, 0
        for part in () if text == "none" else text.split("+"):
            if part == "flip" and not flip:
                flip = True
            elif (match := re.fullmatch(r"crop([1-9]\d*)", part)) and not pad:
                pad = int(match.group(1))
            else:
                raise BadParameter(
                    f"augmentation: {text!r} is not known. Allowed: none, flip, crop4, flip+crop4 "
                    "(the number is the padding in pixels, at least 1); for text none or shift."
                )
        return cls(flip, pad)

    def __str__(self) -> str:
        parts = ["flip"] * self.flip + [f"crop{self.pad}"] * (self.pad > 0)
        return "+".join(parts + ["shift"] * self.shift) or "none"

    def fits(self, in_shape: tuple[int, ...]) -> str | None:
        """Why examples of this shape, (C, H, W) or (L,), cannot be augmented so; None if they can.

        A crop by the image's whole size could show nothing of it.
        """
        if len(in_shape) == 1:
            images_only = self.flip or self.pad
            return "flip and crop are for images: a text takes shift" if images_only else None
        if self.shift:
            return "shift is for text: images take flip and crop"
        least = min(in_shape[1:])
        if self.pad >= least:
            return (
                f"crop{self.pad} on {in_shape[1]}x{in_shape[2]} images could show padding only. "
                f"Allowed here: crop1 to crop{least - 1}"
            )
        return None


@dataclass(frozen=True, eq=False)
class Draws:
    """One epoch of randomness, indexed by sample: (n,) each, or None where nothing is drawn.

    Arguments:
        flip: bool, mirror the sample.
        top, left: int64 in ``0 … 2 pad``, the crop's corner in the padded image; ``pad``: centred.
        shift: int64 in ``0 … L - 1``, how many tokens later the window begins.
    """

    flip: Tensor | None = None
    top: Tensor | None = None
    left: Tensor | None = None
    shift: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order of the fields."""
        return (self.flip, self.top, self.left, self.shift)

    def map(self, change: Callable[[Tensor], Tensor]) -> Draws:
        """``change`` of every tensor there is."""
        return Draws(*(None if t is None else change(t) for t in self.tensors()))

    def of(self, rows: Tensor) -> Draws:
        """Those of the samples ``rows``, in that order and shape."""
        return self.map(lambda t: t[rows])


def draw_epoch(
    augmentation: Augmentation, key: Key, epoch: int, n: int, window: int | None = None
) -> Draws:
    """The draws of ``n`` samples in one epoch, on the CPU, out of ``(key, epoch)``.

    Flips and the two offsets have their own keys: adding crops leaves the flips as they were.

    Arguments:
        augmentation: what to draw.
        key: the run's augmentation key.
        epoch: counts from 0.
        n: number of samples.
        window: L, tokens of a window, for a text.
    """
    flip = top = left = shift = None
    if augmentation.flip:
        top_bits = (key.fold("flip", epoch).words(n) >> np.uint64(63)).astype(bool)
        flip = torch.from_numpy(top_bits)
    if augmentation.pad:
        places = 2 * augmentation.pad + 1
        top = key.fold("top", epoch).integers(n, places)
        left = key.fold("left", epoch).integers(n, places)
    if augmentation.shift and window:
        shift = key.fold("shift", epoch).integers(n, window)
    return Draws(flip, top, left, shift)


class Augmenter:
    """Batches of augmented examples, gathered on the device of the split.

    Arguments:
        split: N images or windows of text; a copy of images padded by ``augmentation.pad`` is made
            once, on the same device.
        augmentation: what to draw.
        black: (C, 1, 1), the padding: :attr:`companion.data.Dataset.black`. None for text.

    Raises:
        BadParameter: the padding is as large as the image, so a crop could show nothing of it; an
            augmentation of images for text, or the other way round; windows to shift that are no
            views of one text (:meth:`companion.data.Split.windows`).
    """

    def __init__(self, split: Split, augmentation: Augmentation, black: Tensor | None = None):
        if why := augmentation.fits(tuple(split.x.shape[1:])):
            raise BadParameter(f"augmentation: {why}.")
        self.augmentation = augmentation
        self._split, self._x = split, split.x
        if augmentation.shift:
            if split.stream is None:
                raise BadParameter(
                    "augmentation: shift needs the text around each window, but this split holds "
                    "copies of windows. Make it with Split.windows, and do not take a head of it."
                )
            self._stream = split.stream
            self._reach = torch.arange(1 + self._x.shape[1], device=self._x.device)
        if pad := augmentation.pad:
            n, channels, height, width = self._x.shape
            shape = (n, channels, height + 2 * pad, width + 2 * pad)
            if black is None:
                raise BadParameter("augmentation: crops need the value of a black pixel.")
            padded = black.to(split.x).expand(shape).clone()
            padded[:, :, pad:-pad, pad:-pad] = split.x
            # (N, C, 2p+1, 2p+1, H, W): all crops of all images, as strides into the padded copy.
            self._crops = padded.unfold(2, height, 1).unfold(3, width, 1)

    def draw(self, key: Key, epoch: int) -> Draws:
        """The draws of all samples in one epoch: a pure function of ``(key, epoch)``.

        :func:`draw_epoch`, moved to the device, once an epoch, so no step waits for it.

        Arguments:
            key: the run's augmentation key.
            epoch: counts from 0.
        """
        made = draw_epoch(self.augmentation, key, epoch, len(self._x), self._split.window)
        return made.map(lambda t: t.to(self._x.device))

    def examples(self, rows: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The augmented examples of ``rows`` and their targets.

        Arguments:
            rows: (B,) int64 sample indices, on the split's device.
            draws: this epoch's, from :meth:`draw`.

        Returns:
            images (B, C, H, W) float32 and classes (B,); or tokens (B, L) int64 and the tokens
            behind them (B, L). New tensors.
        """
        return self.pick_examples(rows, draws.of(rows))

    def pick_examples(self, rows: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """As :meth:`examples`, but ``draws`` are of the rows: entry i belongs to ``rows[i]``."""
        if draws.shift is not None:  # windows that begin later; the text is a circle
            begin = rows * self._x.shape[1] + draws.shift
            found = self._stream[(begin[:, None] + self._reach) % len(self._stream)]
            return found[:, :-1], found[:, 1:]
        if draws.top is not None and draws.left is not None:
            x = self._crops[rows, :, draws.top, draws.left]
        else:
            x = self._x[rows]
        if draws.flip is not None:
            # where, not a masked assignment: that would wait for the device to count the rows.
            x = torch.where(draws.flip[:, None, None, None], x.flip(3), x)
        return x, self._split.y[rows]
