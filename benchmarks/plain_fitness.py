"""One generation of a plain fitness function, against the same function one member at a time with full-rank noise.

    python benchmarks/plain_fitness.py

The network is an MLP 32-256-256-256-8 on 16 rows, the function a loop over batches with ``.item()``. Measured are

- naive: evolution strategies as one writes them by hand, full-rank noise, one model at a time;
- coalesced: the unchanged function, run for all members together;
- batched: the same written for the population;
- inference: the unperturbed network on as many rows in one batch, the limit.

Runs are interleaved and medians reported; ratios come from the same run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched

ROWS = 16
DATA = torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 8, (ROWS,), generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = [32, 256, 256, 256, 8]
        layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1])


def fitness(model: nn.Module) -> float:
    model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, ROWS, ROWS):
            loss = F.cross_entropy(model(DATA[start : start + ROWS]), LABELS[start : start + ROWS])
            total += loss.item()
    return -total


@batched
def population_fitness(population: Population) -> Tensor:
    logits = population(DATA)  # [N, rows, 8]
    labels = LABELS.repeat(len(population))
    return -F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view(len(population), -1).mean(1)


class Naive:
    """Full-rank evolution strategies by hand: perturb, score, put back, one member after the other."""

    def __init__(self, size: int, sigma: float = 0.1, learning_rate: float = 0.01) -> None:
        self.model, self.size, self.sigma, self.learning_rate = network(), size, sigma, learning_rate
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self) -> None:
        parameters = list(self.model.parameters())
        centre = [p.clone() for p in parameters]
        scores, seeds = [], []
        for _ in range(self.size):
            seeds.append(self.generator.get_state())
            for p, c in zip(parameters, centre, strict=True):
                p.copy_(c + self.sigma * torch.randn(p.shape, generator=self.generator))
            scores.append(fitness(self.model))
        for p, c in zip(parameters, centre, strict=True):
            p.copy_(c)
        weights = torch.tensor(scores)
        weights = (weights - weights.mean()) / weights.std()
        for state, weight in zip(seeds, weights.tolist(), strict=True):
            self.generator.set_state(state)
            for p in parameters:
                p.add_(torch.randn(p.shape, generator=self.generator), alpha=self.learning_rate * weight / self.size)


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each, the runs interleaved."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--noise-reuse", type=int, default=2, help="0: every member its own draw; 2: antithetic pairs")
    args = parser.parse_args()
    size = args.population_size

    def trainer(function: Callable[..., object], **options: object) -> EGGROLLTrainer:
        return EGGROLLTrainer(
            model=network(),
            fitness_fn=function,
            population_size=size,
            noise_reuse=args.noise_reuse,
            seed=0,
            **options,  # type: ignore[arg-type]
        )

    scores = [
        trainer(function, coalesce=coalesce)._evaluate(0, size)
        for function, coalesce in ((fitness, False), (fitness, True), (population_fitness, True))
    ]
    print(f"largest difference of a score: coalesced {(scores[1] - scores[0]).abs().max():.1e}", end=", ")
    print(f"batched {(scores[2] - scores[0]).abs().max():.1e}")

    pure, rows = network(), torch.randn(size * ROWS, 32)
    coalesced, population = trainer(fitness), trainer(population_fitness)
    with torch.inference_mode():
        limit = measure({"inference": lambda: pure(rows)}, args.repeats)
    times = (
        measure({"naive": Naive(size).step, "coalesced": coalesced.step, "batched": population.step}, args.repeats)
        | limit
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(
        f"N = {size}, noise_reuse = {args.noise_reuse}, torch {torch.__version__}, {torch.get_num_threads()} threads,"
    )
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, commit {commit}")
    print("| one generation | median ms | against naive | of pure inference |")
    print("|---|---|---|---|")
    for name, seconds in times.items():
        print(
            f"| {name} | {seconds * 1e3:.1f} | {times['naive'] / seconds:.1f}× | {times['inference'] / seconds:.0%} |"
        )


if __name__ == "__main__":
    main()
