"""The audit of batched calls: their outputs, compared with those of members who are called by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_flatten, tree_leaves, tree_map
from ..noise.keys import kept_rng
from .agreement import disagreement, precision
from .arguments import arguments_of
from .members import Members


@dataclasses.dataclass
class Audit:
    """A comparison of batched calls with members who are called by themselves.

    Attributes:
        members: Their indices in the population.
        calls: Calls compared so far.
        found: What differed, if anything did.
        sample: Arguments and keyword arguments of one of the calls, as the model itself got them.
    """

    members: Sequence[int]
    calls: int = 0
    found: str | None = None
    sample: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def audited(
    population: Members,
    result: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dims: Sequence[int | None],
    members: Sequence[int],
) -> Any:
    """Return the result of a batched call, compared with what members by themselves give if that is asked for.

    Args:
        population: The members; what differs is noted in its audit.
        result: Of the call.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        dims: For each leaf of ``(args, kwargs)`` its dimension of members, or None if they share it.
        members: Indices of the members that it was made for.
    """
    audit = population.audit
    if audit is None or population.forwards.one_by_one or audit.found is not None:
        return result
    audit.calls += 1
    model = population.model
    leaves, spec = tree_flatten((args, kwargs))
    eps = precision(model, leaves)
    rows = list(members)
    for member in audit.members:
        if member not in rows or audit.found is not None:
            continue
        at = rows.index(member)
        own_args, own_kwargs = audit.sample = arguments_of(leaves, spec, dims, at)

        def call(own_args: Any = own_args, own_kwargs: Any = own_kwargs) -> Any:
            with torch.no_grad():
                return model(*own_args, **own_kwargs)

        ours = tree_map(lambda leaf, at=at: leaf[at] if isinstance(leaf, Tensor) else leaf, result)
        devices = {leaf.device for leaf in tree_leaves((own_args, own_kwargs)) if isinstance(leaf, Tensor)}
        try:
            with kept_rng(devices), population.holding(member):
                difference = disagreement(model, call, ours, eps)
        except Exception as error:
            population.audit = None
            population.warn(
                "batched outputs cannot be checked, as the model by itself fails for the same input"
                f" ({type(error).__name__}: {error}); @batched(check=False) goes without"
            )
            return result
        if difference is not None:
            audit.found = (
                f"in call {audit.calls} of generation {population.generation + 1} the output of member"
                f" {population.first + member}, computed for all members at once, is not what the model gives with that"
                f" member's weights: {difference}"
            )
    return result
