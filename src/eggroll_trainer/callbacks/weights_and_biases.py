"""Logs to Weights & Biases, on its server or offline in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .callback import Trainer
from .extras import needs
from .logger import Logger, numbers, scores_of, settings_of, texts


class WeightsAndBiases(Logger):
    """Logs all numbers and texts of the metrics, histograms of the members' fitness, and the settings.

    Args:
        project: Name of the project.
        id: Identifier of the run, made of letters, digits and hyphens. A process that resumes from a checkpoint
            continues the run with this identifier. If None, W&B chooses one, and every process makes a new run.
        histogram_every: Number of generations between histograms; 0 for none.
        options: Further arguments of ``wandb.init``, such as ``mode="offline"``, ``dir=…``, ``name=…``, ``group=…``.

    Attributes:
        run: The run that ``wandb.init`` has returned, during training. Use it to log images or tables.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, project: str, *, id: str | None = None, histogram_every: int = 10, **options: Any) -> None:
        needs("wandb", "WeightsAndBiases", "wandb")
        self.project, self.id, self.histogram_every, self.options = project, id, histogram_every, options
        self.run: Any = None
        self._logged = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.project!r}, id={self.id!r})"

    def on_start(self, trainer: Trainer) -> None:
        """Begin a run, or continue it."""
        import wandb

        goes_on = {"id": self.id, "resume": "allow"} if self.id is not None else {}
        options = {"config": settings_of(trainer), **goes_on, **self.options}
        self.run = wandb.init(project=self.project, **options)
        # Later calls of train continue this run.
        self.id = self.run.id
        # A resumed run repeats generations bitwise, so what was logged stays valid. W&B refuses earlier steps.
        self._logged = max(self._logged if trainer.generation else 0, int(self.run.step or 0) - 1)

    def log(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        """Log a generation, unless it was logged before the run was resumed."""
        import wandb

        step = trainer.generation
        if step <= self._logged:
            return
        values: dict[str, Any] = {**numbers(metrics), **texts(metrics)}
        if self.histogram_every and step % self.histogram_every == 0:
            scores = scores_of(trainer)
            values["scores"] = wandb.Histogram(scores[scores.isfinite()].cpu().numpy())
        self.run.log(values, step=step)
        self._logged = step

    def on_end(self, trainer: Trainer) -> None:
        """End the run."""
        if self.run is not None:
            self.run.finish()
            self.run = None
