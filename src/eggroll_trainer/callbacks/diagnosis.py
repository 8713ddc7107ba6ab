"""Measures the step of every k-th generation for each parameter, and what the time was spent on."""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.validation import check_int
from ..diagnostics.layers import LayerFigures, layer_figures, table
from .callback import Callback, Metrics, Trainer


class Diagnosis(Callback):
    """Measures in every tenth generation, say, what the step does to each parameter and what the time is spent on.

    ``print(diagnosis)`` shows a table of the last generation that was measured. The metrics of these generations also
    get ``layers`` and ``seconds_by_station``. Loggers after this callback in the list write them, for example as
    ``layers/0.weight/relative_update``. The other generations cost nothing, except that the one before copies the
    weights.

    Args:
        every: Measure generations whose number is divisible by this.

    Attributes:
        layers: The last :class:`~eggroll_trainer.diagnostics.LayerFigures`, by parameter.
        seconds: What the time of that generation was spent on; see :attr:`ESTrainer.seconds`.
        generation: Number of that generation, counted from 1; 0 before the first.

    Raises:
        TypeError: ``every`` is not an integer.
        ValueError: It is less than 1.

    Example:
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> x = torch.randn(32, 3)
        >>> trainer = EGGROLLTrainer(model=torch.nn.Linear(3, 1), fitness_fn=lambda m: -m(x).square().mean(), seed=0)
        >>> diagnosis = Diagnosis(every=5)
        >>> _ = trainer.train(10, verbose=False, callback=diagnosis)
        >>> diagnosis.generation, list(diagnosis.layers)
        (10, ['weight', 'bias'])
    """

    def __init__(self, every: int = 10) -> None:
        self.every = check_int("every", every, 1)
        self.layers: dict[str, LayerFigures] = {}
        self.seconds: dict[str, float] = {}
        self.generation = self._members = 0
        self._before: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"Diagnosis(every={self.every})"

    def __str__(self) -> str:
        """Return a table of the parameters, and a line about the time."""
        if not self.generation:
            return f"{self!r}: no generation has been measured yet"
        total = sum(self.seconds.values())
        shares = ", ".join(f"{name} {value / total:.0%}" for name, value in self.seconds.items()) if total else ""
        rate = f"; {self._members / total:,.0f} evaluations/s" if total else ""
        return f"{table(self.layers)}\ngeneration {self.generation}: {total:.3g} s ({shares}{rate})"

    def on_start(self, trainer: Trainer) -> None:
        """Copy the weights if the next generation is to be measured."""
        self._copy_weights(trainer)

    def on_generation(self, trainer: Trainer, metrics: Metrics) -> None:
        """Measure the generation if its number is divisible by ``every``."""
        if trainer.generation % self.every == 0 and self._before:
            groups = trainer.param_groups
            dtypes = {
                name: p.dtype for group in groups for name, p in zip(group["names"], group["params"], strict=True)
            }
            self.layers = layer_figures(self._before, trainer._centre.weights(), dtypes, trainer._watch.signal)
            self.seconds, self.generation = trainer.seconds, trainer.generation
            self._members = trainer.population_size
            metrics["layers"] = {name: figures.plain() for name, figures in self.layers.items()}
            metrics["seconds_by_station"] = dict(self.seconds)
        self._copy_weights(trainer)

    @torch.no_grad()
    def _copy_weights(self, trainer: Trainer) -> None:
        self._before = {}
        if (trainer.generation + 1) % self.every == 0:
            values = trainer._centre.weights().items()
            self._before = {name: value.clone() for name, value in values if name in trainer._trained}
