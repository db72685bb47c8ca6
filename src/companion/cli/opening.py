"""One opening of what most commands begin with: A, B, their architecture, the data."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.cli.console import note, say, write_json
from companion.cli.models import reachable, shape_of
from companion.core.errors import BadParameter, MissingData

IN_MEMORY = 5000
"""Training images of a dataset on the disk that are kept: 3 GB at ImageNet's size."""

if TYPE_CHECKING:
    import torch
    from torch import nn

    from companion.cli.checkpoints import Checkpoint
    from companion.core.seeds import Key
    from companion.data import Dataset, Split
    from companion.rebasin import Widened

LETTERS = string.ascii_uppercase
"""What networks are called, in the order they are given."""


@dataclass(frozen=True, eq=False)
class Opened:
    """Checkpoints as networks of one architecture, and the data to measure on.

    Arguments:
        a, b: state dicts of ``module``, with what had to be done to the files.
        files: all of them as they were read.
        model: the architecture's canonical name.
        name: the one it was given.
        module: it.
        shape: of an example.
        classes: as the model has them.
        dataset: None without data.
        source: the name it was given.
        more: further state dicts, of a command that takes any number.
        widened: what the narrower one was, where one of A and B had fewer units than the other.
        narrow: which one that is, 0 or 1.
    """

    a: Checkpoint
    b: Checkpoint
    files: tuple[Checkpoint, ...]
    model: str
    name: str
    module: nn.Module
    shape: tuple[int, ...]
    classes: int
    dataset: Dataset | None
    source: str | None
    more: tuple[Checkpoint, ...] = ()
    widened: Widened | None = None
    narrow: int = 1

    @property
    def ends(self) -> tuple[Checkpoint, ...]:
        """All networks, in the order they were given."""
        return (self.a, self.b, *self.more)

    @property
    def data(self) -> Dataset:
        """The data of a command that needs them."""
        assert self.dataset is not None
        return self.dataset

    def examples(self) -> str:
        """What the networks take: the data, or without data the shape of an example."""
        if self.dataset is not None:
            return self.dataset.label
        words = {1: f"windows of {self.shape[0]} tokens", 3: "images of "}
        sizes = "×".join(map(str, self.shape))
        what = words.get(len(self.shape), "examples of ")
        return f"{what}{'' if len(self.shape) == 1 else sizes}, no data"

    def announce(self, what: str) -> None:
        """Say what was opened; ``what`` ends the line on model and data."""
        for label, end in zip(LETTERS, self.ends, strict=False):
            say(f"{label} = {end.source}")
        say(f"{self.model} on {what}")

    def write(self, path: Path | None, command: str, **found: Any) -> None:
        """The JSON of a command: where the networks and the data come from, and what was found."""
        ends = {
            name.lower(): {"source": end.source, "sha256": end.sha256, "notes": end.notes}
            for name, end in zip(LETTERS, self.ends, strict=False)
        }
        write_json(path, {"command": command, **ends, "model": self.model, **found})

    def about_data(self) -> dict[str, Any]:
        """Of the data, for :meth:`write`."""
        data = self.data
        where = {"name": self.source, "label": data.label, "fingerprint": data.fingerprint}
        return {"data": where}


