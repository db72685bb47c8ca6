"""YAML as this project reads it: plain values, and no key twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class _Once(yaml.SafeLoader):
    """PyYAML's safe loader, which keeps the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # "<<" may stand there more than once
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    "while constructing a mapping",
                    node.start_mark,
                    f"the key {key!r} stands twice",
                    key_node.start_mark,
                )
            if isinstance(key, Hashable):  # PyYAML itself refuses the others
                seen.add(key)
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """The document as plain values.

    Raises:
        yaml.YAMLError: it is not valid, or a mapping has a key twice; the message has the line.
    """
    loader = _Once(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def number(text: str) -> str:
    """A number with an exponent as YAML 1.1 reads one: ``1e-5`` is text, ``1.0e-5`` is not."""
    mantissa, exponent = text.lower().split("e")
    mantissa += "" if "." in mantissa else ".0"
    return f"{mantissa}e{exponent if exponent[0] in '+-' else '+' + exponent}"
