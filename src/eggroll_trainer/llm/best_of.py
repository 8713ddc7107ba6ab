"""pass@k: the chance that at least one of k samples is right, and its like for rewards of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._utils.validation import check_int


def pass_at_k(rewards: Tensor, k: int) -> Tensor:
    """Return the expected best reward of ``k`` samples, estimated without bias from ``S ≥ k`` of them.

    With the rewards sorted, ``r_1 ≤ … ≤ r_S``, it is the mean of the best over all subsets of ``k``,

        ``Σ_i r_i · C(i - 1, k - 1) / C(S, k)``.

    For rewards of 0 and 1, ``c`` of which are 1, that is pass@k, ``1 - C(S - c, k) / C(S, k)``. Taking the best of the
    first ``k``, or ``1 - (1 - c/S)^k``, would be noisier, or biased.

    Args:
        rewards: ``[..., S]``.
        k: At most ``S``.

    Returns:
        ``[...]`` in float64. NaN where a reward is.

    Raises:
        TypeError: ``k`` is no integer.
        ValueError: ``k`` is less than 1 or more than ``S``.

    References:
        "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, equation 1.

    Example:
        >>> pass_at_k(torch.tensor([1.0, 0.0, 0.0, 0.0]), k=2)
        tensor(0.5000, dtype=torch.float64)
    """
    k, samples = check_int("k", k, 1), rewards.shape[-1]
    if k > samples:
        raise ValueError(f"k={k} is more than there are samples, {samples}")
    subsets = math.comb(samples, k)
    # As integers, which don't overflow.
    shares = [math.comb(i, k - 1) / subsets for i in range(samples)]
    weights = torch.tensor(shares, dtype=torch.float64, device=rewards.device)
    # NaN is sorted to the end, where its weight is above zero.
    return (rewards.double().sort(-1).values * weights).sum(-1)
