"""Weight matching: planted permutations come back, the objective never falls, inputs stay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.models import build
from companion.rebasin import weights
from companion.rebasin.assignment import assign_again, assign_nested, assign_units, prices
from companion.rebasin.derive import derive
from companion.rebasin.spec import Axis, Group, Spec, chain
from companion.rebasin.weights import greedy, objective, weight_matching

Theta = dict[str, Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(spec: Spec, seed: int, dtype: torch.dtype = torch.float32) -> Theta:
    """Random weights of size 1 / sqrt(fan in), as layers have them, and biases of size 0.1."""
    g = generator(seed)
    out = {}
    for name, axes in spec.axes.items():
        shape = [sum(map(spec.length, axis)) for axis in axes]
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 100
        out[name] = (torch.randn(shape, generator=g, dtype=torch.float64) / fan_in**0.5).to(dtype)
    return out


def planted(spec: Spec, a: Mapping[str, Tensor], seed: int, noise: float = 0.0) -> tuple:
    """B = A with noise of ``noise`` standard deviations, permuted; and the permutations back."""
    g = generator(seed)
    p = spec.random(g)
    b = {}
    for name, x in a.items():
        std = x.float().std() if x.numel() > 1 else torch.zeros(())
        b[name] = (x + noise * std * torch.randn(x.shape, generator=g)).to(x.dtype)
    return spec.permute(b, p), spec.inverse(p)


def same(p: Mapping[str, Tensor], q: Mapping[str, Tensor]) -> bool:
    return p.keys() == q.keys() and all(torch.equal(p[n], q[n]) for n in q)


def value(spec: Spec, a: Theta, b: Theta, perms: Mapping[str, Tensor]) -> float:
    """The objective, the slow and plain way."""
    b = spec.permute(b, perms)
    return sum(float((a[t].double() * b[t].double()).sum()) for t in spec.objective)


def hand(groups: list[Group], axes: dict[str, tuple[Axis, ...]], *, skip: str = "") -> Spec:
    return Spec({g.name: g for g in groups}, axes, tuple(t for t in axes if t != skip))


HEADS = hand(
    [Group("e", 12), Group("h", 5), Group("h.qk", 3, "h"), Group("h.v", 4, "h")],
    {
        "embed": ((("e",),), ((9,),)),
        # Queries, keys and values behind each other on one axis, as in nn.MultiheadAttention.
        "in.weight": ((("h", "h.qk"), ("h", "h.qk"), ("h", "h.v")), (("e",),)),
        "in.bias": ((("h", "h.qk"), ("h", "h.qk"), ("h", "h.v")),),
        "slope": ((("h",),),),
        "out.weight": ((("e",),), (("h", "h.v"),)),
        "head": (((7,),), (("e",),)),
    },
)
JOINED = hand(  # a concatenation, and a flattened 2x2 map behind it
    [Group("c", 8), Group("d", 6), Group("f", 10)],
    {
        "c.weight": ((("c",),), ((5,),)),
        "d.weight": ((("d",),), ((5,),)),
        "f.weight": ((("f",),), (("c",), ("d",))),
        "flat.weight": (((4,),), (("f", 4),)),
        "gate": ((("c", "d"),),),
    },
)
LOOP = hand(  # a recurrent network: one tensor is moved along both of its axes
    [Group("c", 16)],
    {"in": ((("c",),), ((3,),)), "again": ((("c",),), (("c",),)), "out": (((2,),), (("c",),))},
)
SQUARE = hand([Group("c", 5)], {"outer": ((("c", "c"),),), "in": ((("c",),), ((2,),))})
SPECS = {"mlp": chain(4, 6, 5, 3), "heads": HEADS, "joined": JOINED, "loop": LOOP, "square": SQUARE}


# Assignments


@given(st.integers(1, 5), st.integers(0, 10**6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_assign_is_the_best_of_all(n: int, seed: int, ties: bool) -> None:
    gain = torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
    gain = gain.round() if ties else gain
    p = assign_units(gain)
    rows = torch.arange(n)
    best = max(float(gain[rows, list(q)].sum()) for q in itertools.permutations(range(n)))
    assert sorted(p.tolist()) == list(range(n))
    assert p.dtype == torch.int64
    assert float(gain[rows, p].sum()) == pytest.approx(best)


def test_assign_takes_maxima_that_are_a_permutation() -> None:
    p = torch.randperm(50, generator=generator(0))
    gain = torch.rand(50, 50, generator=generator(1), dtype=torch.float64)
    gain[torch.arange(50), p] += 1
    assert torch.equal(assign_units(gain), p)


def scipys(gain: Tensor) -> float:
    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    return float(gain[rows, columns].sum())


@given(st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 10.0]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_prices_change_no_optimum(n: int, seed: int, change: float, ties: bool) -> None:
    """Neither prices of a similar problem or another one, nor any at all, nor an auction."""
    g = generator(seed)
    gain = torch.randn(n, n, generator=g, dtype=torch.float64)
    gain += 3 * torch.randn(n, generator=g, dtype=torch.float64)  # columns that all want
    other = gain + change * torch.randn(n, n, generator=g, dtype=torch.float64)
    gain, other = (gain.round(), other.round()) if ties else (gain, other)
    rows = torch.arange(n)
    price = assign_again(other)[1]
    for any_price in (
        None,
        price,
        assign_again(other, price)[1],
        torch.randn(n, generator=g, dtype=torch.float64),
    ):
        kept = gain.clone()
        p, new, _ = assign_again(gain, any_price)
        assert sorted(p.tolist()) == list(range(n))
        assert float(gain[rows, p].sum()) == pytest.approx(scipys(gain))
        assert torch.equal(gain, kept)
        # At any prices, what the rows can have is no less than the best assignment.
        assert float((gain - new).amax(1).sum() + new.sum()) >= scipys(gain) - 1e-9


@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_an_auction_gives_nearly_all_rows_a_column_within_epsilon_of_their_best(
    epsilon: float,
) -> None:
    gain = torch.randn(200, 200, generator=generator(0), dtype=torch.float64)
    gain += torch.randn(200, generator=generator(1), dtype=torch.float64) * 3
    p, price, exact = assign_again(gain, epsilon=epsilon)
    assert sorted(p.tolist()) == list(range(200)) and not exact
    net = gain - price
    below = net.amax(1) - net[torch.arange(200), p]
    assert float(below.quantile(0.95)) <= 1.001 * epsilon * float(gain.std())
    assert assign_again(gain, price)[0].equal(assign_units(gain))
    own, _, exact = assign_again(torch.eye(200, dtype=torch.float64)[p], epsilon=epsilon)
    assert exact and own.equal(p)  # nobody wants what another has


def test_prices_make_an_assignment_every_rows_choice_by_a_margin() -> None:
    """So that it survives a small change of the gains."""
    gain = torch.randn(30, 30, generator=generator(0), dtype=torch.float64)
    gain += torch.randn(30, generator=generator(1), dtype=torch.float64) * 3  # columns all want
    p, rows = assign_units(gain), torch.arange(30)
    for _ in range(100):
        gain = gain - prices(gain, p)
    gain[rows, p] -= 0.002
    assert torch.equal(gain.argmax(1), p)


@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_nested_assignment_is_the_best_of_all(h: int, s: int, plain: bool, seed: int) -> None:
    g = generator(seed)
    outer = torch.randn(h, h, generator=g, dtype=torch.float64) if plain else None
    grams = {
        "x": torch.randn(h * s, h * s, generator=g, dtype=torch.float64),
        "y": torch.randn(h, h, generator=g, dtype=torch.float64),  # inner groups of one unit
    }
    p, inner, reached = assign_nested(outer, grams, h)
    pairs = grams["x"].reshape(h, s, h, s)

    def total(p: tuple[int, ...], best: bool) -> float:
        out = 0.0
        for i, j in enumerate(p):
            out += float(grams["y"][i, j]) + (float(outer[i, j]) if outer is not None else 0)
            orders = itertools.permutations(range(s)) if best else [inner["x"][i].tolist()]
            out += max(sum(float(pairs[i, k, j, q[k]]) for k in range(s)) for q in orders)
        return out

    assert reached == pytest.approx(max(total(q, True) for q in itertools.permutations(range(h))))
    assert total(tuple(p.tolist()), False) == pytest.approx(reached)


def test_assign_refuses_what_is_no_gain() -> None:
    with pytest.raises(BadParameter, match="NaN"):
        assign_units(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
    with pytest.raises(BadParameter, match="square"):
        assign_units(torch.zeros(2, 3))
    with pytest.raises(BadParameter, match="'x'"):
        assign_nested(None, {"x": torch.zeros(5, 5)}, 2)


# Planted permutations


@pytest.mark.parametrize("begin", ["anchored", "identity"])
@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("width", [32, 128, 512])
def test_recovers_in_mlps(width: int, noise: float, begin: str) -> None:
    spec = chain(784, width, width, width, 10)
    a = draw(spec, width)
    b, back = planted(spec, a, width + 1, noise)
    found = weight_matching(spec, a, b, begin=begin)
    assert same(found.perms, back)
    assert found.objective == pytest.approx(value(spec, a, b, back))
    assert found.share <= 1 + 1e-12
    assert found.share > {0.0: 1 - 1e-9, 0.1: 0.99, 1.0: 0.65}[noise]
    assert found.before == pytest.approx(value(spec, a, b, spec.identity()))


@pytest.mark.parametrize("net", ["resnet20:norm=layer", "vgg16:norm=layer,width=16"])
def test_recovers_in_convolutional_networks(net: str) -> None:
    module = build(net, (3, 32, 32), 10, Key("init", 1))
    a = module.state_dict()
    spec = derive(module, torch.zeros(1, 3, 32, 32))
    for noise, begin in (
        (0.0, "identity"),
        (0.1, "identity"),
        (0.1, "anchored"),
        (1.0, "anchored"),
    ):
        b, back = planted(spec, a, 5, noise)
        assert same(weight_matching(spec, a, b, begin=begin).perms, back)


@pytest.mark.parametrize("name", ["heads", "joined", "loop"])
@pytest.mark.parametrize("begin", ["anchored", "identity"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_recovers_in_other_shapes(name: str, begin: str, noise: float) -> None:
    spec = SPECS[name]
    a = draw(spec, 11)
    b, back = planted(spec, a, 12, noise)
    # From the identity a few groups that hold each other fast may need another start.
    found = weight_matching(spec, a, b, begin=begin, starts=1 if begin == "anchored" else 20)
    assert same(found.perms, back)
    assert found.objective == pytest.approx(value(spec, a, b, back))


def weakly_anchored() -> Spec:
    """samuela/git-re-basin issue 8: x -> in -> one residual block -> out, one input, one output."""
    return hand(
        [Group("stream", 30), Group("block", 50)],
        {
            "in": ((("stream",),), ((1,),)),
            "up": ((("block",),), (("stream",),)),
            "down": ((("stream",),), (("block",),)),
            "out": (((1,),), (("stream",),)),
        },
    )


@pytest.mark.slow
def test_more_starts_find_what_one_does_not() -> None:
    """The sheet's shares for this toy: 16 % from the identity, 78 % with ten starts."""
    spec = weakly_anchored()
    one = ten = anchored = 0
    for seed in range(40):
        g = generator(seed)
        a = {
            n: torch.randn([sum(map(spec.length, x)) for x in axes], generator=g)
            for n, axes in spec.axes.items()
        }
        b, back = planted(spec, a, 1000 + seed)
        kind: dict[str, Any] = {"key": Key("toy", seed), "order": "random"}
        one += same(weight_matching(spec, a, b, begin="identity", **kind).perms, back)
        ten += same(weight_matching(spec, a, b, begin="identity", starts=10, **kind).perms, back)
        anchored += same(weight_matching(spec, a, b, **kind).perms, back)
    assert one <= 16
    assert ten >= 30
    assert anchored >= 38


