"""Differences between two results, of every dtype, with numbers that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from eggroll_trainer.population.agreement import _distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_largest_difference_and_magnitude(dtype: torch.dtype) -> None:
    a, b = (torch.linspace(-3, 4, 40) + shift for shift in (0.0, 0.25))
    a, b = a.to(dtype), b.to(dtype)
    expected = float((a.double() - b.double()).abs().max()), float(b.double().abs().max())
    assert _distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert _distance(a, a) == (0.0, float(a.double().abs().max()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(bad: float) -> None:
    a, b = torch.tensor([1.0, bad, 3.0]), torch.tensor([1.0, bad, 2.0])
    assert _distance(a, b) == (1.0, 2.0)
    assert _distance(a, torch.tensor([1.0, 0.0, 2.0]))[0] > 1e300


def test_complex_numbers_and_integers() -> None:
    assert _distance(torch.tensor([3 + 4j]), torch.tensor([0j])) == (5.0, 0.0)
    assert _distance(torch.tensor([1, 2]), torch.tensor([1, 2])) == (0.0, 1.0)
    assert _distance(torch.tensor([1, 2]), torch.tensor([1, 3]))[0] == math.inf
    assert _distance(torch.empty(0), torch.empty(0)) == (0.0, 0.0)
