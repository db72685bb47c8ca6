"""The GPU's minutes as one command: stages that fail or hang, resuming, what fits, a rehearsal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_pack
import on_gpu
import pytest
import report
import torch
from gpu_sizes import DESIGNS
from on_gpu import Outcome, Planned, Site, Stage, Step

from companion.core import archive
from companion.core.runs import Store

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.py"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Folders of a call."""
    made = Site(tmp_path / "out", tmp_path / "work", "abc", tiny=True)
    made.out.mkdir()
    made.work.mkdir()
    return made


def stub(name: str, *code: str, limit: float = 30, least: float = 0, **more: Any) -> Stage:
    """A stage whose processes are these programs."""
    together = more.pop("together", False)

    def plan(site: Site, slot: float, notes: Mapping[str, Any]) -> Planned:
        steps = tuple(Step((sys.executable, "-c", c), slot) for c in code)
        return Planned(steps, {"slot": slot}, together)

    def finish(
        site: Site, outcomes: Sequence[Outcome], notes: Mapping[str, Any]
    ) -> tuple[str, str]:
        if all(o.code == 0 for o in outcomes):
            return "done", outcomes[-1].log.strip()
        if any(o.code == on_gpu.UNFINISHED for o in outcomes):
            return "unfinished", "more to do"
        return "failed", on_gpu.why(outcomes)

    return Stage(name, limit, least, plan, finish, **more)


def go(
    site: Site, *todo: Stage, minutes: float = 5, state: Any = None, lanes: int = 1
) -> dict[str, Any]:
    """One call."""
    until = time.monotonic() + 60 * minutes
    state = state or {"commit": "abc", "cards": ["A card"]}
    return on_gpu.go(site, todo, state, until, lanes=lanes)


