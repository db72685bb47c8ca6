"""Checkpoints of the user's: safetensors files, or networks of the run store.

What is stored and what the model calls it often differ in small ways. Those with one possible
meaning are undone, and said (:func:`fit`); all others are refused by name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import nn

from companion.cli.runs import describe_entry, stored_steps
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.core.theta import Theta, check_theta, layout
from companion.training import State

if TYPE_CHECKING:
    from companion.data import Dataset

RUN = "run:"
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's
GPT2 = "transformer."  # transformers' GPT2LMHeadModel has it, GPT2Model and its files do not
_MASKS = re.compile(r"(?:.*\.)?h\.\d+\.attn\.(?:bias|masked_bias)")
"""Constants of older GPT-2 files, which say that attention looks back only."""

CONVERT = (
    "Only safetensors files are read, because loading a pickle can run code. To convert one: "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'new.safetensors')."
)


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors and where they come from.

    Arguments:
        source: as the user gave it.
        theta: name -> tensor, on the CPU.
        sha256: of the file (hex), or the run's key and step.
        recipe: of a run of the store, its recipe's fields; else empty.
        notes: what was done to it, for the user.
    """

    source: str
    theta: Theta
    sha256: str
    recipe: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_checkpoint(source: str, store: Store | None = None) -> Checkpoint:
    """Read ``path.safetensors``, or ``run:KEY[@STEP]`` from the run store (default: its last step).

    Raises:
        BadParameter: no such file, run or step, or not a safetensors file.
        CorruptEntry: a stored network does not match its checksum.
    """
    return _run(source, store or Store()) if source.startswith(RUN) else _file(source)


def _file(source: str) -> Checkpoint:
    path = Path(source).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadParameter(
            f"checkpoint {source}: no such file. Give a safetensors file, or {RUN}KEY[@STEP] "
            "for a network of the run store (`companion runs list`)."
        ) from None
    except OSError as e:
        raise BadParameter(f"checkpoint {source}: cannot be read ({e.strerror}).") from e
    try:
        tensors = load_bytes(content)
    except SafetensorError as e:
        pickled = content[:2] == b"PK" or content[:1] == b"\x80"
        what = "a file of torch.save" if pickled else f"not a safetensors file ({e})"
        raise BadParameter(f"checkpoint {source}: this is {what}. {CONVERT}") from e
    if not tensors:
        raise BadParameter(f"checkpoint {source}: the file holds no tensors.")
    notes: tuple[str, ...] = ()
    if {"step", "trace"} <= tensors.keys() and any(k.startswith("theta/") for k in tensors):
        state = State.from_tensors(tensors)
        tensors, notes = (state.theta, (f"a run at step {state.step}; its weights are taken",))
    return Checkpoint(source, tensors, hashlib.sha256(content).hexdigest(), {}, notes)


def _run(source: str, store: Store) -> Checkpoint:
    key, at, text = source.removeprefix(RUN).partition("@")
    entry = store.find(key)
    steps = stored_steps(entry)
    if entry.identity.get("kind") != "run" or not steps:
        raise BadParameter(
            f"checkpoint {source}: {entry.key[:12]} is "
            f"{describe_entry(entry.identity)}, which holds no network. "
            "`companion runs list --kind run` shows those that do."
        )
    step = int(text) if text.isdecimal() else max(steps) if not at else -1
    if step not in steps:
        raise BadParameter(
            f"checkpoint {source}: step {text!r} is not stored. "
            f"Stored steps: {', '.join(map(str, steps))}."
        )
    name = steps[step][-1]  # weights-… after state-…: the smaller of two equals
    theta = State.from_tensors(entry.read_tensors(name)).theta
    note = f"{describe_entry(entry.identity)}; its weights at step {step}"
    return Checkpoint(source, theta, f"{entry.key}@{step}", entry.identity["recipe"], (note,))


