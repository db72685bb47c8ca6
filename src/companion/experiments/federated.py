"""Federated learning with partial averaging: clients that train alone and average some layers.

Every ``every`` steps the named layer groups are averaged over the clients, weighted by their
numbers of images; all other layers, and the optimisers' momenta, stay with their client. ::

    rule = Federation(recipe=recipe, clients=5, split="classes:2", every=20, averaged=("head",))
    (found,) = measure_federations([(rule, 0)])
    found.accuracy()                       # mean over clients, percent, right after the averaging

A client's test images have the same mix of classes as its training images, as in the split that
the paper's code refers to. Source: Adilova et al. 2024, Section 6; our chapter 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from companion import data as datasets
from companion.connectivity import Measure, Walker
from companion.core import deadline
from companion.core.errors import BadParameter, whole
from companion.core.runs import Entry, Store
from companion.core.seeds import Key
from companion.core.theta import Layout, affine, layout, snapshot, with_aliases
from companion.data import Dataset, Split
from companion.experiments.measurement import Json, Measurement, Where, run
from companion.training import Job, Recipe, Run, State, advance, build, check_fit

_ATTEMPTS = 1000  # draws of a random split until every client has a batch
_FORM = re.compile(r"(dirichlet):([0-9.]+)|(classes):([0-9]+)|iid|domains")


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Who trains on what, and what is averaged. Checked when it is made.

    Arguments:
        recipe: of every client; its ``steps`` are the local steps in all, its schedule is theirs.
        clients: number of clients, 2 or more.
        split: how the classes are shared out. ``iid``: every client has the same share of every
            class. ``dirichlet:0.1``: each class's shares are drawn from a symmetric Dirichlet
            distribution of that concentration (small: uneven). ``classes:2``: the pathological
            split, every client has that many classes and nothing else. ``domains``: feature shift,
            every client has images of all classes, in one domain of a dataset that has domains.
        every: local steps between two averagings, a divisor of ``recipe.steps``.
        averaged: layer groups (names or prefixes) that are averaged; () for none, None for all.
    """

    recipe: Recipe
    clients: int = 5
    split: str = "iid"
    every: int = 20
    averaged: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.averaged is not None:
            object.__setattr__(self, "averaged", tuple(self.averaged))
        for name, least in (("clients", 2), ("every", 1)):
            whole(name, getattr(self, name), least, most=100_000)
        if self.recipe.steps % self.every:
            raise BadParameter(
                f"every: {self.every} local steps do not divide the {self.recipe.steps} steps of "
                "the recipe, so the last average would not be at the end."
            )
        _parse(self.split)

    @property
    def rounds(self) -> int:
        """Number of averaging rounds."""
        return self.recipe.steps // self.every


@dataclass(frozen=True)
class Outcome:
    """The result of a federated run.

    Arguments:
        history: round -> client -> loss and error on its own test images, right after averaging.
        sizes: training images of each client.
        test_sizes: its test images.
        entry: of the run store; :func:`networks` reads the clients' networks from it.
    """

    history: tuple[tuple[Measure, ...], ...]
    sizes: tuple[int, ...]
    test_sizes: tuple[int, ...]
    entry: Entry

    def accuracy(self, number: int = -1) -> float:
        """Mean over the clients of the accuracy on their own test images, in percent."""
        errors = [m.error for m in self.history[number]]
        return 100 - sum(errors) / len(errors)


def _parse(split: str) -> tuple[str, float]:
    found = _FORM.fullmatch(split) if isinstance(split, str) else None
    try:
        kind = (found and (found[1] or found[3] or found[0])) or ""
        value = float((found and (found[2] or found[4])) or 0)
    except ValueError:
        kind, value = "", 0.0
    if not kind or (kind not in ("iid", "domains") and value <= 0):
        raise BadParameter(
            f"split: {split!r} is not known. Allowed: iid, dirichlet:ALPHA with ALPHA above 0 such "
            "as dirichlet:0.1, classes:N such as classes:2, domains."
        )
    return kind, value


def shares(split: str, classes: int, clients: int, key: Key) -> NDArray[np.float64]:
    """Which part of every class each client has, shape (classes, clients); rows sum to one.

    For ``domains``, of every domain: ``classes`` are then the domains.

    Arguments:
        split: as :class:`Federation` takes it.
        key: equal keys, equal shares; NumPy's Philox generator starts from it.

    Raises:
        BadParameter: ``classes:N`` with more classes than there are, or with so few that some
            class would have no client.

    Source: Adilova et al. 2024, Section 6; the Dirichlet split is that of PFL-Non-IID.
    """
    kind, value = _parse(split)
    if kind == "iid":
        return np.full((classes, clients), 1 / clients)
    if kind == "domains":
        if clients < classes:
            raise BadParameter(
                f"split: {clients} clients for {classes} domains: each domain needs a client. Take "
                f"{classes} clients or more, or fewer domains."
            )
        has = np.arange(clients) % classes == np.arange(classes)[:, None]
        return np.asarray(has / has.sum(1, keepdims=True))
    if kind == "dirichlet":
        generator = np.random.Generator(np.random.Philox(key.seed()))
        return generator.dirichlet(np.full(clients, value), size=classes)
    each = int(value)
    if each > classes or each * clients < classes:
        raise BadParameter(
            f"split: {split!r} with {clients} clients and {classes} classes: a client can have "
            f"{-(-classes // clients)} to {classes} classes, so that every class has a client."
        )
    order = key.permutation(classes).numpy()
    has = np.zeros((classes, clients))
    for client in range(clients):  # around the circle of classes: all are used about equally often
        has[order[(client * each + np.arange(each)) % classes], client] = 1
    return np.asarray(has / has.sum(1, keepdims=True))


