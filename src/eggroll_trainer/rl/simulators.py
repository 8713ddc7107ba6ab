"""The fastest simulator of an environment that is exact."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from .._utils.validation import check_int
from .base import Simulator, Step
from .gymnasium_simulator import Environment, GymnasiumSimulator, make_environment, name_of

__all__ = ["Environment", "GymnasiumSimulator", "Simulator", "Step", "make_environment", "make_simulator", "name_of"]


def make_simulator(
    env: str | Callable[[], Environment], count: int, *, threads: int | None = None, **kwargs: Any
) -> Simulator:
    """Return the fastest simulator that does to the bit what Gymnasium's environments do.

    That is a :class:`~eggroll_trainer.rl.locomotion.LocomotionSimulator` for MuJoCo's six locomotion tasks, and a
    :class:`GymnasiumSimulator` for everything else, for environments that are rendered, and, with a warning, for
    versions and options under which the former would differ.

    Args:
        env: An id such as ``"HalfCheetah-v5"``, or a function without arguments that makes an environment.
        count: How many environments, at least 1.
        threads: How many threads step MuJoCo; ``torch.get_num_threads()`` if None. The results don't depend on it.
        **kwargs: Passed on to ``gymnasium.make``; only with an id.

    Raises:
        TypeError: As :class:`GymnasiumSimulator` does.
        ValueError: As :class:`GymnasiumSimulator` does, or ``threads`` is below 1.
        RuntimeError: As :class:`GymnasiumSimulator` does.

    Example:
        >>> with make_simulator("Swimmer-v5", count=2) as simulator:
        ...     type(simulator).__name__
        'LocomotionSimulator'
    """
    if threads is not None:
        check_int("threads", threads, 1)
    if isinstance(env, str) and kwargs.get("render_mode") is None:
        # Needs MuJoCo, which other environments do without.
        try:
            from . import locomotion
        except ImportError:
            # Gymnasium says what is missing, if it is.
            return GymnasiumSimulator(env, count, **kwargs)
        if env in locomotion.TASKS:
            try:
                return locomotion.LocomotionSimulator(env, count, threads=threads, **kwargs)
            except locomotion.NotExactError as error:
                warnings.warn(f"{error}; Gymnasium's own environment is used, which is slower", stacklevel=2)
    return GymnasiumSimulator(env, count, **kwargs)
