"""Keyed randomness: every random choice of a run is a pure function of a key.

A :class:`Key` is a path of labels, ``Key("order", 3).fold("epoch", 7)``. It is hashed with SHA-256
into the 128-bit key of a Philox counter-based generator, so neighbouring seeds share nothing (the
trap of ``seed + epoch``: seed 1 at epoch 2 is seed 2 at epoch 1), nothing depends on how often a
generator was used before, and a run resumed at step k draws what it would have drawn undisturbed.

Only raw 64-bit words of Philox are used, whose stream NumPy guarantees; permutations sort them.
Source: our chapter 1 ("SGD noise is a value").
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Key:
    """A point in the tree of randomness. Equal paths give equal bits on every machine."""

    path: tuple[str | int, ...]

    def __init__(self, *labels: str | int):
        object.__setattr__(self, "path", tuple(labels))

    def fold(self, *labels: str | int) -> Key:
        """The key one or more labels further down; independent of this key and of its siblings."""
        return Key(*self.path, *labels)

    def digest(self) -> bytes:
        """32 bytes that identify the path. Labels are typed and length-prefixed: 1 is not "1"."""
        h = hashlib.sha256()
        for label in self.path:
            word = f"{type(label).__name__}:{label}".encode()
            h.update(len(word).to_bytes(4, "little") + word)
        return h.digest()

    def words(self, n: int) -> NDArray[np.uint64]:
        """``n`` uniform 64-bit words, shape (n,)."""
        key = np.frombuffer(self.digest()[:16], dtype=np.uint64)
        return np.random.Philox(key=key).random_raw(n)

    def permutation(self, n: int) -> torch.Tensor:
        """A uniform permutation of ``range(n)``, int64, shape (n,), on the CPU."""
        return torch.from_numpy(np.argsort(self.words(n), kind="stable"))

    def integers(self, n: int, high: int) -> torch.Tensor:
        """``n`` integers in ``[0, high)``, int64, shape (n,). Bias below ``high / 2**64``."""
        return torch.from_numpy((self.words(n) % np.uint64(high)).astype(np.int64))

    def seed(self) -> int:
        """A 63-bit seed for generators that are not ours (torch's CPU one uses 32 bits of it)."""
        return int.from_bytes(self.digest()[16:24], "little") >> 1

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Inside, torch's CPU generator starts from this key; outside, it is as it was before."""
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that seeds every GPU too, and nobody would set those back.
            torch.default_generator.manual_seed(self.seed())
            yield

    def generator(self) -> torch.Generator:
        """A fresh CPU generator that starts from this key."""
        return torch.Generator().manual_seed(self.seed())
