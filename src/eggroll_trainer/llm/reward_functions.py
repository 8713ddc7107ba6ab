"""Reward functions with the signature of TRL's: ``reward_fn(prompts, completions, **columns) -> list[float]``."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._utils.validation import check_real
from .completions import Completion
from .examples import Example
from .prompts import with_completion

RewardFunction = Callable[..., Any]

_OURS = ("prompts", "completions", "completion_ids")


class RewardFunctions:
    """One or several reward functions, and the weighted sum of their rewards.

    Args:
        functions: A function, or several.
        weights: A weight for each function; 1 if None.
        prompt_key: The column of the prompt. The other columns are passed to the functions.
        example: An example of the data set, which defines the columns.

    Attributes:
        names: Names of the functions, all different.

    Raises:
        TypeError: A function is not callable, or is a coroutine.
        ValueError: There is no function, the number of weights is wrong, or a function needs an argument that is not
            available.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None,
        prompt_key: str,
        example: Example,
    ) -> None:
        self.functions: list[Any] = list(functions) if isinstance(functions, (list, tuple)) else [functions]
        if not self.functions:
            raise ValueError("reward_fn must be at least one function, got none")
        self._prompt_key = prompt_key
        weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights must have one for each of the {len(self.functions)} reward functions, got"
                f" {len(weights)}"
            )
        # Weights may be negative, for penalties.
        self.weights = [
            (-1 if weight < 0 else 1) * check_real("reward_weights", abs(weight), positive=False) for weight in weights
        ]
        columns = [name for name in example if name != prompt_key]
        for name in _OURS:
            if name in columns:
                raise ValueError(f"the data set has a column {name!r}, which reward functions get from us; rename it")
        self._accepted = [_accepted(function, [*_OURS, *columns]) for function in self.functions]
        self.names = _names(self.functions)

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
        """Return the rewards of completions.

        Args:
            examples: The example of each completion.
            completions: The completions, ``rows`` of them.

        Returns:
            The weighted sums ``[rows]``, and the rewards of each function ``[rows, functions]``, both in float64. If a
            function returns None for a completion, it does not apply: its reward is NaN, and 0 in the sum. A sum is NaN
            if no function applies.

        Raises:
            TypeError: A function does not return a list of numbers.
            ValueError: A function returns the wrong number of rewards.
        """
        pairs = [
            with_completion(example[self._prompt_key], completion.text)
            for example, completion in zip(examples, completions, strict=True)
        ]
        # Missing values are None, as in a datasets.Dataset.
        names = dict.fromkeys(name for example in examples for name in example if name != self._prompt_key)
        columns: dict[str, Any] = {name: [example.get(name) for example in examples] for name in names}
        columns |= {
            "prompts": [prompt for prompt, _ in pairs],
            "completions": [completion for _, completion in pairs],
            "completion_ids": [completion.tokens for completion in completions],
        }
        each, applies = [], []
        for function, accepted, name in zip(self.functions, self._accepted, self.names, strict=True):
            given = columns if accepted is None else {key: columns[key] for key in accepted if key in columns}
            values = _checked(name, function(**given), len(pairs))
            each.append([float("nan") if value is None else float(value) for value in values])
            applies.append([value is not None for value in values])
        rewards = torch.tensor(each, dtype=torch.float64, device="cpu").T
        applicable = torch.tensor(applies, device="cpu").T
        weights = torch.tensor(self.weights, dtype=torch.float64, device="cpu")
        # Not by a product with zeros, as NaN times zero is NaN.
        weighted = torch.where(applicable, rewards * weights, torch.zeros_like(rewards))
        return torch.where(applicable.any(1), weighted.sum(1), torch.nan), rewards


def _accepted(function: RewardFunction, available: Sequence[str]) -> list[str] | None:
    """Return the keyword arguments that a function takes, or None if it takes all."""
    if not callable(function):
        raise TypeError(f"reward_fn must be a function, or several, got {type(function).__name__}")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"the reward function {_name(function)} is asynchronous; wrap it with asyncio.run")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        # Some built-ins have no signature.
        return None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in available]
    missing += [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if missing:
        raise ValueError(
            f"the reward function {_name(function)} needs {', '.join(missing)}; it is called with the keyword arguments"
            f" {', '.join(available)}"
        )
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else [p.name for p in named]


def _checked(name: str, values: Any, count: int) -> list[Any]:
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f"the reward function {name} must return a list of {count} numbers, one for each completion, got"
            f" {type(values).__name__}"
        )
    if len(values) != count:
        raise ValueError(f"the reward function {name} returned {len(values)} rewards for {count} completions")
    for value in values:
        real = isinstance(value, (numbers.Real, np.bool_)) or (isinstance(value, Tensor) and value.ndim == 0)
        if value is not None and not real:
            raise TypeError(f"the reward function {name} returned {value!r}, expected a number or None")
    return list(values)


def _name(function: RewardFunction) -> str:
    # For a partial, the name of its function.
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__name__", type(inner).__name__))


def _names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for name in map(_name, functions):
        count = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(name if count == 0 else f"{name}-{count + 1}")
    return names
