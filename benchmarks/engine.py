"""Training steps a second of many replicas on one device, by engine: the measurement that chooses.

    python benchmarks/engine.py --json benchmarks/results/engine-h200.json   # on a GPU, < 9 minutes

Every engine of :mod:`companion.training.replicas` trains M = 1, 3, 9, 27 replicas of the three
networks of Frankle et al. 2020, on random images of the real size (the time does not depend on what
they show). Beside each number stands the floor: the operations over the rate of the tensor cores,
and the fewest bytes over the memory's rate. First of all it checks that what is timed is right:
a replayed graph equals the same step called, and training twice gives the same bits.
On a CPU it runs a tiny version that shows only that it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import machine, write
from torch import nn

from companion.data import Dataset, Split
from companion.theta import snapshot
from companion.training import Recipe, Run, State, advance, advance_many, build
from companion.training.feed import Feed
from companion.training.replicas import most_replicas, replica_bytes, reproducible
from companion.training.stepper import Stepper

BF16_FLOPS, FLOAT32_FLOPS = 800e12, 67e12
"""Operations a second of an H200: a large bf16 product, measured 769-798 TFLOP/s; float32 without
tensor cores, by the datasheet."""
BYTES = 4.3e12
"""Bytes a second of a device-to-device copy, read plus written, measured on an H200."""


@dataclass(frozen=True)
class Case:
    """A network to train: its recipe, the shape and number of its images, and the target."""

    name: str
    recipe: Recipe
    shape: tuple[int, int, int]
    images: int
    target_s: float


def cases(tiny: bool) -> list[Case]:
    """The three networks; ``tiny``: the same code paths in seconds on a CPU."""
    conv: dict[str, Any] = {
        "data": "random",
        "batch": 128,
        "lr": 0.01,
        "weight_decay": 1e-4,
        "augment": "flip+crop4",
        "precision": "bf16",
    }
    cifar = (3, 32, 32)
    lenet = Recipe(
        net="lenet-300-100", data="random", steps=24_000, batch=60, optimizer="adam", lr=1.2e-3
    )
    found = [
        Case("resnet20", Recipe(net="resnet20", steps=63_000, **conv), cifar, 50_000, 30.0),
        Case("lenet", lenet, (1, 28, 28), 60_000, 2.0),
        Case("vgg16", Recipe(net="vgg16", steps=63_000, **conv), cifar, 50_000, 120.0),
    ]
    if not tiny:
        return found
    small = {"resnet20": "resnet8:width=4", "lenet": "mlp:widths=16", "vgg16": "vgg11:width=4"}
    return [
        replace(
            case,
            recipe=replace(
                case.recipe, net=small[case.name], batch=8, augment="none", precision="float32"
            ),
            shape=(case.shape[0], 8, 8),
            images=64,
        )
        for case in found
    ]


def images(case: Case, device: torch.device) -> Dataset:
    """Random images and labels: never zeros, on which a GPU runs faster."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(case.images, *case.shape, generator=draw)
    y = torch.randint(10, (case.images,), generator=draw)
    channels = case.shape[0]
    split, few = Split(x, y), Split(x[:16].clone(), y[:16].clone())
    stat = ((0.5,) * channels, (0.25,) * channels)
    return Dataset("random", "random images", split, few, 10, case.shape, *stat, "none").to(device)


# ---- the floor


