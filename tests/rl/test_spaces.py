"""Actions and observations of every kind: what a member earns in a population is what it earns alone, by Agent."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("gymnasium")

import gymnasium
from gymnasium import spaces

from eggroll_trainer import EGGROLLTrainer, Population
from eggroll_trainer.noise.keys import derive_seed
from eggroll_trainer.rl.policies import Agent, GRUPolicy, LinearPolicy, MLPPolicy, Policy, actions_of, output_size
from eggroll_trainer.rl.rollout import EpisodeReturn
from eggroll_trainer.rl.settings import Settings
from eggroll_trainer.rl.training import Run
from eggroll_trainer.rl.video import record

N = 6

BOX, FOUR = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(4)
MULTI_DISCRETE = spaces.MultiDiscrete([3, 2], start=[5, -1])
TABLE = spaces.MultiDiscrete(np.array([[2, 3], [4, 2]]))
MULTI_BINARY = spaces.MultiBinary(4)
SQUARE = spaces.MultiBinary([2, 2])
GOALS = spaces.Dict(
    goal=spaces.Box(-1, 1, (2,), np.float32), place=spaces.Discrete(3, start=1), on=spaces.MultiBinary(2)
)
PAIR = spaces.Tuple((spaces.Discrete(2), spaces.Box(-1, 1, (2, 2), np.float32)))


class Sampled(gymnasium.Env[Any, Any]):
    """Random observations, and a reward by what is done."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(
        self,
        observation_space: Any = BOX,
        action_space: Any = FOUR,
        render_mode: Any = None,
    ) -> None:
        # Each with random numbers of its own.
        self.observation_space, self.action_space = copy.deepcopy(observation_space), action_space

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.time += 1
        values = np.asarray(spaces.flatten(self.action_space, action), float)
        reward = float(values @ np.arange(1, len(values) + 1)) * self.time
        return self.observation_space.sample(), reward, self.time == 5, False, {}

    def render(self) -> Any:
        return np.zeros((16, 16, 3), np.uint8)


def drawn(policy: Any) -> Any:
    torch.manual_seed(0)
    for parameter in policy.parameters():
        nn.init.normal_(parameter)
    return policy


def alone(policy: nn.Module, env: gymnasium.Env[Any, Any], seed: int, **options: Any) -> float:
    agent, total, ended = Agent(policy, env.action_space, **options), 0.0, False
    observation, _ = env.reset(seed=seed)
    while not ended:
        observation, reward, ended, _, _ = env.step(agent(observation))
        total += float(reward)
    return total


