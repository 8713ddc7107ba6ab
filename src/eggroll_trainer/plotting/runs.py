"""The curves of a run, read from its records or checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..callbacks.logger import numbers
from ..callbacks.records import CSV, JSONLines
from ..checkpoints.files import read_checkpoint

Array = np.ndarray[Any, Any]

# Names of the same quantity in the records of trainers and of commands.
_ALIASES = {
    "mean": ("mean_fitness", "mean_return"),
    "std": ("std_fitness", "std_return"),
    "member": ("fitness", "best_return"),
    "best": ("best_fitness",),
    "centre": ("eval_return", "eval/score"),
    "centre_std": ("eval_std",),
}


class RunCurves:
    """The curves of a run: columns with one number for each generation, NaN if there is none.

    Args:
        name: Name of the run in legends.
        columns: The columns by name, all of the same length.

    Example:
        >>> run = RunCurves.of_history(
        ...     "mine", {"generation": [1, 2], "mean_fitness": [0.5, 0.75], "status": ["ok", "ok"]}
        ... )
        >>> len(run), sorted(run.columns)
        (2, ['generation', 'mean_fitness'])
    """

    def __init__(self, name: str, columns: Mapping[str, Sequence[float] | Array]) -> None:
        self.name = name
        self.columns: dict[str, Array] = {key: np.asarray(values, float) for key, values in columns.items()}

    @classmethod
    def of_records(cls, name: str, records: Iterable[Mapping[str, Any]]) -> RunCurves:
        """Return the curves from one record for each generation. Records may have different entries."""
        rows = [numbers(one) for one in records]
        keys = dict.fromkeys(key for row in rows for key in row)
        return cls(name, {key: [row.get(key, np.nan) for row in rows] for key in keys})

    @classmethod
    def of_history(cls, name: str, history: Mapping[str, Sequence[Any]]) -> RunCurves:
        """Return the curves of ``trainer.history``. Shorter columns are aligned at the last generation."""
        length = max((len(values) for values in history.values()), default=0)
        rows: list[dict[str, Any]] = [{} for _ in range(length)]
        for key, values in history.items():
            for row, value in zip(rows[length - len(values) :], values, strict=True):
                row[key] = value
        return cls.of_records(name, rows)

    def __len__(self) -> int:
        return max((len(values) for values in self.columns.values()), default=0)

    def x(self, name: str = "generation") -> Array:
        """Return the column for the horizontal axis; generations are counted from 1 if there is no column for them.

        Raises:
            ValueError: There is no such column.
        """
        if name in self.columns:
            return self.columns[name]
        if name == "generation":
            return np.arange(1, len(self) + 1, dtype=float)
        raise ValueError(f"{self.name} has no column {name!r}; it has {', '.join(sorted(self.columns))}")

    def role(self, role: str) -> Array | None:
        """Return the column for a quantity such as ``"mean"`` or ``"best"``, whatever its name, or None."""
        for name in _ALIASES[role]:
            if name in self.columns:
                return self.columns[name]
        return None

    def others(self) -> list[str]:
        """Return the names of columns that are neither fitness nor counters."""
        fitness = {name for names in _ALIASES.values() for name in names}
        return [name for name in self.columns if name not in fitness and name not in ("generation", "steps")]


def mean_of_runs(runs: Sequence[RunCurves], x: str) -> tuple[Array, Array, Array]:
    """Average the mean fitness of several runs over the range that they share.

    Args:
        runs: The runs. Runs with different values of ``x`` are interpolated.
        x: Column of the horizontal axis.

    Returns:
        Values of ``x``, and the mean and standard deviation over the runs, ``[n]`` each.
    """
    curves = []
    for run in runs:
        mean = run.role("mean")
        if mean is not None and np.isfinite(mean).any():
            curves.append((run.x(x)[np.isfinite(mean)], mean[np.isfinite(mean)]))
    if not curves:
        return np.array([]), np.array([]), np.array([])
    first, last = max(at[0] for at, _ in curves), min(at[-1] for at, _ in curves)
    places = np.unique(np.concatenate([at for at, _ in curves]))
    places = places[(places >= first) & (places <= last)]
    values = np.stack([np.interp(places, at, mean) for at, mean in curves])
    return places, values.mean(0), values.std(0)


def load_run(path: str | PathLike[str], name: str | None = None) -> RunCurves:
    r"""Read the curves of a run.

    Args:
        path: The folder of a run, which contains ``metrics.jsonl``, ``metrics.csv`` or checkpoints; a file of records,
            ``.jsonl`` or ``.csv``; or a checkpoint, ``.pt``.
        name: Name of the run; that of the folder or file if None.

    Returns:
        The curves.

    Raises:
        FileNotFoundError: There is no such file or folder, or the folder contains no run.
        ValueError: The file is damaged, or contains no generation.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> _ = file.write_text("generation,mean_fitness\n1,0.5\n2,0.75\n")
        >>> load_run(file).columns["mean_fitness"].tolist()
        [0.5, 0.75]
    """
    path = Path(path)
    file = _file_in(path) if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"there is no run at {path}")
    curves = _read(file, name or (path.name if path.is_dir() else path.stem) or path.resolve().name)
    if len(curves) == 0:
        raise ValueError(f"{file} has no generation yet: nothing to plot")
    return curves


def _file_in(folder: Path) -> Path:
    for name in ("metrics.jsonl", "metrics.csv"):
        if (folder / name).exists():
            return folder / name
    checkpoints = sorted([*folder.glob("checkpoint-*.pt"), *folder.glob("checkpoints/checkpoint-*.pt")])
    tables = sorted([*folder.glob("*.jsonl"), *folder.glob("*.csv")])
    tables = [table for table in tables if table.name != "scores.jsonl"]
    for found in (tables, checkpoints):
        if found:
            return found[-1]
    raise FileNotFoundError(
        f"{folder} contains no run: neither metrics.jsonl or metrics.csv, as loggers write them, nor checkpoints"
    )


def _read(file: Path, name: str) -> RunCurves:
    if file.suffix == ".csv":
        return RunCurves.of_records(name, CSV(file).read())
    if file.suffix in (".pt", ".pth"):
        return RunCurves.of_history(name, read_checkpoint(file)["history"])
    try:
        records = JSONLines(file).read()
        if not all(isinstance(one, dict) for one in records):
            raise ValueError("a line is not an object")
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{file} is not a file of JSON lines: {error}") from error
    return RunCurves.of_records(name, records)
