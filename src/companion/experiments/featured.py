"""Features of stored networks: pairs as they are, or matched first; measured once, stored.

What :mod:`companion.experiments.aligned` is for lines, this is for features: runs are trained if
they are missing, B is brought to A by a :class:`Method`, the line between them passes the gates of
every other line, and the instruments of :mod:`companion.features` look at both ends and between. ::

    found = examine([(pair, None), (pair, Method("weights"))], Scope(), device="cpu")
    found[1].barrier.height(), found[1].gaps(), found[1].lemma().violations

Explained in our chapter 3; Zhou et al. 2023.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from companion import data as datasets
from companion.connectivity import (
    BN_EXAMPLES,
    Barrier,
    barrier,
    check_bn_examples,
    grid,
    has_batchnorm,
)
from companion.connectivity.batches import default_batch
from companion.core import codec
from companion.core.errors import BadParameter, one_of
from companion.core.numerics import exact_evaluation
from companion.core.runs import Store
from companion.core.theta import Theta
from companion.data import Dataset, Split
from companion.experiments.featured_values import MODES, Featured, Lemma, mean_gap
from companion.experiments.measurement import Json, Measurement, ends, run
from companion.experiments.methods import Method, match, weights_of
from companion.experiments.pairs import Pair, averaging, jobs_of, normal_error
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
from companion.features.conditions import measurable
from companion.training import Job, build

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

__all__ = [
    "MODES",
    "PARTS",
    "Featured",
    "FeaturesOfPair",
    "Lemma",
    "Scope",
    "examine",
    "looks_of",
    "mean_gap",
    "mixed",
    "survey",
]

PARTS = ("additivity", "commutativity", "stitching", "spectra")
"""What may be measured besides the features: the two conditions of Theorem 1, the stitching test,
and the singular values of the weights and features of A and of B as it was trained. A condition
that is about nothing in a network (additivity, without a ReLU) is left out."""


@dataclass(frozen=True)
class Scope:
    """What of a pair is measured, and on which data.

    Arguments:
        layers: names or patterns, as :func:`companion.features.sites` takes them; None: all.
            Statistics over layers leave out the first that is measured, so name the network's first
            linear map, too.
        alphas: of the features between A and B; 0 is A, as everywhere in this book.
        points: of the error's line, odd.
        bn: modes, the first one for the headline; those of :data:`MODES`.
        parts: of :data:`PARTS`.
        test_examples: how many test images (None: all).
        bn_examples: training images that ``reestimate`` averages over (None: all).
        batch: images at a time (None: by itself).
    """

    layers: tuple[str, ...] | None = None
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    points: int = 25
    bn: tuple[str, ...] = MODES
    parts: tuple[str, ...] = ("additivity", "commutativity", "stitching")
    test_examples: int | None = None
    bn_examples: int | None = BN_EXAMPLES
    batch: int | None = None

    def __post_init__(self) -> None:
        grid(self.points)
        check_bn_examples(self.bn_examples)
        for part in self.parts:
            one_of("part", part, PARTS)
        for mode in self.bn:
            one_of("bn", mode, MODES)
        if not self.bn:
            raise BadParameter(f"bn: give at least one of {', '.join(MODES)}.")

    def identity(self) -> dict[str, Any]:
        """What determines the numbers, for the store.

        ``bn_examples`` counts for networks with BatchNorm only: the store's entry adds it.
        """
        known = codec.to_json(self)
        del known["batch"], known["bn_examples"]
        return known

    def split(self, data: Dataset) -> Split:
        """The test images, or the first of them."""
        return data.test.head(self.test_examples or len(data.test))


@dataclass(frozen=True)
class FeaturesOfPair(Measurement):
    """The features of A, of what a method makes of B, and between them."""

    KIND = "features"

    pair: Pair
    method: Method
    scope: Scope

    def identity(self, device: str) -> Json:
        bn = averaging(self.pair.a.recipe.net, self.scope.bn_examples)
        return {
            "scope": self.scope.identity() | bn,
            "method": self.method.identity(),
            **self.pair.identity(device),
        }

    def jobs(self) -> list[Job]:
        return jobs_of(self.pair)

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        return f"{ends(identity)}, features, units matched by {identity['method']['name']}"

    def measure(self, store: Store, device: str) -> object:
        scope, pair = self.scope, self.pair
        data = datasets.load(pair.a.recipe.data, device)
        module = build(pair.a, data, torch.device(device))
        a, b = (weights_of(r, pair.at, store, device) for r in (pair.a, pair.b))
        naive = self.method.name == "naive"
        moved = dict(b) if naive else match(self.method, module, a, b, data).apply(module, b)
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
            bn_examples=scope.bn_examples,
            classes=data.classes,
            same_noise=pair.a == pair.b or _equal_inits(pair, a, b),
        )
        where: dict[str, Any] = {"layers": scope.layers, "batch": scope.batch}
        average: dict[str, Any] = {"bn_data": data.train, "bn_examples": scope.bn_examples}
        seen = [
            features(module, a, moved, split, alphas=scope.alphas, bn=m, **average, **where)
            for m in modes
        ]
        out: Json = {
            "barrier": line,
            "features": {f.bn: f for f in seen},
            "mixture": mixed(module, a, moved, split, line.curve.alphas),
            "examples": len(split),
        }
        relus, linears = measurable(module, split)
        if "additivity" in scope.parts and relus:
            out["additivity"] = weak_additivity(
                module, a, moved, split, alphas=scope.alphas, batch=scope.batch
            )
        if "commutativity" in scope.parts and linears:
            out["commutativity"] = commutativity(module, a, moved, split, batch=scope.batch)
        if "stitching" in scope.parts:
            out["stitching"] = stitch(module, a, moved, split, **where)
        if "spectra" in scope.parts:
            out["spectra"] = {
                name: (
                    *weight_spectra(module, theta),
                    *feature_spectra(module, theta, split, layers=scope.layers),
                )
                for name, theta in (("a", a), ("b", b))
            }
        return out


def _equal_inits(pair: Pair, a: Theta, b: Theta) -> bool:
    """Two networks of one init at step 0 are equal on purpose."""
    return pair.at == 0 and all(torch.equal(v, b[n]) for n, v in a.items())


@exact_evaluation()
@torch.inference_mode()
def mixed(
    module: nn.Module, a: Theta, b: Theta, split: Split, alphas: Sequence[float]
) -> list[float]:
    """Error (%) of the mixed logits (1 - alpha) f(A) + alpha f(B) at each alpha.

    Arguments:
        a, b: state dicts of ``module``.
        split: images and labels, on the device to compute on.

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


