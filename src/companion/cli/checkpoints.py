"""Checkpoints of the user's: safetensors files, or networks of the run store.

What is stored and what the model calls it often differ in small ways. Those with one possible
meaning are undone, and said (:func:`fit`); all others are refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import nn

from companion.cli.runs import describe, stored_steps
from companion.errors import BadParameter
from companion.runs import Store
from companion.theta import Theta, check, layout
from companion.training import State

RUN = "run:"
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's

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


def read(source: str, store: Store | None = None) -> Checkpoint:
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
        tensors, notes = (
            state.theta,
            (f"a run at step {state.step}; its weights are taken",),
        )
    return Checkpoint(source, tensors, hashlib.sha256(content).hexdigest(), {}, notes)


def _run(source: str, store: Store) -> Checkpoint:
    key, at, text = source.removeprefix(RUN).partition("@")
    entry = store.find(key)
    steps = stored_steps(entry)
    if entry.identity.get("kind") != "run" or not steps:
        raise BadParameter(
            f"checkpoint {source}: {entry.key[:12]} is {describe(entry.identity)}, which holds no "
            "network. `companion runs list --kind run` shows those that do."
        )
    step = int(text) if text.isdecimal() else max(steps) if not at else -1
    if step not in steps:
        raise BadParameter(
            f"checkpoint {source}: step {text!r} is not stored. "
            f"Stored steps: {', '.join(map(str, steps))}."
        )
    name = steps[step][-1]  # weights-… after state-…: the smaller of two equals
    theta = State.from_tensors(entry.read_tensors(name)).theta
    note = f"{describe(entry.identity)}; its weights at step {step}"
    return Checkpoint(source, theta, f"{entry.key}@{step}", entry.identity["recipe"], (note,))


def fit(module: nn.Module, found: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint as a state dict of ``module``, with a note on everything that had to be done.

    Undone: a common prefix of DataParallel or torch.compile; a tied tensor stored under its other
    name; floating-point types other than the module's. ``name`` is what messages call the network.

    Raises:
        BadParameter: missing or extra entries, other shapes, integers where the module has
            floating-point numbers, NaN or infinite values.
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
    check(module, theta, f"{name} ({found.source})")
    return replace(found, theta=theta, notes=(*notes, *sorted(casts)))
