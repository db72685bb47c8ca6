"""The command line: the numbers of the library, one clear message for bad input, few imports."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import BATCHNORM, NET, run, spoilt
from safetensors.torch import load_file, save_file

from companion import __version__, data, models, training
from companion.cli import instability as instability_command
from companion.cli.console import INVALID, size
from companion.cli.options import numbers
from companion.cli.runs import describe_entry
from companion.connectivity import BN_MODES, Barrier, barrier
from companion.core import codec
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.experiments import pairs
from companion.experiments.instability import NOISE, analyse
from companion.experiments.measurement import EVALUATION
from companion.experiments.pairs import Evaluation
from companion.training import Recipe, Run


@pytest.fixture
def path_kept(monkeypatch):
    """A copy of sys.path, because a factory of one's own puts the current folder on it."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def library(a: Path, b: Path, net: str = NET, **options) -> Barrier:
    """The barrier as the library measures it when called directly."""
    digits = data.load("digits")
    module = models.build(net, digits.in_shape, digits.classes)
    return barrier(module, load_file(a), load_file(b), digits, **options)


# --- barrier


def test_barrier_prints_and_writes_the_numbers_of_the_library(nets, tmp_path):
    out = tmp_path / "found.json"
    result = run("barrier", nets["a"], nets["b"], "--model", NET, "--data", "digits", "--json", out)
    found = library(nets["a"], nets["b"])
    assert found.valid
    for split in ("train", "test"):
        for metric, digits in (("loss", 4), ("error", 2)):
            numbers_ = [*found.curve.ends(split, metric)]
            numbers_ += [found.height(split, metric, d) for d in ("mean", "linear")]
            shown = r"\s+".join(re.escape(f"{v:.{digits}f}") for v in numbers_)
            assert re.search(rf"{split} {metric}\s+{shown}\s", result.stdout)
    for gate in found.gates:
        assert str(gate) in result.stdout
    assert str(found) in result.stdout
    written = json.loads(out.read_text())
    assert written["barrier"] == codec.to_json(found)
    assert written["heights"]["test"]["error"]["linear"] == found.height(definition="linear")
    assert written["valid"] is True
    assert written["data"]["fingerprint"] == data.load("digits").fingerprint
    assert written["provenance"]["packages"]["torch"]


@pytest.mark.parametrize("bn", BN_MODES)
def test_barrier_measures_all_batchnorm_modes(nets, bn):
    result = run(
        *("barrier", nets["bn_a"], nets["bn_b"], "--model", BATCHNORM, "--data", "digits"),
        *("--bn", bn, "--points", "5"),
    )
    found = library(nets["bn_a"], nets["bn_b"], BATCHNORM, bn=bn, points=5)
    assert f"barrier, BatchNorm {bn}" in result.stdout
    for mode in set(BN_MODES) - {bn}:
        test = f"{found.height('test', bn=mode):.2f}"
        assert re.search(rf"error barrier, BatchNorm {mode}: .* test {test} points", result.stdout)


def test_barrier_of_some_layers_on_a_part_of_the_data(nets, tmp_path):
    out = tmp_path / "found.json"
    run(
        *("barrier", nets["a"], nets["b"], "--model", NET, "--data", "digits", "--points", "5"),
        *("--layers", "layer1", "--layers", "head", "--rest", "b", "--json", out),
        *("--train-examples", "200", "--test-examples", "100"),
    )
    digits = data.load("digits")
    found = barrier(
        models.build(NET, digits.in_shape, digits.classes),
        load_file(nets["a"]),
        load_file(nets["b"]),
        {"train": digits.train.head(200), "test": digits.test.head(100)},
        points=5,
        groups=["layer1", "head"],
        rest="b",
        bn_data=digits.train,
    )
    written = json.loads(out.read_text())
    assert written["barrier"] == codec.to_json(found)
    assert written["barrier"]["curves"]["none"]["sizes"] == {"train": 200, "test": 100}


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_barrier_draws_the_same_bytes_each_time(nets, tmp_path, suffix):
    pictures = []
    for number in range(2):
        picture = tmp_path / f"{number}.{suffix}"
        run(
            *("barrier", nets["a"], nets["b"], "--model", NET, "--data", "digits"),
            *("--points", "3", "--plot", picture),
        )
        pictures.append(picture.read_bytes())
    assert len(pictures[0]) > 1000
    assert pictures[0] == pictures[1]


