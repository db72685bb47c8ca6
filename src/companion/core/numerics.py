"""What a GPU may do with float32: tensor cores that round it to TF32, and cuBLAS's workspace.

Nvidia's convolutions read float32 as TF32 by default, which keeps 10 of the 23 bits behind the
point. A recipe with ``precision: float32`` and every evaluation ask for float32 and mean it. On a
CPU nothing here changes any number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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

    Gate G2 asks for that. Also a decorator: ``@exact_evaluation()``.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    with exact_float32():
        try:
            cudnn.benchmark, cudnn.deterministic = False, True
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before
