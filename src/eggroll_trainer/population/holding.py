"""A member's weights in the user's own model, for the time of a block: what a member is, by definition."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .._utils.interrupts import delayed_interrupt
from .module_state import ModuleState


@contextlib.contextmanager
def holding(model: nn.Module, values: Mapping[str, Tensor], training: Mapping[nn.Module, bool]) -> Iterator[list[str]]:
    """Have a model hold other values of its parameters inside the block, and put everything in it back afterwards.

    Args:
        model: The model.
        values: By the name of the parameter.
        training: Modules whose training mode is to differ from the model's.

    Yields:
        A list that says after the block what it has changed in the model besides weights.

    Raises:
        RuntimeError: The block has changed a frozen parameter in place, of which there is no copy.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # Whatever else is trained inside the block, by an optimizer of the user's, must not reach the model either.
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
            # It knows parameters, not their values.
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
            " work on a copy of it, or make it trainable"
        )
