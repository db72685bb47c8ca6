"""Steps without bookkeeping: the bits of autograd and of torch.optim, and what is left to these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from companion import data as datasets
from companion.core.runs import Store
from companion.core.theta import snapshot
from companion.training import (
    Fork,
    Job,
    Recipe,
    Run,
    State,
    advance,
    build,
    byhand,
    load_weights,
    loop,
    pruned,
    train,
)

RECIPES: dict[str, dict[str, Any]] = {
    "momentum": {"lr": 0.08, "augment": "crop1"},
    "nesterov, decay": {"nesterov": True, "weight_decay": 1e-3},
    "no momentum": {"momentum": 0.0},
    "adam": {"optimizer": "adam", "lr": 1e-3},
    "adamw, matrices": {
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.1,
        "weight_decay_on": "matrices",
    },
    "one example, one unit": {"net": "mlp:widths=1x3", "batch": 1, "lr": 0.01},
    "one layer of many": {"net": "mlp:widths=257", "batch": 33},
    "norms": {"net": "mlp:widths=16x2,norm=batch"},
    "convolutions": {"net": "resnet8:width=4", "batch": 16, "steps": 6, "augment": "crop1"},
}


def _trained(recipe: Recipe, masked: bool) -> dict[str, torch.Tensor]:
    data, cpu = datasets.load(recipe.data, "cpu"), torch.device("cpu")
    run = Run(recipe)
    module = build(run, data, cpu)
    state = State(0, snapshot(module))
    if masked:
        name = next(n for n, p in module.named_parameters() if p.ndim > 1)
        mask = {name: torch.rand(state.theta[name].shape, generator=torch.manual_seed(0)) < 0.3}
        state = pruned(state, mask, module)
    middle = advance(run, state, recipe.steps // 2, data)
    return advance(run, middle, recipe.steps, data).tensors()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_every_bit_is_that_of_autograd_and_torch_optim(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape: dict[str, Any] = {"net": "mlp:widths=24x2", "data": "digits", "steps": 40, "batch": 60}
    recipe = Recipe(**{**shape, "lr": 0.05, **RECIPES[name]})
    found = _trained(recipe, masked)
    monkeypatch.setattr(byhand, "perceptron", lambda module: [])
    monkeypatch.setattr(byhand, "step_of", lambda optimizer: optimizer.step)
    wanted = _trained(recipe, masked)
    assert list(found) == list(wanted), "states are stored in the same order, too"
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


TOGETHER = ("momentum", "nesterov, decay", "adam", "one example, one unit", "norms")


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("name", TOGETHER)
def test_together_each_run_has_the_bits_it_has_alone(
    name: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two dense networks and a masked one; and where stacked kernels would round differently."""
    shape: dict[str, Any] = {"net": "mlp:widths=24x2", "data": "digits", "steps": 30, "batch": 60}
    recipe = Recipe(**{**shape, "lr": 0.05, **RECIPES[name]})
    data, cpu = datasets.load(recipe.data, "cpu"), torch.device("cpu")
    runs = [Run(recipe, init=i, order=i, augment=i) for i in range(3)]
    states = [State(0, snapshot(build(run, data, cpu))) for run in runs]
    weight = next(n for n, v in states[2].theta.items() if v.ndim > 1)
    mask = {weight: torch.rand(states[2].theta[weight].shape) < 0.3}
    states[2] = pruned(states[2], mask, build(runs[2], data, cpu))
    alone = [advance(r, s, recipe.steps, data) for r, s in zip(runs, states, strict=True)]
    asked: list[bool] = []
    steady = byhand.steady

    def ask(*args: Any) -> bool:
        asked.append(steady(*args))
        return asked[-1] and same

    monkeypatch.setattr(byhand, "steady", ask)
    saved: dict[int, State] = {}
    middle = loop.advance_together(
        runs, states, 12, data, checkpoints=[7], save=lambda m, state: saved.update({m: state})
    )
    found = loop.advance_together(runs, middle, recipe.steps, data)
    assert asked == ([] if name == "norms" else [True, True])
    assert sorted(saved) == [0, 1, 2] and {s.step for s in saved.values()} == {7}
    for m, (one, together) in enumerate(zip(alone, found, strict=True)):
        wanted, got = one.tensors(), together.tensors()
        assert list(wanted) == list(got)
        assert all(torch.equal(got[key], value) for key, value in wanted.items()), f"run {m}"


