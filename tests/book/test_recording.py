"""Recording a chapter in pieces, carrying the store elsewhere, and what the book makes of it."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toybook
from commands import run

from companion import training
from companion.book import chapter, prose, recording
from companion.book.chapter import cells
from companion.book.layout import Book, BookError
from companion.connectivity.gates import Gate
from companion.core import archive, closing, deadline
from companion.core.errors import (
    BadParameter,
    CompanionError,
    CorruptData,
    CorruptEntry,
    MissingData,
    NotMeasured,
    OutOfTime,
)
from companion.core.pool import run_all
from companion.core.runs import Store
from companion.data import Split
from companion.data.text import save_windows
from companion.experiments import aligned, budget, federated, merged, pairs
from companion.experiments.layers import sweep_pairs
from companion.report import claims, page, partly, provenance, recorded
from companion.training import Recipe, Run, engines
from companion.training import engine as training_engine

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = """\
---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A chapter that trains

```{code-cell} python
:tags: [parameters]

steps: int = 20  # T
ks: list[int] = [0, 3]
lr: float = 0.05
```

```{code-cell} python
from companion.report import parameters

parameters.check(globals())

from types import SimpleNamespace

import matplotlib.pyplot as plt

from companion import data
from companion.experiments import instability
from companion.report import claims, figures, page, plots, provenance, recorded, tables
from companion.report.claims import Statistic
from companion.experiments.instability import analyse
from companion.experiments.pairs import Evaluation
from companion.training import Recipe

figures.use_style()
images = data.load("digits")
recipe = Recipe(net="mlp:widths=8", data="digits", steps=steps, lr=lr, augment="crop1")
whole = {"inits": 2, "copies": 2}
common = {
    "evaluation": Evaluation(points=3, train_examples=40, test_examples=40),
    "device": "cpu",
    "workers": 1,
}
plans = [instability.plan_forks(recipe, ks, common["evaluation"], **whole)]
page.budget(SimpleNamespace(**common, plans=lambda: plans))
print("not on the page of a recording")
```

```{code-cell} python
found = analyse(recipe, ks, max_error=100.0, **whole, **common)
means = {k: found.interval(k) for k in ks}
tables.show(["k", "barrier"], list(means.items()), name="barriers")
page.fill(network="perceptron <8>", steps=steps)
```

:::{caption} barriers
Barriers of the {{network}}, T = {{steps}}.
:::

```{code-cell} python
fig, ax = plt.subplots()
drawn = plots.against_k(ax, {"mlp, test": means}, steps=steps)
figures.publish(fig, "instability", data=drawn, values={"first": means[0].value})
```

:::{caption} instability
:alt: Barriers of the {{network}}.
Barrier at k = 0: {{first:.3f}}.
:::

```{code-cell} python
records = recorded.load("01_toy")
page.text(recorded.sentence("01_toy", records))
if records:
    fig, drawn = plots.panels(
        {"this page": (steps, {"mlp": means})} | recorded.curves(records, "instability")
    )
    figures.publish(fig, "recorded", data=drawn)
```

:::{caption} recorded
:optional:
:alt: Panels.
Recorded before.
:::

```{code-cell} python
def c01(found): return Statistic(found.interval(0))
def c02(found): return Statistic(None)
claims.show(
    claims.verdicts({"C01": c01, "C02": c02}, found),
    scale=f"digits, {recipe.net}",
    recorded=records,
)
provenance.show(
    provenance.record(
        dataset={"name": images.label, "sha256": images.fingerprint},
        device="cpu",
        parameters=parameters.changed(globals()),
    )
)
```
"""
TOY = Recipe(net="mlp:widths=8", data="digits", steps=20)
UNSTABLE = {"date", "seconds", "pieces"}  # what two recordings may differ in


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A book whose one chapter trains."""
    made = toybook.make(tmp_path / "book", CHAPTER)
    (made / "chapters/profiles/other/01_toy.yaml").write_text("steps: 24\n")
    (made / "chapters/profiles/nothing").mkdir()
    return made


def ready(root: Path, *settings: str, profile: str = "other", name: str = ""):
    return recording.prepare(Book(root), "01_toy", profile, settings, name)


