"""Weight decay towards the initial weights."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from helpers import make, network, regression
from torch import nn

from eggroll_trainer import ESTrainer

# Settings of these tests are not meant to learn fast.
pytestmark = pytest.mark.filterwarnings("ignore::eggroll_trainer.diagnostics.LearningWarning")

LR, DECAY = 0.2, 0.5


def constant(model: nn.Module) -> float:
    return 1.0


def anchored(**options: Any) -> ESTrainer:
    return make(**{"optimizer": None, "learning_rate": LR, "anchor_decay": DECAY, **options})


def displacement(trainer: ESTrainer) -> torch.Tensor:
    return trainer.current_params - trainer.initial_params


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2e-7), (torch.float64, 1e-15), (torch.bfloat16, 2e-7)])
def test_a_step_pulls_back_by_its_share(dtype: torch.dtype, rounding: float) -> None:
    trainer = anchored(model=network(dtype), fitness_fn=regression(dtype))
    trainer.step()
    before = displacement(trainer)
    free = copy.deepcopy(trainer)
    free.param_groups[0]["anchor_decay"] = 0.0
    trainer.step()
    free.step()
    # One rounding each of the pull and of the step, of weights below 1.
    pull = trainer.current_params - free.current_params
    torch.testing.assert_close(pull, -LR * DECAY * before, rtol=0, atol=4 * rounding)
    assert before.abs().max() > 1e-3


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_without_a_gradient_what_was_learnt_decays_geometrically(optimizer: Any) -> None:
    trainer = anchored(fitness_fn=constant, optimizer=optimizer)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(1.0)
    trainer.train(5, verbose=False)
    expected = torch.full_like(trainer.current_params, (1 - LR * DECAY) ** 5)
    # Five roundings of weights below 2.
    torch.testing.assert_close(displacement(trainer), expected, rtol=0, atol=1e-6)


def test_groups_frozen_parameters_and_live_values() -> None:
    model = network()
    first, last = (list(model[i].parameters()) for i in (0, 3))
    trainer = anchored(
        model=model,
        fitness_fn=constant,
        anchor_decay=0.0,
        params=[{"params": first, "anchor_decay": 1 / LR}, {"params": last}],
    )
    start = [p.detach().clone() for p in (*first, *last)]
    with torch.no_grad():
        for p in (*first, *last):
            p.add_(1.0)
    first[1].requires_grad_(False)
    trainer.step()
    # Taken back as a whole, to the bit; not the frozen one.
    assert torch.equal(first[0], start[0])
    assert torch.equal(first[1], start[1] + 1)
    assert torch.equal(last[0], start[2] + 1)
    trainer.param_groups[1]["anchor_decay"] = 1 / LR
    trainer.step()
    assert torch.equal(last[0], start[2])
    trainer.param_groups[1]["anchor_decay"] = 2 / LR
    with pytest.raises(ValueError, match="anchor_decay must be at most 1 / learning_rate = 5"):
        trainer.step()


def test_the_anchor_is_where_training_began_after_a_resume_and_a_reset() -> None:
    trainer = anchored()
    trainer.train(2, verbose=False)
    state, initial = trainer.state_dict(), trainer.initial_params
    # Made of a model that is somewhere else.
    other = anchored(model=copy.deepcopy(trainer.model))
    other.load_state_dict(state)
    trainer.step()
    other.step()
    assert torch.equal(trainer.current_params, other.current_params)
    trainer.reset()
    assert trainer.param_groups[0]["anchor_decay"] == DECAY
    assert torch.equal(trainer.current_params, initial)


def test_parameters_of_a_single_number() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = network(), nn.Parameter(torch.tensor(1.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.inner(x)

    trainer = anchored(model=Scaled())
    initial = trainer.initial_params
    trainer.train(2, verbose=False)
    trainer.reset()
    assert torch.equal(trainer.current_params, initial)


def test_may_change_between_ask_and_tell() -> None:
    trainer = anchored()
    population = trainer.ask()
    trainer.param_groups[0]["anchor_decay"] = 0.0
    assert trainer.tell(list(range(len(population)))) is not None
