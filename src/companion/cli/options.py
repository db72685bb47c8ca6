"""Options that several commands share, with one wording each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from companion.core.errors import BadParameter, within

if TYPE_CHECKING:
    from companion.experiments.pairs import Evaluation

PICTURES = (".svg", ".png", ".pdf")
"""What ``--plot`` can write."""

A = Annotated[
    str,
    typer.Argument(
        metavar="A",
        help="A file of safetensors or torch.save, a folder or index of shards, or run:KEY@STEP.",
    ),
]
B = Annotated[str, typer.Argument(metavar="B", help="The other network, likewise.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="The architecture: a name of `companion models list`, torchvision:NAME, timm:NAME, "
        "hf:FOLDER, nets.py:factory, or package.module:factory. For runs of the store, and where A "
        "is a folder of transformers, it is known."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(help="A dataset of `companion data list`. For runs of the store it is known."),
]
Bn = Annotated[
    str,
    typer.Option(
        help="What BatchNorm does on the path: interpolate, reestimate or batch. All three are "
        "measured where there is BatchNorm; this one is the headline."
    ),
]
BnExamples = Annotated[
    int | None,
    typer.Option(
        "--bn-examples",
        help="Training examples that BatchNorm's mode reestimate averages over at each point; 0: "
        "all of them (default: 2000, which is nearly always enough, and quick).",
    ),
]
Points = Annotated[int, typer.Option(help="Points of the path, odd.")]
TrainExamples = Annotated[
    int | None, typer.Option(help="Measure on this many training examples instead of all.")
]
TestExamples = Annotated[
    int | None, typer.Option(help="Measure on this many test examples instead of all.")
]
MaxError = Annotated[
    float | None,
    typer.Option(
        callback=lambda value: within("--max-error", value, 0, 100),
        help="The largest test error, in percent, of a network that counts as trained "
        "(default: half the error of guessing; for text, that of always predicting the most "
        "frequent token).",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[Path | None, typer.Option(help="Write all numbers to this file.")]


def bn_average(bn_examples: int | None) -> int | None:
    """What ``--bn-examples`` asks for, as :class:`companion.connectivity.Walker` takes it.

    Raises:
        BadParameter: a negative number, or 1, of which there is no variance.
    """
    from companion.connectivity import BN_EXAMPLES

    if bn_examples is None:
        return BN_EXAMPLES
    if bn_examples < 0 or bn_examples == 1:
        raise BadParameter(f"--bn-examples: {bn_examples} must be 2 or more, or 0 for all.")
    return bn_examples or None


def evaluation(
    points: int,
    bn: str,
    train_examples: int | None,
    test_examples: int | None,
    bn_examples: int | None,
) -> Evaluation:
    """How to measure, of the options by these names."""
    from companion.experiments.pairs import Evaluation

    return Evaluation(points, bn, train_examples, test_examples, bn_average(bn_examples))
