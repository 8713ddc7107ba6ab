"""Members that wait for calls: grouped by module and input shapes, with copies of their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...population.containers import is_container
from .. import thread_modes

# Up to this size, comparing values is as fast as comparing version counters.
_SMALL = 1024


class Group:
    """Members that wait for the same module with inputs of the same shape.

    Args:
        module: The module.
        spec: The structure of the arguments, or the number of positional tensors.
        modes: Modes of the thread.
        training: Training modes of modules that differ from those in the model.
        width: Number of leaves of the arguments.

    Attributes:
        has_objects: Whether there are objects among the arguments or results, such as caches.
    """

    def __init__(
        self, module: nn.Module, spec: Any, modes: thread_modes.Modes, training: dict[nn.Module, bool], width: int
    ) -> None:
        self.module, self.spec, self.modes, self.training = module, spec, modes, training
        self.members: list[Any] = []
        self.columns: list[list[Any]] = [[] for _ in range(width)]
        self.has_objects = False
        self._objects: set[int] = set()

    def take_objects(self, leaves: list[Any]) -> bool:
        """Add the objects among a member's arguments; return False if another member has one of them."""
        objects = {id(leaf) for leaf in leaves if is_container(leaf)}
        if not objects.isdisjoint(self._objects):
            return False
        self._objects |= objects
        return True


class WaitingInput:
    """An input tensor of waiting members.

    Attributes:
        source: The tensor itself. It is kept alive until the call is made, so that its memory is not reused.
        copied: A copy of its values at the time of the call.
    """

    __slots__ = ("_compares_values", "_version", "copied", "source")

    def __init__(self, source: Tensor) -> None:
        self.source, self.copied = source, source.detach().clone()
        # The version counter misses changes of NumPy's memory, and inference tensors have none.
        self._version = source._version if not source.is_inference() and source.untyped_storage().resizable() else None
        self._compares_values = self._version is None or (source.numel() <= _SMALL and source.is_cpu)

    def is_unchanged(self, tensor: Tensor) -> bool:
        """Return whether a tensor at the same memory address still has these values."""
        source = self.source
        if self._compares_values or not (
            source is tensor or (tensor._base is not None and tensor._base is source._base)
        ):
            return tensor.dtype is self.copied.dtype and torch.equal(self.copied, tensor)
        return tensor._version == self._version


class Inputs:
    """The inputs of waiting members."""

    def __init__(self) -> None:
        self._known: dict[Any, WaitingInput] = {}

    def clear(self) -> None:
        """Discard them, after their calls have been made."""
        self._known.clear()

    def copy_of(self, tensor: Tensor) -> Tensor:
        """Return a copy of an input. Inputs with the same memory address and values share one copy.

        It must be a copy, because a fitness function may write into the same memory before the call is made.
        """
        # Usually, all members pass the same tensor.
        known = self._known.get(id(tensor))
        if known is not None and known.source is tensor and known.is_unchanged(tensor):
            return known.copied
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
        known = self._known.get(key)
        if known is None or not known.is_unchanged(tensor):
            known = self._known[key] = WaitingInput(tensor)
        if known.source is tensor:
            self._known[id(tensor)] = known
        return known.copied
