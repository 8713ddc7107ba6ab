"""What a fitness function learns along the way, such as the statistics of the observations that its members meet."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from .._utils.copies import plain_copy
from ..population.untrained import set_untrained, untrained


class Learner(Protocol):
    """A fitness function that keeps something for the next generation, in buffers of the model.

    It must not change within a generation: members are evaluated in chunks, in any order and maybe in other processes.
    What it keeps elsewhere than in the model it hands out by a ``state_dict()`` of numbers and tensors, and takes back
    by ``load_state_dict``. One that keeps nothing in the model says so by ``changes_model = False``: the model's
    buffers and untrained parameters are then not copied in every generation.

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
        """Return what has been seen since the last call, in one tensor, and forget it.

        Called after the evaluation of each chunk, and before it as well: what an evaluation that failed, or one outside
        a generation, has left is thrown away. It may raise if there is nothing.
        """

    def merge_statistics(self, model: nn.Module, statistics: Sequence[Tensor]) -> None:
        """Take in what all chunks of a generation have shown, in the order of their members.

        If it raises, the buffers and parameters of the model and :meth:`state_dict` are put back, and the generation
        counts as not made.

        Args:
            model: The model that is trained.
            statistics: From :meth:`pop_statistics`, here or in other processes; on the CPU, wherever the model is.
        """


def learner(fitness_fn: Any) -> Learner | None:
    """Return the fitness function if it learns, else None."""
    learns = hasattr(fitness_fn, "pop_statistics") and hasattr(fitness_fn, "merge_statistics")
    return cast(Learner, fitness_fn) if learns else None


def changes_model(learner: Learner | None) -> bool:
    """Return whether a learner may keep something in the model."""
    return learner is not None and bool(getattr(learner, "changes_model", True))


def discard_statistics(learner: Learner | None) -> None:
    """Throw away what earlier evaluations have left, so that it is not counted with the next chunk."""
    if learner is not None:
        # One that has seen nothing may have nothing to return.
        with contextlib.suppress(Exception):
            learner.pop_statistics()


@contextlib.contextmanager
def merged(
    learner: Learner | None, model: nn.Module, statistics: Sequence[Tensor], trained: Collection[str]
) -> Iterator[None]:
    """Let a learner take in a generation's statistics; if it, or the block, raises, undo that.

    Args:
        learner: Who takes them in, or None.
        model: The model that is trained.
        statistics: One tensor for each chunk.
        trained: Names of its trained parameters, which a learner leaves alone.
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
    """Return a copy of what a learner keeps elsewhere than in its model, or None."""
    state_dict = getattr(learner, "state_dict", None)
    return None if state_dict is None else plain_copy(state_dict())


def set_learner_state(learner: Learner | None, state: Any) -> None:
    """Give a learner back what :func:`learner_state` returned."""
    load_state_dict = getattr(learner, "load_state_dict", None)
    if state is not None and load_state_dict is not None:
        load_state_dict(plain_copy(state))
