"""Settings that find themselves, against the best fixed ones: `tune` from far off, and "auto".

    OMP_NUM_THREADS=1 python -m benchmarks.self_tuning             # half an hour on a core; prints, and writes a file
    OMP_NUM_THREADS=1 python -m benchmarks.self_tuning regression  # one task

Every run has 200 generations. The fixed settings are those of a grid of 4 sigmas and 4 learning rates that are best
with seed 0. `tune` starts from settings that are off by 30 times, in either direction, and has 40 of the generations.
"""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, tune

from .measure import surroundings

GENERATIONS, SEARCH = 200, 40
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


def cartpole() -> Any:
    from eggroll_trainer.rl.policies import MLPPolicy
    from eggroll_trainer.rl.rollout import EpisodeReturn

    def make() -> tuple[nn.Module, Any, Any]:
        episodes = EpisodeReturn("CartPole-v1", share=2)
        policy = MLPPolicy(*episodes.spaces(), hidden=(16,))

        def centre(trainer: EGGROLLTrainer) -> float:
            return float(episodes.evaluate(trainer.model, episodes=32, seed=12345).mean())

        return policy, episodes, centre

    return make


# The task, the members, and whether the fitness of nothing learnt counts in the comparison.
TASKS: dict[str, tuple[Callable[[], Any], int]] = {
    "regression": (regression, 128),
    "digits, cross-entropy": (lambda: digits(lambda out, y: -F.cross_entropy(out, y)), 128),
    "digits, accuracy": (lambda: digits(lambda out, y: (out.argmax(-1) == y).float().mean()), 128),
    "breast cancer, F1": (cancer, 64),
    "CartPole": (cartpole, 32),
}


def run(task: str, seed: int, sigma: Any, learning_rate: Any, far_off: tuple[float, float] | None = None) -> float:
    make, members = TASKS[task][0](), TASKS[task][1]
    torch.manual_seed(seed + 100)
    model, fitness, centre = make()
    trainer = EGGROLLTrainer(
        model=model, fitness_fn=fitness, population_size=members, noise_reuse=2, sigma=sigma,
        learning_rate=learning_rate, optimizer=torch.optim.Adam, seed=seed,
    )  # fmt: skip
    left = GENERATIONS
    if far_off is not None:
        trainer.sigma, trainer.learning_rate = 0.1 * far_off[0], 0.03 * far_off[1]
        left -= tune(trainer, budget=SEARCH, verbose=False).generations
    trainer.train(left, verbose=False)
    return float(centre(trainer))


def compared(task: str) -> dict[str, Any]:
    """Return what each way of setting reaches, by its name: one value for each seed."""
    grid = {(sigma, step): run(task, 0, sigma, step * sigma) for sigma, step in itertools.product(SIGMAS, STEPS)}
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
    make = TASKS[task][0]()
    torch.manual_seed(100)
    model, fitness, centre = make()
    return float(centre(EGGROLLTrainer(model=model, fitness_fn=fitness, population_size=2, seed=0)))


def main(tasks: list[str]) -> None:
    warnings.simplefilter("ignore")
    found = {}
    for task in tasks or TASKS:
        found[task] = result = compared(task)
        best = statistics.mean(next(iter(result["ways"].values())))
        print(f"{task}: {result['start']:.3f} before")
        for name, values in result["ways"].items():
            share = (statistics.mean(values) - result["start"]) / (best - result["start"])
            print(f"  {name:40} {' '.join(f'{value:.3f}' for value in values)}   {share:.3f} of the fixed", flush=True)
    if not tasks:
        path = Path("docs/research/results") / f"{datetime.date.today()}-self-tuning.json"
        path.write_text(json.dumps({**surroundings(), "generations": GENERATIONS, "tasks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
