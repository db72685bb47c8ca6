"""Layer sweeps of transformers: groups, tied embeddings, replays, on windows of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from commands import said
from torch import Tensor, nn

from companion import models
from companion.connectivity import segment
from companion.core.seeds import Key
from companion.core.theta import layout, snapshot
from companion.data import Split
from companion.layerwise import Sweep, layer_groups, sweep
from companion.layerwise.replay import Replay

NET = "gpt:layers=3,width=16,heads=2"
WINDOW, CLASSES = 12, 64
Theta = dict[str, Tensor]


def gpt(spec: str = NET) -> nn.Module:
    return models.build(spec, (WINDOW,), CLASSES, Key("layers of text")).eval()


def tokens(number: int, name: str) -> Split:
    stream = Key("layers of text", name).integers(number * WINDOW + 1, CLASSES)
    return Split.windows(stream, WINDOW)


SPLITS = {"train": tokens(9, "train"), "test": tokens(5, "test")}


def ends(spec: str = NET) -> tuple[Theta, Theta]:
    """Two networks that differ in every entry, and far enough to have barriers."""
    out = []
    for number in range(2):
        theta = snapshot(gpt(spec))
        generator = Key("layers of text", number).generator()
        for name in layout(gpt(spec)).floating:
            theta[name] += 0.15 * torch.randn(theta[name].shape, generator=generator)
        out.append(theta)
    for theta in out:
        if "lm_head.weight" in layout(gpt(spec)).ties:
            theta["lm_head.weight"] = theta["transformer.wte.weight"]
    return out[0], out[1]


def loss(theta: Theta, split: Split, spec: str = NET, *, strict: bool = True) -> float:
    """Mean loss of a network, without any of the package's walkers."""
    module = gpt(spec)
    module.load_state_dict(theta, strict=strict)
    with torch.no_grad():
        logits = module(split.x).flatten(0, 1)
    return float(nn.functional.cross_entropy(logits.double(), split.y.flatten()))


def halved(a: Theta, b: Theta, *names: str) -> Theta:
    return {k: (v + b[k]) / 2 if k in names else v for k, v in a.items()}


# ---- groups


def test_blocks_and_parts_of_a_transformer() -> None:
    net = gpt()
    example = SPLITS["test"].x[:2]
    assert list(layer_groups(net, "block", example)) == [
        "transformer.wte",
        "transformer.wpe",
        *(f"transformer.h.{i}" for i in range(3)),
        "transformer.ln_f",
    ]
    parts = layer_groups(net, "part", example)
    assert list(parts)[2:5] == [f"transformer.h.0.{p}" for p in ("norms", "attn", "mlp")]
    assert len(parts) == 3 + 3 * 3
    assert set(parts["transformer.h.1.norms"]) == {
        f"transformer.h.1.{norm}.{entry}"
        for norm in ("ln_1", "ln_2")
        for entry in ("weight", "bias")
    }
    assert {n.split(".")[4] for n in parts["transformer.h.1.attn"]} == {"c_attn", "c_proj"}
    for by in ("block", "part"):
        names = [n for names in layer_groups(net, by, example).values() for n in names]
        assert sorted(names) == sorted(layout(net).floating), "every entry once"


def test_blocks_and_parts_of_other_networks() -> None:
    resnet = models.build("resnet18:width=2,norm=layer", (1, 8, 8), 10)
    blocks = layer_groups(resnet, "block")
    assert blocks == {**layer_groups(resnet, 2), **blocks}
    assert [b for b in blocks if b.startswith("stage2")] == ["stage2.0", "stage2.1"]
    parts = layer_groups(resnet, "part")
    assert [p for p in parts if p.startswith("stage2.0")] == [
        "stage2.0.conv1",
        "stage2.0.norms",
        "stage2.0.conv2",
        "stage2.0.shortcut",
    ]
    flat = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    assert list(layer_groups(flat, "block")) == list(layer_groups(flat, "part")) == ["0", "1", "2"]


def test_the_command_line_takes_them() -> None:
    assert "block" in said("layers", "--help")


# ---- the tied embedding


