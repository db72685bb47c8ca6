"""How fast a recipe trains on this machine: a measurement, never an estimate."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import torch

from companion import data as datasets
from companion.core.errors import BadParameter
from companion.core.theta import snapshot
from companion.data import Dataset
from companion.training import loop, replicas
from companion.training.loop import State
from companion.training.recipe import Recipe, Run

_WARM = 3  # steps that do not count: libraries choose their kernels, compilers compile


@dataclass(frozen=True)
class Throughput:
    """The speed of one training process, as measured.

    Arguments:
        seconds: of one step: the median over ``rounds`` of the mean over ``steps`` steps.
        steps, rounds: how much was measured, after a warm-up that does not count.
        examples: images or windows a step.
        tokens: to predict in a step; 0 for images.
        device: name of the GPU, or ``cpu`` (one thread, as every run of ours there).
        engine: of :data:`companion.training.ENGINES`.
        precision: of the recipe.
    """

    seconds: float
    steps: int
    rounds: int
    examples: int
    tokens: int
    device: str
    engine: str
    precision: str

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on in a second; 0 for images."""
        return self.tokens / self.seconds


def throughput(
    recipe: Recipe,
    *,
    device: str = "cpu",
    steps: int = 10,
    rounds: int = 3,
    engine: str = "auto",
    data: Dataset | None = None,
) -> Throughput:
    """Train ``recipe`` for a few steps and time them. Nothing is stored.

    It is one run, and the clock is read inside it, between steps: loading a state, making the
    optimiser, compiling and copying the result are not in it, and a new epoch's order and draws
    are only where an epoch ends between two readings.

    Arguments:
        steps: of a round; more than the recipe has will do.
        rounds: how often.
        engine: ``loop`` or ``loop-compile`` (``auto`` is ``loop`` here): one run at a time.
        data: instead of loading ``recipe.data``.

    Raises:
        BadParameter: a recipe that does not fit its data, an engine for many runs at once, steps
            or rounds that are no whole number of 1 or more.
    """
    for name, value in (("steps", steps), ("rounds", rounds)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadParameter(f"{name}: {value!r} must be a whole number of 1 or more.")
    if engine not in ("auto", "loop", "loop-compile"):
        raise BadParameter(f"engine: {engine!r} trains many runs at once; take loop, loop-compile.")
    engine = "loop" if engine == "auto" else engine
    where = datasets.resolve_device(device)
    data = data if data is not None else datasets.load(recipe.data, where)
    loop.check_fit(recipe, data)
    last = _WARM + steps * rounds
    # One step more, as nobody asks after the last. How long a schedule is changes no step's cost.
    longer = replace(recipe, steps=max(recipe.steps, last + 1))
    run = Run(longer, init="speed", order="speed", augment="speed")
    module = loop.build(run, data, where)
    readings: list[float] = []

    def tick(done: int) -> bool:
        if done >= _WARM and (done - _WARM) % steps == 0:
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            readings.append(time.perf_counter())
        return False  # nothing is saved

    replicas.advance_many(
        *([run], [State(0, snapshot(module))], last + 1, data),
        engine=engine,
        module=module,
        save=lambda _, __: None,
        tick=tick,
    )
    return Throughput(
        seconds=median((b - a) / steps for a, b in pairwise(readings)),
        steps=steps,
        rounds=rounds,
        examples=recipe.batch,
        tokens=recipe.batch * (data.train.window or 0),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        engine=engine,
        precision=recipe.precision,
    )