def content(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def stable(path: Path) -> dict:
    return {k: v for k, v in content(path).items() if k not in UNSTABLE}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(budget, "_PROBE_S", 0.01)


# One recording


def test_a_recording_holds_what_a_reader_needs(root):
    said = []
    path = recording.record(ready(root, "lr=0.1"), say=said.append, commit="abc")
    assert path == root / "data/recorded/01_toy/other-lr-0-1.json"
    assert sorted(p.name for p in (root / "data").rglob("*")) == ["01_toy", path.name, "recorded"]
    found = content(path)
    assert found["parameters"] == {"steps": 24, "ks": [0, 3], "lr": 0.1}
    assert (found["profile"], found["overrides"]) == ("other", {"lr": 0.1})
    assert found["dataset"]["name"] and len(found["dataset"]["sha256"]) == 64
    assert found["hardware"].startswith("CPU, ")
    assert found["provenance"]["packages"]["torch"] and found["provenance"]["parameters"] == {
        "steps": 24,
        "lr": 0.1,
    }
    # What is said of the code counts, also where git knows another commit.
    assert found["provenance"]["code"] == {"commit": "abc", "changed": None}
    assert len(found["source"]) == 64 and found["seconds"] > 0 and found["pieces"] == 1
    assert [c["claim"]["id"] for c in found["claims"]] == ["C01", "C02"]
    curve = found["figures"]["instability"]["data"]["mlp, test"]
    assert curve["k"] == [0, 3] and curve["pairs"] == [2, 2]
    figure = found["figures"]["instability"]
    assert figure["caption"] == f"Barrier at k = 0: {curve['mean'][0]:.3f}."
    assert figure["alt"] == "Barriers of the perceptron <8>." and "values" not in figure
    assert curve["mean"][0] == found["claims"][0]["value"]
    assert found["tables"][0]["columns"] == ["k", "barrier"]
    assert found["tables"][0]["caption"] == "Barriers of the perceptron <8>, T = 24."
    assert found["values"] == {"network": "perceptron <8>", "steps": 24}
    assert found["problems"] == []
    assert any("estimate" in line for line in said) and "not on the page" not in "".join(said)


def test_the_budget_is_what_is_then_computed(root, store):
    said = []
    assert recording.record(ready(root), dry_run=True, say=said.append) is None
    # 2 trunks to k = 3, 4 copies at k = 0, 4 at k = 3, and one of them again for the null control
    assert "11 of 11 runs to train (210 of 210 steps)" in said[0]
    assert "to measure: pair 4 of 4, null 1 of 1" in said[0]
    assert not (root / "data").exists() and not list(store.entries())
    recording.record(ready(root), say=said.append)
    kinds = [e.identity["kind"] for e in store.entries()]
    assert (kinds.count("run"), kinds.count("pair"), kinds.count("null")) == (10, 4, 1)
    said.clear()
    recording.record(ready(root), dry_run=True, say=said.append)
    assert "0 of 11 runs" in said[0] and "nothing is left to compute" in said[1]


def test_a_picture_that_fails_loses_no_verdict(root, monkeypatch):
    path = root / "chapters" / "01_toy.md"
    broken = "fig, ax = plt.subplots()\nax.set_yscale('no such scale')"
    path.write_text(CHAPTER.replace("fig, ax = plt.subplots()", broken, 1))
    made = ready(root)
    found = content(recording.record(made, say=str))
    line = 1 + path.read_text().splitlines().index("ax.set_yscale('no such scale')")
    assert f"chapters/01_toy.md, line {line}: ValueError" in found["problems"][0]
    assert found["claims"] and "instability" not in found["figures"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{first:.3f}}", "{{fist:.3f}}", "nobody gives 'fist'"),
        ("{caption} instability", "{caption} instable", "'instability' has no caption"),
        ("{caption} barriers", "{caption} x\ny\n:::\n:::{caption} barriers", "is called 'x'"),
    ],
)
def test_a_caption_that_does_not_fit_is_named(root, old, new, message):
    path = root / "chapters" / "01_toy.md"
    path.write_text(CHAPTER.replace(old, new))
    with pytest.raises(CompanionError, match=rf"chapters/01_toy\.md.*{message}"):
        recording.record(ready(root), say=str)
    assert not (root / "data").exists()
    path.write_text(CHAPTER.replace(":alt: Barr", ":atl: Barr"))
    with pytest.raises(BookError, match="no option 'atl'"):  # before anything runs
        ready(root)


def test_another_error_names_the_line_and_writes_nothing(root):
    path = root / "chapters" / "01_toy.md"
    path.write_text(CHAPTER.replace("records = ", "undefined + 1\nrecords = "))
    line = 1 + path.read_text().splitlines().index("undefined + 1")
    with pytest.raises(recording.RecordingFailed, match=f"line {line}: NameError"):
        recording.record(ready(root), say=str)
    assert not (root / "data").exists()


def test_a_large_result_is_refused(root, monkeypatch):
    monkeypatch.setattr(recording, "LIMIT", 2000)
    with pytest.raises(recording.RecordingFailed, match=r"0\.002 MB at most.*'instability'"):
        recording.record(ready(root), say=str)
    assert not (root / "data").exists()


# In pieces


class After:
    """A time limit that is reached when it was asked for the ``n``-th time."""

    def __init__(self, n: int):
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.slow
def test_pieces_give_the_numbers_of_one_recording(root, tmp_path, monkeypatch):
    """Stopped again and again, carried to another machine, and the same bits in the end."""
    whole = stable(recording.record(ready(root, name="whole"), say=str))
    weights = {e.key: e.files() for e in Store().entries() if e.identity["kind"] == "run"}
    stops = 0
    monkeypatch.setenv("COMPANION_RUNS", str(tmp_path / "machine-0"))
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(deadline, "passed", After(31))
            try:
                path = recording.record(ready(root, name="whole-2"), time_limit=600, say=str)
                break
            except OutOfTime as error:
                assert "before the time limit. Stored: " in str(error)
        stops += 1
        assert not (root / "data/recorded/01_toy/whole-2.json").exists()
        carried = tmp_path / f"{stops}.tar"
        archive.write_archive(archive.chosen_entries(Store()), carried)
        monkeypatch.setenv("COMPANION_RUNS", str(tmp_path / f"machine-{stops}"))
        archive.read_archive(carried, Store())
    assert stops >= 4
    assert content(path)["pieces"] == stops + 1
    assert {**stable(path), "name": "whole"} == whole
    again = {e.key: e.files() for e in Store().entries() if e.identity["kind"] == "run"}
    assert again == weights


