"""``companion barrier``: is the straight line between two checkpoints low?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli import options
from companion.cli.console import UNITS, end, mode_of, note, number, output, print_table, say
from companion.cli.opening import Opened, amounts, opened

if TYPE_CHECKING:
    from torch import nn

    from companion.connectivity import Barrier
    from companion.core.theta import Theta
    from companion.experiments.pairs import Evaluation

EXAMPLE = (
    "Example: companion barrier a.safetensors b.safetensors --model resnet20 --data cifar10 "
    "--bn reestimate --plot curve.svg"
)


def measure_barrier(
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
    INVALID, and the exit code is 3.
    """
    output(json, "--json")
    output(plot, "--plot", options.PICTURES)
    layers = layers or None

    from companion.core.effective import effective
    from companion.core.theta import distance, layout

    how = options.evaluation(points, bn, train_examples, test_examples, bn_examples)
    pair = opened(a, b, model, data, device)
    first, second, space = pair.a.theta, pair.b.theta, effective(pair.module)
    entries = layout(space.module)
    moving = set(entries.select(layers)).intersection(entries.parameters)
    pair.announce(f"{pair.data.label}: {points} points, {amounts(how.splits(pair.data))}")
    found = measured(pair, how, max_error, (pair.module, first, second), groups=layers, rest=rest)
    if layers:
        apart = distance(space.enter(first), space.enter(second), sorted(moving))
        say(f"moving: {', '.join(layers)} (distance {apart:.4g}); the rest stays at {rest.upper()}")
    _show(found)
    pair.write(json, "barrier", **pair.about_data(), layers=layers, rest=rest, **summary(found))
    draw(plot, "Error and loss on the line between two networks", "curve", 3.7, {"": found})
    end(found.valid)


def measured(
    pair: Opened,
    how: Evaluation,
    max_error: float | None,
    line: tuple[nn.Module, Theta, Theta],
    **more: Any,
) -> Barrier:
    """The barrier on a line, (architecture, A, B), with the data of ``pair``."""
    from companion.connectivity import barrier

    data, (module, a, b) = pair.data, line
    more |= {"classes": data.classes, "max_error": max_error}
    return barrier(module, a, b, how.splits(data), **how.keywords(data), **more)


def draw(
    path: Path | None, title: str, what: str, height: float, found: Mapping[str, Barrier]
) -> None:
    """Draw curves, by name, into a file. None: nothing."""
    if path:
        from companion.report import figures, plots

        with figures.file(path, title, figsize=(8.6, height)) as fig:
            plots.barriers(fig, found)
        say(f"{what} drawn in {path}")


def _show(found: Barrier) -> None:
    """Gates, the table of the headline mode, and a line for each other mode."""
    for text in found.notes:
        note(text)
    for gate in found.gates:
        say(f"  {gate}")
    rows = []
    for split, metrics in found.heights().items():
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
    print_table(columns, rows, title="barrier" + mode_of(found.bn))
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
    return {"valid": found.valid, "heights": found.heights(), "barrier": found}
