"""An exponential moving average of the weights.

``torch.optim.swa_utils.AveragedModel`` averages in the dtype of the weights. In bf16 or fp16, such an average soon
stops changing, as its steps are rounded away. We average the float32 masters, and save the average in checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.interrupts import delayed_interrupt
from .._utils.validation import check_real
from .callback import Callback, Metrics, Trainer


class WeightAverage(Callback):
    """Averages the weights over the last generations, for evaluation and export. It does not change the run.

    After generation ``t``, the average of the centres ``θ_s`` is ``Σ_s β^(t-s) θ_s / Σ_s β^(t-s)``, over the
    generations that were run with this callback. Averaging reduces the noise of single steps. It helps most if steps
    are long or scores are noisy, and little at the end of a run with a falling learning rate.

    The average is part of the trainer's state, under the name ``weight_average_β``.
    :meth:`~eggroll_trainer.ESTrainer.save` and :meth:`~eggroll_trainer.ESTrainer.load` save and restore it exactly.
    With another decay, it starts anew. With several processes, only the first has it.

    Args:
        decay: ``β``, at least 0 and below 1. The average is over about the last ``1/(1 - β)`` generations: choose a
            tenth of the run.

    Raises:
        TypeError: ``decay`` is not a number.
        ValueError: It is out of range.

    Example:
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> x = torch.randn(64, 20)
        >>> def fitness(model):
        ...     return -(model(x) - x[:, :1]).square().mean()
        >>> trainer = EGGROLLTrainer(model=nn.Linear(20, 1), fitness_fn=fitness, learning_rate=0.3, seed=0)
        >>> average = WeightAverage(decay=0.9)
        >>> _ = trainer.train(60, verbose=False, callback=average)
        >>> trainer.evaluate_fitness(average.model) > trainer.evaluate_fitness(trainer.model)
        True
    """

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = check_real("decay", decay, positive=False)
        if self.decay >= 1:
            raise ValueError(f"decay must be below 1, got {self.decay:g}")
        self._name = f"weight_average_{self.decay!r}".replace(".", "_").replace("-", "_")
        self._trainer: Trainer = None

    def __repr__(self) -> str:
        return f"WeightAverage({self.decay:g})"

    def on_start(self, trainer: Trainer) -> None:
        """Register the average with the trainer, unless a checkpoint has restored it."""
        self._trainer = trainer
        if not hasattr(trainer, self._name):
            trainer.register_state(self._name, {"generation": 0, "weight": 0.0, "parameters": {}})
        # Evaluations of members do not depend on it.
        trainer._extra.unsent.add(self._name)

    def on_generation(self, trainer: Trainer, metrics: Metrics) -> None:
        """Add the weights after this generation to the average."""
        self.update(trainer)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, trainer: Trainer) -> None:
        """Add the current weights to the average. Call it after ``trainer.step()`` in a loop of your own.

        A second call in the same generation changes nothing.

        Args:
            trainer: The trainer.
        """
        self.on_start(trainer)
        state = self._state
        if state["generation"] == trainer.generation:
            return
        with delayed_interrupt():
            state["generation"] = trainer.generation
            state["weight"] = self.decay * state["weight"] + (1 - self.decay)
            averages = state["parameters"]
            for name, value in trainer._centre.weights().items():
                if name in averages:
                    averages[name].lerp_(value, (1 - self.decay) / state["weight"])
                else:
                    # The first generation, or a parameter that has been frozen, and so constant, until now.
                    averages[name] = value.clone()

    @property
    def _state(self) -> dict[str, Any]:
        if self._trainer is None:
            raise RuntimeError("there is no average yet: pass it to train(callback=…), or call update(trainer)")
        state: dict[str, Any] = getattr(self._trainer, self._name)
        return state

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The averages of the trained parameters by name, in float32 or wider; empty before the first generation.

        Raises:
            RuntimeError: No trainer was given yet.
        """
        return dict(self._state["parameters"])

    @property
    def model(self) -> nn.Module:
        """A copy of the model with the averaged weights, and with its current buffers and untrained parameters.

        Raises:
            RuntimeError: No trainer was given yet, or a copy of the model does not compute what the model does. In the
                second case, use :meth:`weights`.
        """
        values = self.parameters
        model: nn.Module = self._trainer._copy_with(values, "WeightAverage.model", "with average.weights() as model: …")
        return model

    @contextlib.contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """Put the averaged weights into the trainer's own model inside the block. Don't take a step in it.

        Yields:
            ``trainer.model``.

        Raises:
            RuntimeError: No trainer was given yet.
        """
        values = self.parameters
        with self._trainer._holding(values) as model:
            yield model
