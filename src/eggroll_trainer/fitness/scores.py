"""Scores: checks and converts the results of fitness functions, and computes metrics."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The score of one model: a number, or one for each of several tasks.
Score = float | tuple[float, ...]

_EXPECTED = "a float, a 0-d tensor or a NumPy scalar (higher is better)"


def to_score(value: Any) -> Score:
    """Return the fitness of one model: a float, or one for each of ``K ≥ 2`` tasks from an array ``[K]``.

    Raises:
        TypeError: ``value`` is not a number, nor an array of numbers.
        ValueError: ``value`` is an array of another shape.
    """
    if type(value) is float:
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim == 1 and len(value) > 1:
            return _of_tasks(value)
        if value.ndim != 0:
            raise ValueError(
                f"the fitness function must return {_EXPECTED}, got a {type(value).__name__} of shape"
                f" {list(value.shape)}; reduce it, for example with .mean(), or return one score for each of two or"
                " more tasks, [K]"
            )
        value = value.item()
    if value is None:
        raise TypeError(f"the fitness function must return {_EXPECTED}, got None; is a return missing?")
    # Unlike Python's, NumPy's booleans are not numbers.Real.
    if isinstance(value, (numbers.Real, np.bool_)):
        return float(value)
    raise TypeError(f"the fitness function must return {_EXPECTED}, got {type(value).__name__} {value!r}")


def _of_tasks(value: Tensor | np.ndarray[Any, Any]) -> tuple[float, ...]:
    scores = value.tolist()
    if not all(isinstance(score, numbers.Real) for score in scores):
        raise TypeError(f"the fitness function must return real numbers, got a {type(value).__name__} of {value.dtype}")
    return tuple(map(float, scores))


def mean_over_tasks(scores: Score | Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the mean fitness over tasks, ``[..., K] → [...]``; a single number stays the same."""
    values = np.atleast_1d(np.asarray(scores, np.float64))
    if values.shape[-1] == 1:
        return values[..., 0]
    with np.errstate(over="ignore", invalid="ignore"):
        means = values.mean(-1)
        # The sum of huge scores may overflow, although their mean does not.
        return np.where(np.isfinite(means), means, (values / values.shape[-1]).sum(-1))


