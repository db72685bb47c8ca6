"""The user's own networks: ``package.module:factory`` with optional ``?option=value,…``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from companion.core.errors import BadParameter
from companion.models.options import Shape

DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_own(spec: str) -> bool:
    """Whether ``spec`` names an importable factory: there is a dot before its first colon."""
    head, colon, _ = spec.partition("?")[0].partition(":")
    return bool(colon) and "." in head


def source_digest(spec: str) -> str:
    """SHA-256 of the source file that defines the factory of ``spec``, its imports not included.

    Raises:
        BadParameter: the factory cannot be imported.
    """
    name = spec.partition("?")[0]
    module, factory = (part.strip() for part in name.split(":", 1))
    found = inspect.unwrap(import_factory(spec, module, factory))
    try:
        source = inspect.getsourcefile(found) or inspect.getsourcefile(type(found))
    except TypeError:  # a built-in, or an instance of one
        source = None
    return hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""


def literal(text: str) -> int | float | bool | str | None:
    """A value out of a spec: whole numbers, decimals, true, false and none; all else is text."""
    words: dict[str, bool | None] = {"true": True, "false": False, "none": None}
    if text.casefold() in words:
        return words[text.casefold()]
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text, re.IGNORECASE):
        return float(text)
    return text


def import_factory(spec: str, module_name: str, factory_name: str) -> Callable[..., Any]:
    """Import the factory, or raise :class:`BadParameter` that says what is missing where."""
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as e:  # whatever the user's module does at import
        raise BadParameter(
            f"model {spec!r}: cannot import {module_name!r} ({type(e).__name__}: {e})."
            " Is it installed, or its folder on PYTHONPATH?"
        ) from e
    for name in factory_name.split("."):
        if not hasattr(found, name):
            public = [n for n in vars(found) if not n.startswith("_")]
            close = difflib.get_close_matches(name, public, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise BadParameter(f"model {spec!r}: {module_name} has no {name!r}.{hint}")
        found = getattr(found, name)
    if not callable(found):
        raise BadParameter(
            f"model {spec!r}: {factory_name!r} is of type {type(found).__name__}, not a"
            " function or class that can be called with in_shape=..., classes=... ."
        )
    factory: Callable[..., Any] = found
    return factory


def build_own(
    spec: str, name: str, values: Mapping[str, Any], in_shape: Shape, classes: int
) -> nn.Module:
    """Call the user's factory. What it raises itself comes through, with its own traceback."""
    module_name, _, factory_name = name.partition(":")
    factory = import_factory(spec, module_name, factory_name)
    arguments = {"in_shape": in_shape, "classes": classes, **values}
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a few builtins have none
        pass
    else:
        try:
            signature.bind(**arguments)
        except TypeError as e:
            shown = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
            raise BadParameter(
                f"model {spec!r}: {name}{signature} cannot be called with {shown} ({e})."
            ) from None
    net = factory(**arguments)
    if not isinstance(net, nn.Module):
        raise BadParameter(
            f"model {spec!r}: {name} must return a torch.nn.Module, but returned a"
            f" {type(net).__module__}.{type(net).__qualname__}."
        )
    return net
