"""Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis".

From which step on do two copies of a network, finished under different SGD noise, stay connected?
Two networks are compared: one that sees much noise, and one that is trained gently. ::

    study = design(dataset="digits")
    study.forks.onset()  # Algorithm 1, run when it is first asked for
    claims.verdicts(CLAIMS, study)

Explained in our chapter 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations
from typing import Any

import numpy as np

from companion import data
from companion.connectivity import Curve, Plane, gates, plane
from companion.core import codec, stats
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
from companion.models import may_have_batchnorm, title
from companion.papers.forked import Forked
from companion.report import claims, figures, plots, provenance, recorded, tables
from companion.report.claims import Need, Statistic, statistic
from companion.report.recorded import Record
from companion.report.words import Values, counted, listed, said
from companion.training import Recipe, build, load_weights

CHAPTER = "01_instability"

NOISES = {"both": "order and augmentation", "order": "order", "augment": "augmentation"}
"""What differs between copies -> the same for people."""

MODES = {"interpolate": "interpolated", "reestimate": "re-estimated", "batch": "of the batch"}
"""BatchNorm's statistics on the line -> the same for people."""

LARGER = 8
"""How many times as many examples a large batch holds."""


# The design


@dataclass(frozen=True, eq=False)
class Study(Forked):
    """The chapter's experiment. A property that trains or measures does so once, when first read.

    Arguments:
        noisy, gentle: recipes of the network that sees much noise, and of the calm one.
        images: the dataset.
        ks: fork steps, sorted.
        inits, copies: independent W_0, and copies of each W_k.
        looks: steps at which copies are compared while they train.
        controls: whether to run what the claims C05, C06, C25, C26 and C28 need.
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
    def recipe(self) -> Recipe:
        """The noisy network's."""
        return self.noisy

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
    def large(self) -> Recipe | None:
        """The noisy network with larger batches, for as many epochs; None: too few data."""
        batch, steps = LARGER * self.noisy.batch, max(1, self.steps // LARGER)
        fits = batch <= len(self.images.train)
        return replace(self.noisy, batch=batch, steps=steps) if fits else None

    @property
    def noises(self) -> tuple[str, ...]:
        """The sources of noise that are tried alone."""
        return ("order", "augment") if self.controls and self.noisy.augment != "none" else ()

    @property
    def _where(self) -> dict[str, Any]:
        return {"evaluation": self.evaluation, "device": self.device, "workers": self.workers}

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
    def enlarged(self) -> Instability | None:
        """The noisy network with larger batches; None without controls, or with too few data."""
        return self._analyse(self.large, [self.first]) if self.controls and self.large else None

    @cached_property
    def perturbed(self) -> Instability | None:
        """Copies under the same noise, in each of which one weight is moved at the first fork step;
        None without controls."""
        return self._analyse(self.noisy, [self.first], noise="perturb") if self.controls else None

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

    def _analyse(
        self, recipe: Recipe, ks: Sequence[int], *, controls: bool = False, **how: Any
    ) -> Instability:
        """Algorithm 1; its controls, the gates of the whole experiment, run once."""
        how |= {"inits": self.inits, "copies": self.copies, "max_error": self.max_error}
        return analyse(recipe, ks, controls=controls, **self._where, **how)

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
            *(
                plan_forks(recipe, [self.first], how, **few)
                for recipe in (self.slow, self.large)
                if self.controls and recipe
            ),
            plan_independent(self.noisy, how, inits=max(self.inits, 2)),
            *(
                plan_forks(self.noisy, [self.first], how, noise=n, **few)
                for n in (*self.noises, *(("perturb",) if self.controls else ()))
            ),
        ]

    # What the page says of it

    @property
    def network(self) -> str:
        """The noisy network, for people."""
        return self._names[0]

    @property
    def calm(self) -> str:
        """The gentle network, for people."""
        return self._names[1]

    @property
    def _names(self) -> tuple[str, str]:
        """Both; where two would have one name, their recipes' names."""
        nets = self.noisy.net, self.gentle.net
        noisy, gentle = map(title, nets)
        return nets if noisy == gentle and nets[0] != nets[1] else (noisy, gentle)

    @property
    def scale(self) -> str:
        """What the numbers rest on, in a line."""
        hardware = provenance.hardware(self.device)
        return (
            f"{self.images.label}, {self.network} and {self.calm}, T = {self.steps}, "
            f"{self.inits} inits × {self.copies} copies{self.statistics}, {hardware}"
        )

    @property
    def statistics(self) -> str:
        """Which statistics BatchNorm has on a line, the headline; empty for a network without."""
        return f", BatchNorm's statistics {MODES[mode]}" if (mode := self._mode) else ""

    @property
    def _mode(self) -> str:
        """The headline's key in :data:`MODES`; empty without BatchNorm."""
        return self.evaluation.bn if may_have_batchnorm(self.noisy.net) else ""

    def words(self) -> Values:
        """What captions and prose say of the whole page."""
        return {
            "network": self.network,
            "calm": self.calm,
            "data": self.images.label,
            "T": self.steps,
            "first": self.first,
            "last": self.last,
            "inits": self.inits,
            "statistics": self.statistics,
        }

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
        shape: dict[str, Any] = {"net": "resnet20", "steps": 12_000, "batch": 128, "lr": 0.1}
        shape |= {"milestones": (32 / 63, 48 / 63), "weight_decay": 1e-4, "augment": "flip+crop4"}
    else:
        shape = {"net": "mlp:widths=100x5", "steps": 2000, "batch": 60, "milestones": (0.6, 0.85)}
        tiny = dataset == "digits"
        shape |= {"lr": 0.08, "augment": "crop1"} if tiny else {"lr": 0.05, "augment": "none"}
    given = {"steps": steps, "batch": batch, "precision": precision}
    noisy = _with(Recipe(data=dataset, schedule="step", **shape), net=unstable, lr=lr, **given)
    calm: dict[str, Any] = {"net": "lenet-300-100", "optimizer": "adam", "lr": 1.2e-3, "batch": 60}
    calm |= {"steps": shape["steps"], "augment": shape["augment"]}
    gentle = _with(Recipe(data=dataset, **calm), net=stable, **given)
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


