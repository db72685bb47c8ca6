"""Which weights go: exact numbers, nested masks, scores by hand, and a ticket that was planted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toypairs import NETS, Examples, Tokens

from companion import data as datasets
from companion import models
from companion.connectivity import Walker
from companion.core.errors import BadParameter
from companion.core.masks import alive, masked
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.data import Dataset, Split
from companion.rebasin import derive
from companion.tickets import (
    Pruning,
    carry,
    magnitude,
    prunable,
    prune,
    random_like,
    snip,
    synflow,
    whole,
)
from companion.training import Recipe, Run, State, advance, build, pruned

DIGITS = datasets.load("digits")
MLP = "mlp:widths=12x2"


def net(spec: str = MLP, label: int = 0) -> nn.Module:
    return models.build(spec, DIGITS.in_shape, 10, Key("tickets", label))


# ---- which weights may go


def test_weights_of_linear_layers_and_convolutions_alone_may_go() -> None:
    assert prunable(net()) == ("layer1.linear.weight", "layer2.linear.weight", "head.weight")
    assert prunable(net(), ("head",)) == ("layer1.linear.weight", "layer2.linear.weight")
    resnet = net("resnet8:norm=batch,width=2")
    state = resnet.state_dict()
    names = prunable(resnet, ("stage1",))
    assert all(state[n].ndim in (2, 4) and n.endswith("weight") for n in names)
    assert not any(n.startswith("stage1.") or "norm" in n or "bn" in n for n in names)
    weights = {n for n, v in state.items() if v.ndim > 1}
    assert weights - set(names) == {n for n in weights if n.startswith("stage1.")}
    # In a network for text the embedding stays, and with it a head that is tied to it.
    assert prunable(Tokens()) == ("up.weight", "head.weight")
    gpt = models.build("gpt:layers=1,width=8,heads=2", (6,), 11)
    blocks = [f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
    assert prunable(gpt) == tuple(f"{n}.weight" for n in (*blocks, "transformer.h.0.mlp.c_proj"))
    free = models.build("gpt:layers=1,width=8,heads=2,tied=false", (6,), 11)
    assert prunable(free)[-1] == "lm_head.weight"
    # Attention keeps its weights itself; a norm over images has a weight of three dimensions.
    mixed = nn.Sequential(nn.MultiheadAttention(8, 2), nn.LayerNorm((3, 4, 4)), nn.Linear(8, 2))
    assert prunable(mixed) == ("0.in_proj_weight", "0.out_proj.weight", "2.weight")


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(BadParameter, match=r"'heads' fits no layer. Layers: .*head"):
        prunable(net(), ("heads",))
    with pytest.raises(BadParameter, match="no weight of a linear layer"):
        prunable(net(), ("layer1", "layer2", "head"))
    for fraction in (0.0, 1.0, -0.1, True):
        with pytest.raises(BadParameter, match=r"between 0 and 1; 0.2 prunes 20 %"):
            Pruning(fraction)
    with pytest.raises(BadParameter, match=r"'layers' is not known. Did you mean 'layer'"):
        Pruning(scope="layers")
    assert Pruning(skip=("b", "a")) == Pruning(skip=("a", "b"))
    assert Pruning().density(8) == pytest.approx(0.168, abs=5e-4)


# ---- which weights go

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 999), st.sampled_from(["global", "layer"]), st.booleans())
def test_rounds_are_nested_exact_and_keep_the_highest(
    lengths: list[int], seed: int, scope: str, ties: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    theta = {f"w{i}": torch.randn(n, generator=draw) for i, n in enumerate(lengths)}
    mask = whole(list(theta), theta)
    total = sum(lengths)
    for level in range(1, 8):
        score = {n: torch.rand(v.shape, generator=draw) for n, v in theta.items()}
        if ties:
            score = {n: (3 * v).floor() for n, v in score.items()}
        share = Pruning().density(level)
        new = prune(score, mask, share, scope)
        assert all(not bool((new[n] & ~mask[n]).any()) for n in mask), "nested"
        counts = alive(new)
        if scope == "global":
            assert sum(k for k, _ in counts.values()) == round(total * share)
        else:
            assert all(k == round(n * share) for k, n in counts.values())
        parts = [[n] for n in mask] if scope == "layer" else [list(mask)]
        for names in parts:
            kept = torch.cat([score[n][new[n]] for n in names])
            gone = torch.cat([score[n][mask[n] & ~new[n]] for n in names])
            assert not len(kept) or not len(gone) or kept.min() >= gone.max()
        mask = new


def test_scores_that_do_not_fit_are_refused() -> None:
    theta = {"w": torch.ones(4)}
    mask = whole(["w"], theta)
    with pytest.raises(BadParameter, match=r"none for w of shape \(4,\)"):
        prune({"w": torch.ones(3)}, mask, 0.5)
    with pytest.raises(BadParameter, match="not all are finite"):
        prune({"w": torch.tensor([1.0, float("nan"), 2, 3])}, mask, 0.5)
    half = prune({"w": torch.tensor([1.0, 2, 3, 4])}, mask, 0.5)
    assert half["w"].tolist() == [False, False, True, True]
    gone = torch.tensor([float("nan"), 1.0, 2.0, 3.0])
    assert prune({"w": gone}, half, 0.25)["w"].tolist() == [False, False, False, True]
    with pytest.raises(BadParameter, match="would keep 3 weights, but 2 are left"):
        prune(theta, half, 0.75)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99))
def test_random_masks_have_the_layers_own_numbers_and_are_nested(seed: int) -> None:
    theta = {"a": torch.zeros(7, 5), "b": torch.zeros(40)}
    draw = torch.Generator().manual_seed(seed)
    mask, before = whole(list(theta), theta), None
    for level in range(1, 6):
        score = {n: torch.rand(v.shape, generator=draw) for n, v in theta.items()}
        mask = prune(score, mask, Pruning().density(level))
        found = random_like(mask, Key("random", seed))
        assert alive(found) == alive(mask)
        assert before is None or all(not bool((found[n] & ~before[n]).any()) for n in found)
        before = found
    other = random_like(mask, Key("random", seed + 1))
    assert any(not torch.equal(other[n], found[n]) for n in other)


# ---- a mask in other coordinates


@pytest.mark.parametrize("name", ["mlp", "vgg"])
def test_a_carried_mask_is_the_mask_of_the_permuted_network(name: str) -> None:
    module = NETS[name]()
    theta, names = snapshot(module), prunable(module)
    spec = derive(module, DIGITS.test.x[:2])
    perms = spec.random(torch.Generator().manual_seed(3))
    there = spec.permute(theta, perms)
    here = prune(magnitude(theta, names), whole(names, theta), 0.3)
    moved = carry(here, lambda t: spec.permute(t, perms))
    expected = prune(magnitude(there, names), whole(names, there), 0.3)
    assert all(torch.equal(moved[n], expected[n]) for n in names)
    assert any(not torch.equal(moved[n], here[n]) for n in names)
    # So the permuted sparse network computes what the sparse network did.
    x = DIGITS.test.x[:20]
    outputs = []
    for weights in (masked(theta, here), masked(there, moved)):
        module.load_state_dict(weights)
        outputs.append(module.eval()(x))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)


def test_carrying_by_what_is_no_permutation_is_refused() -> None:
    mask = {"w": torch.tensor([True, False])}
    with pytest.raises(BadParameter, match="not a permutation"):
        carry(mask, lambda theta: {"w": torch.ones(2)})


# ---- scores


def test_snip_is_the_effect_of_a_weight_on_the_loss() -> None:
    """d loss / d c at c = 1, where c multiplies one weight: by finite differences."""
    module = net().double()
    theta, names = snapshot(module), prunable(module)
    part: Any = Examples(DIGITS.train.x[:50].double(), DIGITS.train.y[:50])
    score = snip(module, theta, names, part)

    def loss_with(name: str, index: tuple[int, int], factor: float) -> float:
        changed = {n: v.clone() for n, v in theta.items()}
        changed[name][index] *= factor
        module.load_state_dict(changed)
        with torch.no_grad():
            return float(nn.functional.cross_entropy(module(part.x), part.y))

    for name, index in ((names[0], (3, 20)), (names[1], (5, 2)), (names[2], (9, 0))):
        slope = (loss_with(name, index, 1 + 1e-5) - loss_with(name, index, 1 - 1e-5)) / 2e-5
        assert float(score[name][index]) == pytest.approx(abs(slope), rel=1e-4, abs=1e-9)
    module.load_state_dict(theta)
    assert all(p.grad is None for p in module.parameters())


def test_looking_at_a_network_does_not_change_it() -> None:
    module = net("mlp:widths=12,norm=batch").train()
    theta, names = snapshot(module), prunable(module)
    given = {n: v.clone() for n, v in theta.items()}
    snip(module, theta, names, DIGITS.train.head(20))
    synflow(module, theta, names, DIGITS.in_shape)
    assert all(torch.equal(given[n], v) for n, v in theta.items())
    assert all(torch.equal(given[n], v) for n, v in module.state_dict().items())


def test_synflow_conserves_the_flow_from_layer_to_layer() -> None:
    """Without biases the scores of every layer sum to R (Tanaka et al. 2020, Theorem 1)."""
    module = net()
    theta, names = snapshot(module), prunable(module)
    theta = {n: torch.zeros_like(v) if n.endswith("bias") else v for n, v in theta.items()}
    score = synflow(module, theta, names, DIGITS.in_shape)
    sums = [float(score[n].sum()) for n in names]
    assert sums[0] > 0 and sums == pytest.approx([sums[0]] * len(sums), rel=1e-9)
    with pytest.raises(BadParameter, match="tokens are no numbers"):
        synflow(Tokens(), snapshot(Tokens()), ("up.weight",), (5,))


# ---- the planted ticket


def planted(inputs: Tensor, count: int = 1800) -> Dataset:
    """Images of noise; a small teacher that sees the pixels ``inputs`` alone says the class."""
    x = torch.randn(count + 600, 1, 8, 8, generator=Key("planted", "images").generator())
    draw = Key("planted", "teacher").generator()
    first, second = torch.randn(len(inputs), 3, generator=draw), torch.randn(3, 2, generator=draw)
    z = (x.flatten(1)[:, inputs] @ first).relu() @ second
    y = (z > z.median(0).values).long() @ torch.tensor([1, 2])
    train, test = Split(x[:count], y[:count]), Split(x[count:], y[count:])
    return replace(DIGITS, train=train, test=test)


@pytest.mark.slow
def test_a_planted_ticket_is_found() -> None:
    """A wide network, whose teacher looks at 4 of 64 inputs: IMP keeps their weights, no others.

    The ticket then errs less than the dense network, which a random mask of the same numbers does
    not.
    """
    inputs = torch.tensor([5, 17, 30, 42])
    data = planted(inputs)
    recipe = Recipe(
        net="mlp:widths=48", data="digits", steps=250, batch=60, lr=0.05, weight_decay=2e-3
    )
    run = Run(recipe)
    module = build(run, data, torch.device("cpu"))
    start, names = State(0, snapshot(module)), prunable(module, ("head",))
    walker = Walker(module, {"test": data.test})

    def train(mask: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        theta = advance(run, pruned(start, mask, module), 250, data, module=module).theta
        return theta, walker.at(theta)["test"].error

    mask = whole(names, start.theta)
    theta, dense = train(mask)
    for level in range(1, 8):
        mask = prune(magnitude(theta, names), mask, Pruning(0.4).density(level))
        theta, error = train(mask)
    kept = mask[names[0]]
    share = float(kept[:, inputs].sum() / kept.sum())
    assert share > 0.5, f"{share:.2f} of the weights are on 4 of 64 inputs"
    _, control = train(random_like(mask, Key("control")))
    assert error < dense - 4 and control > dense + 4, (dense, error, control)
    # The mask alone says which pixels the teacher looks at.
    assert set(kept.sum(0).topk(4).indices.tolist()) == set(inputs.tolist())
