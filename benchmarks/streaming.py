"""Align two networks too large to lie in memory twice: a pair of 124M-parameter GPT-2s, from files.

    python benchmarks/streaming.py --json benchmarks/results/streaming.json

A is a GPT-2 of transformers with random weights (its configuration as published, 0.5 GB in
float32), B is A with its units in a random order and noise of a hundredth of each tensor's spread.
Timed is the command ``companion rebasin A B -o OUT`` in a process of its own, imports and all: it
derives and proves the spec, matches, applies, checks the outputs and writes the file. What counts
is processor time and the peak of memory, which a busy machine does not change much, and the
wall-clock time beside them. The goal: 2.5 GB, and 40 s on two cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import machine, write
from safetensors.torch import save_file

from companion import models
from companion.core.seeds import Key
from companion.rebasin import derive

NOISE = 0.01
SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 999},
}


def plant(folder: Path, size: str) -> tuple[Path, Path, int]:
    """A's folder, B's file, and the number of parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    key = Key("benchmark", "streaming")
    with key.fold("weights").seeded():
        GPT2LMHeadModel(GPT2Config(**SIZES[size])).save_pretrained(folder / "a")
    module = models.build(f"hf:{folder / 'a'}", (8,), 2, key)
    spec = derive(module, torch.zeros(2, 8, dtype=torch.int64))
    perms = spec.random(key.fold("order").generator())
    out, draw = {}, key.fold("noise").generator()
    for name, value in module.state_dict().items():
        if name != "lm_head.weight":  # tied
            moved = spec.permute_tensor(value, name, perms)
            noise = torch.randn(moved.shape, generator=draw)
            out[name] = (moved + NOISE * moved.std() * noise).contiguous()
    state = dict(module.state_dict())
    state.pop("lm_head.weight")
    save_file(state, folder / "a" / "model.safetensors")  # the module that was derived from
    save_file(out, folder / "b.safetensors")
    return folder / "a", folder / "b.safetensors", sum(v.numel() for v in out.values())


def measure(a: Path, b: Path, threads: int) -> dict[str, float]:
    """Seconds and gigabytes of one run of the command."""
    words = ["rebasin", str(a), str(b), "-o", str(b.with_name("out.safetensors"))]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "companion", *words], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = {"cpu seconds": used, "wall seconds": time.perf_counter() - begun}
    return {n: round(v, 1) for n, v in seconds.items()} | {"peak GB": after.ru_maxrss / 1e6}


def main(arguments: list[str] | None = None) -> None:
    """Make the pair, align it, and write what that took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        a, b, parameters = plant(Path(folder), options.size)
        found = measure(a, b, options.threads)
    settings = {"size": options.size, "threads": options.threads, "parameters": parameters}
    print(settings, found)
    if options.json:
        about = {"benchmark": "streaming", "machine": machine(), "settings": settings}
        write(options.json, about | {"found": found})


if __name__ == "__main__":
    main()
