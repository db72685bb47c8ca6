"""Permutations as values: group laws, what they do to a state dict, and the file they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from companion import models
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.rebasin import Matching, Unproven, bound, chain, derive
from companion.rebasin.spec import Axis, Block, Group, Spec

NESTED = Spec(
    {
        "stream": Group("stream", 6),
        "heads": Group("heads", 3),
        "heads/1": Group("heads/1", 4, "heads"),
        "heads/2": Group("heads/2", 2, "heads"),
    },
    {
        "qkv": (
            (("heads", "heads/1"), ("heads", "heads/1"), ("heads", "heads/2")),
            (("stream",),),
        ),
        "proj": ((("stream",),), (("heads", "heads/2", 5),)),
        "mix": ((("stream",), (3,), ("stream",)), (("heads",),)),
    },
    ("qkv", "proj", "mix"),
)


def theta_of(spec: Spec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Entries that are all different, so that every move shows."""
    out, start = {}, 0
    for name, axes in spec.axes.items():
        shape = [sum(spec.length(b) for b in axis) for axis in axes]
        size = int(torch.tensor(shape).prod())
        out[name] = torch.arange(start, start + size, dtype=torch.float64).reshape(shape)
        start += size
    return out


def perms_of(spec: Spec, seed: int) -> dict[str, torch.Tensor]:
    return spec.random(Key("perms", seed).generator())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_group_laws(one: int, two: int) -> None:
    p, q = perms_of(NESTED, one), perms_of(NESTED, two)
    x = theta_of(NESTED)
    NESTED.check(p)
    both = NESTED.permute(NESTED.permute(x, p), q)
    assert equal(both, NESTED.permute(x, NESTED.compose(p, q)))
    back = NESTED.permute(NESTED.permute(x, p), NESTED.inverse(p))
    assert equal(back, x)
    assert equal(NESTED.compose(p, NESTED.inverse(p)), NESTED.identity())
    assert equal(NESTED.permute(x, NESTED.identity()), x)


def test_an_axis_by_hand() -> None:
    """Heads (2, 0, 1), and inside of each new head an order of the old head's units."""
    perms = NESTED.identity()
    perms["heads"] = torch.tensor([2, 0, 1])
    perms["heads/2"] = torch.tensor([[1, 0], [0, 1], [1, 0]])
    block: Block = ("heads", "heads/2")
    assert NESTED.block_index(block, perms).tolist() == [5, 4, 0, 1, 3, 2]
    axis: Axis = ((2,), ("heads", "heads/2"))
    assert NESTED.index(axis, perms).tolist() == [0, 1, 7, 6, 2, 3, 5, 4]
    assert NESTED.block_index(("heads", 2), perms).tolist() == [4, 5, 0, 1, 2, 3]
    assert NESTED.block_index((2, "heads"), perms).tolist() == [2, 0, 1, 5, 3, 4]


def test_families_and_counts() -> None:
    assert NESTED.families == (("stream",), ("heads", "heads/1", "heads/2"))
    ways = 720 * 6 * 24**3 * 2**3
    assert 10 ** NESTED.log10_count() == pytest.approx(ways)
    assert [u.start for u in NESTED.uses["stream"] if u.tensor == "mix"] == [0, 9]
    assert [u.start for u in NESTED.uses["heads/1"]] == [0, 12]
    text = str(NESTED)
    assert "4 permutations" in text and "heads/1: 4 units within each unit of heads" in text


def test_tensors_that_do_not_move_are_the_same_objects() -> None:
    module = models.build("resnet8", (3, 16, 16), 10)
    spec = derive(module, torch.randn(2, 3, 16, 16))
    theta = snapshot(module)
    moved = spec.permute(theta, perms_of(spec, 1))
    assert moved["stem.norm.num_batches_tracked"] is theta["stem.norm.num_batches_tracked"]
    assert moved["head.bias"] is theta["head.bias"]
    assert moved["stem.norm.running_var"] is not theta["stem.norm.running_var"]
    assert not any(n.endswith(("running_mean", "num_batches_tracked")) for n in spec.objective)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {k: v for k, v in p.items() if k != "heads"}, "missing.*heads"),
        (lambda p: {**p, "tails": p["heads"]}, "not in the spec.*tails"),
        (lambda p: {**p, "heads": torch.tensor([0, 0, 1])}, "'heads' repeats units"),
        (lambda p: {**p, "heads": p["heads"].int()}, "int64"),
        (lambda p: {**p, "heads/1": p["heads/1"][0]}, r"\(3, 4\) expected"),
    ],
)
def test_what_is_no_permutation_is_refused(change: object, message: str) -> None:
    assert callable(change)
    with pytest.raises(BadParameter, match=message):
        NESTED.check(change(perms_of(NESTED, 3)))


