"""Paths through state that is no plain weight, each against the network that should be there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from companion.connectivity import Walker, barrier, plane, segment
from companion.connectivity.batches import STATISTICS
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import layout, snapshot
from companion.data import Split
from companion.features import features, stitch
from companion.layerwise import sweep
from companion.rebasin import merge_many, repair, reset_batchnorm
from companion.rebasin.repair import averaged
from companion.rebasin.spec import Spec

Make = Callable[[], nn.Module]
LAYERS = (0, 3, 5)


def data(label: str, n: int) -> Split:
    draw = Key("states", label).generator()
    x = torch.randn(n, 1, 5, 5, generator=draw)
    return Split(x, torch.randint(3, (n,), generator=draw))


SPLITS = {"train": data("train", 120), "test": data("test", 60)}
X, Y = SPLITS["test"].x, SPLITS["test"].y


def plain() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, 3)),
    )


def made(make: Make, number: int, steps: int = 4) -> Any:
    """A network after a few steps, in eval mode: two of them differ in all they store."""
    with Key("states", "net", number).seeded(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old weight norm
        net = make()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(SPLITS["train"].x), SPLITS["train"].y).backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def loss(net: nn.Module, theta: Any = None) -> float:
    if theta is not None:
        net.load_state_dict(theta)
    return float(F.cross_entropy(net(X), Y))


@torch.no_grad()
def halfway(*nets: Any, tensor: Callable[[Any, str], Tensor] = getattr) -> nn.Sequential:
    """The plain network of the mean of what the layers of ``nets`` compute with."""
    out = plain()
    for net in nets:
        net(X)  # hooks compute in a forward pass
    for i in LAYERS:
        for name in ("weight", "bias"):
            mean = torch.stack([tensor(net[i], name) for net in nets]).mean(0)
            getattr(out[i], name).copy_(mean)
    return out


# ---- what is kept from one forward pass to the next


class Kept(nn.Module):
    """Computes something of its weights once in eval mode, as LeViT does its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.bias = nn.Linear(25, 3), nn.Parameter(torch.randn(3))
        self.bias_cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training or "bias" not in self.bias_cache:
            self.bias_cache["bias"] = 3 * self.bias
        return self.out(x.flatten(1)) + self.bias_cache["bias"]  # type: ignore[no-any-return]  # a module returns Any


def test_nothing_is_kept_of_other_weights() -> None:
    nets = [made(Kept, i) for i in range(2)]
    used = made(Kept, 2)
    used(X)
    found = segment(used, snapshot(nets[0]), snapshot(nets[1]), SPLITS, points=3).values["test"]
    a, b = (net.state_dict() for net in nets)
    mean = {k: (v + b[k]) / 2 for k, v in a.items()}
    expected = [loss(Kept().eval(), theta) for theta in (a, mean, b)]
    assert found["loss"] == pytest.approx(expected, abs=1e-6)


def test_float64_networks_on_float32_data() -> None:
    a, b = (snapshot(made(plain, i)) for i in range(2))
    one, two = ({k: v.double() for k, v in t.items()} for t in (a, b))
    found = barrier(plain().double(), one, two, SPLITS, points=3, max_error=100)
    assert "weights in float64 are measured in float32" in found.notes
    assert found.curve == barrier(plain(), a, b, SPLITS, points=3, max_error=100).curve


# ---- weights that are computed


