"""float32 means float32 on a GPU too: who computes with it switches TF32 off and puts it back.

The switches exist on every machine and do nothing on a CPU, so what every instrument finds them at
when it multiplies matrices can be seen here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion import data as datasets
from companion.connectivity import Walker
from companion.core.numerics import exact_evaluation, exact_float32
from companion.core.theta import Theta, snapshot
from companion.data import Split
from companion.experiments.featured import mixed
from companion.experiments.merged import logits_of
from companion.features import commutativity, features
from companion.layerwise import Sweep, sweep
from companion.rebasin.activations import activation_matching
from companion.rebasin.derive import derive
from companion.rebasin.repair import repair, reset_batchnorm
from companion.rebasin.ste import straight_through
from companion.training import Recipe, Run, State, advance_many, build, byhand

DIGITS = datasets.load("digits")
FEW = Split(DIGITS.test.x[:40], DIGITS.test.y[:40])
SPLITS = {"train": FEW, "test": FEW}
CPU = torch.device("cpu")
Flags = tuple[bool, bool, bool, bool]
EVALUATION: Flags = (False, False, True, False)


def flags() -> Flags:
    """cuDNN's TF32, cuBLAS's TF32, cuDNN's determinism, cuDNN's timing of kernels."""
    cudnn = torch.backends.cudnn
    cublas = torch.backends.cuda.matmul
    return cudnn.allow_tf32, cublas.allow_tf32, cudnn.deterministic, cudnn.benchmark


@pytest.fixture
def loose() -> Iterator[Flags]:
    """A process that allows everything that is fast."""
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = flags()
    cudnn.allow_tf32 = cublas.allow_tf32 = cudnn.benchmark = True
    yield flags()
    cudnn.allow_tf32, cublas.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@pytest.fixture
def seen(loose: Flags, monkeypatch: pytest.MonkeyPatch) -> set[Flags]:
    """How the switches stood whenever a linear map was computed in float32.

    Passes over two examples, whose shapes alone are looked at, do not count.
    """
    found: set[Flags] = set()
    real = F.linear

    def linear(x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        if x.dtype == torch.float32 and len(x) > 2:
            found.add(flags())
        return real(x, *rest, **named)

    monkeypatch.setattr(F, "linear", linear)
    return found


def networks(net: str) -> tuple[nn.Module, Theta, Theta]:
    runs = [Run(Recipe(net=net, data="digits", steps=1), init=i) for i in range(2)]
    a, b = (snapshot(build(run, DIGITS, CPU)) for run in runs)
    return build(runs[0], DIGITS, CPU), a, b


def test_the_switches_come_back(loose: Flags) -> None:
    assert loose == (True, True, False, True)
    with pytest.raises(ZeroDivisionError), exact_evaluation():
        assert flags() == EVALUATION
        raise ZeroDivisionError
    assert flags() == loose
    with exact_float32():
        assert flags() == (False, False, False, True)
    with exact_float32(False):
        assert flags() == loose
    assert flags() == loose


MLP, NORMED = "mlp:widths=8x8", "mlp:widths=8,norm=batch"
INSTRUMENTS: dict[str, tuple[str, Callable[[nn.Module, Theta, Theta], Any]]] = {
    "walker": (MLP, lambda m, a, b: Walker(m, SPLITS).at(a)),
    "re-estimated": (NORMED, lambda m, a, b: Walker(m, SPLITS, bn="reestimate").at(a)),
    "layers": (MLP, lambda m, a, b: sweep(m, a, b, SPLITS, Sweep(points=3))),
    "features": (MLP, lambda m, a, b: features(m, a, b, FEW)),
    "features, re-estimated": (
        NORMED,
        lambda m, a, b: features(m, a, b, FEW, bn="reestimate", bn_data=FEW),
    ),
    "commutativity": (MLP, lambda m, a, b: commutativity(m, a, b, FEW)),
    "logits": (MLP, lambda m, a, b: logits_of(m, a, FEW.x)),
    "mixed logits": (MLP, lambda m, a, b: mixed(m, a, b, FEW, [0.5])),
    "activation matching": (
        MLP,
        lambda m, a, b: activation_matching(derive(m, FEW.x[:2]), m, a, b, FEW),
    ),
    "straight through": (
        MLP,
        lambda m, a, b: straight_through(derive(m, FEW.x[:2]), m, a, b, FEW, steps=1),
    ),
    "repair": (MLP, lambda m, a, b: repair(m, a, b, FEW.x)),
    "reset": (NORMED, lambda m, a, b: reset_batchnorm(m, a, FEW.x)),
}


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_every_evaluation_is_exact(name: str, seen: set[Flags], loose: Flags) -> None:
    net, measure = INSTRUMENTS[name]
    measure(*networks(net))
    assert seen == {EVALUATION} and flags() == loose


@pytest.mark.parametrize("engine", ["loop", "vmap", "graphs"])
def test_training_in_float32_is_exact(
    engine: str, seen: set[Flags], loose: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small perceptrons on a CPU call the kernels by hand, where these switches do nothing.
    monkeypatch.setattr(byhand, "perceptron", lambda module: [])
    for precision, expected in (("float32", False), ("bf16", True)):
        seen.clear()
        run = Run(Recipe(net=MLP, data="digits", steps=2, precision=precision))
        start = State(0, snapshot(build(run, DIGITS, CPU)))
        advance_many([run], [start], 2, DIGITS, engine=engine)
        assert {f[:2] for f in seen} == {(expected, expected)}
    assert flags() == loose


def test_a_gpu_is_given_out_with_the_workspace_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any matrix product: torch reads the setting at the first one, and never again."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(name, "")  # so that it is put back, whatever happens below
    monkeypatch.delenv(name)
    datasets.resolve_device("cpu")
    assert name not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    datasets.resolve_device("auto")
    assert os.environ[name] == ":4096:8"
    monkeypatch.setenv(name, ":16:8")
    datasets.resolve_device("cuda")
    assert os.environ[name] == ":16:8", "the user's own choice stays"
