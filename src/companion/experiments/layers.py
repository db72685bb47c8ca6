"""Layer barriers between stored runs: measured once, many pairs at a time, kept in the store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from companion import data as datasets
from companion.core import closing, codec
from companion.core.errors import CorruptEntry
from companion.core.pool import run_all
from companion.core.runs import Entry, Store
from companion.experiments.pairs import Evaluation, Pair, averaging, normal_error
from companion.layerwise.sweep import sweep
from companion.layerwise.values import LayerBarriers, Sweep
from companion.training import build, entry_of, load_weights, train

log = logging.getLogger("companion")

SEMANTICS = 1
"""Raised by hand when a sweep of the same networks would give other numbers."""

_FILE = "layers.json"
_Item = tuple[Pair, Sweep, Store, str]


def sweep_pairs(
    pairs: Sequence[Pair],
    settings: Sweep | None = None,
    *,
    reference_error: float | None = None,
    max_error: float | None = None,
    store: Store | None = None,
    device: str = "cpu",
    workers: int = 0,
    label: str = "layers",
) -> list[LayerBarriers]:
    """Train what is missing, then sweep the layers of every pair, in that order.

    The twin of :func:`companion.experiments.pairs.measure`, with the same rule for gate G0. Two
    networks at
    step 0 that start from one init are equal on purpose: gate G0b does not apply to them. They have
    not trained either, so ask ``judged(max_error=100)`` of such a result for its zeros.

    Arguments:
        pairs: what to compare; ``step`` is the checkpoint.
        settings: see :class:`Sweep`.
        reference_error, max_error: percent, for gate G0; by default the reference is the median
            error of all ends of this call.

    Raises:
        as :func:`companion.training.train`.
    """
    store, settings = store or Store(), settings or Sweep()
    where = str(datasets.resolve_device(device))
    missing = [p for p in pairs if not _is_measured(entry_of_layers(p, settings, store, where))]
    if missing:
        lacking = [entry_of_layers(p, settings, store, where) for p in missing]
        closing.check(lacking, f"{len(missing)} of {len(pairs)} sweeps of layers")
    train(
        [job for pair in missing for job in pair.jobs()], store=store, device=where, workers=workers
    )
    items: list[_Item] = [(pair, settings, store, where) for pair in pairs]
    raw = run_all(_stored, items, workers=workers, device=where, label=label)
    found = [codec.from_json(LayerBarriers, value) for value in raw]
    if reference_error is None:
        reference_error = normal_error([f.full for f in found])
    return [f.judged(reference_error=reference_error, max_error=max_error) for f in found]


def entry_of_layers(pair: Pair, settings: Sweep, store: Store, device: str) -> Entry:
    """The store's entry of the sweep of a pair."""
    data = datasets.load(pair.a.recipe.data, device)
    return store.entry(
        {
            "kind": "layers",
            "semantics": SEMANTICS,
            "sweep": settings.identity() | averaging(pair.a.recipe.net, settings.bn_examples),
            "a": entry_of(pair.a, data, device, store).key,
            "b": entry_of(pair.b, data, device, store).key,
            "step": pair.at,
        }
    )


def _stored(item: _Item) -> dict[str, Any]:
    entry = entry_of_layers(*item)
    if known := _known(entry):
        return known  # without a lock, so that a read-only store serves what it has
    with entry.lock():
        value = _known(entry)
        if value is None:
            value = _sweep(item)
            entry.write_json(_FILE, value)
        return value


def _sweep(item: _Item) -> dict[str, Any]:
    pair, settings, store, device = item
    data = datasets.load(pair.a.recipe.data, device)
    a, b = (load_weights(run, pair.at, store=store, device=device) for run in (pair.a, pair.b))
    shared_init = pair.at == 0 and all(torch.equal(v, b[n]) for n, v in a.items())
    images = Evaluation(
        train_examples=settings.train_examples, test_examples=settings.test_examples
    )
    found = sweep(
        build(pair.a, data, torch.device(device)),
        a,
        b,
        images.splits(data),
        settings,
        bn_data=data.train,
        classes=data.classes,
        same_noise=pair.a == pair.b or shared_init,
    )
    return codec.to_json(found)


def _is_measured(entry: Entry) -> bool:
    try:
        return _FILE in entry
    except CorruptEntry:  # whoever reads it says so
        return False


def _known(entry: Entry) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] | None = entry.read_json(_FILE) if _FILE in entry else None
    except CorruptEntry as e:
        log.warning("%s; it is discarded and measured again", e)
        entry.discard()
        return None
    return found
