"""Chains of masks over stored runs: what is trained, what is not trained again, what counts.

How masks are chosen: tests/tickets. That they hold in training: tests/training/test_masked.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from companion import data as datasets
from companion.connectivity import Barrier, Curve
from companion.connectivity.gates import Gate, masks
from companion.core import closing
from companion.core.errors import BadParameter, OutOfTime
from companion.core.masks import Mask, alive, density, masked
from companion.core.runs import Store
from companion.experiments import measurement, tickets
from companion.experiments.budget import count
from companion.experiments.instability import Sample, copy, trunk
from companion.experiments.measurement import key_of
from companion.experiments.methods import match
from companion.experiments.pairs import Evaluation, PairResult
from companion.experiments.tickets import (
    KINDS,
    Chain,
    MaskCheck,
    Search,
    Subnetwork,
    Tickets,
    find_tickets,
    plan_tickets,
)
from companion.tickets import Pruning, carry, prunable
from companion.training import (
    Job,
    Recipe,
    Run,
    build,
    engine,
    lineage,
    load_mask,
    load_state,
    load_weights,
    train,
)

DIGITS = datasets.load("digits")
CPU = torch.device("cpu")
RECIPE = Recipe(net="mlp:widths=12x2", data="digits", steps=6, batch=60, lr=0.05)
FEW = Evaluation(points=3, train_examples=40, test_examples=30)
CHAIN = Chain(RECIPE, init=0, k=2)


def search(**changes: Any) -> Search:
    base: dict[str, Any] = {"recipe": RECIPE, "ks": (2,), "levels": (0, 1, 3), "inits": 1}
    return Search(**{**base, "kinds": ("imp",), **changes})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that are advanced, in order."""
    seen: list[Run] = []
    real = engine._advance

    def watched(group: Any, *rest: Any) -> None:
        seen.extend(work.job.run for work in group)
        real(group, *rest)

    monkeypatch.setattr(engine, "_advance", watched)
    return seen


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[n]) for n, v in a.items())


# ---- what a level is


def test_levels_are_pruned_from_the_run_before_and_rewound() -> None:
    assert CHAIN.run(0) == copy(RECIPE, 0, 2, 1) and CHAIN.run(0).mask is None
    third = CHAIN.run(3)
    assert third.fork == CHAIN.run(0).fork and third.order == CHAIN.run(0).order
    assert third.mask is not None
    assert [job.run for job in third.mask.jobs()] == [CHAIN.run(2)]
    assert third.mask.density == pytest.approx(0.512)
    # A copy is the same subnetwork under other noise.
    assert CHAIN.run(3, number=2) == replace(third, order="0/2", augment="0/2")
    assert len({key_of(CHAIN.run(n, number=c), "cpu") for n in range(6) for c in (1, 2)}) == 12


def test_what_the_controls_share_with_imp_and_what_they_do_not() -> None:
    imp, fresh = CHAIN.run(2), Chain(RECIPE, "0/fresh", 2)
    assert CHAIN.run(2, "random").fork == imp.fork
    assert CHAIN.run(2, "reinit") == replace(fresh.run(0), mask=imp.mask)
    assert CHAIN.run(2, "permuted").fork == fresh.run(0).fork
    assert [j.run for j in CHAIN.mask(2, "one-shot").jobs()] == [CHAIN.run(0)]  # type: ignore[union-attr]  # it has a mask
    assert CHAIN.mask(1, "one-shot") == CHAIN.mask(1), "one round is one shot"
    for kind in ("magnitude", "snip", "synflow"):
        (job,) = CHAIN.mask(2, kind).jobs()  # type: ignore[union-attr]  # it has a mask
        assert job.run == trunk(RECIPE, 0) and job.weights == (2,), "nothing is trained for it"
    assert len({CHAIN.run(2, kind) for kind in KINDS}) == len(KINDS)


