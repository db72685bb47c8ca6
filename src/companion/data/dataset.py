"""A dataset is two splits of tensors on one device: no loader, no workers, no transforms.

All datasets of the book fit into memory, and a batch gathered from a tensor that is already on the
device costs microseconds (the idea of airbench, Jordan 2024). Pixels become normalised floats
(:func:`standardise`), floats and labels a :class:`Split`; a text becomes one stream of tokens, its
windows a :class:`Split` (:meth:`Split.windows`); two splits are a :class:`Dataset`.
Source: our chapter 1 ("The data").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from companion.core.errors import BadParameter
from companion.core.losses import IGNORED, is_label
from companion.core.seeds import Key

Kind = Literal["images", "text"]


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and labels, or windows of tokens and the tokens that follow, on one device.

    Shared by all who loaded it: never written in place.

    Arguments:
        x: (N, …), what forward takes: images (N, C, H, W) float32, normalised per channel; rows of
            a table (N, F), signals (N, C, T), volumes (N, C, D, H, W); or (N, L) int64, tokens.
        y: (N,) int64, classes ``0 … classes - 1``; or of tokens (N, L) int64: ``y[i, t]`` is the
            token behind ``x[i, t]``, so ``y`` is ``x`` shifted by one.
        stream: (T,) int64, the whole text that ``x`` and ``y`` are views of, if they are: only
            :meth:`windows` sets it.

    Raises:
        BadParameter: shapes, types or devices of ``x`` and ``y`` do not fit together.
    """

    x: Tensor
    y: Tensor
    stream: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        tokens = self.x.ndim == 2 and self.x.dtype == torch.int64
        if not tokens and (self.x.ndim < 2 or self.x.dtype not in _REAL):
            raise BadParameter(
                "Split.x: (N, …) float32 (images, rows of a table, signals, …) or (N, L) int64 "
                f"(tokens) expected, got {tuple(self.x.shape)} {self.x.dtype}."
            )
        expected = [tuple(self.x.shape[:1]), tuple(self.x.shape)][: 1 + tokens]
        if tuple(self.y.shape) not in expected or self.y.dtype != torch.int64:
            raise BadParameter(
                f"Split.y: {' or '.join(map(str, expected))} int64 expected, "
                f"got {tuple(self.y.shape)} {self.y.dtype}."
            )
        if self.x.device != self.y.device:
            raise BadParameter(f"Split: x is on {self.x.device}, y on {self.y.device}.")

    @classmethod
    def windows(cls, stream: Tensor, window: int) -> Split:
        """The ``N = (T - 1) // window`` windows of a text, side by side, and the tokens behind.

        Nothing is copied: ``x`` and ``y`` are views of ``stream``, ``y`` one token further on. What
        is left at the end (less than a window) is in ``stream`` only.

        Arguments:
            stream: (T,) int64, contiguous.
            window: L, tokens in one window.

        Raises:
            BadParameter: another shape or type, or not one window and a token behind it.
        """
        if stream.ndim != 1 or stream.dtype != torch.int64:
            raise BadParameter(
                "Split.windows: a stream of tokens is (T,) int64, "
                f"got {tuple(stream.shape)} {stream.dtype}."
            )
        if window < 1:
            raise BadParameter(f"Split.windows: window = {window}; at least 1 token is needed.")
        n = (len(stream) - 1) // window
        if n < 1:
            raise BadParameter(
                f"Split.windows: a text of {len(stream)} tokens has no window of {window} and a "
                f"token behind it. Allowed here: windows of 1 to {len(stream) - 1}."
            )
        x, y = (stream[i : i + n * window].view(n, window) for i in (0, 1))
        return cls(x, y, stream=stream)

    def __len__(self) -> int:
        return len(self.x)

    @classmethod
    def of(cls, data: Any) -> Split:
        """A split of what people have.

        Arguments:
            data: a split; a pair (x, y); or a ``DataLoader``, or anything else that yields batches
                (x, y), as pairs or as mappings with ``labels``. It is read once, in its order.

        Raises:
            BadParameter: it is none of these, or x and y do not fit together.
        """
        if isinstance(data, Split):
            return data
        if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor):
            return cls(*data)
        try:
            batches = [_pair(batch) for batch in data]
        except TypeError:
            raise BadParameter(
                "data: a split, a pair (x, y) or a DataLoader expected, got a "
                f"{type(data).__name__}."
            ) from None
        if not batches:
            raise BadParameter("data: the loader yields no batches.")
        return cls(*(torch.cat(part) for part in zip(*batches, strict=True)))

    @property
    def kind(self) -> Kind:
        """``"text"`` where each token is to be predicted; else ``"images"``, whatever they are."""
        return "images" if self.y.ndim == 1 else "text"

    @property
    def window(self) -> int | None:
        """L, the tokens in one window; None for images."""
        return int(self.x.shape[1]) if self.kind == "text" else None

    @property
    def tokens(self) -> int:
        """N · L, the tokens to predict; 0 for images."""
        return self.y.numel() if self.kind == "text" else 0

    def to(self, device: str | torch.device) -> Split:
        """The same split on ``device``; itself if it is there already. A stream moves once."""
        if self.stream is not None and self.window is not None:
            stream = self.stream.to(device)
            return self if stream is self.stream else Split.windows(stream, self.window)
        x, y = self.x.to(device), self.y.to(device)
        return self if x is self.x and y is self.y else Split(x, y)

    def labelled(self) -> Split:
        """The examples that have a label; itself if all have one.

        Labels of -100 are left out of every mean; an example, or a window, without any other would
        make a batch of its own kind that has no mean.

        Raises:
            BadParameter: none has one.
        """
        has = is_label(self.y)
        has = has.any(1) if has.ndim > 1 else has
        if bool(has.all()):
            return self
        if not bool(has.any()):
            raise BadParameter(f"data: no example has a label; all are {IGNORED}.")
        return Split(self.x[has], self.y[has])

    def head(self, n: int) -> Split:
        """The first ``n`` samples of a fixed keyed shuffle, so classes are mixed in any file order.

        Smaller heads are beginnings of larger ones, on every machine. ``n >= len(self)`` returns
        the split itself, in its own order. Windows of a text are copied: a head has no stream.

        Raises:
            BadParameter: ``n`` is not positive.
        """
        if n < 1:
            raise BadParameter(f"head: n = {n}, at least 1 sample is needed.")
        if n >= len(self):
            return self
        return Split(head_of(self.x, n), head_of(self.y, n))