def looks_of(
    pairs: Sequence[tuple[Pair, Method | str | None]], scope: Scope | None = None
) -> list[FeaturesOfPair]:
    """What :func:`examine` measures with these arguments, for a budget."""
    return [
        FeaturesOfPair(pair, m if isinstance(m, Method) else Method(m or "naive"), scope or Scope())
        for pair, m in pairs
    ]


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
    tasks = looks_of(pairs, scope)
    values = run(tasks, store=store, device=device, workers=workers, label=label)
    lines = [codec.from_json(Barrier, value["barrier"]) for value in values]
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
        groups: any label -> items of :func:`examine`.
        how: its keywords.

    Returns:
        label -> one :class:`Featured` an item.
    """
    found = iter(examine([item for items in groups.values() for item in items], scope, **how))
    return {label: [next(found) for _ in items] for label, items in groups.items()}


def _read(task: FeaturesOfPair, raw: Mapping[str, Any], line: Barrier) -> Featured:
    def part(name: str, kind: type[T]) -> T | None:
        return codec.from_json(kind, raw[name]) if name in raw else None

    return Featured(
        task.pair,
        task.method,
        line,
        codec.from_json(dict[str, Features], raw["features"]),
        codec.from_json(tuple[float, ...], raw["mixture"]),
        raw["examples"],
        part("additivity", Additivity),
        part("commutativity", Commutativity),
        part("stitching", Stitching),
        part("spectra", dict[str, tuple[Spectrum, ...]]) or {},
    )
