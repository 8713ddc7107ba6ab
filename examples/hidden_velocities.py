"""CartPole without its velocities: a recurrent policy has to remember what a single observation does not show.

    python examples/hidden_velocities.py                    # a gated recurrent unit
    python examples/hidden_velocities.py --policy linear    # without a memory, for comparison

Of the four numbers of an observation the policy sees the position of the cart and the angle of the pole.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium import spaces

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.rl.policies import GRUPolicy, LinearPolicy
from eggroll_trainer.rl.rollout import EpisodeReturn


@dataclasses.dataclass
class Args:
    policy: Literal["gru", "linear"] = "gru"
    generations: int = 120
    population_size: int = 128
    sigma: float = 0.1
    learning_rate: float = 0.5
    seed: int = 0


class Positions(gymnasium.ObservationWrapper[Any, Any, Any]):
    """CartPole's positions and angles, but not how fast they change."""

    def __init__(self) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        box = self.env.observation_space
        assert isinstance(box, spaces.Box)
        self.observation_space = spaces.Box(box.low[[0, 2]], box.high[[0, 2]], dtype=np.float32)

    def observation(self, observation: Any) -> Any:
        return observation[[0, 2]]


def main(args: Args) -> float:
    episodes = EpisodeReturn(Positions, episodes=2)
    torch.manual_seed(args.seed)
    policy = {"gru": GRUPolicy, "linear": LinearPolicy}[args.policy](*episodes.spaces())
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
    )
    trainer.train(args.generations)
    returns = episodes.evaluate(policy, 20, seed=1)
    print(f"{args.policy}: {returns.mean():.0f} ± {returns.std():.0f} over 20 fresh episodes")
    return float(returns.mean())


if __name__ == "__main__":
    main(tyro.cli(Args))
