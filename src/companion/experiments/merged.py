"""Networks made of several: merged, averaged, ensembled, corrected for what their data lacked.

Beside :mod:`companion.experiments.aligned`, which matches two networks. :func:`merge_runs` merges
any number of stored runs (Algorithm 3) and reads the result beside its inputs, their plain mean and
their ensemble; :func:`split_runs` reads two networks of biased halves of one dataset, what they
merge into, and the controls. Explained in our chapter 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Unpack

import torch
from torch import nn
from torch.func import functional_call

from companion import data as datasets
from companion.connectivity.batches import examples_a_pass
from companion.connectivity.walk import has_batchnorm
from companion.core import codec
from companion.core.errors import BadParameter
from companion.core.losses import is_label
from companion.core.numerics import exact_evaluation
from companion.core.runs import Store
from companion.core.theta import Theta, affine, layout, with_aliases, without_aliases
from companion.data import Dataset, Split, head_of, text
from companion.experiments.measurement import Json, Measurement, Where, key_of, run
from companion.experiments.methods import Method, match, spec_of, weights_of
from companion.experiments.pairs import Evaluation, Pair
from companion.rebasin import Spec, calibration, triangle_defect, weight_matching
from companion.rebasin.calibration import ensemble_logprobs, prior_shift
from companion.rebasin.merge import merge_many
from companion.rebasin.repair import reset_batchnorm
from companion.training import Job, Run, build

BINS = 10
"""Of reliability curves and of the expected calibration error; the paper's Fig. 13 has 10."""


@dataclass(frozen=True)
class Reading:
    """Loss, error and calibration of one predictor on one split.

    Arguments:
        loss: mean cross-entropy, nats.
        error: percent.
        ece: expected calibration error of the top label, percentage points.
        confidence, fraction: over all (example, class) pairs, in bins of the stated probability:
            its mean, and how often it came true; count: pairs in the bin. Empty bins are left out.
    """

    loss: float
    error: float
    ece: float
    confidence: tuple[float, ...] = field(default=(), repr=False)
    fraction: tuple[float, ...] = field(default=(), repr=False)
    count: tuple[int, ...] = field(default=(), repr=False)


Readings = dict[str, dict[str, Reading]]
"""Predictor -> split -> reading."""


def read_logits(logits: torch.Tensor, y: torch.Tensor) -> Reading:
    """The reading of logits or log-probabilities, shape (N, K), against labels, shape (N,).

    Of a text, whose labels have shape (N, L), every position is a prediction: (N * L, K). Labels of
    -100 are left out.
    """
    y = y.flatten()
    if not bool((kept := is_label(y)).all()):
        logits, y = logits[kept], y[kept]
    p = logits.double().softmax(1)
    curve = calibration.reliability(p, y, bins=BINS)
    full = [i for i, n in enumerate(curve.counts) if n]
    return Reading(
        calibration.nll(logits, y),
        100 * float((logits.argmax(1) != y).double().mean()),
        100 * calibration.ece(p, y, bins=BINS),
        tuple(curve.confidence[i] for i in full),
        tuple(curve.fraction[i] for i in full),
        tuple(curve.counts[i] for i in full),
    )


@exact_evaluation()
@torch.inference_mode()
def logits_of(
    module: nn.Module, theta: Theta, x: torch.Tensor, batch: int | None = None
) -> torch.Tensor:
    """Logits of a network in eval mode, shape (N, K), on the device of ``x``.

    Of a text, those of all positions one after the other: (N * L, K). ``batch``: examples a forward
    pass, at most; default :func:`companion.connectivity.batches.examples_a_pass`.
    """
    module = module.eval()
    own = without_aliases(theta, layout(module).ties)
    parts = x.split(batch or examples_a_pass(x))
    return torch.cat([functional_call(module, own, (part,)).flatten(0, -2) for part in parts])


def _mean(
    module: nn.Module, thetas: Sequence[Theta], data: Dataset, evaluation: Evaluation
) -> Theta:
    """The mean of networks, integers from the first; BatchNorm's statistics estimated again, from
    as many training images as on the lines between two networks."""
    share, lay = [1 / len(thetas)] * len(thetas), layout(module)
    theta = with_aliases({**thetas[0], **affine(thetas, share, lay.floating)}, lay.ties)
    if not has_batchnorm(module):
        return theta
    return reset_batchnorm(module, theta, head_of(data.train.x, evaluation.bn_examples))