@pytest.fixture
def as_if_cuda(monkeypatch):
    """The CPU in the GPU's place: training goes its way through the store."""
    monkeypatch.setattr(training_engine, "_on_gpu", lambda device: True)


def test_the_engine_reaches_every_training(root, store, monkeypatch, as_if_cuda):
    """Trunks, copies and the null control, and no cell of the chapter says a word about it."""
    monkeypatch.chdir(root)
    run("record", "01_toy", "--profile", "other", "--gpu-engine", "graphs")
    runs = [e for e in store.entries() if e.identity["kind"] == "run"]
    trained = [e.read_json("made-by.json") for e in runs if "made-by.json" in e.files()]
    assert len(runs) == 10 and {t["engine"] for t in trained} == {"graphs"} and len(trained) == 10
    assert engines.asked_for() == "auto"


def test_on_a_gpu_only_a_dry_run_probes(root, monkeypatch):
    """A probe costs a second or two a recipe, of a time that is lent."""
    asked = []
    real = budget.probe

    def probe(recipe, **where):
        asked.append(recipe)
        return real(recipe, **where)

    monkeypatch.setattr(budget, "probe", probe)
    monkeypatch.setattr(recording, "resolve_device", lambda _: torch.device("cuda"))
    said = []
    recording.record(ready(root), dry_run=True, say=said.append)
    assert len(asked) == 1 and "estimate: " in said[-1]
    said.clear()
    recording.record(ready(root), say=said.append)
    assert len(asked) == 1 and "--dry-run makes one" in said[-1]
    recording.record(ready(root), say=said.append)
    assert "nothing is left to compute" in said[-1]


@pytest.mark.slow
def test_the_limit_stops_training_in_other_processes(store):
    with deadline.until(time.monotonic()), pytest.raises(OutOfTime):
        run_all(abs, [1, 2], workers=2)
    assert run_all(abs, [-1, 2], workers=2) == [1, 2]


def test_the_command_stops_with_75_and_goes_on(root, monkeypatch):
    monkeypatch.chdir(root)
    words = ["record", "01_toy", "--profile", "other", "-p", "ks=[0]"]
    stopped = run(*words, "--time-limit", "0.001", code=75)
    assert "To continue: companion " in stopped.stdout and "estimate" not in stopped.stdout
    assert not (root / "data").exists()
    assert "estimate" in run(*words).stdout
    (path,) = (root / "data/recorded/01_toy").iterdir()
    assert path.name == "other-ks-0.json" and content(path)["pieces"] == 2
    assert "75" in run("record", "--help").stdout


def test_measured_pairs_need_no_networks(root, tmp_path, monkeypatch):
    first = stable(recording.record(ready(root), say=str))
    small = tmp_path / "small.tar"
    archive.write_archive(archive.chosen_entries(Store(), ["pair", "null", "recording"]), small)
    monkeypatch.setenv("COMPANION_RUNS", str(tmp_path / "elsewhere"))
    archive.read_archive(small, Store())
    assert stable(recording.record(ready(root), say=str)) == first
    assert not [e for e in Store().entries() if e.identity["kind"] == "run"]


def test_a_null_control_that_was_stopped_goes_on_and_leaves_nothing(store, monkeypatch):
    from companion.experiments.instability import copy

    run = copy(Recipe(net="mlp:widths=4", data="digits", steps=30), 0, 2, 1)
    evaluation = pairs.Evaluation(points=3, train_examples=20, test_examples=20)
    pairs.load_weights(run)
    before = len(list(store.entries()))
    with monkeypatch.context() as patch, pytest.raises(OutOfTime):
        patch.setattr(deadline, "passed", After(10))
        pairs.check_null(run, evaluation)
    resumed = [e for e in store.entries() if "resume.safetensors" in e.files()]
    assert len(resumed) == 1 and resumed[0].identity["again"] is True
    assert pairs.check_null(run, evaluation).passed
    assert len(list(store.entries())) == before + 1


# Closed before its end


