"""Trainers under the caller's modes of torch, and populations of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    ADAM,
    X,
    assert_same,
    fitness,
    make,
    network,
)
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, ESTrainer, Population, VanillaESTrainer, batched


def test_the_callers_modes_do_not_reach_the_update() -> None:
    def inner(model: nn.Module) -> float:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            return fitness(model)

    quiet, within = make(fitness_fn=inner), make()
    quiet.train(3, verbose=False)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        within.train(3, verbose=False)
    assert_same(within.state_dict(), quiet.state_dict())
    # Nothing is left that could only be changed in inference mode.
    within.step()


@pytest.mark.parametrize("optimizer", [ADAM, torch.optim.Adagrad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainers_made_and_used_in_inference_mode(dtype: torch.dtype, optimizer: Any) -> None:
    x = X.to(dtype)

    def score(model: nn.Module) -> float:
        return model(x).float().sum().item()

    model = network(dtype)
    with torch.inference_mode():
        trainer = make(model=model, fitness_fn=score, optimizer=optimizer)
        trainer.step()
        trainer.load_state_dict(trainer.state_dict())
    trainer.step()
    with torch.inference_mode():
        trainer.step()
        trainer.reset()
    trainer.step()
    with torch.inference_mode():
        born_there = network(dtype)
    with pytest.raises(ValueError, match="parameter '0.weight' was made under torch.inference_mode"):
        make(model=born_there)


@pytest.mark.parametrize("cls", [EGGROLLTrainer, VanillaESTrainer])
def test_a_population_of_one_is_warned_of_and_learns_nothing(cls: type[ESTrainer]) -> None:
    trainer = make(cls, population_size=1, optimizer=None)
    before = trainer.current_params
    with pytest.warns(RuntimeWarning, match="population_size=1 cannot learn: .* Take at least 2"):
        trainer.step()
    assert torch.equal(trainer.current_params, before)
    later = make(cls)
    later.population_size = 1
    with pytest.warns(RuntimeWarning, match="population_size=1 cannot learn"):
        later.step()
    # One that is not compared with others can.
    alone = make(cls, population_size=1, shaping="raw")
    # Nor is it told that all members are equal.
    alone.train(4, verbose=False)
    assert not torch.equal(alone.current_params, before)


def test_a_population_knows_its_members() -> None:
    @batched
    def too_far(population: Population) -> Tensor:
        population.member(len(population))
        return torch.zeros(len(population))

    with pytest.raises(IndexError, match="member 8 of a population of 8"):
        make(fitness_fn=too_far).step()
