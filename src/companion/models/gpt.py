"""A GPT-2 of any size: the family ``gpt``, for text."""

from __future__ import annotations

import warnings

from torch import nn

from companion.core.errors import BadParameter
from companion.models.options import NetworkFamily, Option, Shape, choice, share, whole_number

GELU = {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}


def gpt(
    in_shape: Shape,
    classes: int,
    *,
    layers: int = 4,
    width: int = 64,
    heads: int = 4,
    bias: str = "true",
    dropout: float = 0.0,
    tied: str = "true",
    positions: int | str = "window",
    gelu: str = "exact",
    headbias: str = "false",
) -> nn.Module:
    """A decoder-only transformer with Hugging Face's parameter names, so its checkpoints fit.

    Norms come before attention and MLP, positions are learned, the MLP is four times as wide, and
    the output matrix is the input embedding unless ``tied`` is "false".

    Arguments:
        in_shape: (L,), the tokens in one window.
        classes: K, entries of the vocabulary.
        layers, width, heads: of the transformer; ``heads`` divides ``width``.
        bias: "false" leaves out every bias, those of the norms too.
        dropout: probability, after the embedding, in attention and before each residual sum. Our
            training loop draws it from the run's augmentation key.
        tied: whether embedding and output matrix are one tensor.
        positions: learned positions, "window" for L of them. A checkpoint with more (GPT-2: 1024)
            wants its own number here.
        gelu: "exact", or GPT-2's own "tanh" approximation.
        headbias: "true" adds a bias to the output matrix. GPT-2 has none; networks whose LayerNorms
            are folded (:func:`companion.rebasin.fold`) have.

    Returns: tokens (B, L) int64 → logits (B, L, K); a ``transformers.GPT2LMHeadModel`` whose
    forward returns logits alone. ``transformers`` is imported when the first one is built.

    Raises: :class:`BadParameter` for fewer positions than the window has tokens.

    Source: Radford et al. 2019 for the architecture; Adilova et al. 2024, the language model of
    their layer-wise barriers: ``layers=12,width=768,heads=12,bias=false,dropout=0.2``, 123.8
    million parameters with a vocabulary of 50,304 and windows of 256. Our chapter on GPT.
    """
    (window,) = in_shape
    length = window if isinstance(positions, str) else positions
    if length < window:
        raise BadParameter(
            f"model 'gpt': positions={length} are fewer than the {window} tokens of a window. "
            f"Leave positions out, or take {window} or more."
        )
    with warnings.catch_warnings():  # tqdm, in a notebook without widgets
        warnings.filterwarnings("ignore", message="IProgress not found")
        from companion.models.gpt_module import gpt_module  # seconds of import: only who needs it

    config = {
        "vocab_size": classes,
        "n_positions": length,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "activation_function": GELU[gelu],
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "tie_word_embeddings": tied == "true",
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    return gpt_module(config, bias=bias == "true", head_bias=headbias == "true")


_MANY = whole_number(1, "learned positions; window is one for each token of a window")
_TRUTH = ("true", "false")

FAMILIES = {
    "gpt": NetworkFamily(
        "GPT-2 of any size, for text (transformers' GPT2LMHeadModel)",
        {
            "layers": whole_number(4, "blocks of attention and MLP"),
            "width": whole_number(64, "of the residual stream"),
            "heads": whole_number(4, "heads of attention; they divide the width"),
            "bias": choice("true", "biases of linear maps and norms", _TRUTH),
            "dropout": share("0", "probability of dropout in training"),
            "tied": choice("true", "embedding and output matrix are one tensor", _TRUTH),
            "positions": Option(
                *("window", _MANY.meaning, f"'window' or {_MANY.allowed}"),
                lambda text: "window" if text.casefold() == "window" else _MANY.parse(text),
            ),
            "headbias": choice("false", "a bias of the output matrix", _TRUTH),
            "gelu": choice("exact", "nonlinearity; tanh is GPT-2's approximation", tuple(GELU)),
        },
        gpt,
        takes="tokens",
    )
}
