"""Print the seconds and the peak of memory of an LSTM over one long sequence.

python -m benchmarks.one_sequence evolution N LENGTH
python -m benchmarks.one_sequence backpropagation BATCH LENGTH
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched

from . import measure, workloads

STEPS = 64


def evolution(size: int, length: int) -> None:
    model = workloads.seeded(lambda: nn.LSTM(16, 64))

    @batched
    def fitness(population: Population) -> Tensor:
        total, state = torch.zeros(len(population)), None
        for start in range(0, length, STEPS):
            x = _inputs(start)
            outputs, state = population(x) if state is None else population.each(x, state, in_dims=(None, 0))
            total += outputs.square().sum((1, 2, 3))
        return -total

    trainer = EGGROLLTrainer(model=model, fitness_fn=fitness, population_size=size, noise_reuse=2, seed=0)
    _measure(trainer.step)


def backpropagation(size: int, length: int) -> None:
    model = workloads.seeded(lambda: nn.LSTM(16, 64))

    def step() -> None:
        model.zero_grad()
        x = torch.cat([_inputs(start) for start in range(0, length, STEPS)]).expand(length, size, 16)
        model(x)[0].square().sum().backward()

    _measure(step)


def _inputs(start: int) -> Tensor:
    return torch.randn(STEPS, 1, 16, generator=workloads.generator(start))


def _measure(step: object) -> None:
    measure.restart_peak()
    before = measure.peak_memory()
    times = [measure.timed(step) for _ in range(2)]  # type: ignore[arg-type]
    print(min(times), measure.peak_memory() - before)


if __name__ == "__main__":
    kind, size, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    {"evolution": evolution, "backpropagation": backpropagation}[kind](size, length)