def gone(pid: int) -> bool:
    """Whether a process has ended (nobody may have waited for it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# ---- stages


@pytest.mark.slow
def test_a_stage_that_fails_or_hangs_stops_nobody(site: Site, tmp_path: Path) -> None:
    """It is killed with its children, even those that do not listen, and the next one runs."""
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('ready', flush=True); time.sleep(600)"
    )
    hangs = (
        "import os, subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "p.stdout.readline()\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{p.pid}}')\n"
        "print('working', flush=True)\n"
        "time.sleep(600)"
    )
    found = go(
        site,
        stub("fails", "print('begun'); raise ValueError('the first error')"),
        stub("hangs", hangs, limit=3),
        stub("works", "print('all is well')"),
    )
    assert [row["state"] for row in found["stages"]] == ["failed", "failed", "done"]
    results = [row["result"] for row in found["stages"]]
    assert results == [
        "exit code 1: ValueError: the first error",
        "killed at its limit; last line: working",
        "all is well",
    ]
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and all(gone(pid) for pid in pids)
    table = (site.out / "table.txt").read_text()
    assert re.search(r"^stage +state +seconds +result$", table, re.M)
    assert re.search(r"^fails +failed +\d+  exit code 1: ValueError: the first error$", table, re.M)
    assert "on A card, commit abc" in table and "A second call goes on" in table
    log = site.log.read_text()
    assert "=== fails: 30 s" in log and "# killed at its limit" in log and "all is well" in log


def test_the_child_of_a_stage_that_ended_is_ended_too(site: Site, tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(p.pid)"
    )
    (row,) = go(site, stub("leaves a child", code))["stages"]
    assert row["state"] == "done" and gone(int(row["result"]))


def test_one_process_of_a_stage_fails_and_the_next_runs(site: Site) -> None:
    (row,) = go(site, stub("two", "raise SystemExit(3)", "print('second')"))["stages"]
    assert row["state"] == "failed" and "second" in site.log.read_text()
    assert row["result"].startswith("exit code 3")


def test_a_plan_that_fails_is_a_stage_that_failed(site: Site) -> None:
    def plan(site: Site, slot: float, notes: Mapping[str, Any]) -> Planned:
        raise KeyError("what")

    found = go(site, Stage("plan", 9, 0, plan, stub("x").finish), stub("next", "print(1)"))
    assert [row["state"] for row in found["stages"]] == ["failed", "done"]
    assert found["stages"][0]["result"] == "KeyError: 'what'"


def test_results_are_on_disk_before_the_next_stage(site: Site) -> None:
    look = (
        "import json, tarfile\n"
        f"tar = tarfile.open({str(site.out / gpu_pack.CARRY)!r})\n"
        "state = json.load(tar.extractfile('stages.json'))\n"
        "print([row['state'] for row in state['stages']], 'table.txt' in tar.getnames())"
    )
    found = go(site, stub("first", "print(1)"), stub("second", look))
    assert found["stages"][1]["result"] == "['done'] True"


def test_children_know_where_they_are(site: Site) -> None:
    names = ("PYTHONPATH", "COMPANION_RUNS", "COMPANION_DATA", "TORCHINDUCTOR_CACHE_DIR")
    environment = site.environment()
    assert all(Path(environment[name]).is_absolute() for name in names)
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert environment["PYTHONUNBUFFERED"] == "1" and environment["MPLBACKEND"] == "Agg"


# ---- side by side


def meet(folder: Path, own: str, other: str) -> str:
    """A program that ends well once the other one runs, and badly if it never does."""
    return (
        "import pathlib, time\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        f"(folder / {own!r}).touch()\n"
        "until = time.monotonic() + 20\n"
        f"while not (folder / {other!r}).exists():\n"
        "    assert time.monotonic() < until, 'alone'\n"
        "    time.sleep(0.02)\n"
        f"print('met', {own!r})"
    )


def test_records_run_side_by_side_and_others_alone(site: Site, tmp_path: Path) -> None:
    """Two of one group meet; the stages of another group wait for them; the log is not mixed."""
    first = stub("a", meet(tmp_path, "a", "b"), group="records")
    second = stub("b", meet(tmp_path, "b", "a"), group="records")
    after = stub("c", meet(tmp_path, "c", "a"))
    assert [[s.name for s in g] for g in on_gpu.groups([after, first, second, after])] == [
        ["c"],
        ["a", "b"],
        ["c"],
    ]
    found = go(site, first, second, after, lanes=2)
    assert [row["state"] for row in found["stages"]] == ["done"] * 3
    assert [row["name"] for row in found["stages"]] == ["a", "b", "c"]
    log = site.log.read_text()
    assert log.count("met a") == 1 and re.search(r"# at most \d+ s\nmet b\n# exit code 0", log)


def test_the_processes_of_one_stage_side_by_side(site: Site, tmp_path: Path) -> None:
    codes = (meet(tmp_path, "a", "b"), meet(tmp_path, "b", "a"))
    (row,) = go(site, stub("both", *codes, together=True))["stages"]
    assert row["state"] == "done" and row["result"] == "met b"


def test_every_record_is_tried_out_and_none_is_kept(site: Site) -> None:
    """What fails is named by its stage; the files that were written for it go."""
    trials = [d.trial for d in DESIGNS]
    stage = on_gpu.tried(False, trials)
    planned = stage.plan(site, 60, {})
    assert isinstance(planned, Planned) and planned.together and len(planned.steps) == len(DESIGNS)
    assert all("steps=" in " ".join(step.words) for step in planned.steps)
    (site.recorded / "01_instability").mkdir(parents=True)
    (site.recorded / "01_instability/tried-0.json").write_text("{}")
    (site.recorded / "01_instability/gpu-mnist.json").write_text("{}")
    well, bad = Outcome(0, ""), Outcome(1, "x\nRuntimeError: no such kernel\n")
    state, said = stage.finish(site, [well, bad, *[well] * (len(trials) - 2)], {})
    assert state == "failed"
    assert (
        said == f"1 of {len(trials)}: {trials[1].stage}: exit code 1: RuntimeError: no such kernel"
    )
    assert [p.name for p in site.recorded.glob("*/*")] == ["gpu-mnist.json"]
    assert stage.finish(site, [well] * len(trials), {})[0] == "done"


def test_only_some_stages_and_the_rest_is_remembered(site: Site) -> None:
    """A call for some stages keeps what an earlier one knows of the others."""
    first = go(site, stub("a", "print(1)"), stub("b", "raise SystemExit(1)"))
    again = go(site, stub("b", "print(2)"), state=first)
    assert [(row["name"], row["state"]) for row in again["stages"]] == [
        ("a", "done"),
        ("b", "done"),
    ]


# ---- time, and the second call


def test_the_time_is_shared(site: Site) -> None:
    """A stage gets its limit or what is left; without enough it is left out, and later done."""
    late = (on_gpu.PACK_S + 8) / 60
    todo = (
        stub("short", "print(1)", limit=4),
        stub("long", "print(2)", limit=100, least=2),
        stub("too long", "print(3)", limit=100, least=50),
    )
    found = go(site, *todo, minutes=late)
    assert [row["state"] for row in found["stages"]] == ["done", "done", "left out"]
    assert found["stages"][0]["notes"]["slot"] == 4
    assert 2 < found["stages"][1]["notes"]["slot"] <= 8
    assert found["stages"][2]["result"] == "no time was left for it"
    again = go(site, *todo, state=found)
    assert again["stages"][2]["state"] == "done"


def test_a_second_call_goes_on(site: Site, tmp_path: Path) -> None:
    """Done stays done, failed is tried once more, unfinished continues with its notes."""
    runs = tmp_path / "runs.txt"
    note = f"open({str(runs)!r}, 'a').write"
    done = stub("done", f"{note}('d')")
    fails = stub("fails", f"{note}('f'); raise SystemExit(1)")
    more = stub("more", f"{note}('u'); raise SystemExit(75)")
    first = go(site, done, fails, more)
    carried = site.out / gpu_pack.CARRY
    # On another machine: nothing is there but the archive.
    other = Site(tmp_path / "out2", tmp_path / "work2", "abc", tiny=True)
    for folder in (other.out, other.work):
        folder.mkdir()
    state = on_gpu.restore(other, carried)
    assert state["stages"] == first["stages"]
    assert [row["state"] for row in state["stages"]] == ["done", "failed", "unfinished"]
    second = go(other, done, fails, more, state=state)
    assert runs.read_text() == "dfufu"
    assert [row["state"] for row in second["stages"]] == ["done", "given up", "unfinished"]
    third = go(other, done, fails, more, state=second)
    assert runs.read_text() == "dfufuu" and third["stages"][1]["attempts"] == 2
    assert third["stages"][2]["seconds"] >= second["stages"][2]["seconds"]


def test_where_a_call_goes_on_from(site: Site, tmp_path: Path) -> None:
    """What is asked for, the same folder, or this machine's last call of the same commit."""
    asked, own = tmp_path / "asked.tar.gz", site.out / gpu_pack.CARRY
    assert on_gpu.earlier(site, None) is None
    go(site, stub("first", "print(1)"))
    assert on_gpu.earlier(site, None) == own and on_gpu.earlier(site, asked) == asked
    own.unlink()
    assert on_gpu.earlier(site, None) == site.work / gpu_pack.CARRY
    other = Site(site.out, site.work, "another commit", tiny=True)
    assert on_gpu.earlier(other, None) is None
    (site.work / gpu_pack.CARRY).write_bytes(b"no archive")
    assert on_gpu.earlier(site, None) is None