@pytest.mark.parametrize("order", ["random", "forward"])
@pytest.mark.parametrize("begin", ["anchored", "identity"])
def test_appendix_a72(begin: str, order: str) -> None:
    """Greedy matching stays at the identity; weight matching swaps both layers, in any order."""
    eps = 0.1
    spec = chain(1, 2, 2, 1, bias=False)
    names = ("0.weight", "1.weight", "2.weight")
    one = torch.tensor([[1.0], [1 + eps]])
    two = torch.diag(torch.tensor([1, eps])), torch.diag(torch.tensor([0, 1.0]))
    a = dict(zip(names, (one, two[0], torch.tensor([[1.0, 0]])), strict=True))
    b = dict(zip(names, (one, two[1], torch.tensor([[0, 1.0]])), strict=True))

    def midpoint(perms: Mapping[str, Tensor]) -> float:
        w = {n: (a[n] + x) / 2 for n, x in spec.permute(b, perms).items()}
        return float(w["2.weight"] @ w["1.weight"] @ w["0.weight"])

    assert same(greedy(spec, a, b).perms, spec.identity())
    assert midpoint(spec.identity()) < 0.75
    for seed in range(20):
        found = weight_matching(spec, a, b, key=Key(seed), begin=begin, order=order)
        assert same(found.perms, {"0": torch.tensor([1, 0]), "1": torch.tensor([1, 0])})
        assert midpoint(found.perms) == pytest.approx(1 + eps / 2)


