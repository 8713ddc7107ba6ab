"""Objects that hold tensors, which a model is called with, returns or changes: key-value caches, outputs, dataclasses.

An object is opened down to the places that hold its tensors, so that these can be exchanged for one batched call and
read again after it. The object itself stays the user's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import tree_leaves, tree_map
from .snapshot import is_immutable

# Items that are looked through; what refers to more is part of something larger.
_LIMIT = 100_000

# Tensors up to so many numbers are kept as copies, to be put back after a call that has failed.
_SMALL = 4096


class Place(NamedTuple):
    """A place ``container[key]`` that holds a tensor, or a tuple of tensors.

    Attributes:
        container: A list or dictionary, such as an object's attributes.
        key: Index or key.
        path: How the place is reached from the object.
    """

    container: Any
    key: Any
    path: tuple[Any, ...]

    def tensors(self) -> list[Tensor]:
        """Return its tensors."""
        return [leaf for leaf in tree_leaves(self.container[self.key]) if isinstance(leaf, Tensor)]

    def exchange(self, new: Mapping[int, Tensor]) -> None:
        """Put other tensors in the place of those it holds, by their ``id``."""
        self.container[self.key] = tree_map(
            lambda leaf: new[id(leaf)] if isinstance(leaf, Tensor) else leaf, self.container[self.key]
        )


def is_container(value: Any) -> bool:
    """Return whether a leaf of a call's arguments is an object that is opened: it has attributes and is no module."""
    return (
        not isinstance(value, (Tensor, nn.Module, torch.Generator))
        and not is_immutable(value)
        and not callable(value)
        and type(getattr(value, "__dict__", None)) is dict
    )


def contents(objects: Iterable[Any]) -> Contents:
    """Return what some objects hold.

    Raises:
        TypeError: One of them refers to a module, or to too much.
    """
    found = Contents([], [])
    seen: set[int] = set()
    for i, value in enumerate(objects):
        if id(value) not in seen:
            seen.add(id(value))
            _look(value.__dict__, (i,), seen, found)
    return found


