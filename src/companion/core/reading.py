"""Files of weights as people have them: safetensors, one or in shards, and files of torch.save.

Tensors of safetensors are read when they are asked for, from a map of the file, so that two large
networks need not lie in memory side by side. Files of torch.save are read with
``torch.load(weights_only=True)`` and in no other way, since a pickle can run code. Beside weights
they may hold values of a few kinds more, which run none (:data:`HARMLESS`).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import io
import json
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import safe_globals

from companion.core.errors import BadParameter
from companion.core.fitting import Lazy

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".tar", ".th", ".chk")
"""Endings of what torch.save writes; the content decides, not the ending."""

NESTS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network"),
    *("weights", "params", "state", "generator", "ema", "model_ema", "state_dict_ema"),
    *("ema_state_dict", "params_ema", "ema_model", "teacher", "student"),
)
"""Where a training's checkpoint keeps its weights, the first that is there. ``FILE#KEY`` names
another one."""

_NUMPY: Any = {
    "scalar": np.float64(0).__reduce__()[0],
    "_reconstruct": np.zeros(0).__reduce__()[0],
}
HARMLESS: list[Any] = [
    *(np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgFDSU"}),
    *((f, f"numpy.{c}.multiarray.{n}") for n, f in _NUMPY.items() for c in ("core", "_core")),
    *(argparse.Namespace, datetime.datetime, datetime.date, datetime.timedelta),
    *(pathlib.PosixPath, pathlib.PurePosixPath),
]
"""What trainings keep beside weights (a best accuracy of numpy, the options of a command line):
values that are made without running any code of the file's."""

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")


@dataclass(frozen=True)
class Weights:
    """Named tensors, and where they come from.

    Arguments:
        tensors: name -> tensor, on the CPU.
        sha256: hex, of the file; of shards, of the lines ``sha256  name`` of all of them.
        about: what was read, where that is not just the file.
    """

    tensors: Mapping[str, Tensor]
    sha256: str
    about: tuple[str, ...] = ()


def read_weights(source: str) -> Weights:
    """Read a file of weights, or a folder that holds one.

    Arguments:
        source: a safetensors file; an index of shards (``*.index.json``); a folder with either;
            a file of torch.save. ``FILE#KEY`` takes the weights under one key of the latter.

    Raises:
        BadParameter: there is no such file, it is none of these or damaged, or holds no tensors.
    """
    path, key = Path(source).expanduser(), ""
    if not path.exists() and "#" in source:
        before, _, key = source.rpartition("#")
        path = Path(before).expanduser()
    try:
        if path.is_dir():
            path = _inside(source, path)
        if path.name.endswith(".json") and not key:
            return _shards(source, path)
        return _one(source, path, key)
    except FileNotFoundError as e:
        what = "no such file" if e.filename in (None, str(path)) else f"there is no {e.filename}"
        raise BadParameter(
            f"checkpoint {source}: {what}. Give a file of safetensors or torch.save, a folder or "
            "index of shards, or run:KEY[@STEP] for a network of the run store (`companion runs "
            "list`)."
        ) from None
    except OSError as e:
        raise BadParameter(f"checkpoint {source}: cannot be read ({e.strerror or e}).") from e


