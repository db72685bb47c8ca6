"""The straight-through estimator: never worse than weight matching, and it returns the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from companion import data, models
from companion.core.effective import effective
from companion.core.errors import BadParameter, OutOfTime
from companion.core.runs import Store
from companion.core.seeds import Key
from companion.data import Split
from companion.rebasin import ste
from companion.rebasin.derive import derive
from companion.rebasin.spec import Spec
from companion.rebasin.ste import straight_through
from companion.rebasin.weights import objective, weight_matching
from companion.training import Recipe, Run, load_weights

RECIPE = Recipe(net="mlp:widths=32x2", data="digits", steps=150, batch=64, lr=0.1)


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split]:
    loaded = data.load("digits")
    return loaded.train, loaded.test


@pytest.fixture(scope="module")
def module(digits: tuple[Split, Split]) -> nn.Module:
    return models.build(RECIPE.net, (1, 8, 8), 10, Key("init"))


@pytest.fixture(scope="module")
def spec(module: nn.Module, digits: tuple[Split, Split]) -> Spec:
    return derive(module, digits[0].x[:2])


@pytest.fixture(scope="module")
def pair(shared_store: Store) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two networks trained from their own inits."""
    a, b = (load_weights(Run(RECIPE, init=i, order=i), store=shared_store) for i in range(2))
    return a, b


def midpoint_loss(
    module: nn.Module, a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], on: Split
) -> float:
    middle = {k: (a[k] + b[k]) / 2 for k in a}
    with torch.no_grad():
        return float(F.cross_entropy(functional_call(module, middle, (on.x,)), on.y))


def flat(perms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.flatten() for p in perms.values()])


def test_it_beats_weight_matching_on_the_held_out_loss(module, spec, pair, digits) -> None:
    a, b = pair
    train, held = digits
    kept = [{k: v.clone() for k, v in t.items()} for t in (a, b, module.state_dict())]
    first = weight_matching(spec, a, b)
    found = straight_through(
        spec, module, a, b, train, steps=40, batch=200, lr=1.0, held_out=held, judge_every=5
    )
    details = found.details or {}
    losses = dict(details["held out"])
    assert list(losses) == list(range(0, 41, 5))
    assert losses[0] == details["weight matching"]
    assert losses[0] == pytest.approx(midpoint_loss(module, a, spec.permute(b, first.perms), held))
    assert losses[details["best"]] == min(losses.values()) < 0.9 * losses[0]
    # What is returned is what was judged best, and its loss is what was said.
    best = midpoint_loss(module, a, spec.permute(b, found.perms), held)
    assert best == pytest.approx(min(losses.values()), rel=1e-5)
    assert len(details["loss"]) == found.passes == 40
    assert details["stopped"] is None
    # The weights' inner product is reported, and weight matching maximises it better.
    assert found.objective == pytest.approx(objective(spec, a, b, found.perms))
    assert (found.before, found.bound) == (first.before, first.bound)
    assert found.before < found.objective < found.bound
    assert found.method == "ste"
    # Nothing of the caller's was written, and no gradient reached it.
    for theta, copy in zip((a, b, module.state_dict()), kept, strict=True):
        assert all(torch.equal(theta[k], v) for k, v in copy.items())
    assert all(v.grad is None and not v.requires_grad for t in pair for v in t.values())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_a_key_decides(module, spec, pair, digits) -> None:
    def go(label: int) -> Any:
        return straight_through(
            spec, module, pair[0], pair[1], digits[0],
            steps=4, batch=100, lr=1.0, key=Key("k", label),
        )  # fmt: skip

    first, again, other = go(1), go(1), go(2)
    assert torch.equal(flat(first.perms), flat(again.perms))
    assert first.details == again.details
    assert first.details["loss"] != other.details["loss"]
    assert [step for step, _ in first.details["held out"]] == [0, 4]  # the last one always counts


def test_inside_no_grad_it_still_learns(module, spec, pair, digits) -> None:
    with torch.no_grad():
        inside = straight_through(
            spec, module, pair[0], pair[1], digits[0], steps=4, batch=100, lr=1.0
        )
    outside = straight_through(
        spec, module, pair[0], pair[1], digits[0], steps=4, batch=100, lr=1.0
    )
    assert inside.details == outside.details


def test_the_best_is_kept_where_steps_are_too_long(module, spec, pair, digits) -> None:
    a, b = pair
    held = digits[1]
    found = straight_through(
        spec, module, a, b, digits[0], steps=8, batch=100, lr=300.0, held_out=held, judge_every=1
    )
    details = found.details or {}
    losses = dict(details["held out"])
    assert details["best"] < 8 and losses[8] > 1.2 * min(losses.values())
    best = midpoint_loss(module, a, spec.permute(b, found.perms), held)
    assert best == pytest.approx(min(losses.values()), rel=1e-5)