def test_a_call_that_is_ended_from_outside_ends_its_stage(tmp_path: Path) -> None:
    """SIGTERM: the process is ended, what is done is packed, the table is printed."""
    pid = tmp_path / "pid"
    hangs = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT / 'benchmarks')!r}, {str(ROOT / 'tests')!r}]\n"
        "import on_gpu\n"
        "from on_gpu import Planned, Stage, Step\n"
        "def stage(name, code):\n"
        "    step = Step((sys.executable, '-c', code), 600)\n"
        "    return Stage(name, 600, 0, lambda *_: Planned((step,)), lambda *_: ('done', 'well'))\n"
        f"todo = (stage('first', 'print(1)'), stage('hangs', {hangs!r}))\n"
        "on_gpu.stages = lambda tiny: todo\n"
        f"on_gpu.main(['--rehearse', '--out', {str(tmp_path / 'out')!r}])\n"
    )
    call = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    call.send_signal(signal.SIGTERM)
    said, _ = call.communicate(timeout=600)
    assert call.returncode == 128 + signal.SIGTERM and gone(int(pid.read_text()))
    assert re.search(r"^hangs +interrupted +\d+  the call ended while it ran$", said, re.M)
    state = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert [row["state"] for row in state["stages"]] == ["done", "interrupted"]
    assert state["stages"][1]["attempts"] == 0  # it was not its fault


