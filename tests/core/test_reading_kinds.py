"""Numbers of every kind that a safetensors file may hold: read, or refused in a line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from companion.core.errors import BadParameter
from companion.core.reading import read_weights

BITS = {"F4": 4, "F6_E2M3": 6, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U16": 16}
BITS |= {"BF16": 16, "F16": 16, "F32": 32, "F64": 64, "C64": 64, "BOOL": 8, "I64": 64}


@pytest.mark.parametrize("kind", BITS)
def test_numbers_of_any_kind_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    size = 4 * 64 * BITS[kind] // 8
    head = {"w": {"dtype": kind, "shape": [4, 64], "data_offsets": [0, size]}}
    text = json.dumps(head).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    try:
        value = read_weights(str(path)).tensors["w"]
    except BadParameter as error:
        assert kind in ("F4", "F6_E2M3")
        assert "odd.safetensors" in str(error) and "Convert the file" in str(error)
    else:
        assert value.shape == (4, 64)
        assert kind == "F8_E8M0" or not value.bool().any()  # which has no zero
