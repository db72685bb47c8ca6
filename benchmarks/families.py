"""Which units of the usual families of networks may move: one row a family, for the book.

python benchmarks/families.py           derives all of them, and writes results/families.json
python benchmarks/families.py Llama     only some

Networks are small (tiny configurations, no downloads) but have every part of the real ones.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn

from companion.core.errors import BadParameter
from companion.rebasin import derive

HERE = Path(__file__).resolve().parent
Made = tuple[nn.Module, Any]


def _image(name: str, size: int = 64, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        import torchvision

        net = getattr(torchvision.models, name)(weights=None, num_classes=10, **options)
        return net, torch.randn(1, 3, size, size)

    return make


def _vgg(name: str) -> Callable[[], Made]:
    def make() -> Made:
        import torchvision

        net = getattr(torchvision.models, name)(weights=None, num_classes=10)
        net.classifier[0] = nn.Linear(512 * 7 * 7, 32)  # not its 100 million weights
        net.classifier[3] = nn.Linear(32, 4096)
        return net, torch.randn(1, 3, 32, 32)

    return make


def _hf(kind: str, example: Any, model: str | None = None, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options)
        net = getattr(transformers, model or f"{kind}Model")(config)
        return net, example() if callable(example) else example

    return make


def _timm(name: str, size: int = 64, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        import timm

        return timm.create_model(name, num_classes=10, **options), torch.randn(1, 3, size, size)

    return make


def _ids() -> torch.Tensor:
    return torch.arange(16).reshape(2, 8)


def _pixels() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXT = SMALL | {"vocab_size": 50, "max_position_embeddings": 32}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
DECODER = TEXT | IDS
TINY_IMAGE = {"image_size": 32, "patch_size": 8}

FAMILIES: dict[str, Callable[[], Made]] = {
    "torchvision: resnet18": _image("resnet18"),
    "torchvision: resnet50": _image("resnet50"),
    "torchvision: resnext50_32x4d": _image("resnext50_32x4d"),
    "torchvision: vgg11_bn": _vgg("vgg11_bn"),
    "torchvision: mobilenet_v2": _image("mobilenet_v2"),
    "torchvision: mobilenet_v3_small": _image("mobilenet_v3_small"),
    "torchvision: mnasnet0_5": _image("mnasnet0_5"),
    "torchvision: shufflenet_v2_x0_5": _image("shufflenet_v2_x0_5"),
    "torchvision: densenet121": _image("densenet121"),
    "torchvision: squeezenet1_1": _image("squeezenet1_1"),
    "torchvision: efficientnet_b0": _image("efficientnet_b0"),
    "torchvision: regnet_y_400mf": _image("regnet_y_400mf"),
    "torchvision: convnext_tiny": _image("convnext_tiny"),
    "torchvision: swin_t": _image("swin_t"),
    "torchvision: vit_b_16": _image("vit_b_16", 32, image_size=32),
    "torchvision: maxvit_t": _image("maxvit_t", 224),
    "transformers: BERT": _hf("Bert", _ids, "BertForMaskedLM", **TEXT),
    "transformers: RoBERTa": _hf(
        "Roberta", _ids, "RobertaForMaskedLM", **TEXT | {"pad_token_id": 1}
    ),
    "transformers: OPT": _hf(
        "OPT",
        _ids,
        "OPTForCausalLM",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        vocab_size=50,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    ),
    "transformers: GPT-2": _hf(
        "GPT2",
        _ids,
        "GPT2LMHeadModel",
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=50,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "transformers: Pythia (GPT-NeoX)": _hf(
        "GPTNeoX", _ids, "GPTNeoXForCausalLM", **DECODER | {"hidden_size": 64}
    ),
    "transformers: Llama": _hf("Llama", _ids, "LlamaForCausalLM", **DECODER),
    "transformers: Llama, grouped queries": _hf(
        "Llama", _ids, "LlamaForCausalLM", **DECODER, num_key_value_heads=2
    ),
    "transformers: Mistral": _hf(
        "Mistral", _ids, "MistralForCausalLM", **DECODER, num_key_value_heads=2
    ),
    "transformers: Qwen2": _hf("Qwen2", _ids, "Qwen2ForCausalLM", **DECODER, num_key_value_heads=2),
    "transformers: Qwen3": _hf(
        "Qwen3", _ids, "Qwen3ForCausalLM", **DECODER, num_key_value_heads=2, head_dim=8
    ),
    "transformers: Gemma 2": _hf(
        "Gemma2", _ids, "Gemma2ForCausalLM", **DECODER, num_key_value_heads=2, head_dim=8
    ),
    "transformers: Phi-3": _hf("Phi3", _ids, "Phi3ForCausalLM", **DECODER, num_key_value_heads=2),
    "transformers: Falcon": _hf(
        "Falcon",
        _ids,
        "FalconForCausalLM",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "transformers: BLOOM": _hf(
        "Bloom",
        _ids,
        "BloomForCausalLM",
        hidden_size=32,
        n_layer=2,
        n_head=4,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "transformers: Mixtral": _hf(
        "Mixtral",
        _ids,
        "MixtralForCausalLM",
        **DECODER,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "transformers: Mamba": _hf(
        "Mamba",
        _ids,
        "MambaForCausalLM",
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        vocab_size=50,
        **IDS,
    ),
    "transformers: T5": _hf(
        "T5",
        lambda: {"input_ids": _ids(), "decoder_input_ids": _ids()},
        "T5ForConditionalGeneration",
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=50,
        decoder_start_token_id=0,
    ),
    "transformers: BART": _hf(
        "Bart",
        lambda: {"input_ids": _ids(), "decoder_input_ids": _ids()},
        "BartForConditionalGeneration",
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=50,
        max_position_embeddings=32,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    ),
    "transformers: Whisper": _hf(
        "Whisper",
        lambda: {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": _ids()[:1]},
        "WhisperForConditionalGeneration",
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=50,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    ),
    "transformers: ViT": _hf("ViT", _pixels, "ViTForImageClassification", **SMALL, **TINY_IMAGE),
    "transformers: Swin": _hf(
        "Swin",
        _pixels,
        "SwinForImageClassification",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "transformers: ConvNeXt": _hf(
        "ConvNext",
        _pixels,
        "ConvNextForImageClassification",
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 2, 1],
    ),
    "transformers: CLIP": _hf(
        "CLIP",
        lambda: {"input_ids": _ids(), "pixel_values": _pixels()},
        text_config=TEXT | IDS | {"bos_token_id": 0, "eos_token_id": 15},
        vision_config=SMALL | TINY_IMAGE,
        projection_dim=16,
    ),
    "timm: resnet18": _timm("resnet18"),
    "timm: vit_tiny_patch16_224": _timm("vit_tiny_patch16_224", 32, img_size=32, depth=2),
    "timm: mixer_s32_224": _timm("mixer_s32_224", 224),
    "timm: efficientnetv2_rw_t": _timm("efficientnetv2_rw_t"),
    "timm: convnextv2_atto": _timm("convnextv2_atto"),
    "timm: swin_tiny_patch4_window7_224": _timm("swin_tiny_patch4_window7_224", 224),
    "timm: mobilevit_xxs": _timm("mobilevit_xxs", 64),
    "timm: resmlp_12_224": _timm("resmlp_12_224", 224),
    "timm: poolformer_s12": _timm("poolformer_s12"),
    "timm: eva02_tiny_patch14_224": _timm("eva02_tiny_patch14_224", 28, img_size=28, depth=2),
}


def row(make: Callable[[], Made]) -> dict[str, Any]:
    """What is derived of one network."""
    torch.manual_seed(0)
    net, example = make()
    start = time.perf_counter()
    try:
        spec = derive(net, example, unread="hold")
    except BadParameter as e:
        return {"why": str(e), "seconds": round(time.perf_counter() - start, 1)}
    return {
        "groups": len(spec.groups),
        "inner": sum(g.within is not None for g in spec.groups.values()),
        "log10": round(spec.log10_count()),
        "held": dict(Counter(re.sub(r",? in [\w.]+$", "", why) for why in spec.held.values())),
        "tolerance": spec.tolerance,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(asked: list[str] | None = None) -> None:
    """Derive all families, or those whose name holds one of the words, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only families with one of these in their name")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "families.json")
    options = parser.parse_args(asked)
    machine = harness.machine()
    for package in ("torchvision", "transformers", "timm"):
        with suppress(PackageNotFoundError):
            machine["packages"][package] = version(package)
    found = {}
    warnings.simplefilter("ignore")
    for name, make in FAMILIES.items():
        if options.words and not any(word in name for word in options.words):
            continue
        if find_spec(name.partition(":")[0]) is None:
            continue
        found[name] = row(make)
        print(name, found[name], flush=True)
    harness.write(
        options.out, {"benchmark": "families", "machine": machine, "settings": {}, "rows": found}
    )


if __name__ == "__main__":
    main()