@pytest.mark.parametrize("was", ["unfinished", "interrupted", "failed"])
def test_what_was_at_work_goes_on_with_what_it_was_sized_for(tmp_path: Path, was: str) -> None:
    """Another T would be other runs; only what failed is sized anew."""
    site, seen = on_gpu.Site(tmp_path / "out", tmp_path / "work", "abc"), []
    site.out.mkdir()
    site.work.mkdir()

    def plan(site: Site, slot: float, notes: Mapping[str, Any]) -> str:
        seen.append(dict(notes))
        return "enough"

    row = {"name": "a", "state": was, "seconds": 1.0, "attempts": 0, "notes": {"T": 5}}
    stage = on_gpu.Stage("a", 60, 0, plan, lambda *_: ("done", ""))
    on_gpu.go(site, [stage], {"stages": [row], "commit": "abc"}, time.monotonic() + 100)
    assert seen == [{"T": 5} if was != "failed" else {}]


def test_another_card_is_measured_anew() -> None:
    def state() -> dict[str, Any]:
        rows = [{"name": n, "state": "done", "attempts": 1} for n in ("right", "speed")]
        return {"cards": ["H100"], "stages": rows}

    same, other = state(), state()
    on_gpu.ask_anew(same, "H100")
    on_gpu.ask_anew(other, "H200")
    assert [row["state"] for row in same["stages"]] == ["done", "done"]
    assert [row["state"] for row in other["stages"]] == ["done", "new"]


# ---- what comes back


def measured(site: Site) -> Store:
    """A run store: a run with weights, a pair that was written twice, and large layers."""
    store = Store(site.work / "runs")
    store.entry({"kind": "run", "n": 0}).write_tensors("w.safetensors", {"x": torch.zeros(9)})
    pair = store.entry({"kind": "pair", "n": 1})
    pair.write_json("pair.json", {"barrier": 1})
    pair.write_json("pair.json", {"barrier": 2})
    noise = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    store.entry({"kind": "layers", "n": 2}).write_tensors("x.safetensors", {"x": noise})
    store.entry({"kind": "null", "n": 3}).write_json("gate.json", {"value": 0})
    return store


def test_measured_entries_come_back_and_runs_do_not(site: Site, tmp_path: Path) -> None:
    measured(site)
    on_gpu.pack(site, {"stages": [], "commit": "abc"})
    with tarfile.open(site.out / gpu_pack.CARRY) as tar:
        tar.extract("store.tar", tmp_path, filter="data")
    other = Store(tmp_path / "other")
    moved = archive.read_archive(tmp_path / "store.tar", other)
    assert moved.entries == 3
    assert other.entry({"kind": "pair", "n": 1}).read_json("pair.json") == {"barrier": 2}
    assert not other.entry({"kind": "run", "n": 0}).files()
    assert not [line for entry in other.entries() for line in entry.verify()]


