"""Batched calls with objects among their arguments or results, such as key-value caches.

What these hold is batched like the arguments themselves: for the call each tensor is exchanged for one with a dimension
of members, and after it they hold plain tensors again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import TreeSpec, is_functorch_wrapped_tensor
from ..perturbation import BatchingRules
from ..perturbation.batching import as_batched
from ..perturbation.sample import members_of
from .containers import Contents, Kept, contents, is_container
from .forward import PLAIN_TYPES, Call, for_one
from .module_state import NotBatchable


class Opened(NamedTuple):
    """The result of a call.

    Attributes:
        leaves: Of the result, tensors with a leading dimension of members where they are in ``own``.
        spec: Its structure.
        own: For each leaf whether it is a tensor that differs between members.
        objects: The objects of the arguments, and those that came up in the result.
        contents: What they hold now: the members' tensors.
        tensors: For each tensor in ``contents`` its values, with a leading dimension of members where they are in
            ``held_own``.
        held_own: For each whether it differs between members.
    """

    leaves: list[Any]
    spec: TreeSpec
    own: list[bool]
    objects: list[Any]
    contents: Contents
    tensors: list[Tensor]
    held_own: list[bool]


def objects_in(leaves: Sequence[Any]) -> list[Any]:
    """Return the objects among the leaves of arguments or results that are opened, each once."""
    return list({id(leaf): leaf for leaf in leaves if is_container(leaf)}.values())


def run_opened(
    call: Call, objects: Sequence[Any], held: list[Tensor], held_dims: Sequence[int | None], *, spend: bool = False
) -> Opened:
    """Make a call for its members at once.

    Args:
        call: The call, without the tensors in objects.
        objects: The objects among its leaves.
        held: What to put in the place of each of the tensors that they hold, for the call. The list is emptied.
        held_dims: For each of these its dimension of members, or None if they share it.
        spend: Whether the tensors in objects are freed as soon as the module replaces them. A cache that grows is then
            never there twice, but a call that fails leaves the objects as they are.

    Raises:
        Exception: Whatever the module raises, or torch.vmap where the call cannot be batched; the objects are then as
            they were, unless ``spend``.
    """
    if spend:
        return _run(call, objects, held, held_dims, BatchingRules())
    kept, again = Kept(objects), list(held)
    try:
        return _run(call, objects, held, held_dims, BatchingRules())
    except Exception as error:
        kept.restore()
        if "vmap: " not in str(error):
            raise
    try:
        # A tensor that the module has made, of one member's shape, was to be filled with what differs between members.
        return _run(call, objects, again, held_dims, BatchingRules(factory_copies=call.size))
    except Exception:
        kept.restore()
        raise


def _run(
    call: Call, objects: Sequence[Any], held: list[Tensor], held_dims: Sequence[int | None], rules: BatchingRules
) -> Opened:
    own_at = [i for i, dim in enumerate(call.dims) if dim is not None]
    before = contents(objects)
    found: list[Any] = []

    def place_held() -> None:
        # Not as arguments of torch.vmap, which would hold them until it returns.
        before.exchange([t if dim is None else as_batched(t, dim) for t, dim in zip(held, held_dims, strict=True)])
        held.clear()

    def member(_: Tensor, factors: dict[str, Any], own: list[Tensor]) -> list[Tensor]:
        place_held()
        given = dict(enumerate(call.leaves)) | dict(zip(own_at, own, strict=True))
        arguments = [given[i] for i in range(len(call.leaves))]
        leaves, spec = for_one(call.module, call.slots, call.centres, factors, arguments, call.spec)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *PLAIN_TYPES)) and not is_container(leaf):
                raise NotBatchable(f"the model returns a {type(leaf).__name__}")
        opened = objects_in([*objects, *leaves])
        after = contents(opened)
        tensors = after.tensors()
        own_leaves = [isinstance(leaf, Tensor) and is_functorch_wrapped_tensor(leaf) for leaf in leaves]
        own_tensors = [is_functorch_wrapped_tensor(tensor) for tensor in tensors]
        found[:] = leaves, spec, own_leaves, opened, after, tensors, own_tensors
        return [value for value, own in zip([*leaves, *tensors], own_leaves + own_tensors, strict=True) if own]

    factors = {name: members_of(value) for name, value in call.factors.items()}
    in_dims = (0, 0, [call.dims[i] for i in own_at])
    own_leaves_in = [call.leaves[i] for i in own_at]
    counter = torch.arange(call.size, device="cpu")
    with rules:
        outputs = iter(torch.vmap(member, in_dims, randomness="different")(counter, factors, own_leaves_in))
    leaves, spec, own_leaves, opened, after, tensors, own_tensors = found
    leaves = [next(outputs) if own else leaf for leaf, own in zip(leaves, own_leaves, strict=True)]
    tensors = [next(outputs) if own else tensor for tensor, own in zip(tensors, own_tensors, strict=True)]
    after.exchange(tensors)
    return Opened(leaves, spec, own_leaves, opened, after, tensors, own_tensors)
