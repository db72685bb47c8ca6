"""Keyed randomness: same key, same bits; different keys, nothing in common."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from companion.core.seeds import Key

labels = st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=12))
paths = st.lists(labels, max_size=4).map(tuple)


def rotated(order: torch.Tensor) -> bytes:
    """The permutation turned so that it starts with 0: equal for all its cyclic shifts."""
    return torch.roll(order, -int((order == 0).nonzero()[0, 0])).numpy().tobytes()


@settings(deadline=None)
@given(paths)
def test_same_key_same_bits(path: tuple[str | int, ...]) -> None:
    a, b = Key(*path), Key(*path)
    assert a == b and hash(a) == hash(b)
    assert a.digest() == b.digest() and a.seed() == b.seed()
    assert np.array_equal(a.words(9), b.words(9))
    assert np.array_equal(a.words(9)[:4], b.words(4)), "a longer draw begins with a shorter one"


@settings(deadline=None)
@given(paths, paths)
def test_different_keys_differ(a: tuple[str | int, ...], b: tuple[str | int, ...]) -> None:
    if a != b:
        assert Key(*a).digest() != Key(*b).digest()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Key(1), Key("1")),
        (Key("order", 12), Key("order", 1, 2)),
        (Key("order", 1, 2), Key("order", 2, 1)),
        (Key("ab", "c"), Key("a", "bc")),
        (Key("a", "b"), Key("ab")),
        (Key("str:a"), Key("a")),
        (Key("a"), Key("a", "")),
        (Key(), Key("")),
        (Key("order", 1).fold("epoch", 2), Key("order", 2).fold("epoch", 1)),
    ],
)
def test_type_order_and_borders_of_labels_count(a: Key, b: Key) -> None:
    assert a.digest() != b.digest()
    assert not np.array_equal(a.words(4), b.words(4))
    assert a.seed() != b.seed()


def test_fold_appends() -> None:
    assert Key("order", 3).fold("epoch", 7) == Key("order", 3, "epoch", 7)
    key = Key("order", 3)
    before = key.words(3)
    key.fold("epoch", 0).words(100)
    assert np.array_equal(key.words(3), before), "a child used its parent up"


def test_golden_values() -> None:
    """The stream is for ever: recorded runs and everybody's stores depend on it."""
    assert Key("init", 0).digest() == hashlib.sha256(b"\x08\0\0\0str:init\x05\0\0\0int:0").digest()
    assert Key("init", 0).words(3).tolist() == GOLDEN_WORDS
    assert Key("init", 0).seed() == GOLDEN_SEED
    assert Key("order", "0/1").fold("epoch", 2).permutation(12).tolist() == GOLDEN_PERMUTATION
    assert Key("augment", 7, "top", 0).integers(12, 9).tolist() == GOLDEN_INTEGERS


GOLDEN_WORDS = [328229330730740112, 4383923880679803490, 8364313131984051831]
GOLDEN_SEED = 7827967803962318272
GOLDEN_PERMUTATION = [8, 11, 0, 6, 1, 5, 3, 2, 4, 7, 10, 9]
GOLDEN_INTEGERS = [7, 5, 5, 1, 3, 0, 5, 8, 6, 6, 2, 4]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(40, 120))
def test_neighbouring_seeds_share_no_shuffle(seed: int, n: int) -> None:
    """The trap of ``seed + epoch``: there, seed 1 at epoch 2 is seed 2 at epoch 1."""
    seen = {
        rotated(Key("order", s).fold("epoch", epoch).permutation(n))
        for s in range(seed, seed + 4)
        for epoch in range(6)
    }
    assert len(seen) == 4 * 6


@settings(deadline=None)
@given(paths, st.integers(0, 300))
def test_permutations_are_permutations(path: tuple[str | int, ...], n: int) -> None:
    order = Key(*path).permutation(n)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))


def chi_square_bounds(cells: int) -> tuple[float, float]:
    # The keys are fixed, so no test here is random; an honest stream is within these bounds.
    return float(chi2.ppf(1e-4, cells - 1)), float(chi2.ppf(1 - 1e-4, cells - 1))


def test_permutations_are_uniform() -> None:
    trials = 6000
    orders = list(itertools.permutations(range(4)))
    counts = dict.fromkeys(orders, 0)
    for seed in range(trials):
        counts[tuple(Key("uniform", seed).permutation(4).tolist())] += 1
    expected = trials / len(orders)
    statistic = sum((c - expected) ** 2 / expected for c in counts.values())
    low, high = chi_square_bounds(len(orders))
    assert low < statistic < high


def test_every_element_visits_every_place() -> None:
    n, trials = 30, 3000
    counts = np.zeros((n, n))
    for seed in range(trials):
        counts[np.arange(n), Key("places", seed).permutation(n).numpy()] += 1
    expected = trials / n
    low, high = chi_square_bounds((n - 1) ** 2 + 1)
    statistic = float(((counts - expected) ** 2 / expected).sum()) * (n - 1) / n
    assert low < statistic < high


def test_integers_are_uniform_and_in_range() -> None:
    for high in (2, 7, 9):
        drawn = Key("integers", high).integers(20_000, high)
        assert drawn.dtype == torch.int64
        assert set(drawn.tolist()) == set(range(high))
        expected = 20_000 / high
        counts = torch.bincount(drawn, minlength=high).double()
        low, top = chi_square_bounds(high)
        assert low < float(((counts - expected) ** 2 / expected).sum()) < top


def test_seeded_starts_from_the_key_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a GPU was seeded; nobody sets it back")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    torch.randn(5)  # somewhere in the middle of the global stream
    before = torch.get_rng_state()
    with Key("a", 1).seeded():
        inside = torch.randn(40)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ZeroDivisionError), Key("a", 1).seeded():
        torch.randn(3)
        _ = 1 / 0
    assert torch.equal(torch.get_rng_state(), before)

    torch.randn(5)  # wherever the global stream is, the keyed one is the same
    with Key("a", 1).seeded():
        assert torch.equal(torch.randn(40), inside)
    with Key("a", 2).seeded():
        assert not torch.equal(torch.randn(40), inside)
    own = torch.randn(40, generator=Key("a", 1).generator())
    assert torch.equal(own, inside)


@pytest.mark.gpu
def test_seeded_leaves_the_gpu_alone() -> None:
    torch.randn(5, device="cuda")
    before = torch.cuda.get_rng_state()
    with Key("a", 1).seeded():
        torch.randn(5)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_seeds_fit_every_generator() -> None:
    seeds = {Key("seed", i).seed() for i in range(500)}
    assert len({s % 2**32 for s in seeds}) == 500, "torch's CPU generator takes 32 bits of a seed"
    assert all(0 <= s < 2**63 for s in seeds)