def assert_members_earn_what_they_earn_alone(policy: nn.Module, make: Any, **options: Any) -> None:
    fitness = EpisodeReturn(make, episodes=2)
    trainer = EGGROLLTrainer(model=policy, fitness_fn=fitness, population_size=N, noise_reuse=2, sigma=0.5, seed=3)
    scores = trainer._evaluator.evaluate(0, N).scores
    members = Population(trainer.model, trainer._method.perturbations(0, N))
    for i in range(N):
        seeds = [derive_seed("episode", 3, 0, i // 2, episode) % 2**31 for episode in range(2)]
        expected = np.mean([alone(members.member(i), make(), seed, **options) for seed in seeds])
        assert float(scores[i]) == pytest.approx(expected, rel=1e-4)
    assert len(scores.unique()) > 1
    trainer.step()


@pytest.mark.parametrize("kind", [LinearPolicy, MLPPolicy, GRUPolicy])
@pytest.mark.parametrize("space", [MULTI_DISCRETE, TABLE, MULTI_BINARY, SQUARE], ids=str)
def test_actions_of_several_parts(kind: Any, space: Any) -> None:
    def make() -> Any:
        return Sampled(action_space=space)

    assert_members_earn_what_they_earn_alone(drawn(kind(*EpisodeReturn(make).spaces())), make)


@pytest.mark.parametrize(
    ("space", "outputs", "actions"),
    [
        (MULTI_DISCRETE, [[0, 1, 2, 9, 8], [7, 0, 0, -2, -1]], [[7, -1], [5, 0]]),
        (TABLE, [[1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1]], [[[0, 1], [3, 1]]]),
        (MULTI_BINARY, [[-1, 0.1, 0, 5]], [[0, 1, 0, 1]]),
        (SQUARE, [[-1, 0.1, 0, 5]], [[[0, 1], [0, 1]]]),
    ],
)
def test_logits_choose_each_part(space: Any, outputs: Any, actions: Any) -> None:
    got = actions_of(np.array(outputs, np.float32), space)
    assert output_size(space) == len(outputs[0])
    assert got.tolist() == actions and all(space.contains(action) for action in got)


def test_parts_are_drawn_by_their_probabilities() -> None:
    draws = 20_000
    torch.manual_seed(0)
    box = spaces.Box(-1, 1, (3,))
    logits = torch.log(torch.tensor([0.2, 0.7, 0.1, 0.4, 0.6])).expand(draws, 5)
    actions = actions_of(LinearPolicy(box, MULTI_DISCRETE, sample=True).act(logits).numpy(), MULTI_DISCRETE)
    bits = torch.logit(torch.tensor([0.2, 0.5, 0.7, 0.99])).expand(draws, 4)
    on = actions_of(LinearPolicy(box, MULTI_BINARY, sample=True).act(bits).numpy(), MULTI_BINARY)
    shares = [*((actions[:, 0] == 5 + k).mean() for k in range(3)), (actions[:, 1] == -1).mean(), *on.mean(0)]
    # The largest deviation is √(0.25/20000) = 0.0035; five of them: failure probability 6e-7 each.
    np.testing.assert_allclose(shares, [0.2, 0.7, 0.1, 0.4, 0.2, 0.5, 0.7, 0.99], rtol=0, atol=0.0177)
    # Parts are drawn independently.
    assert abs(np.corrcoef(actions[:, 0] == 6, actions[:, 1])[0, 1]) < 0.036


class Convolutional(nn.Module):
    flatten_observations = False

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 4 * 3, actions))

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1:] == (6, 5, 3) and pixels.dtype == torch.float32
        return self.body(pixels.permute(0, 3, 1, 2) / 255)


def pixels() -> Any:
    return Sampled(spaces.Box(0, 255, (6, 5, 3), np.uint8))


def test_a_convolutional_network_sees_pixels_in_their_shape() -> None:
    policy = drawn(Convolutional(4))
    assert_members_earn_what_they_earn_alone(policy, pixels)
    fitness = EpisodeReturn(pixels)
    expected = [alone(policy, pixels(), derive_seed("evaluation", 0, k) % 2**31) for k in range(3)]
    np.testing.assert_allclose(fitness.evaluate(policy, 3, 0), expected)


def test_other_modules_see_pixels_flattened() -> None:
    class Layers(nn.Sequential):
        # A layer of this name says nothing of observations.
        def __init__(self) -> None:
            super().__init__()
            self.flatten, self.head = nn.Flatten(), nn.Linear(90, 4)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1:] == (90,)
            return self.head(self.flatten(x / 255))

    assert_members_earn_what_they_earn_alone(drawn(Layers()), pixels)
    assert_members_earn_what_they_earn_alone(drawn(MLPPolicy(*EpisodeReturn(pixels).spaces())), pixels)


SPACES = [spaces.Discrete(5), spaces.Discrete(4, start=-2), spaces.MultiDiscrete([2, 3]), GOALS, PAIR]


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("flattened", [True, False])
def test_agents_see_what_rollouts_show(space: Any, flattened: bool) -> None:
    def make() -> Any:
        return Sampled(space)

    env = make()
    fitness = EpisodeReturn(make)
    seen = fitness.spaces()[0] if flattened else env.observation_space
    assert isinstance(fitness.spaces()[0], spaces.Box)
    policy = drawn(MLPPolicy(seen, env.action_space, hidden=(8,)))
    assert_members_earn_what_they_earn_alone(policy, make)
    plain = nn.Linear(spaces.flatdim(space), 4)
    assert_members_earn_what_they_earn_alone(drawn(plain), make, observation_space=space)
    # What is flattened already is taken as it is.
    agent = Agent(policy, env.action_space)
    for _ in range(5):
        observation = space.sample()
        assert agent(observation) == agent(spaces.flatten(space, observation))


