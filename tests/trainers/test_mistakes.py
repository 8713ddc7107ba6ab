"""Mistakes of people who come from other libraries: the error says what was meant."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import pytest
import torch
from helpers import fitness, make
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

from eggroll_trainer import EGGROLLTrainer, ESTrainer, VanillaESTrainer


class Own(ESTrainer):
    def __init__(self, *args: Any, momentum: float = 0.9, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.momentum = momentum

    def sample_perturbations(self, population_size: int) -> torch.Tensor:
        return torch.randn(population_size, len(self.current_params)) * self.sigma

    def compute_update(self, perturbations: torch.Tensor, fitnesses: torch.Tensor) -> torch.Tensor:
        return (fitnesses[:, None] * perturbations).mean(0)


@pytest.mark.parametrize("cls", [EGGROLLTrainer, VanillaESTrainer, Own])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr", "learning_rate"),
        ("step_size", "learning_rate"),
        ("popsize", "population_size"),
        ("pop_size", "population_size"),
        ("std", "sigma"),
        ("stdev_init", "sigma"),
        ("epochs", "train(num_generations=…)"),
        ("num_generations", "train(num_generations=…)"),
        ("callback", "train(callback=…)"),
        ("loss_fn", "fitness_fn, with maximize=False where lower is better"),
        ("net", "model"),
        ("weight_decay", "functools.partial(torch.optim.Adam, weight_decay=…)"),
        ("popualtion_size", "population_size"),
    ],
)
def test_an_argument_of_another_library(cls: Any, given: str, meant: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"{cls.__name__}() has no argument {given!r}; did you mean")) as info:
        cls(model=nn.Linear(2, 1), fitness_fn=lambda model: 0.0, **{given: 1})
    assert meant in str(info.value)


def test_what_a_class_does_not_have_is_not_meant() -> None:
    options: dict[str, Any] = {"model": nn.Linear(2, 1), "fitness_fn": lambda model: 0.0}
    eggroll: Any = EGGROLLTrainer
    vanilla: Any = VanillaESTrainer
    with pytest.raises(TypeError, match="did you mean rank"):
        eggroll(**options, lora_rank=2)
    with pytest.raises(TypeError) as info:
        vanilla(**options, lora_rank=2)
    assert "mean rank" not in str(info.value)
    with pytest.raises(TypeError, match="noise_reuse=2, which makes antithetic pairs"):
        vanilla(**options, antithetic=True)
    with pytest.raises(TypeError) as info:
        Own(**options, antithetic=True)
    assert "noise_reuse" not in str(info.value)
    with pytest.raises(TypeError, match="it has params, model, fitness_fn"):
        eggroll(**options, zzz=2)


def test_an_argument_of_another_librarys_train() -> None:
    trainer = make()
    with pytest.raises(TypeError, match=r"EGGROLLTrainer.train\(\) has no argument 'epochs'; did you mean num_gen"):
        trainer.train(epochs=3)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'num_generations'"):
        trainer.train()


@pytest.mark.parametrize("cls", [EGGROLLTrainer, VanillaESTrainer, Own])
def test_the_model_as_params(cls: Any) -> None:
    model = nn.Linear(2, 1)
    for arguments in ((model,), (model, lambda model: 0.0)):
        with pytest.raises(TypeError, match=r"params got the model \(a Linear\): pass it as model="):
            cls(*arguments)
    with pytest.raises(TypeError, match="got a Linear; a model is passed as model="):
        cls(model, model=model, fitness_fn=lambda model: 0.0)
    with pytest.raises(TypeError, match="got type; create an instance"):
        cls(model=nn.Linear, fitness_fn=lambda model: 0.0)


def test_signatures_are_those_that_are_written() -> None:
    for cls in (EGGROLLTrainer, VanillaESTrainer, ESTrainer):
        assert list(inspect.signature(cls).parameters)[:3] == ["params", "model", "fitness_fn"]


def run_with_plateau(mode: Any, metric: str, sign: int = 1, **options: Any) -> list[str]:
    """Return the warnings of a run whose loop steps a scheduler of its own."""
    trainer = make(optimizer=None, population_size=64, **options)
    scheduler = ReduceLROnPlateau(trainer, mode=mode, patience=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            metrics = trainer.step()
            scheduler.step(sign * metrics[metric])
    return [str(warning.message) for warning in caught if "ReduceLROnPlateau" in str(warning.message)]


@pytest.mark.parametrize("metric", ["mean_fitness", "fitness"])
def test_a_plateau_that_waits_for_a_rising_fitness_to_fall(metric: str) -> None:
    (message,) = run_with_plateau("min", metric)
    assert f"ReduceLROnPlateau gets {metric}, which rises" in message and "make it with mode='max'" in message


def test_a_plateau_that_waits_for_a_falling_loss_to_rise() -> None:
    options: dict[str, Any] = {"fitness_fn": lambda model: -fitness(model), "maximize": False}
    (message,) = run_with_plateau("max", "mean_fitness", **options)
    assert "which falls" in message and "make it with mode='min'" in message
    assert run_with_plateau("min", "mean_fitness", **options) == []


def test_a_plateau_that_is_right() -> None:
    assert run_with_plateau("max", "mean_fitness") == []
    # Of something else, such as a loss on other data.
    assert run_with_plateau("min", "mean_fitness", sign=-1) == []


def test_other_schedulers_in_ones_own_loop() -> None:
    trainer = make()
    scheduler = ExponentialLR(trainer, 0.9)
    for _ in range(6):
        trainer.step()
        scheduler.step()
    assert trainer.learning_rate < 0.1
