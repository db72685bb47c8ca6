"""``companion merge`` end to end: two networks, several, folders, and what it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import BATCHNORM, Nets, files, run, same, trained
from safetensors.torch import load_file, save_file

from companion import models
from companion.core.seeds import Key
from companion.data import load
from companion.experiments.pairs import Evaluation
from companion.rebasin import derive, merge_many
from companion.report.compare import Answer
from companion.report.compare.case import Case, plain
from companion.report.compare.questions import QUESTIONS
from companion.report.compare.value import ANSWERED
from companion.report.compare.verdicts import findings

NET = "mlp:widths=32x2"
ON = ("--model", NET, "--data", "digits", "--points", "3")
merge = partial(run, "merge")


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Nets:
    found = {name: trained(NET, order=n, init=n, steps=150) for n, name in enumerate("abc")}
    found["twin"] = trained(NET, order=5, init=0, steps=150)
    found |= {f"bn_{n}": trained(BATCHNORM, order=i, init=i) for i, n in enumerate("abc")}
    return files(tmp_path_factory.mktemp("nets"), found)


def test_two_of_one_start_are_averaged_as_they_are(nets, tmp_path):
    out = tmp_path / "m.safetensors"
    said = merge(nets["a"], nets["twin"], *ON, "-o", out).stdout
    assert "the networks share a start" in said
    a, twin, merged = (load_file(p) for p in (nets["a"], nets["twin"], out))
    assert all(torch.allclose(merged[k], (a[k] + twin[k]) / 2) for k in a)


@pytest.mark.slow
def test_two_of_different_starts_are_matched_as_rebasin_does(nets, tmp_path):
    out, numbers, direct = (tmp_path / n for n in ("m.safetensors", "m.json", "d.safetensors"))
    merge(nets["a"], nets["b"], *ON, "-o", out, "--json", numbers)
    rebasin = (*ON, "-o", tmp_path / "b.safetensors", "--merge", direct)
    run("rebasin", nets["a"], nets["b"], *rebasin)
    assert same(load_file(out), load_file(direct))
    found = json.loads(numbers.read_text())
    assert found["method"] == "weights" and found["weights"] == [0.5, 0.5]
    rows = found["merged"]
    assert rows["merged"]["test"]["error"] > rows["A"]["test"]["error"]
    assert found["barriers"]["A, B"]["valid"]
    plain = tmp_path / "plain.safetensors"
    merge(nets["a"], nets["b"], *ON, "-o", plain, "--method", "none", "--json", numbers)
    worse = json.loads(numbers.read_text())["barriers"]["A, B"]["heights"]["test"]["error"]["mean"]
    assert worse > 5 * found["barriers"]["A, B"]["heights"]["test"]["error"]["mean"]


@pytest.mark.parametrize(
    ("options", "name", "method"),
    [((), "MergeMany", "passes"), (("--method", "c2m3"), "C2M3", "c2m3")],
)
def test_three_are_brought_into_the_order_of_the_first(nets, tmp_path, options, name, method):
    out = tmp_path / "m.safetensors"
    said = merge(*(nets[n] for n in "abc"), *ON, "-o", out, "--weights", "2,1,1", *options).stdout
    assert name in said and "B, C" in said
    spec = derive(models.build(NET, (1, 8, 8), 10, Key("x")), torch.randn(2, 1, 8, 8))
    thetas = [load_file(nets[n]) for n in "abc"]
    found = merge_many(spec, thetas, key=Key("rebasin", "cli", 0), method=method)
    moved = [spec.permute(t, found.between(0, i)) for i, t in enumerate(thetas)]
    for name, value in load_file(out).items():
        want = sum(w * t[name] for w, t in zip((0.5, 0.25, 0.25), moved, strict=True))
        assert torch.allclose(value, want, atol=1e-6)


@pytest.mark.slow
def test_statistics_of_three_are_estimated_again(nets, tmp_path):
    outs = [tmp_path / f"{n}.safetensors" for n in ("reset", "none")]
    words = ("--model", BATCHNORM, "--data", "digits", "--points", "3")
    three = [nets[f"bn_{n}"] for n in "abc"]
    said = [merge(*three, *words, "-o", out, "--repair", out.stem).stdout for out in outs]
    assert "BatchNorm estimated again on 1,437 inputs" in said[0]
    reset, plain = map(load_file, outs)
    assert not same(reset, plain)
    assert all(torch.equal(reset[k], plain[k]) for k in reset if k.endswith(("weight", "bias")))


@pytest.mark.slow
def test_it_judges_as_a_report_does(nets, tmp_path):
    digits, heard = load("digits"), set()
    near = {k: 1.01 * v for k, v in load_file(nets["a"]).items()}
    cases = {**nets, **files(tmp_path, {"near": near})}
    for other, examples in (("near", None), ("b", None), ("twin", 25)):
        words = () if examples is None else ("--test-examples", examples)
        out = ("-o", tmp_path / "m.safetensors", "--method", "none")
        said = merge(nets["a"], cases[other], *ON, *out, *words).stdout
        how = Evaluation(3, test_examples=examples)
        thetas = (load_file(nets["a"]), load_file(cases[other]))
        about = (models.build(NET, digits.in_shape, 10), "", how.splits(digits), digits.train, 10)
        case = Case(("a", "b"), thetas, *about, how)
        asked = {n: plain(QUESTIONS[n].ask(case)) for n in ("weights", "ends", "barrier")}
        answers = [Answer(n, "", ANSWERED, values=values) for n, values in asked.items()]
        (basin,) = (f for f in findings("AB", answers) if f.question == "Same basin?")
        assert f"one basin: {basin.verdict} (the rule: {basin.rule}" in said
        heard.add(basin.verdict)
    assert heard == {"yes", "no", "undetermined"}


def test_three_are_repaired(nets, tmp_path):
    out = tmp_path / "m.safetensors"
    said = merge(*(nets[n] for n in "abc"), *ON, "-o", out, "--repair", "forward").stdout
    assert "2 layers corrected" in said and "the network at the weighted mean" in said


def test_names_and_types_are_those_of_the_first_file(nets, tmp_path):
    a = {f"module.{k}": v.half() for k, v in load_file(nets["a"]).items()}
    save_file(a, tmp_path / "a.safetensors")
    out = tmp_path / "m.safetensors"
    merge(tmp_path / "a.safetensors", nets["twin"], *ON, "-o", out, "--method", "none")
    found = load_file(out)
    assert found.keys() == a.keys() and {v.dtype for v in found.values()} == {torch.float16}


@pytest.mark.slow  # transformers takes seconds to be imported
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_transformers_loads_back(tmp_path, monkeypatch, tied):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 12}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)
    nets = []
    for n in range(3):
        with Key("gpt", n).seeded():
            nets.append(GPT2LMHeadModel(config).eval())
        nets[-1].save_pretrained(f"net{n}")
    Path("net0/tokenizer.json").write_text("{}")
    said = merge("net0", "net1", "net2", "-o", "merged", "--method", "none")
    assert "without --data nobody knows" in said.stderr
    assert Path("merged/tokenizer.json").exists()
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert (merged.lm_head.weight is merged.transformer.wte.weight) == tied
    for name, value in merged.state_dict().items():
        want = sum(net.state_dict()[name] for net in nets) / 3
        assert torch.allclose(value, want, atol=1e-6), name
    kept = load_file("merged/model.safetensors").keys()
    assert kept == load_file("net0/model.safetensors").keys()
    again = merge("net0", "net1", "-o", "merged", code=2)
    assert "name a folder that is new" in again.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("a",), "two networks or more"),
        (("a", "b", "--weights", "1"), "must be 2 numbers"),
        (("a", "b", "--weights", "1,-1"), "of 0 or more"),
        (("a", "b", "c", "--method", "activations"), "Allowed: auto, none, weights"),
        (("a", "b", "-o", "folder"), "must end in .safetensors"),
        (("a", "b", "-o", "a"), "which is not overwritten"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(nets, tmp_path, words, why):
    names = {"a": nets["a"], "b": nets["b"], "c": nets["c"]}
    given = [names.get(w, w) for w in words]
    if "-o" not in words:
        given += ["-o", tmp_path / "m.safetensors"]
    assert why in " ".join(merge(*given, *ON, code=2).stderr.split())
    assert not (tmp_path / "m.safetensors").exists()
