"""Many replicas at once: the same training as the loop, to rounding, on every engine.

A CUDA graph captures :meth:`Stepper.one_step`; here the same function is called step by step, so
that batches, tables, counters, optimisers and traces are proven without a GPU. In float64 engines
agree with the loop to 1e-9. What only a GPU can show is marked ``gpu``.
"""

from __future__ import annotations

import statistics
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from companion import data as datasets
from companion.connectivity import Walker
from companion.core.errors import BadParameter, Diverged, OutOfTime
from companion.core.runs import Store
from companion.core.theta import snapshot
from companion.data import Dataset
from companion.experiments.pairs import Evaluation, check_null
from companion.training import (
    Fork,
    Job,
    Recipe,
    Run,
    State,
    advance,
    advance_many,
    build,
    engine,
    engines,
    entry_of,
    load_state,
    load_weights,
    loop,
    made_by,
    replicas,
    train,
    using,
)
from companion.training.feed import Feed
from companion.training.stack import coefficients
from companion.training.stepper import Stepper

CPU = torch.device("cpu")
DIGITS = datasets.load("digits")
PER_EPOCH = len(DIGITS.train) // 60
MLP = "mlp:widths=16x12"


def recipe(**changes: Any) -> Recipe:
    base: dict[str, Any] = {"net": MLP, "data": "digits", "steps": 40, "batch": 60}
    return Recipe(**{**base, **changes})


def runs_of(what: Recipe, count: int = 3) -> list[Run]:
    """Replicas that differ in init, order and augmentation."""
    return [Run(what, init=i, order=10 + i, augment=20 + i) for i in range(count)]


def double(run: Run) -> nn.Module:
    """The run's network in float64, which takes float32 images."""
    module = build(run, DIGITS, CPU).double()
    module.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    return module


def starts(runs: list[Run], make: Any = None) -> list[State]:
    return [State(0, snapshot(make(run) if make else build(run, DIGITS, CPU))) for run in runs]


def gap(a: State, b: State) -> float:
    """Largest difference of weights, buffers, optimiser and losses; names and types must agree."""
    assert a.step == b.step
    worst = float((a.trace - b.trace).abs().max()) if len(a.trace) else 0.0
    for mine, theirs in ((a.theta, b.theta), (a.optimizer, b.optimizer)):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value.shape == theirs[name].shape and value.dtype == theirs[name].dtype, name
            assert value.is_contiguous(), name
            worst = max(worst, float((value.double() - theirs[name].double()).abs().max()))
    return worst


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sgd": ({"momentum": 0.0}, ("vmap", "graphs")),
    "momentum": ({"momentum": 0.9, "weight_decay": 1e-3}, ("vmap", "graphs", "compile")),
    "nesterov": (
        {"nesterov": True, "schedule": "step", "milestones": (0.5, 30), "warmup": 5},
        ("vmap", "graphs"),
    ),
    "adam": (
        {"optimizer": "adam", "lr": 1e-2, "weight_decay": 1e-3, "schedule": "cosine"},
        ("vmap", "graphs"),
    ),
    "adamw": (
        {
            "optimizer": "adamw",
            "lr": 1e-2,
            "weight_decay": 0.1,
            "schedule": "onecycle",
            "warmup": 10,
            "betas": (0.8, 0.99),
        },
        ("vmap", "graphs"),
    ),
    "flip and crop": ({"augment": "flip+crop1"}, ("vmap", "graphs")),
    "mlp, layer norm": ({"net": f"{MLP},norm=layer"}, ("vmap", "graphs")),
    "mlp, batch norm": ({"net": f"{MLP},norm=batch"}, ("vmap", "graphs")),
    "resnet, group norm": (
        {"net": "resnet8:width=4,norm=group", "steps": 6, "lr": 0.02},
        ("vmap", "graphs"),
    ),
    "resnet, layer norm": (
        {"net": "resnet8:width=4,norm=layer", "steps": 6, "lr": 0.02},
        ("vmap", "graphs"),
    ),
    "resnet, batch norm": (
        {"net": "resnet8:width=4", "steps": 6, "augment": "crop1"},
        ("vmap", "graphs"),
    ),
    "lenet": ({"net": "lenet-300-100", "steps": 5}, ("vmap", "graphs")),
    "vgg": ({"net": "vgg11:width=4", "steps": 4, "lr": 0.02}, ("graphs",)),
}


