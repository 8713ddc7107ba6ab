"""Chooses the fastest exact simulator of an environment."""

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
    """Return the fastest simulator that is bitwise equal to Gymnasium's environments.

    For MuJoCo's six locomotion tasks it is a :class:`~eggroll_trainer.rl.locomotion.LocomotionSimulator`. For
    everything else, and for environments with a render mode, it is a :class:`GymnasiumSimulator`. If a version or an
    option would make the former differ, it is also the latter, with a warning.

    Args:
        env: An id such as ``"HalfCheetah-v5"``, or a function without arguments that makes an environment.
        count: Number of environments, at least 1.
        threads: Number of threads for MuJoCo; ``torch.get_num_threads()`` if None. The results don't depend on it.
        **kwargs: Arguments of ``gymnasium.make``; only with an id.

    Raises:
        TypeError: As for :class:`GymnasiumSimulator`.
        ValueError: As for :class:`GymnasiumSimulator`, or ``threads`` is below 1.
        RuntimeError: As for :class:`GymnasiumSimulator`.

    Example:
        >>> with make_simulator("Swimmer-v5", count=2) as simulator:
        ...     type(simulator).__name__
        'LocomotionSimulator'
    """
    if threads is not None:
        check_int("threads", threads, 1)
    if isinstance(env, str) and kwargs.get("render_mode") is None:
        # The module needs MuJoCo, which other environments do not.
        try:
            from . import locomotion
        except Exception:
            # MuJoCo or its renderer is missing, which may raise anything. Gymnasium says so where it is needed.
            return GymnasiumSimulator(env, count, **kwargs)
        if env in locomotion.TASKS:
            try:
                return locomotion.LocomotionSimulator(env, count, threads=threads, **kwargs)
            except locomotion.NotExactError as error:
                warnings.warn(f"{error}; Gymnasium's own environment is used, which is slower", stacklevel=2)
    return GymnasiumSimulator(env, count, **kwargs)
