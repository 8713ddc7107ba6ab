"""Choosing parameters by pattern."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from language_models import adapted, language_model
from torch import nn

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.llm import trainable_parameters


def names(model: nn.Module, *args: Any, **options: Any) -> list[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in trainable_parameters(model, *args, **options)]


@pytest.mark.parametrize(
    "target",
    [
        "all-linear",
        ["q_proj", "v_proj"],
        ["layers.1.self_attn.q_proj"],
        r".*\.(q|k)_proj",
        r"model\.layers\.0\.mlp\.\w+_proj",
        ["o_proj", "down_proj"],
    ],
)
def test_the_modules_that_peft_would_choose(target: Any) -> None:
    model = adapted(language_model(), target_modules=target)
    expected = {
        name.removeprefix("base_model.model.").partition(".lora_A")[0] + ".weight"
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }
    assert set(names(language_model(), target)) == expected
    assert expected


def test_exclusion_as_in_peft() -> None:
    options: Any = {"target_modules": "all-linear", "exclude_modules": ["down_proj", "self_attn.o_proj"]}
    model = adapted(language_model(), **options)
    assert len(names(language_model(), **options)) == sum(".lora_A." in name for name, _ in model.named_parameters())


def test_a_module_stands_for_all_below_it_and_parameters_have_paths_too() -> None:
    model = language_model()
    below = names(model, ["layers.0.self_attn"])
    assert below == [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"]
    assert names(model, ["input_layernorm.weight"]) == [f"model.layers.{i}.input_layernorm.weight" for i in range(2)]
    assert names(model, r"model\.norm", exclude_modules=None) == ["model.norm.weight"]


def test_each_once_in_the_models_order() -> None:
    model = language_model()
    chosen = names(model, ["v_proj", "self_attn", "q_proj"])
    assert chosen == [name for name, _ in model.named_parameters() if "self_attn" in name]


def test_tied_parameters_by_either_name() -> None:
    model = language_model()
    assert names(model, ["lm_head"]) == names(model, ["embed_tokens"]) == ["model.embed_tokens.weight"]


def test_the_rest_stays_as_it_is() -> None:
    model = language_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(6, 10)[None]
    trainer = EGGROLLTrainer(
        trainable_parameters(model, ["q_proj"]),
        model=model,
        fitness_fn=lambda model: model(input_ids=ids, use_cache=False).logits.square().mean(),
        population_size=4,
        seed=0,
    )
    trainer.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == names(model, ["q_proj"])


def test_layers_of_gpt2_are_linear() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=8))
    assert sum(p.ndim == 2 for p in trainable_parameters(model)) == 4


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "a misspelt name": (
        language_model,
        {"target_modules": ["q_proj", "query"]},
        ValueError,
        "target_modules: 'query' matches no module of LlamaForCausalLM; there are model, embed_tokens, layers",
    ),
    "part of a name": (language_model, {"target_modules": ["proj"]}, ValueError, "'proj' matches no module"),
    "an expression for a part": (language_model, {"target_modules": "q_proj"}, ValueError, "'q_proj' matches no"),
    "exclusion": (
        language_model,
        {"target_modules": ["q_proj"], "exclude_modules": ["k"]},
        ValueError,
        "exclude_modules: 'k' matches no module",
    ),
    "no strings": (language_model, {"target_modules": [3]}, TypeError, "target_modules must be strings, got int 3"),
    "all excluded": (
        language_model,
        {"target_modules": ["q_proj"], "exclude_modules": ["self_attn"]},
        ValueError,
        "leave nothing to train: no floating-point parameter",
    ),
    "integers": (Frozen, {"target_modules": ["table"]}, ValueError, "no floating-point parameter"),
    "no linear layers": (Frozen, {}, ValueError, "Frozen has no linear layers; name modules in target_modules"),
    "no module": (lambda: "llama", {}, TypeError, "model must be a torch.nn.Module, got str"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_input(row: str) -> None:
    make, options, error, text = BAD[row]
    with pytest.raises(error) as caught:
        trainable_parameters(make(), **options)
    assert text in str(caught.value)