def test_a_failed_gate_is_invalid_with_an_exit_code_of_its_own(nets, tmp_path):
    out = tmp_path / "found.json"
    same = ("barrier", nets["a"], nets["a"], "--model", NET, "--data", "digits", "--points", "3")
    result = run(*same, "--json", out, code=INVALID)
    assert "G0b distinct FAIL: distance 0" in result.stdout
    assert "INVALID (" in result.stdout
    written = json.loads(out.read_text())
    assert written["valid"] is False
    assert written["heights"]["test"]["error"]["mean"] is None
    strict = (*same[:2], nets["b"], *same[3:], "--max-error", "0.01")
    assert "G0 quality FAIL" in run(*strict, code=INVALID).stdout


def test_wrappers_types_and_ties_are_undone_with_a_note(nets, tmp_path):
    theta = load_file(nets["a"])
    for name, changed, note in (
        ("half", {k: v.half() for k, v in theta.items()}, "float16 weights are cast to float32"),
        ("brain", {k: v.bfloat16() for k, v in theta.items()}, "bfloat16 weights are cast"),
        ("module", {f"module.{k}": v for k, v in theta.items()}, "the prefix 'module.'"),
        ("both", {f"module._orig_mod.{k}": v for k, v in theta.items()}, "'_orig_mod.'"),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(changed, path)
        result = run(
            "barrier", path, nets["b"], "--model", NET, "--data", "digits", "--points", "3"
        )
        assert note in result.stderr
        assert f"A ({path})" in result.stderr
    again = tmp_path / "again.safetensors"
    save_file({k: v.half().float() for k, v in theta.items()}, again)
    shown = [
        run("barrier", p, nets["b"], "--model", NET, "--data", "digits", "--points", "3").stdout
        for p in (tmp_path / "half.safetensors", again)
    ]
    assert shown[0].splitlines()[1:] == shown[1].splitlines()[1:]


OWN = """
from torch import nn

class Tied(nn.Module):
    def __init__(self, in_shape, classes, width):
        super().__init__()
        self.first = nn.Linear(in_shape[0] * in_shape[1] * in_shape[2], width)
        self.middle = nn.Linear(width, width)
        self.again = nn.Linear(width, width)
        self.again.weight = self.middle.weight
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for layer in (self.first, self.middle, self.again):
            x = layer(x.flatten(1)).relu()
        return self.head(x)

def make(in_shape, classes, width=8):
    return Tied(in_shape, classes, width)
"""


def test_a_factory_in_the_current_folder(tmp_path, monkeypatch, path_kept):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "net_of_test_cli.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    spec = "mine.net_of_test_cli:make?width=12"
    shown = run("models", "show", spec, "--data", "digits").stdout
    assert "middle.weight" in shown
    assert "again.weight" not in shown  # tied: counted once
    module = models.build(spec, (1, 8, 8), 10, Key("init", 0))
    theta = snapshot(module)
    save_file(theta, tmp_path / "a.safetensors")
    # As safetensors' save_model may leave it: the tied tensor under its other name only.
    other = {k: v + 0.1 for k, v in theta.items() if k != "middle.weight"}
    save_file(other, tmp_path / "b.safetensors")
    result = run(
        *("barrier", "a.safetensors", "b.safetensors", "--model", spec, "--data", "digits"),
        *("--points", "3", "--max-error", "100"),
    )
    assert "again.weight is the tied middle.weight" in result.stderr
    assert "INVALID" not in result.stdout


def test_checkpoints_of_the_store(store, tmp_path, nets):
    one, two = (
        Run(Recipe(net=NET, data="digits", steps=80, batch=60), order=order) for order in (1, 2)
    )
    training.train(
        [training.Job(one, weights=(40, 80), states=(20,)), training.Job(two, weights=(80,))],
        workers=1,
    )
    digits = data.load("digits")
    first, second = (training.entry_of(r, digits, "cpu", store) for r in (one, two))
    # Model and data are known from the runs; the default is the last step.
    stored = run("barrier", f"run:{first.key[:8]}", f"run:{second.key}@80", "--points", "3")
    direct = run("barrier", nets["a"], nets["b"], "--model", NET, "--data", "digits", "--points", 3)
    assert stored.stdout.splitlines()[2:] == direct.stdout.splitlines()[2:]
    # The store's own files, weights or whole states, by path.
    for name in ("weights-00000040", "state-00000020"):
        path = first.path / f"{name}.safetensors"
        by_path = run(
            *("barrier", path, nets["b"], "--model", NET, "--data", "digits", "--points", "3")
        )
        step = int(name[-8:])
        by_key = run("barrier", f"run:{first.key[:8]}@{step}", f"run:{second.key}", "--points", 3)
        assert f"a run at step {step}" in by_path.stderr
        assert by_path.stdout.splitlines()[2:] == by_key.stdout.splitlines()[2:]
    lost = run("barrier", f"run:{first.key[:8]}@7", f"run:{second.key}", code=2)
    assert "step '7' is not stored. Stored steps: 20, 40, 80." in lost.stderr


def test_a_corrupt_checkpoint_of_the_store(store):
    one = Run(Recipe(net=NET, data="digits", steps=5, batch=60))
    training.train_one(training.Job(one, weights=(5,)))
    entry = training.entry_of(one, data.load("digits"), "cpu", store)
    path = entry.path / "weights-00000005.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    result = run("barrier", f"run:{entry.key}", f"run:{entry.key}", code=1)
    assert "does not match its checksum" in result.stderr


@pytest.fixture(scope="session")
def broken(nets, tmp_path_factory) -> Path:
    """A folder of checkpoints that are none of :data:`NET`."""
    folder = tmp_path_factory.mktemp("broken")
    theta = load_file(nets["a"])
    (folder / "text").write_text("not a tensor in sight")
    (folder / "empty").write_bytes(b"")
    torch.save(torch.nn.Linear(2, 2), folder / "pickle")
    save_file({}, folder / "none")
    return spoilt(theta, folder)


MLP = f"--model {NET} --data digits"
BAD_BARRIERS = {
    "missing file": (f"{{x}}/nowhere {{b}} {MLP}", ["nowhere: no such file", "run:KEY"]),
    "folder": (f"{{x}} {{b}} {MLP}", ["no file of weights"]),
    "text": (f"{{x}}/text {{b}} {MLP}", ["text: this is not a safetensors file"]),
    "empty file": (f"{{x}}/empty {{b}} {MLP}", ["the file is empty"]),
    "pickle": (f"{{a}} {{x}}/pickle {MLP}", ["more than weights", "Linear", "state_dict()"]),
    "no tensors": (f"{{x}}/none {{b}} {MLP}", ["no tensors"]),
    "nan": (f"{{a}} {{x}}/nan {MLP}", ["network B", "nan", "head.bias", "NaN"]),
    "missing entry": (f"{{x}}/less {{b}} {MLP}", ["network A", "less", "head.bias"]),
    "extra entry": (f"{{x}}/more {{b}} {MLP}", ["not in the model ['more']"]),
    "quantised": (f"{{x}}/int8 {{b}} {MLP}", ["int8", "dequantise"]),
    "architecture": (
        "{a} {b} --model mlp:widths=17x2 --data digits",
        ["network A", "a.safetensors", "layer1.linear.weight", "(16, 64)", "(17, 64)"],
    ),
    "unknown model": ("{a} {b} --model resnt20 --data digits", ["resnt20", "resnet20"]),
    "unknown dataset": (f"{{a}} {{b}} --model {NET} --data digit", ["Did you mean 'digits'"]),
    "missing dataset": (
        f"{{a}} {{b}} --model {NET} --data mnist",
        ["MNIST is not in", "companion data get mnist"],
    ),
    "even points": (f"{{a}} {{b}} {MLP} --points 30", ["points: 30 must be odd"]),
    "bn": (f"{{a}} {{b}} {MLP} --bn interpolated", ["Did you mean 'interpolate'"]),
    "layer": (f"{{a}} {{b}} {MLP} --layers layer9", ["layer9", "layer1.linear"]),
    "rest": (f"{{a}} {{b}} {MLP} --rest c", ["rest", "Allowed: a, b"]),
    "train examples": (f"{{a}} {{b}} {MLP} --train-examples 0", ["train_examples: 0"]),
    "device": (f"{{a}} {{b}} {MLP} --device gpu", ["device: 'gpu'", "cuda"]),
    "no model": ("{a} {b} --data digits", ["--model"]),
    "no data": (f"{{a}} {{b}} --model {NET}", ["--data"]),
    "json folder": (f"{{a}} {{b}} {MLP} --json {{x}}/no/x.json", ["there is no folder"]),
    "json is a folder": (f"{{a}} {{b}} {MLP} --json {{x}}", ["is a folder"]),
    "plot": (f"{{a}} {{b}} {MLP} --plot {{x}}/x.gif", ["must end in .svg, .png, .pdf"]),
    "run key": (f"run:zzzz {{b}} {MLP}", ["run key 'zzzz'", "companion runs list"]),
    "factory": (
        "{a} {b} --model no.such:thing --data digits",
        ["cannot import 'no.such'", "PYTHONPATH"],
    ),
}


@pytest.mark.parametrize("case", BAD_BARRIERS)
def test_bad_input_of_barrier(case, nets, broken, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path / "data"))
    words, expected = BAD_BARRIERS[case]
    result = run(
        "barrier", *(w.format(a=nets["a"], b=nets["b"], x=broken) for w in words.split()), code=2
    )
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    for text in expected:
        assert text in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(nets):
    for words in (
        ("barrier", nets["a"], nets["b"], *MLP.split()),
        ("instability", "--net", NET, "--data", "digits", "--steps", "4", "--ks", "0"),
    ):
        assert "sees no GPU here" in run(*words, "--device", "cuda", code=2).stderr


