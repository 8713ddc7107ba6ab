"""Runs that every engine must give the same bits: started by tests in processes of their own.

    python engine_cases.py OUT ENGINE [NAME …]

ENGINE is local, auto, scores or sums. The first process writes OUT: JSON, by case.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from eggroll_trainer import EGGROLLTrainer, ESTrainer, Population, VanillaESTrainer, batched
from eggroll_trainer.distributed import Engine, ProcessGroupEngine, make_engine

GENERATIONS = 10

generator = torch.Generator().manual_seed(0)
X = torch.randn(16, 6, generator=generator)
Y = X[:, :3] * X[:, 3:]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)).to(dtype)


def plain(model: nn.Module) -> float:
    return -(model(X) - Y).square().mean().item()


@batched
def at_once(population: Population) -> Tensor:
    x = X.to(next(population.model.parameters()).dtype)
    return -(population(x).double() - Y).square().mean((1, 2))


def tasks(model: nn.Module) -> Tensor:
    # One column for every four rows, of which the second fails for some members in most generations.
    scores = -(model(X) - Y).square().mean(1).view(4, 4).double().mean(1)
    return scores.masked_fill((scores < -0.25) & (torch.arange(4) == 1), torch.nan)


@batched
def tasks_at_once(population: Population) -> Tensor:
    return torch.nn.functional.cosine_similarity(population(X), Y, dim=2)


def noisy(model: nn.Module) -> float:
    # Draws of torch's own generator belong to the chunk.
    rows = torch.randint(len(X), (8,))
    return -(model(X[rows]) - Y[rows]).square().mean().item()


class Custom(ESTrainer):
    def sample_perturbations(self, population_size: int) -> Tensor:
        return torch.randn(population_size, len(self.current_params)) * self.sigma

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        weights = (fitnesses - fitnesses.mean()) / (fitnesses.std() + 1e-8)
        return (weights[:, None] * perturbations).mean(dim=0)


def cheetah(engine: Engine) -> ESTrainer:
    from eggroll_trainer.rl.policies import MLPPolicy
    from eggroll_trainer.rl.rollout import EpisodeReturn

    fitness = EpisodeReturn("HalfCheetah-v5", max_steps=lambda steps: 10 + min(10, steps // 300), threads=1)
    torch.manual_seed(0)
    policy = MLPPolicy(*fitness.spaces(), hidden=(16,))
    return EGGROLLTrainer(
        model=policy, fitness_fn=fitness, population_size=12, chunk_size=4, noise_reuse=2, seed=5, engine=engine
    )


def make(cls: Callable[..., Any], engine: Engine, **options: Any) -> Any:
    """A trainer of five chunks, the last of which is smaller."""
    defaults: dict[str, Any] = {
        "model": network(),
        "fitness_fn": at_once,
        "population_size": 56,
        "chunk_size": 12,
        "seed": 3,
        "learning_rate": 0.3,
        "sigma": 0.05,
    }
    return cls(**{**defaults, **options}, engine=engine)


def everything(engine: Engine) -> Any:
    model = network()
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.02, "sigma": 0.1, "rank": 2},
        {"params": list(model[2].parameters()), "anchor_decay": 2.0},
    ]
    return make(
        EGGROLLTrainer,
        engine,
        params=groups,
        model=model,
        noise_reuse=4,
        group_size=8,
        learning_rate=0.05,
        optimizer=functools.partial(torch.optim.Adam, betas=(0.8, 0.99)),
        lr_scheduler=functools.partial(StepLR, step_size=7, gamma=0.5),
        sigma_scheduler=functools.partial(ExponentialLR, gamma=0.97),
    )


CASES: dict[str, Callable[[Engine], Any]] = {
    "coalesced": functools.partial(make, EGGROLLTrainer, fitness_fn=plain, noise_reuse=2),
    "everything": everything,
    "bf16": lambda engine: make(EGGROLLTrainer, engine, model=network(torch.bfloat16), noise_reuse=2),
    "float64": lambda engine: make(EGGROLLTrainer, engine, model=network(torch.float64), shaping="centered_ranks"),
    "rademacher": functools.partial(make, EGGROLLTrainer, noise="rademacher", freeze_nonlora=True),
    "vanilla": functools.partial(make, VanillaESTrainer),
    "custom": functools.partial(make, Custom, learning_rate=1.0),
    "noisy": functools.partial(make, EGGROLLTrainer, fitness_fn=noisy),
    "clipped": functools.partial(make, EGGROLLTrainer, noise_reuse=2, shaping="raw", max_grad_norm=0.1),
    "one chunk": functools.partial(make, EGGROLLTrainer, chunk_size=None),
    "tasks": functools.partial(make, EGGROLLTrainer, fitness_fn=tasks, noise_reuse=2, group_size=8),
    "tasks at once": functools.partial(make, EGGROLLTrainer, fitness_fn=tasks_at_once, shaping="centered_ranks"),
    "cheetah": cheetah,
}


def engine_of(name: str) -> Engine:
    if name in ("scores", "sums"):
        return ProcessGroupEngine(exchange=name, check_every=1)  # type: ignore[arg-type]
    return make_engine(None if name == "auto" else name)


def run(out: str, engine: Engine, *wanted: str) -> None:
    results = {}
    for case in wanted or CASES:
        trainer = CASES[case](engine)
        trainer.train(GENERATIONS, verbose=False)
        buffers = [value.double().sum().item() for value in trainer.model.buffers()]
        results[case] = [trainer.checksum(), trainer.history["fitness"], trainer.history["num_tied"], buffers]
    if engine.rank == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], engine_of(sys.argv[2]), *sys.argv[3:])
