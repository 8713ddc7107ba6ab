"""The scores of a generation that ``tell`` has received so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.validation import check_int
from ..fitness.scores import described, is_table, without_single_column


class ToldScores:
    """Scores of some members of a generation.

    Args:
        size: ``N``.
        settings: The settings that the members depend on, in plain form.

    Attributes:
        scores: ``[N]``, or ``[N, K]`` for ``K`` tasks, in float64; NaN for members without a score.
        known: ``[N]``, bool: which members have a score.
    """

    def __init__(self, size: int, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.scores = torch.full((size,), torch.nan, dtype=torch.float64, device="cpu")
        self.known = torch.zeros(size, dtype=torch.bool, device="cpu")

    @classmethod
    def from_state(cls, state: dict[str, Any] | None) -> ToldScores | None:
        """Return the object whose :meth:`state` this is."""
        if state is None:
            return None
        told = cls(len(state["scores"]), state["settings"])
        told.scores, told.known = state["scores"].clone(), state["known"].clone()
        return told

    def state(self) -> dict[str, Any]:
        """Return all of it in plain form, for a checkpoint."""
        return {"settings": self.settings, "scores": self.scores, "known": self.known}

    @property
    def complete(self) -> bool:
        """Whether all members have a score."""
        return bool(self.known.all())

    def with_scores(self, scores: Any, members: Sequence[int] | None) -> ToldScores:
        """Return a copy with further scores. New scores replace earlier ones of the same members.

        Args:
            scores: ``[n]``, or ``[n, K]`` for ``K`` tasks.
            members: Indices of the ``n`` members; all if None.

        Raises:
            TypeError: Scores are not numbers, or members are not integers.
            ValueError: The numbers of scores and members differ, there is no such member, or earlier scores have
                another number of tasks.
        """
        size = len(self.scores)
        chosen = list(range(size)) if members is None else [check_int("members", member, 0) for member in members]
        outside = [member for member in chosen if member >= size]
        if outside:
            raise ValueError(f"members must be below population_size={size}, got {outside[0]}")
        values = _table(scores, len(chosen))
        told, others = ToldScores(size, self.settings), self.known.clone()
        others[chosen] = False
        if not others.any():
            told.scores = torch.full((size, *values.shape[1:]), torch.nan, dtype=torch.float64, device="cpu")
        elif values.shape[1:] == self.scores.shape[1:]:
            told.scores = self.scores.clone()
        else:
            raise ValueError(
                f"got {described(values.shape[1:])} for each member, but other members have"
                f" {described(self.scores.shape[1:])} each: score all members of a generation on the same tasks, with"
                " NaN in each task of a member that failed"
            )
        told.scores[chosen] = values
        told.known = others
        told.known[chosen] = True
        return told


def _table(scores: Any, count: int) -> Tensor:
    """Return the scores of some members as ``[count]``, or ``[count, K]`` for ``K ≥ 2`` tasks, in float64."""
    try:
        # Python floats have 64 bits; torch would convert them to float32.
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
