"""Features of A, B and the networks between them: streamed, against storing them all.

    python benchmarks/features.py --json benchmarks/results/features.json

Two questions. How long does ``companion.features.features`` take beside code that keeps every
feature and computes cosines and coefficients afterwards, in float64? Opponents: all five networks
stored once; and A, B and one network between stored again for every alpha, as the code released
with Zhou et al. 2023 does. A third one stores once and computes in float32, as a lower bound of
what storing costs. All have the same number of threads, the same batches and the same first-in-line
rotation; the numbers are compared.

And how much memory does VGG-16 take at all test images? A process of its own runs the pass and says
its peak; what storing would take is computed from the sizes of the layers, not run: those that the
released code looks at (outputs of convolutions, ReLUs and linear layers), of three networks.

MNIST and CIFAR-10 are read from COMPANION_DATA; what is not there is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Contender, Patience, alternate, machine, ratio, write
from torch import nn

from companion import data as datasets
from companion import models
from companion.core.errors import MissingData
from companion.core.seeds import Key
from companion.core.theta import affine, layout, snapshot
from companion.data import Split
from companion.features import Features, features, sites

ALPHAS = (0.25, 0.5, 0.75)
BATCH = 500
NET = "mlp:widths=512x3"
LARGE = "vgg16:head=4096x2"

State = dict[str, torch.Tensor]
Numbers = list[float]  # baseline, then gap, c and twin of each alpha, layer by layer: means


def ends(net: str, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, State, State]:
    """The architecture, and two networks of it."""
    a, b = (snapshot(models.build(net, shape, classes, Key("init", i))) for i in (0, 1))
    # Neighbours, as two trained networks of one init are.
    b = {n: torch.lerp(a[n], v, 0.2) if v.is_floating_point() else v for n, v in b.items()}
    return models.build(net, shape, classes), a, b


@torch.no_grad()
def store(module: nn.Module, theta: State, x: torch.Tensor, dtype: torch.dtype) -> State:
    """Every layer's features of all images, (images, numbers)."""
    module.load_state_dict(theta)
    module.eval()
    kept: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(m: nn.Module, args: Any, out: torch.Tensor) -> None:
            kept.setdefault(name, []).append(out.flatten(1))

        return hook

    hooks = [
        m.register_forward_hook(keep(n))
        for n, m in module.named_modules()
        if isinstance(m, nn.Linear | nn.ReLU)
    ]
    for part in x.split(BATCH):
        module(part)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).to(dtype) for name, parts in kept.items()}


def means(fa: torch.Tensor, fb: torch.Tensor, f: torch.Tensor, alpha: float) -> Numbers:
    """Gap, c and twin of one layer."""
    mixed = (1 - alpha) * fa + alpha * fb
    gap = 1 - torch.cosine_similarity(f, mixed)
    inner = (f * mixed).sum(1)
    c, twin = inner / (f * f).sum(1), inner / (mixed * mixed).sum(1)
    return [float(v.mean()) for v in (gap, c, twin)]


def stored(
    module: nn.Module, a: State, b: State, x: torch.Tensor, again: bool, dtype: torch.dtype
) -> Numbers:
    """Store, then compute: every network once, or ``again`` A and B for every alpha."""
    floating = layout(module).floating
    out: dict[str, Numbers] = {}
    fa, fb = (store(module, t, x, dtype) for t in (a, b))
    kept = {}
    for alpha in ALPHAS if not again else ():
        mixed = {**a, **affine((a, b), (1 - alpha, alpha), floating)}
        kept[alpha] = store(module, mixed, x, dtype)
    for name in fa:
        out[name] = [float((1 - torch.cosine_similarity(fa[name], fb[name])).mean())]
    for number, alpha in enumerate(ALPHAS):
        if again:
            if number:
                fa, fb = (store(module, t, x, dtype) for t in (a, b))
            mixed = {**a, **affine((a, b), (1 - alpha, alpha), floating)}
            kept = {alpha: store(module, mixed, x, dtype)}
        for name in fa:
            out[name] += means(fa[name], fb[name], kept[alpha][name], alpha)
    return [v for values in out.values() for v in values]


def numbers(found: Features) -> Numbers:
    """Those of the opponents."""
    out = []
    for layer in found.layers:
        out.append(layer.baseline.mean)
        for alpha in ALPHAS:
            out += [s[alpha].mean for s in (layer.gap, layer.c, layer.twin)]
    return out