def test_the_best_is_a_copy(module, spec, pair, digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' code kept the dict that its weight matching goes on writing into."""
    a = pair[0]
    live = spec.identity()
    seen: list[dict[str, torch.Tensor]] = []

    def writes_in_place(*args: Any, **kwargs: Any) -> Any:
        new = spec.identity() if not seen else spec.random(Key("wild", len(seen)).generator())
        for group, p in live.items():
            p.copy_(new[group])
        seen.append(new)
        return SimpleNamespace(perms=live, before=0.0, bound=1.0)

    monkeypatch.setattr(ste, "weight_matching", writes_in_place)
    shifted = spec.permute(a, spec.identity())  # B is A: the identity is best, all else is worse
    found = straight_through(spec, module, a, shifted, digits[0], steps=3, batch=50, judge_every=1)
    assert len(seen) == 4
    assert (found.details or {})["best"] == 0
    assert torch.equal(flat(found.perms), flat(spec.identity()))
    assert not torch.equal(flat(live), flat(spec.identity()))


def test_a_later_call_does_not_change_an_earlier_result(module, spec, pair, digits) -> None:
    def go() -> Any:
        return straight_through(
            spec, module, pair[0], pair[1], digits[0], steps=2, batch=100, lr=1.0
        )

    first = go()
    kept = flat(first.perms).clone()
    straight_through(spec, module, pair[1], pair[0], digits[0], steps=3, batch=100, lr=10.0)
    go()
    assert torch.equal(flat(first.perms), kept)


def test_the_gradient_goes_straight_through(
    module, spec, pair, digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """t moves by lr times half of the gradient at the midpoint, and by momentum."""
    a, b = pair
    references: list[dict[str, torch.Tensor]] = []
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(spec: Spec, t: Any, other: Any, **kwargs: Any) -> Any:
        references.append({k: v.clone() for k, v in t.items()})
        return SimpleNamespace(perms=spec.identity(), before=0.0, bound=1.0)

    real: Callable[..., Any] = ste.endless

    def recorded(*args: Any) -> Any:
        for pair in real(*args):
            batches.append(pair)
            yield pair

    monkeypatch.setattr(ste, "weight_matching", watched)
    monkeypatch.setattr(ste, "endless", recorded)
    straight_through(spec, module, a, b, digits[0], steps=2, batch=50, lr=0.3, momentum=0.5)
    name = "layer1.linear.weight"
    slopes = []
    for x, y in batches:  # the permutation stays, so the midpoint does
        middle = {k: ((a[k] + b[k]) / 2).requires_grad_() for k in a}
        loss = F.cross_entropy(functional_call(module, middle, (x,)), y)
        slopes.append(torch.autograd.grad(loss, middle[name])[0] / 2)
    assert len(references) == 3 and torch.equal(references[0][name], a[name])
    first = a[name] - 0.3 * slopes[0]
    assert torch.allclose(references[1][name], first, atol=1e-6)
    second = first - 0.3 * (0.5 * slopes[0] + slopes[1])
    assert torch.allclose(references[2][name], second, atol=1e-6)


def test_planted_permutations_come_back(module, spec, pair, digits) -> None:
    a = pair[0]
    perms = spec.random(Key("planted").generator())
    found = straight_through(spec, module, a, spec.permute(a, perms), digits[0], steps=2, lr=1e-3)
    assert torch.equal(flat(found.perms), flat(spec.inverse(perms)))
    assert found.share == pytest.approx(1)


def test_batchnorm_uses_batch_statistics_and_keeps_its_buffers() -> None:
    net = models.build("mlp:widths=12x2,norm=batch", (1, 4, 4), 3, Key("init", 0))
    other = models.build("mlp:widths=12x2,norm=batch", (1, 4, 4), 3, Key("init", 1))
    x = torch.randn(60, 1, 4, 4, generator=Key("x").generator())
    train = Split(5 * x + 3, Key("y").integers(60, 3))
    a, b = net.state_dict(), other.state_dict()
    kept = [{k: v.clone() for k, v in t.items()} for t in (a, b)]
    spec = derive(net, train.x[:4])
    args = (spec, net, a, b, train)
    found = straight_through(*args, steps=6, batch=20, lr=1.0, held_out=train)
    for theta, copy in zip((a, b), kept, strict=True):
        assert all(torch.equal(theta[k], v) for k, v in copy.items())
    # Running statistics do not enter the search.
    c, d = ({k: v + 50 if "running" in k else v for k, v in t.items()} for t in (a, b))
    same = straight_through(spec, net, c, d, train, steps=6, batch=20, lr=1.0, held_out=train)
    assert same.details == found.details


def computed(number: int) -> tuple[nn.Sequential, nn.Module]:
    """A network with weight norm and a pruning mask, and the same with plain weights."""
    with Key("ste", "computed", number).seeded():
        net = nn.Sequential(
            *(nn.Flatten(), weight_norm(nn.Linear(64, 12)), nn.ReLU()),
            *(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 10)),
        )
        prune.random_unstructured(net[3], "weight", 0.5)
    return net, effective(net).module


def test_half_way_is_between_the_weights_that_layers_use(digits) -> None:
    """Half of two masks is no mask; half of two lengths times half of two directions no mean."""
    (a, plain_a), (b, plain_b), (module, plain) = (computed(n) for n in range(3))
    train, held = digits
    spec = derive(module, train.x[:2])
    one, two = ({k: v.detach().clone() for k, v in n.state_dict().items()} for n in (a, b))
    found = straight_through(spec, module, one, two, train, steps=2, batch=50, held_out=held)
    moved = spec.permute(two, weight_matching(spec, one, two).perms)
    space = effective(module)
    middle = midpoint_loss(plain, space.enter(one), space.enter(moved), held)
    assert found.details["weight matching"] == pytest.approx(middle, rel=1e-5)

    # The gradient by what B stores is that of the same loss, written out.
    names = ["1.parametrizations.weight.original0", "1.parametrizations.weight.original1"]
    names += ["1.bias", "3.weight_orig", "5.weight"]
    x, y = held.x[:60], held.y[:60]
    half = ste.Midpoint(module, one, x, ste.mean_loss)
    loss, slope = half.gradient(two, x, y, names)
    leaves = {n: two[n].clone().requires_grad_() for n in names}
    g, v, bias, raw, head = leaves.values()
    theirs = {
        **{k: w.detach() for k, w in plain_b.state_dict().items()},
        "1.weight": g * v / v.norm(dim=1, keepdim=True),
        "1.bias": bias,
        "3.weight": raw * two["3.weight_mask"],
        "5.weight": head,
    }
    between = {k: (w.detach() + theirs[k]) / 2 for k, w in plain_a.state_dict().items()}
    true = F.cross_entropy(functional_call(plain, between, (x,)), y)
    grads = torch.autograd.grad(true, list(leaves.values()))
    assert float(loss) == pytest.approx(float(true.detach()), rel=1e-6)
    assert slope.keys() == leaves.keys()
    for name, wanted in zip(names, grads, strict=True):
        torch.testing.assert_close(slope[name] / 2, wanted, rtol=1e-4, atol=1e-6)


def test_free_weights_that_overflow_end_the_search(module, spec, pair, digits) -> None:
    found = straight_through(
        spec, module, pair[0], pair[1], digits[0], steps=50, batch=50, lr=1e38,
        score=lambda outputs, targets: 1e6 * F.cross_entropy(outputs, targets),
    )  # fmt: skip
    details = found.details or {}
    assert details["stopped"] is not None and details["stopped"] < 50
    assert found.passes == details["stopped"]
    assert torch.isfinite(torch.tensor(found.objective))
    spec.check(found.perms)


def test_the_held_out_part_is_not_trained_on(digits) -> None:
    train = digits[0]
    numbered = Split(torch.arange(23.0).view(23, 1, 1, 1), torch.zeros(23, dtype=torch.int64))
    rest, judges = ste.parted(numbered, None, 3, Key("k"))
    held = torch.cat([x for x, _ in judges]).flatten().tolist()
    assert len(held) == 4 and sorted([*held, *rest.x.flatten().tolist()]) == list(range(23))
    rest, judges = ste.parted(train, None, 10, Key("k"))
    assert sum(len(x) for x, _ in judges) == 100 == len(train) - len(rest)
    rest, judges = ste.parted(train, numbered, 10, Key("k"))
    assert rest is train and [len(x) for x, _ in judges] == [8, 8, 7]


def test_an_epoch_uses_every_example_once() -> None:
    numbered = Split(torch.arange(12.0).view(12, 1, 1, 1), torch.zeros(12, dtype=torch.int64))
    drawn = ste.endless(numbered, 4, Key("k"))
    epochs = [torch.cat([next(drawn)[0].flatten() for _ in range(3)]).tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert all(sorted(e) == list(range(12)) for e in epochs)


def test_bad_input(module, spec, pair, digits) -> None:
    a, b = pair
    train = digits[0]

    def refused(match: str, *, b: Any = b, train: Split = train, **changed: Any) -> None:
        with pytest.raises(BadParameter, match=match):
            straight_through(spec, module, a, b, train, **{"steps": 1, **changed})

    refused("steps: 0 must be", steps=0)
    refused("batch: 0 must be", batch=0)
    refused("judge_every: 0 must be", judge_every=0)
    refused("lr: nan", lr=float("nan"))
    refused("momentum: 1.0", momentum=1.0)
    nothing = Split(train.x[:0], train.y[:0])
    refused("train: 2 examples", train=nothing)
    refused("held_out: there are no", held_out=nothing)
    refused("train: there are no", train=nothing, held_out=train)
    refused("network B: head.bias holds NaN", b={**b, "head.bias": b["head.bias"] * torch.nan})
    refused("network B does not fit", b={k: v for k, v in b.items() if k != "head.bias"})


def test_a_time_limit_ends_it(module, spec, pair, digits) -> None:
    from companion.core import deadline

    with deadline.until(0.0), pytest.raises(OutOfTime):
        straight_through(spec, module, pair[0], pair[1], digits[0], steps=1000000, batch=50)
