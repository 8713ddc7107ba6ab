"""What a population earns in episodes is what each member earns alone, stepping an ordinary environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("gymnasium")

import gymnasium
from gymnasium import spaces
from helpers import NEEDS_COMPILER, goes_on

from eggroll_trainer import EGGROLLTrainer, Population
from eggroll_trainer.noise.keys import derive_seed
from eggroll_trainer.rl import lockstep
from eggroll_trainer.rl.policies import Agent, GRUPolicy, LinearPolicy, MLPPolicy, actions_of
from eggroll_trainer.rl.rollout import EpisodeReturn
from eggroll_trainer.rl.simulators import GymnasiumSimulator

N = 6


def env(env_id: str = "CartPole-v1") -> gymnasium.Env[Any, Any]:
    return gymnasium.make(env_id)


def trainer_of(policy: nn.Module, fitness: EpisodeReturn, **options: Any) -> EGGROLLTrainer:
    defaults: dict[str, Any] = {"population_size": N, "noise_reuse": 2, "sigma": 0.5, "seed": 3}
    return EGGROLLTrainer(model=policy, fitness_fn=fitness, **{**defaults, **options})


def policy_of(kind: Any, environment: gymnasium.Env[Any, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(environment.observation_space, environment.action_space, **options)


def alone(policy: nn.Module, environment: gymnasium.Env[Any, Any], seed: int, limit: int | None = None) -> float:
    """The return of one episode, as anybody would play it."""
    agent, total, steps = Agent(policy, environment.action_space), 0.0, 0
    observation, _ = environment.reset(seed=seed)
    while limit is None or steps < limit:
        observation, reward, terminated, truncated, _ = environment.step(agent(observation))
        total, steps = total + float(reward), steps + 1
        if terminated or truncated:
            break
    return total


@pytest.mark.parametrize("kind", [LinearPolicy, MLPPolicy, GRUPolicy])
@pytest.mark.parametrize(("env_id", "limit"), [("CartPole-v1", None), ("Pendulum-v1", 30), ("Hopper-v5", 60)])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_members_earn_what_they_earn_alone(kind: Any, env_id: str, limit: int | None, chunk_size: int | None) -> None:
    environment = env(env_id)
    fitness = EpisodeReturn(env_id, episodes=2, max_steps=limit)
    trainer = trainer_of(policy_of(kind, environment), fitness, chunk_size=chunk_size)
    scores = torch.cat(
        [trainer._evaluator.evaluate(first, count).scores for first, count in trainer._evaluator.chunks()]
    )
    members = Population(trainer.model, trainer._method.perturbations(0, N))
    for i in range(N):
        seeds = [derive_seed("episode", 3, 0, i // 2, episode) % 2**31 for episode in range(2)]
        expected = np.mean([alone(members.member(i), environment, seed, limit) for seed in seeds])
        # Batched products round otherwise, and a simulator amplifies it: an unstable step doubles it at times.
        assert float(scores[i]) == pytest.approx(expected, rel=1e-3)
    fitness.close()


def test_pairs_play_the_same_episodes() -> None:
    fitness = EpisodeReturn("Pendulum-v1", share=2, max_steps=20)
    trainer = trainer_of(policy_of(LinearPolicy, env("Pendulum-v1")), fitness, sigma=1e-12, population_size=8)
    scores = trainer._evaluator.evaluate(0, 8).scores
    torch.testing.assert_close(scores[::2], scores[1::2], rtol=1e-9, atol=0)
    assert (scores[::2, None] - scores[None, ::2]).abs().topk(2).values.min() > 1e-3


def test_episode_seeds_follow_seed_and_generation() -> None:
    def scores(seed: int, generation: int) -> torch.Tensor:
        trainer = trainer_of(policy_of(LinearPolicy, env()), EpisodeReturn("CartPole-v1"), sigma=1e-12, seed=seed)
        trainer.generation = generation
        return trainer._evaluator.evaluate(0, N).scores

    assert torch.equal(scores(1, 0), scores(1, 0))
    assert not torch.equal(scores(1, 0), scores(1, 1)) and not torch.equal(scores(1, 0), scores(2, 0))


def test_the_survival_bonus_counts_in_evaluation_alone() -> None:
    policy = policy_of(LinearPolicy, env("Hopper-v5"))
    seeds = 5
    with_bonus = EpisodeReturn("Hopper-v5")
    without = EpisodeReturn("Hopper-v5", survival_bonus=False)
    a, b = (trainer_of(policy, fitness)._evaluator.evaluate(0, N).scores for fitness in (with_bonus, without))
    # The bonus is one for each step that ends in good health; the last one may not.
    assert ((a - b) >= 5).all() and (a - b - (a - b).round()).abs().max() < 1e-6
    assert np.array_equal(with_bonus.evaluate(policy, seeds, 0), without.evaluate(policy, seeds, 0))


def test_episodes_may_grow() -> None:
    fitness = EpisodeReturn("Pendulum-v1", max_steps=lambda steps: 10 if steps else 5)
    trainer = trainer_of(policy_of(LinearPolicy, env("Pendulum-v1")), fitness)
    trainer.train(2, verbose=False)
    assert fitness.steps == N * (5 + 10)


def test_statistics_do_not_depend_on_chunks_beyond_rounding() -> None:
    runs = []
    for chunk_size in (None, 2):
        policy = policy_of(MLPPolicy, env("Pendulum-v1"))
        trainer = trainer_of(policy, EpisodeReturn("Pendulum-v1", max_steps=20), chunk_size=chunk_size)
        trainer.train(2, verbose=False)
        runs.append(policy.normalizer)
    assert runs[0].count == runs[1].count == 2 * N * 20
    torch.testing.assert_close(runs[0].mean, runs[1].mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sample", [False, True])
def test_a_resumed_run_is_the_same_to_the_bit(sample: bool, tmp_path: Path) -> None:
    def make() -> EGGROLLTrainer:
        policy = policy_of(MLPPolicy, env("Hopper-v5"), sample=sample)
        return trainer_of(policy, EpisodeReturn("Hopper-v5"), optimizer=torch.optim.Adam, learning_rate=0.05)

    trainer, twin = make(), make()
    trainer.train(3, verbose=False)
    trainer.save(tmp_path / "run.pt")
    twin.load(tmp_path / "run.pt")
    goes_on(trainer, twin)


def test_sampled_actions_differ_among_members() -> None:
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        policy = policy_of(LinearPolicy, env(env_id), sample=True)
        members = Population(policy, trainer_of(policy, EpisodeReturn(env_id), sigma=1e-12)._method.perturbations(0, N))
        outputs = members(torch.zeros(policy.inputs))
        assert len(outputs.unique(dim=0)) == N


def test_discrete_actions_are_drawn_by_their_probabilities() -> None:
    policy = policy_of(LinearPolicy, env(), sample=True)
    logits = torch.log(torch.tensor([0.8, 0.2])).expand(20_000, 2)
    torch.manual_seed(0)
    share = float((policy.act(logits).argmax(-1) == 0).double().mean())
    # Deviation √(0.8·0.2/20000) = 0.0028; five of them: failure probability 6e-7.
    assert abs(share - 0.8) < 0.0142


@pytest.mark.parametrize(
    ("low", "high", "dtype", "expected"),
    [
        # -1 and 1 are the bounds.
        ([-1.0, 0.0], [1.0, 5.0], np.float32, [[-1.0, 5.0], [0.5, 2.5]]),
        ([-0.4, -3.0], [0.4, 3.0], np.float64, [[-0.4, 3.0], [0.2, 0.0]]),
        ([0, 0], [255, 10], np.uint8, [[0, 10], [191, 5]]),
        ([np.iinfo(np.int64).min, -9], [np.iinfo(np.int64).max, 9], np.int64, [[-(2**63), 9], [2**62, 0]]),
        # Without bounds on both sides of all there is nothing to scale by.
        ([-1.0, 0.0], [1.0, np.inf], np.float32, [[-1.0, 2.0], [0.5, 0.0]]),
        ([np.finfo(np.float32).min] * 2, [np.finfo(np.float32).max] * 2, np.float32, [[-3.0, 2.0], [0.5, 0.0]]),
    ],
)
def test_actions_fit_their_box(low: Any, high: Any, dtype: Any, expected: Any) -> None:
    box = spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    actions = actions_of(np.array([[-3.0, 2.0], [0.5, 0.0]], np.float32), box)
    assert actions.dtype == dtype and all(box.contains(action) for action in actions)
    np.testing.assert_allclose(actions, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [LinearPolicy, MLPPolicy, GRUPolicy])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_policy_may_see_only_the_first_numbers_of_an_observation(kind: Any, normalize: bool) -> None:
    environment = env("Hopper-v5")
    policy = policy_of(kind, environment, normalize=normalize, observed=4)
    for parameter in policy.parameters():
        nn.init.normal_(parameter)
    seen, unseen = torch.rand(3, 11), torch.rand(3, 11)
    unseen[:, :4] = seen[:, :4]
    state = [policy.initial_state(3)] if kind is GRUPolicy else []
    with torch.no_grad():
        actions, others = (policy(x, *state)[0] if state else policy(x) for x in (seen, unseen))
        assert torch.equal(actions, others)
        unseen[:, 3] += 1
        others = policy(unseen, *state)[0] if state else policy(unseen)
        assert not torch.equal(actions, others)
    agent = Agent(policy, environment.action_space)
    assert environment.action_space.contains(agent(environment.reset(seed=0)[0]))


@pytest.mark.parametrize(("observed", "error"), [(0, ValueError), (12, ValueError), (2.5, TypeError)])
def test_a_policy_cannot_see_what_is_not_there(observed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="observed must be"):
        policy_of(MLPPolicy, env("Hopper-v5"), observed=observed)


def test_actions_are_logits_where_they_are_few() -> None:
    assert actions_of(np.array([[0.0, 2.0, 1.0]]), spaces.Discrete(3, start=5)).tolist() == [6]


class Fails(gymnasium.Env[Any, Any]):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    what = "raise"

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.time = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        if self.time == 3 and self.what == "raise":
            raise OSError("the robot fell over")
        reward = float("nan") if self.time == 3 and self.what == "nan" else 1.0
        return np.zeros(2, np.float32), reward, self.time == 5, False, {}


@pytest.mark.filterwarnings("ignore:all 6 members have had the same fitness")
@pytest.mark.filterwarnings("ignore:Fails, environment 0 of 6, at step 3, gave a reward that is not finite")
@pytest.mark.parametrize(
    ("what", "message"),
    [("raise", "Fails.*step 3.*OSError: the robot fell over"), ("nan", "no member .* has a finite fitness")],
)
def test_an_environment_that_fails_is_named_and_the_run_goes_on(
    what: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fails, "what", "fine")
    policy = policy_of(MLPPolicy, Fails())
    trainer = trainer_of(policy, EpisodeReturn(Fails))
    trainer.step()
    before = trainer.state_dict()
    monkeypatch.setattr(Fails, "what", what)
    with pytest.raises((RuntimeError, ValueError), match=message):
        trainer.step()
    monkeypatch.setattr(Fails, "what", "fine")
    twin = trainer_of(policy_of(MLPPolicy, Fails()), EpisodeReturn(Fails))
    twin.load_state_dict(before)
    goes_on(trainer, twin)


def test_a_model_that_does_not_fit_its_actions() -> None:
    trainer = trainer_of(nn.Linear(4, 5), EpisodeReturn("CartPole-v1"))
    with pytest.raises(ValueError, match="must return 2 outputs for each observation, as CartPole-v1"):
        trainer.step()


@pytest.mark.parametrize("normalize", [True, False])
def test_a_policy_for_other_observations(normalize: bool) -> None:
    policy = MLPPolicy(*EpisodeReturn("CartPole-v1").spaces(), hidden=(4,), normalize=normalize)
    with pytest.raises(ValueError, match="observations of 4 numbers, got 3"):
        trainer_of(policy, EpisodeReturn("Pendulum-v1")).step()


def test_an_unknown_environment() -> None:
    with pytest.raises(ValueError, match="NoSuchTask-v9"):
        EpisodeReturn("NoSuchTask-v9")


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("kind", [MLPPolicy, GRUPolicy])
def test_evaluations_draw_by_their_seed(env_id: str, kind: Any) -> None:
    policy, fitness = policy_of(kind, env(env_id), sample=True), EpisodeReturn(env_id)
    before = torch.get_rng_state()
    returns = fitness.evaluate(policy, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert np.array_equal(EpisodeReturn(env_id).evaluate(policy, 4, seed=1), returns)
    assert not np.array_equal(fitness.evaluate(policy, 4, seed=2), returns)


@pytest.mark.parametrize("kind", [MLPPolicy, GRUPolicy])
@pytest.mark.parametrize("episodes", [1, 2])
def test_forwards_of_those_that_still_play_change_nothing(
    kind: Any, episodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(smallest: int) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(lockstep, "_SMALLEST", smallest)
        policy = policy_of(kind, env())
        fitness = EpisodeReturn("CartPole-v1", episodes=episodes, max_steps=100)
        trainer = trainer_of(policy, fitness, population_size=32, sigma=2.0)
        scores = trainer._evaluator.evaluate(0, 32).scores
        return scores, fitness.pop_statistics()

    everybody, statistics = run(10**9)
    few, same = run(2)
    assert everybody.unique().numel() > 4, "members must end at different times"
    # Only roundings may differ, which do not turn the choice between left and right.
    assert torch.equal(few, everybody)
    torch.testing.assert_close(same, statistics, rtol=1e-5, atol=1e-5)
    again, _ = run(2)
    assert torch.equal(few, again)


def test_few_that_still_play_share_a_forward_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep, "_SMALLEST", 2)
    with GymnasiumSimulator("CartPole-v1", 32) as simulator:
        calls: list[tuple[int, ...]] = []

        def forward(members: Any, x: torch.Tensor) -> torch.Tensor:
            calls.append(tuple(members))
            assert len(x) == 2 * len(calls[-1])
            # Two members balance the pole, the others let it fall.
            angle = x.view(-1, 2, 4)[..., 2] + 0.5 * x.view(-1, 2, 4)[..., 3]
            skill = torch.tensor([1.0 if i % 8 == 1 else -1.0 for i in members])[:, None]
            return torch.stack([-angle * skill, angle * skill], -1).view(-1, 2)

        play = lockstep.Lockstep(simulator, forward, None, 2, device=torch.device("cpu"), name="CartPole-v1")
        returns, steps = play.play(range(32), 60, bonus=True)
    assert steps == returns.sum()
    assert calls[0] == tuple(range(16)) and {len(c) for c in calls} == {16, 4} and {1, 9} <= set(calls[-1])


@NEEDS_COMPILER
def test_policies_that_are_compiled_earn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep, "_SMALLEST", 2)
    scores = []
    for compile in (False, True):
        policy = policy_of(MLPPolicy, env("Hopper-v5"), hidden=(8,))
        trainer = trainer_of(policy, EpisodeReturn("Hopper-v5", max_steps=60), compile=compile, population_size=8)
        scores.append(trainer._evaluator.evaluate(0, 8).scores)
    torch.testing.assert_close(*scores, rtol=1e-3, atol=0)
