"""Evaluations in bfloat16 on a processor that has no units for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .._torch import cpu_has_bf16

# Evaluations that take less in all are not worth a word.
_SECONDS = 5.0


def bf16_advice(
    device: torch.device, autocast: torch.dtype | None, dtypes: Iterable[torch.dtype], seconds: float
) -> str | None:
    """Return what to say of evaluations in bfloat16 where the processor has no units for it, or None.

    Args:
        device: Where members are evaluated.
        autocast: What autocast evaluates in, or None.
        dtypes: Of the parameters.
        seconds: What evaluations have taken.
    """
    in_bf16 = autocast == torch.bfloat16 or (autocast is None and torch.bfloat16 in dtypes)
    if device.type != "cpu" or seconds < _SECONDS or not in_bf16 or cpu_has_bf16():
        return None
    mend = "set trainer.evaluation_dtype = None" if autocast is not None else "call model.float() before making it"
    return (
        "the trainer evaluates in bfloat16, and this processor has no units for that (AVX512_BF16 or AMX, on Arm BF16):"
        f" products may take several times as long as in float32, as `eggroll info` measures. If so, {mend}"
    )
