"""Layer barriers between stored runs: measured once, many pairs at a time, kept in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from companion import data as datasets
from companion.core import codec
from companion.core.runs import Store
from companion.experiments.measurement import Json, Measurement, Where, ends, run
from companion.experiments.pairs import Evaluation, Pair, averaging, jobs_of, normal_error
from companion.layerwise.sweep import LayerBarriers, Sweep, sweep
from companion.training import Job, build, load_weights


@dataclass(frozen=True)
class LayerSweep(Measurement):
    """A sweep over the layers of a pair."""

    KIND = "layers"
    FILE = "layers.json"

    pair: Pair
    settings: Sweep

    def identity(self, device: str) -> Json:
        bn = averaging(self.pair.a.recipe.net, self.settings.bn_examples)
        return {"sweep": self.settings.identity() | bn, **self.pair.identity(device)}

    def jobs(self) -> list[Job]:
        return jobs_of(self.pair)

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        return f"{ends(identity)}, layer by layer"

    def measure(self, store: Store, device: str) -> object:
        pair, settings = self.pair, self.settings
        data = datasets.load(pair.a.recipe.data, device)
        a, b = (load_weights(run, pair.at, store=store, device=device) for run in (pair.a, pair.b))
        parts = Evaluation(
            train_examples=settings.train_examples, test_examples=settings.test_examples
        )
        return sweep(
            build(pair.a, data, torch.device(device)),
            a,
            b,
            parts.splits(data),
            settings,
            bn_data=data.train,
            classes=data.classes,
            same_noise=pair.equal_on_purpose(a, b),
        )


def sweep_pairs(
    pairs: Sequence[Pair],
    settings: Sweep | None = None,
    *,
    reference_error: float | None = None,
    max_error: float | None = None,
    **where: Unpack[Where],
) -> list[LayerBarriers]:
    """Train what is missing, then sweep the layers of every pair, in that order.

    The twin of :func:`companion.experiments.pairs.measure_pairs`, which checks in the same way that
    both trained. Two networks at step 0 that start from one init have not trained, so ask
    ``judged(max_error=100)`` of such a result for its zeros.

    Arguments:
        pairs: what to compare; ``step`` is the checkpoint.
        settings: see :class:`Sweep`.
        reference_error, max_error: percent, for the check that both trained; by default the
            reference is the median error of all ends of this call.

    Raises:
        as :func:`companion.training.train`.
    """
    settings = settings or Sweep()
    tasks = [LayerSweep(pair, settings) for pair in pairs]
    raw = run(tasks, label="layers", **where)
    found = [codec.from_json(LayerBarriers, value) for value in raw]
    if reference_error is None:
        reference_error = normal_error([f.full for f in found])
    return [f.judged(reference_error=reference_error, max_error=max_error) for f in found]
