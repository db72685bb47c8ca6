"""Slopes, curvatures, spectrum, predictors: exact on toys, and against independent computations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from toypairs import DIGITS, NETS, Examples, Theta, pair_of, split_of

from companion import data, models
from companion.connectivity import Walker, segment
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import flatten, layout, snapshot
from companion.landscape import (
    PREDICTORS,
    Blocks,
    Local,
    Surface,
    combined,
    cos_of_branches,
    fit_bend,
    group_prediction,
    hessian_trace,
    inner,
    layer_predictions,
    length,
    moved,
    path_curvature,
    predictions,
    random_direction,
    restricted,
    scaled,
    top_eigenvalues,
    towards,
    weighted_curvature,
)
from companion.layerwise import Sweep, layer_groups, sweep
from companion.rebasin import derive, merge_many

# --- toys: everything exact


def own_loss(outputs: Tensor, _: Tensor) -> tuple[Tensor, Tensor, int]:
    """The network computes its loss itself."""
    return outputs.sum(), torch.zeros(()), len(outputs)


ANY: Any = Examples(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))


class Product(nn.Module):
    """(ab - 1)²: two valleys, a saddle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return ((self.a.weight * self.b.weight - 1) ** 2).expand(len(x), 1)


class Bowl(nn.Module):
    """½ θᵀ M θ + c · θ."""

    m: Tensor
    c: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = Key("bowl").generator()
        half = torch.randn(7, 7, generator=generator, dtype=torch.float64)
        self.theta = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        self.register_buffer("m", half + half.T, persistent=False)
        self.register_buffer("c", torch.arange(7.0).double(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        value = self.theta @ self.m @ self.theta / 2 + self.c @ self.theta
        return value.expand(len(x), 1)


def at(a: float, b: float) -> Theta:
    return {
        n: torch.tensor([[v]], dtype=torch.float64) for n, v in (("a.weight", a), ("b.weight", b))
    }


def line_of(module: nn.Module, a: Theta, b: Theta, points: int = 31) -> tuple[Any, list[float]]:
    walker = Walker(module.double(), {"data": ANY}, score=own_loss)
    curve = segment(module, a, b, {"data": ANY}, points=points, walker=walker)
    return curve.alphas, list(curve.values["data"]["loss"])


@pytest.mark.parametrize(
    ("a", "b", "barrier"),
    [((1, 1), (-1, -1), 1.0), ((0.5, 2), (2, 0.5), 0.5625**2), ((1.5, 0.4), (0.2, 3), None)],
)
def test_the_two_valleys_are_exact(a: Any, b: Any, barrier: float | None) -> None:
    surface, start, end = Surface(Product(), ANY, score=own_loss), at(*a), at(*b)
    delta = towards(Product(), start, end)
    ends = (surface.local(start, delta), surface.local(end, delta))
    alphas, losses = line_of(Product(), start, end)
    height = losses[15] - (losses[0] + losses[-1]) / 2
    assert barrier is None or height == pytest.approx(barrier, abs=1e-9)
    # Along a line the loss is a polynomial of degree four: the quintic knows all of it.
    assert predictions(*ends)["quintic"] == pytest.approx(height, abs=1e-9)
    for t in (0.25, 0.7):
        between = surface.loss(moved(start, delta, t)) - (1 - t) * losses[0] - t * losses[-1]
        assert predictions(*ends, at=t)["quintic"] == pytest.approx(between, abs=1e-9)
        assert weighted_curvature(alphas, path_curvature(alphas, losses), t) == pytest.approx(
            between, abs=1e-9
        )
    for local, (p, q) in zip(ends, (a, b), strict=True):
        u, v = (float(d) for d in delta.values())
        slope = 2 * (p * q - 1) * (q * u + p * v)
        bend = 2 * (q * u + p * v) ** 2 + 4 * (p * q - 1) * u * v
        assert (local.slope, local.curvature) == pytest.approx((slope, bend), abs=1e-9)
    found = path_curvature(alphas, losses)
    assert found[0] == pytest.approx(ends[0].curvature, abs=1e-9)
    # The Hessian [[2b², 4ab - 2], [·, 2a²]] and its eigenvalues.
    p, q = a
    rows = [[2 * q * q, 4 * p * q - 2], [4 * p * q - 2, 2 * p * p]]
    matrix = torch.tensor(rows, dtype=torch.float64)
    spectrum = top_eigenvalues(surface, start, 2)
    assert spectrum.values == pytest.approx(
        torch.linalg.eigvalsh(matrix).flip(0).tolist(), abs=1e-9
    )


def test_a_quadratic_is_exact() -> None:
    bowl = Bowl()
    surface = Surface(bowl, ANY, score=own_loss)
    draw = Key("ends").generator()
    a, b = ({"theta": torch.randn(7, generator=draw).double()} for _ in range(2))
    delta = towards(bowl, a, b)
    d, m = delta["theta"], bowl.m
    ends = (surface.local(a, delta), surface.local(b, delta))
    for local, theta in zip(ends, (a, b), strict=True):
        gradient = m @ theta["theta"] + bowl.c
        assert torch.allclose(surface.gradient(theta)["theta"], gradient, atol=1e-9)
        assert local.slope == pytest.approx(float(gradient @ d), abs=1e-9)
        assert local.curvature == pytest.approx(float(d @ m @ d), abs=1e-9)
        assert torch.allclose(surface.hessian_times(theta, delta)["theta"], m @ d, atol=1e-9)
    for t in (0.5, 0.3):
        true = -t * (1 - t) / 2 * float(d @ m @ d)
        # A shared bowl: the curvature alone has the wrong sign.
        assert predictions(*ends, at=t)["curvature"] == pytest.approx(-true, abs=1e-9)
        for name in ("taylor", "cubic", "quintic"):
            assert predictions(*ends, at=t)[name] == pytest.approx(true, abs=1e-9), name
    alphas, losses = line_of(bowl, a, b)
    height = losses[15] - (losses[0] + losses[-1]) / 2
    assert weighted_curvature(alphas, path_curvature(alphas, losses)) == pytest.approx(
        height, abs=1e-9
    )
    values = torch.linalg.eigvalsh(m).flip(0)
    found = top_eigenvalues(surface, a, 7, tolerance=1e-12)
    assert found.values == pytest.approx(values.tolist(), abs=1e-9)
    assert found.lowest == pytest.approx(float(values[-1]), abs=1e-9)


# --- networks, against independent computations

CASES = [
    *((name, "interpolate") for name in NETS),
    ("batch norm", "batch"),
]


@pytest.mark.parametrize(("name", "bn"), CASES)
def test_derivatives_agree_with_differences(name: str, bn: str) -> None:
    net, a, b = pair_of(NETS[name])
    surface = Surface(net, split_of(name, 40), bn=bn)
    delta = towards(net, a, b)
    local = surface.local(a, delta)
    start = {n: v.double() if v.is_floating_point() else v for n, v in a.items()}
    h = 1e-6
    low, high = (surface.local(moved(start, delta, t), delta) for t in (-h, h))
    assert (high.loss - low.loss) / (2 * h) == pytest.approx(local.slope, rel=1e-4)
    assert (high.slope - low.slope) / (2 * h) == pytest.approx(local.curvature, rel=1e-4)
    assert local.loss == pytest.approx(surface.loss(a), rel=1e-12)
    assert surface.differences(a, delta, 1e-7).slope == pytest.approx(local.slope, rel=1e-4)
    # Over the parameters alone, gradient and Hessian-vector product say the same.
    step = restricted(delta, layout(net).parameters)
    own = surface.local(a, step)
    assert inner(surface.gradient(a), step) == pytest.approx(own.slope, rel=1e-9)
    assert inner(surface.hessian_times(a, step), step) == pytest.approx(own.curvature, rel=1e-9)


def test_batchnorm_statistics_move_with_the_weights() -> None:
    net, a, b = pair_of(NETS["batch norm"])
    surface = Surface(net, DIGITS.test.head(40))
    delta = towards(net, a, b)
    own = restricted(delta, layout(net).parameters)
    assert surface.local(a, delta).slope != pytest.approx(surface.local(a, own).slope, rel=1e-3)
    with pytest.raises(BadParameter, match="reestimate"):
        Surface(net, DIGITS.test.head(40), bn="reestimate")


def test_the_loss_is_the_walkers_and_batches_do_not_matter() -> None:
    net, a, b = pair_of(NETS["mlp"])
    split = DIGITS.test.head(50)
    whole, parts = Surface(net, split), Surface(net, split, batch=7)
    assert whole.loss(a) == pytest.approx(Walker(net, {"x": split}).at(a)["x"].loss, rel=1e-5)
    delta = towards(net, a, b)
    x, y = whole.local(a, delta), parts.local(a, delta)
    assert (x.loss, x.slope, x.curvature) == pytest.approx((y.loss, y.slope, y.curvature))
    half = Surface(net, split, dtype=torch.float32).local(a, delta)
    assert half.curvature == pytest.approx(x.curvature, rel=1e-3)


def test_blocks_add_up_and_each_is_its_own_direction() -> None:
    net, a, b = pair_of(NETS["group norm"])
    surface = Surface(net, DIGITS.test.head(30))
    delta, groups = towards(net, a, b), layer_groups(net)
    blocks, whole = surface.blocks(a, delta, groups), surface.local(a, delta)
    assert blocks.labels == tuple(groups)
    assert blocks.local.slope == pytest.approx(whole.slope, rel=1e-9)
    assert blocks.local.curvature == pytest.approx(whole.curvature, rel=1e-9)
    assert sum(blocks.squares) == pytest.approx(length(delta) ** 2)
    for i, (label, names) in enumerate(list(groups.items())[:3]):
        alone = surface.local(a, restricted(delta, names))
        assert alone.curvature == pytest.approx(blocks.matrix[i][i], rel=1e-9), label
        assert alone.slope == pytest.approx(blocks.slopes[i], rel=1e-9), label
    assert torch.equal(torch.tensor(blocks.matrix), torch.tensor(blocks.matrix).T)
    assert blocks.cross_share == pytest.approx(
        1 - sum(r[i] for i, r in enumerate(blocks.matrix)) / whole.curvature
    )


def test_layer_predictions_are_the_expansion_of_adilovas_barrier() -> None:
    torch.manual_seed(0)
    make = lambda: nn.Sequential(  # noqa: E731  a factory of one line
        *(nn.Flatten(), nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 10))
    )
    net, split = make(), DIGITS.test.head(60)
    a = snapshot(net)
    b = {n: v + 0.004 * torch.randn_like(v) for n, v in a.items()}
    surface, delta = Surface(net, split), towards(net, a, b)
    expected = layer_predictions(surface.blocks(a, delta, layer_groups(net)), surface.loss(b))
    back = layer_predictions(
        surface.blocks(b, delta, layer_groups(net)).reversed(), surface.loss(a)
    )
    found = sweep(net, a, b, {"x": split}, Sweep(kinds=("single",)), max_error=100)
    for label, heights in found.heights("single", "x", "loss").items():
        assert heights["a"] == pytest.approx(expected[label], abs=2e-6), label
        assert heights["b"] == pytest.approx(back[label], abs=2e-6), label
    # Two layers together: theirs, and the curvature between them.
    base, two = surface.blocks(a, delta, layer_groups(net)), ("1", "5")
    both = Sweep(kinds=(), subsets=(("two", two),), rest="a")
    (height,) = sweep(net, a, b, {"x": split}, both, max_error=100).worst("subset", "x").values()
    expected_of_both = group_prediction(base, surface.loss(b), two)
    assert height == pytest.approx(expected_of_both, abs=2e-6)
    cross = expected_of_both + (base.loss - surface.loss(b)) / 2 - expected["1"] - expected["5"]
    assert cross == pytest.approx(base.matrix[0][2] / 4) and abs(cross) > 4e-6
    with pytest.raises(BadParameter, match="'9' is none of 1, 3, 5"):
        group_prediction(base, 0.0, ("9",))


@pytest.mark.parametrize("tied", [True, False])
def test_attention_and_tied_weights(tied: bool) -> None:
    name = f"gpt:layers=1,width=8,heads=2,positions=6,tied={str(tied).lower()}"
    net = models.build(name, (6,), 11)
    a = snapshot(net)
    with Key("other").seeded():
        b = snapshot(models.build(name, (6,), 11, Key("gpt", 1)))
    split = Examples(*(torch.randint(11, (9, 6), generator=Key("x").generator()) for _ in "xy"))
    surface: Any = Surface(net, split)  # type: ignore[arg-type]  # wrong on purpose
    delta = towards(net, a, b)
    local, near = surface.local(a, delta), surface.differences(a, delta, 1e-4)
    assert near.slope == pytest.approx(local.slope, rel=1e-4)
    assert near.curvature == pytest.approx(local.curvature, rel=1e-4)


# --- spectrum

SMALL = "mlp:widths=5x2"


@pytest.fixture(scope="module")
def small() -> tuple[Surface, Theta, Tensor]:
    """A surface, a network, and all of its Hessian."""
    net = models.build(SMALL, DIGITS.in_shape, 10, Key("small"))
    theta = snapshot(net)
    surface = Surface(net, DIGITS.test.head(60))
    times = surface.hessian(theta)
    size = len(flatten(theta, surface.layout.parameters))
    dense = torch.stack([times(row) for row in torch.eye(size, dtype=torch.float64)])
    assert torch.allclose(dense, dense.T, atol=1e-10)
    return surface, theta, dense


@pytest.mark.parametrize("kept", [None, 8])
def test_the_top_eigenvalues_are_those_of_the_whole_hessian(small: Any, kept: int | None) -> None:
    surface, theta, dense = small
    true = torch.linalg.eigvalsh(dense).flip(0)
    found = top_eigenvalues(surface, theta, 5, tolerance=1e-6, kept=kept)
    assert found.values == pytest.approx(true[:5].tolist(), rel=1e-6)
    assert found.lowest >= float(true[-1]) - 1e-9
    for value, error, v in zip(found.values, found.errors, found.vectors, strict=True):
        assert length(v) == pytest.approx(1)
        assert surface.local(theta, v).curvature == pytest.approx(value, rel=1e-6)
        rest = combined([(1, surface.hessian_times(theta, v)), (-value, v)])
        assert length(rest) == pytest.approx(error, rel=1e-3, abs=1e-8)
        assert float((true - value).abs().min()) <= error + 1e-9
    again = top_eigenvalues(surface, theta, 5, tolerance=1e-6, kept=kept)
    assert again.values == found.values


def test_a_rough_answer_says_how_rough_it_is(small: Any) -> None:
    surface, theta, dense = small
    true = torch.linalg.eigvalsh(dense)
    found = top_eigenvalues(surface, theta, 3, tolerance=0, most=5)
    assert found.products == 5 and max(found.errors) > 1e-3
    for value, error in zip(found.values, found.errors, strict=True):
        assert float((true - value).abs().min()) <= error
    with pytest.raises(BadParameter, match="at least 7"):
        top_eigenvalues(surface, theta, 5, kept=4)


def test_the_trace_is_within_its_error(small: Any) -> None:
    surface, theta, dense = small
    net = models.build(SMALL, DIGITS.in_shape, 10)
    groups = layer_groups(net)
    found = hessian_trace(surface, theta, probes=40, groups=groups)
    assert abs(found.whole.value - float(dense.trace())) < 4 * found.whole.error
    sizes = [sum(theta[n].numel() for n in names) for names in groups.values()]
    # The layout is that of the layers, one after the other.
    for (label, estimate), part in zip(
        found.blocks.items(), dense.diagonal().split(sizes), strict=True
    ):
        assert abs(estimate.value - float(part.sum())) < 4 * estimate.error, label
    assert sum(e.value for e in found.blocks.values()) == pytest.approx(found.whole.value)


# A package that it uses is written with torch.jit.script, which torch warns of.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_curvlinops_agrees(small: Any) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    _, theta, dense = small
    net = models.build(SMALL, DIGITS.in_shape, 10).double()
    net.load_state_dict(theta)
    split = DIGITS.test.head(60)
    parts = list(zip(split.x.double().split(20), split.y.split(20), strict=True))
    other = curvlinops.HessianLinearOperator(
        net, nn.CrossEntropyLoss(), list(net.parameters()), parts
    )
    vector = torch.randn(len(dense), generator=Key("v").generator()).double()
    assert torch.allclose(torch.as_tensor(other @ vector), dense @ vector, atol=1e-8)


# --- predictors and the identity


def test_the_predictors_are_the_formulas_of_the_chapter() -> None:
    a, b = Local(0.3, -1.2, 4.0), Local(0.5, 0.7, 2.5)
    found = predictions(a, b)
    assert found == pytest.approx(
        {
            "curvature": (4.0 + 2.5) / 16,
            "taylor": (-1.2 - 0.7) / 4 + (4.0 + 2.5) / 16,
            "cubic": (-1.2 - 0.7) / 8,
            "quintic": 5 / 32 * (-1.2 - 0.7) + (4.0 + 2.5) / 64,
        }
    )
    for predict in PREDICTORS.values():
        with pytest.raises(BadParameter, match="between 0 and 1"):
            predict(a, b, 1.0)


def test_the_taylor_expansion_is_exact_up_to_cubics_at_the_middle() -> None:
    def cubic(t: float) -> Local:
        return Local(1 + t - 3 * t**2 + 5 * t**3, 1 - 6 * t + 15 * t**2, -6 + 30 * t)

    ends = cubic(0.0), cubic(1.0)
    height = cubic(0.5).loss - (ends[0].loss + ends[1].loss) / 2
    assert predictions(*ends)["taylor"] == pytest.approx(height)
    assert predictions(*ends)["cubic"] == pytest.approx(height)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_identity_holds_and_the_hessian_misses_the_kinks(activation: Any) -> None:
    def make(label: int) -> Theta:
        with Key("identity", label).seeded():
            return snapshot(net())

    def net() -> nn.Module:
        return nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 20), activation()),
            *(nn.Linear(20, 20), activation(), nn.Linear(20, 10)),
        )

    module, split = net(), DIGITS.train.head(300)
    a, b = (make(label) for label in (1, 2))
    surface, delta = Surface(module, split), towards(module, a, b)
    curve = segment(module, a, b, {"x": split}, points=31, walker=Walker(module, {"x": split}))
    losses = curve.values["x"]["loss"]
    true = losses[15] - (losses[0] + losses[-1]) / 2
    by_losses = weighted_curvature(curve.alphas, path_curvature(curve.alphas, losses))
    assert by_losses == pytest.approx(true, rel=1e-3)
    hessian = [surface.local(moved(a, delta, t), delta).curvature for t in curve.alphas]
    by_hessian = weighted_curvature(curve.alphas, hessian)
    if activation is nn.Tanh:
        assert by_hessian == pytest.approx(true, rel=1e-3)
    else:  # a ReLU's kinks are curvature without a second derivative
        assert by_hessian != pytest.approx(true, rel=0.05)


