"""From a fitness function to scores: the one entrance.

A function marked as batched is called with the population. A plain function is run for the members together, or alone,
if that was asked for or nothing else is right. What is quick is checked, now and then, against what is right.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from .._utils.memory import is_out_of_memory
from .._utils.warned import Warned
from ..population import Audit, Population
from . import alone, together
from .check import DiffersFromItself, difference, evaluate_noting
from .findings import Findings
from .learning import Learner, discard_statistics
from .randomness import Source, keyed, sources
from .record import Record
from .scores import Score, described, to_score, to_scores

F = TypeVar("F", bound=Callable[..., Any])
Coalesce = bool | Literal["unchecked"]

SAME_TASKS = "all members of a generation must be scored on the same tasks"

# Seconds that an evaluation waits for one in another thread before it says so.
_LONG_WAIT = 10.0


@overload
def batched(fitness_fn: F, *, check: bool = True) -> F: ...
@overload
def batched(fitness_fn: None = None, *, check: bool = True) -> Callable[[F], F]: ...
def batched(fitness_fn: Callable[..., Any] | None = None, *, check: bool = True) -> Any:
    """Mark a fitness function as written for a whole population.

    It is called with a :class:`~eggroll_trainer.Population` of ``N`` members (a chunk of the population) and returns
    ``N`` scores, ``[N]``, or ``[N, K]`` with a column for each of ``K`` tasks, such as prompts or episodes; higher is
    better.

    Args:
        fitness_fn: The function. If it holds much memory for every member, such as the caches of a language model, it
            may have a method ``member_bytes(model)`` that says how many bytes: where the trainer has no ``chunk_size``,
            chunks are then made small enough.
        check: Whether to compare, now and then, the outputs of some members with those of the model holding their
            weights.

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
    """What an evaluation gave.

    Attributes:
        scores: ``[N]`` in float64, or ``[N, K]`` for ``K`` tasks.
        statistics: What it has shown to a function that learns along the way, or None.
        alone: Why the members must be evaluated alone instead, if this has been found out; the scores mean nothing.
    """

    scores: Tensor
    statistics: Tensor | None
    alone: str | None = None


@dataclasses.dataclass
class Evaluation:
    """One evaluation of a population (or chunk).

    Attributes:
        population: The members.
        fitness_fn: From a model to its fitness or, marked as batched, from the population to all.
        coalesce: Whether a function of one model is run for the members together, and whether that is checked.
        findings: What is known about the function; added to.
        to_check: Indices of members that are to be checked, if anything is.
        learner: The function, if it learns along the way.
        warned: The warnings already given; each is given once.
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
            TypeError: The function returned something that is not a number.
            ValueError: The function returned an array of the wrong shape.
        """
        together.refuse_nested()
        with _one_at_a_time(self.warned):
            try:
                return self._batched() if is_batched(self.fitness_fn) else self._plain()
            finally:
                self.population.close()

    def alone(self, index: int) -> Score:
        """Return the fitness of one member, evaluated by itself; what it shows to a function that learns is dropped."""
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
            population.remember(self.to_check)
            population.audit = Audit(self.to_check)
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
        if audit is not None and audit.sample is not None:
            self.findings.note_sample(*audit.sample)
        return Scored(scores, self._statistics(), found)

    def _plain(self) -> Scored:
        """Run a function of one model for all members."""
        if self.coalesce is False or self.findings.alone is not None:
            return self._alone()
        if _is_scripted(self.population.model):
            return self._refused("the model is a TorchScript module")
        check = self.coalesce != "unchecked" and not self.findings.unjudgeable
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
            found = self._difference(index, record)
            if found is not None:
                return self._refused(found)
        return Scored(self._table(scores), statistics)

    def _alone(self) -> Scored:
        scores = []
        # What the members held who waited for each other may be held still.
        with together.Watch(self.findings.alone == together.DEADLOCK) as watch:
            for watch.turns in range(len(self.population)):
                scores.append(self._score_alone(watch.turns))
        return Scored(self._table(scores), self._statistics())

    def _note_draws(self, before: Sequence[Any]) -> None:
        """Note whether the global generators have moved since they were in these states."""
        if before and not self.findings.draws:
            self.findings.draws = any(
                not source.same(source.get(), state) for source, state in zip(self._generators, before, strict=True)
            )

    def _table(self, scores: Sequence[Score]) -> Tensor:
        """Return the scores of the members, ``[N]`` or ``[N, K]``.

        Raises:
            ValueError: They are of different numbers of tasks.
        """
        tasks = [(len(score),) if isinstance(score, tuple) else () for score in scores]
        odd = next((index for index, own in enumerate(tasks) if own != tasks[0]), None)
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

    def _score_noting(self, model: nn.Module) -> Score:
        before = [source.get() for source in self._generators]
        score = self._score(model)
        self._note_draws(before)
        return score

    def _score_alone(self, index: int) -> Score:
        score = self._score_noting if index in self.to_check and not self.findings.draws else self._score
        try:
            if self.findings.sample is None and index == 0 and not _is_scripted(self.population.model):
                value, changed = evaluate_noting(
                    self.population, score, index, self._generators, self.findings.note_sample
                )
            else:
                value, changed = alone.score(self.population, score, index, self._generators)
        except together.Deadlock as error:
            stuck = RuntimeError(
                "the fitness function waits for ever, for a lock, a queue or the like that earlier calls have left in"
                " use: make it inside the function, or pass coalesce=False from the beginning"
            )
            self._annotate(stuck, f"member {self.population.first + index}")
            raise stuck from error
        except BaseException as error:
            self._annotate(error, f"member {self.population.first + index}")
            raise
        # What the model does not save is a cache.
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
        """Find out whether a member who failed together with others does so alone as well."""
        error = failed.error
        if self.coalesce == "unchecked" or not isinstance(error, Exception) or is_out_of_memory(error):
            self._annotate(error, f"member {self.population.first + failed.index}")
            raise error
        self._score_alone(failed.index)
        return self._refused(
            f"member {self.population.first + failed.index} raised {type(error).__name__} ({error}), and does not when"
            " it is evaluated by itself"
        )

    def _difference(self, index: int, record: Record) -> str | None:
        """Return how a member's evaluation differs from the one alone, or None."""
        try:
            return difference(self.population, self._score, index, record, self._generators)
        except DiffersFromItself:
            self.findings.unjudgeable = True
            self.warned.once(
                "the scores cannot be checked: evaluated twice with the same weights, the fitness function does not do"
                " the same, as with an unseeded simulator. Seed it, say from a global generator, torch's, NumPy's or"
                ' Python\'s, or pass coalesce="unchecked" to silence this. If its calls share a simulator or generator,'
                " the scores are wrong: pass coalesce=False",
                "unjudgeable",
            )
            return None
        except Exception as error:
            self._annotate(error, f"member {self.population.first + index} (evaluated by itself)")
            raise
        finally:
            # What the check has shown to a function that learns was shown to it before.
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
            # Python 3.10 has no notes; the message is the only place left.
            error.args = (f"{error.args[0]} ({text})", *error.args[1:]) if error.args else (text,)


def _is_scripted(model: nn.Module) -> bool:
    return any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())


class _one_at_a_time:
    """Let one thread at a time evaluate: generators belong to the process, and models may be shared."""

    _lock = threading.RLock()

    def __init__(self, warned: Warned) -> None:
        self._warned = warned

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=_LONG_WAIT):
            self._warned.once(
                "this evaluation waits for one that another thread has under way, as only one can run at a time in a"
                " process. If that one waits for this one in turn, neither will ever end"
            )
            self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()
