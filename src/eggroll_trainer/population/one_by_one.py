"""Calls of one member after the other, for models that cannot be called for all members at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_flatten, tree_unflatten
from .arguments import arguments_of
from .forward import PLAIN_TYPES
from .members import Members
from .module_state import NotBatchable


def call_one_by_one(
    population: Members,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dims: Sequence[int | None],
    members: Sequence[int],
) -> Any:
    """Call the model for one member after the other, and stack the results.

    Args:
        population: The members.
        args: Positional arguments.
        kwargs: Keyword arguments.
        dims: For each leaf of ``(args, kwargs)`` its dimension of members, or None if members share it.
        members: Indices of the members to call it for.

    Raises:
        ValueError: A call has changed the model.
        TypeError: The model returns values that cannot be stacked.
    """
    leaves, spec = tree_flatten((args, kwargs))
    rows = []
    for i, member in enumerate(members):
        own_args, own_kwargs = arguments_of(leaves, spec, dims, i)
        with torch.no_grad(), population.holding(member) as changed:
            rows.append(tree_flatten(population.model(*own_args, **own_kwargs)))
        if changed:
            raise NotBatchable.for_changes(changed).for_user()
    columns = zip(*(leaves for leaves, _ in rows), strict=True)
    return tree_unflatten([_stack(column) for column in columns], rows[0][1])


def _stack(column: Sequence[Any]) -> Any:
    if all(isinstance(value, Tensor) for value in column):
        return torch.stack(list(column))
    if all(isinstance(value, (bool, int, float)) for value in column) and any(v != column[0] for v in column):
        return torch.tensor(column)
    if isinstance(column[0], PLAIN_TYPES) and all(value == column[0] for value in column):
        return column[0]
    raise TypeError(
        f"the model returns values of type {type(column[0]).__name__}, which cannot be stacked over members: return"
        " tensors or numbers"
    )