# What holds for any pair

PAIRS = given(st.sampled_from(sorted(SPECS)), st.integers(0, 10**6))


@PAIRS
@settings(max_examples=40, deadline=None)
def test_never_worse_than_where_it_began(name: str, seed: int) -> None:
    spec = SPECS[name]
    a, b = draw(spec, seed), draw(spec, seed + 1)
    kept = {n: (a[n].clone(), b[n].clone()) for n in a}
    start = spec.random(generator(seed))
    kept_start = {n: p.clone() for n, p in start.items()}
    kinds: tuple[dict[str, Any], ...] = (
        {}, {"begin": "identity"}, {"order": "random"}, {"start": start}
    )  # fmt: skip
    for kind in kinds:
        found = weight_matching(spec, a, b, key=Key(seed), **kind)
        spec.check(found.perms)
        assert found.objective == pytest.approx(value(spec, a, b, found.perms))
        assert found.objective == pytest.approx(objective(spec, a, b, found.perms))
        floor = value(spec, a, b, start if kind == {"start": start} else spec.identity())
        assert found.objective >= floor - 1e-9 * found.bound
        assert found.details is not None
        steps = found.details["history"]
        assert all(x <= y for x, y in itertools.pairwise(steps))
        assert steps[-1] == pytest.approx(found.objective)
        # Where it ends, nothing is left to do; so no change has been overlooked.
        assert same(weight_matching(spec, a, b, start=found.perms).perms, found.perms)
    for n, (x, y) in kept.items():
        assert torch.equal(a[n], x)
        assert torch.equal(b[n], y)
    assert same(start, kept_start)


