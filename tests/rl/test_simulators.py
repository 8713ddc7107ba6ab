"""GymnasiumSimulator with environments of all kinds of spaces, and whatever can go wrong in them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import eggroll_trainer.rl
from eggroll_trainer.rl.rollout import EpisodeReturn
from eggroll_trainer.rl.simulators import GymnasiumSimulator, Simulator, make_simulator


class Toy(gymnasium.Env[Any, Any]):
    """Counts its steps; everything about it can be replaced."""

    def __init__(self, observation_space: Any = None, action_space: Any = None, limit: int = 10**9) -> None:
        self.observation_space = observation_space or spaces.Box(-1e9, 1e9, (2,), np.float32)
        self.action_space = action_space or spaces.Box(-1, 1, (3,), np.float32)
        self.limit = limit
        self.closed = 0
        self.actions: list[Any] = []

    def observe(self) -> Any:
        return np.full(2, len(self.actions), np.float32)

    def reward(self) -> float:
        return float(len(self.actions))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.actions = []
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        return self.observe(), self.reward(), len(self.actions) >= self.limit, False, {"reward_survive": 0.5}

    def close(self) -> None:
        self.closed += 1


def toys(count: int = 3, cls: type[Toy] = Toy, **kwargs: Any) -> tuple[Simulator, list[Toy]]:
    made: list[Toy] = []

    def make() -> Toy:
        made.append(cls(**kwargs))
        return made[-1]

    return GymnasiumSimulator(make, count), made


def ones(simulator: Simulator) -> np.ndarray:
    return np.ones(simulator.count, bool)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "MountainCar-v0", "FrozenLake-v1"])
def test_episodes_are_gymnasiums(name: str) -> None:
    seeds = [3, 1, 4]
    with make_simulator(name, 3) as simulator:
        first = simulator.reset(seeds)
        assert np.array_equal(first, simulator.reset(seeds))
        simulator.action_space.seed(0)
        actions = np.array([[simulator.action_space.sample() for _ in seeds] for _ in range(250)])
        active = ones(simulator)
        steps = []
        for now in actions:
            steps.append(simulator.step(now, active))
            active &= ~(steps[-1].terminated | steps[-1].truncated)
    for index, seed in enumerate(seeds):
        env = gymnasium.make(name)
        if isinstance(env.observation_space, spaces.Discrete):
            env = gymnasium.wrappers.FlattenObservation(env)
        observation, _ = env.reset(seed=seed)
        assert np.array_equal(observation, first[index])
        ended = False
        for step, action in zip(steps, actions[:, index], strict=True):
            if ended:
                # No automatic reset: nothing happens any more.
                assert not any(part[index].any() for part in step)
                continue
            observation, reward, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            assert np.array_equal(step.observations[index], observation)
            assert (step.rewards[index], step.terminated[index], step.truncated[index]) == (
                reward,
                terminated,
                truncated,
            )
        assert ended
        env.close()


def test_time_limits_truncate() -> None:
    with make_simulator("Pendulum-v1", 2, max_episode_steps=3) as simulator:
        simulator.reset([0, 1])
        actions, active = np.zeros((2, 1), np.float32), np.array([True, False])
        assert [simulator.step(actions, active).truncated.tolist() for _ in range(3)] == [[False, False]] * 2 + [
            [True, False]
        ]
        assert not simulator.step(actions, ~active).truncated.any()


def test_inactive_environments_are_not_stepped() -> None:
    simulator, made = toys(limit=2)
    simulator.reset([0, 1, 2])
    actions = np.zeros((3, 3), np.float32)
    step = simulator.step(actions, np.array([True, False, True]))
    assert [len(toy.actions) for toy in made] == [1, 0, 1]
    assert step.rewards.tolist() == [1, 0, 1] and step.survival.tolist() == [0.5, 0, 0.5]
    step = simulator.step(actions, np.array([True, True, False]))
    assert step.terminated.tolist() == [True, False, False]
    assert step.observations.tolist() == [[2, 2], [1, 1], [0, 0]]
    # Ended, and stepped on all the same.
    assert simulator.step(actions, ones(simulator)).rewards.tolist() == [3, 2, 2]


def test_environments_own_their_actions() -> None:
    simulator, made = toys(1)
    simulator.reset([0])
    actions = np.zeros((1, 3), np.float64)
    simulator.step(actions, ones(simulator))
    actions[:] = 1
    assert made[0].actions[0].tolist() == [0, 0, 0] and made[0].actions[0].dtype == np.float64


@pytest.mark.parametrize(
    ("space", "actions"),
    [
        (spaces.Discrete(3, start=-1), [-1, 0, 1]),
        (spaces.MultiDiscrete([2, 5]), [[0, 4], [1, 0], [1, 1]]),
        (spaces.MultiBinary(2), [[0, 1], [1, 0], [1, 1]]),
        (spaces.MultiBinary(2), [[False, True], [True, False], [True, True]]),
        (spaces.Box(0, 9, (2,), np.int32), [[0, 9], [1, 2], [3, 4]]),
    ],
)
def test_actions_of_integers(space: spaces.Space[Any], actions: list[Any]) -> None:
    simulator, made = toys(action_space=space)
    simulator.reset([0, 1, 2])
    simulator.step(np.array(actions), ones(simulator))
    for toy, action in zip(made, actions, strict=True):
        assert space.contains(toy.actions[0]) and np.array_equal(toy.actions[0], action)


@pytest.mark.parametrize(
    ("space", "observation", "flat"),
    [
        (spaces.Discrete(3), 2, [0, 0, 1]),
        (spaces.Tuple((spaces.Discrete(2), spaces.Box(-1, 1, (2,)))), (1, np.array([0.5, -1])), [0, 1, 0.5, -1]),
        (spaces.Dict(a=spaces.Box(-1, 1, (1,)), b=spaces.MultiBinary(2)), {"a": [0.5], "b": [1, 0]}, [0.5, 1, 0]),
    ],
)
def test_observations_are_flattened(space: Any, observation: Any, flat: list[float]) -> None:
    class Observing(Toy):
        def observe(self) -> Any:
            return observation

    simulator, _ = toys(2, Observing, observation_space=space)
    assert simulator.observation_space.shape == (len(flat),)
    assert simulator.reset([0, 1]).tolist() == [flat, flat]


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_observations_keep_the_dtype_of_their_space(dtype: type) -> None:
    simulator, _ = toys(observation_space=spaces.Box(0, 255, (2,), dtype))
    assert simulator.reset([0, 1, 2]).dtype == dtype


@pytest.mark.parametrize(
    ("env", "kwargs", "error", "message"),
    [
        (
            "Nothing-v0",
            {},
            ValueError,
            "env='Nothing-v0' is not an environment that Gymnasium can make: .*doesn't exist",
        ),
        ("not an id", {}, ValueError, "env='not an id' is not an environment that Gymnasium can make: Malformed"),
        ("nowhere:Nothing-v0", {}, RuntimeError, "needs a package that is not installed: No module named 'nowhere'"),
        ("CartPole-v1", {"wind": 1}, TypeError, "'CartPole-v1' could not be made: .*'wind'"),
        (
            "CartPole-v1",
            {"max_episode_steps": -7},
            RuntimeError,
            "'CartPole-v1' could not be made, .*positive.*-7",
        ),
        (Toy, {"limit": 1}, TypeError, "arguments are passed on with an id only, got .'limit'."),
        (Toy(), {}, TypeError, "env must be an id .*pass a function such as lambda"),
        (lambda: 3, {}, TypeError, "must make a gymnasium.Env, got a int"),
        (lambda: 1 / 0, {}, RuntimeError, "could not be made, ZeroDivisionError: division by zero"),
    ],
)
def test_environments_that_cannot_be_made(
    env: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_simulator(env, 2, **kwargs)


def test_a_missing_dependency() -> None:
    def make() -> Any:
        raise gymnasium.error.DependencyNotInstalled('run `pip install "gymnasium[box2d]"`')

    with pytest.raises(RuntimeError, match=r"needs a package that is not installed: run `pip install") as caught:
        GymnasiumSimulator(make, 1)
    assert isinstance(caught.value.__cause__, gymnasium.error.DependencyNotInstalled)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"observation_space": spaces.Sequence(spaces.Discrete(2))}, r"observations of Sequence.*TransformObservation"),
        ({"action_space": spaces.Dict(a=spaces.Discrete(2))}, r"actions of Dict.*TransformAction"),
    ],
)
def test_unsupported_spaces(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        toys(**arguments)


def test_functions_must_make_environments_anew_and_alike() -> None:
    toy = Toy()
    with pytest.raises(ValueError, match="env made the same Toy twice"):
        GymnasiumSimulator(lambda: toy, 2)
    assert toy.closed
    sizes = iter([2, 3])
    with pytest.raises(ValueError, match="must make environments of the same spaces.*as number 1"):
        GymnasiumSimulator(lambda: Toy(spaces.Box(0, 1, (next(sizes),))), 2)


class RunningStat:
    def __init__(self) -> None:
        self.n = 0


class Welford:
    def __init__(self) -> None:
        self.mean, self.var, self.count = 0.0, 1.0, 0


class Frame:
    """As a DataFrame is: it can tell its mean, and gathers nothing."""

    def mean(self) -> float:
        return 0.0

    var = count = update = mean


def keeping(value: Any, key: str = "kept", frozen: bool = False, cls: type = gymnasium.Wrapper) -> Any:
    env = cls(Toy())
    setattr(env, key, value)
    if frozen:
        env.update_running_mean = False
    return env


def around(env: Any) -> Any:
    return gymnasium.wrappers.TimeLimit(gymnasium.wrappers.ClipReward(env, -1, 1), 9)


STATISTICS: list[tuple[str, Any]] = [
    ("NormalizeObservation", lambda: gymnasium.wrappers.NormalizeObservation(Toy())),
    ("NormalizeReward", lambda: gymnasium.wrappers.NormalizeReward(Toy())),
    ("NormalizeReward", lambda: around(gymnasium.wrappers.NormalizeReward(Toy()))),
    ("Wrapper", lambda: around(keeping(gymnasium.wrappers.utils.RunningMeanStd()))),
    ("Wrapper", lambda: keeping({"position": RunningStat()})),
    ("Wrapper", lambda: keeping([Welford()])),
    ("Wrapper", lambda: keeping(np.zeros(2), "_running_mean")),
    ("Toy", lambda: around(keeping(Welford(), cls=lambda env: env))),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("name", "make"), STATISTICS)
def test_running_statistics_in_wrappers_are_refused(name: str, make: Any) -> None:
    for cls in (lambda make: GymnasiumSimulator(make, 2), EpisodeReturn):
        with pytest.raises(ValueError, match=f"{name} of Toy collects running statistics.*normalize=True"):
            cls(make)


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_that_do_not_run_are_fine(frozen: bool) -> None:
    make = (lambda: keeping(Welford(), frozen=True)) if frozen else (lambda: keeping(Frame()))
    GymnasiumSimulator(make, 2).reset([0, 1])


@pytest.mark.parametrize("count", [0, -1])
def test_counts_below_one(count: int) -> None:
    with pytest.raises(ValueError, match=f"count must be at least 1, got {count}"):
        make_simulator("CartPole-v1", count)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        make_simulator("CartPole-v1", 1, threads=0)


@pytest.mark.parametrize(
    ("seeds", "error", "message"),
    [
        ([0, 1], ValueError, "one for each of the 3 environments, got 2"),
        ([0, -1, 2], ValueError, r"seeds\[1\] must be at least 0, got -1"),
        ([0, 1.5, 2], TypeError, r"seeds\[1\] must be an integer"),
    ],
)
def test_bad_seeds(seeds: list[Any], error: type[Exception], message: str) -> None:
    simulator, _ = toys()
    with pytest.raises(error, match=message):
        simulator.reset(seeds)


def test_seeds_of_numpy() -> None:
    simulator, made = toys()
    simulator.reset(np.arange(3))  # type: ignore[arg-type]
    assert [toy.np_random_seed for toy in made] == [0, 1, 2]


@pytest.mark.parametrize(
    ("space", "actions", "active", "error", "message"),
    [
        (None, np.zeros((2, 3)), [True] * 3, ValueError, r"actions must be of shape \(3, 3\).*got \(2, 3\)"),
        (None, np.zeros((3, 3), complex), [True] * 3, TypeError, "actions must be floating point.*complex128"),
        (None, np.full((3, 3), np.nan), [False, True, True], ValueError, r"actions\[1\] is not finite"),
        (None, np.zeros((3, 3)), [1, 1, 1], TypeError, "active must be of bool, got int64"),
        (None, np.zeros((3, 3)), [True] * 2, ValueError, r"active must be of shape \(3,\), got \(2,\)"),
        (spaces.Discrete(2), np.zeros(3), [True] * 3, TypeError, "actions must be integers.*Discrete.*float64"),
        (
            spaces.Discrete(2),
            np.array([2, 0, -1]),
            [False, True, True],
            ValueError,
            r"actions\[2\] must be in Discrete",
        ),
        (spaces.MultiBinary(1), np.array([[0], [2], [1]]), [True] * 3, ValueError, r"actions\[1\] must be in Multi"),
    ],
)
def test_bad_steps(space: Any, actions: np.ndarray, active: Any, error: type[Exception], message: str) -> None:
    simulator, made = toys(action_space=space)
    simulator.reset([0, 1, 2])
    with pytest.raises(error, match=message):
        simulator.step(actions, np.array(active))
    assert not any(toy.actions for toy in made)


class Failing(Toy):
    """Environment 1 of its simulator does what the subclass says at its second step."""

    fails = ""

    def failing(self) -> bool:
        return len(self.actions) == 2 and self.np_random_seed == 1

    def observe(self) -> Any:
        if self.failing() and self.fails == "raise":
            raise KeyError("oops")
        if self.failing() and self.fails == "shape":
            return np.zeros(1, np.float32)
        observation = super().observe()
        if self.failing() and self.fails == "observation":
            observation[1] = np.nan
        return observation

    def reward(self) -> Any:
        if self.failing() and self.fails == "reward":
            return float("-inf")
        return "much" if self.failing() and self.fails == "no number" else super().reward()


@pytest.mark.parametrize(
    ("fails", "error", "message"),
    [
        ("raise", RuntimeError, "raised KeyError: 'oops'"),
        ("observation", ValueError, r"gave an observation that is not finite: \[ 2. nan\]"),
        ("reward", ValueError, "gave a reward that is not finite: -inf"),
        ("no number", RuntimeError, "raised ValueError: could not convert string to float"),
        ("shape", ValueError, r"gave an observation of shape \(1,\), expected \(2,\)"),
    ],
)
def test_failures_name_the_environment(
    fails: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "fails", fails)
    simulator, _ = toys(cls=Failing)
    simulator.reset([0, 1, 2])
    actions = np.zeros((3, 3), np.float32)
    simulator.step(actions, ones(simulator))
    with pytest.raises(error, match=f"Failing, environment 1 of 3, at step 2, {message}") as caught:
        simulator.step(actions, ones(simulator))
    assert (caught.value.__cause__ is not None) == (error is RuntimeError)
    with pytest.raises(RuntimeError, match="Failing must be reset before it is stepped"):
        simulator.step(actions, ones(simulator))
    simulator.reset([0, 1, 2])
    simulator.step(actions, ones(simulator))


def test_a_failure_at_a_reset_names_the_environment() -> None:
    class NoStart(Toy):
        def observe(self) -> Any:
            return np.full(2, np.nan if self.np_random_seed else 0)

    simulator, _ = toys(cls=NoStart)
    with pytest.raises(ValueError, match="NoStart, environment 1 of 3, at its reset, gave an observation"):
        simulator.reset([0, 1, 2])


def test_stepping_before_a_reset_and_after_closing() -> None:
    simulator, made = toys()
    with pytest.raises(RuntimeError, match="Toy must be reset before it is stepped"):
        simulator.step(np.zeros((3, 3)), ones(simulator))
    with simulator:
        simulator.reset([0, 1, 2])
    simulator.close()
    assert [toy.closed for toy in made] == [1, 1, 1]
    for call in (lambda: simulator.reset([0, 1, 2]), lambda: simulator.step(np.zeros((3, 3)), ones(simulator))):
        with pytest.raises(RuntimeError, match="the simulator of Toy is closed"):
            call()


def test_the_core_does_without_gymnasium() -> None:
    code = "import sys, eggroll_trainer; sys.exit('gymnasium' in sys.modules or 'eggroll_trainer.rl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_renderer_that_is_not_there_matters_to_mujoco_alone() -> None:
    # MuJoCo looks for it when it is imported.
    code = """if True:
        from eggroll_trainer.rl.simulators import make_simulator
        make_simulator("CartPole-v1", 2).close()
        try:
            make_simulator("HalfCheetah-v5", 2)
        except RuntimeError as error:
            print(error)
    """
    environment = {**os.environ, "MUJOCO_GL": "none"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "HalfCheetah-v5' could not be made" in done.stdout and "MUJOCO_GL=none is set" in done.stdout


def test_rl_says_how_to_install_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs Gymnasium: pip install 'eggroll_trainer\[rl\]'"):
        importlib.reload(eggroll_trainer.rl)
