"""Measures how much of an estimate is signal, and how much is noise.

An estimate is a sum ``g = Σ_d x_d`` of ``n`` independent terms, one for each draw. If ``μ`` is their mean,

    E‖g‖² = n²‖μ‖² + Σ_d Var(x_d),      E Σ_d ‖x_d‖² = n‖μ‖² + Σ_d Var(x_d),

so that ``S = n/(n - 1) · (‖g‖² - Σ_d ‖x_d‖²)`` is an unbiased estimate of the squared length of the signal ``nμ``. It
needs only two numbers for each parameter. If the scores are random, ``S/‖g‖²`` is zero on average, with a standard
deviation of about ``√(2/D)`` for ``D`` weights.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..update.estimate import Estimate


@dataclasses.dataclass(frozen=True)
class Part:
    """The signal in the estimate for one parameter.

    Attributes:
        length: Squared length of the estimate, ``‖g‖²``.
        noise: Sum of the squared lengths of its terms, ``Σ_d ‖x_d‖²``.
        sigma: Standard deviation of the perturbations.
        numel: Number of weights.
    """

    length: float
    noise: float
    sigma: float
    numel: int


@dataclasses.dataclass(frozen=True)
class Signal:
    """The signal in an estimate.

    Attributes:
        parts: The part of each parameter, by name.
        draws: ``n``, the number of terms of the estimate.
        members: ``N``.
        spread: The variance of the members' weights, times ``N``.

    Example:
        >>> signal = Signal({"w": Part(length=3.0, noise=2.0, sigma=0.1, numel=50)}, draws=9, members=9, spread=1.0)
        >>> round(signal.squared_cosine, 3), round(signal.split_half_cosine, 3), round(signal.split_half_error, 3)
        (0.375, 0.231, 0.1)
    """

    parts: dict[str, Part]
    draws: int
    members: int
    spread: float

    @property
    def length(self) -> float:
        """Squared length of the estimate."""
        return math.fsum(part.length for part in self.parts.values())

    def of(self, part: Part) -> float:
        """Return the unbiased estimate ``S`` of the squared length of the signal in a part; it may be negative."""
        return (part.length - part.noise) * self.draws / max(1, self.draws - 1)

    @property
    def squared_cosine(self) -> float:
        """Estimated squared cosine between the estimate and the true direction; may be below zero by chance."""
        length = self.length
        return math.fsum(map(self.of, self.parts.values())) / length if length > 0 else 0.0

    @property
    def cosine(self) -> float:
        """Estimate of the cosine between the estimate and the true direction, from 0 to 1."""
        return math.sqrt(min(1.0, max(0.0, self.squared_cosine)))

    @property
    def split_half_cosine(self) -> float:
        """The cosine to expect between the estimates from two halves of the draws, averaged over all ways to halve.

        ``⟨g₁, g₂⟩`` is ``S/4`` on average over the splits, and ``‖g₁‖² + ‖g₂‖²`` is ``‖g‖² - 2⟨g₁, g₂⟩``.
        """
        quarter = math.fsum(map(self.of, self.parts.values())) / 4
        halves = self.length - 2 * quarter
        return 2 * quarter / halves if halves > 0 else 0.0

    @property
    def split_half_error(self) -> float:
        """Standard deviation of :attr:`split_half_cosine` if the scores are random."""
        weighted = math.fsum(part.sigma**2 * part.numel for part in self.parts.values())
        squared = math.fsum(part.sigma**4 * part.numel for part in self.parts.values())
        return math.sqrt(squared / 2) / weighted if weighted > 0 else 0.0

    @property
    def explained_share(self) -> float:
        """Estimate of the share of the scores' variance that a linear function of the weights explains.

        With ``g = Σ_i w_i σ ε_i`` and weights ``w`` of variance ``v``, ``S/(σ²N²v)`` is the squared length of the
        correlations of the scores with the perturbations. Its standard deviation is about ``√(2D)/N``.
        """
        if self.spread <= 0:
            return 0.0
        total = math.fsum(self.of(part) / part.sigma**2 for part in self.parts.values())
        return total / (self.members * self.spread)


def squared_cosine_of(split_half_cosine: float) -> float:
    """Return the :attr:`Signal.squared_cosine` that corresponds to a :attr:`Signal.split_half_cosine`.

    It is also the cosine to expect between a very short plain step and the next estimate.

    Example:
        >>> round(squared_cosine_of(3 / 13), 3)
        0.375
    """
    return 2 * split_half_cosine / (1 + split_half_cosine)


def signal_of(estimate: Estimate) -> Signal | None:
    """Return the signal in an estimate; None if its terms are not known, or it is not finite.

    Args:
        estimate: The estimate of a generation.

    Example:
        >>> signal_of(Estimate({"w": torch.ones(3)})) is None
        True
    """
    terms = estimate.terms
    if terms is None or not terms.squares:
        return None
    names = list(terms.squares)
    lengths = [torch.linalg.vector_norm(estimate.gradient[name]) for name in names]
    values = _numbers(lengths), _numbers([terms.squares[name] for name in names])
    parts = {
        name: Part(length**2, noise, terms.sigmas[name], estimate.gradient[name].numel())
        for name, length, noise in zip(names, *values, strict=True)
    }
    weights = terms.weights
    spread = float((weights - weights.mean()).square().sum())
    signal = Signal(parts, terms.draws, len(weights), spread)
    return signal if math.isfinite(signal.length) else None


def _numbers(values: list[Tensor]) -> list[float]:
    """Return 0-d tensors as floats; those of an accelerator in one transfer."""
    return torch.stack([value.double() if value.device.type != "mps" else value for value in values]).tolist()
