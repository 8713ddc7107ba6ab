"""Diagnostics: whether an update is signal or noise, and what to change if a run does not learn."""

from .course import Course, Probe
from .layers import LayerFigures, layer_figures
from .signal import Signal, signal_of
from .watch import LearningWarning, Watch

__all__ = ["Course", "LayerFigures", "LearningWarning", "Probe", "Signal", "Watch", "layer_figures", "signal_of"]
