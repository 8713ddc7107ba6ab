"""The score log: a few bytes for each member, from which a run can be repeated without its fitness function."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fitness.scores import packed
from .generation import FIXED, Generation, differences
from .run import Run

FORMAT = 1


class ScoreLog:
    """The scores of every generation, in a file of JSON lines.

    Perturbations follow from the seed, so the initial weights and the scores suffice to repeat all steps. A score takes
    four bytes (eight if it is not a float32 number), and a third more as text. The first line contains the settings and
    a checksum of the initial weights. Every other line is a generation, with the settings that differ from these.

    Args:
        path: Path of the file.

    Example:
        >>> import tempfile
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> def make():
        ...     model = torch.nn.Linear(3, 1)
        ...     torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(model.bias)
        ...     return EGGROLLTrainer(
        ...         model=model, fitness_fn=lambda m: -m(torch.ones(1, 3)).square().sum().item(), seed=0
        ...     )
        >>> log, trainer = ScoreLog(tempfile.mkdtemp() + "/scores.jsonl"), make()
        >>> for _ in range(3):
        ...     log.begin(trainer)
        ...     _ = trainer.step()
        ...     log.append(trainer)
        >>> again = make()
        >>> log.replay(again)
        3
        >>> torch.equal(again.current_params, trainer.current_params)
        True
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)

    def is_begun(self) -> bool:
        """Return whether a generation was logged."""
        if not self.path.exists():
            return False
        with open(self.path) as file:
            file.readline()
            return bool(file.readline())

    def begin(self, trainer: Run) -> None:
        """Write the first line, if no generation was logged and the trainer has made none."""
        if trainer.generation == 0 and not self.is_begun():
            head = {"format": FORMAT, "settings": trainer.settings().plain(), "initial": trainer.checksum()}
            self.path.write_text(json.dumps(head) + "\n")

    def append(self, trainer: Run) -> None:
        """Append the trainer's last generation.

        Raises:
            OSError: The file cannot be written.
        """
        last = trainer.last_generation
        if last is None or not self.path.exists():
            return
        arrays = [packed(last.scores), *(values.cpu().numpy() for values in last.statistics)]
        before, now = self._head()["settings"], json.loads(json.dumps(last.settings))
        line = {
            "generation": last.number,
            "seed": now.pop("seed"),
            "settings": {name: now[name] for name in differences(now, before)},
            "arrays": [_to_text(array) for array in arrays],
        }
        if last.again is not None:
            line["again"] = last.again
        with open(self.path, "a") as file:
            file.write(json.dumps({**line, "crc": _checksum(line)}) + "\n")

    def truncate(self, generation: int) -> None:
        """Remove generations after ``generation``, and an incomplete last line."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            record = _parse(line)
            if record is None or record.get("generation", 0) > generation:
                break
            kept.append(line + "\n")
        self.path.write_text("".join(kept))

    def generations(self) -> Iterator[Generation]:
        """Iterate over the logged generations, up to the first damaged line.

        Yields:
            Each generation, in order: its number, settings and scores.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a score log, or has another format.
        """
        head = self._head()
        for line in self.path.read_text().splitlines()[1:]:
            record = _parse(line)
            if record is None:
                return
            scores, *statistics = (_from_text(text) for text in record["arrays"])
            settings = {**head["settings"], **record["settings"], "seed": record["seed"]}
            yield Generation(record["generation"], settings, scores.double(), statistics, record.get("again"))

    def replay(self, trainer: Run, until: int | None = None) -> int:
        """Repeat the steps of a run from the trainer's current generation on, without its fitness function.

        Args:
            trainer: A trainer of the same model, with the same initial weights and arguments; or one that was restored
                at a later generation of the run. Settings that changed during the run change again.
            until: The last generation to repeat; all if None.

        Returns:
            The trainer's generation after that.

        Raises:
            FileNotFoundError: There is no log.
            ValueError: The log is of another run, is damaged, or ends before ``until``.
        """
        head = self._head()
        mine = json.loads(json.dumps(trainer.settings().plain()))
        # Other settings in the first line are those of the first generation.
        changed = differences(
            mine if trainer.generation == 0 else {name: mine[name] for name in FIXED},
            head["settings"],
            ignored=("seed", "options"),
        )
        if changed:
            raise ValueError(
                f"the log {self.path} is of a run with other settings; this trainer has {', '.join(changed.values())}"
            )
        if trainer.generation == 0 and trainer.checksum() != head["initial"]:
            raise ValueError(
                f"the log {self.path} is of a run with other initial weights: load these into the model first"
            )
        for generation in self.generations():
            if until is not None and generation.number > until:
                break
            if generation.number > trainer.generation:
                if generation.number != trainer.generation + 1:
                    raise ValueError(f"{self.path} lacks generation {trainer.generation + 1}")
                trainer.repeat(generation)
        if until is not None and trainer.generation < until:
            raise ValueError(f"{self.path} ends at generation {trainer.generation}, before {until}")
        return trainer.generation

    def _head(self) -> dict[str, Any]:
        with open(self.path) as file:
            head = _json(file.readline())
        if head is None or head.get("format") != FORMAT:
            raise ValueError(f"{self.path} is not a score log in format {FORMAT}")
        return head


def _to_text(array: np.ndarray[Any, Any]) -> list[Any]:
    text: list[Any] = [array.dtype.str, base64.b64encode(array.tobytes()).decode()]
    return text if array.ndim == 1 else [*text, list(array.shape)]


def _from_text(text: list[Any]) -> Tensor:
    dtype, data, *shape = text
    values = torch.from_numpy(np.frombuffer(base64.b64decode(data), np.dtype(dtype)).copy())
    return values.view(*shape) if shape else values


def _checksum(line: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(line).encode())


def _json(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _parse(line: str) -> dict[str, Any] | None:
    """Return a line's record, or None if it is damaged."""
    record = _json(line)
    if record is None or "format" in record:
        return record
    crc = record.pop("crc", None)
    return record if crc == _checksum(record) else None
