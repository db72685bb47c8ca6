"""What one image costs at one point of a line: the measurement that sizes a record's pairs.

    python benchmarks/pair_cost.py --json pairs.json

Random images of the real size; the time does not depend on what they show. Beside it what
re-estimating BatchNorm's statistics costs an image. On a CPU it runs a tiny version that shows only
that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from harness import write

from companion import models
from companion.connectivity import Walker
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.data import Split, resolve_device

# By the names of the engine's benchmark: the network, a small one in its place, and an image.
NETS = {
    "resnet20": ("resnet20", "resnet8:width=4", (3, 32, 32)),
    "lenet": ("lenet-300-100", "mlp:widths=16", (1, 28, 28)),
    "vgg16": ("vgg16", "vgg11:width=4", (3, 32, 32)),
}


def cost(
    spec: str, shape: tuple[int, ...], images: int, device: torch.device, seconds: float
) -> dict[str, float]:
    """Seconds an image, evaluated once and re-estimated from; medians over the turns."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(images, *shape, generator=draw)
    split = Split(x.to(device), torch.randint(10, (images,), generator=draw).to(device))
    module = models.build(spec, shape, 10, Key("pair cost")).to(device)
    theta = snapshot(module)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def point(walker: Walker) -> float:
        walker.at(theta)  # libraries choose their kernels
        took: list[float] = []
        until = time.perf_counter() + seconds
        while len(took) < 3 or time.perf_counter() < until:
            start = wait()
            walker.at(theta)
            took.append(wait() - start)
        return statistics.median(took)

    once = point(Walker(module, {"train": split}))
    again = Walker(module, {"train": split}, bn="reestimate", bn_examples=None)
    more = max(point(again) - once, 0.0) if again.bn == "reestimate" else 0.0
    return {"image_s": once / images, "reestimated_image_s": more / images}


def main(arguments: list[str] | None = None) -> None:
    """Measure each network and write after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring, per mode")
    parser.add_argument("--json", type=Path, help="write the result here, after every network")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    tiny = device.type == "cpu"
    if tiny:
        torch.set_num_threads(1)
    result: dict[str, dict[str, float]] = {}
    for name in options.nets:
        large, small, shape = NETS[name]
        spec, images = (small, 200) if tiny else (large, 10_000)
        result[name] = found = cost(spec, shape, images, device, options.seconds)
        print(
            f"{name}: " + ", ".join(f"{k} {1e6 * v:.3g} µs" for k, v in found.items()), flush=True
        )
        if options.json:
            write(options.json, {"benchmark": "pairs", "pairs": result})


if __name__ == "__main__":
    main()
