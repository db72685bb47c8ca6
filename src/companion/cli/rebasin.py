"""``companion rebasin``: put the units of one network into the order of another's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli import folded, permuted
from companion.cli.barrier import PICTURES, named, summary
from companion.cli.console import note, output, say, write_json
from companion.cli.models import reachable, shape_of
from companion.cli.options import BnExamples, averaged
from companion.core.errors import BadParameter, MissingData, one_of

if TYPE_CHECKING:
    import torch

    from companion.cli.checkpoints import Checkpoint
    from companion.core.seeds import Key
    from companion.data import Dataset

EXAMPLE = (
    "Example: companion rebasin a.safetensors b.safetensors --model resnet20 --data cifar10 "
    "-o b_aligned.safetensors"
)
METHODS = (*permuted.METHODS, *folded.METHODS)
NEEDS_DATA = ("activations", "ste", "rotated-activations")
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
    model: Annotated[
        str | None,
        typer.Option(
            help="The architecture: a name of `companion models list`, or package.module:factory. "
            "For runs of the store it is known."
        ),
    ] = None,
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
        typer.Option(
            help="weights (needs no data), activations, ste (straight-through estimator: slow, "
            "trains) or greedy (one pass from the input on). For GPT networks also: units "
            "(weights, with the residual stream in place), folded (nothing matched, LayerNorm "
            "folded), rotated (folded, the stream rotated), rotated-heads (and units inside of "
            "heads), rotated-activations."
        ),
    ] = "weights",
    starts: Annotated[
        int, typer.Option(help="Starts of weight matching; the best is kept. The first is as-is.")
    ] = 1,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of ste (default 200).")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random in the matching.")] = 0,
    bn: Annotated[
        str,
        typer.Option(
            help="What BatchNorm does on the path: interpolate, reestimate or batch. All three are "
            "measured where there is BatchNorm; this one is the headline."
        ),
    ] = "interpolate",
    bn_examples: BnExamples = None,
    points: Annotated[int, typer.Option(help="Points of the path, odd.")] = 31,
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
    one_of("--method", method, METHODS)
    one_of("--repair", repair, REPAIRS)
    if not 0 <= alpha <= 1:
        raise BadParameter(f"--alpha: {alpha:g} must lie between 0 (A) and 1 (the aligned B).")
    if merge is None and (alpha != 0.5 or repair != "reset"):
        raise BadParameter("--alpha and --repair belong to --merge FILE.")
    if starts != 1 and method not in permuted.STARTS:
        raise BadParameter(f"--starts belongs to --method weights or units, not to {method}.")
    if matching and method in folded.METHODS:
        raise BadParameter(f"--matching is for permutations, and --method {method} does more.")
    if steps is not None and method != "ste":
        raise BadParameter(f"--steps belongs to --method ste, not to {method}.")
    for option, number in (("--starts", starts), ("--steps", steps)):
        if number is not None and number < 1:
            raise BadParameter(f"{option}: {number} must be a whole number of 1 or more.")
    _files(out, json, plot, matching, merge, (a, b))

    from companion import models
    from companion.cli.aligned import barriers, merged, show_barriers, write
    from companion.cli.checkpoints import fit, read
    from companion.core.seeds import Key
    from companion.data import resolve_device
    from companion.experiments.pairs import Evaluation

    evaluation = Evaluation(points, bn, train_examples, test_examples, averaged(bn_examples))
    ends = (read(a), read(b))
    net = named("--model", model, ends, "net")
    dataset, shape, count = _examples(data, ends, in_shape, classes, device)
    if dataset is None and method in NEEDS_DATA:
        raise BadParameter(
            f"--method {method} looks at data: say which with --data. Without data there is "
            "--method weights."
        )
    if dataset is None and plot:
        raise BadParameter("--plot draws the barrier, which needs data: say which with --data.")
    if dataset is None and merge and repair in ("forward", "closed"):
        raise BadParameter(f"--repair {repair} looks at data: say which with --data.")
    module = models.build(reachable(net), shape, count, Key("rebasin", "module"))
    first, second = (fit(module, end, label) for label, end in zip("AB", ends, strict=True))
    for label, end in (("A", first), ("B", second)):
        for text in end.notes:
            note(f"{label} ({end.source}): {text}")
    say(f"A = {a}")
    say(f"B = {b}")
    say(f"{models.canonical(net)} on {dataset.label if dataset else _by(shape)}")

    key = Key("rebasin", "cli", seed)
    at = dataset.train.x.device if dataset else resolve_device(device)
    example = _example(shape, count, key)
    if method in folded.METHODS:
        one, two = ({k: v.to(at) for k, v in end.theta.items()} for end in (first, second))
        here = folded.rotated(method, net, module.to(at), one, two, example.to(at), count, dataset)
    else:
        here = permuted.permuted(
            method,
            net,
            module,
            first.theta,
            second.theta,
            ends[1].theta,
            example,
            dataset,
            at,
            starts,
            steps,
            key,
        )

    measured: dict[str, Any] | None = None
    if dataset is not None:
        before, after = barriers(
            module, first.theta, second.theta, here, dataset, evaluation, max_error
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
            here.module, here.a, here.b, dataset, evaluation, alpha=alpha, form=repair
        )
        write(
            merge, theta, about | {"alpha": f"{alpha:g}", "repair": repair}, what="merged network"
        )
        if method in folded.METHODS:
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
            "a": {"source": a, "sha256": first.sha256, "notes": first.notes},
            "b": {"source": b, "sha256": second.sha256, "notes": second.notes},
            "model": models.canonical(net),
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
    output(plot, "--plot", PICTURES)
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


def _examples(
    name: str | None,
    ends: tuple[Checkpoint, Checkpoint],
    in_shape: str | None,
    classes: int | None,
    device: str,
) -> tuple[Dataset | None, tuple[int, ...], int]:
    """The dataset, if one was named or the runs say which; shape of an example, and classes."""
    from companion import data as datasets
    from companion.cli.checkpoints import vocabulary

    recipes = {str(end.recipe["data"]) for end in ends if end.recipe}
    if in_shape is not None or classes is not None:
        if name is not None:
            raise BadParameter("--in-shape, --classes: --data says both already; leave them out.")
        if in_shape is None or classes is None:
            raise BadParameter("--in-shape and --classes: without --data both are needed.")
        return None, _shape(in_shape), classes
    if name is not None:
        dataset = datasets.load(name, device)
    elif len(recipes) == 1:
        known_name = recipes.pop()
        try:
            dataset = datasets.load(known_name, device)
        except MissingData as e:
            note(f"no barrier is measured: {e}")
            return None, *shape_of(known_name)
    else:
        raise BadParameter(
            "--data: say which, or --in-shape and --classes, to build the model without data."
        )
    return dataset, dataset.in_shape, vocabulary(dataset, ends)


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
