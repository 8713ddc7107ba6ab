"""Records the calls that one member's fitness function makes of its model, with their results."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_flatten, tree_leaves, tree_map, tree_unflatten
from ..population.object_calls import objects_in
from .scores import Score
from .tensor_history import Change, TensorHistory

_ALIGNMENT = 64


@dataclasses.dataclass
class RecordedCall:
    """One call.

    Attributes:
        module: The model, or one of its modules.
        leaves: The leaves of its arguments, tensors as copies.
        spec: Their structure.
        given: Changes of tensors in objects among the arguments, such as caches, since the last call.
        result: The result, if ``batched``.
        left: Changes of tensors in these objects, and those in the result, by the call, if ``batched``.
        batched: Whether it was computed for several members at once. Otherwise the calls of its submodules follow.
        threads: Number of torch's threads after the call.
    """

    module: nn.Module
    leaves: list[Any]
    spec: Any
    given: list[Change]
    result: Any = None
    left: list[Change] = dataclasses.field(default_factory=list)
    batched: bool = False
    threads: int = 1


class Record:
    """The calls of one member's evaluation, in order.

    Attributes:
        calls: The calls.
        threads: Number of torch's threads when the function began.
        score: The function's result, or None.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Discard everything, for a new evaluation."""
        self.calls: list[RecordedCall] = []
        self._history = TensorHistory()
        self.threads = torch.get_num_threads()
        self.score: Score | None = None

    def begin(self, module: nn.Module, leaves: list[Any], spec: Any) -> RecordedCall:
        """Record a call with its arguments, whose tensors must be copies, and return it."""
        call = RecordedCall(module, leaves, spec, self._history.record(objects_in(leaves)))
        self.calls.append(call)
        return call

    def call_of(self, module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments of the first call of a module, or None."""
        call = next((call for call in self.calls if call.module is module), None)
        if call is None:
            return None
        return (tuple(call.leaves), {}) if isinstance(call.spec, int) else tree_unflatten(call.leaves, call.spec)

    def end(self, call: RecordedCall, result: Any) -> None:
        """Record the result of a call that was computed for several members."""
        call.result, call.batched = tree_map(aligned_copy, result), True
        call.left = self._history.record(objects_in([*call.leaves, *tree_leaves(result)]))
        call.threads = torch.get_num_threads()


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return the leaves of a call's arguments and their structure; if all are positional tensors, just their number."""
    if not kwargs and all(type(arg) is Tensor for arg in args):
        return list(args), len(args)
    return tree_flatten((args, kwargs))


def copies(leaves: list[Any]) -> list[Any]:
    """Return the leaves with tensors copied."""
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def aligned_copy(leaf: Any) -> Any:
    """Return a copy of a tensor with the same memory alignment, for which vectorised kernels round in the same way."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach()
    if not leaf.is_cpu or leaf.layout is not torch.strided or leaf.numel() == 0 or leaf.is_conj() or leaf.is_neg():
        return leaf.clone()
    size = leaf.element_size()
    span = size * (1 + sum((n - 1) * stride for n, stride in zip(leaf.shape, leaf.stride(), strict=True)))
    memory = torch.empty(span + 2 * _ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = (leaf.data_ptr() - memory.data_ptr()) % _ALIGNMENT
    if start % size:
        return leaf.clone()
    return memory[start : start + span].view(leaf.dtype).as_strided(leaf.shape, leaf.stride()).copy_(leaf).data
