"""Plots of runs: fitness with bands, diagnostics, several runs compared. They need the extra ``plot``."""

from .figure import plot_runs
from .runs import RunCurves, load_run
from .styles import STYLES, Style

__all__ = ["STYLES", "RunCurves", "Style", "load_run", "plot_runs"]
