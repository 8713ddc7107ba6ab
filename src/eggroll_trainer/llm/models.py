"""What there is to know of a language model: what it can do, where it is, and what a token takes in memory."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def check_causal(model: Any) -> None:
    """Raise ``TypeError`` unless a model goes on with the tokens that it is given, as those of transformers do."""
    causal = callable(getattr(model, "generate", None)) and hasattr(model, "config")
    if not causal or getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(
            f"{type(model).__name__} is no causal language model of transformers, such as"
            " AutoModelForCausalLM.from_pretrained makes"
        )


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's inputs go."""
    return next(model.parameters()).device


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode inside the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call_options(model: Any) -> dict[str, Any]:
    """Return the options of a model's forward that save memory, as far as it has them."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(inside.forward).parameters
    return {name: value for name, value in {"use_cache": False, "logits_to_keep": 0}.items() if name in known}


def logit_bytes(model: Any) -> int:
    """Return what the logits of one token take, in bytes."""
    return int(_text_config(model).vocab_size) * _itemsize(model)


def cache_bytes(model: Any) -> int:
    """Return what keys and values of one token take, in bytes, in all layers; 0 for a model without attention.

    Layers that keep less, such as those with a sliding window, are counted in full.
    """
    config = _text_config(model)
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not heads or not layers:
        return 0
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * layers * kept * size * _itemsize(model))


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _itemsize(model: Any) -> int:
    return next(int(p.dtype.itemsize) for p in model.parameters() if p.is_floating_point())
