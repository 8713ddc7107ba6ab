"""Records the tensors in objects such as caches, call after call. If a tensor has only grown, we store the new part."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..population.containers import contents
from ..population.snapshot import same_bits


class Change(NamedTuple):
    """The difference between a tensor and the one that was in its place before.

    Attributes:
        path: Path of the place.
        new: All values, or those that were appended; None if nothing has changed.
        dim: The dimension in which ``new`` was appended, or None if ``new`` is the whole tensor.
    """

    path: Hashable
    new: Tensor | None
    dim: int | None = None


class TensorHistory:
    """The successive versions of tensors in objects, to record them or to replay a record."""

    def __init__(self) -> None:
        self._last: dict[Hashable, Tensor] = {}

    def record(self, objects: Sequence[Any]) -> list[Change]:
        """Record the tensors in objects, and return how they have changed since the last record."""
        found = contents(objects)
        return [
            self._record(path, tensor.detach()) for path, tensor in zip(found.paths(), found.tensors(), strict=True)
        ]

    def _record(self, key: Hashable, tensor: Tensor) -> Change:
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

    def replay(self, changes: Sequence[Change]) -> list[Tensor]:
        """Replay recorded changes, and return the tensors as they were then, in the order of the record."""
        for path, new, dim in changes:
            if new is not None:
                self._last[path] = new if dim is None else torch.cat([self._last[path], new], dim)
        return [self._last[change.path] for change in changes]
