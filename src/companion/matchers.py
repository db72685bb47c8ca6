"""Every way of matching two networks under one name, for the experiments of chapter 2.

A :class:`Method` is a value with an identity for the run store; :func:`match` carries it out with
the instruments of :mod:`companion.rebasin`. :mod:`companion.aligned` measures what comes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from companion import data as datasets
from companion.data import Dataset
from companion.errors import BadParameter, one_of
from companion.rebasin.activations import activation_matching
from companion.rebasin.derive import derive
from companion.rebasin.matching import Matching, bound
from companion.rebasin.spec import Spec
from companion.rebasin.ste import straight_through
from companion.rebasin.weights import greedy, objective, weight_matching
from companion.runs import Store
from companion.seeds import Key
from companion.theta import Theta, layout
from companion.training import Run, entry_of, load_weights

METHODS = ("naive", "weights", "activations", "ste", "greedy", "random", "steepest")
"""How B is permuted: not at all; weight matching (Algorithm 1); activation matching; the
straight-through estimator (Algorithm 2); one greedy pass; at random; so that the loss falls most
steeply at A (App. A.11)."""


@dataclass(frozen=True)
class Method:
    """How B is brought to A.

    Arguments:
        name: one of :data:`METHODS`.
        starts: ``weights``: descents from as many starts, of which the best counts.
        statistic: ``activations``: ``moment`` or ``correlation``.
        examples: ``activations``, ``steepest``, REPAIR: training images to look at (None: all).
        steps, batch, lr: ``ste``: optimiser steps, images a step, learning rate.
        label: of the random choices (visiting orders, random permutations, batches).
    """

    name: str = "weights"
    starts: int = 1
    statistic: str = "moment"
    examples: int | None = None
    steps: int = 40
    batch: int = 256
    lr: float = 0.01
    label: int | str = 0

    def __post_init__(self) -> None:
        one_of("method", self.name, METHODS)
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
        }
        return {"name": self.name} | {f: getattr(self, f) for f in fields[self.name]}


def key_of(run: Run, store: Store, device: str) -> str:
    """The store's key of a run."""
    return entry_of(run, datasets.load(run.recipe.data, device), device, store).key


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
    names = layout(module).parameters
    leaves = {n: theta[n].detach().clone().requires_grad_() for n in names}
    rest = {n: v for n, v in theta.items() if n not in leaves}
    part = data.train.head(examples or len(data.train))
    module = module.eval()
    out = {n: torch.zeros_like(v) for n, v in leaves.items()}
    for x, y in zip(part.x.split(500), part.y.split(500), strict=True):
        logits = functional_call(module, {**rest, **leaves}, (x,))
        loss = F.cross_entropy(logits, y, reduction="sum") / len(part)
        found = torch.autograd.grad(loss, list(leaves.values()))
        for n, g in zip(leaves, found, strict=True):
            out[n] += g
    return out


def match(method: Method, module: nn.Module, a: Theta, b: Theta, data: Dataset) -> Matching:
    """The permutations of ``method`` for network B. ``naive`` has none.

    Raises:
        BadParameter: ``naive``; whatever the method refuses.
    """
    spec = spec_of(module, data)
    key = Key("aligned", method.label)
    part = data.train.head(method.examples or len(data.train))
    if method.name == "weights":
        return weight_matching(spec, a, b, starts=method.starts, key=key)
    if method.name == "activations":
        return activation_matching(spec, module, a, b, part.x, statistic=method.statistic)
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
