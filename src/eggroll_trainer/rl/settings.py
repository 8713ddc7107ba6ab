"""The settings of a training run, and those found to work for each task."""

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
    """Environment steps to train for, of all members together; the generation that reaches them is the last."""
    policy: Literal["linear", "mlp", "gru"] = "mlp"
    """Kind of policy."""
    hidden: tuple[int, ...] = (16,)
    """Widths of the hidden layers of an mlp; of the recurrent state of a gru, its first number."""
    population_size: int = 64
    """Members in a generation."""
    sigma: float = 0.1
    """Standard deviation of the perturbations."""
    learning_rate: float = 0.05
    """Step size; with adam, of a weight in a generation; with sgd and z-scores, in units of sigma (ranks count 0.29 as
    much)."""
    final_learning_rate: float | None = None
    """What the learning rate falls to, linearly in environment steps; it stays as it is if left out."""
    optimizer: Literal["sgd", "adam"] = "adam"
    """What takes the steps."""
    rank: int = 1
    """Rank of the perturbations; 0 for full rank."""
    antithetic: bool = True
    """Whether members come in pairs of opposite perturbations, which play the same episodes."""
    shaping: str = "centered_ranks"
    """How returns become weights: zscore, centered_ranks, antithetic_sign or raw."""
    normalize: bool = True
    """Whether observations are normalised by their running statistics."""
    observed: int | None = None
    """How many numbers of an observation the policy sees, from the first; all if left out."""
    sample: bool = False
    """Whether the policy draws its actions."""
    survival_bonus: bool = True
    """Whether the reward for merely being alive counts in training; in evaluation it always does."""
    episodes: int = 1
    """Episodes of each member in a generation."""
    max_steps: int | None = None
    """Steps after which training cuts an episode off, besides the environment's own limit."""
    first_max_steps: int | None = None
    """The same at the beginning, from where it grows, by the same factor each step, over 70 % of the training."""
    seed: int = 0
    """Of weights, noise and episodes."""
    eval_every: int = 20
    """Evaluate the centre policy every so many generations, and after every tenth of the steps."""
    eval_episodes: int = 20
    """Episodes of an evaluation."""
    save_every: int = 20
    """Write a checkpoint every so many generations, and at the end."""
    threads: int | None = None
    """Threads of the simulator; torch's number if left out."""
    chunk_size: int | None = None
    """Members evaluated at a time, which is what several processes share; up to 1024 if left out."""
    engine: Literal["local", "torch", "ray"] | None = None
    """Who evaluates the population; what torchrun has started, else this process, if left out."""
    compile: bool = True
    """Whether the population's forward is compiled, where the run is long enough for that to pay."""
    out: Path | None = None
    """Folder of the run; runs/ENV-SEED if left out."""
    resume: bool = False
    """Go on with the run in that folder."""
    video: bool = True
    """Whether to leave a video of the policy."""


# What was tried for them, and what was reached: docs/research/reinforcement-learning.md.
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
    # With less noise no member of some seeds ever reaches the goal, and all learn to stand still.
    "MountainCarContinuous-v0": {"steps": 500_000, "sigma": 0.3},
    # Its observations are of size 1 as they are, and their statistics change most while it learns to swing up.
    "Pendulum-v1": {"steps": 1_600_000, "learning_rate": 0.1, "normalize": False},
    "LunarLander-v3": {"steps": 2_000_000},
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
