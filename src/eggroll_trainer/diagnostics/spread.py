"""What the spread of a generation's fitness says about sigma."""

from __future__ import annotations

from typing import Any

import numpy as np

Fitness = np.ndarray[Any, Any]


def tie_probability(fitness: Fitness) -> float:
    """Return the probability that two different members, of ``[N]``, have the same fitness.

    Example:
        >>> tie_probability(np.array([1.0, 1.0, 2.0, 3.0]))  # one of six pairs of members
        0.16666666666666666
    """
    count = len(fitness)
    _, same = np.unique(fitness, return_counts=True)
    return float((same * (same - 1)).sum()) / max(1, count * (count - 1))


def odd_and_even(fitness: Fitness) -> tuple[Fitness, Fitness]:
    """Return ``(f₊ - f₋)/2`` and ``(f₊ + f₋)/2`` of antithetic pairs ``(2k, 2k + 1)``, ``[N] → [N/2]``."""
    return (fitness[::2] - fitness[1::2]) / 2, (fitness[::2] + fitness[1::2]) / 2


def linear_share(fitness: Fitness) -> float:
    """Return the share of the variance that changes sign within antithetic pairs.

    It is 1 if the fitness is linear over a distance of sigma, about a half if it is noise, and less if it is curved.

    Example:
        >>> linear_share(np.array([1.0, -1.0, 2.0, -2.0])), linear_share(np.array([1.0, 1.0, 2.0, 2.0]))
        (1.0, 0.0)
    """
    odd, even = odd_and_even(fitness)
    # The odd part has mean zero by symmetry.
    of_odd = float(np.square(odd).mean())
    total = of_odd + float(even.var())
    return of_odd / total if total > 0 else 0.0
