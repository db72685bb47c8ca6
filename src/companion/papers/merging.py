"""Git Re-Basin, the other half: many networks merged into one, and networks of different data.

What the page on merging in chapter 2 trains, measures, draws and judges, as
:mod:`companion.papers.rebasin` does for two networks. Its runs are those of that page, or of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from companion.connectivity import gates
from companion.core.errors import BadParameter
from companion.core.stats import Interval
from companion.data import load
from companion.experiments.aligned import Aligned, independent, interval, lines_of, pairs_of
from companion.experiments.budget import Plan
from companion.experiments.merged import Halves, Merge, Readings, merge_runs, split_runs
from companion.experiments.pairs import Pair
from companion.papers.rebasin import (
    NAMES,
    Results,
    Setting,
    counted,
    height,
    over_pairs,
    said,
    setting,
    statistic,
)
from companion.report import claims, figures, page, plots, tables
from companion.report.claims import Statistic
from companion.training import Recipe, Run, check_fit

METRICS = {"loss": "loss (nats)", "error": "error (%)", "ece": "ECE (points)"}
NONE = "not measured"
PREDICTORS = {
    "input": "one input",
    "merged": "merged",
    "ensemble": "ensemble",
}


@dataclass(frozen=True)
class Study(Setting):
    """The experiments of the page. Each runs, once, when it is first looked at.

    Arguments:
        many: networks of the same data that are merged into one.
        halves: networks of random halves
            of the data; 0 leaves either out. merge_width: their width.
        split: whether to train networks of two biased halves.
    """

    many: int
    halves: int
    merge_width: int
    split: bool

    def words(self) -> dict[str, float | str]:
        """What captions and prose say of the whole page."""
        merged = self.named(self.merge_width)
        many = counted(self.many, "network") if self.many else "several networks"
        return {**super().words(), "merged_network": merged, "many": many}

    @property
    def groups(self) -> dict[str, list[Run]]:
        """What is merged: the name of the data -> the networks."""
        recipe, name = self.at_width(self.merge_width), self.base.data
        found = {
            "same data": [independent(recipe, n) for n in range(self.many)],
            "random halves": [
                independent(replace(recipe, data=f"{name}@random-50-{i}"), i)
                for i in range(self.halves)
            ],
        }
        return {k: runs for k, runs in found.items() if runs}

    @property
    def biased(self) -> tuple[Recipe, Recipe]:
        """The main recipe on each of two biased halves."""
        a, b = (replace(self.main, data=f"{self.base.data}@split-{part}") for part in "ab")
        return a, b

    @property
    def split_pairs(self) -> list[Pair]:
        """Networks of the two biased halves."""
        a, b = self.biased
        return pairs_of(a, self.pairs if self.split else 0, other=b)

    @property
    def full(self) -> list[Run]:
        """A network of all the data for each of these pairs."""
        return [p.a for p in pairs_of(self.main, len(self.split_pairs))]

    def plans(self) -> list[Plan]:
        """All that this page trains and measures, for its budget."""
        evaluation, on = self.evaluation, self.base.data
        pairs = self.split_pairs
        tasks = [
            *(Merge(tuple(runs), evaluation, on) for runs in self.groups.values()),
            *lines_of(pairs, evaluation=evaluation, on=on),
            *(Halves(p, full, evaluation) for p, full in zip(pairs, self.full, strict=True)),
        ]
        return [tasks]

    @cached_property
    def merges(self) -> Mapping[str, Readings]:
        """The name of the data -> readings of inputs, merged network, plain mean and ensemble."""
        groups = self.groups
        found = merge_runs(list(groups.values()), self.evaluation, on=self.base.data, **self._where)
        return dict(zip(groups, found, strict=True))

    @cached_property
    def halfway(self) -> Results:
        """The lines between networks of biased halves, as they are and after weight matching."""
        if not self.split:
            return {"naive": [], "weights": []}
        error = max(self.max_error, 30.0)
        return self.align(self.split_pairs, on=self.base.data, max_error=error)

    @cached_property
    def apart(self) -> list[Readings]:
        """For each of these pairs: what A, B, what they merge into, and the controls are worth."""
        return split_runs(self.split_pairs, self.full, self.evaluation, **self._where)

    @property
    def _where(self) -> dict[str, Any]:
        return {"device": self.device, "workers": self.workers}

    # ---- what the readings say

    def inputs(self, data: str, what: str, split: str = "test") -> float:
        """Mean of one number over the inputs of a merge."""
        found = self.merges[data]
        return float(
            np.mean([getattr(r[split], what) for n, r in found.items() if n.startswith("input")])
        )

    def worth(self, data: str, predictor: str, what: str, split: str = "test") -> float:
        """One number of a merge; ``input``: mean over the inputs."""
        if predictor == "input":
            return self.inputs(data, what, split)
        return float(getattr(self.merges[data][predictor][split], what))

    def read(self, predictor: str, what: str, split: str = "test") -> list[float]:
        """One number for each pair of biased halves."""
        return [getattr(r[predictor][split], what) for r in self.apart]

    def corrected(self, what: str) -> list[float]:
        """One corrected network a pair: of A and B the one with the lower loss on train images."""
        train = [self.read(f"{n} corrected", "loss", "train") for n in "AB"]
        test = [self.read(f"{n} corrected", what) for n in "AB"]
        return [test[int(np.argmin(pair))][i] for i, pair in enumerate(zip(*train, strict=True))]

    def valid(self) -> list[tuple[int, Aligned]]:
        """The pairs of biased halves that passed their gates, with their places."""
        return [(i, r) for i, r in enumerate(self.halfway["weights"]) if r.valid]


def design(*, many: int, halves: int, merge_width: int | None, split: bool, **common: Any) -> Study:
    """The study that the page's parameters ask for; refused before anything trains.

    Arguments:
        many, halves, split: as :class:`Study` has them.
        merge_width: None: the main width, on ``digits`` 128 (merging takes many passes).
        common: as :func:`companion.papers.rebasin.setting` takes them.

    Raises:
        BadParameter: one network to merge, and what ``setting`` refuses.
    """
    if 1 in (many, halves) or min(many, halves) < 0:
        raise BadParameter("many, halves: 0, or 2 or more.")
    main = setting(**common)
    width = merge_width or (min(main.width, 128) if main.base.data == "digits" else main.width)
    study = Study(**vars(main), many=many, halves=halves, merge_width=width, split=split)
    recipes = [run.recipe for group in study.groups.values() for run in group[:1]]
    for recipe in (*recipes, *(study.biased if split else ())):
        check_fit(recipe, load(recipe.data, study.device))
    return study


# ---- one function a claim


def _merge(
    study: Study, data: str, value: Callable[[], float], why: str, detail: str = ""
) -> Statistic:
    here = data in study.merges
    return statistic(value() if here else None, (here, why), detail=detail if here else "")


def _same(study: Study, value: Callable[[], float]) -> Statistic:
    return _merge(study, "same data", value, "no merge in this run")


def _random(study: Study, value: Callable[[], float]) -> Statistic:
    why = "no networks of random halves in this run"
    return _merge(study, "random halves", value, why, f"{study.halves} networks")


def _split(study: Study, value: Callable[[int, Aligned], float]) -> Statistic:
    """Over the valid pairs of biased halves: a number of the pair's place and of its line."""
    found = over_pairs([value(i, r) for i, r in study.valid()]) if study.split else None
    return statistic(found, (study.split, "no networks of split data in this run"), study.several)


