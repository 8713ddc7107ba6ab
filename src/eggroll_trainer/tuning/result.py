"""The result of a search for settings."""

from __future__ import annotations

import dataclasses
from os import PathLike
from typing import Any


@dataclasses.dataclass(frozen=True)
class SigmaTrial:
    """A generation with one sigma.

    Attributes:
        sigma: Sigma of the first parameter group.
        linear_share: The share of the fitness' variance that changes sign with the perturbation: 1 if the fitness is
            linear over a distance of sigma, less if it is curved, noisy or too coarse.
        ties: The probability that two different members have the same fitness.
        mean_fitness: Mean fitness of the members.
        std_error: Standard error of this mean.

    Example:
        >>> SigmaTrial(sigma=0.1, linear_share=0.93, ties=0.0, mean_fitness=-1.2).linear_share
        0.93
    """

    sigma: float
    linear_share: float
    ties: float
    mean_fitness: float
    std_error: float = 0.0


@dataclasses.dataclass
class RateTrial:
    """Some generations with one learning rate.

    Attributes:
        learning_rate: Learning rate of the first parameter group.
        fitness: The mean fitness of each generation.
        agreement: The cosine between each generation's estimate and the step before it; negative if steps went too far.

    Example:
        >>> RateTrial(0.1, [-1.2, -1.1]).fitness[-1]
        -1.1
    """

    learning_rate: float
    fitness: list[float] = dataclasses.field(default_factory=list)
    agreement: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The settings that were found, and all trials.

    Attributes:
        sigma: The sigma that was found, for the first parameter group.
        learning_rate: The learning rate that was found, for the first parameter group.
        generations: Number of generations that the search took.
        sigmas: The trials of sigmas.
        rates: The trials of learning rates.

    Example:
        >>> print(Tuning(0.1, 0.3, 12, [SigmaTrial(0.1, 0.93, 0.0, -1.2)], [RateTrial(0.3, [-1.2, -0.9])]))
        sigma=0.1, learning_rate=0.3 (12 generations)
        sigma       linear share  ties  mean fitness
        0.1                 0.93    0%  -1.2  ←
        learning rate  generations  mean fitness
        0.3                      2  -0.9  ←
    """

    sigma: float
    learning_rate: float
    generations: int
    sigmas: list[SigmaTrial]
    rates: list[RateTrial]

    def __str__(self) -> str:
        """Return a table of the trials."""
        lines = [f"sigma={self.sigma:.3g}, learning_rate={self.learning_rate:.3g} ({self.generations} generations)"]
        if self.sigmas:
            lines.append("sigma       linear share  ties  mean fitness")
            lines += [
                f"{trial.sigma:<10.3g}  {trial.linear_share:12.2f}  {trial.ties:4.0%}  {trial.mean_fitness:.5g}"
                + ("  ←" if trial.sigma == self.sigma else "")
                for trial in self.sigmas
            ]
        if self.rates:
            lines.append("learning rate  generations  mean fitness")
            lines += [
                f"{trial.learning_rate:<13.3g}  {len(trial.fitness):11d}  {trial.fitness[-1]:.5g}"
                + ("  ←" if trial.learning_rate == self.learning_rate else "")
                for trial in self.rates
            ]
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Plot the trials; needs matplotlib.

        Args:
            path: File to write, in the format of its ending. If None, the figure is only returned.

        Returns:
            The ``matplotlib.figure.Figure``.
        """
        from .plot import figure_of

        figure = figure_of(self)
        if path is not None:
            figure.savefig(path)
        return figure
