"""Every way of matching two networks under one name, for the experiments of chapters 2 and 5.

A :class:`Method` is a value with an identity for the run store; :func:`place` carries it out with
the instruments of :mod:`companion.rebasin`: it returns both networks in the coordinates in which
they are to be compared. :mod:`companion.experiments.aligned` measures what comes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from companion.core.errors import BadParameter, one_of
from companion.core.runs import Store
from companion.core.seeds import Key
from companion.core.theta import Theta, layout, without_aliases
from companion.data import Dataset, Split
from companion.rebasin.activations import activation_matching
from companion.rebasin.derive import derive
from companion.rebasin.folding import Folding, fold, function_gap, stream_of
from companion.rebasin.matching import Matching, bound
from companion.rebasin.rotating import TOKENS, activation_rotation, rotation_matching
from companion.rebasin.rotation import Rotation
from companion.rebasin.spec import Spec
from companion.rebasin.ste import STEPS, straight_through
from companion.rebasin.weights import greedy, objective, weight_matching
from companion.training import Run, load_weights

METHODS = ("naive", "weights", "activations", "ste", "greedy", "random", "steepest")
"""How B is permuted: not at all; weight matching (Algorithm 1); activation matching; the
straight-through estimator (Algorithm 2); one greedy pass; at random; so that the loss falls most
steeply at A (App. A.11)."""

STREAMS = ("units", "folded", "rotated", "rotated-heads", "rotated-activations")
"""For GPT networks, how the residual stream is treated: heads and MLP units matched by weights with
the stream in place; nothing matched, but LayerNorm folded; folded, and the stream rotated while
heads and units are matched by weights; so that units inside of heads are rotated, too; folded, with
rotation and matching by activations."""


@dataclass(frozen=True)
class Method:
    """How B is brought to A.

    Arguments:
        name: one of :data:`METHODS` or, for GPT networks, of :data:`STREAMS`.
        starts: ``weights``: descents from as many starts, of which the best counts.
        statistic: ``activations``: ``moment`` or ``correlation``.
        examples: ``activations``, ``steepest``, ``rotated-activations``, REPAIR: training images
            or windows to look at (None: all).
        steps, batch, lr: ``ste``: optimiser steps, images or windows a step, learning rate.
        label: of the random choices (visiting orders, random permutations, batches).
    """

    name: str = "weights"
    starts: int = 1
    statistic: str = "moment"
    examples: int | None = None
    steps: int = STEPS
    batch: int = 256
    lr: float = 0.01
    label: int | str = 0

    def __post_init__(self) -> None:
        one_of("method", self.name, (*METHODS, *STREAMS))
        one_of("statistic", self.statistic, ("moment", "correlation"))

    def identity(self) -> dict[str, Any]:
        """What of it determines the permutations of this method, for the store."""
        fields: dict[str, tuple[str, ...]] = {
            "naive": (),
            "weights": ("starts", "label"),
            "activations": ("statistic", "examples"),
            "ste": ("steps", "batch", "lr", "label"),
            "greedy": (),
            "random": ("label",),
            "steepest": ("examples", "label"),
            "units": ("starts", "label"),
            "folded": (),
            "rotated": (),
            "rotated-heads": (),
            "rotated-activations": ("examples",),
        }
        return {"name": self.name} | {f: getattr(self, f) for f in fields[self.name]}


def weights_of(run: Run, step: int, store: Store, device: str) -> dict[str, torch.Tensor]:
    """The network of ``run`` at ``step``, on the device."""
    theta = load_weights(run, step, store=store, device=device)
    return {k: v.to(device) for k, v in theta.items()}


def spec_of(module: nn.Module, data: Dataset) -> Spec:
    """The module's permutation symmetries, proven on one image of ``data``."""
    return derive(module, data.test.x[:2])


def gradient(
    module: nn.Module, theta: Theta, data: Dataset, examples: int | None = None
) -> dict[str, torch.Tensor]:
    """The gradient of the mean training loss at ``theta``, name -> tensor, parameters only."""
    own = layout(module)
    leaves = {n: theta[n].detach().clone().requires_grad_() for n in own.parameters}
    rest = {n: v for n, v in without_aliases(theta, own.ties).items() if n not in leaves}
    part = data.train.head(examples or len(data.train))
    module = module.eval()
    out = {n: torch.zeros_like(v) for n, v in leaves.items()}
    size = examples_a_pass(part.x)
    for x, y in zip(part.x.split(size), part.y.split(size), strict=True):
        logits = functional_call(module, {**rest, **leaves}, (x,))
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")
        found = torch.autograd.grad(loss / part.y.numel(), list(leaves.values()))
        for n, g in zip(leaves, found, strict=True):
            out[n] += g
    return out