def compare(name: str, repeats: int, part: int | None, patience: Patience) -> dict[str, Any]:
    """Time the pass on one dataset."""
    data = datasets.load(name)
    test = data.test.head(part or len(data.test))
    module, a, b = ends(NET, data.in_shape, data.classes)
    found: dict[str, Numbers] = {}

    def ours() -> int:
        found["ours"] = numbers(features(module, a, b, test, alphas=ALPHAS, batch=BATCH))
        return len(test)

    def other(key: str, again: bool, dtype: torch.dtype) -> int:
        found[key] = stored(module, a, b, test.x, again, dtype)
        return len(test)

    mine = Contender("companion", "companion.features.features, errors and losses too", ours)
    others = [
        Contender(
            "stored",
            "features of five networks stored in float64, then compared",
            lambda: other("stored", False, torch.float64),
        ),
        Contender(
            "stored for each alpha",
            "features of A, B and one network between stored in float64 for every alpha",
            lambda: other("again", True, torch.float64),
        ),
        Contender(
            "stored, float32",
            "features of five networks stored, compared in float32",
            lambda: other("float32", False, torch.float32),
        ),
    ]
    contenders = [mine, *others]
    if repeats > 1:
        mine.work()  # a first turn that is thrown away
    alternate(contenders, repeats, patience)
    gaps = {
        key: max(abs(x - y) / max(1.0, abs(y)) for x, y in zip(found["ours"], values, strict=True))
        for key, values in found.items()
        if key != "ours"
    }
    print(f"{NET} on {data.label}: largest difference of any number {gaps['stored']:.1e}")
    for c in others:
        print(f"  {ratio(mine, c)['median']:.2f}x the {c.name}")
    return {
        "data": data.label,
        "net": models.canonical(NET),
        "images": len(test),
        "layers": len(found["ours"]) // (1 + 3 * len(ALPHAS)),
        "largest_difference": max(gaps["stored"], gaps["again"]),
        "largest_difference_float32": gaps["float32"],
        "contenders": [c.to_json() for c in contenders],
        "ratios": {c.name: ratio(mine, c) for c in others},
    }


def highest() -> int:
    """The most memory this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the parent's into what getrusage says
        lines = status.read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak(images: Path, net: str) -> dict[str, Any]:
    """The pass in this process, and its peak of memory, everything included."""
    held = torch.load(images, weights_only=True)
    test = Split(held["x"], held["y"])
    module, a, b = ends(net, tuple(test.x.shape[1:]), held["classes"])
    start = time.perf_counter()
    found = features(module, a, b, test, alphas=ALPHAS)
    took = time.perf_counter() - start
    most = highest()
    released = sites(module, test.x[:2], kinds=("conv", "linear", "activation"))
    each = sum(math.prod(s.shape) for s in released if not s.same)
    return {
        "net": models.canonical(net),
        "images": len(test),
        "networks": 2 + len(ALPHAS),
        "layers": len(found.layers),
        "seconds": round(took, 1),
        "peak_bytes": most,
        "numbers_per_image": each,
        "stored_bytes": 3 * 4 * each * len(test),
    }


def child(name: str, net: str, part: int | None, threads: int) -> dict[str, Any]:
    """:func:`peak` in a process of its own, which holds the test images and no others."""
    data = datasets.load(name)
    test = data.test.head(part or len(data.test))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.pt"
        # Clones: a view would be stored with the whole split.
        held = {"x": test.x.clone(), "y": test.y.clone(), "classes": data.classes}
        torch.save(held, path)
        words = ["--peak", str(path), "--large", net, "--threads", str(threads)]
        done = subprocess.run(
            [sys.executable, __file__, *words], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = {"data": data.label, **json.loads(done.stdout)}
    print(
        f"{net} on {found['data']}, {found['images']:,} images: peak "
        f"{found['peak_bytes'] / 1e9:.2f} GB in {found['seconds']:.0f} s; "
        f"stored, {found['stored_bytes'] / 1e9:.1f} GB"
    )
    return found


def available(names: Sequence[str]) -> list[str]:
    """Those that are under the data root; says which are not."""
    out = []
    for name in names:
        try:
            datasets.load(name)
            out.append(name)
        except MissingData as e:
            print(f"left out: {e}")
    return out


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", nargs="*", default=["mnist"], help="for the time")
    parser.add_argument("--memory", nargs="*", default=["cifar10"], help="data for the memory")
    parser.add_argument("--large", default=LARGE, help="the network for the memory")
    parser.add_argument("--threads", type=int, help="of every contender; 1 on a busy machine")
    parser.add_argument("--images", type=int, help="time this many test images")
    parser.add_argument("--memory-images", type=int, help="the memory with this many test images")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for quiet")
    parser.add_argument("--keep", type=Path, help="take the memory from this earlier result")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(peak(options.peak, options.large)))
        return
    threads = torch.get_num_threads()
    before, patience = machine(), Patience(options.patience)
    cases = [
        compare(name, options.repeats, options.images, patience) for name in available(options.data)
    ]
    if options.keep:
        memory = json.loads(options.keep.read_text(encoding="utf-8"))["memory"]
    else:
        memory = [
            child(name, options.large, options.memory_images, threads)
            for name in available(options.memory)
        ]
    result = {
        "benchmark": "features",
        "unit": "images",
        "settings": {
            "repeats": options.repeats,
            "batch": BATCH,
            "alphas": list(ALPHAS),
            "threads": threads,
            "patience_s": options.patience,
        },
        "cases": cases,
        "memory": memory,
        "machine": before,
    }
    if options.json:
        write(options.json, result)


if __name__ == "__main__":
    main()
