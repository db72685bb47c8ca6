"""Features of two networks: planted truths, a reference that stores everything, sites, tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reread import reread
from torch import Tensor, nn
from toypairs import DIGITS, Examples, Theta

from companion import models
from companion.core import codec
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.data import Split
from companion.features import DEFAULT_KINDS, Features, Stat, Taps, features, first_tensor, sites
from companion.features.measure import MODES, Products, compared

TEST = DIGITS.test.head(70)
ALPHAS = (0.25, 0.5, 0.75)


class Functional(nn.Module):
    """A ReLU in place, functional ones, a sum in place, and no module at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 12)
        self.norm = nn.BatchNorm1d(12)
        self.relu = nn.ReLU(inplace=True)
        self.inner = nn.ModuleList([Inner(), Inner()])
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x.flatten(1))))
        for block in self.inner:
            x = block(x)
        return F.log_softmax(self.head(x), 1)


class Inner(nn.Module):
    """A residual block with functional ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 12)
        self.two = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(F.relu(self.one(x)))
        y += x
        return y.relu_()


def built(spec: str, seed: int) -> nn.Module:
    return models.build(spec, DIGITS.in_shape, DIGITS.classes, Key("test", "features", seed))


def functional(seed: int) -> nn.Module:
    with Key("test", "functional", seed).seeded():
        return Functional()


def gpt(seed: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    words = {"vocab_size": 11, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 2}
    with Key("test", "gpt", seed).seeded():
        config = transformers.GPT2Config(**words, bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config)


NETS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": lambda seed: built("mlp:widths=24x2", seed),
    "resnet8": lambda seed: built("resnet8:width=4", seed),
    "functional": functional,
}


def pair(make: Callable[[int], nn.Module]) -> tuple[nn.Module, Theta, Theta]:
    """Two networks that differ in every entry, BatchNorm's statistics included."""
    out = []
    for seed in range(2):
        module = make(seed).train()
        if any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in module.modules()):
            with torch.no_grad():
                module(DIGITS.train.head(60).x * (1 + seed))
        out.append(snapshot(module))
    return make(5), out[0], out[1]


def mixed(a: Theta, b: Theta, alpha: float) -> Theta:
    return {
        k: ((1 - alpha) * v.double() + alpha * b[k].double()).to(v.dtype)
        if v.is_floating_point()
        else v
        for k, v in a.items()
    }


@torch.no_grad()
def stored(
    module: nn.Module, theta: Theta, x: Tensor, bn_x: Tensor | None = None
) -> dict[str, Tensor]:
    """Every module's outputs, and the network's, in float64: nothing of ours is used."""
    net = copy.deepcopy(module)
    net.load_state_dict(theta)
    if bn_x is not None:
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None
        net.train()
        net(bn_x)
    net.eval()
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(m: nn.Module, args: Any, out: Any) -> None:
            tensor = first_tensor(out)
            assert tensor is not None
            found[name] = tensor.double().clone()

        return keep

    for name, m in net.named_modules():
        m.register_forward_hook(hook(name or "output"))
    net(x)
    return found


