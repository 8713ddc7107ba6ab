"""``eggroll train MODULE:FACTORY``: trains any model with the user's own fitness function, and writes a folder."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import tyro

from .._utils.settings_file import HELP, read_settings, without_config
from ..callbacks import Callback, Checkpoints, EarlyStopping, JSONLines, TensorBoard, TimeLimit
from ..callbacks.run_folder import METRICS, RunFolder
from ..trainers.base import ESTrainer
from .model import FACTORY, ModelSettings, UsageError, is_ours, make_trainer

DESCRIPTION = f"""Train any model with your own fitness function, and write a folder with the results of the run.

{FACTORY}

Examples:
  eggroll train my_model.py:make --generations 200
  eggroll train my_model.py:make --set width=64 --sigma 0.05 --out runs/wide
  eggroll train my_model.py:make --generations 400 --out runs/wide --resume
  eggroll train --config runs/wide --seed 1

{HELP}"""


@dataclasses.dataclass(frozen=True)
class Settings(ModelSettings):
    """How a model is trained."""

    generations: int = 100
    """Number of generations, including those before a --resume."""
    patience: int | None = None
    """Number of generations without a better mean fitness after which training ends."""
    goal: float | None = None
    """Training ends when the mean fitness is equal to this or better."""
    time_limit: float | None = None
    """Seconds after which training ends."""
    save_every: int = 20
    """Number of generations between checkpoints. One is also written at the end."""
    tensorboard: bool = True
    """Whether to write curves for TensorBoard, if it is installed."""
    out: Path | None = None
    """Folder of the run; by default, runs/FACTORY-SEED."""
    resume: bool = False
    """Continue the run in that folder."""


# Settings that may differ when a run is resumed.
_FREE = ("generations", "patience", "goal", "time_limit", "save_every", "tensorboard", "engine")


def main(arguments: list[str]) -> int:
    """Run the command and return the exit status."""
    try:
        file, arguments = without_config(arguments)
        values = {} if file is None else read_settings(file, Settings)
        default = Settings(**{"factory": tyro.MISSING, **values})
    except ValueError as error:
        print(f"eggroll train: {error}", file=sys.stderr)
        return 2
    settings = tyro.cli(Settings, args=arguments, default=default, prog="eggroll train", description=DESCRIPTION)
    try:
        # Exceptions of the user's factory keep their traceback.
        trainer, _ = make_trainer(settings)
    except UsageError as error:
        print(f"eggroll train: {error}", file=sys.stderr)
        return 2
    try:
        folder, callbacks, checkpoints = _run(settings, trainer)
    except (TypeError, ValueError, OSError) as error:
        print(f"eggroll train: {error}", file=sys.stderr)
        return 1
    if trainer.is_main:
        print(f"run: {folder}")
    left = max(0, settings.generations - trainer.generation)
    try:
        result = trainer.train(left, callback=callbacks, checkpoints=checkpoints)
    except (TypeError, ValueError) as error:
        if not is_ours(error):
            raise
        print(f"eggroll train: {error}", file=sys.stderr)
        return 1
    if trainer.is_main:
        _finish(settings, trainer, folder, result["stopped_by"])
    return 0


def _run(settings: Settings, trainer: ESTrainer) -> tuple[Path, list[Callback], Checkpoints]:
    """Open the run's folder; return it with the callbacks and checkpoints that write to it."""
    name = settings.factory.replace(".py:", "-").replace(":", "-").replace("/", "-").replace("\\", "-")
    folder = settings.out or Path("runs") / f"{name}-{settings.seed}"
    trainer.engine.from_main(RunFolder(folder, settings, _FREE).open)
    checkpoints = Checkpoints(folder / "checkpoints", every=settings.save_every)
    if settings.resume:
        checkpoints.restore(trainer)
    # A run that was stopped before its first checkpoint restarts, and overwrites its records.
    callbacks: list[Callback] = [JSONLines(folder / METRICS, overwrite=settings.resume)]
    if settings.tensorboard and _has_tensorboard():
        callbacks.append(TensorBoard(folder))
    if settings.patience is not None or settings.goal is not None:
        callbacks.append(EarlyStopping(settings.patience, goal=settings.goal))
    if settings.time_limit is not None:
        callbacks.append(TimeLimit(settings.time_limit))
    return folder, callbacks, checkpoints


def _has_tensorboard() -> bool:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


def _finish(settings: Settings, trainer: ESTrainer, folder: Path, stopped_by: str | None) -> None:
    """Write the model and the plot, and print the results and the next steps."""
    torch.save(trainer.model.state_dict(), folder / "model.pt")
    if stopped_by is not None:
        print(f"ended after generation {trainer.generation} by {stopped_by}")
    means = trainer.fitness_history
    if not means:
        return
    print(f"mean fitness: {means[0]:.4g} → {means[-1]:.4g} in {trainer.generation} generations")
    print(f"best member: {trainer.best_fitness:.4g}")
    print(f"model: {folder / 'model.pt'}, the state_dict of the centre; checkpoints: {folder / 'checkpoints'}")
    try:
        trainer.plot(folder / "curve.png", title=settings.factory)
        print(f"curve: {folder / 'curve.png'}")
    except ImportError as error:
        print(f"no curve: {error}", file=sys.stderr)
    print(f"next: --resume --generations {2 * trainer.generation} continues; tensorboard --logdir {folder} shows it")
