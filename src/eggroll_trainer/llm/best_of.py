"""pass@k: the probability that at least one of k samples is right, generalised to rewards of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._utils.validation import check_int


def pass_at_k(rewards: Tensor, k: int) -> Tensor:
    """Return an unbiased estimate of the expected best reward of ``k`` samples, from ``S ≥ k`` samples.

    With the rewards sorted, ``r_1 ≤ … ≤ r_S``, it is the mean of the best reward over all subsets of size ``k``,

        ``Σ_i r_i · C(i - 1, k - 1) / C(S, k)``.

    For rewards of 0 and 1, ``c`` of which are 1, it is pass@k, ``1 - C(S - c, k) / C(S, k)``. The best of the first
    ``k`` would be noisier, and ``1 - (1 - c/S)^k`` would be biased.

    Args:
        rewards: ``[..., S]``.
        k: Number of samples, at most ``S``.

    Returns:
        ``[...]`` in float64; NaN if one of the rewards is.

    Raises:
        TypeError: ``k`` is not an integer.
        ValueError: ``k`` is less than 1 or more than ``S``.

    References:
        "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, equation 1.

    Example:
        >>> pass_at_k(torch.tensor([1.0, 0.0, 0.0, 0.0]), k=2)
        tensor(0.5000, dtype=torch.float64)
    """
    k, samples = check_int("k", k, 1), rewards.shape[-1]
    if k > samples:
        raise ValueError(f"k={k} must be at most the number of samples, {samples}")
    subsets = math.comb(samples, k)
    # With Python integers, which don't overflow.
    shares = [math.comb(i, k - 1) / subsets for i in range(samples)]
    weights = torch.tensor(shares, dtype=torch.float64, device=rewards.device)
    # NaN is sorted to the end, where its weight is above zero.
    return (rewards.double().sort(-1).values * weights).sum(-1)
