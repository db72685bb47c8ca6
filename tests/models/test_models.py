"""The papers' networks: their sizes, their spelling, their mathematics, and what they refuse."""

from __future__ import annotations

import operator
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from companion import models
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.models import (
    ChannelLayerNorm,
    PadShortcut,
    build,
    canonical,
    describe,
    in_words,
    names,
    parameter_count,
    title,
)
from companion.models.images import Block
from companion.models.layers import default_groups

MNIST, CIFAR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)
KEY = Key("test", "models")

# One small network per family, norm and shortcut: enough to see every line of every forward.
SMALL = [
    "mlp:widths=16x2",
    "mlp:norm=batch,widths=16-8",
    "mlp:norm=layer,widths=16",
    "lenet-300-100",
    *(f"resnet8:norm={norm},width=4" for norm in ("batch", "layer", "group", "none")),
    "resnet8:norm=group,groups=1,width=4",
    "resnet8:shortcut=A,width=4",
    "resnet8:shortcut=conv3x3,norm=layer,width=4",
    *(f"resnet18:norm={norm},width=4" for norm in ("batch", "layer", "group", "none")),
    *(f"vgg11:norm={norm},width=4" for norm in ("batch", "layer", "group", "none")),
    "vgg16:init=openlth,width=4",
    "vgg11:head=32-16,width=4",
    "mlp:init=lecun,widths=16x2",
    *(f"mobilenet:norm={norm},width=4" for norm in ("batch", "layer", "group", "none")),
    "vit:headwidth=4,heads=3,layers=2,mlp=12,width=16",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(n: int, shape: tuple[int, int, int], label: str = "images") -> torch.Tensor:
    return torch.randn(n, *shape, generator=KEY.fold(label).generator())


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("spec", "shape", "classes", "parameters"),
    [
        ("lenet-300-100", MNIST, 10, 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
        ("lenet-300-100", MNIST, 10, 266_610),
        ("lenet-300-100", DIGITS, 10, 64 * 300 + 300 + 300 * 100 + 100 + 1010),
        ("mlp:widths=300-100", MNIST, 10, 266_610),
        ("mlp:widths=16x3", (1, 1, 16), 3, 867),  # layer-wise LMC's toy, 16-16-16-16-3
        ("mlp", CIFAR, 100, 3072 * 512 + 512 + 2 * (512 * 512 + 512) + 512 * 100 + 100),
        ("resnet20", CIFAR, 10, 272_474),
        ("resnet20", CIFAR, 100, 272_474 + 90 * 65),
        ("resnet20:norm=layer", CIFAR, 10, 272_474),
        ("resnet20:norm=group", CIFAR, 10, 272_474),
        ("resnet20:shortcut=A", CIFAR, 10, 269_722),
        ("resnet18", CIFAR, 10, 11_164_362),
        ("vgg16", CIFAR, 10, 14_728_266),
        ("vgg16:norm=none", CIFAR, 10, 14_728_266 - 2 * 4_224),
        ("vgg16", DIGITS, 10, 14_728_266 - 2 * 9 * 64),  # one channel instead of three
        ("vgg11", CIFAR, 10, 9_220_480 + 5_130 + 2 * 2_752),  # torchvision's features, head, norms
        ("vgg11:norm=none", CIFAR, 100, 9_220_480 + 512 * 100 + 100),
        ("mobilenet", CIFAR, 10, 3_217_226),  # what its port to CIFAR-10 has
        ("mobilenet:statistics=batch", CIFAR, 100, 3_217_226 + 90 * 1025),
        ("vit", CIFAR, 10, 48 * 512 + 512 + 6 * 3_149_312 + 1024 + 5130),
        # Git Re-Basin's: its three heads instead of our one add two hidden layers of 512
        ("vgg16:head=512x2", CIFAR, 10, 14_728_266 + 2 * (512 * 512 + 512)),
        # torchvision's vgg16_bn(num_classes=10), whose first hidden layer sees 7x7 pixels, not 1
        ("vgg16:head=4096x2", CIFAR, 10, 134_309_962 - 48 * 512 * 4096),
    ],
)
def test_parameter_counts(spec, shape, classes, parameters):
    assert parameter_count(build(spec, shape, classes)) == parameters


def _resnet_6n2_by_hand(n: int, w: int, shortcut: str) -> int:
    """He et al.'s network on CIFAR-10 with BatchNorm, added up without building it."""
    convs = 27 * w + 2 * n * 9 * w * w  # stem and first stage
    norms = 2 * w * (1 + 2 * n)
    for c in (2 * w, 4 * w):
        convs += 9 * (c // 2) * c + (2 * n - 1) * 9 * c * c
        norms += 2 * c * 2 * n
        if shortcut == "conv":
            convs += (c // 2) * c
            norms += 2 * c
    return convs + norms + 4 * w * 10 + 10


@pytest.mark.parametrize("shortcut", ["conv", "A"])
@pytest.mark.parametrize(("depth", "width"), [(8, 8), (14, 3), (20, 16), (32, 16), (56, 2)])
def test_resnet_counts_by_arithmetic(depth, width, shortcut):
    net = build(f"resnet{depth}:width={width},shortcut={shortcut}", CIFAR, 10)
    assert parameter_count(net) == _resnet_6n2_by_hand((depth - 2) // 6, width, shortcut)


def test_option_a_arithmetic_is_the_known_count():
    assert _resnet_6n2_by_hand(3, 16, "A") == 269_722
    assert _resnet_6n2_by_hand(3, 16, "conv") == 272_474


def test_running_statistics_explain_the_papers_274k():
    net = build("resnet20", CIFAR, 10)
    assert parameter_count(net, buffers=True) == 274_042
    # Without BatchNorm there is nothing to add.
    assert parameter_count(build("resnet18", CIFAR, 10), buffers=True) == 11_164_362


def test_tied_tensors_count_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert parameter_count(net) == 9 + 3 + 3


# ---------------------------------------------------------------- the same networks elsewhere


def _torchvision_resnet18(norm: type[nn.Module]) -> nn.Module:
    net = torchvision.models.resnet18(num_classes=10, norm_layer=norm)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def _torchvision_vgg(name: str, *hidden: int) -> nn.Module:
    net = getattr(torchvision.models, name)(num_classes=10)
    dense: list[nn.Module] = []
    for n_in, n_out in zip((512, *hidden), hidden, strict=False):
        dense += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(net.features, nn.Flatten(), *dense, nn.Linear((512, *hidden)[-1], 10))


class Identity(nn.Identity):
    """torchvision's blocks pass the number of channels to the norm."""


@pytest.mark.parametrize(
    ("spec", "peer"),
    [
        ("resnet18", lambda: _torchvision_resnet18(Identity)),
        ("resnet18:norm=batch", lambda: _torchvision_resnet18(nn.BatchNorm2d)),
        ("vgg16", lambda: _torchvision_vgg("vgg16_bn")),
        ("vgg11:head=24-9,norm=none", lambda: _torchvision_vgg("vgg11", 24, 9)),
        ("vgg11:norm=none", lambda: _torchvision_vgg("vgg11")),
    ],
)
def test_equals_torchvision_with_the_same_weights(spec, peer):
    ours, theirs = build(spec, CIFAR, 10, KEY), peer()
    weights = list(ours.state_dict().values())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights, strict=True)))
    x = images(2, CIFAR)
    with torch.no_grad():
        for training in (False, True):
            torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


# ---------------------------------------------------------------- spelling


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("resnet20", "resnet20"),
        (" ResNet20 : norm = BATCH , width = 016 ", "resnet20"),
        ("resnet20:width=8,norm=group,shortcut=conv", "resnet20:norm=group,width=8"),
        ("resnet20:shortcut=a", "resnet20:shortcut=A"),
        ("vgg16:head=None", "vgg16"),  # the runs of before there was a head keep their names
        ("vgg16:width=32,head=512-0512", "vgg16:head=512x2,width=32"),
        ("mlp:init=LECUN", "mlp:init=lecun"),
        ("resnet8:groups=auto,norm=group", "resnet8:norm=group"),
        ("resnet18:norm=none", "resnet18"),
        ("resnet18:norm=batch", "resnet18:norm=batch"),
        ("vgg11:norm=none,init=kaiming", "vgg11:norm=none"),
        ("lenet-300-100:norm=none", "lenet-300-100"),
        ("mlp:widths=512-512x2", "mlp"),
        ("mlp:widths=100-100-100-100-100", "mlp:widths=100x5"),
        ("mlp:widths=300x1-100x1", "mlp:widths=300-100"),
        ("a.b:make", "a.b:make"),
        (" a.b : C.make ? z = 1 , y=x=2 ", "a.b:C.make?y=x=2,z=1"),
    ],
)
def test_canonical(spelled, expected):
    assert canonical(spelled) == expected
    assert canonical(expected) == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("mlp:widths=100x5", "six-layer perceptron"),
        ("mlp:widths=100x11", "12-layer perceptron"),
        ("mlp:widths=16,norm=layer", "two-layer perceptron (norm layer)"),
        ("lenet-300-100", "LeNet-300-100"),
        ("resnet20:width=8", "ResNet-20 (width 8)"),
        ("vgg16", "VGG-16"),
        ("a.b:make?z=1", "a.b:make?z=1"),
    ],
)
def test_a_network_has_a_name_for_people(spec, expected):
    assert title(spec) == expected