def mlp() -> tuple[torch.nn.Module, Spec, dict[str, torch.Tensor]]:
    with Key("spec").seeded():
        module = models.build("mlp:widths=12x2,norm=batch", (1, 4, 4), 3)
        spec = derive(module, torch.randn(4, 1, 4, 4))
    return module, spec, snapshot(module)


def matching(spec: Spec, seed: int = 5) -> Matching:
    return Matching(spec, perms_of(spec, seed), "weights", 3.0, 1.0, 4.0, passes=2)


def test_apply_permutes_checks_and_leaves_its_input_alone() -> None:
    module, spec, theta = mlp()
    kept = {k: v.clone() for k, v in theta.items()}
    found = matching(spec)
    aligned = found.apply(module, theta)
    assert all(torch.equal(theta[k], kept[k]) for k in kept)
    assert not torch.equal(aligned["layer1.linear.weight"], theta["layer1.linear.weight"])
    back = replace(found, perms=spec.inverse(found.perms)).apply(module, aligned)
    assert all(torch.equal(back[k], kept[k]) for k in kept)
    assert found.share == 0.75 and found.share_before == 0.25 and 0 < found.moved <= 1
    assert replace(found, perms=spec.identity()).moved == 0


def test_apply_refuses_what_is_not_the_same_function() -> None:
    module, spec, theta = mlp()
    broken = replace(spec, axes={k: v for k, v in spec.axes.items() if "running" not in k})
    theta["layer1.norm.running_mean"] = torch.randn(12, generator=Key("mean").generator())
    found = matching(broken)
    with pytest.raises(Unproven, match="not the same function"):
        found.apply(module, theta)
    found.apply(module, theta, check_outputs=False)
    with pytest.raises(BadParameter, match="NaN"):
        matching(spec).apply(module, {**theta, "head.bias": torch.full((3,), torch.nan)})
    other = models.build("mlp:widths=12x3,norm=batch", (1, 4, 4), 3)
    with pytest.raises(BadParameter, match="same architecture"):
        matching(spec).apply(module, other.state_dict())


def test_a_half_precision_checkpoint_keeps_its_bits() -> None:
    module, spec, theta = mlp()
    half = {k: v.half() if v.is_floating_point() else v for k, v in theta.items()}
    found = matching(spec)
    aligned = found.apply(module, half)
    assert all(aligned[k].dtype == half[k].dtype for k in half)
    expected = spec.permute(half, found.perms)
    assert all(torch.equal(aligned[k], expected[k]) for k in half)


def test_saved_and_read_again(tmp_path: Path) -> None:
    module, spec, _ = mlp()
    found = replace(matching(spec), details={"starts": [1.5]}, seconds=0.5)
    found.save(tmp_path / "m.safetensors")
    again = Matching.load(tmp_path / "m.safetensors", derive(module, torch.randn(2, 1, 4, 4)))
    assert all(torch.equal(again.perms[k], found.perms[k]) for k in found.perms)
    assert again.summary() == found.summary()
    json.dumps(again.summary())


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, spec, theta = mlp()
    matching(spec).save(tmp_path / "m.safetensors")
    with pytest.raises(BadParameter, match="other layers or sizes"):
        Matching.load(tmp_path / "m.safetensors", chain(4, 5, 2))
    save_file(theta, str(tmp_path / "theta.safetensors"))
    with pytest.raises(BadParameter, match=r"not written by companion\.rebasin"):
        Matching.load(tmp_path / "theta.safetensors", spec)
    with pytest.raises(BadParameter, match="no such file"):
        Matching.load(tmp_path / "none.safetensors", spec)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(BadParameter, match="not a safetensors file"):
        Matching.load(tmp_path / "text", spec)


def test_chain_is_what_derive_finds() -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 6), torch.nn.Tanh(),
        torch.nn.Linear(6, 2),
    )  # fmt: skip
    derived = derive(module, torch.randn(3, 4))
    written = chain(4, 5, 6, 2, names=["0", "2", "4"])
    assert derived.to_json() == written.to_json()


def test_bound_is_never_exceeded() -> None:
    x, y = theta_of(NESTED), NESTED.permute(theta_of(NESTED), perms_of(NESTED, 9))
    top = bound(x, y, NESTED)
    assert top == pytest.approx(sum(float((v * v).sum()) for v in x.values()))
    assert sum(float((x[k] * y[k]).sum()) for k in x) < top
