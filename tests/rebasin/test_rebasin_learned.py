"""Learned matching: exact gradients, what was planted found again, never worse than the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from test_rebasin_rotation import (
    VOCABULARY,
    Theta,
    folded,
    folding,
    generator,
    network,
    planted,
    state,
    tokens,
)
from torch import Tensor
from torch.func import functional_call

from companion.core.errors import BadParameter
from companion.core.losses import mean_loss
from companion.data import Split
from companion.rebasin import (
    Rotation,
    function_gap,
    learned_rotation,
    rotation_matching,
    transform,
)
from companion.rebasin.learned import Move, _relative, turned
from companion.rebasin.rotation import Problem


def loss(theta: Mapping[str, Tensor], text: Split) -> float:
    module = folding().module
    like = {k: v.float() for k, v in theta.items()}
    return float(mean_loss(functional_call(module, like, (text.x,)), text.y))


def read_by(theta: Theta, count: int = 60) -> Split:
    """Windows whose next tokens are those that a network finds likeliest: it is at a minimum."""
    x = tokens(count, 5)
    with torch.no_grad():
        return Split(x, functional_call(folding().module, theta, (x,)).argmax(-1))


def latents(seed: int, size: float = 0.3) -> Move:
    """A move that is not the identity, in float64."""
    g = generator(seed)
    rest = Move.begin(Problem(folding(), folded(0), folded(1), "rotated"), folded(0))

    def shaken(x: Tensor) -> Tensor:
        return (x + size * torch.randn(x.shape, generator=g)).double()

    return Move(
        shaken(rest.stream),
        {k: shaken(v) for k, v in rest.perms.items()},
        {k: shaken(v) for k, v in rest.inner.items()},
    )


def wide(theta: Theta) -> Theta:
    return {k: v.double() for k, v in theta.items()}


def nothing() -> Rotation:
    """A start that moves nothing."""
    rest = folding().units.identity()
    found = rotation_matching(folding(), folded(0), folded(0), heads="rotated")
    eye = torch.eye(12, dtype=torch.float64)
    inner = {g: torch.eye(t.shape[-1]).double().expand_as(t) for g, t in found.inner.items()}
    return replace(found, stream=eye, perms=rest, inner=inner)


@pytest.mark.slow
def test_latents_stand_for_rotations_and_permutations() -> None:
    q = turned(latents(1).stream, fixed=True)
    one = torch.eye(12, dtype=torch.float64)
    assert torch.allclose(q @ q.T, one, atol=1e-12)
    assert torch.allclose(q.sum(1), torch.ones(12).double(), atol=1e-12)
    move = Move(torch.zeros(12, 12), {"units": torch.tensor([[0.1, 0.9], [0.2, 0.3]])}, {})
    for _ in range(2):  # the second time by the prices of the first
        assert move.projected().perms["units"].tolist() == [[0, 1], [1, 0]]


def test_a_move_is_the_transformation_that_is_returned() -> None:
    """Carried out with gradients, and as the permutations and rotations that are written down."""
    move, b = latents(2), wide(folded(1))
    there = move.projected().on(folding(), b)
    back = transform(folding(), b, *_relative(nothing(), [move]))
    assert max(float((there[k] - back[k]).abs().max()) for k in b) < 1e-9
    assert max(float((there[k] - b[k]).abs().max()) for k in b) > 0.1
    assert function_gap(folding().module, b, folding().module, there, tokens(4)) < 1e-9


def test_gradients_of_rotations_are_exact() -> None:
    """Of the loss on the line, against central differences, in float64."""
    x = torch.randn(2, 3, 3, dtype=torch.float64, generator=generator(1)).requires_grad_()
    assert torch.autograd.gradcheck(turned, (x,))
    assert torch.autograd.gradcheck(lambda v: turned(v, fixed=True), (x,))
    text, a, b = read_by(folded(0), 4), wide(folded(0)), wide(folded(1))
    module = folding().module.double()
    try:

        def value(move: Move) -> Tensor:
            there = move.projected().on(folding(), b)
            half = {k: torch.lerp(a[k], v, 0.5) for k, v in there.items()}
            return mean_loss(functional_call(module, half, (text.x,)), text.y)

        move = latents(3, 0.1)
        for latent in (move.stream, next(iter(move.inner.values()))):
            latent.requires_grad_()
            (slope,) = torch.autograd.grad(value(move), [latent])
            way = torch.randn(latent.shape, generator=generator(4)).double()
            latent.requires_grad_(False)
            latent += 1e-5 * way
            above = value(move)
            latent -= 2e-5 * way
            below = value(move)
            latent += 1e-5 * way
            assert float((slope * way).sum()) == pytest.approx(
                float(above - below) / 2e-5, rel=1e-6
            )
    finally:
        module.float()


def test_the_gradient_of_a_permutation_goes_straight_through() -> None:
    latent = torch.randn(5, 5, generator=generator(2)).requires_grad_()
    way = torch.randn(5, 5, generator=generator(3))
    p = Move(latent, {"units": latent}, {}).projected().perms["units"]
    (slope,) = torch.autograd.grad((p * way).sum(), [latent])
    assert torch.equal(slope, way)


@pytest.mark.slow
def test_two_moved_ends_make_the_line_that_one_can_make() -> None:
    """S(A) to T(B) is S of A to S^-1 T(B): equal losses point by point."""
    a, b, text = wide(folded(0)), wide(folded(1)), read_by(folded(0), 8)
    of_b, of_a = latents(5), latents(6)
    one, two = of_a.projected().on(folding(), a), of_b.projected().on(folding(), b)
    alone = transform(folding(), b, *_relative(nothing(), [of_b, of_a]))
    for alpha in (0.25, 0.5):
        both = loss({k: torch.lerp(one[k], v, alpha) for k, v in two.items()}, text)
        assert both == pytest.approx(
            loss({k: torch.lerp(a[k], v, alpha) for k, v in alone.items()}, text), abs=1e-5
        )
    assert both != pytest.approx(loss({k: torch.lerp(a[k], b[k], 0.5) for k in a}, text), abs=1e-2)


@cache
def trained() -> tuple[Theta, Split]:
    """A network that has learnt some windows by heart, folded: it lies in a minimum."""
    module, text = network(0), Split(tokens(24, 5), tokens(24, 6))
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        mean_loss(module(text.x), text.y).backward()
        optimizer.step()
    return folding().apply(state(module)), text


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_a_planted_move_is_found_again(both: bool) -> None:
    """From a start that is off: the stream is a little turned, two large units are exchanged."""
    a, text = trained()
    b = planted(folding(), a, 7)
    exact = rotation_matching(folding(), a, b, heads="rotated")
    near = turned(latents(8, 0.1).stream, fixed=True)
    group = next(g for g in exact.perms if g.endswith("mlp.c_fc"))
    perms = {k: v.clone() for k, v in exact.perms.items()}
    two = a[f"{group.removesuffix('c_fc')}c_proj.weight"].norm(dim=1).topk(2).indices
    perms[group][two] = perms[group][two.flip(0)]
    start = replace(exact, stream=near @ exact.stream, perms=perms)
    kept: dict[str, Any] = {"start": start, "held_out": text, "both": both, "judge_every": 5}
    found = learned_rotation(folding(), a, b, text, steps=40, lr=0.01, batch=24, **kept)
    assert torch.equal(found.perms[group], exact.perms[group])
    off = [float((x.stream - exact.stream).norm()) for x in (start, found)]
    assert off[1] < 0.5 * off[0]
    moved = start.apply(b)
    begun = loss({k: torch.lerp(a[k], v, 0.5) for k, v in moved.items()}, text)
    best = min(value for _, value in found.details["held out"])
    assert best - loss(a, text) < 0.05 * (begun - loss(a, text))


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_the_result_is_never_above_the_start(both: bool) -> None:
    """Steps far too long: the start is kept, and B is the function that it was."""
    a, text = trained()
    b = planted(folding(), a, 7)
    before = {k: v.clone() for k, v in b.items()}
    found = learned_rotation(
        folding(), a, b, text, both=both, steps=6, lr=30.0, batch=8, judge_every=2
    )
    values = dict(found.details["held out"])
    assert list(values) == [0, 2, 4, 6] and found.details["best"] == 0
    assert values[0] == min(values.values()) and len(found.details["loss"]) == 6
    start = rotation_matching(folding(), a, b, heads="rotated")
    assert torch.allclose(found.stream, start.stream, atol=1e-12)
    assert found.method == "learned" and found.iterations == 6
    assert loss(found.apply(b), text) == pytest.approx(loss(b, text), abs=1e-5)
    assert all(torch.equal(b[k], v) for k, v in before.items())


@pytest.mark.slow
def test_a_search_goes_down_and_can_be_repeated() -> None:
    a, b, text = folded(0), folded(1), read_by(folded(0))
    how: dict[str, Any] = {"steps": 12, "batch": 32, "lr": 0.01, "held_out": text}
    found, again = (learned_rotation(folding(), a, b, text, **how) for _ in range(2))
    values = [value for _, value in found.details["held out"]]
    assert found.details["best"] > 0 and min(values) < values[0] - 0.01
    assert torch.equal(found.stream, again.stream) and found.details == again.details
    half = {k: torch.lerp(a[k], v, 0.5) for k, v in found.apply(b).items()}
    assert loss(half, text) == pytest.approx(min(values), abs=1e-5)
    assert "details" in found.summary() and "details" not in nothing().summary()


@pytest.mark.slow
def test_tokens_that_no_text_holds_do_not_count() -> None:
    a, b = folded(0), folded(1)
    x = tokens(20) % (VOCABULARY - 4)
    other = {k: v.clone() for k, v in b.items()}
    for name in ("transformer.wte.weight", "lm_head.weight"):
        other[name][-4:] += 3 * torch.randn(4, 12, generator=generator(1))
        other[name][-4:] -= other[name][-4:].mean(1, keepdim=True)
    text = Split(x, x)
    first, second = (
        learned_rotation(folding(), a, theta, text, steps=1, batch=4, lr=1e-9, judge_every=2)
        for theta in (b, other)
    )
    assert torch.allclose(first.stream, second.stream, atol=1e-6)


def test_what_makes_no_sense_is_refused() -> None:
    a, text = folded(0), read_by(folded(0), 8)
    for wrong in (
        {"steps": 0}, {"batch": 0}, {"judge_every": 0}, {"lr": 0.0}, {"lr": float("nan")},
        {"alphas": (0.6, 0.4)}, {"alphas": (0.5, 1.5)},
    ):  # fmt: skip
        with pytest.raises(BadParameter):
            learned_rotation(folding(), a, folded(1), text, **wrong)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(BadParameter, match="2 examples or more"):
        learned_rotation(folding(), a, folded(1), text.head(1))