def to_scores(value: Any, count: int) -> Tensor:
    """Return the scores of a batched fitness function for ``count`` members in float64: ``[count]`` or ``[count, K]``.

    A single column ``[count, 1]`` becomes ``[count]``.

    Raises:
        TypeError: ``value`` is not an array of numbers.
        ValueError: It has another shape.
    """
    expected = f"a batched fitness function must return one score for each of its {count} members"
    try:
        # torch would round a list of Python floats to float32.
        dtype = torch.float64 if isinstance(value, (list, tuple)) else None
        scores = torch.as_tensor(value, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{expected}, a tensor of shape [{count}]; got {type(value).__name__} {value!r}") from None
    if scores.is_complex():
        raise TypeError(f"{expected}, real numbers; got {scores.dtype}")
    if not is_table(scores, count):
        raise ValueError(
            f"{expected}, a tensor of shape [{count}], or [{count}, K] for K tasks; got shape {list(scores.shape)}"
        )
    return without_single_column(scores.detach().double())


def is_table(scores: Tensor, count: int) -> bool:
    """Return whether the scores are ``[count]``, or ``[count, K]`` with at least one column."""
    return scores.shape == (count,) or (scores.ndim == 2 and len(scores) == count and scores.shape[1] > 0)


def without_single_column(scores: Tensor) -> Tensor:
    """Return ``[n, 1]`` as ``[n]``, and other scores unchanged."""
    return scores[:, 0] if scores.shape[1:] == (1,) else scores


def described(tasks: Sequence[int]) -> str:
    """Describe the scores of a member, given the further dimensions of the scores.

    Example:
        >>> described([]), described([3])
        ('a single score', '3 scores')
    """
    return f"{tasks[0]} scores" if tasks else "a single score"


def packed(scores: Tensor) -> np.ndarray[Any, Any]:
    """Return scores in float32 if that is exact, as for scores computed in float32, else in float64.

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
        values: ``[N]``, or ``[N, K]`` for the tasks that have any finite score, in float64 and finite: NaN and ±inf are
            replaced by the worst finite score of their task and group.
        means: ``[N]``, the mean of each member over the tasks.
        num_nonfinite: Number of scores that were not finite.
        num_tied: Number of members that share their mean with another one.
        best: Index of the member with the highest mean, among those with a finite score.
    """

    values: Tensor
    means: Tensor
    num_nonfinite: int
    num_tied: int
    best: int


def check_scores(scores: Tensor, generation: int, group_size: int = 0) -> CheckedScores:
    """Replace scores that are not finite by the worst finite one of their group, in each task separately.

    In a group without a finite score, all become the worst of the generation, so that no member of it is better than
    another. A task without a finite score in the whole generation is left out.

    Args:
        scores: ``[N]``, or ``[N, K]`` with a column for each task.
        generation: Number of the generation, counted from 1.
        group_size: Number of members in a group; 0 for one group of all.

    Raises:
        ValueError: No score is finite.
    """
    count = len(scores)
    table = scores.double().numpy().reshape(count, -1)
    finite = np.isfinite(table)
    num_nonfinite = int((~finite).sum())
    if num_nonfinite == finite.size:
        raise ValueError(
            f"no member of generation {generation} has a finite fitness (NaN or inf from all {count});"
            " the parameters were not changed. Lower sigma or learning_rate, or fix the fitness function."
        )
    judged = finite.any(0)
    if not judged.all():
        table, finite = table[:, judged], finite[:, judged]
    groups = np.where(finite, table, np.inf).reshape(-1, group_size or count, table.shape[1])
    worst = groups.min(1, keepdims=True)
    worst = np.where(np.isfinite(worst), worst, groups.min((0, 1)))
    table = np.where(np.isfinite(groups), groups, worst).reshape(count, -1)
    means = mean_over_tasks(table)
    ordered = np.sort(means)
    same = ordered[1:] == ordered[:-1]
    tied = np.append(same, False) | np.append(False, same)
    # Among members with equal means, the first one of those with the most finite scores.
    eligible = np.where(finite.any(1), means, -np.inf)
    best = int(np.where(eligible == eligible.max(), finite.sum(1), -1).argmax())
    values = torch.from_numpy(table if scores.ndim > 1 else means)
    return CheckedScores(values, torch.from_numpy(means), num_nonfinite, int(tied.sum()), best)


def nonfinite_warning(scores: Tensor, group_size: int) -> str:
    """Return the warning about scores, ``[N]`` or ``[N, K]``, that are not all finite."""
    whose = "group" if group_size else "generation"
    if scores.ndim > 1:
        whose += " and task, and a task without any is left out"
    return (
        f"a fitness that is not finite counts as the worst finite one of its {whose}; see num_nonfinite in the metrics"
    )


def metrics_of(
    scores: CheckedScores,
    generation: int,
    best_fitness: float,
    learning_rate: float,
    sigma: float,
    maximize: bool = True,
) -> dict[str, Any]:
    """Return the metrics of a generation before its step, with an ``update_norm`` of 0.

    Args:
        scores: Scores of its members.
        generation: Number of the generation, counted from 1.
        best_fitness: The best fitness so far, in the fitness function's sign.
        learning_rate: Learning rate of the first parameter group.
        sigma: Sigma of the first parameter group.
        maximize: Whether higher is better for the fitness function. If not, metrics have the negative of ``scores``.
    """
    sign = 1.0 if maximize else -1.0
    fitness = sign * scores.means.max().item()
    mean, std = sign * scores.means.mean().item(), scores.means.std(correction=0).item()
    values = (
        *(generation, fitness, mean, std, best_fitness, 0.0),
        *(scores.num_nonfinite, scores.num_tied, learning_rate, sigma),
    )
    return dict(zip(METRICS, values, strict=True))
