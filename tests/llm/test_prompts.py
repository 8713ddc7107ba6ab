"""From prompts to tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from language_models import ASSISTANT, END, PAD, USER, tokenizer

from eggroll_trainer.llm.prompts import PromptEncoder, left_padded, padding_token, with_completion

A, B = tokenizer()("a b")["input_ids"]
QUESTION = {"role": "user", "content": "a"}


def test_a_text() -> None:
    assert PromptEncoder(tokenizer())("a b") == [A, B]


def test_a_text_begins_with_what_the_tokenizer_begins_texts_with() -> None:
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert PromptEncoder(made)("a") == [1, A]
    # A chat template has written it already, if it is wanted.
    assert PromptEncoder(made)([QUESTION]) == [USER, A, END, ASSISTANT]


def test_a_conversation_up_to_the_assistants_turn() -> None:
    encoder = PromptEncoder(tokenizer())
    assert encoder([QUESTION]) == [USER, A, END, ASSISTANT]
    answer = {"role": "assistant", "content": "b"}
    assert encoder([QUESTION, answer, QUESTION]) == [USER, A, END, ASSISTANT, B, END, USER, A, END, ASSISTANT]


def test_a_turn_that_the_prompt_has_begun_goes_on() -> None:
    assert PromptEncoder(tokenizer())([QUESTION, {"role": "assistant", "content": "b"}]) == [
        *(USER, A, END, ASSISTANT, B),
    ]


def test_options_of_the_template() -> None:
    template = "{% if thinking %}a{% endif %} b"
    assert PromptEncoder(tokenizer(template))([QUESTION]) == [B]
    assert PromptEncoder(tokenizer(template), {"thinking": True})([QUESTION]) == [A, B]


def test_what_reward_functions_get() -> None:
    assert with_completion("a", "b") == ("a", "b")
    assert with_completion([QUESTION], "b") == ([QUESTION], [{"role": "assistant", "content": "b"}])
    begun = [QUESTION, {"role": "assistant", "content": "b "}]
    assert with_completion(begun, "a") == ([QUESTION], [{"role": "assistant", "content": "b a"}])
    assert len(begun) == 2


def test_padding() -> None:
    ids, mask = left_padded([[A, B], [A]], PAD, torch.device("cpu"))
    assert ids.tolist() == [[A, B], [PAD, A]]
    assert mask.tolist() == [[1, 1], [0, 1]]
    assert padding_token(tokenizer()) == PAD
    assert padding_token(tokenizer(pad_token=None)) == END
    assert padding_token(tokenizer(pad_token=None, eos_token=None)) == 0


BAD: dict[str, tuple[Any, str | None, type[Exception], str]] = {
    "a number": (
        3,
        None,
        TypeError,
        'a prompt must be a text or a list of messages {"role": …, "content": …}, got int',
    ),
    "no messages": ([], None, TypeError, "got list '[]'"),
    "texts": (["a", "b"], None, TypeError, "a prompt must be a text or a list of messages"),
    "nothing": ("", None, ValueError, "the prompt '' has no tokens"),
    "no template": ([QUESTION], None, ValueError, "the tokenizer has no chat template: set tokenizer.chat_template"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_prompts(row: str) -> None:
    prompt, template, error, text = BAD[row]
    with pytest.raises(error) as caught:
        PromptEncoder(tokenizer(template))(prompt)
    assert text in str(caught.value)


def test_no_tokenizer() -> None:
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer of transformers, got str"):
        PromptEncoder("gpt2")
