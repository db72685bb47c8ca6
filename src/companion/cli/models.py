"""``companion models``: the networks by name, their options and sizes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from companion.cli.console import print_table, say

app = typer.Typer(no_args_is_help=True, help="Networks: names, options, sizes.")

_SHAPE_OF = {"images": "cifar10", "tokens": "pydoc"}
"""The papers' own images, which every network for images takes; the embedded text."""


def reachable(spec: str) -> str:
    """``spec``; a factory of the user's own may lie in the current folder."""
    from companion.models.own import is_own

    here = str(Path.cwd())
    if is_own(spec) and here not in sys.path:
        sys.path.insert(0, here)
    return spec


def shape_of(data: str) -> tuple[tuple[int, ...], int]:
    """Shape of an example and classes; of the published datasets without having their files."""
    from companion.data import catalogue, load
    from companion.data.parts import split_name

    whole, _ = split_name(data)
    for entry in catalogue():
        if entry.name == whole and entry.shape and entry.classes:
            return entry.shape, entry.classes
    found = load(data)
    return found.in_shape, found.classes


@app.command("list", epilog="Example: companion models list")
def list_networks() -> None:
    """Show every network that has a name, with its options and their defaults."""
    from companion.models import names

    rows = [
        (
            listed.name,
            ",".join(
                f"{option}={text.partition(':')[0]}" for option, text in listed.options.items()
            ),
            listed.summary,
        )
        for listed in names()
    ]
    print_table(["name", "options and their defaults", "what"], rows)
    say("resnet<6n+2> of any depth exists. `companion models show NAME` explains the options.")
    say("Others': torchvision:NAME, timm:NAME, hf:FOLDER (a folder of transformers).")
    say("Your own: nets.py:factory, nets:factory or package.module:factory?option=value, called")
    say("with in_shape=(C, H, W), classes=K if it takes them; on a text with in_shape=(tokens in")
    say("a window,), classes=size of the vocabulary.")


@app.command(
    "show", epilog="Example: companion models show resnet20:width=8,norm=group --data cifar10"
)
def show_network(
    spec: Annotated[str, typer.Argument(help="A network, e.g. mlp:widths=100x5.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="The dataset whose examples and classes it is built for "
            "(default: cifar10; for networks that read text, pydoc)."
        ),
    ] = None,
) -> None:
    """Show one network: canonical name, options, number of parameters, layers."""
    from companion import models
    from companion.core.seeds import Key
    from companion.core.theta import layout
    from companion.models.own import is_own

    reachable(spec)
    data = data or _SHAPE_OF[models.takes(spec) or "images"]
    in_shape, classes = shape_of(data)
    module = models.build(spec, in_shape, classes, Key("init", 0))
    found = layout(module)
    state = module.state_dict()
    name = models.canonical(spec)
    say(name)
    meanings = {listed.name: listed.options for listed in models.names()}
    # Depths that are not listed have the options of those that are.
    known = {} if is_own(spec) else meanings.get(name.partition(":")[0], meanings["resnet20"])
    rows = []
    for option, value in models.describe(spec).items():
        text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append((option, text, known.get(option, "").partition(": ")[2]))
    if rows:
        print_table(["option", "value", "meaning (allowed)"], rows)
    words = len(in_shape) == 1
    shape = (
        f"windows of {in_shape[0]} tokens" if words else f"{'×'.join(map(str, in_shape))} images"
    )
    say(f"built for {shape}, {classes} {'logits a token' if words else 'classes'} ({data})")
    trainable = models.parameter_count(module)
    say(f"parameters: {trainable:,}")
    if found.buffers:
        with_buffers = models.parameter_count(module, buffers=True)
        say(f"with BatchNorm's running statistics: {with_buffers:,}")
    say()
    rows = [
        (group, f"{sum(state[n].numel() for n in entries):,}", ", ".join(entries))
        for group, entries in found.groups.items()
    ]
    print_table(["layer", ">numbers", "entries"], rows)
