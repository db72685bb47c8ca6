"""Features of stored networks: pairs as they are, or matched first; measured once, stored.

What :mod:`companion.aligned` is for lines, this is for features: runs are trained if they are
missing, B is brought to A by a :class:`Method`, the line between them passes the gates of every
other line, and the instruments of :mod:`companion.features` look at both ends and between. ::

    found = examine([(pair, None), (pair, Method("weights"))], Scope(), device="cpu")
    found[1].barrier.height(), found[1].gaps(), found[1].lemma().violations

Explained in our chapter 3; Zhou et al. 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from companion import data as datasets
from companion.aligned import read, run_tasks
from companion.connectivity import Barrier, barrier, grid, has_batchnorm
from companion.connectivity.paths import plain
from companion.connectivity.walk import default_batch
from companion.data import Dataset, Split
from companion.errors import BadParameter, one_of
from companion.features import (
    Additivity,
    Commutativity,
    Features,
    Spectrum,
    Stitching,
    commutativity,
    feature_spectra,
    features,
    stitch,
    weak_additivity,
    weight_spectra,
)
from companion.matchers import Method, key_of, match, weights_of
from companion.pairs import Pair, normal_error
from companion.runs import Entry, Store
from companion.theta import Theta
from companion.training import Job, build

K = TypeVar("K", bound=Hashable)

SEMANTICS = 1
"""Raised by hand when a measurement of the same networks would give other numbers."""

PARTS = ("additivity", "commutativity", "stitching", "spectra")
"""What may be measured besides the features: the two conditions of Theorem 1, the stitching test,
and the singular values of the weights and features of A and of B as it was trained."""

MODES = ("interpolate", "reestimate")
"""BatchNorm on the way between A and B: statistics interpolated as in the paper's code, or
estimated again. A network without BatchNorm has one mode, ``none``."""


@dataclass(frozen=True)
class Scope:
    """What of a pair is measured, and on which data.

    Arguments:
        layers: names or patterns, as :func:`companion.features.sites` takes them; None: all.
        alphas: of the features between A and B; 0 is A, as everywhere in this book.
        points: of the error's line, odd.
        bn: modes, the first one for the headline; those of :data:`MODES`.
        parts: of :data:`PARTS`.
        test_examples: how many test images (None: all).
        batch: images at a time (None: by itself).
    """

    layers: tuple[str, ...] | None = None
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    points: int = 25
    bn: tuple[str, ...] = MODES
    parts: tuple[str, ...] = ("additivity", "commutativity", "stitching")
    test_examples: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        grid(self.points)
        for part in self.parts:
            one_of("part", part, PARTS)
        for mode in self.bn:
            one_of("bn", mode, MODES)
        if not self.bn:
            raise BadParameter(f"bn: give at least one of {', '.join(MODES)}.")

    def identity(self) -> dict[str, Any]:
        """Everything that determines the numbers, for the store."""
        known = asdict(self)
        known.pop("batch")
        return {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}

    def split(self, data: Dataset) -> Split:
        """The test images, or the first of them."""
        return data.test.head(self.test_examples or len(data.test))


@dataclass(frozen=True)
class Lemma:
    """Lemma 1 on one pair: errors along alpha, in percent, and the bound.

    Arguments:
        alphas: the line's grid, shape (points,).
        mixture: error of the mixed logits (1 - alpha) f(A) + alpha f(B): Lemma 1's own object.
        path: error of the network with interpolated weights, which it bounds if LLFC holds.
        bound: Err_A + Err_B.
        examples: images behind each error, so that errors can be compared as counts.
    """

    alphas: tuple[float, ...]
    mixture: tuple[float, ...]
    path: tuple[float, ...]
    bound: float
    examples: int

    def _excess(self, errors: Sequence[float]) -> list[int]:
        """Images above the bound, a whole number at each alpha."""
        limit = round(self.bound * self.examples / 100)
        return [round(e * self.examples / 100) - limit for e in errors]

    @property
    def violations(self) -> int:
        """At how many alphas the mixed logits are wrong more often than the bound: it must be 0."""
        return sum(e > 0 for e in self._excess(self.mixture))

    @property
    def excess(self) -> float:
        """How far the interpolated network's error rises above the bound at most, in points."""
        return 100 * max(self._excess(self.path)) / self.examples


