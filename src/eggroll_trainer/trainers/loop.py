"""The loop over generations, with its progress bar, callbacks and checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from .._utils import validation
from .._utils.interrupts import exit_on_sigterm
from .._utils.memory import freed_memory_kept
from ..callbacks import Checkpoints, Progress
from ..callbacks.callback import Callbacks, FunctionCallback, as_callbacks, call, name_of
from ..checkpoints.generation import adopt, to_send


class Result(dict[str, Any]):
    """What ``train`` returns: a dictionary that shortens long lists when printed."""

    def __repr__(self) -> str:
        """Return the entries, with only the ends of long lists."""
        return f"{{{', '.join(f'{key!r}: {_shortened(value)}' for key, value in self.items())}}}"

    __str__ = __repr__


def run(
    trainer: Any,
    num_generations: int,
    verbose: bool,
    log_every: int,
    callback: Callbacks,
    checkpoints: Checkpoints | None,
) -> Result:
    """Run generations of a trainer; see :meth:`~eggroll_trainer.ESTrainer.train`.

    (The trainer is of type Any, as its module imports this one.)
    """
    num_generations = validation.check_int("num_generations", num_generations, 0)
    log_every = validation.check_int("log_every", log_every, 1)
    callbacks = as_callbacks(callback, log_every)
    keepers = [one for one in callbacks if isinstance(one, Checkpoints)]
    keepers += [] if checkpoints is None else [checkpoints]
    watchers = _Watchers(trainer, [one for one in callbacks if not isinstance(one, Checkpoints)])
    stopped_by: str | None = None
    with freed_memory_kept(), contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(num_generations, verbose and trainer.is_main))
        for keeper in keepers:
            _begin(trainer, keeper)
            stack.enter_context(exit_on_sigterm())
            stack.callback(keeper.save, trainer)
        stack.enter_context(watchers)
        stopped_by = watchers.start()
        trainer._watch.planned = trainer.generation + num_generations
        for i in range(num_generations):
            if stopped_by is not None:
                break
            with contextlib.ExitStack() as after:
                # Save after the callbacks, so that a checkpoint includes their changes; also if they raise.
                for keeper in keepers:
                    after.callback(_keep, trainer, keeper, trainer.generation)
                metrics = watchers.stepped()
                stopped_by = watchers.after_generation(metrics, last=i == num_generations - 1)
                progress.update({**metrics, "status": trainer.status})
        watchers.end()
    last = {key: values[-1] for key, values in trainer.history.items() if values}
    return Result(
        {
            "generation": trainer.generation,
            "best_fitness": trainer.best_fitness,
            **last,
            "stopped_by": stopped_by,
            "fitness_history": trainer.fitness_history,
        }
    )


def _begin(trainer: Any, keeper: Checkpoints) -> None:
    trainer.engine.from_main(lambda: keeper.begin(trainer))


def _keep(trainer: Any, keeper: Checkpoints, before: int) -> None:
    """Save a generation, if one was made."""
    if trainer.generation > before:
        keeper.after_generation(trainer)


class _Watchers:
    """The callbacks of a run. The first process calls them, and all processes apply their changes to the trainer.

    As a context manager, it calls ``on_end`` of the started callbacks at the end, in reverse order.
    """

    def __init__(self, trainer: Any, callbacks: Sequence[Any]) -> None:
        self._trainer, self._callbacks = trainer, callbacks
        self._started = contextlib.ExitStack()
        # Periods of the first process's callbacks, in generations. Other processes may have other callbacks.
        self._periods: list[int] = []

    def __enter__(self) -> _Watchers:
        return self

    def __exit__(self, *error: Any) -> None:
        # Without the other processes, which may have failed elsewhere.
        self._started.close()

    def start(self) -> str | None:
        """Start the callbacks; return the name of one that ends training at once, or None."""
        engine = self._trainer.engine
        self._periods = engine.from_main(
            lambda: [one.every if isinstance(one, FunctionCallback) else 1 for one in self._callbacks]
        )
        return self._call(self._start)

    def end(self) -> None:
        """End the callbacks, with all processes together."""
        self._call(self._started.close)

    def stepped(self) -> dict[str, Any]:
        """Run a generation and return its metrics."""
        trainer = self._trainer
        before = trainer.generation
        try:
            metrics: dict[str, Any] = trainer.step()
        except BaseException:
            # A delayed Ctrl-C may be raised after the generation was made; callbacks see it nevertheless.
            if trainer.generation > before and trainer.is_main:
                self._after_generation(_last_metrics(trainer), last=True)
            raise
        return metrics

    def after_generation(self, metrics: dict[str, Any], last: bool) -> str | None:
        """Call the callbacks after a generation; return the name of one that ends training, or None."""
        if not last and all(self._trainer.generation % period for period in self._periods):
            return None
        return self._call(lambda: self._after_generation(metrics, last))

    def _start(self) -> str | None:
        stopped = None
        for callback in self._callbacks:
            self._started.callback(call, callback, "on_end", self._trainer)
            if call(callback, "on_start", self._trainer):
                stopped = stopped or name_of(callback)
        return stopped

    def _after_generation(self, metrics: dict[str, Any], last: bool) -> str | None:
        trainer, stopped = self._trainer, []

        def look(callback: Any) -> None:
            if call(callback, "on_generation", trainer, metrics):
                stopped.append(callback)

        waiting: list[Any] = []
        with contextlib.ExitStack() as stack:
            # All callbacks see the generation, even if one of them raises.
            for callback in reversed(self._callbacks):
                if not last and isinstance(callback, FunctionCallback) and not callback.is_due(trainer.generation):
                    waiting.insert(0, callback)
                else:
                    stack.callback(look, callback)
        if stopped:
            # A callback ended training: this was the last generation, which functions that were not due see too.
            for callback in waiting:
                look(callback)
        return name_of(stopped[0]) if stopped else None

    def _call(self, function: Any) -> Any:
        """Call a function in the first process, and apply its changes to the trainer in all processes."""
        trainer = self._trainer
        if not self._periods:
            return None
        if trainer.engine.size == 1:
            return function()

        def told() -> tuple[Any, dict[str, Any]]:
            before = trainer.settings()
            return function(), to_send(trainer, before)

        result, settings = trainer.engine.from_main(told)
        if not trainer.is_main:
            adopt(trainer, settings)
        return result


def _last_metrics(trainer: Any) -> dict[str, Any]:
    """Return the metrics of the last generation, from the history."""
    generations = len(trainer.history["generation"])
    return {key: values[-1] for key, values in trainer.history.items() if len(values) == generations}


def _shortened(value: Any) -> str:
    if not isinstance(value, list) or len(value) <= 6:
        return repr(value)
    return f"[{value[0]!r}, {value[1]!r}, …, {value[-1]!r}] ({len(value)} values)"