def inside(name: str, own: Collection[str]) -> str | None:
    """What a model calls an entry of a file; None for a constant that it does not store.

    Arguments:
        name: the file's.
        own: names in the model's state dict.
    """
    while name not in own and (p := next((w for w in WRAPPERS if name.startswith(w)), "")):
        name = name.removeprefix(p)
    return _in_gpt2(name, own)


def _in_gpt2(name: str, own: Collection[str]) -> str | None:
    if name in own or not any(k.startswith(GPT2 + "h.") for k in own):
        return name
    if GPT2 + name in own:
        return GPT2 + name
    return None if _MASKS.fullmatch(name) else name


def vocabulary(dataset: Dataset, ends: Sequence[Checkpoint]) -> int:
    """The number of classes of a model that is to hold these checkpoints, on ``dataset``.

    The dataset's; but a text's is rounded up, and published networks often have as many rows as
    there are tokens: then that number, if it is the one of all checkpoints.
    """
    facts = dataset.text
    if facts is not None and ends and all(_rows(end) == facts.vocabulary for end in ends):
        return facts.vocabulary
    return dataset.classes


def _rows(end: Checkpoint) -> int | None:
    """Of the embedding of tokens."""
    found = (len(v) for k, v in end.theta.items() if re.fullmatch(r"(?:.*\.)?wte\.weight", k))
    return next(found, None)


def fit(module: nn.Module, found: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint as a state dict of ``module``, with a note on everything that had to be done.

    Undone: a common prefix of DataParallel or torch.compile; names of GPT-2 without the prefix
    "transformer.", and the masks in its older files; a tied tensor stored under its other name;
    floating-point types other than the module's. ``name`` is what messages call the network.

    Raises:
        BadParameter: missing or extra entries, other shapes, integers where the module has
            floating-point numbers, NaN or infinite values; two tensors where the module has one.
    """
    own = {k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
    theta, notes = dict(found.theta), list(found.notes)
    while prefix := next(
        (
            p
            for p in WRAPPERS
            if all(k.startswith(p) for k in theta) and not all(k.startswith(p) for k in own)
        ),
        None,
    ):
        theta = {k.removeprefix(prefix): v for k, v in theta.items()}
        notes.append(f"the prefix {prefix!r} of all names is left out")
    theta = _as_gpt2(theta, own, notes)
    for alias, first in layout(module).ties.items():
        if alias in theta and first not in theta:
            theta[first] = theta.pop(alias)
            notes.append(f"{alias} is the tied {first}")
    # Files keep no order; the module's own makes the first complaint the first layer's.
    theta = {k: theta[k] for k in [*own, *sorted(theta.keys() - own.keys())] if k in theta}
    casts: set[str] = set()
    for k, v in theta.items():
        if k not in own or v.dtype == own[k].dtype:
            continue
        have, want = (str(t.dtype).removeprefix("torch.") for t in (v, own[k]))
        if v.is_floating_point() and own[k].is_floating_point():
            theta[k] = v.to(own[k].dtype)
            casts.add(f"{have} weights are cast to {want}")
        elif own[k].is_floating_point():
            raise BadParameter(
                f"network {name} ({found.source}): {k} holds {have} numbers, the model {want}. "
                "Quantised weights are no point of weight space: dequantise them first."
            )
    check_theta(module, theta, f"{name} ({found.source})")
    return replace(found, theta=theta, notes=(*notes, *sorted(casts)))


def _as_gpt2(
    theta: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor], notes: list[str]
) -> dict[str, torch.Tensor]:
    """Entries under the model's names, in case the file's are those of a published GPT-2."""
    names = {k: _in_gpt2(k, own) for k in theta}
    if len({*names.values()} - {None}) < sum(new is not None for new in names.values()):
        return theta  # both forms at once: its names are refused as they are
    out = {new: theta[k] for k, new in names.items() if new is not None}
    if any(new is not None and new != k for k, new in names.items()):
        notes.append(
            f"names are those of GPT-2 without a head; {GPT2!r} is put before them (the published "
            "networks have gelu=tanh)"
        )
    if None in names.values():
        notes.append("attention masks, which are constants, are left out")
    return out
