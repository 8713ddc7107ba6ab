"""Loggers that write files: a line of JSON, or a row of a table, for every generation."""

from __future__ import annotations

import csv
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from .callback import Trainer
from .logger import Logger, record

Record = dict[str, Any]


class _File(Logger):
    """A file of records. It is complete after every generation.

    Args:
        path: Path of the file. A run that resumes from a checkpoint continues it, without the records of later
            generations.
        overwrite: Whether a new run may replace the file of another one.
    """

    def __init__(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        self.path, self.overwrite = Path(path), overwrite
        # The generation and the file size after the last record that this object has written.
        self._written: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def on_start(self, trainer: Trainer) -> None:
        """Remove the records of generations that will be made again.

        Raises:
            FileExistsError: The file belongs to another run, and ``overwrite`` is not set.
        """
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        if self._written == (trainer.generation, self.path.stat().st_size):
            return
        records = self.read()
        if trainer.generation == 0 and records and not self.overwrite:
            raise FileExistsError(
                f"{self.path} has the records of a run already: continue that run with trainer.load(…), use another"
                " file, or set overwrite=True"
            )
        self.write([one for one in records if one.get("generation", 0) <= trainer.generation])

    def log(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        """Add a record."""
        self.append([record(metrics)])
        self._written = trainer.generation, self.path.stat().st_size

    @abstractmethod
    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records at the end."""

    @abstractmethod
    def read(self) -> list[Record]:
        """Return all complete records."""

    @abstractmethod
    def _dump(self, records: list[Record], path: Path) -> None:
        """Write a file with these records."""

    def write(self, records: list[Record]) -> None:
        """Replace all records atomically."""
        beside = self.path.with_name(self.path.name + ".new")
        self._dump(records, beside)
        os.replace(beside, self.path)


class JSONLines(_File):
    """Writes a line of JSON for every generation: all numbers and texts of its metrics. NaN and inf are ``null``.

    Args:
        path: Path of the file. A run that resumes from a checkpoint continues it, without the records of later
            generations.
        overwrite: Whether a new run may replace the file of another one.

    Example:
        >>> import tempfile, torch
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> trainer = EGGROLLTrainer(model=torch.nn.Linear(3, 1), fitness_fn=lambda m: m(torch.ones(1, 3)).item())
        >>> lines = JSONLines(tempfile.mkdtemp() + "/metrics.jsonl")
        >>> _ = trainer.train(2, verbose=False, callback=lines)
        >>> [line["generation"] for line in lines.read()]
        [1, 2]
    """

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add lines at the end."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(_as_line(one) for one in records)

    def read(self) -> list[Record]:
        """Return all complete lines; an empty list if there is no file."""
        if not self.path.exists():
            return []
        # Not splitlines(), which also splits at other separators inside texts.
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.endswith("}")]

    def cut(self, keep: Callable[[int, Record], bool]) -> list[Record]:
        """Remove lines, and return the others.

        Args:
            keep: Takes the index of a line and its record, and returns whether to keep it.
        """
        if not self.path.exists():
            return []
        kept = [line for i, line in enumerate(self.read()) if keep(i, line)]
        self.write(kept)
        return kept

    def _dump(self, records: list[Record], path: Path) -> None:
        path.write_text("".join(_as_line(one) for one in records), encoding="utf-8")


class CSV(_File):
    """Writes a row of a table for every generation: all numbers and texts of its metrics. NaN and inf are empty.

    A metric that first appears in a later generation gets a new column at the end.

    Args:
        path: Path of the file. A run that resumes from a checkpoint continues it, without the records of later
            generations.
        overwrite: Whether a new run may replace the file of another one.

    Example:
        >>> import tempfile, torch
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> trainer = EGGROLLTrainer(model=torch.nn.Linear(3, 1), fitness_fn=lambda m: m(torch.ones(1, 3)).item())
        >>> table = CSV(tempfile.mkdtemp() + "/metrics.csv")
        >>> _ = trainer.train(2, verbose=False, callback=table)
        >>> table.path.read_text().splitlines()[0][:33]
        'generation,fitness,mean_fitness,s'
    """

    def __init__(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        super().__init__(path, overwrite=overwrite)
        self._columns: list[str] | None = None

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add rows at the end."""
        rows = [dict(one) for one in records]
        if self._columns is None:
            self._columns = self._header()
        if not set(_names(rows)) <= set(self._columns):
            self.write([*self.read(), *rows])
            return
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns).writerows(rows)

    def read(self) -> list[Record]:
        """Return all complete rows, with numbers converted; an empty list if there is no file."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rows = csv.DictReader(whole.splitlines(keepends=True))
        return [{key: _value(value) for key, value in row.items() if key and value} for row in rows]

    def _header(self) -> list[str]:
        if not self.path.exists():
            return []
        with open(self.path, encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])

    def _dump(self, records: list[Record], path: Path) -> None:
        self._columns = _names(records)
        with open(path, "w", encoding="utf-8", newline="") as file:
            if self._columns:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(records)


def _names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in records for name in one))


def _as_line(one: Mapping[str, Any]) -> str:
    return json.dumps(one) + "\n"


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
