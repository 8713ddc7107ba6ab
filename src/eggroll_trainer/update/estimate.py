"""The estimate of the gradient: perturbations weighted by the shaped scores, summed chunk by chunk.

Where there are several chunks, the sum is exact in integers: the same to the bit in whatever order, and by however many
processes, it is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..perturbation.sample import ParameterSpec, Perturbations
from .exact_sum import ExactSum

# What it takes to draw a number and to sum it up, about: on an accelerator, and on one core.
_SECONDS_PER_NUMBER = (1e-10, 5e-9)
# Tells the sums of squares from the sums themselves.
_SQUARE = "square of "


class Sharing(Protocol):
    """Who takes part in a sum: an engine."""

    def own_part(self, chunks: Sequence[Any], bytes_of_sums: int, seconds_of_noise: float) -> Sequence[Any]:
        """Return the chunks whose contributions this process should sum."""

    def add_up(self, totals: Mapping[str, Tensor]) -> None:
        """Replace integer sums over :meth:`own_part`, in place, by those over all chunks."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms that an estimate is the sum of: one for each draw, its perturbation times its coefficient.

    Attributes:
        squares: The sum of the squared lengths of the terms, by parameter, 0-d. It is what the squared length of the
            sum would be on average if the scores were random.
        draws: How many terms there are.
        weights: ``[N]``, what the members' perturbations are multiplied by.
        sigmas: Standard deviation of the perturbations, by parameter.
    """

    squares: dict[str, Tensor]
    draws: int
    weights: Tensor
    sigmas: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a generation's scores say about the direction to go.

    Attributes:
        gradient: ``-Δθ`` for every trained parameter.
        terms: What it is the sum of; None where a subclass makes the update.
    """

    gradient: dict[str, Tensor]
    terms: Terms | None = None


def weighted_sum(
    chunks: Sequence[Any],
    weights: Tensor,
    perturbations: Callable[[int, int], Perturbations],
    specs: Callable[[], Sequence[ParameterSpec]],
    unit: int,
    sharing: Sharing,
) -> Estimate:
    """Return ``Σ_i w_i · perturbation_i`` for every parameter, as the gradient, and the squares of its terms.

    Args:
        chunks: ``(first, size)`` of consecutive members.
        weights: ``[N]``.
        perturbations: From the first member and a number of members to their perturbations.
        specs: How each parameter is perturbed.
        unit: How many consecutive members share a draw, with signs ``+ − + − …``.
        sharing: Who takes part.
    """
    known = specs()
    sigmas = {spec.name: spec.sigma for spec in known}

    draws = len(weights) // unit
    if len(chunks) == 1:
        # Nothing to add, so nothing to round.
        own = perturbations(*chunks[0])
        return Estimate(own.weighted_sum(weights), Terms(own.weighted_squares(weights), draws, weights, sigmas))
    signs = torch.tensor([1.0, -1.0], dtype=weights.dtype, device=weights.device).repeat(unit)[:unit]
    coefficients = weights.view(-1, unit) @ signs
    largest, squares = float(coefficients.abs().sum()), float(coefficients.square().sum())
    try:
        total = ExactSum(
            {spec.name: spec.centre for spec in known}, {spec.name: largest * spec.largest for spec in known}
        )
        of_squares = ExactSum(
            {_SQUARE + spec.name: _zero_like(spec.centre) for spec in known},
            {_SQUARE + spec.name: squares * spec.largest**2 * spec.centre.numel() for spec in known},
        )
    except ValueError:
        # Not finite: neither is the update, as whoever takes the step will say.
        return Estimate({spec.name: torch.full_like(spec.centre, torch.inf) for spec in known})
    # What it takes to draw the noise of all members again, and to sum it up.
    numbers = sum(spec.numel for spec in known) * len(weights) // unit
    on_cpu = all(spec.centre.is_cpu for spec in known)
    size = sum(spec.centre.numel() for spec in known)
    for chunk in sharing.own_part(chunks, 8 * size, numbers * _SECONDS_PER_NUMBER[on_cpu]):
        own, used = perturbations(*chunk), weights[chunk[0] : chunk[0] + chunk[1]]
        total.add(own.weighted_sum(used))
        of_squares.add({_SQUARE + name: value for name, value in own.weighted_squares(used).items()})
    sharing.add_up({**total.totals, **of_squares.totals})
    sums = {name.removeprefix(_SQUARE): value for name, value in of_squares.values().items()}
    return Estimate(total.values(), Terms(sums, draws, weights, sigmas))


def _zero_like(tensor: Tensor) -> Tensor:
    """Return 0 in float64, where the tensor is or, if there is no float64 there, on the host."""
    return torch.zeros((), dtype=torch.float64, device="cpu" if tensor.device.type == "mps" else tensor.device)
