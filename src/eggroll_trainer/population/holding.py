"""Puts a member's weights into the user's own model, inside a block. This defines what a member is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .._utils.interrupts import delayed_interrupt
from .module_state import ModuleState


@contextlib.contextmanager
def holding(model: nn.Module, values: Mapping[str, Tensor], training: Mapping[nn.Module, bool]) -> Iterator[list[str]]:
    """Give a model other parameter values inside the block, and restore everything in it afterwards.

    Args:
        model: The model.
        values: Values by the name of the parameter.
        training: Training modes of modules that differ from those in the model.

    Yields:
        A list. After the block, it describes what the block has changed in the model besides weights.

    Raises:
        RuntimeError: The block has changed a frozen parameter in place, which cannot be undone.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # The fitness function may train other parameters itself: it gets copies of them.
    perturbed = {id(parameters[name]) for name in values}
    others = {
        name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in perturbed and p.requires_grad
    }
    frozen = [(name, p, p._version) for name, p in parameters.items() if not p.requires_grad and not p.is_inference()]
    held = [(p, p.data, p.grad, p.requires_grad) for p in parameters.values()]
    state = ModuleState(model)
    changed: list[str] = []
    try:
        with delayed_interrupt():
            for module, mode in training.items():
                module.training = mode
            for name, value in (*values.items(), *others.items()):
                parameters[name].data = value
            # The cache is keyed by parameter, so its casts would be of the old values.
            torch.clear_autocast_cache()
        yield changed
    finally:
        with delayed_interrupt():
            for p, data, grad, trained in held:
                p.data, p.grad = data, grad
                p.requires_grad_(trained)
            torch.clear_autocast_cache()
            changed += state.restore()
    written = next((name for name, p, version in frozen if p._version != version), None)
    if written is not None:
        raise RuntimeError(
            f"the fitness function changes the frozen parameter {written!r} in place, which cannot be undone:"
            " change a copy of it instead, or make it trainable"
        )
