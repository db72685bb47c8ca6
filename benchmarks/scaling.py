"""What the machinery costs a job, apart from its work: plans, claims, notes and the run store.

python benchmarks/scaling.py --json benchmarks/results/scaling.json     # some minutes, 1 GB of disk

Made-up jobs that compute nothing, 10, 1,000 and 100,000 of them: writing the plan, one worker that
takes and notes each, seeing what is done (in one go, and once more when nothing is new), an entry
of the run store for each, listing the store, finding one entry by the beginning of its key. And the
largest number of files in one folder. Seconds are those of one core: user and system time.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import machine

from companion.core.plans import Plan, Queue, Work, Worker
from companion.core.runs import Store

SIZES = (10, 1_000, 100_000)


def cost(work: Callable[[], object]) -> float:
    """Seconds of this process's core, the kernel's share included."""
    before = time.process_time()
    work()
    return time.process_time() - before


def largest(folder: Path) -> int:
    """Entries of the largest folder below."""
    return max(len(folders) + len(files) for _, folders, files in os.walk(folder))


def made_up(number: int, count: int) -> Work:
    """A job that only computes a digest, with an argument as long as a recipe."""
    recipe = {"net": "mlp:widths=100x5", "data": "digits", "steps": 2000, "lr": 0.08, "n": number}
    return Work("companion.core.runs:digest", {"dict": recipe}, f"made up {number} of {count}")


def measure(count: int, folder: Path) -> dict[str, Any]:
    """One row."""
    queue, store = Queue(folder / "queue"), Store(folder / "store")
    jobs = [made_up(n, count) for n in range(count)]
    found: dict[str, Any] = {"jobs": count}
    found["plan"] = cost(lambda: queue.add(jobs))
    (plan,) = queue.plans()
    found["attach"] = cost(lambda: queue.add(jobs))
    worker = Worker("one")
    found["work"] = cost(lambda: worker.work_through(Plan(plan.folder)))
    found["see"] = cost(plan.look)
    found["see again"] = cost(plan.look)
    assert len(plan.outcomes) == count
    found["files of a plan"] = largest(queue.folder)

    def fill(first: int, end: int) -> None:
        for n in range(first, end):
            entry = store.entry({"kind": "made up", "n": n})
            with entry.lock():
                entry.write_json("value.json", {"n": n})

    few = min(count, 1_000)
    found["store"] = cost(lambda: fill(0, few)) * count / few
    first = store.entry({"kind": "made up", "n": 0}).path
    pattern = {name: (first / name).read_bytes() for name in ("value.json", "manifest.json")}
    for n in range(few, count):  # the rest are there to be found, and need not reach the disk
        entry = store.entry({"kind": "made up", "n": n})
        entry.path.mkdir(parents=True)
        (entry.path / "identity.json").write_text(json.dumps(dict(entry.identity)))
        for name in pattern:
            (entry.path / name).write_bytes(pattern[name])
    found["missing"] = cost(
        lambda: [
            "value.json" in store.entry({"kind": "made up", "n": n}).files() for n in range(count)
        ]
    )
    found["list"] = cost(lambda: sum(1 for _ in store.entries()))
    key = store.entry({"kind": "made up", "n": 0}).key
    found["find"] = cost(lambda: store.find(key[:12]))
    found["files of the store"] = largest(store.root)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    given = parser.parse_args()
    cases = []
    for count in given.sizes:
        with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
            cases.append(measure(count, Path(folder)))
        print(json.dumps(cases[-1]), flush=True)
    if given.json:
        found = {"benchmark": "scaling", "machine": machine(), "cases": cases}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
