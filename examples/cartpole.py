"""CartPole from scratch: a plain function that plays one ordinary environment, run for all members together."""

import gymnasium
import torch
from torch import nn

from eggroll_trainer import EGGROLLTrainer


def play(policy: nn.Module, seed: int) -> float:
    env = gymnasium.make("CartPole-v1")  # inside the function: every member has its own
    observation, _ = env.reset(seed=seed)
    total, ended = 0.0, False
    while not ended:
        action = policy(torch.from_numpy(observation)).argmax().item()
        observation, reward, terminated, truncated, _ = env.step(action)
        total, ended = total + float(reward), terminated or truncated
    return total


torch.manual_seed(0)
policy = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
trainer: EGGROLLTrainer = EGGROLLTrainer(
    policy.parameters(), policy, lambda policy: play(policy, trainer.generation),
    population_size=32, sigma=0.3, learning_rate=0.3, noise_reuse=2, seed=0,
)  # fmt: skip
while min(play(policy, seed) for seed in range(1000, 1005)) < 500:
    trainer.train(5)
print("mean return over 20 fresh episodes:", sum(play(policy, seed) for seed in range(20_000, 20_020)) / 20)
