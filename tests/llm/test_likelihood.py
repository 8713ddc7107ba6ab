"""Log-probabilities of given answers and texts, against one sequence at a time with each member's own weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from language_models import ASSISTANT, END, SIZE, USER, adapted, language_model, population, tokenizer
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.llm import LogLikelihood, Perplexity
from eggroll_trainer.llm.teacher_forcing import divergences, log_probabilities, tiles

A, B, C, D = tokenizer()("a b c d")["input_ids"]
DATA = [
    {"prompt": "a b c", "answer": "d"},
    {"prompt": "e", "answer": "f g h i"},
    {"prompt": "j k l m n o", "answer": "p 0"},
    {"prompt": "b", "answer": "b"},
    {"prompt": "c d", "answer": "1 0 1"},
]
# Sums of a dozen log-probabilities of size 10 in float64, through a model of two layers.
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def log_likelihood(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """The log-probability of each token of the answer, by a forward over nothing else."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    return torch.stack([logits[len(prompt) + i - 1].log_softmax(0)[token] for i, token in enumerate(answer)])


def encoded(example: dict[str, str]) -> tuple[list[int], list[int]]:
    return tokenizer()(example["prompt"])["input_ids"], tokenizer()(example["answer"])["input_ids"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("logits_budget", [2**28, 1, 6 * SIZE * 8 * 12])
def test_answers(reduction: Any, end: bool, logits_budget: int) -> None:
    model = language_model()
    fitness = LogLikelihood(
        tokenizer(), DATA, prompts_per_generation=4, reduction=reduction, end=end, logits_budget=logits_budget
    )
    members = population(model)
    scores = fitness(members)
    assert scores.shape == (6, 4) and scores.dtype == torch.float64
    drawn = fitness.examples.drawn(4, members.seed, members.generation)
    for i in range(6):
        with members.holding(i):
            for column, example in enumerate(drawn):
                prompt, answer = encoded(example)
                each = log_likelihood(model, prompt, [*answer, END] if end else answer)
                expected = each.mean() if reduction == "mean" else each.sum()
                assert_equal(scores[i, column], expected)


def test_texts() -> None:
    model = language_model()
    texts = ["a b c", "d e f g h i", "0 1"]
    members = population(model)
    fitness = Perplexity(tokenizer(), texts, texts_per_generation=3, max_length=5)
    scores = fitness(members)
    drawn = [example["text"] for example in fitness.examples.drawn(3, members.seed, members.generation)]
    for i in range(6):
        with members.holding(i):
            for column, text in enumerate(drawn):
                first, *rest = tokenizer()(text)["input_ids"][:5]
                assert_equal(scores[i, column], log_likelihood(model, [first], rest).mean())


def test_evaluation_of_one_model() -> None:
    model = language_model()
    model.train()
    fitness = LogLikelihood(tokenizer(), DATA, prompts_per_generation=1)
    each = [log_likelihood(model, prompt, [*answer, END]) for prompt, answer in map(encoded, DATA)]
    for batch_size in (1, 2, 16):
        result = fitness.evaluate(model, batch_size=batch_size)
        assert_equal(result.scores, torch.stack([one.mean() for one in each]))
        assert result.score == pytest.approx(float(result.scores.mean()), abs=1e-12)
        assert result.tokens == sum(map(len, each)) == 16
        assert result.perplexity == pytest.approx(float(torch.cat(each).mean().neg().exp()), rel=1e-10)
    assert model.training
    assert fitness.evaluate(model, DATA[1:], n=2).scores.shape == (2,)
    assert str(fitness.evaluate(model)).startswith("score -")


def test_a_conversation() -> None:
    question = [{"role": "user", "content": "a"}]
    fitness = LogLikelihood(tokenizer(), [{"prompt": question, "answer": "b c"}], prompts_per_generation=1)
    model = language_model()
    prompt = [USER, A, END, ASSISTANT]
    expected = log_likelihood(model, prompt, [B, C, END]).mean()
    assert fitness.evaluate(model).score == pytest.approx(float(expected), abs=1e-12)

    def score(prompt: Any, answer: Any, **options: Any) -> float:
        data = [{"prompt": prompt, "answer": answer}]
        return LogLikelihood(tokenizer(), data, prompts_per_generation=1, **options).evaluate(model).score

    message = {"role": "assistant", "content": "b c"}
    assert score(question, [message]) == pytest.approx(float(expected), abs=1e-12)
    open_end = log_likelihood(model, prompt, [B, C]).mean()
    assert score(question, "b c", end=False) == pytest.approx(float(open_end), abs=1e-12)
    # A turn that the prompt has begun.
    begun = [*question, {"role": "assistant", "content": "b"}]
    rest = log_likelihood(model, [*prompt, B], [C, END]).mean()
    assert score(begun, " c") == pytest.approx(float(rest), abs=1e-12)


def test_a_tokenizer_that_begins_and_ends_texts() -> None:
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", END)]
    )
    fitness = LogLikelihood(made, [{"prompt": "a", "answer": "b"}], prompts_per_generation=1)
    tokens, count = fitness._encoded({"prompt": "a", "answer": " b"})
    assert (tokens[-count:], tokens[0]) == ([B, END], 1)