def _readings(
    module: nn.Module,
    networks: Mapping[str, Theta],
    splits: Mapping[str, Split],
    combine: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> Readings:
    """Readings of networks, and of what ``combine`` makes of their logits."""
    found: Readings = {}
    for name, split in splits.items():
        logits = {n: logits_of(module, t, split.x) for n, t in networks.items()}
        for n, z in {**logits, **combine(logits)}.items():
            found.setdefault(n, {})[name] = read_logits(z, split.y)
    return found


@dataclass(frozen=True)
class Merge(Measurement):
    """Readings of one merge of many; the arguments are :func:`merge_runs`'."""

    KIND = "merged"
    SEMANTICS = 2  # since 2, weight matching begins with auctions

    runs: tuple[Run, ...]
    evaluation: Evaluation
    on: str | None = None

    def dataset(self, device: str) -> Dataset:
        """What the networks are read on."""
        return datasets.load(self.on or self.runs[0].recipe.data, device)

    def identity(self, device: str) -> Json:
        return {
            "evaluation": self.evaluation.identity(self.runs[0].recipe.net),
            "on": self.dataset(device).fingerprint,
            "runs": [key_of(r, device) for r in self.runs],
        }

    def jobs(self) -> list[Job]:
        return [Job(r, weights=(r.last_step,)) for r in self.runs]

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        return f"{len(identity['runs'])} networks merged into one"

    def opened(self, store: Store, device: str) -> tuple[Dataset, nn.Module, list[Theta], Spec]:
        """The data, the architecture, the networks, and what may move."""
        data = self.dataset(device)
        module = build(self.runs[0], data, torch.device(device))
        thetas: list[Theta] = [weights_of(r, r.last_step, store, device) for r in self.runs]
        return data, module, thetas, spec_of(module, data)

    def measure(self, store: Store, device: str) -> object:
        data, module, thetas, spec = self.opened(store, device)
        merged = merge_many(spec, thetas)
        moved = [spec.permute(t, p) for t, p in zip(thetas, merged.perms, strict=True)]
        networks: dict[str, Theta] = {f"input {i}": t for i, t in enumerate(thetas)}
        networks |= {
            n: _mean(module, these, data, self.evaluation)
            for n, these in (("mean", thetas), ("merged", moved))
        }

        def combine(logits: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            inputs = [logits[f"input {i}"] for i in range(len(thetas))]
            return {"ensemble": ensemble_logprobs(inputs)}

        found = _readings(module, networks, self.evaluation.splits(data), combine)
        return {"readings": found, "passes": merged.passes}


def merge_runs(
    groups: Sequence[Sequence[Run]],
    evaluation: Evaluation | None = None,
    *,
    on: str | None = None,
    **where: Unpack[Where],
) -> list[Readings]:
    """Train what is missing, merge every group of runs (Algorithm 3), and read the outcomes.

    Arguments:
        groups: of two runs or more each, all of one architecture.
        on: dataset to read on; default: the one the first run was trained on.

    Returns:
        for each group the readings of ``input 0``, ``input 1``, …, of their plain ``mean``, of
        ``merged``, and of the ``ensemble`` of the inputs' log-probabilities.

    Source: Git Re-Basin, App. A.10, Table 3 and Fig. 13; our chapter 2.
    """
    if any(len(g) < 2 for g in groups):
        raise BadParameter("merge_runs: a group needs two runs or more.")
    tasks = [Merge(tuple(g), evaluation or Evaluation(), on) for g in groups]
    raw = run(tasks, label="merging many", **where)
    return [codec.from_json(Readings, r["readings"]) for r in raw]


@dataclass(frozen=True)
class Agreement:
    """Networks in an order that all of them agree on, and what pairs on their own do.

    Arguments:
        readings: of their mean, each matched with the ``first``; in the order that MergeMany finds,
            ``merged``; and in that of ``c2m3``.
        defect: of the pairs, each matched on its own: see
            :func:`companion.rebasin.triangle_defect`.
        shares: ``passes`` (MergeMany) and ``c2m3`` -> the objective as a share of its bound.
    """

    readings: Readings
    defect: float
    shares: dict[str, float]


@dataclass(frozen=True)
class Agreed(Merge):
    """An :class:`Agreement`; the arguments are :func:`agree_runs`'."""

    KIND = "agreed"
    SEMANTICS = 1

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        return f"{len(identity['runs'])} networks in one order (C2M3)"

    def measure(self, store: Store, device: str) -> object:
        data, module, thetas, spec = self.opened(store, device)
        passes = merge_many(spec, thetas)
        found = merge_many(spec, thetas, method="c2m3", start=passes)
        pairs = {
            (i, j): weight_matching(spec, thetas[i], thetas[j]).perms
            for i, j in combinations(range(len(thetas)), 2)
        }
        to_first = [spec.identity(), *(pairs[0, j] for j in range(1, len(thetas)))]
        networks: dict[str, Theta] = {}
        for name, perms in (("first", to_first), ("merged", passes.perms), ("c2m3", found.perms)):
            moved = [spec.permute(t, p) for t, p in zip(thetas, perms, strict=True)]
            networks[name] = _mean(module, moved, data, self.evaluation)
        splits = self.evaluation.splits(data)
        return Agreement(
            _readings(module, networks, splits, lambda logits: {}),
            triangle_defect(spec, pairs),
            {"passes": passes.share, "c2m3": found.share},
        )


def agree_runs(
    groups: Sequence[Sequence[Run]],
    evaluation: Evaluation | None = None,
    *,
    on: str | None = None,
    **where: Unpack[Where],
) -> list[Agreement]:
    """Train what is missing, and bring every group of runs into one order by C2M3.

    Arguments:
        groups: of three runs or more each, all of one architecture without units inside of others.
        on: dataset to read on; default: the one the first run was trained on.

    Source: Crisostomi et al. 2024, Section 3; our chapter 2b.
    """
    if any(len(g) < 3 for g in groups):
        raise BadParameter("agree_runs: a group needs three runs or more.")
    tasks = [Agreed(tuple(g), evaluation or Evaluation(), on) for g in groups]
    raw = run(tasks, label="one order for all", **where)
    return [codec.from_json(Agreement, r) for r in raw]


@dataclass(frozen=True)
class Halves(Measurement):
    """Readings of two networks of biased parts of one dataset; arguments as :func:`split_runs`."""

    KIND = "halves"
    SEMANTICS = 2  # since 2, weight matching begins with auctions

    pair: Pair
    full: Run
    evaluation: Evaluation

    @property
    def runs(self) -> tuple[Run, Run, Run]:
        """A, B and the network of the whole dataset."""
        return self.pair.a, self.pair.b, self.full

    def identity(self, device: str) -> Json:
        known = self.evaluation.identity(self.full.recipe.net)
        return {"evaluation": known, "runs": [key_of(r, device) for r in self.runs]}

    def jobs(self) -> list[Job]:
        return [Job(r, weights=(r.last_step,)) for r in self.runs]

    @staticmethod
    def describe(identity: Mapping[str, Any]) -> str:
        a, b, whole = (key[:12] for key in identity["runs"])
        return f"{a} and {b} of parts of the data, beside {whole} of all"

    def measure(self, store: Store, device: str) -> object:
        data = datasets.load(self.full.recipe.data, device)
        module = build(self.full, data, torch.device(device))
        a, b, full = (weights_of(r, r.last_step, store, device) for r in self.runs)
        moved = match(Method("weights"), module, a, b, data).apply(module, b)
        networks = {
            "A": a,
            "B": b,
            "mean of A and B": _mean(module, (a, b), data, self.evaluation),
            "merged": _mean(module, (a, moved), data, self.evaluation),
            "full data": full,
        }

        def prior(split: Split) -> torch.Tensor:
            return torch.bincount(split.y, minlength=data.classes)

        own = {
            n: prior(datasets.load(r.recipe.data, device).train)
            for n, r in zip("AB", self.runs[:2], strict=True)
        }

        def combine(logits: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            whole = prior(data.train)
            mended = {f"{n} corrected": prior_shift(logits[n], p, whole) for n, p in own.items()}
            return {**mended, "ensemble": ensemble_logprobs([logits["A"], logits["B"]])}

        return {"readings": _readings(module, networks, self.evaluation.splits(data), combine)}


def split_runs(
    pairs: Sequence[Pair],
    full: Sequence[Run],
    evaluation: Evaluation | None = None,
    **where: Unpack[Where],
) -> list[Readings]:
    """Train what is missing, and read networks of biased halves, merged ones, and controls.

    Arguments:
        pairs: A and B, each trained on its part of a dataset (``digits@split-a``, ``-b``).
        full: for each pair a network trained on the whole dataset, on which all are read.

    Returns:
        for each pair the readings of ``A``, ``B``, both ``corrected`` for the class frequencies of
        their data, their ``ensemble``, the plain ``mean of A and B``, the ``merged`` midpoint after
        weight matching, and ``full data``.

    Source: Git Re-Basin, Section 5.4, Figs. 5, 10, 11; the correction as a control is from Jordan
    et al. 2023; our chapter 2.
    """
    if len(pairs) != len(full):
        raise BadParameter("split_runs: one network of the whole dataset for each pair is needed.")
    if any(text.is_text(run.recipe.data) for run in full):
        raise BadParameter("split_runs: parts are of labelled images; a text has no parts.")
    tasks = [Halves(p, f, evaluation or Evaluation()) for p, f in zip(pairs, full, strict=True)]
    raw = run(tasks, label="split data", **where)
    return [codec.from_json(Readings, r["readings"]) for r in raw]
