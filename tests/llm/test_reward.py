"""The reward of completions, against each member's own weights, one prompt at a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from language_models import adapted, language_model, population, tokenizer
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population
from eggroll_trainer.llm import CompletionReward, pass_at_k

DATA = [
    {"prompt": prompt, "wanted": wanted} for prompt, wanted in [*zip(["a b c", "d", "e f g h i"], "jkl", strict=True)]
]
DATA += [{"prompt": "k l", "wanted": "m"}, {"prompt": "0 1 0", "wanted": "n"}]


def share(completions: Any, wanted: Any, **_: Any) -> list[float]:
    """How many of a completion's words are not before the wanted one in the alphabet."""
    pairs = zip(completions, wanted, strict=True)
    return [sum(word >= letter for word in text.split()) / 8 for text, letter in pairs]


def length(completion_ids: Any, **_: Any) -> list[int]:
    return [len(tokens) for tokens in completion_ids]


def make(**options: Any) -> CompletionReward:
    defaults = {"dataset": DATA, "reward_fn": share, "prompts_per_generation": 3, "max_new_tokens": 8}
    return CompletionReward(tokenizer(), **{**defaults, **options})


def drawn(reward: CompletionReward, members: Population) -> list[dict[str, Any]]:
    return reward.examples.drawn(reward.prompts_per_generation, members.seed, members.generation)


def complete(model: Any, prompt: str) -> list[int]:
    """The tokens of a greedy completion, without a batch and so without padding."""
    ids = torch.tensor([tokenizer()(prompt)["input_ids"]])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompts_per_call", [None, 1, 2])
def test_scores_are_those_of_each_members_own_weights(prompts_per_call: int | None) -> None:
    model = language_model()
    reward, members = make(prompts_per_call=prompts_per_call), population(model)
    scores = reward(members)
    assert scores.shape == (6, 3) and scores.dtype == torch.float64
    for i in range(6):
        with members.holding(i):
            for column, example in enumerate(drawn(reward, members)):
                tokens = complete(model, example["prompt"])
                text = tokenizer().decode(tokens, skip_special_tokens=True)
                assert float(scores[i, column]) == share([text], [example["wanted"]])[0]
    assert len(scores.unique()) > 3


def test_the_same_prompts_for_all_members_and_others_in_the_next_generation() -> None:
    seen: list[list[Any]] = []

    def watching(prompts: Any, completions: Any, **_: Any) -> list[float]:
        seen.append(prompts)
        return [0.0] * len(prompts)

    reward = make(reward_fn=watching, samples_per_prompt=2, temperature=1.0)
    first, second = (population(language_model(), 4, first=first) for first in (0, 4))
    reward(first)
    reward(second)
    assert seen[0] == seen[1] and len(seen[0]) == 4 * 3 * 2
    assert seen[0] == [prompt for prompt in seen[0][:6:2] for _ in range(2)] * 4
    first.generation = 1
    reward(first)
    assert seen[2] != seen[0]


def test_samples_are_averaged() -> None:
    members = population(language_model())
    each = make(samples_per_prompt=4, temperature=1.5, reward_fn=length)
    scores = each(members)
    completions = each.completer.by_members(
        members, [each.encoder(example["prompt"]) for example in drawn(each, members)], 4, ("completions", 0)
    )
    lengths = torch.tensor([[len(c.tokens) for c in own] for own in completions], dtype=torch.float64).view(6, 3, 4)
    assert torch.equal(scores, lengths.mean(2))
    best = make(samples_per_prompt=4, temperature=1.5, reward_fn=length, pass_at_k=2)
    assert torch.equal(best(members), pass_at_k(lengths, 2))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_members_are_independent_of_chunks_and_calls_of_prompts(temperature: float) -> None:
    options = {"temperature": temperature, "prompts_per_call": 1}
    scores = make(**options)(population(language_model(), 8))
    parts = [make(**options)(population(language_model(), 2, first=first)) for first in (0, 2, 4, 6)]
    assert torch.equal(scores, torch.cat(parts))


def test_several_functions_are_weighted() -> None:
    members = population(language_model())
    both = make(reward_fn=[share, length], reward_weights=[2.0, -0.1])(members)
    expected = 2 * make()(members) - 0.1 * make(reward_fn=length)(members)
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-14)


