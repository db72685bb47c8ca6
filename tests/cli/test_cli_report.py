"""``companion report`` end to end: its numbers are those of the commands that it names."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import BATCHNORM, NET, Nets, files, run, said, trained
from comparisons import HOSTILE
from safetensors.torch import save_file

from companion import data, models
from companion.cli.console import INVALID
from companion.core.seeds import Key
from companion.core.theta import snapshot

SHORT = ("--points", 3, "--train-examples", 60, "--test-examples", 100)
WITH = ("--model", NET, "--data", "digits", *SHORT)
TEXT = "pydoc?tokenizer=bytes&window=8"
GPT = "gpt:heads=2,layers=1,width=8"


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nets:
    monkeypatch.chdir(tmp_path)
    return files(Path(), {name: trained(NET, n, n) for n, name in enumerate("abc")})


def report(*words: object, code: int = 0) -> dict[str, Any]:
    run("report", *words, "-o", "report.html", code=code)
    assert Path("report.html").read_text().lstrip().startswith("<")
    found: dict[str, Any] = json.loads(Path("report.json").read_text())
    return found


def answers(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {a["name"]: a for a in found["answers"]}


def unasked(found: dict[str, Any]) -> dict[str, str]:
    return {a["name"]: a["why"] for a in found["answers"] if a["status"] != "answered"}


def repeated(answer: dict[str, Any]) -> dict[str, Any]:
    """What the command that an answer names finds."""
    words = shlex.split(answer["command"])
    assert words.pop(0) == "companion"
    run(*words, "--json", "single.json")
    found: dict[str, Any] = json.loads(Path("single.json").read_text())
    return found


def agree(ends: dict[str, Any]) -> None:
    """The numbers of a report are those of its commands."""
    line = repeated(ends["barrier"])
    assert ends["barrier"]["values"]["heights"] == line["heights"]
    assert ends["barrier"]["values"]["barrier"] == line["barrier"]
    for name in ("matched", "activation_matched"):
        values, single = ends[name]["values"], repeated(ends[name])
        assert values["heights"] == single["barrier"]["after"]["heights"]
        assert values["barrier"] == single["barrier"]["after"]["barrier"]
        assert values["matching"].keys() == single["matching"].keys()
    merged = repeated(ends["repaired"])["merged"]
    for row in ("A", "B", "merged"):  # A and B there in another order of units, or folded
        for split, numbers in ends["repaired"]["values"]["networks"][row].items():
            exact = 1e-12 if row == "merged" else 1e-6
            assert numbers == pytest.approx(merged[row][split], rel=exact)
    layers, features = repeated(ends["layers"]), repeated(ends["features"])
    assert ends["layers"]["values"]["heights"] == layers["heights"]
    assert ends["features"]["values"]["features"] == features["features"]
    curvature = repeated(ends["curvature"])
    for key in ("barrier", "predictions", "logits", "landscape"):
        assert ends["curvature"]["values"][key] == curvature[key]


@pytest.mark.slow
@pytest.mark.parametrize("net", [NET, BATCHNORM])
def test_the_numbers_are_those_of_the_single_commands(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files(Path(), {name: trained(net, n, n) for n, name in enumerate("ab")})
    words = ("a.safetensors", "b.safetensors", "--model", net, "--data", "digits", *SHORT)
    found = report(*words)
    assert not unasked(found)
    assert found["names"] == ["a.safetensors", "b.safetensors"]
    assert len(found["provenance"]["networks"]["A"]["sha256"]) == 64
    agree(answers(found))
    assert all(one["rule"] and one["sentence"] for one in found["findings"])


@pytest.mark.slow
def test_two_gpts_are_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    classes = data.load(TEXT).classes
    for seed, name in enumerate("ab"):
        theta = snapshot(models.build(GPT, (8,), classes, Key("init", seed)))
        g = Key("noise", seed).generator()
        del theta["lm_head.weight"]
        noisy = {k: v + 0.2 * torch.randn(v.shape, generator=g) for k, v in theta.items()}
        save_file(noisy, f"{name}.safetensors")
    words = ("a.safetensors", "b.safetensors", "--model", GPT, "--data", TEXT)
    found = report(*words, *SHORT, "--max-error", 100)
    ends = answers(found)
    assert "--method rotated " in ends["matched"]["command"]
    assert "--method rotated-activations" in ends["activation_matched"]["command"]
    assert set(unasked(found)) <= {"repaired"}, unasked(found)
    if "repaired" not in unasked(found):
        agree(ends)


def test_what_is_said_and_what_is_left(nets: Nets) -> None:
    result = run(
        "report", nets["a"], nets["b"], *WITH, "-o", "x.html", "--minutes", 0, "--plot", "x.svg"
    )
    assert "nothing to draw" in result.stderr and not Path("x.svg").exists()
    assert "Same basin? not asked" in result.stdout and "numbers written to x.json" in result.stdout
    found = json.loads(Path("x.json").read_text())
    assert {a["status"] for a in found["answers"]} == {"not asked"}
    assert all(" left" in why for why in unasked(found).values())


@pytest.mark.slow
def test_three_networks(nets: Nets) -> None:
    found = report(*nets.values(), *WITH)
    assert not unasked(found) and len(found["names"]) == 3
    values = answers(found)["pairs"]["values"]
    line = repeated({"command": values["commands"]["B, C"]})
    assert values["heights"][1][2] == line["heights"]["test"]["error"]["mean"]
    merged = answers(found)["merged_many"]
    assert merged["command"].startswith("companion merge a.safetensors b.safetensors c.safetensors")
    single = repeated(merged)["merged"]["merged"]["test"]
    assert merged["values"]["networks"]["merged"]["test"] == pytest.approx(single, rel=1e-6)
    agreed = answers(found)["merged_c2m3"]
    assert "--method c2m3" in agreed["command"]
    single = repeated(agreed)["merged"]["merged"]["test"]
    own = agreed["values"]["networks"]["merged by C2M3"]["test"]
    assert own == pytest.approx(single, rel=1e-6)


# --- bad input


def test_without_data_weights_alone_are_looked_at(nets: Nets) -> None:
    found = report(nets["a"], nets["b"], "--model", NET, "--in-shape", "1,8,8", "--classes", 10)
    assert found["data"] is None and "matched" not in unasked(found)
    single = repeated(answers(found)["matched"])
    assert (
        single["matching"]["objective"]
        == (answers(found)["matched"]["values"]["matching"]["objective"])
    )


def test_without_a_model_files_are_compared_as_they_are(nets: Nets) -> None:
    found = report(nets["a"], nets["b"])
    assert list(answers(found)) != list(unasked(found)) and "weights" not in unasked(found)
    assert all("--model: say which" in why for why in unasked(found).values())


def test_other_architectures(nets: Nets) -> None:
    save_file({"one": torch.zeros(2)}, "other.safetensors")
    found = report(nets["a"], "other.safetensors", *WITH, code=INVALID)
    assert answers(found)["weights"]["values"]["only in B, not in A"] == ["one"]
    assert found["findings"][0]["verdict"] == "no"


def test_a_dead_network(nets: Nets) -> None:
    save_file({k: torch.zeros_like(v) for k, v in trained(NET, 1).items()}, "dead.safetensors")
    found = report(nets["a"], "dead.safetensors", *WITH, code=INVALID)
    assert "G0 quality FAIL" in unasked(found)["barrier"]


def test_data_of_another_shape(nets: Nets) -> None:
    words = (nets["a"], nets["b"], "--model", NET, "--data", TEXT, *SHORT)
    found = report(*words, code=INVALID)
    assert "ends" in unasked(found) and "weights" not in unasked(found)


def test_names_are_no_markup(nets: Nets) -> None:
    name = HOSTILE.replace("/", "") + "[red].safetensors"
    Path(name).write_bytes(nets["b"].read_bytes())
    found = report(nets["a"], name, "--minutes", 0)
    assert found["names"][1] == name
    assert "<img" not in Path("report.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a.safetensors"], "two networks or more"),
        (["a.safetensors", "none.safetensors"], "none.safetensors: no such file"),
        (["a.safetensors", "b.safetensors", "--model", "mpl"], "mpl"),
        (["a.safetensors", "b.safetensors", "--data", "digit"], "digit"),
        (["a.safetensors", "b.safetensors", "-o", "report.txt"], "must end in .html"),
        (["a.safetensors", "b.safetensors", "--minutes", "-1"], "--minutes"),
        (["a.safetensors", "b.safetensors", "--train-examples", "-1"], "--train-examples"),
        (["a.safetensors", "b.safetensors", "--points", "4"], "points: 4 must be odd"),
    ],
)
def test_what_is_mistyped_is_said_at_once(words: list[str], told: str, nets: Nets) -> None:
    result = run("report", *words, code=2)
    assert told in result.stderr and not Path("report.html").exists()


def test_help() -> None:
    assert "is a merge worth it" in " ".join(said("report", "--help").split())
