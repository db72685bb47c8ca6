"""Matching networks that stay in their files: the same permutations, from tensors read anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from companion.core.fitting import Lazy
from companion.core.networks import copied, in_precision, without_weights
from companion.core.reading import read_weights
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.core.writing import in_pieces
from companion.rebasin import derive, weight_matching, weights
from companion.rebasin.proof import Subject


@pytest.mark.parametrize("large", [1 << 24, 40])
def test_the_same_permutations_and_in_pieces(tmp_path, monkeypatch, large):
    from safetensors.torch import save_file

    ends = []
    for name in "ab":
        with Key("streamed", name).seeded():
            module = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 3))
        ends.append(snapshot(module))
        save_file(ends[-1], tmp_path / f"{name}.safetensors")
    spec = derive(module, torch.randn(2, 9))
    inside = weight_matching(spec, *ends)
    monkeypatch.setattr(weights, "LARGE", large)
    a, b = (read_weights(str(tmp_path / f"{n}.safetensors")).tensors for n in "ab")
    assert isinstance(a, Lazy)
    found = weight_matching(spec, a, b)
    assert all(torch.equal(found.perms[n], p) for n, p in inside.perms.items())
    assert found.objective == pytest.approx(inside.objective, rel=1e-12)
    moved = found.apply(module, b)
    assert isinstance(moved, Lazy)
    assert all(torch.equal(moved[n], v) for n, v in inside.apply(module, ends[1]).items())


def test_a_large_tensor_is_reordered_in_place_as_it_is_at_once(monkeypatch):
    """Along an axis that stays, whichever it is; with both axes moving as a whole."""
    module = nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
    spec = derive(module, torch.randint(50, (2, 3)))
    perms = spec.random(Key("in place").generator())
    monkeypatch.setattr("companion.rebasin.spec.PART", 20)
    for name, value in snapshot(module).items():
        wanted, moved = spec.permute_tensor(value, name, perms), value.clone()
        spec.permute_(moved, name, perms)
        assert torch.equal(moved, wanted), name


def test_noise_does_not_depend_on_how_a_tensor_lies(monkeypatch):
    """A tensor longer than the draws, and one whose numbers do not lie in a row."""
    monkeypatch.setattr("companion.rebasin.proof.PRIME", 101)
    nets = [nn.Linear(30, 40), nn.Linear(30, 40)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].weight.data = nets[1].weight.data.t().contiguous().t()
    a, b = (Subject(net, torch.randn(2, 30), shake=("weights",)) for net in nets)
    assert torch.equal(a.state["weight"], b.state["weight"])
    assert not torch.equal(a.state["weight"], nets[0].weight.double())
    far = a.state["weight"].flatten() - nets[0].weight.double().flatten()
    assert torch.allclose(far[:900], far[101:1001])  # 101 draws, over and over


def test_a_copy_in_another_precision_is_made_tensor_by_tensor():
    module = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False), nn.BatchNorm1d(9))
    module[1].weight = module[0].weight
    module.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
    own, wanted = copied(module, torch.float64), in_precision(copied(module), torch.float64)
    assert own[0].weight is own[1].weight is not module[0].weight
    other = wanted.state_dict()
    assert own.state_dict().keys() == other.keys()
    for name, x in own.state_dict().items():
        assert x.dtype == other[name].dtype and torch.equal(x, other[name])
    assert own.phase.dtype == torch.complex128 and own[2].num_batches_tracked.dtype == torch.int64
    bare = without_weights(module)
    assert bare[0].weight.untyped_storage().nbytes() == 4 and bare[2].running_var.shape == (9,)
    assert bare[0].weight is bare[1].weight
    again = copied(bare)  # an architecture: a state dict can be loaded into its copy
    again.load_state_dict(
        bare.state_dict() | dict.fromkeys(("0.weight", "1.weight"), torch.eye(9, 6))
    )
    assert int(again[0].weight.count_nonzero()) == 6


def test_a_file_in_pieces_is_the_file_of_safetensors():
    from safetensors.torch import load, save

    tensors = {
        "b.weight": torch.randn(3, 4),
        "a": torch.randn(5, dtype=torch.float64),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "half": torch.randn(3).bfloat16(),
        "other": torch.randn(3).half(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "wave": torch.randn(2, dtype=torch.complex64),
        "none": torch.empty(0, 3),
    }
    about = {"made by": "Größe „1“"}
    written = b"".join(in_pieces(tensors, about))
    assert written == save(tensors, metadata=about)
    turned = {"t": torch.randn(4, 3).t()}  # not in a row
    assert torch.equal(load(b"".join(in_pieces(turned, {})))["t"], turned["t"])