# These spellings are in the keys of stored runs. A line that fails here means a changed default,
# which would give old runs a new meaning: add an option instead.
def test_defaults_are_for_ever():
    assert describe("mlp") == {"widths": [512, 512, 512], "norm": "none", "init": "kaiming"}
    assert describe("lenet-300-100") == {"norm": "none", "init": "kaiming"}
    assert describe("resnet20") == {
        "width": 16,
        "norm": "batch",
        "groups": "auto",
        "shortcut": "conv",
        "init": "kaiming",
    }
    assert describe("resnet18") == {
        "width": 64,
        "norm": "none",
        "groups": "auto",
        "init": "kaiming",
    }
    for depth in (11, 13, 16, 19):
        assert describe(f"vgg{depth}") == {
            "width": 64,
            "norm": "batch",
            "groups": "auto",
            "head": [],
            "init": "kaiming",
        }


def test_describe_an_own_network_types_its_values():
    spec = "a.b:make?n=3,lr=1e-3,flag=True,nothing=none,word=wide,name=x"
    assert describe(spec) == {
        "n": 3,
        "lr": 1e-3,
        "flag": True,
        "nothing": None,
        "word": "wide",
        "name": "x",
    }


def test_names_all_build_and_tell_their_options():
    for name, summary, options in names():
        assert summary and "\n" not in summary
        assert list(options) == list(describe(name))
        assert canonical(name) == name
    listed = [row.name for row in names()]
    assert {"mlp", "lenet-300-100", "resnet20", "resnet18", "vgg11", "vgg16"} <= set(listed)


