"""GPT-2 as ``transformers`` builds it, with a plain forward: the module behind the family ``gpt``.

Importing this module imports ``transformers``, which takes seconds: :mod:`companion.models.gpt`
does so only when a ``gpt`` is built.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

STD = 0.02
"""Of every weight at the start: GPT-2's (Radford et al. 2019) and Adilova et al.'s (2024)."""


class PlainConv1D(nn.Module):
    """Hugging Face's ``Conv1D``, a linear map whose weight is (inputs, outputs), without a bias."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def extra_repr(self) -> str:
        return "{}, {}, bias=False".format(*self.weight.shape)


class Gpt(GPT2LMHeadModel):  # type: ignore[misc]  # mypy does not read transformers
    """``GPT2LMHeadModel`` that maps tokens (B, L) int64 to logits (B, L, K), and nothing else.

    Names and shapes in its state dict are Hugging Face's own, so a GPT-2 checkpoint fits. Attention
    is PyTorch's scaled dot product, causal; nothing is cached between calls. The parts are called
    here one by one: the forward of ``transformers`` looks at the positions to see whether several
    texts share a window, which makes the host wait for the device in every pass, and a compiler
    build a mask that keeps the fast kernels out.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        if self.config._attn_implementation != "sdpa":  # others are causal only by a mask
            logits: Tensor = super().forward(tokens, use_cache=False, return_dict=True).logits
            return logits
        body = self.transformer
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        stream = body.drop(body.wte(tokens) + body.wpe(positions))
        for block in body.h:
            stream = block(stream)
        out: Tensor = self.lm_head(body.ln_f(stream))
        return out


def gpt_module(config: dict[str, Any], *, bias: bool, head_bias: bool = False) -> Gpt:
    """A :class:`Gpt` with fresh weights from torch's current generator.

    Every matrix and embedding is drawn from N(0, 0.02), the two projections of a block that end in
    the residual stream from N(0, 0.02 / sqrt(2 layers)); biases start at 0, norms at 1 and 0.
    The draws are made here, in the order of the state dict: ``transformers`` makes the same ones in
    an order of its own, which may change with its version.

    Arguments:
        config: of ``transformers.GPT2Config``.
        bias: False takes every bias away, those of the norms too.
        head_bias: whether the output matrix has one.
    """
    with no_init_weights():
        module = Gpt(GPT2Config(**config))
    module.tie_weights()
    if not bias:
        for parent in list(module.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, Conv1D):
                    setattr(parent, name, PlainConv1D(layer.weight))
                elif isinstance(layer, nn.LayerNorm):
                    layer.register_parameter("bias", None)
    if head_bias:
        module.lm_head.register_parameter("bias", nn.Parameter(torch.empty(config["vocab_size"])))
    _draw(module)
    return module


@torch.no_grad()
def _draw(module: Gpt) -> None:
    residual = STD / math.sqrt(2 * module.config.n_layer)
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.normal_(0.0, residual if name.endswith("c_proj.weight") else STD)
        else:
            p.fill_(float(name.endswith("weight")))  # one-dimensional weights are those of norms
