"""Whether one generation's estimate agrees with the last one's, from a sample of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Weights that are sampled, at most. Random directions have a cosine of about 1/√k, 0.004.
_SAMPLED = 2**16


class Agreement:
    """Compares estimates of successive generations.

    It keeps evenly spaced entries of the last estimate, 65,536 at most, so that it costs next to nothing for a large
    model.

    Attributes:
        last: Those entries, or None.
    """

    def __init__(self, last: Tensor | None = None) -> None:
        self.last = last

    def sample(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """Return evenly spaced entries of a gradient, ``[k]``."""
        step = max(1, math.ceil(sum(value.numel() for value in gradient.values()) / _SAMPLED))
        return torch.cat([value.flatten()[::step] for value in gradient.values()]).float()

    def cosine(self, sampled: Tensor) -> float | None:
        """Return the cosine between a sampled estimate and the last one; None if there is none to compare with."""
        last = self.last
        if last is None or last.shape != sampled.shape:
            return None
        last = last.to(sampled.device)
        product = float(torch.linalg.vector_norm(last) * torch.linalg.vector_norm(sampled))
        return float(last @ sampled) / product if product > 0 else 0.0
