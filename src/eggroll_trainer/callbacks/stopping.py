"""Callbacks that end training: without improvement, at a goal, or after some time."""

from __future__ import annotations

import datetime
import math
import time

from .._utils.validation import check_int, check_real
from .callback import Callback, Metrics, Trainer
from .logger import numbers


class EarlyStopping(Callback):
    """Ends training when a metric has not improved for some generations, or has reached a goal.

    With a metric in ``trainer.history``, a resumed run ends where the uninterrupted run would.

    Args:
        patience: Number of generations without improvement after which training ends; None to use only the goal.
        min_delta: Smallest difference from the best value so far that counts as an improvement.
        metric: Name of the metric. The mean fitness of the members is less noisy than the best member's.
        goal: Training ends when the metric is equal to this or better.
        mode: ``"max"`` if higher is better, ``"min"`` if lower is. If None, ``"min"`` if the
            trainer has ``maximize=False``, else ``"max"``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or there is neither a patience nor a goal.

    Example:
        >>> import torch
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> trainer = EGGROLLTrainer(
        ...     model=torch.nn.Linear(3, 1),
        ...     fitness_fn=lambda m: -abs(m(torch.ones(1, 3)).item()),
        ...     learning_rate=0.1,
        ...     seed=0,
        ... )
        >>> result = trainer.train(1000, verbose=False, callback=EarlyStopping(patience=20))
        >>> result["generation"] < 1000
        True
    """

    def __init__(
        self,
        patience: int | None = 50,
        min_delta: float = 0.0,
        metric: str = "mean_fitness",
        goal: float | None = None,
        mode: str | None = None,
    ) -> None:
        if patience is None and goal is None:
            raise ValueError("EarlyStopping needs a patience or a goal, got None for both")
        if mode not in ("max", "min", None):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
        self.patience = None if patience is None else check_int("patience", patience, 1)
        self.min_delta = check_real("min_delta", min_delta, positive=False)
        if goal is not None and (isinstance(goal, (bool, str)) or not math.isfinite(goal)):
            raise ValueError(f"goal must be a finite number, got {goal!r}")
        self.metric, self.goal, self.mode = metric, goal, mode
        self._begin(1)

    def __repr__(self) -> str:
        goal = "" if self.goal is None else f", goal={self.goal:g}"
        return f"EarlyStopping(patience={self.patience}{goal}, metric={self.metric!r})"

    def _begin(self, sign: int) -> None:
        self._sign, self.best, self.waited = sign, -math.inf, 0

    def on_start(self, trainer: Trainer) -> None:
        """Check the generations that were made before, for a run that is resumed."""
        higher_is_better = trainer.maximize if self.mode is None else self.mode == "max"
        self._begin(1 if higher_is_better else -1)
        for value in trainer.history.get(self.metric, []):
            if self._is_over(value):
                raise StopIteration

    def on_generation(self, trainer: Trainer, metrics: Metrics) -> bool:
        """Return whether to end training.

        Raises:
            ValueError: There is no such metric.
        """
        values = numbers(metrics)
        if self.metric not in values:
            raise ValueError(f"there is no metric {self.metric!r} to stop by; there are {', '.join(sorted(values))}")
        return self._is_over(values[self.metric])

    def _is_over(self, value: float) -> bool:
        gain = self._sign * value
        if gain > self.best + self.min_delta:
            self.best, self.waited = gain, 0
        else:
            self.waited += 1
        reached = self.goal is not None and gain >= self._sign * self.goal
        return reached or (self.patience is not None and self.waited >= self.patience)


class TimeLimit(Callback):
    """Ends training before a call of ``train`` takes longer than a time limit.

    It ends training if another generation, as long as the longest of the last ten, would exceed the limit.

    Args:
        seconds: The limit in seconds, or a ``datetime.timedelta``.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not above zero.

    Example:
        >>> import torch
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> trainer = EGGROLLTrainer(model=torch.nn.Linear(3, 1), fitness_fn=lambda m: m(torch.ones(1, 3)).item())
        >>> trainer.train(10**9, verbose=False, callback=TimeLimit(0.1))["stopped_by"]
        'TimeLimit(0.1)'
    """

    def __init__(self, seconds: float | datetime.timedelta) -> None:
        if isinstance(seconds, datetime.timedelta):
            seconds = seconds.total_seconds()
        self.seconds = check_real("seconds", seconds, positive=True)
        self._began = self._last = 0.0
        self._taken: list[float] = []

    def __repr__(self) -> str:
        return f"TimeLimit({self.seconds:g})"

    def on_start(self, trainer: Trainer) -> None:
        """Start the clock."""
        self._began = self._last = time.monotonic()
        self._taken = []

    def on_generation(self, trainer: Trainer, metrics: Metrics) -> bool:
        """Return whether another generation would take too long."""
        now = time.monotonic()
        # The first generation includes warm-up and compilation, so it only counts while it is the only one.
        self._taken = [*self._taken[-9 if len(self._taken) > 1 else 1 :], now - self._last]
        self._last = now
        return now - self._began + max(self._taken) > self.seconds