def barriers(found: Instability, split: str = "test", bn: str | None = None) -> dict[int, Interval]:
    """Fork step -> the error barrier, mean over pairs; without the steps that have no valid pair.

    Arguments:
        split: test or train.
        bn: BatchNorm's statistics; None: those of the headline.
    """
    return {k: v for k in found.ks if (v := found.interval(k, split, bn=bn))}


def valid_pairs(study: Study, k: int) -> list[Sample]:
    """The pairs of the noisy network that part at step k and passed every gate."""
    return [s for s in study.forks.at(k) if s.result.barrier.valid]


def _measured(study: Study, *ks: int) -> list[Sample]:
    """The valid pairs of the steps at which all pairs were measured."""
    return [s for k in ks if study.forks.measured(k) for s in valid_pairs(study, k)]


def _at_onset(study: Study) -> list[Sample]:
    """The valid pairs of the step from which on copies are certainly stable; none without one."""
    step = study.forks.onset().high
    return valid_pairs(study, int(step)) if math.isfinite(step) else []


def _over(pairs: Sequence[Sample], value: Callable[[Sample], float]) -> Interval | None:
    """Mean and interval over pairs, clustered by init; None without a pair."""
    values, inits = [value(s) for s in pairs], [s.init for s in pairs]
    return stats.clustered(values, inits) if pairs else None


def _by_init(found: Instability, split: str = "test") -> dict[int, dict[int, float]]:
    """Init -> fork step -> its mean barrier, of the inits that have a valid pair at every step."""
    heights = {k: found.values(k, split) for k in found.ks}
    inits = sorted(set.intersection(*({i for i, _ in each} for each in heights.values())))
    return {
        init: {k: float(np.mean([v for i, v in each if i == init])) for k, each in heights.items()}
        for init in inits
    }


def distances(study: Study, name: str) -> dict[int, Interval]:
    """Fork step -> one distance in weight space (:class:`PairResult`), mean over pairs."""
    found = {k: _over(valid_pairs(study, k), lambda s: s.result.distances[name]) for k in study.ks}
    return {k: v for k, v in found.items() if v is not None}


def _heights(pairs: Iterable[tuple[Any, PairResult]]) -> tuple[list[float], list[Any]]:
    """Barriers of the valid pairs, and their labels; nothing before all are measured."""
    pairs = list(pairs)
    good = [(label, r.barrier.height()) for label, r in pairs if r.barrier.valid]
    whole = all(r.measured for _, r in pairs)
    return ([v for _, v in good], [label for label, _ in good]) if whole else ([], [])


