"""What every test may rely on: a run store of its own, one torch thread, and maybe a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import BATCHNORM, NET, Nets, files, trained

from companion.core.runs import Store


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests come first: no process is left with a long one at the end.

    Tests marked ``gpu`` need a CUDA device; elsewhere they are skipped, and say so.
    """
    slow = Counter(item.path for item in items if "slow" in item.keywords)
    items.sort(key=lambda item: -slow[item.path])
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


SLOW_S = 3.0
"""A test that takes longer carries the mark ``slow``."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests that took long and do not say so. It fails nothing: machines are noisy."""
    took: dict[str, float] = {}
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call" and "slow" not in report.keywords:
            took[report.nodeid] = report.duration
    late = sorted((t, name) for name, t in took.items() if t > SLOW_S)
    if late:
        terminalreporter.section(f"more than {SLOW_S:g} s, not marked slow")
        for seconds, name in reversed(late):
            terminalreporter.write_line(f"{seconds:6.1f} s  {name}")


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Sums round alike on every machine, and two test sessions on two cores do not fight."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def runs_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default run store of this test: a folder of its own, not made yet."""
    root = tmp_path / "runs"
    monkeypatch.setenv("COMPANION_RUNS", str(root))
    return root


@pytest.fixture
def store(runs_root: Path) -> Store:
    """The default run store, empty."""
    return Store()


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that lives as long as the session: what one test trained there, others find."""
    return Store(tmp_path_factory.mktemp("shared-runs"))


@pytest.fixture
def few_of_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data root with the first images of ``cifar10-jpeg``, 1,300 and 200; skipped without it.

    To decode all 60,000 takes longer than what the tests do with them.
    """
    import pyarrow.parquet as pq

    from companion.core.locations import data_root

    for name, count in (("train", 1300), ("test", 200)):
        path = f"cifar10-jpeg/{name}.parquet"
        if not (data_root() / path).is_file():
            pytest.skip("cifar10-jpeg is not under the data root (COMPANION_DATA)")
        (tmp_path / path).parent.mkdir(exist_ok=True)
        pq.write_table(pq.read_table(data_root() / path).slice(0, count), tmp_path / path)
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a toy book whose site is built, once for all processes that share the tests."""
    import toybook  # what trains on a borrowed GPU has no tools for books

    shared = tmp_path_factory.getbasetemp()
    return toybook.built(shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared)


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    """Two MLPs and two with BatchNorm, trained a little on digits, as files: a, b, bn_a, bn_b."""
    found = {
        prefix + end: trained(net, order)
        for prefix, net in (("", NET), ("bn_", BATCHNORM))
        for order, end in enumerate("ab", 1)
    }
    return files(tmp_path_factory.mktemp("checkpoints"), found)


@pytest.fixture(scope="session")
def in_processes(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Runs scenarios of ``tests/processes.py``: their answers, and the folder they worked in."""

    def run(*scenarios: str) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp("processes")
        script = Path(__file__).with_name("processes.py")
        # Python 3.12 warns that a fork copies one thread only; the children need no other.
        strict = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
        done = subprocess.run(
            [sys.executable, *strict, str(script), *scenarios, str(folder)],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), folder

    return run