def test_conversations() -> None:
    seen: list[Any] = []

    def watching(prompts: Any, completions: Any, **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    prompts = [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c "}],
    ]
    make(dataset=[{"prompt": prompt} for prompt in prompts], reward_fn=watching, prompts_per_generation=2)(
        population(language_model(), 2)
    )
    assert len(seen) == 4
    for prompt, completion in seen:
        assert [message["role"] for message in (*prompt, *completion)] == ["user", "assistant"]
        assert completion[0]["content"].startswith("c ") == (prompt[0]["content"] == "b")


# The divergence from a reference model.


def divergence(model: Any, reference: Callable[[Tensor], Tensor], prompt: str) -> float:
    """Summed over the tokens of the greedy completion, from the whole distributions."""
    tokens = complete(model, prompt)
    ids = torch.tensor([[*tokenizer()(prompt)["input_ids"], *tokens]])
    with torch.no_grad():
        p, q = model(input_ids=ids).logits[0].log_softmax(-1), reference(ids)[0].log_softmax(-1)
    each = (p.exp() * (p - q)).sum(-1)
    return float(each[-len(tokens) - 1 : -1].sum())


# Sums of up to eight divergences of size 1 in float64, through a model of two layers.
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-10)


@pytest.mark.parametrize("logits_budget", [2**28, 1])
def test_penalty_for_the_divergence(logits_budget: int) -> None:
    model = language_model()
    base = copy.deepcopy(model)
    options = {"logits_budget": logits_budget, "prompts_per_call": 2}
    members = population(model)
    reward = make(reference=base, kl_penalty=0.25, **options)
    found = (make()(members) - reward(members)) / 0.25
    for i in range(6):
        with members.holding(i):
            for column, example in enumerate(drawn(reward, members)):
                expected = divergence(model, lambda ids: base(input_ids=ids).logits, example["prompt"])
                assert expected > 0.01
                assert_equal(float(found[i, column]), expected)


def test_adapters_diverge_from_the_model_without_them() -> None:
    model = adapted(language_model(), init_lora_weights=False)
    plain = language_model()
    members = population(model, 4)
    reward = make(kl_penalty=1.0)
    found = make()(members) - reward(members)
    assert reward.evaluate(model).kl is not None
    with members.holding(2):
        for column, example in enumerate(drawn(reward, members)):
            expected = divergence(model, lambda ids: plain(input_ids=ids).logits, example["prompt"])
            assert_equal(float(found[2, column]), expected)


def test_a_penalty_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="kl_penalty needs a model to compare with: pass reference="):
        make(kl_penalty=0.1)(population(language_model()))
    model = language_model()
    with pytest.raises(ValueError, match="reference is the model that is trained, and moves with it: pass a copy"):
        make(reference=model)(population(model))


def test_a_model_that_ends_at_once_does_not_diverge() -> None:
    model = language_model()
    options: dict[str, Any] = {"generation_kwargs": {"eos_token_id": list(range(25))}}
    members = population(model)
    reward = make(reference=copy.deepcopy(model), kl_penalty=1.0, reward_fn=length, **options)
    # One token each, which counts.
    assert (reward(members) < 1).all()


# Evaluation of one model.


def test_evaluation() -> None:
    model = language_model()
    model.train()
    other = language_model(seed=1)
    reward = make(reference=other)
    state = torch.get_rng_state()
    result = reward.evaluate(model, batch_size=2)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    model.eval()
    texts = [tokenizer().decode(complete(model, example["prompt"]), skip_special_tokens=True) for example in DATA]
    rewards = share(texts, [example["wanted"] for example in DATA])
    assert result.completions == [[text] for text in texts]
    assert result.prompts == [example["prompt"] for example in DATA]
    assert result.rewards.tolist() == [[value] for value in rewards]
    assert result.reward == pytest.approx(sum(rewards) / 5, abs=1e-15)
    assert result.each == {"share": pytest.approx(result.reward, abs=1e-15)}
    assert result.pass_at_k == {1: pytest.approx(result.reward, abs=1e-15)}
    assert result.length == sum(len(complete(model, example["prompt"])) for example in DATA) / 5
    kl = [divergence(model, lambda ids: other(input_ids=ids).logits, example["prompt"]) for example in DATA]
    assert result.kl == pytest.approx(sum(kl) / 5, abs=1e-10)
    assert make().evaluate(model, DATA[:2], n=1).kl is None