def assign(y: torch.Tensor, parts: NDArray[np.float64], key: Key) -> list[torch.Tensor]:
    """The rows of each client: each class is shuffled and cut where its shares say.

    Arguments:
        y: labels, shape (N,).
        parts: shape (classes, clients).

    Returns:
        ascending rows of every client, disjoint, together all of them.
    """
    out: list[list[torch.Tensor]] = [[] for _ in range(parts.shape[1])]
    labels = y.cpu()
    for c, row in enumerate(parts):
        mine = (labels == c).nonzero()[:, 0]
        mine = mine[key.fold("class", c).permutation(len(mine))]
        cuts = np.round(np.cumsum(row)[:-1] * len(mine)).astype(int).tolist()
        for client, piece in enumerate(torch.tensor_split(mine, cuts)):
            out[client].append(piece)
    return [torch.cat(pieces).sort().values for pieces in out]


def client_data(federation: Federation, data: Dataset, seed: int) -> list[Dataset]:
    """The dataset of every client: its training images, and test images of the same classes.

    A random split in which a client has less than a batch of training images, or no test image, is
    drawn again, as the split's own code does.

    Raises:
        BadParameter: a text; or no such split was found in 1,000 draws.
    """
    if data.kind != "images":
        raise BadParameter(
            f"data: {data.name} is a text, and a federation shares out labelled images by their "
            "classes. Take a dataset of images, such as digits."
        )
    kinds, count = (data.train.y, data.test.y), data.classes
    if federation.split == "domains":
        if data.domains is None:
            raise BadParameter(
                f"split: {data.name} has no domains. Take another split, or a dataset that has "
                "some, such as domainnet."
            )
        kinds, count = data.domains, len(data.domain_names)
    key = Key("federated", federation.split, federation.clients, seed)
    possible = federation.clients * federation.recipe.batch <= len(data.train)
    for attempt in range(_ATTEMPTS if possible else 0):
        draw = key.fold("attempt", attempt)
        parts = shares(federation.split, count, federation.clients, draw)
        train = assign(kinds[0], parts, draw.fold("train"))
        test = assign(kinds[1], parts, draw.fold("test"))
        enough = min(map(len, train)) >= federation.recipe.batch and min(map(len, test)) >= 1
        if enough:
            return [
                replace(data, train=_rows(data.train, a), test=_rows(data.test, b))
                for a, b in zip(train, test, strict=True)
            ]
        if not federation.split.startswith("dirichlet"):
            break
    raise BadParameter(
        f"split: {federation.split!r} of {data.name} for {federation.clients} clients leaves one "
        f"with less than a batch of {federation.recipe.batch} training images, or without a test "
        "image. Take fewer clients or a smaller batch."
    )


def _rows(split: Split, rows: torch.Tensor) -> Split:
    there = rows.to(split.x.device)
    return Split(split.x[there], split.y[there])


def average(
    thetas: Sequence[Mapping[str, torch.Tensor]],
    weights: Sequence[float],
    spec: Layout,
    groups: Sequence[str] | None,
) -> list[dict[str, torch.Tensor]]:
    """The clients' networks after one averaging: the named groups agree, the rest is untouched.

    Arguments:
        thetas: state dicts.
        weights: one a client; they are divided by their sum.
        groups: names or prefixes of layers; () averages nothing, None everything.
    """
    if groups is not None and not groups:
        return [dict(t) for t in thetas]
    total = sum(weights)
    mean = affine(thetas, [w / total for w in weights], spec.select(groups))
    return [
        with_aliases({**t, **{n: v.clone() for n, v in mean.items()}}, spec.ties) for t in thetas
    ]


def thirds(labels: Sequence[str]) -> dict[str, tuple[str, ...] | None]:
    """The groups that the chapter averages: ``all``, ``none``, ``body`` (all but the last layer),
    and the ``shallow``, ``middle`` and ``deep`` third of the layers."""
    n = len(labels)
    low, high = round(n / 3), n - round(n / 3)
    return {
        "all": None,
        "body": tuple(labels[:-1]),
        "shallow": tuple(labels[:low]),
        "middle": tuple(labels[low:high]),
        "deep": tuple(labels[high:]),
        "none": (),
    }


