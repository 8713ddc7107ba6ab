"""Fitness functions that learn along the way: frozen within a generation, merged in order, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import X, assert_same, goes_on, make
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

import eggroll_trainer.fitness.learning
from eggroll_trainer import Population, batched
from eggroll_trainer._utils.interrupts import TimeLimitExceeded
from eggroll_trainer.distributed import LocalEngine


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


class Counting(Learning):
    """Counts the members that it has seen, and can be made to fail after it has seen some."""

    def __init__(self, failures: dict[int, BaseException] | None = None) -> None:
        super().__init__()
        self.failures, self.calls, self.total, self.seen = failures or {}, 0, 0.0, list[float]()

    def __call__(self, population: Population) -> Tensor:
        self.model = population.model
        self.seen.append(float(len(population)))
        self.calls += 1
        if self.calls in self.failures:
            raise self.failures.pop(self.calls)
        return -population(X).square().mean((1, 2))

    def pop_statistics(self) -> Tensor:
        # Raises if there is nothing.
        statistics = torch.tensor(self.seen).view(1, -1).sum(1)[0] if self.seen else torch.stack([])
        self.seen = []
        return statistics

    def merge_statistics(self, model: nn.Module, statistics: Sequence[Tensor]) -> None:
        self.total += sum(float(value) for value in statistics)
        self.model.mean += 0.25

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total = state["total"]


def counting(*args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return make(model=Centred(), fitness_fn=Counting(*args), **{"chunk_size": 4, **options})


def test_a_chunk_that_is_evaluated_again_counts_once() -> None:
    run, twin = counting({2: TimeLimitExceeded()}, engine=LocalEngine(timeout=60)), counting()
    goes_on(run, twin)
    assert run.fitness_fn.total == 16 and run.fitness_fn.calls == twin.fitness_fn.calls + 1


def test_a_generation_that_ran_out_of_memory_counts_once() -> None:
    run = counting({2: torch.OutOfMemoryError("out of memory")}, population_size=1536, chunk_size=None)
    with pytest.warns(RuntimeWarning, match="memory ran out with 1024 members at a time"):
        run.step()
    assert run.fitness_fn.total == 1536


def test_a_step_that_is_repeated_counts_once() -> None:
    run, twin = counting({2: KeyError("broken")}), counting()
    with pytest.raises(KeyError):
        run.step()
    goes_on(run, twin)


def test_evaluations_outside_a_generation_do_not_count() -> None:
    run, twin = counting(), counting()
    for _ in range(2):
        run.evaluate_fitness(run.model)
        run.step()
        run.evaluate_fitness(run.get_best_model())
        twin.step()
    assert run.fitness_fn.total == twin.fitness_fn.total == 16
    assert_same(run.state_dict(), twin.state_dict())


class Numbers(Counting):
    """Keeps nothing in the model."""

    changes_model = False

    def merge_statistics(self, model: nn.Module, statistics: Sequence[Tensor]) -> None:
        self.total += sum(float(value) for value in statistics)
        if self.calls == 4:
            raise KeyError("not merged")


def test_a_model_that_a_learner_leaves_alone_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(model=Centred(), fitness_fn=Numbers(), chunk_size=4, params=None)
    copied: list[Any] = []
    original = eggroll_trainer.fitness.learning.plain_copy

    def recorded(value: Any) -> Any:
        copied.append(value)
        return original(value)

    monkeypatch.setattr("eggroll_trainer.fitness.learning.plain_copy", recorded)
    run.step()
    assert run.fitness_fn.total == 8 and copied == [{"total": 0.0}]
    # What it keeps itself is put back all the same.
    with pytest.raises(KeyError):
        run.step()
    assert run.fitness_fn.total == 8
    state = run.state_dict()
    assert (state["initial_untrained"], state["best_untrained"]) == ({}, {})


class Unmerged(Counting):
    """Fails when all is done but the last part of a merge."""

    broken = False

    def merge_statistics(self, model: nn.Module, statistics: Sequence[Tensor]) -> None:
        super().merge_statistics(model, statistics)
        if self.broken:
            raise ArithmeticError("no mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_that_cannot_be_merged(dtype: torch.dtype) -> None:
    def start() -> Any:
        torch.manual_seed(0)
        options: dict[str, Any] = {
            "lr_scheduler": partial(ExponentialLR, gamma=0.5),
            "sigma_scheduler": partial(ExponentialLR, gamma=0.9),
        }
        return make(model=Centred().to(dtype), fitness_fn=Unmerged(), chunk_size=4, **options)

    run, twin = start(), start()
    x = X.to(dtype)
    for trainer in (run, twin):
        trainer.model.register_forward_pre_hook(lambda module, args: (x,))
    goes_on(run, twin)
    before = run.state_dict()
    parameters = [p.detach().clone() for p in run.model.parameters()]
    run.fitness_fn.broken = True
    with pytest.raises(ArithmeticError):
        run.step()
    assert_same(run.state_dict(), before)
    assert all(map(torch.equal, run.model.parameters(), parameters))
    run.fitness_fn.broken = False
    goes_on(run, twin)
