"""Loads language models and their tokenizers, from a folder or a hub."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .._utils.validation import check_device
from ..distributed import local_device


def load(model: str, dtype: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """Return a tokenizer and its causal language model.

    Args:
        model: A folder, or a name in a hub.
        dtype: Name of the weights' dtype, or ``"auto"`` for that of the file. If None, float32 on a CPU, where it is
            usually the fastest, and that of the file elsewhere.
        device: Device of the model. Several processes on a machine each take their own device of this type. If None,
            CUDA if available, else the CPU.

    Raises:
        OSError: There is no such model, it has no tokenizer, or it is not a causal language model.
        ValueError: ``device`` is not a device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = local_device(check_device(device))
    if dtype is None:
        dtype = "float32" if place.type == "cpu" else "auto"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
    except (OSError, ValueError) as error:
        # transformers takes a missing folder for a name in a hub; our message names both.
        raise OSError(f"the model {model!r} cannot be loaded, from a folder or a hub: {error}") from error
    return tokenizer, loaded.to(place).eval()
