"""Through JSON and back, as the run store takes a value."""

from __future__ import annotations

import json
from typing import TypeVar

from companion.core import codec

T = TypeVar("T")


def reread(value: T) -> T:
    """``value`` after it was written as JSON and read again."""
    text = json.dumps(codec.to_json(value), allow_nan=False)
    return codec.from_json(type(value), json.loads(text))
