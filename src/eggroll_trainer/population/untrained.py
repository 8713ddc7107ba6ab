"""The tensors of a model that are not trained: its buffers, and the parameters that stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn


def untrained(model: nn.Module, trained: Collection[str], *, persistent: bool = True) -> dict[str, Tensor]:
    """Return a model's buffers and the parameters that are not among ``trained``: fitness depends on them as well.

    Args:
        model: The model.
        trained: Names of the trained parameters.
        persistent: Whether to leave out the buffers that a model does not save: caches, which it makes anew.
    """
    left_out = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return {
        name: value
        for name, value in [*model.named_buffers(), *model.named_parameters()]
        # Quantised weights and the like are classes of their own, which a checkpoint cannot hold.
        if name not in trained and type(value) in (Tensor, nn.Parameter) and not (persistent and name in left_out)
    }


@torch.no_grad()
def set_untrained(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into the buffers and parameters of these names.

    A buffer takes the shape of its value, as a forward may have given it another one.

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
