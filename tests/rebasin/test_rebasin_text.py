"""What was made for images on a tied GPT: matching by the straight-through estimator, merging of
many, REPAIR, temperatures, readings. State dicts are whole: they hold the tied tensor twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion import data, models
from companion.connectivity import Walker, segment
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import layout, snapshot, with_aliases, without_aliases
from companion.data import Dataset, Split
from companion.experiments.federated import Federation, average, client_data
from companion.experiments.merged import _mean, logits_of, read_logits, split_runs
from companion.experiments.methods import Method, gradient, match
from companion.experiments.pairs import Evaluation, Pair
from companion.rebasin import derive, merge_many, repair, straight_through
from companion.rebasin.calibration import calibrated_curve
from companion.training import Recipe, Run

L, K = 8, 64
NET = "gpt:layers=1,width=12,heads=3"
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
STREAM = Key("rebasin text").integers(50 * L + 1, K)
SPLIT = Split.windows(STREAM, L)
TEXT = Dataset("noise", "noise", SPLIT, SPLIT.head(12), K, (L,), (), (), "fingerprint")


def net(seed: int = 0) -> nn.Module:
    return models.build(NET, (L,), K, Key("init", seed)).eval()


def theta(seed: int) -> dict[str, Tensor]:
    """Noise on every weight, so that no zero hides a mistake; the tied tensor under both names."""
    out = snapshot(net(seed))
    g = Key("noise", seed).generator()
    out = {k: v + 0.2 * torch.randn(v.shape, generator=g) for k, v in out.items()}
    out[HEAD] = out[WTE].clone()
    return out


def outputs(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    module = net()
    module.load_state_dict(state)
    with torch.no_grad():
        return module(x)


def moved(a: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """``a`` with its units in a random order."""
    spec = derive(net(), SPLIT.x[:2])
    return dict(spec.permute(a, spec.random(Key("plant", seed).generator())))


def test_aliases_are_taken_out_and_put_back() -> None:
    ties = layout(net()).ties
    assert ties == {HEAD: WTE}
    a, b = theta(1), theta(2)
    assert without_aliases(a, ties).keys() == a.keys() - {HEAD}
    assert without_aliases({HEAD: a[HEAD]}, ties) == {WTE: a[HEAD]}, "under its other name alone"
    assert torch.equal(with_aliases({**a, WTE: b[WTE]}, ties)[HEAD], b[WTE])
    assert with_aliases({}, ties) == {}


def test_readings_are_of_all_positions() -> None:
    a = theta(1)
    logits = logits_of(net(), a, SPLIT.x, batch=7)
    assert torch.allclose(logits, outputs(a, SPLIT.x).flatten(0, 1), atol=1e-6)
    found = read_logits(logits, SPLIT.y)
    at = Walker(net(), {"x": SPLIT}).at(a)["x"]
    assert found.loss == pytest.approx(at.loss, rel=1e-6)
    assert found.error == pytest.approx(at.error)


def test_the_gradient_is_that_of_the_tied_network() -> None:
    a, module = theta(1), net()
    module.load_state_dict(a)
    F.cross_entropy(module(SPLIT.x).flatten(0, 1), SPLIT.y.flatten()).backward()
    found = gradient(net(), a, TEXT.train)
    assert found.keys() == dict(module.named_parameters()).keys()
    for name, p in module.named_parameters():
        assert p.grad is not None and torch.allclose(found[name], p.grad, atol=1e-6), name


def test_straight_through_finds_what_was_planted_and_never_loses_to_its_start() -> None:
    a = theta(1)
    b = {k: v + 0.01 for k, v in moved(a, 1).items()}
    spec = derive(net(), SPLIT.x[:2])
    found = straight_through(spec, net(), a, b, SPLIT, steps=3, batch=16, judge_every=1)
    assert max(float((v - a[k]).abs().max()) for k, v in found.apply(net(), b).items()) < 0.0101
    details = found.details or {}
    # the loss is the mean over positions: at A, of which the midpoint is a neighbour here
    assert details["loss"][0] == pytest.approx(Walker(net(), {"x": SPLIT}).at(a)["x"].loss, rel=0.1)
    # and between two networks without a common start, gradients move the free weights
    far = straight_through(spec, net(), a, theta(2), SPLIT, steps=3, batch=16, judge_every=1, lr=1)
    details = far.details or {}
    losses = [loss for _, loss in details["held out"]]
    assert min(losses) <= details["weight matching"] == losses[0]
    through = match(Method("ste", steps=2, batch=16), net(), a, b, TEXT)
    assert all(torch.equal(p, found.perms[g]) for g, p in through.perms.items())


def test_merging_copies_of_one_network_gives_it_back() -> None:
    a = theta(1)
    spec = derive(net(), SPLIT.x[:2])
    merged = merge_many(spec, [a, moved(a, 1), moved(a, 2)])
    assert torch.equal(merged.theta[HEAD], merged.theta[WTE])
    assert torch.allclose(outputs(merged.theta, SPLIT.x), outputs(a, SPLIT.x), atol=1e-4)


def test_a_mean_has_no_network_of_its_own_under_an_alias() -> None:
    a, b = theta(1), theta(2)
    mean = _mean(net(), [a, b], TEXT, Evaluation())
    assert torch.allclose(mean[WTE], (a[WTE] + b[WTE]) / 2) and torch.equal(mean[HEAD], mean[WTE])
    for one in average([a, b], [1, 1], layout(net()), None):
        assert torch.equal(one[HEAD], mean[WTE])
    alone = average([a, b], [1, 1], layout(net()), ("transformer.h",))
    assert torch.equal(alone[1][HEAD], b[WTE])


def test_repair_meets_its_targets_in_norms_and_leaves_tied_weights_alone() -> None:
    a, b = theta(1), theta(2)
    found = repair(net(), a, b, SPLIT.x, batch=1000)
    norms = [f"transformer.{n}" for n in ("h.0.ln_1", "h.0.ln_2", "ln_f")]
    assert list(found.scale) == norms and "bias" in found.skipped["lm_head"]
    assert all(found.after[n] == pytest.approx(1, abs=1e-5) for n in norms)
    assert torch.equal(found.theta[HEAD], found.theta[WTE])
    assert torch.allclose(found.theta[WTE], (a[WTE] + b[WTE]) / 2)
    bare = models.build(NET + ",bias=false", (L,), K, Key("init", 0))
    with pytest.raises(BadParameter, match="it has no bias to take the shift"):
        repair(bare, snapshot(bare), snapshot(bare), SPLIT.x)


def test_a_temperature_is_fitted_over_all_positions() -> None:
    a, b = theta(1), theta(2)
    splits = {"test": TEXT.test}
    found = calibrated_curve(net(), a, b, SPLIT, splits, points=3)
    line = segment(net(), a, b, splits, points=3).values["test"]
    assert found.plain.values["test"]["loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert found.curve.values["test"]["error"] == pytest.approx(line["error"])
    z = outputs(a, SPLIT.x).flatten(0, 1).double()

    def loss(t: float) -> float:
        return float(F.cross_entropy(z / t, SPLIT.y.flatten()))

    t = found.temperatures[0]
    assert loss(t) < min(loss(0.9 * t), loss(1.1 * t))


def test_what_is_for_labelled_images_refuses_a_text() -> None:
    recipe = Recipe(net=NET, data="pydoc?window=8", steps=2, batch=8)
    with pytest.raises(BadParameter, match="noise is a text"):
        client_data(Federation(recipe=recipe, clients=2, every=1), TEXT, 0)
    with pytest.raises(BadParameter, match="a text has no parts"):
        split_runs([Pair(Run(recipe), Run(recipe, init=1))], [Run(recipe)])
    digits = data.load("digits")
    federation = Federation(recipe=replace(recipe, net="resnet8"), clients=2, every=1)
    assert len(client_data(federation, digits, 0)) == 2
