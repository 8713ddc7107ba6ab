"""The audit of batched calls: some members' outputs are compared with those of the model holding their weights."""

from __future__ import annotations

import dataclasses
import time
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
    """A comparison of batched calls with calls of the model for single members.

    Attributes:
        members: Indices of the members that are compared.
        calls: Number of calls compared so far.
        found: A description of the first difference, or None.
        sample: Positional and keyword arguments of one of the calls, for a single member.
        seconds: Seconds spent in comparisons.
    """

    members: Sequence[int]
    calls: int = 0
    found: str | None = None
    sample: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    seconds: float = 0.0


def audited(
    population: Members,
    result: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dims: Sequence[int | None],
    members: Sequence[int],
) -> Any:
    """Return the result of a batched call; if the population has an audit, compare it with single members first.

    Args:
        population: The members. A difference is stored in its audit.
        result: Result of the call.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        dims: For each leaf of ``(args, kwargs)`` its dimension of members, or None if members share it.
        members: Indices of the members that it was made for.
    """
    audit = population.audit
    if audit is None or population.forwards.one_by_one or audit.found is not None:
        return result
    began = time.perf_counter()
    try:
        _compare(population, audit, result, args, kwargs, dims, list(members))
    finally:
        audit.seconds += time.perf_counter() - began
    return result


def _compare(
    population: Members,
    audit: Audit,
    result: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dims: Sequence[int | None],
    rows: list[int],
) -> None:
    """Compare a batched call with calls of single members, and record a difference in the audit."""
    audit.calls += 1
    model = population.model
    leaves, spec = tree_flatten((args, kwargs))
    eps = precision(model, leaves)
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
                "batched outputs cannot be checked, as a call of the member alone fails for the same input"
                f" ({type(error).__name__}: {error}); use @batched(check=False) to skip the check"
            )
            return
        if difference is not None:
            audit.found = (
                f"in call {audit.calls} of generation {population.generation + 1} the output of member"
                f" {population.first + member}, computed for all members at once, is not what the model gives with that"
                f" member's weights: {difference}"
            )
