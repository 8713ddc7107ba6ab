"""LocomotionSimulator against Gymnasium's own environments, bit for bit."""

from __future__ import annotations

from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest

from eggroll_trainer.rl import locomotion, physics
from eggroll_trainer.rl.locomotion import TASKS, LocomotionSimulator, NotExactError
from eggroll_trainer.rl.simulators import GymnasiumSimulator, Simulator, Step, make_simulator

SEEDS = [0, 7, 123456789]
# All that is asked of contacts left out: MuJoCo can then step these in a batch too.
WITHOUT_CONTACTS: dict[str, dict[str, Any]] = {
    "Ant-v5": {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0},
    "Humanoid-v5": {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("HalfCheetah-v5", {"forward_reward_weight": 0.3, "ctrl_cost_weight": 0.7, "reset_noise_scale": 0.3}),
    ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False, "frame_skip": 2}),
    ("Swimmer-v5", {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": 1}),
    ("Hopper-v5", {"terminate_when_unhealthy": False, "healthy_reward": 3}),
    ("Hopper-v5", {"healthy_state_range": (-1.5, 1.5), "healthy_z_range": (1.2, 1.3)}),
    ("Walker2d-v5", {"healthy_z_range": (1.1, 1.3), "healthy_angle_range": (-0.1, 0.1), "max_episode_steps": 5}),
    ("Walker2d-v5", {"exclude_current_positions_from_observation": False, "max_episode_steps": -1}),
    ("Ant-v5", {"contact_force_range": (-0.2, 0.5), "contact_cost_weight": 0.3, "main_body": "aux_1"}),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "healthy_z_range": (0.5, 0.8), "main_body": 3}),
    ("Ant-v5", WITHOUT_CONTACTS["Ant-v5"]),
    ("Humanoid-v5", {"contact_cost_range": (0.001, 0.002), "contact_cost_weight": 1e-3}),
    ("Humanoid-v5", {"include_cinert_in_observation": False, "include_qfrc_actuator_in_observation": False}),
    ("Humanoid-v5", {"include_cvel_in_observation": False, "include_cfrc_ext_in_observation": False}),
    ("Humanoid-v5", {**WITHOUT_CONTACTS["Humanoid-v5"], "terminate_when_unhealthy": False}),
]


def random_actions(simulator: Simulator, steps: int, dtype: type = np.float32) -> np.ndarray:
    """Return actions ``[steps, count, action]``, some of them a little out of bounds."""
    assert isinstance(simulator.action_space, gymnasium.spaces.Box)
    low, high = simulator.action_space.low, simulator.action_space.high
    rng = np.random.default_rng(1)
    return rng.uniform(1.1 * low, 1.1 * high, (steps, simulator.count, len(low))).astype(dtype)


def run(simulator: Simulator, seeds: list[int], actions: np.ndarray) -> tuple[np.ndarray, Step]:
    """Return the first observations ``[count, …]`` and all steps, stacked ``[steps, count, …]``."""
    active = np.ones(simulator.count, bool)
    first = simulator.reset(seeds)
    steps = [simulator.step(a, active) for a in actions]
    return first, Step(*(np.stack(parts) for parts in zip(*steps, strict=True)))


def assert_exact(simulator: Simulator, seeds: list[int], actions: np.ndarray, **kwargs: Any) -> Step:
    first, steps = run(simulator, seeds, actions)
    for index, seed in enumerate(seeds):
        env = gymnasium.make(simulator.name, **kwargs)
        observation, _ = env.reset(seed=seed)
        assert np.array_equal(first[index], observation)
        # Gymnasium goes on beyond the end of an episode, and so must the simulator.
        for t, action in enumerate(actions[:, index]):
            observation, reward, terminated, truncated, info = env.step(action)
            expected = Step(observation, reward, terminated, truncated, info.get("reward_survive", 0.0))  # type: ignore
            for field, got, want in zip(Step._fields, steps, expected, strict=True):
                assert np.array_equal(got[t, index], want), f"{field} of seed {seed} at step {t}"
        env.close()
    return steps


@pytest.mark.parametrize("name", TASKS)
def test_a_thousand_steps_are_gymnasiums(name: str) -> None:
    with LocomotionSimulator(name, len(SEEDS), threads=2) as simulator:
        steps = assert_exact(simulator, SEEDS, random_actions(simulator, 1000))
    assert steps.truncated[999].all() and not steps.truncated[:999].any()
    assert steps.terminated.any() == (name not in ("HalfCheetah-v5", "Swimmer-v5"))
    assert steps.observations.dtype == steps.rewards.dtype == steps.survival.dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", TASKS)
