"""The figure of one or several runs: the fitness, and below it every other number that changes."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .runs import Array, RunCurves, mean_of_runs
from .styles import LINES, LOOKS, Look, Style, parameters

# Inches. The width is that of a page's text.
_WIDTH, _FITNESS, _PANEL = 7.0, 3.4, 1.5
_COLUMNS = 3

# Of the numbers of one dictionary, such as those of each parameter, more panels would hide the others.
_NESTED = 6

# With more runs, bands are left out, as they would cover each other.
_BANDS = 4


def plot_runs(
    runs: Iterable[RunCurves],
    path: str | PathLike[str] | None = None,
    *,
    style: Style = "light",
    x: str = "generation",
    metrics: Sequence[str] | None = None,
    title: str = "",
) -> Any:
    """Plot the fitness of one or several runs, and below it every other number that changes.

    For a single run, the figure shows the mean fitness with a band of one standard deviation of the members, the best
    member of each generation, the best so far, and evaluations of the centre if there are any. For several runs, it
    shows the mean of each with its band. Runs with the same name, such as several seeds, become one curve: their mean,
    with a band of one standard deviation of the runs.

    Args:
        runs: The runs.
        path: File to write, as PNG, SVG or PDF. If None, the figure is only returned.
        style: ``"light"``, ``"dark"`` for dark pages, or ``"print"`` without colours.
        x: Column of the horizontal axis.
        metrics: Names of the numbers below the fitness, such as ``"layers/0.weight/relative_update"``. If None, all
            that change, without dictionaries of more than six numbers.
        title: Title of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no run, no such column or style, or the file's ending is unknown.

    Example:
        >>> import tempfile
        >>> run = RunCurves("a run", {"mean_fitness": [0.0, 1.0, 1.5], "sigma": [0.3, 0.2, 0.1]})
        >>> figure = plot_runs([run], tempfile.mkdtemp() + "/curve.svg")
        >>> [axes.get_title() for axes in figure.axes]
        ['fitness', 'sigma']
    """
    runs = list(runs)
    if not runs:
        raise ValueError("there is no run to plot")
    options = parameters(style)
    matplotlib = _matplotlib()
    with matplotlib.rc_context(options):
        figure = _drawn(runs, LOOKS[style], x, metrics, title)
        if path is not None:
            _save(figure, Path(path))
    return figure


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return matplotlib


def _save(figure: Any, path: Path) -> None:
    kinds = figure.canvas.get_supported_filetypes()
    kind = path.suffix.lstrip(".").lower()
    if kind not in kinds:
        raise ValueError(f"the file must end in .png, .svg or .pdf, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date, the same runs give the same file.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    figure.savefig(path, metadata=metadata)


def _drawn(runs: list[RunCurves], look: Look, x: str, metrics: Sequence[str] | None, title: str) -> Any:
    # Not with pyplot, which would choose a window system for the process.
    from matplotlib.figure import Figure

    class Shown(Figure):  # type: ignore[misc, unused-ignore]
        def _repr_png_(self) -> bytes:
            # For notebooks.
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    names, notes = _panels(runs, x) if metrics is None else (_known(runs, metrics), "")
    rows = math.ceil(len(names) / _COLUMNS)
    figure = Shown(figsize=(_WIDTH, _FITNESS + rows * _PANEL), layout="constrained")
    grid = figure.add_gridspec(1 + rows, _COLUMNS, height_ratios=[_FITNESS, *[_PANEL] * rows])
    axes = figure.add_subplot(grid[0, :])
    groups: dict[str, list[RunCurves]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    # Runs with the same name have the same colour and line.
    looks = {name: _line(look, k) for k, name in enumerate(groups)}
    if len(runs) == 1:
        _draw_run(axes, runs[0], look, x)
    else:
        _draw_runs(axes, groups, look, x)
    axes.set(title="fitness", xlabel=x)
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 6:
        # A long legend would cover the curves.
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    elif handles:
        axes.legend(loc="best", framealpha=0.8, fontsize=8, handlelength=3.5)
    for i, name in enumerate(names):
        panel = figure.add_subplot(grid[1 + i // _COLUMNS, i % _COLUMNS])
        for run in runs:
            if name in run.columns:
                panel.plot(*_shown(run.x(x), run.columns[name]), linewidth=1.1, **looks[run.name])
        panel.set_title(name.replace("_", " "))
        panel.tick_params(labelsize=7)
    for one in figure.axes:
        one.grid(linewidth=0.5)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    if notes:
        figure.supxlabel(notes, fontsize=7, wrap=True)
    if title:
        figure.suptitle(title)
    return figure


def _line(look: Look, k: int) -> dict[str, Any]:
    return {"color": look.lines[k % len(look.lines)], "linestyle": LINES[k % len(LINES)]}


def _draw_run(axes: Any, run: RunCurves, look: Look, x: str) -> None:
    at, mean, std = run.x(x), run.role("mean"), run.role("std")
    if mean is not None:
        axes.plot(*_shown(at, mean), label="mean of the population", **_line(look, 0))
        _band(axes, at, mean, std, look.lines[0], "± standard deviation of the members")
    for k, (role, label) in enumerate((("member", "best of the generation"), ("best", "best so far")), start=1):
        values = run.role(role)
        if values is not None:
            axes.plot(*_shown(at, values), label=label, linewidth=1.1, **_line(look, k))
    centre = run.role("centre")
    if centre is not None:
        axes.plot(*_shown(at, centre), label="centre", marker="o", markersize=3, **_line(look, 3))
        _band(axes, at, centre, run.role("centre_std"), look.lines[3], None)


def _draw_runs(axes: Any, groups: dict[str, list[RunCurves]], look: Look, x: str) -> None:
    spread: Array | None
    for k, (name, runs) in enumerate(groups.items()):
        if len(runs) > 1:
            at, mean, spread = mean_of_runs(runs, x)
            label = f"{name} ({len(runs)} runs)"
        else:
            found = runs[0].role("mean")
            if found is None:
                continue
            at, mean, spread, label = runs[0].x(x), found, runs[0].role("std"), name
        axes.plot(*_shown(at, mean), label=label, **_line(look, k))
        if len(groups) <= _BANDS:
            _band(axes, at, mean, spread, look.lines[k % len(look.lines)], None)


def _band(axes: Any, at: Array, mean: Array, std: Array | None, color: str, label: str | None) -> None:
    if std is not None:
        there = np.isfinite(mean) & np.isfinite(std)
        low, high = mean[there] - std[there], mean[there] + std[there]
        axes.fill_between(at[there], low, high, color=color, alpha=0.18, linewidth=0, label=label)


def _shown(at: Array, values: Array) -> tuple[Array, Array]:
    """Return the points of a curve whose values are finite."""
    there = np.isfinite(values)
    return at[there], values[there]


def _panels(runs: list[RunCurves], x: str) -> tuple[list[str], str]:
    """Return the names of columns to show, those that change, and a text about the others."""
    names = [name for name in dict.fromkeys(name for run in runs for name in run.others()) if name != x]
    sizes = Counter(name.split("/")[0] for name in names)
    large = [name for name, size in sizes.items() if size > _NESTED]
    changing, constant = [], []
    for name in names:
        if name.split("/")[0] in large:
            continue
        values = np.concatenate([run.columns[name] for run in runs if name in run.columns])
        different = np.unique(values[np.isfinite(values)])
        if len(different) > 1:
            changing.append(name)
        elif len(different) == 1:
            constant.append(f"{name.replace('_', ' ')} {different[0]:.4g}")
    notes = ["constant: " + ", ".join(constant)] if constant else []
    notes += [f"{name}: {sizes[name]} numbers, shown by metrics=[…]" for name in large]
    return changing, "; ".join(notes)


def _known(runs: list[RunCurves], metrics: Sequence[str]) -> list[str]:
    there = sorted({name for run in runs for name in run.columns})
    for name in metrics:
        if name not in there:
            raise ValueError(f"no run has {name!r}; there are {', '.join(there)}")
    return list(metrics)
