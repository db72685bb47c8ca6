"""Multi-layer perceptrons, LeNet-300-100 among them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import prod

from torch import nn

from companion.models.layers import LAYER_NORM_EPS
from companion.models.options import INIT, Family, Shape, norm, widths


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

    Source: LeNet-300-100 in Frankle et al. 2020, Table 1; 512x3 in Git Re-Basin, section 5.1.
    Our chapters on instability and on re-basin.
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


def lenet_300_100(in_shape: Shape, classes: int, *, norm: str = "none") -> nn.Sequential:
    """:func:`mlp` with hidden layers of 300 and 100 units; 266,610 parameters on MNIST."""
    return mlp(in_shape, classes, widths=(300, 100), norm=norm)


_NORM = norm("none", ("none", "batch", "layer"))

FAMILIES = {
    "mlp": Family(
        "fully connected ReLU network; 512x3 is Git Re-Basin's",
        {"widths": widths("512x3"), "norm": _NORM, "init": INIT},
        mlp,
    ),
    "lenet-300-100": Family(
        "LeNet-300-100 of Frankle et al. 2020: fully connected, 300 then 100 units",
        {"norm": _NORM, "init": INIT},
        lenet_300_100,
    ),
}