def test_every_kind_keeps_as_many_weights(store: Store) -> None:
    names = prunable(build(Run(RECIPE), DIGITS, CPU))
    found = {kind: load_mask(CHAIN.mask(3, kind), store=store) for kind in KINDS}  # type: ignore[arg-type]  # it has a mask
    total = sum(n for _, n in alive(found["imp"]).values())
    for kind, mask in found.items():
        assert tuple(mask) == names
        assert sum(k for k, _ in alive(mask).values()) == round(0.8**3 * total), kind
    for kind in ("random", "reinit"):
        assert alive(found[kind]) == alive(found["imp"])
    assert same(found["reinit"], found["imp"])
    rest = [found[k] for k in KINDS if k != "reinit"]
    assert not any(same(a, b) for i, a in enumerate(rest) for b in rest[:i])
    # The permuted mask is the one that matching the two dense networks gives.
    new, old = (load_weights(r, store=store) for r in (CHAIN.run(0, "reinit"), CHAIN.run(0)))
    pi = match(tickets.WEIGHTS, build(Run(RECIPE), DIGITS, CPU), new, old, DIGITS)
    assert same(found["permuted"], carry(found["imp"], lambda t: pi.spec.permute(t, pi.perms)))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_and_rewinds_pass_gate_g4(store: Store, scope: str) -> None:
    """Along a chain of ten, against the gate itself, with the head left alone."""
    chain = Chain(RECIPE, 0, 2, Pruning(scope=scope, skip=("head",)))
    last = chain.run(10)
    value = measurement.run([MaskCheck(last)], store=store, workers=1)[0]
    assert value["gate"]["passed"], value
    assert "head.weight" not in value["kept"] and len(value["kept"]) == 2
    levels = [load_mask(chain.mask(n), store=store) for n in range(1, 11)]  # type: ignore[arg-type]  # it has a mask
    total = sum(n for _, n in alive(levels[0]).values())
    for number, mask in enumerate(levels, 1):
        slack = 1 if scope == "layer" else 0.5
        assert abs(density(mask) - 0.8**number) <= slack / total
    # And the gate fails where one of them does not hold.
    w_k = load_weights(trunk(RECIPE, 0), 2, store=store)
    rewound, ended = (load_weights(last, s, store=store) for s in (2, 6))
    assert same(rewound, masked(w_k, levels[-1]))
    assert masks(ended, levels, rewound=rewound, start=w_k, slack=2).passed
    assert not masks(w_k, levels, slack=2).passed
    assert not masks(ended, levels, rewound=w_k, start=w_k, slack=2).passed
    assert not masks(ended, [*levels[:-2], levels[-1], levels[-2]], slack=2).passed
    assert not masks(ended, levels, slack=2, keep=0.7).passed


# ---- what is trained, and when


def test_more_rounds_train_only_what_is_new(store: Store, trained: list[Run]) -> None:
    find_tickets(search(levels=(0, 3)), FEW, controls=False, store=store, workers=1)
    # The trunk, the chain from dense to level 3, and a copy of each measured level.
    assert len(trained) == len(set(trained)) == 1 + 4 + 2
    trained.clear()
    find_tickets(search(levels=(0, 3, 5)), FEW, controls=False, store=store, workers=1)
    assert set(trained) == {CHAIN.run(4), CHAIN.run(5), CHAIN.run(5, number=2)}
    trained.clear()
    find_tickets(search(levels=(0, 5)), FEW, controls=False, store=store, workers=1)
    assert not trained
    find_tickets(search(levels=(0, 5), ks=(2, 3)), FEW, controls=False, store=store, workers=1)
    assert CHAIN.run(3) not in trained and Chain(RECIPE, 0, 3).run(5) in trained