# --- instability

TINY = ("--net", NET, "--data", "digits", "--steps", "60", "--batch", "60", "--workers", "1")


def test_instability_prints_and_writes_the_numbers_of_the_library(tmp_path, store):
    out, picture = tmp_path / "found.json", tmp_path / "found.svg"
    words = ("instability", *TINY, "--ks", "20,0", "--inits", "2", "--copies", "2", "--points", "5")
    first = run(*words, "--json", out, "--plot", picture)
    # 2 trunks to step 20, and 2 copies from each of 2 inits and 2 ks.
    assert "10 runs: 0 in the store" in first.stdout
    assert f"10 to train ({2 * 20 + 4 * 60 + 4 * 40} steps) on cpu" in first.stdout
    again = run(*words)
    assert "10 runs: 10 in the store" in again.stdout
    assert "0 to train (0 steps)" in again.stdout

    recipe = Recipe(net=NET, data="digits", steps=60, batch=60)
    found = analyse(recipe, [0, 20], inits=2, copies=2, evaluation=Evaluation(5), workers=1)
    for k in (0, 20):
        test, train = (found.interval(k, split) for split in ("test", "train"))
        assert test is not None
        assert train is not None
        valid = f"{test.n}/2"
        row = rf"^ *{k}  +" + r"  +".join(map(re.escape, (str(test), str(train), valid)))
        assert re.search(row + rf"  +{found.verdict(k)}", first.stdout, re.MULTILINE)
    for gate in found.samples[0].result.barrier.gates[-2:]:
        assert str(gate) in first.stdout
    written = json.loads(out.read_text())
    assert [row["k"] for row in written["ks"]] == [0, 20]
    interval = found.interval(20, "train", "loss")
    assert interval is not None
    assert written["ks"][1]["train"]["loss"] == dataclasses.asdict(interval)
    steps = {"k": found.onset().value, "earliest": found.onset().low, "latest": found.onset().high}
    assert written["onset"]["test"] == {n: k if k < 60 else None for n, k in steps.items()}
    assert "by the verdicts: k = " in first.stdout
    for sample, pair in zip(found.samples, written["pairs"], strict=True):
        barrier_ = codec.to_json(sample.result.barrier)
        assert (pair["k"], pair["init"], pair["barrier"]) == (sample.k, sample.init, barrier_)
    assert picture.read_text().startswith("<?xml")
    assert f"{len(list(store.entries()))} entries read, 0 problems" in run("runs", "verify").stdout


