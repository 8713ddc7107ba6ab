"""Arguments of a folded call: tensors ``[N·Q, …]`` with the rows of all members in one batch, member after member."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_flatten, tree_unflatten
from .._utils.recent import Recent
from .containers import assign_attributes, contents, copy_with, is_container
from .forward import PLAIN_TYPES
from .module_state import NotBatchable
from .object_calls import ObjectCallResult, objects_in

# Largest number of entries that are remembered.
_MAX_KINDS = 1024


class Vectors:
    """Remembers which vectors have one number for each row, from calls in which this was clear."""

    def __init__(self) -> None:
        self._seen: Recent[Any, bool] = Recent(_MAX_KINDS)

    def are_rows(self, key: Any, size: int, rows: int, doubtful: bool) -> bool:
        """Return whether a vector of ``size`` numbers has one for each of ``rows`` rows.

        Args:
            key: The argument that the vector is.
            size: Length of the vector.
            rows: Number of rows.
            doubtful: Whether another size in the call, such as a sequence length, equals the number of rows.

        Raises:
            ValueError: It is unclear.
        """
        if not doubtful or size != rows:
            self._seen[key] = size == rows
        if key not in self._seen:
            raise ValueError(
                f"a call in population.folded() has {rows} rows and a vector of {rows} numbers. It is unclear whether"
                f" these are one for each row, or for example the positions of {rows} tokens. Use another number of"
                " rows, or another chunk_size"
            )
        return self._seen[key] and size == rows


class RowCall:
    """The arguments of a folded call of a module.

    Args:
        module: The module.
        args: Positional arguments.
        kwargs: Keyword arguments.
        members: ``N``.
        rows: ``Q``; there are ``N·Q·k`` rows for some ``k``.
        vectors: Remembers which vectors are rows.

    Attributes:
        leaves: The leaves of the arguments.
        spec: Their structure.
        objects: The objects among them that hold tensors, such as caches.
        held: The tensors in these objects.
        rows: Number of rows, ``N·Q·k``.
        each: Number of rows of one member, ``Q·k``.
        dims: For each leaf and each tensor in ``held``, 0 if it has rows, or None if members share it.

    Raises:
        ValueError: No tensor has such a number of rows, or it is unclear whether a vector has.
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
            has_rows = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.rows
            if isinstance(value, Tensor) and value.ndim == 1:
                has_rows = vectors.are_rows((module, str(self.spec), path), len(value), self.rows, doubtful)
            self.dims.append(0 if has_rows else None)

    def unfolded_leaves(self) -> list[Any]:
        """Return the leaves, reshaped from ``[N·Q·k, …]`` to ``[N, Q·k, …]``."""
        return self._unfolded(self.leaves, self.dims[: len(self.leaves)])

    def unfolded_held(self) -> list[Tensor]:
        """Return the tensors in ``held``, reshaped in the same way."""
        return self._unfolded(self.held, self.dims[len(self.leaves) :])

    def _unfolded(self, values: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
        return [
            value if dim is None else value.unflatten(0, (self.members, self.each))
            for value, dim in zip(values, dims, strict=True)
        ]

    def of(self, member: int) -> MemberCall:
        """Return the arguments of one member, with its own copies of objects."""
        return MemberCall(self, member)

    def folded(self, result: ObjectCallResult) -> Any:
        """Return the result of a call for all members with their rows in one batch, also in objects."""
        leaves = [self._fold(leaf, varies) for leaf, varies in zip(result.leaves, result.varies, strict=True)]
        result.contents.exchange(
            [self._fold(tensor, varies) for tensor, varies in zip(result.tensors, result.held_varies, strict=True)]
        )
        return tree_unflatten(leaves, result.spec)

    def _fold(self, value: Any, varies: bool) -> Any:
        if not varies:
            # It may have the rows of one member, and be the same for all: repeat them.
            alike = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == self.each > 1
            return value.repeat(self.members, *[1] * (value.ndim - 1)) if alike else value
        if value.ndim >= 2 and value.shape[1] % self.each == 0:
            return value.flatten(0, 1)
        if value.ndim == 1:
            return value
        raise NotBatchable(f"the model returns a tensor of shape {list(value.shape[1:])} for {self.each} rows")

    def row_tensors(self, result: Any, member: int | None = None) -> list[Tensor]:
        """Return the tensors in a result that have rows; only one member's rows if ``member`` is given."""
        found = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor) and leaf.ndim >= 2]
        if member is None:
            return [leaf for leaf in found if leaf.shape[0] % self.each == 0]
        return [leaf.unflatten(0, (self.members, -1))[member] for leaf in found if leaf.shape[0] % self.rows == 0]

    def joined(self, calls: Sequence[MemberCall], results: Sequence[Any]) -> Any:
        """Join the results of single members to one for all rows, also in the objects."""
        flat = [tree_flatten(result) for result in results]
        argument_ids = [id(value) for call in calls for value in call.objects]
        joined = []
        for column in zip(*(leaves for leaves, _ in flat), strict=True):
            if is_container(column[0]) and id(column[0]) not in argument_ids:
                self._join_contents([[value] for value in column])
            joined.append(self._join(column))
        if self.objects:
            self._join_contents([call.objects for call in calls])
            assign_attributes(self.objects, calls[0].objects)
            original = {id(copied): value for copied, value in zip(calls[0].objects, self.objects, strict=True)}
            joined = [original.get(id(value), value) for value in joined]
        return tree_unflatten(joined, flat[0][1])

    def _join_contents(self, objects: Sequence[Sequence[Any]]) -> None:
        """Put the rows of all members into the first member's objects."""
        held = [contents(objects_of_member) for objects_of_member in objects]
        columns = itertools.zip_longest(*(objects_of_member.tensors() for objects_of_member in held))
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
        raise ValueError(
            "the model returns values that cannot be joined over the members of population.folded(): return tensors"
            " with one row for each row of the input"
        )


class MemberCall:
    """One member's part of a call's arguments.

    Attributes:
        objects: Copies of the objects with the member's rows.
    """

    def __init__(self, call: RowCall, member: int) -> None:
        rows = slice(member * call.each, (member + 1) * call.each)
        count = len(call.leaves)
        has_rows = {id(t): dim is not None for t, dim in zip(call.held, call.dims[count:], strict=True)}
        # Copies, as a forward may write into the tensors.
        self.objects = copy_with(call.objects, lambda t: (t[rows] if has_rows[id(t)] else t).clone())
        copied = {id(value): other for value, other in zip(call.objects, self.objects, strict=True)}
        leaves = [
            copied.get(id(leaf), leaf) if dim is None else leaf[rows]
            for leaf, dim in zip(call.leaves, call.dims[:count], strict=True)
        ]
        self.args, self.kwargs = tree_unflatten(leaves, call.spec)

    def copied(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with further copies of the objects."""
        leaves, spec = tree_flatten((self.args, self.kwargs))
        others = copy_with(self.objects, Tensor.clone)
        copied = {id(value): other for value, other in zip(self.objects, others, strict=True)}
        args, kwargs = tree_unflatten([copied.get(id(leaf), leaf) for leaf in leaves], spec)
        return args, kwargs


def _number_of_rows(module: nn.Module, leaves: Sequence[Any], unit: int) -> int:
    """Return the number of rows: of the first tensor with two or more dimensions that has a multiple of ``unit``."""
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
