"""One report on any two networks, or more: what they are to each other, and what one may do. ::

    found = compare(module, theta_a, theta_b, data)
    print(found)                                 # the findings
    found.answer("barrier").values["heights"]    # as `companion barrier --json` has them

``value.py`` what is found · ``case.py`` what is compared · ``questions.py`` what is asked, and at
which cost · ``asking.py`` in which order · ``verdicts.py`` what it means · ``sheet.py`` the page.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import torch
from torch import nn

from companion.connectivity import has_batchnorm
from companion.connectivity.barrier import splits_of
from companion.core.errors import BadParameter, within
from companion.core.theta import Theta, check_theta
from companion.data import Dataset, Split
from companion.experiments.pairs import Evaluation
from companion.report import provenance
from companion.report.compare.asking import Asking, Progress
from companion.report.compare.case import Case, Source
from companion.report.compare.value import Answer, Comparison, Finding, loads
from companion.report.compare.verdicts import THRESHOLDS, findings

__all__ = [
    "THRESHOLDS",
    "Answer",
    "Comparison",
    "Finding",
    "Source",
    "compare",
    "loads",
]

POINTS, TRAIN, TEST = 11, 1000, 2000
"""Of a report: points of a line; training and test examples that stand for all of them."""


def compare(
    module: nn.Module | None,
    theta_a: Theta,
    theta_b: Theta,
    data: Dataset | Mapping[str, Any] | Any | None = None,
    *,
    more: Sequence[Theta] = (),
    names: Sequence[str] | None = None,
    model: str | None = None,
    init: Theta | None = None,
    example: torch.Tensor | None = None,
    points: int = POINTS,
    bn: str | None = None,
    train_examples: int | None = TRAIN,
    test_examples: int | None = TEST,
    bn_examples: int | None = TRAIN,
    max_error: float | None = None,
    minutes: float | None = None,
    progress: Progress | None = None,
    source: Source | None = None,
    why: str = "",
    about: Mapping[str, Any] | None = None,
) -> Comparison:
    """What two networks are to each other, or several: gates, barriers, matching, layers, features.

    Arguments:
        module: the architecture. None: it is not known, and weights are compared as they are.
        theta_a, theta_b, more: state dicts of it.
        data: as :func:`companion.connectivity.barrier` takes it. None: weights alone are looked at.
        names: what people call the networks; default ``A``, ``B``, ….
        model: what they call the architecture; default the class of ``module``.
        init: where all of them come from, for the angle there.
        example: without data, two inputs to prove on what matching may move.
        points: of each line, odd.
        bn: what BatchNorm does on the lines that are judged; default ``reestimate``.
        train_examples, test_examples: that stand for all of them; None: all.
        bn_examples: training inputs that BatchNorm averages over at a point.
        max_error: of a network that counts as trained, in percent.
        minutes: how long it may take; cheap questions are asked first, and what does not fit is
            not asked. None: as long as it takes.
        progress: gets a line of text before each question.
        source: how a command names the networks and the data, for the lines that repeat a part.
        why: why there are no data, or no module.
        about: more provenance.

    Raises:
        BadParameter: options that make no sense. What the networks or the data do not allow is
            said in the comparison.
    """
    within("minutes", minutes, 0, 1e6)
    begun = time.monotonic()
    thetas = (theta_a, theta_b, *more)
    letters = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(thetas)])
    called = letters if names is None else tuple(names)
    if not len(called) == len(letters) == len(thetas):
        raise BadParameter(f"names: {len(called)} for {len(thetas)} networks (26 at most).")
    how = Evaluation(points, bn or "reestimate", train_examples, test_examples, bn_examples)
    splits, train, classes = _data(data, how)
    if module is not None and not has_batchnorm(module):
        how = Evaluation(points, "interpolate", train_examples, test_examples, bn_examples)
    if module is not None:
        try:
            thetas = tuple(
                check_theta(module, t, name) for t, name in zip(thetas, letters, strict=True)
            )
        except BadParameter as e:
            module, why = None, str(e)
    case = Case(
        *(called, thetas, module, why, splits, train, classes, how),
        example=next(iter(splits.values())).x[:2] if example is None and splits else example,
        init=init,
        max_error=max_error,
        source=source,
    )
    asking = Asking(case, None if minutes is None else 60 * minutes, progress)
    answers = asking.all()
    label = None
    if splits:
        label = data.label if isinstance(data, Dataset) else "the data given"
    return Comparison(
        *(called, model or type(module).__name__, label, answers, findings(called, answers)),
        provenance.record(
            date=date.today().isoformat(),
            seconds=round(time.monotonic() - begun, 1),
            minutes=minutes,
            points=points,
            bn=how.bn if case.batchnorm else None,
            examples={name: len(split) for name, split in splits.items()},
            **(about or {}),
        ),
    )


def _data(
    data: Dataset | Mapping[str, Any] | Any | None, how: Evaluation
) -> tuple[dict[str, Split], Split | None, int | None]:
    """The splits to measure on, the training split, and the number of classes."""
    if data is None:
        return {}, None, None
    if isinstance(data, Dataset):
        return how.splits(data), data.train, data.classes
    splits = dict(splits_of(data))
    asked = {name: how.train_examples if name == "train" else how.test_examples for name in splits}
    heads = {name: s.head(asked[name] or len(s)) for name, s in splits.items()}
    return heads, splits.get("train"), None
