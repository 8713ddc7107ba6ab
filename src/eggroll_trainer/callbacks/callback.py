"""The base class of callbacks, and the conversion of a user's functions and objects to callbacks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from ..checkpoints.folder import Checkpoints

# A trainer. Of type Any, as its module imports this one.
Trainer = Any
Metrics = MutableMapping[str, Any]


class Callback:
    """Observes a run: ``trainer.train(100, callback=…)`` takes one, or a list of them.

    All methods are optional, and your class need not inherit from this one. With several processes, the first one calls
    them. Changes that they make to the trainer's arguments and parameter groups reach all processes.

    Example:
        >>> import torch
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> class StopAt(Callback):
        ...     def __init__(self, fitness):
        ...         self.fitness = fitness
        ...
        ...     def on_generation(self, trainer, metrics):
        ...         return metrics["mean_fitness"] > self.fitness
        >>> trainer = EGGROLLTrainer(
        ...     model=torch.nn.Linear(3, 1), fitness_fn=lambda m: m(torch.ones(1, 3)).item(), learning_rate=0.1, seed=0
        ... )
        >>> trainer.train(500, verbose=False, callback=StopAt(5.0))["mean_fitness"] > 5
        True
    """

    def on_start(self, trainer: Trainer) -> None:
        """Prepare for training from ``trainer.generation`` on; called at the beginning of ``train``.

        Raise ``StopIteration`` to end training before the next generation.
        """

    def on_generation(self, trainer: Trainer, metrics: Metrics) -> bool | None:
        """Process a completed generation; called after each one.

        Args:
            trainer: The trainer; ``trainer.last_generation.scores`` has the members' fitness.
            metrics: The result of ``trainer.step()``. You may add entries: callbacks later in the list, such as
                loggers, see them.

        Returns:
            True to end training, like raising ``StopIteration``. Callbacks later in the list are still called.
        """
        return None

    def on_end(self, trainer: Trainer) -> None:
        """Clean up; called at the end of ``train``, even if an exception or a Ctrl-C ends it."""


Function = Callable[[int, list[float]], Any]
# The type of ``train(callback=…)``.
Callbacks = Callback | Checkpoints | Function | Iterable[Callback | Checkpoints | Function] | None

METHODS = ("on_start", "on_generation", "on_end")


class FunctionCallback(Callback):
    """Calls ``function(generation, fitness_history)`` with the trainer's list of mean fitnesses.

    Args:
        function: The function.
        every: Number of generations between calls. It is also called after the last generation.
    """

    def __init__(self, function: Function, every: int = 1) -> None:
        self.function, self.every = function, every

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", None) or repr(self.function)

    def is_due(self, generation: int) -> bool:
        """Return whether the function is called after this generation, even if it is not the last one."""
        return generation % self.every == 0

    def on_generation(self, trainer: Trainer, metrics: Metrics) -> bool | None:
        """Call the function."""
        result: bool | None = self.function(trainer.generation, trainer.fitness_history)
        return result


def as_callbacks(callback: Any, log_every: int = 1) -> list[Any]:
    """Convert the argument ``callback`` to a list of objects with some of the methods of :class:`Callback`.

    Raises:
        TypeError: An entry is neither a function nor an object with one of the methods, or has a misspelt method, or is
            a class.
    """
    if callback is None:
        return []
    if isinstance(callback, Iterable) and not isinstance(callback, str) and not _is_one(callback):
        return [_checked(one, log_every) for one in callback]
    return [_checked(callback, log_every)]


def _is_one(value: Any) -> bool:
    return callable(value) or any(hasattr(value, name) for name in METHODS)


def _checked(callback: Any, log_every: int) -> Any:
    if isinstance(callback, Checkpoints):
        return callback
    if isinstance(callback, type):
        if any(hasattr(callback, name) for name in METHODS):
            raise TypeError(f"callback must be an object, got the class {callback.__name__}: {callback.__name__}(…)")
    elif any(callable(getattr(callback, name, None)) for name in METHODS):
        _check_names(callback)
        return callback
    if not callable(callback):
        _check_names(callback)
        raise TypeError(
            "callback must be a function of (generation, fitness_history), an object with on_start, on_generation or"
            f" on_end, or a list of these; got {type(callback).__name__} {callback!r}"
        )
    return FunctionCallback(callback, log_every)


def _check_names(callback: Any) -> None:
    """Raise ``TypeError`` for methods named ``on_…`` that would never be called."""
    for name in dir(type(callback)):
        if name.startswith("on_") and name not in METHODS and callable(getattr(type(callback), name)):
            near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}? " if near else ""
            raise TypeError(
                f"callback {type(callback).__name__} has a method {name}, which is never called; {meant}The methods of"
                f" a callback are {', '.join(METHODS)}"
            )


def call(callback: Any, method: str, *arguments: Any) -> bool:
    """Call a method of a callback, if it has one, and return whether it asks to end training."""
    function = getattr(callback, method, None)
    if function is None:
        return False
    try:
        result = function(*arguments)
    except StopIteration:
        return True
    return is_true(result)


def is_true(value: Any) -> bool:
    """Return whether a value is True, as a bool of Python, NumPy or torch. Nonzero numbers don't count."""
    if isinstance(value, bool):
        return value
    return str(getattr(value, "dtype", "")) in ("bool", "torch.bool") and getattr(value, "ndim", 1) == 0 and bool(value)


def name_of(callback: Any) -> str:
    """Return the name of a callback for messages."""
    text = repr(callback)
    # The default repr tells nothing more than the class.
    return type(callback).__name__ if " object at 0x" in text else text
