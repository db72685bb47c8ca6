"""The papers' networks for images: perceptrons, CIFAR's ResNets, VGGs, MobileNet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn

from companion.models import options
from companion.models.layers import (
    LAYER_NORM_EPS,
    NormMaker,
    PadShortcut,
    PlainLayout,
    norm_maker,
)
from companion.models.options import NetworkFamily, Shape

SHORTCUTS = ("conv", "conv3x3", "A")
MAX_DEPTH = 1202  # He et al.'s deepest
NOT_OURS = {50: "resnet50", 152: "resnet152"}  # 6n+2 too, but everybody means ImageNet's
CHANNELS = "channels of the first stage; the others scale"
MOBILE = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *[(16, 1)] * 5, (32, 2), (32, 1))
"""Blocks of MobileNet: channels over those of the stem, and stride."""
CONVS_PER_STAGE = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def mlp(
    in_shape: Shape, classes: int, *, widths: tuple[int, ...], norm: str = "none"
) -> nn.Sequential:
    """A ReLU network of fully connected layers on the flattened image.

    Arguments:
        in_shape: (C, H, W) of one image; any.
        classes: number of logits.
        widths: units of each hidden layer.
        norm: "none", "batch" or "layer", between each hidden linear map and its ReLU.

    Returns: (N, C, H, W) → logits (N, classes), with children ``flatten``, ``layer1``, …,
    ``head``; each layer has ``linear``, ``norm`` (if any) and ``relu``.

    Source: LeNet-300-100 in Frankle et al. 2020, Table 1 (266,610 parameters on MNIST); 512x3 in
    Git Re-Basin, section 5.1. Our chapters on instability and on re-basin.
    """
    norms: dict[str, Callable[[int], nn.Module]] = {
        "batch": nn.BatchNorm1d,
        "layer": lambda n: nn.LayerNorm(n, eps=LAYER_NORM_EPS),
    }
    net: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    n_in = prod(in_shape)
    for i, n_out in enumerate(widths, start=1):
        layer: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(n_in, n_out))
        if norm != "none":
            layer["norm"] = norms[norm](n_out)
        layer["relu"] = nn.ReLU()
        net[f"layer{i}"] = nn.Sequential(layer)
        n_in = n_out
    net["head"] = nn.Linear(n_in, classes)
    return nn.Sequential(net)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)).

    (N, c_in, H, W) → (N, c_out, ceil(H / stride), ceil(W / stride)). Source: He et al. 2016,
    figure 2. The shortcut is the identity where the shape stays; else see :func:`resnet`.
    """

    def __init__(
        self, c_in: int, c_out: int, stride: int, norm: NormMaker, shortcut: str, bias: bool
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=bias)
        self.norm1 = norm(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=bias)
        self.norm2 = norm(c_out)
        self.shortcut: nn.Module
        if stride == 1 and c_in == c_out:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PadShortcut(c_in, c_out, stride)
        else:
            kernel = 3 if shortcut == "conv3x3" else 1
            # Never a bias: it would add to the same sum as conv2's, a direction without effect.
            conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
            parts: dict[str, nn.Module] = {"conv": conv, "norm": norm(c_out)}
            if kernel == 1 and stride > 1 and c_in < 8:
                parts = {"plain": PlainLayout(), **parts}
            self.shortcut = nn.Sequential(OrderedDict(parts))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


def resnet(
    in_shape: Shape,
    classes: int,
    *,
    stages: int,
    blocks: int,
    bias: bool,
    width: int,
    norm: str,
    groups: int | str = "auto",
    shortcut: str = "conv",
) -> nn.Sequential:
    """A residual network for small images: a 3x3 stem of stride 1, no max-pool, one linear head.

    The 6n+2 family has three stages of n blocks. ResNet-18 has four of two, as torchvision's.

    Arguments:
        in_shape: (C, H, W) of one image, 4x4 (ResNet-18: 8x8) or larger, square or not.
        classes: number of logits.
        stages: each has twice the channels of the one before, and half its height and width.
        blocks: of a stage, :class:`Block`.
        bias: whether convolutions carry one. In the 6n+2 family they do only with norm="none",
            where it stands in for the norm's shift. Nothing then keeps the activations' scale,
            which doubles its variance with each block at initialisation: unnormalised networks of
            this family want a small learning rate. ResNet-18 has none.
        width: channels of the first stage; 16 is He et al.'s, 64 ResNet-18's.
        norm, groups: see :func:`companion.models.layers.norm_maker`.
        shortcut: where channels double: "conv", a 1x1 convolution and norm (open_lth and the
            parameter counts of Frankle et al. 2020); "conv3x3", the same with a 3x3 kernel (Git
            Re-Basin's ResNet20 code); "A", subsampled and zero-padded (He et al.).

    Returns: (N, C, H, W) → logits (N, classes), with children ``stem``, ``stage1``, …, ``pool``,
    ``flatten`` and ``head``.

    Source: He et al. 2016, section 4.2; Frankle et al. 2020, Table 1 ("274K" for ResNet-20 is
    272,474 parameters and 1,568 running statistics); ResNet-18 without norms and with 11,164,362
    parameters is the CIFAR-10 network of Layer-wise Linear Mode Connectivity (Adilova et al.
    2024). Our chapters on instability and on layer-wise connectivity.
    """
    maker = norm_maker(norm, groups)
    stem = nn.Conv2d(in_shape[0], width, 3, padding=1, bias=bias)
    net: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(OrderedDict(conv=stem, norm=maker(width), relu=nn.ReLU()))
    )
    c_in = width
    for i in range(stages):
        c_out = width << i
        first = Block(c_in, c_out, 1 if i == 0 else 2, maker, shortcut, bias)
        others = (Block(c_out, c_out, 1, maker, shortcut, bias) for _ in range(blocks - 1))
        net[f"stage{i + 1}"] = nn.Sequential(first, *others)
        c_in = c_out
    net["pool"] = nn.AdaptiveAvgPool2d(1)
    net["flatten"] = nn.Flatten()
    net["head"] = nn.Linear(c_in, classes)
    return nn.Sequential(net)


