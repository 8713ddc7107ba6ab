"""Monitors whether a trainer learns: adds metrics, and warns about symptoms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from .._utils.stopwatch import Stopwatch
from ..update.estimate import Estimate
from .agreement import Agreement
from .course import Course
from .signal import Signal, signal_of
from .symptoms import SYMPTOMS, is_time

# The parts of a generation whose time is measured.
STATIONS = ("noise", "evaluation", "check", "update")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of an estimate.

    Attributes:
        metrics: Entries for the metrics of its generation.
        signal: The signal in it; None if that is not known.
    """

    metrics: dict[str, float]
    signal: Signal | None


class LearningWarning(RuntimeWarning):
    """A run does not learn, or learns more slowly than it could. The message gives the evidence and what to change.

    Example:
        >>> import warnings
        >>> warnings.filterwarnings("ignore", category=LearningWarning)  # to silence them
    """


class Watch:
    """Monitors a run.

    Args:
        step: A sample of the last step of the run, ``[k]``, to go on from; None for a new run.

    Attributes:
        agreement: Compares estimates with steps.
        signal: The signal in the last estimate, or None.
        planned: Number of generations that the run is to have in all, or None.
        stopwatch: Seconds of the last generation, by part.
    """

    def __init__(self, step: Tensor | None = None) -> None:
        self.agreement = Agreement(step)
        self.signal: Signal | None = None
        self.planned: int | None = None
        self.stopwatch = Stopwatch(STATIONS)
        self._told: dict[str, int] = {}

    def timing(self, station: str) -> AbstractContextManager[None]:
        """Return a context manager that counts the time of its block for a part of the generation."""
        return self.stopwatch.timing(station)

    def measure(self, estimate: Estimate) -> Measured:
        """Return the measurements of an estimate, and change nothing."""
        signal = signal_of(estimate)
        metrics: dict[str, float] = {"agreement": self.agreement.cosine(estimate.gradient)}
        if signal is not None:
            metrics["grad_norm"] = math.sqrt(signal.length) / estimate.scale
            metrics["split_half_cosine"] = signal.split_half_cosine
            metrics["explained_share"] = signal.explained_share
        return Measured(metrics, signal)

    def accept(self, measured: Measured, step: Tensor) -> None:
        """Record the measurements of the estimate that the step was made from, and a sample of the step, ``[k]``."""
        self.signal, self.agreement.step = measured.signal, step

    def look(
        self, course: Callable[[], Course], generation: int, tell: Callable[[str, str, type[RuntimeWarning]], Any]
    ) -> None:
        """Look for symptoms in some of the generations, and warn about at most one.

        Args:
            course: Returns the course of the run.
            generation: Number of the last generation, counted from 1.
            tell: Called with a message, its kind and the class of the warning, once for each kind.
        """
        if not is_time(generation):
            return
        facts = course()
        for kind, symptom in SYMPTOMS.items():
            with self.timing("check"):
                message = None if kind in self._told else symptom(facts)
            if message is not None:
                self._told[kind] = generation
                tell(message, kind, LearningWarning)
                # One warning at a time: other symptoms may have the same cause.
                return

    def status(self, history: Mapping[str, Sequence[float]]) -> str | None:
        """Return ``"green"``, ``"yellow"`` or ``"red"``; None if the signal in the estimates is not known.

        Red for twenty generations after a symptom was found; else green if the mean split-half cosine of the last ten
        generations is two standard errors above zero; else yellow.
        """
        if self.signal is None:
            return None
        cosines = history["split_half_cosine"][-10:]
        if self._told and len(history["split_half_cosine"]) < max(self._told.values()) + 20:
            return "red"
        error = self.signal.split_half_error / math.sqrt(len(cosines))
        return "green" if sum(cosines) / len(cosines) > 2 * error else "yellow"
