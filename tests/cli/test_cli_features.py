"""``companion features``: the numbers of the library, and one message for bad input."""

from __future__ import annotations

import json

import pytest
from commands import BATCHNORM, NET, run
from safetensors.torch import load_file

from companion import data, models
from companion.cli.console import INVALID
from companion.cli.features import small
from companion.core import codec
from companion.features import (
    MODES,
    Additivity,
    Commutativity,
    Features,
    Stitching,
    commutativity,
    features,
    stitch,
    weak_additivity,
)

WORDS = ("--model", NET, "--data", "digits", "--examples", "100")


@pytest.fixture(scope="module")
def thetas(nets):
    return {name: load_file(path) for name, path in nets.items()}


def test_it_prints_and_writes_the_numbers_of_the_library(nets, thetas, tmp_path):
    out = tmp_path / "x.json"
    words = ("--layers", "*.relu", "--layers", "head", "--alphas", "0.4,0.7")
    result = run("features", nets["a"], nets["b"], *WORDS, *words, "--json", out)
    digits = data.load("digits")
    module = models.build(NET, digits.in_shape, digits.classes)
    a, b, test = thetas["a"], thetas["b"], digits.test.head(100)
    layers = ["*.relu", "head"]
    found = features(module, a, b, test, layers=layers, alphas=(0.4, 0.7))
    written = json.loads(out.read_text())
    assert codec.from_json(Features, written["features"]["none"]) == found
    assert list(written["features"]) == ["none"]
    assert written["valid"] and "provenance" in written and written["a"]["sha256"]
    assert written["settings"] == {"layers": layers, "examples": 100, "per": "sample"}
    assert [x.name for x in found.layers] == ["layer1.relu", "layer2.relu", "head"]
    for layer in found.layers:
        (line,) = [x for x in result.stdout.splitlines() if x.startswith(layer.name)]
        for alpha in (0.4, 0.7):
            assert f"{small(layer.gap[alpha].mean)} ± {small(layer.gap[alpha].std)}" in line
        assert small(layer.ratio(0.4)) in line and f"{layer.c[0.4].median:.3f}" in line
    assert "over 100 images" in result.stdout and "G0 quality pass" in result.stdout
    assert f"bound: {found.errors['a']:.2f} + {found.errors['b']:.2f}" in result.stdout
    assert f"{found.path_loss[0.7]:.4f}" in result.stdout
    assert "INVALID" not in result.stdout


def test_both_batchnorm_modes_are_reported(nets, thetas, tmp_path):
    out = tmp_path / "x.json"
    words = ("--model", BATCHNORM, "--data", "digits", "--examples", "60", "--json", out)
    result = run("features", nets["bn_a"], nets["bn_b"], *words)
    digits = data.load("digits")
    module = models.build(BATCHNORM, digits.in_shape, digits.classes)
    ends, test = (thetas["bn_a"], thetas["bn_b"]), digits.test.head(60)
    want = {m: features(module, *ends, test, bn=m, bn_data=digits.train) for m in MODES}
    written = json.loads(out.read_text())["features"]
    assert {mode: codec.from_json(Features, one) for mode, one in written.items()} == want
    for mode in ("interpolate", "reestimate"):
        assert f"median of c, BatchNorm {mode}" in result.stdout
    one = run("features", nets["bn_a"], nets["bn_b"], *words, "--bn", "reestimate")
    assert "BatchNorm interpolate" not in one.stdout and "layer1.norm" in one.stdout
    assert list(json.loads(out.read_text())["features"]) == ["reestimate"]


def test_conditions_and_stitching(nets, thetas, tmp_path):
    out = tmp_path / "x.json"
    words = (*WORDS, "--conditions", "--stitch", "--json", out)
    result = run("features", nets["a"], nets["b"], *words)
    digits = data.load("digits")
    module = models.build(NET, digits.in_shape, digits.classes)
    ends = (module, thetas["a"], thetas["b"], digits.test.head(100))
    written = json.loads(out.read_text())
    sewn, commuting = stitch(*ends), commutativity(*ends)
    assert codec.from_json(Stitching, written["stitching"]) == sewn
    conditions = written["conditions"]
    assert codec.from_json(Commutativity, conditions["commutativity"]) == commuting
    assert codec.from_json(Additivity, conditions["weak_additivity"]) == weak_additivity(*ends)
    after = result.stdout.partition("stitching")[2]
    for row in sewn.select():
        (line,) = [x for x in after.splitlines() if x.startswith(row.name)]
        assert f"{row.error:.2f}" in line
    assert sewn.row("head").error == sewn.ends["a"].error
    assert small(commuting.layer("head").com) in result.stdout
    assert "Dist_σ" in result.stdout and "opposite signs" in result.stdout


def test_conditions_ask_only_about_the_layers_and_do_without_a_relu(nets, tmp_path):
    out = tmp_path / "x.json"
    words = (*WORDS, "--conditions", "--stitch", "--layers", "head", "--json", out)
    result = run("features", nets["a"], nets["b"], *words)
    assert "no ReLU" in result.output
    written = json.loads(out.read_text())
    assert written["conditions"]["weak_additivity"] is None and written["stitching"]
    assert [x["name"] for x in written["conditions"]["commutativity"]["layers"]] == ["head"]


def test_gates(nets):
    same = run("features", nets["a"], nets["a"], *WORDS, code=INVALID)
    assert "G0b distinct FAIL" in same.stdout and "INVALID as a statement" in same.stdout
    strict = run("features", nets["a"], nets["b"], *WORDS, "--max-error", "0.01", code=INVALID)
    assert "G0 quality FAIL" in strict.stdout and "INVALID as a statement" in strict.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layers layer9", "fits no site"),
        ("--layers layer1.rel", "Did you mean 'layer1.relu'"),
        ("--alphas half", "--alphas: 'half' must be numbers"),
        ("--alphas 0.5,2", "alphas: [0.5, 2.0] must be"),
        ("--bn batch", "--bn: 'batch' is not known"),
        ("--per token", "per: 'token' is not known"),
        ("--per position", "is for token networks"),
        ("--examples 0", "--examples: 0"),
        ("--json nowhere/x.json", "there is no folder"),
    ],
)
def test_bad_input_is_one_message(nets, words, message):
    result = run("features", nets["a"], nets["b"], *WORDS, *words.split(), code=2)
    assert result.stderr.startswith("Error: ") and message in result.stderr


def test_help():
    text = " ".join(run("features", "--help").stdout.split())
    assert "Example: companion features" in text and "--conditions" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0000"), (0.12345, "0.1235"), (2e-8, "2.0e-08"), (float("nan"), "–")],
)
def test_small(value, text):
    assert small(value) == text
