"""Parameters without a number in them, beside others, change nothing."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from helpers import Custom, X, fitness, make, network, population_fitness
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, ESTrainer, VanillaESTrainer


class WithEmpty(nn.Module):
    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.empty = nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in shapes])
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + sum(p.sum() for p in self.empty)


@pytest.mark.parametrize(
    "cls, options",
    [
        *((cls, options) for cls in (EGGROLLTrainer, VanillaESTrainer, Custom) for options in ({}, {"chunk_size": 4})),
        (EGGROLLTrainer, {"noise_reuse": 2, "freeze_nonlora": True}),
        (VanillaESTrainer, {"noise_reuse": 2}),
    ],
)
def test_empty_parameters_change_nothing(cls: type[ESTrainer], options: dict[str, Any]) -> None:
    for fitness_fn in (fitness, population_fitness):
        twin = make(cls, model=nn.Sequential(OrderedDict(net=network())), fitness_fn=fitness_fn, **options)
        twin.train(2, verbose=False)
        for shapes in ([(0,)], [(0, 5)], [(5, 0)], [(0, 0)], [(0,), (0, 3), (3, 0, 2)]):
            trainer = make(cls, model=WithEmpty(*shapes), fitness_fn=fitness_fn, **options)
            trainer.train(2, verbose=False)
            assert torch.equal(trainer.current_params, twin.current_params), shapes
            assert trainer.history == twin.history
            trainer.load_state_dict(trainer.state_dict())
            assert trainer.checksum() is not None
            assert torch.equal(trainer.get_best_model()(X), twin.get_best_model()(X))
            assert trainer.evaluate_fitness(trainer.model) == twin.evaluate_fitness(twin.model)
