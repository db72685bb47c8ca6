"""The family ``gpt``: Hugging Face's numbers and names, our spelling, our init."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import layout, snapshot
from companion.models import build, canonical, describe, has_dropout, names, parameter_count, takes
from companion.models.gpt import gpt
from companion.rebasin import derive

KEY = Key("init", "gpt")
L, K = 10, 64
PAPER = {"layers": 12, "width": 768, "heads": 12, "bias": "false"}


def tokens(n: int = 3, label: str = "x") -> Tensor:
    return Key("tokens", label).integers(n * L, K).view(n, L)


def small(options: str = "", key: Key = KEY) -> nn.Module:
    return build("gpt:layers=2,width=12,heads=3" + options, (L,), K, key).eval()


def shaken(module: nn.Module) -> nn.Module:
    """Biases and norms start at 0 and 1, where mistakes hide: move them."""
    generator = KEY.fold("shake").generator()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return module


def theirs(module: nn.Module, **config: Any) -> nn.Module:
    """Transformers' own network of that size with the same weights; absent biases are 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c: Any = module.config
    other = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.n_positions,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            bos_token_id=None,
            eos_token_id=None,
            **config,
        )
    ).eval()
    state = {k: torch.zeros_like(v) for k, v in other.state_dict().items() if k.endswith("bias")}
    other.load_state_dict({**state, **module.state_dict()})  # strict: their names, their shapes
    return other


# ---- the forward pass


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("options", "activation", "tied"),
    [
        ("", "gelu", True),
        (",gelu=tanh", "gelu_new", True),  # what published GPT-2 checkpoints were trained with
        (",bias=false", "gelu", True),
        (",tied=false,positions=17", "gelu", False),
    ],
)
def test_logits_are_those_of_transformers(
    options: str, activation: str, tied: bool, attention: str
) -> None:
    net = shaken(small(options))
    other = theirs(
        net,
        activation_function=activation,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    with torch.no_grad():
        mine = net(tokens())
        assert mine.shape == (3, L, K)
        torch.testing.assert_close(mine, other(tokens()).logits, rtol=1e-5, atol=1e-5)
        net.config._attn_implementation = "eager"  # type: ignore[union-attr]  # of transformers
        torch.testing.assert_close(net(tokens()), mine, rtol=1e-5, atol=1e-5)


def test_it_compiles_as_one_graph() -> None:
    net = shaken(small())
    one = torch.compile(net, backend="eager", dynamic=False, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(one(tokens()), net(tokens()))


def test_state_dict_has_hugging_faces_names_and_shapes() -> None:
    net = small()
    other = theirs(net)
    mine, their = net.state_dict(), other.state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in their.items()}
    without = small(",bias=false").state_dict()
    assert without.keys() == {k for k in mine if not k.endswith("bias")}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, L - 1), st.sampled_from(["", ",bias=false"]))
def test_no_position_sees_what_comes_later(at: int, options: str) -> None:
    net, x = shaken(small(options)), tokens(1)
    changed = x.clone()
    changed[0, at] = (x[0, at] + 1) % K
    with torch.no_grad():
        before, after = net(x)[0], net(changed)[0]
    torch.testing.assert_close(before[:at], after[:at], rtol=0, atol=1e-6)
    assert not torch.allclose(before[at], after[at], rtol=0, atol=1e-4)


def test_dropout_acts_in_training_only() -> None:
    net, plain = shaken(small(",dropout=0.5")), shaken(small())
    with torch.no_grad():
        assert torch.equal(net(tokens()), plain(tokens()))
        net.train()
        assert not torch.equal(net(tokens()), net(tokens()))
    plain.train()
    assert torch.equal(plain(tokens()), plain(tokens()))


# ---- the weights


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5),
)
def test_number_of_parameters(
    layers: int, heads: int, size: int, bias: bool, tied: bool, more: int
) -> None:
    d = heads * size
    spec = (
        f"gpt:layers={layers},width={d},heads={heads},bias={str(bias).lower()},"
        f"tied={str(tied).lower()},positions={L + more}"
    )
    matrices = (1 if tied else 2) * K * d + (L + more) * d + layers * 12 * d * d
    norms = (2 * layers + 1) * d
    biases = norms + layers * (3 + 1 + 4 + 1) * d
    assert parameter_count(build(spec, (L,), K)) == matrices + norms + bias * biases


def test_the_papers_network_has_123_8_million_parameters() -> None:
    with torch.device("meta"):
        net = gpt((256,), 50304, **PAPER)  # type: ignore[arg-type]  # options by name
    assert parameter_count(net) == 50304 * 768 + 256 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    assert round(parameter_count(net) / 1e6, 1) == 123.8
    assert not any(name.endswith("bias") for name, _ in net.named_parameters())


