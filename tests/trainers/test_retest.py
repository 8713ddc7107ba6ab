"""The best member where scores are noisy: evaluated again before it counts."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make, network
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched
from eggroll_trainer.callbacks import ScoreLog
from eggroll_trainer.trainers.retest import Retest

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Counted:
    """A fitness function that knows how often it was called; ``noise`` is added to each score."""

    def __init__(self, noise: Any = lambda: 0.0) -> None:
        self.noise, self.calls = noise, 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        return quality(model) + float(self.noise())


def quality(model: nn.Module) -> float:
    with torch.no_grad():
        return -(model(X) - 1).square().mean().item()


NOISES = {
    "torch": lambda: 3 * torch.randn(()),
    "numpy": lambda: 3 * np.random.randn(),
    "python": lambda: random.gauss(0, 3),
}


@pytest.mark.parametrize("coalesce", [True, "unchecked", False])
@pytest.mark.parametrize("name", NOISES)
def test_noise_is_found(name: str, coalesce: Any) -> None:
    trainer = make(fitness_fn=Counted(NOISES[name]), coalesce=coalesce)
    trainer.step()
    assert trainer._findings.differs
    # The best of a generation is far luckier than the same member is on average.
    trainer.train(29, verbose=False)
    assert trainer.best_fitness < max(trainer.history["fitness"]) - 1
    bests = trainer.history["best_fitness"]
    assert bests == sorted(bests) and bests[-1] == trainer.best_fitness


def test_the_model_itself_may_draw() -> None:
    model = nn.Sequential(network(), nn.Dropout(0.5))
    for function in (Counted(), batched(lambda population: -(population(X) - 1).square().mean((1, 2)))):
        trainer = EGGROLLTrainer(model=model, fitness_fn=function, population_size=16, seed=0)
        trainer.step()
        assert trainer._findings.differs


def test_a_function_without_noise_costs_nothing_more() -> None:
    function = Counted()
    trainer = make(fitness_fn=function, coalesce="unchecked")
    trainer.train(5, verbose=False)
    assert not trainer._findings.differs and function.calls == 5 * trainer.population_size
    assert trainer.best_fitness == max(trainer.history["fitness"])
    assert trainer.evaluate_fitness(trainer.get_best_model()) == pytest.approx(trainer.best_fitness, rel=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_it_costs_little() -> None:
    function = Counted(NOISES["torch"])
    trainer = make(fitness_fn=function, coalesce="unchecked")
    # A first round ends when the noise is found, and all members start again.
    trainer.step()
    function.calls = 0
    # Without learning, so that it is luck alone.
    trainer.learning_rate = 0.0
    trainer.train(100, verbose=False)
    assert function.calls - 100 * trainer.population_size < 40


def test_the_best_member_is_a_good_one() -> None:
    """Luck of 1 on a quality of deviation 0.3: the luckiest of 64 members each time, against those tested again."""
    chosen: list[tuple[float, float]] = []
    luckiest: list[tuple[float, float]] = []
    for seed in range(6):
        for noisy, found in ((True, chosen), (False, luckiest)):
            function = Counted(lambda: torch.randn(()))
            function.noisy = noisy  # type: ignore[attr-defined]
            trainer = make(fitness_fn=function, population_size=64, learning_rate=0.05, seed=seed, sigma=0.05)
            trainer.train(8, verbose=False)
            best = quality(trainer.get_best_model())
            found.append((best, trainer.best_fitness - best))
    # What is said of it is nearer to the truth.
    assert np.mean([off for _, off in chosen]) < 0.6 * np.mean([off for _, off in luckiest])


def test_the_attribute_decides() -> None:
    quiet, drawing = Counted(), Counted(NOISES["torch"])
    quiet.noisy, drawing.noisy = True, False  # type: ignore[attr-defined]
    trainer = make(fitness_fn=drawing, coalesce="unchecked")
    trainer.train(3, verbose=False)
    assert trainer.best_fitness == max(trainer.history["fitness"])
    trainer = make(fitness_fn=quiet, coalesce="unchecked")
    trainer.step()
    assert quiet.calls == trainer.population_size + 2


@batched
def population_noise(population: Population) -> Tensor:
    return -(population(X) - 1).square().mean((1, 2)) + torch.randn(len(population))


def test_batched_functions() -> None:
    trainer = make(fitness_fn=population_noise)
    trainer.train(10, verbose=False)
    assert trainer._findings.differs and trainer.best_fitness < max(trainer.history["fitness"])


def test_losses() -> None:
    function = Counted(NOISES["torch"])
    trainer = make(fitness_fn=lambda model: -function(model), maximize=False)
    twin = make(fitness_fn=function)
    trainer.train(10, verbose=False), twin.train(10, verbose=False)
    assert trainer.best_fitness == -twin.best_fitness > min(trainer.history["fitness"])


@pytest.mark.parametrize("at", [1, 5, 12])
def test_a_resumed_run_is_the_same(at: int, tmp_path: Path) -> None:
    whole, first, second = (make(fitness_fn=Counted(NOISES["torch"])) for _ in range(3))
    whole.train(20, verbose=False)
    first.train(at, verbose=False)
    first.save(tmp_path / "a.pt")
    second.load(tmp_path / "a.pt")
    second.train(20 - at, verbose=False)
    assert second.history == whole.history
    assert torch.equal(second._best, whole._best)


def test_a_replayed_run_is_the_same(tmp_path: Path) -> None:
    trainer, again = make(fitness_fn=Counted(NOISES["torch"])), make(fitness_fn=Counted(NOISES["torch"]))
    log = ScoreLog(tmp_path / "scores.jsonl")
    for _ in range(20):
        log.begin(trainer)
        trainer.step()
        log.append(trainer)
    assert log.replay(again) == 20
    assert again.history == trainer.history and torch.equal(again._best, trainer._best)
    # Both look at the same candidates from here on.
    assert again._retest.state() == trainer._retest.state()


def test_what_is_told_is_not_evaluated_again() -> None:
    function = Counted(NOISES["torch"])
    trainer = make(fitness_fn=function)
    trainer.step()
    function.calls = 0
    trainer.ask()
    trainer.tell(torch.linspace(0, 100, trainer.population_size))
    assert function.calls == 0 and trainer.best_fitness == 100


def test_a_function_that_fails_when_it_is_evaluated_again() -> None:
    function = Counted(NOISES["torch"])
    trainer, twin = make(fitness_fn=function, coalesce=False), make(fitness_fn=function, coalesce=False)
    noise = function.noise

    def fails() -> float:
        if function.calls > trainer.population_size:
            raise OSError("no more")
        return float(noise())

    function.noise = fails
    with pytest.raises(OSError, match="no more"):
        trainer.step()
    assert trainer.generation == 0 and trainer.history["fitness"] == []
    function.noise = noise
    assert trainer.step() == twin.step()


def test_what_fails_then_does_not_count() -> None:
    function = Counted(NOISES["torch"])
    trainer = make(fitness_fn=function, coalesce=False)
    noise = function.noise
    function.noise = lambda: math.nan if function.calls > trainer.population_size else noise()
    trainer.step()
    assert trainer.best_fitness == -math.inf
    before = trainer.model.state_dict()
    for name, value in trainer.get_best_model().state_dict().items():
        assert torch.equal(value, before[name])


def test_candidates_become_rarer() -> None:
    retest, looked_at = Retest(), []
    for generation in range(1, 100):
        due = retest.is_due(generation)
        looked_at += [generation] * due
        retest.note(generation, 0.5 if due else math.nan, kept=False)
    assert looked_at == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96]
    retest.note(99, 0.5, kept=True)
    assert retest.is_due(100)