class Bent(nn.Module):
    """A parametrization of somebody's own, with a parameter and a buffer of its own."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(1 + torch.rand(()))
        self.register_buffer("shift", torch.rand(()))

    def forward(self, weight: Tensor) -> Tensor:
        return self.gain * torch.tanh(weight) + 0.1 * self.shift


def each(how: Callable[[nn.Module], Any], *layers: int) -> Make:
    def make() -> nn.Module:
        net = plain()
        for i in layers or LAYERS:
            how(net[i])
        return net

    return make


def masked(net: nn.Module) -> None:
    prune.random_unstructured(net, "weight", 0.5)
    prune.l1_unstructured(net, "weight", 0.2)


COMPUTED: dict[str, Make] = {
    "weight norm": each(weight_norm),
    "weight norm of a bias": each(lambda m: weight_norm(m, "bias"), 3),
    "old weight norm": each(nn.utils.weight_norm),
    "orthogonal": each(orthogonal, 3, 5),
    "orthogonal by reflections": each(lambda m: orthogonal(m, orthogonal_map="householder"), 3),
    "masks": each(masked),
    "masks of channels": each(lambda m: prune.random_structured(m, "weight", 0.5, dim=0), 0),
    "one's own": each(lambda m: parametrize.register_parametrization(m, "weight", Bent()), 3),
}
KEEPS_NO_MEAN = ("orthogonal", "orthogonal by reflections", "one's own")


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_path_is_that_of_the_weights_that_layers_compute(kind: str) -> None:
    make = COMPUTED[kind]
    a, b, module = (made(make, i) for i in range(3))
    before = snapshot(module)
    found = barrier(module, snapshot(a), snapshot(b), SPLITS, points=3, max_error=100)
    expected = [loss(a), loss(halfway(a, b)), loss(b)]
    assert found.valid and found.curve.values["test"]["loss"] == pytest.approx(expected, abs=1e-6)
    assert any("effective weights" in text for text in found.notes)
    away = sum(
        float((getattr(a[i], n) - getattr(b[i], n)).detach().square().sum())
        for i in LAYERS
        for n in ("weight", "bias")
    )
    assert found.distance == pytest.approx(away**0.5, rel=1e-5)
    after = module.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items()), "the caller's own stays"
    assert loss(module) == loss(module), "and it still runs"


@pytest.mark.parametrize("kind", ["weight norm", "masks", "old weight norm"])
def test_every_instrument_walks_in_the_same_weights(kind: str) -> None:
    a, b, module = (made(COMPUTED[kind], i) for i in range(3))
    ends, middle = (snapshot(a), snapshot(b)), loss(halfway(a, b))
    layers = sweep(module, *ends, SPLITS, max_error=100)
    assert list(layers.groups) == ["0", "3", "5"] and layers.method == "replay"
    assert layers.full.valid
    assert layers.select("full")[0].half("test", "loss") == pytest.approx(middle, abs=1e-6)
    curve = segment(module, *ends, SPLITS, points=3, groups=["3"], rest="b")
    mixed = halfway(a, b)
    for i in (0, 5):
        for name in ("weight", "bias"):
            getattr(mixed[i], name).data.copy_(getattr(b[i], name))
    assert curve.values["test"]["loss"][1] == pytest.approx(loss(mixed), abs=1e-6)
    between = features(module, *ends, SPLITS["test"], alphas=[0.5])
    assert between.path_loss[0.5] == pytest.approx(middle, abs=1e-6)
    assert stitch(module, *ends, SPLITS["test"]).closed
    assert plane(module, snapshot(module), *ends, SPLITS, points=3).x
    assert Walker(module, SPLITS).at(ends[1])["test"].loss == pytest.approx(loss(b), abs=1e-6)


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_merged_network_is_stored_as_its_ends_are(kind: str) -> None:
    a, b, module = (made(COMPUTED[kind], i) for i in range(3))
    if kind in KEEPS_NO_MEAN:
        with pytest.raises(BadParameter, match=r"layer '3': .* cannot hold the merged weight"):
            averaged(module, (snapshot(a), snapshot(b)), (0.5, 0.5))
        return
    for alpha, wanted in ((0.0, loss(a)), (0.5, loss(halfway(a, b))), (1.0, loss(b))):
        theta = averaged(module, (snapshot(a), snapshot(b)), (1 - alpha, alpha))
        assert theta.keys() == a.state_dict().keys()
        assert loss(module, theta) == pytest.approx(wanted, abs=1e-5)
    got = repair(module, snapshot(a), snapshot(b), SPLITS["train"].x)
    assert list(got.scale) == ["0", "3"]
    assert all(v == pytest.approx(1, abs=1e-3) for n, v in got.after.items() if n != "5")
    module.load_state_dict(dict(got.theta))


def test_a_mean_of_what_weights_are_computed_from_is_refused() -> None:
    thetas = [snapshot(made(COMPUTED["weight norm"], i)) for i in range(2)]
    with pytest.raises(BadParameter, match=r"0.parametrizations.weight.original0.* another"):
        merge_many(Spec({}, {}, ()), thetas)


# ---- spectral norm


@torch.no_grad()
def divided(net: Any, name: str) -> Any:
    """A tensor of a layer before spectral norm, which is the mean's to divide."""
    if parametrize.is_parametrized(net, name):
        return net.parametrizations[name].original
    stored = getattr(net, f"{name}_orig", None)
    return getattr(net, name) if stored is None else stored


