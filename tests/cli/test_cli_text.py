"""The command line on text, end to end: layers, matching and rotation of GPTs, published GPT-2
files, stored windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import said
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from companion import data, models
from companion.cli.checkpoints import fit, read_checkpoint
from companion.cli.console import INVALID
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.data.text import load_windows, save_windows
from companion.rebasin import fold, random_rotation, transform

L = 8
DATA = f"pydoc?tokenizer=bytes&window={L}"
NET = "gpt:heads=2,layers=1,width=8"
FOLDED = "gpt:bias=false,heads=2,layers=1,tied=false,width=8"
SHORT = ("--points", "3", "--train-examples", "40", "--test-examples", "40", "--max-error", "100")
Theta = dict[str, Tensor]


@pytest.fixture(scope="module")
def classes() -> int:
    return data.load(DATA).classes


def shaken(net: str, classes: int, seed: int) -> Theta:
    """A network with noise on every weight, its tied tensor once."""
    g = Key("noise", seed).generator()
    theta = snapshot(models.build(net, (L,), classes, Key("init", seed)))
    if "tied=false" not in net:
        del theta["lm_head.weight"]
    return {k: v + 0.2 * torch.randn(v.shape, generator=g) for k, v in theta.items()}


def outputs(net: str, theta: Theta, classes: int) -> Tensor:
    module = models.build(net, (L,), classes, Key("init", 0)).eval()
    module.load_state_dict(theta, strict="tied=false" in net)
    with torch.no_grad():
        return module(data.load(DATA).test.x[:5])


@pytest.fixture
def ends(tmp_path: Path, classes: int) -> tuple[Path, Path]:
    for seed, name in enumerate("ab"):
        save_file(shaken(NET, classes, seed), tmp_path / f"{name}.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


def test_layers(ends: tuple[Path, Path], tmp_path: Path) -> None:
    numbers = tmp_path / "x.json"
    words = ("layers", *ends, "--model", NET, "--data", DATA, "--by", "part", "--kinds", "single")
    out = said(*words, *SHORT, "--json", numbers, "--plot", tmp_path / "x.svg")
    assert f"train (40 windows of {L} tokens)" in out and "images" not in out
    found = json.loads(numbers.read_text())
    parts = found["heights"]["single"]["test"]["loss"]
    assert set(parts) == {f"transformer.{n}" for n in ("wte", "wpe", "ln_f")} | {
        f"transformer.h.0.{n}" for n in ("norms", "attn", "mlp")
    }


@pytest.mark.parametrize("per", ["sample", "position"])
def test_features(per: str, ends: tuple[Path, Path]) -> None:
    words = ("features", *ends, "--model", NET, "--data", DATA, "--per", per, "--examples", 40)
    out = said(*words, "--max-error", "100")
    assert f"test (40 windows of {L} tokens)" in out and "images" not in out
    what = "40 windows" if per == "sample" else f"{40 * L} tokens"
    assert f"standard deviation over {what}" in out
    assert "FAIL" in said(*words, code=INVALID), "worse than always the commonest token"


@pytest.mark.parametrize("method", ["units", "activations", "ste"])
def test_permutations_keep_the_file_and_the_function(
    method: str, ends: tuple[Path, Path], tmp_path: Path, classes: int
) -> None:
    out, between = tmp_path / "out.safetensors", tmp_path / "merged.safetensors"
    words = ["rebasin", *ends, "--model", NET, "--data", DATA, "--method", method, *SHORT]
    words += ["--steps", "2"] if method == "ste" else []
    told = said(*words, "-o", out, "--merge", between)
    assert "equal outputs: yes" in told and "images" not in told
    b, aligned = (load_file(p) for p in (ends[1], out))
    assert b.keys() == aligned.keys(), "its own names: the tied tensor once"
    gap = (outputs(NET, b, classes) - outputs(NET, aligned, classes)).abs().max()
    assert float(gap) < 1e-4
    stream = torch.equal(b["transformer.wte.weight"], aligned["transformer.wte.weight"])
    assert stream == (method == "units")
    mean = (load_file(ends[0])["transformer.wpe.weight"] + aligned["transformer.wpe.weight"]) / 2
    assert torch.allclose(load_file(between)["transformer.wpe.weight"], mean)
    said("barrier", ends[0], between, "--model", NET, "--data", DATA, *SHORT)


@pytest.mark.parametrize(
    ("method", "bias"),
    [
        ("folded", "true"),
        ("rotated", "true"),
        ("rotated", "false"),
        ("rotated-heads", "false"),
        ("rotated-activations", "true"),
        ("learned", "true"),
        ("learned-both", "false"),
    ],
)
def test_rotations_write_networks_that_load_under_the_name_they_say(
    method: str, bias: str, tmp_path: Path, classes: int
) -> None:
    net = f"{NET},bias={bias}"
    name = FOLDED if bias == "false" else "gpt:headbias=true,heads=2,layers=1,tied=false,width=8"
    a, b, out, between = (tmp_path / f"{n}.safetensors" for n in ("a", "b", "out", "merged"))
    for seed, path in enumerate((a, b)):
        save_file(shaken(net, classes, seed), path)
    words = ["rebasin", a, b, "--model", net, "--data", DATA, "--method", method, *SHORT]
    numbers = tmp_path / "x.json"
    words += ["--steps", 3] if method.startswith("learned") else []
    told = said(*words, "-o", out, "--merge", between, "--json", numbers)
    assert f"a network of --model {name}" in told
    assert f"the merged network is in folded form, too: --model {name}" in told
    aligned = load_file(out)
    expected = outputs(net, load_file(b), classes)
    gap = (expected - outputs(name, aligned, classes)).abs().max() / expected.abs().max()
    assert float(gap) < 1e-4
    with safe_open(str(between), "pt") as f:
        assert f.metadata()["model"] == name
    found = json.loads(numbers.read_text())
    assert found["outputs"]["largest_relative_difference"] < 1e-5
    assert found["barrier"]["before"]["valid"] and found["barrier"]["after"]["valid"]
    if method != "rotated":
        return
    # what is measured afterwards is what the report measured
    said("rebasin", a, a, "--model", net, "--data", DATA, "--method", "folded", *SHORT,
         "-o", tmp_path / "folded.safetensors")  # fmt: skip
    again = tmp_path / "again.json"
    said("barrier", tmp_path / "folded.safetensors", out, "--model", name, "--data", DATA, *SHORT,
         "--json", again)  # fmt: skip
    after = found["barrier"]["after"]["heights"]["test"]["loss"]["mean"]
    height = json.loads(again.read_text())["heights"]["test"]["loss"]["mean"]
    assert height == pytest.approx(after, abs=1e-5)


def test_a_planted_rotation_is_undone(tmp_path: Path, classes: int) -> None:
    module = models.build(FOLDED, (L,), classes, Key("init", 0))
    folding = fold(module, data.load(DATA).test.x[:2])
    a = folding.apply(shaken(FOLDED, classes, 0))
    g = Key("plant").generator()
    b = transform(folding, a, random_rotation(folding.width, g), folding.units.random(g))
    ends = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for theta, path in zip((a, b), ends, strict=True):
        save_file({k: v.float() for k, v in theta.items()}, path)
    out, between = tmp_path / "out.safetensors", tmp_path / "merged.safetensors"
    words = ("--model", FOLDED, "--in-shape", L, "--classes", classes)
    told = said("rebasin", *ends, *words, "--method", "rotated", "-o", out, "--merge", between)
    assert f"windows of {L} tokens, no data" in told and "100.0 % of its upper bound" in told
    for path in (out, between):
        assert max(float((v - a[k]).abs().max()) for k, v in load_file(path).items()) < 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"--model {NET} --method rotated --matching m.safetensors", "--matching is for permuta"),
        (f"--model {NET} --method rotated --starts 2", "--starts belongs to --method weights"),
        (f"--model {NET} --method rotated-activations --in-shape 8 --classes 256", "looks at data"),
        ("--model mlp:widths=4 --method rotated --data digits", "is no GPT network"),
        ("--model mlp:widths=4 --method units --data digits", "no token embedding"),
        ("--model mine.nets:make --method rotated --data " + DATA, "no name to load it by"),
        (f"--model {NET} --method turned --data {DATA}", "'turned' is not known"),
    ],
)
def test_what_cannot_be_rotated_is_refused(
    words: str,
    message: str,
    ends: tuple[Path, Path],
    tmp_path: Path,
    classes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "nets.py").write_text(
        "from companion.models.gpt import gpt\n"
        "def make(in_shape, classes): return gpt(in_shape, classes, heads=2, layers=1, width=8)\n"
    )
    if "mlp" in words:
        theta = snapshot(models.build("mlp:widths=4", (1, 8, 8), 10, Key("init", 0)))
        for path in ends:
            save_file(theta, path)
    out = said("rebasin", *ends, *words.split(), "-o", "o.safetensors", code=2)
    assert message in out and not (tmp_path / "o.safetensors").exists()


def test_a_checkpoint_with_two_tensors_does_not_fit_a_tied_model(
    ends: tuple[Path, Path], classes: int, tmp_path: Path
) -> None:
    theta = load_file(ends[0])
    other = tmp_path / "two.safetensors"
    save_file({**theta, "lm_head.weight": theta["transformer.wte.weight"] + 1}, other)
    module = models.build(NET, (L,), classes, Key("init", 0))
    with pytest.raises(BadParameter, match=r"differ, but the model ties them.*tied=false"):
        fit(module, read_checkpoint(str(other)), "A")


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Path]:
    """Files as GPT-2's: no prefix, no head, masks, as many rows as tokens (257, not 320)."""
    names = []
    for seed, name in enumerate("pq"):
        theta = shaken(NET, 300, seed)
        theta = {k.removeprefix("transformer."): v.clone() for k, v in theta.items()}
        theta["h.0.attn.bias"] = torch.ones(1, 1, L, L).tril()
        theta["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        names.append(tmp_path / f"{name}.safetensors")
        save_file(theta, names[-1])
    return names[0], names[1]


def test_a_published_gpt2_fits(published: tuple[Path, Path], tmp_path: Path) -> None:
    file = load_file(published[0])
    module = models.build(NET, (L,), 300, Key("init", 0))
    found = fit(module, read_checkpoint(str(published[0])), "A")
    assert all(k.startswith("transformer.") for k in found.theta)
    assert torch.equal(found.theta["transformer.h.0.mlp.c_fc.bias"], file["h.0.mlp.c_fc.bias"])
    assert len(found.theta) == len(file) - 2, "the masks are no weights"
    assert any("'transformer.'" in n and "gelu=tanh" in n for n in found.notes)
    assert any("masks" in n for n in found.notes)
    ours = fit(module, read_checkpoint(str(_renamed(published[0], tmp_path))), "A")
    assert not any("masks" in n or "transformer" in n for n in ours.notes)
    assert all(torch.equal(v, found.theta[k]) for k, v in ours.theta.items())


def _renamed(path: Path, folder: Path) -> Path:
    theta = {f"transformer.{k}": v for k, v in load_file(path).items() if k[4:] != "attn.bias"}
    theta.pop("transformer.h.0.attn.masked_bias")
    save_file(theta, folder / "renamed.safetensors")
    return folder / "renamed.safetensors"


def test_other_entries_are_no_masks(published: tuple[Path, Path], tmp_path: Path) -> None:
    module = models.build(NET, (L,), 300, Key("init", 0))
    strange = tmp_path / "strange.safetensors"
    for name in ("h.0.attn.other", "transformer.wte.weight"):  # the last: in both forms at once
        save_file({**load_file(published[0]), name: torch.zeros(3)}, strange)
        with pytest.raises(BadParameter, match="not in the model"):
            fit(module, read_checkpoint(str(strange)), "A")
    save_file({**load_file(published[0]), "wpe.weight": torch.zeros(1024, 8)}, strange)
    with pytest.raises(BadParameter, match=r"wpe\.weight has shape"):
        fit(module, read_checkpoint(str(strange)), "A")


def test_published_files_on_the_command_line(published: tuple[Path, Path], tmp_path: Path) -> None:
    text = f"pydoc?vocab=300&window={L}"
    facts = data.load(text).text
    assert data.load(text).classes == 320 and facts is not None and facts.vocabulary == 300
    words = ("--model", NET, "--data", text, *SHORT)
    assert "INVALID" not in said("barrier", *published, *words)
    said("layers", *published, *words, "--by", "block", "--kinds", "single")
    out = tmp_path / "out.safetensors"
    said("rebasin", *published, *words, "-o", out)
    b, aligned = (load_file(p) for p in (published[1], out))
    assert b.keys() == aligned.keys() and torch.equal(b["h.0.attn.bias"], aligned["h.0.attn.bias"])
    assert not torch.equal(b["wte.weight"], aligned["wte.weight"])


def test_stored_windows_are_listed_kept_and_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPANION_RUNS", str(tmp_path / "one"))
    split = data.load(DATA).test.head(10)
    digest = save_windows(split, Store())
    out = said("runs", "list", "--kind", "windows")
    assert f"windows of text to measure on, SHA-256 {digest[:12]}" in out and "1 entries" in out
    assert "nothing to remove" in said("runs", "gc", "--yes")
    said("runs", "export", tmp_path / "carried.tar", "--kind", "windows")
    monkeypatch.setenv("COMPANION_RUNS", str(tmp_path / "two"))
    assert "1 entries" in said("runs", "import", tmp_path / "carried.tar")
    assert torch.equal(load_windows(digest, Store()).y, split.y)
