"""Properties of a language model: its kind, its device, and the memory that a token takes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def check_causal(model: Any) -> None:
    """Raise ``TypeError`` unless a model is a causal language model of transformers."""
    causal = callable(getattr(model, "generate", None)) and hasattr(model, "config")
    if not causal or getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(
            f"{type(model).__name__} is not a causal language model of transformers: load one, for example with"
            " AutoModelForCausalLM.from_pretrained"
        )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's inputs."""
    return next(model.parameters()).device


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode inside the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call_options(model: Any) -> dict[str, Any]:
    """Return arguments of a model's forward that save memory, if it has them."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(inside.forward).parameters
    return {name: value for name, value in {"use_cache": False, "logits_to_keep": 0}.items() if name in known}


def logit_bytes(model: Any) -> int:
    """Return the memory of the logits of one token, in bytes."""
    return int(_text_config(model).vocab_size) * _itemsize(model)


def cache_bytes(model: Any) -> int:
    """Return the memory of the keys and values of one token in all layers, in bytes; 0 for a model without attention.

    Layers that keep fewer tokens, such as those with a sliding window, are counted in full.
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