FAR = CHAPTER
for _old, _new in (  # device as a parameter, weights and the onset in a caption, a third claim
    ("lr: float = 0.05\n", 'lr: float = 0.05\ndevice: str = "auto"\n'),
    ('"device": "cpu",', '"device": device,'),
    ('device="cpu",', "device=device,"),
    ("use_style()\n", "use_style()\ndevice = str(data.resolve_device(device))\n"),
    ("import Recipe\n", "import Recipe, load_weights\n"),
    ("for k in ks}", "for k in ks if found.interval(k)}"),
    (
        "fig, ax = plt.subplots()\n",
        "start = load_weights(instability.trunk(recipe, 0), 0, device=device)\n"
        "onset = found.onset()\nfig, ax = plt.subplots()\n",
    ),
    (', values={"first": means[0].value})', ")\npage.fill(onset=str(onset), tensors=len(start))"),
    ("at k = 0: {{first:.3f}}.", "has its onset at {{onset}}; {{tensors}} tensors."),
    (
        "return Statistic(None)\n",
        "return Statistic(found.onset().value)\ndef c03(found): return Statistic(0.5)\n",
    ),
    ('"C02": c02}', '"C02": c02, "C03": c03}'),
    ('{recipe.net}",', "{recipe.net}, {provenance.record()['gpu']['name']}\","),
):
    assert FAR.count(_old) == 1, _old
    FAR = FAR.replace(_old, _new)
GPU = {"name": "NVIDIA H100", "cuda": "13.0"}


@pytest.fixture
def far(root, tmp_path, monkeypatch):
    """A store that a recording on a GPU left behind: its numbers and times, and no weights."""
    (root / "chapters" / "01_toy.md").write_text(FAR)
    real, machine = Run.identity, recording._Piece.machine
    record = provenance.record

    def there(self, fingerprint, device):
        return real(self, fingerprint, "cuda")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "identity", there)
        patch.setattr(provenance, "record", lambda **more: record(**more) | {"gpu": GPU})
        patch.setattr(
            recording._Piece, "machine", lambda self: machine(self) | {"device": "cuda:0"}
        )
        patch.setattr(page, "emit", _no_claims(page.emit))
        with pytest.raises(recording.RecordingFailed):  # stopped at its last cell
            recording.record(ready(root), say=str)
    kinds = {"pair", "null", "recording"}
    moved = archive.write_archive(
        [e for e in Store().entries() if e.identity["kind"] in kinds], tmp_path / "far.tar"
    )
    assert moved.entries == 6
    monkeypatch.setenv("COMPANION_RUNS", str(tmp_path / "here"))
    archive.read_archive(tmp_path / "far.tar", Store())
    return Store()


def _no_claims(emit):
    def some(data, entry):
        if "claims" in entry:
            raise RuntimeError("stopped")
        emit(data, entry)

    return some


def lose(store, *kinds):
    """Take the first entry of each kind out of a store."""
    for kind in kinds:
        next(e for e in store.entries() if e.identity["kind"] == kind).discard()


def test_a_stopped_recording_is_closed_on_another_machine(root, far, monkeypatch):
    """The numbers and the machine of the GPU, on one that has none; nothing is computed."""
    monkeypatch.chdir(root)
    before = [e.key for e in far.entries()]
    done = run("record", "01_toy", "--profile", "other", "--close", "--time-limit", "1")
    assert "closed; missing: nothing" in done.output and "to train" not in done.output
    found = content(root / "data/recorded/01_toy/other.json")
    assert found["closed"] is True and found["missing"] == {}
    assert found["hardware"] == "NVIDIA H100" and found["provenance"]["device"] == "cuda:0"
    assert found["scale"].endswith("NVIDIA H100") and found["pieces"] == 1
    assert found["parameters"]["device"] == "auto"
    assert [c["verdict"] for c in found["claims"]].count(claims.NOT_TESTABLE) == 0
    curve = found["figures"]["instability"]["data"]["mlp, test"]
    assert curve["k"] == [0, 3] and curve["pairs"] == [2, 2]
    # Of weights nothing is made: the caption that counts their tensors is lost, and no number is.
    assert found["figures"]["instability"]["caption"] == recording.LOST
    assert found["figures"]["instability"]["alt"] == "Barriers of the perceptron <8>."
    (problem,) = found["problems"]
    assert "a checkpoint: not measured before the recording was closed" in problem
    assert [e.key for e in far.entries()] == before and closing.device() is None
    again = content(recording.close(ready(root), say=str))
    assert {**again, "date": None} == {**found, "date": None}, "it may be closed again"


def test_what_is_missing_is_left_out_and_counted(root, far):
    lost = next(e for e in far.entries() if e.identity["kind"] == "pair")
    start = lost.identity["start"][1]
    lose(far, "pair", "null")
    said = []
    found = content(recording.close(ready(root), say=said.append))
    assert found["missing"] == {"null": 1, "pair": 1}
    assert said == ["closed; missing: 1 × null, 1 × pair"]
    # Half of the pairs at a k would have an interval of no width: the k counts as not measured.
    curve = found["figures"]["instability"]["data"]["mlp, test"]
    assert curve["k"] == [k for k in (0, 3) if k != start] and curve["pairs"] == [2]
    by_id = {c["claim"]["id"]: c for c in found["claims"]}
    assert by_id["C02"]["verdict"] == claims.NOT_TESTABLE  # it needs the onset, over all k
    assert by_id["C02"]["note"] == closing.WHY
    assert by_id["C03"]["verdict"] != claims.NOT_TESTABLE
    assert by_id["C03"]["note"].endswith("missing: 1 × null, 1 × pair")
    assert any("the onset: pairs at k" in problem for problem in found["problems"])
    record = recorded.load("01_toy", root)[0]
    assert "closed before its end; missing: 1 × null, 1 × pair" in record.title
    assert "closed before its end" in recorded.sentence("01_toy", [record])


