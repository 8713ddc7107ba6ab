"""What watches a run, and how a user's functions and objects become that."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from ..checkpoints.folder import Checkpoints

# A trainer; its module imports this one.
Trainer = Any
Metrics = MutableMapping[str, Any]


class Callback:
    """Watches a run: ``trainer.train(100, callback=…)`` takes one, or a list of them.

    All methods are optional, and a class need not inherit from this one to have them. Of several processes the first
    one calls them, and what they do to the trainer's arguments and parameter groups reaches all.

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
        """Prepare for the generation after ``trainer.generation``; called at the beginning of ``train``.

        Raising ``StopIteration`` ends training before the next generation.
        """

    def on_generation(self, trainer: Trainer, metrics: Metrics) -> bool | None:
        """Look at a generation that is over.

        Args:
            trainer: The trainer; ``trainer.last_generation.scores`` has the members' fitness.
            metrics: What ``trainer.step()`` returned. The callbacks that come later in the list see what is added to
                it, so that loggers log it.

        Returns:
            True to end training, as raising ``StopIteration`` does. Callbacks later in the list are called all the
            same.
        """
        return None

    def on_end(self, trainer: Trainer) -> None:
        """Clean up; called at the end of ``train``, also where an exception or a Ctrl-C ends it."""


Function = Callable[[int, list[float]], Any]
# What ``train(callback=…)`` takes.
Callbacks = Callback | Checkpoints | Function | Iterable[Callback | Checkpoints | Function] | None

METHODS = ("on_start", "on_generation", "on_end")


class FunctionCallback(Callback):
    """Calls ``function(generation, fitness_history)``, the trainer's list of mean fitnesses.

    Args:
        function: The function.
        every: Call it every so many generations, and after the last.
    """

    def __init__(self, function: Function, every: int = 1) -> None:
        self.function, self.every = function, every

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", None) or repr(self.function)

    def is_due(self, generation: int) -> bool:
        """Return whether the function is called after this generation if it is not the last."""
        return generation % self.every == 0

    def on_generation(self, trainer: Trainer, metrics: Metrics) -> bool | None:
        """Call the function."""
        result: bool | None = self.function(trainer.generation, trainer.fitness_history)
        return result


def as_callbacks(callback: Any, log_every: int = 1) -> list[Any]:
    """Return what a user gave as ``callback`` as a list of objects with some of the methods of :class:`Callback`.

    Raises:
        TypeError: Something is neither a function nor has one of the methods, has a method that is not called, or is a
            class.
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
    """Raise for methods that look like ours and would never be called."""
    for name in dir(type(callback)):
        if name.startswith("on_") and name not in METHODS and callable(getattr(type(callback), name)):
            near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}? " if near else ""
            raise TypeError(
                f"callback {type(callback).__name__} has a method {name}, which is never called; {meant}The methods of"
                f" a callback are {', '.join(METHODS)}"
            )


def call(callback: Any, method: str, *arguments: Any) -> bool:
    """Call a method of a callback, if it has it, and return whether it asks to end training."""
    function = getattr(callback, method, None)
    if function is None:
        return False
    try:
        result = function(*arguments)
    except StopIteration:
        return True
    return is_true(result)


def is_true(value: Any) -> bool:
    """Return whether a value is True, or NumPy's or torch's; a number other than zero is not."""
    if isinstance(value, bool):
        return value
    return str(getattr(value, "dtype", "")) in ("bool", "torch.bool") and getattr(value, "ndim", 1) == 0 and bool(value)


def name_of(callback: Any) -> str:
    """Return what a callback is called in messages."""
    text = repr(callback)
    # Python's own says nothing.
    return type(callback).__name__ if " object at 0x" in text else text
