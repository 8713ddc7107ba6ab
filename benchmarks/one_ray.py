"""Time generations whose fitness takes a millisecond a member, on Ray's workers: ``python -m benchmarks.one_ray K``.

K is a number of workers, or 0 for this process alone. Prints the median of the seconds of a generation.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched
from eggroll_trainer.distributed import Engine, LocalEngine

from . import measure


@batched
def slow(population: Population) -> Tensor:
    # Busy, as a simulator would be.
    end = time.perf_counter() + 1e-3 * len(population)
    scores = -population(torch.ones(4, 32)).square().mean((1, 2))
    while time.perf_counter() < end:
        pass
    return scores


def main(workers: int, size: int = 1024, generations: int = 6) -> None:
    torch.set_num_threads(1)
    engine: Engine = LocalEngine()
    if workers:
        from eggroll_trainer.distributed import RayEngine

        engine = RayEngine(workers)
    model = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 8))
    trainer = EGGROLLTrainer(
        model=model, fitness_fn=slow, population_size=size, chunk_size=64, noise_reuse=2, seed=0, engine=engine
    )
    for _ in range(2):
        trainer.step()
    print(statistics.median(measure.timed(trainer.step) for _ in range(generations)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
