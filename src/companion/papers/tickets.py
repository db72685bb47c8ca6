"""Frankle et al. 2020, the second half: lottery tickets, and whether SGD noise moves them.

Iterative magnitude pruning (IMP) with rewinding to step k, its controls, and the claim that names
the paper: sparse subnetworks train to the whole network's error exactly where they are stable. ::

    study = design(dataset="digits")
    study.found.error("imp", 9, 0)  # trained when it is first asked for
    claims.verdicts(CLAIMS, study)

Explained in our chapter on lottery tickets.
Source: Frankle et al. 2020, Sections 3 and 4; Paul et al. 2023; Adnan et al. 2025.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from companion import data
from companion.connectivity.gates import UNLEARNED
from companion.core import stats
from companion.core.errors import BadParameter, NotMeasured
from companion.core.stats import Interval
from companion.data import Dataset
from companion.experiments.budget import Plan
from companion.experiments.instability import (
    THRESHOLD,
    Instability,
    analyse,
    check_design,
    plan_forks,
)
from companion.experiments.pairs import Evaluation
from companion.experiments.tickets import (
    Search,
    Tickets,
    check_search,
    find_tickets,
    plan_tickets,
)
from companion.models import title
from companion.papers.forked import Forked
from companion.report import figures, plots, provenance, recorded, tables
from companion.report.claims import Need, Statistic, statistic
from companion.report.recorded import Record
from companion.report.words import Values, counted, listed, said
from companion.tickets import Pruning
from companion.training import Recipe

CHAPTER = "01b_tickets"

NAMES = {
    "imp": "IMP",
    "random": "pruned at random",
    "reinit": "IMP's mask, new initialisation",
    "permuted": "the mask carried over, new initialisation",
}
"""Kinds of subnetworks that the page compares -> their names for people."""

ALIVE = 50.0
"""Percent: with more errors than this an end counts as dead, and its barrier as invalid. It is what
:func:`companion.experiments.tickets.find_tickets` asks of sparse networks."""

# ---- the design


@dataclass(frozen=True, eq=False)
class Study(Forked):
    """The chapter's experiment. A property that trains or measures does so once, when first read.

    Arguments:
        images: the dataset.
        search: the chains of IMP, random pruning and reinitialisation, for every k.
        level: the rounds of pruning after which subnetworks are judged.
        dense_ks: fork steps at which the whole network is measured.
        carried: whether masks are also carried to a new initialisation.
        evaluation, device, workers: as :func:`companion.experiments.tickets.find_tickets`.
    """

    images: Dataset
    search: Search
    level: int
    dense_ks: tuple[int, ...]
    carried: bool
    evaluation: Evaluation
    device: str
    workers: int

    @property
    def recipe(self) -> Recipe:
        """How all networks train."""
        return self.search.recipe

    @property
    def ks(self) -> tuple[int, ...]:
        """The steps that subnetworks are rewound to, sorted."""
        return self.search.ks

    @property
    def new_start(self) -> Search:
        """The mask on a new initialisation, as it is and carried over, at the last k."""
        kinds = ("reinit", "permuted")
        levels = self.search.levels_of("reinit")
        return replace(self.search, ks=(self.last,), kinds=kinds, levels=levels, chains=False)

    @property
    def _where(self) -> dict[str, Any]:
        return {"evaluation": self.evaluation, "device": self.device, "workers": self.workers}

    # What is trained and measured

    @cached_property
    def found(self) -> Tickets:
        """Algorithm 2 and its controls, for every k."""
        return find_tickets(self.search, **self._where)

    @cached_property
    def whole(self) -> Instability:
        """Algorithm 1 on the whole network."""
        shape: dict[str, Any] = {"inits": self.search.inits, "copies": self.search.copies}
        how: dict[str, Any] = {**shape, "max_error": ALIVE, "controls": False}
        return analyse(self.recipe, self.dense_ks, **how, **self._where)

    @cached_property
    def renewed(self) -> Tickets | None:
        """Masks on a new initialisation; None without those that are carried over."""
        if not self.carried:
            return None
        return find_tickets(self.new_start, controls=False, **self._where)

    def plans(self) -> list[Plan]:
        """All of the above, for :func:`companion.report.page.budget`."""
        shape: dict[str, Any] = {"inits": self.search.inits, "copies": self.search.copies}
        new = [plan_tickets(self.new_start, self.evaluation, controls=False)] * self.carried
        return [
            plan_tickets(self.search, self.evaluation),
            plan_forks(self.recipe, self.dense_ks, self.evaluation, **shape, controls=False),
            *new,
        ]

    # What the page says of it

    @property
    def network(self) -> str:
        """The network, for people."""
        return title(self.recipe.net)

    @property
    def scale(self) -> str:
        """What the numbers rest on, in a line."""
        search, hardware = self.search, provenance.hardware(self.device)
        return (
            f"{self.images.label}, {self.network}, T = {self.steps}, k = "
            f"{', '.join(map(str, search.ks))}, down to {self.share(search.levels[-1])} of the "
            f"weights, {search.inits} inits × {search.copies} copies, {hardware}"
        )

    def share(self, level: int) -> str:
        """The density of a level: ``13.4 %``."""
        return f"{100 * self.search.density(level):.3g} %"

    def words(self) -> Values:
        """What captions and prose say of the whole page."""
        search = self.search
        return {
            "network": self.network,
            "data": self.images.label,
            "T": self.steps,
            "first": self.first,
            "last": self.last,
            "last_share": f"{100 * self.last / self.steps:.3g} %",
            "rounds": self.level,
            "density": self.share(self.level),
            "sparsest": self.share(search.levels[-1]),
            "inits": search.inits,
            "copies": search.copies,
            "weights": "all but the last layer" if search.pruning.skip else "all layers",
        }

    def record(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The provenance of the page."""
        return provenance.record(
            dataset={"name": self.images.label, "sha256": self.images.fingerprint},
            recipe=self.recipe.identity(),
            parameters=parameters,
            device=self.device,
        )


