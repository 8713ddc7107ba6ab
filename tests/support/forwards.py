"""A population outside of a trainer's generation, and a model with results of many forms."""

from __future__ import annotations

from typing import Any

import torch
from helpers import fitness
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population
from eggroll_trainer._utils.memory import Budget
from eggroll_trainer.population import forward


def population(
    model: nn.Module, size: int, *, compile: bool = False, budget: int | None = None, **options: Any
) -> Population:
    trainer = EGGROLLTrainer(model=model, fitness_fn=fitness, population_size=size, sigma=0.3, seed=0, **options)
    forwards = forward.Forwards(compile=compile, budget=Budget(budget))
    return Population(model, trainer._method.perturbations(0, size), forwards=forwards)


class Several(nn.Module):
    """Returns more than a tensor, and what does not depend on the member."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("offset", torch.arange(3.0))
        self.factor = 2.0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        y = self.linear(x) * scale * self.factor + self.offset
        return {"y": y, "rest": (self.offset, None, [y.sum(-1), "text", 3])}
