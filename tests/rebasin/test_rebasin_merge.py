"""MergeMany: permuted copies come back into one order, the objective rises, inputs stay."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from commands import trained
from torch import Tensor

from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.models import build
from companion.rebasin import derive, objective, triangle_defect, universe, weight_matching
from companion.rebasin.merge import merge_many
from companion.rebasin.spec import Group, Permutations, Spec, chain

SPEC = chain(20, 24, 16, 5)


def networks(count: int, noise: float, dtype: torch.dtype = torch.float32) -> list[dict]:
    """Permuted copies of one network, each with noise of its own, and an integer buffer."""
    g = torch.Generator().manual_seed(count)
    base = {
        n: torch.randn([sum(map(SPEC.length, a)) for a in axes], generator=g)
        for n, axes in SPEC.axes.items()
    }
    base["2.bias"] = torch.randn(5, generator=g)  # moved by no permutation
    out = []
    for i in range(count):
        noisy = {
            n: (x + noise * torch.randn(x.shape, generator=g)).to(dtype) for n, x in base.items()
        }
        out.append({**SPEC.permute(noisy, SPEC.random(g)), "steps": torch.tensor(100 + i)})
    return out


def aligned(merged, thetas: list[dict]) -> list[dict[str, Tensor]]:
    return [SPEC.permute(t, p) for t, p in zip(thetas, merged.perms, strict=True)]


def pairwise(thetas: list[dict]) -> float:
    return sum(
        float((x[t].double() * y[t].double()).sum())
        for x, y in itertools.combinations(thetas, 2)
        for t in SPEC.objective
    )


@pytest.mark.parametrize("count", [2, 3, 6])
def test_permuted_copies_come_back(count: int) -> None:
    thetas = networks(count, 0.0)
    merged = merge_many(SPEC, thetas)
    first, *others = aligned(merged, thetas)
    for other in others:
        assert all(torch.equal(first[n], other[n]) for n in SPEC.axes)
    assert merged.share == pytest.approx(1)
    assert all(torch.equal(merged.theta[n], first[n]) for n in SPEC.axes)
    for p in merged.perms:
        SPEC.check(p)


def test_noisy_copies_rise_and_stay_untouched() -> None:
    thetas = networks(5, 0.3)
    kept = [{n: x.clone() for n, x in t.items()} for t in thetas]
    merged = merge_many(SPEC, thetas, key=Key("x"))
    assert all(torch.equal(k[n], t[n]) for k, t in zip(kept, thetas, strict=True) for n in k)

    assert merged.history[0] == pytest.approx(pairwise(thetas))
    assert merged.objective == pytest.approx(pairwise(aligned(merged, thetas)))
    assert all(x <= y * (1 + 1e-12) for x, y in itertools.pairwise(merged.history))
    assert len(merged.history) == merged.passes + 1
    assert 0.8 < merged.share < 1
    assert merged.summary()["networks"] == 5

    # The permutations found are those that were planted: any two networks differ by noise alone.
    there = aligned(merged, thetas)
    for x, y in itertools.combinations(there, 2):
        assert float((x["1.weight"] - y["1.weight"]).std()) < 0.3 * 2**0.5 * 1.1
    for n in SPEC.axes:
        mean = torch.stack([t[n].double() for t in there]).mean(0)
        assert torch.allclose(merged.theta[n].double(), mean, atol=1e-6)
    again = merge_many(SPEC, thetas, key=Key("x"))
    assert all(
        torch.equal(p[g], q[g])
        for p, q in zip(merged.perms, again.perms, strict=True)
        for g in SPEC.groups
    )


def test_unrelated_networks_end_where_no_match_helps() -> None:
    """Also where nothing is planted: no network gains by being matched with the others' mean."""
    g = torch.Generator().manual_seed(0)
    spec = chain(3, 6, 4, 2)
    thetas = [
        {
            n: torch.randn([sum(map(spec.length, a)) for a in x], generator=g)
            for n, x in spec.axes.items()
        }
        for _ in range(4)
    ]
    merged = merge_many(spec, thetas)
    assert all(x <= y + 1e-9 for x, y in itertools.pairwise(merged.history))
    assert merged.history[-1] > merged.history[0]
    there = [spec.permute(t, p) for t, p in zip(thetas, merged.perms, strict=True)]
    for i, theta in enumerate(there):
        rest = {n: sum(t[n] for j, t in enumerate(there) if j != i) for n in theta}
        here = sum(float((rest[n] * theta[n]).sum()) for n in spec.objective)
        for group, size in (("0", 6), ("1", 4)):
            for a, b in itertools.combinations(range(size), 2):
                p = spec.identity()
                p[group][[a, b]] = p[group][[b, a]]
                moved = spec.permute(theta, p)
                other = sum(float((rest[n] * moved[n]).sum()) for n in spec.objective)
                assert other <= here + 1e-4


def test_permutations_between_networks_are_consistent() -> None:
    thetas = networks(4, 0.5)
    merged = merge_many(SPEC, thetas)
    for i, j, k in itertools.permutations(range(4), 3):
        by_way = SPEC.compose(merged.between(j, i), merged.between(k, j))
        assert all(torch.equal(by_way[g], merged.between(k, i)[g]) for g in SPEC.groups)
    stay = SPEC.identity()
    assert all(torch.equal(merged.between(2, 2)[g], stay[g]) for g in SPEC.groups)
    # j's network, brought to i's own units, is next to it.
    near = SPEC.permute(thetas[1], merged.between(0, 1))["1.weight"] - thetas[0]["1.weight"]
    assert float(near.std()) < 0.5 * 2**0.5 * 1.1


