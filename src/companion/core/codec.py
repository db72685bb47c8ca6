"""Values to JSON and back; the annotations of a frozen dataclass say how it is read.

    text = json.dumps(codec.to_json(barrier))
    again = codec.from_json(Barrier, json.loads(text))

A dataclass becomes an object with its fields in their order, a tuple a list, a mapping an object.
JSON has no NaN and no infinity: they become the texts "nan", "inf" and "-inf", which are read back.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from companion.core.errors import BadParameter, CorruptData

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

_OMIT = "omit default"
#: ``field(default=None, metadata=OMIT_DEFAULT)``: the field is written only if it differs from its
#: default, so that what was stored before there was such a field keeps its bytes.
OMIT_DEFAULT = types.MappingProxyType({_OMIT: True})

_PLAIN: dict[Any, tuple[str, tuple[type, ...]]] = {
    str: ("text", (str,)),
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
}
_NOT_FINITE = ("nan", "inf", "-inf")


@overload
def to_json(
    value: DataclassInstance | Mapping[Any, Any], where: str = ..., *, null: bool = ...
) -> dict[str, Any]: ...


@overload
def to_json(value: object, where: str = ..., *, null: bool = ...) -> Any: ...


def to_json(value: Any, where: str = "value", *, null: bool = False) -> Any:
    """``value`` as plain JSON types.

    Arguments:
        value: numbers, text, booleans, None, NumPy arrays, torch tensors, and dataclasses, mappings
            and iterables of them.
        where: what to call the value in an error message.
        null: write NaN and infinities as null, as a page draws them; in a dataclass they stay text.

    Raises:
        BadParameter: something JSON cannot hold; the message says where.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return None if null else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: to_json(v, f"{where}.{f.name}")
            for f in dataclasses.fields(value)
            for v in [getattr(value, f.name)]
            if not (f.metadata.get(_OMIT) and v == f.default)
        }
    if isinstance(value, Mapping):
        named = {repr(float(k)) if isinstance(k, float) else str(k): v for k, v in value.items()}
        return {k: to_json(v, f"{where}[{k!r}]", null=null) for k, v in named.items()}
    if hasattr(value, "detach"):  # a torch tensor, on any device, with or without a graph
        value = value.detach().cpu()
    if hasattr(value, "tolist"):  # NumPy and torch, arrays and scalars
        return to_json(value.tolist(), where, null=null)
    if isinstance(value, Iterable) and not isinstance(value, (bytes, set, frozenset)):
        return [to_json(v, f"{where}[{i}]", null=null) for i, v in enumerate(value)]
    raise BadParameter(
        f"{where}: a {type(value).__name__} cannot be written as JSON. Allowed: numbers, strings, "
        "booleans, None, lists, mappings, dataclasses, NumPy arrays, torch tensors."
    )


def changed_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, as JSON.

    For the keys of the run store: a field that is added later leaves old keys as they are.
    """
    return {
        f.name: to_json(v, f.name)
        for f in dataclasses.fields(value)
        if (v := getattr(value, f.name)) != f.default
    }


def from_json(kind: type[T], data: Any, where: str | None = None) -> T:
    """What :func:`to_json` wrote, as a value again. Keys that are no field's are ignored.

    Arguments:
        kind: a dataclass, or a type made of them, such as ``dict[str, Curve]``.
        data: plain JSON types.
        where: what to call the value in an error message; default: the name of ``kind``.

    Raises:
        CorruptData: a field is missing or of another type; the message says which.
    """
    return cast(T, _read(kind, data, where or kind.__name__))


def _read(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    if kind in _PLAIN:
        name, allowed = _PLAIN[kind]
        fits = isinstance(data, allowed) and (kind is bool or not isinstance(data, bool))
        if not fits and not (kind is float and data in _NOT_FINITE):
            raise _wrong(where, name, data)
        return kind(data)
    if dataclasses.is_dataclass(kind):
        return _object(cast(type, kind), data, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType) and len(inner) == 2 and types.NoneType in inner:
        some = inner[inner[0] is types.NoneType]
        return None if data is None else _read(some, data, where)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise _wrong(where, "a list", data)
        kinds = inner[:1] * len(data) if inner[-1] is Ellipsis else inner
        if len(data) != len(kinds):
            raise _wrong(where, f"a list of {len(kinds)}", data)
        pairs = zip(kinds, data, strict=True)
        return tuple(_read(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(pairs))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise _wrong(where, "an object", data)
        key, value = inner
        return {_key(key, k, where): _read(value, v, f"{where}[{k!r}]") for k, v in data.items()}
    raise TypeError(f"{where}: the codec has no way to read {kind} back.")


def _object(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(where, "an object", data)
    hints, found = _hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in data:
            found[field.name] = _read(hints[field.name], data[field.name], f"{where}.{field.name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise CorruptData(f"{where}.{field.name} is missing.")
    return kind(**found)


_hints = cache(typing.get_type_hints)


def _key(kind: Any, key: str, where: str) -> Any:
    try:
        return kind(key)
    except ValueError:
        raise _wrong(f"{where}, a key", _PLAIN[kind][0], key) from None


def _wrong(where: str, wanted: str, data: Any) -> CorruptData:
    shown = repr(data)
    return CorruptData(f"{where}: {wanted} is needed, not {shown[:60]}{'…' * (len(shown) > 60)}.")
