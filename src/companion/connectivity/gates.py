"""Gates a barrier must pass before it is a number; one that fails makes the barrier INVALID, not 0.

Published reproductions went wrong in exactly these ways: dead networks whose barrier is 0, one
network compared with itself, neighbouring seeds that share shuffles. Names follow the fact sheet
of our chapter 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from companion.core.theta import Theta, affine, distance, shares_storage
from companion.data import Split

UNLEARNED = 15.0
"""Percent of its own training images that a network still gets wrong when its training was cut
short: verdicts about what training ends with are not asked of it."""


@dataclass(frozen=True)
class Gate:
    """The outcome of one gate: ``passed`` (None: does not apply) and one line that says why."""

    name: str
    passed: bool | None
    detail: str
    value: float | None = None
    """The number behind the outcome, where there is one (the barrier of the null control)."""

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "n/a"}[self.passed]
        return f"{self.name} {word}: {self.detail}"


def guessing(split: Split) -> float | None:
    """The error of the best guess on a text, in percent: always its commonest token.

    None for images, whose classes are about equally frequent: there it follows from their number.
    """
    if split.kind != "text":
        return None
    counts = torch.bincount(split.y.flatten())
    return 100 * (1 - int(counts.max()) / split.y.numel())


def quality(
    errors: Sequence[float],
    classes: int,
    *,
    reference: float | None = None,
    max_error: float | None = None,
    guess: float | None = None,
) -> Gate:
    """G0: every end has trained.

    Arguments:
        errors: of the ends on the held-out split, in percent.
        classes: for the default bound.
        reference: error of the same recipe when all is well; up to 1.5 times that passes (images).
        max_error: a preset that passes too (small test sets make 1.5 × 2 % a coin toss).
            With neither, half the error of guessing is the bound.
        guess: of a text, the error of :func:`guessing`; None for images. Good models of language
            err at most positions, where 1.5 times a normal error is next to no bound. So an end of
            a text must be below ``guess``, and with a reference it must be right at least half as
            often as that. An end at or below ``max_error`` passes whatever these say, and without
            a reference no other does.
    """
    worst = max(errors)
    if guess is None:
        bounds = [b for b in (reference and 1.5 * reference, max_error) if b is not None]
        bound = max(bounds) if bounds else 50 * (1 - 1 / classes)
        passed = all(e <= bound for e in errors)  # NaN is not
        return Gate("G0 quality", passed, f"end errors ≤ {worst:.2f} %, bound {bound:.2f} %")
    preset = -1.0 if max_error is None else max_error
    bound = 100.0 if max_error is None else preset
    if reference is not None:
        bound = 100 - (100 - reference) / 2
    passed = all(e <= preset or (e <= bound and e < guess) for e in errors)
    if preset >= min(bound, guess):
        detail = f"bound {preset:.2f} %"
    else:
        rule = f"at most {bound:.2f} % and " if bound < guess else ""
        detail = f"bound {rule}below {guess:.2f} %"
    guessed = f"always the commonest token: {guess:.2f} %"
    return Gate("G0 quality", passed, f"end errors ≤ {worst:.2f} %, {detail} ({guessed})")


def distinct(a: Theta, b: Theta, names: Sequence[str], *, same_noise: bool = False) -> Gate:
    """G0b: different noise gave different networks that share no memory.

    With ``same_noise`` (a null control) the ends should be equal and the gate does not apply.
    """
    if same_noise:
        return Gate("G0b distinct", None, "same noise on purpose")
    if shares_storage(a, b):
        return Gate("G0b distinct", False, "the two networks share memory: one object, twice")
    d = distance(a, b, names)
    return Gate("G0b distinct", d > 0, f"distance {d:.4g}")


def of_ends(
    a: Theta,
    b: Theta,
    names: Sequence[str],
    errors: Sequence[float],
    classes: int,
    held_out: Split,
    max_error: float | None = None,
    same_noise: bool = False,
) -> tuple[Gate, Gate]:
    """G0 and G0b: two trained networks, and not one of them twice.

    Arguments:
        names: of the parameters.
        errors: of A and B on ``held_out``.
        classes, max_error, same_noise: as :func:`quality` and :func:`distinct` take them.
    """
    trained = quality(errors, classes, max_error=max_error, guess=guessing(held_out))
    return trained, distinct(a, b, names, same_noise=same_noise)


def null_control(a: Theta, b: Theta, names: Sequence[str], barrier: float) -> Gate:
    """G1: same start, same noise, trained twice: the same network, and a barrier of exactly 0."""
    gap = max(float((a[n].double() - b[n].double()).abs().max()) for n in names)
    return Gate(
        "G1 null control",
        gap == 0 and barrier == 0,
        f"largest weight difference {gap:g}, barrier {barrier:g}",
        barrier,
    )


def symmetry(a: Theta, b: Theta, names: Sequence[str], self_gap: float) -> Gate:
    """G2: the path from A to B is the path from B to A, and the path from A to A stays at A.

    Arguments:
        self_gap: loss of a mixture of A with itself minus loss of A, as the evaluator saw them.
    """
    weights = (1 / 3, 2 / 3)
    there, back = affine((a, b), weights, names), affine((b, a), weights[::-1], names)
    same = all(torch.equal(there[n], back[n]) for n in names)
    return Gate(
        "G2 self and symmetry",
        same and self_gap == 0,
        f"A→B equals B→A: {'yes' if same else 'no'}, loss of A mixed with A minus A: {self_gap:g}",
    )


def noise_independence(
    permutations: Mapping[str, torch.Tensor], draws: Mapping[str, bytes] | None = None
) -> Gate:
    """G3: no two (key, epoch) pairs share a data order, nor a shifted copy of one, nor draws.

    Arguments:
        permutations: name of a (key, epoch) -> its permutation of ``range(n)``, shape (n,). A
            cyclic shift is undone by rotating every permutation so that it starts with 0.
        draws: name of a (key, epoch) -> what augmentation and dropout drew from it, as bytes.
    """

    def rotated(order: torch.Tensor) -> bytes:
        start = int((order == 0).nonzero()[0, 0])
        return torch.roll(order, -start).numpy().tobytes()

    clashes = []
    for group in ({name: rotated(o) for name, o in permutations.items()}, draws or {}):
        seen: dict[bytes, str] = {}
        for name, value in group.items():
            if value in seen:
                clashes.append(f"{seen[value]} = {name}")
            seen[value] = name
    detail = f"{len(clashes)} collisions among {len(permutations)} data orders"
    detail += f" and {len(draws)} draws" if draws else ""
    return Gate("G3 noise independence", not clashes, "; ".join([detail, *clashes[:3]]))


def masks(
    weights: Theta,
    levels: Sequence[Theta],
    *,
    rewound: Theta | None = None,
    start: Theta | None = None,
    keep: float = 0.8,
    slack: int = 1,
) -> Gate:
    """G4: pruning masks mean what they say (Frankle et al. 2020, Algorithm 2).

    Arguments:
        weights: the trained sparse network, to check against the last mask.
        levels: mask after each round (name -> boolean tensor), nested, each keeping ``keep`` of the
            one before.
        rewound, start: the network that was trained and W_k: masked equality, bit by bit.
        keep: share of the weights that each round keeps.
        slack: weights a round by which the numbers may differ; where every tensor is rounded by
            itself, as many as there are tensors.
    """
    faults = []
    last = levels[-1]
    faults += [
        f"{n}: a pruned weight is not 0" for n in last if bool((weights[n][~last[n]] != 0).any())
    ]
    total = sum(m.numel() for m in last.values())
    expected = float(total)
    for number, level in enumerate(levels, 1):
        expected *= keep
        alive = sum(int(m.sum()) for m in level.values())
        if abs(alive - expected) > number * slack:
            faults.append(f"round {number}: {alive} weights alive, {expected:.0f} expected")
        if number > 1 and any(bool((level[n] & ~levels[number - 2][n]).any()) for n in level):
            faults.append(f"round {number}: a pruned weight came back")
    if rewound is not None and start is not None:
        faults += [
            f"{n}: not rewound to W_k"
            for n in last
            if not torch.equal(rewound[n], start[n] * last[n])
        ]
    return Gate("G4 masks", not faults, "; ".join(faults[:3]) or f"{len(levels)} rounds nested")


def batchnorm(headline: str, modes: Sequence[str], average: int | None = None) -> Gate:
    """G5: with BatchNorm all three modes are logged, and the headline one is named.

    Arguments:
        headline: the mode that is reported.
        modes: all that were measured.
        average: training inputs behind the statistics of ``reestimate``, for the detail.
    """
    if headline == "none":
        return Gate("G5 BatchNorm mode", None, "no running statistics in this network")
    missing = {"interpolate", "reestimate", "batch"} - set(modes)
    detail = f"headline {headline}"
    if average is not None:
        detail += f", statistics re-estimated on {average:,} training inputs"
    if missing:
        detail += f", not logged: {', '.join(sorted(missing))}"
    return Gate("G5 BatchNorm mode", not missing, detail)
