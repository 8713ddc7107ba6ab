"""HalfCheetah by `eggroll rl` and by EvoTorch's GymNE, the same environment steps: ``python -m benchmarks.peer_rl``.

EvoTorch: PGPE with ClipUp by the rules of its authors (Toklu et al., "ClipUp", 2020): a largest speed of a fifteenth of
the search radius and a learning rate of half of that; antithetic pairs, centred ranks, two actors, observation
normalisation, the same network and population. Each is timed in turn; returns are those of the centre over 20 fresh
episodes in the plain environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from eggroll_trainer.rl.policies import Agent
from eggroll_trainer.rl.settings import settings_for
from eggroll_trainer.rl.training import Run

ENV = "HalfCheetah-v5"


def ours(steps: int, seed: int) -> tuple[float, float, int]:
    settings = dataclasses.replace(
        settings_for(ENV), steps=steps, seed=seed, out=Path(tempfile.mkdtemp()) / "run", video=False, eval_every=10**9
    )
    run = Run(settings)
    start = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - start
    agent = Agent(run.policy, gymnasium.make(ENV).action_space)
    return seconds, evaluated(agent, seed), run.steps


def evotorchs(steps: int, seed: int, radius: float) -> tuple[float, float, int]:
    from evotorch.algorithms import PGPE
    from evotorch.neuroevolution import GymNE

    torch.manual_seed(seed)
    problem = GymNE(
        ENV,
        "Linear(obs_length, 64) >> Tanh() >> Linear(64, 64) >> Tanh() >> Linear(64, act_length)",
        observation_normalization=True,
        num_actors=2,
    )
    searcher = PGPE(
        problem,
        popsize=64,
        radius_init=radius,
        center_learning_rate=radius / 30,
        stdev_learning_rate=0.1,
        optimizer_config={"max_speed": radius / 15},
    )
    start, taken = time.perf_counter(), 0
    while taken < steps:
        searcher.step()
        taken = int(problem.status["total_interaction_count"])
    seconds = time.perf_counter() - start
    policy = problem.to_policy(searcher.status["center"])

    @torch.no_grad()
    def act(observation: Any) -> Any:
        return policy(torch.as_tensor(observation, dtype=torch.float32)).clamp(-1, 1).numpy()

    return seconds, evaluated(act, seed), taken


def evaluated(act: Any, seed: int, episodes: int = 20) -> float:
    """Return the mean return of a policy over fresh episodes of the plain environment."""
    env, returns = gymnasium.make(ENV), []
    for episode in range(episodes):
        observation, _ = env.reset(seed=10_000 + 100 * seed + episode)
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_500_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--radius", type=float, default=2.25, help="EvoTorch's initial search radius")
    args = parser.parse_args()
    for seed in range(args.seeds):
        for name, (seconds, value, steps) in {
            "eggroll rl": ours(args.steps, seed),
            "EvoTorch": evotorchs(args.steps, seed, args.radius),
        }.items():
            print(f"seed {seed}, {name}: {steps:,} steps in {seconds:.0f} s, return {value:.0f}", flush=True)


if __name__ == "__main__":
    main()
