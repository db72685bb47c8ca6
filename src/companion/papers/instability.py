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
from companion.connectivity import Curve, Plane, gates, plane
from companion.core import stats
from companion.core.errors import BadParameter, NotMeasured
from companion.core.stats import Interval
from companion.core.theta import Theta
from companion.data import Dataset
from companion.experiments.budget import Plan
from companion.experiments.instability import (
    THRESHOLD,
    Instability,
    Sample,
    analyse,
    check_design,
    copy,
    independent_inits,
    plan_forks,
    plan_independent,
    plan_through_training,
    through_training,
    trunk,
)
from companion.experiments.pairs import Evaluation, PairResult
from companion.models import title
from companion.report import claims, figures, plots, provenance, recorded, tables
from companion.report.claims import Need, Statistic, statistic
from companion.report.recorded import Record
from companion.training import Recipe, build, load_weights

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
        ks: fork steps, sorted.
        inits, copies: independent W_0, and copies of each W_k.
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
        return independent_inits(
            self.noisy, inits=max(self.inits, 2), max_error=self.max_error, **self._where
        )

    @cached_property
    def by_noise(self) -> dict[str, Instability]:
        """Source of noise -> copies that part at the first fork step and differ in it alone."""
        alone = {n: self._analyse(self.noisy, [self.first], noise=n) for n in self.noises}
        return {"both": self.forks, **alone}

    def plans(self) -> list[Plan]:
        """All of the above, for :func:`companion.report.page.budget`."""
        how = self.evaluation
        shape: dict[str, Any] = {"inits": self.inits, "copies": self.copies}
        few = {**shape, "controls": False}
        return [
            *(
                plan_through_training(self.noisy, k, self.looks, how, inits=self.inits)
                for k in sorted({self.first, self.last})
            ),
            plan_forks(self.noisy, self.ks, how, **shape),
            plan_forks(self.gentle, self.gentle_ks, how, **shape),
            *(plan_forks(self.noisy, [k], how, schedule="restart", **few) for k in self.again),
            *([plan_forks(self.slow, [self.first], how, **few)] if self.controls else []),
            plan_independent(self.noisy, how, inits=max(self.inits, 2)),
            *(plan_forks(self.noisy, [self.first], how, noise=n, **few) for n in self.noises),
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

    The arguments are the chapter's parameters; None stands for the dataset's own.

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
        check_design(recipe, ks, inits=inits, copies=copies, device=device)
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
    return statistic(
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
    return statistic(
        min(means, default=None),
        _at_init(study),
        _inits(study),
        n=len(means),
        detail="smallest init",
    )


def c03(study: Study) -> Statistic:
    """The share of training from which on the mean barrier stays below 2 points."""
    onset = study.forks.onset()
    return statistic(
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
    return statistic(
        stats.spearman(list(means), [v.value for v in means.values()]),
        (len(means) >= 4, "a rank correlation needs four k or more"),
        n=len(means),
    )


def c05(study: Study) -> Statistic:
    """The barrier at k = 0 with a tenth of the learning rate, over that with all of it."""
    low, standard = slowed(study), study.forks.interval(study.first)
    return statistic(
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
    return statistic(
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
    return statistic(_over(pairs, ratio) if pairs else None, _becomes_stable(study), _inits(study))


def c08(study: Study) -> Statistic:
    """The mean barrier between different initialisations."""
    return statistic(unrelated(study), (study.inits >= 3, "two inits make one pair"))


def _near_guessing(study: Study, family: str, name: str) -> Statistic:
    """The highest test error on the line between copies that part at k = 0, mean over pairs."""
    pairs = _standing(study)

    def top(mode: str) -> Interval:
        return _over(pairs, lambda s: max(s.result.barrier.curves[mode].values["test"]["error"]))

    modes = [mode for mode in study.forks.modes if mode in MODES] if pairs else []
    return statistic(
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
    return statistic(
        float(np.mean(gaps)) if gaps else None,
        _on_cifar(study),
        ("resnet" in net or "vgg" in net, "the claim is about convolutional networks"),
        n=len(gaps),
    )


def c23(study: Study) -> Statistic:
    """The largest mean barrier, over training steps, of copies that part at the last k."""
    end, way = study.forks.interval(study.last), trail(study, study.last)
    return statistic(
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
    return statistic(separation(study), n=len(_all_valid(study)))


def c27(study: Study) -> Statistic:
    """Test error at the first stable k over that at the end."""

    def ratio(pair: Sample) -> float:
        end = float(np.mean(pair.result.barrier.curve.ends()))
        return pair.result.start["test"].error / max(end, 1e-9)

    pairs = _at_onset(study)
    return statistic(
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
    return statistic(
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


def _share(step: int, study: Study) -> str:
    return f"{100 * step / study.steps:.3g} % of training"


def _points(value: Interval | None) -> str:
    return "no valid pair" if value is None else f"{value.value:.1f}"


def _series(points: Mapping[int, Interval]) -> str:
    """For an alternative text: ``21.8 at k = 0, 1.5 at k = 100``."""
    return ", ".join(f"{v.value:.1f} at k = {k}" for k, v in points.items()) or "no valid pair"


def _of(study: Study) -> Values:
    """What nearly every caption says."""
    return {
        "network": study.network,
        "calm": study.calm,
        "data": study.images.label,
        "T": study.steps,
        "first": study.first,
        "last": study.last,
    }


def planes(study: Study) -> dict[int, Plane]:
    """First and last fork step -> the plane through W_0 and two copies of the first init."""
    start = load_weights(trunk(study.noisy, 0), 0, device=study.device)
    module = build(trunk(study.noisy, 0), study.images, study.images.train.x.device)
    test = {"test": study.images.test.head(500 if study.device == "cpu" else 2000)}

    def end(k: int, number: int) -> Theta:
        return load_weights(copy(study.noisy, 0, k, number), device=study.device)

    return {k: plane(module, start, end(k, 1), end(k, 2), test) for k in (study.first, study.last)}


def plane_values(study: Study) -> Values:
    """What the caption of ``plane`` says: the highest error on the segment drawn."""

    def peak(k: int) -> float:
        return max(study.forks.at(k)[0].result.barrier.curve.values["test"]["error"])

    return _of(study) | {"peak_first": peak(study.first), "peak_last": peak(study.last)}


def show_plane(study: Study) -> None:
    """Test error on the plane through W_0 and two copies, for the first and the last fork step."""
    found = planes(study)
    fig, axes = plots.grid(2, height=4.2)
    drawn = plots.planes(axes, {str(k): one for k, one in found.items()})
    for ax, k in zip(axes, found, strict=True):
        ax.set_title(f"copies part at k = {k}")
    figures.publish(fig, "plane", data=drawn, values=plane_values(study))


def _curves(study: Study) -> dict[int, list[Curve]]:
    """Fork step -> the curves of its valid pairs, where there are any."""
    found = {k: [s.result.barrier.curve for s in valid_pairs(study, k)] for k in study.ks}
    return {k: curves for k, curves in found.items() if curves}


def line_values(study: Study) -> Values:
    """What the caption of ``line`` says: the mean error half-way for each fork step."""

    def middle(curves: list[Curve]) -> float:
        errors = [c.values["test"]["error"] for c in curves]
        return float(np.mean([e[len(e) // 2] for e in errors]))

    return _of(study) | {
        "pairs": len(study.forks.at(study.first)),
        "middles": ", ".join(f"{middle(cs):.1f} for k = {k}" for k, cs in _curves(study).items()),
    }


def show_line(study: Study) -> None:
    """Test error and loss on the line between two copies, a curve for each fork step."""
    groups = {f"k = {k} ({k / study.steps:.1%})": cs for k, cs in _curves(study).items()}
    fig, axes = plots.grid(2, width=8.4)
    drawn = {
        metric: plots.lines(ax, groups, metric=metric)
        for ax, metric in zip(axes, ("error", "loss"), strict=True)
    }
    plots.legend(fig, len(groups))
    figures.publish(fig, "line", data=drawn, values=line_values(study))


def instability_values(study: Study) -> Values:
    """What the caption of ``instability`` says."""
    return _of(study) | {
        "inits": study.inits,
        "pairs_each": study.copies * (study.copies - 1) // 2,
        "onset_sentence": onset_sentence(study),
        "noisy_points": _series(barriers(study.forks)),
        "calm_points": _series(barriers(study.gentle_forks)),
    }


def show_instability(study: Study) -> None:
    """The test error barrier against the fork step, for both networks."""
    fig, ax = plt.subplots(figsize=(7.4, 4.2))
    both = {study.network: study.forks, study.calm: study.gentle_forks}
    curves = {f"{name}, test": barriers(found) for name, found in both.items()}
    drawn = plots.against_k(ax, curves, steps=study.steps)
    figures.publish(fig, "instability", data=drawn, values=instability_values(study))


def _conditions(study: Study) -> dict[str, Interval]:
    """What is changed, in words -> the barrier at the first fork step."""
    null = study.forks.samples[0].result.barrier.gate("G1").value
    rows = {
        "same noise twice": None if null is None else Interval(null, 0.0, 0.0, 1, 1),
        "a tenth of the learning rate": slowed(study),
        f"the network itself, k = {study.first}": study.forks.interval(study.first),
        "other initialisations": unrelated(study),
    }
    return {name: v for name, v in rows.items() if v is not None}


def controls_values(study: Study) -> Values:
    """What the caption of ``controls`` says."""
    rows = "; ".join(f"{name} {v.value:.1f} points" for name, v in _conditions(study).items())
    return _of(study) | {"rows": rows}


def show_controls(study: Study) -> None:
    """The barrier at the first fork step with less noise, and with another start."""
    fig, ax = plt.subplots(figsize=(7.4, 2.8))
    drawn = plots.conditions(ax, _conditions(study))
    figures.publish(fig, "controls", data=drawn, values=controls_values(study))


def restart_values(study: Study) -> Values:
    """What the caption of ``restart`` says."""
    pairs = both_ways(study)
    return _of(study) | {
        "left_points": _series({k: a for k, (a, _) in pairs.items()}),
        "all_points": _series({k: b for k, (_, b) in pairs.items()}),
    }


def show_restart(study: Study) -> None:
    """The barrier after the steps that are left, and after all T; nothing without controls."""
    if study.restarted is None:
        return
    left = {k: v for k, v in barriers(study.forks).items() if k > 0}
    curves = {"T − k steps left": left, "all T steps again": barriers(study.restarted)}
    fig, ax = plt.subplots(figsize=(7.4, 3.8))
    drawn = plots.against_k(ax, curves, steps=study.steps)
    figures.publish(fig, "restart", data=drawn, values=restart_values(study))


def distance_values(study: Study) -> Values:
    """What the caption of ``distance`` says."""
    apart, from_init = distances(study, "ab"), distances(study, "a_init")
    return _of(study) | {
        "apart_last": _points(apart.get(study.last)),
        "travelled_last": _points(from_init.get(study.last)),
        "apart_points": _series(apart),
    }


def show_distance(study: Study) -> None:
    """Distances in weight space against the fork step."""
    fig, ax = plt.subplots(figsize=(7.4, 4.0))
    names = {
        "between the copies, |A − B|": "ab",
        "from init to copy, |A − W₀|": "a_init",
        "from fork to copy, |A − Wₖ|": "a_start",
        "from init to fork, |Wₖ − W₀|": "start_init",
    }
    drawn = plots.against_k(
        ax,
        {label: distances(study, name) for label, name in names.items()},
        steps=study.steps,
        threshold=None,
        ylabel="Euclidean distance of the weights",
    )
    figures.publish(fig, "distance", data=drawn, values=distance_values(study))


def through_values(study: Study) -> Values:
    """What the caption of ``through`` says."""
    trails = "; ".join(
        f"parted at {k}: "
        + ", ".join(f"{v.value:.1f} points at step {step}" for step, v in trail(study, k).items())
        for k in study.along
    )
    return _of(study) | {"inits": study.inits, "trails": trails}


def show_through(study: Study) -> None:
    """The barrier between two copies against the step of training at which they are compared."""
    fig, ax = plt.subplots(figsize=(7.4, 3.8))
    trails = {f"copies part at k = {k}": trail(study, k) for k in study.along}
    drawn = plots.against_k(
        ax,
        trails,
        steps=study.steps,
        axis="linear",
        xlabel="step of training at which the copies are compared, and its share",
    )
    figures.publish(fig, "through", data=drawn, values=through_values(study))


def records() -> list[Record]:
    """What was recorded of this chapter on other machines."""
    return recorded.load(CHAPTER)


def recorded_values(found: Sequence[Record], figure: str) -> Values:
    """What the caption of a figure of records says: each curve's first and last barrier."""
    drawn = [r for r in found if figure in r.data["figures"]]
    return {
        "ends": "; ".join(f"{r.name}: {recorded.extremes(r, figure)}" for r in drawn),
        "titles": " ".join(f"{r.title}." for r in drawn),
    }


def show_recorded(found: Sequence[Record], figure: str, name: str) -> None:
    """A figure of this chapter from every record that has it, a panel each; else nothing.

    Arguments:
        figure: what is drawn, as the record calls it.
        name: of the new figure.
    """
    if curves := recorded.curves(found, figure):
        fig, drawn = plots.panels(curves)
        figures.publish(fig, name, data=drawn, values=recorded_values(found, figure))


def by_mode(study: Study) -> dict[str, dict[int, Interval]]:
    """BatchNorm's statistics -> fork step -> barrier; empty for a network without BatchNorm."""
    found = study.forks
    return {
        f"statistics {MODES[mode]}, test": {
            k: v for k in study.ks if (v := found.interval(k, bn=mode))
        }
        for mode in found.modes
        if mode in MODES
    }


def batchnorm_values(study: Study) -> Values:
    """What the caption of ``batchnorm`` says."""
    curves = by_mode(study)
    return _of(study) | {"modes": "; ".join(f"{m} {_series(v)}" for m, v in curves.items())}


def show_batchnorm(study: Study) -> None:
    """The barrier under three kinds of BatchNorm statistics; nothing without BatchNorm."""
    if curves := by_mode(study):
        fig, ax = plt.subplots(figsize=(7.4, 4.0))
        drawn = plots.against_k(ax, curves, steps=study.steps)
        figures.publish(fig, "batchnorm", data=drawn, values=batchnorm_values(study))


# Tables


def show_gates(study: Study) -> None:
    """The gates of the first pair, by their words, and how many pairs failed one."""
    both = (study.forks, study.gentle_forks)
    outcome = {True: "passed", False: "FAILED", None: "does not apply"}
    first = study.forks.samples[0]
    rows = [
        (gate.name.partition(" ")[2], outcome[gate.passed], gate.detail)
        for gate in first.result.barrier.gates
    ]
    values: Values = {
        "count": sum(len(found.samples) for found in both),
        "failed": sum(len(found.invalid()) for found in both),
    }
    tables.show(["check", "outcome", "what it saw"], rows, name="gates", values=_of(study) | values)


def show_barriers(study: Study) -> None:
    """Every barrier, by both definitions, on train and test data, and its verdict."""

    def row(name: str, found: Instability, k: int) -> list[Any]:
        intervals = [
            found.interval(k),
            found.interval(k, "train"),
            found.interval(k, "test", "error", "linear"),
            found.interval(k, "test", "loss"),
        ]
        shown = [v or "no valid pair" for v in intervals]
        return [name, f"{k} ({k / study.steps:.1%})", *shown, found.verdict(k)]

    columns = [
        "network",
        "k",
        "test barrier (points)",
        "train barrier (points)",
        "test, above the line of the ends (points)",
        "test loss barrier (nats)",
        "verdict",
    ]
    both = {study.network: study.forks, study.calm: study.gentle_forks}
    rows = [row(name, found, k) for name, found in both.items() for k in found.ks]
    tables.show(columns, rows, name="barriers", values=_of(study))


# Sentences that depend on the outcome, and numbers of the prose


def onset_sentence(study: Study) -> str:
    """From which fork step on the noisy network is stable."""
    try:
        onset = study.forks.onset()
    except NotMeasured as why:  # a recording that was closed still has its figures
        return str(why)
    if onset is None:
        return f"At no step of this grid does the barrier stay below {THRESHOLD:g} points."
    share = _share(onset, study)
    return f"From k = {onset} on ({share}) the barrier stays below {THRESHOLD:g} points."


def restart_sentence(study: Study) -> str:
    """How the two ways of training compare (Fig. 4)."""
    pairs, disagree = both_ways(study), _disagreement(study)
    if not pairs:
        return "This run left it out."
    apart = [k for k, (a, b) in pairs.items() if a.high < b.low or b.high < a.low]
    widest = max(abs(a.value - b.value) for a, b in pairs.values())
    overlap = (
        f"do not overlap at k = {', '.join(map(str, apart))}" if apart else "overlap at every k"
    )
    by_chance = (
        f". They fall on different sides of {THRESHOLD:g} points at {disagree}"
        + ("; a mean that lies on that line does so by chance" if not apart else "")
        if disagree
        else ""
    )
    return (
        f"The intervals of the two ways {overlap}, and their means differ by {widest:.2f} points "
        f"at most{by_chance}."
    )


def noise_sentence(study: Study) -> str:
    """The barrier at the first fork step under each source of noise."""
    said = {NOISES[name]: found.interval(study.first) for name, found in study.by_noise.items()}
    if len(said) == 1:
        return "This run has one source of noise, so there is nothing to take apart."
    points = "; ".join(f"{name} {v or 'no valid pair'}" for name, v in said.items())
    return f"In points, for copies that part at k = {study.first}: {points}."


def separation_sentence(study: Study) -> str:
    """Whether distance tells unstable pairs from stable ones within this recipe."""
    found = separation(study)
    if np.isnan(found):
        return "All pairs of this run fall on one side of the line, so it cannot say."
    return f"An unstable pair is farther apart than a stable one with probability {found:.2f}."


def values(study: Study) -> Values:
    """The numbers and sentences of the chapter's prose."""
    found, images = study.forks, study.images
    ends = [e for pairs in _curves(study).values() for c in pairs for e in c.ends()]
    looked = trail(study, study.first)
    return _of(study) | {
        "train_images": f"{len(images.train):,}",
        "test_images": f"{len(images.test):,}",
        "pixels": " × ".join(map(str, images.in_shape[1:])),
        "classes": images.classes,
        "one_image": 100 / len(images.test),
        "last_share": _share(study.last, study),
        "wall_first": _points(found.interval(study.first)),
        "wall_last": _points(found.interval(study.last)),
        "wall_calm": _points(study.gentle_forks.interval(study.first)),
        "wall_slow": _points(slowed(study)),
        "wall_strangers": _points(unrelated(study)),
        "wall_trail": _points(looked.get(study.steps)),
        "end_error": f"{np.mean(ends):.1f}" if ends else "no valid pair",
        "apart_first": _points(distances(study, "ab").get(study.first)),
        "apart_last": _points(distances(study, "ab").get(study.last)),
        "travelled_last": _points(distances(study, "a_init").get(study.last)),
        "onset_sentence": onset_sentence(study),
        "restart_sentence": restart_sentence(study),
        "noise_sentence": noise_sentence(study),
        "separation_sentence": separation_sentence(study),
        "unlearned": gates.UNLEARNED,
    }


RECORDS = {"mnist": "cpu-mnist", "small": "cpu-cifar10", "gpu": "gpu-cifar10-jpeg"}
"""Name in the prose -> the record that it discusses."""


def record_values(found: Sequence[Record]) -> Values:
    """What the prose says of the records by name, or that they have no such number."""
    by_name = {record.name: record for record in found}
    out: Values = {}
    for short, name in RECORDS.items():
        here = [by_name[name]] if name in by_name else []
        runs = recorded.curves(here, "instability").values()
        ends = [
            f"{p[min(p)].value:.1f} points at k = {min(p)}, {p[max(p)].value:.1f} at k = {max(p)}"
            for _, curves in runs
            for p in curves.values()
        ]
        noisy, calm, *_ = [*ends, "not recorded", "not recorded"]
        out |= {f"{short}_noisy": noisy, f"{short}_calm": calm}
        by_mode = recorded.curves(here, "batchnorm").values()
        for mode, words in MODES.items():
            points = next((c[f"statistics {words}, test"] for _, c in by_mode), None)
            out[f"{short}_{mode}"] = _points(points[min(points)]) if points else "not recorded"
    return out
