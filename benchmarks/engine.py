"""Training steps a second of many replicas on one device, by engine: the measurement that chooses.

    python benchmarks/engine.py --json benchmarks/results/engine-h200.json   # on a GPU, < 9 minutes

Every engine of :mod:`companion.training.replicas` trains M = 1, 3, 9, 27 replicas of the three
networks of Frankle et al. 2020, on random images of the real size (the time does not depend on what
they show), and one or nine GPTs of 12 layers on random tokens. Beside each number stands the floor:
the operations over the rate of the tensor cores, and the fewest bytes over the memory's rate, both
measured on this device at the start. Then it checks that what is timed is right: a replayed graph
equals the same step called, and training twice gives the same bits.
On a CPU it runs a tiny version that shows only that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import machine, write
from torch import nn

from companion.core.numerics import exact_float32
from companion.core.theta import snapshot
from companion.data import Dataset, Split, resolve_device
from companion.training import Recipe, Run, State, advance, advance_many, build
from companion.training.feed import Feed
from companion.training.replicas import most_replicas, replica_bytes, reproducible
from companion.training.stepper import Stepper

LOOPS = ("loop", "loop-compile")
"""Engines that train one run after the other."""


@dataclass(frozen=True)
class Case:
    """A network to train: its recipe, the shape and number of its examples, and the target.

    Arguments:
        shape: (C, H, W) of an image, or (L,) of a window of tokens. classes: or vocabulary.
        target_s: seconds of a copy that were aimed at; None: none were.
    """

    name: str
    recipe: Recipe
    shape: tuple[int, ...]
    examples: int
    target_s: float | None
    classes: int = 10


def cases(tiny: bool) -> list[Case]:
    """The three networks and the GPT; ``tiny``: the same code paths in seconds on a CPU."""
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
    # Chapter 5's on a GPU, but for the dropout, with which only a loop trains.
    gpt = Recipe(
        net="gpt:layers=12,width=768,heads=12,bias=false,dropout=0.0",
        data="random",
        steps=1_500,
        batch=50,
        optimizer="adamw",
        betas=(0.9, 0.95),
        lr=0.002,
        weight_decay=1e-3,
        weight_decay_on="matrices",
        augment="shift",
        precision="bf16",
    )
    found = [
        Case("resnet20", Recipe(net="resnet20", steps=63_000, **conv), cifar, 50_000, 30.0),
        Case("lenet", lenet, (1, 28, 28), 60_000, 2.0),
        Case("vgg16", Recipe(net="vgg16", steps=63_000, **conv), cifar, 50_000, 120.0),
        Case("gpt", gpt, (256,), 4_000, None, 8_192),
    ]
    if not tiny:
        return found
    small = {
        "resnet20": "resnet8:width=4",
        "lenet": "mlp:widths=16",
        "vgg16": "vgg11:width=4",
        "gpt": "gpt:layers=1,width=16,heads=2,bias=false,dropout=0.0",
    }
    return [
        replace(
            case,
            recipe=replace(
                case.recipe,
                net=small[case.name],
                batch=8,
                augment="shift" if case.name == "gpt" else "none",
                precision="float32",
            ),
            shape=(8,) if case.name == "gpt" else (case.shape[0], 8, 8),
            examples=64,
            classes=min(case.classes, 64),
        )
        for case in found
    ]


def random_data(case: Case, device: torch.device) -> Dataset:
    """Random images and labels, or tokens: never zeros, on which a GPU runs faster."""
    draw = torch.Generator().manual_seed(0)
    if len(case.shape) == 1:
        (window,) = case.shape
        stream = torch.randint(case.classes, (case.examples * window + 1,), generator=draw)
        text = Split.windows(stream, window)
        labels = ("random", "random tokens", text, Split(text.x[:16].clone(), text.y[:16].clone()))
        return Dataset(*labels, case.classes, case.shape, (), (), "none").to(device)
    x = torch.randn(case.examples, *case.shape, generator=draw)
    y = torch.randint(case.classes, (case.examples,), generator=draw)
    channels = case.shape[0]
    split, few = Split(x, y), Split(x[:16].clone(), y[:16].clone())
    stat = ((0.5,) * channels, (0.25,) * channels)
    labels = ("random", "random images", split, few)
    return Dataset(*labels, case.classes, case.shape, *stat, "none").to(device)


# ---- the floor


def per_second(work: Callable[[], object], amount: float, device: torch.device) -> float:
    """``amount`` over the seconds of one call of ``work``: the median of turns."""
    calls, seconds = (8, 0.25) if device.type == "cuda" else (1, 0.02)
    work()  # libraries choose their kernels
    wait(device)
    rates: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(rates) < 5:
        start = time.perf_counter()
        for _ in range(calls):  # several, as the wait at the end must not count
            work()
        wait(device)
        rates.append(calls * amount / (time.perf_counter() - start))
    return statistics.median(rates)


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device does a second, measured: the numbers that the floor divides by.

    Returns:
        ``bf16``, ``float32``: operations of a large matrix product, 2 a multiply-add, of float32
        without TF32; ``bytes``: read and written by a copy from the device to itself.
    """
    size, length = (8192, 1 << 28) if device.type == "cuda" else (256, 1 << 20)
    draw = torch.Generator(device).manual_seed(0)
    found = {}
    with exact_float32():
        for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
            a, b = (torch.randn(size, size, generator=draw, device=device) for _ in "ab")
            a, b = a.to(dtype), b.to(dtype)
            out = torch.empty_like(a)
            product = partial(torch.mm, a, b, out=out)
            found[name] = per_second(product, 2.0 * size**3, device)
    source = torch.randn(length, generator=draw, device=device)
    found["bytes"] = per_second(
        partial(torch.empty_like(source).copy_, source), 8.0 * length, device
    )
    return found


