"""The cosine between an estimate and the last step, from a sample of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Largest number k of sampled weights. The cosine of random directions is about 1/√k, 0.004.
_SAMPLED = 2**16


def random_cosine(weights: int) -> float:
    """Return the standard deviation of the cosine between random directions of so many weights, when sampled.

    Example:
        >>> random_cosine(100), random_cosine(10**9)
        (0.1, 0.00390625)
    """
    return 1 / math.sqrt(max(1, min(_SAMPLED, weights)))


class Agreement:
    """Compares each estimate with the step before it. If that step went too far, the cosine is below zero.

    It compares evenly spaced entries, at most 65,536, so that it costs little for a large model.

    Attributes:
        step: These entries of the last step, ``[k]``; None before the first step.
    """

    def __init__(self, step: Tensor | None = None) -> None:
        self.step = step

    def cosine(self, gradient: Mapping[str, Tensor]) -> float:
        """Return the cosine between an estimate, the negated gradient, and the last step; 0 if there was none."""
        sampled = sample(gradient)
        if self.step is None or self.step.shape != sampled.shape:
            return 0.0
        step = self.step.to(sampled.device)
        product = float(torch.linalg.vector_norm(step) * torch.linalg.vector_norm(sampled))
        return -float(step @ sampled) / product if product > 0 else 0.0


def sample(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return evenly spaced entries of tensors, taken as one vector, in float32, ``[k]``."""
    every = max(1, math.ceil(sum(value.numel() for value in tensors.values()) / _SAMPLED))
    return torch.cat([value.detach().flatten()[::every] for value in tensors.values()]).float()
