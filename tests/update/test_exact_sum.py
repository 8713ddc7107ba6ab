"""Sums in fixed point: the same in any order, never too large, finer than float32."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import make, network, population_fitness, randn

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.noise.keys import LARGEST_NORMAL, Noise, Stream
from eggroll_trainer.perturbation.sample import ParameterSpec, sample
from eggroll_trainer.update.exact_sum import ExactSum


def test_any_order_gives_the_same_bits() -> None:
    terms = [randn(50, seed=i) * 10.0 ** (i - 6) for i in range(12)]
    bounds = {"w": float(sum(term.abs().max() for term in terms))}
    totals = []
    for order in (range(12), reversed(range(12)), torch.randperm(12, device="cpu").tolist()):
        total = ExactSum({"w": torch.zeros(50)}, bounds)
        for i in order:
            total.add({"w": terms[i]})
        totals.append(total.values()["w"])
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])
    # In float32, the order shows.
    assert not torch.equal(sum(terms), sum(reversed(terms)))  # type: ignore[arg-type]
    exact = torch.stack(terms).double().sum(0)
    assert torch.equal(totals[0], exact.float())


def test_partial_totals_may_be_added() -> None:
    terms = [randn(3, seed=i) for i in range(6)]
    whole, *parts = (ExactSum({"w": torch.zeros(3)}, {"w": 40.0}) for _ in range(3))
    for i, term in enumerate(terms):
        whole.add({"w": term})
        parts[i % 2].add({"w": term})
    assert torch.equal(whole.totals["w"], parts[0].totals["w"] + parts[1].totals["w"])


@pytest.mark.parametrize("bound", [1e-30, 3.0, 2.0**20, 1e30])
def test_the_bound_itself_does_not_overflow(bound: float) -> None:
    total = ExactSum({"w": torch.zeros(2, dtype=torch.float64)}, {"w": bound})
    for _ in range(4):
        total.add({"w": torch.tensor([bound / 4, -bound / 4], dtype=torch.float64)})
    values = total.values()["w"]
    assert torch.allclose(values, torch.tensor([bound, -bound], dtype=torch.float64), rtol=1e-15)
    # A rounding of the terms that adds up to as much again would still fit.
    assert total.totals["w"].abs().max() <= 2**62


def test_the_resolution_is_finer_than_float32s() -> None:
    bound = 1e4
    total = ExactSum({"w": torch.zeros(1, dtype=torch.float64)}, {"w": bound})
    total.add({"w": torch.tensor([1.0 + 1e-12], dtype=torch.float64)})
    # Half of the spacing 2**-48 at most; float32's at one is 2**-23.
    assert abs(total.values()["w"].item() - (1 + 1e-12)) <= 2.0**-49


@pytest.mark.parametrize("bound", [math.inf, math.nan, 1e39])
def test_a_bound_must_be_a_number_of_the_dtype(bound: float) -> None:
    with pytest.raises(ValueError, match="may overflow"):
        ExactSum({"w": torch.zeros(1)}, {"w": bound})


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_no_perturbation_exceeds_its_bound(kind: str, rank: int | None) -> None:
    spec = ParameterSpec("w", torch.zeros(20, 30), 0.1, rank, kind)  # type: ignore[arg-type]
    perturbations = sample(Noise(0), [spec], 0, 0, 200)
    largest = max(perturbations.dense(i)["w"].abs().max().item() for i in range(200))
    # A little more by rounding, for which a sum has a bit to spare.
    assert spec.largest / 1000 < largest <= spec.largest * (1 + 1e-6)


def test_normal_numbers_stay_below_their_bound() -> None:
    (values,) = Noise(1).draw(0, 0, 64, [Stream("w", 2**17)])
    assert 4.3 < values.abs().max().item() < LARGEST_NORMAL


def test_chunks_change_the_update_by_rounding_alone() -> None:
    updates = []
    for chunk_size in (None, 2, 4):
        trainer = make(EGGROLLTrainer, model=network(), fitness_fn=population_fitness, chunk_size=chunk_size, sigma=0.1)
        trainer.step()
        updates.append(trainer.current_params - trainer.initial_params)
    # Adam's first step is the sign of the estimate, so that nearly all weights move alike.
    for update in updates[1:]:
        assert torch.allclose(update, updates[0], atol=1e-6)


@pytest.mark.parametrize("score", [1e308, 1e200, 1e39])
def test_an_update_that_overflows_is_an_error_and_changes_nothing(score: float) -> None:
    trainer = make(EGGROLLTrainer, fitness_fn=lambda model: score, shaping="raw", chunk_size=4, optimizer=None)
    before = trainer.current_params
    with pytest.raises(ValueError, match="update is not finite"):
        trainer.step()
    assert torch.equal(trainer.current_params, before)
