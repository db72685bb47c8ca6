"""Rotations of the residual stream: the function stays, planted ones come back, others are refused.

Networks are tiny GPTs whose every weight was shaken: no zero or equal weights hide a mistake.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from companion.connectivity import Walker, segment
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.data import Dataset, Split
from companion.experiments import methods
from companion.experiments.aligned import Method, align, pairs_of, permuted, place, placed
from companion.experiments.pairs import Evaluation
from companion.models.gpt import gpt
from companion.rebasin import (
    Folding,
    Rotation,
    Unproven,
    activation_matching,
    activation_rotation,
    derive,
    fold,
    function_gap,
    procrustes,
    random_rotation,
    rotate,
    rotation_matching,
    stream_of,
    transform,
    weight_matching,
)
from companion.rebasin.rotation import HEADS
from companion.training import Recipe

Theta = dict[str, Tensor]
VOCABULARY, WINDOW = 24, 8
METHOD_KINDS = [(b, t) for b in ("true", "false") for t in ("true", "false")]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (count, WINDOW), generator=generator(seed))


def network(seed: int, *, layers: int = 2, width: int = 12, heads: int = 3, **kind: Any) -> Any:
    """A GPT with noise on all its weights, gains and biases included; seed 0, 1, … are others."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = gpt((WINDOW,), VOCABULARY, layers=layers, width=width, heads=heads, **kind)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.2 * torch.randn(p.shape))
    return module.eval()


@cache
def folding(bias: str = "true", tied: str = "true") -> Folding:
    return fold(network(0, bias=bias, tied=tied), tokens(2))


def state(module: nn.Module) -> Theta:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


@cache
def folded(seed: int, bias: str = "true", tied: str = "true") -> Theta:
    return folding(bias, tied).apply(state(network(seed, bias=bias, tied=tied)))


def gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def planted(found: Folding, a: Theta, seed: int) -> Theta:
    """``a`` with its stream rotated, and its heads and units permuted, at random."""
    g = generator(seed)
    q = random_rotation(found.width, g)
    return {k: v.to(a[k].dtype) for k, v in transform(found, a, q, found.units.random(g)).items()}


# Folding


@pytest.mark.parametrize(("bias", "tied"), METHOD_KINDS)
def test_folding_keeps_the_function(bias: str, tied: str) -> None:
    module = network(3, bias=bias, tied=tied)
    before = state(module)
    found = folding(bias, tied)
    theta = found.apply(before)
    assert function_gap(module, before, found.module, theta, tokens(5, 9)) < 1e-5  # float32
    wide = {k: v.double() for k, v in before.items()}
    there = found.apply(wide)
    assert there["lm_head.weight"].dtype == torch.float64
    assert function_gap(module.double(), wide, found.module.double(), there, tokens(5, 9)) < 1e-9
    found.module.float()
    # every gain is 1, every bias of a norm 0, every write to the stream has no mean over it
    for norm in found.parts.readers:
        assert bool((theta[f"{norm}.weight"] == 1).all())
        assert f"{norm}.bias" not in theta or not bool(theta[f"{norm}.bias"].any())
    for use in found.spec.uses[found.stream]:
        assert float(theta[use.tensor].mean(use.dim).abs().max()) < 1e-6
    assert set(theta) - set(before) == ({"lm_head.bias"} if bias == "true" else set())
    assert not torch.equal(theta["lm_head.weight"], theta["transformer.wte.weight"])


def test_folding_changes_nothing_else() -> None:
    module = network(0)
    before = state(module)
    torch.manual_seed(5)
    random = torch.random.get_rng_state()
    found = fold(module, tokens(2))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert gap(before, state(module)) == 0
    assert module.config.tie_word_embeddings
    assert module.lm_head.weight is module.transformer.wte.weight
    # the folded module starts as the fold of the network's own weights
    assert gap(found.apply(before), state(found.module)) < 1e-7


def test_a_tied_network_may_come_under_one_name() -> None:
    theta = state(network(1))
    one = {k: v for k, v in theta.items() if k != "lm_head.weight"}
    assert gap(folding().apply(theta), folding().apply(one)) == 0


def test_folding_finds_heads_units_and_the_stream() -> None:
    found = folding()
    assert found.stream == "transformer.wte" == stream_of(network(0), derive(network(0), tokens(2)))
    assert found.width == 12
    assert len(found.spec.groups) == 1 + 2 * 4  # in a layer heads, two kinds of units there, units
    assert not any("ln_" in t for t in found.spec.axes)
    held = found.units
    assert found.stream not in held.groups
    assert len(held.groups) == 2 * 4
    assert "transformer.wte.weight" in held.objective and "transformer.wte.weight" not in held.axes
    assert held.held["transformer.wte.weight[1]"] == "held on request"