def test_instability_counts_what_is_stored_already(store):
    common = ("instability", *TINY, "--inits", "1", "--copies", "2", "--points", "3")
    run(*common, "--ks", "0,40")
    finer = run(*common, "--ks", "0,20,40").stdout
    # The trunk has to go to step 20 once more: a state there was not asked for before.
    assert f"7 runs: 4 in the store {store.root}, 3 to train ({20 + 2 * 40} steps)" in finer
    restarted = run(*common, "--ks", "40", "--restart").stdout
    assert "3 runs: 1 in the store" in restarted
    assert "2 to train (120 steps)" in restarted


def test_no_onset_is_told_of_networks_that_have_not_trained(store, tmp_path):
    words = ("instability", "--net", NET, "--data", "digits", "--steps", "2", "--ks", "0,1")
    words += ("--inits", "1", "--copies", "2", "--points", "3", "--workers", "1")
    result = run(*words, "--json", tmp_path / "out.json", code=INVALID)
    assert "INVALID k=1" in result.stdout and "at no k" not in result.stdout
    assert "onset: none can be told, as no pair at k = 1 is valid" in result.stdout
    assert json.loads((tmp_path / "out.json").read_text())["onset"]["test"]["k"] is None


def test_every_recipe_field_can_be_given(monkeypatch):
    seen = {}

    def stop(recipe, ks, **options):
        seen.update(recipe=recipe, ks=ks, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("companion.experiments.instability.analyse", stop)
    run(
        *("instability", "--net", NET, "--data", "digits", "--steps", "50", "--ks", "0 10,20"),
        *("--batch", "20", "--optimizer", "sgd", "--lr", "0.01", "--betas", "0.8,0.9"),
        *("--weight-decay", "1e-4", "--schedule", "step", "--milestones", "0.5,40"),
        *("--gamma", "0.2", "--warmup", "3", "--augment", "crop1", "--precision", "bf16"),
        *("--momentum", "0.5", "--nesterov", "--div", "5", "--final-div", "6"),
        *("--noise", "augment", "--restart", "--restore", "--max-error", "30"),
        *("--bn", "batch", "--points", "7", "--train-examples", "100", "--workers", "3"),
        code=130,
    )
    assert seen["recipe"] == Recipe(
        net=NET,
        data="digits",
        steps=50,
        batch=20,
        optimizer="sgd",
        lr=0.01,
        betas=(0.8, 0.9),
        weight_decay=1e-4,
        schedule="step",
        milestones=(0.5, 40),
        gamma=0.2,
        warmup=3,
        augment="crop1",
        precision="bf16",
        momentum=0.5,
        nesterov=True,
        div=5,
        final_div=6,
    )
    assert seen["ks"] == [0, 10, 20]
    assert (seen["optimizer"], seen["schedule"], seen["noise"]) == ("restore", "restart", "augment")
    assert (seen["max_error"], seen["workers"]) == (30, 3)
    assert seen["evaluation"] == Evaluation(7, "batch", 100)


def test_defaults_of_the_command_are_those_of_the_recipe():
    options = inspect.signature(instability_command.measure_instability).parameters
    for field in dataclasses.fields(Recipe):
        default = options[field.name].default
        if field.name in ("betas", "milestones"):
            assert tuple(numbers(field.name, default, float)) == field.default
        else:
            none = (dataclasses.MISSING, inspect.Parameter.empty)
            assert default == field.default or (field.default, default) == none
    analysed = inspect.signature(analyse).parameters
    for name in ("inits", "copies", "noise", "workers"):
        assert options[name].default == analysed[name].default


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--ks 60", "ks: 60 must be a step from 0 to 59"),
        ("--ks 0,-1", "ks: -1 must be a step"),
        ("--ks 0,x", "--ks: '0,x' must be whole numbers"),
        ("--ks ,", "ks: give at least one"),
        ("--ks 0 --copies 1", "copies: 1"),
        ("--ks 0 --inits 0", "inits: 0"),
        ("--ks 0 --noise order+augment", "noise: 'order+augment' is not known"),
        ("--ks 0 --noise augment", "needs a recipe with augmentation"),
        ("--ks 0 --milestones 0.5", "milestones: only schedule 'step'"),
        ("--ks 0 --betas 0.9", "betas: (0.9,) must be two numbers"),
        ("--ks 0 --batch 5000", "batch: 5000 is more than"),
        ("--ks 0 --lr nan", "lr: nan must be finite"),
        ("--ks 0 --optimizer sdg", "Did you mean 'sgd'"),
        ("--ks 0 --augment crop", "augmentation: 'crop' is not known"),
        ("--ks 0 --points 4", "points: 4 must be odd"),
        ("--ks 0 --workers -1", "workers: -1"),
        ("--ks 0 --net mlp:width=3", "Did you mean 'widths'"),
    ],
)
def test_bad_input_of_instability(words, expected, store):
    result = run("instability", *TINY, *words.split(), code=2)
    assert expected in result.stderr
    assert result.stderr.count("Error: ") == 1
    assert not list(store.entries())


