"""Layer-wise averaging, the other use: clients of federated learning that average some layers.

What the page on federated learning in chapter 4 trains, measures, draws and judges, as
:mod:`companion.papers.layerwise` does for the chapter itself.
Source: Adilova et al. 2024, Section 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from companion import data
from companion.core.errors import BadParameter
from companion.core.pool import one_thread
from companion.core.stats import Interval, clustered, over_pairs
from companion.data import Dataset
from companion.experiments import federated
from companion.experiments.budget import Plan
from companion.experiments.federated import FederatedRun, Federation
from companion.experiments.instability import copy
from companion.experiments.pairs import Evaluation
from companion.layerwise import LayerBarriers, Sweep, layer_groups, sweep
from companion.papers.layerwise import (
    SMALL,
    called,
    fitting,
    largest,
    mean,
    residual,
    top,
    worst_layers,
)
from companion.report import figures, page, plots, provenance, tables
from companion.report.claims import Statistic, statistic
from companion.report.words import MISSING, Values, said
from companion.training import Recipe, build, check_fit

GROUPS = {
    "all": "all layers",
    "body": "all but the last",
    "shallow": "the first third",
    "middle": "the middle third",
    "deep": "the last third",
    "none": "none",
}
"""Which layers clients average, as :func:`companion.experiments.federated.thirds` calls them."""

PARTIAL = ("body", "shallow", "middle", "deep")
APART = {"dirichlet:0.1": "very different", "dirichlet:12": "similar"}
"""Splits of the clients that never average -> what their mixes of classes are."""


@dataclass(frozen=True)
class Study:
    """The experiments of the page. Each runs, once, when it is first looked at.

    Arguments:
        local: the recipe of every client.
        every: steps between two averages.
        splits: mild and pathological, and of a dataset that has domains feature shift -> how the
            images are shared out.
        apart: the recipe of two clients that never average.
        enough: how many steps give them as many epochs as chapter 4's networks have: half of T, for
            each has about half of the images.
        pairs: how many such pairs there are for each split.
    """

    images: Dataset
    local: Recipe
    every: int
    clients: int
    seeds: int
    splits: Mapping[str, str]
    apart: Recipe
    enough: int
    pairs: int
    train_examples: int
    test_examples: int | None
    device: str
    workers: int

    @property
    def evaluation(self) -> Evaluation:
        """How two clients are measured, for the budget."""
        return Evaluation(points=3, train_examples=self.train_examples)

    @property
    def scale(self) -> str:
        """What the verdicts rest on, in one line."""
        hardware = provenance.hardware(self.device)
        many = f"{self.clients} clients with {self.local.net}, {self.seeds} seeds"
        two = f"; two with {self.apart.net}, T = {self.apart.steps}" if self.pairs else ""
        return f"{self.images.label}, {many}{two}, {hardware}"

    def words(self) -> Values:
        """What captions and prose say of the whole page."""
        return {
            "data": self.images.label,
            "client_network": called(self.local.net),
            "client_steps": self.local.steps,
            "every": self.every,
            "clients": self.clients,
            "seeds": f"{self.seeds} seed{'s' * (self.seeds != 1)}",
            "classes": self.splits["pathological"].partition(":")[2],
            "two_network": called(self.apart.net),
            "two_steps": self.apart.steps,
            "enough": self.enough,
        }

    def provenance(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a reader needs to repeat the page's run."""
        return provenance.record(
            dataset={"name": self.images.label, "sha256": self.images.fingerprint},
            residual=self.apart.identity(),
            clients=self.local.identity(),
            parameters=dict(given),
            device=self.device,
        )

    @cached_property
    def groups(self) -> Mapping[str, tuple[str, ...] | None]:
        """What clients average -> the layers; None for all of them."""
        module = build(copy(self.local, 0, 0, 1), self.images, torch.device(self.device))
        return federated.thirds(list(layer_groups(module, example=self.images.test.x[:2])))

    def federation(self, kind: str, group: str) -> Federation:
        """The clients of one split that average one group of layers."""
        return Federation(
            recipe=self.local,
            clients=self.clients,
            split=self.splits[kind],
            every=self.every,
            averaged=self.groups[group],
        )

    @property
    def wanted(self) -> dict[tuple[str, str, int], tuple[Federation, int]]:
        """Split, group and seed -> the federation, and its seed."""
        keys = [(k, g, n) for k in self.splits for g in self.groups for n in range(self.seeds)]
        return {(kind, group, n): (self.federation(kind, group), n) for kind, group, n in keys}

    @property
    def strangers(self) -> list[tuple[Federation, int]]:
        """Two clients that never average, and the seed."""
        two: dict[str, Any] = {"recipe": self.apart, "clients": 2, "every": self.apart.steps}
        rules = [Federation(split=split, averaged=(), **two) for split in APART]
        return [(rule, seed) for rule in rules for seed in range(self.pairs)]

    def plans(self) -> list[Plan]:
        """All federations of the page, for its budget."""
        wanted = [*self.wanted.values(), *self.strangers]
        return [[FederatedRun(rule, seed) for rule, seed in wanted]]

    @cached_property
    def accuracy(self) -> Mapping[tuple[str, str, int], float]:
        """Split, group and seed -> mean accuracy of the clients at the end, in percent."""
        wanted = self.wanted
        found = federated.measure_federations(
            list(wanted.values()), device=self.device, workers=self.workers
        )
        return {key: one.accuracy() for key, one in zip(wanted, found, strict=True)}

    @cached_property
    def between(self) -> list[LayerBarriers]:
        """The barriers between such two clients, on the images of both."""
        wanted = self.strangers
        if not wanted:
            return []
        parted = federated.measure_federations(wanted, device=self.device, workers=self.workers)
        network = build(copy(self.apart, 0, 0, 1), self.images, torch.device(self.device))
        train, test = self.train_examples, self.test_examples
        union = {
            "train": self.images.train.head(train),
            "test": self.images.test.head(test or len(self.images.test)),
        }
        asked = Sweep(kinds=("single",), points=1, train_examples=train, test_examples=test)
        found = []
        with one_thread():  # as every measurement of the pool: small sums are slower on several
            for outcome in parted:
                a, b = federated.networks(outcome, self.device)
                one = sweep(
                    network,
                    a,
                    b,
                    union,
                    fitting(self.apart, asked),
                    bn_data=self.images.train,
                    classes=self.images.classes,
                    max_error=100.0,
                )
                found.append(one)
        return found

    # ---- what the results say

    def reached(self, kind: str, group: str) -> Interval | None:
        """Accuracy of the clients, over seeds."""
        return over_pairs(self.accuracy[kind, group, seed] for seed in range(self.seeds))

    def gain(self, kind: str, group: str, of: int = 1) -> Interval:
        """Accuracy against averaging everything, paired by seed, in points.

        Arguments:
            of: how many groups are looked at together, of which any may decide.
        """
        seeds = range(self.seeds)
        found = [self.accuracy[kind, group, n] - self.accuracy[kind, "all", n] for n in seeds]
        return clustered(found, seeds, of=of)

    @property
    def best(self) -> str:
        """The partial average that helps the clients of the pathological split most."""
        return max(PARTIAL, key=lambda group: self.gain("pathological", group).value)


