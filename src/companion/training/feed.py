"""Data orders and augmentation draws of many replicas, an epoch ahead, made by background threads.

They are functions of (key, epoch), made on the CPU as for one run, so the same keys give the same
batches on every engine. While the device trains an epoch, threads make the next (sorting and
hashing release Python's lock); it reaches the device in one transfer that no step waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.data import Augmentation, Dataset
from companion.data.augmentation import Draws, draw_epoch
from companion.training.recipe import Run

_THREADS = 4


@dataclass(frozen=True)
class Epoch:
    """One epoch's batches: (steps an epoch, M, batch) each; draws are of the row at their place."""

    rows: Tensor
    draws: Draws

    def tensors(self) -> list[Tensor]:
        """Those there are: rows, then what :class:`Draws` holds, in its order."""
        found = (self.rows, *self.draws.tensors())
        return [t for t in found if t is not None]


class Feed:
    """``with Feed(runs, data) as feed: feed.epoch(e)`` for e, e + 1, …; CPU tensors.

    Arguments:
        runs: M runs of one recipe; the same run may stand there several times.
        data: its training split's size is N.
    """

    def __init__(self, runs: Sequence[Run], data: Dataset):
        self.runs = list(runs)
        self.recipe = runs[0].recipe
        self.augmentation = Augmentation.parse(self.recipe.augment)
        self.n, self.window = len(data.train), data.train.window
        self.per_epoch = self.n // self.recipe.batch
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="feed")
        self._coming: tuple[int, list[Future[Epoch]]] | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, run: Run, epoch: int) -> Epoch:
        used, batch = self.per_epoch * self.recipe.batch, self.recipe.batch
        rows = run.order_key().fold("epoch", epoch).permutation(self.n)[:used].view(-1, batch)
        made = draw_epoch(self.augmentation, run.augment_key(), epoch, self.n, self.window)
        return Epoch(rows, made.of(rows))

    def _start(self, epoch: int) -> list[Future[Epoch]]:
        made: dict[Run, Future[Epoch]] = {}
        for run in self.runs:
            if run not in made:
                made[run] = self._pool.submit(self._one, run, epoch)
        return [made[run] for run in self.runs]

    def epoch(self, epoch: int, *, ahead: bool = True) -> Epoch:
        """The batches of ``epoch``; those of the next are begun, unless ``ahead`` is False."""
        if self._coming is None or self._coming[0] != epoch:
            self._coming = (epoch, self._start(epoch))
        parts = [future.result() for future in self._coming[1]]
        self._coming = (epoch + 1, self._start(epoch + 1)) if ahead else None

        def together(tensors: Sequence[Tensor | None]) -> Tensor | None:
            there = [t for t in tensors if t is not None]
            return torch.stack(there, dim=1) if there else None

        rows = together([p.rows for p in parts])
        assert rows is not None
        draws = zip(*(p.draws.tensors() for p in parts), strict=True)
        return Epoch(rows, Draws(*(together(each) for each in draws)))
