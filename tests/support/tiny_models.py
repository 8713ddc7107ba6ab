"""Language models with random weights, small enough for tests."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 61
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_model(name: str, seed: int = 0, **options: Any) -> Any:
    """Return a model of transformers in evaluation mode.

    Args:
        name: ``"llama"``, ``"qwen2"`` (which has biases in its attention) or ``"gpt2"``; all with tied output layers.
        seed: Of its weights.
        options: Of its configuration.
    """
    import transformers

    torch.manual_seed(seed)
    if name == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **_TOKENS, **options})).eval()
    kind = {"llama": "Llama", "qwen2": "Qwen2"}[name]
    config = getattr(transformers, f"{kind}Config")
    settings = {**_SIZES, **_TOKENS, "tie_word_embeddings": True, **options}
    return getattr(transformers, f"{kind}ForCausalLM")(config(**settings)).eval()


def tokens(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Return random token ids ``[rows, length]``, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
