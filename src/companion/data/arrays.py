"""Arrays that took long to make, cached on disk: decoded pictures, tokenised texts.

A cached array is a normal .npy file with the SHA-256 of all its bytes appended. It is written under
another name and renamed, so nobody reads half a file; one that does not match its checksum does not
count. Whoever uses the cache decides what a folder that cannot be written means.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from companion.data.sources import sha256_of

DIGEST = 32  # bytes of a SHA-256


def load(path: Path) -> NDArray[Any] | None:
    """The array stored in ``path``, read-only and memory-mapped; None: none, or a damaged one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - DIGEST))
            expected = file.read()
            file.seek(0)
            h = hashlib.sha256()
            left = size - DIGEST
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                h.update(block)
                left -= len(block)
        if h.digest() != expected:
            return None
        array: NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return array


def store(path: Path, array: NDArray[Any]) -> None:
    """Write ``array`` so that :func:`load` finds it.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
        digest = bytes.fromhex(sha256_of(temporary))
        with temporary.open("ab") as file:
            file.write(digest)
        temporary.chmod(0o644)  # mkstemp's 0600 would hide the cache from a shared run store
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
