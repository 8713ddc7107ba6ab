"""The folder of a run that a command started: its settings, its records, and what TensorBoard shows."""

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
    """The folder of a run: ``config.json``, records in files of JSON lines, and TensorBoard's events.

    Args:
        path: Where it is.
        settings: The run's settings, a dataclass with the fields ``out`` and ``resume``.
        free: Names of settings that may differ when the run is resumed.
        records: Files of JSON lines; a folder with one of them holds a run.
        extra: What else must be the same when the run is resumed.
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
        # Paths as texts, tuples as lists.
        self._settings: dict[str, Any] = json.loads(json.dumps(values, default=str))
        self._free = {"out", "resume", *free}

    def open(self) -> None:
        """Make the folder, or see that the run in it can be resumed.

        Raises:
            FileExistsError: It holds a run, and ``resume`` is not set.
            FileNotFoundError: There is no run to resume.
            ValueError: The run to resume has other settings.
        """
        config, now = self.path / "config.json", self._settings
        if not now["resume"]:
            if any((self.path / name).exists() for name in self.records):
                raise FileExistsError(
                    f"{self.path} holds a run already; give another folder with --out, or go on with it with --resume"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            config.write_text(json.dumps(now, indent=1) + "\n")
            return
        if not config.exists():
            raise FileNotFoundError(f"there is no run to resume in {self.path}")
        before = json.loads(config.read_text())
        changed = [
            f"{k}={now[k]!r} (was {before.get(k)!r})" for k in now if k not in self._free and now[k] != before.get(k)
        ]
        if changed:
            raise ValueError(f"the run in {self.path} has other settings: {', '.join(changed)}")

    def cut(self, name: str, keep: Callable[[int, dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Forget the lines of a file that come after the checkpoint, as these come again; return the others.

        A last line that was not written to its end is forgotten as well.

        Args:
            name: Of the file.
            keep: From the index of a line, and what it says, to whether it stays.
        """
        return JSONLines(self.path / name).cut(keep)

    @contextlib.contextmanager
    def writing(self, main: bool, step: int = 0) -> Iterator[RunWriter]:
        """Yield what writes into the folder.

        Args:
            main: Whether this process is the one to write; what the writer of another one gets is dropped.
            step: Where the run goes on: TensorBoard does not show what an earlier process wrote of later steps.
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
    """Writes records of a run, a line each as soon as it is there, and TensorBoard's events.

    Args:
        path: The run's folder; None to write nothing.
        board: What writes the events; None to write none.
    """

    def __init__(self, path: Path | None, board: TensorBoard | None) -> None:
        self._path, self.board = path, board

    def metrics(self, line: Mapping[str, Any], step: int) -> None:
        """Add a generation's metrics to ``metrics.jsonl``, and to the curves."""
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
        """Add a histogram that TensorBoard shows."""
        if self.board is not None:
            self.board.histogram(tag, values, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Add a text that TensorBoard shows."""
        if self.board is not None:
            self.board.text(tag, markdown, step)
