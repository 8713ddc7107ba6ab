"""Running statistics of observations, as a part of the policy that it carries along."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ObservationNormalizer(nn.Module):
    """Shifts and scales observations to zero mean and unit variance, by the statistics of those seen so far.

    The statistics are buffers: they change only by :meth:`merge`, between generations, and are kept in checkpoints.
    Until the first :meth:`merge` observations pass as they are.

    Args:
        size: Numbers in an observation, ``O``.
        clip: Normalised observations are clipped to ``±clip``.

    Example:
        >>> normalizer = ObservationNormalizer(2)
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> normalizer.merge([statistics_of(x)])
        >>> normalizer(x)
        tensor([[-1., -1.],
                [ 1.,  1.]])
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, size: int, clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        # In float64, as a run sees millions of them.
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        # Sum of squared deviations from the mean.
        self.register_buffer("squares", torch.zeros(size, dtype=torch.float64))
        # What follows from them for the forward.
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, observations: Tensor) -> Tensor:
        """Return ``[..., O]`` normalised."""
        return ((observations - self.shift) * self.scale).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def merge(self, statistics: Sequence[Tensor]) -> None:
        """Take in statistics, one after the other.

        Args:
            statistics: What :func:`statistics_of` returned, ``[2·O + 1]`` each.
        """
        for values in statistics:
            count, (mean, squares) = values[0], values[1:].view(2, -1)
            if count == 0:
                continue
            # Chan, Golub and LeVeque, "Updating formulae … for computing sample variances", 1979.
            total = self.count + count
            delta = mean - self.mean
            self.squares += squares + delta.square() * self.count * count / total
            self.mean += delta * count / total
            self.count.copy_(total)
        if self.count > 1:
            deviation = (self.squares / self.count).sqrt()
            self.shift.copy_(self.mean)
            # What never changes is only shifted.
            self.scale.copy_(torch.where(deviation > 1e-8, 1 / deviation, 1.0))


def statistics_of(observations: Tensor) -> Tensor:
    """Return count, mean and sum of squared deviations of observations ``[n, O]``, ``[2·O + 1]`` in float64."""
    x = observations.double()
    if len(x) == 0:
        return torch.zeros(2 * x.shape[1] + 1, dtype=torch.float64)
    mean = x.mean(0)
    return torch.cat([torch.tensor([float(len(x))], dtype=torch.float64), mean, (x - mean).square().sum(0)])
