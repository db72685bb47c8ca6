"""One measurement, stored as one entry of the run store: the protocol, and the one way to run it.

A measurement is a frozen dataclass that knows what determines its value, what has to be trained
first, and how it is measured. Its class registers itself by its kind, so that ``companion runs``
and the budget know it without a list of their own. ::

    values = run([PairBarrier(pair, Evaluation()) for pair in pairs], label="barriers")

What the store has is read, and its networks may be gone; the rest is trained for, and measured.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypedDict

import torch

from companion import data as datasets
from companion import experiments
from companion.core import closing, codec
from companion.core.errors import CorruptEntry, StoreUnwritable
from companion.core.pool import run_all
from companion.core.runs import Entry, Store
from companion.training import Job, Recipe, Run, train

log = logging.getLogger("companion")

Json: TypeAlias = dict[str, Any]


class Where(TypedDict, total=False):
    """Keywords of everything that measures; defaults and meaning as those of :func:`run`."""

    store: Store | None
    device: str
    workers: int


EVALUATION = 1
"""Semantics of :class:`companion.experiments.pairs.Evaluation`, whose identity is part of some
measurements' own: raised by hand when lines between the same networks would give other numbers."""

_kinds: dict[str, type[Measurement]] = {}


@dataclass(frozen=True)
class Measurement(ABC):
    """What is measured, as a picklable value. A subclass with a ``KIND`` is known to the store.

    Class attributes:
        KIND: of its entries, the ``kind`` of their identity.
        SEMANTICS: raised by hand when the same networks would give other numbers. None: the
            identity says nothing but the semantics of its ``evaluation``.
        FILE: name of the value inside of an entry.
    """

    KIND: ClassVar[str]
    SEMANTICS: ClassVar[int | None] = 1
    FILE: ClassVar[str] = "value.json"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _kinds[cls.KIND] = cls

    @abstractmethod
    def identity(self, device: str) -> Json:
        """Everything that determines the value, without kind and semantics, JSON-able."""

    @abstractmethod
    def jobs(self) -> list[Job]:
        """What has to be trained first."""

    @abstractmethod
    def measure(self, store: Store, device: str) -> object:
        """The value: whatever the codec writes as a JSON object. Its entry is locked meanwhile."""

    @staticmethod
    @abstractmethod
    def describe(identity: Mapping[str, Any]) -> str:
        """One line for ``companion runs list``."""

    @property
    def recipe(self) -> Recipe:
        """The recipe under which a budget counts it."""
        return self.jobs()[0].run.recipe

    @property
    def trains(self) -> tuple[int, ...]:
        """Steps of each network that measuring itself trains, for a budget."""
        return ()

    @property
    def points(self) -> int:
        """Networks evaluated on all splits, as far as that is known beforehand, for a budget."""
        return 0

    def entry(self, store: Store, device: str) -> Entry:
        """The store's entry."""
        own = {} if self.SEMANTICS is None else {"semantics": self.SEMANTICS}
        return store.entry({"kind": self.KIND, **own, **self.identity(device)})

    def file_of(self, value: Json) -> str:
        """The file that keeps ``value``; what is kept elsewhere than in FILE is measured again."""
        return self.FILE

    @classmethod
    def is_current(cls, identity: Mapping[str, Any]) -> bool:
        """Whether this version of the code would still ask for an entry of this kind."""
        evaluation = identity.get("evaluation", {"semantics": EVALUATION})
        return (identity.get("semantics"), evaluation.get("semantics")) == (
            cls.SEMANTICS,
            EVALUATION,
        )


def kinds() -> dict[str, type[Measurement]]:
    """Kind -> class, of every measurement that the modules of this folder define."""
    for module in pkgutil.iter_modules(experiments.__path__, f"{experiments.__name__}."):
        importlib.import_module(module.name)
    return dict(sorted(_kinds.items()))


def key_of(run: Run, device: str) -> str:
    """The store's key of a run."""
    data = datasets.load(run.recipe.data, device)
    return run.key(data.fingerprint, torch.device(device).type)


def ends(identity: Mapping[str, Any]) -> str:
    """The two networks of an identity, in words."""
    return f"{identity['a'][:12]} × {identity['b'][:12]} at step {identity['step']}"


def stored_value(entry: Entry, name: str) -> Json | None:
    """A stored value; None without one. One that is corrupt is logged and its entry discarded."""
    try:
        value = dict(entry.read_json(name))
    except KeyError:  # not stored, or just discarded by another process
        return None
    except CorruptEntry as e:
        log.warning("%s; it is discarded and measured again", e)
        entry.discard()
        return None
    with contextlib.suppress(StoreUnwritable):
        entry.mend()
    return value


def stored(tasks: Sequence[Measurement], store: Store, device: str) -> list[Json | None]:
    """What the store has; None for the rest, which is noted while a recording is closed."""
    entries = [task.entry(store, device) for task in tasks]
    values = [stored_value(entry, task.FILE) for task, entry in zip(tasks, entries, strict=True)]
    closing.lacks([entry for entry, value in zip(entries, values, strict=True) if value is None])
    return values


def run(
    tasks: Sequence[Measurement],
    *,
    store: Store | None = None,
    device: str = "cpu",
    workers: int = 0,
    label: str = "measurements",
) -> list[Json]:
    """The value of every task: read if it is stored, else trained for and measured.

    Arguments:
        tasks: of any kinds; equal ones are measured once.
        store, device, workers: see :mod:`companion.training`.
        label: shown beside the progress bar.

    Raises:
        NotMeasured: something is missing while a recording is closed.
        as :func:`companion.training.train`.
    """
    store, where = store or Store(), str(datasets.resolve_device(device))
    values = stored(tasks, store, where)  # without a lock: a read-only store serves what it has
    keys = [task.entry(store, where).key for task in tasks]
    missing = {k: t for k, t, v in zip(keys, tasks, values, strict=True) if v is None}
    if missing:
        closing.refuse_work(what=f"{len(missing)} of {len(tasks)} {label}")
        jobs = [job for task in missing.values() for job in task.jobs()]
        train(jobs, store=store, device=where, workers=workers)
    items = [(task, store, where) for task in missing.values()]
    made = run_all(_make, items, workers=workers, device=where, label=label, named=_named)
    new = dict(zip(missing, made, strict=True))
    return [new[k] if v is None else v for k, v in zip(keys, values, strict=True)]


def _named(item: tuple[Measurement, Store, str]) -> str:
    task = item[0]
    return task.describe(task.identity(item[2]))


def _make(item: tuple[Measurement, Store, str]) -> Json:
    """Measure and store one task, unless another process did so meanwhile."""
    task, store, device = item
    entry = task.entry(store, device)
    with entry.lock():
        if (value := stored_value(entry, task.FILE)) is None:
            value = codec.to_json(task.measure(store, device))
            entry.write_json(task.file_of(value), value)
        return dict(value)
