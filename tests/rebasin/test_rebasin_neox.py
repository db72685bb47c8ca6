"""GPT-NeoX (Pythia): the stream is rotated, heads and units move, and rotary pairs stay."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from test_rebasin_rotation import Theta, gap, generator, planted, state, tokens
from torch import Tensor, nn

from companion.core.errors import BadParameter
from companion.data import Split
from companion.rebasin import (
    Folding,
    activation_rotation,
    fold,
    function_gap,
    learned_rotation,
    random_rotation,
    rotation_matching,
    transform,
)
from companion.rebasin.learned import Move, _relative
from companion.rebasin.rotation import HEADS, Problem

HEAD_SIZE = 6


@cache
def network(
    seed: int, rotary: float = 0.67, heads: int = 3, parallel: bool = True, tied: bool = False
) -> nn.Module:
    """A GPT-NeoX with noise on all weights; of the 6 queries of a head 4 are in rotary pairs."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=24, hidden_size=HEAD_SIZE * heads, num_hidden_layers=2, intermediate_size=20,
        num_attention_heads=heads, max_position_embeddings=16, use_parallel_residual=parallel,
        tie_word_embeddings=tied, rotary_pct=rotary, bos_token_id=0, eos_token_id=0,
        use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module: nn.Module = GPTNeoXForCausalLM(config)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.2 * torch.randn(p.shape))
    return module.eval()


@cache
def folding(**kind: Any) -> Folding:
    return fold(network(0, **kind), tokens(2))


def folded(seed: int, **kind: Any) -> Theta:
    return folding(**kind).apply(state(network(seed, **kind)))


KINDS: list[dict[str, Any]] = [{}, {"parallel": False, "tied": True}, {"rotary": 1.0}, {"heads": 1}]


@pytest.mark.parametrize("kind", KINDS)
def test_folding_and_rotating_keep_the_function(kind: dict[str, Any]) -> None:
    found, module = folding(**kind), network(1, **kind)
    theta = state(module)
    assert function_gap(module, theta, found.module, found.apply(theta), tokens(5, 9)) < 1e-4
    wide = {k: v.double() if v.is_floating_point() else v for k, v in theta.items()}
    there = found.apply(wide)
    moved = planted(found, there, 3)
    assert function_gap(module, wide, found.module, there, tokens(5, 9)) < 1e-9
    assert function_gap(module, wide, found.module, moved, tokens(5, 9)) < 1e-9
    assert gap(there, moved) > 0.1
    assert set(there) - set(theta) == {"lm_head.bias"}


def test_what_rotary_positions_tie_stays() -> None:
    """Queries and keys in rotary pairs: their units have no symmetry here; the others have."""
    found, every = folding(), folding(rotary=1.0)
    layer = "gpt_neox.layers.0.attention.query_key_value.weight[0]"
    assert "constants" in found.spec.held[layer] and "constants" in every.spec.held[layer]
    sizes = sorted(g.size for g in found.spec.groups.values() if g.within)
    assert sizes == [HEAD_SIZE - 4] * 2 + [HEAD_SIZE] * 2  # in each layer's heads
    assert [g.size for g in every.spec.groups.values() if g.within] == [HEAD_SIZE] * 2  # values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", HEADS)
def test_a_planted_rotation_comes_back(heads: str, kind: dict[str, Any]) -> None:
    found, a = folding(**kind), folded(0, **kind)
    b = planted(found, a, 1)
    by_weights = rotation_matching(found, a, b, heads=heads)
    by_activations = activation_rotation(found, a, b, tokens(64), heads=heads)
    assert abs(by_weights.share_before) < 0.5
    for back in (by_weights, by_activations):
        assert back.share == pytest.approx(1, abs=1e-6)
        assert gap(a, back.apply(b)) < 1e-5


def turns(found: Folding, seed: int) -> dict[str, Tensor]:
    """Random orthogonal matrices inside of each head."""
    g, out = generator(seed), {}
    for name, group in found.units.groups.items():
        if group.within:
            count = found.units.groups[group.within].size
            x = torch.randn(count, group.size, group.size, generator=g, dtype=torch.float64)
            out[name] = torch.linalg.qr(x)[0]
    return out


def test_turns_inside_of_heads_come_back() -> None:
    """Of values, and of queries with keys where no rotary pair is."""
    found, a = folding(), folded(0)
    g = generator(3)
    inner = turns(found, 4)
    assert len(inner) == 4
    b = transform(found, a, random_rotation(found.width, g), found.units.random(g), inner)
    assert function_gap(found.module, a, found.module, b, tokens(5)) < 1e-9
    b = {k: v.float() for k, v in b.items()}
    assert gap(a, rotation_matching(found, a, b, heads="rotated").apply(b)) < 1e-5
    assert rotation_matching(found, a, b).share < 0.99


def test_a_learned_move_is_the_transformation_that_is_returned() -> None:
    found, a, b = folding(), folded(0), {k: v.double() for k, v in folded(1).items()}
    start = rotation_matching(found, a, b, heads="rotated")
    g, rest = generator(5), Move.begin(Problem(found, a, b, "rotated"), a)
    parts = [
        {k: (v + 0.3 * torch.randn(v.shape, generator=g)).double() for k, v in of.items()}
        for of in ({"": rest.stream}, rest.perms, rest.inner)
    ]
    move = Move(parts[0][""], parts[1], parts[2])
    there = move.projected().on(found, transform(found, b, start.stream, start.perms, start.inner))
    assert gap(there, transform(found, b, *_relative(start, [move]))) < 1e-9
    assert function_gap(found.module, b, found.module, there, tokens(4)) < 1e-9
    assert gap(there, b) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_learned_matching_goes_down_and_keeps_the_function(both: bool) -> None:
    found, a, b = folding(), folded(0), folded(1)
    x = tokens(40, 5)
    with torch.no_grad():
        text = Split(x, found.module(x).logits.argmax(-1))
    how: dict[str, Any] = {"steps": 12, "batch": 20, "held_out": text, "both": both}
    back = learned_rotation(found, a, b, text, **how)
    values = [value for _, value in back.details["held out"]]
    assert back.details["best"] > 0 and min(values) < values[0] - 0.01
    assert function_gap(found.module, b, found.module, back.apply(b), tokens(4)) < 1e-4


def test_a_bias_that_nobody_takes_is_refused() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GPTNeoXConfig(**sizes, intermediate_size=8, vocab_size=24, attention_bias=False)
    with pytest.raises(BadParameter, match=r"input_layernorm has a bias and .*query_key_value"):
        fold(GPTNeoXForCausalLM(config), tokens(2))
