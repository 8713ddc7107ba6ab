"""The evaluation of a generation: an engine distributes chunks of members until all have a score."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.interrupts import delayed_interrupt
from .._utils.memory import freed_memory_kept, is_out_of_memory
from ..diagnostics.precision import bf16_advice
from ..diagnostics.simulators import simulator_advice
from ..distributed import Chunk, Outcome
from ..fitness import thread_modes
from ..fitness.evaluate import SAME_TASKS, Evaluation, Scored
from ..fitness.learning import discard_statistics
from ..fitness.scores import described, mean_over_tasks
from ..noise.keys import derive_seed
from ..population import Population, WholePopulation
from .trainable import kept_frozen

# The largest default chunk sizes. Larger chunks are not faster.
_CHUNK_MEMBERS_CPU, _CHUNK_MEMBERS = 1024, 8192


class Evaluator:
    """Evaluates the members of a trainer's generation.

    Args:
        trainer: The trainer that holds it. (Of type Any, as its module imports this one.)

    Attributes:
        most_members: Limit of the chunk size after memory has run out; None before.
        seconds: Seconds that this process has spent in evaluations.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.most_members: int | None = None
        self.seconds = 0.0

    def chunk_members(self) -> int:
        """Return the chunk size: how many members are evaluated at a time."""
        trainer = self.trainer
        if trainer.chunk_size is not None:
            return trainer.chunk_size
        unit = trainer._method.unit
        most = _CHUNK_MEMBERS_CPU if trainer.device.type == "cpu" else _CHUNK_MEMBERS
        fitting = min(most, trainer._budget.chunk_bytes(trainer.device) // max(1, trainer._method.bytes_per_member))
        member_bytes = getattr(trainer.fitness_fn, "member_bytes", None)
        if member_bytes is not None:
            held = trainer._budget.held_bytes(trainer.device)
            fitting = min(fitting, held // max(1, member_bytes(trainer.model)))
        if self.most_members is not None:
            fitting = min(fitting, self.most_members)
        return max(unit, fitting // unit * unit)

    def chunks(self) -> list[Chunk]:
        """Return the chunks of the population, in order."""
        trainer = self.trainer
        size = self.chunk_members()
        return [
            Chunk(first, min(size, trainer.population_size - first))
            for first in range(0, trainer.population_size, size)
        ]

    def evaluate_all(self) -> tuple[Tensor, list[Tensor]]:
        """Return the scores of all members, ``[N]`` or ``[N, K]``, and the statistics that a learner has collected.

        If memory runs out, all are evaluated again in smaller chunks. If a check finds that members must be evaluated
        alone, all are evaluated again, alone.
        """
        trainer = self.trainer
        while True:
            chunks = self.chunks()
            size = chunks[0].size
            try:
                with trainer._watch.timing("evaluation"):
                    outcomes = trainer.engine.evaluate(trainer, chunks)
                alone = next((outcome.alone for outcome in outcomes if outcome.alone is not None), None)
                for message, kind in (warning for outcome in outcomes for warning in outcome.warnings):
                    trainer._warn_once(message, kind)
                if alone is None:
                    trainer._findings.differs |= any(outcome.noise for outcome in outcomes)
                    statistics = [outcome.statistics for outcome in outcomes if outcome.statistics is not None]
                    return self._joined(chunks, [outcome.scores for outcome in outcomes]), statistics
            except Exception as error:
                if not is_out_of_memory(error) or trainer.chunk_size is not None or size == trainer._method.unit:
                    raise
                alone = None
            if alone is not None:
                trainer._findings.decide(alone)
                trainer._warn_once(
                    f"the fitness function is run for one member at a time, which is slow: {alone}", "alone"
                )
            else:
                self.most_members = size // 2
                trainer._warn_once(
                    f"memory ran out with {size} members at a time: chunks are half as large from now on", "memory"
                )
            with delayed_interrupt(), thread_modes.neutral():
                trainer._method.begin_generation()

    def _joined(self, chunks: Sequence[Chunk], scores: Sequence[Tensor]) -> Tensor:
        first = scores[0].shape[1:]
        for chunk, of_chunk in zip(chunks, scores, strict=True):
            if of_chunk.shape[1:] != first:
                raise ValueError(
                    f"in generation {self.trainer.generation + 1} the fitness function returned {described(first)} for"
                    f" each of {chunks[0]} and {described(of_chunk.shape[1:])} for each of {chunk}: {SAME_TASKS}"
                )
        return torch.cat(list(scores))

    def evaluate_chunk(self, chunk: Chunk) -> Outcome:
        """Evaluate some members of the current generation in this process; engines call it."""
        trainer = self.trainer
        trainer._warned.quiet = not trainer.is_main
        if trainer._findings.reason is not None:
            # Another chunk's check failed: the scores of this one would be discarded.
            return Outcome(
                torch.zeros(chunk.size, dtype=torch.float64, device="cpu"), None, (), trainer._findings.reason
            )
        discard_statistics(trainer._learner)
        with freed_memory_kept(), kept_frozen(trainer._centre.candidates):
            result = self.evaluate(*chunk)
        trainer._findings.reason = result.alone
        return Outcome(result.scores, result.statistics, trainer._warned.take(), result.alone, trainer._findings.noise)

    def population(self, first: int, count: int) -> Population:
        """Return members ``first, …, first + count - 1`` of the current generation."""
        trainer = self.trainer
        with torch.no_grad():
            return Population(
                trainer.model,
                trainer._method.perturbations(first, count),
                first=first,
                warned=trainer._warned,
                forwards=trainer._forwards,
                generation=trainer.generation,
                seed=trainer.seed,
            )

    def whole_population(self) -> WholePopulation:
        """Return all members of the current generation, valid until it is over."""
        trainer = self.trainer
        number = trainer.generation

        def make(first: int, count: int) -> Population:
            if trainer.generation != number or trainer._asked is None:
                raise RuntimeError(f"generation {number + 1} is over, and its members are gone; call ask() again")
            return self.population(first, count)

        return WholePopulation(trainer.model, make, self.chunks(), trainer._method.unit)

    def member_weights(self, index: int) -> Tensor:
        """Return all parameters of one member of the current generation, ``[D]``, as the model stores them."""
        centre, unit = self.trainer._centre, self.trainer._method.unit
        first = index // unit * unit
        # From the population, to get the bits that were evaluated: the float32 masters of a bf16 model give others.
        member = self.population(first, unit).member_parameters(index - first)
        # Frozen parameters are the same in every member.
        return centre.flatten({**{name: p.detach() for name, p in centre.parameters.items()}, **member})

    def evaluate_again(self, index: int, attempt: int) -> float:
        """Evaluate one member of the current generation again, alone, and return its fitness.

        Args:
            index: Index of the member.
            attempt: Number of this attempt, from 0. Each attempt uses other random numbers.
        """
        trainer, unit = self.trainer, self.trainer._method.unit
        first = index // unit * unit
        population = self.population(first, unit)
        population.seed = derive_seed(trainer.seed, "again", attempt)
        with (
            trainer._watch.timing("evaluation"),
            kept_frozen(trainer._centre.candidates),
            thread_modes.autocast_to(trainer.evaluation_dtype, trainer.device),
        ):
            evaluation = Evaluation(
                population, trainer._fitness_fn(), False, trainer._findings, (), trainer._learner, trainer._warned
            )
            return float(mean_over_tasks(evaluation.alone(index - first)))

    def evaluate(self, first: int, count: int) -> Scored:
        """Evaluate members ``first, …, first + count - 1``."""
        trainer = self.trainer
        population = self.population(first, count)
        fitness_fn = trainer._fitness_fn()
        trainer._findings.begin_generation(trainer.generation, fitness_fn, trainer.model)
        findings = trainer._findings
        to_check = findings.to_check(trainer.seed, first, count, trainer.population_size)
        evaluation = Evaluation(
            population, fitness_fn, trainer.coalesce, findings, to_check, trainer._learner, trainer._warned
        )
        before, checks, began = findings.model_seconds, findings.check_seconds, time.perf_counter()
        with thread_modes.autocast_to(trainer.evaluation_dtype, trainer.device):
            scored = evaluation.run()
        seconds = time.perf_counter() - began
        trainer._watch.stopwatch.move(findings.check_seconds - checks, "evaluation", "check")
        self.seconds += seconds
        dtypes = (p.dtype for p in trainer._centre.parameters.values())
        advice = bf16_advice(trainer.device, trainer.evaluation_dtype, dtypes, self.seconds)
        if advice is not None:
            trainer._warned.once(advice, "bf16")
        # Checks take time too, so chunks with a check say nothing about the simulator.
        if not to_check:
            advice = simulator_advice(fitness_fn, count, seconds, findings.model_seconds - before)
            if advice is not None:
                trainer._warned.once(advice, "simulator")
        return scored