def examples_a_pass(x: Tensor) -> int:
    """Images a forward pass; of windows (N, L) int64 as many as have :data:`TOKENS` tokens, or two.

    The logits of a window are L times as many as those of an image.
    """
    return 500 if x.is_floating_point() or x.dim() > 2 else max(2, TOKENS // x.shape[1])


def match(method: Method, module: nn.Module, a: Theta, b: Theta, data: Dataset) -> Matching:
    """The permutations of ``method`` for network B. ``naive`` and the foldings have none.

    Raises:
        BadParameter: ``naive``, or a method that folds; whatever the method refuses.
    """
    if method.name not in METHODS and method.name != "units":
        raise BadParameter(f"{method.name} is no permutation of the network as it is: use place().")
    spec = spec_of(module, data)
    key = Key("aligned", method.label)
    part = data.train.head(method.examples or len(data.train))
    if method.name == "units":
        held = spec.hold(stream_of(module, spec))
        return weight_matching(held, a, b, starts=method.starts, key=key)
    if method.name == "weights":
        return weight_matching(spec, a, b, starts=method.starts, key=key)
    if method.name == "activations":
        return activation_matching(
            spec, module, a, b, part.x, statistic=method.statistic, batch=examples_a_pass(part.x)
        )
    if method.name == "ste":
        return straight_through(
            spec,
            module,
            a,
            b,
            data.train,
            steps=method.steps,
            batch=method.batch,
            lr=method.lr,
            key=key,
        )
    if method.name == "greedy":
        return greedy(spec, a, b)
    if method.name == "steepest":
        down = {n: -g for n, g in gradient(module, a, data, method.examples).items()}
        return weight_matching(spec, down, b, key=key)
    if method.name == "random":
        perms = spec.random(key.generator())
        value, before = objective(spec, a, b, perms), objective(spec, a, b)
        return Matching(spec, perms, "random", value, before, bound(a, b, spec), passes=0)
    raise BadParameter("naive: nothing is matched.")


@dataclass(frozen=True, eq=False)
class Placed:
    """Two networks in the coordinates in which a method compares them.

    Arguments:
        module: the architecture there: the original one, or the folded one.
        a, b: state dicts of it, B matched; before: B as it is there with nothing matched.
        summary: what the method has to say, JSON-able; empty for ``naive``.
    """

    module: nn.Module
    a: Theta
    b: Theta
    before: Theta
    summary: dict[str, Any]


def place(method: Method, module: nn.Module, a: Theta, b: Theta, data: Dataset) -> Placed:
    """Carry out any method: A and B in one place, each computing what it did before.

    Arguments:
        module: the architecture; a, b: state dicts of it; data: whose training part methods that
            look at activations or losses see.

    Raises:
        BadParameter: whatever the method refuses. Unproven: a network's function changed.
    """
    if method.name == "naive":
        return Placed(module, a, dict(b), b, {})
    if method.name in METHODS or method.name == "units":
        found = match(method, module, a, b, data)
        return Placed(module, a, found.apply(module, b), b, found.summary())
    folding = fold(module, data.test.x[:2])
    here, there = folding.apply(a), folding.apply(b)
    turned = turn(method, folding, here, there, data.train)
    moved = dict(there) if turned is None else turned.apply(there)
    gap = function_gap(module, b, folding.module, moved, folding.spec.example)
    summary = {"function gap": gap} | (turned.summary() if turned else {})
    return Placed(folding.module, here, moved, there, summary)


def turn(
    method: Method, folding: Folding, a: Theta, b: Theta, train: Split | None
) -> Rotation | None:
    """What brings folded B to folded A; None for ``folded``, where nothing moves.

    Arguments:
        method: ``folded`` or one that rotates. a, b: state dicts of the folded architecture.
        train: windows to look at; only ``rotated-activations`` does.
    """
    if method.name == "folded":
        return None
    if method.name == "rotated-activations":
        if train is None:
            raise BadParameter("rotated-activations looks at windows of text; there are none.")
        part = train.head(method.examples or len(train))
        return activation_rotation(folding, a, b, part.x)
    heads = "rotated" if method.name == "rotated-heads" else "permuted"
    return rotation_matching(folding, a, b, heads=heads)
