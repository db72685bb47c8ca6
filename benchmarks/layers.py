"""Barriers of single layers: our sweep against a fresh model and a DataLoader for every layer.

    python benchmarks/layers.py --json benchmarks/results/layers.json

Every layer of a network, both networks as the default, alpha in {0, ½, 1}, and the whole network;
loss and error on train and test: what the code released with Adilova et al. 2024 computes, and how
it does: for each layer and each alpha, mix the state dicts, build the model again, load, and loop
over a DataLoader. A second opponent slices the tensors instead. All have the same number of
threads (``--threads``; by default torch's own); the opponents put 256 images through the network at
a time, as the released code does; the numbers are compared. What is measured on digits is also
measured on MNIST where COMPANION_DATA has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Contender, Patience, alternate, machine, ratio, write
from torch.utils.data import DataLoader, TensorDataset

from companion import data as datasets
from companion import models
from companion.core.errors import MissingData
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.data import Split
from companion.experiments.pairs import Evaluation
from companion.layerwise import Groups, Sweep, layer_groups, sweep

BATCH = 256
ALPHAS = (0.0, 0.5, 1.0)
NETS = ("mlp:widths=100x5", "resnet18:width=8")
# A part of the images says as much in less time where the network is what takes it.
PARTS = {
    ("digits", NETS[1]): (400, 200),
    ("mnist", NETS[0]): (2000, 1000),
    ("mnist", NETS[1]): (80, 40),
}

State = dict[str, torch.Tensor]
Numbers = list[float]  # loss and error in percent, of train and test, alpha by alpha, set by set


def sliced(split: Split) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Batches that are views of the tensors."""
    return zip(split.x.split(BATCH), split.y.split(BATCH), strict=True)


def loaded(split: Split) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a DataLoader."""
    return DataLoader(TensorDataset(split.x, split.y), BATCH)


@torch.no_grad()
def rebuild(
    build: Callable[[], torch.nn.Module],
    a: State,
    b: State,
    groups: Groups,
    splits: Sequence[Split],
    batches: Callable[[Split], Iterable[tuple[torch.Tensor, torch.Tensor]]],
) -> Numbers:
    """A new model for every layer, default network and alpha, evaluated batch by batch."""
    out = []
    sets = [(tuple(a), a)]  # the whole network
    sets += [(names, rest) for names in groups.values() for rest in (a, b)]
    for names, rest in sets:
        for alpha in ALPHAS:
            model = build()
            mixed = {name: (1 - alpha) * a[name] + alpha * b[name] for name in names}
            model.load_state_dict({**rest, **mixed})
            model.eval()
            for split in splits:
                loss = wrong = 0.0
                for x, y in batches(split):
                    logits = model(x)
                    loss += F.cross_entropy(logits, y, reduction="sum").item()
                    wrong += (logits.argmax(1) != y).sum().item()
                out += [loss / len(split), 100 * wrong / len(split)]
    return out


def compare(
    name: str, net: str, repeats: int, part: int | None, patience: Patience
) -> dict[str, Any]:
    """Time one network on one dataset."""
    data = datasets.load(name)
    train, test = PARTS.get((name, net), (None, None))
    splits = Evaluation(train_examples=part or train, test_examples=part or test).splits(data)

    def build() -> torch.nn.Module:
        return models.build(net, data.in_shape, data.classes)

    a, b = (
        snapshot(models.build(net, data.in_shape, data.classes, Key("init", i))) for i in (0, 1)
    )
    # Neighbours, as two trained networks of one init are: far apart, losses would be huge.
    b = {n: torch.lerp(a[n], v, 0.2) for n, v in b.items()}
    module = build()
    groups = layer_groups(module, example=next(iter(splits.values())).x[:2])
    points = len(ALPHAS) * (1 + 2 * len(groups))
    numbers: dict[str, Numbers] = {}

    def ours() -> int:
        found = sweep(module, a, b, splits, Sweep(kinds=("single",)))
        rows = [r for r in found.rows if r.kind == "single" or r.rest == "a"]
        numbers["ours"] = [
            row.curve.values[s][m][i]
            for row in rows
            for i in range(len(ALPHAS))
            for s in splits
            for m in ("loss", "error")
        ]
        return points

    def middle() -> int:
        sweep(module, a, b, splits, Sweep(kinds=("single",), points=1))
        return points  # the opponents need all of theirs for these barriers

    def other(key: str, batches: Callable[[Split], Any]) -> int:
        numbers[key] = rebuild(build, a, b, groups, list(splits.values()), batches)
        return points

    mine = Contender("companion", "companion.layerwise.sweep", ours)
    loader = Contender(
        "fresh model, DataLoader",
        f"a new model and a DataLoader of {BATCH} images a batch for every layer and alpha",
        lambda: other("loader", loaded),
    )
    slices = Contender(
        "fresh model, tensor slices",
        "a new model for every layer and alpha, batches sliced from the tensors",
        lambda: other("slices", sliced),
    )
    half = Contender(
        "companion, ½ alone",
        "the same barriers by Definition 2, which needs no other point of a segment",
        middle,
    )
    contenders = [mine, half, loader, slices]
    if repeats > 1:
        mine.work()  # a first turn that is thrown away
    alternate(contenders, repeats, patience)
    gaps = [
        max(abs(x - y) / max(1.0, abs(y)) for x, y in zip(numbers["ours"], numbers[k], strict=True))
        for k in ("loader", "slices")
    ]
    print(f"{net} on {data.label}: largest difference of any number {max(gaps):.1e}")
    for c in (loader, slices):
        print(f"  {ratio(mine, c)['median']:.2f}x the {c.name}")
    return {
        "data": data.label,
        "net": models.canonical(net),
        "images": {split: len(s) for split, s in splits.items()},
        "layers": len(groups),
        "points": points,
        "largest_difference": max(gaps),
        "contenders": [c.to_json() for c in contenders],
        "ratios": {c.name: ratio(mine, c) for c in (half, loader, slices)},
        "half": {c.name: ratio(half, c) for c in (loader, slices)},
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", nargs="+", default=["digits", "mnist"])
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--threads", type=int, help="of every contender; 1 on a busy machine")
    parser.add_argument("--images", type=int, help="measure on this many of each split")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for quiet")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    before, patience, cases = machine(), Patience(options.patience), []
    for name in options.data:
        try:
            datasets.load(name)
        except MissingData as e:
            print(f"left out: {e}")
            continue
        cases += [
            compare(name, net, options.repeats, options.images, patience) for net in options.nets
        ]
    result = {
        "benchmark": "layers",
        "unit": "points of the paths",
        "settings": {
            "repeats": options.repeats,
            "batch": BATCH,
            "threads": torch.get_num_threads(),
            "patience_s": options.patience,
        },
        "cases": cases,
        "machine": before,
    }
    if options.json:
        write(options.json, result)


if __name__ == "__main__":
    main()
