"""How an operation with a batching rule of its own is carried out under ``torch.vmap``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import (
    TransformType,
    VmapInterpreter,
    add_batch_dim,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
    unwrap_batched,
)


def unanimous(tensor: Tensor) -> Tensor | None:
    """Return what a tensor is for every member, if it is the same for all, else None.

    Outside of a ``torch.vmap`` it is the tensor itself.
    """
    if torch.compiler.is_compiling():
        return None
    transform = peek_interpreter_stack()
    if transform is None or not is_functorch_wrapped_tensor(tensor):
        return tensor
    if transform.key() != TransformType.Vmap:
        return None
    interpreter = VmapInterpreter(transform)
    values, dim = unwrap_batched(tensor, interpreter.level())
    if dim is None or is_functorch_wrapped_tensor(values):
        return None
    with interpreter.lower():
        first = values.select(dim, 0)
        return first if torch.equal(values, first.unsqueeze(dim).expand_as(values)) else None


def own(tensor: Tensor, size: int) -> Tensor:
    """Return a tensor of which each member under the innermost ``torch.vmap`` has a copy of its own."""
    transform = peek_interpreter_stack()
    if transform is None or transform.key() != TransformType.Vmap or is_functorch_wrapped_tensor(tensor):
        return tensor
    interpreter = VmapInterpreter(transform)
    with interpreter.lower():
        copies = tensor.expand(size, *tensor.shape).contiguous()
    return add_batch_dim(copies, 0, interpreter.level())


def members_in_front(tensor: Tensor, dim: int) -> Tensor:
    """Return a tensor as it is for one member under the innermost ``torch.vmap``; ``dim`` is that of members."""
    transform = peek_interpreter_stack()
    assert transform is not None
    return add_batch_dim(tensor, dim, VmapInterpreter(transform).level())


class _Info(NamedTuple):
    batch_size: int


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return ``function.apply(*arguments)``, directly by its batching rule where the innermost transform is a vmap.

    That is what torch does as well, after looking at signatures and nested structures, which for a small layer takes
    three times as long as the layer.

    Args:
        function: One whose ``vmap`` asks for no more than the batch size, and returns one tensor.
        arguments: Tensors, and what holds none.
    """
    transform = None if torch.compiler.is_compiling() else peek_interpreter_stack()
    if transform is None or transform.key() != TransformType.Vmap:
        return function.apply(*arguments)
    interpreter = VmapInterpreter(transform)
    level = interpreter.level()
    values, dims = zip(
        *(unwrap_batched(value, level) if isinstance(value, Tensor) else (value, None) for value in arguments),
        strict=True,
    )
    with interpreter.lower():
        if all(dim is None for dim in dims):
            return apply(function, *arguments)
        result, dim = function.vmap(_Info(interpreter.batch_size()), dims, *values)
    return add_batch_dim(result, dim, level)