def test_a_run_that_diverges_ends_with_code_1():
    result = run("instability", *TINY, "--ks", "0", "--lr", "1e20", code=1)
    assert "training diverged" in result.stderr


# --- runs


@pytest.fixture
def small_store(store) -> Store:
    """A store with two runs and the pair between them."""
    one, two = (Run(Recipe(net=NET, data="digits", steps=3, batch=60), order=o) for o in (1, 2))
    pairs.measure_pairs([pairs.Pair(one, two)], Evaluation(3), max_error=100, workers=1)
    return store


def test_runs_list_and_show(small_store):
    entries = list(small_store.entries())
    shown = run("runs", "list").stdout
    for entry in entries:
        assert entry.key[:12] in shown
        assert describe_entry(entry.identity) in shown
    total = size(sum(e.bytes() for e in entries))
    assert f"3 entries, {total}, in {small_store.root}" in shown
    assert "1 entries" in run("runs", "list", "--kind", "pair").stdout
    assert "Did you mean 'pair'" in run("runs", "list", "--kind", "pairs", code=2).stderr
    for entry in entries:
        one = run("runs", "show", entry.key[:8]).stdout
        assert entry.key in one
        for name, record in entry.files().items():
            assert re.search(rf"{re.escape(name)}.*{record['sha256'][:12]}", one)
        if entry.identity["kind"] == "pair":
            kept = codec.from_json(Barrier, entry.read_json("pair.json")["barrier"])
            assert str(kept) in one
            refused = run("barrier", f"run:{entry.key}", f"run:{entry.key}", code=2)
            assert "holds no network" in refused.stderr
    assert "found: none" in run("runs", "show", "ffffffffffff", code=2).stderr