def test_the_largest_kinds_stay_behind_if_it_is_too_much(site: Site, tmp_path: Path) -> None:
    measured(site)
    state: dict[str, Any] = {"stages": [], "commit": "abc"}
    on_gpu.pack(site, state, limit=50_000)
    assert (site.out / gpu_pack.CARRY).stat().st_size <= 50_000
    assert state["not carried"] == ["layers"]
    assert "left behind: layers" in (site.out / "table.txt").read_text()
    with tarfile.open(site.out / gpu_pack.CARRY) as tar:
        tar.extract("store.tar", tmp_path, filter="data")
        assert json.load(tar.extractfile("stages.json"))["not carried"] == ["layers"]  # type: ignore[arg-type]  # a file, not a folder
    assert archive.read_archive(tmp_path / "store.tar", Store(tmp_path / "other")).entries == 2


def test_few_small_files_come_back(site: Site) -> None:
    """At most 8 files of 16 MB, in plain names and one folder, however much a stage says."""
    talks = "import sys; sys.stdout.write('x' * 99 + '\\n')\n"
    talks += "for i in range(30_000): print(i, 'y' * 99)\n"
    measured(site)
    go(site, *(stub(f"talks {i}", talks) for i in range(3)))
    files = list(site.out.rglob("*"))
    assert len(files) <= 8 and all(f.is_file() for f in files)
    assert {f.name for f in files} == {"table.txt", "log.txt", "stages.json", gpu_pack.CARRY}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", f.name) for f in files)
    assert site.log.stat().st_size < 3 * on_gpu.LOG_LIMIT + 10_000
    assert site.log.read_text().count("bytes cut") == 3 and "29999 yyy" in site.log.read_text()
    stages = len(on_gpu.stages(False))
    assert on_gpu.LOG_LIMIT * stages < 16e6 and on_gpu.LOGS_LIMIT < 16e6 and on_gpu.LIMIT < 16e6


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            "a\nTraceback …\n  x\ntorch.OutOfMemoryError: none\nbye\n",
            "torch.OutOfMemoryError: none",
        ),
        ("..F\nE       assert 1 == 2\nE   RuntimeError: no\nFAILED x\n", "RuntimeError: no"),
        ("error: --root: no such folder\nmore\n", "error: --root: no such folder"),
        ("nothing special\nthe last line\n\n", "the last line"),
        ("", "it said nothing"),
    ],
)
def test_the_first_error(log: str, line: str) -> None:
    assert on_gpu.first_error(log) == line


def test_half_a_result_and_no_number_cost_no_stage(site: Site) -> None:
    """A benchmark that was killed while it wrote, and one that diverged."""
    stage = on_gpu.speed(tiny=True)
    stage.plan(site, 30, {})
    row = {"net": "lenet", "engine": "vmap", "replicas": 9, "seconds_per_copy": 2.0}
    whole = {
        "rows": [{**row, "deterministic": True}],
        "choice": {"lenet": {"target_s": None}},
        "checks": {"lenet": {"twice": float("nan")}},
    }
    (site.work / "speed/1.json").write_text(json.dumps(whole))
    (site.work / "speed/2.json").write_text(json.dumps(whole)[:50])
    state, result = stage.finish(site, [Outcome(0, ""), Outcome(None, "")], {})
    assert state == "done" and result.startswith("lenet vmap M=9: 2 s a copy; left: killed")
    assert json.loads((site.out / "engine.json").read_text())["checks"]["lenet"]["twice"] is None


def test_results_of_several_calls_are_one() -> None:
    def part(net: str, engine: str, seconds: float, **more: Any) -> dict[str, Any]:
        row = {"net": net, "engine": engine, "replicas": 9, "seconds_per_copy": seconds}
        choice = {net: {"engine": engine, "target_s": 2.0}}
        rows = [{**row, "deterministic": True, **more}]
        return {"device": "A card", "rows": rows, "choice": choice, "floor": {net: {"weights": 1}}}

    found = on_gpu.merged(
        [
            part("lenet", "vmap", 3.0),
            part("lenet", "graphs", 2.0),
            part("lenet", "compile", 1.0, error="no"),
            part("vgg16", "graphs", 9.0),
            {"benchmark": "pairs", "pairs": {"lenet": {"image_s": 1e-6}}},
        ]
    )
    assert len(found["rows"]) == 4 and list(found["floor"]) == ["lenet", "vgg16"]
    assert found["benchmark"] == "engine" and found["pairs"]["lenet"] == {"image_s": 1e-6}
    best = {"engine": "graphs", "replicas": 9, "seconds_per_copy": 2.0, "target_s": 2.0}
    assert found["choice"]["lenet"] == best


