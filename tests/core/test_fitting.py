"""State dicts as people have them, under the module's names; modules as people have them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from companion.core.errors import BadParameter
from companion.core.fitting import Lazy, fitted
from companion.core.networks import leaves, logits, plain, private
from companion.core.theta import affine, check_theta, layout, snapshot

Theta = dict[str, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


class Tied(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.positions: Tensor
        self.register_buffer("positions", torch.arange(5), persistent=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x) * self.positions[: x.shape[1], None])


def renamed(front: str) -> Callable[[Theta], Theta]:
    return lambda t: {front + k: v for k, v in t.items()}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (renamed("module."), "the prefix 'module.' of all names"),
        (renamed("module._orig_mod."), "the prefix '_orig_mod.' of all names"),
        (renamed("_fsdp_wrapped_module."), "'_fsdp_wrapped_module.'"),
        (renamed("model."), "the prefix 'model.' of all names"),
        (renamed("net.backbone."), "the prefix 'net.backbone.' of all names"),
        (
            lambda t: {
                k.replace("0.", "0._checkpoint_wrapped_module.", 1): v for k, v in t.items()
            },
            "'_checkpoint_wrapped_module.' of 2 names",
        ),
        (lambda t: renamed("module.")(t) | {"n_averaged": torch.tensor(3)}, "averaged networks"),
        (lambda t: renamed("model.")(t) | {"loss.weight": torch.ones(3)}, "loss.weight"),
        (lambda t: {k: v for k, v in t.items() if "num_batches" not in k}, "BatchNorm's counters"),
        (
            lambda t: {
                k.replace("1.weight", "1.gamma").replace("1.bias", "1.beta"): t[k] for k in t
            },
            "1.gamma is 1.weight",
        ),
        (
            lambda t: (
                {k: v for k, v in t.items() if k != "0.weight"}
                | {"0.weight_orig": t["0.weight"], "0.weight_mask": torch.ones(5, 6)}
            ),
            "0.weight is pruned",
        ),
    ],
)
def test_names_with_one_meaning_are_undone_and_said(edit, says):
    module = mlp()
    theta = snapshot(module)
    found = fitted(mlp(), edit(theta), {})
    assert says in "; ".join(found.notes)
    assert found.theta.keys() == theta.keys()
    assert all(torch.equal(found.theta[k], v) for k, v in theta.items())
    checked = check_theta(mlp(), edit(theta), "A")
    assert list(checked) == list(theta)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t | {"more": torch.zeros(1)},
        lambda t: {k: v for k, v in t.items() if k != "0.bias"},
        lambda t: renamed("a.")(t) | renamed("b.")(t),  # which of the two?
        lambda t: renamed("model.")(t) | renamed("ema.")(t),
        lambda t: t | {"module.0.weight": t["0.weight"] + 1},
    ],
)
def test_what_could_mean_two_things_is_refused_by_name(edit):
    with pytest.raises(BadParameter, match="network A does not fit the model"):
        check_theta(mlp(), edit(snapshot(mlp())), "A")


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old weight norm
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3))


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3))


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    prune.random_unstructured(net[0], "weight", 0.5)
    return net


def bare() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize("front", ["", "module.", "net."])
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        *((weight_normed, bare), (parametrized, bare), (pruned, bare)),
        *((bare, weight_normed), (bare, parametrized), (bare, pruned)),
        (weight_normed, parametrized),
    ],
)
def test_weights_computed_in_the_file_or_in_the_module(stored, wanted, front):
    """Pruning or weight norm that was removed before one of the two was made; under a prefix."""
    x = torch.randn(4, 6)
    source, target = stored().eval(), wanted().eval()
    theta = renamed(front)(snapshot(source))
    beside = {"loss.weight": torch.ones(2)} if front == "net." else {}
    found = check_theta(target, theta | beside, "A")
    target.load_state_dict(found)
    assert torch.allclose(source(x), target(x), atol=1e-6)
    merged = affine((found, found), (0.5, 0.5), list(found))
    assert merged.keys() == target.state_dict().keys()


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: {k: v for k, v in t.items() if "num_batches" not in k},
        lambda t: {k.replace("1.weight", "1.gamma").replace("1.bias", "1.beta"): t[k] for k in t},
    ],
)
def test_a_prefix_and_something_more(edit):
    theta = snapshot(mlp())
    file = renamed("net.")(edit(theta)) | {"criterion.weight": torch.ones(3)}
    found = fitted(mlp(), file, {})
    assert found.theta.keys() == theta.keys()
    assert all(torch.equal(found.theta[k], v) for k, v in theta.items())
    assert found.names["net.0.weight"] == "0.weight" and found.names["criterion.weight"] is None
    assert "criterion.weight" in "; ".join(found.notes)
    twice = file | renamed("ema.")(edit(theta))
    with pytest.raises(BadParameter, match="does not fit the model"):
        check_theta(mlp(), twice, "A")


def test_networks_and_tensors_without_numbers_are_refused_by_name():
    theta = snapshot(bare())
    for name, net in (
        ("lazy layers: 0.weight", nn.Sequential(nn.LazyLinear(5))),
        ("meta device: 0.weight", bare().to("meta")),
    ):
        with pytest.raises(BadParameter, match=name):
            check_theta(net, theta, "A")
        with pytest.raises(BadParameter, match=name):
            private(net, torch.zeros(1, 6))
    with pytest.raises(BadParameter, match=r"B: 0.weight is sparse"):
        check_theta(bare(), theta | {"0.weight": theta["0.weight"].to_sparse()}, "B")
    with pytest.raises(BadParameter, match=r"0\.weight is on the meta device"):
        check_theta(bare(), theta | {"0.weight": theta["0.weight"].to("meta")}, "B")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_network_is_refused():
    with pytest.raises(BadParameter, match="TorchScript"):
        private(torch.jit.script(bare()), torch.zeros(1, 6))


def test_what_fits_is_the_very_same():
    module = mlp()
    theta = snapshot(module)
    assert check_theta(module, theta, "A") is theta


def test_weight_norm_of_both_spellings():
    new = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    theta = snapshot(new)
    spelling = {"original0": "weight_g", "original1": "weight_v"}
    old = {f"0.{spelling[k.rpartition('.')[2]]}" if "orig" in k else k: v for k, v in theta.items()}
    assert "0.weight_g" in old
    found = check_theta(new, old, "A")
    assert all(torch.equal(found[k], v) for k, v in theta.items())


def test_a_tied_file_beside_an_untied_one():
    tied, untied = Tied(tied=True), Tied()
    file = {"table.weight": tied.table.weight.detach(), "positions": torch.arange(5)}
    found = fitted(untied, file, {})
    assert torch.equal(found.theta["head.weight"], file["table.weight"])
    assert found.theta.keys() == untied.state_dict().keys()
    text = "; ".join(found.notes)
    assert "head.weight is not stored" in text and "positions, which the model makes itself" in text
    only = {"head.weight": tied.head.weight.detach()}
    assert check_theta(tied, only, "A").keys() == {"table.weight"}
    with pytest.raises(BadParameter, match="differ, but the model ties them"):
        check_theta(tied, snapshot(untied), "B")


def test_what_only_its_own_load_state_dict_knows():
    class Renaming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def _load_from_state_dict(self, state, prefix, *more) -> None:  # type: ignore[no-untyped-def]  # torch's own
            if prefix + "kernel" in state:
                state[prefix + "w"] = state.pop(prefix + "kernel") * 2
            super()._load_from_state_dict(state, prefix, *more)

    found = check_theta(Renaming(), {"kernel": torch.ones(3)}, "A")
    assert found["w"].tolist() == [2, 2, 2]


def test_lazy_state_dicts_are_read_when_they_are_asked_for():
    read = []
    theta = snapshot(mlp())

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: (read.append(name), theta[name])[1]

    found = fitted(mlp(), Lazy({f"module.{k}": reader(k) for k in theta}), {})
    assert not read and found.theta.keys() == theta.keys()
    assert torch.equal(found.theta["3.weight"], theta["3.weight"]) and read == ["3.weight"]


def test_minus_infinity_is_a_constant_and_infinity_in_a_weight_is_not():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    module = Masked()
    own = layout(module)
    assert own.integers == ("mask",) and "mask" not in own.floating
    theta = snapshot(module)
    check_theta(module, theta, "A")
    assert not affine((theta, theta), (1.0, 0.0), own.floating)["lin.weight"].isnan().any()
    for name, value in (("mask", torch.nan), ("lin.weight", torch.inf)):
        with pytest.raises(BadParameter, match="NaN or infinite"):
            check_theta(module, theta | {name: torch.full_like(theta[name], value)}, "A")


# --- modules


def test_wrappers_are_looked_through_around_a_module_and_inside():
    module = mlp()
    assert plain(module) is module
    inside = copy.deepcopy(module)
    inside[0] = torch.compile(inside[0], backend="eager")
    for wrapped in (
        torch.compile(module, backend="eager"),
        nn.DataParallel(module),
        torch.optim.swa_utils.AveragedModel(module),
        inside,
    ):
        assert list(plain(wrapped).state_dict()) == list(module.state_dict())
        assert layout(wrapped).parameters == layout(module).parameters
        check_theta(wrapped, snapshot(module), "A")
        check_theta(wrapped, dict(wrapped.state_dict()), "A")
        x = torch.randn(4, 6)
        assert torch.equal(private(wrapped, x)(x), module.eval()(x))


def test_networks_pruned_a_moment_ago_and_old_hooks_can_be_copied():
    pruned, normed = nn.Linear(6, 3), nn.Linear(6, 3)
    prune.l1_unstructured(pruned, "weight", 0.5)
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(normed)
    x = torch.randn(2, 6)
    for module in (pruned, normed):
        copy_ = private(module, x)
        assert torch.equal(copy_(x), module(x).detach())
        for p in copy_.parameters():  # the copy's weight is made of its own parameters
            p.mul_(2)
        assert not torch.equal(copy_(x), module(x))


def test_half_precision_computes_in_the_precision_of_the_data():
    module = nn.Linear(6, 3).bfloat16()
    x = torch.randn(2, 6)
    assert private(module, x)(x).dtype == torch.float32 and module.weight.dtype == torch.bfloat16
    assert private(nn.Linear(6, 3), x.double())(x.double()).dtype == torch.float64


@dataclass
class Scores:
    scores: Tensor
    hidden: Any


def test_logits_of_a_dataclass_of_somebodys_own():
    x = torch.randn(2, 3)
    assert logits(Scores(x, {"a": torch.zeros(1)})) is x
    assert [t.shape for t in leaves(Scores(x, {"a": torch.zeros(1)}))] == [(2, 3), (1,)]


def test_logits_of_records_tuples_and_maps_of_one_pixel():
    from transformers.modeling_outputs import ImageClassifierOutput

    out = torch.randn(2, 3)
    for outputs in (
        *(out, (out, None), [torch.arange(2), out], {"loss": torch.ones(1), "logits": out}),
        *(ImageClassifierOutput(loss=torch.ones(1), logits=out), out[..., None, None]),
    ):
        assert torch.equal(logits(outputs), out)
    with pytest.raises(BadParameter, match="no logits"):
        logits({"classes": torch.arange(2)})
