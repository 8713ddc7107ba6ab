"""What a trainer offers of the best member: a copy, and its weights in the model for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from ..fitness.findings import Findings
from ..update.centre import Centre
from .best import copy_with, holding


class BestMember:
    """For a trainer, which keeps the weights of the best member seen so far."""

    model: nn.Module
    _findings: Findings
    _centre: Centre
    _best: Tensor | None
    _best_untrained: dict[str, Tensor]
    # Blocks that are inside best_weights() now.
    _in_best_weights: int = 0

    def _best_values(self) -> dict[str, Tensor]:
        """Return parameters, buffers and untrained parameters of the best member, by their names."""
        if self._best is None:
            return {}
        trained = self._centre.parameters
        kept = {name: value for name, value in self._best_untrained.items() if name not in trained}
        return {**self._centre.unflatten(self._best), **kept}

    def get_best_model(self) -> nn.Module:
        """Return a new module with the weights of the best member seen so far, the ones that earned its score.

        Before the first generation these are the model's own. ``trainer.model`` is the centre, the mean of all members:
        where scores are noisy or training has converged, it is often the better model; compare both on data of their
        own. A noisy fitness function (one that draws random numbers, differs from itself, or has an attribute
        ``noisy = True``) evaluates a member again before it counts as the best, and ``best_fitness`` is what it
        earned then. Members that :meth:`tell` was told of are not evaluated again.

        Raises:
            RuntimeError: A deep copy of the model does not compute what the model itself does; see
                :meth:`best_weights`.
        """
        return copy_with(self.model, self._best_values(), self._findings.sample)

    @contextlib.contextmanager
    def best_weights(self) -> Iterator[nn.Module]:
        """Put the weights of the best member seen so far into the model itself, inside the block.

        Unlike the copy that :meth:`get_best_model` returns, it is the model that you know: closures over it, hooks and
        lists of its modules are right as well. Don't take a step inside the block.

        Yields:
            ``trainer.model``.

        Example:
            >>> import torch
            >>> from eggroll_trainer import EGGROLLTrainer
            >>> model = nn.Linear(3, 1)
            >>> x = torch.ones(8, 3)
            >>> trainer = EGGROLLTrainer(model=model, fitness_fn=lambda m: m(x).mean(), seed=0)
            >>> _ = trainer.step()
            >>> with trainer.best_weights() as best:
            ...     round(best(x).mean().item() - trainer.best_fitness, 5)
            0.0
        """
        self._in_best_weights += 1
        try:
            with holding(self.model, self._best_values()):
                yield self.model
        finally:
            self._in_best_weights -= 1
