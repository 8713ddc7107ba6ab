"""MuJoCo's locomotion tasks for a whole population at once, bitwise equal to Gymnasium's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import wrappers
from gymnasium.utils import seeding

from .._utils.validation import check_int
from . import physics
from .base import Simulator, Step
from .gymnasium_simulator import Environment, make_environment

_CHECKED_STEPS = 20
_CHECKED_SEEDS = 2

# Returns a field of MjData for the current environments, [n, …].
_Read = Callable[[str], np.ndarray]


class NotExactError(ValueError):
    """The fast simulator would differ from Gymnasium's environment."""


class _Task:
    """Observations and rewards of one kind of environment, for ``n`` of them at once.

    The order of operations and their dtypes are those of Gymnasium's code, as others would round differently.
    """

    entry_point: ClassVar[str]
    # Number of positions that exclude_current_positions_from_observation leaves out.
    excluded: ClassVar[int] = 1
    # Whether the noise of initial velocities is Gaussian instead of uniform.
    gaussian: ClassVar[bool] = False

    def __init__(self, env: Any, options: SimpleNamespace) -> None:
        self.model = env.model
        self.options = options
        self.fields: list[str] = ["qpos", "qvel"]

    def place(self, read: _Read) -> np.ndarray:
        """Return the coordinate whose change is the speed, ``[n]``."""
        return read("qpos")[:, 0]

    def observe(self, read: _Read) -> np.ndarray:
        """Return the observations, ``[n, observation]``."""
        return np.concatenate(self._state(read, read("qvel")), axis=1)

    def healthy(self, read: _Read) -> np.ndarray | None:
        """Return whether each environment is healthy, ``[n]``, or None if the task has no such condition."""
        return None

    def costs(self, read: _Read, actions: np.ndarray) -> np.ndarray:
        """Return the costs, which are subtracted from the rewards, ``[n]``."""
        cost: np.ndarray = self.options.ctrl_cost_weight * np.sum(np.square(actions), axis=1)
        return cost

    def _state(self, read: _Read, velocity: np.ndarray) -> list[np.ndarray]:
        skipped = self.excluded if self.options.exclude_current_positions_from_observation else 0
        return [read("qpos")[:, skipped:], velocity]

    def _contact_cost(self, forces: np.ndarray) -> np.ndarray:
        cost: np.ndarray = self.options.contact_cost_weight * np.sum(np.square(_flat(forces)), axis=1)
        return cost


class _HalfCheetah(_Task):
    entry_point = "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv"
    gaussian = True


class _Swimmer(_Task):
    entry_point = "gymnasium.envs.mujoco.swimmer_v5:SwimmerEnv"
    excluded = 2


class _Walker2d(_Task):
    entry_point = "gymnasium.envs.mujoco.walker2d_v5:Walker2dEnv"

    def observe(self, read: _Read) -> np.ndarray:
        return np.concatenate(self._state(read, np.clip(read("qvel"), -10, 10)), axis=1)

    def healthy(self, read: _Read) -> np.ndarray:
        qpos = read("qpos")
        within_z = _between(qpos[:, 1], self.options.healthy_z_range)
        return within_z & _between(qpos[:, 2], self.options.healthy_angle_range)


class _Hopper(_Walker2d):
    entry_point = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"

    def healthy(self, read: _Read) -> np.ndarray:
        limits = self.options.healthy_state_range
        state = np.concatenate((read("qpos")[:, 2:], read("qvel")), axis=1)
        return _between(state, limits).all(axis=1) & super().healthy(read)


