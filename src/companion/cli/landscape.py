"""``companion landscape``: what does the loss look like at both ends of a line, and between?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli import options
from companion.cli.barrier import measured
from companion.cli.console import mode_of, number, output, print_table, say
from companion.cli.opening import amounts, opened
from companion.core.errors import BadParameter, one_of

if TYPE_CHECKING:
    from companion.experiments.landscape import Geometry
    from companion.landscape import LogitGap, Spectrum

EXAMPLE = (
    "Example: companion landscape a.safetensors b.safetensors --model resnet20:norm=layer "
    "--data cifar10 --train-examples 1000 --init w0.safetensors --plot landscape.svg"
)
_NAMES = {
    "taylor": "two-sided Taylor expansion",
    "curvature": "curvatures of the ends alone",
    "cubic": "cubic through both ends",
    "quintic": "quintic through both ends",
}


def survey_landscape(
    a: options.A,
    b: options.B,
    model: options.Model = None,
    data: options.Data = None,
    init: Annotated[
        str | None,
        typer.Option(help="Where both come from, a file or run:KEY@STEP: for the angle there."),
    ] = None,
    by: Annotated[
        str, typer.Option(help="What a layer is: module, block, part, or a depth; none: no layers.")
    ] = "module",
    eigenvalues: Annotated[
        int, typer.Option(help="Largest eigenvalues of the Hessian at A and at B; 0: none.")
    ] = 3,
    bn: Annotated[
        str,
        typer.Option(
            help="What BatchNorm does: interpolate, or batch (the statistics of each batch)."
        ),
    ] = "interpolate",
    points: options.Points = 31,
    train_examples: options.TrainExamples = None,
    test_examples: options.TestExamples = None,
    max_error: options.MaxError = None,
    device: options.Device = "auto",
    json: options.Json = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw losses and curvature into this file (.svg, .png or .pdf)."),
    ] = None,
) -> None:
    """Measure slopes and curvatures at both ends of the line between two checkpoints.

    Prints them on the training data, beside what they lead to expect of the barrier at the middle,
    and the barrier as it is: of the loss, above the mean of the two ends. Then its parts at the
    logits, the layers, and the largest eigenvalues of the Hessian. Derivatives are exact and in
    float64; --train-examples makes them cheaper.
    """
    output(json, "--json")
    output(plot, "--plot", options.PICTURES)
    if eigenvalues < 0:
        raise BadParameter(f"--eigenvalues: {eigenvalues} must be 0 or more.")

    from companion.cli.checkpoints import fit, read_checkpoint
    from companion.core.theta import layout
    from companion.experiments.landscape import Survey, geometry
    from companion.experiments.pairs import Evaluation
    from companion.landscape import SURFACE_MODES, Surface, logit_gap, top_eigenvalues

    one_of("--bn", bn, SURFACE_MODES)
    kind: str | int | None = int(by) if by.isdecimal() else None if by == "none" else by
    examples: dict[str, Any] = {"train_examples": train_examples, "test_examples": test_examples}
    how = Survey(points=points, by=kind, bn=bn, **examples)
    pair = opened(a, b, model, data, device)
    first, second = pair.a.theta, pair.b.theta
    bases = {}
    if init is not None:
        base = fit(pair.module, read_checkpoint(init), "init").theta
        bases = {"init": (base, base)}
    splits = how.evaluation.splits(pair.data)
    pair.announce(f"{pair.data.label}: {points} points, {amounts(splits)}")
    line = (pair.module, first, second)
    gates = measured(pair, Evaluation(points=3, bn=bn, **examples), max_error, line)
    for gate in gates.gates:
        say(f"  {gate}")
    found = geometry(*line, splits, how, bases)
    gap = logit_gap(*line, splits["train"], bn=bn)
    spectra = {}
    if eigenvalues:
        surface = Surface(pair.module, splits["train"], bn=bn)
        spectra = {
            name: top_eigenvalues(surface, theta, eigenvalues)
            for name, theta in (("A", first), ("B", second))
        }
    _show(found, gap, spectra)
    pair.write(
        json,
        "landscape",
        **pair.about_data(),
        settings=how.identity(pair.name),
        valid=gates.valid,
        barrier={split: found.barrier(split) for split in splits},
        predictions=found.predictions(),
        controls=found.controls(),
        layers={end: found.layers(end) for end in "ab"} if found.blocks else {},
        eigenvalues={name: {"values": s.values, "errors": s.errors} for name, s in spectra.items()},
        logits=gap,
        landscape=found,
        parameters=len(layout(pair.module).parameters),
    )
    if plot:
        from companion.report import figures, plots

        with figures.file(plot, "The loss between two networks", figsize=(8.6, 3.9)) as fig:
            plots.landscape(fig, found)
        say(f"landscape drawn in {plot}")


def _show(found: Geometry, gap: LogitGap, spectra: dict[str, Spectrum]) -> None:
    """Ends and middle, the barrier and what was expected, layers, eigenvalues."""
    rows = []
    for name, local in (("A", found.a), ("middle", found.middle), ("B", found.b)):
        top = ""
        if name in spectra:
            one = spectra[name]
            top = ", ".join(
                f"{v:.3g} ± {e:.1g}" for v, e in zip(one.values, one.errors, strict=True)
            )
        numbers = (local.loss, local.slope, local.curvature)
        rows.append([name, *(number(v, "loss") for v in numbers), top])
    say()
    columns = ["", ">loss", ">slope", ">curvature", "largest eigenvalues"]
    title = "train loss from A (0) to B (1), nats" + mode_of(found.curve.bn)
    print_table(columns if spectra else columns[:4], [r[: 4 + bool(spectra)] for r in rows], title)
    say()
    barriers = [[f"measured, {s}", number(found.barrier(s), "loss")] for s in found.curve.values]
    expected = [
        [f"expected: {_NAMES[n]}", number(v, "loss")] for n, v in found.predictions().items()
    ]
    if len(found.curve.alphas) >= 7:
        expected.append(["weighted curvature of the line", number(found.identity()[0], "loss")])
    print_table(
        ["", ">nats"],
        [*barriers, *expected],
        "barrier of the loss at ½, above the mean of the ends",
    )
    say()
    apart = [f"distance {found.distances['ab']:.4g}"]
    if "a_init" in found.distances:
        apart += [f"from init {found.distances['a_init']:.4g} and {found.distances['b_init']:.4g}"]
    if "init" in found.cosines:
        degrees = math.degrees(math.acos(found.cosines["init"]))
        apart += [f"angle at init {degrees:.1f}°"]
    say(", ".join(apart))
    parts = (gap.barrier, gap.partition, gap.ensemble, gap.target)
    barrier, normaliser, gain, target = (number(v, "loss") for v in parts)
    say(
        f"at the logits (train): barrier {barrier} = {normaliser} (normaliser) - {gain} (gain of "
        f"mixing logits) - ({target}) (true class)"
    )
    if gap.barrier > 0:
        say(f"{100 * gap.share():.0f} % of the examples carry 80 % of it")
    if found.blocks:
        _show_layers(found)


def _show_layers(found: Geometry) -> None:
    both = {end: found.layers(end) for end in "ab"}
    squares = dict(zip(found.end().labels, found.end().squares, strict=True))
    rows = [
        [label, number(both["a"][label], "loss"), number(both["b"][label], "loss"), f"{size:.4g}"]
        for label, size in squares.items()
    ]
    say()
    columns = ["", ">others at A", ">others at B", ">squared distance"]
    print_table(columns, rows, "barrier expected of each layer alone, train loss (nats)")
    shares = " and ".join(f"{found.cross_share(end):.2f} at {end.upper()}" for end in "ab")
    say(f"share of the curvature that is between layers: {shares}")
