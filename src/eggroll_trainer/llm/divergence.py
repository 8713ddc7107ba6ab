"""The divergence of models from a reference model, on their own completions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import Population
from .completions import Completion
from .models import call_options, device_of, evaluating, logit_bytes
from .prompts import padding_token
from .teacher_forcing import Sequences, divergences, tiles


class Divergence:
    """The Kullback–Leibler divergence of a model from a reference model, along the model's completions.

    For a completion ``y_1 … y_L`` of a prompt it is ``Σ_t KL(p(· | y_<t) ‖ q(· | y_<t))`` in nats. ``p`` is the model
    that wrote it, ``q`` the reference, both at temperature 1. Averaged over completions sampled at temperature 1, it is
    the divergence between the distributions of completions. Over others, such as greedy completions, it measures how
    much the models differ along these.

    Args:
        tokenizer: A tokenizer of transformers.
        reference: The reference model, such as a copy of the model before training. If None, the model must be a PEFT
            model, and the reference is the model with its adapters disabled.
        budget: Bytes for logits.
    """

    def __init__(self, tokenizer: Any, reference: nn.Module | None, budget: int) -> None:
        self.tokenizer, self.reference, self.budget = tokenizer, reference, budget

    def has_reference(self, model: nn.Module) -> bool:
        """Return whether there is a reference for a model."""
        return self.reference is not None or hasattr(model, "disable_adapter")

    def of_members(
        self, population: Population, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Completion]]
    ) -> Tensor:
        """Return the divergence for each completion of members, ``[n, rows]`` in float64.

        Args:
            population: The ``n`` members.
            prompts: The tokens of each row's prompt, for ``rows`` rows.
            completions: For each member, the completions of all rows.
        """
        scores = torch.zeros(len(population), len(prompts), dtype=torch.float64, device="cpu")
        options, size = call_options(population.model), len(population) * logit_bytes(population.model)
        # The longest completion of any member determines the memory of a row.
        counts = [max(len(of_member[row].tokens) for of_member in completions) for row in range(len(prompts))]
        lengths = [len(prompt) + count for prompt, count in zip(prompts, counts, strict=True)]
        for first, last in tiles(lengths, counts, 2 * size, self.budget):
            chosen = [(prompts[row], of_member[row].tokens) for of_member in completions for row in range(first, last)]
            sequences = self._sequences(population.model, chosen)
            if sequences is None:
                continue
            with torch.no_grad():
                with population.folded(rows=last - first) as model:
                    logits = sequences.logits(model, options)
                own_scores = self._divergences(population.model, sequences, logits)
            scores[:, first:last] = own_scores.view(-1, last - first)
        return scores

    def of_model(self, model: nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Tensor:
        """Return the divergence for each completion of one model, ``[rows]`` in float64."""
        pairs = [(prompt, c.tokens) for prompt, c in zip(prompts, completions, strict=True)]
        scores = torch.zeros(len(pairs), dtype=torch.float64, device="cpu")
        counts = [len(tokens) for _, tokens in pairs]
        lengths = [len(prompt) + len(tokens) for prompt, tokens in pairs]
        for first, last in tiles(lengths, counts, 2 * logit_bytes(model), self.budget):
            sequences = self._sequences(model, pairs[first:last])
            if sequences is None:
                continue
            with torch.no_grad():
                logits = sequences.logits(model, call_options(model))
                scores[first:last] = self._divergences(model, sequences, logits)
        return scores

    def _sequences(self, model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Sequences | None:
        counts = [len(tokens) for _, tokens in pairs]
        if not any(counts):
            return None
        rows = [[*prompt, *tokens] for prompt, tokens in pairs]
        return Sequences.of(rows, counts, padding_token(self.tokenizer), device_of(model))

    def _divergences(self, model: nn.Module, sequences: Sequences, logits: Tensor) -> Tensor:
        with _reference(self.reference, model) as reference:
            there = sequences.to(device_of(reference))
            expected = there.logits(reference, call_options(reference)).to(logits.device)
        # Values at tokens that are not scored are arbitrary, even NaN.
        each = divergences(logits, expected).where(sequences.scored, 0.0)
        return each.sum(1).to("cpu", torch.float64)


@contextlib.contextmanager
def _reference(reference: nn.Module | None, model: Any) -> Iterator[nn.Module]:
    """Yield the reference model, in evaluation mode."""
    if reference is None:
        with model.disable_adapter(), evaluating(model):
            yield model
    else:
        with evaluating(reference):
            yield reference