@st.composite
def specs(draw: st.DrawFn) -> str:
    """Valid spellings in any order, with defaults spelled out or not, of small networks."""
    name = draw(
        st.sampled_from(["mlp", "lenet-300-100", "resnet8", "resnet14", "resnet18", "vgg11"])
    )
    options = {"init": st.sampled_from(["kaiming", "torch", "openlth", "lecun"])}
    if name in ("mlp", "lenet-300-100"):
        options["norm"] = st.sampled_from(["none", "batch", "layer"])
        width = st.builds(
            lambda w, n: f"{w}x{n}" if n else str(w), st.integers(2, 20), st.integers(0, 3)
        )
        if name == "mlp":
            options["widths"] = st.lists(width, min_size=1, max_size=3).map("-".join)
    else:
        options["norm"] = st.sampled_from(["batch", "layer", "group", "none"])
        options["width"] = st.integers(2, 9).map(str)
        if name == "vgg11":
            options["head"] = st.sampled_from(["none", "None", "5", "06x2", "5-5"])
        if name in ("resnet8", "resnet14"):
            options["shortcut"] = st.sampled_from(["A", "conv", "conv3x3"])
    keys = draw(st.permutations(sorted(options)))
    chosen = {k: draw(options[k]) for k in keys[: draw(st.integers(0, len(keys)))]}
    # The defaults are wide; ask for small ones so that the test stays quick.
    if "width" in options:
        chosen.setdefault("width", "4")
    if chosen.get("norm") == "group" and draw(st.booleans()):
        divisors = [g for g in range(1, 10) if int(chosen["width"]) % g == 0]
        chosen["groups"] = str(draw(st.sampled_from(divisors)))
    query = ",".join(f"{k}={v}" for k, v in chosen.items())
    return f"{name}:{query}" if query else name


@settings(max_examples=60, deadline=None)
@given(specs(), st.sampled_from([DIGITS, (2, 9, 12)]), st.integers(2, 5))
def test_every_valid_spec_builds_and_canonical_is_idempotent(spec, shape, classes):
    short = canonical(spec)
    assert canonical(short) == short
    assert describe(short) == describe(spec)
    net = build(spec, shape, classes, KEY)
    logits = net(images(3, shape))
    assert logits.shape == (3, classes)
    assert logits.isfinite().all()
    again = build(short, shape, classes, KEY).state_dict()
    assert all(
        torch.equal(v, again[k]) for k, v in build(spec, shape, classes, KEY).state_dict().items()
    )


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.text("mlpresnet0123=:,x-wdh .?", max_size=30))
def test_any_text_is_a_spec_or_a_message(text):
    try:
        short = canonical(text)
    except BadParameter:
        return
    assert canonical(short) == short


# ---------------------------------------------------------------- randomness


@pytest.mark.parametrize("spec", [*SMALL, "resnet8:init=torch,width=4", "resnet8:init=openlth"])
def test_equal_keys_equal_bits(spec):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = build(spec, DIGITS, 10, Key("init", 1)).state_dict()
    torch.rand(5)
    b = build(spec, DIGITS, 10, Key("init", 1)).state_dict()
    c = build(spec, DIGITS, 10, Key("init", 2)).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(
        torch.equal(a[k], c[k]) for k in a if k.endswith(("linear.weight", "conv.weight"))
    )
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_key_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    build("mlp:widths=4", DIGITS, 10, KEY)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_key_the_global_generator_decides():
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(build("mlp:widths=4", DIGITS, 10).head.weight)
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


def test_weights_stay_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        net = build("resnet8:width=4", DIGITS, 10, KEY)
    expected = build("resnet8:width=4", DIGITS, 10, KEY).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in net.state_dict().items())


