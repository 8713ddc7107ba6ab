"""Completions by all members at once are those of each member's own weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from language_models import END, PAD, SIZE, language_model, population, tokenizer
from transformers import T5Config, T5ForConditionalGeneration

from eggroll_trainer import Population
from eggroll_trainer.llm.completions import Completer, Decoding, trimmed
from eggroll_trainer.noise.keys import kept_rng, keyed_generator

PROMPTS = [[6, 7, 8], [9], [10, 11, 12, 13, 14]]
KEY = ("completions", 0)


def alone(model: Any, prompt: list[int], decoding: Decoding) -> list[int]:
    """The tokens that one model adds to one prompt, without a batch and so without padding."""
    arguments = decoding.arguments(model, tokenizer())
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), **arguments)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def rows_of(members: Population, decoding: Decoding, prompts: list[list[int]] = PROMPTS, **options: Any) -> Any:
    return Completer(tokenizer(), decoding).by_members(members, prompts, **{"samples": 1, "key": KEY, **options})


def test_greedy_completions_are_each_members_own() -> None:
    model, decoding = language_model(), Decoding(12)
    members = population(model)
    rows = rows_of(members, decoding)
    for i, own in enumerate(rows):
        with members.holding(i):
            assert [completion.tokens for completion in own] == [alone(model, p, decoding) for p in PROMPTS]
    # Some end early, some are cut off, and members differ: or else this shows nothing.
    ended = {completion.ended for own in rows for completion in own}
    assert ended == {True, False}
    assert len({str(own) for own in rows}) > 1


def test_sampled_completions_are_each_members_own() -> None:
    model, decoding = language_model(), Decoding(10, temperature=1.5, top_p=0.9, top_k=12)
    members = population(model)
    completer = Completer(tokenizer(), decoding)
    for i, own in enumerate(rows_of(members, decoding, samples=2)):
        with members.holding(i), kept_rng():
            torch.set_rng_state(keyed_generator(*members.member_key(i), *KEY).get_state())
            expected = completer.by_model(model, PROMPTS, samples=2)
        assert own == expected


@pytest.mark.parametrize("decoding", [Decoding(10), Decoding(10, temperature=1.0)], ids=["greedy", "sampled"])
def test_completions_do_not_depend_on_the_other_members(decoding: Decoding) -> None:
    all_of_them = rows_of(population(language_model(), 8), decoding)
    few = rows_of(population(language_model(), 2, first=4), decoding)
    assert all_of_them[4:6] == few


def test_completions_depend_on_member_generation_seed_and_key() -> None:
    decoding = Decoding(10, temperature=5.0)
    members = population(language_model())
    first = rows_of(members, decoding)
    assert first == rows_of(members, decoding)
    assert len({str([c.tokens for c in own]) for own in first}) == len(members)
    assert rows_of(population(language_model(), seed=6), decoding) != first
    members.generation += 1
    assert rows_of(members, decoding) != first
    members.generation -= 1
    assert rows_of(members, decoding, key=("completions", 1)) != first


@pytest.mark.parametrize(
    "row, pad, tokens, ended",
    [
        ([5, 6, 7], None, [5, 6, 7], False),
        ([5, END, PAD], None, [5, END], True),
        ([END, PAD, PAD], None, [END], True),
        ([5, 6, END], None, [5, 6, END], True),
        ([5, END, END], None, [5, END], True),
        # Written by the model itself.
        ([5, PAD, 6], None, [5, PAD, 6], False),
        ([5, 6, PAD], None, [5, 6, PAD], False),
        # Stopped by something else than a token; in the last row that was so for all.
        ([5, PAD, PAD], PAD, [5], True),
        ([5, END, PAD], PAD, [5, END], True),
        ([5, 6, 7], PAD, [5, 6, 7], False),
        ([5, 6], PAD, [5, 6], True),
    ],
)
def test_a_completion_ends_at_its_own_end(row: list[int], pad: int | None, tokens: list[int], ended: bool) -> None:
    assert trimmed(row, frozenset({END}), pad, 3) == (tokens, ended)


def test_texts_are_without_special_tokens_and_without_what_ended_them() -> None:
    # Here an ordinary word ends a completion.
    decoding = Decoding(12, temperature=3.0, options={"eos_token_id": 6})
    model = language_model()
    found = Completer(tokenizer(), decoding).by_model(model, PROMPTS, samples=20)
    by_word = [completion for completion in found if completion.ended]
    assert by_word and all(c.tokens[-1] == 6 and "a" not in c.text.split() for c in by_word)
    assert all(c.tokens.count(6) == c.ended for c in found)
    assert any(END in c.tokens for c in found)
    assert not any(special in c.text for c in found for special in ("</s>", "<pad>", "<user>"))


def test_strings_that_stop() -> None:
    decoding = Decoding(12, temperature=3.0, options={"stop_strings": ["b"]})
    found = Completer(tokenizer(), decoding).by_model(language_model(), PROMPTS, samples=20)
    stopped = [completion for completion in found if completion.text.split()[-1:] == ["b"]]
    assert stopped and all(completion.ended == (len(completion.tokens) < 12) for completion in stopped)
    assert all("b" not in completion.text.split()[:-1] for completion in found)


def test_beams() -> None:
    model, decoding = language_model(), Decoding(6, options={"num_beams": 2})
    members = population(model, 4)
    for i, own in enumerate(rows_of(members, decoding)):
        with members.holding(i):
            assert own == Completer(tokenizer(), decoding).by_model(model, PROMPTS, samples=1)


def test_the_models_own_distribution_is_sampled() -> None:
    model = language_model()
    plain = Completer(tokenizer(), Decoding(12)).by_model(model, PROMPTS, 1)
    model.generation_config.update(repetition_penalty=5.0, temperature=0.1, top_k=1, top_p=0.1)
    assert Completer(tokenizer(), Decoding(12)).by_model(model, PROMPTS, 1) == plain
    decoding = Decoding(2, temperature=50.0)
    found = Completer(tokenizer(), decoding).by_model(model, [[6]], 400)
    # Nearly uniform over the vocabulary: with top_k=1 there would be one.
    assert len({completion.tokens[0] for completion in found}) == SIZE
    penalised = Completer(tokenizer(), Decoding(12, options={"repetition_penalty": 5.0})).by_model(model, PROMPTS, 1)
    assert penalised != plain


def test_ends_are_the_models_and_the_tokenizers() -> None:
    model = language_model()
    model.generation_config.eos_token_id = [7, 8]
    assert Decoding(4).ends(model, tokenizer()) == [END, 7, 8]
    assert Decoding(4, options={"eos_token_id": 9}).ends(model, tokenizer()) == [9]
    model.generation_config.eos_token_id = None
    assert Decoding(4).ends(model, tokenizer(eos_token=None)) == []


def test_without_any_end_completions_are_of_full_length() -> None:
    model = language_model()
    model.generation_config.eos_token_id = None
    found = Completer(tokenizer(eos_token=None), Decoding(5)).by_model(model, PROMPTS, 1)
    assert [(len(c.tokens), c.ended) for c in found] == [(5, False)] * 3


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
    "half a token": ({"max_new_tokens": 0.5}, TypeError, "max_new_tokens must be an integer"),
    "cold": ({"temperature": -1.0}, ValueError, "temperature must be a finite number of at least 0"),
    "no mass": ({"temperature": 1.0, "top_p": 0.0}, ValueError, "top_p must be a finite number above 0"),
    "too much mass": ({"temperature": 1.0, "top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1, got 1.5"),
    "greedy with top_p": ({"top_p": 0.9}, ValueError, "they need a temperature above 0"),
    "greedy with top_k": ({"top_k": 3}, ValueError, "they need a temperature above 0"),
    "an argument among options": (
        {"options": {"do_sample": True}},
        ValueError,
        "generation_kwargs must not have 'do_sample': pass temperature=",
    ),
    "several sequences": (
        {"options": {"num_return_sequences": 2}},
        ValueError,
        "generation_kwargs must not have 'num_return_sequences': pass samples_per_prompt=",
    ),
    "another result": (
        {"options": {"return_dict_in_generate": True}},
        ValueError,
        "'return_dict_in_generate', which changes what generate() returns",
    ),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_input(row: str) -> None:
    options, error, text = BAD[row]
    with pytest.raises(error) as caught:
        Decoding(**{"max_new_tokens": 4, **options})
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "model", [torch.nn.Linear(2, 2), T5ForConditionalGeneration(T5Config(d_model=8, num_layers=1))]
)
def test_models_that_do_not_go_on_with_a_prompt(model: Any) -> None:
    with pytest.raises(TypeError, match="is not a causal language model of transformers"):
        Completer(tokenizer(), Decoding(4)).by_model(model, PROMPTS, 1)


def test_at_another_temperature() -> None:
    decoding = Decoding(4, temperature=1.0, top_p=0.5, options={"min_p": 0.1})
    assert decoding.at(0.0) == Decoding(4, options={"min_p": 0.1})
    assert decoding.at(0.5) == Decoding(4, temperature=0.5, top_p=0.5, options={"min_p": 0.1})
