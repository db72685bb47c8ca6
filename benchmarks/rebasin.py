"""Undo a planted permutation: our derived spec and matching against the PyPI package `rebasin`.

    pip install --target PEER --no-deps rebasin==0.0.47 torchview graphviz
    python benchmarks/rebasin.py --peer PEER --json benchmarks/results/rebasin.json

Network B is network A with its units in a random order, plus noise of a hundredth of each tensor's
spread, so the answer is known. Timed is everything from two modules to a module B that is aligned:
ours derives and proves the spec, matches, applies and checks that B's outputs are what they were;
theirs traces the network, matches and applies. Both see one image of 64x64 pixels. A residual
stream has one permutation for all of its blocks; "inner" plants only those of units inside a single
block, which is what a tool that keeps streams in place can undo. The peer is no dependency of this
project: where it is not to be had, ours is measured alone.

Memory is the peak of a fresh process for each case, above what it had before the networks were
there, as a multiple of the two networks themselves (which are part of it, so 1 is the least).
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision
from harness import Contender, Patience, alternate, machine, ratio, write
from safetensors.torch import load_file, save_file
from torch import nn

from companion.core.seeds import Key
from companion.core.theta import distance, layout
from companion.rebasin import Spec, derive, weight_matching

HERE = Path(__file__).parent
NOISE = 0.01  # of each tensor's standard deviation
SIDE = 64  # pixels of the example image
CASES = (
    ("mlp", "all"),
    ("resnet18", "all"),
    ("resnet18", "inner"),
    ("resnet50", "all"),
    ("resnet50", "inner"),
)
Align = Callable[[nn.Module, nn.Module, torch.Tensor], int]
"""A, B, an example -> number of permutations considered; B is aligned in place."""


def network(name: str) -> nn.Module:
    """An MLP of 3 x 512 on 784 inputs, or torchvision's ResNet of that name; random weights."""
    if name == "mlp":
        widths = (784, 512, 512, 512)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(512, 10))
    return getattr(torchvision.models, name)()


def example(name: str) -> torch.Tensor:
    """One input of a network."""
    shape = (1, 784) if name == "mlp" else (1, 3, SIDE, SIDE)
    return torch.randn(shape, generator=Key("benchmark", "example").generator())


@torch.no_grad()
def plant(name: str, which: str) -> tuple[nn.Module, nn.Module, int, float]:
    """A, B, number of permutations planted, and the distance the noise made."""
    key = Key("benchmark", name, which)
    with key.fold("weights").seeded():
        a = network(name).eval()
        for module in a.modules():  # norms start as 1 and 0, where a mix-up would not be seen
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None and module.running_mean is not None
                for x in (module.weight, module.running_var):
                    nn.init.uniform_(x, 0.5, 1.5)
                for x in (module.bias, module.running_mean):
                    nn.init.normal_(x, std=0.1)
    spec = derive(a, example(name))
    perms = spec.random(key.fold("order").generator())
    chosen = [g for g in spec.groups if which == "all" or inside_one_block(spec, g)]
    perms = {g: p if g in chosen else spec.identity()[g] for g, p in perms.items()}
    b = copy.deepcopy(a)
    b.load_state_dict(dict(spec.permute(a.state_dict(), perms)))
    moved = {n: x.clone() for n, x in b.state_dict().items()}
    generator = key.fold("noise").generator()
    for x in b.parameters():
        x.add_(NOISE * x.std() * torch.randn(x.shape, generator=generator))
    return a, b, len(chosen), distance(moved, b.state_dict(), layout(b).parameters)


def inside_one_block(spec: Spec, group: str) -> bool:
    """True if everything a group moves lies in one block of a ResNet (``layer1.0``)."""
    blocks = {tuple(u.tensor.split(".")[:2]) for u in spec.uses[group]}
    return len(blocks) == 1 and blocks.pop()[0].startswith("layer")


@dataclass
class Ours:
    """From two modules to an aligned one, and what each part took."""

    parts: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, a: nn.Module, b: nn.Module, x: torch.Tensor) -> int:
        """See :data:`Align`."""
        times = [time.perf_counter()]
        spec = derive(a, x)
        times.append(time.perf_counter())
        theta_a, theta_b = a.state_dict(), b.state_dict()
        found = weight_matching(spec, theta_a, theta_b)
        times.append(time.perf_counter())
        b.load_state_dict(dict(found.apply(b, theta_b)))
        times.append(time.perf_counter())
        names = ("derivation", "matching", "application")
        for part, (begin, end) in zip(names, pairwise(times), strict=True):
            self.parts.setdefault(part, []).append(round(end - begin, 4))
        return len(spec.groups)


def peer(path: Path | None) -> tuple[Align, str] | None:
    """The other package's whole run and its version, or None where it cannot be imported.

    This file has its name, so the folder of benchmarks must not be searched for it.
    """
    searched = sys.path
    sys.path = [str(path)] if path else []
    sys.path += [p for p in searched if Path(p or ".").resolve() != HERE.resolve()]
    try:
        from rebasin import PermutationCoordinateDescent  # type: ignore[attr-defined]  # the peer's, not this file's

        version = importlib.metadata.version("rebasin")
    except ImportError:
        return None
    finally:
        sys.path = searched

    def align(a: nn.Module, b: nn.Module, x: torch.Tensor) -> int:
        descent = PermutationCoordinateDescent(a, b, x)
        descent.rebasin()  # applies what it finds
        return len(descent.pinit.model_graph.permutation_to_info)

    return align, version


