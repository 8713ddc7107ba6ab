"""Detects a ``ReduceLROnPlateau`` with the wrong mode in a user's own training loop.

With ``mode="min"`` it lowers the learning rate while the fitness rises. The trainer has no reference to the scheduler,
so we search the objects that refer to the trainer. The search takes some milliseconds. It runs only after the learning
rate has fallen without a scheduler of the trainer's own.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

# Metrics that the user may pass to the scheduler.
_METRICS = ("mean_fitness", "fitness", "best_fitness")


class PlateauWatch:
    """Finds out why the learning rate of a trainer without ``lr_scheduler=`` falls."""

    def __init__(self) -> None:
        self._rate: float | None = None
        self._falls = 0

    def warning(self, trainer: Any) -> str | None:
        """Return a warning about a scheduler with the wrong mode, or None. Called before each generation."""
        rate, before = trainer.learning_rate, self._rate
        self._rate = rate
        if before is None or rate >= before or trainer.lr_scheduler is not None:
            return None
        self._falls += 1
        # Other schedulers lower the rate in every generation: search only after 1, 2, 4, 8, … falls.
        if self._falls & (self._falls - 1):
            return None
        right = "max" if trainer.maximize else "min"
        for state in _plateau_schedulers(trainer):
            metric = next((key for key in _METRICS if state.get("best") in trainer.history.get(key, ())), None)
            if state.get("mode") != right and metric is not None:
                course = "rises" if trainer.maximize else "falls"
                return (
                    f"ReduceLROnPlateau gets {metric}, which {course} if training goes well, but has mode="
                    f"{state.get('mode')!r} and has therefore lowered the learning rate to {rate:g}: make it with"
                    f" mode={right!r}, or pass it to the trainer as lr_scheduler="
                )
        return None


def _plateau_schedulers(trainer: Any) -> Iterator[Mapping[str, Any]]:
    """Iterate over the attributes of schedulers that refer to the trainer."""
    for referrer in gc.get_referrers(trainer):
        if isinstance(referrer, ReduceLROnPlateau):
            yield vars(referrer)
        # For most objects, the referrer is their attribute dictionary.
        elif isinstance(referrer, dict) and referrer.get("optimizer") is trainer and "patience" in referrer:
            yield referrer
