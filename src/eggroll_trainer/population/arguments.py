"""Arguments of a call for many members: which of them differ between members, and the arguments of one member."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._torch import TreeSpec, tree_flatten, tree_unflatten


def dims_of(
    args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: int | Sequence[int | None], count: int
) -> list[int | None]:
    """Return, for each leaf of the arguments, its dimension of members, or None if members share it.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments, whose tensors have members in dimension 0.
        in_dims: The dimension of members, one for all positional arguments or one for each.
        count: Number of members.

    Raises:
        ValueError: An argument has another number of members.
    """
    if in_dims is None or isinstance(in_dims, int):
        in_dims = [in_dims] * len(args)
    if len(in_dims) != len(args):
        raise ValueError(f"in_dims has {len(in_dims)} entries for {len(args)} positional arguments")
    dims: list[int | None] = []
    for argument, dim in [*zip(args, in_dims, strict=True), *((value, 0) for value in kwargs.values())]:
        for leaf in tree_flatten(argument)[0]:
            varies = dim is not None and isinstance(leaf, Tensor)
            if varies and (leaf.ndim == 0 or leaf.shape[dim] != count):
                raise ValueError(
                    f"expected one input for each of the {count} members in dimension {dim}, got a tensor"
                    f" of shape {list(leaf.shape)}; pass in_dims=None for an input that all members share"
                )
            dims.append(dim if varies else None)
    return dims


def arguments_of(
    leaves: Sequence[Any], spec: TreeSpec, dims: Sequence[int | None], at: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return one member's positional and keyword arguments.

    Args:
        leaves: Leaves of the arguments of all members.
        spec: Their structure.
        dims: For each leaf its dimension of members, or None if members share it.
        at: Index of the member in that dimension.
    """
    member_leaves = [leaf if dim is None else leaf.select(dim, at) for leaf, dim in zip(leaves, dims, strict=True)]
    args, kwargs = tree_unflatten(member_leaves, spec)
    return args, kwargs