@torch.no_grad()
def test_initialisations():
    kaiming = build("mlp:widths=400,norm=batch", MNIST, 10, KEY)
    weight = kaiming.layer1.linear.weight
    assert weight.std().item() == pytest.approx((2 / 784) ** 0.5, rel=0.01)
    assert weight.abs().max() > 3.5 * weight.std()  # normal, not uniform
    assert not kaiming.layer1.linear.bias.any() and not kaiming.head.bias.any()
    assert (kaiming.layer1.norm.weight == 1).all()

    conv = build("vgg11", CIFAR, 10, KEY).stage3[0].conv.weight
    assert conv.std() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.01)  # fan-in, not fan-out

    ours = build("mlp:widths=400,norm=batch,init=torch", MNIST, 10, KEY)
    assert ours.layer1.linear.weight.abs().max() <= 784**-0.5
    assert ours.layer1.linear.bias.any()

    for spec in ("mlp:widths=400,norm=batch", "mlp:widths=400,norm=layer"):
        openlth = build(f"{spec},init=openlth", MNIST, 10, KEY)
        scale = openlth.layer1.norm.weight
        assert 0 <= scale.min() < 0.05 and 0.95 < scale.max() <= 1
        assert scale.mean().item() == pytest.approx(0.5, abs=0.06)
        assert not openlth.layer1.norm.bias.any()
        assert openlth.layer1.linear.weight.std().item() == pytest.approx(
            (2 / 784) ** 0.5, rel=0.01
        )


@torch.no_grad()
def test_lecun_is_flaxs_truncated_normal():
    net = build("vgg16:head=256,init=lecun,width=32", CIFAR, 10, KEY)
    for weight, fan_in in ((net.stage3[1].conv.weight, 128 * 9), (net.dense1.linear.weight, 256)):
        std = fan_in**-0.5
        assert weight.std().item() == pytest.approx(std, rel=0.01)
        # Cut at two standard deviations of the normal that is cut, not of what is left of it.
        assert weight.abs().max().item() == pytest.approx(2 * std / 0.8796, rel=0.01)
    assert not any(p.any() for n, p in net.named_parameters() if n.endswith("conv.bias"))
    assert not net.dense1.linear.bias.any() and not net.head.bias.any()
    assert (net.stage1[0].norm.weight == 1).all()


# ---------------------------------------------------------------- what instruments rely on


@pytest.mark.parametrize("spec", SMALL)
def test_traceable_by_fx(spec):
    net = build(spec, DIGITS, 10, KEY).eval()
    traced = torch.fx.symbolic_trace(net)
    x = images(3, DIGITS)
    assert torch.equal(traced(x), net(x))
    functions = {n.target for n in traced.graph.nodes if n.op == "call_function"}
    assert not functions & {F.relu, operator.iadd}
    if spec.startswith("resnet"):
        assert operator.add in functions


@pytest.mark.parametrize("spec", SMALL)
def test_gradients_reach_every_parameter(spec):
    # In eval mode, because BatchNorm in training takes the bias before it out of the output.
    net = build(spec, DIGITS, 10, KEY).eval()
    F.cross_entropy(net(images(16, DIGITS)), torch.arange(16) % 10).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_narrow_strided_shortcut_reads_plain_memory():
    """Of channels last, oneDNN's gradient of such weights writes beyond their end (AVX2)."""
    net = build("resnet8:norm=layer,width=4", DIGITS, 10, KEY)
    seen = {}
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1):
            module.register_forward_pre_hook(
                lambda conv, args: seen.update({conv.in_channels: args[0].is_contiguous()})
            )
    net(images(2, DIGITS))
    assert seen == {4: True, 8: False}


@pytest.mark.parametrize("spec", SMALL)
def test_output_is_logits_without_softmax(spec):
    # A softmax here would be followed by the one inside cross_entropy, and still train, badly.
    logits = build(spec, DIGITS, 10, KEY).eval()(images(16, DIGITS))
    assert (logits < 0).any()
    sums = logits.sum(1)
    assert not torch.allclose(sums, torch.ones(16), atol=0.05)
    assert not torch.allclose(logits.exp().sum(1), torch.ones(16), atol=0.05)  # nor log-softmax


@pytest.mark.parametrize("spec", SMALL)
def test_every_module_that_computes_is_used_once(spec: str) -> None:
    net = build(spec, DIGITS, 10, KEY)
    calls: Counter[str] = Counter()
    leaves = [n for n, m in net.named_modules() if not list(m.children())]
    for name in leaves:
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    net(images(2, DIGITS))
    assert calls == Counter(leaves)
    # named_modules lists a shared instance once, so hooks on one ReLU never see another's input.
    relus = [m for m in net.modules() if isinstance(m, nn.ReLU)]
    assert (relus or spec.startswith("vit")) and not any(relu.inplace for relu in relus)


@pytest.mark.parametrize("spec", SMALL)
def test_networks_travel_to_worker_processes(spec):
    net = build(spec, DIGITS, 10, KEY).eval()
    x = images(2, DIGITS)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def test_a_patch_that_does_not_fit_the_image_is_refused_with_those_that_do():
    with pytest.raises(BadParameter, match=r"patch=5 does not divide.*Allowed here: 1, 2, 4, 8"):
        build("vit:patch=5,width=8", DIGITS, 10)
    with pytest.raises(BadParameter, match="width=6 is not a multiple of 4"):
        build("vit:width=6", DIGITS, 10)
    told = "digits, resnet20:width=8 and mlp:widths=100x5, T = 800"
    wide = "100-wide six-layer perceptron"
    assert in_words(told) == f"digits, ResNet-20 (width 8) and {wide}, T = 800"
    assert in_words("resnet20:wide=yes, mlps") == "resnet20:wide=yes, mlps"
    assert title("vit") == "ViT" and title("mobilenet:width=8") == "MobileNet (width 8)"


