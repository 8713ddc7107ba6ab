"""What a trainer keeps to see whether it learns: it adds to the metrics, and tells symptoms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..update.estimate import Estimate
from .agreement import Agreement
from .course import Course
from .signal import Signal, signal_of
from .symptoms import SYMPTOMS, is_time


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an estimate shows.

    Attributes:
        metrics: For the metrics of its generation.
        signal: The signal in it, where that is known.
    """

    metrics: dict[str, float]
    signal: Signal | None


class LearningWarning(RuntimeWarning):
    """A run does not learn, or learns more slowly than it could; the message says what shows it and what to change.

    Example:
        >>> import warnings
        >>> warnings.filterwarnings("ignore", category=LearningWarning)  # for whoever knows
    """


class Watch:
    """Watches a run.

    Attributes:
        agreement: Compares estimates with steps.
        signal: The signal in the last estimate.
        planned: Generations that the run is to have in all, or None.
    """

    def __init__(self, step: Tensor | None = None) -> None:
        self.agreement = Agreement(step)
        self.signal: Signal | None = None
        self.planned: int | None = None
        self._told: dict[str, int] = {}

    def measure(self, estimate: Estimate) -> Measured:
        """Return what an estimate shows, and change nothing."""
        signal = signal_of(estimate)
        metrics: dict[str, float] = {"agreement": self.agreement.cosine(estimate.gradient)}
        if signal is not None:
            metrics["split_half_cosine"] = signal.split_half_cosine
            metrics["explained_share"] = signal.explained_share
        return Measured(metrics, signal)

    def accept(self, measured: Measured, step: Tensor) -> None:
        """Keep what the step was made of, and a sample of the step, ``[k]``."""
        self.signal, self.agreement.step = measured.signal, step

    def look(
        self, course: Callable[[], Course], generation: int, tell: Callable[[str, str, type[RuntimeWarning]], Any]
    ) -> None:
        """Look for symptoms, if it is time.

        Args:
            course: Makes the course of the run.
            generation: The last one, counted from 1.
            tell: Gets a message, its kind and the class of the warning; each kind is told once.
        """
        if not is_time(generation):
            return
        facts = course()
        for kind, symptom in SYMPTOMS.items():
            message = None if kind in self._told else symptom(facts)
            if message is not None:
                self._told[kind] = generation
                tell(message, kind, LearningWarning)
                # One thing at a time: what else is wrong may follow from it.
                return

    def status(self, history: Mapping[str, Sequence[float]]) -> str | None:
        """Return a traffic light: green, yellow or red; None where the signal in the estimates is not known.

        Green where the split-half cosine of the last ten generations is two standard errors above zero, yellow where it
        cannot be told from noise, and red for twenty generations after a symptom was found.
        """
        if self.signal is None:
            return None
        cosines = history["split_half_cosine"][-10:]
        if self._told and len(history["split_half_cosine"]) < max(self._told.values()) + 20:
            return "red"
        error = self.signal.split_half_error / math.sqrt(len(cosines))
        return "green" if sum(cosines) / len(cosines) > 2 * error else "yellow"
