"""Fixed evaluation windows: their hash, and keeping them in the run store.

Two losses can be compared if they were measured on the same tokens. The digest says whether they
were; the stored windows let anybody measure on them again. Source: our chapter 5.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from companion.core import closing
from companion.core.errors import BadParameter, CorruptData
from companion.data.dataset import Split

if TYPE_CHECKING:
    from companion.core.runs import Store

_ROWS = 4096  # hashed at a time
_FILE = "windows.safetensors"


def windows_digest(split: Split) -> str:
    """SHA-256 (hex) of the windows of a text: their number, length, order and tokens.

    Raises:
        BadParameter: the split holds images.
    """
    if split.kind != "text":
        raise BadParameter("windows: a split of a text is needed; this one holds images.")
    h = hashlib.sha256(f"windows v1 {len(split)} {split.window}\n".encode())
    for part in (split.x, split.y):
        for rows in part.split(_ROWS):
            h.update(rows.cpu().numpy().astype("<i8").tobytes())
    return h.hexdigest()


def save_windows(split: Split, store: Store) -> str:
    """Keep the windows of a text in the run store, once, as an entry of kind ``windows``.

    Arguments:
        split: such as the head of the test split that a measurement used.
        store: where to.

    Returns:
        Their digest, the name under which :func:`load_windows` finds them.

    Raises:
        BadParameter: the split holds images.
        StoreUnwritable: no space, or no permission.
    """
    digest = windows_digest(split)
    if closing.active():  # what was measured names them, and nothing else is measured on them
        return digest
    entry = store.entry(_identity(digest))
    with entry.lock():
        if _FILE not in entry:
            small = {"x": split.x.to(torch.int32), "y": split.y.to(torch.int32)}
            entry.write_tensors(_FILE, small)
    return digest


def load_windows(digest: str, store: Store) -> Split:
    """The windows that :func:`save_windows` kept, on the CPU.

    Raises:
        BadParameter: there are none with this digest.
        CorruptEntry, CorruptData: they are not those that were stored.
    """
    entry = store.entry(_identity(digest))
    if _FILE not in entry:
        raise BadParameter(f"windows {digest[:12]}: not in the run store {store.root}.")
    tensors = entry.read_tensors(_FILE)
    split = Split(tensors["x"].long(), tensors["y"].long())
    if windows_digest(split) != digest:
        raise CorruptData(f"windows {digest[:12]}: {entry.path} holds other windows.")
    return split


def _identity(digest: str) -> dict[str, str]:
    return {"kind": "windows", "windows": digest}