# vmap has no rule of its own for one operation in ChannelLayerNorm's gradient, and says it is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * ("compile" in CASES[c][1])) for c in CASES],
)
def test_engines_agree_with_the_loop_in_float64(case: str) -> None:
    changes, engines = CASES[case]
    what = recipe(**changes)
    runs = runs_of(what, 3 if "mlp" in what.net else 2)
    expected = [
        advance(run, s, what.steps, DIGITS, module=double(run))
        for run, s in zip(runs, starts(runs, double), strict=True)
    ]
    for name in engines:
        found = advance_many(
            *(runs, starts(runs, double), what.steps, DIGITS),
            engine=name,
            module=double(runs[0]),
            backend="aot_eager",
        )
        worst = max(gap(a, b) for a, b in zip(found, expected, strict=True))
        # The trace is float32 in all engines: its last bit may differ.
        assert worst < 1e-6, (case, name, worst)
        weights = max(
            float((f.theta[k].double() - v.double()).abs().max())
            for f, e in zip(found, expected, strict=True)
            for k, v in e.theta.items()
        )
        assert weights < 1e-9, (case, name, weights)


def test_replicas_that_train_alone_and_together_are_equal_bit_by_bit() -> None:
    """The engine of the GPU, without its capture: a replica's kernels do not know the others."""
    what = recipe(augment="flip+crop1", steps=30)
    runs = runs_of(what)
    together = advance_many(runs, starts(runs), 30, DIGITS, engine="graphs")
    for run, state, found in zip(runs, starts(runs), together, strict=True):
        (alone,) = advance_many([run], [state], 30, DIGITS, engine="graphs")
        assert gap(alone, found) == 0
        (wide,) = advance_many([run], [state], 30, DIGITS, engine="graphs", width=3)
        assert gap(wide, found) == 0
    (narrow,) = advance_many(runs[:1], starts(runs[:1]), 30, DIGITS, engine="vmap", width=3)
    again = advance_many(runs, starts(runs), 30, DIGITS, engine="vmap")
    assert gap(narrow, again[0]) == 0, "filled up to the same width: the same bits"


@pytest.mark.parametrize("name", ["vmap", "graphs"])
def test_stopping_and_going_on_is_not_stopping(name: str) -> None:
    """Across an epoch's end, in the middle of one, and with Adam's count of steps."""
    what = recipe(optimizer="adam", lr=1e-2, augment="crop1", net=f"{MLP},norm=batch")
    runs = runs_of(what, 2)
    whole = advance_many(runs, starts(runs), 40, DIGITS, engine=name)
    states = starts(runs)
    for stop in (7, PER_EPOCH, PER_EPOCH + 1, 40):
        states = advance_many(runs, states, stop, DIGITS, engine=name)
        assert [s.step for s in states] == [stop] * 2
    assert max(gap(a, b) for a, b in zip(states, whole, strict=True)) == 0
    assert int(whole[0].theta["layer1.norm.num_batches_tracked"]) == 40


def test_checkpoints_and_resume_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_LOOK_EVERY", 7)
    what = recipe()
    runs = runs_of(what, 2)
    kept: list[tuple[int, State]] = []
    asked: list[int] = []

    def tick(step: int) -> bool:
        asked.append(step)
        return step == 11

    given = starts(runs)
    untouched = starts(runs)
    advance_many(
        *(runs, given, 40, DIGITS),
        engine="vmap",
        checkpoints=(5, 40),
        save=lambda m, s: kept.append((m, s)),
        tick=tick,
    )
    assert [(m, s.step) for m, s in kept] == [(m, k) for k in (5, 11, 40) for m in (0, 1)]
    assert asked == [s for s in range(1, 40) if s != 5]
    assert max(gap(a, b) for a, b in zip(given, untouched, strict=True)) == 0
    for m, state in kept:
        alone = advance(runs[m], starts(runs)[m], state.step, DIGITS)
        assert gap(state, alone) < 1e-5