def test_the_order_of_patches_is_seen_only_through_the_positions():
    net = build("vit:headwidth=4,heads=2,layers=1,mlp=8,width=8", CIFAR, 10, KEY).eval()
    x = images(2, CIFAR)
    turned = x.roll(4, 3)  # by one patch
    assert not torch.allclose(net(x), net(turned), atol=1e-4)
    net.patches.positions.zero_()
    torch.testing.assert_close(net(x), net(turned))


def test_mobilenet_may_take_the_statistics_of_each_batch():
    net = build("mobilenet:statistics=batch,width=2", CIFAR, 10, KEY).eval()
    x = images(6, CIFAR)
    assert not torch.allclose(net(x)[:3], net(x[:3]))
    assert not [n for n, _ in net.named_buffers()]


def test_parameter_names_read_as_layer_groups():
    def groups(spec: str) -> list[str]:
        parameters = build(spec, DIGITS, 10).named_parameters()
        return list(dict.fromkeys(name.rpartition(".")[0] for name, _ in parameters))

    assert groups("resnet8:width=4") == [
        "stem.conv",
        "stem.norm",
        *(f"stage1.0.{m}" for m in ("conv1", "norm1", "conv2", "norm2")),
        *(
            f"stage{s}.0.{m}"
            for s in (2, 3)
            for m in ("conv1", "norm1", "conv2", "norm2", "shortcut.conv", "shortcut.norm")
        ),
        "head",
    ]
    assert groups("mlp:widths=4x2") == ["layer1.linear", "layer2.linear", "head"]
    convs = ["1.0", "2.0", "3.0", "3.1", "4.0", "4.1", "5.0", "5.1"]
    assert groups("vgg11:width=4,norm=none") == [*(f"stage{c}.conv" for c in convs), "head"]
    # The 21 layers of the layer-wise paper: stem, 16 in blocks, 3 shortcuts, head.
    assert len(groups("resnet18:width=4")) == 21


@pytest.mark.parametrize("spec", SMALL)
def test_channels_last_and_autocast(spec):
    net, x = build(spec, DIGITS, 10, KEY).eval(), images(4, DIGITS)
    expected = net(x)
    last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x)
    assert low.isfinite().all()
    assert (low.float() - expected).norm() < 0.1 * expected.norm()


# ---------------------------------------------------------------- norms


def test_channel_layer_norm_equals_the_definition():
    norm, x = ChannelLayerNorm(5), 3 * images(2, (5, 3, 4)) + 1
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = torch.empty_like(x)
    for n in range(2):
        for i in range(3):
            for j in range(4):
                v = x[n, :, i, j]
                centred = v - v.sum() / 5
                sd = (centred.square().sum() / 5 + 1e-6).sqrt()
                expected[n, :, i, j] = centred / sd * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x.to(memory_format=torch.channels_last)), expected)
    assert not torch.allclose(norm(x), F.group_norm(x, 1, norm.weight, norm.bias), atol=0.1)


def test_channel_layer_norm_keeps_channels_last():
    x = images(2, (4, 3, 3)).to(memory_format=torch.channels_last)
    assert ChannelLayerNorm(4)(x).is_contiguous(memory_format=torch.channels_last)


def test_channel_layer_norm_commutes_with_permutations():
    norm, x = ChannelLayerNorm(6), images(2, (6, 3, 3))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    p = Key("p").permutation(6)
    permuted = ChannelLayerNorm(6)
    permuted.load_state_dict({k: v[p] for k, v in norm.state_dict().items()})
    torch.testing.assert_close(permuted(x[:, p]), norm(x)[:, p])


def _norms(spec: str, kind: type[nn.Module]) -> list[nn.Module]:
    return [m for m in build(spec, DIGITS, 10).modules() if isinstance(m, kind)]


def test_group_norm_groups():
    by_default = _norms("resnet8:width=8,norm=group", nn.GroupNorm)
    assert {(m.num_channels, m.num_groups) for m in by_default} == {(8, 2), (16, 4), (32, 8)}
    assert len(by_default) == 9
    one = _norms("vgg11:width=4,norm=group,groups=1", nn.GroupNorm)
    assert {m.num_groups for m in one} == {1} and len(one) == 8
    assert {m.num_groups for m in _norms("resnet18:width=6,norm=group,groups=3", nn.GroupNorm)} == {
        3
    }
    sizes = {c: c // default_groups(c) for c in (1, 2, 3, 4, 5, 6, 7, 10, 12, 25, 64)}
    assert sizes == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 3, 7: 7, 10: 2, 12: 4, 25: 5, 64: 4}


@pytest.mark.parametrize("family", ["resnet8", "resnet18", "vgg11"])
def test_norm_option_reaches_every_layer(family):
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    wanted = {"batch": nn.BatchNorm2d, "layer": ChannelLayerNorm, "group": nn.GroupNorm}
    counts = set()
    for norm, kind in wanted.items():
        found = _norms(f"{family}:width=4,norm={norm}", kinds)
        assert all(type(m) is kind for m in found)
        counts.add(len(found))
    assert len(counts) == 1 and counts.pop() > 0
    assert not _norms(f"{family}:width=4,norm=none", kinds)