def test_steady_notices_kernels_that_round_by_the_number_of_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, cpu = datasets.load("digits", "cpu"), torch.device("cpu")
    runs = [
        Run(Recipe(net="mlp:widths=8", data="digits", steps=1, batch=5), init=i) for i in (0, 1)
    ]
    layers = byhand.stacked([build(run, data, cpu) for run in runs])
    x, y = (torch.stack([t[:5], t[5:10]]) for t in (data.train.x, data.train.y))
    assert byhand.steady(layers, x, y)
    real = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda b, x, w: real(b, x, w) * (1 + 1e-6 * len(x)))
    assert not byhand.steady(layers, x, y)


def test_the_engine_trains_small_networks_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = Recipe(net="mlp:widths=24x2", data="digits", steps=30, batch=60, lr=0.05)
    trunk = Run(recipe, order="trunk")
    forks = [Run(recipe, order=i, fork=Fork(trunk, 10)) for i in range(5)]
    jobs = [Job(run, weights=(20, 30)) for run in forks]
    sizes: list[int] = []
    real = loop.advance_together

    def counted(runs: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(runs))
        return real(runs, *args, **options)

    monkeypatch.setattr(loop, "advance_together", counted)
    train(jobs, store=Store(tmp_path / "together"), workers=1)
    assert sizes == [1, 5]
    monkeypatch.setattr(byhand, "TOGETHER", 1)
    train(jobs, store=Store(tmp_path / "alone"), workers=1)
    assert sizes == [1, 5, 1, 1, 1, 1, 1, 1]
    for run in forks:
        for step in (20, 30):
            one, other = (
                load_weights(run, step, store=Store(tmp_path / name))
                for name in ("together", "alone")
            )
            assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("net", "wanted"),
    [("mlp:widths=100x5", True), ("mlp:widths=512x3", False), ("resnet8:width=4", False)],
)
def test_only_small_perceptrons_share_their_steps(net: str, wanted: bool) -> None:
    data, cpu = datasets.load("digits", "cpu"), torch.device("cpu")
    module = build(Run(Recipe(net=net, data="digits", steps=1, batch=2)), data, cpu)
    assert (byhand.at_once(module) > 1) == wanted


def test_perceptrons_are_computed_by_hand() -> None:
    data, cpu = datasets.load("digits", "cpu"), torch.device("cpu")
    for net, layers in {"mlp:widths=8x3": 4, "lenet-300-100": 3}.items():
        run = Run(Recipe(net=net, data="digits", steps=1, batch=2))
        assert len(byhand.perceptron(build(run, data, cpu))) == layers


def _plain(*rest: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), *(rest or (nn.Linear(4, 2),)))


def _twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)


def _tied() -> nn.Module:
    made = _plain(nn.Linear(4, 4))
    made[3].weight = made[1].weight
    return made


def _hooked() -> nn.Module:
    made = _plain()
    made[1].register_forward_hook(lambda module, args, out: 2 * out)
    return made


def _watched() -> nn.Module:
    made = _plain()
    next(made.parameters()).register_hook(lambda grad: 2 * grad)
    return made


def _frozen() -> nn.Module:
    made = _plain()
    next(made.parameters()).requires_grad_(False)
    return made


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "no bias": lambda: _plain(nn.Linear(4, 2, bias=False)),
    "another activation": lambda: _plain(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)),
    "two linear layers": lambda: _plain(nn.Linear(4, 4), nn.Linear(4, 2)),
    "a ReLU at the end": lambda: _plain(nn.Linear(4, 2), nn.ReLU()),
    "inputs that are not flattened": lambda: nn.Sequential(nn.Linear(4, 2)),
    "flattened elsewhere": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(4, 2)),
    "computed weights": lambda: _plain(parametrizations.weight_norm(nn.Linear(4, 2))),
    "nothing": nn.Identity,
    "a layer that is used twice": _twice,
    "tied weights": _tied,
    "a hook of a module": _hooked,
    "a hook of a weight": _watched,
    "a frozen weight": _frozen,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_go_through_autograd(name: str) -> None:
    assert byhand.perceptron(_plain())
    assert not byhand.perceptron(OTHERS[name]())
