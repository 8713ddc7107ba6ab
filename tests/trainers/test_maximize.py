"""``maximize=False``: a loss is minimised as its negative would be maximised, and shown as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import POPULATION, Custom, fitness, make, network, population_fitness
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from eggroll_trainer import EGGROLLTrainer, ESTrainer, Population, VanillaESTrainer, batched
from eggroll_trainer.callbacks import Checkpoints, ScoreLog


def loss(model: nn.Module) -> Any:
    return -fitness(model)


@batched
def population_loss(population: Population) -> Tensor:
    return -population_fitness(population)


def tasks(model: nn.Module) -> Tensor:
    return torch.tensor([loss(model), 2 * loss(model)])


SIGNED = ("fitness", "mean_fitness", "best_fitness")


@pytest.mark.parametrize("cls", [EGGROLLTrainer, VanillaESTrainer, Custom])
@pytest.mark.parametrize(
    ("one", "other"),
    [(fitness, loss), (population_fitness, population_loss), (lambda m: -tasks(m), tasks)],
    ids=["plain", "batched", "tasks"],
)
def test_the_same_steps_as_of_the_negative(cls: type[ESTrainer], one: Any, other: Any) -> None:
    trainer, twin = make(cls, fitness_fn=one), make(cls, fitness_fn=other, maximize=False)
    assert trainer.maximize and not twin.maximize
    assert (trainer.best_fitness, twin.best_fitness) == (-math.inf, math.inf)
    trainer.train(4, verbose=False), twin.train(4, verbose=False)
    assert torch.equal(trainer.current_params, twin.current_params)
    for key, values in trainer.history.items():
        assert twin.history[key] == ([-value for value in values] if key in SIGNED else values)
    assert twin.best_fitness == min(twin.history["fitness"]) == -trainer.best_fitness
    # In the function's own sign.
    if other is not tasks:
        assert twin.evaluate_fitness(twin.get_best_model()) == pytest.approx(twin.best_fitness, rel=1e-5)


def test_what_is_not_finite_is_the_worst() -> None:
    trainer, twin = make(fitness_fn=loss, maximize=False), make()
    losses = torch.arange(8.0)
    trainer.ask(), twin.ask()
    with pytest.warns(RuntimeWarning, match="not finite counts as the worst"):
        metrics = trainer.tell(torch.where(losses > 5, torch.nan, losses))
    twin.tell(-losses.clamp(max=5))
    assert (metrics["num_nonfinite"], metrics["fitness"], metrics["best_fitness"]) == (2, 0.0, 0.0)
    assert torch.equal(trainer.current_params, twin.current_params)


def test_ask_and_tell_of_losses() -> None:
    trainer, twin = make(maximize=False, fitness_fn=population_loss), make(fitness_fn=population_fitness)
    trainer.ask()
    losses = torch.linspace(3, 0, POPULATION)
    metrics = trainer.tell(losses)
    twin.ask()
    twin.tell(-losses)
    assert torch.equal(trainer.current_params, twin.current_params) and metrics["best_fitness"] == 0.0


def test_it_goes_on_and_refuses_the_other_way(tmp_path: Path) -> None:
    trainer, twin = make(fitness_fn=loss, maximize=False), make(fitness_fn=loss, maximize=False)
    trainer.train(3, verbose=False)
    trainer.save(tmp_path / "a.pt")
    twin.load(tmp_path / "a.pt")
    assert twin.step() == trainer.step()
    with pytest.raises(ValueError, match=r"this one has maximize=True \(was False\)"):
        make(fitness_fn=loss).load(tmp_path / "a.pt")
    # As earlier versions wrote it.
    state = make().state_dict()
    del state["settings"]["maximize"]
    make().load_state_dict(state)


def test_the_best_checkpoint_and_the_log(tmp_path: Path) -> None:
    trainer, checkpoints = make(fitness_fn=loss, maximize=False, learning_rate=0.3), Checkpoints(tmp_path, every=1)
    trainer.train(5, verbose=False, checkpoints=checkpoints)
    best = make(fitness_fn=loss, maximize=False, learning_rate=0.3)
    best.load(tmp_path / "best.pt")
    means = trainer.history["mean_fitness"]
    assert best.history["mean_fitness"][-1] == min(means) and len(set(means)) == 5
    again = make(fitness_fn=loss, maximize=False, learning_rate=0.3)
    assert ScoreLog(tmp_path / "scores.jsonl").replay(again) == 5
    assert torch.equal(again.current_params, trainer.current_params) and again.history == trainer.history
    with pytest.raises(ValueError, match="maximize=True"):
        ScoreLog(tmp_path / "scores.jsonl").replay(make(fitness_fn=loss, learning_rate=0.3))


def test_plateaus() -> None:
    def of(mode: Any) -> Any:
        return lambda optimizer: ReduceLROnPlateau(optimizer, mode=mode, patience=0, threshold=10.0)

    with pytest.raises(ValueError, match="the mean fitness, which falls; make it with mode='min'"):
        make(fitness_fn=loss, maximize=False, lr_scheduler=of("max"))
    with pytest.raises(ValueError, match="the mean fitness, which rises; make it with mode='max'"):
        make(lr_scheduler=of("min"))
    trainer = make(fitness_fn=loss, maximize=False, lr_scheduler=of("min"))
    trainer.train(3, verbose=False)
    assert trainer.learning_rate < 0.1


@pytest.mark.parametrize("value", [None, 1, "min"])
def test_it_is_true_or_false(value: Any) -> None:
    with pytest.raises(TypeError, match="maximize must be True or False"):
        EGGROLLTrainer(model=network(), fitness_fn=loss, maximize=value)
    trainer: Any = make()
    with pytest.raises(AttributeError):
        trainer.maximize = False
