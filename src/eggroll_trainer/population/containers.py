"""Objects that hold tensors and that a model takes, returns or changes: key-value caches, outputs, dataclasses.

An object is searched for the places that hold its tensors. These can then be replaced for one batched call, and read
after it. The object itself stays the user's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import tree_leaves, tree_map
from .snapshot import is_immutable

# Largest number of items that are searched, so that we don't follow references to the whole program.
_LIMIT = 100_000

# Tensors up to this size are copied, to restore them after a failed call.
_SMALL = 4096


class Place(NamedTuple):
    """A place ``container[key]`` that holds a tensor, or a tuple of tensors.

    Attributes:
        container: A list or dictionary, such as an object's attributes.
        key: Index or key.
        path: The keys that lead from the object to the place.
    """

    container: Any
    key: Any
    path: tuple[Any, ...]

    def tensors(self) -> list[Tensor]:
        """Return its tensors."""
        return [leaf for leaf in tree_leaves(self.container[self.key]) if isinstance(leaf, Tensor)]

    def exchange(self, new: Mapping[int, Tensor]) -> None:
        """Replace its tensors by those in ``new``, whose keys are the ``id`` of the old ones."""
        self.container[self.key] = tree_map(
            lambda leaf: new[id(leaf)] if isinstance(leaf, Tensor) else leaf, self.container[self.key]
        )


def is_container(value: Any) -> bool:
    """Return whether a leaf of a call's arguments is an object to search for tensors: attributes, but no module."""
    return (
        not isinstance(value, (Tensor, nn.Module, torch.Generator))
        and not is_immutable(value)
        and not callable(value)
        and type(getattr(value, "__dict__", None)) is dict
    )


def contents(objects: Iterable[Any]) -> Contents:
    """Return the contents of objects.

    Raises:
        TypeError: One of them refers to a module, or to too many objects.
    """
    found = Contents([], [])
    seen: set[int] = set()
    for i, value in enumerate(objects):
        if id(value) not in seen:
            seen.add(id(value))
            _search(value.__dict__, (i,), seen, found)
    return found


class Contents(NamedTuple):
    """The contents of objects: their tensors, and the containers that lead to these.

    Attributes:
        places: The places of tensors, in a fixed order.
        containers: The lists and dictionaries that were searched, each with its path.
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
        """Return the path of each of the tensors."""
        return [path for path, _ in self._by_identity().values()]

    def exchange(self, values: Iterable[Tensor]) -> None:
        """Replace the tensors in the objects, in the order of :meth:`tensors`."""
        new = dict(zip(self._by_identity(), values, strict=True))
        for place in self.places:
            place.exchange(new)

    def signature(self) -> tuple[Any, ...]:
        """Return a key that is equal for objects that differ only in the values of tensors.

        Raises:
            TypeError: They hold something that cannot be compared, such as a set or an array.
        """
        tensors = [(path, t.shape, t.dtype, t.device) for path, t in self._by_identity().values()]
        values = [
            (path, key, type(value), _comparable(value))
            for container, path in self.containers
            for key, value in _items(container)
            if not isinstance(value, Tensor) and _container_in(value) is None
        ]
        return tuple(tensors), tuple(values), tuple(path for _, path in self.containers)

    def same_places(self, other: Contents) -> bool:
        """Return whether other objects have the same structure, with single tensors in all places."""
        return (
            self.paths() == other.paths()
            and [path for _, path in self.containers] == [path for _, path in other.containers]
            and all(isinstance(place.container[place.key], Tensor) for place in other.places)
        )

    def take_over(self, other: Contents, values: Iterable[Tensor]) -> None:
        """Set the tensors, and copy immutable values from the contents of objects with the same places."""
        self.exchange(values)
        for (container, _), (theirs, _) in zip(self.containers, other.containers, strict=True):
            for key, value in _items(theirs):
                if is_immutable(value):
                    container[key] = value


def _search(container: Any, path: tuple[Any, ...], seen: set[int], found: Contents) -> None:
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
                _search_value(leaf, (*where, i), seen, found)
        else:
            _search_value(value, where, seen, found)


def _search_value(value: Any, path: tuple[Any, ...], seen: set[int], found: Contents) -> None:
    inside = _container_in(value)
    if inside is not None and id(value) not in seen:
        seen.add(id(value))
        _search(inside, path, seen, found)


def _container_in(value: Any) -> Any:
    """Return the list or dictionary with the contents of a value, or None if it has none."""
    if isinstance(value, (list, dict)):
        return value
    return value.__dict__ if is_container(value) else None


def _comparable(value: Any) -> Any:
    """Return a key that is the same for equal values.

    Raises:
        TypeError: The value is mutable.
    """
    if isinstance(value, tuple):
        return tuple(
            type(leaf) if isinstance(leaf, Tensor) or _container_in(leaf) is not None else _comparable(leaf)
            for leaf in tree_leaves(value)
        )
    if not is_immutable(value):
        raise TypeError(f"holds a {type(value).__name__}")
    # 0.0 equals -0.0, and NaN does not equal itself; slices have no hash.
    return repr(value) if isinstance(value, (float, complex, slice)) else value


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


class SavedState:
    """The state of objects, to restore them after a failed call.

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
        """Restore the objects.

        Raises:
            RuntimeError: A large tensor was changed in place, of which there is no copy.
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
                raise RuntimeError(
                    "a failed call has changed a tensor of an argument in place, which cannot be undone: pass a copy of"
                    " the argument, or let the model make a new tensor"
                )


def copy_with(objects: Sequence[Any], value_of: Callable[[Tensor], Tensor]) -> list[Any]:
    """Return deep copies of objects in which each tensor is replaced by ``value_of(tensor)``."""
    memo: dict[int, Any] = {id(tensor): value_of(tensor) for tensor in contents(objects).tensors()}
    return copy.deepcopy(list(objects), memo)


def assign_attributes(objects: Sequence[Any], others: Sequence[Any]) -> None:
    """Replace the attributes of objects by those of others."""
    for value, other in zip(objects, others, strict=True):
        attributes: Mapping[str, Any] = dict(other.__dict__)
        value.__dict__.clear()
        value.__dict__.update(attributes)