def design(
    *,
    dataset: str = "digits",
    net: str | None = None,
    steps: int | None = None,
    lr: float | None = None,
    warmup: int = 0,
    batch: int | None = None,
    ks: Sequence[int] | None = None,
    dense_ks: Sequence[int] | None = None,
    level: int = 9,
    levels: Sequence[int] = (1, 3, 6, 9, 12),
    control_levels: Sequence[int] = (6, 9, 12),
    skip: Sequence[str] | None = None,
    inits: int = 4,
    copies: int = 2,
    carried: bool = True,
    points: int = 11,
    train_examples: int | None = 500,
    test_examples: int | None = None,
    bn: str = "interpolate",
    precision: str = "float32",
    device: str = "auto",
    workers: int = 0,
) -> Study:
    """The recipe, the levels and steps, and what is measured. Nothing is trained.

    For colour images on a GPU the network is the paper's ResNet-20, and one that is named trains
    the same way; for grey images of MNIST's size it is the paper's LeNet-300-100 with Adam. For
    ``digits``, and for colour images on a CPU, it is a five-layer perceptron with a large step,
    which is unstable at initialisation.

    The arguments are the chapter's parameters; None stands for the dataset's own.

    Raises:
        BadParameter, MissingData, DeviceUnavailable: whatever is wrong with them.

    Source: Frankle et al. 2020, Table 1 (ResNet-20, VGG-16, LeNet-300-100); the perceptron is ours.
    """
    device = str(data.resolve_device(device))
    images = data.load(dataset, device)
    convolutional = device != "cpu" if net is None else net.startswith(("resnet", "vgg"))
    shape: dict[str, Any] = {"steps": 2000, "batch": 60}
    if images.in_shape[0] == 3 and convolutional:
        shape = {"net": "resnet20", "steps": 12_000, "batch": 128, "lr": 0.1, "schedule": "step"}
        shape |= {"milestones": (32 / 63, 48 / 63), "weight_decay": 1e-4, "augment": "flip+crop4"}
    elif dataset in ("mnist", "fashion_mnist"):
        shape |= {"net": "lenet-300-100", "optimizer": "adam", "lr": 1.2e-3}
    else:
        shape |= {"net": "mlp:widths=100x4", "schedule": "step", "milestones": (0.6, 0.85)}
        tiny = dataset == "digits"
        shape |= {"steps": 800, "lr": 0.1, "augment": "crop1"} if tiny else {"lr": 0.05}
    given = {"net": net, "steps": steps, "lr": lr, "batch": batch, "precision": precision}
    shape |= {name: value for name, value in given.items() if value is not None}
    recipe = Recipe(data=dataset, warmup=warmup, **shape)
    if level not in control_levels:
        raise BadParameter(f"level: {level} must be among control_levels {list(control_levels)}.")
    if skip is None:  # the paper's code: the head of LeNet and VGG is left alone, ResNet's is not
        skip = () if recipe.net.startswith("resnet") else ("head",)
    search = Search(
        recipe=recipe,
        ks=tuple((0, recipe.steps // 10) if ks is None else ks),
        levels=tuple(levels),
        control_levels=tuple(control_levels),
        kinds=("imp", "random", "reinit"),
        inits=inits,
        copies=copies,
        pruning=Pruning(skip=tuple(skip)),
    )
    own = [round(recipe.steps / 20)]
    extra = own if dense_ks is None else dense_ks
    study = Study(
        images=images,
        search=search,
        level=level,
        dense_ks=tuple(sorted({*search.ks, *extra})),
        carried=carried,
        evaluation=Evaluation(points, bn, train_examples, test_examples),
        device=device,
        workers=workers,
    )
    check_search(search, device)
    check_design(recipe, study.dense_ks, inits=inits, copies=copies, device=device)
    return study


# ---- statistics that claims and figures share


def noise(study: Study, kind: str, level: int, k: int) -> Interval | None:
    """The test error barrier between copies of a subnetwork; None without a valid pair."""
    return study.found.instability(kind, level).interval(k)


def _barriers(study: Study, kind: str, level: int, k: int) -> dict[int, float]:
    """Init -> mean barrier of its valid pairs."""
    values = study.found.instability(kind, level).values(k)
    inits = dict.fromkeys(init for init, _ in values)
    return {i: statistics.fmean(v for init, v in values if init == i) for i in inits}


def _excess(study: Study, kind: str, level: int, k: int) -> dict[int, float]:
    """Init -> points of error above the whole network."""
    whole = dict(study.found.errors("imp", 0, k))
    errors = study.found.errors(kind, level, k)
    return {init: error - whole[init] for init, error in errors if init in whole}


def more_noise(study: Study, kind: str, level: int, k: int) -> Interval | None:
    """By how much the barrier exceeds that of IMP, over initialisations."""
    mine, imp = (_barriers(study, one, level, k) for one in (kind, "imp"))
    shared = [init for init in mine if init in imp]
    gaps = [mine[init] - imp[init] for init in shared]
    return stats.clustered(gaps, shared) if gaps else None


def cells(study: Study) -> dict[tuple[int, int], dict[int, tuple[bool, bool]]]:
    """(k, level) -> init -> whether IMP's subnetwork is stable, and whether it is matching.

    By the numbers of each initialisation; only those with a valid barrier. Level 0 is left out.
    """
    out = {}
    for k in study.ks:
        limit = study.found.tolerance(k)
        for level in study.search.levels[1:]:
            barrier = _barriers(study, "imp", level, k)
            excess = _excess(study, "imp", level, k)
            out[k, level] = {
                i: (barrier[i] < THRESHOLD, excess[i] <= limit) for i in barrier if i in excess
            }
    return out


def only_imp(study: Study) -> list[int]:
    """Levels of the paper's Range II: random pruning matches at no k, IMP does at some."""
    ks, found = study.ks, study.found
    return [
        level
        for level in study.search.levels_of("random")
        if all(found.matching("random", level, k) == "not matching" for k in ks)
        and any(found.matching("imp", level, k) == "matching" for k in ks)
    ]


def _agreement(
    found: Iterable[Mapping[int, tuple[bool, bool]]],
) -> tuple[Interval | None, bool]:
    """How often two yes-or-no answers agree, one share an init; and whether both answers occur."""
    rows = [(init, a, b) for cell in found for init, (a, b) in cell.items()]
    inits = list(dict.fromkeys(init for init, *_ in rows))
    shares = [statistics.fmean(a == b for i, a, b in rows if i == init) for init in inits]
    both = len({b for *_, b in rows}) == 2
    return (stats.clustered(shares, inits) if shares else None), both


def links(study: Study) -> dict[tuple[int, int], dict[int, tuple[bool, bool]]]:
    """(k, level) -> init -> whether it is connected to the level before, and whether it matches."""
    out = {}
    for k in study.ks:
        limit = study.found.tolerance(k)
        for level in study.search.levels[1:]:
            excess = _excess(study, "imp", level, k)
            heights = study.found.successive_values(level, k)
            out[k, level] = {i: (v < THRESHOLD, excess[i] <= limit) for i, v in heights}
    return out


def dead(study: Study) -> tuple[int, int, list[str]]:
    """Pairs of copies with a dead end, pairs in all, and which kinds at which density have any."""
    found = [*study.found.subnetworks, *(study.renewed.subnetworks if study.renewed else ())]
    every = {(s.kind, s.level, s.k, s.init): s for s in found}.values()
    lost = [s for s in every for pair in s.noise if not pair.result.barrier.valid]
    where = sorted({(s.level, NAMES[s.kind]) for s in lost})
    total = sum(len(s.noise) for s in every)
    return len(lost), total, [f"{name} at {study.share(level)}" for level, name in where]


def onsets(study: Study) -> tuple[Interval, Interval]:
    """The step from which on the subnetwork of the page is stable, and the whole network's."""
    return study.found.instability("imp", study.level).onset(), study.whole.onset()


# ---- claims: what each needs to be testable, and its statistic

_NEEDS: dict[str, tuple[Callable[[Study], bool], str]] = {
    "init": (lambda s: s.first == 0, "the grid has no k = 0"),
    "later": (lambda s: s.last > 0, "the grid has no k above 0"),
    "inits": (lambda s: s.search.inits >= 2, "one init decides nothing"),
    "unstable": (
        lambda s: s.whole.verdict(s.dense_ks[0]) == "unstable",
        "the whole network was not certainly unstable at the smallest k",
    ),
    "carried": (lambda s: s.carried, "masks that are carried over were left out of this run"),
    "resnet": (lambda s: title(s.recipe.net) == "ResNet-20", "the claim is about ResNet-20"),
    "standard": (
        lambda s: title(s.recipe.net) in ("ResNet-20", "VGG-16") and not _gentle(s.recipe),
        "the claim is about ResNet-20 and VGG-16 in their standard recipe",
    ),
    "gentle": (lambda s: _gentle(s.recipe), "the claim is about a low learning rate, or warm-up"),
}


def _gentle(recipe: Recipe) -> bool:
    """The paper's variants, for which IMP works from initialisation (Table 1)."""
    return recipe.lr <= 0.01 or recipe.warmup > 0


def _needs(study: Study, *names: str) -> list[Need]:
    return [(met(study), why) for met, why in (_NEEDS[name] for name in names)]


def _trained_to_the_end(study: Study) -> Need:
    """Whether the whole networks fit their own training images: else training was cut short."""
    errors = study.found.errors("imp", 0, study.first, "train")
    error = statistics.fmean(e for _, e in errors) if errors else 100.0
    told = f"the whole networks end with {error:.0f} % error on their own training images"
    return error <= UNLEARNED, f"training was cut short: {told}"


def _measured_at(study: Study, level: int) -> Need:
    share = study.share(level)
    return level in study.search.levels, f"subnetworks with {share} of the weights are left out"


def _both(wanted: Sequence[str], found: Sequence[str]) -> bool | float:
    """True if every word is as wanted, False if one is decided otherwise, NaN if it is open."""
    undecided = ("undetermined", "invalid")
    if any(
        word != want and word not in undecided for want, word in zip(wanted, found, strict=True)
    ):
        return False
    return math.nan if any(word in undecided for word in found) else True


def _sign(gap: Interval | None) -> str:
    """In words whether an interval lies above 0."""
    if gap is None or gap.clusters < 2:
        return "undetermined"
    return "above" if gap.low > 0 else "undetermined" if gap.high > 0 else "below"


def _outcome(study: Study, wanted: tuple[str, str], level: int, *needs: Need) -> Statistic:
    """Whether IMP's subnetworks at k = 0 are stable and matching, as wanted."""
    here, k = study.found, study.first
    measured = level in study.search.levels
    found = (here.stable("imp", level, k), here.matching("imp", level, k)) if measured else ()
    excess = here.excess("imp", level, k)
    barrier = said(noise(study, "imp", level, k), "{:.2f}", "no valid pair") if measured else ""
    return statistic(
        _both(wanted, found) if found else None,
        *_needs(study, "init", "inits"),
        _measured_at(study, level),
        *needs,
        n=len(here.at("imp", level, k)),
        detail=f"{study.share(level)}: barrier {barrier} points, error {said(excess, '{:+.2f}')} "
        f"points above the whole network (at most {here.tolerance(k):.2f})"
        if found
        else "",
    )


def c09(study: Study) -> Statistic:
    """The step from which on the subnetwork is stable minus that of the whole network."""
    sparse, whole = onsets(study)
    ends = [
        math.nan if math.isinf(a) and math.isinf(b) else a - b
        for a, b in (
            (sparse.value, whole.value),
            (sparse.low, whole.high),
            (sparse.high, whole.low),
        )
    ]
    value, low, high = ends
    told = [
        f"{name}: k = {said(one.low, '{:.0f}')} to {said(one.high, '{:.0f}')}"
        for name, one in (("subnetwork", sparse), ("whole network", whole))
    ]
    open_end = any(math.isnan(end) for end in ends)
    number = math.nan if open_end else Interval(value, low, high, sparse.n, sparse.clusters)
    return statistic(number, *_needs(study, "inits", "unstable"), detail="; ".join(told))


def c10(study: Study) -> Statistic:
    """Whether IMP's subnetworks at k = 0 are stable and matching."""
    small = not study.recipe.net.startswith(("resnet", "vgg")), "the claim is about small networks"
    return _outcome(study, ("stable", "matching"), study.level, small)


def _gap(study: Study, kind: str, k: int) -> tuple[Interval | None, str]:
    """Error above that of IMP, and the same in words, with the spread of both kinds."""
    gap = study.found.excess(kind, study.level, k, over="imp")
    each = [[e for _, e in study.found.errors(one, study.level, k)] for one in (kind, "imp")]
    spread = math.hypot(*(statistics.stdev(errors) for errors in each if len(errors) > 1))
    sigmas = f", {gap.value / spread:.1f} standard deviations of both" if gap and spread else ""
    return gap, f"error {said(gap, '{:+.2f}')} points{sigmas}"


def c11(study: Study) -> Statistic:
    """Whether error and barrier of random subnetworks exceed those of IMP's."""
    gap, told = _gap(study, "random", study.last)
    rise = more_noise(study, "random", study.level, study.last)
    return statistic(
        _both(("above", "above"), (_sign(gap), _sign(rise))),
        *_needs(study, "inits"),
        (rise is not None, "random subnetworks are dead at this density, and have no barrier"),
        n=gap.n if gap else None,
        detail=f"k = {study.last}: {told}; barrier {said(rise, '{:+.2f}')} points",
    )


def c12(study: Study) -> Statistic:
    """The error of IMP's mask on a new initialisation above that on its own."""
    gap, told = _gap(study, "reinit", study.last)
    return statistic(gap, *_needs(study, "inits"), detail=f"k = {study.last}: {told}")


def c18(study: Study) -> Statistic:
    """Whether ResNet-20's subnetworks at k = 0 are neither stable nor matching."""
    needs = [*_needs(study, "resnet", "standard"), _trained_to_the_end(study)]
    return _outcome(study, ("unstable", "not matching"), 8, *needs)


def _matching_from(study: Study, level: int) -> tuple[float, float]:
    """The k from which on no subnetwork is certainly not matching, and that from which on all are
    certainly matching; infinite where the grid has none."""
    ks = study.ks
    words = [study.found.matching("imp", level, k) for k in ks]

    def first(holds: Sequence[bool]) -> float:
        return next((k for i, k in enumerate(ks) if all(holds[i:])), math.inf)

    return first([w != "not matching" for w in words]), first([w == "matching" for w in words])


def c19(study: Study) -> Statistic:
    """Whether ResNet-20's subnetworks are stable and matching from about 0.8 % of training on."""
    ks, aim, level = study.ks, 0.008 * study.steps, 8
    near = [
        max((k for k in ks if k <= aim), default=-1),
        min((k for k in ks if k >= aim), default=-1),
    ]
    measured = level in study.search.levels
    ends: list[tuple[float, float]] = []
    if measured:
        stable = study.found.instability("imp", level).onset()
        ends = [(stable.low, stable.high), _matching_from(study, level)]
    inside = all(near[0] <= end <= near[1] for pair in ends for end in pair)
    outside = any(high < near[0] or low > near[1] for low, high in ends)
    return statistic(
        None if not measured else True if inside else False if outside else math.nan,
        *_needs(study, "inits", "resnet", "standard"),
        _trained_to_the_end(study),
        _measured_at(study, level),
        (min(near) > 0, "the grid has no steps on both sides of 0.8 % of training"),
        n=study.search.inits,
        detail="; ".join(
            f"{name} from k = {said(low, '{:.0f}')} to {said(high, '{:.0f}')}"
            for name, (low, high) in zip(("stable", "matching"), ends, strict=False)
        ),
    )


def c20(study: Study) -> Statistic:
    """How often stable and matching agree, over k and the densities where only IMP matches."""
    levels = only_imp(study)
    here = [cell for (_, level), cell in cells(study).items() if level in levels]
    share, both = _agreement(here)
    shares = ", ".join(study.share(level) for level in levels)
    return statistic(
        share,
        *_needs(study, "inits"),
        (bool(levels), "at no density does only iterative magnitude pruning match"),
        (both or not levels, "there every subnetwork matches, or none: nothing can disagree"),
        detail=f"{len(here)} settings of k and density ({shares})" if levels else "",
    )


def c21(study: Study) -> Statistic:
    """Whether the subnetworks of a gently trained ResNet-20 are stable and matching at k = 0."""
    needs = [*_needs(study, "resnet", "gentle"), _trained_to_the_end(study)]
    return _outcome(study, ("stable", "matching"), 11, *needs)


def c22(study: Study) -> Statistic:
    """The error of random subnetworks above that of IMP's at k = 0."""
    gap, told = _gap(study, "random", study.first)
    needs = _needs(study, "init", "inits", "standard")
    return statistic(gap, *needs, _trained_to_the_end(study), detail=told)


def i01(study: Study) -> Statistic:
    """How often a connection to the level before and a matching error agree, over levels and k."""
    share, both = _agreement(links(study).values())
    return statistic(
        share,
        *_needs(study, "inits"),
        (both, "all levels of this run match, or none: nothing can disagree"),
        detail=f"{counted(len(study.search.levels) - 1, 'level')}, {len(study.ks)} k",
    )


def i02(study: Study) -> Statistic:
    """The barrier between the whole network's solution and a sparse one, at k = 0."""
    found, level = study.found, study.level
    before = found.successive(level, study.first)
    connected = before is not None and before.clusters > 1 and before.high < THRESHOLD
    later = {f"k = {k}:": found.to_dense(level, k) for k in study.ks[1:]}
    return statistic(
        found.to_dense(level, study.first),
        *_needs(study, "init", "inits"),
        (connected, "the level is not certainly connected to the one before"),
        detail=listed(later, "{:.1f} points") if later else "",
    )


def i03(_: Study) -> Statistic:
    """One permutation for two whole chains: nothing here measures it."""
    return statistic(None, (False, "no run of this book matches two chains level by level"))


def i04(study: Study) -> Statistic:
    """The error of the mask as it is above that of the mask carried over, on a new init."""
    new = study.renewed
    plain = said(study.found.error("imp", study.level, study.last), "{:.1f}")
    return statistic(
        new.excess("reinit", study.level, study.last, over="permuted") if new else None,
        *_needs(study, "inits", "carried"),
        detail=f"k = {study.last}; error of the mask on its own initialisation: {plain} %",
    )


def i05(_: Study) -> Statistic:
    """Signs on a new initialisation: nothing here trains them."""
    return statistic(None, (False, "no run of this book copies signs to a new initialisation"))


def i06(_: Study) -> Statistic:
    """Flatness against the share that a round may prune: it is not measured."""
    return statistic(None, (False, "no run of this book varies the share that a round prunes"))


def i07(_: Study) -> Statistic:
    """Larger batches for a network on which IMP fails at k = 0: there is none here."""
    why = "no run of this book has a network on which pruning fails at k = 0, in larger batches"
    return statistic(None, (False, why))


_ALL = (c09, c10, c11, c12, c18, c19, c20, c21, c22, i01, i02, i03, i04, i05, i06, i07)
CLAIMS: dict[str, Callable[[Study], Statistic]] = {f.__name__.upper(): f for f in _ALL}
"""Claim id -> its statistic, in the order of the table."""


# ---- figures and tables, and the values of their captions


def _present(found: Mapping[int, Interval | None]) -> dict[int, Interval]:
    """What was measured, without the rest."""
    return {level: one for level, one in found.items() if one is not None}


def _levels_of(study: Study, kind: str) -> tuple[int, ...]:
    """The levels that are drawn of a kind; all begin with the whole network."""
    return (0, *(level for level in study.search.levels_of(kind) if level))


def _series(points: Mapping[int, Interval], study: Study) -> str:
    """For an alternative text: ``1.8 at 100 %, 1.2 at 13.4 %``."""
    told = [f"{said(one, '{:.1f}')} at {study.share(level)}" for level, one in points.items()]
    return ", ".join(told) or "no valid pair"


def _against_density(
    ax: Any, curves: Mapping[str, Mapping[int, Interval]], **look: Any
) -> dict[str, Any]:
    """Curves against the level, whose ticks say the density of 20 % a round."""
    levels = sorted({level for points in curves.values() for level in points})
    ticks = {level: f"{100 * 0.8**level:.3g}" for level in levels}
    xlabel = "weights left (%), 20 % fewer each round"
    return plots.sweep(ax, curves, xlabel=xlabel, ticks=ticks, axis="linear", **look)


def _two_panels(
    errors: Mapping[str, Mapping[int, Interval]], barriers: Mapping[str, Mapping[int, Interval]]
) -> tuple[Any, dict[str, Any]]:
    """Error and barrier against density; dead networks have no barrier."""
    fig, (left, right) = plots.grid(2, height=4.0)
    drawn = _against_density(left, errors, ylabel="test error (%)")
    drawn |= _against_density(right, barriers, ylabel="error barrier (points)")
    plots.dashed(right, THRESHOLD, text=f"{THRESHOLD:g} points: the paper's line")
    for ax in (left, right):
        ax.set_yscale("symlog", linthresh=5)
        ax.set_ylim(0, 100)
        ax.set_yticks([0, 1, 2, 3, 4, 5, 10, 20, 50, 100])
        ax.yaxis.set_major_formatter("{x:g}")
    plots.legend(fig, len(errors))
    return fig, drawn


_QUANTITIES = ("error", "barrier")
"""What a curve of the density figures shows, in the order of the panels."""


def show_density(study: Study, k: int, name: str) -> None:
    """Error and instability against density, of IMP, random pruning and reinitialisation."""
    found = study.found
    curves: dict[str, dict[str, dict[int, Interval]]] = {q: {} for q in _QUANTITIES}
    values: Values = {"k": k}
    for kind in study.search.kinds:
        either = {level: kind if level else "imp" for level in _levels_of(study, kind)}
        error = _present({n: found.error(of, n, k) for n, of in either.items()})
        barrier = _present({n: noise(study, of, n, k) for n, of in either.items()})
        curves["error"][NAMES[kind]], curves["barrier"][NAMES[kind]] = error, barrier
        values |= {f"{kind}_errors": _series(error, study)}
        values |= {f"{kind}_barriers": _series(barrier, study)}
    fig, _ = _two_panels(curves["error"], curves["barrier"])
    data: dict[str, Any] = {"T": 0}
    for quantity, group in curves.items():
        for label, points in group.items():
            data[f"{quantity}: {label}, test"] = {
                "k": list(points),
                **{end: [getattr(p, end) for p in points.values()] for end in ("low", "high")},
                "mean": [p.value for p in points.values()],
                "pairs": [p.n for p in points.values()],
            }
    figures.publish(fig, name, data=data, values=values)


def show_recorded(records: Sequence[Record], name: str) -> None:
    """The density figure of the first record that has it; nothing without one."""
    for record in records:
        for drawn_title, (_, series) in recorded.curves([record], "density").items():
            groups: dict[str, dict[str, dict[int, Interval]]] = {q: {} for q in _QUANTITIES}
            for label, points in series.items():
                quantity, _, kind = label.removesuffix(", test").partition(": ")
                groups[quantity][kind] = points
            fig, drawn = _two_panels(groups["error"], groups["barrier"])
            told = {
                f"{quantity}s": "; ".join(
                    f"{kind} {said(points[max(points)], '{:.1f}')}"
                    for kind, points in groups[quantity].items()
                    if points
                )
                for quantity in _QUANTITIES
            }
            deepest = max(max(points) for group in groups.values() for points in group.values())
            told |= {"title": record.title, "deepest": f"{100 * 0.8**deepest:.3g} %"}
            figures.publish(fig, name, data={drawn_title: drawn}, values=told)
            return


def show_onset(study: Study) -> None:
    """The barrier against k, of the whole network and of subnetworks at the page's density."""
    share = study.share(study.level)
    curves = {
        f"{share}, {NAMES[kind]}": study.found.instability(kind, study.level)
        for kind in study.search.kinds
    } | {f"whole {study.network}": study.whole}
    points = {
        name: {k: v for k in one.ks if (v := one.interval(k))} for name, one in curves.items()
    }
    fig, (ax,) = plots.grid(1, height=4.2, width=7.4)
    drawn = plots.against_k(ax, points, steps=study.steps)
    told = "; ".join(
        f"{name}: "
        + (", ".join(f"{said(v, '{:.1f}')} at k = {k}" for k, v in of.items()) or "dead")
        for name, of in points.items()
    )
    values = {"told": told, "onset_sentence": onset_sentence(study)}
    figures.publish(fig, "onset", data=drawn, values=values)


def show_quadrants(study: Study) -> None:
    """Loss of accuracy against instability, a point for each k, density and kind."""
    found = study.found
    groups: dict[str, list[tuple[float, float]]] = {}
    for kind in study.search.kinds:
        groups[NAMES[kind]] = []
        for k in study.ks:
            for level in study.search.levels_of(kind):
                barrier, excess = noise(study, kind, level, k), found.excess(kind, level, k)
                if level and barrier and excess:
                    groups[NAMES[kind]].append((barrier.value, excess.value))
    limit = found.tolerance(study.first)
    fig, (ax,) = plots.grid(1, height=4.6, width=7.4)
    drawn = plots.quadrants(
        ax,
        groups,
        lines=(THRESHOLD, limit),
        xlabel="error barrier between copies (points)",
        ylabel="test error above the whole network (points)",
        corners=("stable, matching", "unstable, matching", "stable, not matching", "neither"),
    )
    counts = {
        name: sum((x < THRESHOLD) == (y <= limit) for x, y in points)
        for name, points in groups.items()
    }
    values: Values = {
        "tolerance": said(limit, "{:.1f}"),
        "agreeing": "; ".join(f"{name} {n} of {len(groups[name])}" for name, n in counts.items()),
    }
    figures.publish(fig, "quadrants", data=drawn, values=values)


def show_chain(study: Study) -> None:
    """The barrier from each level to the one before, and to the whole network, for every k."""
    found, levels = study.found, study.search.levels[1:]
    fig, axes = plots.grid(2, height=4.0, sharey=True)
    drawn: dict[str, Any] = {}
    values: Values = {}
    ways = {
        "to_previous": ("the level before", found.successive),
        "to_whole": ("the whole network", found.to_dense),
    }
    for ax, (place, (what, way)) in zip(axes, ways.items(), strict=True):
        curves = {f"k = {k}": _present({n: way(n, k) for n in levels}) for k in study.ks}
        drawn[what] = _against_density(ax, curves, ylabel="error barrier (points)")
        plots.dashed(ax, THRESHOLD)
        ax.set_title(f"to {what}")
        told = "; ".join(f"{k}: {_series(points, study)}" for k, points in curves.items())
        values[place] = told
    plots.legend(fig, len(study.ks))
    figures.publish(fig, "chain", data=drawn, values=values)


def show_carried(study: Study) -> None:
    """The error of the mask on a new initialisation, as it is and carried over, beside IMP's."""
    new = study.renewed
    if new is None:
        return
    levels = new.search.levels_of("reinit")
    sources = {"imp": study.found, "permuted": new, "reinit": new}
    curves = {
        NAMES[kind]: _present({n: found.error(kind, n, study.last) for n in levels})
        for kind, found in sources.items()
    }
    fig, (ax,) = plots.grid(1, height=3.8, width=7.4)
    drawn = _against_density(ax, curves, ylabel="test error (%)")
    ax.legend()
    values: Values = {"k": study.last}
    values["told"] = "; ".join(
        f"{name}: {_series(points, study)}" for name, points in curves.items()
    )
    figures.publish(fig, "carried", data=drawn, values=values)


def show_cells(study: Study) -> None:
    """Every subnetwork: error, barrier, and the two verdicts."""
    found, rows = study.found, []
    for k in study.ks:
        for kind in study.search.kinds:
            for level in study.search.levels_of(kind):
                if kind != "imp" and not level:
                    continue
                name = NAMES[kind] if level else "whole network"
                rows.append(
                    [
                        f"{name}, {study.share(level)}",
                        k,
                        found.error(kind, level, k) or "not measured",
                        found.excess(kind, level, k) if level else "",
                        found.matching(kind, level, k) if level else "",
                        noise(study, kind, level, k) or "no valid pair",
                        found.stable(kind, level, k),
                    ]
                )
    columns = ["subnetwork", "k", "test error (%)", "above the whole network (points)"]
    columns += ["matching?", "error barrier (points)", "stable?"]
    tables.show(columns, rows, name="cells")


# ---- sentences that depend on the outcome, and numbers of the prose


def onset_sentence(study: Study) -> str:
    """From which step on the subnetwork is stable, and the whole network."""
    try:
        found = onsets(study)
    except NotMeasured as why:  # a recording that was closed still has its figures
        return str(why)
    told = []
    for name, one in zip(("The subnetwork", "The whole network"), found, strict=True):
        low, high = (said(end, "{:.0f}") for end in (one.low, one.high))
        if math.isinf(one.low):
            told.append(f"{name} is stable at no k of this grid")
        elif math.isinf(one.high):
            told.append(f"{name} is certainly stable at no k of this grid")
        elif low == high:
            told.append(f"{name} is stable from k = {high} on")
        else:
            told.append(f"{name} is certainly stable from k = {high} on, and perhaps from {low}")
    return ", ".join([told[0], told[1].replace("The", "the", 1)]) + "."


def start_sentence(study: Study) -> str:
    """How IMP fares without any rewinding at the density of the page."""
    found, level, k = study.found, study.level, study.first
    stable, matching = found.stable("imp", level, k), found.matching("imp", level, k)
    told = f"Rewound to step {k}, the subnetworks with {study.share(level)} of the weights are"
    if (stable, matching) == ("stable", "matching"):
        end = "so pruning works from the very first weights here" if k == 0 else "so pruning works"
        return f"{told} stable and as good as the whole network (matching), {end}."
    return f"{told}, by their intervals, {stable} and {matching}."


def range_sentence(study: Study) -> str:
    """The paper's three ranges of density, as this run has them."""
    found, ks = study.found, study.ks
    controls = study.search.levels_of("random")
    easy = [n for n in controls if any(found.matching("random", n, k) == "matching" for k in ks)]
    hard = [
        n
        for n in study.search.levels[1:]
        if all(found.matching("imp", n, k) == "not matching" for k in ks)
    ]
    ranges = {
        "random pruning matches, too,": easy,
        "only IMP certainly matches": only_imp(study),
        "certainly nothing matches": hard,
    }
    told = [
        f"{name} at {', '.join(map(study.share, found_at))}"
        for name, found_at in ranges.items()
        if found_at
    ]
    if not told:
        return "At no density of this page do the intervals decide what matches."
    return f"By the intervals, {'; '.join(told)}."


def dead_sentence(study: Study) -> str:
    """How many pairs of copies have a dead end."""
    lost, total, where = dead(study)
    if not lost:
        return f"All {total} pairs of copies of this page are alive."
    return (
        f"{lost} of the {total} pairs of copies of this page have a dead end, and no barrier: "
        f"{', '.join(where)}."
    )


def values(study: Study) -> Values:
    """The numbers and sentences of the chapter's prose."""
    found, level, last = study.found, study.level, study.last
    out: Values = {}
    for name, k in (("first", study.first), ("last", last)):
        for kind in study.search.kinds:
            out[f"{kind}_error_{name}"] = said(found.error(kind, level, k), "{:.1f}")
            barrier = noise(study, kind, level, k)
            out[f"{kind}_wall_{name}"] = said(barrier, "{:.1f}", "no valid number of")
        out[f"whole_error_{name}"] = said(found.error("imp", 0, k), "{:.1f}")
        out[f"whole_wall_{name}"] = said(noise(study, "imp", 0, k), "{:.1f}", "no valid number of")
        out[f"drift_{name}"] = said(found.to_dense(level, k), "{:.1f}", "no valid number of")
        out[f"step_{name}"] = said(found.successive(level, k), "{:.1f}", "no valid number of")
    new = study.renewed
    deepest = max(study.search.levels_of("random"))
    for kind in ("reinit", "permuted"):
        for name, here in (("new", level), ("sparse", deepest)):
            error = new.error(kind, here, last) if new else None
            out[f"{name}_{kind}"] = said(error, "{:.1f}")
    out["sparse_density"] = study.share(deepest)
    out["sparse_wall"] = said(
        noise(study, "imp", deepest, study.first), "{:.1f}", "no valid number of"
    )
    out["sparse_error"] = said(found.error("imp", deepest, study.first), "{:.1f}")
    out["first_link"] = said(found.successive(study.search.levels[1], study.first), "{:.1f}")
    out["first_density"] = study.share(study.search.levels[1])
    out["one_image"] = 100 / len(study.images.test)
    return out | {
        "onset_sentence": onset_sentence(study),
        "start_sentence": start_sentence(study),
        "range_sentence": range_sentence(study),
        "dead_sentence": dead_sentence(study),
    }