def test_an_empty_store(store):
    assert "0 entries, 0 B" in run("runs", "list").stdout
    assert "0 entries read, 0 problems" in run("runs", "verify").stdout
    assert "nothing to remove" in run("runs", "gc").stdout
    assert not store.root.exists()


def test_runs_verify_finds_a_changed_byte(small_store):
    assert "3 entries read, 0 problems" in run("runs", "verify").stdout
    entry = next(e for e in small_store.entries() if e.identity["kind"] == "run")
    path = entry.path / "weights-00000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    result = run("runs", "verify", code=1)
    assert f"{path} does not match its checksum" in result.stdout
    assert "3 entries read, 1 problems" in result.stdout
    run("runs", "verify", entry.key[:10], code=1)
    assert "corrupt" in run("runs", "gc", "--dry-run").stdout


def test_gc_removes_what_no_longer_counts_and_asks_first(small_store):
    kept = {e.key for e in small_store.entries()}
    assert "nothing to remove" in run("runs", "gc", "--yes").stdout
    current = next(e for e in small_store.entries() if e.identity["kind"] == "run").identity
    old = small_store.entry({**current, "semantics": 0})
    fork = {"parent": old.identity, "step": 1, "optimizer": "reset", "schedule": "continue"}
    child = small_store.entry({**current, "fork": fork})
    ends = {"kind": "pair", "a": "0" * 64, "step": 3, "start": None}
    today = {"semantics": EVALUATION, "points": 3}
    orphan = small_store.entry({**ends, "b": old.key, "evaluation": today})
    before = small_store.entry({**ends, "b": "1" * 64, "evaluation": {**today, "semantics": 0}})
    unknown = small_store.entry({"kind": "of another instrument"})
    clients = {"kind": "federated", "clients": 2}
    averaged = small_store.entry({**clients, "semantics": 0})
    for entry in (old, child, orphan, before, unknown, averaged):
        entry.write_json("x.json", [1, 2, 3])
    leftover = unknown.path / ".tmp-of-a-killed-write"
    leftover.write_bytes(b"12345")
    os.utime(leftover, (0, 0))
    gone = {old.key, child.key, orphan.key, before.key, averaged.key}
    byte_count = 5 + sum(
        f.stat().st_size for e in (old, child, orphan, before, averaged) for f in e.path.iterdir()
    )

    dry = run("runs", "gc", "--dry-run").stdout
    assert f"6 to remove, {size(byte_count)}," in dry
    assert all(key in dry for key in gone)
    refused = run("runs", "gc", input="n\n", code=1)
    assert "Delete them?" in refused.stdout
    assert leftover.exists()
    assert {e.key for e in small_store.entries()} == {*kept, *gone, unknown.key}
    assert f"removed 6, {size(byte_count)}" in run("runs", "gc", "--yes").stdout
    assert {e.key for e in small_store.entries()} == {*kept, unknown.key}
    assert not leftover.exists()


