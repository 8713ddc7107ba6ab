"""``learning_rate="auto"`` and ``sigma="auto"``: settings that are adapted after every generation.

*Learning rate.* The cosine between a step and the next estimate is positive if the step was too short, zero after an
exact line search, and negative if the step went too far. After an infinitely short step it would be the estimate's
squared cosine with the true direction. The learning rate grows while the cosine is above 0.4 of that, and shrinks
otherwise.

*Sigma.* Over antithetic pairs, ``f₊`` and ``f₋``, the linear share ``Var(f₊ - f₋)/(Var(f₊ - f₋) + Var(f₊ + f₋))`` is
near 1 if the fitness is linear over a distance of sigma. Above 0.85, sigma grows. Below, either the fitness is curved
and sigma is too large, or the fitness is noisy or coarse and sigma is too small. To tell these apart, sigma alternates
by ±15 %. If the mean fitness is better with the smaller sigma, the fitness is curved and sigma shrinks. Otherwise sigma
grows, up to the size of the weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from .._utils import validation
from ..diagnostics.agreement import random_cosine
from ..diagnostics.signal import squared_cosine_of
from ..diagnostics.spread import linear_share, odd_and_even, tie_probability
from ..fitness.scores import CheckedScores
from ..update import OptimizerFactory

# Decay of the exponential averages, which cover about five generations.
_MEMORY = 0.8
# The learning rate stays at this share of the agreement after a very short step.
_AGREEMENT = 0.4
# Largest change of the learning rate's natural logarithm in a generation.
_RATE_CHANGE = 0.2
# The linear share at which sigma stays; change of log(sigma) per unit of the share; change if the share says nothing.
_LINEAR, _SIGMA_CHANGE, _BLIND_CHANGE = 0.85, 0.4, 0.05
# Amplitude of the alternation of log(sigma); the tie probability above which sigma changes.
_ALTERNATION, _TIES = 0.15, 0.05


# A number, or "auto": adapted after every generation.
Setting = float | Literal["auto"]

# Initial values of adapted settings; the step is in units of sigma.
_FIRST_SIGMA, _FIRST_STEP = 0.1, 0.3


def first_settings(learning_rate: Setting, sigma: Setting, optimizer: OptimizerFactory | None) -> tuple[float, float]:
    """Return the learning rate and sigma of the first generation."""
    first_sigma = _FIRST_SIGMA if sigma == "auto" else sigma
    if learning_rate != "auto":
        return learning_rate, first_sigma
    plain = optimizer is None or getattr(optimizer, "func", optimizer) is torch.optim.SGD
    # The plain step is in units of sigma. Steps of Adam and most others are not.
    unit = 1.0 if plain else validation.check_real("sigma", first_sigma, positive=True)
    return _FIRST_STEP * unit, first_sigma


@dataclasses.dataclass(frozen=True)
class Facts:
    """Measurements of a generation, from which settings are adapted.

    Attributes:
        agreement: The cosine between its estimate and the step before it.
        possible: Estimate of the squared cosine between its estimate and the true direction.
        weights: Number of trained weights, ``D``.
        size: Root mean square of the weights.
        sigma: Standard deviation of the perturbations.
        linear_share: Linear share of the pairs' variance, from 0 to 1; None if there are no pairs.
        mean: The mean fitness, with its standard error.
        ties: The probability that two members have the same fitness.
    """

    agreement: float
    possible: float
    weights: int
    size: float
    sigma: float
    linear_share: float | None
    mean: tuple[float, float]
    ties: float


def facts_of(metrics: Mapping[str, Any], scores: CheckedScores, weights: int, pairs: bool) -> Facts:
    """Return the measurements of a generation.

    Args:
        metrics: Metrics of the generation.
        scores: Scores of its members.
        weights: Number of trained weights, ``D``.
        pairs: Whether members ``2k`` and ``2k + 1`` are antithetic.
    """
    size = metrics["update_norm"] / metrics["relative_update"] if metrics["relative_update"] else 0.0
    fitness = scores.means.numpy()
    averages = odd_and_even(fitness)[1] if pairs else fitness
    return Facts(
        metrics["agreement"],
        squared_cosine_of(metrics["split_half_cosine"]),
        weights,
        size / math.sqrt(max(1, weights)),
        metrics["sigma"],
        linear_share(fitness) if pairs else None,
        (float(averages.mean()), float(averages.std()) / math.sqrt(len(averages))),
        tie_probability(fitness),
    )


def first_state() -> dict[str, Any]:
    """Return the state of an :class:`Adaptation` before the first generation."""
    averages: dict[str, Any] = dict.fromkeys(("agreement", "possible", "ties", "curvature"), 0.0)
    return {**averages, "linear_share": 1.0, "generations": 0, "means": [], "offset": 0.0}


class Adaptation:
    """Computes the factors by which settings change after a generation.

    Args:
        state: Averages over past generations, which are updated in place; see :func:`first_state`.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def after(self, facts: Facts, learning_rate: bool, sigma: bool) -> tuple[float, float]:
        """Return the factors for the learning rate and for sigma; 1 for a setting that is not adapted."""
        self.state["generations"] += 1
        return self._rate(facts) if learning_rate else 1.0, self._sigma(facts) if sigma else 1.0

    def _average(self, key: str, value: float) -> float:
        self.state[key] = _MEMORY * self.state[key] + (1 - _MEMORY) * value
        return float(self.state[key])

    def _rate(self, facts: Facts) -> float:
        if self.state["generations"] == 1:
            # There is no step to compare with.
            return 1.0
        agreement = self._average("agreement", facts.agreement)
        possible = self._average("possible", facts.possible)
        # Two standard deviations of the average of random cosines.
        least = 2 * math.sqrt((1 - _MEMORY) / (1 + _MEMORY)) * random_cosine(facts.weights)
        # The same slope on both sides: otherwise, random cosines alone would change the rate.
        share = (agreement - _AGREEMENT * possible) / max(possible, least) / (1 - _AGREEMENT)
        return math.exp(_RATE_CHANGE * max(-1.0, min(1.0, share)))

    def _sigma(self, facts: Facts) -> float:
        assert facts.linear_share is not None
        state = self.state
        share, ties = self._average("linear_share", facts.linear_share), self._average("ties", facts.ties)
        larger = state["generations"] % 2 == 1
        state["means"] = [*state["means"], list(facts.mean)][-3:]
        if len(state["means"]) == 3:
            (before, error_before), (mean, error), (after, error_after) = state["means"]
            # The middle one has the other sigma. Comparing it with both neighbours cancels a steady rise.
            difference = ((before + after) / 2 - mean) * (-1 if larger else 1)
            deviation = math.sqrt(error**2 + (error_before**2 + error_after**2) / 4)
            score = difference / deviation if deviation > 0 else 0.0
            self._average("curvature", max(-5.0, min(5.0, score)))
        small = facts.sigma < facts.size or facts.size == 0
        if ties > _TIES:
            change = 2 * _BLIND_CHANGE if small else -2 * _BLIND_CHANGE
        elif share >= _LINEAR or state["curvature"] > 1:
            change = _SIGMA_CHANGE * (share - _LINEAR)
        else:
            change = _BLIND_CHANGE if small else -_BLIND_CHANGE
        offset, state["offset"] = state["offset"], -_ALTERNATION if larger else _ALTERNATION
        return math.exp(change + state["offset"] - offset)