class _Ant(_Task):
    entry_point = "gymnasium.envs.mujoco.ant_v5:AntEnv"
    excluded = 2
    gaussian = True

    def __init__(self, env: Any, options: SimpleNamespace) -> None:
        super().__init__(env, options)
        self._body = env.data.body(options.main_body).id
        self._contacts = bool(options.include_cfrc_ext_in_observation or options.contact_cost_weight)
        self.fields += ["xpos", "cfrc_ext"] if self._contacts else ["xpos"]

    def place(self, read: _Read) -> np.ndarray:
        return read("xpos")[:, self._body, 0]

    def observe(self, read: _Read) -> np.ndarray:
        parts = self._state(read, read("qvel"))
        if self.options.include_cfrc_ext_in_observation:
            parts.append(_flat(self._forces(read)[:, 1:]))
        return np.concatenate(parts, axis=1)

    def healthy(self, read: _Read) -> np.ndarray:
        qpos = read("qpos")
        low, high = self.options.healthy_z_range
        finite = np.isfinite(qpos).all(1) & np.isfinite(read("qvel")).all(1)
        return finite & (low <= qpos[:, 2]) & (qpos[:, 2] <= high)

    def costs(self, read: _Read, actions: np.ndarray) -> np.ndarray:
        cost = super().costs(read, actions)
        return cost + (self._contact_cost(self._forces(read)) if self._contacts else 0.0)

    def _forces(self, read: _Read) -> np.ndarray:
        low, high = self.options.contact_force_range
        return np.clip(read("cfrc_ext"), low, high)


class _Humanoid(_Task):
    entry_point = "gymnasium.envs.mujoco.humanoid_v5:HumanoidEnv"
    excluded = 2

    def __init__(self, env: Any, options: SimpleNamespace) -> None:
        super().__init__(env, options)
        self._mass = self.model.body_mass.sum()
        # Further parts of observations, and the first body or joint of each. Gymnasium too compares with `is True`.
        parts = {"cinert": 1, "cvel": 1, "qfrc_actuator": 6, "cfrc_ext": 1}
        self._parts = {f: n for f, n in parts.items() if getattr(options, f"include_{f}_in_observation") is True}
        self._contacts = bool("cfrc_ext" in self._parts or options.contact_cost_weight)
        self.fields += ["xipos", *self._parts]
        if self._contacts and "cfrc_ext" not in self._parts:
            self.fields.append("cfrc_ext")

    def place(self, read: _Read) -> np.ndarray:
        # The centre of mass, in all three coordinates, so that einsum adds in the same order as for one environment.
        weighted: np.ndarray = np.einsum("b,nbj->nj", self.model.body_mass, read("xipos"))
        return weighted[:, 0] / self._mass

    def observe(self, read: _Read) -> np.ndarray:
        parts = self._state(read, read("qvel"))
        parts += [_flat(read(field)[:, begin:]) for field, begin in self._parts.items()]
        return np.concatenate(parts, axis=1)

    def healthy(self, read: _Read) -> np.ndarray:
        return _between(read("qpos")[:, 2], self.options.healthy_z_range)

    def costs(self, read: _Read, actions: np.ndarray) -> np.ndarray:
        # Gymnasium computes this cost from the controls, which are float64, not from the actions.
        cost = super().costs(read, actions.astype(np.float64))
        low, high = self.options.contact_cost_range
        contact = self._contact_cost(read("cfrc_ext")) if self._contacts else np.zeros(len(actions))
        return cost + np.clip(contact, low, high)


TASKS: dict[str, type[_Task]] = {
    "HalfCheetah-v5": _HalfCheetah,
    "Ant-v5": _Ant,
    "Hopper-v5": _Hopper,
    "Walker2d-v5": _Walker2d,
    "Humanoid-v5": _Humanoid,
    "Swimmer-v5": _Swimmer,
}


