"""Running statistics of observations, as a part of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class ObservationNormalizer(nn.Module):
    """Shifts and scales observations to zero mean and unit variance, with running statistics.

    The statistics are buffers: they change only in :meth:`merge`, between generations, and are saved in checkpoints.
    Before the first :meth:`merge`, observations are only clipped.

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
        # In float64, as a run has millions of observations.
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        # Sum of squared deviations from the mean.
        self.register_buffer("squares", torch.zeros(size, dtype=torch.float64))
        # Computed from these, for the forward.
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, observations: Tensor) -> Tensor:
        """Return normalised observations, ``[..., O] → [..., O]``.

        Raises:
            ValueError: Observations have another size.
        """
        _check_size(len(self.shift), observations.shape)
        return ((observations - self.shift) * self.scale).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def merge(self, statistics: Sequence[Tensor]) -> None:
        """Merge statistics of further observations, in order.

        Args:
            statistics: Results of :meth:`Statistics.as_tensor`, ``[2·O + 1]`` each.
        """
        for values in statistics:
            # They are on the CPU, and may come from another process.
            values = values.to(self.mean.device)
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
            # Numbers that never change are only shifted.
            self.scale.copy_(torch.where(deviation > 1e-8, 1 / deviation, 1.0))


class Statistics:
    """Computes count, mean and squared deviations of observations that are added step by step.

    Args:
        reference: ``[O]``, a value near the expected mean. Differences from it are summed in float64.
    """

    def __init__(self, reference: np.ndarray[Any, Any]) -> None:
        self._reference = reference.astype(np.float64)
        self._count = 0
        self._sum, self._squares = np.zeros_like(self._reference), np.zeros_like(self._reference)

    def add(self, observations: np.ndarray[Any, Any]) -> None:
        """Add observations ``[n, O]``.

        Raises:
            ValueError: They have another size than the reference.
        """
        _check_size(len(self._reference), observations.shape)
        differences = observations - self._reference
        self._count += len(differences)
        self._sum += differences.sum(0)
        self._squares += np.einsum("no,no->o", differences, differences)

    def as_tensor(self) -> Tensor:
        """Return count, mean and sum of squared deviations, ``[2·O + 1]`` in float64."""
        count = max(1, self._count)
        mean = self._reference + self._sum / count
        # Rounding may make these slightly negative.
        squares = np.maximum(self._squares - self._sum**2 / count, 0)
        return torch.from_numpy(np.concatenate([[float(self._count)], mean, squares]))


def _check_size(expected: int, shape: Sequence[int]) -> None:
    # Without this check, an observation with one number would be broadcast.
    if shape[-1] != expected:
        raise ValueError(f"expected observations of {expected} numbers, got {shape[-1]}")


def statistics_of(observations: Tensor) -> Tensor:
    """Return count, mean and sum of squared deviations of observations ``[n, O]``, ``[2·O + 1]`` in float64."""
    x = observations.double().numpy()
    statistics = Statistics(x[0] if len(x) else np.zeros(x.shape[1]))
    statistics.add(x)
    return statistics.as_tensor()
