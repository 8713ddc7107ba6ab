"""The base class of loggers, and functions that extract numbers and texts from metrics."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from .._utils.interrupts import delayed_interrupt
from .callback import Callback, Metrics, Trainer, name_of


class Logger(Callback, ABC):
    """A callback that logs every generation. A Ctrl-C takes effect after the logging.

    If logging fails, it issues a warning, and training goes on.
    """

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """Exceptions for failures that don't end training, such as a full disk or a lost connection."""
        return (OSError,)

    @abstractmethod
    def log(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of a generation."""

    def on_generation(self, trainer: Trainer, metrics: Metrics) -> None:
        """Log the metrics of a generation."""
        try:
            with delayed_interrupt():
                self.log(trainer, metrics)
        except self.failures as error:
            warnings.warn(f"{name_of(self)} could not write, but training goes on: {error}", stacklevel=2)


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float | int]:
    """Return the numbers among some values by name. Numbers in a nested dictionary are named ``NAME/KEY``.

    Example:
        >>> import torch
        >>> numbers({"fitness": torch.tensor(0.5), "layers": {"0.weight": 1}, "status": "ok", "solved": True})
        {'fitness': 0.5, 'layers/0.weight': 1, 'solved': 1}
    """
    return dict(_numbers(metrics, prefix))


def _numbers(metrics: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float | int]]:
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
            continue
        # 0-d tensors and arrays, and NumPy scalars.
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()
        if isinstance(value, (int, float)):
            yield f"{prefix}{key}", int(value) if isinstance(value, bool) else value


def texts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts among some values."""
    return {key: value for key, value in metrics.items() if isinstance(value, str)}


def record(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and texts of a generation for JSON. Numbers that are not finite become None."""
    finite = {k: v if math.isfinite(v) else None for k, v in numbers(metrics).items()}
    return {**finite, **texts(metrics)}


def scores_of(trainer: Trainer) -> Any:
    """Return the members' fitness in the last generation, ``[N]``: means, if they have scores for several tasks."""
    last = trainer.last_generation
    if last is None:
        return None
    return last.scores if last.scores.ndim == 1 else last.scores.mean(1)


def settings_of(trainer: Trainer) -> dict[str, float | int | str | bool]:
    """Return the settings of a run as hyperparameters: numbers and texts by name."""
    plain = trainer.settings().plain()
    named = {"learning_rate": trainer.learning_rate, "sigma": trainer.sigma, "model": type(trainer.model).__name__}
    for key in ("rank", "anchor_decay"):
        if key in plain["options"][0]:
            named[key] = plain["options"][0][key]
    simple = {key: value for key, value in plain.items() if isinstance(value, (int, float, str)) and value != ""}
    return {**simple, **named}