def test_closing_under_the_parameters_that_are_whole(root, far):
    """Fewer fork steps than the recording was stopped with: the store says where it ran."""
    for entry in list(far.entries()):
        if entry.identity.get("start", [0, 0])[1] == 3:
            entry.discard()
    found = content(recording.close(ready(root, "ks=[0]"), say=str))
    assert found["missing"] == {} and found["hardware"] == "NVIDIA H100"
    assert found["claims"][1]["verdict"] != claims.NOT_TESTABLE


def test_what_cannot_be_closed(root, far, store, monkeypatch):
    monkeypatch.chdir(root)
    words = ("record", "01_toy", "--profile", "other", "--close", "--dry-run")
    assert "leave --dry-run out" in run(*words, code=2).output
    for entry in list(far.entries()):
        if entry.identity["kind"] == "pair":
            entry.discard()
    with pytest.raises(recording.RecordingFailed, match=r"nothing that a claim needs.*'pair': 4"):
        # C03 stands for no measurement in this toy: leave it out.
        path = root / "chapters" / "01_toy.md"
        path.write_text(path.read_text().replace(', "C03": c03', ""))
        recording.close(ready(root), say=str)
    lose(far, "recording")
    with pytest.raises(BadParameter, match="where 01_toy was recorded; it does not say"):
        recording.close(ready(root), say=str)
    target = ready(root).target
    target.parent.mkdir(parents=True)
    target.write_text("{}")
    with pytest.raises(BadParameter, match="is there already, and was not closed"):
        recording.close(ready(root), say=str)


def test_a_statement_that_fails_takes_its_names_with_it():
    """Else the next figure would be drawn from the last one's numbers."""
    source = """
drawn = 1
drawn = missing()
shown.append(drawn)
for name in ("a", "b"):
    shown.append(name)
    missing()
shown.append(name)
drawn = 2
shown.append(drawn)
others = [missing(), 1]
"""
    namespace = {"shown": [], "missing": closing.refuse_work}
    failed = []
    with closing.closed({"device": "cpu"}):
        partly.execute(
            *(ast.parse(source), "x.py", namespace, set()),
            lambda statement, error: failed.append((statement.lineno, type(error))),
        )
    assert namespace["shown"] == ["a", 2] and "name" not in namespace
    assert failed == [(line, NotMeasured) for line in (3, 5, 11)] and "others" not in namespace


