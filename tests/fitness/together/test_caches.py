"""Plain functions whose model is called with objects that hold tensors, or returns them: together as alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import DECODERS, VOCABULARY, build
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer

N = 6


def scores(model: nn.Module, function: Callable[[Any], float], coalesce: Any) -> list[float]:
    """Return the scores of two generations."""
    found: list[float] = []

    def noted(member: nn.Module) -> float:
        score = function(member)
        found.append(score)
        return score

    trainer = EGGROLLTrainer(
        model=model, fitness_fn=noted, population_size=N, sigma=0.2, learning_rate=0.1, seed=0, coalesce=coalesce
    )
    history = [trainer.step()["mean_fitness"] for _ in range(2)]
    assert found
    return [*history, *(float(p.detach().sum()) for p in model.parameters())]


def compare(make: Callable[[], nn.Module], function: Callable[[Any], float]) -> None:
    """Compare the scores and updates of members together, which gives no warning, with those alone."""
    together, alone = scores(make(), function, True), scores(make(), function, False)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-9, atol=1e-9)


@dataclasses.dataclass
class State:
    """A dataclass that a model returns, with a list that grows."""

    steps: list[Tensor]
    total: Tensor
    count: int = 0


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if state is None:
            state = State([], torch.zeros(len(x), 3, dtype=x.dtype))
        h = torch.tanh(self.layer(x + state.total))
        state.steps.append(h)
        state.total[:] = state.total + h
        state.count += 1
        return h * state.count, state


def stateful() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Stateful().double()


X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


def unroll(model: nn.Module) -> float:
    x, state, total = X, None, 0.0
    for _ in range(4):
        x, state = model(x, state)
        total += x.square().sum().item()
    assert state is not None and state.count == 4 and len(state.steps) == 4
    return total + state.total.sum().item() + sum(step.sum().item() for step in state.steps)


def test_an_object_of_the_users() -> None:
    compare(stateful, unroll)


def test_what_the_function_does_to_its_object() -> None:
    def function(model: nn.Module) -> float:
        y, state = model(X)
        state.total = state.total * 2
        state.steps.clear()
        y, state = model(y, state)
        return (y.sum() + state.total.sum()).item() + len(state.steps)

    compare(stateful, function)


def test_objects_of_other_shapes_are_other_calls() -> None:
    def function(model: nn.Module) -> float:
        y, state = model(X)
        if y.sum() > 0:
            y, state = model(y, state)
        y, state = model(y, state)
        return y.sum().item() + state.count

    compare(stateful, function)


def test_one_object_for_all_is_found() -> None:
    shared = State([], torch.zeros(4, 3, dtype=torch.float64))

    def function(model: nn.Module) -> float:
        y, _ = model(X, shared)
        return y.sum().item()

    with pytest.warns(RuntimeWarning) as warned:
        scores(stateful(), function, True)
    assert any("one and the same object" in str(w.message) or "alone" in str(w.message) for w in warned)


class Counted(nn.Module):
    """Called with an object that holds more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, state: Any) -> Tensor:
        state.pair = (state.pair[0] + x, state.pair[1] + 1)
        state.window = state.window[::-1]
        return self.layer(state.pair[0]) * state.pair[1] + state.window[0]


class Notes:
    def __init__(self, window: Any) -> None:
        self.pair = (torch.zeros(4, 3, dtype=torch.float64), 0)
        self.window = window


def counted() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Counted().double()


def test_tuples_of_tensors_and_numbers() -> None:
    def function(model: nn.Module) -> float:
        notes = Notes((1, 5))
        for _ in range(3):
            y = model(X, notes)
        return y.sum().item() + notes.pair[0].sum().item() + notes.pair[1] + notes.window[0]

    compare(counted, function)


def test_members_whose_objects_differ_are_not_put_together() -> None:
    calls = []

    def function(model: nn.Module) -> float:
        calls.append(1)
        notes = Notes((1, 5) if len(calls) % 2 else (2, 7))
        return model(X, notes).sum().item()

    # Which is which depends on the order: nothing can be compared with anything.
    with pytest.warns(RuntimeWarning):
        scores(counted(), function, True)


def test_arrays_in_objects_are_not_guessed() -> None:
    import numpy as np

    def function(model: nn.Module) -> float:
        return model(X, Notes(np.array([1.0, 2.0]))).sum().item()

    with pytest.warns(RuntimeWarning, match="Notes that holds a ndarray"):
        together = scores(counted(), function, True)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(scores(counted(), function, False)))


# Language models.

IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
ARCHITECTURES = [
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM",
    "Gemma2ForCausalLM", "PhiForCausalLM", "GPTNeoXForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM",
    "FalconForCausalLM", "MambaForCausalLM",
]  # fmt: skip


def forward(model: Any) -> float:
    with torch.no_grad():
        return float(model(input_ids=IDS, attention_mask=MASK).logits.square().mean())


def decode_by_hand(model: Any) -> float:
    tokens, cache, total = IDS, None, 0.0
    with torch.no_grad():
        for _ in range(3):
            # By position, as the name of the argument differs between releases.
            out = model(input_ids=tokens, use_cache=True, **({} if cache is None else {_cache_name(model): cache}))
            cache = out[_cache_name(out)] if isinstance(out, dict) else out[1]
            tokens = out.logits[:, -1:].argmax(-1)
            total += float(out.logits.mean()) + float(tokens.sum())
    return total


def _cache_name(owner: Any) -> str:
    if isinstance(owner, dict):
        return "past_key_values" if "past_key_values" in owner else "cache"
    import inspect

    return "cache" if "cache" in inspect.signature(owner.forward).parameters else "past_key_values"


def greedy(model: Any) -> float:
    tokens = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False)
    return float((tokens * torch.arange(tokens.shape[1])).sum())


def sampled(model: Any) -> float:
    tokens = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=5, do_sample=True)
    # What is drawn after it is the member's own as well.
    return float((tokens * torch.arange(tokens.shape[1])).sum()) + float(torch.rand(()))


def language_model(name: str) -> Callable[[], nn.Module]:
    transformers = pytest.importorskip("transformers")

    def make() -> nn.Module:
        model: Any = build(getattr(transformers, name), dict(DECODERS[name])).double()
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
        return model

    return make


@pytest.mark.parametrize("function", [forward, greedy, sampled])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "MambaForCausalLM"])
def test_a_language_model(name: str, function: Callable[[Any], float]) -> None:
    compare(language_model(name), function)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed")
def test_decoding_by_hand() -> None:
    compare(language_model("LlamaForCausalLM"), decode_by_hand)


@pytest.mark.slow
@pytest.mark.parametrize("function", [forward, greedy, sampled])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_language_models(name: str, function: Callable[[Any], float]) -> None:
    compare(language_model(name), function)