def _inside(source: str, folder: Path) -> Path:
    """The file of weights in a folder."""
    for name in (*SINGLES[:1], *INDEXES, *SINGLES[1:]):
        if (folder / name).is_file():
            return folder / name
    files = sorted(p for p in folder.iterdir() if p.is_file())
    found = [p for p in files if p.suffix == ".safetensors"]
    found = found or [p for p in files if p.name.endswith(".index.json")]
    found = found or [p for p in files if p.suffix in PICKLES]
    if len(found) == 1:
        return found[0]
    names = ", ".join(p.name for p in found[:5])
    raise BadParameter(
        f"checkpoint {source}: this folder holds "
        + (
            f"{len(found)} files of weights ({names}), and no index that says they are shards of "
            "one network. Name one of them."
            if found
            else "no file of weights."
        )
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _one(source: str, path: Path, key: str) -> Weights:
    with path.open("rb") as f:
        begin = f.read(16)
    if not begin:
        raise BadParameter(f"checkpoint {source}: the file is empty.")
    if begin.startswith(b"version https://"):
        raise BadParameter(
            f"checkpoint {source}: this is a pointer of Git LFS and not the file. `git lfs pull` "
            "brings it."
        )
    tensors: Mapping[str, Tensor]
    about: tuple[str, ...]
    if begin[:2] == b"PK" or begin[:1] == b"\x80":
        tensors, about = _unpickled(source, path, key, begin[:2] == b"PK")
    elif key:
        raise BadParameter(
            f"checkpoint {source}: {path.name} is no file of torch.save, and has no keys such as "
            f"{key!r} to take weights from."
        )
    else:
        tensors, about = _mapped(source, path), ()
    if not tensors:
        raise BadParameter(f"checkpoint {source}: the file holds no tensors.")
    return Weights(tensors, _sha256(path), about)


def _mapped(source: str, path: Path) -> Lazy:
    """The tensors of a safetensors file."""
    try:
        with safe_open(str(path), "pt") as f:
            names = list(f.keys())
    except SafetensorError as e:
        raise BadParameter(
            f"checkpoint {source}: this is not a safetensors file ({e}), nor one of torch.save."
        ) from e
    return Lazy({name: partial(_tensor, path, name) for name in names})


def _tensor(path: Path, name: str) -> Tensor:
    """One tensor, in memory as long as it is used: the map of the file goes with it."""
    try:
        with safe_open(str(path), "pt") as f:
            found: Tensor = f.get_tensor(name)
        if not found.is_complex():
            found.new_zeros(1).to(torch.float32)  # some kinds can be stored, and nothing else
    except (SafetensorError, NotImplementedError, RuntimeError) as e:
        raise BadParameter(
            f"{path.name}: {name} holds numbers that PyTorch cannot read ({e}). "
            "Convert the file to float32 or bfloat16 first."
        ) from e
    return found


def _shards(source: str, index: Path) -> Weights:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(name) for name in listed.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadParameter(
            f"checkpoint {source}: {index.name} is no index of shards, which has a weight_map."
        ) from e
    digests, tensors, about = [], {}, []
    for name in files:
        part = _one(source, index.parent / name, "")
        digests.append(f"{part.sha256}  {name}\n")
        about += [text for text in part.about if text not in about]
        missing = [n for n, file in listed.items() if file == name and n not in part.tensors]
        if missing:
            raise BadParameter(f"checkpoint {source}: {name} lacks {', '.join(missing[:3])}.")
        reads = part.tensors.reads if isinstance(part.tensors, Lazy) else None
        for n in part.tensors:
            tensors[n] = reads[n] if reads else partial(part.tensors.__getitem__, n)
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    return Weights(Lazy(tensors), digest, (f"{len(files)} shards", *about))


def _unpickled(
    source: str, path: Path, key: str, zipped: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights in a file of torch.save, and where in it they are."""
    if zipped and not zipfile.is_zipfile(path):
        raise BadParameter(f"checkpoint {source}: the file is damaged or cut short.")
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                raise BadParameter(
                    f"checkpoint {source}: this is a zip archive, but none of torch.save; it holds "
                    f"{', '.join(archive.namelist()[:3])}."
                )
    # By its ending, PyTorch would read it as safetensors.
    misnamed = path.suffix == ".safetensors"
    place = io.BytesIO(path.read_bytes()) if misnamed else path
    try:
        # A map where the format allows one: what is not needed, such as an optimiser, is not read.
        with warnings.catch_warnings(), safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # of archives that are refused in a moment
            mapped = zipped and not misnamed
            value = torch.load(place, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as e:
        raise BadParameter(
            f"checkpoint {source}: it holds more than weights (torch.load(weights_only=True) "
            f"refuses it: {_first_sentence(str(e))}). Where you trust it, save its "
            "weights alone: torch.save(module.state_dict(), 'weights.pth')."
        ) from e
    except OSError:
        raise
    except Exception as e:  # a damaged file, a TorchScript archive, a pickle of something else
        raise BadParameter(
            f"checkpoint {source}: torch.load(weights_only=True) cannot read it "
            f"({type(e).__name__}: {str(e).strip().splitlines()[0].partition('. ')[0]})."
        ) from e
    return _state_in(source, value, key)


def _first_sentence(text: str) -> str:
    """What torch.load says it met, without its advice to load anything."""
    for line in text.splitlines():
        if "Unsupported" in line or "GLOBAL" in line:
            return (
                line.strip()
                .split(" was not an allowed")[0]
                .removeprefix("WeightsUnpickler error: ")
            )
    return text.strip().partition("\n")[0][:160]


def _is_state(value: Any) -> bool:
    """Whether a value is a state dict: names, and at least one tensor directly under them."""
    return isinstance(value, Mapping) and any(_is_tensor(v) for v in value.values())


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor, or an array of NumPy that can be one."""
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "biufc"
    )


def _holds_state(value: Any, depth: int = 5) -> bool:
    """Whether it is a state dict, or has one under one of the usual keys."""
    if not isinstance(value, Mapping) or not depth:
        return False
    return _is_state(value) or any(_holds_state(value.get(k), depth - 1) for k in NESTS)


def _state_in(source: str, value: Any, key: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    about: tuple[str, ...] = ()
    where: list[str] = []
    if key:
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                has = ", ".join(map(str, value)) if isinstance(value, Mapping) else "no keys"
                raise BadParameter(f"checkpoint {source}: no {part!r} in it; it has: {has}.")
            value = value[part]
            where.append(part)
    while isinstance(value, Mapping) and (not _is_state(value) or where == []) and len(where) < 5:
        nested = [k for k in NESTS if _holds_state(value.get(k))]
        if not nested:
            break
        where.append(nested[0])
        others = [k for k in nested[1:] if _is_state(value[k])]
        if others:
            about += (f"there is also {', '.join(others)} (FILE#{others[0]} takes that)",)
        value = value[nested[0]]
    if not _is_state(value):
        keys = ", ".join(map(str, list(value)[:8])) if isinstance(value, Mapping) else ""
        kind = f"a mapping with {keys}" if keys else f"a {type(value).__name__}"
        raise BadParameter(
            f"checkpoint {source}: no weights are found in it; it holds {kind}. A state dict is "
            f"looked for, also under {', '.join(NESTS[:4])}, …; FILE#KEY names another key."
        )
    # Detached: nn.Parameters come with a gradient; two names of one tensor are two of them here.
    found = {str(k): torch.as_tensor(v).detach() for k, v in value.items() if _is_tensor(v)}
    if where:
        about = (f"its weights are under {'.'.join(where)}", *about)
    return found, about