def test_evaluation_by_samples() -> None:
    reward, model = make(reward_fn=length), language_model()
    result = reward.evaluate(model, samples_per_prompt=5, temperature=2.0, n=3)
    assert result.rewards.shape == (3, 5) and list(result.pass_at_k) == [1, 2, 4]
    for k, value in result.pass_at_k.items():
        assert value == pytest.approx(float(pass_at_k(result.rewards, k).mean()), abs=1e-14)
    again = reward.evaluate(model, samples_per_prompt=5, temperature=2.0, n=3)
    assert again.completions == result.completions
    assert reward.evaluate(model, samples_per_prompt=5, temperature=2.0, n=3, seed=1).completions != result.completions
    with pytest.raises(ValueError, match="samples_per_prompt=2 needs a temperature above 0"):
        reward.evaluate(model, samples_per_prompt=2)
    # Greedy completions are all the same: one is enough.
    assert make(samples_per_prompt=4, temperature=1.0).evaluate(model, temperature=0.0).rewards.shape == (5, 1)


def test_the_result_as_text() -> None:
    result = make(reward_fn=[share, length], reference=language_model(seed=1)).evaluate(language_model(), n=2)
    first, *lines = str(result).splitlines()
    assert first.startswith("reward ") and "share " in first and "length " in first and "KL " in first
    assert len(lines) == 2 and lines[0].startswith("  'a b c' → '")


# Training.


def trainer_of(reward: CompletionReward, model: nn.Module | None = None, **options: Any) -> EGGROLLTrainer:
    model = language_model(dtype=torch.float32) if model is None else model
    defaults: dict[str, Any] = {"population_size": 8, "noise_reuse": 2, "sigma": 0.05, "learning_rate": 0.2, "seed": 0}
    return EGGROLLTrainer(model=model, fitness_fn=reward, **{**defaults, **options})


def test_it_trains() -> None:
    def says_a(completions: Any, **_: Any) -> list[float]:
        return [text.split().count("a") / 4 for text in completions]

    reward = make(reward_fn=says_a, max_new_tokens=4, prompts_per_generation=4)
    model = language_model(dtype=torch.float32)
    trainer = trainer_of(reward, model, population_size=64, sigma=0.1, learning_rate=1.0)
    assert reward.evaluate(model).reward < 0.1
    trainer.train(15, verbose=False)
    assert reward.evaluate(model).reward > 0.8


def test_a_resume_has_the_same_bits() -> None:
    def run(generations: int) -> tuple[EGGROLLTrainer, CompletionReward]:
        reward = make(temperature=1.0, samples_per_prompt=2)
        trainer = trainer_of(reward, chunk_size=4)
        trainer.train(generations, verbose=False)
        return trainer, reward

    whole, told = run(2)
    half, _ = run(1)
    resumed, counted = run(0)
    resumed.load_state_dict(half.state_dict())
    resumed.step()
    assert torch.equal(whole.current_params, resumed.current_params)
    assert (told.tokens, told.metrics) == (counted.tokens, counted.metrics)


def test_metrics_are_means_over_all_chunks() -> None:
    model = language_model()
    reward = make(reward_fn=[share, length], reference=copy.deepcopy(model), kl_penalty=0.01)
    trainer = trainer_of(reward, model, chunk_size=2)
    lengths, shares = make(reward_fn=length), make()
    chunks = list(trainer.ask().chunks())
    each = {name: torch.cat([fn(chunk) for chunk in chunks]) for name, fn in {"n": lengths, "s": shares}.items()}
    trainer.step()
    metrics = reward.metrics
    assert sorted(metrics) == ["completion_length", "ended", "kl", "reward", "rewards/length", "rewards/share"]
    assert metrics["rewards/share"] == pytest.approx(float(each["s"].mean()), abs=1e-12)
    assert (
        metrics["rewards/length"] == metrics["completion_length"] == pytest.approx(float(each["n"].mean()), abs=1e-12)
    )
    assert metrics["reward"] == pytest.approx(metrics["rewards/share"] + metrics["rewards/length"], abs=1e-12)
    assert metrics["kl"] > 0 and 0 <= metrics["ended"] <= 1
    assert reward.tokens == int(each["n"].sum())


