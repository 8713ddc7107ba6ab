"""What one member's fitness function hands to its model and gets back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_flatten, tree_leaves, tree_map, tree_unflatten
from ..population.object_calls import objects_in
from .held import Change, History
from .scores import Score

_ALIGNMENT = 64


@dataclasses.dataclass
class RecordedCall:
    """One call.

    Attributes:
        module: The model, or one of its modules.
        leaves: The leaves of its arguments, tensors as copies.
        spec: Their structure.
        given: What objects among them, such as caches, held before.
        result: What it returned, if ``batched``.
        left: What these objects, and those in the result, held after it, if ``batched``.
        batched: Whether it was computed for several members at once. Otherwise the calls of the modules inside follow.
        threads: Number of torch's threads that the function went on with.
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
        threads: Number of torch's threads that the function began with.
        score: What the function returned in the end.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.calls: list[RecordedCall] = []
        self._held = History()
        self.threads = torch.get_num_threads()
        self.score: Score | None = None

    def begin(self, module: nn.Module, leaves: list[Any], spec: Any) -> RecordedCall:
        """Note a call, with copies of its arguments."""
        call = RecordedCall(module, leaves, spec, self._held.note(objects_in(leaves)))
        self.calls.append(call)
        return call

    def call_of(self, module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments of the first call of a module, or None."""
        call = next((call for call in self.calls if call.module is module), None)
        if call is None:
            return None
        return (tuple(call.leaves), {}) if isinstance(call.spec, int) else tree_unflatten(call.leaves, call.spec)

    def end(self, call: RecordedCall, result: Any) -> None:
        """Note what a call that was computed for several members has returned."""
        call.result, call.batched = tree_map(aligned_copy, result), True
        call.left = self._held.note(objects_in([*call.leaves, *tree_leaves(result)]))
        call.threads = torch.get_num_threads()


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return the leaves of a call's arguments and their structure: for positional tensors alone, their number."""
    if not kwargs and all(type(arg) is Tensor for arg in args):
        return list(args), len(args)
    return tree_flatten((args, kwargs))


def copies(leaves: list[Any]) -> list[Any]:
    """Return leaves in which tensors are copies."""
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def aligned_copy(leaf: Any) -> Any:
    """Return a copy of a tensor that kernels treat alike: they begin and end their vectors where memory is aligned."""
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