def _along(study: Study, k: int) -> dict[int, tuple[list[float], list[int]]]:
    """Training step -> barriers there of copies that part at k, and their inits."""
    found = {step: _heights(pairs) for step, pairs in study.along[k].items()}
    return {step: (values, inits) for step, (values, inits) in found.items() if values}


def trail(study: Study, k: int) -> dict[int, Interval]:
    """Training step -> the test error barrier, at that step, of copies that part at k."""
    return {step: stats.clustered(*group) for step, group in _along(study, k).items()}


def unrelated(study: Study) -> Interval | None:
    """The test error barrier between different initialisations, each of which is in many pairs;
    None without a valid pair."""
    pairs = combinations(range(max(study.inits, 2)), 2)
    values, labels = _heights(zip(pairs, study.strangers, strict=True))
    return stats.over_networks(values, labels) if values else None


def slowed(study: Study) -> Interval | None:
    """The barrier at the first fork step with a tenth of the learning rate."""
    return study.slowed.interval(study.first) if study.slowed else None


def enlarged(study: Study) -> Interval | None:
    """The barrier at the first fork step with larger batches."""
    return study.enlarged.interval(study.first) if study.enlarged else None


def perturbed(study: Study) -> Interval | None:
    """The barrier at the first fork step where copies differ in one weight and in nothing else."""
    return study.perturbed.interval(study.first) if study.perturbed else None


def both_ways(study: Study) -> dict[int, tuple[Interval, Interval]]:
    """Fork step -> the barrier after the steps that are left, and after all T steps again."""
    if study.restarted is None:
        return {}
    pairs = {k: (study.forks.interval(k), study.restarted.interval(k)) for k in study.again}
    return {k: (a, b) for k, (a, b) in pairs.items() if a and b}


def changes(study: Study) -> dict[int, Interval]:
    """Fork step -> by how much the barrier changes if copies train all T steps again, by pairs."""
    if study.restarted is None:
        return {}
    left = {(s.k, s.init, s.copies): s.result.barrier.height() for s in _measured(study, *study.ks)}
    found = {
        k: [
            (s.init, s.result.barrier.height() - left[k, s.init, s.copies])
            for s in study.restarted.at(k)
            if s.result.barrier.valid and (k, s.init, s.copies) in left
        ]
        for k in study.again
        if study.restarted.measured(k)
    }
    return {
        k: stats.clustered([v for _, v in rows], [init for init, _ in rows])
        for k, rows in found.items()
        if rows
    }


def _largest_change(study: Study) -> tuple[int, Interval] | None:
    """The fork step whose interval reaches farthest from 0, and that interval."""
    found = changes(study).items()
    return max(found, key=lambda of: max(abs(of[1].low), abs(of[1].high)), default=None)


def separation(study: Study) -> float:
    """How often an unstable pair is farther apart than a stable one (AUC); NaN without both."""
    pairs = [s.result for s in _measured(study, *study.ks)]
    unstable = [pair.barrier.height() >= THRESHOLD for pair in pairs]
    return stats.auc([pair.distances["ab"] for pair in pairs], unstable)


# Claims: what each needs to be testable, and its statistic

_NEEDS: dict[str, tuple[Callable[[Study], bool], str]] = {
    "init": (lambda s: s.first == 0, "the grid has no k = 0"),
    "inits": (lambda s: s.inits >= 2, "one init decides nothing"),
    "controls": (lambda s: s.controls, "the controls were left out of this run"),
    "stable": (
        lambda s: math.isfinite(s.forks.onset().high),
        "at no k of this grid it is certainly stable from there on",
    ),
    "unstable": (
        lambda s: s.forks.verdict(s.first) == "unstable",
        "it was not certainly unstable at the smallest k",
    ),
    "cifar": (lambda s: s.noisy.data in ("cifar10", "cifar10-jpeg"), "the claim is about CIFAR-10"),
}


def _needs(study: Study, *names: str) -> list[Need]:
    return [(met(study), why) for met, why in (_NEEDS[name] for name in names)]


def _trained_to_the_end(study: Study) -> Need:
    """Shares of a training, and what it ends with, mean something where it came to its end."""
    ends = [s.result.barrier.curve.ends("train") for s in _measured(study, study.first)]
    error = float(np.mean(ends)) if ends else 100
    told = f"the networks end with {error:.0f} % error on their own training images"
    return error <= gates.UNLEARNED, f"training was cut short: {told}"


def _of(study: Study, network: str) -> Need:
    return title(study.noisy.net) == network, f"the claim is about {network}"


