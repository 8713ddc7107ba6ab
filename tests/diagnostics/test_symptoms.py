"""Each symptom gives one warning that says what to do; a run that learns gives none."""

from __future__ import annotations

import functools
import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eggroll_trainer import EGGROLLTrainer, ESTrainer
from eggroll_trainer.diagnostics import LearningWarning
from eggroll_trainer.diagnostics.losses import loss_that_it_computes

torch.manual_seed(0)
X = torch.randn(128, 6)
Y = torch.sin(X[:, :1]) + 0.5 * X[:, 1:2]


def regression(model: nn.Module) -> float:
    return -F.mse_loss(model(X), Y).item()


def weight_of(model: nn.Module) -> torch.Tensor:
    """Return the weight, asked for in a way that type checkers understand."""
    assert isinstance(model, nn.Linear)
    return model.weight


def accuracy(model: nn.Module) -> float:
    return ((model(X) > 0) == (Y > 0)).float().mean().item()


def warned(
    generations: int,
    fitness_fn: Callable[[nn.Module], Any] = regression,
    model: nn.Module | None = None,
    **options: Any,
) -> list[str]:
    """Return what a run is told."""
    torch.manual_seed(1)
    if model is None:
        model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
    trainer = EGGROLLTrainer(model=model, fitness_fn=fitness_fn, seed=0, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train(generations, verbose=False)
    return [str(one.message) for one in told if isinstance(one.message, LearningWarning)]


def test_a_run_that_learns_hears_nothing() -> None:
    settings: dict[str, Any] = {"population_size": 128, "learning_rate": 0.1, "sigma": 0.05, "noise_reuse": 2}
    assert warned(60, **settings) == []
    adam: dict[str, Any] = {**settings, "optimizer": torch.optim.Adam, "learning_rate": 0.02}
    assert warned(60, **adam) == []


def test_short_steps_at_the_end_of_a_schedule_are_no_symptom() -> None:
    falls_to_zero = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=100)
    settings: dict[str, Any] = {"population_size": 128, "sigma": 0.05, "optimizer": torch.optim.Adam}
    assert warned(100, learning_rate=0.03, lr_scheduler=falls_to_zero, **settings) == []


def test_one_that_has_learnt_all_there_is_hears_nothing() -> None:
    # The rest of it is noise around the optimum.
    target = torch.full((3,), 0.5)
    model = nn.Linear(3, 1, bias=False)
    assert warned(
        150, lambda m: -(weight_of(m)[0] - target).square().sum(), model, population_size=64, learning_rate=0.1
    ) == []  # fmt: skip


def test_the_documented_defaults_move_too_little() -> None:
    message, *_ = warned(100)
    assert "the steps are very short" in message and "0.011 of sigma" in message and "Raise learning_rate" in message


@pytest.mark.slow
def test_steps_that_could_be_longer() -> None:
    messages = warned(300, population_size=256, learning_rate=0.01, sigma=0.05, noise_reuse=2)
    assert any("the steps could be longer" in message for message in messages)


@pytest.mark.parametrize("learning_rate", [5, 50])
def test_steps_that_are_too_long(learning_rate: float) -> None:
    messages = warned(20, learning_rate=learning_rate)
    assert any("the mean fitness has fallen from" in m and "Lower learning_rate" in m for m in messages)


def test_a_loss_that_is_minimised_is_told_in_its_own_sign() -> None:
    messages = warned(20, lambda model: -regression(model), learning_rate=50, maximize=False)
    (message,) = [one for one in messages if "the mean fitness has" in one]
    # It begins at about 1, and ends far above.
    assert re.match(r"the mean fitness has risen from \d\S* to \d", message)


def test_steps_that_undo_each_other() -> None:
    model = nn.Linear(3, 1, bias=False)
    messages = warned(
        30, lambda m: -weight_of(m).square().sum(), model, population_size=256, learning_rate=5.0, sigma=0.1
    )  # fmt: skip
    assert any("each step undoes the last one" in message for message in messages)


def test_a_loss() -> None:
    (message, *_) = warned(60, lambda m: F.mse_loss(m(X), Y).item(), learning_rate=0.3)
    assert "calls mse_loss" in message and "return its negative" in message


def test_a_constant() -> None:
    (message,) = warned(20, lambda m: 1.0, learning_rate=0.1)
    assert "the same fitness for 3 generations (1)" in message


