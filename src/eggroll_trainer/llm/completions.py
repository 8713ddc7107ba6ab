"""Completes prompts with a model, or with all members of a population in one call of ``generate()``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import Population
from .._utils.validation import check_int, check_real
from .models import check_causal, device_of
from .prompts import left_padded, padding_token

# Options of generate() for which Decoding has arguments, and options that change its result.
_ARGUMENTS = {
    "max_new_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "temperature": "temperature",
    "do_sample": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "num_return_sequences": "samples_per_prompt",
}
_REFUSED = ("return_dict_in_generate", "output_scores", "output_logits", "streamer", "inputs", "input_ids")


class Completion(NamedTuple):
    """The completion of a prompt by a model.

    Attributes:
        tokens: Its tokens, including the token that ends it.
        text: Its text, without special tokens.
        ended: Whether it has ended by itself, within the allowed number of tokens.
    """

    tokens: list[int]
    text: str
    ended: bool


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How completions are generated.

    Args:
        max_new_tokens: Tokens after which a completion is cut off.
        temperature: 0 for the likeliest token at each step; otherwise tokens are sampled from ``softmax(logits / t)``.
        top_p: Sample from the likeliest tokens with this total probability; 1 for all tokens.
        top_k: Sample from this number of likeliest tokens; 0 for all tokens.
        options: Further keyword arguments of ``generate()``, such as ``{"stop_strings": ["###"]}``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or ``options`` contains an option that has its own argument.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_int("max_new_tokens", self.max_new_tokens, 1)
        check_real("temperature", self.temperature, positive=False)
        check_int("top_k", self.top_k, 0)
        if not 0 < check_real("top_p", self.top_p, positive=True) <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ValueError("top_p and top_k are for sampled tokens: they need a temperature above 0")
        for name in self.options:
            if name in _ARGUMENTS:
                raise ValueError(f"generation_kwargs must not have {name!r}: pass {_ARGUMENTS[name]}=")
            if name in _REFUSED:
                raise ValueError(f"generation_kwargs must not have {name!r}, which changes what generate() returns")

    @property
    def ends_otherwise(self) -> bool:
        """Whether something other than a token may end a completion, such as a string."""
        return not self.options.keys().isdisjoint(("stop_strings", "stopping_criteria", "max_time"))

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature > 0

    def at(self, temperature: float) -> Decoding:
        """Return the same settings with another temperature; for 0, without ``top_p`` and ``top_k``."""
        if temperature == 0:
            return Decoding(self.max_new_tokens, 0.0, options=self.options)
        return dataclasses.replace(self, temperature=temperature)

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Return the keyword arguments of ``generate()``.

        Options of the model's ``generation_config`` that change probabilities, such as a repetition penalty, are turned
        off, as rewards are for the model's own distribution.
        """
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.samples,
            "repetition_penalty": 1.0,
            "pad_token_id": padding_token(tokenizer),
        }
        if self.samples:
            arguments |= {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": self.top_k}
        ends = self.ends(model, tokenizer)
        if ends:
            arguments["eos_token_id"] = ends
        if "stop_strings" in self.options:
            arguments["tokenizer"] = tokenizer
        return {**arguments, **self.options}

    def ends(self, model: Any, tokenizer: Any) -> list[int]:
        """Return the tokens that end a completion: those in ``options``, or those of the model and the tokenizer."""
        if "eos_token_id" in self.options:
            found = [self.options["eos_token_id"]]
        else:
            config = getattr(model, "generation_config", None)
            found = [getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
        flat = [token for one in found for token in (one if isinstance(one, (list, tuple)) else [one])]
        return sorted({int(token) for token in flat if token is not None})


class Completer:
    """Completes prompts.

    Args:
        tokenizer: A tokenizer of transformers.
        decoding: The settings.
    """

    def __init__(self, tokenizer: Any, decoding: Decoding) -> None:
        self.tokenizer, self.decoding = tokenizer, decoding

    def by_members(
        self, population: Population, prompts: Sequence[Sequence[int]], samples: int, key: Sequence[int | str]
    ) -> list[list[Completion]]:
        """Return ``samples`` completions of each prompt by each member: a list for each of the ``n`` members.

        Args:
            population: The ``n`` members.
            prompts: The tokens of each prompt.
            samples: Number of completions of each prompt.
            key: Distinguishes the random numbers of this call from those of other calls.
        """
        check_causal(population.model)
        arguments = self.decoding.arguments(population.model, self.tokenizer)
        ids, mask = self._padded(population.model, prompts, samples)
        n = len(population)
        with torch.no_grad(), population.folded(rows=len(ids), key=key) as model:
            new: Any = model
            sequences = new.generate(ids.repeat(n, 1), attention_mask=mask.repeat(n, 1), **arguments)
        found = self._completions(population.model, sequences[:, ids.shape[1] :])
        return [found[i * len(ids) : (i + 1) * len(ids)] for i in range(n)]

    def by_model(self, model: nn.Module, prompts: Sequence[Sequence[int]], samples: int) -> list[Completion]:
        """Return ``samples`` completions of each prompt by one model, in the order ``[prompt, sample]``."""
        check_causal(model)
        arguments = self.decoding.arguments(model, self.tokenizer)
        ids, mask = self._padded(model, prompts, samples)
        generating: Any = model
        with torch.no_grad():
            sequences = generating.generate(ids, attention_mask=mask, **arguments)
        return self._completions(model, sequences[:, ids.shape[1] :])

    def _padded(self, model: nn.Module, prompts: Sequence[Sequence[int]], samples: int) -> tuple[Tensor, Tensor]:
        rows = [prompt for prompt in prompts for _ in range(samples)]
        return left_padded(rows, padding_token(self.tokenizer), device_of(model))

    def _completions(self, model: nn.Module, new: Tensor) -> list[Completion]:
        ends = frozenset(self.decoding.ends(model, self.tokenizer))
        pad = padding_token(self.tokenizer) if self.decoding.ends_otherwise else None
        rows = [trimmed(row, ends, pad, self.decoding.max_new_tokens) for row in new.tolist()]
        # The token that ends a completion may be an ordinary one, such as a line break.
        contents = [tokens[:-1] if tokens and tokens[-1] in ends else tokens for tokens, _ in rows]
        texts = self.tokenizer.batch_decode(contents, skip_special_tokens=True)
        return [Completion(tokens, text, ended) for (tokens, ended), text in zip(rows, texts, strict=True)]


def trimmed(row: Sequence[int], ends: frozenset[int], pad: int | None, most: int) -> tuple[list[int], bool]:
    """Return the tokens of a row up to its end, and whether it has ended by itself.

    ``generate()`` pads the rows of a batch until the last of them has ended.

    Args:
        row: The tokens.
        ends: Tokens that end it.
        pad: The padding token, if something other than a token may end the row; else None.
        most: Largest number of tokens.

    Example:
        >>> trimmed([5, 6, 2, 0, 0], frozenset({2}), pad=None, most=8)
        ([5, 6, 2], True)
        >>> trimmed([5, 6, 7], frozenset({2}), pad=None, most=3)
        ([5, 6, 7], False)
    """
    for i, token in enumerate(row):
        if token in ends:
            return list(row[: i + 1]), True
    size = len(row)
    while size and row[size - 1] == pad:
        size -= 1
    return list(row[:size]), size < most