def opened(
    a: str,
    b: str,
    model: str | None,
    data: str | None,
    device: str,
    shape: tuple[tuple[int, ...], int] | None = None,
    *,
    more: Sequence[str] = (),
    optional: bool = False,
    stream: bool = False,
    other: str | None = None,
) -> Opened:
    """Read A and B, load the data, build the model, and fit all of them to it.

    Arguments:
        a, b, model, data, device: as on the command line; None: as the runs of the store say.
        shape: in place of data, the shape of an example, and classes.
        more: further networks.
        optional: do without data that the runs name and that are not here.
        stream: leave tensors in their files until they are needed, each time anew.
        other: B's architecture, where it is not A's: the narrower of the two gets units of weight 0
            until it has the other's shape, and that is the one they are opened as.

    Raises:
        BadParameter: model or data are not known, or the networks do not fit. MissingData: no data.
    """
    from companion import models
    from companion.cli.checkpoints import fit, read_checkpoint
    from companion.core.networks import channels_last
    from companion.core.seeds import Key

    if len(more) > len(LETTERS) - 2:
        raise BadParameter(f"{len(more) + 2} networks are too many: {len(LETTERS)} at most.")
    files = tuple(map(read_checkpoint, (a, b, *more)))
    net = _named("--model", model or own_folder(a), files[:1] if other else files, "net")
    if shape is None and data is None and optional:
        shape = models.example_of(net)
    source, dataset, example, classes = _data(data, files, device, shape, optional)
    # Its own weights count for nothing, but what is derived of it should not vary with them.
    module = models.build(reachable(net), example, classes, Key("rebasin", "module"))
    widened, narrow = None, 1
    if other is not None:
        net, module, files, widened, narrow = _one_width(
            (net, other), module, files, example, classes
        )
    ends = [fit(module, end, label) for label, end in zip(LETTERS, files, strict=False)]
    if not stream:
        ends = [replace(end, theta=dict(end.theta)) for end in ends]
    for label, end in zip(LETTERS, ends, strict=False):
        if end.notes:
            note(f"{label} ({end.source}): {'; '.join(end.notes)}")
    if dataset is not None:
        _tried(net, module, dataset)
        module = channels_last(module, dataset.test.x[:2])
    first, second, *rest = ends
    named = (models.canonical(net), net, module, example, classes, dataset, source)
    return Opened(first, second, files, *named, more=tuple(rest), widened=widened, narrow=narrow)


def _one_width(
    nets: tuple[str, str],
    first: nn.Module,
    files: tuple[Checkpoint, ...],
    shape: tuple[int, ...],
    classes: int,
) -> tuple[str, nn.Module, tuple[Checkpoint, ...], Widened, int]:
    """The wider one's name and module, all files as networks of it, and which one was narrow.

    Arguments:
        nets: architectures of A and B.
        first: A's.
    """
    from companion import models
    from companion.cli.checkpoints import fit
    from companion.core.seeds import Key
    from companion.rebasin import widen

    key = Key("rebasin", "module")
    both = (first, models.build(reachable(nets[1]), shape, classes, key))
    counts = [sum(p.numel() for p in module.parameters()) for module in both]
    at = 0 if counts[0] < counts[1] else 1
    found, net, module = files[at], nets[1 - at], both[1 - at]
    theta = dict(fit(both[at], found, LETTERS[at]).theta)
    widened = widen(both[at], module, theta, example_for(module, shape, classes, key))
    every = widened.spec.identity()
    units, kept = (sum(p.numel() for p in of.values()) for of in (every, widened.places(every)))
    added = f"{units - kept} units of weight 0 added, to be a network of {models.canonical(net)}"
    wide = replace(found, theta=widened.theta, notes=(*found.notes, added))
    return net, module, (*files[:at], wide, *files[at + 1 :]), widened, at


def example_for(
    module: nn.Module,
    shape: tuple[int, ...],
    classes: int,
    key: Key,
    at: torch.device | None = None,
) -> Any:
    """Two windows of random tokens, for a network that embeds them, or two inputs of noise.

    With whatever else a network of transformers needs, by name. ``at`` is where.
    """
    import torch
    from torch import nn

    from companion.models import zoo

    generator = key.fold("example").generator()
    tables = (nn.Embedding, nn.EmbeddingBag)
    example = torch.randn(2, *shape, generator=generator)
    words = len(shape) == 1 and any(isinstance(m, tables) for m in module.modules())
    if words or (len(shape) == 1 and not _runs(module, example)):
        example = torch.randint(classes, (2, *shape), generator=generator)
    return zoo.inputs(module, example.to(at), generator)


