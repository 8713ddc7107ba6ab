"""Adapters and merged weights, loaded again by PEFT and transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import load
from tiny_models import tiny_model, tokens
from torch import nn

from eggroll_trainer import EGGROLLTrainer, VanillaESTrainer

pytest.importorskip("transformers")
pytest.importorskip("peft")

from eggroll_trainer.llm.adapters import AdapterWriter  # noqa: E402
from eggroll_trainer.llm.export import changes_of, save_merged, weights_of, write_update  # noqa: E402
from eggroll_trainer.llm.members import write_adapters  # noqa: E402

MODELS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "gpt2": {}, "untied": {"tie_word_embeddings": False}}
# Float32; logits are of the order of 1.
TOLERANCE = 1e-5


def make_model(name: str) -> Any:
    return tiny_model("llama" if name == "untied" else name, **MODELS[name])


def trainer_of(model: nn.Module, fitness: Callable[..., float] = lambda model: 0.0, **options: Any) -> EGGROLLTrainer:
    settings = {"population_size": 8, "noise_reuse": 2, "sigma": 0.05, "seed": 0, "freeze_nonlora": True, **options}
    settings.setdefault("coalesce", False)
    return EGGROLLTrainer(model=model, fitness_fn=fitness, **settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def quiet(model: nn.Module) -> float:
    """A score with a known best: small logits."""
    return -logits(model).square().mean().item()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_the_member(name: str, rank: int, tmp_path: Path) -> None:
    model = make_model(name)
    population = trainer_of(model, rank=rank).ask()
    # Several in one model, as a server has them.
    folders = write_adapters(population, tmp_path, members=[0, 1, 5])
    adapted = load(model, *folders)
    assert distance(logits(population.member(0)), logits(model)) > 0.1
    for folder, member in zip(folders, [0, 1, 5], strict=True):
        adapted.set_adapter(folder.name)
        assert distance(logits(adapted), logits(population.member(member))) < TOLERANCE
    with adapted.disable_adapter():
        assert distance(logits(adapted), logits(model)) == 0


def test_ranks_of_groups_and_small_matrices_are_filled_up_to_one(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=12, intermediate_size=40, num_attention_heads=2, num_key_value_heads=1)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if "proj" in name and "mlp" not in name], "rank": 2},
        {"params": [p for name, p in named.items() if "mlp" in name], "rank": 5},
    ]
    population = trainer_of(model, params=groups).ask()
    # The keys' matrix [6, 12] has fewer entries than its factors of rank 5 would, and is not perturbed by these.
    groups[0]["rank"] = 5
    small = trainer_of(model, params=groups).ask()
    assert len(small.lora(0)) < len(population.lora(0)) == len(population.names) == len(small.names)
    for which, rank in ((population, 5), (small, 6)):
        [folder] = write_adapters(which, tmp_path / str(rank), members=[3])
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank
        assert distance(logits(load(model, folder)), logits(which.member(3))) < TOLERANCE


def test_full_rank_members_of_a_vanilla_trainer(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attention = [p for name, p in model.named_parameters() if "q_proj" in name]
    trainer = VanillaESTrainer(attention, model, lambda model: 0.0, population_size=4, sigma=0.05, seed=0)
    population = trainer.ask()
    [folder] = write_adapters(population, tmp_path, members=[2])
    assert distance(logits(load(model, folder)), logits(population.member(2))) < TOLERANCE


def test_norms_are_refused_or_stored_whole(tmp_path: Path) -> None:
    model = tiny_model("llama")
    population = trainer_of(model, freeze_nonlora=False).ask()
    with pytest.raises(ValueError, match="norm.*freeze_nonlora=True"):
        write_adapters(population, tmp_path)
    assert not any(tmp_path.iterdir()), "nothing is left behind"
    folders = write_adapters(population, tmp_path, members=[0, 1], full_rank="save")
    adapted = load(model, *folders)
    for member, folder in enumerate(folders):
        adapted.set_adapter(folder.name)
        assert distance(logits(adapted), logits(population.member(member))) < TOLERANCE


def test_names_say_what_the_adapter_is(tmp_path: Path) -> None:
    model = tiny_model("llama")
    queries = [p for name, p in model.named_parameters() if "q_proj" in name]
    trainer = trainer_of(model, params=queries)
    [first] = write_adapters(trainer.ask(), tmp_path, members=[7], base_model="some/model")
    trainer.tell(torch.arange(8.0))
    [second] = write_adapters(trainer.ask(), tmp_path, members=[7])
    assert (first.name, second.name) == ("generation-1-member-7", "generation-2-member-7")
    config = json.loads((first / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"] and config["base_model_name_or_path"] == "some/model"
    one_layer = trainer_of(model, params=queries[:1]).ask()
    [third] = write_adapters(one_layer, tmp_path / "one", members=[0])
    config = json.loads((third / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"], "not that of every layer"
    assert len(write_adapters(one_layer, tmp_path / "all")) == 8


class Shared(nn.Module):
    """A layer at two places, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(9, 9, bias=False)
        self.two = self.one
        self.bare = nn.Parameter(torch.zeros(9, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)) @ self.bare


