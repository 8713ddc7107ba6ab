"""Makes the call that a group of members waits for, for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch import tree_flatten, tree_unflatten
from ...population import Population
from ...population.containers import assign_attributes, contents, copy_with, is_container
from ...population.module_state import NotBatchable
from ...population.object_calls import ObjectCallResult, objects_in
from .. import thread_modes
from .waiting import Group

# Up to this size, tensors in objects are compared, and not batched if they are equal for all members.
_SMALL = 16


def results_of(population: Population, group: Group) -> list[Any]:
    """Make the call that a group waits for, and return each member's result.

    Raises:
        NotBatchable: The call cannot be made for all members at once.
        ValueError: A BatchNorm layer is in training mode.
    """
    leaves: list[Any] = []
    dims: list[int | None] = []
    for column in group.columns:
        shared = all(leaf is column[0] for leaf in column) or not isinstance(column[0], Tensor)
        leaf = column[0] if shared else torch.stack(column)
        leaves.append(leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf)
        dims.append(None if shared else 0)
    versions = [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
    members = [member.index for member in group.members]
    with thread_modes.autocast(group.modes):
        if group.has_objects:
            results = _results_with_objects(population, group, leaves, dims, members)
        else:
            args, kwargs = (leaves, {}) if isinstance(group.spec, int) else tree_unflatten(leaves, group.spec)
            result = population.run(group.module, tuple(args), kwargs, dims, members, group.training)
            results = _shares(result, len(members))
    if versions != [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]:
        raise NotBatchable("the model's forward changes its input in place")
    return results


def _shares(result: Any, count: int) -> list[Any]:
    """Return each member's part of a batched result."""
    if isinstance(result, Tensor):
        return _slices(result)
    leaves, spec = tree_flatten(result)
    columns = [_slices(leaf) if isinstance(leaf, Tensor) else [leaf] * count for leaf in leaves]
    return [tree_unflatten([column[i] for column in columns], spec) for i in range(count)]


def _slices(tensor: Tensor) -> list[Tensor]:
    # Through .data, slices have separate version counters, like separate outputs.
    return [part.data for part in tensor.unbind(0)]


def _results_with_objects(
    population: Population, group: Group, leaves: list[Any], dims: list[int | None], members: Sequence[int]
) -> list[Any]:
    """Make a call with objects among its arguments or results, such as caches. Each member has its own objects."""
    objects = [objects_in([column[i] for column in group.columns]) for i in range(len(members))]
    held = [contents(objects_of_member) for objects_of_member in objects]
    values, value_dims = [], []
    for column in zip(*(objects_of_member.tensors() for objects_of_member in held), strict=True):
        shared = column[0].numel() <= _SMALL and all(torch.equal(column[0], value) for value in column)
        values.append(column[0].clone() if shared else _stacked(column))
        value_dims.append(None if shared else 0)
    spec = tree_flatten((tuple(leaves), {}))[1] if isinstance(group.spec, int) else group.spec
    call = population.call_of(group.module, leaves, spec, dims, members)
    result = population.run_with_objects(call, objects[0], values, value_dims, group.training)
    return _given_out(result, objects)


def _given_out(result: ObjectCallResult, objects: Sequence[Sequence[Any]]) -> list[Any]:
    """Return each member's result, and update its objects. Before, the first member's objects hold all tensors."""
    count, given = len(objects), len(objects[0])
    template, made = result.objects[:given], result.objects[given:]
    leaf_columns = [
        _slices(leaf) if varies else [leaf] * count for leaf, varies in zip(result.leaves, result.varies, strict=True)
    ]
    tensor_columns = [
        _slices(tensor) if varies else [tensor.clone() for _ in range(count)]
        for tensor, varies in zip(result.tensors, result.held_varies, strict=True)
    ]
    after = contents(template)
    results = []
    # The first member last, as the others' objects are copied from its objects.
    for i in reversed(range(count)):
        tensors = {id(t): column[i] for t, column in zip(result.tensors, tensor_columns, strict=True)}
        mine = contents(objects[i])
        if i and mine.same_places(after):
            mine.take_over(after, [tensors[id(tensor)] for tensor in after.tensors()])
            new = copy_with(made, lambda t, by_id=tensors: by_id[id(t)])  # type: ignore[misc]
        else:
            copies = copy_with([*template, *made], lambda t, by_id=tensors: by_id[id(t)])  # type: ignore[misc]
            assign_attributes(objects[i], copies[:given])
            new = copies[given:]
        own_objects = dict(zip(map(id, result.objects), [*objects[i], *new], strict=True))
        leaves = [
            own_objects.get(id(column[i]), column[i]) if is_container(column[i]) else column[i]
            for column in leaf_columns
        ]
        results.append(tree_unflatten(leaves, result.spec))
    return results[::-1]


def _stacked(column: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one shape; if they are evenly spaced in the same memory, return a view."""
    first, size = column[0], column[0].element_size()
    step = column[1].data_ptr() - first.data_ptr() if len(column) > 1 else 0
    memory = first.untyped_storage().data_ptr()
    in_line = (
        step > 0
        and step % size == 0
        and all(
            tensor.data_ptr() == first.data_ptr() + i * step
            and tensor.stride() == first.stride()
            and tensor.untyped_storage().data_ptr() == memory
            for i, tensor in enumerate(column)
        )
    )
    if not in_line:
        return torch.stack(list(column))
    return first.as_strided((len(column), *first.shape), (step // size, *first.stride()))