@pytest.mark.parametrize("error", [MissingData("x"), BadParameter("x"), OutOfTime("x")])
def test_what_has_nothing_to_do_with_missing_numbers_ends_it(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        partly.execute(ast.parse("fail()"), "x.py", {"fail": fail}, set(), print)


@pytest.mark.parametrize(
    "work",
    [
        lambda: training.load_weights(Run(TOY)),
        lambda: training.load_state(Run(TOY), 3),
        lambda: training.train([training.Job(Run(TOY), weights=(20,))]),
        lambda: training.throughput(TOY, steps=2, rounds=1),
        lambda: aligned.align(aligned.pairs_of(TOY, 1)),
        lambda: sweep_pairs(aligned.pairs_of(TOY, 1)),
        lambda: merged.merge_runs([[Run(TOY), Run(TOY, init=1)]]),
        lambda: federated.measure_federations([(federated.Federation(recipe=TOY, every=10), 0)]),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_nothing_is_computed_while_a_recording_is_closed(work, device, store):
    with closing.closed({"device": device}), pytest.raises(NotMeasured, match="before the recor"):
        work()
    assert not list(store.entries())


def test_windows_have_their_name_while_a_recording_is_closed(store):
    split = Split.windows(torch.arange(41), 8)
    with closing.closed({"device": "cpu"}):
        digest = save_windows(split, store)
    assert not list(store.entries())
    assert save_windows(split, store) == digest and len(list(store.entries())) == 1


# Without the book's tools


@pytest.mark.slow
def test_no_notebook_tools_are_needed(root, tmp_path):
    program = """
import sys
class Block:
    names = {"IPython", "ipykernel", "jupyter", "jupyter_core", "jupyter_client", "jupytext",
             "papermill", "nbformat", "nbclient", "myst_nb", "platformdirs", "jupyter_book"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Block())
from companion.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, "record", "01_toy", "--profile", "other"],
        cwd=root,
        env={**os.environ, "COMPANION_RUNS": str(tmp_path / "r")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (root / "data/recorded/01_toy/other.json").is_file()


@pytest.mark.parametrize("text", [None, toybook.CHAPTER, CHAPTER])
def test_cells_are_read_as_jupytext_reads_them(text):
    import jupytext

    extra = (
        "\n````{code-cell} python\n---\ntags: [a, b]\n---\nx = '''\n```\n'''\n````\n"
        "\n```{code-cell} python\n:tags: [c]\n:name: n\n\n\n# two blank lines\n```\n"
        "\n```python\nnot_a_cell = 1\n```\n\n```{note}\nno cell\n```\n"
        "\n~~~{code-cell} python\nz = 1\n~~~\n\n```{code-cell} python\n```\n"
    )
    text = text or (ROOT / "chapters/01_instability.md").read_text(encoding="utf-8")
    text += extra.replace("} python", "} ipython3") if "} ipython3" in text else extra
    theirs = [c for c in jupytext.reads(text, fmt="md:myst").cells if c.cell_type == "code"]
    ours = chapter.cells(text, "x")
    assert [c.source for c in ours] == [c.source for c in theirs]
    assert [c.options for c in ours] == [dict(c.metadata) for c in theirs]
    lines = text.splitlines()
    for cell in ours:
        if cell.source:
            assert cell.source.splitlines()[0] == lines[cell.line - 1]


# Archives


@pytest.fixture
def filled(store: Store) -> Store:
    entry = store.entry({"kind": "pair", "x": 1})
    entry.write_json("pair.json", [1, 2])
    entry.write_json("pair.json", [1, 2, 3])  # replaced: another name on disk
    store.entry({"kind": "null", "x": 2}).write_json("gate.json", {})
    return store


def test_an_archive_comes_back_and_what_is_here_stays(filled, tmp_path):
    moved = archive.write_archive(archive.chosen_entries(filled), tmp_path / "a.tar")
    assert (moved.entries, moved.files) == (2, 2)
    other = Store(tmp_path / "other")
    other.entry({"kind": "pair", "x": 1}).write_json("pair.json", "mine")
    got = archive.read_archive(tmp_path / "a.tar", other)
    assert (got.entries, got.files, got.kept) == (2, 1, 1)
    assert other.entry({"kind": "pair", "x": 1}).read_json("pair.json") == "mine"
    assert [e.key for e in other.entries()] == [e.key for e in filled.entries()]
    assert not [line for e in other.entries() for line in e.verify()]
    archive.write_archive(archive.chosen_entries(filled), tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_the_commands_move_a_part(filled, tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    done = run("runs", "export", path, "--kind", "pair")
    assert done.stdout.startswith("1 entries, 1 files")
    run("runs", "export", path, code=2)  # never over an older one
    monkeypatch.setenv("COMPANION_RUNS", str(tmp_path / "o"))
    assert "1 entries: 1 files" in run("runs", "import", path).stdout
    run("runs", "import", tmp_path / "gone.tar", code=2)
    run("runs", "export", tmp_path / "b.tar", "--kind", "pear", code=2)
    run("runs", "export", tmp_path / "no" / "b.tar", code=2)


def rewritten(source: Path, target: Path, change) -> Path:
    """An archive with every member passed through ``change(member, data)``."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            data = file.read()
            for m, d in change(member, data):
                m.size = len(d)
                new.addfile(m, io.BytesIO(d))
    return target


def renamed(name):
    def change(member, data):
        yield member, data
        if member.name.endswith("pair.json"):
            yield tarfile.TarInfo(name), b"x"

    return change


def link(member, data):
    yield member, data
    bad = tarfile.TarInfo(f"{'0' * 64}/link.json")
    bad.type, bad.linkname = tarfile.SYMTYPE, "/etc/passwd"
    yield bad, b""


def damaged(member, data):
    yield member, data.replace(b"[1, 2, 3]", b"[1, 2, 4]")


def other_identity(member, data):
    yield member, data.replace(b'"x": 1', b'"x": 7')


def lost(member, data):
    if not member.name.endswith("gate.json"):
        yield member, data


def twice(member, data):
    yield member, data
    yield tarfile.TarInfo(member.name), data


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (renamed("../../outside.json"), "no file of an entry"),
        (renamed("/tmp/outside.json"), "no file of an entry"),
        (renamed(f"{'0' * 64}/../x"), "no file of an entry"),
        (renamed(f"{'0' * 64}/.hidden"), "no file of an entry"),
        (renamed(f"{'0' * 64}/alone.json"), "identity.json is missing"),
        (link, "no file of an entry"),
        (damaged, "does not match its checksum"),
        (other_identity, "not what its key says"),
        (lost, "not those of its manifest"),
        (twice, "twice"),
    ],
)
def test_a_bad_archive_is_refused_whole(filled, tmp_path, change, why):
    archive.write_archive(archive.chosen_entries(filled), tmp_path / "a.tar")
    bad = rewritten(tmp_path / "a.tar", tmp_path / "bad.tar", change)
    before = {p for p in tmp_path.rglob("*") if "other" not in p.parts}
    with pytest.raises(CorruptEntry, match=why):
        archive.read_archive(bad, Store(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    assert {p for p in tmp_path.rglob("*") if "other" not in p.parts} == before


@pytest.mark.parametrize("cut", [0, 100, 700, 3000])
def test_a_cut_archive_is_refused(filled, tmp_path, cut):
    archive.write_archive(archive.chosen_entries(filled), tmp_path / "a.tar")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:cut])
    with pytest.raises(CorruptEntry, match="not a whole archive"):
        archive.read_archive(tmp_path / "cut.tar", Store(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def declared(size):
    """An archive whose first member says that it has so many bytes."""

    def change(source, target):
        content = bytearray(source.read_bytes())
        header = tarfile.TarInfo(f"{'0' * 64}/identity.json")
        header.size = size
        target.write_bytes(header.tobuf(tarfile.GNU_FORMAT)[:512] + content)
        return target

    return change


def extended(source, target):
    """An archive that begins with an extended header of 4 EB."""
    header = tarfile.TarInfo("./PaxHeaders/x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 62
    target.write_bytes(header.tobuf(tarfile.GNU_FORMAT)[:512] + source.read_bytes())
    return target


@pytest.mark.parametrize("change", [declared(1 << 62), declared(10**12), declared(-1), extended])
def test_sizes_that_no_file_has_are_refused(filled, tmp_path, change):
    archive.write_archive(archive.chosen_entries(filled), tmp_path / "a.tar")
    bad = change(tmp_path / "a.tar", tmp_path / "bad.tar")
    with pytest.raises(CorruptEntry, match="not a whole archive"):
        archive.read_archive(bad, Store(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_an_export_can_always_be_imported(filled, tmp_path):
    damaged, healthy = filled.entries()
    (damaged.path / "identity.json").write_text('{"kind": "another"}')
    with pytest.raises(CorruptEntry, match=r"identity\.json is not what its key says"):
        archive.write_archive(archive.chosen_entries(filled), tmp_path / "a.tar")
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".tmp-*"))
    archive.write_archive([healthy], tmp_path / "a.tar")
    assert archive.read_archive(tmp_path / "a.tar", Store(tmp_path / "other")).entries == 1


@pytest.mark.parametrize("identity", [{"x": 1}, [1], "text", {"kind": 3}, None])
def test_an_identity_of_another_shape_is_not_imported(store, tmp_path, identity):
    entry = store.entry(identity)
    entry.write_json("x.json", 1)
    archive.write_archive([entry], tmp_path / "a.tar")
    with pytest.raises(CorruptEntry, match="no object that names its kind"):
        archive.read_archive(tmp_path / "a.tar", Store(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


# What the book makes of it


@pytest.mark.slow
def test_a_page_draws_what_is_recorded(root, toy):
    """Recorded here, then executed, staged and built: figure, column, front page."""
    shutil.copytree(toy / "build/shown", root / "build/shown")  # the pages around have run
    made = ready(root, "lr=0.2", name="far")
    recording.record(made, say=str)
    book = Book(root)
    for words in (["notebooks"], ["execute"], ["stage"], ["html"]):
        done = toybook.run(root, *words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    html = (book.html("quick") / "chapters" / "01_toy.html").read_text(encoding="utf-8")
    assert 'id="fig-recorded"' in html
    assert html.count("Recorded, profile other") == 1
    record = recorded.load("01_toy", root)[0]
    assert record.data["date"] in html and record.data["hardware"] in html
    front = (book.html("quick") / "index.html").read_text(encoding="utf-8")
    assert '<span class="board-scale">far</span>' in front
    front = (book.html("quick") / "claims.html").read_text(encoding="utf-8")
    assert "Recorded, profile other" in front
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", front))
    assert "Recorded before, at other scales" in words and "2 claims: 1 " in words
    results = content(book.html("quick") / "results.json")
    assert results["chapters"]["01_toy"]["recorded"][0]["name"] == "far"


@pytest.mark.slow
def test_without_records_the_pages_say_so(root, toy):
    assert recorded.load("01_toy", root) == []
    said = recorded.sentence("01_toy", [])
    assert "Nothing is recorded" in said and "companion record 01_toy --profile gpu" in said
    front = (Book(toy).html("other") / "claims.html").read_text(encoding="utf-8")
    assert "Nothing is recorded at a larger scale yet" in front


def test_a_recording_does_not_look_at_other_recordings(root):
    path = recording.record(ready(root), say=str)
    first = stable(path)
    assert stable(recording.record(ready(root), say=str)) == first


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 2}, "has format 2"),
        ({"chapter": "02_x"}, "a record of 02_x"),
        ({"claims": [{}]}, "claims are unreadable"),
        ({"hardware": None}, "'hardware' is missing"),
        ({"date": "yesterday"}, "its date"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_record_stops_the_build(root, change, why):
    path = root / "data/recorded/01_toy/bad.json"
    path.parent.mkdir(parents=True)
    good = {
        **dict.fromkeys(("profile", "name", "hardware", "scale"), "x"),
        "format": 1,
        "chapter": "01_toy",
        "date": "2026-01-01",
        "seconds": 1.0,
        "parameters": {},
        "dataset": {"name": "d"},
        "claims": [],
        "figures": {},
        "provenance": {},
    }
    path.write_text(json.dumps(good))
    assert recorded.load("01_toy", root)[0].dataset == "d"
    path.write_text("{" if change is None else json.dumps({**good, **change}))
    with pytest.raises(CorruptData, match=f"data/recorded/01_toy/bad.json: .*{why}"):
        recorded.load("01_toy", root)


def test_the_real_profiles_fit_their_chapters():
    book = Book(ROOT)
    for profile in book.profiles():
        for name in book.chapters():
            if profile == "quick" or (book.profile_folder(profile) / f"{name}.yaml").is_file():
                recording.prepare(book, name, profile)


# What is typed wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["02_toy", "--profile", "other"], "Did you mean '01_toy'?"),
        (["01_toy", "--profile", "oter"], "Did you mean 'other'?"),
        (["01_toy", "--profile", "nothing"], "it sets nothing for 01_toy"),
        (["01_toy", "--profile", "other", "-p", "step=3"], "Did you mean 'steps'?"),
        (["01_toy", "--profile", "other", "-p", "steps=x"], "'x' is of type str"),
        (["01_toy", "--profile", "other", "-p", "lr=1e-3"], "YAML reads 1e-3 as text"),
        (["01_toy", "--profile", "other", "-p", "lr"], "is not NAME=VALUE"),
        (["01_toy", "--profile", "other", "--time-limit", "0"], "above 0 seconds"),
        (["01_toy", "--profile", "other", "--gpu-engine", "graph"], "Did you mean 'graphs'?"),
        (["01_toy", "--profile", "other", "--name", "../x"], "is needed as a file name"),
        (["01_toy", "--profile", "other", "--root", "nowhere"], "there is no book in"),
    ],
)
def test_typing_errors_cost_nothing(root, monkeypatch, store, words, message):
    monkeypatch.chdir(root)
    assert message in run("record", *words, code=2).output
    assert not list(store.entries()) and not (root / "data").exists()


def test_a_folder_that_cannot_be_written_is_refused_first(root, store, monkeypatch):
    (root / "data").write_text("a file is in the way")
    with pytest.raises(BadParameter, match="cannot be written"):
        ready(root)
    (root / "data").unlink()
    monkeypatch.setattr(recording.os, "access", lambda *_: False)
    with pytest.raises(BadParameter, match="cannot be written"):
        ready(root)


def test_outside_a_recorder_a_script_prints(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    page.text("a sentence")
    assert capsys.readouterr().out == "a sentence\n"


def test_a_network_without_a_valid_pair_leaves_no_empty_curve():
    """Of a network whose pairs all failed a gate a record holds a curve without points."""
    some = {"k": [0, 5], "mean": [4.0, 1.0], "low": [3, 0], "high": [5, 2], "pairs": [3, 3]}
    none = {name: [] for name in some}
    data = {"T": 10, "mlp:widths=9, test": some, "lenet, test": none, "mlp, train": some}
    record = recorded.Record(
        "01_toy", "cpu", "cpu", {},
        {"figures": {"instability": {"data": data}}, "dataset": {"name": "D"}, "hardware": "CPU",
         "date": "2026-01-01"},
    )  # fmt: skip
    ((steps, series),) = recorded.curves([record], "instability").values()
    assert steps == 10 and list(series) == ["two-layer perceptron, test"]
    said = recorded.extremes(record, "instability")
    assert said == "two-layer perceptron, test 4.0 points at k = 0, 1.0 at k = 5"


@pytest.mark.parametrize("chapter", Book(ROOT).chapters())
def test_every_verdict_of_a_chapter_can_be_left_out_by_itself(chapter):
    """Closing leaves out verdicts one by one: `claims.verdicts` judges each by itself."""
    source = (ROOT / "chapters" / f"{chapter}.md").read_text(encoding="utf-8")
    code = "\n".join(cell.source for cell in cells(source, chapter))
    if "claims.show(" in code:  # the page of errata judges nothing
        assert "claims.verdicts(" in code
    assert "claims.judge(" not in code


def test_a_null_control_that_failed_is_known_when_a_recording_is_closed(store, monkeypatch):
    recipe = Recipe(net="mlp:widths=8", data="digits", steps=5, batch=32)
    few = pairs.Evaluation(points=3, train_examples=20, test_examples=20)
    failed = Gate("G1 null control", False, "bits differ", 0.5)
    monkeypatch.setattr(pairs, "_null", lambda *_: failed)
    assert pairs.check_null(Run(recipe), few) == failed
    with closing.closed({"device": "cpu"}) as lacking:
        assert pairs.check_null(Run(recipe), few) == failed and not lacking
        other = pairs.check_null(Run(replace(recipe, lr=0.2)), few)
    assert other.passed is None and set(lacking) == {"null"}
    assert pairs.check_null(Run(recipe), few) == failed  # it was run again


def test_no_two_chapters_have_a_figure_of_one_name():
    """A label stands once in a book; the figure of a record may be drawn in one chapter so far."""
    owners = {}
    for page_name in Book(ROOT).chapters():
        source = (ROOT / "chapters" / f"{page_name}.md").read_text(encoding="utf-8")
        for cell in cells(source, page_name):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "figures.publish":
                    owners.setdefault(ast.unparse(node.args[1]), set()).add(page_name)
        for block in prose.captions(source, str)[1]:
            owners.setdefault(repr(block.name), set()).add(page_name)
    assert len(owners) > 30
    assert not {name: found for name, found in owners.items() if len(found) > 1}


def test_a_refused_recording_keeps_nothing(root, store):
    """It used to write an entry for the time that it had not spent."""
    with pytest.raises(BadParameter, match="k = 999"):
        recording.record(ready(root, "ks=[999]"), say=str)
    assert list(store.entries()) == []