# ---- the records' commands


def test_a_record_is_sized_and_asked_for(site: Site) -> None:
    stage = on_gpu.recording(replace(DESIGNS[0], most=12_000))
    planned = stage.plan(site, 9000, {})
    assert isinstance(planned, Planned)
    words = planned.steps[0].words
    assert words[1:5] == ("-m", "companion", "record", "01_instability")
    assert words[words.index("--time-limit") + 1] == "8995"
    assert words[words.index("--commit") + 1] == "abc" and "steps=12000" in words
    assert words[words.index("--root") + 1] == str(site.book)
    assert stage.plan(site, 46, {}) == "does not fit: 1500 steps need more than its 46 s"
    # What stopped goes on as it began, in whatever slot.
    again = stage.plan(site, 46, json.loads(json.dumps(planned.notes)))
    assert isinstance(again, Planned) and "steps=12000" in again.steps[0].words
    stopped = Outcome(75, "…\nstopped. Stored: 3 of 9 runs.\n")
    state, result = stage.finish(site, [stopped], planned.notes)
    assert state == "unfinished" and "T = 12,000" in result and "3 of 9 runs" in result
    assert stage.finish(site, [Outcome(1, "error: no\n")], planned.notes)[0] == "failed"


def test_options_of_record_are_found_without_importing_it() -> None:
    assert on_gpu.offers("--time-limit") and on_gpu.offers("--commit")
    assert not on_gpu.offers("--frobnicate")


