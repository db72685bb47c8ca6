"""``companion rebasin``: put the units of one network into the order of another's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli import folded, options, permuted
from companion.cli.barrier import summary
from companion.cli.console import output, say, write_json
from companion.cli.opening import opened
from companion.core.errors import BadParameter, one_of
from companion.experiments.methods import METHOD_KINDS, Method, described, offered

if TYPE_CHECKING:
    import torch

    from companion.core.seeds import Key

EXAMPLE = (
    "Example: companion rebasin a.safetensors b.safetensors --model resnet20 --data cifar10 "
    "-o b_aligned.safetensors"
)
DEFAULT = Method()
REPAIRS = ("reset", "forward", "closed", "none")


def command(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A safetensors file, or run:KEY or run:KEY@STEP. It stays."
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The network whose units are reordered, likewise.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Write the aligned B here (.safetensors), as B's file "
            "has it: same names, same types.",
        ),
    ],
    model: options.Model = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A dataset of `companion data list`: the barrier is measured before and after. "
            "For runs of the store it is known."
        ),
    ] = None,
    in_shape: Annotated[
        str | None,
        typer.Option(
            help="Without --data: channels,height,width of an image, such as 3,32,32, or the "
            "tokens in a window, such as 64."
        ),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(help="Without --data: number of classes, or of tokens.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(help=described()),
    ] = DEFAULT.name,
    starts: Annotated[
        int, typer.Option(help="Starts of weight matching; the best is kept. The first is as-is.")
    ] = DEFAULT.starts,
    steps: Annotated[
        int | None, typer.Option(help=f"Optimiser steps of ste (default {DEFAULT.steps}).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random in the matching.")] = 0,
    bn: options.Bn = "interpolate",
    bn_examples: options.BnExamples = None,
    points: options.Points = 31,
    train_examples: options.TrainExamples = None,
    test_examples: options.TestExamples = None,
    max_error: options.MaxError = None,
    device: options.Device = "auto",
    json: options.Json = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw both curves into this file (.svg, .png or .pdf); needs --data."),
    ] = None,
    matching: Annotated[
        Path | None, typer.Option(help="Write the permutations to this file (.safetensors).")
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(
            help="Write the network between A and the aligned B to this file (.safetensors)."
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Where between: 0 is A, 1 the aligned B; for --merge.")
    ] = 0.5,
    repair: Annotated[
        str,
        typer.Option(
            help="For --merge, what is done about the statistics inside: reset (BatchNorm is "
            "estimated again, where there is BatchNorm and data), forward or closed (REPAIR of "
            "every layer that can take it), none."
        ),
    ] = "reset",
) -> None:
    """Reorder the units of network B so that they match those of A; B's outputs stay the same.

    The permutations are derived from the architecture and proven on random ones before they are
    used. Prints what was found, and, with data, the barrier before and after. Methods that fold or
    rotate a GPT network write networks of another form, and say under which name they load.
    """
    one_of("--method", method, offered())
    kind = METHOD_KINDS[method]
    one_of("--repair", repair, REPAIRS)
    if not 0 <= alpha <= 1:
        raise BadParameter(f"--alpha: {alpha:g} must lie between 0 (A) and 1 (the aligned B).")
    if merge is None and (alpha != 0.5 or repair != "reset"):
        raise BadParameter("--alpha and --repair belong to --merge FILE.")
    for option, changed in (("starts", starts != DEFAULT.starts), ("steps", steps is not None)):
        if changed and option not in kind.options:
            having = " or ".join(offered(option))
            raise BadParameter(f"--{option} belongs to --method {having}, not to {method}.")
    if matching and kind.folds:
        raise BadParameter(f"--matching is for permutations, and --method {method} does more.")
    for option, number in (("--starts", starts), ("--steps", steps)):
        if number is not None and number < 1:
            raise BadParameter(f"{option}: {number} must be a whole number of 1 or more.")
    _files(out, json, plot, matching, merge, (a, b))

    from companion.cli.aligned import barriers, merged, show_barriers, write
    from companion.connectivity.batches import examples_a_pass
    from companion.core.seeds import Key
    from companion.data import resolve_device

    measuring = options.evaluation(points, bn, train_examples, test_examples, bn_examples)
    pair = opened(
        a, b, model, data, device, _shape_and_classes(data, in_shape, classes), optional=True
    )
    dataset, module, shape, count = pair.dataset, pair.module, pair.shape, pair.classes
    first, second, net = pair.a, pair.b, pair.name
    if dataset is None and kind.data:
        raise BadParameter(
            f"--method {method} looks at data: say which with --data. Without data there is "
            "--method weights."
        )
    if dataset is None and plot:
        raise BadParameter("--plot draws the barrier, which needs data: say which with --data.")
    if dataset is None and merge and repair in ("forward", "closed"):
        raise BadParameter(f"--repair {repair} looks at data: say which with --data.")
    pair.announce(dataset.label if dataset else _by(shape))

    train = dataset.train if dataset else None
    batch = DEFAULT.batch if train is None else min(DEFAULT.batch, examples_a_pass(train.x))
    how = Method(method, starts, steps=DEFAULT.steps if steps is None else steps, batch=batch)
    key = Key("rebasin", "cli", seed)
    at = dataset.train.x.device if dataset else resolve_device(device)
    example = _example(shape, count, key)
    if kind.folds:
        one, two = ({k: v.to(at) for k, v in end.theta.items()} for end in (first, second))
        here = folded.rotated(how, net, module.to(at), one, two, example.to(at), count, train)
    else:
        theta_a, theta_b, file = first.theta, second.theta, pair.files[1].theta
        here = permuted.permuted(how, net, module, theta_a, theta_b, file, example, train, at, key)

    measured: dict[str, Any] | None = None
    if dataset is not None:
        before, after = barriers(
            module, first.theta, second.theta, here, dataset, measuring, max_error
        )
        measured = {
            "data": {"name": dataset.name, "label": dataset.label},
            "fingerprint": dataset.fingerprint,
            "before": summary(before),
            "after": summary(after),
            "batchnorm": show_barriers(before, after),
        }
    about = {
        "method": method,
        "model": here.model,
        "aligned to (sha256)": first.sha256,
        "made from (sha256)": second.sha256,
    }
    write(out, here.file, about)
    if matching:
        assert here.matching is not None
        here.matching.save(matching)
        say(f"permutations written to {matching}")
    between = None
    if merge:
        theta, between = merged(
            here.module, here.a, here.b, dataset, measuring, alpha=alpha, form=repair
        )
        write(
            merge, theta, about | {"alpha": f"{alpha:g}", "repair": repair}, what="merged network"
        )
        if kind.folds:
            say(f"the merged network is in folded form, too: --model {here.model}")
    if plot and measured:
        from companion.report import figures, plots

        title = "Error and loss on the line before and after matching"
        with figures.file(plot, title, figsize=(8.6, 3.9)) as fig:
            plots.barriers(fig, {"before": before, "after": after})
        say(f"curves drawn in {plot}")
    write_json(
        json,
        {
            "command": "rebasin",
            **pair.about(),
            "in_shape": list(shape),
            "classes": count,
            "output": out.name,
            **here.about,
            "barrier": measured,
            "merged": between,
        },
    )


# --- input


def _files(
    out: Path,
    json: Path | None,
    plot: Path | None,
    matching: Path | None,
    merge: Path | None,
    ends: tuple[str, str],
) -> None:
    output(out, "--output", (".safetensors",))
    output(json, "--json")
    output(plot, "--plot", options.PICTURES)
    output(matching, "--matching", (".safetensors",))
    output(merge, "--merge", (".safetensors",))
    given = {"--output": out, "--json": json, "--plot": plot, "--matching": matching}
    given["--merge"] = merge
    files = {option: path.resolve() for option, path in given.items() if path}
    for name, end in zip("AB", ends, strict=True):
        for option, path in files.items():
            if Path(end).expanduser().resolve() == path:
                raise BadParameter(f"{option}: {path.name} is {name}, which is not overwritten.")
    if len(set(files.values())) < len(files):
        raise BadParameter(f"{', '.join(files)}: each needs a file of its own.")


def _shape_and_classes(
    data: str | None, in_shape: str | None, classes: int | None
) -> tuple[tuple[int, ...], int] | None:
    """What stands in for data; None where it is data that say it."""
    if in_shape is None and classes is None:
        return None
    if data is not None:
        raise BadParameter("--in-shape, --classes: --data says both already; leave them out.")
    if in_shape is None or classes is None:
        raise BadParameter("--in-shape and --classes: without --data both are needed.")
    return _shape(in_shape), classes


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise BadParameter(
            f"--in-shape: {text!r} is not channels,height,width, such as 3,32,32, nor the tokens "
            "in a window, such as 64."
        )
    return tuple(map(int, parts))


def _by(shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return f"windows of {shape[0]} tokens, no data"
    return f"images of {'×'.join(map(str, shape))}, no data"


def _example(shape: tuple[int, ...], classes: int, key: Key) -> torch.Tensor:
    """Two images of noise, or two windows of random tokens."""
    import torch

    generator = key.fold("example").generator()
    if len(shape) == 1:
        return torch.randint(classes, (2, *shape), generator=generator)
    return torch.randn(2, *shape, generator=generator)
