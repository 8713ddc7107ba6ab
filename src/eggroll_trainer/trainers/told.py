"""The scores that have been told of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.validation import check_int
from ..fitness.scores import described, is_table, without_single_column


class Told:
    """The scores of some of a generation's members.

    Args:
        size: ``N``.
        settings: What the members depend on, in plain form.

    Attributes:
        scores: ``[N]``, or ``[N, K]`` for ``K`` tasks, in float64; NaN for those who have none.
        known: ``[N]``, who has been told of.
    """

    def __init__(self, size: int, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.scores = torch.full((size,), torch.nan, dtype=torch.float64, device="cpu")
        self.known = torch.zeros(size, dtype=torch.bool, device="cpu")

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> Told | None:
        """Return what :meth:`state` was of."""
        if state is None:
            return None
        told = cls(len(state["scores"]), state["settings"])
        told.scores, told.known = state["scores"].clone(), state["known"].clone()
        return told

    def state(self) -> dict[str, Any]:
        """Return all that it holds."""
        return {"settings": self.settings, "scores": self.scores, "known": self.known}

    @property
    def complete(self) -> bool:
        """Whether all have been told of."""
        return bool(self.known.all())

    def with_scores(self, scores: Any, members: Sequence[int] | None) -> Told:
        """Return these and further scores; a member who is told of again gets the new one.

        Raises:
            TypeError: Scores are not numbers, or members not integers.
            ValueError: There are not as many scores as members, there is no such member, or the scores are of another
                number of tasks than those that are kept.
        """
        size = len(self.scores)
        chosen = list(range(size)) if members is None else [check_int("members", member, 0) for member in members]
        outside = [member for member in chosen if member >= size]
        if outside:
            raise ValueError(f"members must be below population_size={size}, got {outside[0]}")
        values = _table(scores, len(chosen))
        told, others = Told(size, self.settings), self.known.clone()
        others[chosen] = False
        if not others.any():
            told.scores = torch.full((size, *values.shape[1:]), torch.nan, dtype=torch.float64, device="cpu")
        elif values.shape[1:] == self.scores.shape[1:]:
            told.scores = self.scores.clone()
        else:
            raise ValueError(
                f"got {described(values.shape[1:])} for each member, and others were told"
                f" {described(self.scores.shape[1:])} each: all members of a generation must be scored on the same"
                " tasks; one that failed has NaN in each"
            )
        told.scores[chosen] = values
        told.known = others
        told.known[chosen] = True
        return told


def _table(scores: Any, count: int) -> Tensor:
    """Return what was told of some members as ``[count]``, or ``[count, K]`` for ``K ≥ 2`` tasks, in float64."""
    try:
        # Python's numbers are float64, which torch would make float32.
        dtype = None if hasattr(scores, "dtype") else torch.float64
        values = torch.as_tensor(scores, dtype=dtype, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"scores must be numbers, [{count}], got {type(scores).__name__}") from None
    if values.is_complex():
        raise TypeError(f"scores must be real numbers, got {values.dtype}")
    if not is_table(values, count):
        raise ValueError(
            f"expected one score for each of {count} members, or [{count}, K] for K tasks, got shape"
            f" {list(values.shape)}"
        )
    return without_single_column(values.double())
