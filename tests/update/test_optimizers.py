"""Optimizers that take the steps of a trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    global_generator_untouched,
    make,
    network,
)


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "ASGD", "RMSprop", "Rprop"]
)
def test_optimizers_that_can_step_are_taken(name: str) -> None:
    factory = getattr(torch.optim, name)
    made: list[Any] = []

    def recording(params: Any, lr: float) -> Any:
        made.append(factory(params, lr=lr))
        return made[-1]

    with global_generator_untouched():
        trainer = make(optimizer=recording)
    # What a factory keeps is the optimizer that takes the steps.
    before = trainer.current_params
    trainer.step()
    assert made[-1].state[made[-1].param_groups[0]["params"][0]] or name == "SGD"
    assert not torch.equal(trainer.current_params, before)


def test_optimizers_that_go_by_shapes_are_taken() -> None:
    masks = [torch.ones_like(p) for p in network().parameters()]

    class Masked(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p, mask in zip(self.param_groups[0]["params"], masks, strict=True):
                p.grad *= mask
            return super().step()

    make(optimizer=Masked).step()
