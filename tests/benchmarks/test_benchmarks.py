"""The benchmarks run, their contenders compute the same, and the README says what the results say.

No time is asserted: a test machine may be busy.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import engine
import pytest
import report
import torch

from companion.book.layout import Book
from companion.book.recording import _setting, prepare

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@dataclass
class Done:
    stdout: str
    stderr: str


def script(name: str, *words: object, code: int = 0) -> Done:
    """Run a benchmark as a user does, without the seconds that a fresh Python imports for."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    words = (BENCHMARKS / name, *words)
    with patch.object(sys, "argv", [str(w) for w in words]), patch.object(sys, "path", [*sys.path]):
        try:
            with redirect_stdout(out), redirect_stderr(err):
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = int(bool(end.code))
            err.write(str(end.code))
        finally:
            torch.set_num_threads(1)
    assert status == code, err.getvalue()
    return Done(out.getvalue(), err.getvalue())


def check_contenders(
    contenders: list[dict[str, Any]], ratios: dict[str, Any], repeats: int
) -> None:
    ours, *others = contenders
    assert ours["name"] == "companion"
    for contender in contenders:
        assert len(contender["seconds"]) == repeats
        assert contender["per_second"] > 0
        assert contender["units"] > 0
        assert contender["what"]
    assert list(ratios) == [c["name"] for c in others]
    for ratio in ratios.values():
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


