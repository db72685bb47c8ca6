"""Runs under a mask: pruned weights are exactly 0 all the way, on every engine; rewinds are bits.

Gate G4 of the sheet on Frankle et al. 2020, as properties. How masks are chosen: tests/tickets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from companion import data as datasets
from companion.connectivity import gates
from companion.core.errors import BadParameter, OutOfTime
from companion.core.masks import Mask, masked
from companion.core.runs import Store, digest
from companion.core.theta import snapshot
from companion.data import Dataset
from companion.experiments.pairs import Evaluation, check_null
from companion.training import (
    Fork,
    Job,
    MaskRecipe,
    Recipe,
    Run,
    State,
    advance,
    advance_many,
    build,
    engine,
    entry_of,
    lineage,
    load_mask,
    load_state,
    load_weights,
    mask_entry,
    pruned,
    train,
)

CPU = torch.device("cpu")
DIGITS = datasets.load("digits")
COMPILED = [pytest.param(name, marks=pytest.mark.slow) for name in ("loop-compile", "compile")]
ENGINES = ["loop", "vmap", "graphs", *COMPILED]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"nesterov": True, "weight_decay": 0.01},
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
}


def recipe(**changes: Any) -> Recipe:
    base: dict[str, Any] = {"net": "mlp:widths=8x2", "data": "digits", "steps": 12, "batch": 60}
    return Recipe(**{**base, **changes})


def some_mask(run: Run, seed: int, share: float) -> dict[str, Tensor]:
    """Random; of every tensor of two dimensions or more."""
    draw = torch.Generator().manual_seed(seed)
    theta = build(run, DIGITS, CPU).state_dict()
    return {n: torch.rand(v.shape, generator=draw) < share for n, v in theta.items() if v.ndim > 1}


def start_of(run: Run, mask: Mask) -> State:
    module = build(run, DIGITS, CPU)
    return pruned(State(0, snapshot(module)), mask, module)


def zeros(state: State, mask: Mask, run: Run) -> None:
    """What a pruned weight has: +0, and nothing in the optimiser. And what is left has moved."""
    trained = [n for n, p in build(run, DIGITS, CPU).named_parameters() if p.requires_grad]
    for name, kept in mask.items():
        gone = state.theta[name][~kept]
        assert not bool(gone.any()) and not bool(gone.signbit().any()), name
        for slot, value in state.optimizer.items():
            if value.ndim and trained[int(slot.partition(".")[0])] == name:
                assert not bool(value[~kept].any()), slot
    assert state.mask.keys() == mask.keys()


@pytest.mark.parametrize("name", ENGINES)
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from(["mlp:widths=8x2", "mlp:widths=8x2,norm=batch", "mlp:widths=8,norm=layer"]),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_pruned_weights_stay_at_zero_on_every_engine(
    name: str, optimizer: str, net: str, seed: int, share: float
) -> None:
    what = recipe(net=net, steps=5, **OPTIMIZERS[optimizer])
    runs = [Run(what, init=i, order=10 + i) for i in range(3)]
    # The second is dense: replicas of both kinds train side by side.
    masks: list[dict[str, Tensor]] = [some_mask(runs[0], seed, share), {}]
    masks.append(some_mask(runs[2], seed + 1, 0.3))
    states = [start_of(run, mask) for run, mask in zip(runs, masks, strict=True)]
    kept: list[tuple[int, State]] = []
    done = advance_many(
        *(runs, states, what.steps, DIGITS),
        engine=name,
        backend="aot_eager",
        checkpoints=(2,),
        save=lambda m, state: kept.append((m, state)),
    )
    assert {m for m, _ in kept} == {0, 1, 2}
    for m, state in [*kept, *enumerate(done)]:
        zeros(state, masks[m], runs[m])
    # The dense one is what it is alone, and the sparse ones what the loop makes of them.
    for run, state, found in zip(runs, states, done, strict=True):
        expected = advance(run, state, what.steps, DIGITS)
        for n, v in expected.theta.items():
            assert torch.allclose(v, found.theta[n], atol=1e-4), (name, n)


@pytest.mark.parametrize("name", ["loop", "graphs", "vmap"])
def test_what_is_kept_trains_and_convolutions_too(name: str) -> None:
    what = recipe(net="resnet8:width=2", steps=3, lr=0.02)
    run = Run(what)
    mask = some_mask(run, 1, 0.5)
    (found,) = advance_many([run], [start_of(run, mask)], 3, DIGITS, engine=name)
    zeros(found, mask, run)
    start = start_of(run, mask)
    moved = [(found.theta[n] != start.theta[n])[kept].float().mean() for n, kept in mask.items()]
    assert min(moved) > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["loop", "vmap", "graphs", "compile"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_pruned_weights_stay_at_zero_on_a_gpu(name: str, precision: str) -> None:
    what = recipe(steps=30, precision=precision, **OPTIMIZERS["momentum"])
    runs = [Run(what, init=i, order=10 + i) for i in range(2)]
    masks: list[dict[str, Tensor]] = [some_mask(runs[0], 1, 0.3), {}]
    states = [start_of(run, mask) for run, mask in zip(runs, masks, strict=True)]
    done = advance_many(runs, states, 30, DIGITS.to("cuda"), engine=name)
    for run, mask, state in zip(runs, masks, done, strict=True):
        zeros(state, mask, run)


def test_a_masked_network_trains_as_one_in_which_the_mask_is_a_layer() -> None:
    """An implementation of its own: the weights are parametrised by mask * w, without decay."""
    run = Run(recipe(lr=0.05))
    mask = some_mask(run, 3, 0.4)
    found = advance(run, start_of(run, mask), 12, DIGITS)
    module = build(run, DIGITS, CPU)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    opt = torch.optim.SGD(leaves.values(), 0.05, momentum=0.9)
    for step in range(12):
        rows = run.order_key().fold("epoch", 0).permutation(len(DIGITS.train))
        rows = rows[60 * step : 60 * (step + 1)]
        used = {n: p * mask[n] if n in mask else p for n, p in leaves.items()}
        logits = torch.func.functional_call(module, used, (DIGITS.train.x[rows],))
        opt.zero_grad()
        torch.nn.functional.cross_entropy(logits, DIGITS.train.y[rows]).backward()
        opt.step()
    for n, p in leaves.items():
        expected = p.detach() * mask[n] if n in mask else p.detach()
        assert torch.allclose(expected, found.theta[n], atol=1e-5), n


def test_a_state_carries_its_mask_through_files_and_stops() -> None:
    run = Run(recipe(optimizer="adam", lr=0.01))
    mask = some_mask(run, 5, 0.3)
    whole = advance(run, start_of(run, mask), 12, DIGITS)
    half = advance(run, start_of(run, mask), 7, DIGITS)
    again = State.from_tensors(half.tensors())
    assert {n: v.dtype for n, v in again.mask.items()} == dict.fromkeys(mask, torch.bool)
    found = advance(run, again, 12, DIGITS)
    assert all(torch.equal(v, found.theta[n]) for n, v in whole.theta.items())
    assert all(torch.equal(v, found.optimizer[n]) for n, v in whole.optimizer.items())
    assert not any(k.startswith("mask/") for k in State(0, half.theta).tensors())
    assert not any(k.startswith("mask/") for k in half.tensors(full=False))


def test_a_mask_that_does_not_fit_is_refused() -> None:
    run = Run(recipe())
    state = start_of(run, {})
    module = build(run, DIGITS, CPU)
    with pytest.raises(BadParameter, match=r"layer9.weight is not trained in this network"):
        pruned(state, {"layer9.weight": torch.ones(2, dtype=torch.bool)}, module)
    with pytest.raises(BadParameter, match="Mask and network must be of one architecture"):
        pruned(state, {"head.weight": torch.ones(2, dtype=torch.bool)}, module)
    sparse = replace(run, mask=Half(run))
    for way in (
        lambda: advance(sparse, state, 1, DIGITS),
        lambda: advance_many([run, sparse], [state, state], 1, DIGITS, engine="graphs"),
    ):
        with pytest.raises(BadParameter, match="the run has one, the state none"):
            way()


# ---- in the store


@dataclass(frozen=True)
class Half(MaskRecipe):
    """The larger half of each tensor of a run at its end: the simplest rule there is."""

    RULE = "half"

    run: Run
    density: float = 0.5

    def details(self, fingerprint: str, device: str) -> dict[str, Any]:
        return {"run": self.run.key(fingerprint, device)}

    def jobs(self) -> list[Job]:
        return [Job(self.run, weights=(self.run.last_step,))]

    def make(self, data: Dataset, store: Store) -> Mask:
        made.append(self)
        theta = load_weights(self.run, store=store, device=str(data.train.x.device))
        return {n: v.abs() >= v.abs().median() for n, v in theta.items() if v.ndim > 1}


made: list[Half] = []


@pytest.fixture(autouse=True)
def nothing_made() -> None:
    made.clear()


DENSE = Run(recipe(), order="dense")
TRUNK = Run(recipe(), order="trunk")


def sparse_run(k: int = 4, order: str = "sparse", **fork: Any) -> Run:
    return Run(recipe(), order=order, fork=Fork(TRUNK, k, **fork), mask=Half(DENSE))


def test_keys_of_dense_runs_stay_and_a_mask_makes_another_run() -> None:
    fingerprint = DIGITS.fingerprint
    assert "mask" not in DENSE.identity(fingerprint, "cpu")
    sparse = replace(DENSE, mask=Half(DENSE))
    identity = sparse.identity(fingerprint, "cpu")
    assert identity.pop("mask") == Half(DENSE).key(fingerprint, "cpu")
    assert identity == DENSE.identity(fingerprint, "cpu")
    assert Half(DENSE).key(fingerprint, "cpu") == digest(Half(DENSE).identity(fingerprint, "cpu"))
    other = replace(DENSE, mask=Half(replace(DENSE, order="other")))
    deeper = replace(DENSE, mask=Half(sparse))
    assert len({r.key(fingerprint, "cpu") for r in (DENSE, sparse, other, deeper)}) == 4


def test_a_mask_of_another_network_or_dataset_is_refused() -> None:
    with pytest.raises(BadParameter, match=r"it comes from the net 'mlp.*', the run has 'mlp:"):
        Run(recipe(net="mlp:widths=9x2"), mask=Half(DENSE))
    with pytest.raises(BadParameter, match=r"data 'digits', the run has 'digits@split-a'"):
        Run(recipe(data="digits@split-a"), mask=Half(DENSE))


def test_a_fork_of_a_sparse_run_at_step_0_is_not_a_fresh_run() -> None:
    sparse = replace(TRUNK, mask=Half(DENSE))
    assert Run(recipe(), fork=Fork(sparse, 0)).fork is not None
    assert Run(recipe(), fork=Fork(TRUNK, 0), mask=Half(DENSE)).fork is None


def test_a_rewind_is_bitwise_and_what_a_mask_needs_is_trained_first(store: Store) -> None:
    sparse = sparse_run()
    train([Job(sparse, weights=(4, 12), states=(9,))], store=store, workers=1)
    assert len(made) == 1, "once, and kept"
    mask = load_mask(Half(DENSE), store=store)
    assert len(made) == 1
    w_k = load_state(TRUNK, 4, store=store).theta
    rewound, ended = (load_weights(sparse, s, store=store) for s in (4, 12))
    expected = masked(w_k, mask)
    assert all(
        torch.equal(v.view(torch.int32), rewound[n].view(torch.int32)) for n, v in expected.items()
    )
    gate = gates.masks(ended, [mask], rewound=rewound, start=w_k, keep=0.5, slack=8)
    assert gate.passed, gate
    zeros(load_state(sparse, 9, store=store), mask, sparse)
    entry = mask_entry(Half(DENSE), store, "cpu")
    assert entry.bytes() < 8 * 64 * 8, "a bit a weight"
    assert entry.key == sparse.identity(DIGITS.fingerprint, "cpu")["mask"]


def test_restored_momentum_is_masked_and_restarts_train_all_steps(store: Store) -> None:
    for sparse in (sparse_run(optimizer="restore"), sparse_run(schedule="restart")):
        mask = load_mask(Half(DENSE), store=store)
        first = load_state(sparse, sparse.first_step, store=store)
        zeros(first, mask, sparse)
        assert sparse.fork is not None
        assert bool(first.optimizer) == (sparse.fork.optimizer == "restore")
        zeros(load_state(sparse, 12, store=store), mask, sparse)


@pytest.mark.slow
def test_the_pool_makes_the_same_bits(store: Store, tmp_path: Path) -> None:
    """Two workers, each of which may be the one that makes the mask."""
    jobs = [Job(sparse_run(order=o), weights=(12,)) for o in ("a", "b", "c")]
    other = Store(tmp_path / "other")
    train(jobs, store=store, workers=1)
    train(jobs, store=other, workers=2)
    for job in jobs:
        one, two = (load_weights(job.run, store=s) for s in (store, other))
        assert all(torch.equal(v, two[n]) for n, v in one.items())


def test_a_killed_sparse_run_goes_on_with_the_same_bits(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = sparse_run()
    expected = load_weights(sparse, store=Store(tmp_path / "other"))
    real = engine._Work.save

    def dies(self: Any, reached: State) -> None:
        real(self, reached)
        if self.job.run == sparse and reached.step == 8:
            raise OutOfTime("killed")

    monkeypatch.setattr(engine, "_clock", lambda: lambda step: step == 8)
    monkeypatch.setattr(engine._Work, "save", dies)
    with pytest.raises(OutOfTime):
        train([Job(sparse, weights=(12,))], store=store, workers=1)
    monkeypatch.setattr(engine._Work, "save", real)
    seen: list[int] = []
    real_advance = engine._advance

    def watched(group: Any, *rest: Any) -> None:
        seen.append(group[0].state.step)
        zeros(group[0].state, load_mask(Half(DENSE), store=store), sparse)
        real_advance(group, *rest)

    monkeypatch.setattr(engine, "_advance", watched)
    found = load_weights(sparse, store=store)
    assert seen == [8], "from the resume point"
    assert all(torch.equal(v, found[n]) for n, v in expected.items())


def test_a_corrupt_mask_is_said_and_made_again(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_mask(Half(DENSE), store=store)
    entry = mask_entry(Half(DENSE), store, "cpu")
    (entry.path / "mask.safetensors").write_bytes(b"no")
    again = load_mask(Half(DENSE), store=store)
    assert len(made) == 2 and "made again" in caplog.text
    assert all(torch.equal(v, again[n]) for n, v in first.items())


def test_the_null_control_of_a_sparse_run_retrains_only_that_run(store: Store) -> None:
    sparse = sparse_run()
    evaluation = Evaluation(points=3, train_examples=40, test_examples=30)
    gate = check_null(sparse, evaluation, store=store)
    assert gate.passed and gate.value == 0
    assert len(made) == 1, "the mask is copied, not made again"


def test_lineage_puts_each_run_once_as_early_as_it_can_be() -> None:
    first = replace(DENSE, mask=Half(DENSE))
    second = replace(DENSE, mask=Half(first))
    copies = [replace(first, order="copy"), sparse_run()]
    jobs = [Job(run, weights=(12,)) for run in (second, *copies, DENSE)]
    waves = lineage(jobs)
    found = [{job.run for job in wave} for wave in waves]
    assert found == [{DENSE, TRUNK}, {first, *copies}, {second}]
    assert sum(len(wave) for wave in waves) == len(set().union(*found))
    (trunk,) = [job for job in waves[0] if job.run == TRUNK]
    assert trunk.states == (4,)


def test_an_entry_of_the_store_is_the_same_for_equal_masks(store: Store) -> None:
    a, b = sparse_run(), sparse_run()
    assert a == b and a is not b
    assert entry_of(a, DIGITS, "cpu", store).key == entry_of(b, DIGITS, "cpu", store).key
    known: Mapping[str, Any] = a.identity(DIGITS.fingerprint, "cpu")
    assert len(known["mask"]) == 64, "a digest, however long the chain"