# --- data and models


def test_data_commands(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path))
    shown = run("data", "list").stdout
    for entry in data.catalogue():
        assert entry.name in shown
        assert entry.how in shown
    digits = data.load("digits")
    checked = run("data", "check", "digits").stdout
    assert digits.fingerprint in checked
    assert f"train: {len(digits.train):,} images of 1×8×8" in checked
    absent = run("data", "check", "mnist", code=1).stdout
    assert "How to get it: companion data get mnist" in absent
    assert "nothing to download" in run("data", "get", "digits", code=2).stderr
    assert "Did you mean 'mnist'" in run("data", "get", "mnits", code=2).stderr
    assert run("data", "check", "images:nowhere", code=2).stderr.count("Error: ") == 1


def test_data_get_says_where_the_files_are(monkeypatch, tmp_path):
    monkeypatch.setattr("companion.data.download", lambda name: tmp_path / name)
    assert str(tmp_path / "mnist") in run("data", "get", "mnist").stdout


def test_models_commands():
    shown = run("models", "list").stdout
    for listed in models.names():
        assert re.search(rf"^{re.escape(listed.name)} ", shown, re.MULTILINE)
        assert listed.summary in shown
    one = run("models", "show", "resnet8:norm=batch,width=8", "--data", "digits").stdout
    module = models.build("resnet8:width=8", (1, 8, 8), 10)
    assert one.startswith("resnet8:width=8\n")
    assert f"parameters: {models.parameter_count(module):,}\n" in one
    assert f"statistics: {models.parameter_count(module, buffers=True):,}\n" in one
    assert "stage1.0.conv1.weight" in one
    assert re.search(r"^width +8 ", one, re.MULTILINE)
    assert "272,474" in run("models", "show", "resnet20").stdout
    assert "running statistics" not in run("models", "show", "mlp").stdout
    assert "Did you mean" in run("models", "show", "resnet20:widht=8", code=2).stderr


# --- the whole


def test_version_and_help():
    assert run("--version").stdout == f"companion {__version__}\n"
    assert "Example: companion" in " ".join(run("--help").stdout.split())
    commands = {
        ("barrier",): (*BN_MODES, "package.module:factory", "run:KEY@STEP"),
        ("instability",): (*NOISE, *training.recipe.OPTIMIZERS, *training.recipe.SCHEDULES),
        ("data", "list"): (),
        ("data", "get"): (),
        ("data", "check"): (),
        ("models", "list"): (),
        ("models", "show"): (),
        ("runs", "list"): ("run", "pair"),
        ("runs", "show"): (),
        ("runs", "verify"): (),
        ("runs", "gc"): ("--dry-run", "--yes"),
    }
    for words, named in commands.items():
        text = " ".join(run(*words, "--help", env={"COLUMNS": "200"}).stdout.split())
        assert f"Example: companion {' '.join(words)}" in text
        for name in named:
            assert name in text


