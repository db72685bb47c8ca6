"""``companion layers``: which layers make the barrier between two checkpoints?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from companion.cli import options
from companion.cli.console import UNITS, end, mode_of, note, number, output, print_table, say
from companion.cli.opening import amounts, opened

if TYPE_CHECKING:
    from companion.layerwise import LayerBarriers

EXAMPLE = (
    "Example: companion layers a.safetensors b.safetensors --model resnet18 --data cifar10 "
    "--draws 5 --plot layers.svg"
)
_TITLES = {
    "single": "one layer at a time",
    "shallow": "the first layers",
    "deep": "the last layers",
    "random": "layers in random order",
    "window": "neighbouring layers",
    "subset": "layers of your choice",
}


def measure_layers(
    a: options.A,
    b: options.B,
    model: options.Model = None,
    data: options.Data = None,
    kinds: Annotated[
        str,
        typer.Option(
            help="What moves, comma-separated: single, shallow (the first, the first two, …), deep "
            "(the last, …), random (cumulative in random order), window (neighbours)."
        ),
    ] = "single,shallow,deep",
    by: Annotated[
        str,
        typer.Option(
            help="What a layer is: module; block (stage1.0, h.0); part (of a block: h.0.attn, "
            "h.0.norms); or a number d, for modules whose names agree in the first d parts; or "
            "names or beginnings of names, comma-separated."
        ),
    ] = "module",
    together: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that move together, comma-separated (names or beginnings of names); may "
            "be given several times."
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Layers in a window.")] = 3,
    draws: Annotated[
        int,
        typer.Option(help="Random directions of equal norm to compare each layer with; 0: none."),
    ] = 0,
    rest: Annotated[
        str, typer.Option(help="Where the other layers stay: a, b or both in turn.")
    ] = "both",
    bn: Annotated[
        str, typer.Option(help="What BatchNorm does: interpolate, reestimate or batch.")
    ] = "interpolate",
    bn_examples: options.BnExamples = None,
    points: Annotated[
        int, typer.Option(help="Points of each segment, odd; 1 is the middle alone.")
    ] = 3,
    train_examples: options.TrainExamples = None,
    test_examples: options.TestExamples = None,
    max_error: options.MaxError = None,
    device: options.Device = "auto",
    json: options.Json = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the barriers into this file (.svg, .png or .pdf).")
    ] = None,
) -> None:
    """Measure the barriers of single layers, and of groups of them, between two checkpoints.

    Heights are those of Adilova et al. 2024: loss (nats) and error (points) at the middle of the
    segment, above the mean of the two whole networks; of the two default networks the larger. If a
    gate fails, they are INVALID.
    """
    output(json, "--json")
    output(plot, "--plot", options.PICTURES)

    from companion.experiments.pairs import Evaluation, averaging
    from companion.layerwise import Sweep, sweep

    settings = Sweep(
        by=_by(by),
        kinds=_words(kinds),
        subsets=tuple((", ".join(_words(text)), _words(text)) for text in together or ()),
        points=points,
        rest=rest,
        window=window,
        draws=draws,
        bn=bn,
        train_examples=train_examples,
        test_examples=test_examples,
        bn_examples=options.bn_average(bn_examples),
    )
    pair = opened(a, b, model, data, device)
    dataset = pair.data
    parts = Evaluation(train_examples=train_examples, test_examples=test_examples)
    splits = parts.splits(dataset)
    pair.announce(f"{dataset.label}: {amounts(splits)}")
    found = sweep(
        pair.module,
        pair.a.theta,
        pair.b.theta,
        splits,
        settings,
        bn_data=dataset.train,
        classes=dataset.classes,
        max_error=max_error,
    )
    _show(found)
    pair.write(
        json,
        "layers",
        **pair.about_data(),
        settings=settings.identity() | averaging(pair.name, settings.bn_examples),
        valid=found.valid,
        heights=found.all_heights(),
        layers=found,
    )
    if plot:
        from companion.report import figures, plots

        size = (8.6, max(3.4, 1.4 + 0.22 * len(found.groups)))
        title = "Loss barriers of layers between two networks"
        with figures.file(plot, title, figsize=size) as fig:
            plots.layers(fig, found)
        say(f"barriers drawn in {plot}")
    end(found.valid)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _by(text: str) -> str | int | tuple[str, ...]:
    if text.isdecimal():
        return int(text)
    return text if text in ("module", "block", "part") else _words(text)


def _kinds(found: LayerBarriers) -> list[str]:
    return [kind for kind in _TITLES if found.select(kind)]


def _show(found: LayerBarriers) -> None:
    """Gates, a table for each kind of set, and the sum of the single layers."""
    for text in found.full.notes:
        note(text)
    for gate in found.full.gates:
        say(f"  {gate}")
    sides = [(split, metric) for split in found.splits for metric in UNITS]
    columns = ["", *(f">{split} {metric} ({UNITS[metric]})" for split, metric in sides)]
    whole = [number(found.full_height(s, m), m) for s, m in sides]
    for kind in _kinds(found):
        heights = [(found.worst(kind, s, m), m) for s, m in sides]
        labels = list(heights[0][0])
        rows = [[label, *(number(h[label], m) for h, m in heights)] for label in labels]
        say()
        print_table(
            columns, [["whole network", *whole], *rows], title=_TITLES[kind] + mode_of(found.bn)
        )
    if found.select("single"):
        say()
        for split in found.splits:
            parts = found.additivity(split)
            say(
                f"{split} loss: whole network {number(parts.full, 'loss')}, sum of single layers "
                f"{number(parts.total, 'loss')}"
            )
    _show_random(found)


def _show_random(found: LayerBarriers) -> None:
    split = found.splits[-1]
    rows = []
    for kind in ("full", "single"):
        for rise in found.rises(kind, split):
            low, high = (number(f(rise.random), "loss") for f in (min, max))
            rows.append(
                [
                    "whole network" if kind == "full" else rise.label,
                    rise.rest.upper(),
                    number(rise.averaging, "loss"),
                    number(rise.mean, "loss"),
                    f"{low} to {high}",
                ]
            )
    if rows:
        say()
        columns = ["", "from", ">towards the other", ">random, mean", ">random, range"]
        print_table(columns, rows, title=f"rise of the {split} loss at half the distance (nats)")