def c01(study: Study) -> Statistic:
    """The calm network's barrier at k = 0, the larger of train and test."""
    found = [study.gentle_forks.values(study.first, split) for split in ("train", "test")]
    groups = [([v for _, v in each], [i for i, _ in each]) for each in found if each]
    claim = claims.registry()["C01"]
    return statistic(
        stats.highest(groups) if groups else None,
        *_needs(study, "init", "inits"),
        (bool(groups), f"no valid pair of {study.calm}"),
        (claim.takes(study.noisy.data), claim.about),
    )


def c02(study: Study) -> Statistic:
    """The perceptron's test barrier at k = 0."""
    perceptron = study.noisy.net.startswith("mlp"), "the question is about a perceptron"
    found = study.forks.interval(study.first)
    return statistic(found, *_needs(study, "init", "inits"), perceptron)


def _onset(study: Study, *needs: Need) -> Statistic:
    """The share of training from which on copies are stable."""
    onset = study.forks.onset()
    steps = [f"{k:g}" if math.isfinite(k) else "never" for k in (onset.low, onset.high)]
    between = f"k = {steps[0]}" + (f" to {steps[1]}" if steps[0] != steps[1] else "")
    never = "never on this grid"
    return statistic(
        replace(onset, **{e: getattr(onset, e) / study.steps for e in ("value", "low", "high")}),
        (bool(_measured(study, *study.ks)), "no valid pair"),
        _trained_to_the_end(study),
        *needs,
        *_needs(study, "unstable"),
        detail=never if math.isinf(onset.low) else f"{between} of {study.steps}",
    )


def c03(study: Study) -> Statistic:
    """The share of training from which on copies are stable."""
    early = any(0 < k / study.steps <= 0.05 for k in study.ks)
    return _onset(study, (early, "the grid has no k up to 5 % of training"))


def c04(study: Study) -> Statistic:
    """Spearman's rank correlation of k and the test barrier, one an init."""
    found = [stats.spearman(list(of), list(of.values())) for of in _by_init(study.forks).values()]
    return statistic(
        stats.clustered(found, range(len(found))) if found else None,
        (len(study.forks.ks) >= 4, "a rank correlation needs four k or more"),
        (not any(map(math.isnan, found)), "a barrier that is the same at every k has no trend"),
    )


def c05(study: Study) -> Statistic:
    """The barrier at k = 0 with a tenth of the learning rate."""
    low, standard = slowed(study), study.forks.interval(study.first)
    return statistic(
        low,
        *_needs(study, "init", "inits", "controls", "unstable"),
        detail=f"{standard.value:.2f} points with all of it" if low and standard else "",
    )


def c06(study: Study) -> Statistic:
    """The barrier after all T steps again minus that after the steps that are left."""
    found = _largest_change(study)
    each = {f"k = {k}:": change for k, change in changes(study).items()}
    return statistic(
        found[1] if found else None,
        *_needs(study, "controls", "inits", "unstable"),
        detail=listed(each, "{:+.2f}") if found else "",
    )


def c07(study: Study) -> Statistic:
    """Where copies are stable: their distance over their mean distance from init."""

    def ratio(pair: Sample) -> float:
        d = pair.result.distances
        return 2 * d["ab"] / (d["a_init"] + d["b_init"])

    return statistic(_over(_at_onset(study), ratio), *_needs(study, "stable", "inits"))


def c08(study: Study) -> Statistic:
    """The mean barrier between different initialisations."""
    return statistic(unrelated(study), (study.inits >= 3, "two inits make one pair"))


def _near_guessing(study: Study, network: str) -> Statistic:
    """The highest test error on the line between copies that part at k = 0, mean over pairs."""
    pairs = _measured(study, study.first)

    def top(mode: str) -> Interval | None:
        return _over(pairs, lambda s: max(s.result.barrier.curves[mode].values["test"]["error"]))

    tops = {mode: top(mode) for mode in study.forks.modes}
    return statistic(
        tops["interpolate"] if "interpolate" in tops else top(study.forks.headline),
        *_needs(study, "init", "inits", "cifar"),
        _of(study, network),
        _trained_to_the_end(study),
        detail=f"{study.network}, T = {study.steps}"
        + "".join(
            f"; statistics {MODES[mode]} {v.value:.0f} %"
            for mode, v in tops.items()
            if v and mode in MODES
        ),
    )


