"""Graphs that ``torch.compile`` has made, and how to call them again without what it does around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .._torch import lookup_backend, tree_flatten, tree_unflatten
from .recent import Recent

# A graph, what it was called with, and what it returned.
_Record = tuple[Callable[..., Sequence[Any]], tuple[Any, ...], Sequence[Any]]

# Shapes of tensors for which it is remembered how a kernel is called.
_MAX_PREPARED = 64


class Backend:
    """A backend of ``torch.compile``: the default one, whose graphs can be watched.

    Around a graph, ``torch.compile`` checks that all is as it was when it compiled, and finds the graph's inputs. For
    a small model that takes several times as long as the graph. Who knows that nothing but some tensors has changed
    since the last call can do without.
    """

    inner = "inductor"

    def __init__(self) -> None:
        self._records: list[_Record] | None = None

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """Compile a graph."""
        compiled = lookup_backend(self.inner)(graph, inputs)

        def run(*args: Any) -> Any:
            outputs = compiled(*args)
            if self._records is not None:
                self._records.append((compiled, args, outputs))
            return outputs

        return run

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[_Record]]:
        """Yield the calls of graphs inside the block."""
        records: list[_Record] = []
        self._records = records
        try:
            yield records
        finally:
            self._records = None


def replay(records: Sequence[_Record], own: Sequence[Tensor], result: Any) -> Callable[[Sequence[Tensor]], Any] | None:
    """Return what computes ``result`` again from other tensors in the place of ``own``.

    Args:
        records: The graphs that were called for it.
        own: Tensors that the graph was called with.
        result: What was made of the graph's outputs.

    Returns:
        The function, or None where more was done than to call one graph: the tensors are told by their identity.
    """
    if len(records) != 1:
        return None
    graph, inputs, outputs = records[0]
    leaves, spec = tree_flatten(result)
    inputs_at = [[i for i, value in enumerate(inputs) if value is tensor] for tensor in own]
    outputs_at = [[i for i, value in enumerate(outputs) if value is leaf] for leaf in leaves]
    if any(len(places) != 1 for places in (*inputs_at, *outputs_at)):
        return None
    into, out_of = [places[0] for places in inputs_at], [places[0] for places in outputs_at]
    others = [None if i in into else value for i, value in enumerate(inputs)]

    def again(tensors: Sequence[Tensor]) -> Any:
        arguments = others.copy()
        for place, tensor in zip(into, tensors, strict=True):
            arguments[place] = tensor
        values = graph(*arguments)
        return tree_unflatten([values[place] for place in out_of], spec)

    return again


class Kernel:
    """A function of ours, compiled for all shapes: those that it has met are not checked again.

    Args:
        function: Of tensors alone, into some of which it writes; it returns nothing.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._backend = Backend()
        self._function = torch.compile(function, fullgraph=True, dynamic=True, backend=self._backend)
        self._prepared: Recent[Hashable, Callable[[Sequence[Tensor]], Any]] = Recent(_MAX_PREPARED)

    def __call__(self, *tensors: Tensor) -> None:
        """Call the function."""
        kind = tuple((t.shape, t.device, t.is_inference()) for t in tensors)
        if kind in self._prepared:
            self._prepared[kind](tensors)
            return
        with self._backend.recording() as records:
            self._function(*tensors)
        again = replay(records, tensors, [])
        if again is not None:
            self._prepared[kind] = again
