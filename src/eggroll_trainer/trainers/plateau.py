"""A ``ReduceLROnPlateau`` in a user's own loop that waits for a rising fitness to fall.

It lowers the learning rate for no reason. Only the scheduler knows its mode, and it does not tell its optimizer: it is
looked for among the objects that refer to the trainer. That takes some milliseconds, and is done only after the
learning rate has fallen without a schedule of the trainer's own.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

# What the scheduler may have been given of a generation's metrics.
_METRICS = ("mean_fitness", "fitness", "best_fitness")


class PlateauWatch:
    """Notices when the learning rate of a trainer without ``lr_scheduler=`` falls."""

    def __init__(self) -> None:
        self._rate: float | None = None
        self._falls = 0

    def warning(self, trainer: Any) -> str | None:
        """Return what to say before a generation of a trainer, or None."""
        rate, before = trainer.learning_rate, self._rate
        self._rate = rate
        if before is None or rate >= before or trainer.lr_scheduler is not None:
            return None
        self._falls += 1
        # Other schedulers lower it in every generation: 1, 2, 4, 8, … times is often enough to look.
        if self._falls & (self._falls - 1):
            return None
        right = "max" if trainer.maximize else "min"
        for state in _plateau_schedulers(trainer):
            metric = next((key for key in _METRICS if state.get("best") in trainer.history.get(key, ())), None)
            if state.get("mode") != right and metric is not None:
                course = "rises" if trainer.maximize else "falls"
                return (
                    f"ReduceLROnPlateau gets {metric}, which {course} where training goes well, and has mode="
                    f"{state.get('mode')!r}, so that it has lowered the learning rate to {rate:g}: make it with"
                    f" mode={right!r}, or pass it to the trainer as lr_scheduler="
                )
        return None


def _plateau_schedulers(trainer: Any) -> Iterator[Mapping[str, Any]]:
    """Iterate over the attributes of schedulers that refer to the trainer."""
    for referrer in gc.get_referrers(trainer):
        if isinstance(referrer, ReduceLROnPlateau):
            yield vars(referrer)
        # Where an object has a dictionary of its own, that is what refers.
        elif isinstance(referrer, dict) and referrer.get("optimizer") is trainer and "patience" in referrer:
            yield referrer
