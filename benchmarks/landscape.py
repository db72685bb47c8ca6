"""What a look at the landscape of a network that people have costs: seconds and peak memory.

    python benchmarks/landscape.py --json benchmarks/results/landscape.json

Two ResNet-18 of torchvision (11.7 million parameters, 1,000 classes) that were never trained, on 64
random images: a plane, slopes and curvatures at both ends of the line, and the five largest
eigenvalues of the Hessian with the error that Lanczos reached. Nobody else is timed here: the
question is whether it fits into two minutes and 3 GB on two cores. In float32. Seconds of the
processor, divided by the threads, say what an idle machine would have taken.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import machine, write
from torchvision.models import resnet18

from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.data import Split
from companion.landscape import Surface, plane_along, random_direction, top_eigenvalues, towards


def peak() -> float:
    """Peak memory of this process so far, in GB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def timed(name: str, what: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it returns; seconds, seconds of the processor by thread, and the peak so far."""
    wall, work = time.perf_counter(), time.process_time()
    found = what()
    cost = {
        "seconds": time.perf_counter() - wall,
        "busy": (time.process_time() - work) / torch.get_num_threads(),
        "peak_gb": peak(),
    }
    print(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in cost.items()), flush=True)
    return found, cost


def measure(images: int, size: int, points: int, count: int) -> dict[str, Any]:
    """All stages, by name."""
    made = []
    for number in range(2):
        with Key("benchmark", "landscape", number).seeded():
            made.append(resnet18())
    net, (a, b) = made[0], (snapshot(m) for m in made)
    draw = Key("benchmark", "images").generator()
    split = Split(
        torch.randn(images, 3, size, size, generator=draw),
        torch.randint(1000, (images,), generator=draw),
    )
    delta, steps = towards(net, a, b), [i / (points - 1) for i in range(points)]
    u = random_direction(net, a, Key("benchmark", "u"))
    surface = Surface(net, split, dtype=torch.float32)
    out: dict[str, Any] = {"start": {"peak_gb": peak()}}
    plane, out["plane"] = timed(
        "plane", lambda: plane_along(net, a, delta, u, {"train": split}, steps, steps)
    )
    ends, out["slopes and curvatures"] = timed(
        "slopes and curvatures", lambda: [surface.local(t, delta) for t in (a, b)]
    )
    spectrum, out["eigenvalues"] = timed(
        "eigenvalues", lambda: top_eigenvalues(surface, a, count, tolerance=1e-2, most=60, kept=16)
    )
    first = plane.values["train"]["loss"][0]
    return {
        "stages": out,
        "losses": [[first[0], first[-1]], [end.loss for end in ends]],
        "curvatures": [end.curvature for end in ends],
        "values": spectrum.values,
        "errors": spectrum.errors,
        "products": spectrum.products,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--points", type=int, default=9, help="of each side of the plane")
    parser.add_argument("--eigenvalues", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args.images, args.size, args.points, args.eigenvalues)
    values = zip(found["values"], found["errors"], strict=True)
    print("eigenvalues: " + ", ".join(f"{v:.4g} ± {e:.1g}" for v, e in values))
    print(f"products with the Hessian: {found['products']}")
    if args.json:
        asked = {k: v for k, v in vars(args).items() if k != "json"}
        write(args.json, {"asked": asked, **found, "machine": machine()})


if __name__ == "__main__":
    main()