def test_c2m3_of_noisy_copies_finds_what_was_planted() -> None:
    thetas = networks(5, 0.3)
    there = aligned(merge_many(SPEC, thetas, method="c2m3"), thetas)
    for x, y in itertools.combinations(there, 2):
        assert float((x["1.weight"] - y["1.weight"]).std()) < 0.3 * 2**0.5 * 1.1


@pytest.mark.slow
def test_c2m3_of_trained_networks_has_no_triangle_defect_and_ends_no_lower() -> None:
    """Than Algorithm 3, and than pairs matched in a chain; pairs matched one by one disagree."""
    nets = [trained("mlp:widths=16x2", n, init=n) for n in range(4)]
    spec = derive(build("mlp:widths=16x2", (1, 8, 8), 10), torch.zeros(2, 1, 8, 8))
    passes, found = (merge_many(spec, nets, method=m) for m in ("passes", "c2m3"))
    every = list(itertools.combinations(range(4), 2))
    pairs = {(i, j): weight_matching(spec, nets[i], nets[j]).perms for i, j in every}
    between = {(i, j): found.between(i, j) for i, j in every}
    assert triangle_defect(spec, between) == 0 < triangle_defect(spec, pairs)
    assert all(x <= y for x, y in itertools.pairwise(found.history))
    chained = [spec.identity()]
    for i in range(1, 4):
        chained.append(spec.compose(pairs[i - 1, i], chained[-1]))

    def value(perms: Sequence[Permutations]) -> float:
        moved = [spec.permute(t, p) for t, p in zip(nets, perms, strict=True)]
        return sum(objective(spec, moved[i], moved[j]) for i, j in every)

    assert found.objective == pytest.approx(value(found.perms))
    assert found.objective > passes.objective > value(chained)


@pytest.mark.parametrize("name", ["resnet8:norm=batch,width=4", "vgg11:width=2"])
def test_c2m3_mixes_every_axis_as_permutations_move_it(name: str) -> None:
    """At permutations its objective is that of the permuted networks, residual streams included."""
    nets = [build(name, (1, 16, 16), 10, Key("c2m3", n)) for n in range(3)]
    spec = derive(nets[0], torch.zeros(2, 1, 16, 16))
    thetas = [dict(net.state_dict()) for net in nets]
    g = torch.Generator().manual_seed(0)
    perms = [spec.random(g) for _ in thetas]
    soft = [{n: torch.eye(len(p), dtype=torch.float64)[p] for n, p in own.items()} for own in perms]
    moved = [spec.permute(t, p) for t, p in zip(thetas, perms, strict=True)]
    there = sum(objective(spec, x, y) for x, y in itertools.combinations(moved, 2))
    laid = [{n: spec.lay_out(t[n].double(), n) for n in spec.objective} for t in thetas]
    assert float(universe._objective(spec, laid, soft)) == pytest.approx(there, rel=1e-9)


def test_c2m3_goes_on_from_what_passes_found() -> None:
    thetas = networks(3, 0.8)
    start = merge_many(SPEC, thetas)
    anew, further = (merge_many(SPEC, thetas, method="c2m3", start=s) for s in (None, start))
    assert further.history == anew.history and further.before == start.before
    assert all(torch.equal(x[g], anew.perms[i][g]) for i, x in enumerate(further.perms) for g in x)
    for wrong in ({"method": "passes"}, {"method": "c2m3", "thetas": thetas[:2]}):
        how: dict[str, Any] = {"thetas": thetas, "start": start} | wrong
        with pytest.raises(BadParameter, match="start: of c2m3, and of as many networks; got 3"):
            merge_many(SPEC, **how)


def test_c2m3_refuses_heads() -> None:
    spec = Spec({"heads": Group("heads", 6), "units": Group("units", 4, "heads")}, {}, ())
    with pytest.raises(BadParameter, match="'units' are"):
        merge_many(spec, [{}, {}, {}], method="c2m3")


def test_entries_that_are_not_averaged() -> None:
    thetas = networks(3, 0.2, torch.float16)
    merged = merge_many(SPEC, thetas)
    assert merged.theta["steps"] == 100
    assert merged.theta["steps"] is not thetas[0]["steps"]
    assert {n: x.dtype for n, x in merged.theta.items()} == {
        n: x.dtype for n, x in thetas[0].items()
    }
    mean = torch.stack([t["2.bias"].double() for t in thetas]).mean(0).half()
    assert torch.equal(merged.theta["2.bias"], mean)


def test_nothing_to_permute() -> None:
    thetas = [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]
    merged = merge_many(Spec({}, {}, ()), thetas)
    assert torch.equal(merged.theta["w"], torch.full((2,), 0.5))


def test_refuses_networks_that_differ() -> None:
    thetas = networks(2, 0.1)
    with pytest.raises(BadParameter, match="at least two"):
        merge_many(SPEC, thetas[:1])
    with pytest.raises(BadParameter, match="max_passes"):
        merge_many(SPEC, thetas, max_passes=0)
    with pytest.raises(BadParameter, match=r"network 2 .*missing.*steps"):
        merge_many(SPEC, [thetas[0], {n: x for n, x in thetas[1].items() if n != "steps"}])
    with pytest.raises(BadParameter, match=r"network 2: 2.bias has shape"):
        merge_many(SPEC, [thetas[0], {**thetas[1], "2.bias": torch.zeros(4)}])
    with pytest.raises(BadParameter, match=r"network 2: 0.bias holds NaN"):
        merge_many(SPEC, [thetas[0], {**thetas[1], "0.bias": torch.full((24,), torch.nan)}])
