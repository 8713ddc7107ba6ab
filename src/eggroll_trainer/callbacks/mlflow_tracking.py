"""Logs to MLflow, on a tracking server or in a local store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .callback import Trainer
from .extras import needs
from .logger import Logger, numbers, settings_of, texts


class MLflow(Logger):
    """Logs all numbers of the metrics, and the settings. Texts become tags.

    Args:
        run_name: Name of the run. A process that resumes from a checkpoint continues the newest run with this name.
        experiment: Name of the experiment. It is created if it does not exist.
        tracking_uri: The store, such as ``http://…`` or ``sqlite:///mlflow.db``; MLflow's default if None.

    Attributes:
        run_id: Identifier of the run for MLflow's client. Use it to log artifacts.

    Raises:
        ImportError: mlflow is not installed.
    """

    def __init__(self, run_name: str, *, experiment: str = "eggroll", tracking_uri: str | None = None) -> None:
        needs("mlflow", "MLflow", "mlflow")
        self.run_name, self.experiment, self.tracking_uri = run_name, experiment, tracking_uri
        self.run_id: str | None = None
        self._client: Any = None
        self._logged = 0
        self._texts: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.run_name!r}, experiment={self.experiment!r})"

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """Exceptions of the client if the server cannot be reached."""
        from mlflow.exceptions import MlflowException

        return (OSError, MlflowException)

    def on_start(self, trainer: Trainer) -> None:
        """Begin a run, or continue it."""
        from mlflow import MlflowClient

        self._client = client = MlflowClient(self.tracking_uri)
        experiment = client.get_experiment_by_name(self.experiment)
        place = client.create_experiment(self.experiment) if experiment is None else experiment.experiment_id
        self.run_id, self._logged = self._before(place) if trainer.generation else None, 0
        if self.run_id is not None:
            # A resumed run repeats generations bitwise, so what was logged stays valid.
            history = client.get_metric_history(self.run_id, "generation")
            self._logged = max((int(metric.value) for metric in history), default=0)
            client.update_run(self.run_id, status="RUNNING")
            return
        self.run_id = client.create_run(place, run_name=self.run_name).info.run_id
        for key, value in settings_of(trainer).items():
            client.log_param(self.run_id, key, value)

    def log(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        """Log a generation, unless it was logged before the run was resumed."""
        from mlflow.entities import Metric

        step, now = trainer.generation, int(1000 * time.time())
        if step <= self._logged:
            return
        values = [Metric(_name(key), float(value), now, step) for key, value in numbers(metrics).items()]
        self._client.log_batch(self.run_id, metrics=values)
        for key, text in texts(metrics).items():
            if self._texts.get(key) != text:
                self._client.set_tag(self.run_id, key, text)
                self._texts[key] = text
        self._logged = step

    def on_end(self, trainer: Trainer) -> None:
        """End the run."""
        if self.run_id is not None:
            self._client.set_terminated(self.run_id)

    def _before(self, experiment: str) -> str | None:
        """Return the identifier of the newest run with this name, or None."""
        # Not by a filter expression, in which names cannot contain quotes.
        runs = self._client.search_runs([experiment], order_by=["attributes.start_time DESC"], max_results=1000)
        return next((str(run.info.run_id) for run in runs if run.info.run_name == self.run_name), None)


def _name(key: str) -> str:
    """Return a metric's name with characters replaced that MLflow does not allow."""
    return "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in key)