@pytest.mark.parametrize(
    ("make", "dim"),
    [
        (each(spectral_norm, 0, 3), 0),
        (each(nn.utils.spectral_norm, 0, 3), 0),
        (each(lambda m: spectral_norm(m, dim=1), 0, 3), 1),
    ],
    ids=["parametrization", "hook", "columns"],
)
def test_between_networks_each_point_has_its_own_singular_value(make: Make, dim: int) -> None:
    a, b, module = (made(make, i) for i in range(3))
    found = barrier(module, snapshot(a), snapshot(b), SPLITS, points=3, max_error=100)
    middle: Any = halfway(a, b, tensor=divided)
    with torch.no_grad():
        for i in (0, 3):
            weight = middle[i].weight
            weight /= torch.linalg.matrix_norm(weight.movedim(dim, 0).flatten(1), 2)
    expected = [loss(a), loss(middle), loss(b)]
    assert found.valid, found
    assert found.curve.values["test"]["loss"] == pytest.approx(expected, abs=1e-6)
    assert any("own largest singular values" in text for text in found.notes)
    theta = averaged(module, (snapshot(a), snapshot(b)), (0.5, 0.5))
    assert loss(module, theta) == pytest.approx(loss(middle), abs=1e-6)
    full = sweep(module, snapshot(a), snapshot(b), SPLITS, max_error=100).select("full")[0]
    assert full.half("test", "loss") == pytest.approx(loss(middle), abs=1e-6)


# ---- complex numbers, whole numbers


class Waves(nn.Module):
    """A filter in the frequencies, with complex weights and a complex buffer."""

    phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, 5, 3, dtype=torch.cfloat))
        self.register_buffer("phase", torch.randn(5, 3, dtype=torch.cfloat))
        self.out = nn.Linear(100, 3)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft2(x) * self.filter * self.phase
        return self.out(torch.fft.irfft2(waves, s=(5, 5)).flatten(1))


def test_complex_entries_move() -> None:
    a, b, module = (made(Waves, i) for i in range(3))
    ends = (snapshot(a), snapshot(b))
    found = barrier(module, *ends, SPLITS, points=3, max_error=100)
    mean = {k: (v + ends[1][k]) / 2 for k, v in ends[0].items()}
    expected = [loss(a), loss(made(Waves, 3), mean), loss(b)]
    assert found.valid and found.curve.values["test"]["loss"] == pytest.approx(expected, abs=1e-6)
    learnt = [n for n, _ in module.named_parameters()]
    away = sum(float((ends[0][n] - ends[1][n]).abs().square().sum()) for n in learnt)
    assert found.distance == pytest.approx(away**0.5)
    assert layout(module).parameters == ("filter", "out.weight", "out.bias")
    assert torch.equal(averaged(module, ends, (0.0, 1.0))["filter"], ends[1]["filter"])
    assert sweep(module, *ends, SPLITS, max_error=100).full.valid


