"""``companion rebasin`` end to end: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import BATCHNORM, Nets, files, run, same, spoilt, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from companion import data, models, rebasin, training
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.training import Recipe, Run, build

NET = "mlp:widths=32x2"
SHORT = ("--points", "3", "--train-examples", "200")


align = partial(run, "rebasin")


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Nets:
    found = {
        prefix + end: trained(net, order=seed, init=seed, steps=150)
        for prefix, net in (("", NET), ("bn_", BATCHNORM))
        for seed, end in enumerate("ab")
    }
    return files(tmp_path_factory.mktemp("checkpoints"), found)


def planted(net: str, theta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``theta`` with its units in a random order."""
    module = models.build(net, (1, 8, 8), 10, Key("init", 0))
    spec = rebasin.derive(module, torch.randn(2, 1, 8, 8, generator=Key("x").generator()))
    moved = spec.permute(theta, spec.random(Key("plant").generator()))
    return {k: v.contiguous() for k, v in moved.items()}


def test_report_numbers_and_files(nets, tmp_path):
    files = {n: tmp_path / n for n in ("out.safetensors", "x.json", "x.svg", "m.safetensors")}
    out, numbers, plot, matching = files.values()
    result = align(
        *(nets["a"], nets["b"], "--model", NET, "--data", "digits", "--points", "5", "-o", out),
        *("--json", numbers, "--plot", plot, "--matching", matching),
    )
    assert "permutations: 2, 10^71 ways to order 64 units" in result.stdout
    assert "equal outputs: yes" in result.stdout
    assert "before: barrier train" in result.stdout and "after:  barrier train" in result.stdout
    assert plot.read_text().startswith("<?xml")
    found = json.loads(numbers.read_text())
    before, after = (found["barrier"][w]["heights"]["test"] for w in ("before", "after"))
    for metric in ("loss", "error"):
        for definition in ("mean", "linear"):
            assert 0 <= after[metric][definition] < before[metric][definition] / 2
    assert found["matching"]["share before"] < found["matching"]["share"] < 1
    assert found["outputs"]["largest_relative_difference"] <= 1e-8
    assert found["barrier"]["batchnorm"] is None

    # The file, the permutations and B belong together, and the library finds the same.
    a, b, aligned = (load_file(p) for p in (nets["a"], nets["b"], out))
    module = models.build(NET, (1, 8, 8), 10, Key("init", 0))
    spec = rebasin.derive(module, torch.randn(2, 1, 8, 8, generator=Key("x").generator()))
    stored = rebasin.Matching.load(matching, spec)
    assert same(dict(spec.permute(b, stored.perms)), aligned) and not same(b, aligned)
    direct = rebasin.weight_matching(spec, a, b, key=Key("rebasin", "cli", 0))
    assert all(torch.equal(direct.perms[n], p) for n, p in stored.perms.items())
    with safe_open(str(out), "pt") as f:
        about = f.metadata()
    assert about["format"] == "pt" and about["method"] == "weights"
    assert about["aligned to (sha256)"] == found["a"]["sha256"]
    assert about["made from (sha256)"] == found["b"]["sha256"]


@pytest.mark.parametrize(
    "method", [("activations",), ("ste", "--steps", "20"), ("greedy",), ("weights", "--starts", 2)]
)
def test_every_method_lowers_the_barrier(nets, tmp_path, method):
    out, numbers = tmp_path / "out.safetensors", tmp_path / "x.json"
    result = align(
        *(nets["a"], nets["b"], "--model", NET, "--data", "digits", "-o", out, "--json", numbers),
        *("--points", "5", "--method", *method),
    )
    found = json.loads(numbers.read_text())
    before, after = (
        found["barrier"][w]["heights"]["test"]["error"]["mean"] for w in ("before", "after")
    )
    assert after < before / 2
    assert f"matching by {method[0]}" in result.stdout
    assert ("best of 2 starts" in result.stdout) == ("--starts" in method)