def c13(study: Study) -> Statistic:
    """The highest error on the line between copies of ResNet-20 that part at k = 0."""
    return _near_guessing(study, "ResNet-20")


def c14(study: Study) -> Statistic:
    """The same of VGG-16."""
    return _near_guessing(study, "VGG-16")


def c15(study: Study) -> Statistic:
    """The share of training from which on copies of ResNet-20 are stable."""
    return _onset(study, *_needs(study, "cifar"), _of(study, "ResNet-20"))


def c16(study: Study) -> Statistic:
    """The same of VGG-16."""
    return _onset(study, *_needs(study, "cifar"), _of(study, "VGG-16"))


def c17(study: Study) -> Statistic:
    """The absolute difference of train and test barrier over the fork steps, one an init."""
    test, train = _by_init(study.forks), _by_init(study.forks, "train")
    gaps = [np.mean([abs(v - train[i][k]) for k, v in of.items()]) for i, of in test.items()]
    convolutional = any(name in study.noisy.net for name in ("resnet", "vgg"))
    return statistic(
        stats.clustered([float(gap) for gap in gaps], range(len(gaps))) if gaps else None,
        *_needs(study, "cifar", "inits"),
        (convolutional, "the claim is about convolutional networks"),
    )


def c23(study: Study) -> Statistic:
    """The largest mean barrier, over training steps, of copies that part at the last k."""
    way = _along(study, study.last)
    connected = study.forks.verdict(study.last) == "stable"
    return statistic(
        stats.highest(list(way.values())) if way else None,
        (connected, f"copies that part at k = {study.last} do not certainly end connected"),
        detail=f"k = {study.last}, {len(way)} steps",
    )


def c24(study: Study) -> Statistic:
    """Area under the ROC curve of distance as a predictor of instability."""
    return statistic(separation(study), n=len(_measured(study, *study.ks)))


def c25(study: Study) -> Statistic:
    """The barrier at k = 0 with batches 8 times as large, for as many epochs."""
    enough = study.large is not None, f"the data have no batch of {LARGER * study.noisy.batch}"
    trained = ""
    if study.large:
        trained = f"batches of {study.large.batch} for {study.large.steps} steps"
    return statistic(
        study.enlarged.interval(study.first) if study.enlarged else None,
        *_needs(study, "init", "inits", "controls", "unstable"),
        enough,
        detail=trained,
    )


def c26(study: Study) -> Statistic:
    """The barrier at k = 0 after one weight was moved, under the same noise."""
    found = perturbed(study)
    standard = study.forks.interval(study.first)
    return statistic(
        found,
        *_needs(study, "init", "inits", "controls", "unstable"),
        detail=f"{standard.value:.1f} points with all the noise" if found and standard else "",
    )


def c27(study: Study) -> Statistic:
    """Where copies are stable: test error at the fork over that at the end."""

    def ratio(pair: Sample) -> float:
        end = float(np.mean(pair.result.barrier.curve.ends()))
        return pair.result.start["test"].error / max(end, 1e-9)

    return _early(study, ratio)


def _early(study: Study, value: Callable[[Sample], float]) -> Statistic:
    """Something of the step from which on copies are stable, which they were not at first."""
    return statistic(
        _over(_at_onset(study), value),
        *_needs(study, "stable", "unstable", "inits"),
        _trained_to_the_end(study),
    )


def c28(study: Study) -> Statistic:
    """The smallest of the barriers at k = 0 under order, augmentation, and both."""
    found = {name: f.interval(study.first) for name, f in study.by_noise.items()}
    there = {name: v.value for name, v in found.items() if v is not None}
    return statistic(
        min(there.values()) if len(there) == 3 else None,
        *_needs(study, "init", "controls"),
        n=len(study.forks.at(study.first)),
        detail=", ".join(f"{name} {v:.1f}" for name, v in there.items()),
    )


def c29(study: Study) -> Statistic:
    """Where copies are stable: distance from init to fork over that from fork to copy."""

    def ratio(pair: Sample) -> float:
        d = pair.result.distances
        return 2 * d["start_init"] / (d["a_start"] + d["b_start"])

    return _early(study, ratio)


def c30(_: Study) -> Statistic:
    """How disagreement goes with instability: it is not measured."""
    return statistic(None, (False, "what copies answer image by image is not kept here"))


_ALL = (
    *(c01, c02, c03, c04, c05, c06, c07, c08, c13, c14, c15),
    *(c16, c17, c23, c24, c25, c26, c27, c28, c29, c30),
)
CLAIMS: dict[str, Callable[[Study], Statistic]] = {f.__name__.upper(): f for f in _ALL}
"""Claim id -> its statistic, in the order of the table."""


