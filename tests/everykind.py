"""A run store with one small entry of every kind, made through the package's public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from companion.core.runs import Store
from companion.data import Split
from companion.data.text import save_windows
from companion.experiments import federated, measurement, pairs
from companion.experiments.aligned import align
from companion.experiments.featured import Scope, examine
from companion.experiments.landscape import (
    Bending,
    Gap,
    Survey,
    bend_pairs,
    decompose_pairs,
    survey_pairs,
)
from companion.experiments.layers import sweep_pairs
from companion.experiments.merged import agree_runs, merge_runs, split_runs
from companion.experiments.methods import Method
from companion.experiments.tickets import Chain, MaskCheck
from companion.layerwise import Sweep
from companion.training import Fork, Recipe, Run

PLAIN = Recipe(net="mlp:widths=6x2", data="digits", steps=4, batch=32, lr=0.1)
BATCHNORM = Recipe(net="mlp:widths=6,norm=batch", data="digits", steps=4, batch=32, lr=0.1)
FEW = pairs.Evaluation(points=3, train_examples=40, test_examples=30)
TRUNK = Run(BATCHNORM, init=0, order="trunk", augment="trunk")


def _run(number: int, data: str = "digits") -> Run:
    recipe = Recipe(net=PLAIN.net, data=data, steps=4, batch=32, lr=0.1)
    return Run(recipe, init=number, order=str(number), augment=str(number))


def _copy(number: int) -> Run:
    return Run(BATCHNORM, init=0, order=str(number), fork=Fork(TRUNK, 2))


A, B, C = (_run(n) for n in range(3))
STRANGERS = pairs.Pair(A, B)
COPIES = pairs.Pair(_copy(1), _copy(2), start=(TRUNK, 2))
HALVES = pairs.Pair(_run(0, "digits@split-a"), _run(1, "digits@split-b"))
SPARSE = Chain(PLAIN, init=0, k=2).run(2)
FEDERATION = federated.Federation(recipe=PLAIN, clients=2, every=2, averaged=("head",))

ASKED: dict[str, Callable[[Store], Any]] = {
    "pair": lambda store: pairs.measure_pairs([COPIES], FEW, store=store, workers=1),
    "null": lambda store: pairs.check_null(COPIES.a, FEW, store=store),
    "aligned": lambda store: align(
        *([STRANGERS], ["weights"], FEW), extras=("temperature", "repair"), store=store, workers=1
    ),
    "merged": lambda store: merge_runs([[A, B, C]], FEW, store=store, workers=1),
    "agreed": lambda store: agree_runs([[A, B, C]], FEW, store=store, workers=1),
    "halves": lambda store: split_runs([HALVES], [C], FEW, store=store, workers=1),
    "layers": lambda store: sweep_pairs(
        *([COPIES], Sweep(kinds=("single",), draws=1, train_examples=40, test_examples=30)),
        store=store,
        workers=1,
    ),
    "features": lambda store: examine(
        [(STRANGERS, Method("weights"))],
        Scope(layers=("layer1.linear", "head"), alphas=(0.5,), points=3, test_examples=30),
        store=store,
        workers=1,
    ),
    "landscape": lambda store: survey_pairs(
        [COPIES], Survey(points=3, train_examples=40, test_examples=30), store=store, workers=1
    ),
    "logits": lambda store: decompose_pairs(
        [(STRANGERS, "weights")], Gap(examples=30), store=store, workers=1
    ),
    "bend": lambda store: bend_pairs(
        *([COPIES], Bending(steps=3, points=3, at=(0.5,), sharp_examples=20, test_examples=30)),
        store=store,
        workers=1,
    ),
    "federated": lambda store: federated.measure_federations(
        [(FEDERATION, 0)], store=store, workers=1
    ),
    "subnetwork": lambda store: measurement.run([MaskCheck(SPARSE)], store=store, workers=1),
}
"""Kind of a measurement -> asks for one of it."""


def fill(store: Store) -> None:
    """Make one entry of every measurement, the runs they need, and windows of a made-up text."""
    for ask in ASKED.values():
        ask(store)
    tokens = torch.arange(24).reshape(4, 6)
    save_windows(Split(tokens, tokens + 1), store)
