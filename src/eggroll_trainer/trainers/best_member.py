"""Access to the best member of a run: as a copy, or temporarily in the user's model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ..fitness.findings import Findings
from ..update.centre import Centre
from .best import copy_with, holding


class BestMember:
    """Mixin for trainers, which keep the weights of the best member seen so far."""

    model: nn.Module
    _findings: Findings
    _centre: Centre
    _best: Tensor | None
    _best_untrained: dict[str, Tensor]
    # Number of open blocks in which the model holds other weights.
    _held: int = 0

    def _best_values(self) -> dict[str, Tensor]:
        """Return parameters, buffers and untrained parameters of the best member, by their names."""
        if self._best is None:
            return {}
        trained = self._centre.parameters
        kept = {name: value for name, value in self._best_untrained.items() if name not in trained}
        return {**self._centre.unflatten(self._best), **kept}

    def get_best_model(self) -> nn.Module:
        """Return a new module with the perturbed weights of the best member seen so far.

        Before the first generation these are the model's own. ``trainer.model`` holds the centre, the mean of all
        members. It is often the better model if scores are noisy or training has converged: compare both on held-out
        data.

        A noisy fitness function draws random numbers, returns different values for the same weights, or has an
        attribute ``noisy = True``. With one, a member is evaluated again before it counts as the best, and
        ``best_fitness`` is the result of that. Members scored by :meth:`tell` are not evaluated again.

        Raises:
            RuntimeError: A deep copy of the model computes something else than the model; use :meth:`best_weights`.
        """
        return self._copy_with(self._best_values(), "get_best_model()", "with trainer.best_weights() as model: …")

    @contextlib.contextmanager
    def best_weights(self) -> Iterator[nn.Module]:
        """Inside the block, give the model itself the weights of the best member seen so far.

        Unlike with the copy that :meth:`get_best_model` returns, closures, hooks and lists that refer to the model see
        these weights too. Don't take a step inside the block.

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
        with self._holding(self._best_values()) as model:
            yield model

    def _copy_with(self, values: Mapping[str, Tensor], caller: str, instead: str) -> nn.Module:
        """Return a copy of the model with other values of some parameters and buffers; see :func:`.copy_with`."""
        return copy_with(self.model, values, self._findings.sample, caller, instead)

    @contextlib.contextmanager
    def _holding(self, values: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Put other values of some parameters and buffers into the model inside the block."""
        self._held += 1
        try:
            with holding(self.model, values):
                yield self.model
        finally:
            self._held -= 1
