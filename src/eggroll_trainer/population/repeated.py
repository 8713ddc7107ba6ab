"""Calls of one model that differ in nothing but the values of tensors, such as the steps of a simulation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.graphs import Backend, replay
from .._utils.interrupts import delayed_interrupt
from .forward import Call


class RepeatedCalls:
    """Makes calls for members, and prepares each kind of call so that the next one of it costs less.

    Calls are of one kind if they are for the same members, and their tensors agree in shape, strides, dtype and device.

    Args:
        make: Returns the call for tensors ``[n, …]`` and the ``n`` members whose rows they have.
        run: Runs a call for members.
        backend: The backend of ``torch.compile``: a call that is one graph is repeated without its Python code.
    """

    def __init__(
        self,
        make: Callable[[Sequence[Tensor], Sequence[int]], Call],
        run: Callable[[Call, Sequence[int]], Any],
        backend: Backend,
    ) -> None:
        self._make, self._run, self._backend = make, run, backend
        self._calls: dict[Any, Call] = {}
        self._prepared: dict[Any, Callable[[Sequence[Tensor]], Any]] = {}

    def __call__(self, tensors: Sequence[Tensor], members: range | tuple[int, ...]) -> Any:
        """Return the model's result for the members.

        Raises:
            ValueError: A tensor has rows for another number of members.
        """
        kind = members, tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        if kind in self._prepared:
            try:
                with delayed_interrupt(), torch.no_grad():
                    return self._prepared[kind](tensors)
            except Exception:
                # The full call below handles errors, such as running out of memory.
                del self._prepared[kind]
        if kind not in self._calls:
            for shape in (list(t.shape) for t in tensors):
                if not shape or shape[0] != len(members):
                    raise ValueError(f"expected one input for each of {len(members)} members, got shape {shape}")
            self._calls[kind] = self._make(tensors, members)
        with self._backend.recording() as records:
            result = self._run(dataclasses.replace(self._calls[kind], leaves=list(tensors)), members)
        again = replay(records, tensors, result)
        if again is not None:
            self._prepared[kind] = again
        return result
