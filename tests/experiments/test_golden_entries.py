"""Stores that people have keep serving: identities, keys, file names and values stay as they were.

The golden file was made before all measurements came under one protocol. Where a value is changed
on purpose, its SEMANTICS is raised, and ``python tests/experiments/test_golden_entries.py`` writes
the file again.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from everykind import fill

from companion.core.runs import Entry, Store, canonical_json, digest

GOLDEN = Path(__file__).with_name("golden_entries.json")


def _as_golden(entry: Entry) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for name in sorted(entry.files()):
        if name.endswith(".json"):
            files[name] = entry.read_json(name)
        else:  # of weights their names and sums
            tensors = entry.read_tensors(name)
            files[name] = {n: float(t.double().sum()) for n, t in tensors.items()}
    return {"key": entry.key, "identity": canonical_json(entry.identity), "files": files}


def made(root: Path) -> list[dict[str, Any]]:
    """One entry of every kind, as the golden file has them."""
    store = Store(root)
    fill(store)
    return [_as_golden(entry) for entry in store.entries()]


def differences(found: Any, golden: Any, where: str = "") -> list[str]:
    """Where the two are not equal; times may be, and the last digits of numbers.

    Single precision has seven digits, and processors add them up in another order: 1.8e-6 between
    an AMD EPYC with AVX-512 and one with AVX2. What a change of code does is far above 1e-5.
    """
    if isinstance(golden, dict) and isinstance(found, dict) and set(found) == set(golden):
        kept = [k for k in golden if k != "seconds"]
        return [d for k in kept for d in differences(found[k], golden[k], f"{where}.{k}")]
    if isinstance(golden, list) and isinstance(found, list) and len(found) == len(golden):
        pairs = enumerate(zip(found, golden, strict=True))
        return [d for i, (f, g) in pairs for d in differences(f, g, f"{where}[{i}]")]
    number = isinstance(golden, float) and isinstance(found, float)
    same = found == (pytest.approx(golden, rel=1e-5, abs=1e-5) if number else golden)
    return [] if same else [f"{where}: {found} was {golden}"]


@pytest.mark.slow
def test_entries_of_every_kind_are_what_they_were(tmp_path: Path) -> None:
    found = made(tmp_path)
    golden = json.loads(GOLDEN.read_bytes())
    assert [e["identity"] for e in found] == [e["identity"] for e in golden]
    for now, then in zip(found, golden, strict=True):
        assert now["key"] == then["key"] == digest(json.loads(now["identity"]))
        kind = json.loads(now["identity"])["kind"]
        assert differences(now["files"], then["files"], kind) == []


if __name__ == "__main__":
    os.environ.setdefault("COMPANION_RUNS", tempfile.mkdtemp())
    with tempfile.TemporaryDirectory() as folder:
        lines = ",\n".join(json.dumps(entry) for entry in made(Path(folder)))
    GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