def test_adapters_of_peft() -> None:
    model = adapted(language_model(), init_lora_weights=False)
    members = population(model)
    fitness = LogLikelihood(tokenizer(), DATA, prompts_per_generation=5)
    scores = fitness(members)
    with members.holding(3):
        expected = fitness.evaluate(model, fitness.examples.drawn(5, members.seed, members.generation)).scores
    assert_equal(scores[3], expected)


def test_it_trains() -> None:
    fitness = LogLikelihood(tokenizer(), DATA, prompts_per_generation=4)
    model = language_model(dtype=torch.float32)
    trainer = EGGROLLTrainer(
        model=model, fitness_fn=fitness, population_size=64, noise_reuse=2, sigma=0.05, learning_rate=0.5, seed=0
    )
    before = fitness.evaluate(model).perplexity
    trainer.train(15, verbose=False)
    # From the size of the vocabulary to less than half of it.
    assert before > 20 and fitness.evaluate(model).perplexity < before / 2


def test_half_precision_is_summed_in_float32() -> None:
    logits = (50 * torch.randn(3, 4, 1000, generator=torch.Generator().manual_seed(0))).bfloat16()
    targets = torch.arange(12).view(3, 4)
    wide = logits.double().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    found = log_probabilities(logits, targets)
    assert found.dtype == torch.float32
    # Logarithms of sums of a thousand numbers, of size 200.
    torch.testing.assert_close(found.double(), wide, rtol=1e-6, atol=1e-5)


def test_divergences() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 4, 50, generator=generator, dtype=torch.float64)
    p[0, 0, 7] = -torch.inf
    q[0, 0, 7] = -torch.inf
    q[0, 0, 8] = -torch.inf
    p[0, 0, 8] = -torch.inf
    expected = nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True)
    # Of what p rules out nothing is added.
    expected[0, 0, 7:9] = 0.0
    torch.testing.assert_close(divergences(p, q), expected.sum(-1), rtol=0, atol=1e-12)
    assert (divergences(p, p) == 0).all()
    with pytest.raises(ValueError, match="they need the same vocabulary"):
        divergences(p, q[..., :-1])


def test_slices_of_rows_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = torch.randn(2, 5, 4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.arange(20).view(5, 4)
    whole = log_probabilities(p, targets), divergences(p, q)
    for rows in (0, 2):
        monkeypatch.setattr("eggroll_trainer.llm.teacher_forcing._SLICE", rows * 4 * 50 * 8)
        assert torch.equal(log_probabilities(p, targets), whole[0])
        assert torch.equal(divergences(p, q), whole[1])


def test_tiles_fit_and_cover_all_rows_in_order() -> None:
    lengths, counts = [3, 9, 4, 4, 12, 2], [1, 4, 3, 3, 2, 1]
    for budget in (1, 40, 100, 10**6):
        parts = list(tiles(lengths, counts, 2, budget))
        assert [i for first, last in parts for i in range(first, last)] == list(range(6))
        for first, last in parts:
            rows = list(zip(lengths, counts, strict=True))[first:last]
            places = max(length for length, _ in rows) - min(length - count for length, count in rows)
            assert last - first == 1 or 2 * (last - first) * (places + 1) <= budget
    assert list(tiles(lengths, counts, 2, 10**6)) == [(0, 6)]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "reduction": (
        {"prompts_per_generation": 1, "reduction": "max"},
        ValueError,
        'reduction must be "mean" or "sum", got \'max\'',
    ),
    "too many prompts": (
        {},
        ValueError,
        "prompts_per_generation=8 must be at most the number of examples, 5; lower it",
    ),
    "no budget": ({"prompts_per_generation": 1, "logits_budget": 0}, ValueError, "logits_budget must be at least 1"),
    "no column": ({"answer_key": "solution"}, ValueError, "dataset[0] has no column 'solution'"),
    "a number as answer": (
        {"dataset": [{"prompt": "a", "answer": 3}], "prompts_per_generation": 1},
        TypeError,
        "the answer to a prompt that is a text must be a text, got int",
    ),
    "a number as answer to a conversation": (
        {"dataset": [{"prompt": [{"role": "user", "content": "a"}], "answer": 3}], "prompts_per_generation": 1},
        TypeError,
        "an answer must be a text or a list of messages, got int",
    ),
    "no answer": (
        {"dataset": [{"prompt": "a", "answer": ""}], "prompts_per_generation": 1, "end": False},
        ValueError,
        "the answer to the prompt 'a' has no tokens",
    ),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_input(row: str) -> None:
    options, error, text = BAD[row]
    with pytest.raises(error) as caught:
        LogLikelihood(tokenizer(), **{"dataset": DATA, **options})
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "dataset, options, error, text",
    [
        (["a"], {}, ValueError, "the text 'a' has 1 tokens; at least two are needed to predict one"),
        ([{"text": 3}], {}, TypeError, "a text must be a string, got int"),
        (["a b"], {"max_length": 1}, ValueError, "max_length must be at least 2, got 1"),
        (
            ["a b"],
            {"texts_per_generation": 2},
            ValueError,
            "texts_per_generation=2 must be at most the number of examples",
        ),
    ],
)
def test_bad_texts(dataset: Any, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        Perplexity(tokenizer(), dataset, **{"texts_per_generation": 1, **options})
    assert text in str(caught.value)


def test_chunks_are_as_large_as_logits_allow() -> None:
    fitness, model = Perplexity(tokenizer(), ["a b c d e", "a b"], texts_per_generation=2), language_model()
    assert fitness.member_bytes(model) == 5 * SIZE * 8
