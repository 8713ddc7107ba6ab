"""Finding a simulator that all calls of a fitness function share: members who take turns would step it in turns."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch


def shared_environment(fitness_fn: Callable[..., Any]) -> str | None:
    """Return the name of an environment that the function, or one of its module that it uses, finds outside itself.

    An environment is an object with methods ``reset`` and ``step``, as Gymnasium's and dm_control's have.

    Example:
        >>> class Env:
        ...     def reset(self): ...
        ...     def step(self, action): ...
        >>> env = Env()
        >>> shared_environment(lambda model: env.step(model(env.reset())))
        'env'
        >>> shared_environment(lambda model: Env().step(0)) is None
        True
    """
    module = getattr(_function_of(fitness_fn), "__module__", None)
    seen: set[int] = set()
    todo: list[Any] = [fitness_fn]
    while todo:
        function = todo.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for name, value in _outer_values(function):
            if _is_environment(value):
                return name
            if getattr(_function_of(value), "__module__", None) == module:
                todo.append(value)
    return None


def _is_environment(value: Any) -> bool:
    if isinstance(value, (type, types.ModuleType, torch.optim.Optimizer)):
        # Trainers are optimizers that can be reset, and fitness functions may well look at theirs.
        return False
    return all(callable(getattr(value, method, None)) for method in ("reset", "step"))


def _function_of(value: Any) -> types.FunctionType | None:
    """Return the Python function behind a function, method, partial or callable object."""
    if isinstance(value, functools.partial):
        return _function_of(value.func)
    if isinstance(value, types.MethodType):
        return _function_of(value.__func__)
    if isinstance(value, types.FunctionType):
        return value
    call = vars(type(value)).get("__call__")
    return call if isinstance(call, types.FunctionType) else None


def _outer_values(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the global, closed-over, bound and default values that a function uses, by name."""
    if isinstance(value, functools.partial):
        for i, bound in enumerate((*value.args, *value.keywords.values())):
            yield f"argument {i}", bound
    function = _function_of(value)
    if function is None:
        return
    names = set(_names(function.__code__))
    owner = getattr(value, "__self__", None if isinstance(value, types.FunctionType) else value)
    for name, attribute in getattr(owner, "__dict__", {}).items():
        if name in names:
            yield name, attribute
    for name in sorted(names & function.__globals__.keys()):
        yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            # Not assigned yet.
            continue
    for default in function.__defaults__ or ():
        yield "a default argument", default


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
