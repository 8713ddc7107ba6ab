"""Finds out whether a simulator takes most of an evaluation's time, which batching the model cannot reduce."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

# Shorter evaluations get no advice.
_SECONDS = 1.0
# Smallest share of the time outside of the model's forwards for which there is advice.
_SHARE = 0.6
# Depth to which functions that the fitness function refers to are searched.
_DEPTH = 3


def simulator_advice(function: Callable[..., Any], members: int, seconds: float, in_model: float) -> str | None:
    """Return advice on a fitness function whose simulator runs for one member after the other, or None.

    Args:
        function: The fitness function.
        members: Number of members that were evaluated.
        seconds: Time that this took.
        in_model: Seconds of it that were spent in the model's forwards.
    """
    outside_model = seconds - in_model
    if in_model == 0 or seconds < _SECONDS or outside_model < _SHARE * seconds or not plays_environment(function):
        return None
    return (
        f"the evaluation of {members} members took {seconds:.1f} s. The model's forwards took {in_model:.1f} s of it;"
        f" the fitness function's own code took {outside_model:.1f} s, as it runs for one member after the other. It"
        " plays a Gymnasium environment. To step the environments of all members together, use the fitness function"
        " eggroll_trainer.rl.rollout.EpisodeReturn(ENV_ID); the user guide's page on reinforcement learning shows how"
    )


def plays_environment(function: Callable[..., Any]) -> bool:
    """Return whether a function, or one that it calls, refers to Gymnasium or holds one of its environments.

    Example:
        >>> plays_environment(lambda model: model.score())
        False
    """
    gymnasium = sys.modules.get("gymnasium")
    return gymnasium is not None and any(
        value is gymnasium or isinstance(value, (gymnasium.Env, gymnasium.vector.VectorEnv))
        for value in _reached(function, _DEPTH)
    )


def _reached(function: Any, depth: int) -> Iterator[Any]:
    """Iterate over the globals, attributes, closure and defaults of a function, and of functions among these."""
    while isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values())
        function = function.func
    owner = getattr(function, "__self__", None)
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        owner, function = function, type(function).__call__
    yield from getattr(owner, "__dict__", {}).values()
    if not isinstance(function, types.FunctionType):
        return
    names = {name for part in _parts(function.__code__) for name in part.co_names}
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    for cell in function.__closure__ or ():
        # Empty cells raise.
        with contextlib.suppress(ValueError):
            values.append(cell.cell_contents)
    # An import inside the function.
    values += [sys.modules[name] for name in names if name == "gymnasium" and name in sys.modules]
    for value in (*values, *(function.__defaults__ or ())):
        yield value
        if depth and (inspect.isfunction(value) or inspect.ismethod(value)):
            yield from _reached(value, depth - 1)


def _parts(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _parts(constant)
