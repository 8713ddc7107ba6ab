"""Data sets: the examples of each generation, the same for all members in all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._utils.validation import check_int
from ..noise.keys import keyed_generator

Example = dict[str, Any]


class Examples:
    """A data set from which generations draw examples.

    Every example is drawn once an epoch, in an order that depends on the seed and the epoch. If examples remain at the
    end of an epoch, too few for a generation, they are left out.

    Args:
        dataset: A list of dicts, a ``datasets.Dataset``, or another sequence of mappings. A string stands for
            ``{keys[0]: string}``.
        keys: The columns that every example must have.

    Raises:
        TypeError: ``dataset`` is not a sequence.
        ValueError: It is empty, or its first example lacks a column.

    Example:
        >>> examples = Examples(["one", "two", "three"], ["prompt"])
        >>> sorted(example["prompt"] for g in range(3) for example in examples.drawn(1, seed=0, generation=g))
        ['one', 'three', 'two']
    """

    def __init__(self, dataset: Any, keys: Sequence[str]) -> None:
        if isinstance(dataset, (Mapping, str)):
            hint = "; pass one of its splits" if isinstance(dataset, Mapping) else ""
            raise TypeError(f"dataset must be a sequence of examples, got a {type(dataset).__name__}{hint}")
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"dataset must have a length and integer indices, got a {type(dataset).__name__}; make a list of as"
                " many examples as you want"
            )
        if len(dataset) == 0:
            raise ValueError("dataset is empty")
        self._dataset, self._keys = dataset, tuple(keys)
        # Raise errors about examples here, not in the first generation.
        self[0]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        """Return an example.

        Raises:
            TypeError: It is not a mapping.
            ValueError: It lacks a column.
        """
        example = self._dataset[index]
        if isinstance(example, str):
            example = {self._keys[0]: example}
        if not isinstance(example, Mapping):
            raise TypeError(f"dataset[{index}] must be a mapping from columns to values, got {type(example).__name__}")
        for key in self._keys:
            if key not in example:
                raise ValueError(f"dataset[{index}] has no column {key!r}; its columns are {list(example)}")
        return dict(example)

    def first(self, count: int | None) -> list[Example]:
        """Return the first examples, all of them if ``count`` is None or larger.

        Raises:
            ValueError: ``count`` is less than 1.
        """
        count = len(self) if count is None else min(check_int("n", count, 1), len(self))
        return [self[i] for i in range(count)]

    def check_count(self, name: str, count: int) -> int:
        """Return the number of examples of a generation, if the data set has that many.

        Raises:
            TypeError: ``count`` is not an integer.
            ValueError: It is less than 1, or there are fewer examples.
        """
        count = check_int(name, count, 1)
        if count > len(self):
            raise ValueError(f"{name}={count} must be at most the number of examples, {len(self)}; lower it")
        return count

    def drawn(self, count: int, seed: int, generation: int) -> list[Example]:
        """Return the examples of a generation.

        Args:
            count: Number of examples, at most all.
            seed: Seed of the run.
            generation: Index of the generation, counted from 0.
        """
        epoch, place = divmod(generation, len(self) // count)
        generator = keyed_generator("examples", seed, epoch)
        order = torch.randperm(len(self), generator=generator, device="cpu")
        return [self[i] for i in order[place * count : (place + 1) * count].tolist()]
