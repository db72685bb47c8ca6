"""Networks of other collections, by name: ``torchvision:NAME``, ``timm:NAME`` and ``hf:FOLDER``.

Only architectures are taken from there, never weights: those are the user's two files.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from companion.core.errors import BadParameter, one_of
from companion.models.options import Shape

PLACES = ("torchvision", "timm", "hf")
HEAD_BIAS = "headbias"
"""Option of ``hf``: the output matrix has a bias, as where LayerNorm is folded into it."""
TOKENS = 32
"""Tokens in a window, where a language model says only how many it can take."""
PADDING = 2
"""Positions that RoBERTa leaves out before the first token."""
BESIDE = 5
"""Tokens for a decoder, or beside images."""
IMAGE = 224
"""Pixels a side, where a network of images does not say."""


def builder(spec: str, place: str, name: str) -> Callable[..., Any]:
    """The function of torchvision, or of timm, that builds the network called ``name``.

    Raises:
        BadParameter: there is none, or timm is not installed.
    """
    if place == "torchvision":
        from torchvision import models as collection

        every = collection.list_models()
        found: Callable[..., Any] = collection.get_model_builder(
            _one_of_many(f"model {spec!r}, in torchvision", name, every)
        )
        return found
    timm = _timm(spec)
    base = _one_of_many(f"model {spec!r}, in timm", name.partition(".")[0], timm.list_models())
    entry: Callable[..., Any] = timm.model_entrypoint(base)
    return entry


def _timm(spec: str) -> Any:
    try:
        import timm
    except ImportError:
        raise BadParameter(
            f"model {spec!r}: timm is not installed. It is the extra companion[zoo]."
        ) from None
    return timm


def _one_of_many(where: str, name: str, allowed: list[str]) -> str:
    """As :func:`one_of`, for lists too long to be shown."""
    if name in allowed:
        return name
    try:
        return one_of(where, name, allowed)
    except BadParameter as e:
        raise BadParameter(
            f"{str(e).partition(' Allowed:')[0]} It has {len(allowed)} names."
        ) from None


def build(
    spec: str, place: str, name: str, values: Mapping[str, Any], in_shape: Shape, classes: int
) -> nn.Module:
    """Build the network ``name`` of ``place``, with random weights.

    Arguments:
        values: options given by the user; of ``hf`` entries of the configuration to change, and
            :data:`HEAD_BIAS`.
        in_shape, classes: of the data. What the network cannot be told is left as it is.

    Raises:
        BadParameter: it is not known there, or takes no such options.
    """
    if place == "hf":
        return _hugging_face(spec, name, values)
    make = builder(spec, place, name)
    sides = in_shape[1:] if len(in_shape) == 3 else ()
    tries: list[dict[str, Any]] = [{"num_classes": classes}]
    if place == "torchvision":
        if "weights" in values:
            raise BadParameter(f"model {spec!r}: weights are those of your files; leave them out.")
        tries[0] |= {"weights": None}
        if "weights_backbone" in inspect.signature(make).parameters:
            tries[0]["weights_backbone"] = None
        if name in ("googlenet", "inception_v3"):
            tries[0]["init_weights"] = True
        if name.startswith("vit_") and sides:
            tries[0]["image_size"] = sides[0]
    else:
        tries[0] |= {"in_chans": in_shape[0]} if len(in_shape) == 3 else {}
        tries = [{**tries[0], "img_size": sides}, *tries] if sides else tries
        make = _named(_timm(spec).create_model, name)
    for n, arguments in enumerate(tries, 1):
        try:
            found: nn.Module = make(**arguments, **values)
            return found
        except Exception as e:  # what the collections raise for options that do not fit
            if n < len(tries):
                continue  # most networks of timm take any size, and no such option
            raise BadParameter(f"model {spec!r}: {type(e).__name__}: {e}") from e
    raise AssertionError("there is always one to try")


def _named(create: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda **options: create(name, pretrained=False, **options)


# --- Hugging Face


def config_file(spec: str, folder: str) -> Path:
    """The ``config.json`` of a network's folder, which is all that its architecture needs.

    Raises:
        BadParameter: there is none.
    """
    path = Path(folder).expanduser()
    path = path if path.name == "config.json" else path / "config.json"
    if not path.is_file():
        raise BadParameter(
            f"model {spec!r}: there is no {path}. hf:FOLDER is a folder on this machine as "
            "save_pretrained of transformers writes it."
        )
    return path


def _config(spec: str, folder: str, values: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    path = config_file(spec, folder)
    try:
        json.loads(path.read_text(encoding="utf-8"))
        found = AutoConfig.from_pretrained(path.parent, local_files_only=True)
    except Exception as e:  # what transformers raises for kinds that it does not know
        why = str(e).strip().partition("\n")[0]
        raise BadParameter(
            f"model {spec!r}: transformers cannot read {path} ({type(e).__name__}: {why}). "
            "Networks with code of their own need a factory of yours: package.module:factory."
        ) from e
    for key, value in values.items():
        if not hasattr(found, key):
            known = [k for k in vars(found) if not k.startswith("_")]
            one_of(f"model {spec!r}, option", key, known)
        setattr(found, key, value)
    return found


def _hugging_face(spec: str, folder: str, values: Mapping[str, Any]) -> nn.Module:
    import transformers

    entries = {k: v for k, v in values.items() if k != HEAD_BIAS}
    config = _config(spec, folder, entries)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # memory of a language model for its next token
    kind = next(iter(config.architectures or ()), "")
    cls = getattr(transformers, kind, None)
    try:
        if cls is None:
            made: nn.Module = transformers.AutoModel.from_config(config)
        else:
            made = cls(config)
        if values.get(HEAD_BIAS):
            head = made.get_submodule("lm_head")
            head.register_parameter(
                "bias", nn.Parameter(torch.zeros(len(head.get_parameter("weight"))))
            )
    except Exception as e:  # a configuration that contradicts itself
        raise BadParameter(f"model {spec!r}: {type(e).__name__}: {e}") from e
    return made.float()


def example_of(spec: str, folder: str) -> tuple[Shape, int] | None:
    """Shape of an example and number of classes, where a folder's configuration says them."""
    config = _config(spec, folder.partition("?")[0], {})
    seen = getattr(config, "vision_config", config)  # of a network of images and text
    channels = getattr(seen, "num_channels", None)
    size = getattr(seen, "image_size", None if channels is None else IMAGE)
    channels = 3 if channels is None else channels
    mels, steps = (getattr(config, n, None) for n in ("num_mel_bins", "max_source_positions"))
    if mels and steps:  # speech, two frames a position
        return (mels, 2 * steps), config.vocab_size
    if isinstance(size, int) and isinstance(channels, int):
        return (channels, size, size), max(2, int(getattr(config, "num_labels", 2)))
    words = getattr(config, "vocab_size", None)
    most = getattr(config, "max_position_embeddings", TOKENS)
    if isinstance(words, int) and isinstance(most, int):
        skipped = PADDING if "roberta" in config.model_type else 0
        return (min(TOKENS, max(1, most - skipped)),), words
    return None


def inputs(module: nn.Module, example: Tensor, generator: torch.Generator) -> Any:
    """What forward takes: ``example``, or by their names all that a network of transformers needs.

    Arguments:
        example: of its main input.
        generator: of the other ones: tokens for a decoder, or beside images.
    """
    config = getattr(module, "config", None)
    if config is None or not hasattr(module, "main_input_name"):
        return example
    takes = inspect.signature(module.forward).parameters
    named = {str(module.main_input_name): example}
    if "pixel_values" in takes and example.ndim == 4:
        named = {"pixel_values": example}
    words = getattr(getattr(config, "text_config", config), "vocab_size", None)
    more = "decoder_input_ids" if getattr(config, "is_encoder_decoder", False) else "input_ids"
    if words is None or more not in takes or more in named:
        return example
    tokens = torch.randint(words, (len(example), BESIDE), generator=generator)
    return named | {more: tokens.to(example.device)}
