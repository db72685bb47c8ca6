"""Labels that are left out, labels that do not exist, and outputs that are no numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion import data as datasets
from companion.connectivity import Walker, barrier, classification
from companion.connectivity.gates import commonest, guessing
from companion.core.errors import BadParameter
from companion.core.losses import IGNORED
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.data import Split
from companion.experiments.merged import read_logits
from companion.experiments.methods import gradient
from companion.features import features, stitch
from companion.landscape.bends import fit_bend
from companion.layerwise import sweep
from companion.rebasin import derive, ste
from companion.rebasin.calibration import calibrated_curve
from companion.rebasin.ste import straight_through
from companion.tickets.scores import snip
from companion.training import Recipe, Run, State, advance_many, build


def draw(*label: str) -> torch.Generator:
    return Key("labels", *label).generator()


class Words(nn.Module):
    """Tokens (N, L) to logits (N, L, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))  # type: ignore[no-any-return]  # a module returns Any


def network(kind: str, number: int) -> nn.Module:
    with Key("labels", "net", number).seeded():
        layers = (nn.Flatten(), nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 7))
        return Words() if kind == "text" else nn.Sequential(*layers)


def split(kind: str) -> Split:
    """A third of the labels is left out: of images, of tokens, and one whole window."""
    if kind == "text":
        x = torch.randint(7, (40, 6), generator=draw("x"))
    else:
        x = torch.randn(90, 1, 4, 4, generator=draw("x"))
    y = torch.randint(7, x.shape[: 2 if kind == "text" else 1], generator=draw("y"))
    y[torch.rand(y.shape, generator=draw("out")) < 1 / 3] = IGNORED
    if kind == "text":
        y[3] = IGNORED
    return Split(x, y)


@torch.no_grad()
def truth(net: nn.Module, data: Split) -> tuple[float, float]:
    """Loss and error over the labels that are there."""
    kept = data.y >= 0
    logits, y = net(data.x)[kept], data.y[kept]
    return float(F.cross_entropy(logits, y)), 100 * float((logits.argmax(1) != y).double().mean())


@pytest.mark.parametrize("kind", ["images", "text"])
def test_ignored_labels_are_left_out_everywhere(kind: str) -> None:
    data = split(kind)
    a, b, module = (network(kind, i) for i in range(3))
    ends = (snapshot(a), snapshot(b))
    wanted = [pytest.approx(truth(net, data), abs=1e-5) for net in (a, b)]
    found = barrier(module, *ends, {"test": data}, points=3, max_error=100)
    values = found.curve.values["test"]
    assert [(values["loss"][i], values["error"][i]) for i in (0, 2)] == wanted
    kept = data.y >= 0
    assert found.curve.sizes == {"test": 39 if kind == "text" else int(kept.sum())}
    often = 100 * (1 - int(torch.bincount(data.y[kept]).max()) / int(kept.sum()))
    assert commonest(data) == pytest.approx(often)
    assert guessing(data) == (commonest(data) if kind == "text" else None)
    layers = sweep(module, *ends, {"test": data}, max_error=100)
    assert (layers.ends["test"]["loss"][0], layers.ends["test"]["error"][0]) == wanted[0]
    seen = features(module, *ends, data)
    assert (seen.losses["a"], seen.errors["a"]) == wanted[0]
    assert seen.predictions == int(kept.sum())
    sewn = stitch(module, *ends, data)
    assert (sewn.ends["b"].loss, sewn.ends["b"].error) == wanted[1] and sewn.n == int(kept.sum())
    cool = calibrated_curve(module, *ends, data, {"test": data}, points=3)
    assert cool.curve.values["test"]["loss"][0] <= values["loss"][0] + 1e-9


@pytest.mark.parametrize("kind", ["images", "text"])
def test_ignored_labels_do_not_count_where_networks_learn(kind: str) -> None:
    """The straight-through estimator, bends, saliency, gradients: as if they were not there."""
    data, (a, b, module) = split(kind), (network(kind, i) for i in range(3))
    ends = (snapshot(a), snapshot(b))
    there = data.labelled()
    assert len(there) == (39 if kind == "text" else int((data.y >= 0).sum()))
    assert there.labelled() is there

    def learned(on: Split) -> list[Tensor]:
        spec = derive(module, on.x[:2])
        found = straight_through(spec, module, *ends, on, steps=3, batch=5, held_out=on)
        assert all(map(math.isfinite, found.details["loss"]))
        bend = fit_bend(module, *ends, on, steps=4, batch=5).anchors[1]
        scores = snip(module, ends[0], ["head.weight" if kind == "text" else "1.weight"], on)
        slopes = gradient(module, ends[0], on)
        held = torch.tensor([value for _, value in found.details["held out"]])
        return [held, *bend.values(), *scores.values(), *slopes.values()]

    for x, y in zip(learned(data), learned(there), strict=True):
        torch.testing.assert_close(x, y)
    half = ste.Midpoint(module, ends[0], data.x, ste.mean_loss)
    middle = {n: (v + ends[1][n]) / 2 for n, v in ends[0].items()}
    module.load_state_dict(middle)
    parts = [(data.x[:4], data.y[:4]), (data.x[4:], data.y[4:])]
    assert half.loss(ends[1], parts) == pytest.approx(truth(module, data)[0], abs=1e-5)

    logits = a(data.x).detach()
    found = read_logits(logits.flatten(0, -2), data.y)
    assert (found.loss, found.error) == pytest.approx(truth(a, data), abs=1e-5)
    nothing = Split(data.x, torch.full_like(data.y, IGNORED))
    with pytest.raises(BadParameter, match="no example has a label"):
        nothing.labelled()


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_ignored_labels_are_refused_before_a_training(engine: str) -> None:
    """A run's steps and orders are counted by examples: which of them count is part of the data."""
    digits = datasets.load("digits")
    y = digits.train.y.clone()
    y[5] = IGNORED
    given = replace(digits, train=Split(digits.train.x, y))
    run = Run(Recipe(net="mlp:widths=4", data="digits", steps=2, batch=50))
    cpu = torch.device("cpu")
    start = State(0, snapshot(build(run, digits, cpu)))
    with pytest.raises(BadParameter, match="data digits: labels of -100 in its training split"):
        advance_many([run, run], [start, start], 2, given, engine=engine)