def test_both_backends_are_gymnasiums(name: str, dtype: type) -> None:
    backends: list[Any] = ["threads"] if physics.batch is None else ["threads", "batch"]
    for backend in backends:
        kwargs = WITHOUT_CONTACTS.get(name, {}) if backend == "batch" else {}
        with LocomotionSimulator(name, 2, threads=2, backend=backend, **kwargs) as simulator:
            assert_exact(simulator, SEEDS[:2], random_actions(simulator, 100, dtype), **kwargs)


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_arguments_are_gymnasiums(name: str, kwargs: dict[str, Any]) -> None:
    with LocomotionSimulator(name, 2, threads=1, **kwargs) as simulator:
        assert_exact(simulator, SEEDS[:2], random_actions(simulator, 60), **kwargs)


@pytest.mark.parametrize("name", TASKS)
def test_a_large_population_is_a_small_one(name: str) -> None:
    """NumPy adds up in other orders for other shapes, if one isn't careful."""
    with LocomotionSimulator(name, 40, threads=2) as large, LocomotionSimulator(name, 1, threads=1) as small:
        actions = random_actions(large, 10)
        first, steps = run(large, list(range(40)), actions)
        for index in (0, 17, 39):
            alone, alone_steps = run(small, [index], actions[:, index : index + 1])
            assert np.array_equal(alone[0], first[index])
            assert all(np.array_equal(a[:, 0], s[:, index]) for a, s in zip(alone_steps, steps, strict=True))


