"""What a fitness function learns along the way, such as the statistics of the observations that its members meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from ..checkpoint import plain_copy


class Learner(Protocol):
    """A fitness function that keeps something for the next generation, in buffers of the model.

    It must not change within a generation: members are evaluated in chunks, in any order and maybe in other processes.
    What it keeps elsewhere than in the model it hands out by a ``state_dict()`` of numbers and tensors, and takes back
    by ``load_state_dict``.
    """

    def pop_statistics(self) -> Tensor:
        """Return what the evaluation of the last chunk has shown, in one tensor, and forget it."""

    def merge_statistics(self, model: nn.Module, statistics: Sequence[Tensor]) -> None:
        """Take in what all chunks of a generation have shown, in the order of their members. Must not raise.

        Args:
            model: The model that is trained.
            statistics: From :meth:`pop_statistics`, here or in other processes; on the CPU, wherever the model is.
        """


def learner(fitness_fn: Any) -> Learner | None:
    """Return the fitness function if it learns, else None."""
    learns = hasattr(fitness_fn, "pop_statistics") and hasattr(fitness_fn, "merge_statistics")
    return cast(Learner, fitness_fn) if learns else None


def learner_state(learner: Learner | None) -> Any:
    """Return a copy of what a learner keeps elsewhere than in its model, or None."""
    state_dict = getattr(learner, "state_dict", None)
    return None if state_dict is None else plain_copy(state_dict())


def set_learner_state(learner: Learner | None, state: Any) -> None:
    """Give a learner back what :func:`learner_state` returned."""
    load_state_dict = getattr(learner, "load_state_dict", None)
    if state is not None and load_state_dict is not None:
        load_state_dict(plain_copy(state))
