"""``companion landscape``: the numbers of the library, a figure, and one message for bad input."""

from __future__ import annotations

import json

import pytest
from commands import BATCHNORM, NET, run, trained
from safetensors.torch import save_file

from companion import data, models
from companion.core import codec
from companion.experiments.landscape import Geometry, Survey, geometry
from companion.landscape import Surface, top_eigenvalues

FEW = ("--train-examples", "100", "--test-examples", "60")
WORDS = ("--model", NET, "--data", "digits", *FEW)


def test_it_prints_and_writes_the_numbers_of_the_library(nets, tmp_path):
    start = trained(NET, 1, steps=1)
    save_file(dict(start), tmp_path / "w0.safetensors")
    out, picture = tmp_path / "x.json", tmp_path / "x.svg"
    words = ("--init", tmp_path / "w0.safetensors", "--json", out, "--plot", picture)
    result = run("landscape", nets["a"], nets["b"], *WORDS, "--eigenvalues", "2", *words)
    digits = data.load("digits")
    module = models.build(NET, digits.in_shape, digits.classes)
    a, b = trained(NET, 1), trained(NET, 2)
    splits = {"train": digits.train.head(100), "test": digits.test.head(60)}
    found = geometry(module, a, b, splits, Survey(), {"init": (start, start)})
    written = json.loads(out.read_text())
    assert written["valid"] and written["command"] == "landscape" and written["provenance"]
    assert codec.from_json(Geometry, written["landscape"]) == found
    assert written["barrier"]["test"] == found.barrier("test")
    assert written["predictions"] == found.predictions()
    assert written["logits"]["barrier"] == pytest.approx(found.barrier(), abs=1e-6)
    top = top_eigenvalues(Surface(module, splits["train"]), a, 2)
    assert written["eigenvalues"]["A"]["values"] == list(top.values)
    for value in (
        f"{found.a.curvature:.4f}",
        f"{found.barrier():.4f}",
        f"{found.predictions()['quintic']:.4f}",
        f"{found.layers('b')['head']:.4f}",
        f"{top.values[0]:.3g} ±",
        "angle at init",
        "layer2.linear",
    ):
        assert value in result.stdout, value
    assert "<svg" in picture.read_text()[:400]


def test_the_batchnorm_mode_is_said_and_parts_can_be_left_out(nets):
    words = ("--model", BATCHNORM, "--data", "digits", *FEW, "--points", "3", "--eigenvalues", "0")
    result = run("landscape", nets["bn_a"], nets["bn_b"], *words, "--bn", "batch", "--by", "none")
    assert "nats, BatchNorm batch" in result.stdout
    assert "eigenvalues" not in result.stdout and "each layer alone" not in result.stdout
    assert "headline batch" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bn", "reestimate"), "--bn: 'reestimate' is not known"),
        (("--eigenvalues", "-1"), "--eigenvalues: -1"),
        (("--points", "4"), "points: 4 must be odd"),
        (("--by", "nothing"), "groups: 'nothing' is not known"),
        (("--init", "gone.safetensors"), "gone.safetensors"),
        (("--plot", "x.gif"), "must end in"),
    ],
)
def test_bad_input_is_one_message(nets, words, message):
    result = run("landscape", nets["a"], nets["b"], *WORDS, *words, code=2)
    assert message in result.stderr and "Traceback" not in result.output