def test_a_planted_permutation_is_undone_and_said(nets, tmp_path):
    moved, out = tmp_path / "moved.safetensors", tmp_path / "out.safetensors"
    a = load_file(nets["bn_a"])
    save_file(planted(BATCHNORM, a), moved)
    words = ("--model", BATCHNORM, "--data", "digits", *SHORT)
    result = align(nets["bn_a"], moved, *words, "-o", out)
    assert same(load_file(out), a)  # running statistics included
    assert "the aligned B is A, bit for bit" in result.stdout
    assert "after:  barrier train 0.00 points, test 0.00 points" in result.stdout
    again = tmp_path / "again.safetensors"
    result = align(nets["bn_a"], out, *words, "-o", again)
    assert "already aligned: no unit moves" in result.stdout
    assert same(load_file(again), a)


def test_batchnorm_is_measured_in_all_modes(nets, tmp_path):
    out, numbers = tmp_path / "out.safetensors", tmp_path / "x.json"
    result = align(
        *(nets["bn_a"], nets["bn_b"], "--model", BATCHNORM, "--data", "digits", *SHORT),
        *("-o", out, "--json", numbers, "--bn", "reestimate"),
    )
    said = json.loads(numbers.read_text())["barrier"]["batchnorm"]
    assert list(said["barriers"]) == ["reestimate", "interpolate", "batch"]
    assert said["gain"] == said["barriers"]["interpolate"] - said["barriers"]["reestimate"]
    assert said["reestimate"] == (said["gain"] > 1)
    assert "running statistics are B's own, permuted" in result.stdout
    b, aligned = load_file(nets["bn_b"]), load_file(out)
    assert aligned["layer1.norm.num_batches_tracked"] == b["layer1.norm.num_batches_tracked"]
    for name in ("layer1.norm.running_mean", "layer2.norm.running_var", "layer1.linear.weight"):
        assert not torch.equal(aligned[name], b[name])
        assert torch.equal(aligned[name].flatten().sort().values, b[name].flatten().sort().values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_names_and_types_of_the_file_are_kept(nets, tmp_path, dtype):
    given, out = tmp_path / "given.safetensors", tmp_path / "out.safetensors"
    b = {f"module._orig_mod.{k}": v.to(dtype) for k, v in load_file(nets["b"]).items()}
    save_file(b, given)
    words = ("--model", NET, "--in-shape", "1,8,8", "--classes", "10")
    result = align(nets["a"], given, *words, "-o", out)
    assert "the prefix 'module.'" in result.stderr
    aligned = load_file(out)
    assert aligned.keys() == b.keys() and {v.dtype for v in aligned.values()} == {dtype}
    for name, value in b.items():
        assert torch.equal(aligned[name].flatten().sort().values, value.flatten().sort().values)
    assert align(nets["a"], out, *words, "-o", tmp_path / "again.safetensors").stdout.count(
        "already aligned"
    )


def test_without_data(nets, tmp_path):
    out = tmp_path / "out.safetensors"
    result = align(
        *(nets["a"], nets["b"], "--model", NET, "--in-shape", "1,8,8", "--classes", "10", "-o", out)
    )
    assert "equal outputs: yes" in result.stdout and "barrier" not in result.stdout
    with_data = tmp_path / "with.safetensors"
    align(nets["a"], nets["b"], "--model", NET, "--data", "digits", *SHORT, "-o", with_data)
    assert same(load_file(out), load_file(with_data))


def test_a_narrow_network_finds_its_units_in_a_wide_one(nets, tmp_path):
    """B is A without some of its units: they are found, and B computes what it did."""
    wide, narrow = "mlp:widths=32x2", "mlp:widths=20x2"
    theta = load_file(nets["a"])
    first, second = (torch.randperm(32, generator=Key(n).generator())[:20] for n in "xy")
    part = {
        **theta,
        "layer1.linear.weight": theta["layer1.linear.weight"][first],
        "layer1.linear.bias": theta["layer1.linear.bias"][first],
        "layer2.linear.weight": theta["layer2.linear.weight"][second][:, first],
        "layer2.linear.bias": theta["layer2.linear.bias"][second],
        "head.weight": theta["head.weight"][:, second],
    }
    save_file({k: v.contiguous() for k, v in part.items()}, tmp_path / "b.safetensors")
    ends = (nets["a"], tmp_path / "b.safetensors", "-o", tmp_path / "out.safetensors")
    shape = ("--in-shape", "1,8,8", "--classes", "10", "--model", wide)
    said = align(*ends, *shape, "--model-b", narrow, "--json", tmp_path / "x.json")
    assert "24 units of weight 0 added" in said.output
    places = json.loads((tmp_path / "x.json").read_text())["places"]
    assert places.keys() == {"layer1.linear", "layer2.linear"}
    for found, planted in zip(places.values(), (first, second), strict=True):
        assert len(set(found)) == 20
        # Larger units than a unit's own may have a larger product with it.
        assert sum(i == j for i, j in zip(found, planted.tolist(), strict=True)) >= 17
    assert error_of(narrow, ends[1]) == error_of(wide, tmp_path / "out.safetensors")
    # The other way round: A has fewer units, and B stays what it is, in A's order.
    turned = (ends[1], nets["a"], "-o", tmp_path / "wide.safetensors", "--in-shape", "1,8,8")
    turned += ("--classes", 10, "--model", narrow, "--model-b", wide, "--json", tmp_path / "y.json")
    said = align(*turned)
    assert "b.safetensors): 24 units of weight 0 added, to be a network of mlp:w" in said.stderr
    back = json.loads((tmp_path / "y.json").read_text())
    assert back["model"] == models.canonical(wide)
    moved = load_file(tmp_path / "wide.safetensors")
    assert error_of(wide, nets["a"]) == error_of(wide, tmp_path / "wide.safetensors")
    for found, planted in zip(back["places"].values(), (first, second), strict=True):
        assert sum(i == j for i, j in zip(found, planted.tolist(), strict=True)) >= 17
    at = back["places"]["layer1.linear"]  # A's unit i beside the unit of B that is in its place
    assert torch.equal(moved["layer1.linear.bias"][:20], theta["layer1.linear.bias"][at])
    unsaid = align(*ends, *shape, code=2).stderr
    assert "(20, 64)" in unsaid and "name B's architecture with --model-b" in unsaid
    away = align(*ends, *shape, "--model-b", "mlp:widths=20x3", code=2).stderr
    assert "missing" in away


def test_runs_of_the_store_say_what_they_are(store, tmp_path):
    runs = [Run(Recipe(net=NET, data="digits", steps=60, batch=60), init=i) for i in (0, 1)]
    training.train([training.Job(r, weights=(60,)) for r in runs], workers=1)
    digits = data.load("digits")
    a, b = (training.entry_of(r, digits, "cpu", store).key for r in runs)
    out = tmp_path / "out.safetensors"
    result = align(f"run:{a[:8]}", f"run:{b}@60", "-o", out, "--max-error", "100", *SHORT)
    assert "mlp:widths=32x2 on digits" in result.stdout and "after:  barrier" in result.stdout
    assert load_file(out).keys() == build(runs[0], digits, torch.device("cpu")).state_dict().keys()


def test_runs_on_data_that_is_not_here_are_matched_without(nets, tmp_path, monkeypatch):
    from companion.cli import checkpoints

    monkeypatch.setenv("COMPANION_DATA", str(tmp_path))
    net = "mlp:widths=8"
    for end in "ab":
        theta = snapshot(models.build(net, (1, 28, 28), 10, Key("init", end)))
        save_file(theta, tmp_path / f"{end}.safetensors")
    read = checkpoints._file

    def known(source: str):
        from dataclasses import replace

        return replace(read(source), recipe={"net": net, "data": "mnist@split-a"})

    monkeypatch.setattr(checkpoints, "_file", known)
    ends = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    result = align(*ends, "-o", tmp_path / "out.safetensors")
    assert "no barrier is measured: MNIST is not in" in result.stderr
    assert "equal outputs: yes" in result.stdout


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_shape, classes, order):
        super().__init__()
        self.hidden = nn.Linear(in_shape[0] * in_shape[1] * in_shape[2], 8)
        self.head = nn.Linear(8, classes)
        self.order = order

    def forward(self, x):
        y = self.hidden(x.flatten(1)).relu()
        if self.order:
            y = torch.from_numpy(y.detach().cumsum(1).numpy())
        return self.head(y)