@dataclass(frozen=True)
class Featured:
    """What was measured of a pair under one way of bringing B to A.

    Arguments:
        pair, method: which.
        barrier: of the test error and loss on the line from A to B (or pi(B)), with its gates.
        features: BatchNorm mode -> the features; one entry ``none`` without BatchNorm.
        mixture: error (%) of the mixed logits on the line's grid; examples: images behind it.
        additivity, commutativity, stitching: if they were asked for.
        spectra: ``a`` and ``b`` -> singular values of weights and features, if asked for.
    """

    pair: Pair
    method: Method
    barrier: Barrier
    features: Mapping[str, Features] = field(repr=False)
    mixture: tuple[float, ...] = field(repr=False)
    examples: int
    additivity: Additivity | None = field(default=None, repr=False)
    commutativity: Commutativity | None = field(default=None, repr=False)
    stitching: Stitching | None = field(default=None, repr=False)
    spectra: Mapping[str, tuple[Spectrum, ...]] = field(default_factory=dict, repr=False)

    @property
    def valid(self) -> bool:
        """True if no gate failed."""
        return self.barrier.valid

    @property
    def modes(self) -> tuple[str, ...]:
        """The BatchNorm modes, headline first."""
        return tuple(self.features)

    def look(self, bn: str | None = None) -> Features:
        """The features under a BatchNorm mode; None: the headline's. A network without BatchNorm
        has one answer to every mode."""
        return self.features.get(bn or self.modes[0], self.features[self.modes[0]])

    def height(self, bn: str | None = None) -> float:
        """The test error barrier above the line between the ends, as the paper of this chapter has
        it (points); NaN if a gate failed."""
        mode = bn if bn in self.barrier.curves else None
        return self.barrier.height("test", "error", "linear", bn=mode)

    def gaps(self, alpha: float = 0.5, bn: str | None = None) -> dict[str, float]:
        """Layer -> E[1 - cos_alpha]."""
        return {x.name: x.gap[alpha].mean for x in self.look(bn).layers}

    def baselines(self, bn: str | None = None) -> dict[str, float]:
        """Layer -> E[1 - cos(A, B)]."""
        return {x.name: x.baseline.mean for x in self.look(bn).layers}

    def ratios(self, alpha: float = 0.5, bn: str | None = None) -> dict[str, float]:
        """Layer -> E[1 - cos_alpha] / E[1 - cos(A, B)]."""
        return {x.name: x.ratio(alpha) for x in self.look(bn).layers}

    def coefficients(self, alpha: float = 0.5, bn: str | None = None) -> dict[str, float]:
        """Layer -> median over samples of the paper's coefficient c."""
        return {x.name: x.c[alpha].median for x in self.look(bn).layers}

    def lemma(self) -> Lemma:
        """Lemma 1 along the line. BatchNorm's statistics are interpolated, so that both ends are A
        and B themselves; with statistics estimated again they would be other networks."""
        curves = self.barrier.curves
        curve = curves["interpolate"] if "interpolate" in curves else curves["none"]
        path = tuple(curve.values["test"]["error"])
        bound = self.mixture[0] + self.mixture[-1]
        return Lemma(tuple(curve.alphas), self.mixture, path, bound, self.examples)


@dataclass(frozen=True)
class Task:
    """One measurement: what the store keeps an entry of."""

    pair: Pair
    method: Method
    scope: Scope
    store: Store
    device: str

    def entry(self) -> Entry:
        """The store's entry."""
        return self.store.entry(
            {
                "kind": "features",
                "semantics": SEMANTICS,
                "scope": self.scope.identity(),
                "method": self.method.identity(),
                "a": key_of(self.pair.a, self.store, self.device),
                "b": key_of(self.pair.b, self.store, self.device),
                "step": self.pair.at,
            }
        )

    def measure(self) -> dict[str, Any]:
        """The value, JSON-able."""
        return _measure(self)


def _measure(task: Task) -> dict[str, Any]:
    scope, pair = task.scope, task.pair
    data = datasets.load(pair.a.recipe.data, task.device)
    module = build(pair.a, data, torch.device(task.device))
    a, b = (weights_of(r, pair.at, task.store, task.device) for r in (pair.a, pair.b))
    naive = task.method.name == "naive"
    moved = dict(b) if naive else match(task.method, module, a, b, data).apply(module, b)
    split = scope.split(data)
    modes = scope.bn if has_batchnorm(module) else scope.bn[:1]
    line = barrier(
        module,
        a,
        moved,
        {"test": split},
        points=scope.points,
        bn=modes[0],
        bn_data=data.train,
        classes=data.classes,
        same_noise=pair.a == pair.b or _equal_inits(pair, a, b),
    )
    where: dict[str, Any] = {"layers": scope.layers, "batch": scope.batch}
    seen = [
        features(module, a, moved, split, alphas=scope.alphas, bn=m, bn_data=data.train, **where)
        for m in modes
    ]
    out: dict[str, Any] = {
        "barrier": line.to_json(),
        "features": {f.bn: f.to_json() for f in seen},
        "mixture": [plain(e) for e in mixed(module, a, moved, split, line.curve.alphas)],
        "examples": len(split),
    }
    if "additivity" in scope.parts:
        found = weak_additivity(module, a, moved, split, alphas=scope.alphas, batch=scope.batch)
        out["additivity"] = found.to_json()
    if "commutativity" in scope.parts:
        out["commutativity"] = commutativity(module, a, moved, split, batch=scope.batch).to_json()
    if "stitching" in scope.parts:
        out["stitching"] = stitch(module, a, moved, split, **where).to_json()
    if "spectra" in scope.parts:
        out["spectra"] = {
            name: [
                s.to_json()
                for s in (
                    *weight_spectra(module, theta),
                    *feature_spectra(module, theta, split, layers=scope.layers),
                )
            ]
            for name, theta in (("a", a), ("b", b))
        }
    return out


