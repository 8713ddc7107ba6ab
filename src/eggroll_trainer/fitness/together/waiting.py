"""What members wait for: a call that they can make together, with inputs that are the same or of the same shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...population.containers import is_container
from .. import thread_modes

# Up to so many values, looking whether they are the same costs no more than asking for the version.
_SMALL = 1024


class Group:
    """Members that wait for the same module with inputs of the same shape.

    Args:
        module: The module.
        spec: The structure of the arguments, or the number of positional tensors.
        modes: Modes of the thread.
        training: Modules whose training mode differs from the model's.
        width: How many leaves the arguments have.

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
        """Note the objects among a member's arguments, and return whether they are nobody else's."""
        objects = {id(leaf) for leaf in leaves if is_container(leaf)}
        if not objects.isdisjoint(self._objects):
            return False
        self._objects |= objects
        return True


class Held:
    """An input that members wait with.

    Attributes:
        source: As it was handed in. It stays alive until it is served, so that its memory means nothing else meanwhile.
        copied: Its values at that time.
    """

    __slots__ = ("_looked_at", "_version", "copied", "source")

    def __init__(self, source: Tensor) -> None:
        self.source, self.copied = source, source.detach().clone()
        # Memory of NumPy's and inference tensors don't count all changes as versions.
        self._version = source._version if not source.is_inference() and source.untyped_storage().resizable() else None
        self._looked_at = self._version is None or (source.numel() <= _SMALL and source.is_cpu)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor at the same place has the values still."""
        source = self.source
        if self._looked_at or not (source is tensor or (tensor._base is not None and tensor._base is source._base)):
            return tensor.dtype is self.copied.dtype and torch.equal(self.copied, tensor)
        return tensor._version == self._version


class Inputs:
    """The inputs of those who wait."""

    def __init__(self) -> None:
        self._held: dict[Any, Held] = {}

    def clear(self) -> None:
        """Forget them: they have been served."""
        self._held.clear()

    def hold(self, tensor: Tensor) -> Tensor:
        """Return a copy of an input, one and the same for inputs that are at the same place with the same values.

        It is a copy because the function, or another member's, may fill the same memory anew before it is served.
        """
        # Mostly all members call with one and the same tensor.
        known = self._held.get(id(tensor))
        if known is not None and known.source is tensor and known.holds(tensor):
            return known.copied
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
        known = self._held.get(key)
        if known is None or not known.holds(tensor):
            known = self._held[key] = Held(tensor)
        if known.source is tensor:
            self._held[id(tensor)] = known
        return known.copied
