"""Settings that find themselves, against the best fixed ones: `tune` from far off, and "auto".

    OMP_NUM_THREADS=1 python -m benchmarks.self_tuning             # all, in an hour and a half on a core
    OMP_NUM_THREADS=1 python -m benchmarks.self_tuning regression  # one task

Every run has 200 generations, or 100 with a simulator. The fixed settings are those of a grid of 4 sigmas and 4
learning rates that are best with seed 0. `tune` starts from settings that are off by 30 times, in either direction, and
has a fifth of the generations. Figures are printed, and added to docs/research/results.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, tune

from .measure import surroundings

SEEDS = (0, 1, 2)
SIGMAS = (0.03, 0.1, 0.3, 1.0)
# What a weight moves by in a generation, in units of sigma, about.
STEPS = (0.1, 0.3, 1.0, 3.0)
FAR_OFF = ((30.0, 1 / 30), (1 / 30, 30.0))


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def supervised(x: Tensor, sizes: tuple[int, ...], score: Callable[[Tensor], Tensor]) -> Any:
    def make() -> tuple[nn.Module, Any, Any]:
        @torch.no_grad()
        def fitness(model: nn.Module) -> Tensor:
            return score(model(x))

        return mlp(*sizes), fitness, lambda trainer: trainer.evaluate_fitness(trainer.model)

    return make


def regression() -> Any:
    x = torch.randn(256, 10, generator=torch.Generator().manual_seed(0))
    y = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2]
    return supervised(x, (10, 32, 1), lambda out: -F.mse_loss(out, y))


def digits(score: Callable[[Tensor, Tensor], Tensor]) -> Any:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels[:500] / 16 - 0.3, dtype=torch.float32), torch.tensor(labels[:500])
    return supervised(x, (64, 32, 10), lambda out: score(out, y))


def cancer() -> Any:
    values, labels = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(values, dtype=torch.float32), torch.tensor(labels)
    x = (x - x.mean(0)) / x.std(0)

    def f1(out: Tensor) -> Tensor:
        found = (out[..., 0] > 0).long()
        return 2 * (found * y).sum() / (found.sum() + y.sum())

    return supervised(x, (30, 16, 1), f1)


def episodes(env: str, hidden: tuple[int, ...], max_steps: int | None = None) -> Any:
    from eggroll_trainer.rl.policies import MLPPolicy
    from eggroll_trainer.rl.rollout import EpisodeReturn

    def make() -> tuple[nn.Module, Any, Any]:
        fitness = EpisodeReturn(env, share=2, max_steps=max_steps)
        policy = MLPPolicy(*fitness.spaces(), hidden=hidden)

        def centre(trainer: EGGROLLTrainer) -> float:
            return float(fitness.evaluate(trainer.model, episodes=32, seed=12345).mean())

        return policy, fitness, centre

    return make


class Task(NamedTuple):
    """What to train.

    Attributes:
        make: Returns a function that returns a model, a fitness function, and a function of the trainer that returns
            the fitness of the centre.
        members: ``N``.
        generations: Length of a run; a fifth of it may go into the search.
        most: The largest possible fitness. Fixed settings that reach it end the search on the grid.
    """

    make: Callable[[], Any]
    members: int
    generations: int = 200
    most: float = 1.0


TASKS: dict[str, Task] = {
    "regression": Task(regression, 128),
    "digits, cross-entropy": Task(lambda: digits(lambda out, y: -F.cross_entropy(out, y)), 128),
    "digits, accuracy": Task(lambda: digits(lambda out, y: (out.argmax(-1) == y).float().mean()), 128),
    "breast cancer, F1": Task(cancer, 64),
    "CartPole": Task(lambda: episodes("CartPole-v1", (16,)), 32, 100, 500.0),
    "HalfCheetah, 200 steps": Task(lambda: episodes("HalfCheetah-v5", (), 200), 32, 100, math.inf),
}


def run(task: str, seed: int, sigma: Any, learning_rate: Any, far_off: tuple[float, float] | None = None) -> float:
    kind = TASKS[task]
    torch.manual_seed(seed + 100)
    model, fitness, centre = kind.make()()
    trainer = EGGROLLTrainer(
        model=model, fitness_fn=fitness, population_size=kind.members, noise_reuse=2, sigma=sigma,
        learning_rate=learning_rate, optimizer=torch.optim.Adam, seed=seed,
    )  # fmt: skip
    left = kind.generations
    if far_off is not None:
        trainer.sigma, trainer.learning_rate = 0.1 * far_off[0], 0.03 * far_off[1]
        left -= tune(trainer, budget=kind.generations // 5, verbose=False).generations
    trainer.train(left, verbose=False)
    return float(centre(trainer))


def compared(task: str) -> dict[str, Any]:
    """Return what each way of setting reaches, by its name: one value for each seed."""
    grid: dict[tuple[float, float], float] = {}
    for sigma, step in itertools.product(SIGMAS, STEPS):
        grid[sigma, step] = run(task, 0, sigma, step * sigma)
        if grid[sigma, step] >= TASKS[task].most:
            break
    sigma, step = max(grid, key=lambda key: grid[key])
    ways: dict[str, list[float]] = {
        f"fixed, {sigma:g} and {step * sigma:.2g}": [run(task, seed, sigma, step * sigma) for seed in SEEDS]
    }
    for far_off in FAR_OFF:
        name = f"tune, sigma × {far_off[0]:.2g}, rate × {far_off[1]:.2g}"
        ways[name] = [run(task, seed, 0.1, 0.03, far_off) for seed in SEEDS]
    ways["auto"] = [run(task, seed, "auto", "auto") for seed in SEEDS]
    start = run_nothing(task)
    return {"start": start, "grid": [[*key, value] for key, value in grid.items()], "ways": ways}


def run_nothing(task: str) -> float:
    make = TASKS[task].make()
    torch.manual_seed(100)
    model, fitness, centre = make()
    return float(centre(EGGROLLTrainer(model=model, fitness_fn=fitness, population_size=2, seed=0)))


def main(tasks: list[str]) -> None:
    warnings.simplefilter("ignore")
    path = Path("docs/research/results") / f"{datetime.date.today()}-self-tuning.json"
    found = json.loads(path.read_text())["tasks"] if path.exists() else {}
    for task in tasks or TASKS:
        found[task] = result = compared(task)
        best = statistics.mean(next(iter(result["ways"].values())))
        print(f"{task}: {result['start']:.3f} before")
        for name, values in result["ways"].items():
            share = (statistics.mean(values) - result["start"]) / (best - result["start"])
            print(f"  {name:40} {' '.join(f'{value:.3f}' for value in values)}   {share:.3f} of the fixed", flush=True)
        path.write_text(json.dumps({**surroundings(), "tasks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