def test_init_is_gpt2s() -> None:
    net = build("gpt:layers=8,width=96,heads=4", (L,), 512, KEY)
    for name, p in net.requires_grad_(False).named_parameters():
        if p.ndim > 1:
            std = 0.02 / 16**0.5 if name.endswith("c_proj.weight") else 0.02
            assert float(p.std()) == pytest.approx(std, rel=0.1), name
            assert abs(float(p.mean())) < 5 * std / p.numel() ** 0.5, name
        else:
            assert bool((p == float(name.endswith("weight"))).all()), name


def test_equal_keys_give_equal_bits_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = small(), small(), small(key=Key("init", "other"))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in snapshot(a).items():
        assert torch.equal(value, snapshot(b)[name])
    assert not torch.equal(snapshot(a)["lm_head.weight"], snapshot(c)["lm_head.weight"])


def test_the_tied_embedding_is_one_group() -> None:
    found = layout(small())
    assert found.ties == {"lm_head.weight": "transformer.wte.weight"}
    assert found.groups["transformer.wte"] == ("transformer.wte.weight",)
    assert "lm_head" not in found.groups
    assert not found.buffers and not found.integers
    net = small()
    net.load_state_dict(snapshot(small(key=Key("init", "other"))))
    assert net.get_parameter("lm_head.weight") is net.get_parameter("transformer.wte.weight"), (
        "loading keeps the tie"
    )
    untied = layout(small(",tied=false"))
    assert not untied.ties and untied.groups["lm_head"] == ("lm_head.weight",)


@pytest.mark.parametrize("options", ["", ",bias=false", ",tied=false", ",gelu=tanh"])
def test_heads_and_units_are_found_by_the_tracer(options: str) -> None:
    spec = derive(shaken(small(options)), tokens())
    sizes = {name: group.size for name, group in spec.groups.items()}
    assert sizes["transformer.wte"] == 12, "the residual stream"
    for block in range(2):
        assert sizes[f"transformer.h.{block}.attn.c_attn"] == 3, "heads"
        assert sizes[f"transformer.h.{block}.mlp.c_fc"] == 48, "units of the MLP"


# ---- the spelling


def test_spelling() -> None:
    assert canonical("GPT: width=64 ,bias=FALSE, dropout=.20,positions=Window") == (
        "gpt:bias=false,dropout=0.2"
    )
    assert canonical("gpt:dropout=0.0,layers=04") == "gpt"
    assert describe("gpt:layers=2,dropout=0.1") == {
        "layers": 2,
        "width": 64,
        "heads": 4,
        "bias": "true",
        "dropout": 0.1,
        "tied": "true",
        "positions": "window",
        "gelu": "exact",
        "headbias": "false",
    }
    assert "gpt" in [row.name for row in names()]
    assert (takes("gpt"), takes("resnet8"), takes("a.b:c")) == ("tokens", "images", None)
    assert [has_dropout(s) for s in ("gpt", "gpt:dropout=0.1", "resnet8")] == [False, True, False]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999))
def test_dropout_keeps_its_value(thousandths: int) -> None:
    spec = canonical(f"gpt:dropout={thousandths / 1000:.3f}")
    assert canonical(spec) == spec
    assert describe(spec)["dropout"] == thousandths / 1000


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("gpt:heads=3", (L,), r"heads=3 do not divide the width 64\. Allowed: 1, 2, 4, 8"),
        ("gpt:dropout=1", (L,), r"dropout: '1' is not a number from 0 to below 1"),
        ("gpt:dropout=.", (L,), r"dropout: '\.' is not a number"),
        ("gpt:bias=no", (L,), "bias: .*no"),
        ("gpt:positions=0", (L,), "positions: '0' is not 'window' or a whole number"),
        ("gpt:positions=9", (L,), "positions=9 are fewer than the 10 tokens of a window"),
        ("gpt", (3, 8, 8), r"gpt.* reads text, but the data's examples are images.*pydoc"),
        ("resnet8", (L,), "takes images, but the data's examples are windows of 10 tokens.*gpt"),
        ("gpt", (L, L), r"in_shape must be .* or \(tokens,\)"),
        ("gpt", (0,), "in_shape must be"),
        ("gpt:init=torch", (L,), "init"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        build(spec, shape, K)


@pytest.mark.slow
def test_transformers_is_imported_when_a_gpt_is_built() -> None:
    code = (
        "import sys; from companion import models, training;"
        "models.canonical('gpt:dropout=0.1'); models.names();"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
