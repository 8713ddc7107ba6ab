"""Which examples a generation sees."""

from __future__ import annotations

from typing import Any

import pytest

from eggroll_trainer.llm.examples import Examples

TEN = Examples([{"prompt": str(i), "answer": i} for i in range(10)], ["prompt"])


def drawn(count: int, seed: int, generation: int, examples: Examples = TEN) -> list[str]:
    return [example["prompt"] for example in examples.drawn(count, seed, generation)]


def test_an_epoch_has_every_example_once() -> None:
    for epoch in range(3):
        seen = [prompt for generation in range(5) for prompt in drawn(2, 0, 5 * epoch + generation)]
        assert sorted(seen) == [str(i) for i in range(10)]


def test_the_rest_of_an_epoch_is_left_out_and_never_are_two_the_same() -> None:
    seen = [drawn(4, 0, generation) for generation in range(8)]
    assert all(len(set(prompts)) == 4 for prompts in seen)
    # Two generations an epoch.
    assert all(len({*seen[i], *seen[i + 1]}) == 8 for i in range(0, 8, 2))
    # What is left out is not always the same.
    assert len({prompt for prompts in seen for prompt in prompts}) == 10


def test_a_function_of_seed_and_generation() -> None:
    assert drawn(4, 3, 7) == drawn(4, 3, 7)
    assert drawn(4, 3, 7) != drawn(4, 4, 7)
    assert len({tuple(drawn(10, 3, generation)) for generation in range(6)}) == 6


def test_all_columns_come_along_as_copies() -> None:
    data = [{"prompt": "a", "answer": 1}]
    example = Examples(data, ["prompt"]).drawn(1, 0, 0)[0]
    example["answer"] = 2
    assert data == [{"prompt": "a", "answer": 1}]


def test_texts() -> None:
    examples = Examples(["a", "b"], ["text"])
    assert examples.first(None) == [{"text": "a"}, {"text": "b"}]
    assert examples.first(1) == [{"text": "a"}]
    assert len(examples.first(5)) == 2


class Indexed:
    """Like a ``datasets.Dataset``: with a length, and indexed by integers."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not isinstance(index, int):
            raise TypeError(index)
        return {"prompt": f"{index}"}


def test_anything_with_a_length_and_indices() -> None:
    assert sorted(drawn(3, 0, 0, Examples(Indexed(), ["prompt"]))) == ["0", "1", "2"]


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "splits": ({"train": ["a"]}, TypeError, "dataset must be a sequence of examples, got a dict; pass one of its"),
    "a text": ("a b c", TypeError, "dataset must be a sequence of examples, got a str"),
    "an iterator": (iter(["a"]), TypeError, "dataset must have a length and integer indices, got a list_iter"),
    "empty": ([], ValueError, "dataset is empty"),
    "no mapping": ([3], TypeError, "dataset[0] must be a mapping from columns to values, got int"),
    "another column": (
        [{"question": "a"}],
        ValueError,
        "dataset[0] has no column 'prompt'; its columns are ['question']",
    ),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_input(row: str) -> None:
    dataset, error, text = BAD[row]
    with pytest.raises(error) as caught:
        Examples(dataset, ["prompt"])
    assert text in str(caught.value)


def test_a_later_example_is_named() -> None:
    examples = Examples([{"prompt": "a"}, {"text": "b"}], ["prompt"])
    with pytest.raises(ValueError, match=r"dataset\[1\] has no column 'prompt'"):
        examples.drawn(2, 0, 0)


@pytest.mark.parametrize(
    "count, error, text",
    [
        (11, ValueError, "prompts_per_generation=11 must be at most the number of examples, 10; lower it"),
        (0, ValueError, "prompts_per_generation must be at least 1, got 0"),
        (2.5, TypeError, "prompts_per_generation must be an integer"),
    ],
)
def test_bad_counts(count: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        TEN.check_count("prompts_per_generation", count)
    assert text in str(caught.value)
