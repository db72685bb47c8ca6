"""Tensors as a safetensors file, piece by piece: a large network is not in memory twice."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save


def in_pieces(
    tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of ``safetensors.torch.save(tensors, about)``, one tensor after the other.

    Arguments:
        tensors: on any device; tied ones are written under each of their names.
        about: the file's metadata.
    """
    # What the format calls each type of numbers, in the order in which types lie in a file.
    few = save({str(v.dtype): v.new_empty(0, device="cpu") for v in tensors.values()})
    listed = json.loads(few[8 : 8 + struct.unpack("<Q", few[:8])[0]])
    rank = {kind: place for place, kind in enumerate(listed)}
    order = sorted(tensors, key=lambda n: (rank[str(tensors[n].dtype)], n))
    sizes = {n: tensors[n].numel() * tensors[n].element_size() for n in order}
    header: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    for name in order:
        begin, end = end, end + sizes[name]
        kind, shape = listed[str(tensors[name].dtype)]["dtype"], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        value = tensors[name].detach().cpu().contiguous()
        yield value.reshape(-1).view(torch.uint8).numpy().data
