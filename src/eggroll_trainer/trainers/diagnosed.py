"""What a trainer says of its run besides the metrics: a traffic light, and where the time goes."""

from __future__ import annotations

from typing import Any

from ..diagnostics import Watch


class Diagnosed:
    """For a trainer, which is watched."""

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
        """What the last generation took in this process, by station.

        ``noise``: drawing random numbers; ``evaluation``: the fitness function and the model's forwards, with the wait
        for other processes; ``check``: evaluating members alone to compare, in generations 1, 2, 4, 8, …, and looking
        for symptoms; ``update``: everything from the scores to the new weights. On an accelerator, which works on
        while the program goes on, noise is counted where it is waited for.

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
