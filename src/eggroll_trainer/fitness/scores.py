"""From what a fitness function returns to the scores of a population."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

_EXPECTED = "a float, a 0-d tensor or a NumPy scalar (higher is better)"


def to_score(value: Any) -> float:
    """Return the fitness of one model as a float.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is an array of more than a number.
    """
    if type(value) is float:
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim != 0:
            raise ValueError(
                f"the fitness function must return {_EXPECTED}, got a {type(value).__name__} of shape"
                f" {list(value.shape)}; reduce it, for example with .mean()"
            )
        value = value.item()
    if value is None:
        raise TypeError(f"the fitness function must return {_EXPECTED}, got None; is a return missing?")
    # NumPy's booleans are not among Python's numbers, as Python's own are.
    if isinstance(value, (numbers.Real, np.bool_)):
        return float(value)
    raise TypeError(f"the fitness function must return {_EXPECTED}, got {type(value).__name__} {value!r}")


def to_scores(value: Any, count: int) -> Tensor:
    """Return what a batched fitness function gave for ``count`` members as ``[count]`` in float64.

    Raises:
        TypeError: ``value`` is not an array of numbers.
        ValueError: It has another shape.
    """
    expected = f"a batched fitness function must return one score for each of its {count} members"
    try:
        # A list of Python's floats would be rounded to float32.
        dtype = torch.float64 if isinstance(value, (list, tuple)) else None
        scores = torch.as_tensor(value, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{expected}, a tensor of shape [{count}]; got {type(value).__name__} {value!r}") from None
    if scores.shape != (count,):
        raise ValueError(f"{expected}, a tensor of shape [{count}]; got shape {list(scores.shape)}")
    if scores.is_complex():
        raise TypeError(f"{expected}, real numbers; got {scores.dtype}")
    return scores.detach().double()


def packed(scores: Tensor) -> np.ndarray[Any, Any]:
    """Return scores ``[n]`` in float32 if they lose nothing by it, as most come from such tensors, else in float64.

    Example:
        >>> packed(torch.tensor([0.5, float("nan")], dtype=torch.float64)).dtype.name
        'float32'
        >>> packed(torch.tensor([0.1], dtype=torch.float64)).dtype.name
        'float64'
    """
    wide = scores.double().numpy()
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    return narrow if np.array_equal(narrow, wide, equal_nan=True) else wide


METRICS = (
    "generation",
    "fitness",
    "mean_fitness",
    "std_fitness",
    "best_fitness",
    "update_norm",
    "num_nonfinite",
    "num_tied",
    "learning_rate",
    "sigma",
)


@dataclasses.dataclass(frozen=True)
class CheckedScores:
    """The scores of one generation.

    Attributes:
        values: ``[N]`` in float64, finite: NaN and ±inf are replaced by the worst finite score of their group.
        num_nonfinite: How many were replaced.
        num_tied: How many members share their score with another one.
        best: Index of the member with the highest score; one whose own score is finite.
    """

    values: Tensor
    num_nonfinite: int
    num_tied: int
    best: int


def check_scores(scores: Tensor, generation: int, group_size: int = 0) -> CheckedScores:
    """Replace scores that are not finite by the worst finite one of their group.

    In a group without a finite score they become the worst of the generation: no member of it is better than another.

    Args:
        scores: ``[N]``.
        generation: Its index, counted from 1.
        group_size: Members in a group; 0 for one group of all.

    Raises:
        ValueError: No score is finite.
    """
    values = scores.double().numpy()
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(
            f"no member of generation {generation} has a finite fitness (NaN or inf from all {len(scores)});"
            " the parameters were not changed. Lower sigma or learning_rate, or mend the fitness function."
        )
    groups = np.where(finite, values, np.inf).reshape(-1, group_size or len(values))
    worst = groups.min(1, keepdims=True)
    worst = np.where(np.isfinite(worst), worst, values[finite].min())
    values = np.where(np.isfinite(groups), groups, worst).reshape(-1)
    ordered = np.sort(values)
    same = ordered[1:] == ordered[:-1]
    tied = np.append(same, False) | np.append(False, same)
    best = int(np.where(finite, values, -np.inf).argmax())
    return CheckedScores(torch.from_numpy(values), int((~finite).sum()), int(tied.sum()), best)


def metrics_of(
    scores: CheckedScores, generation: int, best_fitness: float, learning_rate: float, sigma: float
) -> dict[str, Any]:
    """Return the metrics of a generation, the step not taken yet.

    Args:
        scores: Of its members.
        generation: Its index, counted from 1.
        best_fitness: The best fitness before it.
        learning_rate: Of the first parameter group.
        sigma: Of the first parameter group.
    """
    fitness = scores.values.max().item()
    mean, std = scores.values.mean().item(), scores.values.std(correction=0).item()
    values = (
        *(generation, fitness, mean, std, max(fitness, best_fitness), 0.0),
        *(scores.num_nonfinite, scores.num_tied, learning_rate, sigma),
    )
    return dict(zip(METRICS, values, strict=True))
