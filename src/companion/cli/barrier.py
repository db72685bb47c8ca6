"""``companion barrier``: is the straight line between two checkpoints low?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli.console import note, output, say, table, write_json
from companion.cli.models import reachable
from companion.cli.options import BnExamples, averaged
from companion.core.errors import BadParameter

if TYPE_CHECKING:
    from companion.cli.checkpoints import Checkpoint
    from companion.connectivity import Barrier
    from companion.data import Split

EXAMPLE = (
    "Example: companion barrier a.safetensors b.safetensors --model resnet20 --data cifar10 "
    "--bn reestimate --plot curve.svg"
)
PICTURES = (".svg", ".png", ".pdf")
UNITS = {"loss": "nats", "error": "points"}


def number(value: float, metric: str) -> str:
    """A loss to 4 digits, an error to 2; INVALID where a gate failed."""
    return "INVALID" if math.isnan(value) else f"{value:.{4 if metric == 'loss' else 2}f}"


def heights(found: Barrier) -> dict[str, dict[str, dict[str, float]]]:
    """Split -> metric -> definition -> barrier, under the headline BatchNorm mode."""
    from companion.connectivity import DEFINITIONS

    return {
        split: {m: {d: found.height(split, m, d) for d in DEFINITIONS} for m in UNITS}
        for split in found.curve.values
    }


def examples(split: Split) -> str:
    """How many of what: ``1,437 images``, or ``290 windows of 64 tokens``."""
    what = "images" if split.kind == "images" else f"windows of {split.window} tokens"
    return f"{len(split):,} {what}"


def named(option: str, given: str | None, ends: tuple[Checkpoint, Checkpoint], field: str) -> str:
    """``given``, or what the runs of the store say, if they agree."""
    known = {str(end.recipe[field]) for end in ends if end.recipe}
    if given is None and len(known) == 1:
        return known.pop()
    if given is None:
        raise BadParameter(
            f"{option}: say which. (Only two runs of the store that agree make it known.)"
        )
    return given


def command(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A safetensors file, or run:KEY or run:KEY@STEP.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other network, likewise.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The architecture: a name of `companion models list`, or package.module:factory. "
            "For runs of the store it is known."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A dataset of `companion data list`. For runs of the store it is known."),
    ] = None,
    bn: Annotated[
        str,
        typer.Option(
            help="What BatchNorm does on the path: interpolate, reestimate or batch. All three are "
            "measured where there is BatchNorm; this one is the headline."
        ),
    ] = "interpolate",
    bn_examples: BnExamples = None,
    points: Annotated[int, typer.Option(help="Points of the path, odd.")] = 31,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Move only these layers (a name or the beginning of names, such as stage1); "
            "may be given several times."
        ),
    ] = None,
    rest: Annotated[str, typer.Option(help="Where the other layers stay: a or b.")] = "a",
    train_examples: Annotated[
        int | None, typer.Option(help="Measure on this many training examples instead of all.")
    ] = None,
    test_examples: Annotated[
        int | None, typer.Option(help="Measure on this many test examples instead of all.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Gate G0: the largest test error, in percent, of a network that counts as trained "
            "(default: half the error of guessing; of text, that of always the commonest token)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curve into this file (.svg, .png or .pdf).")
    ] = None,
) -> None:
    """Measure the barrier between two checkpoints of one architecture.

    Prints the gates, then loss and error at both ends and the barrier under both definitions: above
    the mean of the ends, and above the straight line between them. If a gate fails, the barrier is
    INVALID.
    """
    output(json, "--json")
    output(plot, "--plot", PICTURES)
    layers = layers or None

    from companion import data as datasets
    from companion import models
    from companion.cli.checkpoints import fit, read, vocabulary
    from companion.connectivity import barrier
    from companion.core.theta import distance, layout
    from companion.experiments.pairs import Evaluation

    evaluation = Evaluation(points, bn, train_examples, test_examples, averaged(bn_examples))
    ends = (read(a), read(b))
    net = named("--model", model, ends, "net")
    name = named("--data", data, ends, "data")
    dataset = datasets.load(name, device)
    module = models.build(reachable(net), dataset.in_shape, vocabulary(dataset, ends))
    first, second = (fit(module, end, label) for label, end in zip("AB", ends, strict=True))
    for label, end in (("A", first), ("B", second)):
        for text in end.notes:
            note(f"{label} ({end.source}): {text}")

    splits = evaluation.splits(dataset)
    sizes = ", ".join(f"{split} ({examples(s)})" for split, s in splits.items())
    entries = layout(module)
    moving = set(entries.select(layers)).intersection(entries.parameters)
    say(f"A = {a}")
    say(f"B = {b}")
    say(f"{models.canonical(net)} on {dataset.label}: {points} points, {sizes}")
    found = barrier(
        module,
        first.theta,
        second.theta,
        splits,
        points=points,
        groups=layers,
        rest=rest,
        bn=bn,
        bn_data=dataset.train,
        bn_examples=evaluation.bn_examples,
        classes=dataset.classes,
        max_error=max_error,
    )
    if layers:
        apart = distance(first.theta, second.theta, sorted(moving))
        say(f"moving: {', '.join(layers)} (distance {apart:.4g}); the rest stays at {rest.upper()}")
    _show(found)
    write_json(
        json,
        {
            "command": "barrier",
            "a": {"source": a, "sha256": first.sha256, "notes": first.notes},
            "b": {"source": b, "sha256": second.sha256, "notes": second.notes},
            "model": models.canonical(net),
            "data": {"name": name, "label": dataset.label, "fingerprint": dataset.fingerprint},
            "layers": layers,
            "rest": rest,
            "valid": found.valid,
            "heights": heights(found),
            "barrier": found.to_json(),
        },
    )
    if plot:
        from companion.report import figures, plots

        title = "Error and loss on the line between two networks"
        with figures.file(plot, title, figsize=(8.6, 3.7)) as fig:
            plots.barriers(fig, {"": found})
        say(f"curve drawn in {plot}")


def _show(found: Barrier) -> None:
    """Gates, the table of the headline mode, and a line for each other mode."""
    for gate in found.gates:
        say(f"  {gate}")
    rows = []
    for split, metrics in heights(found).items():
        for metric, unit in UNITS.items():
            ends = found.curve.ends(split, metric)
            above = metrics[metric]
            rows.append(
                (
                    f"{split} {metric}",
                    *(number(v, metric) for v in ends),
                    number(above["mean"], metric),
                    number(above["linear"], metric),
                    unit,
                    f"{found.curve.peak(split, metric):.2f}",
                )
            )
    say()
    columns = ["", ">A", ">B", ">above mean", ">above line", "", ">highest at α"]
    table(
        columns, rows, title="barrier" + ("" if found.bn == "none" else f", BatchNorm {found.bn}")
    )
    for mode, curve in found.curves.items():
        if mode != found.bn:
            values = (
                f"{split} {number(found.height(split, 'error', bn=mode), 'error')}"
                for split in curve.values
            )
            say(f"error barrier, BatchNorm {mode}: {', '.join(values)} points")
    say()
    say(str(found))


def summary(found: Barrier) -> dict[str, Any]:
    """A barrier for JSON: whether it is valid, its heights, and everything behind them."""
    return {"valid": found.valid, "heights": heights(found), "barrier": found.to_json()}
