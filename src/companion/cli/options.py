"""Options that several commands share, with one wording each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli.console import say
from companion.cli.models import reachable
from companion.core.errors import BadParameter, within

if TYPE_CHECKING:
    from companion.core.runs import Store
    from companion.experiments.budget import Plan
    from companion.experiments.pairs import Evaluation
    from companion.training import Recipe

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
InShape = Annotated[
    str | None,
    typer.Option(
        help="Without --data: channels,height,width of an image, such as 3,32,32, or the "
        "tokens in a window, such as 64; the shape of any other example, likewise."
    ),
]
Classes = Annotated[
    int | None, typer.Option(help="Without --data: number of classes, or of tokens.")
]
MatchExamples = Annotated[
    int | None,
    typer.Option(
        help="Training examples that matching by activations, and the statistics of a merged "
        "network, look at (default: all)."
    ),
]
MatchingSeed = Annotated[int, typer.Option(help="Of everything random in the matching.")]
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
Workers = Annotated[int, typer.Option(help="Processes; 0 is one per core (CPU only).")]


def _use(ctx: typer.Context, text: str | None) -> str | None:
    """The engine, for as long as the command runs."""
    from companion.core import slurm

    ctx.with_resource(slurm.using(text))
    return text


Engine = Annotated[
    str | None,
    typer.Option(
        callback=_use,
        help="Where to train and measure: local; slurm, with what Slurm should know, such as "
        "slurm:partition=main,time=60,tasks=32,cpus=4 (also account, qos, constraint, gpus, "
        "memory, jobs); queue, for workers started by hand. Default: COMPANION_ENGINE, else local.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only say what there is to do, how long it takes, and what is submitted."
    ),
]

# How a network is trained: the fields of a Recipe, for :func:`recipe`.
Net = Annotated[
    str, typer.Option(help="A network of `companion models list`, or package.module:factory.")
]
TrainedOn = Annotated[str, typer.Option(help="A dataset of `companion data list`.")]
Steps = Annotated[int, typer.Option(help="T, the optimiser steps of the whole training.")]
Batch = Annotated[int, typer.Option(help="Images, or windows of text, a step.")]
Optimizer = Annotated[str, typer.Option(help="sgd, adam or adamw.")]
Lr = Annotated[float, typer.Option(help="Peak learning rate.")]
Momentum = Annotated[float, typer.Option(help="Of sgd.")]
Nesterov = Annotated[bool, typer.Option("--nesterov", help="For sgd.")]
Betas = Annotated[str, typer.Option(help="Of adam and adamw.")]
WeightDecay = Annotated[float, typer.Option(help="As the optimiser defines it.")]
WeightDecayOn = Annotated[
    str, typer.Option(help="all, or matrices: no norms, biases and embeddings.")
]
Schedule = Annotated[
    str, typer.Option(help="constant, step (with milestones), cosine or onecycle.")
]
Milestones = Annotated[
    str, typer.Option(help="Where step lowers the rate: fractions of T, or steps above 1.")
]
Gamma = Annotated[float, typer.Option(help="What step multiplies the rate by.")]
Warmup = Annotated[int, typer.Option(help="Steps of linear warm-up.")]
Div = Annotated[float, typer.Option(help="onecycle starts at lr / div.")]
FinalDiv = Annotated[float, typer.Option(help="onecycle ends at lr / div / final_div.")]
Augment = Annotated[str, typer.Option(help="none, flip, crop4, …; for text shift.")]
Precision = Annotated[str, typer.Option(help="float32 or bf16.")]


def numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """The numbers of ``"0,50,200"``.

    Raises:
        BadParameter: one of them is none.
    """
    try:
        return [kind(part) for part in re.split(r"[,\s]+", text.strip(", ")) if part]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise BadParameter(f"{option}: {text!r} must be {what} with commas between them.") from None


def recipe(given: Mapping[str, Any]) -> Recipe:
    """How to train, of the options by the names of its fields.

    Arguments:
        given: name of an option -> its value; others are left out.

    Raises:
        BadParameter: as :class:`companion.training.Recipe`.
    """
    from dataclasses import fields

    from companion.training import Recipe, recipe_from

    values = {f.name: given[f.name] for f in fields(Recipe)} | {"net": reachable(given["net"])}
    values |= {n: numbers(f"--{n}", given[n], float) for n in ("betas", "milestones")}
    return recipe_from(values)


def announce(
    tasks: Plan, how: Evaluation, store: Store, device: str, workers: int, dry_run: bool
) -> None:
    """Say what is to be trained; of a dry run also what it costs, and end there.

    Arguments:
        tasks: all that the command measures.
        how: to evaluate, for the estimate.
        store, device, workers: of the command.
        dry_run: whether that is all.
    """
    from companion.core import slurm
    from companion.experiments.budget import count, submitted

    costs = count([tasks], store=store, device=device)
    for cost in costs:
        runs, left = cost.whole.runs, cost.missing
        say(
            f"{runs} runs: {runs - left.runs} in the store {store.root}, "
            f"{left.runs} to train ({left.steps:,} steps) on {device}"
        )
    if dry_run:
        for line in submitted(costs, how, device=device, workers=workers):
            say(line)
        raise typer.Exit
    if engine := slurm.asked_for():
        slurm.check(engine)


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