@pytest.mark.parametrize("kind", ["images", "text"])
def test_labels_that_are_none_are_refused(kind: str) -> None:
    data, net = split(kind), network(kind, 0)
    for wrong in (7, -1):
        y = data.y.clone()
        y[0] = wrong
        with pytest.raises(BadParameter, match=rf"labels: .*{wrong}.* from 0 to 6; -100 is left"):
            Walker(net, {"test": Split(data.x, y)}).at(snapshot(net))
    nothing = Split(data.x, torch.full_like(data.y, IGNORED))
    with pytest.raises(BadParameter, match="split 'some': no example has a label"):
        Walker(net, {"some": nothing}).at(snapshot(net))
    with pytest.raises(BadParameter, match="no example has a label"):
        barrier(net, snapshot(net), snapshot(network(kind, 1)), {"test": nothing}, points=3)


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ([math.nan, 0.0, 1.0], True),
        ([math.nan] * 3, True),
        ([math.inf, 0.0, 0.0], True),  # where the right class is the infinite one, too
        ([-math.inf] * 3, True),
        ([3.0, -math.inf, 0.0], False),  # a class that is masked out
        ([3.0, 1e38, 0.0], True),
        ([1e38, 0.0, 0.0], False),
    ],
)
def test_outputs_that_are_no_numbers_are_errors(row: list[float], wrong: bool) -> None:
    outputs = torch.tensor([row, [9.0, 0.0, 0.0]])
    _, errors, count = classification(outputs, torch.zeros(2, dtype=torch.int64))
    assert (int(errors), int(count)) == (wrong, 2)
    _, errors, count = classification(outputs, torch.tensor([IGNORED, 0]))
    assert (int(errors), int(count)) == (0, 1)


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4, 4), (4, 3)])
def test_outputs_that_do_not_go_with_the_labels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadParameter, match=r"logits \(2, classes\) are needed"):
        classification(torch.zeros(shape), torch.zeros(2, dtype=torch.int64))


class OneIsNaN(nn.Module):
    """No number for the first example, whatever its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x / (x[:, :1] != 0))  # type: ignore[no-any-return]  # a module returns Any


def test_one_example_without_numbers_is_one_error() -> None:
    with Key("labels", "one").seeded():
        a, b = (snapshot(OneIsNaN()) for _ in range(2))
    x = torch.randn(50, 4, generator=draw("one"))
    x[0, 0] = 0
    data = {"test": Split(x, (x[:, 1] > 0).long())}
    found = barrier(OneIsNaN(), a, b, data, points=3, max_error=100)
    assert found.valid and found.height("test", "error") >= 0
    assert math.isnan(found.height("test", "loss")) and min(found.errors) >= 2
    assert found.curve.values["test"]["loss"] == (math.inf,) * 3


class Root(nn.Module):
    """No number at all half-way between a gain of 1 and one of -1."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.out = nn.Parameter(torch.ones(())), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.flatten(1)) * torch.sqrt(self.gain.abs() - 0.5)  # type: ignore[no-any-return]  # a module returns Any


def test_a_point_without_numbers_is_no_good_point_although_class_0_is_common() -> None:
    with Key("labels", "root").seeded():
        a, b = (snapshot(Root()) for _ in range(2))
    b["gain"] = -b["gain"]
    y = torch.zeros(50, dtype=torch.int64)
    y[:3] = 1
    data = {"test": Split(torch.randn(50, 1, 3, 3, generator=draw("root")), y)}
    curve = barrier(Root(), a, b, data, points=3, max_error=100).curve.values["test"]
    assert curve["error"][1] == 100 and curve["loss"][1] == math.inf
    swept = sweep(Root(), a, b, data, max_error=100)
    assert swept.select("full")[0].half("test", "error") == 100
