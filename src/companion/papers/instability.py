"""Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis".

From which step on do two copies of a network, finished under different SGD noise, stay connected?
Two networks are compared: one that sees much noise, and one that is trained gently. ::

    study = design(dataset="digits")
    study.forks.onset()  # Algorithm 1, run when it is first asked for
    claims.verdicts(CLAIMS, study)

Explained in our chapter 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from companion import data
from companion.connectivity import gates
from companion.core import stats
from companion.core.errors import BadParameter
from companion.core.stats import Interval
from companion.data import Dataset
from companion.experiments.budget import Plan
from companion.experiments.instability import (
    THRESHOLD,
    Instability,
    Sample,
    analyse,
    check,
    independent,
    plan,
    plan_independent,
    plan_through_training,
    through_training,
)
from companion.experiments.pairs import Evaluation, PairResult
from companion.models import title
from companion.report import claims, figures, plots, provenance
from companion.report.claims import Statistic
from companion.training import Recipe

CHAPTER = "01_instability"

NOISES = {"both": "order and augmentation", "order": "order", "augment": "augmentation"}
"""What differs between copies -> the same for people."""

MODES = {"interpolate": "interpolated", "reestimate": "re-estimated", "batch": "of the batch"}
"""BatchNorm's statistics on the line -> the same for people."""


# The design