def vgg(
    in_shape: Shape,
    classes: int,
    *,
    depth: int,
    width: int = 64,
    norm: str = "batch",
    groups: int | str = "auto",
    head: tuple[int, ...] = (),
) -> nn.Sequential:
    """VGG: five stages of 3x3 convolutions (always with a bias), a max-pool after each, one head.

    A max-pool is left out where the map is already a single pixel high or wide, so 8x8 and 28x28
    images pass; the convolutions after that see the one pixel through the kernel's centre alone,
    and their other eight taps get no gradient. Larger images are averaged before the head.

    Arguments:
        in_shape: (C, H, W) of one image, 8x8 or larger, square or not.
        classes: number of logits.
        depth: 11, 13, 16 or 19 (Simonyan & Zisserman's A, B, D, E, counting their three heads).
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
        norm, groups: see :func:`companion.models.layers.norm_maker`.
        head: units of hidden fully connected layers (ReLU, no norm) before the classifier.

    Returns: (N, C, H, W) → logits (N, classes), with children ``stage1`` to ``stage5``, ``pool``,
    ``flatten``, ``dense1``, … (``linear``, ``relu``) for the layers of ``head``, and ``head``, the
    classifier; each stage holds ``0``, ``1``, … of ``conv``, ``norm``, ``relu``, and ``pool``.

    Source: Simonyan & Zisserman 2015, Table 1; the single head is open_lth's and gives the 14.7M
    of Frankle et al. 2020, Table 1 (14,728,266; open_lth averages where our last max-pool is).
    Git Re-Basin's VGG-16 has two hidden layers of 8 × width units (``head=512x2`` at width 64),
    Simonyan & Zisserman's has ``head=4096x2``, with dropout and, at 224x224 pixels, on a 7x7 map;
    here there is no dropout and the map is averaged to one pixel. Our chapters on instability and
    on re-basin.
    """
    maker = norm_maker(norm, groups)
    c_in, side = in_shape[0], min(in_shape[1:])
    net: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (convs, scale) in enumerate(zip(CONVS_PER_STAGE[depth], (1, 2, 4, 8, 8), strict=True)):
        stage: OrderedDict[str, nn.Module] = OrderedDict()
        c_out = scale * width
        for j in range(convs):
            conv = nn.Conv2d(c_in, c_out, 3, padding=1)
            stage[str(j)] = nn.Sequential(OrderedDict(conv=conv, norm=maker(c_out), relu=nn.ReLU()))
            c_in = c_out
        if side > 1:
            stage["pool"] = nn.MaxPool2d(2)
            side //= 2
        net[f"stage{i + 1}"] = nn.Sequential(stage)
    net["pool"] = nn.AdaptiveAvgPool2d(1)
    net["flatten"] = nn.Flatten()
    for i, units in enumerate(head, start=1):
        net[f"dense{i}"] = nn.Sequential(OrderedDict(linear=nn.Linear(c_in, units), relu=nn.ReLU()))
        c_in = units
    net["head"] = nn.Linear(c_in, classes)
    return nn.Sequential(net)


