"""Git Re-Basin, the other half: many networks merged into one, and networks of different data.

What the page on merging in chapter 2 trains, measures, draws and judges, as
:mod:`companion.papers.rebasin` does for two networks. Its runs are those of that page, or of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from companion.core.errors import BadParameter
from companion.core.stats import over_pairs
from companion.data import load
from companion.experiments.aligned import Aligned, independent, interval, lines_of, pairs_of
from companion.experiments.budget import Plan
from companion.experiments.merged import (
    Agreed,
    Agreement,
    Halves,
    Merge,
    Readings,
    agree_runs,
    merge_runs,
    split_runs,
)
from companion.experiments.pairs import Pair
from companion.papers import rebasin
from companion.papers.rebasin import LOSS, NAMES, Results, Setting
from companion.report import claims, figures, plots, tables
from companion.report.claims import Statistic, statistic
from companion.report.words import MISSING, Values, counted, said, untested
from companion.training import Run, check_fit

METRICS = {
    "loss": ("loss (nats)", "{:.3f}"),
    "error": ("error (%)", "{:.1f}"),
    "ece": ("ECE (points)", "{:.1f}"),
}
PREDICTORS = {
    "input": "one input",
    "first": "matched with the first",
    "merged": "merged",
    "c2m3": "merged by C2M3",
    "ensemble": "ensemble",
}
THREE = "same data, three"
"""Networks of a merge that are also brought into one order by C2M3."""

WHY = {
    "same data": "no merge in this run",
    THREE: "C2M3 was not tried in this run",
    "random halves": "no networks of random halves in this run",
}
"""Data of the networks of a merge -> why a claim about it is not judged without it."""


@dataclass(frozen=True)
class Study(Setting):
    """The experiments of the page. Each runs, once, when it is first looked at.

    Arguments:
        many: networks of the same data that are merged into one.
        halves: networks of random halves of the data; 0 leaves either out.
        merges: of each kind, no network in two of them.
        merge_width: width of both.
        split: whether to train networks of two biased halves.
    """

    many: int
    halves: int
    merges: int
    merge_width: int
    split: bool

    @property
    def groups(self) -> dict[str, list[list[Run]]]:
        """What is merged: the name of the data -> for each merge the networks."""
        recipe, found = self.at_width(self.merge_width), {}
        for name, size in (("same data", self.many), ("random halves", self.halves)):
            runs = [
                independent(
                    replace(recipe, data=f"{recipe.data}@random-50-{n}")
                    if name == "random halves"
                    else recipe,
                    n,
                )
                for n in range(size * self.merges)
            ]
            if runs:
                found[name] = [runs[i : i + size] for i in range(0, len(runs), size)]
        return found

    @property
    def agreeing(self) -> list[list[Run]]:
        """What is also brought into one order by C2M3: three perceptrons of each merge."""
        three = self.is_mlp and self.many > 2
        return [runs[:3] for runs in self.groups.get("same data", [])] if three else []

    @property
    def split_pairs(self) -> list[Pair]:
        """Networks of the two biased halves."""
        a, b = (replace(self.main, data=f"{self.main.data}@split-{part}") for part in "ab")
        return pairs_of(a, self.pairs if self.split else 0, other=b)

    @property
    def full(self) -> list[Run]:
        """A network of all the data for each of these pairs."""
        return [p.a for p in pairs_of(self.main, len(self.split_pairs))]

    def plans(self) -> list[Plan]:
        """All that this page trains and measures, for its budget."""
        evaluation, on, pairs = self.evaluation, self.main.data, self.split_pairs
        tasks = [
            *(Merge(tuple(runs), evaluation, on) for g in self.groups.values() for runs in g),
            *(Agreed(tuple(runs), evaluation, on) for runs in self.agreeing),
            *lines_of(pairs, evaluation=evaluation, on=on),
            *(Halves(p, full, evaluation) for p, full in zip(pairs, self.full, strict=True)),
        ]
        return [tasks]

    @cached_property
    def merged(self) -> Mapping[str, list[Readings]]:
        """The name of the data -> for each merge the readings of inputs, merged network, plain
        mean and ensemble; of :data:`THREE` those of an :class:`Agreement`."""
        runs, on = [g for groups in self.groups.values() for g in groups], self.main.data
        found = merge_runs(runs, self.evaluation, on=on, device=self.device, workers=self.workers)
        each = iter(found)
        out = {data: [next(each) for _ in groups] for data, groups in self.groups.items()}
        return out | ({THREE: [one.readings for one in self.agreed]} if self.agreed else {})

    @cached_property
    def agreed(self) -> list[Agreement]:
        """For each merge of the same data: all networks in one order, and pairs on their own."""
        how: Any = {"on": self.main.data, "device": self.device, "workers": self.workers}
        return agree_runs(self.agreeing, self.evaluation, **how) if self.agreeing else []

    @cached_property
    def halfway(self) -> Results:
        """The lines between networks of biased halves, as they are and after weight matching."""
        if not self.split:
            return {"naive": [], "weights": []}
        error = max(self.max_error, 30.0)
        return self.align(self.split_pairs, on=self.main.data, max_error=error)

    @cached_property
    def apart(self) -> list[Readings]:
        """For each of these pairs: what A, B, what they merge into, and the controls are worth."""
        if not self.split:
            return []
        how = (self.split_pairs, self.full, self.evaluation)
        return split_runs(*how, device=self.device, workers=self.workers)

    # ---- what the readings say

    def worth(self, data: str, predictor: str, what: str) -> list[float]:
        """A number of each merge, on test images; ``input``: mean over its inputs."""
        found = self.merged.get(data, [])
        read = ([r["test"] for n, r in one.items() if n.startswith(predictor)] for one in found)
        return [float(np.mean([getattr(reading, what) for reading in one])) for one in read if one]

    def read(self, predictor: str, what: str = "loss") -> list[float]:
        """One number a pair; ``corrected``: of A or B, the one with less loss on train images."""
        both = ("A corrected", "B corrected")
        names = both if predictor == "corrected" else (predictor,)
        found = (min((r[n] for n in names), key=lambda one: one["train"].loss) for r in self.apart)
        return [getattr(one["test"], what) for one in found]


def design(
    *, many: int, halves: int, merges: int, merge_width: int | None, split: bool, **common: Any
) -> Study:
    """The study that the page's parameters ask for; refused before anything trains.

    Arguments:
        many, halves, merges, split: as :class:`Study` has them.
        merge_width: None: the main width, on ``digits`` 128 (merging takes many passes).
        common: as :func:`companion.papers.rebasin.setting` takes them.

    Raises:
        BadParameter: one network to merge, and what ``setting`` refuses.
    """
    if 1 in (many, halves) or min(many, halves) < 0:
        raise BadParameter("many, halves: 0, or 2 or more.")
    if merges < 1:
        raise BadParameter("merges: 1 or more.")
    shared = rebasin.setting(**common)
    digits = shared.main.data == "digits"
    usual = min(shared.width, 128) if digits else shared.width
    width = usual if merge_width is None else merge_width
    own = {"many": many, "halves": halves, "merges": merges, "merge_width": width, "split": split}
    study = Study(**(vars(shared) | own))
    first = [run for pair in study.split_pairs[:1] for run in (pair.a, pair.b)]
    for run in (*(groups[0][0] for groups in study.groups.values()), *first):
        check_fit(run.recipe, load(run.recipe.data, study.device))
    return study


# ---- the claims

Number = Callable[..., float]
"""Of a predictor and what is read of it."""


def merge(
    study: Study, data: str, value: Callable[..., float], *of: tuple[str, str], needs: str = ""
) -> Statistic:
    """Over the merges of this data: a number of what the predictors read.

    Arguments:
        of: predictor, and what is read of it; ``value`` takes them in this order.
        needs: names of :meth:`companion.papers.rebasin.Setting.trained` and of the network's kind.
    """
    read = [study.worth(data, *one) for one in of]
    known = {
        "trained": study.trained,
        "mlp": (study.is_mlp, "the claim is about perceptrons"),
    }
    there = (data in study.merged, WHY[data])
    found = over_pairs(value(*row) for row in zip(*read, strict=True))
    several = (study.merges >= 2, "one merge decides nothing")
    asked = [known[name] for name in needs.split()]
    size = {"same data": study.many, THREE: 3}.get(data, study.halves)
    return statistic(found, there, several, *asked, detail=f"{size} networks each" if size else "")


def halves(study: Study, value: Callable[[Aligned, Number], float]) -> Statistic:
    """Over the valid pairs of biased halves: a number of a line, and of what the pair reads."""
    lines = enumerate(study.halfway["weights"])
    found = [value(r, lambda *of, i=i: study.read(*of)[i]) for i, r in lines if r.valid]
    split = (study.split, "no networks of split data in this run")
    return statistic(over_pairs(found), split, (study.pairs >= 2, "one pair decides nothing"))


CLAIMS: dict[str, Callable[[Study], Statistic]] = {
    # Merged from many: test loss over that of the inputs, test error minus theirs.
    "R12": lambda s: merge(
        *(s, "same data", lambda merged, own: merged / own),
        *(("merged", "loss"), ("input", "loss")),
        needs="mlp trained",
    ),
    "R13": lambda s: merge(
        *(s, "same data", lambda merged, own: merged - own),
        *(("merged", "error"), ("input", "error")),
        needs="mlp",
    ),
    # Random halves: calibration error against the ensemble's, test error of the plain mean.
    "R14": lambda s: merge(
        *(s, "random halves", lambda merged, other: abs(merged - other)),
        *(("merged", "ece"), ("ensemble", "ece")),
        needs="mlp trained",
    ),
    "R15": lambda s: merge(s, "random halves", lambda error: error, ("mean", "error")),
    # Biased halves, the chosen point of the line: test loss and error minus those of the better
    # end; the loss of one corrected network minus its own; its loss minus that of the worse of
    # ensemble and full data. Calibration error of the midpoint minus that of the better input.
    "R16": lambda s: halves(s, lambda r, of: r.chosen() - r.best_end()),
    "R17": lambda s: halves(
        s, lambda r, of: r.chosen("test", "error") - r.best_end("test", "error")
    ),
    "R18": lambda s: halves(s, lambda r, of: of("corrected") - r.chosen()),
    "R19": lambda s: halves(s, lambda r, of: r.chosen() - max(of("ensemble"), of("full data"))),
    "R20": lambda s: halves(
        s, lambda r, of: of("merged", "ece") - min(of("A", "ece"), of("B", "ece"))
    ),
    # All networks in one order at once: test loss minus that of MergeMany.
    "R43": lambda s: merge(
        *(s, THREE, lambda c2m3, merged: c2m3 - merged),
        *(("c2m3", "loss"), ("merged", "loss")),
    ),
}


# ---- figures, and the numbers of captions and prose


def show_merges(study: Study) -> None:
    """What merging many networks gives, beside one input and the ensemble."""
    if not study.groups:
        return
    fig, axes = plots.grid(3, columns=3, height=3.8)
    drawn = {}
    for ax, (metric, (label, form)) in zip(axes, METRICS.items(), strict=True):
        rows = {
            f"{len(groups[0])} of {data.partition(',')[0]}: {text}": over_pairs(
                study.worth(data, predictor, metric)
            )
            for data, groups in {**study.groups, THREE: study.agreeing}.items()
            if groups
            for predictor, text in PREDICTORS.items()
        }
        drawn[metric] = plots.conditions(
            ax, rebasin.there(rows), threshold=None, xlabel=f"test {label}", form=form
        )
    for ax in axes[1:]:
        ax.set_yticklabels([])
    figures.publish(fig, "rebasin-merge", data=drawn)


def show_split(study: Study) -> None:
    """The line between networks of biased halves, and what it has to be compared with."""
    if not study.split:
        return
    bars = {
        "one network, corrected": float(np.mean(study.read("corrected"))),
        "ensemble of A and B": float(np.mean(study.read("ensemble"))),
        "trained on all data": float(np.mean(study.read("full data"))),
    }
    groups = {NAMES[n]: [r.barrier.curve for r in g if r.valid] for n, g in study.halfway.items()}
    fig, axes = plots.grid(2, height=4.2)
    look = {"metric": "loss", "xlabel": "α, from A (0) to π(B) (1)"}
    drawn = plots.lines(axes[0], groups, **look)
    plots.lines(axes[1], groups | {NAMES["naive"]: []}, **look)
    plots.levels(axes[1], bars)
    plots.legend(fig, columns=3)
    figures.publish(fig, "rebasin-split", data=drawn | {"levels": bars})


def show_predictors(study: Study) -> None:
    """The table of all predictors made of two biased halves."""
    if not study.split:
        return
    names = {
        "A": "A",
        "B": "B",
        "mean of A and B": "mean of A and B, as they are",
        "merged": "merged: the midpoint after weight matching",
        "A corrected": "A, corrected for its class frequencies",
        "B corrected": "B, corrected for its class frequencies",
        "ensemble": "ensemble of A and B",
        "full data": "one network trained on all data",
    }
    columns = ["predictor", *(f"test {label}" for label, _ in METRICS.values())]
    rows = [
        [text, *(f"{np.mean(study.read(n, m)):.3f}" for m in METRICS)] for n, text in names.items()
    ]
    tables.show(columns, rows, name="rebasin-predictors")


def values(study: Study, verdicts: Iterable[claims.Verdict]) -> Values:
    """All numbers and sentences of the page's prose and captions."""
    told = {
        f"{short}_{predictor}_{what}": said(over_pairs(study.worth(data, predictor, what)), form)
        for data, short in (("same data", "same"), ("random halves", "half"), (THREE, "three"))
        for predictor in (*PREDICTORS, "mean")
        for what, (_, form) in METRICS.items()
    }
    merging = "was not tried here"
    if "same data" in study.groups:
        after, before = (np.mean(study.worth("same data", p, "loss")) for p in ("merged", "input"))
        merging = f"{'raises' if after >= before else 'lowers'} the test loss here"
        merging += ", too" if after < before else ""
    read = {
        "ensemble_loss": over_pairs(study.read("ensemble")),
        "full_loss": over_pairs(study.read("full data")),
        "middle_loss": over_pairs(study.read("merged")),
        "corrected_loss": over_pairs(study.read("corrected")),
        **{f"{of}_ece": over_pairs(study.read(of, "ece")) for of in ("A", "merged", "ensemble")},
        "chosen_loss": interval(study.halfway["weights"], Aligned.chosen),
        "naive_barrier": interval(study.halfway["naive"], LOSS),
        "weights_barrier": interval(study.halfway["weights"], LOSS),
    }
    forms = {"ece": "{:.1f}", "loss": "{:.3f}", "barrier": "{:.2f}"}
    missing = rebasin.NO_PAIR if study.split else MISSING
    better = {
        "reproduced": "the corrected one is better",
        "not reproduced": "the corrected one is not better",
        "undetermined": "the pairs do not agree on which is better",
        claims.NOT_TESTABLE: "this run does not decide which is better",
    }
    gained = {
        "reproduced": "has a lower test loss than MergeMany's",
        "not reproduced": "has no lower test loss than MergeMany's",
        "undetermined": "is not told apart from MergeMany's by these merges",
        claims.NOT_TESTABLE: "was not compared in this run",
    }
    verdicts = list(verdicts)
    word = {v.claim.id: v.verdict for v in verdicts}
    shares = {f"{n}_share": [100 * a.shares[n] for a in study.agreed] for n in ("passes", "c2m3")}
    shares["defect"] = [100 * a.defect for a in study.agreed]
    return {
        **study.words(),
        "merged_network": study.named(study.merge_width),
        "many": counted(study.many, "network") if study.many else "several networks",
        "merges": counted(study.merges, "merge"),
        "epochs": study.main.steps * study.main.batch / len(study.images.train),
        **told,
        "merging": merging,
        **{n: said(v, forms[n.rpartition("_")[2]], missing) for n, v in read.items()},
        **{n: said(over_pairs(v), "{:.1f}") for n, v in shares.items()},
        "corrected_or_merged": better[word["R18"]],
        "agreeing": gained[word["R43"]],
        "untested": untested(verdicts),
    }