def test_a_killed_chain_goes_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[Run]
) -> None:
    whole = Store(tmp_path / "whole")
    expected = load_weights(CHAIN.run(4), store=whole)
    trained.clear()
    real = engine._begin

    def killed(job: Any, *rest: Any) -> Any:
        if job.run == CHAIN.run(3):
            raise OutOfTime("killed")
        return real(job, *rest)

    monkeypatch.setattr(engine, "_begin", killed)
    with pytest.raises(OutOfTime):
        train([Job(CHAIN.run(4), weights=(6,))], store=store, workers=1)
    assert set(trained) == {trunk(RECIPE, 0), *(CHAIN.run(n) for n in range(3))}
    trained.clear()
    monkeypatch.setattr(engine, "_begin", real)
    found = load_weights(CHAIN.run(4), store=store)
    assert trained == [CHAIN.run(3), CHAIN.run(4)]
    assert same(expected, found)


def test_a_budget_counts_a_chain_before_anything_is_trained(store: Store) -> None:
    asked = search(levels=(0, 3), kinds=("imp", "random", "permuted"))
    (before,) = count([plan_tickets(asked, FEW)], store=store, device="cpu")
    # Two trunks; chain 0 … 3; a copy of levels 0 and 3; two of both controls; the new dense one.
    # The null control trains one more.
    assert before.whole.runs == before.missing.runs == 2 + 4 + 2 + 4 + 1 + 1
    assert before.whole.measured == {"pair": 6, "subnetwork": 3, "null": 1}
    find_tickets(asked, FEW, store=store, workers=1)
    (after,) = count([plan_tickets(asked, FEW)], store=store, device="cpu")
    assert after.whole == before.whole and not after.missing


