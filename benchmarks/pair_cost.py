"""What one image costs at one point of a line: the measurement that sizes a record's pairs.

    python benchmarks/pair_cost.py --json pairs.json

The networks and the random images are those of ``engine.py``. Beside it what re-estimating
BatchNorm's statistics costs an image, which is most of a pair of such networks.
On a CPU it runs a tiny version that shows only that it runs.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from engine import Case, cases, images, wait
from harness import write

from companion.connectivity import Walker, has_batchnorm
from companion.theta import snapshot
from companion.training import Run, build


def cost(case: Case, device: torch.device, seconds: float) -> dict[str, float]:
    """Seconds an image, evaluated once and re-estimated from; medians over the turns."""
    data = images(replace(case, images=min(case.images, 10_000)), device)
    module = build(Run(case.recipe), data, device)
    theta = snapshot(module)

    def point(bn: str) -> float:
        walker = Walker(module, {"train": data.train}, bn=bn, bn_data=data.train)
        walker.at(theta)
        took: list[float] = []
        until = time.perf_counter() + seconds
        while len(took) < 3 or time.perf_counter() < until:
            wait(device)
            start = time.perf_counter()
            walker.at(theta)
            wait(device)
            took.append(time.perf_counter() - start)
        return sorted(took)[len(took) // 2]

    once = point("interpolate")
    found = {"image_s": once / len(data.train), "reestimated_image_s": 0.0}
    if has_batchnorm(module):
        more = max(point("reestimate") - once, 0.0)
        found["reestimated_image_s"] = more / len(data.train)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure each network and write after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--nets", nargs="+", default=["resnet20", "lenet", "vgg16"])
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring, per mode")
    parser.add_argument("--json", type=Path, help="write the result here, after every network")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    tiny = device.type == "cpu"
    if tiny:
        torch.set_num_threads(1)
    known = {case.name: case for case in cases(tiny)}
    result: dict[str, dict[str, float]] = {}
    for net in options.nets:
        result[net] = found = cost(known[net], device, options.seconds)
        print(f"{net}: " + ", ".join(f"{k} {1e6 * v:.3g} µs" for k, v in found.items()), flush=True)
        if options.json:
            write(options.json, {"benchmark": "pairs", "pairs": result})


if __name__ == "__main__":
    main()