def compare(
    name: str, which: str, aligners: dict[str, Align], repeats: int, patience: Patience, room: bool
) -> dict[str, Any]:
    """Time one instance, look at what was found, and with ``room`` at the memory it takes."""
    ours = aligners["companion"]
    assert isinstance(ours, Ours)
    a, b, planted, noise = plant(name, which)
    x = example(name)
    with torch.no_grad():
        before = b(x)
    entries = layout(a).parameters
    work: dict[str, nn.Module] = {}
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}

    def fresh(key: str) -> None:
        work[key] = copy.deepcopy(b)

    def align(key: str) -> int:
        found[key] = {"permutations": aligners[key](a, work[key], x)}
        return 1

    contenders = []
    for key in aligners:
        try:  # a first turn that is thrown away; where it fails, there are no others
            fresh(key)
            align(key)
        except Exception as e:
            failed[key] = f"{type(e).__name__}: {e}"[:300]
            found.pop(key, None)
            print(f"{key} on {name}: {failed[key]}")
            continue
        contenders.append(
            Contender(
                key,
                "spec or trace, matching, application",
                partial(align, key),
                partial(fresh, key),
            )
        )
    ours.parts.clear()
    alternate(contenders, repeats, patience)
    for key, result in found.items():
        with torch.no_grad():
            gap = float((work[key](x) - before).abs().max() / before.abs().max())
        apart = distance(a.state_dict(), work[key].state_dict(), entries)
        result["distance"] = round(apart, 4)
        result["recovered"] = apart < 1.01 * noise
        result["output_difference"] = float(f"{gap:.2g}")
    first, *others = contenders
    return {
        "net": name,
        "planted": which,
        "parameters": sum(p.numel() for p in a.parameters()),
        "permutations_planted": planted,
        "distance_before": round(distance(a.state_dict(), b.state_dict(), entries), 4),
        "distance_of_noise": round(noise, 4),
        "contenders": [c.to_json() for c in contenders],
        "ratios": {c.name: ratio(first, c) for c in others},
        "parts": {part: list(s) for part, s in ours.parts.items()},
        "found": found,
        "failed": failed,
        "memory": {c.name: memory(name, c.name, a, b) for c in contenders if room},
    }


# --- memory, in processes of their own

PEER_PATH: list[Path] = []


def memory(name: str, key: str, a: nn.Module, b: nn.Module) -> float | None:
    """Peak memory of one contender as a multiple of the two networks; None: not Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with TemporaryDirectory() as folder:
        for end, net in (("a", a), ("b", b)):
            save_file(net.state_dict(), Path(folder) / end)
        words = [sys.executable, __file__, "--memory-of", key, folder, name]
        words += ["--peer", *map(str, PEER_PATH)] if PEER_PATH else []
        done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
        return None
    return float(json.loads(done.stdout.splitlines()[-1])["multiple"])


def measure(key: str, folder: Path, name: str, aligners: dict[str, Align]) -> None:
    """Print the peak of this process. A small network first, so that no import counts."""
    small = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 5))
    aligners[key](small, copy.deepcopy(small), torch.randn(1, 4))
    if name != "mlp":
        convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
        convolution.eval()
        aligners[key](convolution, copy.deepcopy(convolution), example(name))
    x = example(name)
    before = status("VmRSS")
    nets = []
    for end in ("a", "b"):
        with torch.device("meta"):  # no weights yet: those of the file become its own
            net = network(name).eval()
        state = {n: v.clone() for n, v in load_file(folder / end).items()}
        net.load_state_dict(state, assign=True)
        nets.append(net)
    size = sum(v.nbytes for net in nets for v in net.state_dict().values())
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    aligners[key](nets[0], nets[1], x)
    print(json.dumps({"multiple": round((status("VmHWM") - before) / size, 2)}))


def status(what: str) -> int:
    """Bytes of memory of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def cases(chosen: Sequence[str]) -> list[tuple[str, str]]:
    """The instances of some networks."""
    return [case for case in CASES if case[0] in chosen]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", default=list(dict(CASES)), choices=list(dict(CASES)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", type=Path, help="folder that holds the package rebasin")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for quiet")
    parser.add_argument("--threads", type=int, help="of torch, for both (default: all cores)")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--no-memory", action="store_true", help="leave its processes out")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    aligners: dict[str, Align] = {"companion": Ours()}
    version = None
    if found := peer(options.peer):
        align, version = found
        aligners["rebasin"] = align
    if options.memory_of:
        key, folder, name = options.memory_of
        measure(key, Path(folder), name, aligners)
        return
    if options.peer:
        PEER_PATH.append(options.peer)
    if version is None:
        print("The package rebasin is not here (--peer FOLDER): ours is measured alone.")
    before, patience = machine(), Patience(options.patience)
    results = []
    for name, which in cases(options.nets):
        case = compare(
            *(name, which, aligners, options.repeats, patience), room=not options.no_memory
        )
        results.append(case)
        print(f"{name}, {which} planted: {json.dumps(case['found'])}")
        print(f"  {json.dumps(case['ratios'])} memory {json.dumps(case['memory'])}")
    result = {
        "benchmark": "rebasin",
        "unit": "networks aligned",
        "settings": {
            "repeats": options.repeats,
            "noise": NOISE,
            "pixels": SIDE,
            "threads": torch.get_num_threads(),
            "peer": version,
            "patience_s": options.patience,
        },
        "cases": results,
        "machine": before,
    }
    if options.json:
        write(options.json, result)


if __name__ == "__main__":
    main()
