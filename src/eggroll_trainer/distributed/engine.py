"""Engines: who evaluates the chunks of a population.

The trainer hands an engine the chunks of a generation and gets their outcomes in the order of their members. What a
chunk's outcome is depends on the chunk alone, so a run is the same on every engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .._utils.interrupts import TimeLimitExceeded, time_limit
from .._utils.thread_state import restored_thread_state
from .._utils.validation import check_int, check_real

T = TypeVar("T")


class Chunk(NamedTuple):
    """Members ``first, …, first + size - 1`` of a population: what is evaluated in one piece."""

    first: int
    size: int

    def __str__(self) -> str:
        return f"members {self.first}-{self.first + self.size - 1}"


class Outcome(NamedTuple):
    """What the evaluation of a chunk gave.

    Attributes:
        scores: ``[size]``, or ``[size, K]`` for ``K`` tasks, in float64, on the CPU.
        statistics: What it has shown to a fitness function that learns along the way, on the CPU; else None.
        warnings: Messages and kinds of the warnings that the first process is to give.
        alone: Why all members must be evaluated alone instead, if the evaluation has found that out.
        noise: Whether it has found that the same weights do not always earn the same.
    """

    scores: Tensor
    statistics: Tensor | None
    warnings: tuple[tuple[str, str], ...] = ()
    alone: str | None = None
    noise: bool = False


class Evaluator(Protocol):
    """What an engine sees of a trainer."""

    generation: int
    fitness_fn: Any

    def evaluate_chunk(self, chunk: Chunk) -> Outcome:
        """Evaluate a chunk of the current generation in this process, and return what that gave."""

    def fingerprint(self) -> dict[str, Any]:
        """Return, by name, what must be the same for all who take part in the current generation."""

    def checksum(self) -> int:
        """Return a number that tells parameters apart that differ in any bit."""

    def working_state(self) -> dict[str, Any]:
        """Return what changes from generation to generation and outcomes depend on, for a copy of the trainer."""


class Engine(ABC):
    """Evaluates the chunks of a generation, maybe together with other processes that run the same script.

    Args:
        timeout: Seconds that the evaluation of a chunk may take; no limit if None.
        retries: How often a chunk is evaluated again whose evaluation took longer.

    Attributes:
        rank: Index of this process among those that run the script.
        size: How many there are.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
    """

    rank: int = 0
    size: int = 1

    def __init__(self, *, timeout: float | None = None, retries: int = 3) -> None:
        self.timeout = None if timeout is None else check_real("timeout", timeout, positive=True)
        self.retries = check_int("retries", retries, 0)

    @abstractmethod
    def evaluate(self, trainer: Evaluator, chunks: Sequence[Chunk]) -> list[Outcome]:
        """Return the outcomes of all chunks, in their order.

        Args:
            trainer: Whose generation it is.
            chunks: All chunks of the population, in order.

        Raises:
            TimeoutError: A chunk took longer than ``timeout``, every time.
            Exception: Whatever the fitness function raised.
        """

    @abstractmethod
    def own_part(self, chunks: Sequence[Chunk], bytes_of_sums: int, seconds_of_noise: float) -> Sequence[Chunk]:
        """Return the chunks whose contributions to the update this process should sum; :meth:`add_up` does the rest.

        Args:
            chunks: All of them.
            bytes_of_sums: Bytes of the sums.
            seconds_of_noise: What it takes to sum all contributions here, about.
        """

    @abstractmethod
    def add_up(self, totals: Mapping[str, Tensor]) -> None:
        """Replace integer sums over :meth:`own_part`, in place, by those over all chunks."""

    @abstractmethod
    def from_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the first process, and return its result, or raise what it raises, in all of them."""

    @abstractmethod
    def copy_main(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""

    def _evaluate_here(
        self, trainer: Evaluator, chunks: Sequence[Chunk], *, exit_when_stuck: bool = False
    ) -> list[Outcome]:
        """Return the outcomes of chunks, evaluated in this process one after the other."""
        # Made at once: small pieces that stay would lie in the way of large ones that come and go.
        total = sum(chunk.size for chunk in chunks)
        scores = torch.empty(total, dtype=torch.float64, device="cpu")
        outcomes: list[Outcome] = []
        at = 0
        for chunk in chunks:
            outcome = self._evaluate_chunk(trainer, chunk, exit_when_stuck)
            if not outcomes and outcome.scores.ndim > 1:
                # Only now the number of tasks is known.
                scores = scores.new_empty(total, *outcome.scores.shape[1:])
            part = scores[at : at + chunk.size]
            # Another number of tasks is an error, which the trainer raises.
            kept = part.copy_(outcome.scores) if part.shape == outcome.scores.shape else outcome.scores
            outcomes.append(outcome._replace(scores=kept))
            at += chunk.size
        return outcomes

    def _evaluate_chunk(self, trainer: Evaluator, chunk: Chunk, exit_when_stuck: bool) -> Outcome:
        for attempt in range(self.retries + 1):
            try:
                with time_limit(self.timeout, exit_when_stuck=exit_when_stuck), restored_thread_state():
                    return trainer.evaluate_chunk(chunk)
            except TimeLimitExceeded:
                if attempt == self.retries:
                    raise TimeoutError(self._too_slow(trainer, chunk)) from None
        raise AssertionError

    def _too_slow(self, trainer: Evaluator, chunk: Chunk) -> str:
        times = f", {self.retries + 1} times" if self.retries else ""
        return (
            f"the fitness of {chunk} of generation {trainer.generation + 1} took longer than the engine's timeout of"
            f" {self.timeout:g} s{times}; the parameters were not changed. Mend the fitness function, or give it more"
            " time"
        )


class LocalEngine(Engine):
    """Evaluates all chunks in this process, one after the other.

    Args:
        timeout: Seconds that the evaluation of a chunk may take; no limit if None.
        retries: How often a chunk is evaluated again whose evaluation took longer.
    """

    def evaluate(self, trainer: Evaluator, chunks: Sequence[Chunk]) -> list[Outcome]:
        """Return the outcomes of all chunks."""
        return self._evaluate_here(trainer, chunks)

    def own_part(self, chunks: Sequence[Chunk], bytes_of_sums: int, seconds_of_noise: float) -> Sequence[Chunk]:
        """Return all chunks."""
        return chunks

    def add_up(self, totals: Mapping[str, Tensor]) -> None:
        """Leave the totals as they are."""

    def from_main(self, function: Callable[[], T]) -> T:
        """Run ``function``."""
        return function()

    def copy_main(self, tensors: Sequence[Tensor]) -> None:
        """Leave the tensors as they are."""