def test_chance() -> None:
    values = itertools.count()

    def fitness(model: nn.Module) -> float:
        return (next(values) * 0.618034) % 1.0

    (message,) = warned(100, fitness, learning_rate=0.1, coalesce=False)
    assert "indistinguishable from noise" in message and "The fitness itself is noisy" in message


def test_a_sigma_under_the_resolution_of_the_fitness() -> None:
    (message, *_) = warned(20, accuracy, learning_rate=0.2, sigma=0.001)
    assert "too coarse for sigma=0.001" in message


@pytest.mark.parametrize("sigma, expected", [(0.6, "have the worst fitness, -2"), (5.0, "sigma=5 is too large")])
def test_a_sigma_with_which_most_members_fail(sigma: float, expected: str) -> None:
    def fitness(model: nn.Module) -> float:
        return max(-2.0, regression(model))

    assert expected in warned(20, fitness, learning_rate=0.1, sigma=sigma)[0]


def test_a_sigma_that_is_too_large() -> None:
    def fitness(model: nn.Module) -> float:
        # A ridge, of which members see nothing but its surroundings.
        return float(torch.exp(-4 * (model(X) - Y).square().mean())) + 1e-3 * math.sin(1e4 * float(model(X[:1])))

    messages = warned(60, fitness, learning_rate=0.02, sigma=1.0)
    assert any("The model without perturbation is better than most members" in message for message in messages)


def test_a_fitness_without_a_slope() -> None:
    messages = warned(50, lambda m: math.sin(1e6 * float(m(X[:1]))), learning_rate=0.1)
    assert "There are 50 members for 257 weights" in messages[0]


@pytest.mark.filterwarnings("ignore:a fitness that is not finite")
def test_scores_that_are_not_finite() -> None:
    def fitness(model: nn.Module) -> float:
        value = regression(model)
        return value if value > -1.0 else float("nan")

    torch.manual_seed(1)
    trainer = EGGROLLTrainer(model=nn.Linear(6, 1), fitness_fn=fitness, seed=0, learning_rate=0.1, sigma=0.5)
    with pytest.warns(LearningWarning, match="of the scores were not finite"):
        trainer.train(3, verbose=False)


def test_it_is_told_once_and_goes_on_where_warnings_are_errors() -> None:
    trainer = EGGROLLTrainer(model=nn.Linear(6, 1), fitness_fn=lambda m: 1.0, seed=0)
    trainer.train(2, verbose=False)
    with pytest.raises(LearningWarning):
        trainer.step()
    assert trainer.generation == 3 and len(trainer.history["generation"]) == 3
    trainer.train(20, verbose=False)


def test_scores_told_from_outside_are_not_asked_for_here() -> None:
    calls = []

    def fitness(model: nn.Module) -> float:
        calls.append(model)
        return 0.0

    trainer = EGGROLLTrainer(model=nn.Linear(6, 1), fitness_fn=fitness, seed=0, learning_rate=0.1)
    generator = torch.Generator().manual_seed(0)
    with pytest.warns(LearningWarning, match="indistinguishable from noise"):
        for _ in range(100):
            trainer.ask()
            trainer.tell(torch.rand(50, generator=generator))
    assert not calls


def test_a_custom_trainer_is_watched_as_far_as_it_can_be() -> None:
    class Simple(ESTrainer):
        def sample_perturbations(self, population_size: int) -> torch.Tensor:
            return torch.randn(population_size, len(self.current_params)) * self.sigma

        def compute_update(self, perturbations: torch.Tensor, fitnesses: torch.Tensor) -> torch.Tensor:
            return ((fitnesses - fitnesses.mean())[:, None] * perturbations).mean(0)

    trainer = Simple(model=nn.Linear(6, 1), fitness_fn=lambda m: 1.0, seed=0)
    with pytest.warns(LearningWarning, match="the same fitness"):
        metrics = trainer.train(4, verbose=False)
    assert "split_half_cosine" not in metrics and metrics["agreement"] == 0.0


def test_losses_are_found_in_the_code() -> None:
    criterion = nn.CrossEntropyLoss()
    assert loss_that_it_computes(lambda m: criterion(m(X), Y)) == "criterion"
    held = nn.CrossEntropyLoss()
    assert loss_that_it_computes(lambda m: held(m(X), Y)) == "CrossEntropyLoss"

    def outer(model: nn.Module) -> float:
        return sum(F.l1_loss(model(x), y).item() for x, y in zip(X, Y, strict=True))

    assert loss_that_it_computes(outer) == "l1_loss"
    assert loss_that_it_computes(print) is None
    assert loss_that_it_computes(accuracy) is None
