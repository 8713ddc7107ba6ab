"""The settings of a training run, and tuned settings for each task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a policy is trained in a Gymnasium environment."""

    env: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ENV_ID")]
    """Id of the environment, such as HalfCheetah-v5."""
    steps: int = 1_000_000
    """Environment steps to train for, of all members together. The generation that reaches them is the last one."""
    policy: Literal["linear", "mlp", "gru"] = "mlp"
    """Kind of policy."""
    hidden: tuple[int, ...] = (16,)
    """Widths of the hidden layers of an mlp. The first number is the width of the recurrent state of a gru."""
    population_size: int = 64
    """Members in a generation."""
    sigma: float = 0.1
    """Standard deviation of the perturbations."""
    learning_rate: float = 0.05
    """Step size. With adam, about the step of a weight in a generation; with sgd and z-scores, in units of sigma (with
    ranks, 0.29 times that)."""
    final_learning_rate: float | None = None
    """Final learning rate, to which it falls linearly in environment steps; by default, it stays constant."""
    optimizer: Literal["sgd", "adam"] = "adam"
    """Optimizer that takes the steps."""
    rank: int = 1
    """Rank of the perturbations; 0 for full rank."""
    antithetic: bool = True
    """Whether members come in pairs of opposite perturbations, which play the same episodes."""
    shaping: str = "centered_ranks"
    """How returns become weights: zscore, centered_ranks, antithetic_sign or raw."""
    normalize: bool = True
    """Whether observations are normalised by their running statistics."""
    observed: int | None = None
    """Number of leading entries of an observation that the policy sees; by default, all."""
    sample: bool = False
    """Whether the policy draws its actions at random."""
    survival_bonus: bool = True
    """Whether the reward for staying alive counts in training. In evaluation it always does."""
    episodes: int = 1
    """Episodes of each member in a generation."""
    max_steps: int | None = None
    """Steps after which training cuts an episode off, in addition to the environment's own limit."""
    first_max_steps: int | None = None
    """Initial value of this limit, which grows exponentially over the first 70 % of the training."""
    seed: int = 0
    """Seed of weights, noise and episodes."""
    eval_every: int = 20
    """Number of generations between evaluations of the centre policy. It is also evaluated every tenth of the steps."""
    eval_episodes: int = 20
    """Episodes of an evaluation."""
    save_every: int = 20
    """Number of generations between checkpoints. One is also written at the end."""
    threads: int | None = None
    """Threads of the simulator; by default, as many as torch has."""
    chunk_size: int | None = None
    """Members evaluated at a time; several processes share the chunks. By default, up to 1024."""
    engine: Literal["local", "torch", "ray"] | None = None
    """What evaluates the population; by default, torch under torchrun, else local."""
    compile: bool = True
    """Whether to compile the population's forward, if the run is long enough for that to pay off."""
    out: Path | None = None
    """Folder of the run; by default, runs/ENV-SEED."""
    resume: bool = False
    """Continue the run in that folder."""
    video: bool = True
    """Whether to record a video of the policy."""


# See docs/research/reinforcement-learning.md for the experiments behind these settings.
_LOCOMOTION: dict[str, object] = {
    "policy": "linear",
    "hidden": (64, 64),
    "optimizer": "sgd",
    "learning_rate": 0.4,
    "sigma": 0.05,
    "population_size": 64,
    "shaping": "zscore",
}
_WIDER: dict[str, object] = {**_LOCOMOTION, "policy": "mlp", "sigma": 0.02, "first_max_steps": 150}
TASKS: dict[str, dict[str, object]] = {
    "CartPole-v1": {"steps": 300_000},
    "Acrobot-v1": {"steps": 500_000},
    # With less noise, no member reaches the goal for some seeds, and all learn to stand still.
    "MountainCarContinuous-v0": {"steps": 500_000, "sigma": 0.3},
    # Its observations are about 1 in size already, and their statistics change most while it learns to swing up.
    "Pendulum-v1": {"steps": 1_600_000, "learning_rate": 0.1, "normalize": False},
    "LunarLander-v3": {"steps": 2_000_000},
    "BipedalWalker-v3": {**_LOCOMOTION, "steps": 12_000_000, "population_size": 32, "first_max_steps": 200},
    "HalfCheetah-v5": {
        **_WIDER,
        "steps": 12_000_000,
        "max_steps": 400,
        "shaping": "centered_ranks",
        "learning_rate": 1.4,
    },
    "Hopper-v5": {**_LOCOMOTION, "steps": 10_000_000, "population_size": 32, "survival_bonus": False},
    "Walker2d-v5": {**_LOCOMOTION, "steps": 15_000_000, "sigma": 0.02, "survival_bonus": False},
    "Swimmer-v5": {**_LOCOMOTION, "steps": 3_000_000, "population_size": 16},
    "Ant-v5": {**_WIDER, "steps": 6_000_000},
    "Humanoid-v5": {
        **_LOCOMOTION,
        "steps": 25_000_000,
        "population_size": 460,
        "sigma": 0.019,
        "learning_rate": 0.25,
        "survival_bonus": False,
    },
}


def settings_for(env: str) -> Settings:
    """Return the default settings of a task."""
    return Settings(env, **TASKS.get(env, {}))  # type: ignore[arg-type]
