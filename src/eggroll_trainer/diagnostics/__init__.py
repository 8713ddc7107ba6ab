"""Diagnostics: is it signal or noise, and what to do where it does not learn."""

from .course import Course, Probe
from .signal import Signal, signal_of
from .watch import LearningWarning, Watch

__all__ = ["Course", "LearningWarning", "Probe", "Signal", "Watch", "signal_of"]
