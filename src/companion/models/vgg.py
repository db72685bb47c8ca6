"""VGG networks with a single linear layer on top, or with hidden ones before it."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import nn

from companion.models.layers import norm_maker
from companion.models.options import GROUPS, INIT, Family, Shape, hidden, norm, width

CONVS_PER_STAGE = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


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


FAMILIES = {
    f"vgg{depth}": Family(
        f"VGG-{depth} with one linear layer after global pooling",
        {
            "width": width(64),
            "norm": norm("batch"),
            "groups": GROUPS,
            "head": hidden("units of hidden fully connected layers before the classifier"),
            "init": INIT,
        },
        partial(vgg, depth=depth),
        smallest=8,
    )
    for depth in CONVS_PER_STAGE
}