class Shuffled(nn.Module):
    """Pixels in an order that is stored; ``steps`` counts and changes nothing."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(25))
        self.register_buffer("steps", torch.randint(100, ()))
        self.out = nn.Linear(25, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.flatten(1)[:, self.order])


def test_whole_numbers_that_differ_are_refused_if_they_matter() -> None:
    a, b, module = (made(Shuffled, i) for i in range(3))
    ends = (snapshot(a), snapshot(b))
    assert not torch.equal(ends[0]["steps"], ends[1]["steps"])
    for call in (
        lambda: barrier(module, *ends, SPLITS, points=3, max_error=100),
        lambda: sweep(module, *ends, SPLITS),
        lambda: features(module, *ends, SPLITS["test"]),
        lambda: repair(module, *ends, X),
        lambda: averaged(module, ends, (0.5, 0.5)),
    ):
        with pytest.raises(BadParameter, match=r"A and B: order.*int64.* no line between"):
            call()
    ends[1]["order"] = ends[0]["order"].clone()
    assert barrier(module, *ends, SPLITS, points=3, max_error=100).valid, "counters may differ"


# ---- norms


def tracked(norm: Callable[[], nn.Module], flat: bool = False) -> Make:
    def make() -> nn.Module:
        first = nn.Flatten(2) if flat else nn.Identity()
        return nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), first, norm(), nn.ReLU(), nn.Flatten()),
            nn.Linear(100, 3),
        )

    return make


@pytest.mark.parametrize(
    "make",
    [
        tracked(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        tracked(lambda: nn.InstanceNorm1d(4, track_running_stats=True), flat=True),
    ],
    ids=["2d", "1d"],
)
def test_running_statistics_of_instance_norm_are_measured_in_all_modes(make: Make) -> None:
    a, b, module = (made(make, i) for i in range(3))
    ends = (snapshot(a), snapshot(b))
    found = barrier(module, *ends, SPLITS, points=3, max_error=100)
    assert list(found.curves) == ["interpolate", "reestimate", "batch"]
    assert found.valid and "re-estimated on 120 training inputs" in found.gate("G5").detail
    mean = {k: (v + ends[1][k]) / 2 for k, v in ends[0].items()}
    net = made(make, 3)
    assert found.curve.values["test"]["loss"][1] == pytest.approx(loss(net, mean), abs=1e-6)
    net[2].momentum = 1.0  # as all inputs are one batch
    net.train()
    with torch.no_grad():
        net(SPLITS["train"].x)
    anew = loss(net.eval())
    assert found.curves["reestimate"].values["test"]["loss"][1] == pytest.approx(anew, abs=1e-6)
    theta = reset_batchnorm(module, mean, SPLITS["train"].x)
    assert loss(net, theta) == pytest.approx(anew, abs=1e-6)
    assert repair(module, *ends, SPLITS["train"].x).reset == ("2",)


def test_a_batchnorm_that_runs_twice_averages_both_runs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm2d(1), nn.Linear(25, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(3 * self.norm(x) + 1).flatten(1))

    module = made(Twice, 0)
    walker = Walker(module, SPLITS, bn="reestimate", batch=40)
    walker.at(snapshot(module))
    parts, mean = SPLITS["train"].x.split(40), 0.0
    for x in parts:  # the second run sees what the first has normalised: mean 1 (and bias)
        norm = module.norm
        first = F.batch_norm(x, None, None, norm.weight, norm.bias, True)
        mean += float(x.mean() + (3 * first + 1).detach().mean()) / (2 * len(parts))
    found = walker.module.get_buffer("norm.running_mean")
    assert float(found) == pytest.approx(mean, abs=1e-6)


def test_batchnorm_without_statistics_measures_batches_of_one_size_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = tracked(lambda: nn.BatchNorm2d(4, track_running_stats=False))
    a, b, module = (made(make, i) for i in range(3))
    many = {"test": data("many", 2 * STATISTICS + 100)}
    found = barrier(module, snapshot(a), snapshot(b), many, points=3, max_error=100)
    assert list(found.curves) == ["batch"] and found.valid
    assert f"each batch of up to {STATISTICS} by itself" in found.gate("G5").detail
    with torch.no_grad():
        parts = zip(many["test"].x.tensor_split(3), many["test"].y.tensor_split(3), strict=True)
        sums = [float(F.cross_entropy(a(x), y, reduction="sum")) for x, y in parts]
    expected = sum(sums) / len(many["test"])
    assert found.curve.values["test"]["loss"][0] == pytest.approx(expected, abs=1e-6)
    layers = sweep(module, snapshot(a), snapshot(b), many, max_error=100)
    assert layers.ends["test"]["loss"][0] == pytest.approx(expected, abs=1e-6)
    between = features(module, snapshot(a), snapshot(b), many["test"])
    assert between.losses["a"] == pytest.approx(expected, abs=1e-6)


# ---- precision


def test_a_weight_computed_in_two_steps_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = plain()
        torch.nn.utils.weight_norm(net[3])
        prune.random_unstructured(net[3], "weight_v", 0.5)
    theta = snapshot(net)
    with pytest.raises(BadParameter, match="layer '3': its weight"):
        segment(net, theta, theta, SPLITS, points=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    a, b = (made(plain, i).to(dtype) for i in range(2))
    ends = (snapshot(a), snapshot(b))
    found = barrier(plain().to(dtype), *ends, SPLITS, points=3, max_error=100)
    wide = [{k: v.float() for k, v in end.items()} for end in ends]
    mean = {k: (v + wide[1][k]) / 2 for k, v in wide[0].items()}
    expected = [loss(plain(), t) for t in (wide[0], mean, wide[1])]
    assert found.valid and found.curve.values["test"]["loss"] == pytest.approx(expected, abs=1e-6)
    assert any("measured in float32" in text for text in found.notes)


def test_outputs_that_overflow_half_precision_are_numbers_in_float32() -> None:
    def loud() -> nn.Module:
        net: Any = plain()
        net[5].weight.data *= 1e6
        return net

    stored = (snapshot(made(loud, i, steps=0).half()) for i in range(2))
    a, b = ({k: v.clamp(-6e4, 6e4) for k, v in end.items()} for end in stored)
    found = barrier(plain().half(), a, b, SPLITS, points=3, max_error=100)
    assert all(v < float("inf") for v in found.curve.values["test"]["loss"])
