"""Training: exact steps and schedules, noise as a value, forks, resume, all to the bit."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from companion import data
from companion.core.errors import BadParameter, CorruptEntry, Diverged
from companion.core.runs import Store, canonical_json
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.data import Augmentation, Augmenter
from companion.training import (
    Fork,
    Job,
    Recipe,
    Run,
    State,
    advance,
    build,
    check_fit,
    engine,
    entry_of,
    load_state,
    load_weights,
    make_optimizer,
    merge_jobs,
    recipe_from,
    train,
    train_one,
)

CPU = torch.device("cpu")
DIGITS = data.load("digits")
N = len(DIGITS.train)  # 1,437: 23 batches of 60 an epoch, and 57 images left over
PER_EPOCH = N // 60


def recipe(**changes: Any) -> Recipe:
    base: dict[str, Any] = {"net": "mlp:widths=16", "data": "digits", "steps": 40, "batch": 60}
    return Recipe(**{**base, **changes})


def start(run: Run) -> State:
    return State(0, snapshot(build(run, DIGITS, CPU)))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal in every bit, names and types included."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(-1), b[k].view(-1)) for k in a
    )


def same_state(a: State, b: State) -> bool:
    return (
        a.step == b.step
        and same(a.theta, b.theta)
        and same(a.optimizer, b.optimizer)
        and torch.equal(a.trace, b.trace)
    )


# ---- recipes


BAD_RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": ({"lr": "1e-3"}, r"lr: a number is needed, got '1e-3' \(str\).*1\.0e-3"),
    "true for a number": ({"momentum": True}, "momentum: a number is needed"),
    "NaN": ({"lr": math.nan}, "lr: nan must be finite"),
    "infinite": ({"weight_decay": math.inf}, "weight_decay: inf must be finite"),
    "negative lr": ({"lr": -0.1}, "lr: -0.1 must be finite and not negative"),
    "negative steps": ({"steps": -5}, "steps: -5 must be a whole number of 1 or more"),
    "no steps": ({"steps": 0}, "steps: 0 must be a whole number of 1 or more"),
    "half a step": ({"steps": 10.5}, "steps: 10.5 must be a whole number"),
    "text steps": ({"steps": "100"}, "steps: '100' must be a whole number"),
    "true steps": ({"steps": True}, "steps: True must be a whole number"),
    "empty batch": ({"batch": 0}, "batch: 0 must be a whole number of 1 or more"),
    "optimizer": (
        {"optimizer": "adamV"},
        "optimizer: 'adamV' .*Did you mean 'adam'.*sgd, adam, adamw",
    ),
    "schedule": ({"schedule": "cosin"}, "schedule: .*Did you mean 'cosine'"),
    "precision": ({"precision": "fp16"}, "precision: 'fp16' is not known.*float32, bf16"),
    "warmup": ({"warmup": 40}, "warmup: 40 steps of warm-up in a run of 40"),
    "negative warmup": ({"warmup": -1}, "warmup: -1 must be a whole number of 0 or more"),
    "milestones without step": (
        {"milestones": (0.5,)},
        "milestones: only schedule 'step' has them",
    ),
    "step without milestones": ({"schedule": "step"}, r"'step' needs milestones, e\.g\. \(0\.5"),
    "milestones as a number": (
        {"schedule": "step", "milestones": 0.5},
        "milestones: a list of num",
    ),
    "milestones as text": ({"schedule": "step", "milestones": "0.5"}, "milestones: a list of num"),
    "milestone of text": ({"schedule": "step", "milestones": ["0.5"]}, "milestones: a list of num"),
    "milestone beyond T": ({"schedule": "step", "milestones": (0.5, 41)}, "milestones: .*T = 40"),
    "milestone below 0": ({"schedule": "step", "milestones": (-0.5,)}, "milestones: .*between 0"),
    "momentum": ({"momentum": 1.0}, r"momentum: 1\.0 must be in \[0, 1\)"),
    "nesterov without momentum": ({"nesterov": True, "momentum": 0.0}, "nesterov: needs"),
    "nesterov of adam": ({"nesterov": True, "optimizer": "adam"}, "nesterov: needs"),
    "one beta": ({"betas": (0.9,)}, r"betas: \(0\.9,\) must be two numbers in \[0, 1\)"),
    "betas too large": ({"betas": (0.9, 1.0)}, "betas: .* must be two numbers"),
    "div": ({"schedule": "onecycle", "warmup": 5, "div": 0}, "div, final_div: .*above 0"),
    "final_div": ({"schedule": "onecycle", "final_div": 0.0}, "div, final_div: .*above 0"),
    "net": ({"net": "mpl:widths=16"}, "Did you mean 'mlp'"),
    "net option": ({"net": "mlp:width=16"}, "Did you mean 'widths'"),
    "no net": ({"net": None}, "net: text is needed, got None"),
    "no data": ({"data": 3}, "data: text is needed, got 3"),
    "augment": ({"augment": "flop"}, "augmentation: 'flop' is not known.*none, flip, crop4"),
    "augment of YAML": ({"augment": None}, "augment: text is needed, got None"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_recipe_that_makes_no_sense_is_refused_with_a_reason(case: str) -> None:
    changes, message = BAD_RECIPES[case]
    with pytest.raises(BadParameter, match=message):
        recipe(**changes)


def test_recipes_out_of_yaml() -> None:
    values = {
        "net": "MLP:widths=16x1",
        "data": "digits",
        "steps": 40,
        "schedule": "step",
        "milestones": [0.5, 30],
        "betas": [0.9, 0.99],
        "lr": 1,
    }
    found = recipe_from(values)
    assert found == Recipe(
        net="mlp:widths=16",
        data="digits",
        steps=40,
        schedule="step",
        milestones=(0.5, 30.0),
        betas=(0.9, 0.99),
        lr=1.0,
    )
    assert found.net == "mlp:widths=16" and isinstance(found.lr, float)
    assert hash(found) == hash(recipe_from({**values, "lr": 1.0}))
    with pytest.raises(BadParameter, match=r"recipe field: 'learning_rate' is not known.*lr, mom"):
        recipe_from({**values, "learning_rate": 0.1})
    with pytest.raises(BadParameter, match=r"'momentun' .*Did you mean 'momentum'"):
        recipe_from({**values, "momentun": 0.1})
    with pytest.raises(BadParameter, match="recipe: data, steps must be given"):
        recipe_from({"net": "mlp"})


OWN_NETS = """
from torch import nn