def _runs(module: nn.Module, example: torch.Tensor) -> bool:
    """Whether forward takes it."""
    import torch

    from companion.core.networks import private

    try:
        with torch.no_grad():
            private(module, example)(example)
    except Exception:  # whatever the user's forward does
        return False
    return True


def own_folder(source: str) -> str | None:
    """The model that a folder of transformers is its own description of."""
    return f"hf:{source}" if (Path(source).expanduser() / "config.json").is_file() else None


def _named(option: str, given: str | None, ends: Sequence[Checkpoint], field: str) -> str:
    """``given``, or what the runs of the store say, if they agree."""
    known = {str(end.recipe[field]) for end in ends if end.recipe}
    if given is None and len(known) == 1:
        return known.pop()
    if given is None:
        raise BadParameter(
            f"{option}: say which. (Only two runs of the store that agree make it known.)"
        )
    return given


def _data(
    name: str | None,
    ends: Sequence[Checkpoint],
    device: str,
    shape: tuple[tuple[int, ...], int] | None,
    optional: bool,
) -> tuple[str | None, Dataset | None, tuple[int, ...], int]:
    """The dataset's name and the dataset, if there is one; shape of an example, and classes."""
    from companion import data as datasets
    from companion.cli.checkpoints import vocabulary
    from companion.data.streamed import in_memory, is_streamed

    if shape is not None:
        return None, None, *shape
    known = name
    if name is None and optional and len({str(e.recipe["data"]) for e in ends if e.recipe}) != 1:
        raise BadParameter(
            "--data: say which, or --in-shape and --classes, to build the model without data."
        )
    known = _named("--data", name, ends, "data")
    try:
        dataset = datasets.load(known, device)
    except MissingData as e:
        if name is not None or not optional:
            raise
        note(f"no barrier is measured: {e}")
        return known, None, *shape_of(known)
    if is_streamed(dataset.train.x):  # statistics and matching look at some, in memory
        of = len(dataset.train)
        dataset = replace(dataset, train=in_memory(dataset.train, IN_MEMORY))
        note(
            f"{dataset.label} stays on the disk: {len(dataset.train):,} of its {of:,} training "
            "images stand for the train split"
        )
    return known, dataset, dataset.in_shape, vocabulary(dataset, ends)


def _tried(net: str, module: nn.Module, dataset: Dataset) -> None:
    """Refuse a network that cannot read the data, or has too few outputs, before any work."""
    import torch

    from companion.core.networks import private

    x, y = dataset.test.x[:2], dataset.test.y[:2]
    if not x.is_floating_point():  # the largest token: an embedding may have too few rows for it
        x = x.clone()
        x[0, 0] = max(int(split.x.max()) for split in (dataset.train, dataset.test))
    shape = "×".join(map(str, x.shape[1:]))
    try:
        with torch.no_grad():
            out = private(module, x)(x)
    except BadParameter:
        raise
    except Exception as e:  # whatever the user's forward does
        raise BadParameter(
            f"model {net!r}: its forward fails on examples of {dataset.name} ({shape}): "
            f"{type(e).__name__}: {e}"
        ) from e
    if out.shape[:-1] != y.shape:
        wanted = ", ".join([*map(str, y.shape), "classes"])
        raise BadParameter(
            f"model {net!r}: of {len(x)} examples of {dataset.name} it makes {tuple(out.shape)}; "
            f"logits ({wanted}) are needed."
        )
    most = max(int(split.y.max()) for split in (dataset.train, dataset.test))
    if out.shape[-1] <= most:
        raise BadParameter(
            f"model {net!r}: it has {out.shape[-1]} outputs, but the labels of {dataset.name} go "
            f"up to {most}."
        )


def amount(split: Split) -> str:
    """How many of what: ``1,437 images``, or ``290 windows of 64 tokens``."""
    what = "images" if split.kind == "images" else f"windows of {split.window} tokens"
    return f"{len(split):,} {what}"


def amounts(splits: dict[str, Split]) -> str:
    """The same of every split, by name."""
    return ", ".join(f"{name} ({amount(split)})" for name, split in splits.items())
