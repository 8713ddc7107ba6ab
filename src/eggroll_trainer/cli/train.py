"""``eggroll train MODULE:FACTORY``: train any model by a fitness function of the user's, and leave a folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from .._utils.importing import function_named
from .._utils.settings_file import HELP, read_settings, without_config
from ..callbacks import Callback, Checkpoints, EarlyStopping, JSONLines, TensorBoard, TimeLimit
from ..callbacks.run_folder import METRICS, RunFolder
from ..trainers.base import ESTrainer
from ..trainers.eggroll import EGGROLLTrainer
from ..trainers.vanilla import VanillaESTrainer

DESCRIPTION = f"""Train any model by a fitness function of yours, and leave a folder with all that belongs to the run.

FACTORY is a function that returns a model and its fitness function, or a trainer:

  def make():
      model = nn.Linear(10, 1)
      return model, lambda model: -(model(x) - y).square().mean().item()

Examples:
  eggroll train my_model.py:make --generations 200
  eggroll train my_model.py:make --set width=64 --sigma 0.05 --out runs/wide
  eggroll train my_model.py:make --generations 400 --out runs/wide --resume
  eggroll train --config runs/wide --seed 1

{HELP}"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is trained."""

    factory: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODULE:FACTORY")]
    """Function that returns a model and its fitness function, or a trainer; FILE.py:FACTORY as well."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE, an argument of the factory: as JSON where VALUE is that, else a text; may be repeated."""
    generations: int = 100
    """Generations to train for, those before a --resume included."""
    population_size: int = 256
    """Members in a generation. This and all up to --seed are for factories that return no trainer."""
    learning_rate: float = 0.03
    """Step size: about what a weight moves in a generation with adam; in units of sigma with sgd."""
    sigma: float = 0.1
    """Standard deviation of the perturbations."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """What takes the steps."""
    rank: int = 1
    """Rank of the perturbations; 0 for full rank."""
    antithetic: bool = True
    """Whether members come in pairs of opposite perturbations."""
    shaping: str = "zscore"
    """How scores become weights: zscore, centered_ranks, antithetic_sign or raw."""
    compile: bool = False
    """Whether batched forwards are compiled."""
    chunk_size: int | None = None
    """Members evaluated at a time; as many as memory allows if left out."""
    device: str | None = None
    """Where to train; where the model is if left out."""
    engine: Literal["local", "torch", "ray"] | None = None
    """Who evaluates the population; what torchrun has started, else this process, if left out."""
    seed: int = 0
    """Of noise, and of torch while the factory runs."""
    patience: int | None = None
    """End after so many generations without a better mean fitness."""
    goal: float | None = None
    """End when the mean fitness is this or better."""
    time_limit: float | None = None
    """End after so many seconds."""
    save_every: int = 20
    """Write a checkpoint every so many generations, and at the end."""
    tensorboard: bool = True
    """Whether to write curves for TensorBoard, where it is installed."""
    out: Path | None = None
    """Folder of the run; runs/FACTORY-SEED if left out."""
    resume: bool = False
    """Go on with the run in that folder."""


# What may differ when a run is resumed.
_FREE = ("generations", "patience", "goal", "time_limit", "save_every", "tensorboard", "engine")
# What a trainer brings along.
_OF_TRAINERS = (
    *("population_size", "learning_rate", "sigma", "optimizer", "rank", "antithetic", "shaping", "compile"),
    *("chunk_size", "device", "engine"),
)


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
        factory = function_named("MODULE:FACTORY", settings.factory)
        given = _arguments(settings.set)
    except ValueError as error:
        print(f"eggroll train: {error}", file=sys.stderr)
        return 2
    # What a user's function raises needs its traceback.
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        made = factory(**given)
    try:
        trainer = _trainer(settings, made)
        folder, callbacks, checkpoints = _run(settings, trainer)
    except (TypeError, ValueError, OSError) as error:
        print(f"eggroll train: {error}", file=sys.stderr)
        return 1
    if trainer.is_main:
        print(f"run: {folder}")
    left = max(0, settings.generations - trainer.generation)
    result = trainer.train(left, callback=callbacks, checkpoints=checkpoints)
    if trainer.is_main:
        _finish(settings, trainer, folder, result["stopped_by"])
    return 0


def _arguments(given: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set must be NAME=VALUE, got {text!r}")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def _trainer(settings: Settings, made: Any) -> ESTrainer:
    """Return the trainer that a factory returned, or one for its model and fitness function."""
    if isinstance(made, ESTrainer):
        defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
        changed = [name for name in _OF_TRAINERS if getattr(settings, name) != defaults[name]]
        if changed:
            named = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise ValueError(f"{settings.factory} returns a trainer, which has its own settings: leave out {named}")
        return made
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise TypeError(
            f"{settings.factory} must return a trainer, or a model and its fitness function; got {_described(made)}"
        )
    model, fitness_fn = made
    options: dict[str, Any] = {
        "model": model,
        "fitness_fn": fitness_fn,
        "population_size": settings.population_size,
        "learning_rate": settings.learning_rate,
        "sigma": settings.sigma,
        "optimizer": {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[settings.optimizer],
        "noise_reuse": 2 if settings.antithetic else 0,
        "shaping": settings.shaping,
        "compile": settings.compile,
        "chunk_size": settings.chunk_size,
        "device": settings.device,
        "engine": settings.engine,
        "seed": settings.seed,
    }
    if settings.rank == 0:
        return VanillaESTrainer(**options)
    return EGGROLLTrainer(rank=settings.rank, **options)


def _described(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(one).__name__ for one in made)})"
    return type(made).__name__


def _run(settings: Settings, trainer: ESTrainer) -> tuple[Path, list[Callback], Checkpoints]:
    """Open the run's folder, and return it with what is to be written there."""
    name = settings.factory.replace(".py:", "-").replace(":", "-").replace("/", "-").replace("\\", "-")
    folder = settings.out or Path("runs") / f"{name}-{settings.seed}"
    trainer.engine.from_main(RunFolder(folder, settings, _FREE).open)
    checkpoints = Checkpoints(folder / "checkpoints", every=settings.save_every)
    if settings.resume:
        checkpoints.restore(trainer)
    # Run once more from the start, if it was stopped before the first checkpoint.
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
    """Write the model and the plot, and say what came out and what to do next."""
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
    print(f"next: --resume --generations {2 * trainer.generation} trains on; tensorboard --logdir {folder} shows it")
