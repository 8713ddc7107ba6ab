"""Settings and functions for commands that take a ``MODULE:FACTORY``, which returns a model or a trainer."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from .._utils.importing import function_named
from ..trainers.base import ESTrainer
from ..trainers.from_settings import trainer_from

FACTORY = """FACTORY is a function that returns a model and its fitness function, or a trainer:

  def make():
      model = nn.Linear(10, 1)
      return model, lambda model: -(model(x) - y).square().mean().item()"""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What is trained, and how."""

    factory: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODULE:FACTORY")]
    """Function that returns a model and its fitness function, or a trainer. FILE.py:FACTORY works too."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE, an argument of the factory. VALUE is read as JSON if possible, else as text. May be repeated."""
    population_size: int = 256
    """Members in a generation. The options from here to --engine are for factories that return no trainer."""
    learning_rate: float = 0.03
    """Step size. With adam, about the step of a weight in a generation; with sgd, in units of sigma."""
    sigma: float = 0.1
    """Standard deviation of the perturbations."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer that takes the steps."""
    rank: int = 1
    """Rank of the perturbations; 0 for full rank."""
    antithetic: bool = True
    """Whether members come in pairs of opposite perturbations."""
    shaping: str = "zscore"
    """How scores become weights: zscore, centered_ranks, antithetic_sign or raw."""
    compile: bool = False
    """Whether batched forwards are compiled."""
    chunk_size: int | None = None
    """Members evaluated at a time; by default, as many as memory allows."""
    device: str | None = None
    """Device to train on; by default, the model's own."""
    engine: Literal["local", "torch", "ray"] | None = None
    """What evaluates the population; by default, torch under torchrun, else local."""
    seed: int = 0
    """Seed of the noise, and of torch while the factory runs."""


# Settings that a trainer from a factory has already.
_OF_TRAINERS = (
    *("population_size", "learning_rate", "sigma", "optimizer", "rank", "antithetic", "shaping", "compile"),
    *("chunk_size", "device", "engine"),
)


class UsageError(Exception):
    """The command line is wrong; the message says how."""


def make_trainer(settings: ModelSettings) -> tuple[ESTrainer, bool]:
    """Return a trainer for what the factory returns, and whether the factory returned the trainer itself.

    Exceptions of the factory itself are raised unchanged.

    Raises:
        UsageError: There is no such factory, an argument of it is malformed, it returns something else, or a setting is
            out of range.
    """
    try:
        factory = function_named("MODULE:FACTORY", settings.factory)
        given = _arguments(settings.set)
        _check_arguments(factory, given)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        made = factory(**given)
    try:
        return _trainer(settings, made), isinstance(made, ESTrainer)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def is_ours(error: BaseException) -> bool:
    """Return whether the library has raised an exception. Then its message suffices; others need a traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).split(".")[0] == "eggroll_trainer"


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


def _check_arguments(factory: Callable[..., Any], given: Mapping[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        name = getattr(factory, "__name__", repr(factory))
        raise ValueError(f"{name}() cannot be called with the arguments of --set: {error}") from error


def _trainer(settings: ModelSettings, made: Any) -> ESTrainer:
    """Return the trainer that a factory returned, or one for its model and fitness function."""
    if isinstance(made, ESTrainer):
        defaults = {field.name: field.default for field in dataclasses.fields(ModelSettings)}
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
    return trainer_from(settings, model=model, fitness_fn=fitness_fn, compile=settings.compile, device=settings.device)


def _described(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(one).__name__ for one in made)})"
    return type(made).__name__
