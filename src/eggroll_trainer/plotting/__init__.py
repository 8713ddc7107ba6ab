"""Plots of one run or several: fitness with bands, and diagnostics. They need the extra ``plot``."""

from .figure import plot_runs
from .runs import RunCurves, load_run

__all__ = ["RunCurves", "load_run", "plot_runs"]