# Figures and tables, and the values of their captions

_points = partial(said, form="{:.1f}", missing="no valid pair")


def _share(step: int, study: Study) -> str:
    return f"{100 * step / study.steps:.3g} % of training"


def _series(points: Mapping[int, Interval]) -> str:
    """For an alternative text: ``21.8 at k = 0, 1.5 at k = 100``."""
    return ", ".join(f"{_points(v)} at k = {k}" for k, v in points.items()) or "no valid pair"


def _show_against_k(
    study: Study,
    name: str,
    curves: Mapping[str, Mapping[int, Interval]],
    *,
    height: float,
    values: Values,
    **look: Any,
) -> None:
    fig, (ax,) = plots.grid(1, height=height, width=7.4)
    drawn = plots.against_k(ax, curves, steps=study.steps, **look)
    figures.publish(fig, name, data=drawn, values=values)


def planes(study: Study) -> dict[int, Plane]:
    """Fork step -> the plane through W_0 and two copies of the first initialisation."""
    start = load_weights(trunk(study.noisy, 0), 0, device=study.device)
    module = build(trunk(study.noisy, 0), study.images, study.images.train.x.device)
    test = {"test": study.images.test.head(500 if study.device == "cpu" else 2000)}

    def end(k: int, number: int) -> Theta:
        return load_weights(copy(study.noisy, 0, k, number), device=study.device)

    return {k: plane(module, start, end(k, 1), end(k, 2), test) for k in study.ks}


def show_plane(study: Study) -> None:
    """Test error on the plane through W_0 and two copies, for the first and the last fork step.

    The data behind it has the planes and the lines of all fork steps: the front page shows them.
    """
    found = planes(study)
    lines = {  # of the very copies that span the plane
        k: study.forks.at(k)[0].result.barrier.curve.values["test"]["error"] for k in found
    }
    fig, axes = plots.grid(2, height=4.2)
    ends = {"peak_first": study.first, "peak_last": study.last}
    plots.planes(axes, {str(k): found[k] for k in ends.values()})
    for ax, k in zip(axes, ends.values(), strict=True):
        ax.set_title(f"copies part at k = {k}")
    drawn = {str(k): {**codec.to_json(found[k]), "line": lines[k]} for k in found}
    peaks: Values = {name: max(lines[k]) for name, k in ends.items()}
    figures.publish(fig, "plane", data=drawn, values=peaks)


def _curves(study: Study) -> dict[int, list[Curve]]:
    """Fork step -> the curves of its valid pairs, where there are any."""
    found = {k: [s.result.barrier.curve for s in valid_pairs(study, k)] for k in study.ks}
    return {k: curves for k, curves in found.items() if curves}