@pytest.mark.slow
def test_loss_curves_and_errors_agree_within_noise() -> None:
    """float32, a real schedule: the engines' mean curves differ by less than the runs do."""
    what = recipe(
        net="mlp:widths=40x40",
        steps=230,
        lr=0.05,
        schedule="step",
        milestones=(0.6,),
        augment="crop1",
    )
    runs = runs_of(what, 3)
    module = build(runs[0], DIGITS, CPU)
    walker = Walker(module, {"test": DIGITS.test})
    curves, errors = {}, {}
    for name in ("loop", "vmap", "graphs"):
        done = advance_many(runs, starts(runs), what.steps, DIGITS, engine=name)
        curves[name] = torch.stack([s.trace for s in done])
        errors[name] = [walker.at(s.theta)["test"].error for s in done]
    spread = statistics.stdev(errors["loop"]) + 0.3
    for name in ("vmap", "graphs"):
        # The first steps agree in all but rounding; then rounding grows as it does.
        assert float((curves[name] - curves["loop"])[:, :8].abs().max()) < 1e-3
        late = [c[:, -50:].mean() for c in (curves[name], curves["loop"])]
        assert float((late[0] - late[1]).abs()) < 0.05 * float(late[1]) + 0.01
        gap_of_means = statistics.mean(errors[name]) - statistics.mean(errors["loop"])
        assert abs(gap_of_means) < spread, errors


@pytest.mark.parametrize(
    ("name", "net"),
    [
        *(("vmap", MLP), ("vmap", f"{MLP},norm=layer"), ("graphs", f"{MLP},norm=batch")),
        *(("graphs", MLP), ("graphs", f"{MLP},norm=layer"), ("graphs", "resnet8:width=4")),
    ],
)
def test_bf16_reads_rounded_weights_and_keeps_float32_ones(name: str, net: str) -> None:
    what = recipe(net=net, precision="bf16", steps=3, lr=0.02)
    runs = runs_of(what, 2)
    found = advance_many(runs, starts(runs), 3, DIGITS, engine=name)
    for run, start, state in zip(runs, starts(runs), found, strict=True):
        expected = advance(run, start, 3, DIGITS)
        assert all(v.dtype == expected.theta[k].dtype for k, v in state.theta.items())
        assert float((state.trace - expected.trace).abs().max()) < 0.05
        (exact,) = advance_many([Run(recipe(net=net, steps=3, lr=0.02))], [start], 1, DIGITS)
        assert not torch.equal(state.trace[:1], exact.trace[:1])
        weight = state.theta["head.weight"]
        assert not torch.equal(weight, weight.bfloat16().float()), "master weights are float32"


def test_a_warm_up_takes_no_step() -> None:
    """What a capture runs before: everything it changed is put back, also at an epoch's end."""
    what = recipe(net=f"{MLP},norm=batch", optimizer="adam", augment="flip")
    runs = runs_of(what, 2)
    states = advance_many(runs, starts(runs), PER_EPOCH - 1, DIGITS, engine="graphs")
    steppers = []
    for warm in (False, True):
        stepper = Stepper(
            *(build(runs[0], DIGITS, CPU), what, DIGITS, states, 40), engine="graphs", window=10
        )
        with Feed(runs, DIGITS) as feed:
            stepper.feed(feed.epoch(0), PER_EPOCH - 1)
            if warm:
                stepper.warm_up()
            stepper.step()
            stepper.feed(feed.epoch(1), 0)
            stepper.step()
        steppers.append(stepper)
    a, b = (s.stack.states(PER_EPOCH + 1, list(s.losses()[:2].T)) for s in steppers)
    assert max(gap(x, y) for x, y in zip(a, b, strict=True)) == 0


