"""The curve between two networks: our walker against a fresh model and a DataLoader every time.

    python benchmarks/barrier.py --json benchmarks/results/barrier.json

Loss and error at 31 points of a segment, on the train and the test split. The other way is how
people write it: interpolate the state dicts, build the model again, load, loop over a DataLoader.
A second opponent slices the tensors instead of using a DataLoader. All have the default number of
threads; the opponents put 500 images through the network at a time, ours what its default says;
their numbers are compared. What is measured on digits is also measured on MNIST where
COMPANION_DATA has it.
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
from companion.connectivity import segment
from companion.core.errors import MissingData
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.data import Split
from companion.experiments.pairs import Evaluation

BATCH = 500  # the walker's own; a DataLoader with a smaller one would be slower
NETS = ("mlp:widths=100x5", "resnet8:norm=group,width=8")
# Where the network is what takes the time, a part of the images says as much in less of it.
PARTS = {("mnist", NETS[1]): (2000, 1000)}

State = dict[str, torch.Tensor]
Numbers = list[float]  # loss and error in percent of train and test, alpha by alpha


def sliced(split: Split) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Batches that are views of the tensors."""
    return zip(split.x.split(BATCH), split.y.split(BATCH), strict=True)


def loaded(split: Split) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a DataLoader."""
    return DataLoader(TensorDataset(split.x, split.y), BATCH)


@torch.no_grad()
def reload(
    build: Callable[[], torch.nn.Module],
    a: State,
    b: State,
    splits: Sequence[Split],
    alphas: Sequence[float],
    batches: Callable[[Split], Iterable[tuple[torch.Tensor, torch.Tensor]]],
) -> Numbers:
    """A new model at every alpha, evaluated batch by batch."""
    out = []
    for alpha in alphas:
        model = build()
        model.load_state_dict({name: (1 - alpha) * a[name] + alpha * b[name] for name in a})
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
    name: str, net: str, points: int, repeats: int, part: int | None, patience: Patience
) -> dict[str, Any]:
    """Time one network on one dataset."""
    data = datasets.load(name)
    train, test = PARTS.get((name, net), (None, None))
    splits = Evaluation(train_examples=part or train, test_examples=part or test).splits(data)

    def build() -> torch.nn.Module:
        return models.build(net, data.in_shape, data.classes)

    def at(seed: int) -> State:
        return snapshot(models.build(net, data.in_shape, data.classes, Key("init", seed)))

    module, a, b = build(), at(0), at(1)
    alphas = [i / (points - 1) for i in range(points)]
    numbers: dict[str, Numbers] = {}

    def walk() -> int:
        values = segment(module, a, b, splits, points=points).values
        numbers["ours"] = [
            values[s][m][i] for i in range(points) for s in splits for m in ("loss", "error")
        ]
        return points

    def other(key: str, batches: Callable[[Split], Any]) -> int:
        numbers[key] = reload(build, a, b, list(splits.values()), alphas, batches)
        return points

    ours = Contender("companion", "companion.connectivity.segment", walk)
    loader = Contender(
        "fresh model, DataLoader",
        f"a new model and a DataLoader of {BATCH} images a batch for every alpha",
        lambda: other("loader", loaded),
    )
    slices = Contender(
        "fresh model, tensor slices",
        "a new model for every alpha, batches sliced from the tensors",
        lambda: other("slices", sliced),
    )
    contenders = [ours, loader, slices]
    if repeats > 1:  # a first turn of each that is thrown away
        for contender in contenders:
            contender.work()
    alternate(contenders, repeats, patience)
    gaps = [
        max(abs(x - y) for x, y in zip(numbers["ours"], numbers[key], strict=True))
        for key in ("loader", "slices")
    ]
    result = {
        "data": data.label,
        "net": models.canonical(net),
        "images": {split: len(s) for split, s in splits.items()},
        "points": points,
        "largest_difference": max(gaps),
        "contenders": [c.to_json() for c in contenders],
        "ratios": {c.name: ratio(ours, c) for c in (loader, slices)},
    }
    print(f"{net} on {data.label}: largest difference of any number {max(gaps):.1e}")
    for c in (loader, slices):
        print(f"  {ratio(ours, c)['median']:.2f}x the {c.name}")
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=31)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", nargs="+", default=["digits", "mnist"])
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--images", type=int, help="measure on this many of each split")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for quiet")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    before, patience, cases = machine(), Patience(options.patience), []
    for name in options.data:
        try:
            datasets.load(name)
        except MissingData as e:
            print(f"left out: {e}")
            continue
        cases += [
            compare(name, net, options.points, options.repeats, options.images, patience)
            for net in options.nets
        ]
    result = {
        "benchmark": "barrier",
        "unit": "points of the path",
        "settings": {
            "points": options.points,
            "repeats": options.repeats,
            "batch": BATCH,
            "patience_s": options.patience,
        },
        "cases": cases,
        "machine": before,
    }
    if options.json:
        write(options.json, result)


if __name__ == "__main__":
    main()
