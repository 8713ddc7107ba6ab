"""Reward functions as TRL's users write them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from eggroll_trainer.llm.completions import Completion
from eggroll_trainer.llm.reward_functions import RewardFunctions

EXAMPLES = [{"prompt": "p", "answer": 1}, {"prompt": "q", "answer": 2}]
COMPLETIONS = [Completion([7, 2], "x", True), Completion([8, 9], "y z", False)]


def rewards(functions: Any, weights: Any = None, examples: Any = EXAMPLES) -> tuple[list[float], list[list[float]]]:
    made = RewardFunctions(functions, weights, "prompt", examples[0])
    totals, each = made(examples, COMPLETIONS)
    assert totals.dtype == each.dtype == torch.float64
    return totals.tolist(), each.tolist()


def test_what_functions_are_called_with() -> None:
    seen: dict[str, Any] = {}

    def record(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [1.0, 2.0]

    assert rewards(record) == ([1.0, 2.0], [[1.0], [2.0]])
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["x", "y z"],
        "completion_ids": [[7, 2], [8, 9]],
        "answer": [1, 2],
    }


def test_a_column_that_some_examples_lack() -> None:
    examples = [{"prompt": "p", "answer": 1}, {"prompt": "q", "hint": "?"}]
    seen: list[Any] = []

    def record(answer: Any, **columns: Any) -> list[float]:
        seen.extend([answer, columns["hint"]])
        return [0.0, 0.0]

    rewards(record, examples=examples)
    assert seen == [[1, None], [None, "?"]]


def test_conversations() -> None:
    def last_message(completions: Any, prompts: Any, **_: Any) -> list[int]:
        assert completions[0] == [{"role": "assistant", "content": "x"}]
        assert prompts[0] == [{"role": "user", "content": "p"}]
        return [len(completion[0]["content"]) for completion in completions]

    examples = [{"prompt": [{"role": "user", "content": text}]} for text in "pq"]
    assert rewards(last_message, examples=examples)[0] == [1.0, 3.0]


def test_functions_get_no_more_than_they_want() -> None:
    assert rewards(lambda completions: [len(text) for text in completions])[0] == [1.0, 3.0]
    assert rewards(lambda answer, *, scale=2.0: [scale * value for value in answer])[0] == [2.0, 4.0]
    # A built-in doesn't tell what it wants, and a callable object tells by its __call__.
    partial = functools.partial(lambda completions, power: [len(text) ** power for text in completions], power=2)
    assert rewards(partial)[0] == [1.0, 9.0]


def test_several_functions_are_weighted_and_named() -> None:
    def length(completions: Any, **_: Any) -> list[int]:
        return [len(text) for text in completions]

    functions: list[Any] = [length, functools.partial(length), lambda answer: answer]
    made = RewardFunctions(functions, [1.0, -0.5, 2.0], "prompt", EXAMPLES[0])
    assert made.names == ["length", "length-2", "<lambda>"]
    totals, each = made(EXAMPLES, COMPLETIONS)
    assert each.tolist() == [[1, 1, 1], [3, 3, 2]]
    assert totals.tolist() == [2.5, 5.5]


def test_none_does_not_apply_and_not_a_number_is_one() -> None:
    nan = float("nan")
    totals, each = rewards([lambda answer: [None, 1.0], lambda answer: [3.0, nan], lambda answer: [None, 4.0]])
    assert totals[0] == 3.0 and np.isnan(totals[1])
    assert np.isnan(each[0]).tolist() == [True, False, True]
    # Where no function applies there is no reward.
    assert np.isnan(rewards(lambda answer: [None, 1.0])[0]).tolist() == [True, False]
    # Nor does a weight of zero hide what is not a number.
    assert np.isnan(rewards([lambda answer: [nan, 1.0], lambda answer: [1.0, 1.0]], [0.0, 1.0])[0][0])


@pytest.mark.parametrize(
    "values", [(1, True), np.array([1.0, 1.0]), torch.ones(2), [np.float32(1), torch.tensor(1.0)], [np.bool_(True), 1]]
)
def test_kinds_of_numbers(values: Any) -> None:
    assert rewards(lambda answer: values)[0] == [1.0, 1.0]


async def waits(completions: Any, **_: Any) -> list[float]:
    return [0.0] * len(completions)


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "none": ([], None, ValueError, "reward_fn must be at least one function, got none"),
    "no function": ([3], None, TypeError, "reward_fn must be a function, or several, got int"),
    "a coroutine": (waits, None, TypeError, "the reward function waits is asynchronous"),
    "fewer weights": (
        [waits, waits],
        [1.0],
        ValueError,
        "reward_weights must have one for each of the 2 reward functions, got 1",
    ),
    "weight": (lambda answer: answer, [float("inf")], ValueError, "reward_weights must be a finite number"),
    "unknown column": (
        lambda solution: solution,
        None,
        ValueError,
        "needs solution; it is called with the keyword arguments prompts, completions, completion_ids, answer",
    ),
    "unknown column among all": (lambda solution, **others: solution, None, ValueError, "needs solution"),
    "by position": (
        lambda completions, /: completions,
        None,
        ValueError,
        "needs completions; it is called with the keyword arguments",
    ),
    "too few": (lambda answer: [1.0], None, ValueError, "returned 1 rewards for 2 completions"),
    "one number": (lambda answer: 1.0, None, TypeError, "must return a list of 2 numbers, one for each completion"),
    "texts": (lambda answer: ["good", "bad"], None, TypeError, "returned 'good', expected a number or None"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_input(row: str) -> None:
    functions, weights, error, text = BAD[row]
    with pytest.raises(error) as caught:
        rewards(functions, weights)
    assert text in str(caught.value)


def test_columns_of_our_names() -> None:
    with pytest.raises(ValueError, match="a column 'completions', which reward functions get from us; rename it"):
        RewardFunctions(waits, None, "prompt", {"prompt": "a", "completions": "b"})