class LocomotionSimulator(Simulator):
    """MuJoCo's locomotion tasks, with all environments stepped in one call and scored at once.

    Observations, rewards, terminations and truncations are bitwise equal to those of Gymnasium's environments. At
    construction, the simulator compares itself with Gymnasium's environment for a few steps. So an unknown version or
    option is an error, not another task.

    MuJoCo 4 steps all simulations in one call, but does not compute contact forces. Ant and Humanoid, which use these,
    are stepped one by one in a pool of threads. So are all tasks with MuJoCo 3.

    Args:
        env_id: One of HalfCheetah-v5, Ant-v5, Hopper-v5, Walker2d-v5, Humanoid-v5 and Swimmer-v5.
        count: Number of environments, at least 1.
        threads: Number of threads that step them; ``torch.get_num_threads()`` if None. The results don't depend on it.
        backend: ``"batch"`` for MuJoCo's own stepping, ``"threads"`` for the pool, ``"auto"`` for the faster one.
        **kwargs: Arguments of ``gymnasium.make``: weights of rewards, healthy ranges, ``max_episode_steps``, …

    Raises:
        NotExactError: The simulator differs from Gymnasium's environment. It is a ValueError.
        TypeError: The environment does not know an argument.
        ValueError: ``env_id`` or ``backend`` is not one of these, or a number is below 1.
        RuntimeError: The environment can't be made.

    Example:
        >>> with LocomotionSimulator("Hopper-v5", count=3, threads=1) as simulator:
        ...     observations = simulator.reset([0, 1, 2])
        ...     step = simulator.step(np.zeros((3, 3), np.float32), np.array([True, True, False]))
        >>> observations.shape, step.survival
        ((3, 11), array([1., 1., 0.]))
    """

    def __init__(
        self,
        env_id: str,
        count: int,
        *,
        threads: int | None = None,
        backend: Literal["auto", "batch", "threads"] = "auto",
        **kwargs: Any,
    ) -> None:
        if env_id not in TASKS:
            raise ValueError(
                f"env_id must be one of {', '.join(TASKS)}, got {env_id!r}; make_simulator takes any environment"
            )
        if backend not in ("auto", "batch", "threads"):
            raise ValueError(f"backend must be 'auto', 'batch' or 'threads', got {backend!r}")
        count = check_int("count", count, 1)
        threads = torch.get_num_threads() if threads is None else check_int("threads", threads, 1)
        env = make_environment(env_id, kwargs)
        try:
            super().__init__(env_id, count, env.observation_space, env.action_space)
            self._prepare(env, TASKS[env_id], threads, backend)
            try:
                self._check_exact(env)
            except BaseException:
                self.close()
                raise
        finally:
            env.close()

    def _prepare(self, env: Environment, task: type[_Task], threads: int, backend: str) -> None:
        _check_known(self.name, env, task)
        # A MujocoEnv. Of type Any, as its module cannot be imported without MuJoCo.
        unwrapped: Any = env.unwrapped
        options = _options(env)
        self._task = task(unwrapped, options)
        self._noise = options.reset_noise_scale
        self._initial = unwrapped.init_qpos, unwrapped.init_qvel
        self._substeps = unwrapped.frame_skip
        self._dt = unwrapped.dt
        self._weight = options.forward_reward_weight
        self._healthy_reward = getattr(options, "healthy_reward", 0.0)
        self._terminates = bool(getattr(options, "terminate_when_unhealthy", False))
        self._limit = env.spec.max_episode_steps if env.spec is not None else None
        contacts = "cfrc_ext" in self._task.fields
        if backend == "batch" and (physics.batch is None or contacts):
            reason = "does not compute contact forces, which it needs" if contacts else "needs MuJoCo 4"
            raise ValueError(f"{self.name} cannot use backend='batch': it {reason}; use backend='auto'")
        batched = backend != "threads" and physics.batch is not None and not contacts
        kind = physics.BatchPhysics if batched else physics.ThreadPhysics
        self._physics: physics.Physics = kind(unwrapped.model, self.count, threads, self._task.fields)
        self._places = np.zeros(self.count)

    def _check_exact(self, env: Environment) -> None:
        """Compare some steps with Gymnasium's environment.

        Raises:
            NotExactError: They differ.
        """
        seeds = list(range(self.count))
        active = np.arange(self.count) < _CHECKED_SEEDS
        rng = np.random.default_rng(0)
        # In single precision, like the actions of policies.
        actions = rng.uniform(-1.1, 1.1, (_CHECKED_STEPS, self.count, *(self.action_space.shape or ())))
        actions = actions.astype(np.float32)
        first = self.reset(seeds)
        steps = [self.step(a, active) for a in actions]
        for index in range(min(self.count, _CHECKED_SEEDS)):
            same = np.array_equal(first[index], env.reset(seed=index)[0])
            for action, step in zip(actions, steps, strict=True):
                observation, reward, terminated, truncated, info = env.step(action[index])
                expected = (observation, reward, terminated, truncated, info.get("reward_survive", 0.0))
                same &= all(np.array_equal(got[index], e) for got, e in zip(step, expected, strict=True))
            if not same:
                raise NotExactError(
                    f"{self.name} is simulated differently by Gymnasium {gymnasium.__version__} and MuJoCo"
                    f" {physics.mujoco.__version__} with the arguments given"
                )
        self._ready = False

    def _reset(self, seeds: list[int]) -> np.ndarray:
        qpos, qvel = (np.tile(initial, (self.count, 1)) for initial in self._initial)
        scale = self._noise
        for index, seed in enumerate(seeds):
            rng, _ = seeding.np_random(seed)
            qpos[index] += rng.uniform(low=-scale, high=scale, size=qpos.shape[1])
            if self._task.gaussian:
                qvel[index] += scale * rng.standard_normal(qvel.shape[1])
            else:
                qvel[index] += rng.uniform(low=-scale, high=scale, size=qvel.shape[1])
        self._physics.reset(qpos, qvel)
        read = self._reader(np.arange(self.count))
        self._places[:] = self._task.place(read)
        return self._task.observe(read)

    def _step(self, actions: np.ndarray, ids: np.ndarray, step: Step) -> None:
        try:
            self._physics.step(actions, ids, self._substeps)
        except physics.PhysicsError as error:
            raise self._failure(error.index, error) from error
        read = self._reader(ids)
        place = self._task.place(read)
        rewards = self._weight * ((place - self._places[ids]) / self._dt)
        self._places[ids] = place
        healthy = self._task.healthy(read)
        if healthy is not None:
            survival = healthy * self._healthy_reward
            rewards = rewards + survival
            step.survival[ids] = survival
            step.terminated[ids] = ~healthy & self._terminates
        step.rewards[ids] = rewards - self._task.costs(read, actions[ids])
        step.observations[ids] = self._task.observe(read)
        if self._limit is not None:
            step.truncated[ids] = self.elapsed[ids] >= self._limit

    def _close(self) -> None:
        self._physics.close()

    def _reader(self, ids: np.ndarray) -> _Read:
        """Return a function that reads fields of environments ``ids``, each only once."""
        known: dict[str, np.ndarray] = {}

        def read(field: str) -> np.ndarray:
            if field not in known:
                known[field] = self._physics.read(field, ids)
            return known[field]

        return read


def _check_known(name: str, env: Environment, task: type[_Task]) -> None:
    """Raise ``NotExactError`` unless the environment is Gymnasium's own, without wrappers that change its behaviour."""
    cls = type(env.unwrapped)
    made = f"{cls.__module__}:{cls.__qualname__}"
    if made != task.entry_point:
        raise NotExactError(f"{name} is registered as {made}, not Gymnasium's {task.entry_point}")
    while isinstance(env, gymnasium.Wrapper):
        if type(env) not in (wrappers.TimeLimit, wrappers.OrderEnforcing, wrappers.PassiveEnvChecker):
            raise NotExactError(f"{name} is wrapped in {type(env).__name__}")
        env = env.env


def _options(env: Environment) -> SimpleNamespace:
    """Return the arguments that the environment was made with, including defaults."""
    parameters = inspect.signature(type(env.unwrapped).__init__).parameters
    options = {name: parameter.default for name, parameter in parameters.items()}
    return SimpleNamespace(**{**options, **(env.spec.kwargs if env.spec is not None else {})})


def _between(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    low, high = limits
    return (low < values) & (values < high)


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)