def federate(federation: Federation, seed: int, data: Dataset) -> dict[str, Any]:
    """Train one federation. All clients start from one initialisation.

    Arguments:
        seed: of the split, the initialisation and every client's data order.
        data: on the device to train on.

    Returns:
        ``history``, ``sizes``, ``test_sizes`` (JSON-able) and ``thetas`` (a state dict a client).

    Raises:
        BadParameter: a layer that does not exist, a split that cannot be made.
        Diverged: a client's loss is not finite.
    """
    recipe = federation.recipe
    check_fit(recipe, data)
    own = client_data(federation, data, seed)
    runs = [
        Run(recipe, init=f"federated {seed}", order=label, augment=label)
        for label in (f"federated {seed}/{client}" for client in range(federation.clients))
    ]
    module = build(runs[0], data, data.train.x.device)
    spec = layout(module)
    spec.select(federation.averaged)
    start = snapshot(module)
    states = [State(0, {k: v.clone() for k, v in start.items()}) for _ in runs]
    tests = [Walker(module, {"test": one.test}) for one in own]
    sizes = [len(one.train) for one in own]
    history = []
    for number in range(1, federation.rounds + 1):
        deadline.stop_if_passed()
        stop = number * federation.every
        states = [
            advance(run, state, stop, one, module=module)
            for run, state, one in zip(runs, states, own, strict=True)
        ]
        thetas = average([s.theta for s in states], sizes, spec, federation.averaged)
        states = [
            State(s.step, t, s.optimizer, s.trace) for s, t in zip(states, thetas, strict=True)
        ]
        found = [walker.at(s.theta)["test"] for walker, s in zip(tests, states, strict=True)]
        history.append([[m.loss if math.isfinite(m.loss) else "inf", m.error] for m in found])
    return {
        "history": history,
        "sizes": sizes,
        "test_sizes": [len(one.test) for one in own],
        "thetas": [s.theta for s in states],
    }


@dataclass(frozen=True)
class FederatedRun(Measurement):
    """One federation under one seed; the clients' networks are stored beside its history."""

    KIND = "federated"
    FILE = "federated.json"

    federation: Federation
    seed: int

    def identity(self, device: str) -> Json:
        rule = self.federation
        return {
            "recipe": rule.recipe.identity(),
            "clients": rule.clients,
            "split": rule.split,
            "every": rule.every,
            "averaged": None if rule.averaged is None else list(rule.averaged),
            "data": datasets.load(rule.recipe.data, device).fingerprint,
            "seed": self.seed,
            "device": torch.device(device).type,
        }

    def jobs(self) -> list[Job]:
        return []

    @property
    def recipe(self) -> Recipe:
        return self.federation.recipe

    @property
    def trains(self) -> tuple[int, ...]:
        return (self.recipe.steps,) * self.federation.clients

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        recipe, averaged = identity["recipe"], identity["averaged"]
        groups = "all layers" if averaged is None else f"{len(averaged)} layers"
        return (
            f"{identity['clients']} clients, {recipe['net']} on {recipe['data']} "
            f"({identity['split']}), {groups} averaged, seed {identity['seed']}"
        )

    def measure(self, store: Store, device: str) -> object:
        found = federate(self.federation, self.seed, datasets.load(self.recipe.data, device))
        for client, theta in enumerate(found.pop("thetas")):
            self.entry(store, device).write_tensors(f"client-{client:04d}.safetensors", theta)
        return found


def measure_federations(
    wanted: Sequence[tuple[Federation, int]], **where: Unpack[Where]
) -> list[Outcome]:
    """Train what the run store lacks; return every outcome, in the order of ``wanted``.

    Arguments:
        wanted: (federation, seed) pairs.

    Raises:
        as :func:`federate`.
    """
    store, device = where.get("store") or Store(), where.get("device", "cpu")
    device = str(datasets.resolve_device(device))
    for federation, seed in wanted:  # refuse what cannot be, before anything trains
        data = datasets.load(federation.recipe.data, device)
        check_fit(federation.recipe, data)
        client_data(federation, data, seed)
    tasks = [FederatedRun(federation, seed) for federation, seed in wanted]
    raw = run(tasks, label="federated", **where)
    return [
        Outcome(
            tuple(tuple(Measure(float(a), float(b)) for a, b in row) for row in r["history"]),
            tuple(r["sizes"]),
            tuple(r["test_sizes"]),
            task.entry(store, device),
        )
        for task, r in zip(tasks, raw, strict=True)
    ]


def networks(outcome: Outcome, device: str = "cpu") -> list[dict[str, torch.Tensor]]:
    """The clients' networks at the end of an outcome, on ``device``."""
    return [
        {
            k: v.to(device)
            for k, v in outcome.entry.read_tensors(f"client-{client:04d}.safetensors").items()
        }
        for client in range(len(outcome.sizes))
    ]
