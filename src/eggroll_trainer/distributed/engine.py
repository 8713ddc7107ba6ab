"""Engines: they evaluate the chunks of a population.

The trainer passes the chunks of a generation to an engine, and gets their outcomes in the order of their members. An
outcome depends only on its chunk, so a run is the same on every engine.
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
    """Members ``first, …, first + size - 1`` of a population, which are evaluated together."""

    first: int
    size: int

    def __str__(self) -> str:
        return f"members {self.first}-{self.first + self.size - 1}"


class Outcome(NamedTuple):
    """The result of the evaluation of a chunk.

    Attributes:
        scores: ``[size]``, or ``[size, K]`` for ``K`` tasks, in float64, on the CPU.
        statistics: Statistics that a fitness function has collected from the chunk, on the CPU; else None.
        warnings: Messages and kinds of warnings for the first process to issue.
        alone: The reason why all members must be evaluated alone instead, or None.
        noise: Whether evaluations of the same weights were found to differ.
    """

    scores: Tensor
    statistics: Tensor | None
    warnings: tuple[tuple[str, str], ...] = ()
    alone: str | None = None
    noise: bool = False


class Evaluator(Protocol):
    """The interface of a trainer that engines use."""

    generation: int
    fitness_fn: Any

    def evaluate_chunk(self, chunk: Chunk) -> Outcome:
        """Evaluate a chunk of the current generation in this process, and return its outcome."""

    def fingerprint(self) -> dict[str, Any]:
        """Return, by name, what must be the same in all processes of the current generation."""

    def checksum(self) -> int:
        """Return a checksum over every bit of the parameters."""

    def working_state(self) -> dict[str, Any]:
        """Return the part of the state that changes between generations and that outcomes depend on."""


class Engine(ABC):
    """Evaluates the chunks of a generation, possibly together with other processes that run the same script.

    Args:
        timeout: Seconds that the evaluation of a chunk may take; no limit if None.
        retries: How often the evaluation of a chunk is repeated after a timeout.

    Attributes:
        rank: Index of this process among those that run the script.
        size: Number of processes that run the script.

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
            trainer: The trainer.
            chunks: All chunks of the population, in order.

        Raises:
            TimeoutError: A chunk took longer than ``timeout`` in every attempt.
            Exception: Any exception of the fitness function.
        """

    @abstractmethod
    def own_part(self, chunks: Sequence[Chunk], bytes_of_sums: int, seconds_of_noise: float) -> Sequence[Chunk]:
        """Return the chunks whose contributions to the update this process sums. :meth:`add_up` adds the others.

        Args:
            chunks: All chunks of the population.
            bytes_of_sums: Size of the sums in bytes.
            seconds_of_noise: Estimated seconds to sum the contributions of all chunks in one process.
        """

    @abstractmethod
    def add_up(self, totals: Mapping[str, Tensor]) -> None:
        """Replace integer sums over :meth:`own_part`, in place, by sums over all chunks."""

    @abstractmethod
    def from_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the first process, and return its result, or raise its exception, in all of them."""

    @abstractmethod
    def copy_main(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""

    def _evaluate_here(
        self, trainer: Evaluator, chunks: Sequence[Chunk], *, exit_when_stuck: bool = False
    ) -> list[Outcome]:
        """Evaluate chunks in this process, one after the other, and return their outcomes."""
        # Allocate all scores at once: small tensors that stay alive would fragment the memory.
        total = sum(chunk.size for chunk in chunks)
        scores = torch.empty(total, dtype=torch.float64, device="cpu")
        outcomes: list[Outcome] = []
        at = 0
        for chunk in chunks:
            outcome = self._evaluate_chunk(trainer, chunk, exit_when_stuck)
            if not outcomes and outcome.scores.ndim > 1:
                # The number of tasks is known after the first chunk.
                scores = scores.new_empty(total, *outcome.scores.shape[1:])
            part = scores[at : at + chunk.size]
            # If the numbers of tasks differ, the trainer raises an error.
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
            f" {self.timeout:g} s{times}; the parameters were not changed. Fix the fitness function, or raise the"
            " timeout"
        )


class LocalEngine(Engine):
    """Evaluates all chunks in this process, one after the other.

    Args:
        timeout: Seconds that the evaluation of a chunk may take; no limit if None.
        retries: How often the evaluation of a chunk is repeated after a timeout.
    """

    def evaluate(self, trainer: Evaluator, chunks: Sequence[Chunk]) -> list[Outcome]:
        """Return the outcomes of all chunks."""
        return self._evaluate_here(trainer, chunks)

    def own_part(self, chunks: Sequence[Chunk], bytes_of_sums: int, seconds_of_noise: float) -> Sequence[Chunk]:
        """Return all chunks."""
        return chunks

    def add_up(self, totals: Mapping[str, Tensor]) -> None:
        """Do nothing: the totals are complete."""

    def from_main(self, function: Callable[[], T]) -> T:
        """Run ``function``."""
        return function()

    def copy_main(self, tensors: Sequence[Tensor]) -> None:
        """Do nothing: there is only one process."""