class Contents(NamedTuple):
    """What objects hold, down to tensors.

    Attributes:
        places: The places of tensors, in a fixed order.
        containers: The lists and dictionaries that were looked through, and how they are reached.
    """

    places: list[Place]
    containers: list[tuple[Any, tuple[Any, ...]]]

    def _by_identity(self) -> dict[int, tuple[tuple[Any, ...], Tensor]]:
        found: dict[int, tuple[tuple[Any, ...], Tensor]] = {}
        for place in self.places:
            for i, tensor in enumerate(place.tensors()):
                found.setdefault(id(tensor), ((*place.path, i), tensor))
        return found

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of the places, each once."""
        return [tensor for _, tensor in self._by_identity().values()]

    def paths(self) -> list[tuple[Any, ...]]:
        """Return, for each of the tensors, how it is reached."""
        return [path for path, _ in self._by_identity().values()]

    def exchange(self, values: Iterable[Tensor]) -> None:
        """Put other tensors in the place of those that the objects hold, in the order of :meth:`tensors`."""
        new = dict(zip(self._by_identity(), values, strict=True))
        for place in self.places:
            place.exchange(new)

    def signature(self) -> tuple[Any, ...]:
        """Return what objects have in common that differ in the values of tensors alone.

        Raises:
            TypeError: They hold something, such as a set or an array, that cannot be compared.
        """
        tensors = [(path, t.shape, t.dtype, t.device) for path, t in self._by_identity().values()]
        values = [
            (path, key, type(value), _comparable(value))
            for container, path in self.containers
            for key, value in _items(container)
            if not isinstance(value, Tensor) and _inside(value) is None
        ]
        return tuple(tensors), tuple(values), tuple(path for _, path in self.containers)

    def same_places(self, other: Contents) -> bool:
        """Return whether other objects are of the same structure, and of one that can be taken over place by place."""
        return (
            self.paths() == other.paths()
            and [path for _, path in self.containers] == [path for _, path in other.containers]
            and all(isinstance(place.container[place.key], Tensor) for place in other.places)
        )

    def take_over(self, other: Contents, values: Iterable[Tensor]) -> None:
        """Hold other tensors, and the numbers, strings and the like that objects of the same places hold."""
        self.exchange(values)
        for (container, _), (theirs, _) in zip(self.containers, other.containers, strict=True):
            for key, value in _items(theirs):
                if is_immutable(value):
                    container[key] = value


def _look(container: Any, path: tuple[Any, ...], seen: set[int], found: Contents) -> None:
    if len(seen) > _LIMIT:
        raise TypeError("refers to too many objects")
    found.containers.append((container, path))
    for key, value in _items(container):
        where = (*path, key)
        if isinstance(value, Tensor):
            found.places.append(Place(container, key, where))
        elif isinstance(value, nn.Module):
            raise TypeError("refers to a module")
        elif isinstance(value, tuple):
            leaves = tree_leaves(value)
            if any(isinstance(leaf, Tensor) for leaf in leaves):
                found.places.append(Place(container, key, where))
            for i, leaf in enumerate(leaves):
                _look_into(leaf, (*where, i), seen, found)
        else:
            _look_into(value, where, seen, found)


def _look_into(value: Any, path: tuple[Any, ...], seen: set[int], found: Contents) -> None:
    inside = _inside(value)
    if inside is not None and id(value) not in seen:
        seen.add(id(value))
        _look(inside, path, seen, found)


def _inside(value: Any) -> Any:
    """Return the list or dictionary that holds what is inside of a value, or None if there is nothing to look at."""
    if isinstance(value, (list, dict)):
        return value
    return value.__dict__ if is_container(value) else None


def _comparable(value: Any) -> Any:
    """Return a key that is the same for equal values.

    Raises:
        TypeError: The value may change in a way that is not seen.
    """
    if isinstance(value, tuple):
        return tuple(
            type(leaf) if isinstance(leaf, Tensor) or _inside(leaf) is not None else _comparable(leaf)
            for leaf in tree_leaves(value)
        )
    if not is_immutable(value):
        raise TypeError(f"holds a {type(value).__name__}")
    # 0.0 equals -0.0, and NaN does not equal itself; slices have no hash.
    return repr(value) if isinstance(value, (float, complex, slice)) else value


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


class Kept:
    """The state of objects, to be put back after a call that has failed.

    Args:
        objects: The objects.
    """

    def __init__(self, objects: Sequence[Any]) -> None:
        found = contents(objects)
        self._containers = [(container, copy.copy(container)) for container, _ in found.containers]
        tensors = found.tensors()
        self._copies = [tensor.clone() if tensor.numel() <= _SMALL else None for tensor in tensors]
        self._versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
        self._tensors = tensors

    def restore(self) -> None:
        """Put everything back.

        Raises:
            RuntimeError: A large tensor has been written into.
        """
        for container, before in self._containers:
            if isinstance(container, dict):
                container.clear()
                container.update(before)
            else:
                container[:] = before
        for tensor, copied, version in zip(self._tensors, self._copies, self._versions, strict=True):
            if copied is not None:
                tensor.copy_(copied)
            elif version is not None and tensor._version != version:
                raise RuntimeError("a failed call has written into a tensor of an argument, which cannot be undone")


def copy_with(objects: Sequence[Any], value_of: Callable[[Tensor], Tensor]) -> list[Any]:
    """Return copies of objects that hold other tensors, but are the same in all else."""
    memo: dict[int, Any] = {id(tensor): value_of(tensor) for tensor in contents(objects).tensors()}
    return copy.deepcopy(list(objects), memo)


def become(objects: Sequence[Any], others: Sequence[Any]) -> None:
    """Give objects the attributes of others."""
    for value, other in zip(objects, others, strict=True):
        attributes: Mapping[str, Any] = dict(other.__dict__)
        value.__dict__.clear()
        value.__dict__.update(attributes)