@pytest.mark.parametrize(
    ("name", "dense", "message"),
    [
        ("one.weight", {}, "PEFT has no adapter for 'one.weight', a parameter of one .Linear. and two .Linear."),
        ("bare", {}, "PEFT has no adapter for 'bare', a parameter of the model .Shared."),
        (None, {}, "no parameter has changed"),
        (None, {"bare": torch.ones(9, 9)}, "without its matrix"),
    ],
)
def test_what_an_adapter_cannot_hold(name: str | None, dense: Any, message: str, tmp_path: Path) -> None:
    factors = {} if name is None else {name: (torch.ones(9, 1), torch.ones(9, 1))}
    with pytest.raises(ValueError, match=message):
        AdapterWriter(Shared(), full_rank="save").write(tmp_path / "adapter", factors, dense)
    assert not (tmp_path / "adapter").exists()


def test_bad_arguments(tmp_path: Path) -> None:
    model = tiny_model("llama")
    population = trainer_of(model).ask()
    with pytest.raises(TypeError, match=r"what trainer.ask\(\) returns, got LlamaForCausalLM"):
        write_adapters(model, tmp_path)
    with pytest.raises(ValueError, match='full_rank must be "error" or "save", got \'keep\''):
        write_adapters(population, tmp_path, full_rank="keep")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="member 8 of a population of 8"):
        write_adapters(population, tmp_path, members=[8])
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        AdapterWriter("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        write_update(model, {}, tmp_path, rank=0)


# The update.


def trained(name: str = "llama", generations: int = 4, **options: Any) -> EGGROLLTrainer:
    trainer = trainer_of(make_model(name), quiet, learning_rate=0.5, population_size=16, **options)
    trainer.train(generations, verbose=False)
    return trainer


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_update_at_full_rank_is_the_trained_model(name: str, tmp_path: Path) -> None:
    initial, trainer = make_model(name), trained(name)
    update = write_update(trainer.model, changes_of(trainer), tmp_path, rank=32, evaluate=trainer.evaluate_fitness)
    assert distance(logits(load(initial, tmp_path)), logits(trainer.model)) < TOLERANCE
    assert distance(logits(initial), logits(trainer.model)) > 0.1
    assert min(update.energy.values()) == pytest.approx(1) and update.total == pytest.approx(1)
    assert update.score == trainer.evaluate_fitness(trainer.model)
    assert update.score_kept == pytest.approx(update.score, rel=1e-4)


def test_the_update_at_a_rank_is_the_best_of_that_rank(tmp_path: Path) -> None:
    initial, trainer = make_model("llama"), trained()
    changes = changes_of(trainer)
    update = write_update(trainer.model, changes, tmp_path, rank=3, evaluate=trainer.evaluate_fitness)
    kept = {}
    adapted = load(initial, tmp_path)
    dense = {name: p.detach().clone() for name, p in initial.named_parameters()}
    for name, change in changes.items():
        U, S, Vh = torch.linalg.svd(change.double(), full_matrices=False)
        kept[name] = S[:3].square().sum(), S.square().sum()
        dense[name] += (U[:, :3] * S[:3] @ Vh[:3]).float()
        assert update.energy[name] == pytest.approx((kept[name][0] / kept[name][1]).item())
    expected = sum(part for part, _ in kept.values()) / sum(whole for _, whole in kept.values())
    assert update.total == pytest.approx(float(expected)) and 0.1 < update.total < 0.9
    oracle = copy.deepcopy(initial)
    oracle.load_state_dict(dense, strict=False)
    assert distance(logits(adapted), logits(oracle)) < TOLERANCE
    # The score with the adapter is what the adapter, loaded by PEFT, scores.
    assert update.score_kept == pytest.approx(quiet(adapted), rel=1e-4)
    assert update.score_kept != pytest.approx(update.score, rel=1e-3)
    lines = str(update).splitlines()
    assert lines[0] == f"rank 3 keeps {update.total:.1%} of the change's energy"
    assert "score" in lines[1] and len(lines) == 2 + len(changes)


def test_the_update_of_norms(tmp_path: Path) -> None:
    initial, trainer = make_model("llama"), trained(freeze_nonlora=False)
    with pytest.raises(ValueError, match="norm"):
        write_update(trainer.model, changes_of(trainer), tmp_path, rank=32)
    write_update(trainer.model, changes_of(trainer), tmp_path, rank=32, full_rank="save")
    assert distance(logits(load(initial, tmp_path)), logits(trainer.model)) < TOLERANCE


def test_changes_of_a_run_with_freezing(tmp_path: Path) -> None:
    trainer = trained()
    changes, weights = changes_of(trainer), weights_of(trainer)
    initial = dict(make_model("llama").named_parameters())
    for name, p in trainer.model.named_parameters():
        if name in changes:
            assert torch.equal(weights[name], p)
            assert torch.equal(changes[name], p.detach() - initial[name].detach())
    next(trainer.model.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="frozen or unfrozen during the run"):
        changes_of(trainer)


# Merged weights.


def reload(model: Any, folder: Path) -> Any:
    return type(model).from_pretrained(folder)


def test_merged_float32_is_the_model(tmp_path: Path) -> None:
    trainer = trained()
    merged = save_merged(trainer.model, tmp_path, evaluate=trainer.evaluate_fitness)
    assert merged.score == merged.score_saved and merged.dtype == torch.float32
    loaded = reload(trainer.model, tmp_path)
    assert distance(logits(loaded), logits(trainer.model)) == 0


def test_merged_rounded_is_scored_as_it_was_saved(tmp_path: Path) -> None:
    trainer = trained()
    merged = save_merged(trainer.model, tmp_path, dtype=torch.bfloat16, evaluate=trainer.evaluate_fitness)
    loaded = reload(trainer.model, tmp_path)
    assert loaded.dtype == torch.bfloat16, "the configuration says so"
    assert merged.score == quiet(trainer.model) and merged.score_saved == quiet(loaded)
    # Of logits with 8 bits each.
    assert merged.score != merged.score_saved == pytest.approx(merged.score, rel=2**-5)
    assert trainer.model.dtype == torch.float32


def test_masters_of_a_bf16_model(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model("llama").bfloat16(), quiet, learning_rate=0.01)
    trainer.train(2, verbose=False)
    save_merged(trainer.model, tmp_path, dtype=torch.float32, weights=weights_of(trainer))
    loaded = dict(reload(trainer.model, tmp_path).named_parameters())
    masters = weights_of(trainer)
    assert all(torch.equal(loaded[name], value) for name, value in masters.items())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters.values())
    with pytest.raises(ValueError, match="no parameter 'other'"):
        save_merged(trainer.model, tmp_path, weights={"other": torch.ones(1)})
