"""A chapter's parameters under plain papermill: typed, and nothing unknown.

papermill passes an unknown name with a log line only, and checks no type. A chapter therefore
annotates its parameters cell (``steps: int | None = None``) and calls :func:`check` in the next.
"""

from __future__ import annotations

import ast
import contextlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from companion.core.errors import BadParameter, one_of

_NOTEBOOK = {"In", "Out"}  # IPython's own data; its other names are functions or start with "_"


def check(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The chapter's parameters and their values, once names and types are right.

    Arguments:
        namespace: ``globals()`` of a notebook whose parameters cell annotates every parameter.
            What papermill injects besides is in there too, and is how a mistyped name is seen.

    Raises:
        BadParameter: an unknown name (with the nearest known one), or a value of another type.
    """
    declared = _declared(namespace)
    for name, value in namespace.items():
        foreign = isinstance(value, types.ModuleType) or callable(value) or name.startswith("_")
        if not foreign and name not in _NOTEBOOK:
            one_of("parameter", name, declared)
    return values(namespace)


def values(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The chapter's parameters and their values, for ``paper.design(**values(globals()))``.

    Arguments:
        namespace: ``globals()`` of a notebook, in any cell.

    Raises:
        BadParameter: a value of another type than the parameters cell says.
    """
    found = {}
    for name, hint in _declared(namespace).items():
        value = namespace[name]
        if not _fits(value, hint):
            wanted = hint.__name__ if isinstance(hint, type) else str(hint)
            raise BadParameter(
                f"parameter {name}: {value!r} is of type {type(value).__name__}, needed: {wanted}. "
                "papermill: -p NAME VALUE for numbers and names, -y 'NAME: [1, 2]' for lists; "
                "in YAML 1e-3 is text, write 0.001."
            )
        found[name] = float(value) if hint is float else value
    return found


def changed(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters whose values are not the chapter's own: what a command has to set again.

    The defaults are read from the source of the parameters cell, which IPython keeps in ``In``.
    """
    defaults: dict[str, Any] = {}
    for source in namespace.get("In", []):
        try:
            statements = ast.parse(source).body
        except SyntaxError:  # magics
            continue
        for node in statements:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                with contextlib.suppress(ValueError):  # computed: no default to compare with
                    defaults.setdefault(node.target.id, ast.literal_eval(node.value))
    return {
        name: namespace[name]
        for name in _declared(namespace)
        if name not in defaults or namespace[name] != defaults[name]
    }


def _declared(namespace: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name to type, from the annotations of the parameters cell."""
    found: Mapping[str, Any] = namespace.get("__annotations__", {})
    return found


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is list:
        (inner,) = typing.get_args(hint)
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    if isinstance(hint, str):  # annotations under `from __future__ import annotations`
        raise TypeError(f"annotation {hint!r} is text; the parameters cell needs real types")
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        number = isinstance(value, int) or (hint is float and isinstance(value, float))
        return number and not isinstance(value, bool)
    return isinstance(value, hint)
