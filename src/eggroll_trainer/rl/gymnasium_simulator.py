"""Simulators for any Gymnasium environment: one environment for each member, stepped one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from .._utils.validation import check_int
from .base import Simulator, Step
from .observations import Flattened

__all__ = ["Environment", "GymnasiumSimulator", "make_environment", "name_of"]

# Names of the survival bonus in the info of Gymnasium's environments, older ones last.
_SURVIVAL = ("reward_survive", "reward_alive")

Environment = gymnasium.Env[Any, Any]


class GymnasiumSimulator(Simulator):
    """Any Gymnasium environment, made ``count`` times and stepped one by one.

    Gymnasium's own vector environments are no faster. They also reset environments whose episodes have ended, which a
    population of different policies does not need. Observations that are not a Box (Discrete, Dict, Tuple, …) are
    flattened by ``gymnasium.wrappers.FlattenObservation``; Discrete becomes one-hot.

    Wrappers that collect running statistics, such as ``gymnasium.wrappers.NormalizeObservation``, are refused: each
    environment would have its own statistics, of a single member, and checkpoints would not include them.

    Args:
        env: An id such as ``"CartPole-v1"``, or a function without arguments that makes an environment.
        count: Number of environments, at least 1.
        **kwargs: Arguments of ``gymnasium.make``; only with an id.

    Raises:
        TypeError: ``env`` is neither an id nor such a function, its spaces are not supported, or it does not know an
            argument.
        ValueError: There is no environment of that id, it collects running statistics, or ``count`` is below 1.
        RuntimeError: The environment can't be made, for example because a package is missing.

    Example:
        >>> with GymnasiumSimulator("CartPole-v1", count=2) as simulator:
        ...     observations = simulator.reset([0, 1])
        ...     step = simulator.step(np.array([0, 1]), np.array([True, False]))
        >>> observations.shape, step.rewards
        ((2, 4), array([1., 0.]))
    """

    def __init__(self, env: str | Callable[[], Environment], count: int, **kwargs: Any) -> None:
        count = check_int("count", count, 1)
        self._environments: list[Environment] = []
        try:
            for _ in range(count):
                self._environments.append(make_environment(env, kwargs))
            first = self._environments[0]
            _check_no_statistics(first)
            space = first.observation_space
            if not isinstance(space, spaces.Box) and space.is_np_flattenable:
                space = Flattened(space)
                self._environments = [gymnasium.wrappers.FlattenObservation(env) for env in self._environments]
            super().__init__(name_of(first), count, space, first.action_space)
            self._check_alike()
        except BaseException:
            self._close()
            raise

    def _check_alike(self) -> None:
        if len({id(env.unwrapped) for env in self._environments}) < self.count:
            raise ValueError(f"env made the same {self.name} twice; it must make a new one at every call")
        for index, env in enumerate(self._environments):
            if env.observation_space != self.observation_space or env.action_space != self.action_space:
                raise ValueError(
                    f"env must make environments of the same spaces, got {self.observation_space} and"
                    f" {self.action_space}, then, as number {index}, {env.observation_space} and {env.action_space}"
                )

    def _reset(self, seeds: list[int]) -> np.ndarray:
        observations = np.zeros((self.count, *self.observation_space.shape), self.observation_space.dtype)
        for index, (env, seed) in enumerate(zip(self._environments, seeds, strict=True)):
            try:
                observation, _ = env.reset(seed=seed)
            except Exception as error:
                raise self._failure(index, error) from error
            observations[index] = self._check_shape(index, observation)
        return observations

    def _step(self, actions: np.ndarray, ids: np.ndarray, step: Step) -> None:
        for index in ids.tolist():
            try:
                observation, reward, terminated, truncated, info = self._environments[index].step(actions[index])
                step.rewards[index] = reward
            except Exception as error:
                raise self._failure(index, error) from error
            step.observations[index] = self._check_shape(index, observation)
            step.terminated[index] = terminated
            step.truncated[index] = truncated
            step.survival[index] = next((info[key] for key in _SURVIVAL if key in info), 0.0)

    def _close(self) -> None:
        for env in self._environments:
            env.close()
        self._environments = []

    def _check_shape(self, index: int, observation: Any) -> Any:
        # NumPy would broadcast a smaller one.
        if np.shape(observation) != self.observation_space.shape:
            raise ValueError(
                f"{self._where(index)} gave an observation of shape {np.shape(observation)}, expected"
                f" {self.observation_space.shape} as its observation_space says"
            )
        return observation


def make_environment(env: str | Callable[[], Environment], kwargs: dict[str, Any]) -> Environment:
    """Return a new environment.

    Raises:
        TypeError: ``env`` is neither an id nor a function that makes environments, or it does not know an argument.
        ValueError: There is no environment of that id.
        RuntimeError: It can't be made.
    """
    if not isinstance(env, str) and not callable(env):
        raise TypeError(
            f"env must be an id such as 'CartPole-v1' or a function that makes an environment, got {env!r};"
            " for an environment, pass a function such as lambda: MyEnv()"
        )
    if not isinstance(env, str) and kwargs:
        raise TypeError(f"arguments are passed on with an id only, got {sorted(kwargs)}; let the function pass them")
    named = repr(env)
    try:
        made = gymnasium.make(env, **kwargs) if isinstance(env, str) else env()
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise RuntimeError(f"env={named} needs a package that is not installed: {error}{_renderer()}") from error
    except gymnasium.error.Error as error:
        raise ValueError(
            f"env={named} is not an environment that Gymnasium can make: {error}"
            " Import the package that registers it, or pass a function that makes it"
        ) from error
    except TypeError as error:
        raise TypeError(f"env={named} could not be made: {error}") from error
    except Exception as error:
        raise RuntimeError(f"env={named} could not be made, {type(error).__name__}: {error}{_renderer()}") from error
    if not isinstance(made, gymnasium.Env):
        raise TypeError(f"env={named} must make a gymnasium.Env, got a {type(made).__name__}")
    return made


def _renderer() -> str:
    """Return what to try if MuJoCo's renderer is chosen, as importing MuJoCo fails if the renderer is not there."""
    chosen = os.environ.get("MUJOCO_GL")
    return f". MUJOCO_GL={chosen} is set: if it is not installed here, unset it" if chosen else ""


def name_of(env: Environment) -> str:
    """Return the name of an environment for messages: its id, or its class."""
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def _check_no_statistics(env: Environment) -> None:
    """Raise ``ValueError`` if the environment or a wrapper collects running statistics and is not frozen."""
    name = name_of(env)
    while True:
        frozen = getattr(env, "update_running_mean", None) is False
        kept = [key for key, value in vars(env).items() if _is_statistics(key, value)]
        if kept and not frozen:
            raise ValueError(
                f"{type(env).__name__} of {name} collects running statistics in {kept[0]}, separately for every member,"
                " and they are lost when a run is resumed. Leave it out: policies normalise observations themselves"
                " with normalize=True, and the trainer's shaping makes the scale of rewards irrelevant. If the"
                " statistics don't change any more, set update_running_mean = False on it"
            )
        if not isinstance(env, gymnasium.Wrapper):
            return
        env = env.env


def _is_statistics(key: str, value: Any) -> bool:
    if key.lstrip("_") in ("running_mean", "running_var", "running_std"):
        return True
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    # Many libraries have a class RunningMeanStd of their own, named after the one in OpenAI's baselines.
    return any(
        any(cls.__name__.startswith("Running") for cls in type(v).__mro__)
        or {"mean", "var", "count"} <= getattr(v, "__dict__", {}).keys()
        for v in values
    )
