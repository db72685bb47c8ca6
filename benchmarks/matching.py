"""Weight matching of trained networks, the real work: ours, PyPI's `rebasin`, and a plain loop.

    pip install --target PEER --no-deps rebasin==0.0.47 torchview graphviz
    OMP_NUM_THREADS=1 python benchmarks/matching.py --peer PEER --json matching.json

`rebasin.py` plants a permutation, where the maxima of the rows solve nearly every assignment. Here
two networks of chapter 2 (perceptrons on digits) were trained apart, every assignment is contested
and it takes many passes. One thread, and CPU seconds of the process, so that other programs disturb
less; all on the same pair in one run. Objectives are ``<A, P(B)>`` over weights and biases: ours
and theirs stop where no group can rise alone, so speed counts only beside how high that is. The
plain loop is forty lines on SciPy, from three seeds; theirs is random too and has one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import machine, write
from rebasin import peer  # type: ignore[attr-defined]  # benchmarks/rebasin.py
from scipy.optimize import linear_sum_assignment
from torch import nn

from companion.core.theta import Theta
from companion.experiments.aligned import pairs_of
from companion.papers.rebasin import setting
from companion.rebasin import Spec, chain, objective, weight_matching
from companion.training import Job, load_weights, train

SEEDS = 3


def trained(width: int) -> tuple[Theta, Theta]:
    """The first pair of chapter 2 at this width; trained where the run store lacks it."""
    names = ("net", "width", "train_examples", "test_examples", "bn")
    unset: dict[str, Any] = dict.fromkeys(names)
    study = setting(
        dataset="digits", pairs=1, points=25, max_error=5.0, device="cpu", workers=1, **unset
    )
    (pair,) = pairs_of(study.at_width(width), 1)
    train([Job(run, weights=(run.last_step,)) for run in (pair.a, pair.b)], workers=1)
    return load_weights(pair.a), load_weights(pair.b)


def layers_of(theta: Theta) -> list[str]:
    """Names of the linear layers, in order."""
    return [name.removesuffix(".weight") for name in theta if name.endswith(".weight")]


def spec_of(theta: Theta) -> Spec:
    """Every hidden layer of a perceptron has one permutation."""
    names = layers_of(theta)
    shapes = [theta[f"{name}.weight"].shape for name in names]
    return chain(shapes[0][1], *(shape[0] for shape in shapes), names=names)


def plain(a: Theta, b: Theta, seed: int) -> dict[str, torch.Tensor]:
    """Algorithm 1 as one writes it down: from the identity, in random order, until none rises."""
    rng = np.random.default_rng(seed)
    names = layers_of(a)
    x, y = ([t[f"{n}.weight"].numpy().astype("float64") for n in names] for t in (a, b))
    u, v = ([t[f"{n}.bias"].numpy().astype("float64") for n in names] for t in (a, b))
    p = [np.arange(len(bias)) for bias in u[:-1]]
    rising = True
    while rising:
        rising = False
        for i in rng.permutation(len(p)):
            into = y[i] if i == 0 else y[i][:, p[i - 1]]
            out = y[i + 1] if i + 1 == len(p) else y[i + 1][p[i + 1]]
            gain = x[i] @ into.T + np.outer(u[i], v[i]) + x[i + 1].T @ out
            rows, columns = linear_sum_assignment(gain, maximize=True)
            here = gain[rows, p[i]].sum()
            if gain[rows, columns].sum() > here + 1e-12 * abs(here):
                p[i], rising = columns, True
    return {name: torch.from_numpy(q) for name, q in zip(names, p, strict=False)}


def module_of(theta: Theta) -> nn.Sequential:
    """A perceptron of these weights, which the peer can trace."""
    layers: list[nn.Module] = []
    for name in layers_of(theta):
        weight, bias = theta[f"{name}.weight"], theta[f"{name}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and the result."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def compare(width: int, repeats: int, other: Callable[..., int] | None) -> dict[str, Any]:
    """All on one pair, in turns."""
    a, b = trained(width)
    spec = spec_of(a)
    rows: dict[str, dict[str, list[float]]] = {}

    def keep(name: str, seconds: float, value: float) -> None:
        row = rows.setdefault(name, {"seconds": [], "objective": []})
        row["seconds"].append(round(seconds, 3))
        row["objective"].append(round(value, 2))

    for turn in range(repeats):
        seconds, found = cpu(lambda: weight_matching(spec, a, b))
        keep("companion", seconds, found.objective)
        if other is not None:
            ends = module_of(a), module_of(b)
            torch.manual_seed(turn)
            seconds, _ = cpu(partial(other, *ends, torch.zeros(2, 64)))
            theirs = dict(zip(a, ends[1].state_dict().values(), strict=True))
            keep("rebasin", seconds, objective(spec, a, theirs))
    for seed in range(SEEDS):
        seconds, perms = cpu(partial(plain, a, b, seed))
        keep("plain loop", seconds, objective(spec, a, b, perms))
    ours = np.array(rows["companion"]["seconds"])
    ratios = {n: float(np.median(r["seconds"]) / np.median(ours)) for n, r in rows.items()}
    return {
        "width": width,
        "contenders": rows,
        "ratios": {n: round(x, 2) for n, x in ratios.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="folder that holds the package rebasin")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before = machine()
    sys.modules.pop("rebasin")  # the file beside this one: the peer has its name
    found = peer(options.peer)
    cases = []
    for width in options.widths:
        cases.append(compare(width, options.repeats, found[0] if found else None))
        print(json.dumps(cases[-1]), flush=True)
    settings = {"repeats": options.repeats, "threads": 1, "peer": found[1] if found else None}
    result = {"benchmark": "matching", "settings": settings, "cases": cases, "machine": before}
    if options.json:
        write(options.json, result)


if __name__ == "__main__":
    main()