def angles(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 - cos, <u, v> / <u, u> and <u, v> / <v, v> of the rows."""
    uu, uv, vv = (u * u).sum(1), (u * v).sum(1), (v * v).sum(1)
    return 1 - uv / uu.sqrt() / vv.sqrt(), uv / uu, uv / vv


def close(stat: Stat, values: Tensor) -> None:
    assert stat.n == len(values)
    assert stat.mean == pytest.approx(float(values.mean()), rel=1e-10, abs=1e-10)
    assert stat.std == pytest.approx(float(values.std(correction=0)), rel=1e-8, abs=1e-10)
    for got, q in ((stat.low, 0.05), (stat.median, 0.5), (stat.high, 0.95)):
        assert got == pytest.approx(float(values.quantile(q)), rel=1e-9, abs=1e-10)


def compare(
    found: Features, module: nn.Module, a: Theta, b: Theta, x: Tensor, rows: int = 1, **kw: Any
) -> int:
    """Check every layer that has a module with what a reference says. Returns how many."""
    of_a, of_b = (stored(module, t, x, **kw) for t in (a, b))
    checked = 0
    for alpha in found.alphas:
        between = stored(module, mixed(a, b, alpha), x, **kw)
        for layer in found.layers:
            if "#" in layer.name:
                continue
            fa, fb, f = (
                t[layer.name].flatten(0, rows - 1).flatten(1) for t in (of_a, of_b, between)
            )
            assert layer.size == f.shape[1]
            close(layer.baseline, angles(fa, fb)[0])
            gap, c, twin = angles(f, (1 - alpha) * fa + alpha * fb)
            close(layer.gap[alpha], gap)
            close(layer.c[alpha], c)
            close(layer.twin[alpha], twin)
            assert layer.ratio(alpha) == layer.gap[alpha].mean / layer.baseline.mean
            checked += 1
    return checked


# --- against a reference that stores everything ---------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_the_streamed_pass_equals_storing_everything(name):
    module, a, b = pair(NETS[name])
    before = copy.deepcopy(module.state_dict())
    found = features(module, a, b, TEST, batch=len(TEST))
    assert found.n == found.predictions == len(TEST) and found.per == "sample"
    assert compare(found, module, a, b, TEST.x) >= 3 * 5
    assert found.bn == ("none" if name == "mlp" else "interpolate")
    assert module.training and all(
        torch.equal(v, before[k]) for k, v in module.state_dict().items()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_errors_and_losses_of_ends_path_and_mixture():
    module, a, b = pair(NETS["mlp"])
    found = features(module, a, b, TEST, alphas=(0.3, 0.5))
    of_a, of_b = (stored(module, t, TEST.x)["output"] for t in (a, b))

    def score(logits: Tensor) -> tuple[float, float]:
        wrong = (logits.argmax(1) != TEST.y).double().mean()
        return 100 * float(wrong), float(F.cross_entropy(logits.float(), TEST.y))

    for end, logits in (("a", of_a), ("b", of_b)):
        error, loss = score(logits)
        assert found.errors[end] == error and found.losses[end] == pytest.approx(loss, rel=1e-6)
    for alpha in (0.3, 0.5):
        between = stored(module, mixed(a, b, alpha), TEST.x)["output"]
        error, loss = score(between)
        assert found.path[alpha] == error
        assert found.path_loss[alpha] == pytest.approx(loss, rel=1e-6)
        error, loss = score((1 - alpha) * of_a + alpha * of_b)
        assert found.mixture[alpha] == error
        assert found.mixture_loss[alpha] == pytest.approx(loss, rel=1e-6)
    assert found.bound == found.errors["a"] + found.errors["b"]


def test_both_batchnorm_modes_are_right_and_differ():
    module, a, b = pair(NETS["resnet8"])
    training = DIGITS.train.head(80)
    found = {
        mode: features(module, a, b, TEST, bn=mode, bn_data=training, batch=len(TEST))
        for mode in MODES
    }
    assert list(found) == ["interpolate", "reestimate"] == [f.bn for f in found.values()]
    compare(found["interpolate"], module, a, b, TEST.x)
    compare(found["reestimate"], module, a, b, TEST.x, bn_x=training.x)
    one, other = (f.layer("stage2.0.norm1").gap[0.5].mean for f in found.values())
    assert abs(one - other) > 0.01
    first = [f.layer("stem.conv").gap[0.5] for f in found.values()]  # before any BatchNorm
    assert first[0] == first[1]
    assert {features(*pair(NETS["mlp"]), TEST, bn=m, bn_data=training).bn for m in MODES} == {
        "none"
    }


@pytest.mark.parametrize("per", ["sample", "position"])
def test_token_networks(per):
    module, a, b = pair(gpt)
    tokens = Key("test", "tokens").integers(6 * 9, 11)
    text = torch.as_tensor(tokens).view(6, 9)
    split = Examples(text[:, :-1].contiguous(), text[:, 1:].contiguous())
    found = features(module, a, b, split, per=per, batch=6)
    names = [layer.name for layer in found.layers]
    assert "transformer.h.1" in names and names[-1] == "lm_head"  # tuples, tensors and a record
    assert found.layer("transformer.h.0.mlp.act").kind == "activation"
    assert found.n == (48 if per == "position" else 6) and found.predictions == 48
    assert compare(found, module, a, b, split.x, 2 if per == "position" else 1) == 3 * len(names)
    logits = stored(module, a, split.x)["output"]
    assert found.errors["a"] == 100 * float((logits.argmax(-1) != split.y).double().mean())


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    module, a, b = pair(NETS["functional"])
    found = features(module, a, b, TEST)
    there = features(module, a, b, TEST.to("cuda"))
    for one, other in zip(found.layers, there.layers, strict=True):
        assert other.gap[0.5].mean == pytest.approx(one.gap[0.5].mean, rel=1e-3, abs=1e-6)
        assert other.c[0.5].median == pytest.approx(one.c[0.5].median, rel=1e-3)


# --- planted truths -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_equal_networks_have_no_gap_at_all(name):
    module, a, _ = pair(NETS[name])
    found = features(module, a, {k: v.clone() for k, v in a.items()}, TEST, batch=32)
    for layer in found.layers:
        assert layer.baseline == Stat(0.0, 0.0, len(TEST), 0.0, 0.0, 0.0)
        assert math.isnan(layer.ratio())
        for alpha in ALPHAS:
            assert layer.gap[alpha] == Stat(0.0, 0.0, len(TEST), 0.0, 0.0, 0.0)
            assert layer.c[alpha].low == layer.c[alpha].high == 1 == layer.twin[alpha].mean
    assert len(set(found.path.values()) | set(found.errors.values())) == 1


def test_the_ends_of_the_segment_have_no_gap():
    module, a, b = pair(NETS["resnet8"])
    found = features(module, a, b, TEST, alphas=(0, 1))
    for layer in found.layers:
        for alpha in (0.0, 1.0):
            assert layer.gap[alpha].mean == 0 and layer.c[alpha].low == layer.c[alpha].high == 1
    assert found.path == found.mixture == {0.0: found.errors["a"], 1.0: found.errors["b"]}


def test_permuted_units():
    """B computes what A does with its units in another order: apart until the order is undone."""
    module, a, _ = pair(NETS["mlp"])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    b = dict(a)
    for entry in ("layer1.linear.weight", "layer1.linear.bias"):
        b[entry] = a[entry][order]
    b["layer2.linear.weight"] = a["layer2.linear.weight"][:, order]
    found = features(module, a, b, TEST, layers=["layer1.relu", "layer2.linear", "head"])
    hidden = stored(module, a, TEST.x)["layer1.relu"]
    close(found.layer("layer1.relu").baseline, angles(hidden, hidden[:, order])[0])
    assert found.layer("layer1.relu").baseline.low > 0.1
    assert found.layer("layer2.linear").baseline.high < 1e-12  # the same function from here on
    assert found.layer("layer2.linear").gap[0.5].mean > 1e-3
    back = order.argsort()
    for entry in ("layer1.linear.weight", "layer1.linear.bias"):
        b[entry] = b[entry][back]
    b["layer2.linear.weight"] = b["layer2.linear.weight"][:, back]
    undone = features(module, a, b, TEST)
    assert {layer.gap[t].high for layer in undone.layers for t in ALPHAS} == {0.0}


def linear(*weights: Tensor) -> nn.Module:
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
    with torch.no_grad():
        for layer, w in zip(layers, weights, strict=True):
            layer.weight.copy_(w)
    return nn.Sequential(*layers)


def vectors(n: int = 20, size: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=random, dtype=dtype)
    return Examples(x, torch.randint(0, 3, (n,), generator=random))


@pytest.mark.parametrize(("k", "m"), [(2.0, 0.5), (3.0, 1.0), (1.0, 5.0), (-3.0, 0.2)])
def test_scaled_layers_in_closed_form(k, m):
    """B's layers are k and m times A's: features stay on one line, and only c says so."""
    random = torch.Generator().manual_seed(3)
    first, second = torch.randn(5, 4, generator=random), torch.randn(3, 5, generator=random)
    module = linear(first, second)
    a, b = snapshot(module), snapshot(linear(k * first, m * second))
    found = features(module, a, b, vectors(), alphas=(0.5, 0.8))
    for alpha in (0.5, 0.8):
        between = (1 - alpha + alpha * k) * (1 - alpha + alpha * m)
        mean = 1 - alpha + alpha * k * m
        layer = found.layer("1")
        # A signed cosine: features that point the other way are as far apart as can be.
        assert layer.gap[alpha].mean == pytest.approx(2.0 if mean * between < 0 else 0, abs=1e-10)
        assert layer.c[alpha].median == pytest.approx(mean / between, rel=1e-5)
        assert layer.c[alpha].std < 1e-4 * abs(mean / between)
    assert found.layer("1").baseline.mean == pytest.approx(2.0 if k * m < 0 else 0, abs=1e-10)
    if k == -3:
        assert found.layer("1").gap[0.5].low == pytest.approx(2)  # the paper's |cos| has 0 here


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5))
def test_c_times_its_twin_is_the_squared_cosine_of_each_sample(seed, size, rows):
    random = torch.Generator().manual_seed(seed)
    f = torch.randn(5, rows, size, generator=random, dtype=torch.float64)
    table = torch.empty(12, rows, dtype=torch.float64)
    Products(f.device).add(table[:3], (f[0], f[1]), ((0, 0), (0, 1), (1, 1)))
    for i in range(3):
        three = (f[0], f[1], f[2 + i])
        Products(f.device).add(table[3 + 3 * i : 6 + 3 * i], three, ((2, 2), (2, 0), (2, 1)))
    _, gaps, cs, twins = compared(table, ALPHAS)
    cosine = 1 - gaps
    assert torch.allclose(cs * twins, cosine**2, rtol=1e-9, atol=1e-12)
    assert bool((torch.sign(cs) == torch.sign(cosine)).all())
    for i, alpha in enumerate(ALPHAS):
        gap, c, twin = angles(f[2 + i], (1 - alpha) * f[0] + alpha * f[1])
        for got, want in ((gaps[i], gap), (cs[i], c), (twins[i], twin)):
            assert torch.allclose(got, want, rtol=1e-7, atol=1e-10)


def test_products_of_rows_that_are_larger_than_the_buffer():
    x, y = (torch.randn(3, 2, 41, 7) for _ in range(2))
    products = Products(x.device)
    products._size = 100
    out = torch.empty(2, 3, dtype=torch.float64)
    products.add(out, (x, y), ((0, 1), (1, 1)))
    want = torch.stack([(u.double() * v.double()).flatten(1).sum(1) for u, v in ((x, y), (y, y))])
    assert torch.allclose(out, want, rtol=1e-13)


def test_products_are_exact_where_float32_is_not():
    big = torch.tensor([[1.0, 1e-5] * 5000])
    out = torch.empty(1, 1, dtype=torch.float64)
    Products(big.device).add(out, (big,), ((0, 0),))
    assert float(out) == pytest.approx(float((big.double() ** 2).sum()), rel=1e-15)


def test_zero_features_are_counted_and_have_no_angle():
    random = torch.Generator().manual_seed(3)
    net = nn.Sequential(linear(torch.randn(6, 4, generator=random)), nn.ReLU(), nn.Linear(6, 3))
    a = snapshot(net)
    b = {k: -v for k, v in a.items()}
    split = vectors()
    split.x[:2] = 0
    found = features(net, a, b, split)
    first = found.layer("0.0")
    assert (first.baseline.n, first.baseline.undefined) == (18, 2)
    assert first.baseline.mean == pytest.approx(2)
    # In the middle the weights cancel: no feature at all has a direction.
    for stat in (first.gap[0.5], first.c[0.5], first.twin[0.5]):
        assert (stat.n, stat.undefined) == (0, 20) and math.isnan(stat.mean)
    assert first.gap[0.25].n == 18 and first.gap[0.25].mean == pytest.approx(0, abs=1e-12)
    again = reread(found)
    assert codec.to_json(again) == codec.to_json(found)
    assert math.isnan(again.layer("0.0").gap[0.5].median)


# --- properties -----------------------------------------------------------------------------------


def means(found: Features, alphas: tuple[float, ...]) -> list[float]:
    return [
        getattr(layer, what)[t].mean
        for layer in found.layers
        for what in ("gap", "c", "twin")
        for t in alphas
    ]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 25), st.floats(0.05, 0.95))
def test_neither_batches_nor_the_order_of_the_networks_matter(seed, n, batch, alpha):
    random = torch.Generator().manual_seed(seed)

    def net() -> nn.Module:
        layers = [nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)]
        whole = nn.Sequential(*layers).double()
        with torch.no_grad():
            for p in whole.parameters():
                p.copy_(torch.randn(p.shape, generator=random, dtype=p.dtype))
        return whole

    one, other = net(), net()
    a, b = snapshot(one), snapshot(other)
    split = vectors(n, seed=seed, dtype=torch.float64)
    whole = features(one, a, b, split, alphas=(alpha,), batch=n)
    parts = features(one, a, b, split, alphas=(alpha,), batch=batch)
    assert means(parts, (alpha,)) == pytest.approx(means(whole, (alpha,)), rel=1e-7)
    assert parts.errors == whole.errors and parts.path == whole.path
    turned = features(one, b, a, split, alphas=(1 - alpha,))
    assert means(turned, (1 - alpha,)) == pytest.approx(means(whole, (alpha,)), rel=1e-7)
    assert turned.errors == {"a": whole.errors["b"], "b": whole.errors["a"]}
    # Lemma 1: a mixture of logits is wrong only where A or B is, whatever the networks.
    assert whole.mixture[alpha] <= whole.bound + 1e-9
    for layer in whole.layers:
        assert 0 <= layer.gap[alpha].low <= layer.gap[alpha].median <= layer.gap[alpha].high <= 2


def test_the_bound_of_lemma_1_is_reached_and_the_path_can_break_it():
    """A and B are right on everything and the network between them is wrong on everything."""
    first, second = torch.eye(2), torch.eye(2)
    module = linear(first, second)
    a, b = snapshot(module), snapshot(linear(-first, -second))
    x = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    found = features(module, a, b, Examples(x, torch.tensor([0, 1])), alphas=(0.5,))
    assert found.bound == 0 == found.mixture[0.5]
    assert found.path[0.5] == 50  # all logits 0: class 0 is guessed
    only_a = snapshot(linear(first, -second))  # wrong everywhere
    found = features(module, a, only_a, Examples(x, torch.tensor([0, 1])), alphas=(0.75,))
    assert found.bound == 100 == found.mixture[0.75]


def test_json_round_trip():
    module, a, b = pair(NETS["functional"])
    found = features(module, a, b, TEST, alphas=(0.1, 1 / 3))
    again = reread(found)
    assert again == found


# --- sites and taps -------------------------------------------------------------------------------


def test_functional_and_reused_activations_are_sites():
    module = functional(0)
    found = {s.name: s for s in sites(module, TEST.x[:3])}
    assert list(found) == [
        *("stem", "norm", "relu"),
        *("inner.0.one", "inner.0.relu#1", "inner.0.two", "inner.0.relu#2", "inner.0"),
        *("inner.1.one", "inner.1.relu#1", "inner.1.two", "inner.1.relu#2", "inner.1"),
        *("head", "output"),
    ]
    assert found["inner.1.relu#2"].kind == "activation" and found["inner.1"].kind == "block"
    assert found["inner.1"].same == "inner.1.relu#2" and found["output"].kind == "output"
    assert found["stem"].shape == (12,) and found["relu"].same == ""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(x) - 0.1
            return torch.relu(self.relu(x) - 0.1) - torch.relu(x)

    found = {s.name: s for s in sites(Twice(), torch.randn(3, 4))}
    assert list(found) == ["relu", "relu#2", "relu()#1", "relu()#2", "output"]
    assert [s.name for s in sites(Twice(), torch.randn(3, 4), ["relu"])] == ["relu", "relu#2"]


def test_taps_hand_over_what_was_there_before_it_was_written_over():
    module = functional(0).eval()
    block, x = module.inner[0], TEST.x[:9]
    with torch.no_grad():
        norm = module.norm(module.stem(x.flatten(1)))
        h = norm.relu()
        one = block.one(h)
        two = block.two(one.relu())
        want = {
            "norm": (norm, module.stem(x.flatten(1))),
            "relu": (h, norm),
            "inner.0.relu#1": (one.relu(), one),
            "inner.0.two": (two, one.relu()),
            "inner.0.relu#2": ((two + h).relu(), two + h),
            "inner.0": ((two + h).relu(), h),
        }
        output = module(x)
    with Taps(module, sites(module, x, list(want)), inputs=True) as taps:
        for _ in range(2):
            found, out = taps.run(x)
            assert found.keys() == want.keys() == taps.inputs.keys()
            assert torch.equal(out, output)
            for name, (after, before) in want.items():
                assert torch.equal(found[name], after), name
                assert torch.equal(taps.inputs[name], before), name
    with pytest.raises(RuntimeError, match="only inside"):
        taps.run(x)


def test_a_visitor_sees_each_site_keeps_nothing_and_can_replace_outputs() -> None:
    module, a, b = pair(NETS["functional"])
    x = TEST.x[:9]
    places = sites(module, x)
    with Taps(module, places) as one, Taps(module, places) as other:
        one.load(a)
        other.load(b)
        of_a, out = one.run(x)
        seen: list[str] = []
        kept, _ = other.run(x, lambda name, f: seen.append(name))
        assert kept == {} and seen == [s.name for s in places]
        for name in ("inner.0.relu#1", "inner.0.relu#2", "inner.1", "norm", "output"):

            def swap(n: str, _: Tensor, name: str = name) -> Tensor | None:
                return of_a[name] if n == name else None

            stitched = other.run(x, swap)[1]
            assert torch.equal(stitched, out) == (name == "output")
            net = copy.deepcopy(module).eval()
            net.load_state_dict(b)
            if name == "norm":
                net.get_submodule("norm").register_forward_hook(lambda *_: of_a["norm"].clone())
                assert torch.equal(stitched, net(x))
        tail = other.run(x, lambda n, f: of_a[n] if n == "inner.1.relu#2" else None)[1]
        with torch.inference_mode():
            assert torch.equal(tail, F.log_softmax(net.get_submodule("head")(of_a["inner.1"]), 1))
        two = of_a["inner.0.two"].clone()
        other.run(x, lambda n, f: of_a[n] if n == "inner.0.two" else None)
        assert torch.equal(of_a["inner.0.two"], two)  # the network writes into its own copy


def test_which_layers():
    module, x = built("resnet8:width=4", 0), TEST.x[:2]

    def names(*layers: str, **kw: Any) -> list[str]:
        return [s.name for s in sites(module, x, list(layers), **kw)]

    assert names("head", "stem.conv") == ["stem.conv", "head"]  # in order, each once
    assert names("stage1", "stage1") == ["stage1"]  # a module of that name
    assert names("stage1.*")[:2] == ["stage1.0.conv1", "stage1.0.norm1"]
    assert names("*.relu2") == [f"stage{i}.0.relu2" for i in (1, 2, 3)]
    assert names("stage[12].0") == ["stage1.0", "stage2.0"]
    assert names("output") == ["output"]
    every = {s.kind for s in sites(module, x)}
    assert every == set(DEFAULT_KINDS) | {"linear"}
    assert [s.name for s in sites(module, x, kinds=["block"])][-1] == "output"
    assert sum(math.prod(s.shape) for s in sites(built("mlp:widths=24x2", 0), x)) == 4 * 24 + 10


def test_a_prefix_without_a_site_of_its_own():
    module = gpt(0)
    found = [s.name for s in sites(module, torch.zeros(2, 4, dtype=torch.int64), ["transformer.h"])]
    assert found[0] == "transformer.h.0.ln_1" and found[-1] == "transformer.h.1"


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"alphas": ()}, "alphas: [] must be one or more"),
        ({"alphas": (0.5, 0.5)}, "different numbers from 0 (A) to 1 (B)"),
        ({"alphas": (1.5,)}, "different numbers"),
        ({"alphas": (math.nan,)}, "different numbers"),
        ({"bn": "batch"}, "bn: 'batch' is not known"),
        ({"bn": "reestimate"}, "needs bn_data="),
        ({"per": "token"}, "per: 'token' is not known"),
        ({"per": "position"}, "is for token networks"),
        ({"batch": 0}, "batch: 0 must be"),
        ({"layers": ["stage9"]}, "layers: 'stage9' fits no site"),
        ({"layers": ["stage1.0.relu"]}, "Did you mean 'stage1.0.relu"),
    ],
)
def test_bad_parameters_are_said_before_any_work(words, message):
    module, a, b = pair(NETS["resnet8"])
    with pytest.raises(BadParameter) as e:
        features(module, a, b, TEST, **words)
    assert message in str(e.value)


def test_other_bad_input():
    module, a, b = pair(NETS["mlp"])
    with pytest.raises(BadParameter, match="network B does not fit"):
        features(module, a, {k: v for k, v in b.items() if "head" not in k}, TEST)
    with pytest.raises(BadParameter, match="no data"):
        features(module, a, b, Examples(TEST.x[:0], TEST.y[:0]))
    with pytest.raises(BadParameter, match=r"targets \(70, 1\) do not fit"):
        features(module, a, b, Examples(TEST.x, TEST.y[:, None]))
    with pytest.raises(BadParameter, match="has none of the kinds conv"):
        sites(nn.Sequential(nn.Flatten()), TEST.x[:2])
    with pytest.raises(BadParameter, match="Did you mean 'conv'"):
        sites(module, TEST.x[:2], kinds=["convs"])
    with pytest.raises(BadParameter, match="not one feature for each"):
        sites(gpt(0), torch.zeros(2, 4, dtype=torch.int64), ["transformer.wpe"])
    with pytest.raises(BadParameter, match="'head2' was not measured"):
        features(module, a, b, TEST.head(5), layers=["head"]).layer("head2")
    assert isinstance(TEST, Split)


def test_positions_need_sites_that_have_them():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x).mean(1))

    module = Pooled()
    a = snapshot(module)
    split = Examples(torch.zeros(4, 7, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(BadParameter, match=r"per: 'position' needs features \(N, 7, …\), but head"):
        features(module, a, a, split, per="position")
    assert features(module, a, a, split).n == 4
    assert features(module, a, a, split, layers=["embed"], per="position").n == 28