def test_chains_of_all_inits_are_trained_side_by_side() -> None:
    """A wave holds level n of every chain, so that the pool has more than one run at a time."""
    plan = plan_tickets(search(inits=3, ks=(0, 2), levels=(0, 4)), FEW)
    waves = lineage(job for task in plan for job in task.jobs())
    at = [{job.run for job in wave} for wave in waves]
    for level in range(5):
        runs = {Chain(RECIPE, i, k).run(level) for i in range(3) for k in (0, 2)}
        where = [n for n, wave in enumerate(at) for _ in wave & runs]
        assert len(where) == 6 and max(where) - min(where) <= 1


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": (6,)}, "ks: 6 must be a step from 0 to 5"),
        ({"ks": ()}, "at least one fork step"),
        ({"levels": (0, -1)}, "levels: -1 must be a whole number"),
        ({"kinds": ("imp", "randon")}, "Did you mean 'random'"),
        ({"copies": 1}, "copies: 1 must be a whole number of 2 or more"),
        ({"inits": 0}, "inits: 0"),
        ({"control_levels": (2,)}, "must be among levels"),
        ({"pruning": Pruning(skip=("stem",))}, "'stem' fits no layer"),
        ({"optimizer": "keep"}, "optimizer: 'keep'"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_training(
    changes: dict[str, Any], message: str, store: Store, trained: list[Run]
) -> None:
    with pytest.raises(BadParameter, match=message):
        find_tickets(search(**changes), FEW, store=store)
    assert not trained and not list(store.entries())


def test_synflow_of_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("To prune or not to prune. " * 400)
    data = f"text:{tmp_path / 'book.txt'}?window=8"
    text = Recipe(net="gpt:layers=1,width=8,heads=2", data=data, steps=3, batch=4)
    with pytest.raises(BadParameter, match="not for text"):
        tickets.check_search(Search(recipe=text, kinds=("imp", "synflow")))


# ---- what is measured


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Tickets:
    """Two inits, a control and two k, a few steps."""
    asked = search(inits=2, ks=(0, 2), levels=(0, 1, 3), kinds=("imp", "random"))
    return find_tickets(asked, FEW, store=Store(tmp_path_factory.mktemp("t")), workers=1)


def test_what_a_search_finds(found: Tickets) -> None:
    assert len(found.subnetworks) == 2 * 2 * (3 + 2)
    for s in found.subnetworks:
        assert s == found.at(s.kind, s.level, s.k)[s.init]
        assert set(s.errors()) == {1, 2}
        assert (
            (s.previous is not None) == (s.dense is not None) == (s.kind == "imp" and s.level > 0)
        )
        names = [g.name[:2] for g in s.noise[0].result.barrier.gates]
        assert names == ["G0", "G0", "G2", "G5", "G1", "G3", *(["G4"] if s.level else [])]
        assert all(g.passed for g in s.noise[0].result.barrier.gates if g.name[:2] in ("G1", "G4"))
        if s.level:
            kept = sum(a for a, _ in s.kept.values())
            total = sum(n for _, n in s.kept.values())
            assert kept == round(total * 0.8**s.level)
    # Three levels further on the barrier to dense and to the level before are two numbers.
    first, third = (found.at("imp", n, 2)[0] for n in (1, 3))
    assert first.previous is not None and first.dense is not None and third.dense is not None
    assert first.previous.distances == first.dense.distances
    assert third.dense.distances["ab"] > first.dense.distances["ab"]


def test_young_networks_are_dead_and_so_not_stable(found: Tickets) -> None:
    """After six steps they guess: gate G0 makes their barriers INVALID, not 0."""
    dead = [s for s in found.subnetworks if min(s.errors().values()) > 50]
    assert dead
    for s in dead:
        assert all(not n.result.barrier.valid for n in s.noise)
    every = {(s.kind, s.level, s.k) for s in dead}
    for kind, level, k in every:
        here = found.at(kind, level, k)
        if all(s in dead for s in here):
            assert found.stable(kind, level, k) == "invalid"
            assert found.error(kind, level, k) is not None, "an error is an error"


def test_nothing_is_computed_while_a_recording_is_closed(store: Store) -> None:
    with closing.closed({"device": "cpu"}) as lacking:
        got = find_tickets(search(levels=(0, 2), kinds=("imp", "random")), FEW, store=store)
    assert {kind: len(keys) for kind, keys in lacking.items()} == {
        "pair": 5,
        "subnetwork": 2,
        "null": 1,
    }
    assert got.error("imp", 2, 2) is None and got.stable("imp", 2, 2) == "invalid"
    assert not list(store.entries())


# ---- statistics, on made-up results


def result(errors: tuple[float, float], height: float, valid: bool = True) -> PairResult:
    middle = sum(errors) / 2 + height
    curve = Curve(
        (0.0, 0.5, 1.0),
        {
            s: {"error": (errors[0], middle, errors[1]), "loss": (0.1, 0.1, 0.1)}
            for s in ("test", "train")
        },
        "none",
        {"test": 100, "train": 100},
    )
    gates = (Gate("G0 quality", valid, ""),)
    return PairResult(Barrier({"none": curve}, "none", gates, 1.0, 10, errors, None), {}, {})


def made_up(
    errors: Sequence[float], heights: Sequence[float], dense: Sequence[float], valid: bool = True
) -> Tickets:
    """Level 2 of three inits: error and barrier of each, beside the dense error."""

    def of(kind: str, level: int, init: int, error: float, height: float) -> Subnetwork:
        pair = result((error, error), height, valid or not level)
        sample = Sample(init, 0, (1, 2), pair)
        along = {"previous": pair, "dense": pair} if level else {}
        return Subnetwork(kind, level, 0, init, (sample,), {}, **along)

    base = [of("imp", 0, i, e, 0.1) for i, e in enumerate(dense)]
    rest = [of("imp", 2, i, e, h) for i, (e, h) in enumerate(zip(errors, heights, strict=True))]
    return Tickets(search(ks=(0,), levels=(0, 2), inits=3), (*base, *rest))


def test_verdicts_of_a_level() -> None:
    dense = (2.0, 2.2, 1.8)
    good = made_up((2.0, 2.1, 1.9), (0.1, 0.2, 0.1), dense)
    assert (good.matching("imp", 2, 0), good.stable("imp", 2, 0)) == ("matching", "stable")
    assert good.tolerance(0) == pytest.approx(0.2, abs=0.01)
    bad = made_up((5.0, 5.3, 4.8), (6.0, 7.0, 6.5), dense)
    assert (bad.matching("imp", 2, 0), bad.stable("imp", 2, 0)) == ("not matching", "unstable")
    assert bad.matching("imp", 2, 0, tolerance=4.0) == "matching"
    mixed = made_up((2.0, 3.0, 1.5), (0.1, 4.0, 0.3), dense)
    verdicts = (mixed.matching("imp", 2, 0), mixed.stable("imp", 2, 0))
    assert verdicts == ("undetermined", "undetermined")
    one = made_up((2.0,), (0.1,), (2.0,))
    assert one.matching("imp", 2, 0) == "undetermined", "one init has no interval"
    excess = bad.excess("imp", 2, 0)
    assert excess is not None and excess.value == pytest.approx(3.0333, abs=1e-3)
    along = bad.successive(2, 0)
    assert along is not None and along.value == pytest.approx(6.5)
    assert dict(bad.to_dense_values(2, 0)) == pytest.approx({0: 6.0, 1: 7.0, 2: 6.5})
    assert bad.instability("imp", 2).verdict(0) == "unstable"


def test_dead_pairs_count_nowhere_but_in_the_error() -> None:
    dead = made_up((90.0, 89.0, 90.0), (0.0, 0.0, 0.0), (2.0, 2.2, 1.8), valid=False)
    assert dead.stable("imp", 2, 0) == "invalid"
    assert dead.successive(2, 0) is None and dead.to_dense(2, 0) is None
    assert dead.matching("imp", 2, 0) == "not matching"
    assert dead.excess("imp", 2, 0, over="random") is None, "not measured"
    with pytest.raises(BadParameter, match="over: 'dens'"):
        dead.excess("imp", 2, 0, over="dens")


# ---- real networks


@pytest.mark.slow
def test_a_sparse_resnet20_trains_an_epoch_on_cifar10(store: Store, few_of_cifar: None) -> None:
    """The paper's density of 16.8 %, on the copy of CIFAR-10 whose images are JPEGs.

    One epoch of a few of its 50,000 training images: every one of them is seen once, but for
    the rest that fills no batch. The whole copy is forty times as long, minutes on one core.
    """
    epoch = len(datasets.load("cifar10-jpeg").train) // 64
    assert epoch == 1300 // 64
    recipe = Recipe(net="resnet20", data="cifar10-jpeg", steps=epoch, batch=64, lr=0.03)
    chain = Chain(recipe)
    run = chain.run(8, "magnitude")
    assert run.mask is not None
    mask = load_mask(run.mask, store=store)
    total = sum(n for _, n in alive(mask).values())
    assert total > 270_000 and density(mask) == pytest.approx(0.8**8, abs=1 / total)
    state = load_state(run, epoch, store=store)
    gate = masks(
        state.theta,
        [mask],
        rewound=load_weights(run, 0, store=store),
        start=load_weights(trunk(recipe, 0), 0, store=store),
        keep=0.8**8,
    )
    assert gate.passed, gate
    assert not any(bool(state.theta[n][~kept].any()) for n, kept in mask.items())
    assert not any(bool(v.any()) for v in pruned_momentum(state.optimizer, mask, run))
    assert len(state.trace) == epoch  # the loss of each step
    assert float(state.trace[-5:].mean()) < float(state.trace[:3].mean()) - 0.3


def pruned_momentum(optimizer: dict[str, Tensor], mask: Mask, run: Run) -> list[Tensor]:
    """What the optimiser keeps of pruned weights."""
    module = build(run, datasets.load(run.recipe.data), CPU)
    places = {n: i for i, (n, _) in enumerate(module.named_parameters())}
    return [optimizer[f"{places[n]}.momentum_buffer"][~kept] for n, kept in mask.items()]
