"""Batched calls with objects among their arguments or results, such as key-value caches.

The tensors in these objects are batched like arguments: during the call, each is replaced by one with a dimension of
members. After it, the objects hold plain tensors again.
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
from .containers import Contents, SavedState, contents, is_container
from .forward import PLAIN_TYPES, Call, for_one
from .module_state import NotBatchable


class ObjectCallResult(NamedTuple):
    """The result of a call.

    Attributes:
        leaves: Leaves of the result. Tensors that differ between members have a leading dimension of members.
        spec: Structure of the result.
        varies: For each leaf, whether it is a tensor that differs between members.
        objects: The objects among the arguments and in the result.
        contents: Contents of these objects after the call.
        tensors: The tensors in ``contents``. Those that differ between members have a leading dimension of members.
        held_varies: For each of these, whether it differs between members.
    """

    leaves: list[Any]
    spec: TreeSpec
    varies: list[bool]
    objects: list[Any]
    contents: Contents
    tensors: list[Tensor]
    held_varies: list[bool]


def objects_in(leaves: Sequence[Any]) -> list[Any]:
    """Return the objects among the leaves of arguments or results whose tensors are batched, each once."""
    return list({id(leaf): leaf for leaf in leaves if is_container(leaf)}.values())


def run_with_objects(
    call: Call, objects: Sequence[Any], held: list[Tensor], held_dims: Sequence[int | None], *, spend: bool = False
) -> ObjectCallResult:
    """Make a call for its members at once.

    Args:
        call: The call, without the tensors in objects.
        objects: The objects among its leaves.
        held: For each tensor in the objects, the tensor that replaces it during the call. The list is emptied.
        held_dims: For each of these its dimension of members, or None if members share it.
        spend: Whether to free tensors in objects as soon as the module replaces them. A growing cache is then never in
            memory twice, but a failed call does not restore the objects.

    Raises:
        Exception: Any exception of the module, or of torch.vmap if the call cannot be batched. The objects are then
            restored, unless ``spend``.
    """
    if spend:
        return _run(call, objects, held, held_dims, BatchingRules())
    kept, again = SavedState(objects), list(held)
    try:
        return _run(call, objects, held, held_dims, BatchingRules())
    except Exception as error:
        kept.restore()
        if "vmap: " not in str(error):
            raise
    try:
        # The module may write values that differ between members into a tensor that it has made: give members copies.
        return _run(call, objects, again, held_dims, BatchingRules(factory_copies=call.size))
    except Exception:
        kept.restore()
        raise


def _run(
    call: Call, objects: Sequence[Any], held: list[Tensor], held_dims: Sequence[int | None], rules: BatchingRules
) -> ObjectCallResult:
    batched_at = [i for i, dim in enumerate(call.dims) if dim is not None]
    before = contents(objects)
    found: list[Any] = []

    def place_held() -> None:
        # Not passed as arguments of torch.vmap, which would keep them alive until it returns.
        before.exchange([t if dim is None else as_batched(t, dim) for t, dim in zip(held, held_dims, strict=True)])
        held.clear()

    def member(_: Tensor, factors: dict[str, Any], inputs: list[Tensor]) -> list[Tensor]:
        place_held()
        given = dict(enumerate(call.leaves)) | dict(zip(batched_at, inputs, strict=True))
        arguments = [given[i] for i in range(len(call.leaves))]
        leaves, spec = for_one(call.module, call.slots, call.centres, factors, arguments, call.spec)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *PLAIN_TYPES)) and not is_container(leaf):
                raise NotBatchable(f"the model returns a {type(leaf).__name__}")
        all_objects = objects_in([*objects, *leaves])
        after = contents(all_objects)
        tensors = after.tensors()
        varies = [isinstance(leaf, Tensor) and is_functorch_wrapped_tensor(leaf) for leaf in leaves]
        held_varies = [is_functorch_wrapped_tensor(tensor) for tensor in tensors]
        found[:] = leaves, spec, varies, all_objects, after, tensors, held_varies
        return [value for value, varying in zip([*leaves, *tensors], varies + held_varies, strict=True) if varying]

    factors = {name: members_of(value) for name, value in call.factors.items()}
    in_dims = (0, 0, [call.dims[i] for i in batched_at])
    inputs = [call.leaves[i] for i in batched_at]
    counter = torch.arange(call.size, device="cpu")
    with rules:
        outputs = iter(torch.vmap(member, in_dims, randomness="different")(counter, factors, inputs))
    leaves, spec, varies, all_objects, after, tensors, held_varies = found
    leaves = [next(outputs) if varying else leaf for leaf, varying in zip(leaves, varies, strict=True)]
    tensors = [next(outputs) if varying else tensor for tensor, varying in zip(tensors, held_varies, strict=True)]
    after.exchange(tensors)
    return ObjectCallResult(leaves, spec, varies, all_objects, after, tensors, held_varies)