def r12(study: Study) -> Statistic:
    """Test loss of the network merged from many, over the mean of its inputs."""
    if "same data" not in study.merges:
        return statistic(None, (False, "no merge in this run"))
    merged, own = (study.worth("same data", p, "loss") for p in ("merged", "input"))
    wrong = study.inputs("same data", "error", "train")
    short = f"training was cut short: {wrong:.0f} % error on training images"
    needs = (wrong <= gates.UNLEARNED, short)
    return statistic(merged / own, needs, detail=f"{merged:.4f} against {own:.4f}")


def r13(study: Study) -> Statistic:
    """Test error of the network merged from many, minus the mean of its inputs."""
    return _same(
        study,
        lambda: study.worth("same data", "merged", "error") - study.inputs("same data", "error"),
    )


def r14(study: Study) -> Statistic:
    """Calibration error, merged from random halves against their ensemble."""
    return _random(
        study,
        lambda: abs(
            study.worth("random halves", "merged", "ece")
            - study.worth("random halves", "ensemble", "ece")
        ),
    )


def r15(study: Study) -> Statistic:
    """Test error of the plain mean of the networks of random halves."""
    return _random(study, lambda: study.worth("random halves", "mean", "error"))


def r16(study: Study) -> Statistic:
    """Test loss at the chosen point of the line, minus that of the better end."""
    return _split(study, lambda i, r: r.chosen() - r.best_end())


def r17(study: Study) -> Statistic:
    """Test error at the chosen point, minus that of the better end."""
    return _split(study, lambda i, r: r.chosen("test", "error") - r.best_end("test", "error"))


def r18(study: Study) -> Statistic:
    """Test loss of one network, corrected for its class frequencies, minus the chosen point's."""
    return _split(study, lambda i, r: study.corrected("loss")[i] - r.chosen())


def r19(study: Study) -> Statistic:
    """Test loss at the chosen point, minus that of the worse of ensemble and full data."""
    return _split(
        study,
        lambda i, r: r.chosen() - max(study.read(n, "loss")[i] for n in ("ensemble", "full data")),
    )


def r20(study: Study) -> Statistic:
    """Calibration error of the midpoint, minus that of the better input."""
    return _split(
        study,
        lambda i, r: study.read("merged", "ece")[i] - min(study.read(n, "ece")[i] for n in "AB"),
    )


CLAIMS: dict[str, Callable[[Study], Statistic]] = {
    f.__name__.upper(): f for f in (r12, r13, r14, r15, r16, r17, r18, r19, r20)
}


# ---- figures, and the numbers of their captions


