"""Checkpoints of the user's: files of weights, or networks of the run store.

What is stored and what the model calls it often differ in small ways. Those with one possible
meaning are undone, and said (:func:`fit`); all others are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from companion.cli.runs import describe_entry, stored_steps
from companion.core.errors import BadParameter
from companion.core.fitting import fitted, in_type_of
from companion.core.reading import read_weights
from companion.core.runs import Store
from companion.core.theta import Theta, check_theta, layout
from companion.training import State

if TYPE_CHECKING:
    from companion.data import Dataset

RUN = "run:"


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors and where they come from.

    Arguments:
        source: as the user gave it.
        theta: name -> tensor, on the CPU.
        sha256: of the file (hex), or the run's key and step.
        recipe: of a run of the store, its recipe's fields; else empty.
        notes: what was done to it, for the user.
        names: the file's name of each entry -> the model's; None where it is left out. Known once
            it is fitted to a model.
    """

    source: str
    theta: Theta
    sha256: str
    recipe: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    names: Mapping[str, str | None] = field(default_factory=dict)


def read_checkpoint(source: str, store: Store | None = None) -> Checkpoint:
    """Read a file of weights, or ``run:KEY[@STEP]`` from the run store (default: its last step).

    Raises:
        BadParameter: no such run or step; what :func:`read_weights` refuses.
        CorruptEntry: a stored network does not match its checksum.
    """
    return _run(source, store or Store()) if source.startswith(RUN) else _file(source)


def _file(source: str) -> Checkpoint:
    found = read_weights(source)
    names = found.tensors.keys()
    if {"step", "trace"} <= names and any(k.startswith("theta/") for k in names):
        state = State.from_tensors(found.tensors)
        notes = (f"a run at step {state.step}; its weights are taken",)
        return Checkpoint(source, state.theta, found.sha256, {}, notes)
    return Checkpoint(source, found.tensors, found.sha256, {}, found.about)


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

    Undone: whatever differs in name alone (:mod:`companion.core.fitting`), and floating-point types
    other than the module's. ``name`` is what messages call the network.

    Raises:
        BadParameter: missing or extra entries, other shapes, integers where the module has
            floating-point numbers, NaN or infinite values; two tensors where the module has one.
    """
    done = fitted(module, found.theta, layout(module).ties)
    own = {k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
    for k, v in done.theta.items():
        if k in own and own[k].is_floating_point() and not v.is_floating_point():
            have, want = (str(t.dtype).removeprefix("torch.") for t in (v, own[k]))
            raise BadParameter(
                f"network {name} ({found.source}): {k} holds {have} numbers, the model {want}. "
                "Quantised weights are no point of weight space: dequantise them first."
            )
    theta, casts = in_type_of(done.theta, own)
    theta = check_theta(module, theta, f"{name} ({found.source})")
    return replace(found, theta=theta, names=done.names, notes=(*found.notes, *done.notes, *casts))
