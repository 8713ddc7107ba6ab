"""The best member of a generation, evaluated again where its score may be luck."""

from __future__ import annotations

import math
import operator
from typing import Any

from ..fitness.scores import CheckedScores

# How often a candidate is evaluated again before it becomes the best member, if it keeps its promise.
TIMES = 2

# Generations between two candidates, at most, where none has kept its promise for long.
_LONGEST = 16


class Retest:
    """Decides whether the best member of a generation becomes the best of the run, where scores are noisy.

    The highest of many noisy scores is mostly luck. A candidate is therefore evaluated again, with other random
    numbers, and counts by what it earns then. Candidates that fail become rarer: the next one is looked at after 1, 2,
    4, … generations, at most 16.
    """

    def __init__(self) -> None:
        self._gap, self._next = 1, 0

    def state(self) -> list[int]:
        """Return what the next decision depends on."""
        return [self._gap, self._next]

    @classmethod
    def of(cls, state: list[int] | None) -> Retest:
        """Return what :meth:`state` was of."""
        retest = cls()
        if state is not None:
            retest._gap, retest._next = state
        return retest

    def is_due(self, generation: int) -> bool:
        """Return whether a candidate of this generation is looked at."""
        return generation >= self._next

    def note(self, generation: int, again: float | None, kept: bool) -> None:
        """Note the outcome of a generation.

        Args:
            generation: Its index.
            again: What its candidate earned, NaN if it was not looked at, None if there was no need to.
            kept: Whether it became the best member.
        """
        if again is None or (math.isnan(again) and not self.is_due(generation)):
            return
        self._gap = 1 if kept else min(_LONGEST, 2 * self._gap)
        self._next = generation + (1 if kept else self._gap // 2)


def earned_again(trainer: Any, checked: CheckedScores) -> float | None:
    """Return what the best member of the trainer's generation earns when it is evaluated again.

    Args:
        trainer: The trainer. (Of type Any, as its module imports this one.)
        checked: The scores of the generation, higher is better.

    Returns:
        The mean of the evaluations, in the fitness function's sign; it stops at the first that lets it fall below the
        best member. NaN if it is not looked at. None if there is no need to, as the fitness function gives the same
        for the same weights, or the member is no candidate.
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
            # NaN is no better either.
            if not sign * mean > best:
                break
        return mean if math.isfinite(mean) else math.nan

    return float(trainer.engine.from_main(evaluate))


def best_of(best: float, first: float, again: float | None, maximize: bool) -> float:
    """Return the best fitness of a run after a generation.

    Args:
        best: Before it.
        first: Of its best member.
        again: What that member has earned when it was evaluated again, or None.
        maximize: Whether higher is better.

    Example:
        >>> best_of(0.5, 0.9, None, True), best_of(0.5, 0.9, 0.6, True), best_of(0.5, 0.9, 0.4, True)
        (0.9, 0.6, 0.5)
    """
    better = operator.gt if maximize else operator.lt
    earned = first if again is None else again
    # NaN is no better than anything.
    return earned if better(first, best) and better(earned, best) else best
