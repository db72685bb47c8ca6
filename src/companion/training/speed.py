"""How fast a recipe trains on this machine: a measurement, never an estimate."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from companion import data as datasets
from companion.data import Dataset
from companion.errors import BadParameter
from companion.pool import one_thread
from companion.theta import snapshot
from companion.training import loop, replicas
from companion.training.loop import State
from companion.training.recipe import Recipe, Run


@dataclass(frozen=True)
class Throughput:
    """The speed of one training process, as measured.

    Arguments:
        seconds: of one step: the median over ``rounds`` of the mean over ``steps`` steps.
        steps, rounds: how much was measured, after a warm-up that does not count.
        examples: images or windows a step. tokens: to predict in a step; 0 for images.
        device: name of the GPU, or ``cpu`` (one thread, as every run of ours there).
        engine: of :data:`companion.training.replicas.ENGINES`. precision: of the recipe.
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

    @property
    def examples_per_second(self) -> float:
        """Images or windows trained on in a second."""
        return self.examples / self.seconds


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

    Arguments:
        steps: of a round, at most; a recipe may have fewer.
        rounds: how often.
        engine: ``loop`` or ``loop-compile`` (``auto`` is ``loop`` here): one run at a time.
        data: instead of loading ``recipe.data``.

    Raises:
        BadParameter: a recipe that does not fit its data, or an engine for many runs at once.
    """
    if engine not in ("auto", "loop", "loop-compile"):
        raise BadParameter(f"engine: {engine!r} trains many runs at once; take loop, loop-compile.")
    engine = "loop" if engine == "auto" else engine
    where = datasets.resolve_device(device)
    data = data if data is not None else datasets.load(recipe.data, where)
    loop.check_fit(recipe, data)
    run, many = Run(recipe, init="speed", order="speed", augment="speed"), min(steps, recipe.steps)
    module = loop.build(run, data, where)
    state = State(0, snapshot(module))

    def seconds() -> float:
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return time.perf_counter()

    times = []
    with one_thread():
        for _ in range(rounds + 1):
            begun = seconds()
            replicas.advance_many([run], [state], many, data, engine=engine, module=module)
            times.append((seconds() - begun) / many)
    return Throughput(
        seconds=sorted(times[1:])[rounds // 2],
        steps=many,
        rounds=rounds,
        examples=recipe.batch,
        tokens=recipe.batch * (data.train.window or 0),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        engine=engine,
        precision=recipe.precision,
    )