@pytest.mark.parametrize(
    ("spec", "biased"),
    [
        ("resnet8:width=4", False),
        ("resnet8:width=4,norm=none", True),  # in place of the norm's shift
        ("resnet18:width=4", False),  # the paper's parameter count
        ("vgg11:width=4", True),  # torchvision's and open_lth's, norm or not
        ("vgg11:width=4,norm=none", True),
    ],
)
def test_which_convolutions_have_a_bias(spec, biased):
    convs = {n: m for n, m in build(spec, DIGITS, 10).named_modules() if isinstance(m, nn.Conv2d)}
    for name, conv in convs.items():
        assert (conv.bias is not None) == (biased and "shortcut" not in name), name


# ---------------------------------------------------------------- shortcuts


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_option_a_is_exact_when_the_residual_branches_are_zero(norm):
    """Planted: with every branch silent, stage 3 is the stem's output, every 4th pixel, padded."""
    net = build(f"resnet14:width=4,norm={norm},shortcut=A", CIFAR, 10, KEY).eval()
    for block in net.modules():
        if isinstance(block, Block):
            last = block.norm2 if norm == "batch" else block.conv2
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    x = images(2, CIFAR)
    stem = net.stem(x)
    expected = torch.zeros(2, 16, 8, 8)
    expected[:, 2 + 4 : 2 + 4 + 4] = stem[:, :, ::4, ::4]  # 2 of 4 new, then 4 of 8 new in front
    assert torch.equal(net.stage3(net.stage2(net.stage1(stem))), expected)
    assert torch.equal(net(x), net.head(expected.mean((2, 3))))


def test_option_a_has_no_parameters():
    net = build("resnet20:shortcut=A", CIFAR, 10)
    pads = [m for m in net.modules() if isinstance(m, PadShortcut)]
    assert len(pads) == 2
    assert sum(parameter_count(m, buffers=True) for m in pads) == 0
    assert not any("shortcut" in name for name in net.state_dict())


def test_option_a_with_an_odd_number_of_new_channels():
    x = images(2, (3, 5, 7))
    y = PadShortcut(3, 6, 2)(x)
    assert y.shape == (2, 6, 3, 4)
    assert torch.equal(y[:, 1:4], x[:, :, ::2, ::2])
    assert not y[:, [0, 4, 5]].any()


@pytest.mark.parametrize(("shortcut", "kernel"), [("conv", 1), ("conv3x3", 3)])
def test_conv_shortcuts(shortcut, kernel):
    net = build(f"resnet8:width=4,norm=layer,shortcut={shortcut}", CIFAR, 10)
    for stage in (net.stage2, net.stage3):
        assert stage[0].shortcut.conv.kernel_size == (kernel, kernel)
        assert stage[0].shortcut.conv.stride == (2, 2)
        assert isinstance(stage[0].shortcut.norm, ChannelLayerNorm)
    assert isinstance(net.stage1[0].shortcut, nn.Identity)


# ---------------------------------------------------------------- images of other sizes


@pytest.mark.parametrize(
    ("shape", "pools"),
    [(DIGITS, 3), (MNIST, 4), (CIFAR, 5), ((3, 64, 64), 5), ((3, 8, 40), 3), ((3, 40, 9), 3)],
)
def test_vgg_skips_max_pools_of_a_single_pixel(shape, pools):
    net = build("vgg11:width=2", shape, 7)
    assert sum(isinstance(m, nn.MaxPool2d) for m in net.modules()) == pools
    assert net(images(2, shape)).shape == (2, 7)


@pytest.mark.parametrize("spec", ["resnet8:width=2", "resnet18:width=2", "mlp:widths=3"])
@pytest.mark.parametrize("shape", [DIGITS, MNIST, (5, 8, 20), (4, 33, 9)])
def test_any_shape_that_is_large_enough(spec, shape):
    assert build(spec, shape, 4)(images(2, shape)).shape == (2, 4)


