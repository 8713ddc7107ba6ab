"""Attributes of a trainer that describe its run: a traffic light, and what the time was spent on."""

from __future__ import annotations

from typing import Any

from ..diagnostics import Watch


class Diagnosed:
    """Adds these attributes to a trainer."""

    history: dict[str, list[Any]]
    _watch: Watch

    @property
    def status(self) -> str | None:
        """``"green"`` if the run learns, ``"yellow"`` if that cannot be told from noise, ``"red"`` after a warning.

        None before the first generation, and if a subclass computes its own update.
        """
        return self._watch.status(self.history)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that this process spent on each part of the last generation.

        * ``noise``: drawing random numbers.
        * ``evaluation``: the fitness function and the model's forwards, and waiting for other processes.
        * ``check``: evaluating members alone for comparison, in generations 1, 2, 4, 8, …, and looking for symptoms.
        * ``update``: everything from the scores to the new weights.

        An accelerator draws the noise in the background, so this time counts for the part that waits for it.

        Example:
            >>> from eggroll_trainer import EGGROLLTrainer
            >>> import torch
            >>> trainer = EGGROLLTrainer(
            ...     model=torch.nn.Linear(3, 1), fitness_fn=lambda m: m(torch.ones(1, 3)).item(), seed=0
            ... )
            >>> _ = trainer.step()
            >>> list(trainer.seconds)
            ['noise', 'evaluation', 'check', 'update']
        """
        return dict(self._watch.stopwatch.seconds)