_REAL = (torch.float32, torch.float64)
_LABELS = ("labels", "label", "y", "target", "targets")


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Examples and labels of one batch of a loader."""
    if isinstance(batch, Mapping):
        labels = next((batch[k] for k in _LABELS if k in batch), None)
        rest = [v for k, v in batch.items() if isinstance(v, Tensor) and k not in _LABELS]
        batch = (*rest, labels) if labels is not None else ()
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise BadParameter(
            "data: a loader's batches must be pairs (x, y), or mappings of one tensor and labels; "
            "for networks of several inputs wrap the module in one that takes a single tensor."
        )
    x, y = (torch.as_tensor(v) for v in batch)
    return x, y.long() if not (y.is_floating_point() or y.is_complex()) else y


def head_of(values: Tensor, n: int | None) -> Tensor:
    """The rows of ``values`` that :meth:`Split.head` takes; None: all, the very tensor."""
    if n is None or n >= len(values):
        return values
    return values[Key("data", "head").permutation(len(values))[:n].to(values.device)]


@dataclass(frozen=True)
class TextCounts:
    """One text in four units. ``words`` are what white space separates; ``tokens`` all of them."""

    tokens: int
    bytes: int
    characters: int
    words: int

    @property
    def bytes_per_token(self) -> float:
        """Loss in nats per token, divided by this and by ln 2, is in bits per byte."""
        return self.bytes / self.tokens


@dataclass(frozen=True)
class TextFacts:
    """How a text became tokens.

    Arguments:
        tokenizer: ``"bpe"``, ``"gpt2"``, ``"bytes"``, or ``"own"`` of a file.
        vocabulary: its size. :attr:`Dataset.classes` is this, rounded up to a multiple of 64.
        train, test: both texts in tokens, bytes, characters and words.
        evaluated_on: which text ``test`` is, in words: ``"its validation text"``.
    """

    tokenizer: str
    vocabulary: int
    train: TextCounts
    test: TextCounts
    evaluated_on: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named dataset on one device.

    Arguments:
        name: what :func:`companion.data.load` was asked for; of a text, in canonical spelling.
        label: what it is, for figures and tables, never better than the truth: a lossy copy of
            CIFAR-10 is called one.
        train, test: the two :class:`Split` s.
        classes: number of classes; of a text, size of the vocabulary, rounded up.
        in_shape: (C, H, W) of one image; (L,) of a text: the tokens in one window.
        mean, std: per channel, in units of white = 1: ``x = (pixel - mean) / std``; () for a text.
        fingerprint: SHA-256 (hex) of what was read and of how it was split, resized and normalised,
            or tokenised (:func:`companion.data.sources.fingerprint`). Run keys contain it.
        class_names: one per class, or empty if nobody named them.
        text: how it was tokenised; None for images.
        domains: the domain of each train and of each test image, (N,) int64 each, on the CPU;
            None: the dataset has none.
        domain_names: one per domain.
    """

    name: str
    label: str
    train: Split
    test: Split
    classes: int
    in_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    class_names: tuple[str, ...] = ()
    text: TextFacts | None = None
    domains: tuple[Tensor, Tensor] | None = None
    domain_names: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """``"images"`` or ``"text"``."""
        return self.train.kind

    @property
    def black(self) -> Tensor:
        """(C, 1, 1) float32: the value of a black pixel after normalisation, on our device.

        Crops are padded with it. That is what torchvision's RandomCrop before Normalize shows the
        network; padding normalised images with 0 would show it the mean colour instead.

        Raises:
            BadParameter: this is a text.
        """
        if self.kind == "text":
            raise BadParameter(f"{self.name} is a text: it has no black pixel, and no crops.")
        pixel = np.zeros((1, len(self.mean), 1, 1), dtype=np.uint8)
        return standardise(pixel, 255, self.mean, self.std)[0].to(self.train.x.device)

    def to(self, device: str | torch.device) -> Dataset:
        """The same dataset on ``device``; itself if it is there already."""
        train, test = self.train.to(device), self.test.to(device)
        if train is self.train and test is self.test:
            return self
        return replace(self, train=train, test=test)


