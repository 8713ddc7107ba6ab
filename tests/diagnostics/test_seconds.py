"""Where the time of a generation goes: stations that are made to take it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Custom, fitness, make, network, population_fitness

from eggroll_trainer import Population, batched
from eggroll_trainer._utils.stopwatch import Stopwatch
from eggroll_trainer.trainers import keyed

LONG = 0.05


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What happens once in a process, such as imports, takes longer than what is timed."""
    for fitness_fn in (population_fitness, fitness):
        make(fitness_fn=fitness_fn).step()
    make(Custom).step()


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        time.sleep(LONG)
        return function(*args, **kwargs)

    return called


@batched
def slow_fitness(population: Population) -> torch.Tensor:
    time.sleep(LONG)
    return population_fitness(population)


def longest(trainer: Any) -> str:
    trainer.step()
    seconds = trainer.seconds
    assert all(value >= 0 for value in seconds.values())
    name = max(seconds, key=lambda key: seconds[key])
    assert seconds[name] >= LONG
    return name


def test_evaluation() -> None:
    trainer = make(fitness_fn=slow_fitness)
    assert trainer.seconds == dict.fromkeys(("noise", "evaluation", "check", "update"), 0.0)
    assert longest(trainer) == "evaluation"


def test_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "sample", slow(keyed.sample))
    assert longest(make(fitness_fn=population_fitness)) == "noise"
    # Twice of two chunks: once more for the update, if they are not kept.
    trainer = make(fitness_fn=population_fitness, chunk_size=4)
    assert longest(trainer) == "noise" and trainer.seconds["noise"] >= 2 * LONG


def test_noise_of_a_custom_trainer() -> None:
    class Slow(Custom):
        def sample_perturbations(self, population_size: int) -> torch.Tensor:
            time.sleep(LONG)
            return super().sample_perturbations(population_size)

    assert longest(make(Slow)) == "noise"


def test_update() -> None:
    class Slow(Custom):
        def compute_update(self, perturbations: torch.Tensor, fitnesses: torch.Tensor) -> torch.Tensor:
            time.sleep(LONG)
            return super().compute_update(perturbations, fitnesses)

    assert longest(make(Slow)) == "update"


class SlowAlone(torch.nn.Module):
    """A model that takes its time for a batch of rows that has no members."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from eggroll_trainer._torch import peek_interpreter_stack

        if peek_interpreter_stack() is None:
            time.sleep(LONG)
        return self.inner(x)


@pytest.mark.parametrize("fitness_fn", [population_fitness, lambda model: -model(torch.ones(2, 4)).square().mean()])
def test_check(fitness_fn: Any) -> None:
    trainer = make(model=SlowAlone(), fitness_fn=fitness_fn)
    assert longest(trainer) == "check"
    # The checks are in generations 1, 2, 4, 8, …; in the third only symptoms are looked for.
    trainer.step()
    trainer.step()
    assert trainer.seconds["check"] < LONG / 2 and trainer.seconds["evaluation"] > 0


def test_blocks_inside_others_count_once() -> None:
    watch = Stopwatch(["a", "b"])
    with watch.timing("a"):
        time.sleep(0.01)
        with watch.timing("b"):
            time.sleep(0.02)
        with watch.timing("a"):
            time.sleep(0.01)
    assert 0.02 <= watch.seconds["a"] < 0.2 and 0.02 <= watch.seconds["b"] < 0.2
    watch.move(0.01, "a", "b")
    assert watch.seconds["b"] >= 0.03
    with pytest.raises(RuntimeError), watch.timing("a"):
        raise RuntimeError
    watch.restart()
    assert watch.seconds == {"a": 0.0, "b": 0.0}
    time.sleep(0.01)
    with watch.timing("b"):
        pass
    assert watch.seconds["a"] == 0.0 and watch.seconds["b"] < 0.01
