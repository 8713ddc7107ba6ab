"""Fitness functions that learn along the way: frozen within a generation, merged in order, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import X, goes_on, make
from torch import Tensor, nn

from eggroll_trainer import Population, batched


class Centred(nn.Module):
    """Subtracts a mean that the fitness function keeps."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - self.mean)


class Learning:
    """Adds up what it is shown; each chunk shows which members it had."""

    def __init__(self) -> None:
        self.model: Any = None
        self.merged: list[list[float]] = []
        self.means: list[float] = []
        self.fail = False
        batched(self)

    def __call__(self, population: Population) -> Tensor:
        self.model = population.model
        self.means.append(float(self.model.mean[0]))
        self.first = population.first
        if self.fail and population.first > 0:
            raise KeyError("in the second chunk")
        return -population(X).square().mean((1, 2))

    def pop_statistics(self) -> Tensor:
        return torch.tensor([float(self.first)])

    def merge_statistics(self, model: nn.Module, statistics: Sequence[Tensor]) -> None:
        self.merged.append([float(value) for value in statistics])
        self.model.mean += 0.25


def trainer(**options: Any) -> Any:
    torch.manual_seed(0)
    return make(model=Centred(), fitness_fn=Learning(), chunk_size=3, **options)


def test_chunks_are_merged_in_order_after_the_generation() -> None:
    run = trainer()
    run.train(2, verbose=False)
    assert run.fitness_fn.merged == [[0, 3, 6]] * 2
    assert run.fitness_fn.means == [0, 0, 0, 0.25, 0.25, 0.25]


def test_a_generation_that_fails_teaches_nothing() -> None:
    run = trainer()
    run.step()
    run.fitness_fn.fail = True
    with pytest.raises(KeyError):
        run.step()
    assert len(run.fitness_fn.merged) == 1 and run.model.mean[0] == 0.25
    run.fitness_fn.fail = False
    twin = trainer()
    twin.step()
    goes_on(run, twin)


def test_what_was_learnt_is_resumed(tmp_path: Path) -> None:
    run, twin = trainer(), trainer()
    run.train(3, verbose=False)
    run.save(tmp_path / "run.pt")
    twin.load(tmp_path / "run.pt")
    assert twin.model.mean[0] == 0.75
    goes_on(run, twin)
    assert torch.equal(run.get_best_model()(X), twin.get_best_model()(X))


def test_the_best_model_has_what_was_known_when_it_was_scored() -> None:
    run = trainer(learning_rate=0.0, sigma=0.3)
    run.train(4, verbose=False)
    best = run.get_best_model()
    generation = run.history["fitness"].index(run.best_fitness)
    assert best.mean[0] == 0.25 * generation
    assert -best(X).detach().square().mean().item() == pytest.approx(run.best_fitness, rel=1e-5)


def test_reset_forgets_it() -> None:
    run, twin = trainer(), trainer()
    run.train(2, verbose=False)
    run.reset()
    assert run.model.mean[0] == 0
    goes_on(run, twin)
