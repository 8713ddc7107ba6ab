"""A folder with the checkpoints of a run."""

from __future__ import annotations

import contextlib
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

from .._utils.interrupts import delayed_interrupt
from .._utils.validation import check_int
from .files import read_checkpoint
from .run import Run
from .score_log import ScoreLog


class Checkpoints:
    """Keeps the newest checkpoints of a run, the best one, and the scores of all generations.

    The folder contains ``checkpoint-GENERATION.pt``, ``best.pt`` (the checkpoint with the best mean fitness in its last
    generation) and ``scores.jsonl`` (a :class:`~eggroll_trainer.checkpoints.score_log.ScoreLog`). With several
    processes, the first one reads and writes.

    Args:
        folder: The folder. It is created if it does not exist.
        every: Number of generations between checkpoints. :meth:`ESTrainer.train` also writes one when training ends,
            even by an exception.
        keep_last: Number of newest checkpoints to keep.
        keep_best: Whether to keep the best checkpoint.
        log: Whether to log the scores.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import tempfile, torch
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> model = torch.nn.Linear(3, 1)
        >>> trainer = EGGROLLTrainer(
        ...     model=model, fitness_fn=lambda m: -m(torch.ones(1, 3)).square().sum().item(), seed=0
        ... )
        >>> checkpoints = Checkpoints(tempfile.mkdtemp(), every=5)
        >>> checkpoints.restore(trainer)  # nothing there yet
        False
        >>> _ = trainer.train(20 - trainer.generation, verbose=False, checkpoints=checkpoints)
        >>> sorted(path.name for path in checkpoints.folder.iterdir())  # doctest: +NORMALIZE_WHITESPACE
        ['best.pt', 'checkpoint-00000010.pt', 'checkpoint-00000015.pt', 'checkpoint-00000020.pt', 'scores.jsonl']
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        every: int = 10,
        keep_last: int = 3,
        keep_best: bool = True,
        log: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.every = check_int("every", every, 1)
        self.keep_last = check_int("keep_last", keep_last, 1)
        self.keep_best = bool(keep_best)
        self.log = ScoreLog(self.folder / "scores.jsonl") if log else None
        self._best: float | None = None

    def restore(self, trainer: Run) -> bool:
        """Restore the newest checkpoint that can be read. With several processes, call it in all of them.

        Returns:
            Whether there is a checkpoint.

        Raises:
            ValueError: There are checkpoints, but none can be read, or they are of another model.
        """
        state = trainer.engine.from_main(self._newest)
        if state is not None:
            trainer.load_state_dict(state)
        if self.log is not None and trainer.is_main:
            self.log.truncate(trainer.generation)
        return state is not None

    def begin(self, trainer: Run) -> None:
        """Prepare the folder for the trainer's next generation.

        Raises:
            FileExistsError: The folder holds another run, which the trainer does not continue.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        logged = trainer.generation == 0 and self.log is not None and self.log.is_begun()
        paths = self.paths()
        if logged or (paths and paths[-1] > self._path(trainer.generation)):
            raise FileExistsError(
                f"{self.folder} holds a run already: continue it with checkpoints.restore(trainer), or use another"
                " folder"
            )
        if self.log is not None:
            self.log.begin(trainer)

    def after_generation(self, trainer: Run) -> None:
        """Log the generation, and write a checkpoint if it is due. If that fails, issue a warning."""
        if not trainer.is_main:
            return
        try:
            # An interrupt between the two could leave a log without the checkpoint.
            with delayed_interrupt():
                if self.log is not None:
                    self.log.append(trainer)
                if trainer.generation % self.every == 0:
                    self.save(trainer)
        except OSError as error:
            warnings.warn(
                f"generation {trainer.generation} was not written to {self.folder}, and training goes on: {error}."
                " Free space, or check the folder's permissions",
                stacklevel=2,
            )

    def save(self, trainer: Run) -> None:
        """Write a checkpoint of the trainer's current generation, unless there is one.

        Raises:
            OSError: It cannot be written. Older checkpoints are unchanged.
        """
        path = self._path(trainer.generation)
        if not trainer.is_main or trainer.generation == 0 or path.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save(path)
        for old in self.paths()[: -self.keep_last]:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
        mean = trainer.history["mean_fitness"][-1]
        best = self._best_fitness()
        if self.keep_best and (best is None or (mean > best if trainer.maximize else mean < best)):
            self._best = mean
            trainer.save(self.folder / "best.pt")

    def paths(self) -> list[Path]:
        """Return the paths of all checkpoints, the newest last."""
        return sorted(self.folder.glob("checkpoint-*.pt"))

    def _path(self, generation: int) -> Path:
        return self.folder / f"checkpoint-{generation:08d}.pt"

    def _newest(self) -> dict[str, Any] | None:
        paths = self.paths()
        for path in reversed(paths):
            try:
                return read_checkpoint(path)
            except ValueError as error:
                warnings.warn(f"{error}; taking the checkpoint before it", stacklevel=2)
                # Make room for the new checkpoint of this generation.
                path.rename(path.with_suffix(".damaged"))
        if paths:
            raise ValueError(
                f"none of the {len(paths)} checkpoints in {self.folder} can be read: use another folder for a new run"
            )
        return None

    def _best_fitness(self) -> float | None:
        """Return the mean fitness of the best checkpoint, or None if it is missing or damaged."""
        if self._best is None:
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, IndexError):
                self._best = read_checkpoint(self.folder / "best.pt")["history"]["mean_fitness"][-1]
        return self._best
