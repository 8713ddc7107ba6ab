"""The folder of a run that a command started: its settings, records, and TensorBoard events."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .records import JSONLines
from .tensorboard import TensorBoard

METRICS = "metrics.jsonl"


class RunFolder:
    """The folder of a run: ``config.json``, files of JSON lines, and TensorBoard events.

    Args:
        path: Path of the folder.
        settings: The run's settings, a dataclass with the fields ``out`` and ``resume``.
        free: Names of settings that may differ when the run is resumed.
        records: Names of files of JSON lines. A folder with one of them contains a run.
        extra: Further values that must be the same when the run is resumed.
    """

    def __init__(
        self,
        path: Path,
        settings: Any,
        free: Collection[str] = (),
        records: Collection[str] = (METRICS,),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.records = path, tuple(records)
        values = {**dataclasses.asdict(settings), **(extra or {})}
        # Through JSON, so that paths become texts and tuples become lists.
        self._settings: dict[str, Any] = json.loads(json.dumps(values, default=str))
        self._free = {"out", "resume", *free}

    def open(self) -> None:
        """Create the folder, or check that the run in it can be resumed.

        Raises:
            FileExistsError: It contains a run, and ``resume`` is not set.
            FileNotFoundError: There is no run to resume.
            ValueError: The run to resume has other settings.
        """
        config, now = self.path / "config.json", self._settings
        if not now["resume"]:
            if any((self.path / name).exists() for name in self.records):
                raise FileExistsError(
                    f"{self.path} holds a run already; give another folder with --out, or continue it with --resume"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            config.write_text(json.dumps(now, indent=1) + "\n")
            return
        if not config.exists():
            raise FileNotFoundError(f"there is no run to resume in {self.path}; leave out --resume to start one")
        before = json.loads(config.read_text())
        changed = [
            f"{k}={now[k]!r} (was {before.get(k)!r})" for k in now if k not in self._free and now[k] != before.get(k)
        ]
        if changed:
            raise ValueError(
                f"the run in {self.path} has other settings: {', '.join(changed)}. Resume it with the same ones, or"
                " start a new run with --out"
            )

    def cut(self, name: str, keep: Callable[[int, dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Remove the lines of a file that will be written again, and an incomplete last line; return the others.

        Args:
            name: Name of the file.
            keep: Takes the index of a line and its record, and returns whether to keep it.
        """
        return JSONLines(self.path / name).cut(keep)

    @contextlib.contextmanager
    def writing(self, main: bool, step: int = 0) -> Iterator[RunWriter]:
        """Yield a writer for the folder.

        Args:
            main: Whether this process writes. The writers of other processes do nothing.
            step: The step at which the run resumes. TensorBoard hides events of later steps from an earlier process.
        """
        board = TensorBoard(self.path) if main else None
        if board is None:
            yield RunWriter(None, None)
            return
        board.open(step)
        try:
            yield RunWriter(self.path, board)
        finally:
            board.close()


class RunWriter:
    """Writes records of a run, each at once as a line of JSON, and TensorBoard events.

    Args:
        path: The run's folder; None to write nothing.
        board: Writes the events; None to write none.
    """

    def __init__(self, path: Path | None, board: TensorBoard | None) -> None:
        self._path, self.board = path, board

    def metrics(self, line: Mapping[str, Any], step: int) -> None:
        """Add a generation's metrics to ``metrics.jsonl`` and to TensorBoard's curves."""
        self.append(METRICS, line)
        self.scalars(line, step)

    def append(self, name: str, *lines: Mapping[str, Any]) -> None:
        """Add lines to a file of JSON lines."""
        if self._path is not None and lines:
            JSONLines(self._path / name).append(lines)

    def scalars(self, values: Mapping[str, Any], step: int, prefix: str = "") -> None:
        """Add the numbers among some values to TensorBoard's curves."""
        if self.board is not None:
            self.board.scalars(values, step, prefix)

    def histogram(self, tag: str, values: Any, step: int) -> None:
        """Add a histogram to TensorBoard."""
        if self.board is not None:
            self.board.histogram(tag, values, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Add a text to TensorBoard."""
        if self.board is not None:
            self.board.text(tag, markdown, step)
