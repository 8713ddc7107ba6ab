"""The arguments of a call whose tensors have rows of all members in one batch, member after member: ``[N·Q, …]``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_flatten, tree_unflatten
from .._utils.recent import Recent
from .containers import become, contents, copy_with, is_container
from .forward import PLAIN_TYPES
from .module_state import NotBatchable
from .opened import Opened, objects_in

# Kinds of arguments of which something is remembered.
_MAX_KINDS = 1024


class Vectors:
    """Which vectors have been seen to be rows, in calls that left no doubt."""

    def __init__(self) -> None:
        self._seen: Recent[Any, bool] = Recent(_MAX_KINDS)

    def are_rows(self, key: Any, size: int, rows: int, doubtful: bool) -> bool:
        """Return whether a vector of ``size`` numbers has one for each of ``rows`` rows.

        Args:
            key: How it was handed in.
            size: How many numbers it has.
            rows: How many rows there are.
            doubtful: Whether something else, such as the length of a sequence, is of the same number.

        Raises:
            ValueError: It cannot be told.
        """
        if not doubtful or size != rows:
            self._seen[key] = size == rows
        if key not in self._seen:
            raise ValueError(
                f"a call in population.folded() has {rows} rows and a vector of {rows} numbers, which may have one for"
                f" each row or be, say, the positions of {rows} tokens. Use another number of rows, or another"
                " chunk_size"
            )
        return self._seen[key] and size == rows


class RowCall:
    """The arguments of a call of a module.

    Args:
        module: The module.
        args: Positional arguments.
        kwargs: Keyword arguments.
        members: ``N``.
        rows: ``Q``; there are ``N·Q·k`` rows for some ``k``.
        vectors: Which vectors are rows.

    Attributes:
        leaves: The leaves of the arguments.
        spec: Their structure.
        objects: The objects among them that hold tensors, such as caches.
        held: The tensors that these hold.
        rows: The number of rows.
        each: The number of rows of each member.
        dims: For each leaf and each tensor in ``held`` 0 where it has rows, or None where members share it.

    Raises:
        ValueError: No tensor has such a number of rows, or it is unclear which do.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        members: int,
        rows: int,
        vectors: Vectors,
    ) -> None:
        self.members = members
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.objects = objects_in(self.leaves)
        held = contents(self.objects)
        self.held = held.tensors()
        self.rows = _number_of_rows(module, self.leaves, members * rows)
        self.each = self.rows // members
        values = [*self.leaves, *self.held]
        paths = [*range(len(self.leaves)), *(path[1:] for path in held.paths())]
        doubtful = any(isinstance(value, Tensor) and self.rows in value.shape[1:] for value in values)
        self.dims: list[int | None] = []
        for path, value in zip(paths, values, strict=True):
            own = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.rows
            if isinstance(value, Tensor) and value.ndim == 1:
                own = vectors.are_rows((module, str(self.spec), path), len(value), self.rows, doubtful)
            self.dims.append(0 if own else None)

    def unfolded_leaves(self) -> list[Any]:
        """Return the leaves, ``[N, Q·k, …]`` instead of ``[N·Q·k, …]``."""
        return self._unfolded(self.leaves, self.dims[: len(self.leaves)])

    def unfolded_held(self) -> list[Tensor]:
        """Return the tensors in ``held`` likewise."""
        return self._unfolded(self.held, self.dims[len(self.leaves) :])

    def _unfolded(self, values: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
        return [
            value if dim is None else value.unflatten(0, (self.members, self.each))
            for value, dim in zip(values, dims, strict=True)
        ]

    def of(self, member: int) -> MemberCall:
        """Return the arguments of one member, with objects of its own."""
        return MemberCall(self, member)

    def folded(self, opened: Opened) -> Any:
        """Return the result of a call made for all members, with their rows in one batch; objects hold them too."""
        leaves = [self._fold(leaf, own) for leaf, own in zip(opened.leaves, opened.own, strict=True)]
        opened.contents.exchange(
            [self._fold(tensor, own) for tensor, own in zip(opened.tensors, opened.held_own, strict=True)]
        )
        return tree_unflatten(leaves, opened.spec)

    def _fold(self, value: Any, own: bool) -> Any:
        if not own:
            # It may have as many rows as one member has, and be the same for all.
            alike = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == self.each > 1
            return value.repeat(self.members, *[1] * (value.ndim - 1)) if alike else value
        if value.ndim >= 2 and value.shape[1] % self.each == 0:
            return value.flatten(0, 1)
        if value.ndim == 1:
            return value
        raise NotBatchable(f"the model returns a tensor of shape {list(value.shape[1:])} for {self.each} rows")

    def row_tensors(self, result: Any, member: int | None = None) -> list[Tensor]:
        """Return the tensors with rows in a result: of all members, or one member's rows."""
        found = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor) and leaf.ndim >= 2]
        if member is None:
            return [leaf for leaf in found if leaf.shape[0] % self.each == 0]
        return [leaf.unflatten(0, (self.members, -1))[member] for leaf in found if leaf.shape[0] % self.rows == 0]

    def joined(self, calls: Sequence[MemberCall], results: Sequence[Any]) -> Any:
        """Return the result for all rows from those of the members, and have the objects hold theirs."""
        flat = [tree_flatten(result) for result in results]
        own = [id(value) for call in calls for value in call.objects]
        joined = []
        for column in zip(*(leaves for leaves, _ in flat), strict=True):
            if is_container(column[0]) and id(column[0]) not in own:
                self._join_contents([[value] for value in column])
            joined.append(self._join(column))
        if self.objects:
            self._join_contents([call.objects for call in calls])
            become(self.objects, calls[0].objects)
            original = {id(copied): value for copied, value in zip(calls[0].objects, self.objects, strict=True)}
            joined = [original.get(id(value), value) for value in joined]
        return tree_unflatten(joined, flat[0][1])

    def _join_contents(self, objects: Sequence[Sequence[Any]]) -> None:
        """Have the first member's objects hold the rows of all."""
        held = [contents(own) for own in objects]
        columns = itertools.zip_longest(*(own.tensors() for own in held))
        held[0].exchange([self._join(column) for column in columns])

    def _join(self, column: Sequence[Any]) -> Any:
        first = column[0]
        if isinstance(first, Tensor):
            if first.ndim == 0:
                return first if _all_equal(column) else torch.stack(list(column))
            if first.shape[0] % self.each == 0 and (first.ndim > 1 or first.shape[0] == self.each):
                return torch.cat(list(column))
            if _all_equal(column):
                return first
        elif is_container(first) or (isinstance(first, PLAIN_TYPES) and all(value == first for value in column)):
            return first
        raise ValueError("the model returns values that cannot be put together for all members of population.folded()")