def for_32(in_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, classes))

def two(in_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

class nothing(nn.Module):
    def __init__(self, in_shape, classes):
        super().__init__()

    def forward(self, x):
        return None
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": N + 1}, rf"batch: {N + 1} is more than the {N} training images of digits"),
        ({"net": "torch.nn:Linear"}, "torch.nn:Linear.* cannot be called with nothing"),
        ({"net": "my.nets:for_32"}, r"my.nets:for_32 does not take images of shape \(1, 8, 8\)"),
        ({"net": "my.nets:two"}, r"my.nets:two makes \(2, 2\) of 2 images.*\(2, 10\) are needed"),
        ({"net": "my.nets:nothing"}, "my.nets:nothing does not take images"),
        ({"augment": "crop4"}, r"augment: 'crop4' shifts images of digits \(8×8\) by half"),
        ({"net": "no.such.module:factory"}, "cannot import 'no.such.module'"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_any_training(
    changes: dict[str, Any],
    message: str,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "nets.py").write_text(OWN_NETS)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my", "my.nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(engine.loop, "advance_together", refuse)  # advance calls it
    bad = Run(recipe(**changes))
    good = Run(recipe())
    for attempt in (
        lambda: check_fit(bad.recipe, DIGITS),
        lambda: train_one(Job(bad, weights=(40,)), store=store),
        lambda: train([Job(good, weights=(40,)), Job(bad, weights=(40,))], store=store, workers=1),
        lambda: load_weights(bad, store=store),
    ):
        with pytest.raises(BadParameter, match=message):
            attempt()
    if "net" not in changes:  # the parent fits, the copy does not: the parent must wait for that
        copy = Run(bad.recipe, fork=Fork(good, 20))
        with pytest.raises(BadParameter, match=message):
            train([Job(copy, weights=(40,))], store=store, workers=1)
    with pytest.raises(BadParameter, match="digit"):
        train([Job(Run(recipe(data="digit")), weights=(40,))], store=store, workers=1)
    assert list(store.entries()) == []


def test_asking_whether_it_fits_draws_no_randomness() -> None:
    before = torch.get_rng_state()
    check_fit(recipe(), DIGITS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [1.5, None, True, (1,)])
@pytest.mark.parametrize("name", ["init", "order", "augment"])
def test_labels_of_randomness_are_numbers_or_text(name: str, bad: Any) -> None:
    with pytest.raises(BadParameter, match=f"{name}: a whole number or text is needed"):
        Run(recipe(), **{name: bad})


# ---- identity


def test_identity_leaves_defaults_out() -> None:
    assert recipe().identity() == {
        "net": "mlp:widths=16",
        "data": "digits",
        "steps": 40,
        "batch": 60,
    }
    spelled = recipe(lr=0.1, momentum=0.9, schedule="constant", betas=[0.9, 0.999], gamma=0.1)
    assert spelled.identity() == recipe().identity() and spelled == recipe()
    changed = recipe(schedule="step", milestones=[0.5], lr=0.2)
    assert changed.identity()["milestones"] == [0.5]
    assert recipe_from(changed.identity()) == changed


@dataclass(frozen=True, kw_only=True)
class NextYear(Recipe):
    """Recipe with a field that does not exist yet; its default is today's behaviour."""

    clip: float = math.inf
    shape: tuple[int, ...] = ()


def test_a_new_field_with_a_default_keeps_old_names() -> None:
    old = recipe(lr=0.2)
    values: dict[str, Any] = {"net": "mlp:widths=16", "data": "digits"}
    values |= {"steps": 40, "batch": 60, "lr": 0.2}
    assert NextYear(**values).identity() == old.identity()
    assert NextYear(**values, clip=1.0).identity() == {**old.identity(), "clip": 1.0}
    a, b = (Run(r).identity("f", "cpu") for r in (NextYear(**values), old))
    assert canonical_json(a) == canonical_json(b)


def test_identity_is_pinned() -> None:
    """Stores that people have depend on it: a change here must come with a new SEMANTICS."""
    fork = Fork(Run(recipe(), init=1, order="1/trunk"), 10, "restore", "restart")
    run = Run(recipe(augment="flip"), order="1/1", augment="1/2", fork=fork)
    base = {"net": "mlp:widths=16", "data": "digits", "steps": 40, "batch": 60}
    assert run.identity("abc", "cpu") == {
        "kind": "run",
        "semantics": 1,
        "recipe": {**base, "augment": "flip"},
        "init": 1,
        "order": "1/1",
        "augment": "1/2",
        "data": "abc",
        "device": "cpu",
        "fork": {
            "parent": {
                "kind": "run",
                "semantics": 1,
                "recipe": base,
                "init": 1,
                "order": "1/trunk",
                "data": "abc",
                "device": "cpu",
            },
            "step": 10,
            "optimizer": "restore",
            "schedule": "restart",
        },
    }


def test_everything_that_changes_the_bits_changes_the_identity() -> None:
    base = Run(recipe(augment="crop1"))
    parent = Run(recipe(augment="crop1"))
    runs = [
        base,
        Run(recipe(augment="crop1", lr=0.2)),
        Run(recipe(augment="crop1"), init=1),
        Run(recipe(augment="crop1"), init="0"),
        Run(recipe(augment="crop1"), order=1),
        Run(recipe(augment="crop1"), augment=1),
        *(
            Run(recipe(augment="crop1"), fork=Fork(parent, k, o, s))
            for k in (5, 6)
            for o in ("reset", "restore")
            for s in ("continue", "restart")
        ),
    ]
    names = {canonical_json(r.identity("f", "cpu")) for r in runs}
    names |= {canonical_json(base.identity("g", "cpu")), canonical_json(base.identity("f", "cuda"))}
    assert len(names) == len(runs) + 2


def test_without_augmentation_its_label_does_not_count() -> None:
    a, b = Run(recipe(), augment=1), Run(recipe(), augment=2)
    assert canonical_json(a.identity("f", "cpu")) == canonical_json(b.identity("f", "cpu"))


# ---- schedules


def reference_rates(recipe: Recipe, scheduler: Any) -> list[float]:
    """What PyTorch's own scheduler sets before each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = scheduler(optimizer)
    rates = []
    for _ in range(recipe.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def rates(recipe: Recipe) -> list[float]:
    return [recipe.learning_rate(t) for t in range(recipe.steps)]


lrs = torch.optim.lr_scheduler


@pytest.mark.parametrize("milestones", [(0.5, 0.75), (20, 30), (0.5, 30), (0.26, 0.99)])
def test_step_schedule(milestones: tuple[float, ...]) -> None:
    r = recipe(schedule="step", milestones=milestones, gamma=0.2, lr=0.3)
    at = [math.ceil(m * 40) if m < 1 else int(m) for m in milestones]
    expected = reference_rates(r, lambda o: lrs.MultiStepLR(o, at, gamma=0.2))
    assert rates(r) == pytest.approx(expected, rel=1e-12)


def test_a_milestone_is_not_late_by_a_rounding_error() -> None:
    assert 0.55 * 100 > 55, "the trap"
    r = recipe(schedule="step", milestones=(0.55,), steps=100)
    assert r.learning_rate(54) == 0.1 and r.learning_rate(55) == pytest.approx(0.01)
    r = recipe(schedule="step", milestones=(32 / 63, 48 / 63), steps=63_000)
    assert [r.learning_rate(t) for t in (31_999, 47_999)] == pytest.approx([0.1, 0.01])
    assert [r.learning_rate(t) for t in (32_000, 48_000)] == pytest.approx([0.01, 0.001])


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_cosine_schedule(warmup: int) -> None:
    r = recipe(schedule="cosine", lr=0.3, warmup=warmup)
    expected = reference_rates(r, lambda o: lrs.CosineAnnealingLR(o, T_max=40 - warmup))
    assert rates(r)[warmup:] == pytest.approx(expected[: 40 - warmup], rel=1e-9)


@pytest.mark.parametrize(("steps", "warmup"), [(40, 10), (40, 20), (40, 2), (100, 37), (40, 39)])
def test_onecycle_schedule(steps: int, warmup: int) -> None:
    r = recipe(schedule="onecycle", lr=0.3, warmup=warmup, steps=steps, div=10.0, final_div=50.0)
    expected = reference_rates(r, lambda o: _onecycle(o, steps, warmup))
    assert rates(r) == pytest.approx(expected, rel=1e-9)


def _onecycle(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> Any:
    schedule = lrs.OneCycleLR(
        optimizer,
        max_lr=0.3,
        total_steps=steps,
        pct_start=warmup / steps,
        div_factor=10.0,
        final_div_factor=50.0,
        anneal_strategy="cos",
        cycle_momentum=False,
    )

    class Bounded:
        taken = 0

        def step(self) -> None:
            self.taken += 1
            if self.taken < steps:  # PyTorch refuses to look beyond the last step
                schedule.step()

    return Bounded()


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
@pytest.mark.parametrize("warmup", [1, 2, 9])
def test_linear_warmup(schedule: str, warmup: int) -> None:
    milestones = (0.5,) if schedule == "step" else ()
    r = recipe(schedule=schedule, lr=0.3, warmup=warmup, milestones=milestones)
    expected = reference_rates(
        r, lambda o: lrs.LinearLR(o, start_factor=1 / warmup, total_iters=max(warmup - 1, 1))
    )
    assert rates(r)[:warmup] == pytest.approx(expected[:warmup], rel=1e-12)
    assert r.learning_rate(warmup - 1) == pytest.approx(0.3) and r.learning_rate(0) > 0
    if schedule == "constant":
        assert rates(r)[warmup:] == [0.3] * (40 - warmup)


# ---- the loop against a loop


def plain_loop(run: Run, make: Any, steps: int, theta: dict[str, Tensor] | None = None) -> Any:
    """A training loop as one would write it in a notebook: the reference for ours."""
    net = build(run, DIGITS, CPU)
    if theta:
        net.load_state_dict(theta)
    optimizer = make(net.parameters())
    augmenter = Augmenter(DIGITS.train, Augmentation.parse(run.recipe.augment), DIGITS.black)
    losses = []
    for step in range(steps):
        epoch, position = step // PER_EPOCH, step % PER_EPOCH
        order = Key("order", run.order, "epoch", epoch).permutation(N)
        rows = order[60 * position : 60 * position + 60]
        x, _ = augmenter.examples(rows, augmenter.draw(Key("augment", run.augment), epoch))
        for group in optimizer.param_groups:
            group["lr"] = run.recipe.learning_rate(step)
        loss = F.cross_entropy(net(x), DIGITS.train.y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return net.state_dict(), losses


OPTIMIZERS: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd": (
        {"momentum": 0.0},
        lambda p: torch.optim.SGD(p, 0.1, fused=True),
    ),
    "sgd+momentum": (
        {"momentum": 0.9, "weight_decay": 1e-3},
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3, fused=True),
    ),
    "nesterov": (
        {"momentum": 0.8, "nesterov": True},
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=True, fused=True),
    ),
    "adam": (
        {"optimizer": "adam", "lr": 1.2e-3, "weight_decay": 1e-3, "betas": (0.8, 0.99)},
        lambda p: torch.optim.Adam(p, 1.2e-3, (0.8, 0.99), weight_decay=1e-3, fused=True),
    ),
    "adamw": (
        {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loop_is_a_plain_loop_bit_by_bit(name: str) -> None:
    changes, make = OPTIMIZERS[name]
    run = Run(
        recipe(net="mlp:widths=16,norm=batch", augment="crop1", schedule="cosine", **changes),
        init=1,
        order=2,
        augment=3,
    )
    found = advance(run, start(run), 40, DIGITS)
    theta, losses = plain_loop(run, make, 40)
    assert same(found.theta, theta)
    assert found.trace.tolist() == losses
    assert found.step == 40
    assert losses[-1] < losses[0], "it learns"


def test_fused_optimisers_are_the_textbook_ones() -> None:
    run = Run(recipe(optimizer="adam", lr=1e-3))
    fused = advance(run, start(run), 20, DIGITS).theta
    plain, _ = plain_loop(run, lambda p: torch.optim.Adam(p, 1e-3, fused=False), 20)
    for name in fused:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 1, 50])
def test_exactly_that_many_steps(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Spy(Augmenter):
        def examples(self, rows: Tensor, draws: Any) -> tuple[Tensor, Tensor]:
            seen.extend(rows.clone().split(60))  # several batches are gathered in one go
            return super().examples(rows, draws)

    monkeypatch.setattr(engine.loop, "Augmenter", Spy)
    run = Run(recipe(steps=steps, optimizer="adam"))
    found = advance(run, start(run), steps, DIGITS)
    assert len(seen) == steps == len(found.trace) and found.step == steps
    assert {len(rows) for rows in seen} == {60}, "full batches only"
    assert float(found.optimizer["0.step"]) == steps, "the optimiser counted as many"
    epochs = [torch.cat(seen[i : i + PER_EPOCH]) for i in range(0, steps, PER_EPOCH)]
    assert all(len(e.unique()) == len(e) for e in epochs), "no image twice in an epoch"
    assert len(epochs) < 2 or not torch.equal(epochs[0][:60], epochs[1][:60])


def test_the_loop_changes_none_of_its_arguments() -> None:
    run = Run(recipe())
    first = start(run)
    middle = advance(run, first, 10, DIGITS)
    kept = State(
        middle.step,
        {k: v.clone() for k, v in middle.theta.items()},
        {k: v.clone() for k, v in middle.optimizer.items()},
        middle.trace.clone(),
    )
    once, again = (advance(run, middle, 30, DIGITS) for _ in range(2))
    assert same_state(middle, kept) and same_state(once, again)
    assert first.step == 0 and not first.optimizer and len(first.trace) == 0
    noise = torch.get_rng_state()
    advance(run, middle, 30, DIGITS)
    assert torch.equal(torch.get_rng_state(), noise), "no use of the global generator"


def test_threads_do_not_change_the_bits() -> None:
    run = Run(recipe(net="mlp:widths=128", batch=1000, steps=3))
    one = advance(run, start(run), 3, DIGITS)
    torch.set_num_threads(2)
    try:
        two = advance(run, start(run), 3, DIGITS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert same_state(one, two)


def test_stopping_and_going_on_is_not_stopping() -> None:
    for changes in ({"schedule": "cosine"}, {"optimizer": "adamw", "lr": 1e-3, "augment": "crop1"}):
        run = Run(recipe(net="mlp:widths=16,norm=batch", **changes))
        straight = advance(run, start(run), 40, DIGITS)
        state = start(run)
        for stop in (1, 1, 17, PER_EPOCH, PER_EPOCH + 1, 40):
            state = advance(run, state, stop, DIGITS)
            tensors = state.tensors()
            state = State.from_tensors({k: v.clone() for k, v in tensors.items()})
        assert same_state(state, straight)


def test_batchnorm_statistics_are_part_of_the_state() -> None:
    run = Run(recipe(net="mlp:widths=16,norm=batch"))
    found = advance(run, start(run), 20, DIGITS)
    assert int(found.theta["layer1.norm.num_batches_tracked"]) == 20
    assert float(found.theta["layer1.norm.running_var"].sub(1).abs().max()) > 0.1
    fresh = {**found.theta, "layer1.norm.running_mean": torch.zeros(16)}
    right = advance(run, found, 30, DIGITS).theta["layer1.norm.running_mean"]
    wrong = advance(run, replace(found, theta=fresh), 30, DIGITS)
    assert not torch.equal(right, wrong.theta["layer1.norm.running_mean"])


def test_checkpoints_are_runs_that_stopped_there() -> None:
    run = Run(recipe(optimizer="adam", lr=1e-3))
    saved: list[State] = []
    advance(run, start(run), 30, DIGITS, checkpoints=(7, 23), save=saved.append)
    assert [s.step for s in saved] == [7, 23]
    for state in saved:
        assert same_state(state, advance(run, start(run), state.step, DIGITS))


# ---- noise


def test_labels_decide_the_noise() -> None:
    def weights(**labels: Any) -> dict[str, Tensor]:
        run = Run(recipe(augment="crop1", steps=5), **labels)
        return advance(run, start(run), 5, DIGITS).theta

    base = weights(init="i", order="o", augment="a")
    assert same(base, weights(init="i", order="o", augment="a"))
    for other in ("init", "order", "augment"):
        labels = {"init": "i", "order": "o", "augment": "a", other: "x"}
        assert not same(base, weights(**labels)), f"{other} does nothing"


def test_the_same_init_label_is_the_same_network() -> None:
    a = build(Run(recipe(lr=0.1), init=5, order=1), DIGITS, CPU)
    b = build(Run(recipe(lr=0.2), init=5, order=2), DIGITS, CPU)
    assert same(snapshot(a), snapshot(b))
    assert not same(snapshot(a), snapshot(build(Run(recipe(), init=6), DIGITS, CPU)))


@pytest.mark.parametrize("differ", ["order", "augment"])
def test_order_and_augmentation_are_two_sources(
    differ: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(Augmenter):
        def examples(self, rows: Tensor, draws: Any) -> tuple[Tensor, Tensor]:
            x, y = super().examples(rows, draws)
            seen.append((rows.clone(), x.clone()))
            return x, y

    monkeypatch.setattr(engine.loop, "Augmenter", Spy)
    epochs = []
    for label in (1, 2):
        seen.clear()
        noise: dict[str, Any] = {differ: label}
        run = Run(recipe(augment="flip+crop1"), **noise)
        advance(run, start(run), PER_EPOCH, DIGITS)
        epochs.append((torch.cat([r for r, _ in seen]), torch.cat([x for _, x in seen])))
    (rows_a, _), (rows_b, _) = epochs
    assert torch.equal(rows_a, rows_b) == (differ == "augment")
    images = []
    for rows, x in epochs:
        by_row = torch.full((N, *x.shape[1:]), math.nan)
        by_row[rows] = x
        images.append(by_row)
    both = ~(images[0].isnan() | images[1].isnan()).flatten(1).any(1)
    equal = (images[0][both] == images[1][both]).flatten(1).all(1).double().mean()
    if differ == "order":
        assert both.sum() > 1000 and equal == 1, "an image is augmented alike wherever it comes"
    else:
        assert equal < 0.3, "1 of 18 draws is the same by chance, some images are symmetric"


# ---- forks


@pytest.mark.parametrize("name", ["sgd+momentum", "adam"])
def test_a_restored_fork_with_the_same_noise_is_the_undisturbed_run(
    name: str, store: Store
) -> None:
    changes = OPTIMIZERS[name][0]
    parent = Run(
        recipe(net="mlp:widths=16,norm=batch", augment="crop1", schedule="cosine", **changes),
        init=1,
        order=2,
        augment=3,
    )
    undisturbed = load_weights(parent, store=Store(store.root / "other"))
    for k in (1, PER_EPOCH, 39):
        copy = replace(parent, fork=Fork(parent, k, "restore"))
        assert copy.first_step == k and copy.last_step == 40
        assert same(load_weights(copy, store=store), undisturbed)
        reset = replace(parent, fork=Fork(parent, k, "reset"))
        assert not same(load_weights(reset, store=store), undisturbed)


def test_a_reset_fork_starts_with_a_fresh_optimiser(store: Store) -> None:
    parent = Run(recipe(momentum=0.0))  # nothing to lose: reset and restore are the same
    found = [
        load_weights(Run(recipe(momentum=0.0), fork=Fork(parent, 20, o)), store=store)
        for o in ("reset", "restore")
    ]
    assert same(*found) and same(found[0], load_weights(parent, store=store))
    state = load_state(Run(recipe(), fork=Fork(Run(recipe()), 20)), 20, store=store)
    assert state.step == 20 and not state.optimizer and len(state.trace) == 0
    assert same(state.theta, load_weights(Run(recipe()), 20, store=store))
    state = load_state(Run(recipe(), fork=Fork(Run(recipe()), 20, "restore")), 20, store=store)
    assert same(state.optimizer, load_state(Run(recipe()), 20, store=store).optimizer)


def test_schedule_continues_or_restarts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = Recipe.learning_rate

    def spy(self: Recipe, step: int) -> float:
        seen.append(step)
        return real(self, step)

    parent = Run(recipe())
    load_state(parent, 15, store=store)
    monkeypatch.setattr(Recipe, "learning_rate", spy)
    for schedule, steps in (("continue", range(15, 40)), ("restart", range(40))):
        seen.clear()
        run = Run(recipe(), order="other", fork=Fork(parent, 15, schedule=schedule))  # type: ignore[arg-type]  # refused at run time
        state = load_state(run, 40, store=store)
        assert seen == list(steps)
        assert len(state.trace) == len(steps) and state.step == 40 == run.last_step
        assert run.first_step == steps[0]
        assert same(
            load_weights(run, run.first_step, store=store), load_weights(parent, 15, store=store)
        )


def test_a_fork_takes_its_noise_at_its_own_step(store: Store) -> None:
    """A copy at k sees position k of its own order, not position 0 (as open_lth does)."""
    parent = Run(recipe(), order="trunk")
    copy = Run(recipe(), order="own", fork=Fork(parent, 30))
    theta = load_state(parent, 30, store=store).theta
    by_hand = advance(Run(recipe(), order="own"), State(30, theta), 40, DIGITS)
    assert same(load_weights(copy, store=store), by_hand.theta)


def test_a_fork_at_0_is_a_root_run(store: Store) -> None:
    parent = Run(recipe(), init=4, order="trunk")
    for optimizer in ("reset", "restore"):
        for schedule in ("continue", "restart"):
            copy = Run(recipe(), init=0, order="own", fork=Fork(parent, 0, optimizer, schedule))
            assert copy.fork is None and copy == Run(recipe(), init=4, order="own")
    deep = Run(recipe(), order="own", fork=Fork(parent, 5))
    assert deep.init == 4, "a copy has its parent's init"
    again = Run(recipe(), fork=Fork(deep, 5))
    assert again.fork is not None and again.fork.parent.fork is not None
    assert same(load_weights(again, 5, store=store), load_weights(parent, 5, store=store))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Run(recipe(), fork=Fork(p, 41)), "fork at k = 41: .*steps 0 to 40"),
        (lambda p: Run(recipe(), fork=Fork(p, -1)), "fork at k = -1: .*steps 0 to 40"),
        (lambda p: Run(recipe(), fork=Fork(p, 40)), "k = 40: no step is left of T = 40"),
        (lambda p: Run(recipe(), fork=Fork(p, 2.0)), "k = 2.0: a whole number is needed"),  # type: ignore[arg-type]  # refused at run time
        (lambda p: Run(recipe(), fork=Fork(p, True)), "k = True: a whole number is needed"),
        (
            lambda p: Run(recipe(), fork=Fork(Run(recipe(), fork=Fork(p, 20)), 10)),
            "fork at k = 10: the run it leaves has steps 20 to 40",
        ),
        (lambda p: Run(recipe(), fork=Fork(p, 5, "keep")), "fork optimizer.*reset, restore"),  # type: ignore[arg-type]  # refused at run time
        (lambda p: Run(recipe(), fork=Fork(p, 5, "reset", "again")), "fork schedule.*continue"),  # type: ignore[arg-type]  # refused at run time
        (
            lambda p: Run(recipe(net="mlp:widths=8"), fork=Fork(p, 5)),
            "network 'mlp:widths=8' is not its parent's 'mlp:widths=16'",
        ),
        (lambda p: Job(p, weights=(41,)), "checkpoint at step 41: the run has steps 0 to 40"),
        (
            lambda p: Job(Run(recipe(), fork=Fork(p, 20)), states=(19,)),
            "checkpoint at step 19: the run has steps 20 to 40",
        ),
    ],
)
def test_forks_and_jobs_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        make(Run(recipe()))


def test_a_restart_may_leave_the_last_step(store: Store) -> None:
    parent = Run(recipe())
    run = Run(recipe(), order=1, fork=Fork(parent, 40, schedule="restart"))
    assert same(load_weights(run, 0, store=store), load_weights(parent, 40, store=store))


# ---- the engine


def test_wanted_states_exist_and_nothing_else(store: Store) -> None:
    run = Run(recipe())
    train_one(Job(run, weights=(0, 9, 40), states=(20,)), store=store)
    entry = entry_of(run, DIGITS, "cpu", store)
    assert sorted(entry.files()) == [
        "state-00000020.safetensors",
        "weights-00000000.safetensors",
        "weights-00000009.safetensors",
        "weights-00000040.safetensors",
    ]
    assert entry.verify() == []
    assert same(load_weights(run, 0, store=store), start(run).theta)
    for step in (9, 20, 40):
        stopped = advance(run, start(run), step, DIGITS)
        assert same(load_weights(run, step, store=store), stopped.theta)
    assert same_state(load_state(run, 20, store=store), advance(run, start(run), 20, DIGITS))


def test_what_exists_is_not_trained_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(recipe())
    load_state(run, 20, store=store)
    calls: list[tuple[int, int]] = []
    real = engine.loop.advance

    def counted(run: Run, state: State, stop: int, *args: Any, **options: Any) -> State:
        calls.append((state.step, stop))
        return real(run, state, stop, *args, **options)

    monkeypatch.setattr(engine.loop, "advance", counted)
    load_weights(run, 20, store=store)
    load_state(run, 20, store=store)
    assert calls == [], "a full state serves who wants its weights"
    load_weights(run, 40, store=store)
    assert calls == [(20, 40)], "from the nearest stored state"
    load_weights(run, 30, store=store)
    assert calls[1:] == [(20, 30)]
    for _ in range(2):
        load_weights(run, 40, store=store)
        train([Job(run, weights=(30, 40), states=(20,))], store=store, workers=1)
    assert len(calls) == 2
    load_weights(replace(run, order=1), 1, store=store)
    assert len(calls) == 3


def test_jobs_are_merged() -> None:
    a, b = Run(recipe()), Run(recipe(), order=1)
    found = merge_jobs(
        [Job(a, weights=(40,)), Job(b, states=(3,)), Job(a, weights=(5, 40), states=(7,))]
    )
    assert found == [Job(a, (5, 40), (7,)), Job(b, (), (3,))]


@pytest.mark.slow
def test_one_worker_and_two_make_the_same_bits(tmp_path: Path) -> None:
    base = recipe(net="mlp:widths=16,norm=batch", augment="crop1")
    trunks = [Run(base, init=i, order=f"{i}/trunk", augment=f"{i}/trunk") for i in range(2)]
    copies = [
        Run(base, order=f"{i}/{c}", augment=f"{i}/{c}", fork=Fork(t, 10))
        for i, t in enumerate(trunks)
        for c in range(2)
    ]
    jobs = [Job(c, weights=(25, 40)) for c in copies]
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    train(jobs, store=one, workers=1)
    train(jobs, store=two, workers=2)
    found = [
        {e.key: {n: r["sha256"] for n, r in e.files().items()} for e in s.entries()}
        for s in (one, two)
    ]
    assert len(found[0]) == 6 and found[0] == found[1]


@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_undisturbed_run(
    in_processes: Any, store: Store
) -> None:
    from processes import KILLED

    answers, folder = in_processes("killed_training")
    found = answers["killed_training"]
    assert found["problems"] == []
    assert len(found["killed_at"]) >= 2 and found["killed_at"] == sorted(set(found["killed_at"]))
    killed = Store(folder / "killed_training")
    assert sorted(entry_of(KILLED, DIGITS, "cpu", killed).files()) == [
        "state-00000100.safetensors",
        "weights-00000240.safetensors",
    ], "the resume point is taken away at the end"
    for step in (100, 240):
        assert same(
            load_weights(KILLED, step, store=killed), load_weights(KILLED, step, store=store)
        )
    assert same_state(load_state(KILLED, 100, store=killed), load_state(KILLED, 100, store=store))


def test_a_resume_point_is_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(recipe())
    expected = load_state(run, 40, store=Store(store.root / "other"))
    monkeypatch.setattr(engine, "RESUME_EVERY_S", 0.0)

    def stop_at_30(self: Recipe, step: int) -> float:
        if step == 30:
            raise KeyboardInterrupt
        return self.lr

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recipe, "learning_rate", stop_at_30)
        load_state(run, 40, store=store)
    entry = entry_of(run, DIGITS, "cpu", store)
    assert list(entry.files()) == ["resume.safetensors"]
    assert int(entry.read_tensors("resume.safetensors")["step"]) == 30
    first: list[int] = []
    real = engine.loop.advance

    def counted(run: Run, state: State, *args: Any, **options: Any) -> State:
        first.append(state.step)
        return real(run, state, *args, **options)

    monkeypatch.setattr(engine.loop, "advance", counted)
    assert same_state(load_state(run, 40, store=store), expected)
    assert first == [30] and list(entry.files()) == ["state-00000040.safetensors"]


def test_what_lies_beyond_a_wanted_step_is_not_taken_for_it(store: Store) -> None:
    run = Run(recipe())
    at_5, at_10 = (advance(run, start(run), step, DIGITS) for step in (5, 10))
    load_state(run, 20, store=store)
    train_one(Job(run, weights=(10, 40)), store=store)
    entry = entry_of(run, DIGITS, "cpu", store)
    assert {"weights-00000010.safetensors", "weights-00000040.safetensors"} <= set(entry.files())
    assert same(load_weights(run, 10, store=store), at_10.theta)
    entry.write_tensors("resume.safetensors", advance(run, start(run), 30, DIGITS).tensors())
    train_one(Job(run, weights=(5,)), store=store)
    assert "weights-00000005.safetensors" in entry.files()
    assert same(load_weights(run, 5, store=store), at_5.theta)
    assert same_state(load_state(run, 5, store=store), at_5)


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("what", ["weights-00000040", "state-00000020", "resume", "manifest"])
def test_a_corrupt_checkpoint_is_reported_and_made_again(
    what: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(recipe(optimizer="adam"))
    copy = Run(recipe(optimizer="adam"), order=1, fork=Fork(run, 20, "restore"))
    train_one(Job(run, weights=(40,), states=(20,)), store=store)
    expected = load_weights(run, store=store), load_weights(copy, store=store)
    entry = entry_of(run, DIGITS, "cpu", store)
    if what == "resume":
        entry.write_tensors("resume.safetensors", advance(run, start(run), 30, DIGITS).tensors())
        entry.remove("weights-00000040.safetensors")
    if what == "manifest":
        (entry.path / "manifest.json").write_text("{")
    else:
        spoil(entry.path / f"{what}.safetensors")
    if what == "state-00000020":  # whoever needs it finds out
        entry_of(copy, DIGITS, "cpu", store).discard()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="companion"):
        found = load_weights(run, store=store), load_weights(copy, store=store)
    assert same(found[0], expected[0]) and same(found[1], expected[1])
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and "made again" in said[0]
    assert ("unreadable" if what == "manifest" else f"{what}.safetensors does not match") in said[0]
    assert all(e.verify() == [] for e in store.entries())


def test_a_disk_that_never_keeps_what_it_was_given_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from companion.core import runs

    real = runs._write_atomically

    def bad_disk(path: Path, content: bytes) -> None:
        real(path, content[:-1] + b"?" if path.name.endswith("safetensors") else content)

    monkeypatch.setattr(runs, "_write_atomically", bad_disk)
    with pytest.raises(CorruptEntry, match=r"never read back.*COMPANION_RUNS"):
        load_weights(Run(recipe(steps=2)), store=store)


def test_device_auto_is_a_device(store: Store) -> None:
    where = data.resolve_device("auto").type
    run = Run(recipe(steps=3))
    load_weights(run, store=store, device="auto")
    assert "weights-00000003.safetensors" in entry_of(run, DIGITS, where, store)


# ---- divergence


def test_divergence_names_the_run_and_leaves_nothing(store: Store) -> None:
    run = Run(recipe(lr=1e12, steps=300), init="i", order="o")
    with pytest.raises(Diverged) as caught:
        load_weights(run, store=store)
    text = str(caught.value)
    for part in ("mlp:widths=16", "digits", "lr 1e+12", "of 300", "init 'i'", "order 'o'", "sgd"):
        assert part in text
    assert "Lower lr" in text
    theta = start(run).theta
    step = int(text.split("at step ")[1].split(" ")[0])
    before = advance(run, State(0, theta), step, DIGITS) if step else None
    assert before is None or bool(torch.isfinite(before.trace).all()), "an earlier step was broken"
    assert list(store.entries()) == []
    with pytest.raises(Diverged):
        train([Job(run, weights=(300,))], store=store, workers=1)


def test_weights_that_are_not_finite_are_never_stored(store: Store) -> None:
    """The loss of the last step is finite, what the step does to the weights is not."""
    run = Run(recipe(lr=3e38, steps=1, momentum=0.0, weight_decay=1e10))
    with pytest.raises(Diverged, match=r"layer1.*not finite at step 1 of 1"):
        load_weights(run, store=store)
    assert list(store.entries()) == []


def test_good_checkpoints_before_a_divergence_stay_good(store: Store) -> None:
    run = Run(recipe(lr=1e12, steps=300))
    with pytest.raises(Diverged):
        train_one(Job(run, weights=(0, 300), states=(250,)), store=store)
    (entry,) = store.entries()
    assert list(entry.files()) == ["weights-00000000.safetensors"] and entry.verify() == []
    assert same(load_weights(run, 0, store=store), start(run).theta)


# ---- precision, optimisers


def test_bf16_keeps_float32_weights() -> None:
    run = Run(recipe(precision="bf16", optimizer="adam", lr=1e-3))
    found = advance(run, start(run), 40, DIGITS)
    assert {v.dtype for v in found.theta.values()} == {torch.float32}
    assert {v.dtype for v in found.optimizer.values()} == {torch.float32}
    assert found.trace.dtype == torch.float32 and found.trace[-1] < found.trace[0]
    plain = Run(recipe(optimizer="adam", lr=1e-3))
    exact = advance(plain, start(plain), 40, DIGITS)
    assert not same(found.theta, exact.theta), "autocast did nothing"
    assert float((found.trace - exact.trace).abs().max()) < 0.1
    assert canonical_json(run.identity("f", "cpu")) != canonical_json(plain.identity("f", "cpu"))


def test_optimisers_are_made_from_the_recipe() -> None:
    net = build(Run(recipe()), DIGITS, CPU)
    net.get_parameter("head.weight").requires_grad_(False)
    sgd = make_optimizer(recipe(momentum=0.7, weight_decay=0.1, lr=0.2), net)
    assert isinstance(sgd, torch.optim.SGD)
    group = sgd.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.7, 0.1, 0.2)
    assert len(group["params"]) == 3, "a frozen tensor is not trained"
    assert type(make_optimizer(recipe(optimizer="adam"), net)) is torch.optim.Adam
    assert type(make_optimizer(recipe(optimizer="adamw"), net)) is torch.optim.AdamW


@pytest.mark.gpu
def test_the_gpu_gives_the_same_bits_twice(tmp_path: Path) -> None:
    """Without it every null control fails, and with it every barrier measured on a GPU."""
    for net in ("mlp:widths=64", "resnet8:width=8"):
        run = Run(recipe(net=net, steps=100, batch=120, augment="crop1"))
        found = [
            load_weights(run, store=Store(tmp_path / f"{net[:3]}{i}"), device="cuda") for i in "ab"
        ]
        assert same(*found)


def test_an_edited_factory_is_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    """Its name alone does not say what it builds: old runs of it must not count."""
    package = tmp_path / "edited_net"
    package.mkdir()
    (package / "__init__.py").touch()
    source = package / "nets.py"
    text = (
        "from torch import nn\n"
        "def make(in_shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.ReLU())\n"
    )
    source.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = Run(Recipe(net="edited_net.nets:make", data="digits", steps=2))
    before = run.identity("f", "cpu")
    assert before == run.identity("f", "cpu")
    source.write_text(text.replace("ReLU", "Tanh"))
    assert run.identity("f", "cpu") != before
    source.write_text(text)
    assert run.identity("f", "cpu") == before