def check_machine(machine: dict[str, Any]) -> None:
    assert machine["packages"]["torch"]
    assert machine["cpu"]["cores"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", machine["date"])
    assert "/" not in json.dumps(machine)  # no folder of this machine


@pytest.mark.slow
def test_the_engines_are_measured_and_one_is_chosen(tmp_path: Path) -> None:
    """The tiny version: every engine that runs without a compiler, the floor, the checks."""
    done = script(
        *("engine.py", "--device", "cpu", "--copies", "1", "2", "--seconds", "0.05"),
        *("--nets", "resnet20", "lenet", "gpt", "--engines", "loop", "vmap", "graphs"),
        *("--json", tmp_path / "engine.json"),
    )
    found = json.loads((tmp_path / "engine.json").read_text(encoding="utf-8"))
    check_machine(found["machine"])
    assert {(r["net"], r["engine"], r["replicas"]) for r in found["rows"]} == {
        *(
            (net, engine, m)
            for net in ("resnet20", "lenet")
            for m in (1, 2)
            for engine in ["graphs"]
        ),
        *(("resnet20", "vmap", 2), ("lenet", "vmap", 1), ("lenet", "vmap", 2)),
        *(("gpt", "graphs", 1), *((net, "loop", 1) for net in ("resnet20", "lenet", "gpt"))),
    }
    assert all(r["tokens_per_second"] > 0 for r in found["rows"] if r["net"] == "gpt")
    assert all(r["times_the_floor"] > 0 for r in found["rows"])
    # The device's own, measured: no number of another one is typed in.
    assert found["ceilings"].keys() == {"bf16", "float32", "bytes"}
    assert all(1e6 < rate < 1e17 for rate in found["ceilings"].values())
    for bound in found["floor"].values():
        seconds = bound["flop_per_step"] / found["ceilings"]["float32"]
        assert bound["seconds_per_step_operations"] == pytest.approx(seconds)
    assert not [r for r in found["rows"] if "error" in r] and found["left_out"] == []
    for check in found["checks"].values():
        assert check == dict.fromkeys(
            ("replay_minus_eager", "twice", "other_number_of_replicas"), 0.0
        )
    for net, bound in found["floor"].items():
        assert bound["seconds_per_run"] > 0
        best = found["choice"][net]["seconds_per_copy"]
        rows = [r for r in found["rows"] if r["net"] == net and r["deterministic"]]
        assert best == min(r["seconds_per_copy"] for r in rows)
        assert found["whole"][net]["steps"] >= 4
    assert "choice resnet20" in done.stdout


def test_the_floor_counts_what_the_paper_counts() -> None:
    """Multiply-adds of the fact sheet: 40.8M for ResNet-20, 0.266M for LeNet, 313M for VGG-16.

    Of the GPT: 12 width squared a block and token, the output matrix, and attention's half square.
    """
    ceiling = {"bf16": 8e14, "float32": 6.7e13, "bytes": 4.3e12}
    found = []
    for case in engine.cases(False):
        few = dataclasses.replace(case, examples=256)
        bound = engine.floor(few, engine.random_data(few, torch.device("cpu")), ceiling)
        found.append((bound["multiply_adds_per_example"], bound["flop_per_step"]))
    gpt = 256 * (12 * 12 * 768**2 + 8192 * 768) + 12 * 256**2 * 768
    expected = ((40.8e6, 31.3), (0.266e6, 0.096), (313e6, 241), (gpt, 6 * 50 * gpt / 1e9))
    for (adds, flop), (paper, gflop) in zip(found, expected, strict=True):
        assert adds == pytest.approx(paper, rel=0.01)
        assert flop / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with the results of the benchmarks at a tiny size."""
    folder = tmp_path_factory.mktemp("results")
    script(
        *("pool.py", "--runs", "2", "--steps", "10", "--repeats", "1", "--workers", "1"),
        *("--patience", "0", "--json", folder / "pool.json"),
    )
    script(
        *("barrier.py", "--points", "3", "--repeats", "1", "--data", "digits", "--images", "60"),
        *("--patience", "0", "--json", folder / "barrier.json"),
    )
    alone = script(
        *("rebasin.py", "--nets", "mlp", "--repeats", "1", "--threads", "1"),
        *("--patience", "0", "--json", folder / "rebasin.json"),
    )
    if json.loads((folder / "rebasin.json").read_text())["settings"]["peer"] is None:
        assert "rebasin is not here (--peer FOLDER): ours is measured alone" in alone.stdout
    script(
        *("layers.py", "--repeats", "1", "--data", "digits", "--images", "20", "--threads", "1"),
        *("--patience", "0", "--json", folder / "layers.json"),
    )
    script(
        *("features.py", "--repeats", "1", "--data", "digits", "--images", "40"),
        *("--memory", "digits", "--memory-images", "20", "--large", "vgg11:width=4"),
        *("--threads", "1", "--patience", "0", "--json", folder / "features.json"),
    )
    script("scaling.py", "--sizes", "10", "--json", folder / "scaling.json")
    # In a Python of its own: it imports rebasin.py beside it, and here tests/rebasin has that name.
    words = ("--widths", "8", "--repeats", "1", "--json", folder / "matching.json")
    subprocess.run([sys.executable, BENCHMARKS / "matching.py", *words], check=True)
    return folder


@pytest.mark.slow
def test_pool(results):
    found = json.loads((results / "pool.json").read_text())
    assert found["benchmark"] == "pool"
    # The plain loop and the engine, with the same noise: the same losses, step by step.
    assert 0 <= found["agreement"]["largest_loss_difference"] < 1e-5
    assert list(found["ratios"]) == ["workers warm", "with start-up"]
    for ratios in found["ratios"].values():
        check_contenders(found["contenders"], ratios, 1)
    assert len(found["starting"]["seconds"]) == 1
    assert found["contenders"][0]["units"] == 20
    check_machine(found["machine"])


@pytest.mark.slow
def test_matching(results):
    found = json.loads((results / "matching.json").read_text())
    (case,) = found["cases"]
    ours, plain = (case["contenders"][name] for name in ("companion", "plain loop"))
    assert len(ours["seconds"]) == 1 and len(plain["seconds"]) == 3
    assert min(*ours["objective"], *plain["objective"]) > 0
    check_machine(found["machine"])


@pytest.mark.slow
def test_barrier(results):
    found = json.loads((results / "barrier.json").read_text())
    assert found["benchmark"] == "barrier"
    assert [case["net"] for case in found["cases"]] == [
        "mlp:widths=100x5",
        "resnet8:norm=group,width=8",
    ]
    for case in found["cases"]:
        assert case["largest_difference"] < 1e-5
        assert case["images"] == {"train": 60, "test": 60}
        check_contenders(case["contenders"], case["ratios"], 1)
    check_machine(found["machine"])


@pytest.mark.slow
def test_rebasin(results):
    found = json.loads((results / "rebasin.json").read_text())
    assert found["benchmark"] == "rebasin"
    (case,) = found["cases"]
    assert case["permutations_planted"] == case["found"]["companion"]["permutations"] == 3
    assert case["found"]["companion"]["recovered"]
    assert case["found"]["companion"]["distance"] == pytest.approx(case["distance_of_noise"])
    assert case["distance_before"] > 10 * case["distance_of_noise"]
    assert case["found"]["companion"]["output_difference"] < 1e-5
    assert case["failed"] == {} and (case["memory"]["companion"] or 1) >= 1  # None: not Linux
    assert [len(seconds) for seconds in case["parts"].values()] == [1, 1, 1]
    check_contenders(case["contenders"], case["ratios"], 1)
    check_machine(found["machine"])


PEER = """
class PermutationCoordinateDescent:
    def __init__(self, a, b, x):
        if {fails}:
            raise AssertionError("A and B must be one")
        from types import SimpleNamespace as N
        self.pinit = N(model_graph=N(permutation_to_info=[1, 2]))

    def rebasin(self):
        import time
        time.sleep(0.2)  # a ratio of times needs some
"""


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_rebasin_beside_a_peer(tmp_path, fails):
    """A peer that does nothing is measured and found out; one that fails is quoted."""
    package = tmp_path / "peer" / "rebasin"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PEER.format(fails=fails))
    about = tmp_path / "peer" / "rebasin-0.0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: rebasin\nVersion: 0.0.1\n")
    out = tmp_path / "rebasin.json"
    sys.modules.pop("rebasin", None)  # the benchmark has the peer's name
    script(
        *("rebasin.py", "--nets", "mlp", "--repeats", "1", "--threads", "1", "--patience", "0"),
        *("--peer", tmp_path / "peer", "--no-memory", "--json", out),
    )
    sys.modules.pop("rebasin", None)
    found = json.loads(out.read_text())
    (case,) = found["cases"]
    assert found["settings"]["peer"] == "0.0.1" and case["found"]["companion"]["recovered"]
    if fails:
        assert case["failed"] == {"rebasin": "AssertionError: A and B must be one"}
        assert case["ratios"] == {}
    else:
        theirs = case["found"]["rebasin"]
        assert not theirs["recovered"] and theirs["permutations"] == 2
        assert theirs["distance"] == case["distance_before"]
        check_contenders(case["contenders"], case["ratios"], 1)


@pytest.mark.slow
def test_layers(results):
    found = json.loads((results / "layers.json").read_text())
    assert found["benchmark"] == "layers"
    assert [case["net"] for case in found["cases"]] == ["mlp:widths=100x5", "resnet18:width=8"]
    assert [case["layers"] for case in found["cases"]] == [6, 21]
    for case in found["cases"]:
        assert case["largest_difference"] < 1e-6
        check_contenders(case["contenders"], case["ratios"], 1)
    check_machine(found["machine"])


@pytest.mark.slow
def test_features(results):
    found = json.loads((results / "features.json").read_text())
    assert found["benchmark"] == "features"
    (case,) = found["cases"]
    assert case["images"] == 40 and case["net"] == "mlp"
    assert 0 <= case["largest_difference"] < 1e-9  # float64, and the same batches
    assert case["largest_difference_float32"] < 1e-4
    check_contenders(case["contenders"], case["ratios"], 1)
    (memory,) = found["memory"]
    sizes = (4 * 64, 8 * 16, *[16 * 4] * 2, *[32] * 4)  # of an 8x8 image's feature maps
    assert memory["numbers_per_image"] == 2 * sum(sizes) + 10
    assert memory["stored_bytes"] == 3 * 4 * 20 * memory["numbers_per_image"]
    assert memory["networks"] == 5 and memory["layers"] == 3 * 8 + 1
    assert 5e7 < memory["peak_bytes"] < 3e9
    check_machine(found["machine"])


def test_barrier_without_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path))
    done = script("barrier.py", "--data", "mnist", "--json", tmp_path / "x.json")
    assert "left out: MNIST is not in" in done.stdout
    assert json.loads((tmp_path / "x.json").read_text())["cases"] == []


@pytest.mark.slow
def test_report(results, tmp_path):
    readme = tmp_path / "README.md"
    shutil.copy(BENCHMARKS / "README.md", readme)
    words = ("--readme", readme, "--results", results, "--recorded", records(tmp_path))
    script("report.py", *words, "--check", code=1)  # it shows the committed results
    script("report.py", *words)
    script("report.py", *words, "--check")
    text = readme.read_text()
    assert text.count("| mlp, all |") == 2 and "no peer was there" in text
    for name in ("pool", "barrier", "rebasin"):
        for contender in contenders(json.loads((results / f"{name}.json").read_text())):
            if name == "pool":
                assert f"| {contender['name']} | {contender['per_second']:,.0f} |" in text
    readme.write_text(text.replace("<!-- pool: begin -->", ""))
    assert "markers of pool" in script("report.py", *words, code=1).stderr


def contenders(found: dict[str, Any]) -> list[dict[str, Any]]:
    """All contenders of a result."""
    return [c for case in found.get("cases", [found]) for c in case["contenders"]]


def records(tmp_path: Path) -> Path:
    """A copy of the committed records, to be written beside."""
    return Path(shutil.copytree(ROOT / "data" / "recorded", tmp_path / "recorded"))


def test_the_committed_tables_are_those_of_the_committed_results():
    script("report.py", "--check")
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        found = json.loads(path.read_text())
        check_machine(found["machine"])
        # Three have rows, not turns; one takes a quarter of an hour and is about memory; of one a
        # turn of its peers takes half a minute: three turns.
        if found["benchmark"] not in ("engine", "families", "matching", "scaling", "streaming"):
            assert found["settings"]["repeats"] >= 5
            assert path.stat().st_size < 20_000


def test_the_records_table_follows_the_files(tmp_path: Path) -> None:
    folder = records(tmp_path)
    readme = tmp_path / "README.md"
    shutil.copy(BENCHMARKS / "README.md", readme)
    words = ("--readme", readme, "--recorded", folder)
    script("report.py", *words, "--check")
    made = json.loads((folder / "01_instability/cpu-mnist.json").read_text())
    made |= {"name": "gpu-mnist", "profile": "gpu", "hardware": "A card", "pieces": 1, "seconds": 9}
    (folder / "01_instability/gpu-mnist.json").write_text(json.dumps(made))
    done = script("report.py", *words, "--check", code=1)
    assert "data/recorded/README.md is not what its results say" in done.stderr
    script("report.py", *words)
    text = (folder / "README.md").read_text()
    assert "`companion record 01_instability --profile gpu -p dataset=mnist" in text
    assert "9 s, A card |" in text and re.search(r"^From a GPU: .*A card.*\.$", text, re.M)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "data/recorded").glob("*/*.json")), ids=lambda p: f"{p.parent.name}"
)
def test_a_records_command_makes_that_record(path: Path) -> None:
    """The command in the table, read back as the program reads it."""
    document = json.loads(path.read_text())
    words = shlex.split(report.command(document))
    settings = [words[i + 1] for i, word in enumerate(words) if word == "-p"]
    book = Book(ROOT)
    asked = prepare(book, document["chapter"], document["profile"], settings, words[-1])
    assert asked.overrides == document["overrides"] and asked.name == document["name"]


@pytest.mark.parametrize(
    "value", ["mnist", "true", "12", "1e-3", "text: a", "", None, True, 0.5, [1, 2], ["a b", None]]
)
def test_a_parameter_is_written_as_it_is_read(value: Any) -> None:
    (name, found) = _setting(f"x={report.literal(value)}")
    assert name == "x" and found == value and type(found) is type(value)


def test_the_engines_table(tmp_path: Path) -> None:
    """Nothing measured, one card, two cards; a row that failed is said to have."""
    assert "Not yet measured on a GPU" in report.engine([])
    row = {"net": "lenet", "engine": "vmap", "replicas": 9, "deterministic": True}
    good = {"steps_per_second_each": 2900.4, "seconds_per_copy": 0.92, "times_the_floor": 24.0}
    found = {
        "device": "A card",
        "floor": {"lenet": {}},
        "checks": {"lenet, vmap": {"twice": None, "replay_minus_eager": 1e-7}},
        "rows": [
            {**row, **good, "gigabytes": 0.4, "ready_s": 1.5},
            {**row, "engine": "compile", "error": "RuntimeError: no compiler\nmore"},
        ],
        "left_out": [["lenet", "loop", 1]],
        "choice": {
            "lenet": {"engine": "vmap", "replicas": 9, "seconds_per_copy": 0.92, "target_s": 2.0}
        },
        "machine": {"date": "2026-01-01", "python": "3.12.3", "packages": {"torch": "2.11.0"}},
    }
    text = report.engine([found, found | {"device": "Another"}])
    assert text.count("| lenet | vmap | 9 | 2,900 | 0.92 | 24.0× | 0.4 | 1.5 |") == 2
    assert "**A card.** Fastest: lenet: `vmap` with M = 9, 0.92 s a copy, target 2 s met." in text
    assert "- lenet, `compile`, M = 9: RuntimeError: no compiler\n" in text
    assert "- lenet, vmap: twice not finite, replay minus eager 1e-07" in text
    assert "Left out for lack of time: lenet `loop` M = 1." in text


@pytest.mark.slow
def test_the_landscape_of_a_resnet_is_right_at_a_smaller_size(tmp_path):
    out = tmp_path / "x.json"
    few = ("--images", 3, "--points", 2, "--eigenvalues", 1, "--threads", 1)
    script("landscape.py", *few, "--json", out)
    found = json.loads(out.read_text())
    on_plane, at_ends = found["losses"]
    assert on_plane == pytest.approx(at_ends, rel=1e-4)
    assert found["errors"][0] <= 1e-2 * max(found["values"]) and found["products"] < 60
    assert all(stage["peak_gb"] < 3 for stage in found["stages"].values())
    check_machine(found["machine"])
