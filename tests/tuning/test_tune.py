"""The search for settings, on trainers that start far off."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Custom, assert_same
from torch import nn

from eggroll_trainer import EGGROLLTrainer, VanillaESTrainer, tune
from eggroll_trainer.diagnostics import LearningWarning
from eggroll_trainer.tuning import SigmaTrial
from eggroll_trainer.tuning.tune import _chosen

X = torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
Y = torch.sin(X[:, :1]) + 0.5 * X[:, 1:2]


def fitness(model: nn.Module) -> torch.Tensor:
    return -(model(X) - Y).square().mean()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


def make(cls: Any = EGGROLLTrainer, **options: Any) -> Any:
    settings: dict[str, Any] = {"fitness_fn": fitness, "population_size": 64, "seed": 0, **options}
    return cls(model=network(), **settings)


SHARES = {0.01: 1.0, 0.03: 0.95, 0.1: 0.7, 0.3: 0.4, 1.0: 0.1}


@pytest.mark.parametrize(
    "ties, expected",
    [
        # Smooth, also if two of very many scores are equal by chance.
        ((0.0, 0.0, 0.0, 0.0, 0.0), 0.03),
        ((1e-6, 0.0, 1e-6, 0.0, 0.0), 0.03),
        # Piecewise constant.
        ((0.2, 0.1, 0.03, 0.02, 0.02), 0.1),
        # Those that tell members apart; or the one that does so best.
        ((0.9, 0.8, 0.7, 0.1, 0.1), 0.3),
        ((1.0, 0.9, 0.8, 0.7, 0.6), 1.0),
    ],
)
def test_the_sigma_that_is_chosen(ties: tuple[float, ...], expected: float) -> None:
    trials = [SigmaTrial(s, share, t, 0.0) for (s, share), t in zip(SHARES.items(), ties, strict=True)]
    assert _chosen(trials) == expected


@pytest.mark.parametrize(
    "sigma, rate, optimizer", [(3.0, 1e-3, None), (3.0, 3.0, torch.optim.Adam), (0.003, 3.0, None)]
)
def test_settings_that_are_far_off(sigma: float, rate: float, optimizer: Any) -> None:
    trainer = make(sigma=sigma, learning_rate=rate, optimizer=optimizer)
    before = trainer.evaluate_fitness(trainer.model)
    found = tune(trainer, budget=40, verbose=False)
    assert found.generations <= 40
    assert 0.01 < trainer.sigma < 0.35
    trainer.train(160, verbose=False)
    # The best of a grid of fixed settings leaves 0.02 of it after 200 generations.
    assert trainer.evaluate_fitness(trainer.model) > 0.1 * before


@pytest.mark.parametrize("maximize", [True, False])
def test_smaller_sigmas_are_tried_if_all_are_too_large(maximize: bool) -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    trainer = EGGROLLTrainer(
        model=nn.Linear(3, 1),
        fitness_fn=lambda model: (-1 if maximize else 1) * (model(x) - x[:, :1]).square().mean(),
        maximize=maximize,
        population_size=32,
        sigma=1000.0,
        seed=0,
    )
    found = tune(trainer, budget=40, learning_rate=False, verbose=False)
    tried = [trial.sigma for trial in found.sigmas]
    assert len(tried) > 9 and tried == sorted(tried)
    assert found.sigma < 3.0 < tried[-9]


def test_a_small_budget_has_fewer_rates_with_three_generations_each() -> None:
    found = tune(make(sigma=0.1, learning_rate=0.1), budget=20, verbose=False)
    assert found.generations <= 20
    assert len(found.rates) >= 2 and all(len(trial.fitness) >= 3 for trial in found.rates)


@pytest.mark.parametrize("cls, options", [(EGGROLLTrainer, {}), (VanillaESTrainer, {"group_size": 4}), (Custom, {})])
def test_the_trainer_is_what_it_was(cls: Any, options: dict[str, Any]) -> None:
    trainer = make(cls, sigma=0.1, learning_rate=0.1, **options)
    trainer.train(2, verbose=False)
    before = trainer.state_dict()
    found = tune(trainer, budget=20, apply=False, verbose=False)
    assert_same(trainer.state_dict(), before)
    assert bool(found.sigmas) == (cls is not Custom) and found.rates
    twin = make(cls, sigma=0.1, learning_rate=0.1, **options)
    twin.train(4, verbose=False)
    trainer.train(2, verbose=False)
    assert torch.equal(twin.current_params, trainer.current_params)


def test_only_one_of_the_two() -> None:
    trainer = make(sigma=0.1, learning_rate=1e-3)
    tune(trainer, budget=20, sigma=False, verbose=False)
    assert trainer.sigma == 0.1 and trainer.learning_rate > 0.01
    trainer = make(sigma=3.0, learning_rate=0.1)
    found = tune(trainer, budget=20, learning_rate=False, verbose=False)
    assert trainer.learning_rate == 0.1 and trainer.sigma < 1 and not found.rates


def test_groups_keep_their_ratios() -> None:
    model = network()
    assert isinstance(model, nn.Sequential)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 2e-3, "sigma": 1.5}]
    trainer = EGGROLLTrainer(groups, model, fitness, 64, learning_rate=1e-3, sigma=3.0, seed=0)
    tune(trainer, budget=20, verbose=False)
    first, second = trainer.param_groups
    assert second["lr"] == pytest.approx(2 * first["lr"]) and second["sigma"] == pytest.approx(first["sigma"] / 2)
    assert first["lr"] != 1e-3 and first["sigma"] != 3.0


def test_a_loss_is_minimised() -> None:
    one = make(sigma=3.0, learning_rate=1e-3)
    other = make(sigma=3.0, learning_rate=1e-3, fitness_fn=lambda model: -fitness(model), maximize=False)
    found = [tune(trainer, budget=30, verbose=False) for trainer in (one, other)]
    assert found[0].sigma == found[1].sigma and found[0].learning_rate == found[1].learning_rate


def test_a_coarse_fitness_gets_a_sigma_that_tells_members_apart() -> None:
    def accuracy(model: nn.Module) -> torch.Tensor:
        return ((model(X) > 0) == (Y > 0)).float().mean()

    trainer = make(fitness_fn=accuracy, sigma=1e-4, learning_rate=0.1)
    found = tune(trainer, budget=30, verbose=False)
    assert found.sigma > 1e-3


def test_what_is_wrong_with_settings_that_are_tried_is_not_told() -> None:
    trainer = make(sigma=1e-4, learning_rate=1e-5, fitness_fn=lambda m: float((m(X) > 0).float().mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(trainer, budget=20, verbose=False)
        # What the user's own settings lack is.
        trainer.learning_rate, trainer.sigma = 1e-5, 1e-5
    with pytest.warns(LearningWarning):
        trainer.train(40, verbose=False)


def test_the_table_and_the_figure(tmp_path: Path) -> None:
    found = tune(make(), budget=20, verbose=False)
    text = str(found)
    assert f"sigma={found.sigma:.3g}" in text and text.count("←") == 2
    found.plot(tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").stat().st_size > 10_000


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="tune takes a trainer, got Linear"):
        tune(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget must be at least 20"):
        tune(make(), budget=5)
    with pytest.raises(ValueError, match="adapt themselves"):
        tune(make(learning_rate="auto"))
    trainer = make(fitness_fn=lambda model: 1.0)
    before = trainer.state_dict()
    with pytest.raises(ValueError, match="the same fitness with every sigma"):
        tune(trainer, budget=20, verbose=False)
    assert_same(trainer.state_dict(), before)
