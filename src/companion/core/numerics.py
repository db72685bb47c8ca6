"""Devices by name, and what a GPU may do with float32: TF32, and cuBLAS's workspace.

Nvidia's convolutions read float32 as TF32 by default, which keeps 10 of the 23 bits behind the
point. A recipe with ``precision: float32`` and every evaluation ask for float32 and mean it. On a
CPU nothing here changes any number.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from companion.core import closing, slurm
from companion.core.errors import BadParameter, DeviceUnavailable


def fix_cublas_workspace() -> None:
    """Give cuBLAS a workspace of fixed size, without which its sums may differ from call to call.

    Torch reads the setting at the first matrix product of the process on a GPU, deterministic or
    not, and never again: whoever is about to use a GPU calls this first. A setting of the user's
    own stays.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def exact_float32(on: bool = True) -> Iterator[None]:
    """Inside, products and convolutions of float32 tensors are computed in float32, not in TF32.

    Arguments:
        on: False changes nothing, for a recipe in another precision.
    """
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    # Of torch's two interfaces to these switches the older one, throughout: mixed, they raise.
    before = cudnn.allow_tf32, cublas.allow_tf32
    try:
        if on:
            cudnn.allow_tf32 = cublas.allow_tf32 = False
        yield
    finally:
        cudnn.allow_tf32, cublas.allow_tf32 = before


@contextmanager
def exact_evaluation() -> Iterator[None]:
    """Inside, evaluating the same network on the same batches gives the same bits, in float32.

    The check of self and symmetry asks for that. Also a decorator: ``@exact_evaluation()``.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    with exact_float32():
        try:
            cudnn.benchmark, cudnn.deterministic = False, True
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device a name stands for, checked to exist on this machine.

    Before a GPU is handed out, cuBLAS gets its workspace: see :func:`fix_cublas_workspace`. While
    a recording is closed no GPU has to be here, and ``"auto"`` is where it was measured; nor where
    a cluster has them (:func:`companion.core.slurm.elsewhere`): there ``"auto"`` is a GPU.

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
        name = closing.device() or ("cuda" if slurm.elsewhere() else name)
    if name == "cpu":
        return torch.device("cpu")
    if closing.active() or slurm.elsewhere():
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
    """Where tensors for ``device`` lie: there; on the CPU if the device need not be here."""
    return torch.device("cpu") if closing.active() or slurm.elsewhere() else device
