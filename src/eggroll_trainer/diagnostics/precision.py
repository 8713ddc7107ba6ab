"""Detects slow evaluations in bfloat16, on a processor without instructions for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .._torch import cpu_has_bf16

# Number of seconds of evaluations from which on we warn.
_SECONDS = 5.0


def bf16_advice(
    device: torch.device, autocast: torch.dtype | None, dtypes: Iterable[torch.dtype], seconds: float
) -> str | None:
    """Return a warning if evaluations in bfloat16 are probably slow on this processor, else None.

    Args:
        device: The device on which members are evaluated.
        autocast: The dtype of autocast in evaluations, or None.
        dtypes: The dtypes of the parameters.
        seconds: Seconds that evaluations have taken so far.
    """
    # First what costs nothing: this is asked for every chunk.
    if device.type != "cpu" or seconds < _SECONDS:
        return None
    in_bf16 = autocast == torch.bfloat16 or (autocast is None and torch.bfloat16 in dtypes)
    if not in_bf16 or cpu_has_bf16():
        return None
    mend = (
        "set trainer.evaluation_dtype = None"
        if autocast is not None
        else "call model.float() before making the trainer"
    )
    return (
        "the trainer evaluates in bfloat16, but this processor has no instructions for it (AVX512_BF16 or AMX; BF16 on"
        " Arm), so products may take several times as long as in float32. Measure both with `eggroll info`. If"
        f" bfloat16 is slower, {mend}"
    )