def standardise(
    pixels: NDArray[np.uint8], white: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """``(pixels / white - mean) / std`` per channel, on the CPU.

    The operations and their order are those of torchvision's ToTensor and Normalize: equal bits.
    A GPU may round divisions differently, which is why datasets are normalised before they move.

    Arguments:
        pixels: (N, C, H, W) uint8, may be a read-only memory map.
        white: the integer value of a white pixel (255; 16 in ``digits``).
        mean, std: C numbers each, in units of white = 1.

    Returns:
        (N, C, H, W) float32.
    """
    x = torch.empty(pixels.shape, dtype=torch.float32)
    np.copyto(x.numpy(), pixels)
    shift = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
    return x.div_(white).sub_(shift).div_(scale)


def channel_statistics(
    pixels: NDArray[np.uint8], white: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (population) per channel over all pixels, white = 1.

    Computed in exact integers up to the last division, so every machine gets the same numbers.
    A channel that never changes gets std 1: there is nothing to scale.

    Arguments:
        pixels: (N, C, H, W) uint8.
        white: the integer value of a white pixel.
    """
    counts = np.zeros((pixels.shape[1], 256), dtype=np.int64)
    for start in range(0, len(pixels), 1024):  # bincount makes int64 copies: keep them small
        for c in range(pixels.shape[1]):
            counts[c] += np.bincount(pixels[start : start + 1024, c].ravel(), minlength=256)
    # Python's integers: the sums of squares of a large dataset do not fit into 64 bits.
    n = [int(row.sum()) for row in counts]
    sums = [sum(int(k) * v for v, k in enumerate(row)) for row in counts]
    squares = [sum(int(k) * v * v for v, k in enumerate(row)) for row in counts]
    mean = tuple(s / (m * white) for m, s in zip(n, sums, strict=True))
    variance = [m * q - s * s for m, s, q in zip(n, sums, squares, strict=True)]
    std = tuple(math.sqrt(v) / (m * white) or 1.0 for m, v in zip(n, variance, strict=True))
    return mean, std


def stratified_split(
    y: NDArray[np.int64], n_test: int, key: Key
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows into train and test with the same share of every class.

    Class c gives ``n_c * n_test / N`` rows to the test split, rounded so that the sum is ``n_test``
    (largest remainders are rounded up, ties to the lower class), but at least one row and not all.
    Which rows: the first of the permutation of the class's rows by ``key.fold("class", c)``.

    Arguments:
        y: (N,) classes; each occurs at least twice.
        n_test: size of the test split. Classes with fewer than ``N / n_test`` rows can add to it.
        key: the split is a pure function of ``y``, ``n_test`` and this.

    Returns:
        Rows of train and of test, disjoint, each ascending, int64; together ``range(N)``.
    """
    classes, counts = np.unique(y, return_counts=True)
    quota, remainder = np.divmod(counts * n_test, len(y))
    largest = np.argsort(-remainder, kind="stable")[: n_test - int(quota.sum())]
    quota[largest] += 1
    quota = np.clip(quota, 1, counts - 1)
    test = np.zeros(len(y), dtype=bool)
    for c, n_c in zip(classes, quota, strict=True):
        rows = np.flatnonzero(y == c)
        order = key.fold("class", int(c)).permutation(len(rows)).numpy()
        test[rows[order[:n_c]]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)