def merge_values(study: Study) -> dict[str, float | str]:
    """Losses, errors and calibration of inputs, merged network, ensemble and plain mean."""
    out: dict[str, float | str] = {}
    for data, short in (("same data", "same"), ("random halves", "half")):
        for predictor in (*PREDICTORS, "mean"):
            for what, form in (("loss", "{:.3f}"), ("error", "{:.1f}"), ("ece", "{:.1f}")):
                value = study.worth(data, predictor, what) if data in study.merges else None
                out[f"{short}_{predictor}_{what}"] = NONE if value is None else said(value, form)
    if "same data" in study.merges:
        better = study.worth("same data", "merged", "loss") < study.inputs("same data", "loss")
        out["merging"] = "lowers the test loss here, too" if better else "raises the test loss here"
    else:
        out["merging"] = "was not tried here"
    return out


def _dots(axes: Sequence[Any], rows: Mapping[str, Mapping[str, Interval | None]]) -> dict[str, Any]:
    """A panel a metric, a row a predictor."""
    drawn = {}
    for ax, (metric, label) in zip(axes, METRICS.items(), strict=True):
        good = {name: v for name, of in rows.items() if (v := of[metric]) is not None}
        form = "{:.3f}" if metric == "loss" else "{:.1f}"
        drawn[metric] = plots.conditions(
            ax, good, threshold=None, xlabel=f"test {label}", form=form
        )
    for ax in axes[1:]:
        ax.set_yticklabels([])
    return drawn


def show_merges(study: Study) -> None:
    """What merging many networks gives, beside one input and the ensemble."""
    page.fill(**merge_values(study))
    if not study.merges:
        return
    rows = {
        f"{len(study.groups[data])} of {data}: {text}": {
            m: over_pairs([study.worth(data, predictor, m)]) for m in METRICS
        }
        for data in study.merges
        for predictor, text in PREDICTORS.items()
    }
    fig, axes = plots.grid(3, columns=3, height=3.4)
    figures.publish(fig, "rebasin-merge", data=_dots(axes, rows))


def split_values(study: Study) -> dict[str, float | str]:
    """What networks of biased halves are compared with, and what is read on their line."""
    lines = study.halfway
    three = {"loss": "{:.3f}", "ece": "{:.1f}"}

    def mean(name: str, what: str) -> str:
        return said(over_pairs(study.read(name, what)), three[what]) if study.split else NONE

    rows = {"ensemble": "ensemble", "full": "full data", "middle": "merged"}
    out: dict[str, float | str] = {f"{k}_loss": mean(n, "loss") for k, n in rows.items()}
    out |= {f"{n}_ece": mean(n, "ece") for n in ("A", "merged", "ensemble")}
    corrected = over_pairs(study.corrected("loss")) if study.split else None
    found = {
        "corrected_loss": (corrected, "{:.3f}"),
        "chosen_loss": (interval(lines["weights"], Aligned.chosen), "{:.3f}"),
        "naive_barrier": (interval(lines["naive"], height("test", "loss")), "{:.2f}"),
        "weights_barrier": (interval(lines["weights"], height("test", "loss")), "{:.2f}"),
    }
    return out | {k: said(v, form) if study.split else NONE for k, (v, form) in found.items()}


def show_split(study: Study) -> None:
    """The line between networks of biased halves, and what it has to be compared with."""
    page.fill(**split_values(study))
    if not study.split:
        return
    bars = {
        "one network, corrected": float(np.mean(study.corrected("loss"))),
        "ensemble of A and B": float(np.mean(study.read("ensemble", "loss"))),
        "trained on all data": float(np.mean(study.read("full data", "loss"))),
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
    rows = {
        "A": "A",
        "B": "B",
        "mean of A and B": "mean of A and B, as they are",
        "merged": "merged: the midpoint after weight matching",
        "A corrected": "A, corrected for its class frequencies",
        "B corrected": "B, corrected for its class frequencies",
        "ensemble": "ensemble of A and B",
        "full data": "one network trained on all data",
    }
    columns = ["predictor", *(f"test {label}" for label in METRICS.values())]
    tables.show(
        columns,
        [
            [text, *(f"{np.mean(study.read(n, m)):.3f}" for m in METRICS)]
            for n, text in rows.items()
        ],
        name="rebasin-predictors",
    )


def closing_values(study: Study, verdicts: Sequence[claims.Verdict]) -> dict[str, float | str]:
    """What R18 decided, in words, and what this run could not reach."""
    words = {
        "reproduced": "the corrected one is better",
        "not reproduced": "the corrected one is not better",
        "undetermined": "the pairs do not agree on which is better",
        claims.NOT_TESTABLE: "this run does not decide which is better",
    }
    untested = [v for v in verdicts if v.verdict == claims.NOT_TESTABLE]
    return {
        "corrected_or_merged": words[next(v.verdict for v in verdicts if v.claim.id == "R18")],
        "untested": "; ".join(f"{v.claim.id} ({v.note or 'not measured'})" for v in untested)
        or "none",
    }
