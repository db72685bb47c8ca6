"""What people have, end to end: their files, their networks, on the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from companion import models
from companion.core.seeds import Key
from companion.core.theta import check_theta, snapshot
from companion.rebasin import derive

Theta = Mapping[str, Tensor]
SMALL = ("--points", "3", "--train-examples", "100", "--test-examples", "100")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Files of these names lie in the current folder, and factories are found there."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


def planted(module: nn.Module, example: Tensor) -> tuple[Theta, Theta]:
    """A network and the same with its units in another order."""
    with Key("found").seeded():
        for p in module.parameters():  # fresh norms and biases are equal: no unit could be told
            p.data.add_(0.1 * torch.randn(p.shape))
    theta = snapshot(module)
    spec = derive(module, example, unread="hold")
    moved = spec.permute(theta, spec.random(Key("plant").generator()))
    return theta, {k: v.contiguous() for k, v in moved.items()}


def undone(theta: Theta, module: nn.Module) -> None:
    """The file that was written is ``theta``, up to what a file leaves to the model."""
    found = check_theta(module, load_file("out.safetensors"), "out")
    for name, value in found.items():
        assert torch.equal(value, theta[name]), name


@pytest.mark.slow
def test_two_resnets_of_torchvision_in_files_of_trainings():
    module = models.build("torchvision:resnet18", (3, 32, 32), 10, Key("net"))
    a, b = planted(module, torch.randn(2, 3, 32, 32))
    torch.save({"epoch": 90, "state_dict": {f"module.{k}": v for k, v in a.items()}}, "a.pth")
    averaged = {"n_averaged": torch.tensor(5)} | {f"module.{k}": v for k, v in b.items()}
    torch.save({"model": averaged, "optimizer": {"state": {}}}, "b.pth")
    where = ("--model", "torchvision:resnet18", "--in-shape", "3,32,32", "--classes", "10")
    said = run("rebasin", "a.pth", "b.pth", *where, "-o", "out.safetensors")
    assert "A (a.pth): its weights are under state_dict; the prefix 'module.'" in said.stderr
    assert said.stderr.count("note: ") == 2  # one for each file
    undone(a, module)
    assert load_file("out.safetensors").keys() == averaged.keys()  # in B's own form


def test_a_folder_in_shards_is_its_own_architecture():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 12}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    with Key("gpt").seeded():
        module = GPT2LMHeadModel(config)
    a, b = planted(module, torch.randint(50, (2, 12)))
    for name, theta in (("a", a), ("b", b)):
        module.load_state_dict(dict(theta))
        module.save_pretrained(name, max_shard_size="8KB")
    assert len(list(Path("a").glob("*.safetensors"))) > 1
    said = run("rebasin", "a", "b/model.safetensors.index.json", "-o", "out.safetensors")
    assert "shards" in said.stderr and "hf:a on windows of 12 tokens" in said.stdout
    undone(a, module)


SIZES = {"d_model": 8, "vocab_size": 40}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SIDES = {"image_size": 8, "patch_size": 4}


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (
            "T5ForConditionalGeneration",
            SIZES | {"d_kv": 4, "d_ff": 8, "num_layers": 1},
            "32 tokens",
        ),
        (
            "WhisperForConditionalGeneration",
            SIZES | LAYERS | HEADS | {"num_mel_bins": 4, "max_source_positions": 6},
            "examples of 4×12",
        ),
        ("CLIPModel", {"text_config": TEXT, "vision_config": TEXT | SIDES}, "images of 3×8×8"),
        ("ResNetForImageClassification", {"hidden_sizes": [4], "depths": [1]}, "3×224×224"),
        (
            "RobertaForMaskedLM",
            TEXT | {"max_position_embeddings": 12, "vocab_size": 40},
            "10 tokens",
        ),
    ],
)
def test_folders_of_networks_with_several_inputs(kind, options, says):
    """Decoders get tokens, beside images stands a text; speech and images say their sizes."""
    import transformers

    made = getattr(transformers, kind)
    for name in "ab":
        with Key("several", name).seeded():
            made(made.config_class(**options)).save_pretrained(name)
    said = run("rebasin", "a", "b", "-o", "out.safetensors")
    assert says in said.stdout and "equal outputs: yes" in said.stdout


def test_names_that_transformers_translates():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8, num_labels=3)
    module = ViTForImageClassification(config)
    a, b = planted(module, torch.randn(2, 3, 16, 16))
    for name, theta in (("a", a), ("b", b)):
        module.load_state_dict(dict(theta))
        module.save_pretrained(name)
    file = load_file("b/model.safetensors")
    said = run("rebasin", "a", "b", "-o", "out.safetensors")
    undone(a, module)
    assert load_file("out.safetensors").keys() == file.keys()
    if file.keys() != module.state_dict().keys():
        assert " is vit." in said.stderr


def test_a_mixture_of_experts_as_transformers_writes_it():
    """Mixtral in memory has a stack of experts; its file has every expert's matrices by name."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    with Key("mixtral").seeded():
        module = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_experts_per_tok=2))
    a, b = planted(module, torch.randint(40, (2, 8)))
    for name, theta in (("a", a), ("b", b)):
        module.load_state_dict(dict(theta))
        module.save_pretrained(name)
    stored = load_file("b/model.safetensors").keys()
    assert any(".experts.2." in n for n in stored) and stored != b.keys()
    said = run("rebasin", "a", "b", "-o", "out.safetensors", "--json", "said.json")
    assert "hf:a on windows of" in said.stdout
    groups = json.loads(Path("said.json").read_text())["spec"]["groups"]
    assert 3 in groups.values() and 12 in groups.values()  # experts, and the units of each
    undone(a, module)
    Path("out.safetensors").replace("b/model.safetensors")  # transformers reads it, too
    back = MixtralForCausalLM.from_pretrained("b").state_dict()
    assert all(torch.equal(back[name], value) for name, value in a.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rotated", "rotated-activations", "learned"])
def test_a_folder_of_pythia_is_rotated_and_loads_under_the_name_that_is_said(method):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1}
    config = GPTNeoXConfig(
        **sizes, num_attention_heads=2, vocab_size=257, max_position_embeddings=16, rotary_pct=0.5,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with Key("neox").seeded():
        module = GPTNeoXForCausalLM(config).eval()
    x = torch.randint(200, (2, 8), generator=Key("tokens").generator())
    for name, theta in zip("ab", planted(module, x), strict=True):
        module.load_state_dict(dict(theta))
        module.save_pretrained(name)
    expected = module(x).logits
    more = ("--data", "pydoc?tokenizer=bytes&window=8", "--max-error", 100, *SMALL)
    more += ("--steps", 2) if method == "learned" else ()
    said = run("rebasin", "a", "b", "--method", method, *more, "-o", "out.safetensors")
    name = "hf:a?headbias=true,tie_word_embeddings=false"
    assert f"a network of --model {name}" in said.stdout
    assert "held in place: gpt_neox.layers.0.attention.query_key_value.weight[0]" in said.stdout
    folded = models.build(name, (8,), 257)
    folded.load_state_dict(load_file("out.safetensors"))
    assert torch.allclose(folded.eval()(x).logits, expected, atol=1e-4)
    if method != "rotated":
        return
    run("rebasin", "a", "a", "--method", "folded", *more[:6], "-o", "a.safetensors")
    one, other = load_file("a.safetensors"), load_file("out.safetensors")
    assert max(float((one[k] - other[k]).abs().max()) for k in one) < 1e-4  # B was A, planted


NETS = """
import torch
from torch import nn

def mlp(in_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))

class Record(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(None, 10)
    def forward(self, x):
        return {"hidden": x.long(), "logits": self.net(x)[..., None, None]}

class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.emb, self.mid = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        if tied:
            self.head.weight = self.emb.weight
    def forward(self, i):
        return self.head(self.mid(self.emb(i)).relu())

table = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
boundless = nn.Sequential(nn.Linear(64, 3))

def empty():
    raise AssertionError

def meta():
    return nn.Linear(64, 10, device="meta")

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(10))

class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.out = nn.Parameter(torch.randn(9, 6)), nn.Linear(6, 9)
    def forward(self, i):
        return self.out(nn.functional.embedding(i, self.rows).relu())

class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(2, 2)
    def forward(self, x):
        return {}["x"]
"""


def test_a_checkpoint_of_lightning():
    """As its Trainer writes one: the module under an attribute, a loss's weights beside it."""
    Path("nets.py").write_text(NETS)
    module = models.build("nets.py:mlp", (1, 8, 8), 10, Key("net"))
    ends = planted(module, torch.randn(2, 1, 8, 8))
    for name, theta in zip("ab", ends, strict=True):
        state = {f"model.{k}": v for k, v in theta.items()} | {"criterion.weight": torch.ones(10)}
        facts = {"epoch": 3, "global_step": 90, "pytorch-lightning_version": "2.5.0"}
        more = {"callbacks": {"ModelCheckpoint{'monitor': None}": {"best": torch.tensor(0.1)}}}
        optimiser = {"optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]}
        torch.save({**facts, "state_dict": state, **more, **optimiser}, f"{name}.ckpt")
    where = ("--model", "nets:mlp", "--in-shape", "1,8,8", "--classes", "10")
    said = run("rebasin", "a.ckpt", "b.ckpt", *where, "-o", "out.safetensors")
    assert "beside the network (criterion.weight) is left out" in said.stderr
    undone(ends[0], module)


def test_a_network_of_timm():
    pytest.importorskip("timm")
    module = models.build("timm:test_resnet", (3, 32, 32), 10, Key("net"))
    a, b = planted(module, torch.randn(2, 3, 32, 32))
    save_file(dict(a), "a.safetensors")
    torch.save(dict(b), "b.pt")
    where = ("--model", "timm:test_resnet", "--in-shape", "3,32,32", "--classes", "10")
    run("rebasin", "a.safetensors", "b.pt", *where, "-o", "out.safetensors")
    undone(a, module)


def test_records_are_measured_by_every_command():
    Path("nets.py").write_text(NETS)
    for name in "ab":
        module = models.build("nets.py:Record", (1, 8, 8), 10, Key(name))
        torch.save(module.state_dict(), f"{name}.pt")
    where = ("a.pt", "b.pt", "--model", "nets.py:Record", "--data", "digits", "--max-error", "100")
    assert "barrier train" in run("barrier", *where, *SMALL).stdout
    assert "whole network" in run("layers", *where, *SMALL).stdout
    assert "features" in run("features", *where, "--examples", "50", "--stitch").stdout
    run("rebasin", *where, *SMALL, "--method", "activations", "-o", "out.safetensors")


def test_a_tied_file_is_aligned_beside_an_untied_one():
    """Where the units of the two matrices come to move apart, the file gets the second one."""
    Path("nets.py").write_text(NETS)
    tied, untied = (models.build(f"nets.py:Tied?tied={t}", (4,), 9, Key("t")) for t in (1, 0))
    save_file({k: v for k, v in snapshot(tied).items() if k != "head.weight"}, "tied.safetensors")
    save_file(snapshot(untied), "untied.safetensors")
    where = ("--model", "nets.py:Tied?tied=false", "--in-shape", "4", "--classes", "9")
    said = run("rebasin", "untied.safetensors", "tied.safetensors", *where, "-o", "out.safetensors")
    assert "head.weight is not stored, since it was tied: it is emb.weight" in said.stderr
    out = load_file("out.safetensors")
    assert "head.weight" in out and not torch.equal(out["head.weight"], out["emb.weight"])
    untied.load_state_dict(out)
    tokens = torch.randint(9, (3, 4))
    assert torch.allclose(untied(tokens), tied(tokens), atol=1e-6)


def test_lazy_layers_and_tokens_looked_up_by_hand():
    Path("nets.py").write_text(NETS)
    for factory, shape, classes in (("lazy", (1, 8, 8), 10), ("Rows", (5,), 9)):
        for name in "ab":
            net = models.build(f"nets.py:{factory}", shape, classes, Key("net", name))
            torch.save(net.state_dict(), f"{name}.pt")
        sizes = (
            "--in-shape",
            ",".join(map(str, shape)),
            "--classes",
            classes,
            "-o",
            "c.safetensors",
        )
        said = run("rebasin", "a.pt", "b.pt", "--model", f"nets.py:{factory}", *sizes)
        assert "permutations: 1" in said.stdout


def test_rows_of_a_table_without_data():
    Path("nets.py").write_text(NETS)
    ends = planted(models.build("nets.py:table", (5,), 2), torch.randn(2, 5))
    for name, theta in zip("ab", ends, strict=True):
        torch.save(dict(theta), f"{name}.pt")
    where = ("--model", "nets.py:table", "--in-shape", "5", "--classes", "2")
    run("rebasin", "a.pt", "b.pt", *where, "-o", "out.safetensors")
    undone(ends[0], models.build("nets.py:table", (5,), 2))


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("Failing", ["its forward fails on examples of digits (1×8×8)", "KeyError"]),
        ("boundless", ["mat1 and mat2"]),
        ("nothing", ["nets.py has no 'nothing'"]),
        ("empty", ["empty failed (AssertionError, in nets.py, line"]),
        ("meta", ["on the meta device: weight has no values"]),
    ],
)
def test_a_network_that_fails_is_refused_before_any_work(factory, says):
    Path("nets.py").write_text(NETS)
    if factory in ("Failing", "boundless"):
        torch.save(models.build(f"nets.py:{factory}", (1, 8, 8), 10).state_dict(), "a.pt")
    else:
        torch.save({"w": torch.ones(2)}, "a.pt")
    where = ("--model", f"nets.py:{factory}", "--data", "digits")
    said = run("barrier", "a.pt", "a.pt", *where, code=2).stderr
    assert all(text in said for text in says) and "Traceback" not in said
