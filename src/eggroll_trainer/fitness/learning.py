"""Fitness functions that collect statistics during evaluations, such as the mean of observations: learners."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from .._utils.copies import plain_copy
from ..population.untrained import set_untrained, untrained


class Learner(Protocol):
    """A fitness function that collects statistics and uses them from the next generation on.

    It must not change within a generation, as members are evaluated in chunks, in any order and possibly in other
    processes. It keeps the statistics in buffers of the model. If it has other state, it needs ``state_dict()``, which
    returns numbers and tensors, and ``load_state_dict``. If it keeps nothing in the model, set an attribute
    ``changes_model = False``: the model's buffers and untrained parameters are then not copied in every generation.

    Example:
        >>> import torch
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> class Counts:
        ...     seen = 0  # examples, of all generations
        ...
        ...     def __call__(self, model):
        ...         self.now = getattr(self, "now", 0) + 4
        ...         return model(torch.ones(4, 2)).mean().item()
        ...
        ...     def pop_statistics(self):
        ...         now, self.now = getattr(self, "now", 0), 0
        ...         return torch.tensor([float(now)])
        ...
        ...     def merge_statistics(self, model, statistics):
        ...         self.seen += int(sum(statistics))
        >>> fitness = Counts()
        >>> trainer = EGGROLLTrainer(
        ...     model=torch.nn.Linear(2, 1), fitness_fn=fitness, population_size=8, coalesce=False, seed=0
        ... )
        >>> _ = trainer.step()
        >>> fitness.seen
        32
    """

    def pop_statistics(self) -> Tensor:
        """Return the statistics collected since the last call, in one tensor, and reset them.

        It is called after the evaluation of each chunk. It is also called before it, to discard what a failed
        evaluation, or one outside of a generation, has collected. It may raise if there are no statistics.
        """

    def merge_statistics(self, model: nn.Module, statistics: Sequence[Tensor]) -> None:
        """Merge the statistics of all chunks of a generation, in the order of their members.

        If it raises, the model's buffers and parameters and the :meth:`state_dict` are restored, and the generation is
        not made.

        Args:
            model: The model that is trained.
            statistics: Results of :meth:`pop_statistics` from this or other processes, always on the CPU.
        """


def learner(fitness_fn: Any) -> Learner | None:
    """Return the fitness function if it is a learner, else None."""
    learns = hasattr(fitness_fn, "pop_statistics") and hasattr(fitness_fn, "merge_statistics")
    return cast(Learner, fitness_fn) if learns else None


def changes_model(learner: Learner | None) -> bool:
    """Return whether a learner may change the model's buffers or untrained parameters."""
    return learner is not None and bool(getattr(learner, "changes_model", True))


def discard_statistics(learner: Learner | None) -> None:
    """Discard collected statistics, so that they don't count with the next chunk."""
    if learner is not None:
        # A learner may raise if it has no statistics.
        with contextlib.suppress(Exception):
            learner.pop_statistics()


@contextlib.contextmanager
def merged(
    learner: Learner | None, model: nn.Module, statistics: Sequence[Tensor], trained: Collection[str]
) -> Iterator[None]:
    """Merge a generation's statistics into a learner; undo it if the learner or the block raises.

    Args:
        learner: The learner, or None.
        model: The model that is trained.
        statistics: One tensor for each chunk.
        trained: Names of its trained parameters, which a learner does not change.
    """
    if learner is None:
        yield
        return
    before = plain_copy(untrained(model, trained, persistent=False)) if changes_model(learner) else {}
    state = learner_state(learner)
    try:
        learner.merge_statistics(model, statistics)
        yield
    except BaseException:
        set_untrained(model, before)
        set_learner_state(learner, state)
        raise


def learner_state(learner: Learner | None) -> Any:
    """Return a copy of a learner's ``state_dict()``, or None if it has none."""
    state_dict = getattr(learner, "state_dict", None)
    return None if state_dict is None else plain_copy(state_dict())


def set_learner_state(learner: Learner | None, state: Any) -> None:
    """Restore what :func:`learner_state` returned."""
    load_state_dict = getattr(learner, "load_state_dict", None)
    if state is not None and load_state_dict is not None:
        load_state_dict(plain_copy(state))
