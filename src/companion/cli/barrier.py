"""``companion barrier``: is the straight line between two checkpoints low?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli import options
from companion.cli.console import UNITS, number, output, say, table, write_json
from companion.cli.opening import amounts, opened

if TYPE_CHECKING:
    from companion.connectivity import Barrier

EXAMPLE = (
    "Example: companion barrier a.safetensors b.safetensors --model resnet20 --data cifar10 "
    "--bn reestimate --plot curve.svg"
)


def heights(found: Barrier) -> dict[str, dict[str, dict[str, float]]]:
    """Split -> metric -> definition -> barrier, under the headline BatchNorm mode."""
    from companion.connectivity import DEFINITIONS

    return {
        split: {m: {d: found.height(split, m, d) for d in DEFINITIONS} for m in UNITS}
        for split in found.curve.values
    }


def command(
    a: options.A,
    b: options.B,
    model: options.Model = None,
    data: options.Data = None,
    bn: options.Bn = "interpolate",
    bn_examples: options.BnExamples = None,
    points: options.Points = 31,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Move only these layers (a name or the beginning of names, such as stage1); "
            "may be given several times."
        ),
    ] = None,
    rest: Annotated[str, typer.Option(help="Where the other layers stay: a or b.")] = "a",
    train_examples: options.TrainExamples = None,
    test_examples: options.TestExamples = None,
    max_error: options.MaxError = None,
    device: options.Device = "auto",
    json: options.Json = None,
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
    output(plot, "--plot", options.PICTURES)
    layers = layers or None

    from companion.connectivity import barrier
    from companion.core.theta import distance, layout

    how = options.evaluation(points, bn, train_examples, test_examples, bn_examples)
    pair = opened(a, b, model, data, device)
    dataset, module, first, second = pair.data, pair.module, pair.a.theta, pair.b.theta
    splits = how.splits(dataset)
    entries = layout(module)
    moving = set(entries.select(layers)).intersection(entries.parameters)
    pair.announce(f"{dataset.label}: {points} points, {amounts(splits)}")
    found = barrier(
        module,
        first,
        second,
        splits,
        points=points,
        groups=layers,
        rest=rest,
        bn=bn,
        bn_data=dataset.train,
        bn_examples=how.bn_examples,
        classes=dataset.classes,
        max_error=max_error,
    )
    if layers:
        apart = distance(first, second, sorted(moving))
        say(f"moving: {', '.join(layers)} (distance {apart:.4g}); the rest stays at {rest.upper()}")
    _show(found)
    write_json(
        json,
        {
            "command": "barrier",
            **pair.about_data(),
            "layers": layers,
            "rest": rest,
            **summary(found),
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
    return {"valid": found.valid, "heights": heights(found), "barrier": found}