@given(st.sampled_from(["mlp", "heads", "joined"]), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_ends_where_no_swap_helps(name: str, seed: int) -> None:
    """Every group is optimal given the others: what skips unchanged groups skips nothing else."""
    spec = SPECS[name]
    a, b = draw(spec, seed), draw(spec, seed + 1)
    found = weight_matching(spec, a, b, key=Key(seed))
    assert found.details is not None and found.details["starts"][0]["converged"]
    for group, p in found.perms.items():
        if spec.groups[group].within or any(g.within == group for g in spec.groups.values()):
            rows: Iterable[int | None] = range(len(p)) if spec.groups[group].within else ()
        else:
            rows = (None,)
        for row in rows:
            for i, j in itertools.combinations(range(p.shape[-1]), 2):
                q = p.clone()
                line = q if row is None else q[row]
                line[[i, j]] = line[[j, i]]
                other = value(spec, a, b, {**found.perms, group: q})
                assert other <= found.objective + 1e-8 * found.bound


@PAIRS
@settings(max_examples=20, deadline=None)
def test_the_order_of_b_does_not_matter(name: str, seed: int) -> None:
    """From corresponding starts, B and a permuted B give the same network."""
    spec = SPECS[name]
    a, b = draw(spec, seed, torch.float64), draw(spec, seed + 1, torch.float64)
    p = spec.random(generator(seed))
    back = spec.inverse(p)
    one = weight_matching(spec, a, b, begin="identity", key=Key(seed))
    two = weight_matching(spec, a, spec.permute(b, p), start=back, key=Key(seed))
    assert two.objective == pytest.approx(one.objective)
    assert same(spec.compose(p, two.perms), one.perms)


def test_greedy_does_not_see_the_order_of_b() -> None:
    for spec in SPECS.values():
        a, b = draw(spec, 3), draw(spec, 4)
        p = spec.random(generator(5))
        one, two = greedy(spec, a, b), greedy(spec, a, spec.permute(b, p))
        assert two.objective == pytest.approx(one.objective)
        assert one.method == "greedy"
        assert one.objective == pytest.approx(value(spec, a, b, one.perms))


def test_greedy_uses_only_what_was_matched_before() -> None:
    """The next layer's weights have no say: with them at odds, the first layer decides."""
    spec = chain(3, 3, 2, bias=False)
    a = {"0.weight": torch.eye(3), "1.weight": torch.tensor([[9.0, 0, 0], [0, 0, 0]])}
    b = {"0.weight": torch.eye(3), "1.weight": torch.tensor([[0, 9.0, 0], [0, 0, 0]])}
    assert same(greedy(spec, a, b).perms, spec.identity())
    assert weight_matching(spec, a, b).perms["0"][0] == 1


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_network_matches_itself(name: str) -> None:
    spec = SPECS[name]
    a = draw(spec, 1)
    for begin in ("anchored", "identity"):
        found = weight_matching(spec, a, a, begin=begin)
        assert same(found.perms, spec.identity())
        assert found.share == pytest.approx(1)
        assert found.moved == 0


def test_same_key_same_result_and_best_of_starts() -> None:
    spec = weakly_anchored()
    a, b = draw(spec, 1), draw(spec, 2)
    one, two = (
        weight_matching(spec, a, b, key=Key("x"), starts=5, begin="identity") for _ in range(2)
    )
    assert one.details is not None
    assert same(one.perms, two.perms)
    values = [s["objective"] for s in one.details["starts"]]
    assert len(set(values)) > 1
    assert one.objective == max(values)
    assert one.starts == 5
    best = one.details["starts"][values.index(max(values))]
    assert one.passes == best["passes"] == len(one.details["history"]) - 1
    assert weight_matching(spec, a, b, max_passes=1, begin="identity").passes == 1


# Tensors of all kinds


def test_tied_tensors_count_once() -> None:
    """A second name of a tensor moves with it and does not count."""
    axes = {
        "embed": (((20,),), (("c",),)),
        "head": (((20,),), (("c",),)),
        "norm": ((("c",),),),
        "running": ((("c",),),),
    }
    spec = Spec({"c": Group("c", 8)}, axes, ("embed", "norm"))
    a = draw(spec, 1)
    a["head"], a["running"] = a["embed"], 1e6 * a["running"]
    b, back = planted(spec, a, 2)
    b["running"] = b["running"].flip(0)  # would win if buffers counted
    found = weight_matching(spec, a, b)
    assert same(found.perms, back)
    assert found.bound == pytest.approx(sum(float(a[t].norm() ** 2) for t in ("embed", "norm")))
    assert same(weight_matching(spec, a, {t: b[t] for t in ("embed", "norm")}).perms, back)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    spec = chain(50, 40, 30, 5)
    a = draw(spec, 1)
    b, back = planted(spec, a, 2)
    half = {n: x.to(dtype) for n, x in b.items()}
    found = weight_matching(spec, a, half)
    assert same(found.perms, back)
    assert all(p.dtype == torch.int64 and p.device.type == "cpu" for p in found.perms.values())
    # 300^2 is more than float16 holds: sums are float64 whatever the entries are.
    big = {n: (300 * x.sign()).to(torch.float16) for n, x in a.items()}
    assert weight_matching(spec, big, big).share == pytest.approx(1)


def test_parameters_that_require_gradients() -> None:
    spec = chain(4, 6, 3)
    a = {n: torch.nn.Parameter(x) for n, x in draw(spec, 1).items()}
    b, back = planted(spec, {n: x.detach() for n, x in a.items()}, 2)
    found = weight_matching(spec, a, {n: torch.nn.Parameter(x) for n, x in b.items()})
    assert same(found.perms, back)


def test_nothing_to_permute() -> None:
    found = weight_matching(Spec({}, {}, ()), {"w": torch.ones(2)}, {"w": torch.ones(2)})
    assert found.perms == {}
    assert (found.objective, found.passes) == (0, 0)
    assert math.isnan(found.share), "nothing was matched: that is not a perfect match"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, "network B.*0.bias"),
        ({"1.weight": torch.zeros(3, 7)}, r"network B: 1.weight has shape \(3, 7\)"),
        ({"0.weight": torch.full((6, 4), float("nan"))}, "network B: 0.weight holds NaN"),
        ({"0.bias": torch.full((6,), float("inf"))}, "network B: 0.bias holds NaN or inf"),
        ({"0.bias": torch.zeros(6, dtype=torch.int64)}, "0.bias is torch.int64"),
    ],
)
def test_refuses_networks_that_do_not_fit(change: Theta, message: str) -> None:
    spec = chain(4, 6, 3)
    a = draw(spec, 1)
    b = {n: x for n, x in {**a, **change}.items() if x is not None}
    with pytest.raises(BadParameter, match=message):
        weight_matching(spec, a, b)
    with pytest.raises(BadParameter, match=message.replace("network B", "network A")):
        greedy(spec, b, a)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"starts": 0}, "starts"),
        ({"max_passes": 0}, "max_passes"),
        ({"rtol": -1.0}, "rtol"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"order": "forwards"}, "Did you mean 'forward'"),
        ({"begin": "zero"}, "begin"),
        ({"start": {"0": torch.zeros(6, dtype=torch.int64)}}, "repeats"),
    ],
)
def test_refuses_bad_options(kind: dict, message: str) -> None:
    spec = chain(4, 6, 3)
    a = draw(spec, 1)
    with pytest.raises(BadParameter, match=message):
        weight_matching(spec, a, a, **kind)


