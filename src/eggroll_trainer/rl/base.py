"""The interface of simulators, which step one environment for each member of a population."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from .._utils.validation import check_int


class Step(NamedTuple):
    """The results of a step of ``count`` environments. Rows of inactive environments are zero.

    Attributes:
        observations: ``[count, *observation]``.
        rewards: ``[count]``, float64.
        terminated: ``[count]``, bool: whether the episode has reached a terminal state.
        truncated: ``[count]``, bool: whether it was cut off, such as by a time limit.
        survival: ``[count]``, float64: the part of the reward that is a bonus for staying alive; zero if the
            environment does not report it.
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    survival: np.ndarray


class Simulator(ABC):
    """``count`` environments of one kind, stepped together.

    An environment is not reset when its episode ends: mark it as inactive, or continue to step it if it allows that. A
    simulator can be used in the process that made it, by one thread at a time.

    Subclasses implement ``_reset``, ``_step`` and ``_close``. This class checks arguments and results.

    Args:
        name: The environment's name in messages.
        count: Number of environments, at least 1.
        observation_space: Gymnasium's space of one environment's observations.
        action_space: Gymnasium's space of one environment's actions: Box, Discrete, MultiDiscrete or MultiBinary.

    Attributes:
        strict: Whether an observation or a reward that is not finite raises an error. True unless you set it to False.
        not_finite: If not strict, messages about such observations and rewards in the last reset or step, by the index
            of the environment. Observations are checked in single precision, as policies see them.

    Raises:
        TypeError: The spaces are of other kinds.
    """

    def __init__(
        self, name: str, count: int, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
    ) -> None:
        if not isinstance(observation_space, spaces.Box):
            raise TypeError(
                f"{name} has observations of {observation_space}, expected a Box;"
                " turn them into one with gymnasium.wrappers.TransformObservation"
            )
        if not isinstance(action_space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise TypeError(
                f"{name} has actions of {action_space}, expected a Box, Discrete, MultiDiscrete or MultiBinary;"
                " turn them into one with gymnasium.wrappers.TransformAction"
            )
        self.name = name
        self.count = count
        self.observation_space: spaces.Box = observation_space
        self.action_space: spaces.Space[Any] = action_space
        # Steps of each environment since its reset.
        self.elapsed = np.zeros(count, np.int64)
        self.strict, self.not_finite = True, dict[int, str]()
        self._ready = False
        self._closed = False

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Start an episode in every environment, as its ``reset(seed=seed)`` does.

        Args:
            seeds: ``[count]`` integers of at least 0; the same seed gives the same episode.

        Returns:
            The first observations, ``[count, *observation]``.

        Raises:
            TypeError: A seed is not an integer.
            ValueError: The number of seeds is not ``count``, one is negative, or an observation is not finite.
            RuntimeError: An environment raised, or the simulator is closed.
        """
        self._check_open()
        seeds = [check_int(f"seeds[{i}]", seed, 0) for i, seed in enumerate(seeds)]
        if len(seeds) != self.count:
            raise ValueError(f"seeds must be one for each of the {self.count} environments, got {len(seeds)}")
        self._ready = False
        self.not_finite = {}
        self.elapsed[:] = 0
        observations = self._reset(seeds)
        self._look("an observation", observations, np.arange(self.count))
        self._ready = True
        return observations

    def step(self, actions: np.ndarray, active: np.ndarray) -> Step:
        """Step the active environments.

        Args:
            actions: ``[count, *action]``, floating point for a Box of floats and integers otherwise. Values beyond the
                bounds of a Box are passed to the environment. Rows of inactive environments are ignored.
            active: ``[count]``, bool: the environments to step. The others do not change.

        Returns:
            The step, its arrays owned by the caller.

        Raises:
            TypeError: An argument has the wrong dtype.
            ValueError: An argument has the wrong shape, an action is not finite or not in its discrete space, or an
                observation or a reward is not finite.
            RuntimeError: An environment raised, there was no reset before, or the simulator is closed. After an error
                of an environment, reset the simulator.
        """
        self._check_open()
        if not self._ready:
            raise RuntimeError(f"{self.name} must be reset before it is stepped: call reset(seeds)")
        active = np.asarray(active)
        if active.dtype != bool:
            raise TypeError(f"active must be of bool, got {active.dtype}")
        if active.shape != (self.count,):
            raise ValueError(f"active must be of shape {(self.count,)}, got {active.shape}")
        self.not_finite = {}
        ids = np.flatnonzero(active)
        actions = self._check_actions(np.asarray(actions), ids)
        step = Step(
            np.zeros((self.count, *self.observation_space.shape), self.observation_space.dtype),
            np.zeros(self.count),
            np.zeros(self.count, bool),
            np.zeros(self.count, bool),
            np.zeros(self.count),
        )
        if not len(ids):
            return step
        # If this raises, only some environments have been stepped.
        self._ready = False
        self.elapsed[ids] += 1
        self._step(actions, ids, step)
        self._look("an observation", step.observations, ids)
        self._look("a reward", step.rewards, ids)
        self._ready = True
        return step

    def close(self) -> None:
        """Close the environments. The simulator cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def _reset(self, seeds: list[int]) -> np.ndarray:
        """Reset every environment and return the observations, ``[count, *observation]``."""

    @abstractmethod
    def _step(self, actions: np.ndarray, ids: np.ndarray, step: Step) -> None:
        """Step the environments ``ids`` (ascending, at least one) and write their rows of ``step``."""

    @abstractmethod
    def _close(self) -> None:
        """Close the environments."""

    def _failure(self, index: int, error: BaseException) -> RuntimeError:
        """Return an error that names the environment that raised ``error``."""
        return RuntimeError(f"{self._where(index)} raised {type(error).__name__}: {error}")

    def _where(self, index: int) -> str:
        doing = f"at step {self.elapsed[index]}" if self.elapsed[index] else "at its reset"
        return f"{self.name}, environment {index} of {self.count}, {doing},"

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the simulator of {self.name} is closed; make another")

    def _check_actions(self, actions: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Check actions, and return a copy in the dtype that the environments take."""
        space = self.action_space
        expected = (self.count, *(space.shape or ()))
        if actions.shape != expected:
            raise ValueError(f"actions must be of shape {expected}, one row for each environment, got {actions.shape}")
        kinds = "fiu" if isinstance(space, spaces.Box) and np.dtype(space.dtype).kind == "f" else "iu"
        if isinstance(space, spaces.MultiBinary):
            kinds = "iub"
        if actions.dtype.kind not in kinds:
            wanted = "floating point" if "f" in kinds else "integers"
            raise TypeError(f"actions must be {wanted} for {self.name}, whose actions are {space}, got {actions.dtype}")
        if actions.dtype.kind == "f":
            bad = _any(~np.isfinite(actions[ids])) if not np.isfinite(actions).all() else np.zeros(0, bool)
            if bad.any():
                index = int(ids[bad.argmax()])
                raise ValueError(
                    f"actions[{index}] is not finite: {actions[index]}; mark the environment as not active instead"
                )
            # Not cast to the space's dtype, as the dtype affects the rounding of control costs.
            return actions.copy()
        low, high = _bounds(space)
        chosen = actions[ids]
        outside = _any((chosen < low) | (chosen > high))
        if outside.any():
            index = int(ids[outside.argmax()])
            raise ValueError(f"actions[{index}] must be in {space}, got {actions[index]}")
        return actions.astype(space.dtype)

    def _look(self, what: str, values: np.ndarray, ids: np.ndarray) -> None:
        """Raise an error for values that are not finite or, if not strict, record the environments."""
        if values.dtype.kind != "f":
            return
        if not self.strict and what == "an observation" and values.itemsize > 4:
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
        if np.isfinite(values).all():
            return
        for index in ids[_any(~np.isfinite(values[ids]))].tolist():
            message = f"{self._where(index)} gave {what} that is not finite: {values[index]}"
            if self.strict:
                raise ValueError(
                    f"{message}; keep actions within the bounds of the action space, or wrap the environment to end"
                    " such episodes"
                )
            self.not_finite.setdefault(index, message)


def _bounds(space: spaces.Space[Any]) -> tuple[Any, Any]:
    """Return the lowest and highest allowed action; infinite if the environment itself handles all actions."""
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, spaces.MultiBinary):
        return 0, 1
    return -np.inf, np.inf


def _any(mask: np.ndarray) -> np.ndarray:
    """Return ``[n]``, whether any is true in each row of ``[n, …]``."""
    return np.asarray(mask.any(axis=tuple(range(1, mask.ndim))))
