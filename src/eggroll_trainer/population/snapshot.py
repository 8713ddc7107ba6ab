"""Snapshots of containers, arrays and objects, to detect changes later and to undo them."""

from __future__ import annotations

import collections
import enum
import functools
import pickle
import random
import re
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_IMMUTABLE = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type(...), type, enum.Enum, np.generic, re.Pattern,
    types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size, weakref.ref,
)  # fmt: skip
# Not followed: other code saves and restores modules and parameters.
_GUARDED = (nn.Module, nn.Parameter, types.MethodType)

# For one item, two functions: one returns whether it has changed, the other restores it.
_Note = tuple[Callable[[], bool], Callable[[], object]]

# For tensors up to this size, we compare values.
_SMALL = 4096

# Limit of the number of items: more than a model's state, so that we don't follow references to the whole program.
_LIMIT = 1000


def is_immutable(value: Any) -> bool:
    """Return whether a value is immutable, including everything in it."""
    return isinstance(value, _IMMUTABLE) or (isinstance(value, (tuple, frozenset)) and all(map(is_immutable, value)))


class Snapshot:
    """The state of a value and of everything that can be reached from it, except for modules and parameters.

    Args:
        value: A container, array, tensor or object.
        seen: The ``id`` of values that other snapshots contain already; extended in place.

    Example:
        >>> notes = {"seen": [1, 2]}
        >>> before = Snapshot(notes)
        >>> notes["seen"].append(3)
        >>> before.changed()
        True
        >>> before.restore()
        >>> notes
        {'seen': [1, 2]}
    """

    def __init__(self, value: Any, seen: set[int] | None = None) -> None:
        self._notes: list[_Note] = []
        seen = set() if seen is None else seen
        todo = [value]
        while todo:
            if len(self._notes) > _LIMIT:
                break
            item = todo.pop()
            if not isinstance(item, _GUARDED) and not is_immutable(item) and id(item) not in seen:
                seen.add(id(item))
                todo += self._note(item)

    def changed(self) -> bool:
        """Return whether anything has changed."""
        return any(differs() for differs, _ in self._notes)

    def restore(self) -> None:
        """Undo all changes."""
        for differs, put_back in self._notes:
            if differs():
                put_back()

    def _note(self, item: Any) -> list[Any]:
        """Record one item and return the items that it refers to."""
        if isinstance(item, (tuple, frozenset)):
            return list(item)
        if isinstance(item, functools.partial):
            return [item.func, *item.args, *item.keywords.values()]
        if isinstance(item, Tensor):
            self._notes.append(_note_tensor(item))
            return []
        for cls, (read, write) in _HIDDEN.items():
            if isinstance(item, cls):
                self._notes.append(_note_hidden(item, read, write))
                return []
        held: list[Any] = []
        for part in _parts(item):
            contents = _contents(part)
            held += contents
            self._notes.append(_note_contents(part, contents))
        return held


# Types whose state is not in Python attributes, with functions to read and write it.
_HIDDEN: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], object]]] = {
    np.ndarray: (lambda array: array, lambda array, state: array.__setitem__(..., state)),
    bytearray: (bytes, lambda array, state: array.__setitem__(slice(None), state)),
    torch.Generator: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    random.Random: (lambda g: g.getstate(), lambda g, state: g.setstate(state)),
    np.random.RandomState: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    np.random.Generator: (lambda g: g.bit_generator.state, lambda g, state: setattr(g.bit_generator, "state", state)),
}


def _note_hidden(item: Any, read: Callable[[Any], Any], write: Callable[[Any, Any], object]) -> _Note:
    state = pickle.dumps(read(item))
    return lambda: pickle.dumps(read(item)) != state, lambda: write(item, pickle.loads(state))


def _note_tensor(tensor: Tensor) -> _Note:
    # Inference tensors have no version counter, and batch normalisation does not increment it: compare small ones.
    compared = tensor.is_inference() or tensor.numel() <= _SMALL
    copied, version = tensor.detach().clone(), 0 if compared else tensor._version
    return (
        lambda: not same_bits(tensor, copied) if compared else tensor._version != version,
        lambda: tensor.detach().copy_(copied),
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape, device and values; NaN equals NaN."""
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return one.layout is other.layout and torch.equal(one.detach().to_dense(), other.detach().to_dense())
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    both_nan = one.isnan() & other.isnan()
    return bool(((one == other) | both_nan).all())


def _parts(item: Any) -> list[Any]:
    """Return the containers that make up an item: the item itself if it is one, and its attributes."""
    parts = [item] if isinstance(item, (list, dict, set, collections.deque)) else []
    attributes = getattr(item, "__dict__", None)
    return [*parts, attributes] if type(attributes) is dict else parts


def _contents(part: Any) -> list[Any]:
    return [x for pair in part.items() for x in pair] if isinstance(part, dict) else list(part)


def _note_contents(part: Any, contents: list[Any]) -> _Note:
    def differs() -> bool:
        now = _contents(part)
        return len(now) != len(contents) or any(a is not b for a, b in zip(now, contents, strict=True))

    def put_back() -> None:
        part.clear()
        if isinstance(part, dict):
            part.update(zip(contents[::2], contents[1::2], strict=True))
        elif isinstance(part, set):
            part.update(contents)
        else:
            part.extend(contents)

    return differs, put_back
