"""A tiny GPT-NeoX, trained here, in folders as Pythia's checkpoints are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from companion import data
from companion.data.text import tokenizer

STEPS = (0, 4, 12)


def train(home: Path, seed: int, order: torch.Tensor | None = None) -> None:
    """Save a GPT-NeoX at each of :data:`STEPS`, and its tokeniser, as ``home/step…``.

    Arguments:
        order: of the units of the first MLP, to be put in before it is saved.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    text = data.load("pydoc?vocab=320&window=16")
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=text.classes, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(module.parameters(), 0.01)
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            mlp: Any = module.gpt_neox.layers[0].mlp
            kept = {k: v.clone() for k, v in mlp.state_dict().items()}
            if order is not None:
                moved = {"dense_h_to_4h.weight": 0, "dense_h_to_4h.bias": 0}
                moved["dense_4h_to_h.weight"] = 1
                at = {k: v.index_select(moved[k], order) for k, v in kept.items() if k in moved}
                mlp.load_state_dict(kept | at)
            module.save_pretrained(home / f"step{step}")
            mlp.load_state_dict(kept)
            definition = tokenizer("pydoc?vocab=320").definition
            (home / f"step{step}" / "tokenizer.json").write_text(definition)
        x = text.train.x[torch.randint(len(text.train), (8,))]
        module(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