def floor(case: Case, data: Dataset, ceiling: dict[str, float]) -> dict[str, float]:
    """Operations and bytes of one step of one replica, and the seconds they must take.

    Operations: 2 a multiply-add, forward once and backward twice (gradients of the input and of the
    weights), of convolutions, linear maps and causal attention (half of all pairs of tokens).
    Bytes: weights and optimiser tensors (4 bytes) read and written once; the output of each
    convolution and linear map written, read by the next layer and by the backward pass, and its
    gradient written and read: five times, in the training precision. All that stands between
    (norms, ReLU, sums, attention) is taken to be fused away.

    Arguments:
        ceiling: what :func:`ceilings` returns.
    """
    recipe, cpu = case.recipe, torch.device("cpu")
    module = build(Run(recipe), data, cpu).eval()
    multiply_adds = outputs = 0

    def count(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal multiply_adds, outputs
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        inputs = len(weight) if turned(layer) else weight[0].numel()
        multiply_adds += out[0].numel() * inputs
        outputs += out[0].numel()

    def turned(layer: nn.Module) -> bool:
        """A linear map as transformers' GPT-2 has it, (inputs, outputs)."""
        return type(layer).__name__.endswith("Conv1D")

    def attend(_: nn.Module, __: object, out: torch.Tensor) -> None:
        """Queries, keys and values, (B, L, 3 D): L * L / 2 pairs, twice D multiply-adds each."""
        nonlocal multiply_adds
        multiply_adds += out.shape[1] ** 2 * out.shape[2] // 3

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) or turned(layer):
            layer.register_forward_hook(count)
        if name.endswith("attn.c_attn"):
            layer.register_forward_hook(attend)
    with torch.no_grad():
        module(data.train.x[:1].cpu())
    half = recipe.precision == "bf16"
    weights = sum(p.numel() for p in module.parameters())
    slots = 2 if recipe.optimizer != "sgd" else 1
    flop = 6.0 * multiply_adds * recipe.batch
    moved = 8.0 * weights * (1 + slots) + 5.0 * outputs * recipe.batch * (2 if half else 4)
    arithmetic = flop / ceiling["bf16" if half else "float32"]
    memory = moved / ceiling["bytes"]
    return {
        "multiply_adds_per_example": multiply_adds,
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
    careful = reproducible(device, deterministic, strict=data.kind == "text")
    exact = exact_float32(case.recipe.precision == "float32")
    with careful, exact, Feed(runs, data) as feed:
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
        rates: list[float] = []
        position, taken = 1, 0
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


def looping(
    case: Case, data: Dataset, engine: str, seconds: float, deterministic: bool
) -> dict[str, Any]:
    """Steps a second of one run of a loop, read between its steps."""
    device = data.train.x.device
    (run,), (state,) = replicas(case, data, 1)
    module = build(run, data, device)
    readings: list[float] = []

    def take(steps: int, every: int) -> list[float]:
        """Steps a second of each turn of ``every`` steps, among the first ``steps`` of the run."""

        def tick(done: int) -> bool:
            if done % every == 0:
                wait(device)
                readings.append(time.perf_counter())
            return False

        readings.clear()
        compiler = "inductor" if engine == "loop-compile" else None
        options: dict[str, Any] = {"save": lambda _: None, "tick": tick, "compiler": compiler}
        advance(run, state, steps + 1, data, module=module, **options)
        return [every / (b - a) for a, b in pairwise(readings)]

    with reproducible(device, deterministic, strict=data.kind == "text"):
        begun = time.perf_counter()
        rough = take(6, 1)
        ready = readings[0] - begun  # the first step compiles
        steps = int(statistics.median(rough) * seconds)
        every = max(1, min(steps, case.recipe.steps - 2) // 5)
        turns = take(5 * every, every)
    return {
        "steps_per_second_each": statistics.median(turns),
        "turns": [round(r, 2) for r in turns],
        "ready_s": round(ready, 2),
    }


def measured(
    case: Case,
    data: Dataset,
    engine: str,
    count: int,
    ceiling: dict[str, float],
    **how: Any,
) -> dict[str, Any]:
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
        if engine in LOOPS:
            row |= looping(case, data, engine, **how)
        else:
            row |= stepping(case, data, engine, count, **how)
    except Exception as e:  # an engine that fails is a result; the others are still measured
        traceback.print_exc()
        return row | {"error": f"{type(e).__name__}: {str(e)[:300]}"}
    all_of_them = row["steps_per_second_each"] * (1 if engine in LOOPS else count)
    row["seconds_per_copy"] = case.recipe.steps / all_of_them
    if data.kind == "text":
        row["tokens_per_second"] = all_of_them * case.recipe.batch * case.shape[0]
    bound = floor(case, data, ceiling)["seconds_per_run"]
    row["times_the_floor"] = row["seconds_per_copy"] / bound
    return row


def correct(case: Case, data: Dataset, engine: str) -> dict[str, Any]:
    """Largest differences of weights: a replay against the step called, and training twice."""
    count = 1 if data.kind == "text" else 3  # a GPT fills the device alone
    runs, states = replicas(case, data, count)

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
            "other_number_of_replicas": gap(first, trained(None, width=count + 1)),
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
    each = total / best["seconds_per_copy"] / (1 if best["engine"] in LOOPS else count)
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


def plan(case: Case, copies: list[int], most: int) -> list[tuple[str, int]]:
    """What to measure of a network, the likely winners first: the time limit cuts the end.

    Arguments:
        copies: numbers of replicas asked for; most: how many fit.
    """
    big = sorted(copies, reverse=True)
    if case.name == "lenet":
        first = [("vmap", m) for m in big]
        rest = [(e, m) for e in ("graphs", "compile") for m in big]
        return [*first, ("loop", 1), *rest]
    if case.name == "gpt":
        together = [("graphs", 9), ("compile", 9)] if 9 in copies and most >= 9 else []
        return [("loop-compile", 1), ("graphs", 1), ("loop", 1), ("compile", 1), *together]
    graphs = [(e, m) for m in big for e in ("graphs", "compile")]
    stacked = [("vmap", m) for m in big[-2:-1]]
    return [*graphs, ("loop", 1), ("loop-compile", 1), *stacked]


def show(row: dict[str, Any]) -> None:
    """One line."""
    head = f"{row['net']:9} {row['engine']:12} M={row['replicas']:<3}"
    if "error" in row:
        print(f"{head} ERROR {row['error']}", flush=True)
        return
    rate = row.get("steps_per_second_each", 0.0)
    tokens = row.get("tokens_per_second", 0.0)
    print(
        f"{head} {rate:9.1f} steps/s each  {row['seconds_per_copy']:9.2f} s a copy  "
        f"{row.get('times_the_floor', 0.0):7.1f} x floor  {row.get('gigabytes', 0):6.1f} GB  "
        f"ready {row.get('ready_s', 0):5.1f} s" + (f"  {tokens:9.0f} tokens/s" if tokens else ""),
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, choose, and write after every step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 3, 9, 27], metavar="M")
    names = [case.name for case in cases(True)]
    parser.add_argument("--nets", nargs="+", default=names, choices=names)
    kinds = ["loop", "loop-compile", "vmap", "graphs", "compile"]
    parser.add_argument("--engines", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, per row")
    parser.add_argument("--time-limit", type=float, default=480.0, help="start no row after this")
    parser.add_argument("--processes", type=int, default=3, help="0: leave processes out")
    parser.add_argument("--json", type=Path, help="write the result here, after every row")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    device = resolve_device(options.device)
    tiny = device.type == "cpu"
    if tiny:
        torch.set_num_threads(1)
    chosen = [
        c for c in cases(tiny) if c.name in ([options.child] if options.child else options.nets)
    ]
    if options.child:
        (case,) = chosen
        data = random_data(case, device)
        print(json.dumps(stepping(case, data, "graphs", 1, options.seconds, True)))
        return

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (tiny networks)"
    result: dict[str, Any] = {
        "benchmark": "engine",
        "device": gpu,
        "ceilings": ceilings(device),
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

    ceiling = result["ceilings"]
    how: dict[str, Any] = {
        "ceiling": ceiling,
        "seconds": options.seconds,
        "deterministic": True,
    }
    print(
        f"{gpu}, torch {torch.__version__}: {ceiling['bf16'] / 1e12:.1f} TFLOP/s in bf16, "
        f"{ceiling['float32'] / 1e12:.1f} in float32, {ceiling['bytes'] / 1e12:.2f} TB/s",
        flush=True,
    )
    held: dict[str, Dataset] = {}
    most: dict[str, int] = {}
    for case in chosen:
        held[case.name] = data = random_data(case, device)
        most[case.name] = most_replicas(case.recipe, data, device)
        result["floor"][case.name] = bound = floor(case, data, ceiling)
        memory = replica_bytes(
            build(Run(case.recipe), data, torch.device("cpu")), case.recipe, data
        )
        target = "no target" if case.target_s is None else f"target {case.target_s:g} s"
        print(
            f"{case.name}: floor {bound['seconds_per_run']:.2f} s a copy ({target}); "
            f"{bound['flop_per_step'] / 1e9:.2f} GFLOP and {bound['bytes_per_step'] / 1e6:.1f} "
            f"MB a step; at most {most[case.name]} replicas of "
            f"{memory / 1e9:.2f} GB",
            flush=True,
        )
        for engine in ("vmap",) if case.name == "lenet" else ("graphs", "compile"):
            if engine in options.engines and left() > 0:
                result["checks"][f"{case.name}, {engine}"] = found = correct(case, data, engine)
                print(f"  check {engine}: {found}", flush=True)
    # Round and round, so that the limit cuts every network's end and not the last network.
    plans = {
        c.name: [p for p in plan(c, options.copies, most[c.name]) if p[0] in options.engines]
        for c in chosen
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
        if best and left() > enough and best["engine"] not in LOOPS:
            free = how | {"deterministic": False}  # what the promise of equal bits costs
            keep(measured(case, held[case.name], best["engine"], best["replicas"], **free))
    if options.processes and device.type == "cuda" and left() > 60 and "resnet20" in held:
        keep(in_processes(chosen[0], options.processes, 3 * options.seconds))
    save()
    if options.json:
        write(options.json, result)
    for name, best in result["choice"].items():
        said = f"choice {name}: {best['engine']}, M={best['replicas']}: "
        said += f"{best['seconds_per_copy']:.2f} s a copy"
        if best["target_s"] is not None:
            met = "met" if best["seconds_per_copy"] <= best["target_s"] else "MISSED"
            said += f", target {best['target_s']:g} s {met}"
        print(said, flush=True)
    if result["left_out"]:
        print(f"left out for lack of time: {result['left_out']}", flush=True)


if __name__ == "__main__":
    main()
