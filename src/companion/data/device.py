"""Names of devices: ``auto``, ``cpu``, ``cuda``, ``cuda:1``."""

from __future__ import annotations

import re
import warnings

import torch

from companion.core import closing
from companion.core.errors import BadParameter, DeviceUnavailable
from companion.core.numerics import fix_cublas_workspace


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device a name stands for, checked to exist on this machine.

    Before a GPU is handed out, cuBLAS gets its workspace: see :mod:`companion.core.numerics`. While
    a recording is closed no GPU has to be here, and ``"auto"`` is where it was measured.

    Arguments:
        name: ``"cpu"``; ``"cuda"`` (the current GPU) or ``"cuda:N"``; ``"auto"`` is ``cuda`` where
            there is a GPU and ``cpu`` elsewhere. A ``torch.device`` is checked in the same way.

    Returns:
        The device, a GPU always with its index: ``resolve_device("cuda") == tensor.device`` holds.

    Raises:
        BadParameter: the name is none of these.
        DeviceUnavailable: a GPU is asked for that this machine does not have.
    """
    name = str(name)
    if not (match := re.fullmatch(r"(auto|cpu|cuda)|cuda:(\d+)", name)):
        raise BadParameter(f"device: {name!r} is not known. Allowed: auto, cpu, cuda, cuda:N.")
    if name == "auto":
        name = closing.device() or name
    if name == "cpu":
        return torch.device("cpu")
    if closing.active():
        return torch.device("cuda", int(name.partition(":")[2] or 0))
    # A driver too old for this build of torch shows as a warning and "no GPU": part of our message.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if name == "auto":
            return torch.device("cpu")
        why = f" torch says: {said[0].message}" if said else ""
        raise DeviceUnavailable(
            f"device: {name} was asked for, but torch {torch.__version__} sees no GPU here. "
            f"Use cpu, or auto for a GPU where there is one.{why}"
        )
    fix_cublas_workspace()
    index = int(match.group(2)) if match.group(2) else torch.cuda.current_device()
    if index >= count:
        raise DeviceUnavailable(
            f"device: {name} was asked for, but this machine has {count} GPU(s): "
            f"{', '.join(f'cuda:{i}' for i in range(count))}."
        )
    return torch.device("cuda", index)


def memory_of(device: torch.device) -> torch.device:
    """Where tensors for ``device`` lie: there; on the CPU while a recording is closed."""
    return torch.device("cpu") if closing.active() else device
