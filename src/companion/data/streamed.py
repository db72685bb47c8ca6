"""Pictures that stay on the disk: decoded when a batch of them is asked for.

ImageNet as normalised floats is 770 GB. What walks along a line, matches activations or repairs
statistics goes through a split in order, one batch after the other, so the batches may be decoded
on the way: :class:`Pixels` stands where a split has its tensor ``x``, and any index of it is an
ordinary tensor. The next batch is decoded while the network computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from companion.data.dataset import Split, standardise

_CPU = torch.device("cpu")
_THREADS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class Pixels:
    """Rows of pictures on the disk, read as a tensor (N, C, H, W) float32 is.

    ``pixels[2:5]``, ``pixels[rows]``, ``pixels.tensor_split(n)`` and ``pixels.split(n)`` decode and
    normalise; ``shape``, ``dtype``, ``device`` and ``to`` are those of the tensor it stands for.

    Arguments:
        read: the number of a picture -> its pixels, (H, W) or (H, W, 3) uint8. Threads call it.
        rows: (N,) int64, which pictures.
        shape: (N, C, H, W).
        mean, std: C numbers each, in units of white = 1.
        device: where the batches go.
    """

    read: Callable[[int], NDArray[np.uint8]]
    rows: NDArray[np.int64]
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device = _CPU

    dtype = torch.float32

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, axis: int) -> int:
        return self.shape[axis]

    def element_size(self) -> int:
        return 4

    def is_floating_point(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: str | torch.device) -> Pixels:
        """The same pictures, with batches on ``device``."""
        device = torch.device(device)
        return self if device == self.device else replace(self, device=device)

    def __getitem__(self, index: Any) -> Tensor:
        """The pictures of a slice, of a tensor of rows, or one of them."""
        chosen = self.rows[index.cpu().numpy() if isinstance(index, Tensor) else index]
        one = np.ndim(chosen) == 0
        with ThreadPoolExecutor(_THREADS) as pool:
            found = self._decoded(np.atleast_1d(chosen), pool)
        return found[0] if one else found

    def tensor_split(self, parts: int) -> Parts:
        """As of a tensor; each part is decoded when its turn comes."""
        return Parts(self, np.array_split(self.rows, parts))

    def split(self, size: int) -> Parts:
        """As of a tensor; each part is decoded when its turn comes."""
        return Parts(self, [self.rows[i : i + size] for i in range(0, len(self), size)])

    def stream(self, parts: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        """The pictures of each part; the next are decoded meanwhile."""
        with ThreadPoolExecutor(_THREADS) as pool, ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._decoded, parts[0], pool)
            for following in (*parts[1:], None):
                found = coming.result()
                if following is not None:
                    coming = ahead.submit(self._decoded, following, pool)
                yield found

    def _decoded(self, rows: NDArray[np.int64], pool: ThreadPoolExecutor) -> Tensor:
        out = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        for place, image in zip(out, pool.map(self.read, rows.tolist()), strict=True):
            place[:] = image if image.ndim == 2 else image.transpose(2, 0, 1)
        return standardise(out, 255, self.mean, self.std).to(self.device)


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts of :class:`Pixels`, decoded anew by everybody who goes through them."""

    pixels: Pixels
    rows: Sequence[NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        return self.pixels.stream(self.rows)


def is_streamed(x: Any) -> bool:
    """Whether a split's ``x`` stays on the disk."""
    return isinstance(x, Pixels)


def in_memory(split: Split, n: int) -> Split:
    """:meth:`Split.head`, decoded once and kept."""
    few = split.head(n)
    return Split(few.x[:], few.y)


def rows_of(x: Any, rows: Tensor) -> Tensor:
    """``x[rows]``, without reading pictures that stay on the disk."""
    if isinstance(x, Pixels):
        own = x.rows[rows.cpu().numpy()]
        return as_tensor(replace(x, rows=own, shape=(len(own), *x.shape[1:])))
    found: Tensor = x[rows]
    return found


def as_tensor(pixels: Pixels) -> Tensor:
    """For types: what a split's ``x`` may be, too."""
    return cast("Tensor", pixels)