def test_an_error_that_nobody_thought_of_is_a_message_and_debug_shows_its_traceback(monkeypatch):
    def broken_load(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("companion.data.load", broken_load)
    words = ("models", "show", "mlp", "--data", "images:x")
    said = run(*words, code=1).stderr
    assert "models failed: ZeroDivisionError: a bug (test_cli.py" in said and "--debug" in said
    assert "report" in said and "Traceback" not in said
    for debug in ((*words, "--debug"), ("--debug", *words)):
        said = run(*debug, code=1).stderr
        assert "Traceback" in said and "in broken_load" in said


def test_an_interruption_ends_with_130_and_one_line(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("companion.experiments.instability.analyse", interrupted)
    result = run("instability", *TINY, "--ks", "0", code=130)
    assert result.stderr.count("\n") == 1
    assert "the same command continues" in result.stderr


def test_warnings_of_the_package_reach_the_error_stream(store):
    words = ("instability", *TINY, "--ks", "0", "--inits", "1", "--copies", "2", "--points", "3")
    first = run(*words)
    assert not first.stderr
    entry = next(e for e in store.entries() if e.identity["kind"] == "run")
    (entry.path / "manifest.json").write_text("{")
    # What was measured needs no networks: without the number, the broken one is looked at.
    next(e for e in store.entries() if e.identity["kind"] == "pair").discard()
    assert "corrupt" in run("runs", "list").stdout
    second = run(*words)
    assert second.stderr.startswith("warning: run store: ")
    assert "the entry is discarded and made again" in second.stderr
    assert second.stdout.splitlines()[1:] == first.stdout.splitlines()[1:]


def python(code: str, *commands: tuple[str | Path, ...]) -> subprocess.CompletedProcess[str]:
    """Run command lines in a fresh process, then ``code``."""
    program = (
        "import sys\nfrom companion.cli import main\n"
        f"for words in {[[str(word) for word in words] for words in commands]}:\n"
        "    sys.argv = ['companion', *words]\n"
        "    try:\n        main()\n"
        f"    except SystemExit as end:\n        assert not end.code, end.code\n{code}"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_help_imports_nothing_heavy():
    heavy = ["torch", "numpy", "matplotlib", "sklearn", "pydoc_data"]
    done = python(f"assert not [m for m in {heavy} if m in sys.modules]", ("--help",))
    assert done.returncode == 0, done.stderr
    assert "instability" in done.stdout


@pytest.mark.slow
def test_no_command_imports_the_tools_of_the_book(nets, tmp_path):
    book = ["IPython", "ipykernel", "jupyter_book", "jupyter_core", "jupytext", "nbformat"]
    book += ["papermill", "sphinx", "docutils", "transformers", "companion.book"]
    slow = ["torch._dynamo", "sympy", "sklearn"]  # a training needs none of them
    written = ("--plot", tmp_path / "x.svg", "--json", tmp_path / "x.json")
    done = python(
        f"assert 'torch' in sys.modules\nassert not [m for m in {book + slow} if m in sys.modules]",
        ("barrier", nets["a"], nets["b"], *MLP.split(), "--points", "3", *written),
        ("instability", *TINY, "--ks", "0", "--inits", "1", "--copies", "2", "--points", "3"),
    )
    assert done.returncode == 0, done.stderr
    assert "barrier train" in done.stdout and "on digits" in done.stdout


def test_numbers_and_sizes():
    assert numbers("--ks", "0, 5,,10 ", int) == [0, 5, 10]
    with pytest.raises(BadParameter, match="--ks"):
        numbers("--ks", "1.5", int)
    assert [size(n) for n in (0, 999, 1000, 1234567, 999_999, 5 * 10**12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 MB",
        "1 MB",
        "5 TB",
    ]