# ---------------------------------------------------------------- what is refused, and how


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            "resnt20",
            ["'resnt20' is not known", "Did you mean 'resnet20'?", "mlp, lenet", "module:f"],
        ),
        ("vgg12", ["Allowed:", "vgg11, vgg13, vgg16, vgg19"]),
        ("", ["Allowed:", "mlp"]),
        ("resnet21", ["depth of 21", "Did you mean 'resnet20'?", "6n+2", "resnet8, resnet14"]),
        ("resnet2", ["depth of 2 ", "'resnet8'"]),
        ("resnet100000", ["up to resnet1202"]),
        ("resnet50", ["ImageNet", "resnet44, resnet56", "torchvision:resnet50"]),
        ("resnet20:wdith=8", ["'wdith' is not known", "Did you mean 'width'?", "norm, groups"]),
        ("vgg11:shortcut=A", ["'shortcut' is not known", "Allowed: width, norm"]),
        ("vgg11:head=0", ["head: '0' is not 'none', or widths", "such as 512x2"]),
        ("vgg11:head=nine", ["head: 'nine'"]),
        ("vgg11:head=", ["'head=' is not option=value"]),
        ("mlp:init=lekun", ["Did you mean 'lecun'?"]),
        ("resnet20:norm=bach", ["norm: 'bach'", "Did you mean 'batch'?", "layer, group, none"]),
        ("mlp:norm=group", ["Allowed: none, batch, layer"]),
        ("resnet20:width=0", ["width: '0' is not a whole number"]),
        ("resnet20:width=-8", ["'-8' is not a whole number"]),
        ("resnet20:width=1.5", ["'1.5'"]),
        ("resnet20:width=²", ["'²'"]),
        ("resnet20:width=" + "9" * 5000, ["is not a whole number from 1"]),
        ("resnet20:width=8,width=8", ["'width' is given twice"]),
        ("resnet20:width", ["'width' is not option=value"]),
        ("resnet20:", ["is not option=value"]),
        ("resnet20:width=8,", ["is not option=value"]),
        ("resnet20?width=8", ["is not known"]),
        ("mlp:widths=abc", ["widths: 'abc'", "300-100", "100x5"]),
        ("mlp:widths=100x", ["'100x'"]),
        ("mlp:widths=100--5", ["'100--5'"]),
        ("mlp:widths=5x100000", ["at most 1000 hidden layers"]),
        ("resnet20:groups=4", ["groups=4 needs norm=group", "norm is batch"]),
        ("resnet20:norm=group,groups=3", ["does not divide the width 16", "1, 2, 4, 8, 16"]),
        ("resnet20:norm=layer,width=1", ["single channel", "at least 2"]),
        ("mlp:norm=layer,widths=8-1", ["single channel"]),
        ("a.b:c d", ["'c d' is not a Python name", "package.module:factory"]),
        ("a.b:make?classes=3", ["'classes' cannot be an option", "come from the data"]),
        ("a.b:make?", ["is not option=value"]),
    ],
)
def test_bad_specs_are_refused_before_anything_is_built(spec, says):
    for function in (canonical, describe, lambda s: build(s, CIFAR, 10)):
        with pytest.raises(BadParameter) as error:
            function(spec)
        for part in says:
            assert part in str(error.value)


@pytest.mark.parametrize("spec", [None, 3, b"resnet20", ["mlp"]])
def test_a_spec_is_text(spec):
    with pytest.raises(BadParameter, match="expected a name"):
        canonical(spec)


@pytest.mark.parametrize(
    ("spec", "shape", "classes", "says"),
    [
        ("resnet20", (3, 3, 32), 10, ["'resnet20'", "4x4 pixels or more", "3x32", "3 channels"]),
        ("resnet18", (1, 7, 7), 10, ["'resnet18'", "8x8", "7x7"]),
        ("vgg16", (3, 4, 4), 10, ["'vgg16'", "8x8", "4x4", "mlp"]),
        ("mlp", (28, 28), 10, ["in_shape", "(channels, height, width)", "(28, 28)"]),
        ("mlp", (1, 0, 8), 10, ["in_shape", "(1, 0, 8)"]),
        ("mlp", (1, 8.5, 8), 10, ["in_shape"]),
        ("mlp", 64, 10, ["in_shape"]),
        ("mlp", DIGITS, 1, ["classes", "from 2, not 1"]),
        ("mlp", DIGITS, "10", ["classes", "'10'"]),
    ],
)
def test_networks_that_do_not_fit_the_data(spec, shape, classes, says):
    with pytest.raises(BadParameter) as error:
        build(spec, shape, classes)
    for part in says:
        assert part in str(error.value)


# ---------------------------------------------------------------- the user's own networks