def test_the_feed_is_the_loops_order_and_augmentation() -> None:
    from companion.data import Augmenter

    run = runs_of(recipe(augment="flip+crop1"), 1)[0]
    augmenter = Augmenter(DIGITS.train, Feed([run], DIGITS).augmentation, DIGITS.black)
    with Feed([run, run], DIGITS) as feed:
        for epoch in (0, 1, 5):
            got = feed.epoch(epoch)
            order = run.order_key().fold("epoch", epoch).permutation(len(DIGITS.train))
            assert got.rows.shape == (PER_EPOCH, 2, 60)
            assert torch.equal(got.rows[:, 1].reshape(-1), order[: PER_EPOCH * 60])
            draws = augmenter.draw(run.augment_key(), epoch)
            theirs, _ = augmenter.examples(order[60:120], draws)
            mine, _ = augmenter.pick_examples(
                got.rows[1, 0], type(draws)(*(t[1, 0] for t in got.tensors()[1:]))
            )
            assert torch.equal(mine, theirs)


def test_the_table_is_the_schedule() -> None:
    what = recipe(schedule="cosine", warmup=4)
    table = coefficients(what, 3, 40, [0, 0])
    assert table.flatten().tolist() == [what.learning_rate(s) for s in range(3, 40)]
    adam = coefficients(recipe(optimizer="adamw", weight_decay=0.1), 0, 5, [0, 7])
    assert adam.shape == (5, 3, 2)
    assert adam[2, 0, 1] == pytest.approx(0.1 / (1 - 0.9**10))


def test_divergence_names_the_run_and_saves_nothing_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_LOOK_EVERY", 10)
    what = recipe(lr=1e18)
    runs = runs_of(what, 2)
    kept: list[int] = []
    with pytest.raises(Diverged, match=r"not finite at step \d+ of 40 \(init 0, order 10, sgd"):
        advance_many(
            *(runs, starts(runs), 40, DIGITS),
            engine="vmap",
            checkpoints=(30,),
            save=lambda m, s: kept.append(s.step),
        )
    assert kept == []


def test_what_cannot_train_together_is_refused() -> None:
    runs = runs_of(recipe(), 2)
    states = starts(runs)
    with pytest.raises(BadParameter, match="2 runs and 1 states"):
        advance_many(runs, states[:1], 5, DIGITS)
    with pytest.raises(BadParameter, match="one recipe"):
        advance_many([runs[0], Run(recipe(lr=0.2))], states, 5, DIGITS)
    with pytest.raises(BadParameter, match="at one step"):
        advance_many(runs, [states[0], State(3, states[1].theta)], 5, DIGITS)
    with pytest.raises(BadParameter, match=r"engine: 'graph' is not known.*'graphs'"):
        advance_many(runs, states, 5, DIGITS, engine="graph")
    conv = runs_of(recipe(net="resnet8:width=4", precision="bf16"), 2)
    with pytest.raises(BadParameter, match="'vmap' does not train convolutions or BatchNorm in"):
        advance_many(conv, starts(conv), 5, DIGITS, engine="vmap")


def test_which_engine() -> None:
    cuda = torch.device("cuda")
    mlp, conv = (build(Run(recipe(net=n)), DIGITS, CPU) for n in (MLP, "resnet8:width=4"))
    assert [replicas.choose(m, CPU) for m in (mlp, conv)] == ["loop", "loop"]
    assert [replicas.choose(m, cuda) for m in (mlp, conv)] == ["vmap", "graphs"]
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    cumulative = nn.Sequential(nn.BatchNorm2d(3, momentum=None))
    for module in (dropout, cumulative):
        assert replicas.choose(module, cuda) == "loop"
        with pytest.raises(BadParameter, match=r"cannot train this network.*Use 'loop'"):
            replicas.choose(module, cuda, "graphs")
    small, large = (
        replicas.replica_bytes(build(Run(recipe(net=n)), DIGITS, CPU), recipe(net=n), DIGITS)
        for n in (MLP, "resnet8:width=32")
    )
    assert 64 << 20 < small < large


def test_frozen_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight
            self.head = nn.Linear(64, 10)
            self.a.bias.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.b(self.a(x.flatten(1)).relu()).relu())

    torch.manual_seed(0)
    module = Tied()
    run = Run(recipe())
    start = State(0, snapshot(module))
    expected = advance(run, start, 10, DIGITS, module=module)
    for name in ("vmap", "graphs"):
        (found,) = advance_many([run], [start], 10, DIGITS, module=module, engine=name)
        assert gap(found, expected) < 1e-5
        assert torch.equal(found.theta["a.bias"], start.theta["a.bias"])


