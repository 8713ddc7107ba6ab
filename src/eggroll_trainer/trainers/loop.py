"""The loop over generations, with what watches it: a progress bar, a callback, checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from .._utils import validation
from .._utils.interrupts import exit_on_sigterm
from .._utils.memory import freed_memory_kept
from ..callbacks import Checkpoints, Progress
from ..checkpoints.generation import adopt, to_send

Callback = Callable[[int, list[float]], Any]


def run(
    trainer: Any,
    num_generations: int,
    verbose: bool,
    log_every: int,
    callback: Callback | None,
    checkpoints: Checkpoints | None,
) -> dict[str, Any]:
    """Run generations of a trainer; see :meth:`~eggroll_trainer.ESTrainer.train`.

    (The trainer is of type Any, as its module imports this one.)
    """
    num_generations = validation.check_int("num_generations", num_generations, 0)
    log_every = validation.check_int("log_every", log_every, 1)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    with freed_memory_kept(), contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(num_generations, verbose and trainer.is_main))
        if checkpoints is not None:
            trainer.engine.from_main(lambda: checkpoints.begin(trainer))
            stack.enter_context(exit_on_sigterm())
            stack.callback(checkpoints.save, trainer)
        for i in range(num_generations):
            progress.update(trainer.step())
            if checkpoints is not None:
                checkpoints.after_generation(trainer)
            if callback is not None and (trainer.generation % log_every == 0 or i == num_generations - 1):
                _call(trainer, callback)
    last = {key: values[-1] for key, values in trainer.history.items() if values}
    return {
        "generation": trainer.generation,
        "best_fitness": trainer.best_fitness,
        **last,
        "fitness_history": trainer.fitness_history,
    }


def _call(trainer: Any, callback: Callback) -> None:
    """Call a user's function in the first process, and follow what it did to the trainer in all."""
    if trainer.engine.size == 1:
        callback(trainer.generation, trainer.fitness_history)
        return

    def call() -> dict[str, Any]:
        before = trainer.settings()
        callback(trainer.generation, trainer.fitness_history)
        return to_send(trainer, before)

    settings = trainer.engine.from_main(call)
    if not trainer.is_main:
        adopt(trainer, settings)
