"""Calls the graphs that ``torch.compile`` has made directly, without its guards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .._torch import lookup_backend, tree_flatten, tree_unflatten
from .recent import Recent

# A compiled graph, the arguments of a call, and its results.
_Record = tuple[Callable[..., Sequence[Any]], tuple[Any, ...], Sequence[Any]]

# Number of input shapes for which the direct call of a kernel is kept.
_MAX_PREPARED = 64


class Backend:
    """A backend of ``torch.compile``: the default one, with a record of the calls of its graphs.

    Before it calls a graph, ``torch.compile`` evaluates guards and collects the graph's inputs. For a small model, this
    takes several times as long as the graph. If only the values of some tensors have changed since the last call, we
    skip the guards and call the graph directly.
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
        """Yield a list, to which the calls of graphs inside the block are added."""
        records: list[_Record] = []
        self._records = records
        try:
            yield records
        finally:
            self._records = None


def replay(
    records: Sequence[_Record], replaced: Sequence[Tensor], result: Any
) -> Callable[[Sequence[Tensor]], Any] | None:
    """Return a function that computes ``result`` again, for other tensors in the place of ``replaced``.

    Args:
        records: The recorded calls of graphs that computed ``result``.
        replaced: Tensors among the inputs of the graph.
        result: The result, made of outputs of the graph.

    Returns:
        The function. None if more than one graph was called, or if a tensor of ``replaced`` or ``result`` is not
        exactly one input or output of the graph, by identity.
    """
    if len(records) != 1:
        return None
    graph, inputs, outputs = records[0]
    leaves, spec = tree_flatten(result)
    inputs_at = [[i for i, value in enumerate(inputs) if value is tensor] for tensor in replaced]
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
    """A function compiled for all shapes. For shapes that it has met, it is called without guards.

    Args:
        function: A function whose arguments are tensors only. It writes into some of them, and returns nothing.
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