class PostNorm(nn.Module):
    """Layers under GPT-2's names, normalised after the addition."""

    def __init__(self) -> None:
        super().__init__()
        own = network(0)
        self.transformer, self.lm_head = own.transformer, own.lm_head

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self.transformer
        z = parts.wte(x) + parts.wpe(torch.arange(x.shape[1]))
        for block in parts.h:
            z = block.ln_1(z + block.attn(z)[0])
            z = block.ln_2(z + block.mlp(z))
        return self.lm_head(parts.ln_f(z))


def test_networks_that_cannot_be_folded_are_refused() -> None:
    with pytest.raises(Unproven, match="pre-LN"):
        fold(PostNorm(), tokens(2))
    layer = nn.TransformerEncoderLayer(8, 2, norm_first=False)
    with pytest.raises(BadParameter, match="post-LN"):
        fold(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), tokens(2))
    with pytest.raises(BadParameter, match=r"Linear is no GPT network.*GPT2LMHeadModel"):
        fold(nn.Linear(3, 3), torch.zeros(2, 3))
    no_last = network(0)
    del no_last.transformer.ln_f
    with pytest.raises(BadParameter, match="post-LN"):
        fold(no_last, tokens(2))
    root = network(0)
    root.transformer.h[1].ln_2 = nn.RMSNorm(12)
    with pytest.raises(BadParameter, match=r"h\.1\.ln_2 is a RMSNorm"):
        fold(root, tokens(2))
    half = network(0, bias="false")
    half.transformer.h[0].ln_1.bias = nn.Parameter(torch.ones(12))
    with pytest.raises(BadParameter, match=r"ln_1 has a bias and .*c_attn.*none"):
        fold(half, tokens(2))
    with pytest.raises(BadParameter, match="no token embedding"):
        stream_of(nn.Linear(3, 3), folding().spec)
    theta = state(network(0))
    theta["transformer.wte.weight"][0, 0] = torch.nan
    with pytest.raises(BadParameter, match="NaN"):
        folding().apply(theta)
    with pytest.raises(BadParameter, match="does not fit the model"):
        folding().apply(folded(0))  # twice


# Rotations


@pytest.mark.parametrize(("bias", "tied"), METHOD_KINDS)
def test_rotating_keeps_the_function(bias: str, tied: str) -> None:
    found = folding(bias, tied)
    theta = {k: v.double() for k, v in folded(1, bias, tied).items()}
    moved = rotate(found, theta, random_rotation(12, generator(0)))
    module = copy.deepcopy(found.module).double()
    assert function_gap(module, theta, module, moved, tokens(5, 9)) < 1e-9
    assert gap(theta, moved) > 0.1  # another point of weight space


def test_only_rotations_that_keep_the_ones_do() -> None:
    found, theta = folding(), folded(1)
    q = torch.linalg.qr(torch.randn(12, 12, generator=generator(0), dtype=torch.float64))[0]
    moved = transform(found, theta, q)
    assert function_gap(found.module, theta, found.module, moved, tokens(5)) > 1e-2
    for bad, why in (
        (q, "all-ones"),
        (2 * torch.eye(12), "orthogonal"),
        (torch.eye(11), "12 x 12"),
        (torch.full((12, 12), torch.nan), "NaN"),
    ):
        with pytest.raises(BadParameter, match=why):
            rotate(found, theta, bad)
        with pytest.raises(BadParameter, match=why):
            rotation_matching(found, theta, theta, start=bad)


def test_a_rotation_that_changes_the_function_is_refused() -> None:
    found = rotation_matching(folding(), folded(0), folded(1))
    q = found.stream.clone()
    q[0] *= 1.01
    broken = Rotation(**{**vars(found), "stream": q})
    with pytest.raises(Unproven, match="not the same function"):
        broken.apply(folded(1))


