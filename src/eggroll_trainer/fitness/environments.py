"""What all calls of a fitness function share, looked through for what forbids that members take turns."""

from __future__ import annotations

import functools
import sysconfig
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
# Containers with more values than this are data.
_FEW = 64


class Outside:
    """What a fitness function and the functions that it calls use from outside; libraries are not looked into.

    Attributes:
        values: The values, by the names under which they are used.
        names: All names of globals and attributes in the functions.

    Example:
        >>> class Env:
        ...     def reset(self): ...
        ...     def step(self, action): ...
        >>> env = Env()
        >>> Outside(lambda model: env.step(model(env.reset()))).environment()
        'env'
        >>> Outside(lambda model: Env().step(0)).environment() is None
        True
    """

    def __init__(self, fitness_fn: Callable[..., Any]) -> None:
        self.values: list[tuple[str, Any]] = []
        self.names: set[str] = set()
        seen: set[tuple[int, int]] = set()
        todo: list[tuple[str, Any]] = [("fitness_fn", fitness_fn)]
        while todo:
            name, value = todo.pop()
            # Methods are made anew at every look. The values stay alive in the list, so that no other gets their id.
            key = (id(value.__func__), id(value.__self__)) if isinstance(value, types.MethodType) else (id(value), 0)
            if key in seen:
                continue
            seen.add(key)
            self.values.append((name, value))
            todo += self._next(name, value)

    def environment(self) -> str | None:
        """Return the name of an environment among the values: an object with methods ``reset`` and ``step``.

        Gymnasium's and dm_control's have them.
        """
        return next((name for name, value in self.values if _is_environment(value)), None)

    def lock(self) -> str | None:
        """Return the name of a lock among the values that a thread can take only once."""
        return next((name for name, value in self.values if isinstance(value, _LOCKS)), None)

    def seeds(self) -> bool:
        """Return whether the functions use a name that tells of seeding."""
        return any("seed" in name.lower() for name in self.names)

    def _next(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Yield what can be reached from a value in one step."""
        if isinstance(value, functools.partial):
            yield name, value.func
            yield from ((f"argument {i}", bound) for i, bound in enumerate(value.args))
            yield from value.keywords.items()
        if isinstance(value, (list, tuple, set)) and len(value) <= _FEW:
            yield from ((name, item) for item in value)
        elif isinstance(value, dict) and len(value) <= _FEW:
            yield from ((name, item) for item in value.values())
        function = _function_of(value)
        if function is not None and not function.__code__.co_filename.startswith(_LIBRARIES):
            names = set(_names(function.__code__))
            self.names |= names
            yield from _outer_values(function, names)
            owner = getattr(value, "__self__", value)
            if owner is not function:
                yield from _members(owner, names)
        elif isinstance(value, types.ModuleType):
            if not (getattr(value, "__file__", None) or _LIBRARIES[0]).startswith(_LIBRARIES):
                yield from ((name, vars(value)[name]) for name in sorted(self.names & vars(value).keys()))
        elif function is None and not isinstance(value, type):
            # Attributes of attributes: in `config.world.env` all are names of the function.
            yield from _members(value, self.names)


_LOCKS = (type(threading.Lock()), threading.Semaphore)


def _is_environment(value: Any) -> bool:
    if isinstance(value, (type, types.ModuleType, torch.optim.Optimizer)):
        # Trainers are optimizers that can be reset, and fitness functions may well look at theirs.
        return False
    return all(callable(getattr(value, method, None)) for method in ("reset", "step"))


def _function_of(value: Any) -> types.FunctionType | None:
    """Return the Python function behind a function, method or callable object."""
    if isinstance(value, types.MethodType):
        return _function_of(value.__func__)
    if isinstance(value, types.FunctionType):
        return value
    call = None if isinstance(value, type) else getattr(type(value), "__call__", None)  # noqa: B004
    return call if isinstance(call, types.FunctionType) else None


def _outer_values(function: types.FunctionType, names: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield the global, closed-over and default values that a function uses, by name."""
    for name in sorted(names & function.__globals__.keys()):
        yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            # Not assigned yet.
            continue
    for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield "a default argument", default


def _members(owner: Any, names: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield the attributes and methods of an object that are among the names."""
    attributes = getattr(owner, "__dict__", {})
    for name in sorted(names & attributes.keys()):
        yield name, attributes[name]
    for name in sorted(names):
        attribute = next((vars(cls)[name] for cls in type(owner).__mro__ if name in vars(cls)), None)
        if isinstance(attribute, types.FunctionType):
            yield name, types.MethodType(attribute, owner)
        elif isinstance(attribute, (staticmethod, classmethod)):
            yield name, attribute.__func__
        elif not hasattr(attribute, "__get__"):
            yield name, attribute


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