def show_line(study: Study) -> None:
    """Test error and loss on the line between two copies, a curve for each fork step."""
    found = _curves(study)
    groups = {f"k = {k} ({k / study.steps:.1%})": curves for k, curves in found.items()}
    fig, axes = plots.grid(2, width=8.4)
    drawn = {
        metric: plots.lines(ax, groups, metric=metric)
        for ax, metric in zip(axes, ("error", "loss"), strict=True)
    }
    plots.legend(fig, len(groups))
    errors = {k: [c.values["test"]["error"] for c in curves] for k, curves in found.items()}
    middles = {k: np.mean([e[len(e) // 2] for e in each]) for k, each in errors.items()}
    values: Values = {"pairs": len(study.forks.at(study.first))}
    values["middles"] = ", ".join(f"{v:.1f} for k = {k}" for k, v in middles.items())
    figures.publish(fig, "line", data=drawn, values=values)


def show_instability(study: Study) -> None:
    """The test error barrier against the fork step, for both networks."""
    noisy, calm = barriers(study.forks), barriers(study.gentle_forks)
    curves = {f"{study.network}, test": noisy, f"{study.calm}, test": calm}
    values: Values = {
        "pairs_each": study.copies * (study.copies - 1) // 2,
        "onset_sentence": onset_sentence(study),
        "noisy_points": _series(noisy),
        "calm_points": _series(calm),
    }
    _show_against_k(study, "instability", curves, height=4.2, values=values)


def show_controls(study: Study) -> None:
    """The barrier at the first fork step with less noise, and with another start."""
    null = study.forks.samples[0].result.barrier.gate("G1").value
    found = {
        "same noise twice": None if null is None else Interval(null, 0.0, 0.0, 1, 1),
        "a tenth of the learning rate": slowed(study),
        f"batches {LARGER} times as large": enlarged(study),
        f"the network itself, k = {study.first}": study.forks.interval(study.first),
        "other initialisations": unrelated(study),
    }
    rows = {name: v for name, v in found.items() if v is not None}
    fig, (ax,) = plots.grid(1, height=2.8, width=7.4)
    drawn = plots.conditions(ax, rows)
    figures.publish(fig, "controls", data=drawn, values={"rows": listed(rows, "{:.1f} points")})


def show_restart(study: Study) -> None:
    """The barrier after the steps that are left, and after all T; nothing without controls."""
    if study.restarted is None:
        return
    left = {k: v for k, v in barriers(study.forks).items() if k > 0}
    curves = {"T − k steps left": left, "all T steps again": barriers(study.restarted)}
    pairs = both_ways(study)
    values: Values = {
        name: _series({k: ways[number] for k, ways in pairs.items()})
        for number, name in enumerate(("left_points", "all_points"))
    }
    _show_against_k(study, "restart", curves, height=3.8, values=values)


def show_distance(study: Study) -> None:
    """Distances in weight space against the fork step."""
    names = {
        "between the copies, |A − B|": "ab",
        "from init to copy, |A − W₀|": "a_init",
        "from fork to copy, |A − Wₖ|": "a_start",
        "from init to fork, |Wₖ − W₀|": "start_init",
    }
    curves = {label: distances(study, name) for label, name in names.items()}
    values = _lengths(study) | {"apart_points": _series(distances(study, "ab"))}
    look: dict[str, Any] = {"threshold": None, "ylabel": "Euclidean distance of the weights"}
    _show_against_k(study, "distance", curves, height=4.0, values=values, **look)


def _lengths(study: Study) -> Values:
    """How far copies that part at the last step are apart, and from where they began."""
    names = {"apart_last": "ab", "travelled_last": "a_init"}
    return {word: _points(distances(study, name).get(study.last)) for word, name in names.items()}


def show_through(study: Study) -> None:
    """The barrier between two copies against the step of training at which they are compared."""
    trails = {k: trail(study, k) for k in study.along}
    told = "; ".join(
        f"parted at {k}: "
        + ", ".join(f"{_points(v)} points at step {step}" for step, v in found.items())
        for k, found in trails.items()
    )
    curves = {f"copies part at k = {k}": found for k, found in trails.items()}
    xlabel = "step of training at which the copies are compared, and its share"
    look: dict[str, Any] = {"axis": "linear", "xlabel": xlabel}
    _show_against_k(study, "through", curves, height=3.8, values={"trails": told}, **look)


def by_mode(study: Study) -> dict[str, dict[int, Interval]]:
    """BatchNorm's statistics -> fork step -> barrier; empty for a network without BatchNorm."""
    modes = [mode for mode in study.forks.modes if mode in MODES]
    return {f"statistics {MODES[mode]}, test": barriers(study.forks, bn=mode) for mode in modes}


def show_batchnorm(study: Study) -> None:
    """The barrier under three kinds of BatchNorm statistics; nothing without BatchNorm."""
    if curves := by_mode(study):
        told = "; ".join(f"{mode} {_series(points)}" for mode, points in curves.items())
        _show_against_k(study, "batchnorm", curves, height=4.0, values={"modes": told})


def show_gates(study: Study) -> None:
    """The gates of the first pair, by their words, and how many pairs failed one."""
    both = (study.forks, study.gentle_forks)
    outcome = {True: "passed", False: "FAILED", None: "does not apply"}
    rows = [
        (gate.name.partition(" ")[2], outcome[gate.passed], gate.detail)
        for gate in study.forks.samples[0].result.barrier.gates
    ]
    values: Values = {
        "count": sum(len(found.samples) for found in both),
        "failed": sum(len(found.invalid()) for found in both),
    }
    tables.show(["check", "outcome", "what it saw"], rows, name="gates", values=values)


def show_barriers(study: Study) -> None:
    """Every barrier, by both definitions, on train and test data, and its verdict."""
    columns: dict[str, tuple[str, ...]] = {
        "test barrier (points)": (),
        "train barrier (points)": ("train",),
        "test, above the line of the ends (points)": ("test", "error", "linear"),
        "test loss barrier (nats)": ("test", "loss"),
    }
    rows = []
    for name, found in ((study.network, study.forks), (study.calm, study.gentle_forks)):
        for k in found.ks:
            shown = [found.interval(k, *how) or "no valid pair" for how in columns.values()]
            rows.append([name, f"{k} ({k / study.steps:.1%})", *shown, found.verdict(k)])
    tables.show(["network", "k", *columns, "verdict"], rows, name="barriers")


# Sentences that depend on the outcome, and numbers of the prose


def onset_sentence(study: Study) -> str:
    """From which fork step on the noisy network is stable."""
    try:
        onset = study.forks.onset()
    except NotMeasured as why:  # a recording that was closed still has its figures
        return str(why)
    if math.isinf(onset.low):
        return f"At no step of this grid does the barrier stay below {THRESHOLD:g} points."
    above = max((k for k in study.ks if k < onset.low), default=None)
    certain, line = math.isfinite(onset.high), f"{THRESHOLD:g} points"
    few = counted(study.inits, "initialisation")
    told = []
    if above is not None:
        told.append(f"At k = {above} the barrier is still above {line}.")
    if certain:
        share = _share(int(onset.high), study)
        told.append(f"From k = {onset.high} on ({share}) it is below {line}.")
    if onset.low < onset.high:
        known = above is not None, certain
        where = {(False, True): "Before that", (True, False): "After that"}
        where |= {(True, True): "In between", (False, False): f"To say whether it is below {line}"}
        told.append(f"{where[known]}, {few} are too few to tell.")
    return " ".join(told)


def restart_sentence(study: Study) -> str:
    """How the two ways of training compare (Fig. 4)."""
    found = _largest_change(study)
    if found is None:
        return "This run left it out." if study.restarted is None else "No pair is valid."
    k, change = found
    told = f"The barrier changes by {said(change)} points at k = {k}"
    ends = f"90 % interval {said(change.low)} to {said(change.high)}"
    return f"{told} ({ends}); no other fork step has an interval that reaches farther from 0."


def noise_sentence(study: Study) -> str:
    """The barrier at the first fork step under each source of noise."""
    found = {NOISES[name]: one.interval(study.first) for name, one in study.by_noise.items()}
    if len(found) == 1:
        return "This run has one source of noise, so there is nothing to take apart."
    points = "; ".join(f"{name} {v or 'no valid pair'}" for name, v in found.items())
    known = [v for v in found.values() if v is not None]
    alike = len(known) == len(found) and max(v.low for v in known) < min(v.high for v in known)
    reading = "overlap: either source alone does about as much as both together"
    if not alike:
        reading = "do not all overlap, so the sources are not alike here"
    return f"At k = {study.first}, in points: {points}. The intervals {reading}."


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
    walls = {
        "first": found.interval(study.first),
        "last": found.interval(study.last),
        "calm": study.gentle_forks.interval(study.first),
        "slow": slowed(study),
        "perturbed": perturbed(study),
        "large": enlarged(study),
        "strangers": unrelated(study),
        "trail": trail(study, study.first).get(study.steps),
    }
    trails = [[v.value for v in trail(study, k).values()] for k in (study.first, study.last)]
    return {
        "train_images": f"{len(images.train):,}",
        "test_images": f"{len(images.test):,}",
        "pixels": " × ".join(map(str, images.in_shape[1:])),
        "classes": images.classes,
        "one_image": 100 / len(images.test),
        "last_share": _share(study.last, study),
        **{f"wall_{name}": _points(wall) for name, wall in walls.items()},
        **_lengths(study),
        "trail_first_least": said(min(trails[0], default=None), "{:.1f}"),
        "trail_last_most": said(max(trails[1], default=None), "{:.1f}"),
        "end_error": f"{np.mean(ends):.1f}" if ends else "no valid pair",
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
    out: Values = {}
    for short, name in RECORDS.items():
        walls, modes = (
            next((curves for _, curves in runs.values()), {})
            for runs in (
                recorded.curves([r for r in found if r.name == name], figure)
                for figure in ("instability", "batchnorm")
            )
        )
        ends = [*map(recorded.ends, walls.values()), "not recorded", "not recorded"]
        out |= {f"{short}_noisy": ends[0], f"{short}_calm": ends[1]}
        for mode, words in MODES.items():
            points = modes.get(f"statistics {words}, test")
            out[f"{short}_{mode}"] = _points(points[min(points)]) if points else "not recorded"
    return out
