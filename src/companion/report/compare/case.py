"""What questions are asked of: networks, data, and what earlier questions have found."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from companion.connectivity import BN_MODES, Barrier, Walker, barrier, has_batchnorm
from companion.connectivity.walk import Scored, classification, predictions
from companion.core import codec
from companion.core.errors import BadParameter
from companion.core.numerics import exact_evaluation
from companion.core.theta import Theta, layout
from companion.data import Split
from companion.experiments.methods import Method
from companion.experiments.pairs import Evaluation
from companion.rebasin.calibration import ensemble_logprobs
from companion.report.compare.value import Json

NORMAL = 1.96
"""Standard errors of a 95 % interval."""

NONE_SEEN = 3.0
"""Where none of n examples differ, a share of up to 3 / n may (95 %, the rule of three)."""


@dataclass(frozen=True)
class Source:
    """How a command names what is compared, for the lines that repeat a part.

    Arguments:
        files: the networks, as they were typed.
        options: words that every command takes: the model, the data, the device.
    """

    files: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Reading:
    """One predictor on every example of a split.

    Arguments:
        loss, wrong, count: summed over the predictions of an example; shape (examples,), float64.
    """

    loss: Tensor
    wrong: Tensor
    count: Tensor

    def mean(self) -> dict[str, float]:
        """Loss in nats and error in percent."""
        n = self.count.sum()
        return {"loss": float(self.loss.sum() / n), "error": float(100 * self.wrong.sum() / n)}

    def above(self, others: Sequence[Reading]) -> tuple[dict[str, float], dict[str, float]]:
        """How far it lies above the mean of others, and half the width of a 95 % interval of that.

        The interval is over examples, each compared with itself, so networks that err on the same
        ones are told apart by the rest. Of a text an example is a window.
        """
        found, width = {}, {}
        total, n = self.count.sum(), int((self.count > 0).sum())
        for metric, unit in (("loss", 1.0), ("error", 100.0)):
            field = "wrong" if metric == "error" else metric
            base = torch.stack([getattr(o, field) for o in others]).mean(0)
            apart = getattr(self, field) - base
            mean = apart.sum() / total
            deviation = (apart - mean * self.count).square().sum().sqrt() / total
            least = NONE_SEEN / n if metric == "error" else 0.0
            found[metric] = unit * float(mean)
            width[metric] = unit * max(NORMAL * float(deviation), least)
        return found, width


Readings = dict[str, dict[str, Reading]]
"""Predictor -> split -> reading."""


def means(readings: Mapping[str, Mapping[str, Reading]]) -> dict[str, dict[str, dict[str, float]]]:
    """Predictor -> split -> loss and error."""
    return {n: {s: one.mean() for s, one in of.items()} for n, of in readings.items()}


class _Kept:
    """A score that keeps what it has seen of every example."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, ...]] = []

    def __call__(self, outputs: Tensor, y: Tensor) -> Scored:
        sums = [v.double().view(len(y), -1).sum(1) for v in predictions(outputs, y)]
        self.batches.append(tuple(sums))
        return classification(outputs, y)

    def taken(self, splits: Mapping[str, Split]) -> dict[str, Reading]:
        """What has been seen since the last time: every split once."""
        columns = [torch.cat(parts).cpu() for parts in zip(*self.batches, strict=True)]
        self.batches.clear()
        sizes = [len(s) for s in splits.values()]
        parts = zip(*(c.split(sizes) for c in columns), strict=True)
        return {name: Reading(*part) for name, part in zip(splits, parts, strict=True)}


