"""Calls whose sequence grows step by step are measured once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched
from eggroll_trainer.population import forward


@batched
def ranks(population: Population) -> Tensor:
    return torch.arange(float(len(population)))


def noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets what each measurement of a call finds."""
    measured: list[int] = []
    live_bytes = forward.live_bytes

    def measure(function: Callable[[], Any]) -> int:
        measured.append(live_bytes(function))
        return measured[-1]

    monkeypatch.setattr(forward, "live_bytes", measure)
    return measured


def test_growing_sequences_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = noted(monkeypatch)
    trainer = EGGROLLTrainer(model=nn.Linear(3, 2), fitness_fn=ranks, population_size=8, sigma=0.1, seed=0)
    members = next(iter(trainer.ask().chunks()))
    for length in range(4, 12):
        out = members(torch.ones(2, length, 3))
        assert out.shape == (8, 2, length, 2)
    assert len(measured) == 2  # One member, and two.


def test_where_it_might_not_fit_it_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = noted(monkeypatch)
    trainer = EGGROLLTrainer(
        model=nn.Linear(3, 2), fitness_fn=ranks, population_size=8, sigma=0.1, seed=0, memory_budget=200_000
    )
    members = next(iter(trainer.ask().chunks()))
    members(torch.ones(2, 10, 3))
    members(torch.ones(2, 10_000, 3))
    assert len(measured) == 4
