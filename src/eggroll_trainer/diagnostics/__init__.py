"""Diagnostics: whether an update is signal or noise, and what to change if a run does not learn."""

from .course import Course, Probe
from .signal import Signal, signal_of
from .watch import LearningWarning, Watch

__all__ = ["Course", "LearningWarning", "Probe", "Signal", "Watch", "signal_of"]
