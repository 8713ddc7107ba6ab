"""The estimate of the gradient: perturbations weighted by the shaped scores, summed chunk by chunk.

The sum of several chunks is exact, in integers. So it has the same bits in any order of the chunks, and with any number
of processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..perturbation.sample import ParameterSpec, Perturbations
from .exact_sum import ExactSum

# Approximate seconds to draw a number and add it up: on an accelerator, and on one CPU core.
_SECONDS_PER_NUMBER = (1e-10, 5e-9)
# Prefix of the names of the sums of squares.
_SQUARE = "square of "


class Sharing(Protocol):
    """The methods of an engine that share a sum among processes."""

    def own_part(self, chunks: Sequence[Any], bytes_of_sums: int, seconds_of_noise: float) -> Sequence[Any]:
        """Return the chunks whose contributions this process sums.

        Args:
            chunks: All chunks of the population.
            bytes_of_sums: Size of the sums, which processes exchange.
            seconds_of_noise: Estimated time to draw the noise of all chunks again in one process.
        """

    def add_up(self, totals: Mapping[str, Tensor]) -> None:
        """Replace integer sums over :meth:`own_part`, in place, by those over all chunks."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """Statistics of the terms of an estimate. There is one term for each draw: its perturbation times its coefficient.

    Attributes:
        squares: By parameter, the sum of the squared norms of the terms, 0-d. With random scores, the squared norm of
            the estimate has this value on average.
        draws: Number of terms.
        weights: ``[N]``, the factors of the members' perturbations.
        sigmas: By parameter, the standard deviation of the perturbations.
    """

    squares: dict[str, Tensor]
    draws: int
    weights: Tensor
    sigmas: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimate of a generation: the direction of its step.

    Attributes:
        gradient: ``-Δθ`` for every trained parameter.
        terms: Statistics of its terms; None if a subclass computes the update.
        scale: The factor by which clipping has multiplied it.
    """

    gradient: dict[str, Tensor]
    terms: Terms | None = None
    scale: float = 1.0

    def clipped(self, most: float | None) -> Estimate:
        """Return the estimate, scaled down to the Euclidean norm ``most`` if it is longer; unchanged if that is None.

        Its terms are scaled too, as if all weights of members had been smaller by the same factor.
        """
        if most is None:
            return self
        length = length_of(list(self.gradient.values()))
        if not most < length < math.inf:
            # The step raises an error for an estimate that is not finite.
            return self
        scale = most / length
        terms = self.terms
        if terms is not None:
            squares = {name: value * scale**2 for name, value in terms.squares.items()}
            terms = dataclasses.replace(terms, squares=squares, weights=terms.weights * scale)
        return Estimate({name: value * scale for name, value in self.gradient.items()}, terms, scale)


def length_of(values: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of tensors taken together."""
    return root_of_squares([torch.linalg.vector_norm(value.flatten()) for value in values])


def root_of_squares(norms: Sequence[Tensor]) -> float:
    """Return the norm of a vector from the norms of its parts, each 0-d."""
    # One transfer, so that we wait for an accelerator only once. The squares are summed in float64.
    return torch.stack([norm.double().to(norms[0].device) for norm in norms]).square().sum().sqrt().item()


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
        perturbations: Takes the first member and a number of members, and returns their perturbations.
        specs: Returns how each parameter is perturbed.
        unit: Number of consecutive members that share a draw, with signs ``+ − + − …``.
        sharing: The engine that shares the chunks among processes.
    """
    known = specs()
    sigmas = {spec.name: spec.sigma for spec in known}

    draws = len(weights) // unit
    if len(chunks) == 1:
        # A single term needs no exact sum.
        drawn = perturbations(*chunks[0])
        return Estimate(drawn.weighted_sum(weights), Terms(drawn.weighted_squares(weights), draws, weights, sigmas))
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
        # The weights are not finite. The step raises an error for an update that is not finite.
        return Estimate({spec.name: torch.full_like(spec.centre, torch.inf) for spec in known})
    # All numbers that are drawn again and added up.
    numbers = sum(spec.numel for spec in known) * len(weights) // unit
    on_cpu = all(spec.centre.is_cpu for spec in known)
    size = sum(spec.centre.numel() for spec in known)
    for chunk in sharing.own_part(chunks, 8 * size, numbers * _SECONDS_PER_NUMBER[on_cpu]):
        drawn, used = perturbations(*chunk), weights[chunk[0] : chunk[0] + chunk[1]]
        total.add(drawn.weighted_sum(used))
        of_squares.add({_SQUARE + name: value for name, value in drawn.weighted_squares(used).items()})
    sharing.add_up({**total.totals, **of_squares.totals})
    sums = {name.removeprefix(_SQUARE): value for name, value in of_squares.values().items()}
    return Estimate(total.values(), Terms(sums, draws, weights, sigmas))


def _zero_like(tensor: Tensor) -> Tensor:
    """Return 0 in float64, on the tensor's device or, if that has no float64, on the CPU."""
    return torch.zeros((), dtype=torch.float64, device="cpu" if tensor.device.type == "mps" else tensor.device)