@dataclass(eq=False)
class Case:
    """Networks and data, how they are measured, and what has been found so far.

    Arguments:
        names: of the networks.
        thetas: state dicts, in the same order; of ``module`` if there is one.
        module: the architecture; None: it is not known, or the networks are none of it.
        why: why there is no module, or no data.
        splits: what to measure on; empty without data.
        train: the training split that norms average over and matching looks at.
        classes: of the data.
        how: points, examples, BatchNorm.
        example: two inputs, on the device to compute on.
        init: where the networks come from, if that is known.
        max_error: of a network that counts as trained, in percent.
        source: for the commands.
    """

    names: tuple[str, ...]
    thetas: tuple[Theta, ...]
    module: nn.Module | None = None
    why: str = ""
    splits: Mapping[str, Split] = field(default_factory=dict)
    train: Split | None = None
    classes: int | None = None
    how: Evaluation = field(default_factory=Evaluation)
    example: Tensor | None = None
    init: Theta | None = None
    max_error: float | None = None
    source: Source | None = None
    found: dict[str, Any] = field(default_factory=dict)
    """Name of a question -> what a later one needs of its answer."""

    @property
    def net(self) -> nn.Module:
        """The architecture, of a question that needs it."""
        assert self.module is not None
        return self.module

    @property
    def pair(self) -> tuple[nn.Module, Theta, Theta]:
        """The architecture and the first two networks."""
        return self.net, self.thetas[0], self.thetas[1]

    @cached_property
    def letters(self) -> tuple[str, ...]:
        """What networks are called in the answers: ``A``, ``B``, …"""
        return tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(self.names)])

    @property
    def held_out(self) -> str:
        """The split that verdicts are read on."""
        return "test" if "test" in self.splits else [*self.splits][-1]

    @property
    def metric(self) -> str:
        """What barriers are judged by: the loss of a text, else the error."""
        return "loss" if self.splits[self.held_out].kind == "text" else "error"

    @cached_property
    def batchnorm(self) -> bool:
        """Whether the network keeps running statistics."""
        return self.module is not None and has_batchnorm(self.module)

    @cached_property
    def folds(self) -> bool:
        """Whether it is a GPT network, whose residual stream may be rotated."""
        from companion.rebasin.folding import parts_of

        try:
            parts_of(self.net)
        except BadParameter:
            return False
        return True

    def method(self, kind: str) -> Method:
        """How B is matched by ``weights`` or ``activations``: as its architecture asks for."""
        rotated = {"weights": "rotated", "activations": "rotated-activations"}
        name = rotated[kind] if self.folds else kind
        return Method(name, examples=self.how.train_examples)

    @property
    def seen(self) -> Split:
        """The training examples that matching, REPAIR and new statistics look at.

        Raises:
            BadParameter: there are none.
        """
        if self.train is None:
            raise BadParameter("this looks at training data, and no split is called 'train'.")
        return self.train.head(self.how.train_examples or len(self.train))

    def line(self, module: nn.Module, a: Theta, b: Theta, **more: Any) -> tuple[Barrier, Json]:
        """The barrier on a line, and its values as `companion barrier --json` has them.

        Beside them ``margin``: split -> metric -> half the width of a 95 % interval of the height,
        over examples.
        """
        how: Any = {"points": self.how.points, "bn": self.how.bn, "bn_data": self.train}
        how |= {"bn_examples": self.how.bn_examples, "classes": self.classes}
        how |= {"max_error": self.max_error} | more
        found = barrier(module, a, b, self.splits, **how)
        values: Json = {"valid": found.valid, "heights": found.heights(), "barrier": found}
        if found.valid:
            average = {"bn_data": self.train, "bn_examples": self.how.bn_examples}
            values["margin"] = margins(module, a, b, self.splits, found, **average)
        return found, values

    def read(self, networks: Mapping[str, tuple[nn.Module, Theta]]) -> Readings:
        """Networks with the statistics they store, on every example of every split."""
        found: Readings = {}
        for name, (module, theta) in networks.items():
            kept = _Kept()
            Walker(module, self.splits, score=kept).at(theta)
            found[name] = kept.taken(self.splits)
        return found

    @exact_evaluation()
    @torch.inference_mode()
    def ensemble(self) -> dict[str, Reading]:
        """The networks' mean log-probabilities, normalised again, on every split."""
        walkers = [Walker(self.net, self.splits) for _ in self.thetas]
        for walker, theta in zip(walkers, self.thetas, strict=True):
            walker.at(theta)
        kept = _Kept()
        for split in self.splits.values():
            for x, y in walkers[0].batches(split):
                logits = [w.module(x).flatten(0, -2) for w in walkers]
                kept(ensemble_logprobs(logits), y)
        return kept.taken(self.splits)

    @cached_property
    def pace(self) -> float:
        """CPU seconds that a forward pass takes for one example, measured once."""
        split = self.splits[self.held_out]
        part = split.head(min(32, len(split)))
        walker = Walker(self.net, {"": part})
        walker.here()
        begun = time.process_time()
        walker.here()
        return (time.process_time() - begun) / len(part)

    @cached_property
    def weights(self) -> int:
        """Parameters of a network."""
        if self.module is None:
            return sum(v.numel() for v in self.thetas[0].values())
        return sum(self.module.state_dict()[n].numel() for n in layout(self.module).parameters)

    def command(self, name: str, *words: object, of: Sequence[int] = (0, 1)) -> str:
        """The line that repeats a part; "" where no files are known."""
        if self.source is None:
            return ""
        files = [self.source.files[i] for i in of]
        return shlex.join(["companion", name, *files, *self.source.options, *map(str, words)])

    def examples(self, *, test: bool = True) -> list[object]:
        """Options that say how many examples are measured on."""
        given = {"--train-examples": self.how.train_examples}
        if test:
            given["--test-examples"] = self.how.test_examples
        return [word for k, v in given.items() if v is not None for word in (k, v)]


def margins(
    module: nn.Module,
    a: Theta,
    b: Theta,
    splits: Mapping[str, Split],
    found: Barrier,
    **average: Any,
) -> dict[str, dict[str, float]]:
    """Of a barrier, split -> metric -> half the width of a 95 % interval over examples.

    Arguments:
        module, a, b, splits: that it was measured of.
        average: ``bn_data`` and ``bn_examples``, as :class:`Walker` takes them.
    """
    curve, kept = found.curve, _Kept()
    mode = found.bn if found.bn in BN_MODES else "interpolate"  # there is nothing to choose
    walker = Walker(module, splits, bn=mode, score=kept, **average)
    tops = {
        (split, metric): max(
            zip(curve.excess(split, metric), curve.alphas, strict=True), key=lambda e: e[0]
        )[1]
        for split in splits
        for metric in ("loss", "error")
    }
    alphas = sorted({0.0, 1.0, *tops.values()})
    points: list[dict[str, Reading]] = []
    walker.walk(
        (a, b),
        [(1 - t, t) for t in alphas],
        each=lambda: points.append(kept.taken(splits)),
    )
    at = dict(zip(alphas, points, strict=True))
    return {
        split: {
            metric: at[tops[split, metric]][split].above([at[0.0][split], at[1.0][split]])[1][
                metric
            ]
            for metric in ("loss", "error")
        }
        for split in splits
    }


def plain(values: Mapping[str, Any]) -> Json:
    """Values as JSON; NaN and infinities are null, as the commands write them."""
    found: Json = codec.to_json(values, null=True)
    return found