def test_what_is_no_path_is_refused() -> None:
    with pytest.raises(BadParameter, match="7 or more"):
        path_curvature((0, 0.5, 1), (1, 2, 1))
    with pytest.raises(BadParameter, match="from 0 to 1"):
        weighted_curvature((0, 0.5, 0.9), (1, 2, 1))


def test_the_angle_of_branches() -> None:
    names = ("w",)
    base, a, b = ({"w": torch.tensor(v)} for v in ([1.0, 1.0], [2.0, 1.0], [1.0, 3.0]))
    assert cos_of_branches(a, b, base, names) == pytest.approx(0)
    assert cos_of_branches(a, a, base, names) == pytest.approx(1)


def test_what_does_not_fit_is_named() -> None:
    net, a, b = pair_of(NETS["mlp"])
    surface, delta = Surface(net, DIGITS.test.head(9)), towards(net, a, b)
    with pytest.raises(BadParameter, match="no entry"):
        surface.local(a, {**delta, "ghost": torch.zeros(1)})
    with pytest.raises(BadParameter, match="no entry"):
        moved(a, {"ghost": torch.zeros(1)})
    less = {n: v for n, v in a.items() if n != "head.bias"}
    with pytest.raises(BadParameter, match="does not fit"):
        surface.local(less, delta)
    before = copy.deepcopy(a)
    surface.local(a, scaled(delta, 2))
    assert all(torch.equal(v, before[n]) for n, v in a.items())
    assert isinstance(surface.blocks(a, delta, {"all": layout(net).parameters}), Blocks)


@pytest.mark.parametrize("kind", ["weight norm", "a mask"])
def test_weights_that_are_computed_are_refused_by_the_layers_name(kind: str) -> None:
    """Directions are of weights: what a network stores in their place has other ones."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10))
    if kind == "a mask":
        prune.random_unstructured(module[1], "weight", 0.5)
    else:
        weight_norm(module[1])
    theta = {n: v.detach().clone() for n, v in module.state_dict().items()}
    part = data.load("digits").train.head(20)
    for look in (
        lambda: towards(module, theta, theta),
        lambda: random_direction(module, theta, Key("a")),
        lambda: Surface(module, part),
        lambda: fit_bend(module, theta, theta, part, steps=1),
    ):
        with pytest.raises(BadParameter, match=r"layer '1': its weight is computed .*remove"):
            look()
    spec = derive(module, part.x[:2])
    with pytest.raises(BadParameter, match=r"mean of weights, but 1\..* are what weights .*remove"):
        merge_many(spec, [theta, theta])
