"""Converts prompts, which are texts or conversations, to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# A text, or the messages of a conversation.
Prompt = str | Sequence[Mapping[str, Any]]


def is_conversation(prompt: Any) -> bool:
    """Return whether a prompt is a list of messages, each with a role and a content."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    )


class PromptEncoder:
    """Converts prompts to tokens.

    A text is encoded unchanged, with the special tokens that the tokenizer adds at its beginning. The messages of a
    conversation are formatted with the tokenizer's chat template, followed by the beginning of the assistant's turn. If
    the last message is the assistant's, the completion continues it.

    Args:
        tokenizer: A tokenizer of transformers.
        template_options: Keyword arguments of the chat template, such as ``{"enable_thinking": False}``.
    """

    def __init__(self, tokenizer: Any, template_options: Mapping[str, Any] | None = None) -> None:
        if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
            raise TypeError(f"tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}")
        self.tokenizer, self.template_options = tokenizer, dict(template_options or {})

    def __call__(self, prompt: Any) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            TypeError: It is neither a text nor a list of messages.
            ValueError: It has no tokens, or the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            tokens = self.plain(prompt, special=True)
        elif is_conversation(prompt):
            tokens = self.plain(self.formatted(prompt))
        else:
            raise TypeError(
                'a prompt must be a text or a list of messages {"role": …, "content": …}, got'
                f" {type(prompt).__name__} {str(prompt)[:60]!r}"
            )
        if not tokens:
            raise ValueError(f"the prompt {prompt!r} has no tokens")
        return tokens

    def plain(self, text: str, special: bool = False) -> list[int]:
        """Return the tokens of a text, with or without the tokenizer's special tokens."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def formatted(self, messages: Sequence[Mapping[str, Any]], complete: bool = False) -> str:
        """Return a conversation as a text, up to where the assistant continues.

        Args:
            messages: The messages.
            complete: Whether the conversation is complete, so that the assistant does not continue it.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                "the prompt is a conversation, and the tokenizer has no chat template: set tokenizer.chat_template, or"
                " pass prompts as texts"
            )
        begun = not complete and messages[-1]["role"] == "assistant"
        return str(
            self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=not complete and not begun,
                continue_final_message=begun,
                **self.template_options,
            )
        )


def with_completion(prompt: Any, completion: str) -> tuple[Any, Any]:
    """Return a prompt and its completion in the form that reward functions get.

    The completion of a text is a text. That of a conversation is a list with one message of the assistant. If the
    prompt has begun the assistant's turn, this beginning is part of the completion.
    """
    if isinstance(prompt, str):
        return prompt, completion
    messages = list(prompt)
    if messages[-1]["role"] == "assistant":
        completion = str(messages.pop()["content"]) + completion
    return messages, [{"role": "assistant", "content": completion}]


def padding_token(tokenizer: Any) -> int:
    """Return the padding token: the tokenizer's, or its end of text, or 0. It is masked, so any token will do."""
    tokens = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(int(token) for token in tokens if token is not None)


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows of tokens padded on the left, and the attention mask, ``[rows, T]`` each."""
    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
