"""Puts other weights, such as the best member's, into the user's model for a while, or into a copy of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.interrupts import delayed_interrupt
from ..noise.keys import kept_rng
from ..population.agreement import disagreement, precision
from ..population.copying import copy_of
from ..population.module_state import ModuleState
from ..population.untrained import set_untrained

# The positional and the keyword arguments of a call of the model.
Sample = tuple[tuple[Any, ...], dict[str, Any]]


@contextlib.contextmanager
def holding(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Have a model hold other values of some of its parameters and buffers inside the block.

    Args:
        model: The model.
        values: By the name of the parameter or buffer.
    """
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    held = [(tensors[name], tensors[name].data) for name in values]
    try:
        with delayed_interrupt(), torch.no_grad():
            for name, value in values.items():
                tensors[name].data = value.to(tensors[name], copy=True)
            torch.clear_autocast_cache()
        yield
    finally:
        with delayed_interrupt():
            for tensor, data in held:
                tensor.data = data
            torch.clear_autocast_cache()


def copy_with(
    model: nn.Module, values: Mapping[str, Tensor], sample: Sample | None, caller: str, instead: str
) -> nn.Module:
    """Return a deep copy of a model with other values of some of its parameters and buffers.

    Args:
        model: The model.
        values: By the name of the parameter or buffer.
        sample: A call for which the copy is compared with the model.
        caller: The call of the user, for messages.
        instead: Advice on what to use if the model cannot be copied.

    Raises:
        RuntimeError: The copy does not compute what the model itself does with these values.
    """
    copy = copy_of(model)
    set_untrained(copy, values)
    difference = None if sample is None else _difference(model, copy, values, sample)
    if difference is not None:
        raise RuntimeError(
            f"{caller} cannot copy this model: the copy does not compute what the model itself does with these weights"
            f" ({difference}). Something in it, such as a closure, refers to the original. Use the model itself"
            f" instead: {instead}"
        )
    return copy


def _difference(model: nn.Module, copy: nn.Module, values: Mapping[str, Tensor], sample: Sample) -> str | None:
    args, kwargs = sample
    devices = {p.device for p in model.parameters()}
    with torch.no_grad(), kept_rng(devices), _unchanged(model), _unchanged(copy):
        try:
            with holding(model, values):
                model(*args, **kwargs)
        except Exception:
            # The recorded call depends on state of the fitness function, and cannot be repeated.
            return None
        try:
            # The model holds other weights here, so a copy that reads them gives another result.
            result = copy(*args, **kwargs)
        except Exception as error:
            return f"it raises {type(error).__name__}: {error}"
        with holding(model, values):
            return disagreement(model, lambda: model(*args, **kwargs), result, precision(model, list(args)))


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    state = ModuleState(module)
    try:
        yield
    finally:
        state.restore()