# ---- at home: the pack, and the way back


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data root with small files in all places."""
    root = tmp_path / "data"
    for names in gpu_pack.FILES.values():
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())
    return root


def test_the_pack(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    size = gpu_pack.pack(data, folder, "abc123")
    assert size == sum(p.stat().st_size for p in folder.iterdir())
    assert (folder / "commit").read_text() == "abc123\n"
    site = Site(tmp_path / "out", tmp_path / "work", "abc")
    site.work.mkdir()
    on_gpu.furnish(site, folder)
    for names in gpu_pack.FILES.values():
        for name in names:
            assert (site.work / "data" / name).read_bytes() == name.encode()
    assert (site.book / "chapters" / "01_instability.md").is_file()
    # With what a first call left, also if that lies in the pack itself.
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / gpu_pack.CARRY).write_bytes(b"results")
    gpu_pack.pack(data, folder, "abc123", tmp_path / "back")
    gpu_pack.pack(data, folder, "abc123", folder)
    assert (folder / gpu_pack.CARRY).read_bytes() == b"results"


def test_the_pack_says_what_is_missing(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (data / "cifar10-jpeg/test.parquet").unlink()
    shutil.rmtree(data / "wikitext-2")
    with pytest.raises(gpu_pack.Refused) as error:
        gpu_pack.pack(data, tmp_path / "pack", "abc")
    assert "CIFAR-10 (JPEG copy): cifar10-jpeg/test.parquet\n" in str(error.value)
    assert "WikiText-2: wikitext-2/valid.txt" in str(error.value)
    assert "MNIST" not in str(error.value) and not (tmp_path / "pack").exists()


def test_the_pack_refuses_what_is_too_large_or_not_there(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(gpu_pack.Refused, match="is not there"):
        gpu_pack.pack(data, tmp_path / "pack", "abc", tmp_path / "nothing")
    monkeypatch.setattr(gpu_pack, "LIMIT", 1000)
    with pytest.raises(gpu_pack.Refused, match="can travel"):
        gpu_pack.pack(data, tmp_path / "pack", "abc")
    assert not list((tmp_path / "pack").iterdir())


def test_the_pack_prints_the_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPANION_DATA", str(data))
    monkeypatch.setattr(gpu_pack, "head", lambda _: ("a" * 40, False))
    gpu_pack.main(["--folder", str(tmp_path / "pack")])
    said = capsys.readouterr().out
    assert 'python3 benchmarks/on_gpu.py --minutes 6 --out "$OUT"' in said
    assert "not committed" in said and "carry" in said
    assert (tmp_path / "pack/commit").read_text() == f"{'a' * 40}-changed\n"
    (data / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SystemExit, match="missing"):
        gpu_pack.main(["--folder", str(tmp_path / "pack")])


def test_without_a_pack_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COMPANION_DATA", raising=False)
    with pytest.raises(SystemExit):
        on_gpu.main(["--out", str(tmp_path / "out"), "--pack", str(tmp_path / "none")])
    assert "make gpu-pack" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        on_gpu.main(["--unpack", str(tmp_path)])
    assert "is not what a call left" in capsys.readouterr().err


def test_results_go_into_place(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site.recorded / "01_instability").mkdir(parents=True)
    (site.recorded / "01_instability/gpu-mnist.json").write_text("{}")
    on_gpu.write(site.out / "engine.json", {"device": "NVIDIA H100 80GB HBM3"})
    go(site, stub("works", "print('the end of the log')"))
    home = tmp_path / "home"
    on_gpu.main(["--unpack", str(site.out), "--root", str(home)])
    assert (home / "data/recorded/01_instability/gpu-mnist.json").read_text() == "{}"
    assert (home / "benchmarks/results/engine-nvidia-h100-80gb-hbm3.json").is_file()
    said = capsys.readouterr().out
    assert "the end of the log" in said and "report.py" in said and "new: data/recorded" in said
    on_gpu.write(site.out / "engine.json", {"device": "cpu (tiny networks)"})
    on_gpu.pack(site, {"stages": [], "commit": "abc"})
    assert any("of a CPU" in line for line in on_gpu.unpack(site.out, tmp_path / "other"))
    assert not (tmp_path / "other/benchmarks").exists()


def test_it_starts_without_torch() -> None:
    """The first second of a GPU's minute is not spent on imports."""
    code = "import on_gpu, sys; print(sorted({'torch', 'numpy', 'companion'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


# ---- all of it


@pytest.mark.slow
def test_the_rehearsal(tmp_path: Path) -> None:
    """Every stage, tiny, on this CPU; then a second call, and the results into place."""
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(out), "--minutes", "20"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, f"{log}\n{done.stderr}\n{done.stdout}"
    state = json.loads((out / "stages.json").read_text())
    assert [row["name"] for row in state["stages"]] == [s.name for s in on_gpu.stages(True)]
    assert {row["state"] for row in state["stages"]} == {"done"}, done.stdout
    assert "1 of 1 records run" in state["stages"][0]["result"]
    assert "passed" in state["stages"][1]["result"] and "expected from measured" in done.stdout
    assert len(list(out.rglob("*"))) == 5 <= 8
    assert not list(tmp_path.glob("companion-rehearsal-*"))
    engine = json.loads((out / "engine.json").read_text())
    assert set(engine["choice"]) == {"lenet", "gpt"}
    assert set(engine["pairs"]) == {"lenet", "resnet20", "vgg16"}
    assert "| lenet | " in report.engine([engine])

    home = tmp_path / "home"
    said = on_gpu.unpack(out, home)
    assert "new: data/recorded/01_instability/rehearsal.json" in said
    record = json.loads((home / "data/recorded/01_instability/rehearsal.json").read_text())
    assert record["parameters"]["steps"] == 40 and record["provenance"]["device"] == "cpu"
    assert not (ROOT / "data/recorded/01_instability/rehearsal.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert again.returncode == 0 and "at most" not in again.stdout  # nothing is left to do
    imported = (out / "log.txt").read_text()[len(log) :]
    assert re.search(r"\d+ entries: \d+ files, .* added", imported)
