"""A PEFT model is trained like any module: an adapter comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import load, quiet
from tiny_models import tiny_model, tokens
from torch import nn

from eggroll_trainer import EGGROLLTrainer

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from eggroll_trainer.llm.export import save_merged  # noqa: E402
from eggroll_trainer.llm.members import write_adapters  # noqa: E402

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(name: str = "llama", targets: Any = TARGETS, **options: Any) -> Any:
    with quiet():
        config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options)
        return peft.get_peft_model(tiny_model(name), config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def likelihood(model: nn.Module) -> float:
    """The mean log-likelihood of some tokens."""
    log_p = logits(model)[:, :-1].log_softmax(-1)
    return log_p.gather(-1, tokens()[:, 1:, None]).mean().item()


def trainer_of(model: nn.Module, **options: Any) -> EGGROLLTrainer:
    settings = {"population_size": 32, "noise_reuse": 2, "sigma": 0.02, "learning_rate": 1.0, "seed": 0, **options}
    return EGGROLLTrainer(model=model, fitness_fn=likelihood, **settings)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_adapters_are_trained_and_nothing_else(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = trainer_of(model)
    # About -ln 61, by chance.
    start = likelihood(model)
    trainer.train(30, verbose=False)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "lora_" in key}
    assert likelihood(model) > start + 0.2

    model.save_pretrained(tmp_path)
    loaded = load(tiny_model(name), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    # What it was wrapped around is a model like any other, once they are merged.
    merged = save_merged(model, tmp_path / "merged", evaluate=likelihood)
    assert merged.score_saved == pytest.approx(merged.score, rel=1e-5)
    assert "lora" not in " ".join(dict(tiny_model(name).from_pretrained(tmp_path / "merged").named_parameters()))


def test_members_run_together() -> None:
    together, alone = trainer_of(adapted()), trainer_of(adapted(), coalesce=False)
    for _ in range(2):
        assert together.step()["mean_fitness"] == pytest.approx(alone.step()["mean_fitness"], rel=1e-5)


def test_members_as_adapters(tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_of(model)
    trainer.train(2, verbose=False)
    population = trainer.ask()
    # After training, so that no factor is zero.
    [folder] = write_adapters(population, tmp_path, members=[3])
    loaded = load(tiny_model("llama"), folder)
    assert (logits(loaded) - logits(population.member(3))).abs().max() < 1e-5
    assert (logits(loaded) - logits(model)).abs().max() > 1e-3


def test_adapters_on_tied_weights_are_not_merged(tmp_path: Path) -> None:
    model = adapted(targets=["embed_tokens", "lm_head", "q_proj"])
    trainer_of(model).train(1, verbose=False)
    with pytest.raises(ValueError, match="adds both to the shared weight"):
        save_merged(model, tmp_path)
