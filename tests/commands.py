"""The command line in the test's own process, and small networks on digits as files for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from companion import data
from companion.cli import app
from companion.core.theta import snapshot
from companion.training import Recipe, Run, State, advance, build

NET = "mlp:widths=16x2"
BATCHNORM = "mlp:norm=batch,widths=16x2"
Nets = dict[str, Path]


def run(*words: object, code: int = 0, **options: Any) -> Result:
    """Invoke the command line and check its exit code; the output on failure."""
    result = CliRunner().invoke(app, [str(w) for w in words], **options)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def said(*words: object, code: int = 0) -> str:
    """All that a command says."""
    return run(*words, code=code).output


@cache
def trained(net: str, order: int, init: int = 0, steps: int = 80) -> dict[str, Tensor]:
    """A small network on digits, trained without the store. Do not write into its tensors."""
    digits = data.load("digits")
    one = Run(Recipe(net=net, data="digits", steps=steps, batch=60), init=init, order=order)
    start = State(0, snapshot(build(one, digits, torch.device("cpu"))))
    return advance(one, start, steps, digits).theta


def files(folder: Path, thetas: Mapping[str, Mapping[str, Tensor]]) -> Nets:
    """Networks as files: name to path."""
    for name, theta in thetas.items():
        save_file(dict(theta), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in thetas}


def spoilt(theta: Mapping[str, Tensor], folder: Path) -> Path:
    """``folder``, with files that are not quite this network: nan, less, more, int8."""
    for name, changed in {
        "nan": {**theta, "head.bias": theta["head.bias"] * float("nan")},
        "less": {k: v for k, v in theta.items() if k != "head.bias"},
        "more": {**theta, "more": torch.zeros(1)},
        "int8": {k: v.to(torch.int8) for k, v in theta.items()},
    }.items():
        save_file(changed, folder / name)
    return folder


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal names, types and bits."""
    return a.keys() == b.keys() and all(
        v.dtype == b[k].dtype and torch.equal(v, b[k]) for k, v in a.items()
    )