@pytest.mark.parametrize("backend", ["auto", "threads"])
@pytest.mark.parametrize("name", TASKS)
def test_inactive_environments_stay_as_they_are(name: str, backend: Any) -> None:
    with LocomotionSimulator(name, 3, threads=2, backend=backend) as simulator:
        actions = random_actions(simulator, 20)
        _, expected = run(simulator, SEEDS, actions)
        simulator.reset(SEEDS)
        # Environment 1 pauses at every other step, so that it is at step t // 2.
        for t in range(20):
            active = np.array([True, t % 2 == 0, True])
            now = actions[t].copy()
            now[1] = actions[t // 2, 1] if active[1] else np.nan
            step = simulator.step(now, active)
            for got, want in zip(step, expected, strict=True):
                assert np.array_equal(got[0], want[t, 0]) and np.array_equal(got[2], want[t, 2])
                assert np.array_equal(got[1], want[t // 2, 1] if active[1] else np.zeros_like(got[1]))
        assert simulator.elapsed.tolist() == [20, 10, 20]


def test_no_active_environment() -> None:
    with LocomotionSimulator("Swimmer-v5", 2, threads=1) as simulator:
        simulator.reset([0, 1])
        step = simulator.step(np.zeros((2, 2)), np.zeros(2, bool))
        assert not any(part.any() for part in step)
        assert not simulator.elapsed.any()


@pytest.mark.parametrize("name", TASKS)
def test_resetting_twice_gives_the_same(name: str) -> None:
    with LocomotionSimulator(name, 3, threads=2) as simulator:
        actions = random_actions(simulator, 15)
        once = run(simulator, SEEDS, actions)
        again = run(simulator, SEEDS, actions)
        assert np.array_equal(once[0], again[0])
        assert all(np.array_equal(a, b) for a, b in zip(once[1], again[1], strict=True))


def test_results_belong_to_the_caller() -> None:
    with LocomotionSimulator("HalfCheetah-v5", 2, threads=1) as simulator:
        actions = random_actions(simulator, 3)
        first, steps = run(simulator, [0, 1], actions)
        simulator.reset([0, 1])[:] = np.nan
        for t in range(3):
            step = simulator.step(actions[t], np.ones(2, bool))
            assert np.array_equal(step.observations, steps.observations[t])
            for part in step:
                part[:] = 1
        assert np.isfinite(first).all()


def test_make_simulator_takes_the_fast_path() -> None:
    for name in TASKS:
        with make_simulator(name, 2, threads=1) as simulator:
            assert isinstance(simulator, LocomotionSimulator)


@pytest.mark.parametrize("name", ["Reacher-v5", "HalfCheetah-v4"])
@pytest.mark.filterwarnings("ignore:.*HalfCheetah-v4 is out of date:DeprecationWarning")
def test_make_simulator_leaves_other_environments_to_gymnasium(name: str) -> None:
    with make_simulator(name, 2, threads=1) as simulator:
        assert isinstance(simulator, GymnasiumSimulator)
        assert_exact(simulator, SEEDS[:2], random_actions(simulator, 20))


def test_make_simulator_leaves_rendering_and_functions_to_gymnasium() -> None:
    with make_simulator("Swimmer-v5", 1, render_mode="rgb_array") as simulator:
        assert isinstance(simulator, GymnasiumSimulator)
    with make_simulator(lambda: gymnasium.make("Swimmer-v5"), 1) as simulator:
        assert isinstance(simulator, GymnasiumSimulator)


def test_gymnasium_simulator_is_gymnasiums_too() -> None:
    with GymnasiumSimulator("Hopper-v5", 3) as simulator:
        steps = assert_exact(simulator, SEEDS, random_actions(simulator, 50))
    assert steps.survival.any()


class _Rounded(locomotion._Swimmer):
    def place(self, read: Any) -> np.ndarray:
        return super().place(read) * np.float64(1 + 2**-52)


def test_a_difference_of_one_bit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(locomotion.TASKS, "Swimmer-v5", _Rounded)
    with pytest.raises(NotExactError, match="Swimmer-v5 is simulated differently by Gymnasium"):
        LocomotionSimulator("Swimmer-v5", 2)
    with pytest.warns(UserWarning, match="differently.*Gymnasium's own environment is used"):
        simulator = make_simulator("Swimmer-v5", 2)
    assert isinstance(simulator, GymnasiumSimulator)
    simulator.close()


def test_another_environment_under_the_same_id(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = gymnasium.spec("Hopper-v5")
    monkeypatch.setitem(gymnasium.registry, "Swimmer-v5", spec)
    with pytest.raises(NotExactError, match="registered as gymnasium.envs.mujoco.hopper_v5:HopperEnv"):
        LocomotionSimulator("Swimmer-v5", 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"env_id": "CartPole-v1"}, ValueError, "env_id must be one of HalfCheetah-v5.*got 'CartPole-v1'"),
        ({"backend": "gpu"}, ValueError, "backend must be 'auto', 'batch' or 'threads', got 'gpu'"),
        ({"env_id": "Ant-v5", "backend": "batch"}, ValueError, "does not compute contact forces"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"count": 1.5}, TypeError, "count must be an integer, got float 1.5"),
        ({"wind": 3}, TypeError, "unexpected keyword argument 'wind'"),
    ],
)
@pytest.mark.skipif(physics.batch is None, reason="MuJoCo 3 has no batches")
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LocomotionSimulator(**{"env_id": "Swimmer-v5", "count": 2, **arguments})


def test_an_error_of_mujoco_names_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocomotionSimulator("Swimmer-v5", 3, threads=2, backend="threads") as simulator:
        simulator.reset(SEEDS)
        original = mujoco.mj_step
        broken = simulator._physics._data[1]  # type: ignore[attr-defined]

        def step(model: Any, data: Any, nstep: int) -> None:
            if data is broken:
                raise mujoco.FatalError("out of stack")
            original(model, data, nstep=nstep)

        monkeypatch.setattr(mujoco, "mj_step", step)
        with pytest.raises(RuntimeError, match=r"Swimmer-v5, environment 1 of 3, at step 1, .*out of stack") as caught:
            simulator.step(np.zeros((3, 2)), np.ones(3, bool))
        assert caught.value.__cause__ is not None
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="must be reset"):
            simulator.step(np.zeros((3, 2)), np.ones(3, bool))
        simulator.reset(SEEDS)


def test_observations_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocomotionSimulator("Swimmer-v5", 3, threads=1, backend="threads") as simulator:
        simulator.reset(SEEDS)
        simulator._physics._data[2].qvel[0] = np.inf  # type: ignore[attr-defined]
        # MuJoCo itself mends a state that is not finite.
        monkeypatch.setattr(mujoco, "mj_step", lambda *args, **kwargs: None)
        with pytest.raises(ValueError, match="Swimmer-v5, environment 2 of 3, at step 1, gave an observation that is"):
            simulator.step(np.zeros((3, 2)), np.ones(3, bool))
