"""The estimate of the gradient: perturbations weighted by the shaped scores, summed chunk by chunk.

Where there are several chunks, the sum is exact in integers: the same to the bit in whatever order, and by however many
processes, it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..perturbation.sample import ParameterSpec, Perturbations
from .exact_sum import ExactSum

# What it takes to draw a number and to sum it up, about: on an accelerator, and on one core.
_SECONDS_PER_NUMBER = (1e-10, 5e-9)


class Sharing(Protocol):
    """Who takes part in a sum: an engine."""

    def own_part(self, chunks: Sequence[Any], bytes_of_sums: int, seconds_of_noise: float) -> Sequence[Any]:
        """Return the chunks whose contributions this process should sum."""

    def add_up(self, totals: Mapping[str, Tensor]) -> None:
        """Replace integer sums over :meth:`own_part`, in place, by those over all chunks."""


def weighted_sum(
    chunks: Sequence[Any],
    weights: Tensor,
    perturbations: Callable[[int, int], Perturbations],
    specs: Callable[[], Sequence[ParameterSpec]],
    unit: int,
    sharing: Sharing,
) -> dict[str, Tensor]:
    """Return ``Σ_i w_i · perturbation_i`` for every parameter.

    Args:
        chunks: ``(first, size)`` of consecutive members.
        weights: ``[N]``.
        perturbations: From the first member and a number of members to their perturbations.
        specs: How each parameter is perturbed.
        unit: How many consecutive members share a draw, with signs ``+ − + − …``.
        sharing: Who takes part.
    """

    def contribution(chunk: Any) -> dict[str, Tensor]:
        first, size = chunk
        return perturbations(first, size).weighted_sum(weights[first : first + size])

    if len(chunks) == 1:
        # Nothing to add, so nothing to round.
        return contribution(chunks[0])
    known = specs()
    signs = torch.tensor([1.0, -1.0], dtype=weights.dtype, device=weights.device).repeat(unit)[:unit]
    largest = float((weights.view(-1, unit) @ signs).abs().sum())
    try:
        total = ExactSum(
            {spec.name: spec.centre for spec in known}, {spec.name: largest * spec.largest for spec in known}
        )
    except ValueError:
        # Not finite: neither is the update, as whoever takes the step will say.
        return {spec.name: torch.full_like(spec.centre, torch.inf) for spec in known}
    # What it takes to draw the noise of all members again, and to sum it up.
    numbers = sum(spec.numel for spec in known) * len(weights) // unit
    on_cpu = all(spec.centre.is_cpu for spec in known)
    size = sum(spec.centre.numel() for spec in known)
    for chunk in sharing.own_part(chunks, 8 * size, numbers * _SECONDS_PER_NUMBER[on_cpu]):
        total.add(contribution(chunk))
    sharing.add_up(total.totals)
    return total.values()