@pytest.mark.parametrize(
    ("observation_space", "policy", "given", "observation", "error", "message"),
    [
        (None, nn.Linear(5, 4), None, 3, TypeError, "pass observation_space"),
        (None, nn.Linear(5, 4), None, {"goal": [1.0]}, TypeError, "pass observation_space"),
        (spaces.Discrete(5), None, None, 5, ValueError, "an observation of Discrete.5. was expected, got 5: .*0 to 4"),
        (spaces.Discrete(5), None, None, np.zeros(4), ValueError, "an observation of Discrete.5. was expected"),
        (GOALS, None, None, {"goal": [1.0]}, ValueError, "an observation of Dict.* was expected"),
        (spaces.Box(-1, 1, (3,)), None, None, np.zeros(1), ValueError, "for observations of 3 numbers, got 1"),
        (spaces.Box(-1, 1, (3,)), None, None, np.zeros(4), ValueError, "for observations of 3 numbers, got 4"),
        (spaces.Box(-1, 1, (3,)), None, spaces.Discrete(2), 1, ValueError, "for observations of 3 numbers, got 2"),
        (spaces.Box(-1, 1, (3,)), None, spaces.Box(-1, 1, (2,)), np.zeros(3), ValueError, r"got one of shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_agents_refuse_what_does_not_fit(
    observation_space: Any, policy: Any, given: Any, observation: Any, error: Any, message: str, normalize: bool
) -> None:
    if policy is None:
        policy = MLPPolicy(observation_space, spaces.Discrete(4), normalize=normalize)
    agent = Agent(policy, spaces.Discrete(4), given)
    with pytest.raises(error, match=message):
        agent(observation)


def test_spaces_that_cannot_be_flattened() -> None:
    with pytest.raises(TypeError, match="have no fixed size"):
        Policy(spaces.Sequence(spaces.Discrete(2)), spaces.Discrete(2))
    with pytest.raises(TypeError, match="actions must be a Box, Discrete, MultiDiscrete or MultiBinary"):
        Policy(spaces.Discrete(2), spaces.Text(2))


@pytest.mark.parametrize("space", [MULTI_DISCRETE, MULTI_BINARY], ids=str)
def test_members_draw_on_their_own(space: Any) -> None:
    policy = LinearPolicy(BOX, space, sample=True)
    fitness = EpisodeReturn(lambda: Sampled(action_space=space))
    trainer = EGGROLLTrainer(model=policy, fitness_fn=fitness, population_size=N, sigma=1e-12, seed=3)
    outputs = Population(policy, trainer._method.perturbations(0, N))(torch.zeros(3))
    assert outputs.isfinite().all() and len(outputs.unique(dim=0)) == N
    assert torch.equal(trainer._evaluator.evaluate(0, N).scores, trainer._evaluator.evaluate(0, N).scores)


@pytest.fixture
def registered() -> Iterator[str]:
    gymnasium.register("Goals-v0", lambda **options: Sampled(GOALS, MULTI_DISCRETE, **options))
    yield "Goals-v0"
    del gymnasium.registry["Goals-v0"]


@pytest.mark.filterwarnings("ignore::UserWarning:gymnasium")
@pytest.mark.parametrize("policy", ["linear", "gru"])
def test_runs_and_videos_with_spaces_of_several_parts(registered: str, policy: Any, tmp_path: Path) -> None:
    settings = Settings(
        registered, steps=80, policy=policy, population_size=8, eval_episodes=2, compile=False, out=tmp_path / "run"
    )
    run = Run(settings)
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["steps"] == 80 and "eval_return" in lines[-1] and lines[-1]["num_nonfinite"] == 0
    total = record(run.policy, registered, tmp_path / "video.mp4", seed=4)
    assert total == alone(run.policy, Sampled(GOALS, MULTI_DISCRETE), 4)
    assert (tmp_path / "video.mp4").exists()
