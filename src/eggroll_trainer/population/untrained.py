"""The tensors of a model that are not trained: its buffers and frozen parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn


def untrained(model: nn.Module, trained: Collection[str], *, persistent: bool = True) -> dict[str, Tensor]:
    """Return a model's buffers, and its parameters that are not among ``trained``.

    Args:
        model: The model.
        trained: Names of the trained parameters.
        persistent: Whether to leave out buffers that the model does not save, such as caches.
    """
    left_out = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return {
        name: value
        for name, value in [*model.named_buffers(), *model.named_parameters()]
        # Other tensor classes, such as quantised weights, cannot be stored in a checkpoint.
        if name not in trained and type(value) in (Tensor, nn.Parameter) and not (persistent and name in left_out)
    }


@torch.no_grad()
def set_untrained(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into the buffers and parameters of these names. A buffer takes the shape of its value.

    Raises:
        ValueError: A parameter has another shape, or there is no such tensor.
    """
    buffers = dict(model.named_buffers())
    tensors = {**dict(model.named_parameters()), **buffers}
    for name, value in values.items():
        current = tensors.get(name)
        if current is not None and current.shape == value.shape:
            current.copy_(value)
            continue
        if current is None or name not in buffers:
            raise ValueError(f"the model has no buffer {name!r}, nor a parameter of shape {list(value.shape)}")
        path, _, key = name.rpartition(".")
        setattr(model.get_submodule(path), key, value.detach().to(current, copy=True))
