"""Copies of what objects such as caches hold, call after call: of what has only grown, the new part is kept."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..population.containers import contents
from ..population.snapshot import same_bits


class Change(NamedTuple):
    """How a tensor follows from the one that was in its place before.

    Attributes:
        path: How its place is reached.
        new: Its values, or those that were appended; None where nothing has changed.
        dim: The dimension in which they were appended, or None where ``new`` is all of it.
    """

    path: Hashable
    new: Tensor | None
    dim: int | None = None


class History:
    """The tensors in places, one version after the other."""

    def __init__(self) -> None:
        self._last: dict[Hashable, Tensor] = {}

    def note(self, objects: Sequence[Any]) -> list[Change]:
        """Return what has changed in what objects hold since it was last noted."""
        found = contents(objects)
        return [self._note(path, tensor.detach()) for path, tensor in zip(found.paths(), found.tensors(), strict=True)]

    def _note(self, key: Hashable, tensor: Tensor) -> Change:
        before = self._last.get(key)
        self._last[key] = tensor.clone()
        if before is None or before.ndim != tensor.ndim or before.dtype != tensor.dtype:
            return Change(key, self._last[key])
        longer = [dim for dim in range(tensor.ndim) if tensor.shape[dim] != before.shape[dim]]
        if not longer:
            return Change(key, None if same_bits(before, tensor) else self._last[key])
        dim, size = longer[0], before.shape[longer[0]]
        if len(longer) > 1 or tensor.shape[dim] < size or not same_bits(before, tensor.narrow(dim, 0, size)):
            return Change(key, self._last[key])
        return Change(key, tensor.narrow(dim, size, tensor.shape[dim] - size).clone(), dim)

    def follow(self, changes: Sequence[Change]) -> list[Tensor]:
        """Return what objects held when the changes were noted, in the order in which they were."""
        for path, new, dim in changes:
            if new is not None:
                self._last[path] = new if dim is None else torch.cat([self._last[path], new], dim)
        return [self._last[change.path] for change in changes]
