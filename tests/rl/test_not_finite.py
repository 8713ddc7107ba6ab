"""An observation, reward or action that is not finite ends one member's episode, and costs nobody else anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("gymnasium")

import gymnasium
from gymnasium import spaces

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.rl import lockstep
from eggroll_trainer.rl.policies import GRUPolicy, MLPPolicy
from eggroll_trainer.rl.rollout import EpisodeReturn

N, LENGTH = 8, 6
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.filterwarnings("ignore:.*finite")


class Slide(gymnasium.Env[Any, Any]):
    """Numbers its instances, the first being that of ``spaces()``; some of them fail at some step."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space: Any = spaces.Box(-1, 1, (1,), np.float32)
    made = 0
    bad: tuple[int, ...] = ()
    at, what, value = 3, "observation", NAN

    def __init__(self) -> None:
        self.number = Slide.made - 1
        Slide.made += 1

    def failing(self, what: str) -> bool:
        return self.number in self.bad and self.time == self.at and self.what == what

    def see(self) -> Any:
        observation = self.np_random.uniform(-1, 1, 2)
        if self.failing("observation"):
            observation[1] = self.value
        return observation

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self.see(), {}

    def step(self, action: Any) -> Any:
        assert self.time < LENGTH and not (self.number in self.bad and self.time >= self.at and self.what != "nothing")
        self.time += 1
        reward = self.value if self.failing("reward") else float(np.sum(action)) + self.time
        return self.see(), reward, self.time == LENGTH, False, {}


def play(
    monkeypatch: pytest.MonkeyPatch, kind: Any = MLPPolicy, episodes: int = 1, **failure: Any
) -> tuple[Tensor, Tensor, Any, EGGROLLTrainer]:
    """Return all scores and statistics of a generation, the metrics, and the trainer."""
    for key, value in {"made": 0, **failure}.items():
        monkeypatch.setattr(Slide, key, value)
    torch.manual_seed(0)
    fitness = EpisodeReturn(Slide, episodes=episodes)
    policy = kind(*fitness.spaces())
    trainer = EGGROLLTrainer(model=policy, fitness_fn=fitness, population_size=N, noise_reuse=2, sigma=0.5, seed=3)
    scores, statistics, _ = trainer._evaluator.evaluate(0, N)
    assert statistics is not None
    return scores, statistics, trainer.step(), trainer


@pytest.mark.parametrize("kind", [MLPPolicy, GRUPolicy])
@pytest.mark.parametrize("smallest", [2, 16])
@pytest.mark.parametrize(
    ("what", "value", "at"),
    [
        ("observation", NAN, 3),
        ("observation", INF, 1),
        ("observation", -INF, 0),
        # Infinite in single precision, and its square in double.
        ("observation", 1e200, 2),
        ("reward", NAN, 2),
        ("reward", -INF, LENGTH),
    ],
)
@pytest.mark.parametrize("bad", [(1,), (0, 1, 2, 4, 5, 6, 7)])
def test_bad_members_are_the_worst_and_alone(
    kind: Any, smallest: int, what: str, value: float, at: int, bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "_SMALLEST", smallest)
    fine, _, metrics, _ = play(monkeypatch, kind)
    assert metrics["num_nonfinite"] == 0 and fine.isfinite().all()
    scores, statistics, metrics, trainer = play(monkeypatch, kind, what=what, value=value, at=at, bad=bad)
    others = [i for i in range(N) if i not in bad]
    assert scores[list(bad)].isnan().all()
    torch.testing.assert_close(scores[others], fine[others], rtol=1e-5, atol=1e-5)
    assert metrics["num_nonfinite"] == len(bad)
    # What a policy has seen and steps are as many, what it could not see is not among them.
    assert statistics[0] == statistics[1] == LENGTH * len(others) + at * len(bad)
    assert statistics.isfinite().all()
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_one_of_several_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, _, metrics, _ = play(monkeypatch, episodes=2, bad=(5,))
    assert scores.isnan().nonzero().flatten().tolist() == [2] and metrics["num_nonfinite"] == 1


