"""HalfCheetah learns to run: a small network, rewarded by MuJoCo's own task.

    python examples/halfcheetah.py                  # 12 million steps
    python examples/halfcheetah.py --steps 1000000

The same as ``eggroll rl HalfCheetah-v5``; here are the pieces that it is made of.
"""

from __future__ import annotations

import dataclasses

import torch
import tyro

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.rl.policies import MLPPolicy
from eggroll_trainer.rl.rollout import EpisodeReturn, growing


@dataclasses.dataclass
class Args:
    steps: int = 12_000_000
    """Environment steps of all members together."""
    population_size: int = 64
    sigma: float = 0.02
    learning_rate: float = 1.4
    """Centred ranks have a deviation of 0.29: a weight moves by 0.4 sigma a generation."""
    first_length: int = 150
    """Steps of the first generations' episodes. Short ones tell who runs faster as well as the task's 1,000, and leave
    time for more generations."""
    last_length: int = 400
    """What they grow to over 70 % of the training."""
    seed: int = 0


def main(args: Args) -> float:
    length = growing(args.first_length, args.last_length, steps=round(0.7 * args.steps))
    episodes = EpisodeReturn("HalfCheetah-v5", max_steps=length)
    torch.manual_seed(args.seed)
    policy = MLPPolicy(*episodes.spaces())
    trainer = EGGROLLTrainer(
        policy.parameters(),
        policy,
        episodes,
        population_size=args.population_size,
        learning_rate=args.learning_rate,
        sigma=args.sigma,
        noise_reuse=2,
        shaping="centered_ranks",
        seed=args.seed,
        compile=True,
    )
    while episodes.steps < args.steps:
        trainer.train(20)
        returns = episodes.evaluate(policy, 20, seed=trainer.generation)
        print(f"{episodes.steps / 1e6:5.1f}M steps: {returns.mean():6.0f} ± {returns.std():.0f}")
    return float(returns.mean())


if __name__ == "__main__":
    main(tyro.cli(Args))