def _equal_inits(pair: Pair, a: Theta, b: Theta) -> bool:
    """Two networks of one init at step 0 are equal on purpose."""
    return pair.at == 0 and all(torch.equal(v, b[n]) for n, v in a.items())


@torch.inference_mode()
def mixed(
    module: nn.Module, a: Theta, b: Theta, split: Split, alphas: Sequence[float]
) -> list[float]:
    """Error (%) of the mixed logits (1 - alpha) f(A) + alpha f(B) at each alpha.

    Arguments:
        a, b: state dicts of ``module``; split: images and labels, on the device to compute on.

    Source: Zhou et al. 2023, Lemma 1: such a mixture is wrong only where A or B is.
    """
    module = module.eval()
    wrong = torch.zeros(len(alphas), dtype=torch.int64, device=split.x.device)
    size = default_batch(module, split.x.device, "none")
    for x, y in zip(split.x.split(size), split.y.split(size), strict=True):
        # In float64 a mixture keeps the order of two logits that both have, so Lemma 1 is exact.
        f_a, f_b = (functional_call(module, dict(t), (x,)).double() for t in (a, b))
        for i, alpha in enumerate(alphas):
            wrong[i] += (((1 - alpha) * f_a + alpha * f_b).argmax(1) != y).sum()
    return [100 * w / len(split) for w in wrong.tolist()]


def examine(
    pairs: Sequence[tuple[Pair, Method | str | None]],
    scope: Scope | None = None,
    *,
    reference_error: float | None = None,
    max_error: float | None = None,
    store: Store | None = None,
    device: str = "cpu",
    workers: int = 0,
    label: str = "features",
) -> list[Featured]:
    """Train what is missing, bring B to A, and measure the features of every pair.

    Arguments:
        pairs: each with the method that brings B to A; None, or ``naive``: as it is.
        scope: what is measured.
        reference_error, max_error: percent, of gate G0; by default the reference is the median
            error of all ends of this call that have the same recipe.

    Returns:
        one :class:`Featured` an item, in their order; one that failed a gate is not ``valid``, and
        has no barrier.

    Raises:
        BadParameter: layers that do not exist; what training and matching refuse.

    Source: Zhou et al. 2023, Figures 2 to 7 and Tables 2 and 3; our chapter 3.
    """
    store, scope = store or Store(), scope or Scope()
    where = str(datasets.resolve_device(device))
    tasks = [Task(pair, _method(m), scope, store, where) for pair, m in pairs]
    raw = [read(task.entry()) for task in tasks]
    missing = [i for i, known in enumerate(raw) if known is None]
    jobs = [job for i in missing for job in jobs_of(tasks[i].pair)]
    made = run_tasks([tasks[i] for i in missing], jobs, workers, label)
    values = [known or made.pop(0) for known in raw]
    lines = [Barrier.from_json(value["barrier"]) for value in values]
    out = []
    for task, value, line in zip(tasks, values, lines, strict=True):
        recipe = task.pair.a.recipe
        alike = [x for t, x in zip(tasks, lines, strict=True) if t.pair.a.recipe == recipe]
        normal = normal_error(alike) if reference_error is None else reference_error
        out.append(_read(task, value, line.judged(reference_error=normal, max_error=max_error)))
    return out


def survey(
    groups: Mapping[K, Sequence[tuple[Pair, Method | str | None]]],
    scope: Scope | None = None,
    **how: Any,
) -> dict[K, list[Featured]]:
    """:func:`examine` for many groups of pairs at once, so that no process waits between them.

    Arguments:
        groups: any label -> items of :func:`examine`; how: its keywords.

    Returns:
        label -> one :class:`Featured` an item.
    """
    found = iter(examine([item for items in groups.values() for item in items], scope, **how))
    return {label: [next(found) for _ in items] for label, items in groups.items()}


def _method(method: Method | str | None) -> Method:
    return method if isinstance(method, Method) else Method(method or "naive")


def jobs_of(pair: Pair) -> list[Job]:
    """What has to be trained before a pair can be looked at."""
    return [Job(pair.a, weights=(pair.at,)), Job(pair.b, weights=(pair.at,))]


def _read(task: Task, raw: Mapping[str, Any], line: Barrier) -> Featured:
    def part(name: str, read: Callable[[Any], Any]) -> Any:
        return read(raw[name]) if name in raw else None

    return Featured(
        task.pair,
        task.method,
        line,
        {mode: Features.from_json(f) for mode, f in raw["features"].items()},
        tuple(float(e) for e in raw["mixture"]),
        int(raw["examples"]),
        part("additivity", Additivity.from_json),
        part("commutativity", Commutativity.from_json),
        part("stitching", Stitching.from_json),
        {k: tuple(map(Spectrum.from_json, v)) for k, v in raw.get("spectra", {}).items()},
    )


def mean_gap(found: Featured, alpha: float = 0.5, bn: str | None = None) -> float:
    """E[1 - cos_alpha], averaged over layers; NaN if a gate failed."""
    values = [v for v in found.gaps(alpha, bn).values() if not math.isnan(v)]
    return sum(values) / len(values) if values and found.valid else math.nan