def test_it_is_said_once_which(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(RuntimeWarning, match=r"Slide, environment 1 of 8, at step 3, gave an observation .* \[.*nan"):
        play(monkeypatch, bad=(1, 2))


def test_nobody_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no member of generation 1 has a finite fitness"):
        play(monkeypatch, bad=tuple(range(N)), at=0)


def test_evaluations_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, trainer = play(monkeypatch)
    fitness = EpisodeReturn(Slide)
    monkeypatch.setattr(Slide, "bad", (2,))
    monkeypatch.setattr(Slide, "made", 1)
    assert np.isnan(fitness.evaluate(trainer.model, 4, 0)).tolist() == [False, False, True, False]


class Blind(nn.Module):
    """Gives the same outputs whatever it sees, by its parameters; those below 0 become something else."""

    def __init__(self, outputs: int, instead: float) -> None:
        super().__init__()
        self.weight, self.instead = nn.Parameter(torch.zeros(outputs)), instead

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.where(self.weight < 0, self.instead, self.weight)
        return outputs.expand(*x.shape[:-1], len(self.weight))


BOX = spaces.Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize(
    ("space", "instead", "good"),
    [
        (BOX, NAN, False),
        # Clipped to the bounds.
        (BOX, -INF, True),
        (spaces.Box(-np.inf, np.inf, (2,), np.float32), -INF, False),
        (spaces.Box(0, 9, (2,), np.int32), NAN, False),
        (spaces.Discrete(2), NAN, False),
        # What a mask makes of logits.
        (spaces.Discrete(2), -INF, True),
        (spaces.MultiDiscrete([1, 1]), NAN, False),
        (spaces.MultiBinary(2), NAN, False),
        (spaces.MultiBinary(2), -INF, True),
    ],
)
def test_actions(space: Any, instead: float, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slide, "action_space", space)
    fitness = EpisodeReturn(Slide)
    policy = Blind(2, instead)
    trainer = EGGROLLTrainer(model=policy, fitness_fn=fitness, population_size=N, sigma=0.5, seed=3)
    scores, statistics, _ = trainer._evaluator.evaluate(0, N)
    values = trainer._method.perturbations(0, N).members()["weight"]
    assert isinstance(values, Tensor)
    bad = (values < 0).any(-1) & (not good)
    assert bad.any() != good and not bad.all()
    assert torch.equal(scores.isnan(), bad)
    # Of a member without an action nothing is stepped.
    assert statistics is not None and statistics[0] == LENGTH * int((~bad).sum())


@pytest.mark.parametrize("where", ["observe", "costs"])
@pytest.mark.parametrize("backend", ["batch", "threads"])
def test_locomotion(where: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    from eggroll_trainer.rl.locomotion import LocomotionSimulator

    torch.manual_seed(0)
    fitness = EpisodeReturn("HalfCheetah-v5", max_steps=10)
    policy = MLPPolicy(*fitness.spaces(), hidden=(8,))
    trainer = EGGROLLTrainer(model=policy, fitness_fn=fitness, population_size=N, noise_reuse=2, sigma=0.5, seed=3)
    fine = trainer._evaluator.evaluate(0, N).scores
    simulator: Any = LocomotionSimulator("HalfCheetah-v5", N, backend=backend)  # type: ignore[arg-type]
    fitness._simulators[N] = simulator
    right = getattr(simulator._task, where)

    def broken(*arguments: Any) -> Any:
        values = right(*arguments)
        if len(values) == N and simulator.elapsed[2] == 4:
            values[2] = NAN
        return values

    monkeypatch.setattr(simulator._task, where, broken)
    scores, statistics, _ = trainer._evaluator.evaluate(0, N)
    assert statistics is not None
    assert scores.isnan().nonzero().flatten().tolist() == [2]
    others = [i for i in range(N) if i != 2]
    torch.testing.assert_close(scores[others], fine[others], rtol=1e-3, atol=0)
    assert statistics[0] == statistics[1] == 10 * (N - 1) + 4 and statistics.isfinite().all()
    assert trainer.step()["num_nonfinite"] == 1
