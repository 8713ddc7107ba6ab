"""Plots of runs: fitness with bands, diagnostics, several runs compared. They need the extra ``plot``."""

from .figure import plot_runs
from .runs import RunCurves, load_run

__all__ = ["RunCurves", "load_run", "plot_runs"]
