"""Layer-wise averaging, the other use: clients of federated learning that average some layers.

What the page on federated learning in chapter 4 trains, measures, draws and judges, as
:mod:`companion.papers.layerwise` does for the chapter itself.
Source: Adilova et al. 2024, Section 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from companion import data
from companion.core.errors import BadParameter
from companion.core.pool import one_thread
from companion.core.stats import Interval
from companion.data import Dataset
from companion.experiments import federated
from companion.experiments.budget import Plan
from companion.experiments.federated import FederatedRun, Federation
from companion.experiments.instability import copy
from companion.experiments.pairs import Evaluation
from companion.layerwise import LayerBarriers, Sweep, layer_groups, sweep
from companion.papers.layerwise import (
    NONE,
    SMALL,
    Values,
    called,
    fitting,
    harmless,
    largest,
    mean,
    over,
    residual,
    said,
    top,
    worst_layers,
)
from companion.report import figures, page, plots, provenance, tables
from companion.report.claims import Statistic, statistic
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
        splits: mild and pathological -> how the classes are shared out.
        apart: the recipe of two clients that never average.
        pairs: how many such pairs there are for each split.
    """

    images: Dataset
    local: Recipe
    every: int
    clients: int
    seeds: int
    splits: Mapping[str, str]
    apart: Recipe
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
        hardware = "CPU" if self.device == "cpu" else provenance.record()["gpu"]["name"]
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
            "seeds": f"{self.seeds} seed" + "s" * (self.seeds != 1),
            "classes": self.splits["pathological"].partition(":")[2],
            "two_network": called(self.apart.net),
            "two_steps": self.apart.steps,
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

    def plans(self) -> list[Plan]:
        """All federations of the page, for its budget."""
        wanted = [*self.wanted.values(), *self.strangers]
        return [[FederatedRun(rule, seed) for rule, seed in wanted]]

    @property
    def wanted(self) -> dict[tuple[str, str, int], tuple[Federation, int]]:
        """Split, group and seed -> the federation, and its seed."""
        keys = [(k, g, n) for k in self.splits for g in self.groups for n in range(self.seeds)]
        return {(kind, group, n): (self.federation(kind, group), n) for kind, group, n in keys}

    @cached_property
    def accuracy(self) -> Mapping[tuple[str, str, int], float]:
        """Split, group and seed -> mean accuracy of the clients at the end, in percent."""
        wanted = self.wanted
        found = federated.measure_federations(
            list(wanted.values()), device=self.device, workers=self.workers
        )
        return {key: one.accuracy() for key, one in zip(wanted, found, strict=True)}

    @property
    def strangers(self) -> list[tuple[Federation, int]]:
        """Two clients that never average, and the seed."""
        return [
            (
                Federation(
                    recipe=self.apart,
                    clients=2,
                    split=split,
                    every=self.apart.steps,
                    averaged=(),
                ),
                seed,
            )
            for split in APART
            for seed in range(self.pairs)
        ]

    @cached_property
    def between(self) -> list[LayerBarriers]:
        """The barriers between such two clients, on the images of both."""
        wanted = self.strangers
        if not wanted:
            return []
        parted = federated.measure_federations(wanted, device=self.device, workers=self.workers)
        network = build(copy(self.apart, 0, 0, 1), self.images, torch.device(self.device))
        union = {
            "train": self.images.train.head(self.train_examples),
            "test": self.images.test.head(self.test_examples or len(self.images.test)),
        }
        asked = Sweep(
            kinds=("single",),
            points=1,
            train_examples=self.train_examples,
            test_examples=self.test_examples,
        )
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
        return over([self.accuracy[kind, group, seed] for seed in range(self.seeds)])

    def gain(self, kind: str, group: str) -> Interval:
        """Accuracy against averaging everything, paired by seed, in points."""
        each = [
            self.accuracy[kind, group, n] - self.accuracy[kind, "all", n] for n in range(self.seeds)
        ]
        found = over(each)
        assert found is not None  # an accuracy is finite
        return found

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
    main = residual(
        images, device=where, net=net, steps=steps, lr=lr, batch=batch, precision=precision
    )
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
    study = Study(
        images=images,
        local=local,
        every=every,
        clients=clients,
        seeds=seeds,
        splits={
            "mild": "dirichlet:12",
            "pathological": f"classes:{max(-(-images.classes // clients), 2)}",
        },
        apart=replace(
            main, steps=max(2, main.steps // 4), warmup=min(main.warmup, main.steps // 8)
        ),
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
    """Share of the layers without a barrier between two clients that never average."""
    found = [one for one in study.between if one.full_height("train") > SMALL]
    return statistic(
        min(map(harmless, found), default=None),
        ("resnet" in study.apart.net, "the claim is about a residual network"),
        (study.pairs > 0, "clients that never average were left out of this run"),
        (len(found) >= 2, "fewer than two pairs of clients have a barrier"),
        n=len(found),
        detail="largest layer / whole network: "
        + ", ".join(f"{largest(one):.0%}" for one in found),
    )


def b15(study: Study) -> Statistic:
    """Does a partial average help where the paper says it does, and nowhere else?"""
    mild, extreme = ([study.gain(kind, g) for g in PARTIAL] for kind in study.splits)
    beaten = any(v.low > 0 for v in mild)
    helped = any(v.low > 0 for v in extreme)
    hurt = all(v.high < 0 for v in extreme)
    nothing = [study.gain(kind, "none").value for kind in study.splits]
    best = study.gain("pathological", study.best).value
    return statistic(
        True if helped and not beaten else False if beaten or hurt else math.nan,
        (study.seeds >= 3, "fewer than three seeds"),
        n=study.seeds,
        detail=f"best partial average against all, in points: mild "
        f"{max(v.value for v in mild):+.1f}, pathological {best:+.1f} ({study.best}); no average "
        f"at all: {nothing[0]:+.1f} and {nothing[1]:+.1f}",
    )


CLAIMS: dict[str, Callable[[Study], Statistic]] = {f.__name__.upper(): f for f in (b14, b15)}


# ---- figures, and the numbers of their captions and of the prose around them


def averages_values(study: Study) -> Values:
    """Accuracies of both splits, and what helps the clients of the pathological one."""
    out: Values = {}
    for kind in study.splits:
        of = {GROUPS[g]: said(study.reached(kind, g), "{:.1f}") for g in GROUPS}
        out[f"{kind}_all"], out[f"{kind}_none"] = of[GROUPS["all"]], of[GROUPS["none"]]
        out[f"{kind}_each"] = ", ".join(f"{name} {value}" for name, value in of.items())
    partial, nothing = (study.gain("pathological", g) for g in (study.best, "none"))
    mild = max(study.gain("mild", group).value for group in PARTIAL)
    out |= {
        "best": GROUPS[study.best],
        "best_gain": said(partial, "{:+.1f}"),
        "none_gain": said(nothing, "{:+.1f}"),
        "mild_gain": said(mild, "{:+.1f}"),
    }
    if partial.low > 0 and nothing.value >= partial.value - 1:
        out["lesson"] = (
            "The gain is not in choosing layers, it is in leaving the clients alone: with few "
            "classes a client's task is easy without the others."
        )
    elif partial.low > 0:
        out["lesson"] = "Averaging some layers helps more than averaging none does."
    else:
        out["lesson"] = "No choice of layers is clearly better than averaging all of them."
    return out


def show_averages(study: Study) -> None:
    """Accuracy by which layers are averaged, for both splits on one axis."""
    page.fill(**averages_values(study))
    fig, axes = plots.grid(2, height=3.4, sharex=True, sharey=True)
    drawn = {}
    for ax, kind in zip(axes, study.splits, strict=True):
        reached = {group: study.reached(kind, group) for group in GROUPS}
        rows = {group: row for group, row in reached.items() if row is not None}
        plots.conditions(
            ax,
            {GROUPS[group]: row for group, row in rows.items()},
            threshold=None,
            xlabel="mean accuracy of the clients (%)",
            from_zero=False,
        )
        ax.set_title(kind)
        drawn[kind] = {
            group: {"mean": row.value, "low": row.low, "high": row.high, "seeds": row.n}
            for group, row in rows.items()
        }
    figures.publish(fig, "federated", data=drawn)


def apart_values(study: Study) -> Values:
    """How good two clients that never average are, and what their average is worth."""
    if not study.between:
        nothing: Values = {"below": "They were left out of this run."}
        return nothing | dict.fromkeys(("two_errors", "two_whole", "two_layer"), NONE)
    whole = [one.full_height("train") for one in study.between]
    errors = [e for one in study.between for e in one.ends["test"]["error"]]
    below = sum(v < 0 for v in whole)
    told = f"In {below} of {len(whole)} pairs the barrier is negative: the average is better on "
    told += "the images of both than the two are on average."
    return {
        "two_errors": f"{said(min(errors), '{:.1f}')} to {said(max(errors), '{:.1f}')}",
        "two_whole": f"{said(min(whole))} to {said(max(whole))}",
        "two_layer": said(mean([top(one) for one in study.between])),
        "below": told if below else "The barrier is positive in all of them.",
    }


def show_apart(study: Study) -> None:
    """The barriers between two clients that never average, pair by pair."""
    page.fill(**apart_values(study))
    if not study.between:
        return
    rows: list[Sequence[Any]] = [
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
