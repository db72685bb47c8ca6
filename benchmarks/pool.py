"""Training steps a second: our pool of one-thread runs against plain loops, one run at a time.

    python benchmarks/pool.py --json benchmarks/results/pool.json

The work is chapter 1's: a 5-layer MLP on digits, many runs of one recipe. All contenders compute
the same (network, optimiser, schedule, augmentation); a check at the start gives the plain loop our
noise and compares the losses step by step. Ours also writes its results to a run store on disk, the
plain loops keep nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Contender, Patience, alternate, machine, ratio, write
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from companion import data as datasets
from companion import models
from companion.core.runs import Store
from companion.core.theta import snapshot
from companion.data import Augmentation, Augmenter, Dataset
from companion.training import Job, Recipe, Run, State, advance, build, train

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def plain(net: nn.Module, recipe: Recipe, batches: Batches) -> list[torch.Tensor]:
    """A training loop as people write it: module, optimizer, scheduler, batch after batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    marks = [int(m * recipe.steps) for m in recipe.milestones]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks, recipe.gamma)
    net.train()
    losses = []
    for _ in range(recipe.steps):
        x, y = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return losses


def padded(data: Dataset, pad: int) -> torch.Tensor:
    """The training images with a black border, to crop from."""
    n, channels, height, width = data.train.x.shape
    out = data.black.expand(n, channels, height + 2 * pad, width + 2 * pad).clone()
    out[:, :, pad:-pad, pad:-pad] = data.train.x
    return out


def crop(x: torch.Tensor, pad: int) -> torch.Tensor:
    """A random crop of each image of a padded batch, all at once."""
    size = x.shape[-1] - 2 * pad
    top, left = torch.randint(0, 2 * pad + 1, (2, len(x)))
    return x.unfold(2, size, 1).unfold(3, size, 1)[torch.arange(len(x)), :, top, left]


def with_loader(data: Dataset, batch: int, pad: int) -> Batches:
    """Batches of a shuffling DataLoader over a TensorDataset."""
    loader = DataLoader(
        TensorDataset(padded(data, pad), data.train.y), batch, shuffle=True, drop_last=True
    )
    while True:
        for x, y in loader:
            yield crop(x, pad), y


def with_index(data: Dataset, batch: int, pad: int) -> Batches:
    """Batches indexed straight out of the tensors: no loader, no collation."""
    images, y = padded(data, pad), data.train.y
    while True:
        order = torch.randperm(len(y))
        for start in range(0, len(y) - batch + 1, batch):
            rows = order[start : start + batch]
            yield crop(images[rows], pad), y[rows]


def with_our_noise(run: Run, data: Dataset) -> Batches:
    """The batches that the engine gives to ``run``, for the check."""
    augmenter = Augmenter(data.train, Augmentation.parse(run.recipe.augment), data.black)
    epoch = 0
    while True:
        order = run.order_key().fold("epoch", epoch).permutation(len(data.train))
        draws = augmenter.draw(run.augment_key(), epoch)
        for start in range(0, len(order) - run.recipe.batch + 1, run.recipe.batch):
            rows = order[start : start + run.recipe.batch]
            yield augmenter.examples(rows, draws)
        epoch += 1


def agreement(recipe: Recipe, data: Dataset, steps: int) -> float:
    """Largest difference of the losses of our engine and of the plain loop, same noise, nats."""
    run = Run(recipe)
    net = build(run, data, torch.device("cpu"))
    start = State(0, snapshot(net))
    ours = advance(run, start, steps, data).trace
    short = replace(recipe, steps=steps, schedule="constant", milestones=())
    theirs = torch.stack(plain(net, short, with_our_noise(run, data)))
    return float((ours - theirs).abs().max())


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=12, help="runs in our pool")
    parser.add_argument("--plain-runs", type=int, default=1, help="runs of each plain loop")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="0: one per core")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for quiet")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)

    before = machine()
    recipe = Recipe(
        net="mlp:widths=100x5",
        data="digits",
        steps=options.steps,
        batch=60,
        lr=0.08,
        momentum=0.9,
        schedule="step",
        milestones=(0.6, 0.85),
        augment="crop1",
    )
    pad = Augmentation.parse(recipe.augment).pad
    data = datasets.load(recipe.data)
    compared = min(50, options.steps // 2)
    gap = agreement(recipe, data, compared)
    print(f"largest difference of the loss in {compared} steps with the same noise: {gap:.1e} nats")

    with tempfile.TemporaryDirectory() as folder:
        turns = iter(range(1_000_000))

        def pool(runs: int, steps: int) -> int:
            store = Store(Path(folder) / str(next(turns)))  # a new one: nothing is trained already
            short = replace(recipe, steps=steps)
            jobs = [Job(Run(short, order=i, augment=i), weights=(steps,)) for i in range(runs)]
            train(jobs, store=store, workers=options.workers)
            return runs * steps

        def stop_workers() -> None:
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True)

        def alone(batches: Batches, threads: int) -> int:
            torch.set_num_threads(threads)
            for _ in range(options.plain_runs):
                net = models.build(recipe.net, data.in_shape, data.classes)
                plain(net, recipe, batches)
            torch.set_num_threads(default)
            return options.plain_runs * recipe.steps

        default = torch.get_num_threads()
        batch = recipe.batch
        ours = Contender(
            "companion",
            f"{options.runs} runs in the pool, results stored; worker processes already up",
            lambda: pool(options.runs, recipe.steps),
            before=lambda: pool(4, 2),
        )
        starting = Contender(
            "starting the workers",
            "start the processes, import torch in them, train four runs of two steps",
            lambda: pool(4, 2),
            before=stop_workers,
        )
        indexed = Contender(
            "plain loop, indexed tensors",
            f"one run at a time, batches indexed from a tensor, {default} threads (the default)",
            lambda: alone(with_index(data, batch, pad), default),
        )
        one_thread = Contender(
            "plain loop, indexed tensors, 1 thread",
            "the same with torch.set_num_threads(1)",
            lambda: alone(with_index(data, batch, pad), 1),
        )
        loader = Contender(
            "plain loop, DataLoader",
            f"one run at a time, DataLoader(shuffle=True) over a TensorDataset, {default} threads",
            lambda: alone(with_loader(data, batch, pad), default),
        )
        opponents = [indexed, one_thread, loader]
        patience = Patience(options.patience)
        for contender in opponents:  # a first turn that is thrown away
            contender.work()
        # Ours comes right after its workers have started; the others rotate around the two.
        alternate([starting, ours, *opponents], options.repeats, patience)

    result = {
        "benchmark": "pool",
        "unit": "steps",
        "settings": {
            "recipe": recipe.identity(),
            "runs": options.runs,
            "plain_runs": options.plain_runs,
            "repeats": options.repeats,
            "workers": options.workers,
            "patience_s": options.patience,
        },
        "agreement": {"steps": compared, "largest_loss_difference": gap},
        "contenders": [c.to_json() for c in (ours, *opponents)],
        "starting": starting.to_json(),
        "ratios": {
            "workers warm": {other.name: ratio(ours, other) for other in opponents},
            "with start-up": {other.name: ratio(ours, other, starting) for other in opponents},
        },
        "machine": before,
    }
    for contender in (ours, *opponents):
        print(f"{contender.name:40} {contender.to_json()['per_second']:10,.0f} steps/s")
    for other in opponents:
        warm, started = (ratio(ours, other, extra)["median"] for extra in (None, starting))
        print(f"{warm:.2f}x ({started:.2f}x with start-up) the {other.name}")
    if options.json:
        write(options.json, result)


if __name__ == "__main__":
    main()
