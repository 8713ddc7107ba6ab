"""Random numbers in a folded block with a key of its own."""

from __future__ import annotations

import torch
from torch import nn

from eggroll_trainer import EGGROLLTrainer, Population


def _population(size: int) -> Population:
    trainer = EGGROLLTrainer(
        model=nn.Linear(3, 2), fitness_fn=lambda model: 0.0, population_size=size, chunk_size=size, seed=0
    )
    return next(trainer.ask().chunks())


def _drawn(population: Population, draws: int, key: tuple[int | str, ...] | None) -> torch.Tensor:
    with population.folded(rows=2, key=key):
        return torch.cat([torch.rand(2 * len(population), 4) for _ in range(draws)], 1)


def test_a_key_makes_a_block_independent_of_what_was_drawn_before():
    first, second = _population(3), _population(3)
    _drawn(first, 1, ("prompts", 0))
    _drawn(second, 7, ("prompts", 0))
    assert torch.equal(_drawn(first, 2, ("prompts", 1)), _drawn(second, 2, ("prompts", 1)))
    # Without one the numbers go on where the last block has left off.
    _drawn(first, 1, None)
    _drawn(second, 2, None)
    assert not torch.equal(_drawn(first, 1, None), _drawn(second, 1, None))


def test_each_part_of_the_key_and_the_member_tell():
    population = _population(3)
    base = _drawn(population, 1, ("prompts", 0))
    for other in (("prompts", 1), ("answers", 0), ()):
        assert not torch.isin(_drawn(population, 1, other), base).any()
    assert not torch.isin(base[:2], base[2:]).any()
    assert torch.equal(base, _drawn(population, 1, ("prompts", 0)))


def test_numbers_do_not_depend_on_the_number_of_members():
    assert torch.equal(_drawn(_population(2), 1, (5,)), _drawn(_population(6), 1, (5,))[:4])
