"""Fitness is float64 from the function to the update, whatever the parameters and perturbations are."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make, network
from torch import Tensor, nn

from eggroll_trainer import ESTrainer, Population, VanillaESTrainer, batched
from eggroll_trainer.fitness.scores import to_score, to_scores

# Scores that only float64 tells apart, that no fp16 holds, and that integers would cut off.
SCORES = torch.tensor([1 + i * 2.0**-40 for i in range(4)] + [1e9, 1e9 + 0.25, 0.5, -0.5], dtype=torch.float64)


@batched
def batched_scores(population: Population) -> Tensor:
    return SCORES[population.first : population.first + len(population)]


def plain_scores() -> Callable[[nn.Module], float]:
    remaining = iter(SCORES.tolist())
    return lambda model: next(remaining)


class Watching(ESTrainer):
    """Keeps what it is given."""

    dtype = torch.float32

    def sample_perturbations(self, population_size: int) -> Tensor:
        return torch.randint(1, 3, (population_size, len(self.current_params))).to(self.dtype)

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        self.seen = perturbations, fitnesses
        return torch.zeros(len(self.current_params))


@pytest.mark.parametrize(
    "sampled", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_custom_trainers_get_it(dtype: torch.dtype, sampled: torch.dtype) -> None:
    for fitness, coalesce in ((batched_scores, True), (plain_scores(), "unchecked"), (plain_scores(), False)):
        trainer = make(Watching, model=network(dtype), fitness_fn=fitness, coalesce=coalesce, optimizer=None)
        trainer.dtype = sampled
        trainer.step()
        perturbations, fitnesses = trainer.seen
        assert fitnesses.dtype == torch.float64 and torch.equal(fitnesses, SCORES)
        assert perturbations.dtype == sampled


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "elementwise": lambda p, w: (w[:, None] * p).sum(0),
    "@": lambda p, w: w @ p,
    "@, the other way round": lambda p, w: p.T @ w,
    "matmul": lambda p, w: torch.matmul(w, p),
    "mv": lambda p, w: torch.mv(p.T, w),
    "mm": lambda p, w: w[None].mm(p)[0],
    "einsum": lambda p, w: torch.einsum("n,nd->d", w, p),
    "tensordot": lambda p, w: torch.tensordot(w, p, dims=1),
    "linear": lambda p, w: nn.functional.linear(w, p.T),
    "addmv": lambda p, w: torch.addmv(torch.zeros(p.shape[1]), p.T, w),
    "dot": lambda p, w: torch.stack([w.dot(column) for column in p.T]),
}


@pytest.mark.parametrize("sampled", [torch.float32, torch.int64])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_perturbations(name: str, sampled: torch.dtype) -> None:
    class Multiplying(Watching):
        dtype = sampled

        def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
            weights = fitnesses.argsort().argsort() / 8 - 0.5
            return PRODUCTS[name](perturbations, weights.to(fitnesses) * 1e-3)

    trainer = make(Multiplying, fitness_fn=batched_scores, optimizer=None)
    before = trainer.current_params
    trainer.step()
    other = make(Watching, fitness_fn=batched_scores, optimizer=None)
    other.step()
    ranks = SCORES.argsort().argsort().double() / 8 - 0.5
    expected = before.double() + 0.1 * 1e-3 * (ranks[:, None] * other.seen[0].double()).sum(0)
    torch.testing.assert_close(trainer.current_params.double(), expected, rtol=1e-6, atol=1e-6)


def test_products_outside_are_as_they_were() -> None:
    trainer = make(Watching, fitness_fn=batched_scores, optimizer=None)
    trainer.step()
    with pytest.raises(RuntimeError):
        torch.ones(2, dtype=torch.float64) @ torch.ones(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_subclasses_of_keyed_trainers(dtype: torch.dtype) -> None:
    seen: list[Tensor] = []

    class Dense(VanillaESTrainer):
        def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
            seen.append(fitnesses)
            return super().compute_update(perturbations, fitnesses)

    trainer = make(Dense, model=network(dtype), fitness_fn=batched_scores, optimizer=None)
    trainer.step()
    assert torch.equal(seen[0], SCORES)


@pytest.mark.parametrize(
    "value", [True, np.True_, np.bool_(True), np.array(True), torch.tensor(True), 1, np.int8(1), Fraction(1)]
)
def test_what_counts_as_a_number(value: Any) -> None:
    assert to_score(value) == 1.0 and type(to_score(value)) is float


def test_booleans_train() -> None:
    trainer = make(fitness_fn=lambda model: np.bool_(model[0].weight.sum() > 0), coalesce=False, sigma=1.0)
    trainer.step()
    assert set(trainer.history["fitness"]) <= {0.0, 1.0} and trainer.history["std_fitness"][0] > 0


@pytest.mark.parametrize(
    "value",
    [
        [0.1, 0.2, 1e9 + 0.25],
        (0.1, 0.2, 1e9 + 0.25),
        [np.float64(0.1), 0.2, torch.tensor(1e9 + 0.25, dtype=torch.float64)],
        np.array([0.1, 0.2, 1e9 + 0.25]),
        torch.tensor([0.1, 0.2, 1e9 + 0.25], dtype=torch.float64),
    ],
)
def test_batched_scores_keep_their_digits(value: Any) -> None:
    assert to_scores(value, 3).tolist() == [0.1, 0.2, 1e9 + 0.25]


def test_batched_booleans() -> None:
    for value in ([True, np.True_, np.False_], np.array([True, True, False]), torch.tensor([True, True, False])):
        assert to_scores(value, 3).tolist() == [1.0, 1.0, 0.0]
