"""Fitness functions that score given tokens, for all members in one forward."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import Population, batched
from .._utils.validation import check_int
from .examples import Example, Examples
from .models import call_options, check_causal, device_of, evaluating, logit_bytes
from .prompts import PromptEncoder, padding_token
from .teacher_forcing import Sequences, log_probabilities, tiles

# Number of examples from which the typical length is estimated.
_LOOKED_AT = 64


class Scored(NamedTuple):
    """A sequence of tokens, the last ``num_scored`` of which are scored."""

    tokens: list[int]
    num_scored: int


@dataclasses.dataclass(frozen=True)
class LikelihoodResult:
    """The result of an evaluation.

    Attributes:
        score: The mean fitness over examples.
        perplexity: ``exp`` of the mean negative log-probability of all scored tokens.
        tokens: Number of scored tokens.
        scores: The fitness of each example, ``[n]`` in float64.
    """

    score: float
    perplexity: float
    tokens: int
    scores: Tensor

    def __str__(self) -> str:
        """Return score and perplexity in one line."""
        return f"score {self.score:.4g}, perplexity {self.perplexity:.4g} over {self.tokens} tokens"


class TeacherForced(ABC):
    """A fitness function: log-probabilities of given tokens, for all members in one forward.

    Args:
        examples: The data set.
        encoder: Converts prompts to tokens.
        count: Number of examples in a generation.
        reduction: ``"mean"`` or ``"sum"`` over the scored tokens of an example.
        logits_budget: Bytes for the logits of a forward.
        check: See :func:`eggroll_trainer.batched`.
    """

    def __init__(
        self,
        examples: Examples,
        encoder: PromptEncoder,
        count: int,
        reduction: Literal["mean", "sum"],
        logits_budget: int,
        check: bool,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
        self.examples, self.encoder, self.count, self.reduction = examples, encoder, count, reduction
        self.logits_budget = check_int("logits_budget", logits_budget, 1)
        # Raise errors about examples here, not in the first generation.
        looked_at = [self._encoded(examples[i]) for i in range(min(len(examples), _LOOKED_AT))]
        self._longest = 1 + max(row.num_scored for row in looked_at)
        # Mark this object as a fitness function for populations.
        batched(self, check=check)

    @abstractmethod
    def _encoded(self, example: Example) -> Scored:
        """Return the tokens of an example."""

    def __call__(self, population: Population) -> Tensor:
        """Return the score of every member for every example of the generation, ``[N, K]``."""
        drawn = self.examples.drawn(self.count, population.seed, population.generation)
        rows = [self._encoded(example) for example in drawn]
        n, model = len(population), population.model
        check_causal(model)
        options, size = call_options(model), n * logit_bytes(model)
        parts = []
        population.eval()
        for first, last in self._tiles(rows, size):
            one = self._sequences(rows[first:last], model)
            every = one.repeated(n)
            with torch.no_grad():
                with population.folded(rows=last - first) as folded:
                    logits = every.logits(folded, options)
                sums = _sums(logits, every)
            parts.append(sums.view(n, last - first))
        return self._reduced(torch.cat(parts, 1), rows)

    def member_bytes(self, model: nn.Module) -> int:
        """Return the approximate bytes of one member, the logits of one example, from which a trainer sizes chunks."""
        return self._longest * logit_bytes(model)

    def evaluate(
        self, model: nn.Module, dataset: Any = None, n: int | None = None, *, batch_size: int = 16
    ) -> LikelihoodResult:
        """Score one model.

        Args:
            model: The model, such as ``trainer.model``.
            dataset: Examples with the same columns; the training examples if None.
            n: Number of examples to use, from the first one on; all if None.
            batch_size: Largest number of rows in a forward.

        Returns:
            The mean score, the perplexity, and the score of each example.

        Raises:
            TypeError: ``dataset`` is not a sequence.
            ValueError: An example lacks a column or has no tokens to score.
        """
        check_causal(model)
        batch_size = check_int("batch_size", batch_size, 1)
        examples = self.examples if dataset is None else Examples(dataset, self._columns)
        rows = [self._encoded(example) for example in examples.first(n)]
        parts = []
        with torch.no_grad(), evaluating(model):
            options = call_options(model)
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                for first, last in self._tiles(batch, logit_bytes(model)):
                    sequences = self._sequences(batch[first:last], model)
                    parts.append(_sums(sequences.logits(model, options), sequences))
        sums = torch.cat(parts)
        scores, tokens = self._reduced(sums, rows), sum(row.num_scored for row in rows)
        perplexity = torch.exp(-sums.double().sum() / tokens)
        return LikelihoodResult(float(scores.mean()), float(perplexity), tokens, scores)

    @property
    @abstractmethod
    def _columns(self) -> tuple[str, ...]:
        """The columns of an example that are used."""

    def _tiles(self, rows: Sequence[Scored], size: int) -> list[tuple[int, int]]:
        lengths, counts = [len(row.tokens) for row in rows], [row.num_scored for row in rows]
        return list(tiles(lengths, counts, size, self.logits_budget))

    def _sequences(self, rows: Sequence[Scored], model: nn.Module) -> Sequences:
        tokens, counts = [row.tokens for row in rows], [row.num_scored for row in rows]
        return Sequences.of(tokens, counts, padding_token(self.encoder.tokenizer), device_of(model))

    def _reduced(self, sums: Tensor, rows: Sequence[Scored]) -> Tensor:
        """Return scores from sums over the tokens of each example, ``[..., K]``."""
        sums = sums.to("cpu", torch.float64)
        counts = torch.tensor([row.num_scored for row in rows], dtype=torch.float64, device="cpu")
        return sums / counts if self.reduction == "mean" else sums


def _sums(logits: Tensor, sequences: Sequences) -> Tensor:
    """Return the total log-probability of the scored tokens of each row, ``[rows]``."""
    # Values at tokens that are not scored are arbitrary, even NaN.
    return log_probabilities(logits, sequences.targets).where(sequences.scored, 0.0).sum(1)
