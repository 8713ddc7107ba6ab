"""How a fitness function is run for a population: as it stands if it is batched, else coalesced, else one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..population import Population
from ..warned import Warned
from . import thread_modes
from .coalesce import Coalescer
from .environments import Outside
from .member_state import Differentiated
from .scores import to_score, to_scores
from .view import view_class

F = TypeVar("F", bound=Callable[..., Any])


def batched(fitness_fn: F) -> F:
    """Mark a fitness function as written for a whole population.

    It is called with a :class:`~eggroll_trainer.Population` of ``N`` members (a chunk of the population) and returns
    ``N`` scores, ``[N]``; higher is better.

    Example:
        >>> @batched
        ... def fitness(population):
        ...     x = torch.ones(4, 3)
        ...     return population(x).mean((1, 2))  # [N, 4, O] → [N]
        >>> is_batched(fitness)
        True
    """
    try:
        fitness_fn._eggroll_batched = True  # type: ignore[attr-defined]
        return fitness_fn
    except AttributeError:
        # Bound methods and built-ins don't take attributes.
        marked: Any = functools.partial(fitness_fn)
        marked._eggroll_batched = True
        return marked


def is_batched(fitness_fn: Callable[..., Any]) -> bool:
    """Return whether the function was marked by :func:`batched`."""
    return getattr(fitness_fn, "_eggroll_batched", False)


def evaluate(
    population: Population,
    fitness_fn: Callable[..., Any],
    *,
    generation: int,
    coalesce: bool = True,
    warned: Warned,
) -> Tensor:
    """Return the fitness of every member, ``[N]`` in float64.

    Args:
        population: The members.
        fitness_fn: From a model to its fitness or, marked as batched, from the population to all.
        generation: Its index, to be noted on exceptions.
        coalesce: Whether a function of one model may be run for the members together.
        warned: The warnings already given; each is given once.

    Raises:
        TypeError: The function returned something that is not a number.
        ValueError: The function returned an array of the wrong shape.
    """
    if is_batched(fitness_fn):
        try:
            return to_scores(fitness_fn(population), len(population))
        except Exception as error:
            last = population.first + len(population) - 1
            _add_note(error, f"in the fitness of members {population.first}-{last} of generation {generation}")
            raise

    def annotate(error: BaseException, index: int) -> None:
        _add_note(error, f"in the fitness of member {population.first + index} of generation {generation}")

    def score(model: nn.Module) -> float:
        return to_score(fitness_fn(model))

    if coalesce:
        outside = Outside(fitness_fn)
        reason = _DIFFERENTIATES if _DIFFERENTIATES in warned else why_not_coalesced(population.model, outside)
        if reason is None:
            try:
                coalescer = Coalescer(population, score, warned, seeds=outside.seeds())
                return torch.tensor(coalescer.scores(annotate), dtype=torch.float64, device="cpu")
            except Differentiated:
                reason = _DIFFERENTIATES
                # Not to be tried again.
                warned.note(reason)
        warned.once(f"the fitness function is run for one member at a time: {reason}")
    return torch.tensor(_one_by_one(population, score, annotate), dtype=torch.float64, device="cpu")


def _one_by_one(
    population: Population,
    score: Callable[[nn.Module], float],
    annotate: Callable[[BaseException, int], None],
) -> list[float]:
    scores = []
    for i in range(len(population)):
        with thread_modes.kept():
            try:
                scores.append(score(population.member(i)))
            except BaseException as error:
                annotate(error, i)
                raise
    return scores


def _add_note(error: BaseException, text: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:
        # Python 3.10 has no notes; the message is the only place left.
        error.args = (f"{error.args[0]} ({text})", *error.args[1:]) if error.args else (text,)


_DIFFERENTIATES = "it takes gradients through its model"


def why_not_coalesced(model: nn.Module, outside: Outside) -> str | None:
    """Return why the members cannot take turns in a function, or None if nothing speaks against it.

    Args:
        model: The model.
        outside: What the function uses from outside.
    """
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            return "the model is a TorchScript module"
        try:
            view_class(module.__class__)
        except TypeError as error:
            return f"{type(module).__name__} cannot be subclassed: {error}"
    environment, lock = outside.environment(), outside.lock()
    if environment is not None:
        return (
            f"all its calls step the same environment {environment!r}; make one inside the function, and the members"
            " can run together"
        )
    if lock is not None:
        return f"all its calls take the same lock {lock!r}, which can be taken once"
    return None
