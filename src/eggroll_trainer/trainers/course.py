"""The course of a trainer's run, for diagnostics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._utils.thread_state import restored_thread_state
from ..diagnostics import Course, Probe


def course_of(trainer: Any, means: Tensor, evaluated: bool) -> Course:
    """Return the course of a run.

    Args:
        trainer: The trainer. (Of type Any, as its module imports this one.)
        means: ``[N]``, the fitness of the last generation's members, higher is better.
        evaluated: Whether the trainer's own fitness function gave these scores.
    """
    # Scores passed to ``tell`` come from another function, and a probe would add to the statistics of a learner.
    can_probe = evaluated and trainer._learner is None and trainer.is_main

    sign = 1.0 if trainer.maximize else -1.0

    def probe() -> Probe:
        with restored_thread_state():
            one, other = trainer.evaluate_fitness(trainer.model), trainer.evaluate_fitness(trainer.model)
        return Probe((sign * one, sign * other))

    return Course(
        history=trainer.history,
        scores=means.numpy(),
        maximize=trainer.maximize,
        weights=len(trainer._centre),
        planned=trainer._watch.planned,
        signal=trainer._watch.signal,
        optimizer=type(trainer._centre.optimizer).__name__,
        fitness_fn=trainer._fitness_fn(),
        probe=probe if can_probe else None,
    )