def design(
    *,
    dataset: str,
    net: str | None,
    steps: int | None,
    lr: float | None,
    batch: int | None,
    apart_steps: int | None,
    client_net: str,
    client_steps: int,
    clients: int,
    seeds: int,
    pairs: int,
    train_examples: int,
    test_examples: int | None,
    precision: str,
    device: str,
    workers: int,
) -> Study:
    """The study that the page's parameters ask for; refused before anything trains.

    The parameters are explained in the page's cell; what is None follows from the dataset.

    Raises:
        BadParameter: what a parameter cannot be, or the dataset cannot serve.
    """
    where = str(data.resolve_device(device))
    images = data.load(dataset, where)
    for name, value, least in (("seeds", seeds, 1), ("pairs", pairs, 0)):
        if value < least:
            raise BadParameter(f"{name}: {value} must be {least} or more.")
    main = residual(images, where, steps, precision, net=net, lr=lr, batch=batch)
    local = Recipe(
        net=client_net,
        data=dataset,
        steps=client_steps,
        batch=16,
        lr=0.02,
        schedule="cosine",
        precision=precision,
    )
    every = max(1, next(n for n in range(min(20, client_steps), 0, -1) if client_steps % n == 0))
    short = max(2, main.steps // 4) if apart_steps is None else apart_steps
    study = Study(
        images=images,
        local=local,
        every=every,
        clients=clients,
        seeds=seeds,
        splits={
            "mild": "dirichlet:12",
            "pathological": f"classes:{max(-(-images.classes // clients), 2)}",
            **({"feature shift": "domains"} if images.domains else {}),
        },
        apart=replace(main, steps=short, warmup=min(main.warmup, short // 2)),
        enough=main.steps // 2,
        pairs=pairs,
        train_examples=train_examples,
        test_examples=test_examples,
        device=where,
        workers=workers,
    )
    for recipe in (main, local, study.apart):
        check_fit(recipe, images)
    for seed in range(seeds):  # every split can be made
        for kind in study.splits:
            federated.client_data(study.federation(kind, "none"), images, seed)
    return study


# ---- one function a claim


def b14(study: Study) -> Statistic:
    """The largest layer's barrier over the whole, between two clients that never average."""
    each = zip(study.strangers, study.between, strict=True)
    kept = [(one, seed) for (_, seed), one in each if one.full_height("train") > SMALL]
    shares = [largest(one) for one, _ in kept]
    seeds = [seed for _, seed in kept]  # of the initialisation, too: one cluster
    return statistic(
        clustered(shares, seeds) if kept else None,
        ("resnet" in study.apart.net, "the claim is about a residual network"),
        (study.pairs > 0, "clients that never average were left out of this run"),
        (len(set(seeds)) >= 2, "fewer than two seeds have clients with a barrier"),
        (
            study.apart.steps >= study.enough,
            f"training was cut short: {study.apart.steps} steps, where chapter 4's networks have "
            f"as many epochs after {study.enough}; layers have barriers early that go later",
        ),
        detail=f"largest layer / whole network: {', '.join(f'{v:.0%}' for v in shares)}",
    )


NOT_BETTER = 2.0
"""Points: the margin of error of Frankle et al. 2020, within which two networks are alike."""


def b15(study: Study) -> Statistic:
    """Does a partial average help where the paper says it does, and nowhere else?

    Any of several groups may be the better one by chance, so intervals for that are wider. That
    none is asks every one of them, each by its own interval.
    """
    mild, extreme = "mild", "pathological"

    def some(kind: str) -> bool:
        return any(study.gain(kind, g, of=len(PARTIAL)).low > 0 for g in PARTIAL)

    alike = all(study.gain(mild, g).high < NOT_BETTER for g in PARTIAL)
    hurt = all(study.gain(extreme, g).high < 0 for g in PARTIAL)
    nothing = [study.gain(kind, "none").value for kind in study.splits]
    gains = [max(study.gain(kind, g).value for g in PARTIAL) for kind in study.splits]
    no = some(mild) or hurt
    return statistic(
        False if no else True if alike and some(extreme) else math.nan,
        (study.seeds >= 3, "fewer than three seeds"),
        n=study.seeds,
        detail=f"best of {len(PARTIAL)} partial averages against all, in points: mild "
        f"{gains[0]:+.1f}, pathological {gains[1]:+.1f} ({study.best}); no average at all: "
        f"{nothing[0]:+.1f} and {nothing[1]:+.1f}",
    )


CLAIMS: dict[str, Callable[[Study], Statistic]] = {f.__name__.upper(): f for f in (b14, b15)}


# ---- figures, and the numbers of their captions and of the prose around them


def show_averages(study: Study) -> None:
    """Accuracy by which layers are averaged, for all splits on one axis."""
    reached = {kind: {g: study.reached(kind, g) for g in GROUPS} for kind in study.splits}
    for kind, rows in reached.items():
        name = kind.replace(" ", "_")
        words = {GROUPS[group]: said(row, "{:.1f}") for group, row in rows.items()}
        page.fill(
            **{
                f"{name}_all": words[GROUPS["all"]],
                f"{name}_none": words[GROUPS["none"]],
                f"{name}_each": ", ".join(f"{group} {value}" for group, value in words.items()),
            }
        )
    partial, nothing = (study.gain("pathological", g) for g in (study.best, "none"))
    lesson = "No choice of layers is clearly better than averaging all of them."
    if partial.low > 0 and nothing.value >= partial.value - 1:
        lesson = "The gain does not come from choosing layers but from leaving the clients alone: "
        lesson += "with few classes a client's task is easy without the others."
    elif partial.low > 0:
        lesson = "Averaging some layers helps more than averaging none does."
    mild = max(study.gain("mild", group).value for group in PARTIAL)
    better = "better" if mild > 0 else "worse"
    page.fill(
        best=GROUPS[study.best],
        best_gain=said(partial, "{:+.1f}"),
        none_gain=said(nothing, "{:+.1f}"),
        mild_told=f"{said(abs(mild), '{:.1f}')} points {better} than",
        lesson=lesson,
    )
    fig, axes = plots.grid(len(reached), height=3.4, sharex=True, sharey=True)
    drawn = {}
    label = "mean accuracy of the clients (%)"
    for ax, (kind, found) in zip(axes, reached.items(), strict=True):
        good = {group: row for group, row in found.items() if row is not None}
        named = {GROUPS[group]: row for group, row in good.items()}
        plots.conditions(ax, named, threshold=None, xlabel=label, from_zero=False)
        ax.set_title(kind)
        drawn[kind] = {
            group: {"mean": row.value, "low": row.low, "high": row.high, "seeds": row.n}
            for group, row in good.items()
        }
    figures.publish(fig, "federated", data=drawn)


def show_apart(study: Study) -> None:
    """The barriers between two clients that never average, pair by pair."""
    if not study.between:
        none = dict.fromkeys(("two_errors", "two_whole", "two_layer"), MISSING)
        page.fill(below="They were left out of this run.", **none)
        return
    whole = [one.full_height("train") for one in study.between]
    errors = [one.ends["test"]["error"] for one in study.between]
    below = sum(v < 0 for v in whole)
    told = "The barrier is positive in all of them."
    if below:
        told = (
            f"In {below} of {len(whole)} pairs the barrier is negative: the average is better on "
        )
        told += "the images of both than the two are on average."
    page.fill(
        two_errors=f"{said(min(map(min, errors)), '{:.1f}')} to "
        f"{said(max(map(max, errors)), '{:.1f}')}",
        two_whole=f"{said(min(whole))} to {said(max(whole))}",
        two_layer=said(mean([top(one) for one in study.between])),
        below=told,
    )
    rows = [
        (
            APART[rule.split],
            seed,
            " and ".join(f"{e:.1f}" for e in one.ends["test"]["error"]),
            said(one.full_height("train")),
            said(top(one)),
            worst_layers([one]),
        )
        for (rule, seed), one in zip(study.strangers, study.between, strict=True)
    ]
    columns = ["mixes of classes", "seed", "test error of the two (%)", "whole network (nats)"]
    tables.show([*columns, "worst layer (nats)", "which"], rows, name="strangers")