@dataclass(frozen=True, eq=False)
class Study:
    """The chapter's experiment. A property that trains or measures does so once, when first read.

    Arguments:
        noisy, gentle: recipes of the network that sees much noise, and of the calm one.
        images: the dataset.
        ks: fork steps, sorted. inits, copies: independent W_0, and copies of each W_k.
        looks: steps at which copies are compared while they train.
        controls: whether to run what the claims C05, C06 and C28 need.
        max_error: percent; at or below it a network counts as trained.
        evaluation, device, workers: as :func:`companion.experiments.instability.analyse`.
    """

    noisy: Recipe
    gentle: Recipe
    images: Dataset
    ks: tuple[int, ...]
    inits: int
    copies: int
    looks: tuple[int, ...]
    controls: bool
    max_error: float
    evaluation: Evaluation
    device: str
    workers: int

    @property
    def steps(self) -> int:
        """T."""
        return self.noisy.steps

    @property
    def first(self) -> int:
        """The smallest fork step."""
        return self.ks[0]

    @property
    def last(self) -> int:
        """The largest fork step."""
        return self.ks[-1]

    @property
    def gentle_ks(self) -> tuple[int, ...]:
        """Three fork steps are enough for the calm network."""
        return tuple(sorted({self.first, self.ks[len(self.ks) // 2], self.last}))

    @property
    def again(self) -> tuple[int, ...]:
        """Fork steps from which copies also train all T steps (the paper's Fig. 4)."""
        return tuple(k for k in self.ks if k > 0 and self.controls)

    @property
    def slow(self) -> Recipe:
        """The noisy network with a tenth of its learning rate."""
        return replace(self.noisy, lr=self.noisy.lr / 10)

    @property
    def noises(self) -> tuple[str, ...]:
        """The sources of noise that are tried alone."""
        return ("order", "augment") if self.controls and self.noisy.augment != "none" else ()

    # What is trained and measured

    @cached_property
    def along(self) -> dict[int, dict[int, list[tuple[int, PairResult]]]]:
        """Fork step -> training step -> (init, pair): copies while they train (App. C)."""
        return {
            k: through_training(self.noisy, k, self.looks, inits=self.inits, **self._where)
            for k in sorted({self.first, self.last})
        }

    @cached_property
    def forks(self) -> Instability:
        """Algorithm 1 on the noisy network, at every fork step."""
        # First the copies that are also looked at while they train: else they train twice.
        _ = self.along
        return self._analyse(self.noisy, self.ks, controls=True)

    @cached_property
    def gentle_forks(self) -> Instability:
        """Algorithm 1 on the calm network."""
        return self._analyse(self.gentle, self.gentle_ks, controls=True)

    @cached_property
    def restarted(self) -> Instability | None:
        """The same states trained for all T steps again; None without controls."""
        return self._analyse(self.noisy, self.again, schedule="restart") if self.again else None

    @cached_property
    def slowed(self) -> Instability | None:
        """The noisy network with a tenth of its learning rate; None without controls."""
        return self._analyse(self.slow, [self.first]) if self.controls else None

    @cached_property
    def strangers(self) -> list[PairResult]:
        """Pairs of different initialisations."""
        return independent(
            self.noisy, inits=max(self.inits, 2), max_error=self.max_error, **self._where
        )

    @cached_property
    def by_noise(self) -> dict[str, Instability]:
        """Source of noise -> copies that part at the first fork step and differ in it alone."""
        alone = {n: self._analyse(self.noisy, [self.first], noise=n) for n in self.noises}
        return {"both": self.forks, **alone}

    def plans(self) -> list[Plan]:
        """All of the above, for :func:`companion.report.page.budget`."""
        shape: dict[str, Any] = {"inits": self.inits, "copies": self.copies}
        few = {**shape, "controls": False}
        return [
            *(
                plan_through_training(self.noisy, k, self.looks, inits=self.inits)
                for k in sorted({self.first, self.last})
            ),
            plan(self.noisy, self.ks, **shape),
            plan(self.gentle, self.gentle_ks, **shape),
            *(plan(self.noisy, [k], schedule="restart", **few) for k in self.again),
            *([plan(self.slow, [self.first], **few)] if self.controls else []),
            plan_independent(self.noisy, inits=max(self.inits, 2)),
            *(plan(self.noisy, [self.first], noise=noise, **few) for noise in self.noises),
        ]

    def _analyse(
        self, recipe: Recipe, ks: Sequence[int], *, controls: bool = False, **how: Any
    ) -> Instability:
        return analyse(
            recipe,
            ks,
            inits=self.inits,
            copies=self.copies,
            max_error=self.max_error,
            controls=controls,  # the gates of the whole experiment: once
            **self._where,
            **how,
        )

    @property
    def _where(self) -> dict[str, Any]:
        return {
            "evaluation": self.evaluation,
            "device": self.device,
            "workers": self.workers,
        }

    # What the page says of it

    @property
    def network(self) -> str:
        """The noisy network, for people."""
        return self._name(self.noisy)

    @property
    def calm(self) -> str:
        """The gentle network, for people."""
        return self._name(self.gentle)

    def _name(self, recipe: Recipe) -> str:
        nets = {self.noisy.net, self.gentle.net}
        return title(recipe.net) if len({title(n) for n in nets}) == len(nets) else recipe.net

    @property
    def scale(self) -> str:
        """What the numbers rest on, in a line."""
        hardware = "CPU" if self.device == "cpu" else provenance.record()["gpu"]["name"]
        return (
            f"{self.images.label}, {self.network} and {self.calm}, T = {self.steps}, "
            f"{self.inits} inits × {self.copies} copies, {hardware}"
        )

    def record(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The provenance of the page."""
        return provenance.record(
            dataset={"name": self.images.label, "sha256": self.images.fingerprint},
            noisy=self.noisy.identity(),
            gentle=self.gentle.identity(),
            parameters=parameters,
            device=self.device,
        )


def design(
    *,
    dataset: str = "digits",
    unstable: str | None = None,
    stable: str | None = None,
    steps: int | None = None,
    ks: Sequence[int] | None = None,
    lr: float | None = None,
    batch: int | None = None,
    inits: int = 3,
    copies: int = 3,
    controls: bool = True,
    points: int = 31,
    looks: int = 5,
    train_examples: int | None = 10_000,
    test_examples: int | None = None,
    max_error: float = 5.0,
    bn: str = "interpolate",
    precision: str = "float32",
    device: str = "auto",
    workers: int = 0,
) -> Study:
    """The two recipes, the grid of fork steps, and what is measured. Nothing is trained.

    For colour images on a GPU the noisy network is the paper's ResNet-20; a convolutional network
    that is named is trained the same way. Everywhere else it is a six-layer perceptron with a large
    step. The calm one is LeNet-300-100 with Adam.

    Arguments:
        the chapter's parameters; None: the dataset's own.

    Raises:
        BadParameter, MissingData, DeviceUnavailable: whatever is wrong with them.

    Source: Frankle et al. 2020, Table 1 (the ResNet-20 and LeNet-300-100); the perceptron is ours.
    """
    device = str(data.resolve_device(device))
    images = data.load(dataset, device)
    convolutional = device != "cpu" if unstable is None else unstable.startswith(("resnet", "vgg"))
    if images.in_shape[0] == 3 and convolutional:
        noisy = Recipe(
            net="resnet20",
            data=dataset,
            steps=12_000,
            batch=128,
            lr=0.1,
            schedule="step",
            milestones=(32 / 63, 48 / 63),
            weight_decay=1e-4,
            augment="flip+crop4",
        )
    else:
        noisy = Recipe(
            net="mlp:widths=100x5",
            data=dataset,
            steps=2000,
            batch=60,
            lr=0.08 if dataset == "digits" else 0.05,
            schedule="step",
            milestones=(0.6, 0.85),
            augment="crop1" if dataset == "digits" else "none",
        )
    gentle = Recipe(
        net="lenet-300-100",
        data=dataset,
        optimizer="adam",
        lr=1.2e-3,
        batch=60,
        steps=noisy.steps,
        augment=noisy.augment,
    )
    shared = {"steps": steps, "batch": batch, "precision": precision}
    noisy = _with(noisy, net=unstable, lr=lr, **shared)
    gentle = _with(gentle, net=stable, **shared)
    shares = (0, 1 / 80, 1 / 40, 1 / 20, 1 / 10)
    ks = sorted({round(noisy.steps * share) for share in shares}) if ks is None else ks
    if len(set(ks)) < 2:
        raise BadParameter(f"ks: {ks} must hold two fork steps or more, such as [0, 50].")
    for recipe in (noisy, gentle):
        check(recipe, ks, inits=inits, copies=copies, device=device)
    if looks < 2:
        raise BadParameter(f"looks: {looks} must be 2 or more.")
    late, shares_left = max(ks), np.linspace(0.15, 1, looks)
    return Study(
        noisy=noisy,
        gentle=gentle,
        images=images,
        ks=tuple(sorted(set(ks))),
        inits=inits,
        copies=copies,
        looks=tuple(sorted({late + max(1, round(s * (noisy.steps - late))) for s in shares_left})),
        controls=controls,
        max_error=max_error,
        evaluation=Evaluation(points, bn, train_examples, test_examples),
        device=device,
        workers=workers,
    )


def _with(recipe: Recipe, **changed: Any) -> Recipe:
    return replace(recipe, **{name: v for name, v in changed.items() if v is not None})


# Statistics that claims and figures share


def barriers(found: Instability, split: str = "test") -> dict[int, Interval]:
    """Fork step -> the error barrier, mean over pairs; without the steps that have no valid pair.

    Arguments:
        split: test or train.
    """
    values = {k: found.interval(k, split) for k in found.ks}
    return {k: v for k, v in values.items() if v is not None}


def valid_pairs(study: Study, k: int) -> list[Sample]:
    """The pairs of the noisy network that part at step k and passed every gate."""
    return [s for s in study.forks.at(k) if s.result.barrier.valid]


def distances(study: Study, name: str) -> dict[int, Interval]:
    """Fork step -> one distance in weight space (:class:`PairResult`), mean over pairs."""
    groups = {k: valid_pairs(study, k) for k in study.ks}
    return {
        k: _over(group, lambda s: s.result.distances[name]) for k, group in groups.items() if group
    }


def trail(study: Study, k: int) -> dict[int, Interval]:
    """Training step -> the test error barrier, at that step, of copies that part at k."""
    out = {}
    for step, results in study.along[k].items():
        good = [(i, r.barrier.height()) for i, r in results if r.barrier.valid]
        if good and all(r.measured for _, r in results):
            out[step] = stats.clustered([v for _, v in good], [i for i, _ in good])
    return out


def unrelated(study: Study) -> Interval | None:
    """The test error barrier between different initialisations; None without a valid pair."""
    heights = [r.barrier.height() for r in study.strangers if r.barrier.valid]
    if not heights or not all(r.measured for r in study.strangers):
        return None
    return stats.clustered(heights, range(len(heights)))


def slowed(study: Study) -> Interval | None:
    """The barrier at the first fork step with a tenth of the learning rate."""
    return study.slowed.interval(study.first) if study.slowed else None


def both_ways(study: Study) -> dict[int, tuple[Interval, Interval]]:
    """Fork step -> the barrier after the steps that are left, and after all T steps again."""
    if study.restarted is None:
        return {}
    pairs = {k: (study.forks.interval(k), study.restarted.interval(k)) for k in study.again}
    return {k: (a, b) for k, (a, b) in pairs.items() if a and b}


def separation(study: Study) -> float:
    """How often an unstable pair is farther apart than a stable one (AUC); NaN without both."""
    pairs = _all_valid(study)
    return stats.auc(
        [s.result.distances["ab"] for s in pairs],
        [s.result.barrier.height() >= THRESHOLD for s in pairs],
    )


def _all_valid(study: Study) -> list[Sample]:
    found = study.forks
    return [s for s in found.samples if s.result.barrier.valid and found.measured(s.k)]


def _over(pairs: Sequence[Sample], value: Callable[[Sample], float]) -> Interval:
    """Mean and interval over pairs, clustered by init."""
    return stats.clustered([value(s) for s in pairs], [s.init for s in pairs])


def _standing(study: Study) -> list[Sample]:
    """The valid pairs at the first fork step, if all of them were measured."""
    return valid_pairs(study, study.first) if study.forks.measured(study.first) else []


def _at_onset(study: Study) -> list[Sample]:
    onset = study.forks.onset()
    return valid_pairs(study, study.last if onset is None else onset)


# Claims: what each needs to be testable, and its statistic

Need = tuple[bool, str]
"""Whether something is there, and what to say if it is not."""


def _statistic(
    value: float | Interval | None, *needs: Need, n: int | None = None, detail: str = ""
) -> Statistic:
    lacking = [why for there, why in needs if not there]
    return Statistic(value, n=n, detail=detail, note="; ".join(lacking), testable=not lacking)


def _at_init(study: Study) -> Need:
    return study.first == 0, "the grid has no k = 0"


def _inits(study: Study) -> Need:
    return study.inits >= 2, "one init decides nothing"


def _ran_controls(study: Study) -> Need:
    return study.controls, "the controls were left out of this run"


def _becomes_stable(study: Study) -> Need:
    return study.forks.onset() is not None, "it did not become stable on this grid"


def _was_unstable(study: Study) -> Need:
    onset = study.forks.onset()
    return onset is None or onset > study.first, "it was stable from the smallest k on"


def _on_cifar(study: Study) -> Need:
    return study.noisy.data in ("cifar10", "cifar10-jpeg"), "the claim is about CIFAR-10"


def _trained_to_the_end(study: Study) -> Need:
    """Shares of a training, and what it ends with, mean something where it came to its end."""
    pairs = _standing(study)
    error = float(np.mean([s.result.barrier.curve.ends("train") for s in pairs])) if pairs else 100
    return (
        error <= gates.UNLEARNED,
        f"training was cut short: the networks end with {error:.0f} % error on their own training "
        "images",
    )


def c01(study: Study) -> Statistic:
    """The calm network's barrier at k = 0, the larger of train and test."""
    found = [study.gentle_forks.interval(study.first, split) for split in ("train", "test")]
    there = [v for v in found if v is not None]
    claim = claims.registry()["C01"]
    return _statistic(
        max(there, key=lambda v: v.value, default=None),
        _at_init(study),
        _inits(study),
        (bool(there), f"no valid pair of {study.calm}"),
        (claim.takes(study.noisy.data), claim.about),
    )


def c02(study: Study) -> Statistic:
    """The noisy network's test barrier at k = 0, the smallest of the inits' means."""
    values = study.forks.values(study.first)
    means = [float(np.mean([v for i, v in values if i == init])) for init in {i for i, _ in values}]
    return _statistic(
        min(means, default=None),
        _at_init(study),
        _inits(study),
        n=len(means),
        detail="smallest init",
    )


def c03(study: Study) -> Statistic:
    """The share of training from which on the mean barrier stays below 2 points."""
    onset = study.forks.onset()
    return _statistic(
        float("inf") if onset is None else onset / study.steps,
        (bool(_all_valid(study)), "no valid pair"),
        _trained_to_the_end(study),
        (
            any(0 < k / study.steps <= 0.05 for k in study.ks),
            "the grid has no k up to 5 % of training",
        ),
        _was_unstable(study),
        n=len(study.forks.at(study.first)),
        detail="never on this grid" if onset is None else f"k = {onset} of {study.steps}",
    )


def c04(study: Study) -> Statistic:
    """Spearman's rank correlation of k and the mean test barrier."""
    means = barriers(study.forks)
    return _statistic(
        stats.spearman(list(means), [v.value for v in means.values()]),
        (len(means) >= 4, "a rank correlation needs four k or more"),
        n=len(means),
    )


def c05(study: Study) -> Statistic:
    """The barrier at k = 0 with a tenth of the learning rate, over that with all of it."""
    low, standard = slowed(study), study.forks.interval(study.first)
    return _statistic(
        low.value / standard.value if low and standard and standard.value else None,
        _at_init(study),
        _ran_controls(study),
        n=len(study.forks.at(study.first)),
        detail=f"{low.value:.2f} against {standard.value:.2f} points" if low and standard else "",
    )


def _agree(study: Study) -> dict[int, bool]:
    """Fork step -> whether the two ways of training fall on the same side of 2 points."""
    return {
        k: (a.value < THRESHOLD) == (b.value < THRESHOLD) for k, (a, b) in both_ways(study).items()
    }


def _disagreement(study: Study) -> str:
    """Where they do not, with the numbers; empty if they agree everywhere."""
    pairs = both_ways(study)
    return ", ".join(
        f"k = {k}: {pairs[k][0].value:.2f} against {pairs[k][1].value:.2f} points"
        for k, same in _agree(study).items()
        if not same
    )


def c06(study: Study) -> Statistic:
    """The share of the k at which both ways of training give one verdict."""
    agree = _agree(study)
    return _statistic(
        float(np.mean(list(agree.values()))) if agree else None,
        _ran_controls(study),
        n=len(agree),
        detail=_disagreement(study),
    )


def c07(study: Study) -> Statistic:
    """At the first stable k: the copies' distance over their mean distance from init."""

    def ratio(pair: Sample) -> float:
        d = pair.result.distances
        return 2 * d["ab"] / (d["a_init"] + d["b_init"])

    pairs = _at_onset(study)
    return _statistic(_over(pairs, ratio) if pairs else None, _becomes_stable(study), _inits(study))


def c08(study: Study) -> Statistic:
    """The mean barrier between different initialisations."""
    return _statistic(unrelated(study), (study.inits >= 3, "two inits make one pair"))


def _near_guessing(study: Study, family: str, name: str) -> Statistic:
    """The highest test error on the line between copies that part at k = 0, mean over pairs."""
    pairs = _standing(study)

    def top(mode: str) -> Interval:
        return _over(pairs, lambda s: max(s.result.barrier.curves[mode].values["test"]["error"]))

    modes = [mode for mode in study.forks.modes if mode in MODES] if pairs else []
    return _statistic(
        top(study.forks.headline) if pairs else None,
        _at_init(study),
        _inits(study),
        _on_cifar(study),
        (study.noisy.net.startswith(family), f"the claim is about {name}"),
        detail=f"{study.network}, T = {study.steps}"
        + "".join(f"; statistics {MODES[mode]} {top(mode).value:.0f} %" for mode in modes),
    )


def c13(study: Study) -> Statistic:
    """The highest error on the line between copies of ResNet-20 that part at k = 0."""
    return _near_guessing(study, "resnet20", "ResNet-20")


def c14(study: Study) -> Statistic:
    """The same of VGG-16."""
    return _near_guessing(study, "vgg16", "VGG-16")


def c17(study: Study) -> Statistic:
    """The mean absolute difference of train and test barrier over the fork steps."""
    test, train = barriers(study.forks), barriers(study.forks, "train")
    gaps = [abs(v.value - train[k].value) for k, v in test.items()]
    net = study.noisy.net
    return _statistic(
        float(np.mean(gaps)) if gaps else None,
        _on_cifar(study),
        ("resnet" in net or "vgg" in net, "the claim is about convolutional networks"),
        n=len(gaps),
    )


def c23(study: Study) -> Statistic:
    """The largest mean barrier, over training steps, of copies that part at the last k."""
    end, way = study.forks.interval(study.last), trail(study, study.last)
    return _statistic(
        max((v.value for v in way.values()), default=None),
        (
            end is not None and end.value < THRESHOLD,
            f"copies that part at k = {study.last} do not end connected",
        ),
        n=study.inits,
        detail=f"k = {study.last}, {len(way)} steps",
    )


def c24(study: Study) -> Statistic:
    """Area under the ROC curve of distance as a predictor of instability."""
    return _statistic(separation(study), n=len(_all_valid(study)))


def c27(study: Study) -> Statistic:
    """Test error at the first stable k over that at the end."""

    def ratio(pair: Sample) -> float:
        end = float(np.mean(pair.result.barrier.curve.ends()))
        return pair.result.start["test"].error / max(end, 1e-9)

    pairs = _at_onset(study)
    return _statistic(
        _over(pairs, ratio) if pairs else None,
        _becomes_stable(study),
        _was_unstable(study),
        _trained_to_the_end(study),
        _inits(study),
    )


def c28(study: Study) -> Statistic:
    """The smallest of the barriers at k = 0 under order, augmentation, and both."""
    found = {name: f.interval(study.first) for name, f in study.by_noise.items()}
    there = {name: v for name, v in found.items() if v is not None}
    return _statistic(
        min(v.value for v in there.values()) if len(there) == 3 else None,
        _at_init(study),
        _ran_controls(study),
        n=len(study.forks.at(study.first)),
        detail=", ".join(f"{name} {v.value:.1f}" for name, v in there.items()),
    )


CLAIMS: dict[str, Callable[[Study], Statistic]] = {
    "C01": c01,
    "C02": c02,
    "C03": c03,
    "C04": c04,
    "C05": c05,
    "C06": c06,
    "C07": c07,
    "C08": c08,
    "C13": c13,
    "C14": c14,
    "C17": c17,
    "C23": c23,
    "C24": c24,
    "C27": c27,
    "C28": c28,
}
"""Claim id -> its statistic, in the order of the table."""


# Figures, and the values of their captions

Values = dict[str, float | str]


def _series(points: Mapping[int, Interval]) -> str:
    """For an alt text: ``21.8 points at k = 0, 1.5 at k = 100``."""
    return ", ".join(f"{v.value:.1f} at k = {k}" for k, v in points.items()) or "no valid pair"


def line_values(study: Study) -> Values:
    """What the caption of the figure ``line`` says."""
    middle = study.evaluation.points // 2
    groups = {k: _curves(study, k) for k in study.ks}
    return {
        "network": study.network,
        "data": study.images.label,
        "T": study.steps,
        "pairs": len(study.forks.at(study.first)),
        "middles": ", ".join(
            f"{np.mean([c.values['test']['error'][middle] for c in curves]):.1f} for k = {k}"
            for k, curves in groups.items()
            if curves
        ),
    }


def _curves(study: Study, k: int) -> list[Any]:
    return [s.result.barrier.curve for s in valid_pairs(study, k)]


def show_line(study: Study) -> None:
    """Test error and loss on the line between two copies, a curve for each fork step."""
    groups = {f"k = {k} ({k / study.steps:.1%})": _curves(study, k) for k in study.ks}
    groups = {label: curves for label, curves in groups.items() if curves}
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.8))
    drawn = {
        metric: plots.lines(ax, groups, metric=metric)
        for ax, metric in zip(axes, ("error", "loss"), strict=True)
    }
    plots.legend(fig, len(groups))
    figures.publish(fig, "line", data=drawn, values=line_values(study))