OWN = """
import torch
from torch import nn

LIMIT = 3

def make_net(in_shape, classes, width=4, bias=True):
    c, h, w = in_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, width), nn.ReLU(),
                         nn.Linear(width, classes, bias=bias))

class Net(nn.Module):
    def __init__(self, in_shape, classes):
        super().__init__()
        self.head = nn.Conv2d(in_shape[0], classes, in_shape[1:])

    @classmethod
    def make(cls, **kwargs):
        return cls(**kwargs)

    def forward(self, x):
        return self.head(x).flatten(1)

def make_weights(in_shape, classes):
    return torch.zeros(classes)

def make_nothing(in_shape, classes):
    pass

def make_for_cifar():
    return nn.Linear(3072, 10)

def make_mistake(in_shape, classes):
    raise RuntimeError("a bug of the user's")

def make_torchs(*, weights=None, **options):
    return inner(**options)

def inner(num_classes=1000):
    return nn.Sequential(nn.Linear(2, num_classes))

READY = nn.Linear(2, 2)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_lab"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(OWN)
    (package / "broken.py").write_text("1 / 0\n")
    (package / "leaving.py").write_text("raise SystemExit('usage')")
    (tmp_path / "nets_of_test_models.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def test_own_factory(own):
    net = build("my_lab.nets:make_net", DIGITS, 10, KEY)
    assert net[1].out_features == 4
    assert net(images(3, DIGITS)).shape == (3, 10)
    wide = build("my_lab.nets:make_net?width=7,bias=false", DIGITS, 10, KEY)
    assert wide[1].out_features == 7 and wide[3].bias is None
    for spec in ("my_lab.nets:Net", "my_lab.nets:Net.make"):
        assert build(spec, DIGITS, 10)(images(3, DIGITS)).shape == (3, 10)


def test_own_factory_is_seeded(own):
    a, b, c = (build("my_lab.nets:make_net", DIGITS, 10, Key(n))[1].weight for n in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("no_such.module:make", ["cannot import 'no_such.module'", "ModuleNotFound", "PYTHONPATH"]),
        ("my_lab.broken:make", ["cannot import 'my_lab.broken'", "ZeroDivisionError"]),
        ("my_lab.nets:make_nte", ["my_lab.nets has no 'make_nte'", "Did you mean 'make_net'?"]),
        ("my_lab.nets:LIMIT", ["'LIMIT' is of type int", "in_shape=..., classes=..."]),
        ("my_lab.nets:make_weights", ["must return a torch.nn.Module", "torch.Tensor"]),
        ("my_lab.nets:make_nothing", ["must return a torch.nn.Module", "NoneType"]),
        ("mymodule:make", ["cannot import 'mymodule'", "companion models list"]),
        (
            "my_lab.nets:make_mistake",
            ["make_mistake failed (RuntimeError: a bug of the user's, in"],
        ),
        ("my_lab/nets.py:make_nte", ["no 'make_nte'", "Did you mean 'make_net'?"]),
        ("my_lab/broken.py:make", ["ZeroDivisionError", "in broken.py, line 1"]),
        ("my_lab/leaving.py:make", ["SystemExit: usage"]),
        ("my_lab/nowhere.py:make", ["there is no file"]),
        ("torchvision:resnet8", ["in torchvision", "'resnet8' is not known"]),
        ("torchvision:resnet18?weights=DEFAULT", ["weights are those of your files"]),
        ("torchvision:resnet18?wdith=3", ["wdith"]),
        ("hf:my_lab", ["there is no", "config.json"]),
        ("my_lab.nets:make_net?wdith=3", ["cannot be called with", "wdith"]),
    ],
)
def test_own_factories_that_are_refused(own, spec, says):
    with pytest.raises(BadParameter) as error:
        build(spec, DIGITS, 10)
    for part in says:
        assert part in str(error.value)


def test_factories_get_what_they_name(own):
    assert build("my_lab.nets:make_for_cifar", DIGITS, 7).out_features == 10
    assert build("my_lab.nets:make_torchs", DIGITS, 7)[0].out_features == 7
    assert build("my_lab.nets:make_torchs?num_classes=4", DIGITS, 7)[0].out_features == 4
    assert build("my_lab.nets:READY", DIGITS, 7) is not build("my_lab.nets:READY", DIGITS, 7)
    assert build("my_lab/nets.py:make_net?width=3", DIGITS, 7)[1].out_features == 3
    assert build("nets_of_test_models:make_net", DIGITS, 7)[3].out_features == 7
    assert canonical(" my_lab/nets.py : make_net ? b=1,a=2") == "my_lab/nets.py:make_net?a=2,b=1"
    assert models.is_own("nets:make") and not models.is_own("mlp:widths=3")


def test_torchvision_by_name():
    net = build("torchvision:resnet18?width_per_group=64", (3, 32, 32), 7, KEY)
    assert net.fc.out_features == 7 and net.eval()(images(2, (3, 32, 32))).shape == (2, 7)
    assert build("torchvision.models:squeezenet1_1", (3, 32, 32), 7).num_classes == 7
    assert canonical("torchvision:resnet18") == "torchvision:resnet18"


def test_timm_by_name():
    pytest.importorskip("timm")
    net = build("timm:resnet10t", (1, 32, 32), 7, KEY)
    assert net(images(2, (1, 32, 32))).shape == (2, 7)
    vit = build("timm:vit_tiny_patch16_224?depth=1,embed_dim=48", (3, 32, 32), 7)
    assert vit(images(2, (3, 32, 32))).shape == (2, 7)
    with pytest.raises(BadParameter, match="in timm: 'resnet10' is not known"):
        build("timm:resnet10", (3, 32, 32), 7)


def test_a_folder_of_transformers_is_an_architecture(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8, num_labels=5)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    net = build(f"hf:{tmp_path}", (3, 16, 16), 10, KEY)
    assert isinstance(net, ViTForImageClassification) and net.classifier.out_features == 5
    assert models.example_of(f"hf:{tmp_path}") == ((3, 16, 16), 5)
    assert build(f"hf:{tmp_path}?num_labels=4", (3, 16, 16), 10).classifier.out_features == 4
    assert len(models.source_digest(f"hf:{tmp_path}")) == 64
    with pytest.raises(BadParameter, match="'hidden_sizes' is not known"):
        build(f"hf:{tmp_path}?hidden_sizes=4", (3, 16, 16), 10)
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(BadParameter, match="transformers cannot read"):
        build(f"hf:{tmp_path}", (3, 16, 16), 10)


def test_a_question_mark_before_the_colon_is_no_factory() -> None:
    with pytest.raises(BadParameter):
        canonical("?.:")
