"""A small language model with random weights, and a tokenizer of words for it."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eggroll_trainer import EGGROLLTrainer, Population

PAD, BEGIN, END, UNKNOWN, USER, ASSISTANT = range(6)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"]
# The word is what transformers tries a tokenizer out with where strings end completions.
WORDS = [*"abcdefghijklmnop", "0", "1", "abcdef"]
SIZE = len(SPECIAL) + len(WORDS)

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, **options: Any) -> Any:
    """A tokenizer with one token for each word."""
    inside = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token=SPECIAL[UNKNOWN])
    )
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    made = PreTrainedTokenizerFast(
        tokenizer_object=inside, additional_special_tokens=["<s>", "<user>", "<assistant>"], **names
    )
    made.chat_template = template
    return made


def language_model(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A Llama of two layers."""
    config = LlamaConfig(
        **{
            "vocab_size": SIZE,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "initializer_range": 0.4,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "pad_token_id": PAD,
            **options,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
        return model.to(dtype).eval()


def adapted(model: nn.Module, **options: Any) -> Any:
    """A PEFT model with LoRA adapters."""
    with warnings.catch_warnings():
        # Of transformers, which this release of PEFT is older than.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, **options}))


def population(model: nn.Module, size: int = 6, first: int = 0, **options: Any) -> Population:
    """Members ``first, …`` of a population, ``size`` of them."""
    defaults = {"sigma": 0.1, "seed": 5, "noise_reuse": 2}
    trainer = EGGROLLTrainer(
        model=model,
        fitness_fn=lambda model: 0.0,
        population_size=first + size,
        chunk_size=size,
        **{**defaults, **options},
    )
    return next(chunk for chunk in trainer.ask().chunks() if chunk.first == first)
