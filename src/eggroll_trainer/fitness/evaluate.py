"""Evaluates a population with a fitness function.

A function that is marked as batched is called with the population. A plain function is run for the members together.
Now and then, this is checked against the evaluation of single members. If that differs, or on request, members are
evaluated alone.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from .._utils.memory import is_out_of_memory
from .._utils.warned import Warned
from ..population import Audit, Population
from . import alone, together
from .check import DiffersFromItself, difference, evaluate_observed
from .findings import Findings
from .learning import Learner, discard_statistics
from .randomness import Source, keyed, sources
from .record import Record
from .scores import Score, described, to_score, to_scores

F = TypeVar("F", bound=Callable[..., Any])
Coalesce = bool | Literal["unchecked"]

SAME_TASKS = "all members of a generation must be scored on the same tasks"

# Seconds that an evaluation waits for one in another thread before it warns.
_LONG_WAIT = 10.0


@overload
def batched(fitness_fn: F, *, check: bool = True) -> F: ...
@overload
def batched(fitness_fn: None = None, *, check: bool = True) -> Callable[[F], F]: ...
def batched(fitness_fn: Callable[..., Any] | None = None, *, check: bool = True) -> Any:
    """Mark a fitness function as one that evaluates a whole population at once.

    It is called with a :class:`~eggroll_trainer.Population` of ``N`` members (a chunk of the population) and returns
    ``N`` scores, ``[N]``, or ``[N, K]`` with a column for each of ``K`` tasks, such as prompts or episodes; higher is
    better. Use it if the function can work on the outputs of all members as tensors; otherwise write a plain function
    of one model.

    Args:
        fitness_fn: The function. If it needs much memory for each member, as for the caches of a language model, give
            it a method ``member_bytes(model)`` that returns the bytes for one member. A trainer without ``chunk_size``
            then makes chunks that fit.
        check: Whether to compare, now and then, the outputs of some members with those of the model with their
            weights.

    Returns:
        The function itself, marked; or a decorator if ``fitness_fn`` is None.

    Example:
        >>> @batched
        ... def fitness(population):
        ...     x = torch.ones(4, 3)
        ...     return population(x).mean((1, 2))  # [N, 4, O] → [N]
        >>> is_batched(fitness)
        True
        >>> @batched(check=False)
        ... def quick(population):
        ...     return population(torch.ones(4, 3)).mean((1, 2))
    """
    if fitness_fn is None:
        return functools.partial(batched, check=check)
    mark = "checked" if check else "unchecked"
    try:
        fitness_fn._eggroll_batched = mark  # type: ignore[attr-defined]
        return fitness_fn
    except AttributeError:
        # Bound methods and built-ins don't take attributes.
        marked: Any = functools.partial(fitness_fn)
        marked._eggroll_batched = mark
        return marked


def is_batched(fitness_fn: Callable[..., Any]) -> bool:
    """Return whether the function was marked by :func:`batched`."""
    return hasattr(fitness_fn, "_eggroll_batched")


class Scored(NamedTuple):
    """The result of an evaluation.

    Attributes:
        scores: ``[N]`` in float64, or ``[N, K]`` for ``K`` tasks.
        statistics: The statistics that a learner has collected, or None.
        alone: The reason why the members must be evaluated alone instead, or None. If given, the scores are invalid.
    """

    scores: Tensor
    statistics: Tensor | None
    alone: str | None = None


@dataclasses.dataclass
class Evaluation:
    """One evaluation of a population (or chunk).

    Attributes:
        population: The members.
        fitness_fn: Takes a model and returns its fitness; if marked as batched, takes the population and returns all.
        coalesce: Whether a plain function is run for the members together, and whether that is checked.
        findings: What is known about the function; updated in place.
        to_check: Indices of the members to check.
        learner: The function, if it is a learner, or None.
        warned: The warnings that have been issued; each is issued once.
    """

    population: Population
    fitness_fn: Callable[..., Any]
    coalesce: Coalesce
    findings: Findings
    to_check: Sequence[int]
    learner: Learner | None
    warned: Warned

    def run(self) -> Scored:
        """Return the fitness of every member.

        Raises:
            TypeError: The function does not return a number.
            ValueError: The function returns an array of the wrong shape.
        """
        together.refuse_nested()
        with _one_at_a_time(self.warned):
            try:
                return self._batched() if is_batched(self.fitness_fn) else self._plain()
            finally:
                self.population.close()

    def alone(self, index: int) -> Score:
        """Return the fitness of one member, evaluated alone. A learner's statistics of it are discarded."""
        together.refuse_nested()
        with _one_at_a_time(self.warned):
            try:
                if not is_batched(self.fitness_fn):
                    return self._score_alone(index)
                return self._batched_alone(index)
            finally:
                self.population.close()
                discard_statistics(self.learner)

    def _batched_alone(self, index: int) -> Score:
        def function(model: nn.Module) -> Score:
            single = Population.of(model, generation=self.population.generation, seed=self.population.seed)
            (row,) = to_scores(self.fitness_fn(single), 1).tolist()
            return tuple(row) if isinstance(row, list) else row

        try:
            return alone.score(self.population, function, index, self._generators)[0]
        except Exception as error:
            self._annotate(error, f"member {self.population.first + index} (evaluated again)")
            raise

    @functools.cached_property
    def _generators(self) -> list[Source]:
        parameter = next(self.population.model.parameters(), None)
        return sources(torch.device("cpu") if parameter is None else parameter.device)

    def _batched(self) -> Scored:
        """Call a function of the whole population."""
        population = self.population
        if self.findings.alone is not None:
            population.forwards.one_by_one = True
        elif getattr(self.fitness_fn, "_eggroll_batched", "") == "checked" and self.to_check:
            population.audit = Audit(population.remember(self.to_check))
        members = f"members {population.first}-{population.first + len(population) - 1}"
        try:
            with keyed(self._generators, population.seed, population.generation, "evaluation", population.first):
                before = [source.get() for source in self._generators] if self.to_check else []
                scores = to_scores(self.fitness_fn(population), len(population))
                self._note_draws(before)
        except Exception as error:
            self._annotate(error, members)
            raise
        audit = population.audit
        found = None if audit is None else audit.found
        self.findings.check_seconds += 0.0 if audit is None else audit.seconds
        if audit is not None and audit.sample is not None:
            self.findings.note_sample(*audit.sample)
        return Scored(scores, self._statistics(), found)

    def _plain(self) -> Scored:
        """Run a function of one model for all members."""
        if self.coalesce is False or self.findings.alone is not None:
            return self._alone()
        if _is_scripted(self.population.model):
            return self._refused("the model is a TorchScript module")
        check = self.coalesce != "unchecked" and not self.findings.nondeterministic
        records = {index: Record() for index in self.to_check} if check else {}
        try:
            scores = together.scores(
                self.population,
                self._score,
                findings=self.findings,
                warned=self.warned,
                generators=self._generators,
                records=records,
            )
        except together.NotTogether as reason:
            return self._refused(str(reason))
        except together.MemberFailed as failed:
            return self._failed(failed)
        statistics = self._statistics()
        for index, record in records.items():
            call = record.call_of(self.population.model)
            if call is not None:
                self.findings.note_sample(*call)
            began = time.perf_counter()
            found = self._difference(index, record)
            self.findings.check_seconds += time.perf_counter() - began
            if found is not None:
                return self._refused(found)
        return Scored(self._table(scores), statistics)

    def _alone(self) -> Scored:
        scores = []
        # Members that deadlocked before may still hold locks.
        with together.DeadlockWatch(self.findings.alone == together.DEADLOCK) as watch:
            for watch.turns in range(len(self.population)):
                scores.append(self._score_alone(watch.turns))
        return Scored(self._table(scores), self._statistics())

    def _note_draws(self, before: Sequence[Any]) -> None:
        """Note whether the global generators have been used since they were in these states."""
        if before and not self.findings.draws:
            self.findings.draws = any(
                not source.same(source.get(), state) for source, state in zip(self._generators, before, strict=True)
            )

    def _table(self, scores: Sequence[Score]) -> Tensor:
        """Return the scores of the members, ``[N]`` or ``[N, K]``.

        Raises:
            ValueError: Members have different numbers of tasks.
        """
        tasks = [(len(score),) if isinstance(score, tuple) else () for score in scores]
        odd = next((index for index, shape in enumerate(tasks) if shape != tasks[0]), None)
        if odd is not None:
            first = self.population.first
            error = ValueError(
                f"the fitness function returned {described(tasks[0])} for member {first} and {described(tasks[odd])}"
                f" for member {first + odd}: {SAME_TASKS}"
            )
            self._annotate(error, f"member {first + odd}")
            raise error
        return torch.tensor(scores, dtype=torch.float64, device="cpu")

    def _score(self, model: nn.Module) -> Score:
        return to_score(self.fitness_fn(model))

    def _score_and_note_draws(self, model: nn.Module) -> Score:
        before = [source.get() for source in self._generators]
        score = self._score(model)
        self._note_draws(before)
        return score

    def _score_alone(self, index: int) -> Score:
        score = self._score_and_note_draws if index in self.to_check and not self.findings.draws else self._score
        try:
            if self.findings.sample is None and index == 0 and not _is_scripted(self.population.model):
                value, changed = evaluate_observed(
                    self.population, score, index, self._generators, self.findings.note_sample
                )
            else:
                value, changed = alone.score(self.population, score, index, self._generators)
        except together.Deadlock as error:
            stuck = RuntimeError(
                "the fitness function waits forever for a lock, a queue or the like that earlier calls have not"
                " released: create it inside the function, or pass coalesce=False from the beginning"
            )
            self._annotate(stuck, f"member {self.population.first + index}")
            raise stuck from error
        except BaseException as error:
            self._annotate(error, f"member {self.population.first + index}")
            raise
        # Buffers that the model does not save are caches, which need no warning.
        buffers = [what for what in changed if what.startswith("buffer ")]
        if buffers:
            self.warned.once(
                f"the fitness function changes {', '.join(buffers)} of the model: the changes are undone after each"
                " member, and lost. To keep such statistics, update the buffers of trainer.model between generations,"
                " or give the fitness function pop_statistics() and merge_statistics()",
                "buffers",
            )
        return value

    def _failed(self, failed: together.MemberFailed) -> Scored:
        """Raise a member's error if the member also fails alone; otherwise members must be evaluated alone."""
        error = failed.error
        if self.coalesce == "unchecked" or not isinstance(error, Exception) or is_out_of_memory(error):
            self._annotate(error, f"member {self.population.first + failed.index}")
            raise error
        self._score_alone(failed.index)
        return self._refused(
            f"member {self.population.first + failed.index} raised {type(error).__name__} ({error}), and does not when"
            " it is evaluated alone"
        )

    def _difference(self, index: int, record: Record) -> str | None:
        """Describe how a member's evaluation differs from its evaluation alone, or return None."""
        try:
            return difference(self.population, self._score, index, record, self._generators)
        except DiffersFromItself:
            self.findings.nondeterministic = True
            self.warned.once(
                "the scores cannot be checked: two evaluations with the same weights differ, as with an unseeded"
                " simulator. Seed it, for example from torch's, NumPy's or Python's global generator, or pass"
                ' coalesce="unchecked" to silence this warning. If calls of the fitness function share a simulator or a'
                " generator, the scores are wrong: pass coalesce=False",
                "nondeterministic",
            )
            return None
        except Exception as error:
            self._annotate(error, f"member {self.population.first + index} (evaluated alone)")
            raise
        finally:
            # The statistics of a checked member have been collected already.
            discard_statistics(self.learner)

    def _statistics(self) -> Tensor | None:
        return None if self.learner is None else self.learner.pop_statistics().cpu()

    def _refused(self, reason: str) -> Scored:
        discard_statistics(self.learner)
        return Scored(torch.zeros(len(self.population), dtype=torch.float64, device="cpu"), None, reason)

    def _annotate(self, error: BaseException, who: str) -> None:
        text = f"in the fitness of {who} of generation {self.population.generation + 1}"
        if hasattr(error, "add_note"):
            error.add_note(text)
        else:
            # Python 3.10 has no notes: add the text to the message.
            error.args = (f"{error.args[0]} ({text})", *error.args[1:]) if error.args else (text,)


def _is_scripted(model: nn.Module) -> bool:
    return any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())


class _one_at_a_time:
    """Lets one thread at a time evaluate, as threads share the global generators and possibly models."""

    _lock = threading.RLock()

    def __init__(self, warned: Warned) -> None:
        self._warned = warned

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=_LONG_WAIT):
            self._warned.once(
                "this evaluation waits for another one in another thread, as only one can run at a time in a process."
                " If the other one waits for this one, neither will ever end: evaluate in one thread only"
            )
            self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()
