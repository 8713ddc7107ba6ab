"""Evaluates the best member of a generation again if scores are noisy, as its score may be luck."""

from __future__ import annotations

import math
import operator
from typing import Any

from ..fitness.scores import CheckedScores

# Evaluations that a candidate must pass to become the best member.
TIMES = 2

# The longest wait between two candidates, in generations, after candidates have failed.
_LONGEST = 16


class Retest:
    """Decides when the best member of a generation is evaluated again, if scores are noisy.

    The highest of many noisy scores is mostly luck. A candidate for the best of the run is therefore evaluated again
    with other random numbers, and its fitness is the result of that. After a candidate has failed, the next one is
    evaluated 1, 2, 4, … generations later, at most 16.
    """

    def __init__(self) -> None:
        self._gap, self._next = 1, 0

    def state(self) -> list[int]:
        """Return the state that the next decision depends on, for a checkpoint."""
        return [self._gap, self._next]

    @classmethod
    def from_state(cls, state: list[int] | None) -> Retest:
        """Return the object whose :meth:`state` this is."""
        retest = cls()
        if state is not None:
            retest._gap, retest._next = state
        return retest

    def is_due(self, generation: int) -> bool:
        """Return whether a candidate of this generation is evaluated again."""
        return generation >= self._next

    def note(self, generation: int, again: float | None, kept: bool) -> None:
        """Record the outcome of a generation.

        Args:
            generation: Its number.
            again: What :func:`earned_again` returned.
            kept: Whether its candidate became the best member.
        """
        if again is None or (math.isnan(again) and not self.is_due(generation)):
            return
        self._gap = 1 if kept else min(_LONGEST, 2 * self._gap)
        self._next = generation + (1 if kept else self._gap // 2)


def earned_again(trainer: Any, checked: CheckedScores) -> float | None:
    """Evaluate the best member of the trainer's generation again, and return its fitness.

    Args:
        trainer: The trainer. (Of type Any, as its module imports this one.)
        checked: The scores of the generation, higher is better.

    Returns:
        The mean of the evaluations, in the fitness function's sign. They end when their mean is no better than the
        best fitness so far. NaN if the candidate is skipped. None if the fitness function is not noisy, or the first
        score is no better than the best fitness so far.
    """
    sign = 1 if trainer.maximize else -1
    best = sign * trainer.best_fitness
    if not trainer._findings.noisy(trainer._fitness_fn()) or float(checked.means[checked.best]) <= best:
        return None
    if not trainer._retest.is_due(trainer.generation + 1):
        return math.nan

    def evaluate() -> float:
        earned: list[float] = []
        while len(earned) < TIMES:
            earned.append(trainer._evaluator.evaluate_again(checked.best, len(earned)))
            mean = sum(earned) / len(earned)
            # False for NaN too.
            if not sign * mean > best:
                break
        return mean if math.isfinite(mean) else math.nan

    return float(trainer.engine.from_main(evaluate))


def best_of(best: float, first: float, again: float | None, maximize: bool) -> float:
    """Return the best fitness of a run after a generation.

    Args:
        best: The best fitness before it.
        first: The fitness of the generation's best member.
        again: The fitness of that member when evaluated again; NaN if it was skipped, None if there was no need.
        maximize: Whether higher is better.

    Example:
        >>> best_of(0.5, 0.9, None, True), best_of(0.5, 0.9, 0.6, True), best_of(0.5, 0.9, 0.4, True)
        (0.9, 0.6, 0.5)
    """
    better = operator.gt if maximize else operator.lt
    earned = first if again is None else again
    # Comparisons with NaN are False: a skipped candidate is not taken.
    return earned if better(first, best) and better(earned, best) else best