def test_a_tied_embedding_is_one_group_and_neither_half_alone() -> None:
    """The embedding moves with the output matrix. Averaging either half alone is something else."""
    a, b = ends()
    both = ("transformer.wte.weight", "lm_head.weight")
    assert both[1] not in {n for names in layer_groups(gpt()).values() for n in names}
    found = sweep(gpt(), a, b, SPLITS, Sweep(by="block", kinds=("single",), points=1, rest="a"))
    row = next(r for r in found.select("single") if r.label == "transformer.wte")
    together = loss(halved(a, b, *both), SPLITS["test"])
    assert row.half("test", "loss") == pytest.approx(together, abs=1e-6)
    # Untied, the halves can be averaged one at a time.
    untied = f"{NET},tied=false"
    assert loss(halved(a, b, *both), SPLITS["test"], untied) == pytest.approx(together, abs=1e-6)
    for half in both:
        alone = loss(halved(a, b, half), SPLITS["test"], untied)
        assert abs(alone - together) > 1e-3, f"{half} alone is the whole pair"


def test_a_state_dict_with_one_half_averaged_is_whole_again_when_it_is_loaded() -> None:
    """The trap of the released script: the second name of the tensor overwrites the first."""
    a, b = ends()
    plain, test = loss(a, SPLITS["test"]), SPLITS["test"]
    both = loss(halved(a, b, "transformer.wte.weight", "lm_head.weight"), test)
    assert loss(halved(a, b, "transformer.wte.weight"), test) == pytest.approx(plain, abs=1e-9)
    assert loss(halved(a, b, "lm_head.weight"), test) == pytest.approx(both, abs=1e-9)


# ---- replays


CASES = {
    NET: ("module", "block", "part"),
    f"{NET},bias=false": ("part",),
    f"{NET},tied=false": ("block",),
}


@pytest.mark.parametrize(("spec", "by"), [(s, by) for s, all_ in CASES.items() for by in all_])
def test_a_replay_of_a_transformer_gives_what_full_passes_give(spec: str, by: str) -> None:
    a, b = ends(spec)
    settings = Sweep(by=by, kinds=("single",), points=1)
    if by == "block":
        kinds = ("single", "shallow", "deep", "window")
        ends_of = (("ends", ("transformer.wte", "transformer.ln_f")),)
        settings = replace(settings, kinds=kinds, window=2, points=3, draws=1, subsets=ends_of)
    options: Any = {"batch": 4, "max_error": 100.0}
    fast = sweep(gpt(spec), a, b, SPLITS, settings, **options)
    slow = sweep(gpt(spec), a, b, SPLITS, settings, fast=False, **options)
    assert (fast.method, slow.method) == ("replay", "walker")
    assert fast.groups == slow.groups
    for one, other in zip(fast.rows, slow.rows, strict=True):
        assert (one.label, one.rest, one.draw) == (other.label, other.rest, other.draw)
        for split in SPLITS:
            for metric in ("loss", "error"):
                values = other.curve.values[split][metric]
                assert one.curve.values[split][metric] == pytest.approx(values, abs=1e-6)
    assert abs(fast.full_height("train")) > 0.01, "nothing to measure"


def test_a_replay_computes_no_block_below_the_first_changed_one() -> None:
    a, b = ends()
    replay = Replay(gpt())
    names = {part: name for name, part in replay.module.named_modules()}
    run: list[str] = []
    for part in list(replay.module.modules()):
        if type(part).__name__ == "GPT2Block":
            inner = type(part).forward

            def counted(*args: Any, part: Any = part, inner: Any = inner, **kwargs: Any) -> Any:
                run.append(names[part])
                return inner(part, *args, **kwargs)

            part.forward = counted
            replay._patch(part)
    own = layout(gpt()).floating
    replay.load({n: a[n].clone() for n in own})
    tape = replay.record(SPLITS["test"].x)
    moved = [n for n in own if n.startswith("transformer.h.1.mlp")]
    replay.load({n: b[n].clone() for n in moved})
    run.clear()
    found = replay.run(SPLITS["test"].x, tape, tape.cut(moved))
    assert run == ["transformer.h.1", "transformer.h.2"]
    expected = gpt()
    expected.load_state_dict({**a, **{n: b[n] for n in moved}})
    with torch.no_grad():
        assert torch.allclose(found, expected(SPLITS["test"].x), atol=1e-5)
    # The embedding is read first, by the embedding layer, and last, by the head.
    assert tape.cut(["transformer.wte.weight"]) < tape.cut(["transformer.h.0.ln_1.weight"])


def test_rows_of_blocks_are_the_segments_of_connectivity() -> None:
    a, b = ends()
    found = sweep(gpt(), a, b, SPLITS, Sweep(by="block", kinds=("single", "window"), window=2))
    for row in found.select("single", rest="b") + found.select("window", rest="b"):
        plain = segment(gpt(), a, b, SPLITS, points=3, groups=row.groups, rest="b")
        for split in SPLITS:
            values = plain.values[split]["loss"]
            assert row.curve.values[split]["loss"] == pytest.approx(values, abs=1e-6)