def make(in_shape, classes, order=False):
    return Net(in_shape, classes, order)

class Sums(nn.Module):
    def forward(self, x):
        return x.cumsum(1)

def summed(in_shape, classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 2, padding=1), nn.ReLU(), Sums(), nn.Flatten(),
        nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, classes),
    )
"""


def test_factories_whose_units_cannot_move(tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "net_of_test_rebasin.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    words = ["--in-shape", "1,2,2", "--classes", "3", "-o", "out.safetensors", "--model"]
    name = "own.net_of_test_rebasin:make"
    sys.path.insert(0, str(tmp_path))
    for end in "ab":
        theta = snapshot(models.build(name, (1, 2, 2), 3, Key("init", end)))
        save_file(theta, f"{end}.safetensors")
    align("a.safetensors", "b.safetensors", *words, name)
    Path("out.safetensors").unlink()
    result = align("a.safetensors", "b.safetensors", *words, f"{name}?order=True", code=2)
    assert "there is nothing to match: " in result.stderr
    assert not Path("out.safetensors").exists()

    name = "own.net_of_test_rebasin:summed"
    for end in "ab":
        save_file(snapshot(models.build(name, (1, 2, 2), 3, Key(end))), f"{end}.safetensors")
    result = align("a.safetensors", "b.safetensors", *words, name)
    assert "held in place: 0.weight[0], 0.bias[0], 4.weight[1]: its order" in result.stdout


@pytest.fixture(scope="module")
def broken(nets, tmp_path_factory) -> Path:
    """A folder of checkpoints that are none of :data:`NET`."""
    return spoilt(load_file(nets["a"]), tmp_path_factory.mktemp("broken"))


SHAPE = "--in-shape 1,8,8 --classes 10"
GOOD = f"--model {NET} {SHAPE} -o {{o}}"
BAD = {
    "nan": (f"{{a}} {{x}}/nan {GOOD}", ["network B", "head.bias", "NaN"]),
    "missing": (f"{{x}}/less {{b}} {GOOD}", ["network A", "missing ['head.bias']"]),
    "extra": (f"{{x}}/more {{b}} {GOOD}", ["not in the model ['more']"]),
    "int8": (f"{{a}} {{x}}/int8 {GOOD}", ["int8", "dequantise"]),
    "architectures": (f"{{a}} {{bn}} {GOOD}", ["network B", "layer1.norm"]),
    "other sizes": (
        f"{{a}} {{b}} --model mlp:widths=31x2 {SHAPE} -o {{o}}",
        ["network A", "(32, 64)", "(31, 64)"],
    ),
    "method": (f"{{a}} {{b}} {GOOD} --method weight", ["Did you mean 'weights'"]),
    "activations": (f"{{a}} {{b}} {GOOD} --method activations", ["--method activations", "--data"]),
    "ste": (f"{{a}} {{b}} {GOOD} --method ste", ["--method ste", "--data"]),
    "plot": (f"{{a}} {{b}} {GOOD} --plot {{x}}/x.svg", ["--plot", "--data"]),
    "no shape": (f"{{a}} {{b}} --model {NET} -o {{o}}", ["--data", "--in-shape"]),
    "half a shape": (
        f"{{a}} {{b}} --model {NET} --classes 10 -o {{o}}",
        ["--in-shape and --classes: without --data both"],
    ),
    "a shape": (
        f"{{a}} {{b}} --model {NET} --in-shape 8,8 --classes 10 -o {{o}}",
        ["in_shape must be (channels, height, width)"],
    ),
    "data and shape": (f"{{a}} {{b}} {GOOD} --data digits", ["leave them out"]),
    "no model": (f"{{a}} {{b}} {SHAPE} -o {{o}}", ["--model"]),
    "starts": (f"{{a}} {{b}} {GOOD} --method greedy --starts 3", ["--starts belongs to"]),
    "no starts": (f"{{a}} {{b}} {GOOD} --starts 0", ["--starts: 0", "1 or more"]),
    "no steps": (
        f"{{a}} {{b}} {GOOD} --method ste --steps 0",
        ["--steps: 0", "1 or more"],
    ),
    "steps": (f"{{a}} {{b}} {GOOD} --steps 3", ["--steps belongs to"]),
    "over A": (f"{{a}} {{b}} --model {NET} {SHAPE} -o {{a}}", ["is A, which is not overwritten"]),
    "over B": (f"{{a}} {{b}} --model {NET} {SHAPE} -o {{b}}", ["is B, which is not overwritten"]),
    "json over A": (f"{{a}} {{b}} {GOOD} --json {{a}}", ["--json", "not overwritten"]),
    "one file": (f"{{a}} {{b}} {GOOD} --matching {{o}}", ["a file of its own"]),
    "suffix": (f"{{a}} {{b}} --model {NET} {SHAPE} -o {{x}}/x.pt", ["must end in .safetensors"]),
    "folder": (f"{{a}} {{b}} --model {NET} {SHAPE} -o {{x}}/no/x.safetensors", ["no folder"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, nets, broken, tmp_path):
    words, expected = BAD[case]
    out = tmp_path / "out.safetensors"
    before = {name: path.read_bytes() for name, path in nets.items()}
    paths = {"a": nets["a"], "b": nets["b"], "bn": nets["bn_b"], "x": broken, "o": out}
    result = align(*(w.format(**paths) for w in words.split()), code=2)
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    for text in expected:
        assert text in result.stderr
    assert not out.exists()
    assert before == {name: path.read_bytes() for name, path in nets.items()}


def error_of(net: str, path: Path) -> float:
    digits = data.load("digits")
    module = models.build(net, (1, 8, 8), 10, Key("init", 0))
    module.load_state_dict(load_file(path))
    wrong = module.eval()(digits.test.x).argmax(1) != digits.test.y
    return 100 * float(wrong.double().mean())


@pytest.mark.parametrize("repair", ["none", "reset", "forward", "closed"])
def test_merging_two_checkpoints_with_one_command(nets, tmp_path, repair):
    """The merged file is a network as it stands, and better than the plain mean of A and B."""
    prefix = "bn_" if repair == "reset" else ""
    net = BATCHNORM if prefix else NET
    a, b = nets[prefix + "a"], nets[prefix + "b"]
    merged, numbers = tmp_path / "merged.safetensors", tmp_path / "x.json"
    align(
        *(a, b, "--model", net, "--data", "digits", "-o", tmp_path / "out.safetensors", *SHORT),
        *("--merge", merged, "--repair", repair, "--json", numbers),
    )
    found = json.loads(numbers.read_text())["merged"]
    assert found["merged"]["test"]["error"] == pytest.approx(error_of(net, merged), abs=1e-9)
    mean = {k: (v + load_file(b)[k]) / 2 for k, v in load_file(a).items() if v.is_floating_point()}
    save_file({**load_file(a), **mean}, tmp_path / "mean.safetensors")
    assert error_of(net, merged) < error_of(net, tmp_path / "mean.safetensors") / 2
    with safe_open(str(merged), "pt") as f:
        assert f.metadata()["alpha"] == "0.5"


def test_alpha_0_is_a(nets, tmp_path):
    merged = tmp_path / "merged.safetensors"
    align(
        *(nets["a"], nets["b"], "--model", NET, "--data", "digits", *SHORT),
        *("-o", tmp_path / "out.safetensors", "--merge", merged, "--alpha", 0),
    )
    assert same(load_file(merged), load_file(nets["a"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--merge", "m.safetensors", "--alpha", 2), "must lie between 0"),
        (("--alpha", 0.3), "belong to --merge"),
        (("--merge", "m.safetensors", "--repair", "forwards"), "Did you mean 'forward'"),
        (("--merge", "out.safetensors"), "each needs a file of its own"),
    ],
)
def test_merging_with_bad_options(nets, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    result = align(
        *(nets["a"], nets["b"], "--model", NET, "--data", "digits", *SHORT),
        *("-o", "out.safetensors", *words),
        code=2,
    )
    assert message in " ".join(result.output.split())