@pytest.mark.parametrize("net", ["mlp:widths=40x3,norm=layer", "resnet8:norm=group,width=8"])
@pytest.mark.parametrize("order", ["forward", "random"])
def test_gains_that_are_kept_are_those_that_would_be_summed(
    net: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They follow the steps of other families: the same descent as with all summed anew."""
    a, b = (build(net, (1, 8, 8), 10, Key("kept", n)) for n in range(2))
    spec = derive(a, torch.zeros(2, 1, 8, 8))
    thetas = [m.state_dict() for m in (a, b)]
    kept = weight_matching(spec, *thetas, order=order)
    monkeypatch.setattr(weights, "ROOM", 0.0)
    monkeypatch.setattr(weights, "ROOM_AT_LEAST", 0)
    anew = weight_matching(spec, *thetas, order=order)
    assert kept.passes == anew.passes > 1
    assert kept.objective == anew.objective
    assert all(torch.equal(p, anew.perms[n]) for n, p in kept.perms.items())


class Everything(set[str]):
    def __contains__(self, _: object) -> bool:
        return True


@pytest.mark.parametrize("planted_noise", [None, 0.3])
def test_only_what_an_auction_decided_is_solved_again(
    planted_noise: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last, exact pass leaves out the families whose optimum is known: nothing else changes."""
    spec = chain(30, 40, 40, 40, 10)
    a = draw(spec, 0)
    b = draw(spec, 1) if planted_noise is None else planted(spec, a, 1, planted_noise)[0]
    solved: list[int] = []
    plain = weights.Descent.improve

    def counted(state: Any, family: Any, tol: float) -> float:
        solved[-1] += 1
        return plain(state, family, tol)

    monkeypatch.setattr(weights.Descent, "improve", counted)
    solved.append(0)
    found = weight_matching(spec, a, b)

    def all_again(state: Any, *args: Any) -> None:
        begin(state, *args)
        state.rough = Everything()

    begin = weights.Descent.__init__
    monkeypatch.setattr(weights.Descent, "__init__", all_again)
    solved.append(0)
    again = weight_matching(spec, a, b)
    assert same(found.perms, again.perms)
    assert (found.objective, found.details) == (again.objective, again.details)
    assert solved[0] <= solved[1]
    if planted_noise is not None:  # every assignment was exact at once
        assert (solved, found.passes) == ([3, 6], 2)
