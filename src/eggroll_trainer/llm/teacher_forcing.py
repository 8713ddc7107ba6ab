"""Probabilities of given tokens: one forward over whole sequences, whose last tokens are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Bytes of logits that are converted to float32 at a time.
_SLICE = 2**24


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences of tokens, padded on the right. Their last tokens are scored.

    In a causal model, padding on the right does not affect earlier tokens or positions. So no mask is needed, and all
    members' calls have the same form, whatever the lengths of their sequences.

    Attributes:
        ids: ``[rows, T]``, token ids.
        scored: ``[rows, S]``, bool: whether each of the last ``S`` of the ``T`` tokens is scored.
    """

    ids: Tensor
    scored: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], counts: Sequence[int], pad: int, device: torch.device) -> Sequences:
        """Return sequences from rows of tokens.

        Args:
            rows: The tokens of each row.
            counts: Number of last tokens of each row that are scored; not all, as the first token cannot be.
            pad: The padding token.
            device: Device of the tensors.
        """
        longest = max(map(len, rows))
        first = min(len(row) - count for row, count in zip(rows, counts, strict=True))
        ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
        scored = [
            [len(row) - count <= place < len(row) for place in range(first, longest)]
            for row, count in zip(rows, counts, strict=True)
        ]
        return cls(torch.tensor(ids, device=device), torch.tensor(scored, device=device))

    @property
    def targets(self) -> Tensor:
        """The last ``S`` tokens of each row, ``[rows, S]``."""
        return self.ids[:, -self.scored.shape[1] :]

    def repeated(self, times: int) -> Sequences:
        """Return the rows several times, once for each member of a population."""
        return Sequences(self.ids.repeat(times, 1), self.scored.repeat(times, 1))

    def to(self, device: torch.device) -> Sequences:
        """Return the sequences on a device."""
        return Sequences(self.ids.to(device), self.scored.to(device))

    def logits(self, model: nn.Module, options: dict[str, Any]) -> Tensor:
        """Return a model's logits for the last ``S`` tokens, ``[rows, S, V]``.

        Args:
            model: A causal language model.
            options: Further arguments of its forward.
        """
        count = self.scored.shape[1]
        if "logits_to_keep" in options:
            options = {**options, "logits_to_keep": count + 1}
        # Some models warn about padding without a mask.
        mask = torch.ones_like(self.ids)
        logits: Tensor = model(input_ids=self.ids, attention_mask=mask, **options).logits
        # The logits at a token predict the next one.
        return logits[:, -count - 1 : -1]


def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Return ``log p`` of each token, ``[rows, S]`` in float32 or wider.

    Args:
        logits: ``[rows, S, V]``.
        targets: ``[rows, S]``.
    """

    def of(wide: Tensor, rows: slice) -> Tensor:
        return wide.gather(-1, targets[rows, :, None]).squeeze(-1) - wide.logsumexp(-1)

    return _in_slices(of, logits)


def divergences(logits: Tensor, reference: Tensor) -> Tensor:
    """Return ``KL(p‖q) = Σ_v p_v (log p_v - log q_v)`` at each token, ``[rows, S]`` in nats.

    Args:
        logits: Logits of ``p``, ``[rows, S, V]``.
        reference: Logits of ``q``, ``[rows, S, V]``.

    Raises:
        ValueError: The shapes differ.
    """
    if logits.shape != reference.shape:
        raise ValueError(
            f"the reference model has logits of shape {list(reference.shape)}, the trained model of"
            f" {list(logits.shape)}: they need the same vocabulary"
        )

    def of(wide: Tensor, rows: slice) -> Tensor:
        p, q = wide.log_softmax(-1), reference[rows].to(wide.dtype).log_softmax(-1)
        # Tokens with probability zero contribute nothing.
        return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)

    return _in_slices(of, logits)


def _in_slices(function: Callable[[Tensor, slice], Tensor], logits: Tensor) -> Tensor:
    """Apply a function to a few rows of logits at a time, in float32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    step = max(1, _SLICE // max(1, logits[:1].numel() * wide.itemsize))
    parts = [slice(first, first + step) for first in range(0, len(logits), step)]
    return torch.cat([function(logits[rows].to(wide), rows) for rows in parts])


def tiles(lengths: Sequence[int], counts: Sequence[int], logit_bytes: int, budget: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows ``(first, last + 1)``, in order, so that the logits of each range fit into a budget.

    Args:
        lengths: Number of tokens of each row.
        counts: Number of last tokens of each row that are scored.
        logit_bytes: Bytes of the logits of one token, for all members together.
        budget: Bytes. A range has at least one row.
    """
    first = 0
    while first < len(lengths):
        last, longest, earliest = first, 0, lengths[first]
        while last < len(lengths):
            longest = max(longest, lengths[last])
            earliest = min(earliest, lengths[last] - counts[last])
            if last > first and (last + 1 - first) * (longest - earliest + 1) * logit_bytes > budget:
                break
            last += 1
        yield first, last
        first = last
