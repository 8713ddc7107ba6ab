"""Tiny models of transformers with random weights, and inputs for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCABULARY = 61
Inputs = dict[str, Any]

# Sizes under the names that most configurations know.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Fewer heads of keys and values than of queries.
GROUPED = {**SIZES, "num_key_value_heads": 2}


def tokens() -> Inputs:
    """Two sentences, the second one padded at its end."""
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    return {"input_ids": ids * mask, "attention_mask": mask}


def prompt() -> Inputs:
    """For decoders, without a cache."""
    return {**tokens(), "use_cache": False}


def sequences() -> Inputs:
    """For an encoder and a decoder."""
    return {**tokens(), "decoder_input_ids": tokens()["input_ids"][:, :5], "use_cache": False}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def pixels() -> Inputs:
    return {"pixel_values": randn(2, 3, 16, 16)}


def image_and_text() -> Inputs:
    return {**tokens(), **pixels()}


def spectrogram() -> Inputs:
    return {"input_features": randn(2, 8, 40), "decoder_input_ids": tokens()["input_ids"], "use_cache": False}


def waveform() -> Inputs:
    return {"input_values": randn(2, 400)}


def t5() -> Inputs:
    return {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0}  # fmt: skip


def bart() -> Inputs:
    return {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
            "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip


IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3, "hidden_size": 16, "intermediate_size": 24,
         "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip

# The model's class (its configuration is found from it), the options of its configuration, and its inputs.
DECODERS: dict[str, Inputs] = {
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": {**GROUPED, "sliding_window": 4},
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 4},
    "GemmaForCausalLM": {**GROUPED, "head_dim": 4},
    "Gemma2ForCausalLM": {**GROUPED, "head_dim": 4, "sliding_window": 4},
    "PhiForCausalLM": GROUPED,
    "Phi3ForCausalLM": GROUPED,
    "OlmoForCausalLM": GROUPED,
    "GPTNeoXForCausalLM": SIZES,
    "GPT2LMHeadModel": {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32,
                        "bos_token_id": 1, "eos_token_id": 2},
    "OPTForCausalLM": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "BloomForCausalLM": {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": SIZES,
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "MambaForCausalLM": {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
}  # fmt: skip
ENCODERS: dict[str, Inputs] = {
    "BertModel": SIZES,
    "BertForSequenceClassification": SIZES,
    "RobertaModel": SIZES,
    "DistilBertModel": {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4,
                        "max_position_embeddings": 32},
    "AlbertModel": {**SIZES, "embedding_size": 8},
    "ElectraModel": {**SIZES, "embedding_size": 8},
    "DebertaV2Model": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
}  # fmt: skip
OTHERS: dict[str, tuple[Inputs, Callable[[], Inputs]]] = {
    "T5ForConditionalGeneration": (t5(), sequences),
    "BartForConditionalGeneration": (bart(), sequences),
    "WhisperForConditionalGeneration": (
        {**bart(), "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32},
        spectrogram,
    ),
    "ViTModel": (IMAGE, pixels),
    "DeiTModel": (IMAGE, pixels),
    "ConvNextModel": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}, pixels),
    "ResNetModel": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, pixels),
    "CLIPModel": (
        {"text_config": {**SIZES, "projection_dim": 8}, "vision_config": {**IMAGE, "projection_dim": 8},
         "projection_dim": 8},
        image_and_text,
    ),
    "Wav2Vec2Model": (
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
         "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2},
        waveform,
    ),
}  # fmt: skip
MODELS: dict[str, tuple[Inputs, Callable[[], Inputs]]] = {
    **{name: (options, prompt) for name, options in DECODERS.items()},
    **{name: (options, tokens) for name, options in ENCODERS.items()},
    **OTHERS,
}


def build(cls: Any, options: Inputs) -> nn.Module:
    """Return a tiny model of a class, in evaluation mode, with random weights."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return cls(cls.config_class(**options)).eval()
