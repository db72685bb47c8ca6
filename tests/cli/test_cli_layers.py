"""``companion layers``: the numbers of the library, a figure, and one message for bad input."""

from __future__ import annotations

import json

import pytest
from commands import BATCHNORM, NET, run, trained

from companion import data, models
from companion.cli.console import INVALID
from companion.core import codec
from companion.layerwise import KINDS, Sweep, sweep

WORDS = ("--model", NET, "--data", "digits", "--train-examples", "200", "--test-examples", "100")


def test_it_prints_and_writes_the_numbers_of_the_library(nets, tmp_path):
    words = (
        "--kinds",
        "single,window",
        "--window",
        "2",
        "--draws",
        "2",
        "--together",
        "layer1,head",
    )
    out = tmp_path / "x.json"
    result = run("layers", nets["a"], nets["b"], *WORDS, *words, "--json", out)
    digits = data.load("digits")
    module = models.build(NET, digits.in_shape, digits.classes)
    found = sweep(
        module,
        trained(NET, 1),
        trained(NET, 2),
        {"train": digits.train.head(200), "test": digits.test.head(100)},
        Sweep(
            kinds=("single", "window"),
            window=2,
            draws=2,
            subsets=(("layer1, head", ("layer1", "head")),),
        ),
        classes=10,
    )
    written = json.loads(out.read_text())
    assert written["valid"] and written["command"] == "layers" and written["provenance"]
    # Settings differ in the numbers of images alone, which the library got as data.
    assert written["layers"] == codec.to_json(found)
    assert written["heights"]["single"]["test"]["loss"] == found.heights("single")
    for label in (
        "whole network",
        "layer2.linear",
        "layer1.linear … layer2.linear",
        "layer1, head",
    ):
        assert label in result.stdout
    assert f"{found.full_height('test'):.4f}" in result.stdout
    assert f"{found.worst()['head']:.4f}" in result.stdout
    assert "rise of the test loss" in result.stdout
    assert "sum of single layers" in result.stdout


@pytest.mark.parametrize("bn", ["interpolate", "reestimate"])
def test_the_batchnorm_mode_is_said(nets, bn):
    words = ("--model", BATCHNORM, "--data", "digits", "--bn", bn, "--kinds", "single")
    few = ("--train-examples", "100", "--test-examples", "60")
    result = run("layers", nets["bn_a"], nets["bn_b"], *words, *few)
    assert f"one layer at a time, BatchNorm {bn}" in result.stdout
    assert "layer1.norm" in result.stdout


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_it_draws_the_same_bytes_each_time(nets, tmp_path, suffix):
    pictures = []
    for number in range(2):
        path = tmp_path / f"{number}.{suffix}"
        run("layers", nets["a"], nets["b"], *WORDS, "--points", "1", "--plot", path)
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1] and len(pictures[0]) > 5000


def test_a_failed_gate_shows_as_invalid(nets):
    words = (*WORDS, "--kinds", "single", "--draws", "1")
    same = run("layers", nets["a"], nets["a"], *words, code=INVALID)
    assert "G0b distinct FAIL" in same.stdout and "INVALID" in same.stdout
    assert "0.0000" not in same.stdout.partition("one layer")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kinds single,shalow", "Did you mean 'shallow'"),
        ("--by stage1", "fits no layer"),
        ("--by 0", "depth 0"),
        ("--together layer9", "fits no layer"),
        ("--kinds window --window 9", "window: 9 layers"),
        ("--points 4", "must be odd"),
        ("--rest c", "rest: 'c'"),
        ("--draws -1", "draws: -1"),
        ("--plot x.gif", "must end in .svg"),
        ("--bn eval", "bn: 'eval'"),
    ],
)
def test_bad_input_is_one_message(nets, words, message):
    result = run("layers", nets["a"], nets["b"], *WORDS, *words.split(), code=2)
    assert result.stderr.startswith("Error: ") and message in result.stderr


def test_help_names_every_kind():
    text = " ".join(run("layers", "--help").stdout.split())
    assert "Example: companion layers" in text
    for kind in KINDS:
        assert kind in text