# ---- the run store, with the CPU in the GPU's place


@pytest.fixture
def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Jobs take the GPU's way through the store; the list says who trained with how many."""
    calls: list[tuple[str, int, int]] = []
    real = replicas.advance_many

    def counted(runs: Any, states: Any, stop: int, *args: Any, **options: Any) -> Any:
        calls.append((options["engine"], len(runs), options["width"]))
        return real(runs, states, stop, *args, **options)

    def chosen(module: nn.Module, device: Any, name: str = "auto", _: Any = None) -> str:
        conv = any(isinstance(m, nn.Conv2d) for m in module.modules())
        return name if name != "auto" else "graphs" if conv else "vmap"

    monkeypatch.setattr(replicas, "advance_many", counted)
    monkeypatch.setattr(replicas, "choose", chosen)
    monkeypatch.setattr(engine, "_on_gpu", lambda device: True)
    return calls


def test_jobs_train_in_groups(store: Store, as_if_cuda: list[Any], tmp_path: Path) -> None:
    what = recipe()
    trunk = Run(what)
    copies = [Run(what, order=i, fork=Fork(trunk, 10)) for i in (1, 2, 3)]
    jobs = [Job(c, weights=(20, 40)) for c in copies]
    jobs += [Job(Run(what, order=7), weights=(40,)), Job(Run(recipe(lr=0.05)), weights=(40,))]
    train(jobs, store=store, at_once=2)
    assert sorted(as_if_cuda) == [("vmap", 1, 1)] * 4 + [("vmap", 2, 2)]
    for copy in copies:
        assert sorted(entry_of(copy, DIGITS, "cpu", store).files()) == [
            "made-by.json",
            "weights-00000020.safetensors",
            "weights-00000040.safetensors",
        ]
        start = load_state(trunk, 10, store=store)
        expected = advance(copy, State(10, start.theta), 40, DIGITS)
        found = load_weights(copy, store=store)
        assert max(float((found[k] - v).abs().max()) for k, v in expected.theta.items()) < 1e-5
    assert made_by(copies[0], store=store)["engine"] == "vmap"
    before = len(as_if_cuda)
    train(jobs, store=store)
    assert len(as_if_cuda) == before, "what exists is not trained again"


def test_only_wanted_states_are_kept(store: Store, as_if_cuda: list[Any]) -> None:
    a, b = Run(recipe(), order=1), Run(recipe(), order=2)
    train([Job(a, weights=(5, 40)), Job(b, weights=(40,), states=(9,))], store=store)
    assert [c[1] for c in as_if_cuda] == [2]
    names = [sorted(entry_of(r, DIGITS, "cpu", store).files()) for r in (a, b)]
    assert names[0] == [
        *("made-by.json", "weights-00000005.safetensors", "weights-00000040.safetensors"),
    ]
    assert names[1] == [
        *("made-by.json", "state-00000009.safetensors", "weights-00000040.safetensors"),
    ]