def floor(case: Case, data: Dataset) -> dict[str, float]:
    """Operations and bytes of one step of one replica, and the seconds they must take.

    Operations: 2 a multiply-add, forward once and backward twice (gradients of the input and of the
    weights), of convolutions and linear maps. Bytes: weights and optimiser tensors (4 bytes) read
    and written once; the output of each convolution and linear map written, read by the next layer
    and by the backward pass, and its gradient written and read: five times, in the training
    precision. All that stands between (norms, ReLU, sums) is taken to be fused away.
    """
    recipe, cpu = case.recipe, torch.device("cpu")
    module = build(Run(recipe), data, cpu).eval()
    multiply_adds = outputs = 0

    def count(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal multiply_adds, outputs
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        multiply_adds += out[0].numel() * weight[0].numel()
        outputs += out[0].numel()

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module(data.train.x[:1].cpu())
    half = recipe.precision == "bf16"
    weights = sum(p.numel() for p in module.parameters())
    slots = 2 if recipe.optimizer != "sgd" else 1
    flop = 6.0 * multiply_adds * recipe.batch
    moved = 8.0 * weights * (1 + slots) + 5.0 * outputs * recipe.batch * (2 if half else 4)
    arithmetic, memory = flop / (BF16_FLOPS if half else FLOAT32_FLOPS), moved / BYTES
    return {
        "multiply_adds_per_image": multiply_adds,
        "weights": weights,
        "flop_per_step": flop,
        "bytes_per_step": moved,
        "seconds_per_step_operations": arithmetic,
        "seconds_per_step_bytes": memory,
        "seconds_per_run": max(arithmetic, memory) * recipe.steps,
    }


# ---- measuring


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def replicas(case: Case, data: Dataset, count: int) -> tuple[list[Run], list[State]]:
    """Runs that differ in everything, at their start."""
    runs = [Run(case.recipe, init=i, order=i, augment=i) for i in range(count)]
    cpu = torch.device("cpu")
    return runs, [State(0, snapshot(build(run, data, cpu))) for run in runs]


def stepping(
    case: Case, data: Dataset, engine: str, count: int, seconds: float, deterministic: bool
) -> dict[str, Any]:
    """Steps a second of ``count`` replicas together, without what happens once an epoch."""
    device = data.train.x.device
    runs, states = replicas(case, data, count)
    per_epoch = len(data.train) // case.recipe.batch
    with reproducible(device, deterministic), Feed(runs, data) as feed:
        begun = time.perf_counter()
        stepper = Stepper(
            *(build(runs[0], data, device), case.recipe, data, states, case.recipe.steps),
            engine=engine,
            window=200,
        )
        stepper.feed(feed.epoch(0, ahead=False), 0)
        stepper.step()  # captures
        wait(device)
        ready = time.perf_counter() - begun
        position, rates, taken = 1, [], 0
        chunk = 5 if device.type == "cuda" else 1
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(rates) < 3:
            start = time.perf_counter()
            for _ in range(chunk):
                if position == per_epoch:
                    position = 0
                    stepper._position.zero_()
                if taken % 200 == 199:
                    stepper.losses()
                stepper.step()
                position, taken = position + 1, taken + 1
            wait(device)
            took = time.perf_counter() - start
            rates.append(chunk / took)
            # Turns of about a quarter of a second: the wait at the end must not count.
            chunk = max(1, min(int(rates[-1] * seconds / 8), 20_000))
            if taken + chunk + 10 > case.recipe.steps:
                break
        finite = bool(torch.isfinite(stepper.stack.theta).all())
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    half = sorted(rates[1:])[len(rates[1:]) // 2]
    return {
        "steps_per_second_each": half,
        "turns": [round(r, 2) for r in rates[1:]],
        "ready_s": round(ready, 2),
        "gigabytes": round(used / 1e9, 2),
        "finite": finite,
    }


def looping(case: Case, data: Dataset, seconds: float, deterministic: bool) -> dict[str, Any]:
    """Steps a second of one run of the plain loop."""
    device = data.train.x.device
    (run,), (state,) = replicas(case, data, 1)
    steps, rate = 3, 0.0
    with reproducible(device, deterministic):
        until = time.perf_counter() + seconds
        while not rate or time.perf_counter() < until:
            start = time.perf_counter()
            state = advance(run, state, state.step + steps, data)
            wait(device)
            rate = steps / (time.perf_counter() - start)
            steps = max(3, int(rate * seconds / 3))
            if state.step + steps > case.recipe.steps:
                break
    return {"steps_per_second_each": rate, "turns": [round(rate, 2)], "ready_s": 0.0}


def measured(case: Case, data: Dataset, engine: str, count: int, **how: Any) -> dict[str, Any]:
    """One row: rates, amortised seconds a copy of the whole recipe, times of the floor."""
    device = data.train.x.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    row: dict[str, Any] = {"net": case.name, "engine": engine, "replicas": count}
    row["deterministic"] = how["deterministic"]
    if engine == "vmap" and case.recipe.precision == "bf16":
        # Convolutions stacked are grouped convolutions; autocast does not reach them.
        case = replace(case, recipe=replace(case.recipe, precision="float32"))
    row["precision"] = case.recipe.precision
    try:
        found = looping(case, data, **how) if engine == "loop" else None
        row |= found or stepping(case, data, engine, count, **how)
    except Exception as e:  # an engine that fails is a result; the others are still measured
        traceback.print_exc()
        return row | {"error": f"{type(e).__name__}: {str(e)[:300]}"}
    all_of_them = row["steps_per_second_each"] * (1 if engine == "loop" else count)
    row["seconds_per_copy"] = case.recipe.steps / all_of_them
    row["times_the_floor"] = row["seconds_per_copy"] / floor(case, data)["seconds_per_run"]
    return row


def correct(case: Case, data: Dataset, engine: str) -> dict[str, Any]:
    """Largest differences of weights: a replay against the step called, and training twice."""
    runs, states = replicas(case, data, 3)

    def trained(capture: bool | None, width: int = 0) -> list[State]:
        options: dict[str, Any] = {"engine": engine, "capture": capture, "width": width}
        return advance_many(runs, states, 12, data, **options)

    def gap(a: list[State], b: list[State]) -> float:
        pairs = [(s.theta[k], t.theta[k]) for s, t in zip(a, b, strict=True) for k in s.theta]
        return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)

    try:
        first = trained(None)
        return {
            "replay_minus_eager": gap(first, trained(False)),
            "twice": gap(first, trained(None)),
            "other_number_of_replicas": gap(first, trained(None, width=4)),
        }
    except Exception as e:
        traceback.print_exc()
        return {"error": f"{type(e).__name__}: {str(e)[:300]}"}


def whole(case: Case, data: Dataset, best: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The chosen engine as the run store uses it: start, capture, epochs, looks, states at the end.

    ``seconds_per_copy`` here scales all of that to the recipe's steps; starting is paid once.
    """
    count, total = best["replicas"], case.recipe.steps
    runs, states = replicas(case, data, count)
    each = total / best["seconds_per_copy"] / (1 if best["engine"] == "loop" else count)
    steps = max(4, min(total, int(each * seconds)))
    begun = time.perf_counter()
    advance_many(runs, states, steps, data, engine=best["engine"])
    took = time.perf_counter() - begun
    scaled = took * total / steps / count
    return {"engine": best["engine"], "replicas": count, "steps": steps, "seconds": took} | {
        "seconds_per_copy_start_included": scaled
    }


def in_processes(case: Case, count: int, seconds: float) -> dict[str, Any]:
    """``count`` processes with one captured replica each: how well the GPU is shared."""
    command = [sys.executable, __file__, "--child", case.name, "--seconds", str(seconds)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    rates = []
    for child in children:
        try:
            out, _ = child.communicate(timeout=seconds + 60)
        except subprocess.TimeoutExpired:
            child.kill()
            out = ""
        lines = out.strip().splitlines()
        rates.append(json.loads(lines[-1]).get("steps_per_second_each", 0.0) if lines else 0.0)
    row = {"net": case.name, "engine": "processes", "replicas": count, "rates": rates}
    if not all(rates):
        return row | {"error": "a process failed or was too slow to start"}
    return row | {"seconds_per_copy": case.recipe.steps / sum(rates)}


def plan(case: Case, copies: list[int]) -> list[tuple[str, int]]:
    """What to measure of a network, the likely winners first: the time limit cuts the end."""
    big = sorted(copies, reverse=True)
    if case.name == "lenet":
        first = [("vmap", m) for m in big]
        rest = [(e, m) for e in ("graphs", "compile") for m in big]
        return [*first, ("loop", 1), *rest]
    graphs = [(e, m) for m in big for e in ("graphs", "compile")]
    return [*graphs, ("loop", 1), *[("vmap", m) for m in big[-2:-1]]]


def show(row: dict[str, Any]) -> None:
    """One line."""
    head = f"{row['net']:9} {row['engine']:9} M={row['replicas']:<3}"
    if "error" in row:
        print(f"{head} ERROR {row['error']}", flush=True)
        return
    rate = row.get("steps_per_second_each", 0.0)
    print(
        f"{head} {rate:9.1f} steps/s each  {row['seconds_per_copy']:9.2f} s a copy  "
        f"{row.get('times_the_floor', 0.0):7.1f} x floor  {row.get('gigabytes', 0):6.1f} GB  "
        f"ready {row.get('ready_s', 0):5.1f} s",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, choose, and write after every step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 3, 9, 27], metavar="M")
    parser.add_argument("--nets", nargs="+", default=["resnet20", "lenet", "vgg16"])
    parser.add_argument("--engines", nargs="+", default=["loop", "vmap", "graphs", "compile"])
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, per row")
    parser.add_argument("--time-limit", type=float, default=480.0, help="start no row after this")
    parser.add_argument("--processes", type=int, default=3, help="0: leave processes out")
    parser.add_argument("--json", type=Path, help="write the result here, after every row")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    tiny = device.type == "cpu"
    if tiny:
        torch.set_num_threads(1)
    chosen = [
        c for c in cases(tiny) if c.name in ([options.child] if options.child else options.nets)
    ]
    if options.child:
        (case,) = chosen
        data = images(case, device)
        print(
            json.dumps(
                measured(case, data, "graphs", 1, seconds=options.seconds, deterministic=True)
            )
        )
        return

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (tiny networks)"
    result: dict[str, Any] = {
        "benchmark": "engine",
        "device": gpu,
        "ceilings": {"bf16": BF16_FLOPS, "float32": FLOAT32_FLOPS, "bytes": BYTES},
        "floor": {},
        "checks": {},
        "rows": [],
        "left_out": [],
        "choice": {},
        "whole": {},
        "machine": machine(),
    }

    def left() -> float:
        return options.time_limit - (time.monotonic() - begun)

    def keep(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        show(row)
        save()

    def save() -> None:
        fair = [r for r in result["rows"] if "error" not in r and r.get("finite", True)]
        for case in chosen:
            ours = [r for r in fair if r["net"] == case.name and r["engine"] != "processes"]
            ours = [r for r in ours if r["deterministic"]]
            if ours:
                best = min(ours, key=lambda r: r["seconds_per_copy"])
                result["choice"][case.name] = {
                    k: best[k] for k in ("engine", "replicas", "seconds_per_copy")
                } | {"target_s": case.target_s}
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    how: dict[str, Any] = {"seconds": options.seconds, "deterministic": True}
    print(f"{gpu}, torch {torch.__version__}", flush=True)
    held: dict[str, Dataset] = {}
    for case in chosen:
        held[case.name] = data = images(case, device)
        result["floor"][case.name] = bound = floor(case, data)
        memory = replica_bytes(
            build(Run(case.recipe), data, torch.device("cpu")), case.recipe, data
        )
        print(
            f"{case.name}: floor {bound['seconds_per_run']:.2f} s a copy (target {case.target_s:g} "
            f"s); {bound['flop_per_step'] / 1e9:.2f} GFLOP and {bound['bytes_per_step'] / 1e6:.1f} "
            f"MB a step; at most {most_replicas(case.recipe, data, device)} replicas of "
            f"{memory / 1e9:.2f} GB",
            flush=True,
        )
        for engine in ("vmap",) if case.name == "lenet" else ("graphs", "compile"):
            if engine in options.engines and left() > 0:
                result["checks"][f"{case.name}, {engine}"] = found = correct(case, data, engine)
                print(f"  check {engine}: {found}", flush=True)
    # Round and round, so that the limit cuts every network's end and not the last network.
    plans = {
        c.name: [p for p in plan(c, options.copies) if p[0] in options.engines] for c in chosen
    }
    for turn in range(max(len(p) for p in plans.values())):
        for case in chosen:
            if turn >= len(plans[case.name]):
                continue
            engine, count = plans[case.name][turn]
            if left() <= 0:
                result["left_out"].append([case.name, engine, count])
                continue
            keep(measured(case, held[case.name], engine, count, **how))
    for case in chosen:
        best = result["choice"].get(case.name)
        if best and left() > 20:
            result["whole"][case.name] = whole(case, held[case.name], best, 4 * options.seconds)
            print(f"whole {case.name}: {result['whole'][case.name]}", flush=True)
    for case in chosen:
        best = result["choice"].get(case.name)
        # torch.compile compiles again for it.
        enough = 100 if best and best["engine"] == "compile" else 0
        if best and left() > enough and best["engine"] != "loop":
            free = how | {"deterministic": False}  # what the promise of equal bits costs
            keep(measured(case, held[case.name], best["engine"], best["replicas"], **free))
    if options.processes and device.type == "cuda" and left() > 60 and "resnet20" in held:
        keep(in_processes(chosen[0], options.processes, 3 * options.seconds))
    save()
    if options.json:
        write(options.json, result)
    for name, best in result["choice"].items():
        met = "met" if best["seconds_per_copy"] <= best["target_s"] else "MISSED"
        print(
            f"choice {name}: {best['engine']}, M={best['replicas']}: {best['seconds_per_copy']:.2f}"
            f" s a copy, target {best['target_s']:g} s {met}",
            flush=True,
        )
    if result["left_out"]:
        print(f"left out for lack of time: {result['left_out']}", flush=True)


if __name__ == "__main__":
    main()
