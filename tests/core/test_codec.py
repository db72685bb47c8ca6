"""The codec: every value comes back, and what is not one is refused by the name of its place."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from types import GenericAlias
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion.core import codec
from companion.core.errors import BadParameter, CorruptData

PLAIN = {
    str: st.text(max_size=8),
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(),
}


def _grown(kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Annotations made of annotations, frozen dataclasses among them."""
    some = st.lists(kinds, min_size=1, max_size=3)
    return st.one_of(
        kinds.map(lambda k: GenericAlias(tuple, (k, ...))),
        some.map(lambda ks: GenericAlias(tuple, tuple(ks))),
        st.tuples(st.sampled_from((str, int, float)), kinds).map(
            lambda kv: GenericAlias(Mapping, kv)
        ),
        kinds.filter(lambda k: type(None) not in getattr(k, "__args__", ())).map(
            lambda k: k | None
        ),
        some.map(
            lambda ks: make_dataclass("Made", [(f"f{i}", k) for i, k in enumerate(ks)], frozen=True)
        ),
    )


ANNOTATIONS = st.recursive(st.sampled_from(list(PLAIN)), _grown, max_leaves=6)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation."""
    if kind in PLAIN:
        return PLAIN[kind]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        parts = {f.name: values(f.type) for f in dataclasses.fields(kind)}
        return st.builds(kind, **parts)
    inner = kind.__args__
    if type(None) in inner:
        return st.none() | values(inner[0])
    if kind.__origin__ is not tuple:
        keys = values(inner[0]).filter(lambda k: k == k)
        return st.dictionaries(keys, values(inner[1]), max_size=3)
    if inner[-1] is Ellipsis:
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    return st.tuples(*map(values, inner))


@given(st.data())
def test_any_value_comes_back(data: st.DataObject) -> None:
    kind = data.draw(ANNOTATIONS)
    value = data.draw(values(kind))
    text = json.dumps(codec.to_json(value), allow_nan=False)
    again = codec.from_json(kind, json.loads(text), "value")
    # repr tells NaN from numbers, 0.0 from -0.0, 1 from 1.0 and a tuple from a list.
    assert repr(again) == repr(value)
    assert json.dumps(codec.to_json(again), allow_nan=False) == text


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(), st.lists))
def test_plain_data_for_a_page_have_no_numbers_that_are_not_finite(value: Any) -> None:
    written = codec.to_json(value, null=True)
    json.dumps(written, allow_nan=False)
    if "nan" not in repr(value) and "inf" not in repr(value):
        assert repr(written) == repr(value)


@dataclass(frozen=True)
class Inner:
    """One number, and one that came later."""

    x: float
    later: int | None = field(default=None, metadata=codec.OMIT_DEFAULT)


@dataclass(frozen=True)
class Outer:
    """Values in values."""

    name: str
    parts: Mapping[str, tuple[Inner, ...]]
    ends: tuple[float, int] | None = None
    flag: bool = False


OUTER = Outer("a", {"b": (Inner(0.5), Inner(math.inf, 3))})
WRITTEN = {
    "name": "a",
    "parts": {"b": [{"x": 0.5}, {"x": "inf", "later": 3}]},
    "ends": None,
    "flag": False,
}


def test_fields_keep_their_order_and_omitted_defaults_are_read() -> None:
    assert json.dumps(codec.to_json(OUTER)) == json.dumps(WRITTEN)
    assert codec.from_json(Outer, WRITTEN) == OUTER
    assert codec.from_json(dict[str, Outer], {"k": WRITTEN}) == {"k": OUTER}


def test_fields_that_have_a_default_may_be_missing_and_other_keys_are_ignored() -> None:
    assert codec.from_json(Outer, {"name": "a", "parts": {}, "more": 1}) == Outer("a", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "Outer.name: text is needed, not 3"),
        ({"name": None}, "Outer.name: text is needed, not None"),
        ({"parts": [1]}, "Outer.parts: an object is needed, not [1]"),
        ({"parts": {"b": 1.5}}, "Outer.parts['b']: a list is needed, not 1.5"),
        ({"parts": {"b": [{}]}}, "Outer.parts['b'][0].x is missing"),
        ({"parts": {"b": ["x" * 99]}}, "Outer.parts['b'][0]: an object is needed, not 'xxx"),
        ({"parts": {"b": [{"x": "1"}]}}, "Outer.parts['b'][0].x: a number is needed, not '1'"),
        ({"parts": {"b": [{"x": True}]}}, "Outer.parts['b'][0].x: a number is needed, not True"),
        ({"parts": {"b": [{"x": 1, "later": 0.5}]}}, "later: a whole number is needed, not 0.5"),
        ({"ends": [1.0]}, "Outer.ends: a list of 2 is needed, not [1.0]"),
        ({"ends": [1.0, True]}, "Outer.ends[1]: a whole number is needed, not True"),
        ({"flag": 0}, "Outer.flag: true or false is needed, not 0"),
    ],
)
def test_what_is_malformed_is_refused_by_its_place(change: Any, message: str) -> None:
    with pytest.raises(CorruptData) as error:
        codec.from_json(Outer, {**WRITTEN, **change})
    assert message in str(error.value) and len(str(error.value)) < 140


def test_a_key_that_is_no_number_and_no_object_at_all_are_refused() -> None:
    with pytest.raises(CorruptData, match=r"curves, a key: a number is needed, not 'x'"):
        codec.from_json(dict[float, str], {"x": "y"}, "curves")
    with pytest.raises(CorruptData, match=r"entry 3: an object is needed, not None"):
        codec.from_json(Outer, None, "entry 3")


def test_an_annotation_the_codec_cannot_read_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="no way to read"):
        codec.from_json(set[int], [1])


def test_arrays_tensors_and_scalars_become_lists_and_numbers() -> None:
    value = {
        "a": np.arange(2),
        "b": torch.ones(1, requires_grad=True),
        3: (np.float32(0.5), np.nan, float("inf"), True, None),
        np.float64(0.5): [np.int64(1), np.bool_(True), np.array([np.nan])],
    }
    assert codec.to_json(value, null=True) == {
        "a": [0, 1],
        "b": [1.0],
        "3": [0.5, None, None, True, None],
        "0.5": [1, True, [None]],
    }
    assert codec.to_json(np.float64("-inf")) == "-inf"
    assert codec.to_json({"x": Inner(math.nan)}, null=True) == {"x": {"x": "nan"}}


@pytest.mark.parametrize("value", [object(), {1}, b"bytes", Inner])
def test_what_json_cannot_hold_is_refused_by_its_place(value: Any) -> None:
    with pytest.raises(BadParameter, match=r"figure 'x', data\['a'\]\[1\]: a .* cannot be written"):
        codec.to_json({"a": [0, value]}, "figure 'x', data")
    with pytest.raises(BadParameter, match=r"value\.parts\['b'\]: a"):
        codec.to_json(Outer("a", {"b": value}))


def test_what_differs_from_its_default_makes_a_key() -> None:
    assert codec.changed_fields(Outer("a", {}, flag=True)) == {
        "name": "a",
        "parts": {},
        "flag": True,
    }
    assert codec.changed_fields(Inner(0.0)) == {"x": 0.0}
