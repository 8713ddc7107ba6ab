"""The expected best of k samples."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from eggroll_trainer.llm import pass_at_k


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_the_mean_over_all_subsets(samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, samples, generator=generator, dtype=torch.float64)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(range(samples), k))
        expected = torch.stack([rewards[:, list(chosen)].amax(1) for chosen in subsets]).mean(0)
        # Sums of at most 35 terms below 4.
        torch.testing.assert_close(pass_at_k(rewards, k), expected, rtol=0, atol=1e-13)


def test_pass_at_k_of_right_and_wrong() -> None:
    n = 200
    for right, k in [(0, 10), (3, 1), (3, 10), (195, 10), (200, 200)]:
        rewards = torch.tensor([1.0] * right + [0.0] * (n - right))[torch.randperm(n)]
        expected = 1 - math.comb(n - right, k) / math.comb(n, k)
        # 200 weights, each rounded once.
        assert float(pass_at_k(rewards, k)) == pytest.approx(expected, abs=1e-13)


def test_not_a_number_stays() -> None:
    rewards = torch.tensor([[1.0, float("nan"), 0.0], [1.0, 0.0, 0.0]])
    assert pass_at_k(rewards, 2).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    "k, error, text",
    [
        (0, ValueError, "k must be at least 1, got 0"),
        (4, ValueError, "k=4 must be at most the number of samples, 3"),
        (1.0, TypeError, "k must be an integer"),
    ],
)
def test_bad_input(k: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        pass_at_k(torch.zeros(3), k)
    assert text in str(caught.value)