def test_a_loop_on_a_gpu_keeps_a_run_once_it_ends(
    store: Store, as_if_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job(Run(recipe(), order=i), weights=(40,)) for i in (1, 2)]
    real = loop.advance
    begun: list[Run] = []

    def until_the_second(run: Run, *args: Any, **options: Any) -> State:
        begun.append(run)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(run, *args, **options)

    monkeypatch.setattr(loop, "advance", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(jobs, store=store, engine="loop")
    kept = [set(entry_of(run, DIGITS, "cpu", store).files()) for run in begun]
    assert kept == [{"weights-00000040.safetensors", "made-by.json"}, set()]
    assert made_by(begun[0], store=store)["replicas"] == 1


def test_a_group_killed_goes_on_with_the_same_bits(
    store: Store, as_if_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job(Run(recipe(), order=i), weights=(40,)) for i in (1, 2)]
    whole = Store(store.root / "other")
    train(jobs, store=whole)
    real = Stepper.step
    steps = 0

    def stop_at_30(self: Stepper) -> None:
        nonlocal steps
        steps += 1
        if steps == 30:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "RESUME_EVERY_S", 0.0)
        patch.setattr(Stepper, "step", stop_at_30)
        train(jobs, store=store)
    entry = entry_of(jobs[0].run, DIGITS, "cpu", store)
    assert int(entry.read_tensors("resume.safetensors")["step"]) == 29
    train(jobs, store=store)
    for job in jobs:
        a, b = (load_weights(job.run, store=s) for s in (store, whole))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_null_control_trains_as_the_stored_run_was(store: Store, as_if_cuda: list[Any]) -> None:
    """Same engine, same number of replicas: on a GPU its kernels may depend on both."""
    what = recipe(net="resnet8:width=4", steps=4)
    runs = [Run(what, order=i) for i in range(3)]
    train([Job(r, weights=(4,)) for r in runs], store=store)
    gate = check_null(runs[1], store=store)
    assert gate.passed and gate.value == 0
    assert as_if_cuda == [("graphs", 3, 3), ("graphs", 1, 3)]


def test_stacked_replicas_are_one_of_a_few_numbers(store: Store, as_if_cuda: list[Any]) -> None:
    """The next of a few widths: not always 27, and not every number, as bits depend on it."""
    most = [replicas.stacked(count, 27) for count in range(1, 28)]
    assert most == [1, 2, 4, 4, *[9] * 5, *[16] * 7, *[27] * 11]
    assert [replicas.stacked(count, 11) for count in (3, 9, 10, 11, 12)] == [4, 9, 11, 11, 12]
    jobs = [Job(Run(recipe(), order=i), weights=(40,)) for i in range(3)]
    train(jobs, store=store)
    assert as_if_cuda == [("vmap", 3, 4)] and made_by(jobs[0].run, store=store)["replicas"] == 4
    load_weights(jobs[1].run, 0, store=store)  # its start, which nobody had asked for
    gate = check_null(jobs[1].run, store=store)
    assert gate.passed and as_if_cuda[1:] == [("vmap", 1, 4)]


