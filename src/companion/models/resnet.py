"""Residual networks: the 6n+2 family made for CIFAR, and ResNet-18 with a CIFAR stem."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from companion.models.layers import NormMaker, PadShortcut, norm_maker
from companion.models.options import GROUPS, INIT, Family, Shape, choice, norm, width

SHORTCUTS = ("conv", "conv3x3", "A")
MAX_DEPTH = 1202  # He et al.'s deepest
NOT_OURS = {50: "resnet50", 152: "resnet152"}  # 6n+2 too, but everybody means ImageNet's


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)).

    (N, c_in, H, W) → (N, c_out, ceil(H / stride), ceil(W / stride)). Source: He et al. 2016,
    figure 2. The shortcut is the identity where the shape stays; else see :func:`resnet_6n2`.
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
            self.shortcut = nn.Sequential(OrderedDict(conv=conv, norm=norm(c_out)))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


def _resnet(
    in_shape: Shape,
    classes: int,
    stages: list[int],
    blocks: int,
    norm: NormMaker,
    shortcut: str,
    bias: bool,
) -> nn.Sequential:
    stem = nn.Conv2d(in_shape[0], stages[0], 3, padding=1, bias=bias)
    net: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(OrderedDict(conv=stem, norm=norm(stages[0]), relu=nn.ReLU()))
    )
    c_in = stages[0]
    for i, c_out in enumerate(stages):
        first = Block(c_in, c_out, 1 if i == 0 else 2, norm, shortcut, bias)
        others = (Block(c_out, c_out, 1, norm, shortcut, bias) for _ in range(blocks - 1))
        net[f"stage{i + 1}"] = nn.Sequential(first, *others)
        c_in = c_out
    net["pool"] = nn.AdaptiveAvgPool2d(1)
    net["flatten"] = nn.Flatten()
    net["head"] = nn.Linear(c_in, classes)
    return nn.Sequential(net)


def resnet_6n2(
    in_shape: Shape,
    classes: int,
    *,
    depth: int,
    width: int = 16,
    norm: str = "batch",
    groups: int | str = "auto",
    shortcut: str = "conv",
) -> nn.Sequential:
    """The CIFAR ResNets: three stages of n blocks, ``width``, 2 and 4 times ``width`` channels.

    Arguments:
        in_shape: (C, H, W) of one image, 4x4 or larger, square or not.
        classes: number of logits.
        depth: 6n+2.
        width: channels of the first stage; 16 is He et al.'s.
        norm, groups: see :func:`companion.models.layers.norm_maker`. Convolutions carry a bias
            only with norm="none", where it stands in for the norm's shift. Nothing then keeps the
            activations' scale, which doubles its variance with each block at initialisation:
            unnormalised networks of this family want a small learning rate.
        shortcut: where channels double: "conv", a 1x1 convolution and norm (open_lth and the
            parameter counts of Frankle et al. 2020); "conv3x3", the same with a 3x3 kernel (Git
            Re-Basin's ResNet20 code); "A", subsampled and zero-padded (He et al.).

    Returns: (N, C, H, W) → logits (N, classes), with children ``stem``, ``stage1`` to ``stage3``
    of :class:`Block`, ``pool``, ``flatten`` and ``head``.

    Source: He et al. 2016, section 4.2; Frankle et al. 2020, Table 1 ("274K" for ResNet-20 is
    272,474 parameters and 1,568 running statistics). Our chapter on instability.
    """
    maker = norm_maker(norm, groups)
    stages = [width, 2 * width, 4 * width]
    return _resnet(in_shape, classes, stages, (depth - 2) // 6, maker, shortcut, norm == "none")


def resnet18(
    in_shape: Shape,
    classes: int,
    *,
    width: int = 64,
    norm: str = "none",
    groups: int | str = "auto",
) -> nn.Sequential:
    """torchvision's ResNet-18 for small images: 3x3 stem of stride 1, no max-pool, no conv biases.

    Arguments:
        in_shape: (C, H, W) of one image, 8x8 or larger, square or not.
        classes: number of logits.
        width: channels of the first of four stages; 64 is the original.
        norm, groups: see :func:`companion.models.layers.norm_maker`.

    Returns: (N, C, H, W) → logits (N, classes), with children ``stem``, ``stage1`` to ``stage4``
    of :class:`Block`, ``pool``, ``flatten`` and ``head``.

    Source: the CIFAR-10 network of Layer-wise Linear Mode Connectivity (Adilova et al. 2024),
    which has no norm and 11,164,362 parameters. Our chapter on layer-wise connectivity.
    """
    stages = [width, 2 * width, 4 * width, 8 * width]
    return _resnet(in_shape, classes, stages, 2, norm_maker(norm, groups), "conv", bias=False)


def family_6n2(depth: int) -> Family:
    """The family "resnet<depth>"; ``depth`` must be 6n+2."""
    return Family(
        f"CIFAR ResNet of He et al. 2016, depth {depth} = 6n+2 with n = {(depth - 2) // 6}",
        {
            "width": width(16),
            "norm": norm("batch"),
            "groups": GROUPS,
            "shortcut": choice(
                "conv", "where channels double (A: subsample and pad with zeros)", SHORTCUTS
            ),
            "init": INIT,
        },
        partial(resnet_6n2, depth=depth),
        smallest=4,
    )


FAMILIES = {
    **{f"resnet{d}": family_6n2(d) for d in (8, 14, 20, 32, 44, 56, 110)},
    "resnet18": Family(
        "ResNet-18 with a CIFAR stem, without norms unless asked (layer-wise LMC)",
        {"width": width(64), "norm": norm("none"), "groups": GROUPS, "init": INIT},
        resnet18,
        smallest=8,
    ),
}