def mobilenet(
    in_shape: Shape,
    classes: int,
    *,
    width: int = 32,
    norm: str = "batch",
    groups: int | str = "auto",
    statistics: str = "running",
) -> nn.Sequential:
    """MobileNet for small images: a 3x3 stem of stride 1, then 13 depth-wise separable blocks.

    Arguments:
        in_shape: (C, H, W) of one image, 8x8 or larger.
        classes: number of logits.
        width: channels of the stem; the blocks have 2 to 32 times as many. 32 is the paper's.
        norm, groups: see :func:`companion.models.layers.norm_maker`.
        statistics: of norm="batch": "running", or "batch": BatchNorm keeps none and takes those of
            each batch in evaluation, too, as FedBABU's network does.

    Returns: (N, C, H, W) → logits (N, classes), with children ``stem``, ``block1`` to ``block13``
    (``depthwise``, ``norm1``, ``relu1``, ``pointwise``, ``norm2``, ``relu2``), ``pool``,
    ``flatten`` and ``head``.

    Source: Howard et al. 2017, Table 1, with the strides of the stem and of the second block left
    out for images of 32x32; the network of FedBABU (Oh et al. 2022) and, on CIFAR-100, of
    Layer-wise Linear Mode Connectivity (Adilova et al. 2024), section 4. Our chapters on
    layer-wise connectivity and on federated learning.
    """
    maker = norm_maker(norm, groups)

    def normed(channels: int) -> nn.Module:
        if norm == "batch" and statistics == "batch":
            return nn.BatchNorm2d(channels, track_running_stats=False)
        return maker(channels)

    stem = nn.Conv2d(in_shape[0], width, 3, padding=1, bias=False)
    net: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(OrderedDict(conv=stem, norm=normed(width), relu=nn.ReLU()))
    )
    c_in = width
    for i, (scale, stride) in enumerate(MOBILE, start=1):
        c_out = scale * width
        net[f"block{i}"] = nn.Sequential(
            OrderedDict(
                depthwise=nn.Conv2d(c_in, c_in, 3, stride, padding=1, groups=c_in, bias=False),
                norm1=normed(c_in),
                relu1=nn.ReLU(),
                pointwise=nn.Conv2d(c_in, c_out, 1, bias=False),
                norm2=normed(c_out),
                relu2=nn.ReLU(),
            )
        )
        c_in = c_out
    net["pool"] = nn.AdaptiveAvgPool2d(1)
    net["flatten"] = nn.Flatten()
    net["head"] = nn.Linear(c_in, classes)
    return nn.Sequential(net)


def _resnet_6n2(in_shape: Shape, classes: int, *, norm: str, **others: Any) -> nn.Sequential:
    return resnet(in_shape, classes, stages=3, bias=norm == "none", norm=norm, **others)


def family_6n2(depth: int) -> NetworkFamily:
    """The family "resnet<depth>"; ``depth`` must be 6n+2."""
    doubling = "where channels double (A: subsample and pad with zeros)"
    return NetworkFamily(
        f"CIFAR ResNet of He et al. 2016, depth {depth} = 6n+2 with n = {(depth - 2) // 6}",
        {
            "width": options.whole_number(16, CHANNELS),
            "norm": options.norm("batch"),
            "groups": options.GROUPS,
            "shortcut": options.choice("conv", doubling, SHORTCUTS),
            "init": options.INIT,
        },
        partial(_resnet_6n2, blocks=(depth - 2) // 6),
        smallest=4,
    )


_NORM = options.norm("none", ("none", "batch", "layer"))

FAMILIES = {
    "mlp": NetworkFamily(
        "fully connected ReLU network; 512x3 is Git Re-Basin's",
        {"widths": options.widths("512x3"), "norm": _NORM, "init": options.INIT},
        mlp,
    ),
    "lenet-300-100": NetworkFamily(
        "LeNet-300-100 of Frankle et al. 2020: fully connected, 300 then 100 units",
        {"norm": _NORM, "init": options.INIT},
        partial(mlp, widths=(300, 100)),
    ),
    **{f"resnet{d}": family_6n2(d) for d in (8, 14, 20, 32, 44, 56, 110)},
    "resnet18": NetworkFamily(
        "ResNet-18 with a CIFAR stem, without norms unless asked (layer-wise LMC)",
        {
            "width": options.whole_number(64, CHANNELS),
            "norm": options.norm("none"),
            "groups": options.GROUPS,
            "init": options.INIT,
        },
        partial(resnet, stages=4, blocks=2, bias=False),
        smallest=8,
    ),
    "mobilenet": NetworkFamily(
        "MobileNet with a CIFAR stem (layer-wise LMC on CIFAR-100; FedBABU's: statistics=batch)",
        {
            "width": options.whole_number(32, "channels of the stem; the others scale"),
            "norm": options.norm("batch"),
            "groups": options.GROUPS,
            "statistics": options.choice(
                "running",
                "BatchNorm's in evaluation",
                ("running", "batch"),
            ),
            "init": options.INIT,
        },
        mobilenet,
        smallest=8,
    ),
    **{
        f"vgg{depth}": NetworkFamily(
            f"VGG-{depth} with one linear layer after global pooling",
            {
                "width": options.whole_number(64, CHANNELS),
                "norm": options.norm("batch"),
                "groups": options.GROUPS,
                "head": options.hidden(
                    "units of hidden fully connected layers before the classifier"
                ),
                "init": options.INIT,
            },
            partial(vgg, depth=depth),
            smallest=8,
        )
        for depth in CONVS_PER_STAGE
    },
}