def test_a_run_stopped_in_company_goes_on_alone_with_the_same_bits(
    store: Store, as_if_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of replicas it began with is kept beside what it can go on from."""
    jobs = [Job(Run(recipe(), order=i), weights=(40,)) for i in range(3)]
    whole = Store(store.root / "other")
    train(jobs, store=whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "RESUME_EVERY_S", 0.0)
        real, left = Stepper.step, iter(range(30))

        def step(self: Stepper) -> None:
            if next(left) == 29:
                raise KeyboardInterrupt
            real(self)

        patch.setattr(Stepper, "step", step)
        train(jobs, store=store)
    found, expected = (load_weights(jobs[1].run, store=s) for s in (store, whole))
    assert as_if_cuda[-1] == ("vmap", 1, 4)
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    train(jobs, store=store)
    assert as_if_cuda[-1] == ("vmap", 2, 4), "the others, too"


@pytest.fixture
def broken(as_if_cuda: list[Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """engine -> what it raises when it is to train."""
    raised: dict[str, BaseException] = {}
    real = replicas.advance_many

    def sometimes(*args: Any, **options: Any) -> Any:
        if error := raised.get(options["engine"]):
            as_if_cuda.append((options["engine"], "fails"))
            raise error
        return real(*args, **options)

    monkeypatch.setattr(replicas, "advance_many", sometimes)
    return raised


def test_a_simpler_engine_takes_over(
    store: Store,
    as_if_cuda: list[Any],
    broken: dict[str, BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once a call, with a word in the log; what is kept says which engine it was."""
    broken |= {"vmap": RuntimeError("no batching rule\nand more"), "compile": OSError("no gcc")}
    jobs = [Job(Run(recipe(), order=i), weights=(40,)) for i in range(4)]
    train(jobs, store=store, at_once=2)
    assert as_if_cuda == [("vmap", "fails"), ("graphs", 2, 2), ("graphs", 2, 2)]
    assert made_by(jobs[0].run, store=store)["engine"] == "graphs"
    (said,) = caplog.messages
    assert said.startswith(f"the engine 'vmap' cannot train {MLP} on digits (lr 0.1, T = 40); ")
    assert said.endswith("'graphs' takes over. RuntimeError: no batching rule")
    as_if_cuda.clear()
    broken["graphs"] = RuntimeError("operation not permitted when stream is capturing")
    train(
        [Job(Run(recipe(), order=i), weights=(40,)) for i in (8, 9)], store=store, engine="compile"
    )
    expected = [("compile", "fails"), ("graphs", "fails"), *[("loop", 1, 1)] * 2]
    assert as_if_cuda == expected and len(caplog.messages) == 3
    as_if_cuda.clear()
    broken["loop-compile"] = RuntimeError("no compiler")
    train([Job(Run(recipe(), order=7), weights=(40,))], store=store, engine="loop-compile")
    assert as_if_cuda == [("loop-compile", "fails"), ("loop", 1, 1)]
    broken["loop"] = RuntimeError("the last one is an error")
    with pytest.raises(RuntimeError, match="the last one"):
        train([Job(Run(recipe(), order=6), weights=(40,))], store=store)


def test_what_a_failed_engine_held_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Stepper and its tensors live on in the error's frames: first they go, then the cache."""

    class Held:
        pass

    alive: list[weakref.ref[Held]] = []
    order: list[str] = []

    def attempt(*rest: Any) -> None:
        order.append(rest[-2])
        if rest[-2] == "graphs":
            held = Held()
            alive.append(weakref.ref(held))
            raise RuntimeError("capture failed")

    def empty_cache() -> None:
        assert alive[0]() is None
        order.append("empty_cache")

    monkeypatch.setattr(engine, "_advance", attempt)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    split = SimpleNamespace(x=SimpleNamespace(device=torch.device("cuda")))
    group: Any = [SimpleNamespace(job=Job(Run(recipe())))]
    data: Any = SimpleNamespace(train=split)
    engine._train_group(group, 40, data, nn.Linear(1, 1), "graphs", 0, False)
    assert order == ["graphs", "empty_cache", "loop"]


@pytest.mark.parametrize("error", [Diverged("x"), OutOfTime("x"), KeyboardInterrupt()])
def test_what_is_no_fault_of_the_engine_goes_through(
    error: BaseException, store: Store, as_if_cuda: list[Any], broken: dict[str, BaseException]
) -> None:
    broken["vmap"] = error
    with pytest.raises(type(error)):
        train([Job(Run(recipe()), weights=(40,))], store=store)
    assert as_if_cuda == [("vmap", "fails")]


def test_a_null_control_takes_no_other_engine(
    store: Store,
    as_if_cuda: list[Any],
    broken: dict[str, BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its bits are compared, so another engine's would say nothing."""
    run = Run(recipe())
    train([Job(run, weights=(40,))], store=store)
    with monkeypatch.context() as patch:
        patch.setattr(engines, "working", lambda *_: "loop")  # it has failed since, elsewhere
        gate = check_null(run, Evaluation(points=5), store=store)
    assert gate.passed and as_if_cuda[-1] == ("vmap", 1, 1)
    broken["vmap"] = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        check_null(run, store=store)


def test_an_engine_for_everything_inside(
    store: Store, as_if_cuda: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Through everything that trains, where it is not told otherwise, and only inside."""
    with using("graphs"):
        with using("auto"):
            load_weights(Run(recipe(), order=1), store=store)
        with using("loop"):
            train([Job(Run(recipe(), order=2), weights=(40,))], store=store)
        train([Job(Run(recipe(), order=3), weights=(40,))], store=store)
        train([Job(Run(recipe(), order=4), weights=(40,))], store=store, engine="vmap")
    load_state(Run(recipe(), order=5), 3, store=store)
    assert [call[0] for call in as_if_cuda] == ["graphs", "loop", "graphs", "vmap", "vmap"]
    with (
        pytest.raises(BadParameter, match=r"engine: 'graph' is not known.*'graphs'"),
        using("graph"),
    ):
        pass
    assert not caplog.messages
    # A chapter trains several networks; one that the engine cannot train gets a simpler one.
    half = recipe(net=f"{MLP},norm=batch", precision="bf16", steps=3)
    as_if_cuda.clear()
    with using("vmap"):
        train([Job(Run(half, order=i), weights=(3,)) for i in (1, 2)], store=store, at_once=1)
    assert [call[0] for call in as_if_cuda] == ["graphs"] * 2
    (said,) = caplog.messages
    assert "'vmap' does not train convolutions or BatchNorm in bf16" in said


def test_on_a_cpu_the_loop_trains_whatever_is_asked_for(store: Store) -> None:
    run, start = Run(recipe()), starts([Run(recipe())])[0]
    expected = advance(run, start, 40, DIGITS)
    with using("graphs"):
        found = load_weights(run, store=store)
    assert all(torch.equal(found[k], v) for k, v in expected.theta.items())
    assert made_by(run, store=store) == {}


# ---- what only a GPU shows


def on_gpu() -> Dataset:
    return DIGITS.to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vmap", "graphs", "compile"])
@pytest.mark.parametrize("net", [MLP, "resnet8:width=8", "vgg11:width=8"])
def test_a_captured_step_is_the_eager_step(name: str, net: str) -> None:
    """Capture and replay against the same function called: equal bits, across an epoch's end."""
    if name == "vmap" and net != MLP:
        pytest.skip("vmap is for networks without convolutions")
    what = recipe(net=net, steps=30, lr=0.02, augment="crop1", precision="bf16")
    runs = runs_of(what)
    eager, captured = (
        advance_many(runs, starts(runs), 30, on_gpu(), engine=name, capture=capture)
        for capture in (False, True)
    )
    assert max(gap(a, b) for a, b in zip(eager, captured, strict=True)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["loop", "vmap", "graphs", "compile"])
@pytest.mark.parametrize("net", [MLP, "resnet8:width=8"])
def test_gpu_engines_agree_with_the_cpu_loop(name: str, net: str) -> None:
    what = recipe(net=net, steps=30, lr=0.02, augment="crop1")
    runs = runs_of(what)
    expected = [advance(r, s, 30, DIGITS) for r, s in zip(runs, starts(runs), strict=True)]
    found = advance_many(runs, starts(runs), 30, on_gpu(), engine=name)
    for a, b in zip(found, expected, strict=True):
        assert float((a.trace.cpu() - b.trace)[:10].abs().max()) < 0.02
        assert float((a.trace.cpu() - b.trace)[-10:].mean().abs()) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("net", [MLP, "resnet8:width=8", "vgg11:width=8"])
def test_a_replica_has_the_same_bits_twice_and_in_any_company(net: str) -> None:
    what = recipe(net=net, steps=60, lr=0.02, augment="crop1", precision="bf16")
    runs = runs_of(what, 4)
    a, b = (advance_many(runs, starts(runs), 60, on_gpu()) for _ in "ab")
    assert max(gap(x, y) for x, y in zip(a, b, strict=True)) == 0
    (alone,) = advance_many(runs[2:3], starts(runs[2:3]), 60, on_gpu(), width=4)
    assert gap(alone, a[2]) == 0


@pytest.mark.gpu
def test_the_null_control_is_exactly_zero_on_a_gpu(store: Store) -> None:
    for net in (MLP, "resnet8:width=8"):
        runs = [Run(recipe(net=net, steps=60, lr=0.02), order=i) for i in range(3)]
        train([Job(r, weights=(60,)) for r in runs], store=store, device="cuda")
        gate = check_null(runs[0], store=store, device="cuda")
        assert gate.passed and gate.value == 0


def test_the_loop_engine_is_advance() -> None:
    runs = runs_of(recipe(), 2)
    found = advance_many(runs, starts(runs), 10, DIGITS)
    expected = [loop.advance(r, s, 10, DIGITS) for r, s in zip(runs, starts(runs), strict=True)]
    assert max(gap(a, b) for a, b in zip(found, expected, strict=True)) == 0
