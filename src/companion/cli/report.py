"""``companion report``: what are these networks to each other, and may they be averaged?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli import options
from companion.cli.console import end, note, output, say, visible
from companion.cli.opening import LETTERS, Opened, example_for, opened
from companion.cli.rebasin import check_files, shape_and_classes
from companion.core.errors import BadParameter, whole, within

if TYPE_CHECKING:
    from companion.report.compare import Comparison

EXAMPLE = (
    "Example: companion report a.safetensors b.safetensors --model resnet20 --data cifar10 "
    "--minutes 5 -o report.html"
)


def report_networks(
    networks: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C …]",
            help="Files of safetensors or torch.save, folders or indexes of shards, or "
            "run:KEY[@STEP]; two or more.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Write the page here (.html), and all numbers beside it (.json)."
        ),
    ] = Path("report.html"),
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the line between two networks, or the barriers of all pairs, into this file "
            "(.svg, .png or .pdf)."
        ),
    ] = None,
    model: options.Model = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A dataset of `companion data list`. Without data the report says what weights "
            "alone can tell. For runs of the store it is known."
        ),
    ] = None,
    in_shape: options.InShape = None,
    classes: options.Classes = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            callback=lambda value: within("--minutes", value, 0, 1e6),
            help="How long it may take: cheap questions are asked first, and what does not fit is "
            "named in the report (default: as long as it takes).",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Where the networks come from, a file or run:KEY@STEP, if it is known."),
    ] = None,
    bn: Annotated[
        str,
        typer.Option(
            help="What BatchNorm does on the lines that are judged: interpolate, reestimate, batch."
        ),
    ] = "reestimate",
    points: Annotated[int, typer.Option(help="Points of each line, odd.")] = 11,
    train_examples: Annotated[
        int,
        typer.Option(
            help="Training examples that stand for all, also where matching looks at them and "
            "BatchNorm averages over them; 0: all of them."
        ),
    ] = 1000,
    test_examples: Annotated[
        int, typer.Option(help="Test examples that stand for all; 0: all of them.")
    ] = 2000,
    max_error: options.MaxError = None,
    device: options.Device = "auto",
) -> None:
    """Compare two networks, or more, with every instrument, and write one page about it.

    Same network, same basin, connected after matching, which layers, is a merge worth it: with the
    numbers, the rule behind each verdict, what could not be asked and why, and the command that
    repeats each part. If a gate fails the barriers are INVALID, and the exit code is 3; so it is
    where networks and data do not fit together.
    """
    begun = time.monotonic()
    if len(networks) < 2:
        raise BadParameter("report takes two networks or more: A.safetensors B.safetensors.")
    beside = out.with_suffix(".json")
    output(out, "--output", (".html",))
    output(plot, "--plot", options.PICTURES)
    check_files({}, networks)

    from companion import data as datasets
    from companion import models
    from companion.cli.checkpoints import fit, read_checkpoint
    from companion.cli.models import reachable
    from companion.core.seeds import Key
    from companion.data import resolve_device
    from companion.report.compare import Source, compare

    for option, count in (("train", train_examples), ("test", test_examples)):
        whole(f"--{option}-examples", count, 0)
    average = max(2, train_examples) if train_examples else 0
    how = options.evaluation(points, bn, train_examples or None, test_examples or None, average)
    if model is not None:  # a mistyped name is said at once, and not in a report
        models.canonical(reachable(model))
    if data is not None:
        datasets.load(data, device)
    shape = shape_and_classes(data, in_shape, classes)
    pair, why = _opened(networks, model, data, device, shape)
    given: dict[str, Any] = {"--model": model, "--data": data, "--max-error": max_error}
    given |= {"--in-shape": in_shape, "--classes": classes}
    words = [w for k, v in given.items() if v is not None for w in (k, str(v))]
    words += [] if device == "auto" else ["--device", device]
    if pair is None:
        ends = tuple(read_checkpoint(one) for one in networks)
        more: dict[str, Any] = {"model": model or "unknown"}
    else:
        ends, more = pair.ends, {"model": pair.model, "data": pair.dataset}
        if pair.dataset is None:
            at, key = resolve_device(device), Key("rebasin", "cli", 0)
            more["example"] = example_for(pair.module, pair.shape, pair.classes, key, at)
        if init is not None:
            more["init"] = fit(pair.module, read_checkpoint(init), "init").theta
    if minutes is not None:
        minutes = max(0.0, minutes - (time.monotonic() - begun) / 60)
    thetas = [dict(one.theta) for one in ends]
    found = compare(
        None if pair is None else pair.module,
        *thetas[:2],
        more=thetas[2:],
        names=names_of(networks),
        points=how.points,
        bn=how.bn,
        train_examples=how.train_examples,
        test_examples=how.test_examples,
        bn_examples=how.bn_examples,
        max_error=max_error,
        minutes=minutes,
        progress=lambda text: typer.echo(visible(text), err=True),
        source=Source(tuple(networks), tuple(words)),
        why=why,
        about=_about(ends),
        **more,
    )
    say(str(found))
    write_report(found, out, beside)
    if plot:
        from companion.report.compare.sheet import picture

        if picture(found, plot):
            say(f"barriers drawn in {plot}")
        else:
            note("no line was measured, so there is nothing to draw")
    end(not found.invalid and not (why and data))


def names_of(sources: list[str]) -> tuple[str, ...]:
    """What the networks are called: their files, or as they were typed where these are the same."""
    short = [Path(s).name or s for s in sources]
    return tuple(short if len(set(short)) == len(short) else sources)


def _opened(
    networks: list[str],
    model: str | None,
    data: str | None,
    device: str,
    shape: tuple[tuple[int, ...], int] | None,
) -> tuple[Opened | None, str]:
    """The networks and their data; without data, or nothing, and why, where they do not fit."""
    from companion import data as datasets
    from companion.cli.checkpoints import read_checkpoint

    first, second, *more = networks

    def tried(data: str | None, shape: tuple[tuple[int, ...], int] | None) -> Opened:
        return opened(first, second, model, data, device, shape, more=more, optional=True)

    try:
        return tried(data, shape), ""
    except BadParameter as e:
        why = str(e)
    for one in networks:  # a file that is not there is said, and reported by nobody
        read_checkpoint(one)
    if data is not None:
        loaded = datasets.load(data, device)
        try:
            found = tried(None, (loaded.in_shape, loaded.classes))
        except BadParameter:
            pass
        else:
            note(f"the data are left out: {why}")
            return found, why
    note(f"weights are compared as they are: {why}")
    return None, why


def _about(ends: Any) -> dict[str, Any]:
    """Where the networks come from."""
    files = {
        letter: {"source": one.source, "sha256": one.sha256, "notes": list(one.notes)}
        for letter, one in zip(LETTERS, ends, strict=False)
    }
    return {"networks": files}


def write_report(found: Comparison, page: Path, beside: Path) -> None:
    """The page, and its numbers.

    Raises:
        BadParameter: one of them cannot be written.
    """
    import json

    from companion.core import files

    text = json.dumps(found.to_json(), indent=1, allow_nan=False)
    for path, content in ((page, found.html()), (beside, f"{text}\n")):
        try:
            files.write(path, content.encode())
        except OSError as e:
            raise BadParameter(f"{path} cannot be written ({e.strerror}).") from e
        say(f"{'report' if path == page else 'numbers'} written to {path}")
