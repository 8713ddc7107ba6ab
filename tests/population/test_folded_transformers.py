"""Unmodified models of transformers, folded: each member's tokens and outputs are those of its own weights."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from architectures import DECODERS, GROUPED, OTHERS, VOCABULARY, build
from torch import Tensor

from eggroll_trainer import EGGROLLTrainer, Population, batched
from eggroll_trainer.noise.keys import keyed_generator

N, Q, NEW = 4, 2, 5

# Eight architectures for every day; the others are slow tests.
DAILY = [
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel",
    "GPTNeoXForCausalLM", "OPTForCausalLM", "MambaForCausalLM",
]  # fmt: skip
EXTRA: dict[str, dict[str, Any]] = {
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 4, "sliding_window": 4},
    "Mamba2ForCausalLM": {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2,
                          "num_heads": 4, "head_dim": 8, "n_groups": 1},
    "RwkvForCausalLM": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "context_length": 32},
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": DECODERS["MixtralForCausalLM"],
    "OlmoeForCausalLM": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                            "shared_expert_intermediate_size": 12},
}  # fmt: skip
ENCODER_DECODERS = ["T5ForConditionalGeneration", "BartForConditionalGeneration"]
GREEDY = {"do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampled": {"do_sample": True, "top_p": 0.9},
    "static": {**GREEDY, "cache_implementation": "static"},
    "returns_three": {"do_sample": True, "num_return_sequences": 3},
    "no_cache": {**GREEDY, "use_cache": False},
}


@batched
def ranks(population: Population) -> Tensor:
    return torch.arange(float(len(population)))


def make(name: str, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> Population:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"not in transformers {transformers.__version__}")
    model: Any = build(getattr(transformers, name), dict(options)).to(dtype)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    trainer = EGGROLLTrainer(model=model, fitness_fn=ranks, population_size=N, sigma=0.2, seed=0)
    return next(iter(trainer.ask().chunks()))


def prompts(padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (Q, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, : 3 if padded else 0] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def repeated(inputs: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    return {name: value.repeat(times, 1) for name, value in inputs.items()}


def compare_generate(members: Population, inputs: dict[str, Tensor], **options: Any) -> None:
    """Compare the tokens of all members with those that each generates alone, to the end of its own."""
    with members.folded(rows=Q) as model:
        tokens = model.generate(**repeated(inputs, N), max_new_tokens=NEW, **options)  # type: ignore[operator]
    different = set()
    for i in range(N):
        own = tokens.unflatten(0, (N, -1))[i]
        with torch.random.fork_rng(), members.holding(i):
            torch.set_rng_state(keyed_generator(*members.member_key(i)).get_state())
            alone = members.model.generate(**inputs, max_new_tokens=NEW, **options)  # type: ignore[operator]
        assert torch.equal(own[:, : alone.shape[1]], alone)
        assert (own[:, alone.shape[1] :] == 0).all()
        different.add(str(alone.tolist()))
    assert len(different) > 1, "the members say all the same: nothing was tested"


def compare_logits(members: Population, inputs: dict[str, Tensor], tolerance: float) -> None:
    with members.folded(rows=Q) as model, torch.no_grad():
        logits = model(**repeated(inputs, N)).logits
    for i in range(N):
        with members.holding(i), torch.no_grad():
            alone = members.model(**inputs).logits
        torch.testing.assert_close(logits.unflatten(0, (N, -1))[i], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DAILY)
def test_generate(name: str, mode: str) -> None:
    # Where a row has only padding before a window of 4 tokens, Gemma 2 gives NaN, also by itself.
    inputs = prompts(padded=name != "Gemma2ForCausalLM")
    members = make(name, DECODERS[name])
    compare_generate(members, inputs, **MODES[mode])
    if mode == "greedy":
        compare_logits(members, inputs, 1e-9)


def test_beams() -> None:
    compare_generate(make("LlamaForCausalLM", DECODERS["LlamaForCausalLM"]), prompts(), num_beams=3, do_sample=False)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_is_right(name: str) -> None:
    members = make(name, EXPERTS[name], torch.float32)
    with warnings.catch_warnings():
        # It may say that members run one after the other.
        warnings.filterwarnings("ignore", "in population.folded")
        compare_generate(members, prompts(), do_sample=False)
        compare_logits(members, prompts(), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*(n for n in DECODERS if n not in (*DAILY, *EXPERTS)), *EXTRA, *ENCODER_DECODERS])
def test_generate_of_others(name: str, mode: str) -> None:
    options = DECODERS.get(name) or EXTRA.get(name) or OTHERS[name][0]
    if name == "RwkvForCausalLM" and mode == "static":
        pytest.skip("it has no static cache")
    with warnings.catch_warnings():
        # Bloom and RWKV run one member after the other, as what they do in a forward cannot be batched.
        if name in ("BloomForCausalLM", "RwkvForCausalLM"):
            warnings.filterwarnings("ignore", "in population.folded")
        compare_generate(make(name, options), prompts(padded=False), **MODES[mode])
