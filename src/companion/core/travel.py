"""Values that travel to another machine, as JSON: what :mod:`companion.core.plans` is written in.

Nothing is pickled. A tuple stays a tuple, a path a path, and a frozen dataclass of this package
becomes the name of its class and the fields that differ from their defaults. Reading makes nothing
but these; functions travel by their name, too.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from companion.core.errors import BadParameter, CorruptData

_OURS = __name__.partition(".")[0]


def to_wire(value: Any) -> Any:
    """``value`` as plain JSON types.

    Arguments:
        value: None, booleans, numbers, text, paths, and lists, tuples, mappings with keys of text
            and dataclasses of this package, made of them.

    Raises:
        BadParameter: something else; such work can only be done where it was asked for.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [to_wire(v) for v in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: to_wire(v) for key, v in value.items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
        differ = {k: v for k, (v, d) in given.items() if type(v) is not type(d) or v != d}
        return {name_of(type(value)): {k: to_wire(v) for k, v in differ.items()}}
    raise BadParameter(
        f"engine: a {type(value).__name__} cannot travel to another machine. Use --engine local."
    )


def from_wire(data: Any) -> Any:
    """What :func:`to_wire` wrote, as a value again.

    Raises:
        CorruptData: it did not write that, or another version of the code did.
    """
    if not isinstance(data, dict):
        if isinstance(data, list):
            raise CorruptData("plan: a list without its kind.")
        return data
    if len(data) != 1:
        raise CorruptData(f"plan: one kind of value is needed, not {sorted(data)[:3]}.")
    ((kind, inside),) = data.items()
    try:
        if kind == "path":
            return Path(inside)
        if kind in ("list", "tuple"):
            values = [from_wire(v) for v in inside]
            return values if kind == "list" else tuple(values)
        fields = {key: from_wire(v) for key, v in inside.items()}
        return fields if kind == "dict" else _found(kind, dataclasses.is_dataclass)(**fields)
    except (TypeError, AttributeError) as e:
        raise CorruptData(f"plan: {kind!r} is not of this version of the code ({e}).") from e


def name_of(thing: type | Callable[..., Any]) -> str:
    """A class or function of this package by name, such as ``companion.training.recipe:Job``.

    Raises:
        BadParameter: it is not of this package, or has no name of its own.
    """
    name = f"{thing.__module__}:{thing.__qualname__}"
    if not _is_ours(name):
        raise BadParameter(f"engine: {name} is not of this package, so it cannot travel.")
    return name


def function(name: str) -> Callable[..., Any]:
    """The function of this package that :func:`name_of` names. Raises as :func:`from_wire`."""
    found: Callable[..., Any] = _found(name, callable)
    return found


def _is_ours(name: str) -> bool:
    module, _, inside = name.partition(":")
    return module.split(".")[0] == _OURS and inside.isidentifier()


def _found(name: str, fits: Callable[[Any], bool]) -> Any:
    try:
        if not _is_ours(name):
            raise ImportError("only this package's own names are read")
        module, _, inside = name.partition(":")
        found = getattr(importlib.import_module(module), inside)
    except (ImportError, AttributeError) as e:
        raise CorruptData(f"plan: {name!r} is not known here ({e}).") from e
    if not fits(found):
        raise CorruptData(f"plan: {name!r} is not of the kind that is needed.")
    return found
