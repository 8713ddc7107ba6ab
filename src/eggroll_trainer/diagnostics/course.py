"""The course of a run: the data in which symptoms are found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .signal import Signal, squared_cosine_of
from .spread import tie_probability


@dataclasses.dataclass(frozen=True)
class Probe:
    """Further evaluations, made if a run is in trouble.

    Attributes:
        centre: The fitness of the model without perturbation, evaluated twice; higher is better.
    """

    centre: tuple[float, float]

    @property
    def noise(self) -> float:
        """Absolute difference between two evaluations of the same model."""
        return abs(self.centre[0] - self.centre[1])


@dataclasses.dataclass(frozen=True)
class Course:
    """The course of a run so far.

    Attributes:
        history: ``trainer.history``, one entry a generation.
        scores: The members' mean fitness in the last generation, ``[N]``; higher is better.
        maximize: Whether higher is better for the fitness in the history.
        weights: Number of trained weights, ``D``.
        planned: Number of generations that the run is to have in all; None if unknown.
        signal: The signal in the last estimate; None if unknown.
        optimizer: Name of the optimizer's class.
        fitness_fn: The user's function.
        probe: Evaluates the centre; None if that is not possible.
    """

    history: Mapping[str, Sequence[Any]]
    scores: np.ndarray[Any, Any]
    maximize: bool
    weights: int
    planned: int | None
    signal: Signal | None
    optimizer: str
    fitness_fn: Callable[..., Any]
    probe: Callable[[], Probe] | None = None

    @property
    def generation(self) -> int:
        """Number of generations so far."""
        return len(self.history["mean_fitness"])

    @property
    def means(self) -> np.ndarray[Any, Any]:
        """The mean fitness of each generation; higher is better."""
        return np.asarray(self.history["mean_fitness"], float) * (1.0 if self.maximize else -1.0)

    def shown(self, fitness: float) -> str:
        """Return a fitness as text, in the sign of the user's function."""
        return f"{fitness if self.maximize else -fitness:.4g}"

    @property
    def members(self) -> int:
        """Number of members, ``N``."""
        return len(self.scores)

    def last(self, key: str, count: int = 1) -> list[float]:
        """Return a metric of the last ``count`` generations, or of all if there are fewer."""
        return list(self.history.get(key, ())[-count:])

    def mean(self, key: str, count: int = 1) -> float:
        """Return the mean of a metric over the last generations."""
        return float(np.mean(self.last(key, count)))

    def possible_agreement(self, count: int) -> float:
        """Return the mean ``agreement`` that the last generations would have after very short plain steps."""
        return float(np.mean([squared_cosine_of(halves) for halves in self.last("split_half_cosine", count)]))

    @property
    def sigma(self) -> float:
        """Standard deviation of the perturbations in the last generation."""
        return self.last("sigma")[0]

    @property
    def step_in_sigmas(self) -> float:
        """Root mean square step of a weight, averaged over the last three generations, in units of sigma."""
        return self.mean("update_norm", 3) / math.sqrt(max(1, self.weights)) / self.sigma

    @property
    def path_in_sigmas(self) -> float:
        """The root mean square moves of a weight in all generations added up, in units of sigma."""
        return sum(self.history["update_norm"]) / math.sqrt(max(1, self.weights)) / self.sigma

    @property
    def tie_probability(self) -> float:
        """The probability that two different members have the same fitness."""
        return tie_probability(self.scores)

    def gain(self, first: int = 3, last: int = 10) -> float:
        """Return the gain in mean fitness from the first to the last few generations, in standard errors.

        The error is that of the mean of ``N`` members or the fluctuation of the means from one generation to the next,
        whichever is larger.
        """
        means = self.means
        if len(means) < first + last:
            return 0.0
        spread = float(np.median(self.history["std_fitness"])) / math.sqrt(self.members)
        # From second differences, which are zero for a steady rise.
        error = max(spread, float(np.median(np.abs(np.diff(means, 2))))) * math.sqrt(1 / first + 1 / last)
        difference = float(means[-last:].mean() - means[:first].mean())
        return difference / error if error > 0 else 0.0
