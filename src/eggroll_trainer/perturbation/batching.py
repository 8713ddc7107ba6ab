"""Helpers to work with tensors under ``torch.vmap``, and to call batching rules directly."""

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


def common_value(tensor: Tensor) -> Tensor | None:
    """Return the common value of a batched tensor if it is the same for all members, else None.

    Outside of a ``torch.vmap``, return the tensor itself.
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


def copy_per_member(tensor: Tensor, size: int) -> Tensor:
    """Return a tensor with one copy for each of ``size`` members, batched under the innermost ``torch.vmap``."""
    transform = peek_interpreter_stack()
    if transform is None or transform.key() != TransformType.Vmap or is_functorch_wrapped_tensor(tensor):
        return tensor
    interpreter = VmapInterpreter(transform)
    with interpreter.lower():
        copies = tensor.expand(size, *tensor.shape).contiguous()
    return add_batch_dim(copies, 0, interpreter.level())


def as_batched(tensor: Tensor, dim: int) -> Tensor:
    """Return a tensor batched under the innermost ``torch.vmap``, whose members are its dimension ``dim``."""
    transform = peek_interpreter_stack()
    assert transform is not None
    return add_batch_dim(tensor, dim, VmapInterpreter(transform).level())


class _Info(NamedTuple):
    batch_size: int


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return ``function.apply(*arguments)``; if the innermost transform is a vmap, call the batching rule directly.

    The result is that of torch. But torch first inspects signatures and nested structures, which for a small layer
    takes three times as long as the layer.

    Args:
        function: Its ``vmap`` must use nothing but the batch size of ``info``, and return one tensor.
        arguments: Tensors, and objects that contain no tensors.
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