class MemberCall:
    """One member's part of a call's arguments.

    Attributes:
        objects: Copies of the objects with the member's rows.
    """

    def __init__(self, call: RowCall, member: int) -> None:
        rows = slice(member * call.each, (member + 1) * call.each)
        count = len(call.leaves)
        own = {id(t): dim is not None for t, dim in zip(call.held, call.dims[count:], strict=True)}
        # Each has its own, as a forward may write into them.
        self.objects = copy_with(call.objects, lambda t: (t[rows] if own[id(t)] else t).clone())
        copied = {id(value): other for value, other in zip(call.objects, self.objects, strict=True)}
        leaves = [
            copied.get(id(leaf), leaf) if dim is None else leaf[rows]
            for leaf, dim in zip(call.leaves, call.dims[:count], strict=True)
        ]
        self.args, self.kwargs = tree_unflatten(leaves, call.spec)

    def copied(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments once more, with further copies of the objects."""
        leaves, spec = tree_flatten((self.args, self.kwargs))
        others = copy_with(self.objects, Tensor.clone)
        copied = {id(value): other for value, other in zip(self.objects, others, strict=True)}
        args, kwargs = tree_unflatten([copied.get(id(leaf), leaf) for leaf in leaves], spec)
        return args, kwargs


def _number_of_rows(module: nn.Module, leaves: Sequence[Any], unit: int) -> int:
    """Return the rows of the first tensor with more than one dimension that has a multiple of ``unit``."""
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.ndim >= 2 and leaf.shape[0] > 0 and leaf.shape[0] % unit == 0:
            return leaf.shape[0]
    shapes = [list(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
    raise ValueError(
        f"{type(module).__name__} is called in population.folded() with tensors of shapes {shapes}: expected a number"
        f" of rows in dimension 0 that is a multiple of {unit}, members times rows of each"
    )


def _all_equal(column: Sequence[Tensor]) -> bool:
    return all(torch.equal(column[0], value) for value in column)
