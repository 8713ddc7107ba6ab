"""Guesses from its code whether a fitness function computes a loss."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_LOSSES = (
    *("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "bce_loss"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "criterion", "loss_fn", "loss"),
)


def loss_that_it_computes(function: Callable[..., Any]) -> str | None:
    """Return the name of a loss function that the code calls, or the class of a loss module that it uses, or None.

    Example:
        >>> import torch.nn.functional as F
        >>> loss_that_it_computes(lambda model: F.mse_loss(model(0), 1))
        'mse_loss'
        >>> loss_that_it_computes(lambda model: model.reward()) is None
        True
    """
    code = _code(function)
    if code is None:
        return None
    names = [name for part in _parts(code) for name in part.co_names + part.co_freevars]
    for name in names:
        if name in _LOSSES:
            return name
    held = [getattr(function, "__globals__", {}).get(name) for name in names]
    for cell in getattr(function, "__closure__", None) or ():
        # Empty cells raise.
        with contextlib.suppress(ValueError):
            held.append(cell.cell_contents)
    for value in held:
        if isinstance(value, nn.Module) and type(value).__name__.endswith("Loss"):
            return type(value).__name__
    return None


def _code(function: Any) -> types.CodeType | None:
    function = getattr(function, "__func__", function)
    if hasattr(function, "__code__"):
        return function.__code__
    return getattr(type(function).__call__, "__code__", None)


def _parts(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _parts(constant)
