"""The pieces the papers' networks share: norms, the parameter-free shortcut, initialisations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

NormMaker = Callable[[int], nn.Module]
"""Number of channels → norm layer."""

LAYER_NORM_EPS = 1e-6  # Flax's default, hence Git Re-Basin's; PyTorch's own would be 1e-5

NORMS = ("batch", "layer", "group", "none")
INITS = ("kaiming", "torch", "openlth", "lecun")

_CUT_STD = 0.87962566103423978  # standard deviation of N(0, 1) truncated at two of its own


def first_dropout(module: nn.Module) -> str | None:
    """Name of a layer of ``module`` that drops units while it trains; None if none does."""
    layers = module.named_modules()
    return next((n for n, layer in layers if isinstance(layer, _DropoutNd) and layer.p > 0), None)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a feature map, at each position on its own.

    Statistics are taken over axis 1 alone, so permuting channels together with ``weight`` and
    ``bias`` permutes the output: this is Flax's ``LayerNorm`` on NHWC, which is neither
    ``nn.LayerNorm([C, H, W])`` nor ``GroupNorm(1)`` (both share statistics between positions).

    Arguments:
        channels: size of axis 1.

    Input and output have shape ``(N, channels, *anything)``. ``weight`` and ``bias`` have shape
    (channels,). Source: Git Re-Basin (Ainsworth et al. 2023), section 5 and its ResNet20 code;
    our chapter on re-basin.
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=LAYER_NORM_EPS)

    def forward(self, input: Tensor) -> Tensor:
        # On channels_last memory both moves are views of the same bytes, so nothing is copied.
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class PlainLayout(nn.Module):
    """The same numbers with channels outermost in memory.

    Before a strided 1x1 convolution of fewer than 8 channels: given channels last, as
    :class:`ChannelLayerNorm` leaves them, oneDNN's gradient of its weights writes beyond their end
    on a CPU with AVX2 and no AVX-512, and the process dies some time later (torch 2.14.1).
    """

    def forward(self, input: Tensor) -> Tensor:
        return input.contiguous()


class PadShortcut(nn.Module):
    """Option A: keep every ``stride``-th pixel, fill the new channels with zeros. No parameters.

    The zero channels go half before and half after the old ones, as in Idelbayev's port, whose
    CIFAR checkpoints are the published ones. The old channels keep their places among the new, so
    a stage cannot choose its permutation freely; Git Re-Basin's ResNet20 therefore has a
    convolution here instead. Source: He et al. 2016, section 4.2.

    Arguments:
        c_in, c_out: channels before and after, ``c_in <= c_out``.
        stride: subsampling factor along height and width.

    (N, c_in, H, W) → (N, c_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, zero channels={self.before}+{self.after}"


def default_groups(channels: int) -> int:
    """GroupNorm groups of 4 channels, or of 3, 2, 5, 6, … where 4 does not divide ``channels``.

    Never groups of one channel (for ``channels > 1``): on a 1x1 map those are always zero.
    """
    size = next((s for s in (4, 3, 2, *range(5, channels)) if channels % s == 0), channels)
    return channels // size


def norm_maker(norm: str, groups: int | str = "auto") -> NormMaker:
    """Channels → norm layer for feature maps of shape (N, C, H, W).

    Arguments:
        norm: "batch", "layer" (over channels, :class:`ChannelLayerNorm`), "group" or "none".
        groups: for "group", the number of groups, or "auto" for :func:`default_groups`.
    """
    if norm == "batch":
        return nn.BatchNorm2d
    if norm == "layer":
        return ChannelLayerNorm
    if norm == "group":
        return lambda c: nn.GroupNorm(default_groups(c) if groups == "auto" else int(groups), c)
    return lambda c: nn.Identity()


@torch.no_grad()
def initialise(module: nn.Module, scheme: str) -> None:
    """Draw the weights of ``module`` again, in place, from torch's current generator.

    Arguments:
        scheme: "kaiming": weights of every convolution and linear layer N(0, 2 / fan_in), their
            biases 0 (He et al. 2015, equation 10). "torch": leave what PyTorch's constructors
            drew. "openlth": open_lth's defaults, that is kaiming weights, PyTorch's own biases,
            and norm scales from U[0, 1] with shifts 0. "lecun": Flax's default, hence Git
            Re-Basin's: weights from a normal distribution cut at two of its standard deviations
            and widened so that the variance is 1 / fan_in, biases 0 (LeCun et al. 1998, "Efficient
            BackProp", section 4.6). Norms are 1 and 0 in all but "openlth".
    """
    for layer in module.modules() if scheme != "torch" else ():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if scheme == "lecun":
                std = layer.weight[0].numel() ** -0.5 / _CUT_STD
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None and scheme != "openlth":
                nn.init.zeros_(layer.bias)
        elif scheme == "openlth" and isinstance(
            layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm
        ):
            nn.init.uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def parameter_count(module: nn.Module, buffers: bool = False) -> int:
    """Number of parameters; a tensor that several layers share counts once.

    Arguments:
        module: any network.
        buffers: also count floating-point buffers, that is BatchNorm's running means and variances
            but not its integer step counters.

    The difference matters when a paper's count is checked: CIFAR ResNet-20 has 272,474 trainable
    parameters and 274,042 with running statistics, and the second is the "274K" of Frankle et al.
    2020, Table 1. Our chapter on instability.
    """
    count = sum(p.numel() for p in module.parameters())
    if buffers:
        count += sum(b.numel() for b in module.buffers() if b.is_floating_point())
    return count