def test_a_prompt_to_which_no_function_applies_is_left_out() -> None:
    def some(completions: Any, wanted: Any, **_: Any) -> list[float | None]:
        return [None if letter == "j" else len(text) for text, letter in zip(completions, wanted, strict=True)]

    reward = make(reward_fn=some, prompts_per_generation=5)
    with pytest.warns(RuntimeWarning, match="not finite"):
        trainer_of(reward).step()
    assert torch.isfinite(torch.tensor(list(reward.metrics.values()))).all()


def test_half_precision() -> None:
    trainer = trainer_of(make(), language_model(dtype=torch.bfloat16), sigma=0.1)
    before = trainer.current_params
    assert trainer.step()["update_norm"] > 0
    assert trainer.current_params.dtype == torch.float32 and not torch.equal(before, trainer.current_params)
    assert next(trainer.model.parameters()).dtype == torch.bfloat16


def test_the_fitness_of_one_model() -> None:
    reward, model = make(prompts_per_generation=5), language_model()
    trainer = trainer_of(reward, model)
    assert trainer.evaluate_fitness(model) == pytest.approx(reward.evaluate(model).reward, abs=1e-12)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "greedy samples": ({"samples_per_prompt": 2}, ValueError, "samples_per_prompt=2 needs a temperature above 0"),
    "k above the samples": ({"pass_at_k": 2}, ValueError, "pass_at_k=2 needs as many samples: pass samples_per_prompt"),
    "no sample": ({"samples_per_prompt": 0}, ValueError, "samples_per_prompt must be at least 1, got 0"),
    "too many prompts": (
        {"prompts_per_generation": 6},
        ValueError,
        "prompts_per_generation=6 must be at most the number of",
    ),
    "no prompt in a call": ({"prompts_per_call": 0}, ValueError, "prompts_per_call must be at least 1, got 0"),
    "negative penalty": ({"kl_penalty": -1.0}, ValueError, "kl_penalty must be a finite number of at least 0"),
    "a name as reference": ({"reference": "llama"}, TypeError, "reference must be a torch.nn.Module, got str"),
    "no budget": ({"logits_budget": 0}, ValueError, "logits_budget must be at least 1, got 0"),
    "no column": ({"prompt_key": "question"}, ValueError, "dataset[0] has no column 'question'"),
    "no prompt": ({"dataset": [{"prompt": 3}]}, ValueError, "prompts_per_generation=3 must be at most"),
    "a number as prompt": (
        {"dataset": [{"prompt": 3, "wanted": "a"}], "prompts_per_generation": 1},
        TypeError,
        "a prompt must be a text or a list of messages",
    ),
    "a wrong function": (
        {"reward_fn": lambda solution: solution},
        ValueError,
        "needs solution; it is called with the keyw",
    ),
    "an argument twice": ({"generation_kwargs": {"max_length": 3}}, ValueError, "must not have 'max_length': pass max"),
    "half of the probability": ({"top_p": 0.5}, ValueError, "they need a temperature above 0"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_input(row: str) -> None:
    options, error, text = BAD[row]
    with pytest.raises(error) as caught:
        make(**options)
    assert text in str(caught.value)


def test_chunks_are_as_large_as_caches_allow() -> None:
    reward, model = make(samples_per_prompt=2, temperature=1.0, prompts_per_call=2), language_model()
    ids = torch.zeros(1, 5 + 8, dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    logits = 2 * 25 * 8
    expected = 2 * 2 * (sum(t.nbytes for t in tensors) + logits)
    assert reward.member_bytes(model) == expected
    # Half of the budget is for what an evaluation holds.
    trainer = trainer_of(reward, model, population_size=12, memory_budget=10 * expected)
    assert [len(chunk) for chunk in trainer.ask().chunks()] == [4, 4, 4]
    assert [len(chunk) for chunk in trainer_of(reward, model, memory_budget=1).ask().chunks()] == [2] * 4


def test_checks_leave_no_trace() -> None:
    def run(check: bool) -> Tensor:
        trainer = trainer_of(make(temperature=1.0, check=check), chunk_size=4)
        trainer.train(2, verbose=False)
        return trainer.current_params

    assert torch.equal(run(check=True), run(check=False))