@given(st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_procrustes_is_the_best_of_all(width: int, seed: int) -> None:
    g = generator(seed)
    gain = torch.randn(width, width, generator=g, dtype=torch.float64)
    q = procrustes(gain)
    one = torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(q @ q.T, one.diag())
    torch.testing.assert_close(q @ one, one)
    best = float((gain * q).sum())
    for _ in range(5):
        other = random_rotation(width, g)
        assert float((gain * other).sum()) <= best + 1e-9
        # nor is there a better one nearby
        near = procrustes(q + 0.01 * other)
        assert float((gain * near).sum()) <= best + 1e-9


def test_procrustes_refuses_what_is_no_table_of_gains() -> None:
    with pytest.raises(BadParameter, match="square"):
        procrustes(torch.ones(2, 3))
    with pytest.raises(BadParameter, match="NaN"):
        procrustes(torch.full((2, 2), torch.nan))


# Matching


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize(("bias", "tied"), [("true", "true"), ("false", "false")])
def test_planted_rotations_come_back(heads: str, by: str, bias: str, tied: str) -> None:
    found, a = folding(bias, tied), folded(0, bias, tied)
    b = planted(found, a, 1)
    x = tokens(64)
    if by == "weights":
        back = rotation_matching(found, a, b, heads=heads)
        assert back.iterations == 0 and back.converged  # the embeddings tell Q, at once
    else:
        back = activation_rotation(found, a, b, x, heads=heads)
    assert back.share == pytest.approx(1, abs=1e-6)
    assert abs(back.before / back.bound) < 0.5
    moved = back.apply(b)
    assert gap(a, moved) < 1e-5
    y = tokens(64, 1)
    curve = segment(found.module, a, moved, {"test": Split(x, y)}, points=5)
    losses = curve.values["test"]["loss"]
    assert max(losses) - min(losses) < 1e-5
    # and the line was not flat before
    rough = segment(found.module, a, b, {"test": Split(x, y)}, points=5).values["test"]["loss"]
    assert max(rough) - min(rough) > 0.05


def test_turns_inside_of_heads_come_back() -> None:
    """Planted turns of queries with keys, and of values: permutations cannot undo them."""
    found, a = folding(), folded(0)
    g = generator(3)
    inner = {}
    for name, group in found.units.groups.items():
        if group.within:
            x = torch.randn(3, group.size, group.size, generator=g, dtype=torch.float64)
            inner[name] = torch.linalg.qr(x)[0]
    assert len(inner) == 4
    q = random_rotation(12, g)
    b = transform(found, a, q, found.units.random(g), inner)
    assert function_gap(found.module, a, found.module, b, tokens(5)) < 1e-6
    b = {k: v.float() for k, v in b.items()}
    assert gap(a, rotation_matching(found, a, b, heads="rotated").apply(b)) < 1e-5
    assert rotation_matching(found, a, b, heads="permuted").share < 0.99


@pytest.mark.parametrize("heads", HEADS)
def test_the_objective_never_falls_and_is_what_it_says(heads: str) -> None:
    found, a, b = folding(), folded(0), folded(1)
    back = rotation_matching(found, a, b, heads=heads, rtol=0)
    rises = [y - x for x, y in zip(back.history, back.history[1:], strict=False)]
    assert rises and min(rises) > -1e-9 * back.bound
    assert sum(rises) > 1e-3 * back.bound
    assert back.before < back.objective == back.history[-1] < back.bound
    moved = back.apply(b)

    def product(theta: Theta) -> float:
        return sum(float((a[t].double() * theta[t].double()).sum()) for t in found.spec.objective)

    assert product(moved) == pytest.approx(back.objective, rel=1e-6)
    assert product(b) == pytest.approx(back.before, abs=1e-6 * back.bound)
    # the distance is what falls: the norms of both networks stay
    names = found.spec.objective
    far, near = (sum(float((a[t] - x[t]).square().sum()) for t in names) for x in (b, moved))
    assert far - near == pytest.approx(2 * (back.objective - back.before), rel=1e-4)


@given(
    st.integers(0, 10**6),
    st.integers(1, 2),
    st.sampled_from([(4, 1), (4, 2), (6, 3), (8, 2)]),
    st.sampled_from(METHOD_KINDS),
    st.sampled_from(HEADS),
)
@settings(max_examples=12, deadline=None)
def test_any_small_network(
    seed: int, layers: int, size: tuple[int, int], kind: tuple[str, str], heads: str
) -> None:
    bias, tied = kind
    width, count = size
    a, b = (
        network(seed + i, layers=layers, width=width, heads=count, bias=bias, tied=tied)
        for i in (0, 1)
    )
    found = fold(a, tokens(2))
    one, other = found.apply(state(a)), found.apply(state(b))
    back = rotation_matching(found, one, other, heads=heads)
    moved = back.apply(other)
    assert function_gap(b, state(b), found.module, moved, tokens(4, 2)) < 1e-4
    assert back.objective >= back.before - 1e-9 * back.bound
    assert min(y - x for x, y in zip(back.history, (*back.history[1:], 1e99), strict=True)) > -1e-9
    itself = rotation_matching(found, one, one, heads=heads)
    assert itself.share == pytest.approx(1, abs=1e-6)
    # rotating and permuting B first changes nothing: both are the same network to be found
    hidden = rotation_matching(found, one, planted(found, other, seed), heads=heads)
    assert hidden.objective == pytest.approx(back.objective, rel=1e-4, abs=1e-4 * back.bound)


def test_inputs_are_not_changed_and_mistakes_are_refused() -> None:
    found, a, b = folding(), folded(0), folded(1)
    kept = {k: v.clone() for k, v in a.items()}, {k: v.clone() for k, v in b.items()}
    rotation_matching(found, a, b, heads="rotated").apply(b)
    activation_rotation(found, a, b, tokens(4)).apply(b)
    assert gap(a, kept[0]) == 0 and gap(b, kept[1]) == 0
    with pytest.raises(BadParameter, match="heads"):
        rotation_matching(found, a, b, heads="turned")
    with pytest.raises(BadParameter, match="max_iterations"):
        rotation_matching(found, a, b, max_iterations=0)
    with pytest.raises(BadParameter, match="tokens of shape"):
        activation_rotation(found, a, b, tokens(0))
    with pytest.raises(BadParameter, match="network B"):
        rotation_matching(found, a, {**b, "lm_head.bias": b["lm_head.bias"] * torch.nan})
    with pytest.raises(BadParameter, match="network A"):
        rotation_matching(found, state(network(0)), b)


# Permutations of a GPT as it is


@pytest.mark.parametrize("hold", [False, True])
def test_permutations_with_the_stream_in_place_or_not(hold: bool) -> None:
    module = network(0)
    spec = derive(module, tokens(2))
    stream = stream_of(module, spec)
    spec = spec.hold(stream) if hold else spec
    assert (stream in spec.groups) is not hold
    a = state(module)
    p = spec.random(generator(4))
    b = spec.permute(a, p)
    # a permutation of the stream moves both names of the embedding alike
    assert torch.equal(b["lm_head.weight"], b["transformer.wte.weight"])
    assert torch.equal(b["transformer.wte.weight"], a["transformer.wte.weight"]) is hold
    by_weights = weight_matching(spec, a, b)
    by_activations = activation_matching(spec, module, a, b, tokens(64))
    for found in (by_weights, by_activations):
        assert gap(a, found.apply(module, b)) == 0
    heads = [g for g in spec.groups.values() if g.within]
    assert len(heads) == 4 and all(g.size == 4 for g in heads)


def test_hold_takes_inner_groups_along() -> None:
    spec = derive(network(0), tokens(2))
    outer = next(g.within for g in spec.groups.values() if g.within)
    held = spec.hold(outer)
    assert len(held.groups) == len(spec.groups) - 3
    b = held.permute(state(network(0)), held.random(generator(0)))
    assert function_gap(network(0), state(network(0)), network(0), b, tokens(3)) < 1e-5
    with pytest.raises(BadParameter, match=r"Did you mean 'transformer\.wte'"):
        spec.hold("transformer.wt")


# The bridge


def text() -> Dataset:
    stream = torch.randint(VOCABULARY, (40 * WINDOW + 1,), generator=generator(0))
    split = Split.windows(stream, WINDOW)
    return Dataset("text", "text", split, split, VOCABULARY, (WINDOW,), (), (), "0" * 64)


@pytest.mark.parametrize("name", [k.name for k in methods.METHOD_KINDS.values() if k.nets == "gpt"])
def test_methods_of_the_stream(name: str) -> None:
    module, data = network(0), text()
    a, b = state(module), state(network(1))
    found = place(Method(name, examples=20, steps=5), module, a, b, data)
    x = tokens(5)
    assert function_gap(module, a, found.module, found.a, x) < 1e-5
    assert function_gap(module, b, found.module, found.b, x) < 1e-5
    assert function_gap(module, b, found.module, found.before, x) < 1e-5
    Walker(found.module, {"test": data.test}).walk((found.a, found.b), [(0.5, 0.5)])
    assert (gap(found.before, found.b) > 0) is (name != "folded")
    if name != "units":
        assert found.summary["function gap"] < 1e-5
    if name in ("rotated", "rotated-heads"):
        assert found.summary["share"] > found.summary["share before"]


def test_stored_runs_are_aligned_once(store: Store) -> None:
    recipe = Recipe(
        data="pydoc?tokenizer=bytes&window=16",
        net="gpt:layers=1,width=8,heads=2",
        optimizer="adamw",
        lr=0.01,
        batch=8,
        steps=3,
    )
    few = Evaluation(points=3, train_examples=8, test_examples=8)
    names = ["naive", "units", "weights", "folded", "rotated"]
    found = align(pairs_of(recipe, 1), names, few, max_error=100.0, workers=1)
    ends = [found[n][0].barrier.curve.ends("test", "loss") for n in names]
    for pair in ends:  # the same two functions under every method
        assert pair == pytest.approx(ends[0], rel=1e-5)
    assert all(found[n][0].valid for n in names)
    rotated = found["rotated"][0]
    assert rotated.distances["after"] < rotated.distances["before"]
    assert rotated.matching["share"] > rotated.matching["share before"]
    assert set(permuted(rotated)) == set(placed(rotated).module.state_dict())
    again = align(pairs_of(recipe, 1), names, few, max_error=100.0, workers=1)
    assert again["rotated"][0].matching["seconds"] == rotated.matching["seconds"]  # it was stored
