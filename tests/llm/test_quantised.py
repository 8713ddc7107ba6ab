"""Quantised base models with adapters on top, with the libraries that are installed."""

from __future__ import annotations

import copy
import importlib.util
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import quiet
from tiny_models import tiny_model, tokens
from torch import nn

from eggroll_trainer import EGGROLLTrainer

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from eggroll_trainer.llm import batch_quantised_layers, trainable_parameters, write_adapters  # noqa: E402


def torchao_int8(model: Any, **options: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(version=2, **options), filter_fn=_inner)


def torchao_dynamic(model: Any, **options: Any) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(version=2, **options), filter_fn=_inner)


def torchao_int4(model: Any) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    int4: Any = vars(torch)["int4"]
    quantize_(model, IntxWeightOnlyConfig(int4, PerGroup(32)), filter_fn=_inner)


def bitsandbytes(model: Any, bits: int) -> None:
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if not _inner(module, name):
            continue
        sizes = module.in_features, module.out_features
        layer: Any
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer.load_state_dict({"weight": module.weight.data.clone()}, strict=False)
        model.set_submodule(name, layer.to("cpu"))


def _inner(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


LIBRARIES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "torchao int8": ("torchao", torchao_int8),
    "torchao int4": ("torchao", torchao_int4),
    "bitsandbytes int8": ("bitsandbytes", lambda model: bitsandbytes(model, 8)),
    "bitsandbytes nf4": ("bitsandbytes", lambda model: bitsandbytes(model, 4)),
}


@pytest.fixture(autouse=True)
def quiet_libraries() -> Iterator[None]:
    """Let libraries warn of kernels that they lack on a CPU, and of torch's names."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        for library in ("torchao", "bitsandbytes"):
            if importlib.util.find_spec(library) is not None:
                warnings.simplefilter("ignore")
                importlib.import_module(library)
                warnings.simplefilter("error")
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture(params=LIBRARIES)
def quantised(request: pytest.FixtureRequest) -> Any:
    """A quantised model with adapters, and the names of its quantised layers."""
    library, quantise = LIBRARIES[request.param]
    pytest.importorskip(library)
    with quiet():
        model = tiny_model("llama", hidden_size=64, intermediate_size=128)
        quantise(model)
        names = batch_quantised_layers(model)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config).eval(), names


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def likelihood(model: nn.Module) -> float:
    log_p = logits(model)[:, :-1].log_softmax(-1)
    return log_p.gather(-1, tokens()[:, 1:, None]).mean().item()


def base_logits(model: Any) -> torch.Tensor:
    with model.disable_adapter():
        return logits(model)


def trainer_of(model: nn.Module, **options: Any) -> EGGROLLTrainer:
    settings = {"population_size": 16, "noise_reuse": 2, "sigma": 0.05, "learning_rate": 1.0, "seed": 0, **options}
    return EGGROLLTrainer(model=model, fitness_fn=likelihood, **settings)


def test_it_learns_and_the_base_stays(quantised: Any, tmp_path: Path) -> None:
    model, names = quantised
    assert len(names) == 2 * 7
    before = base_logits(model)
    start = likelihood(model)
    trainer = trainer_of(model)
    # A member that runs alone is a warning, and warnings are errors.
    trainer.train(15, verbose=False)
    assert likelihood(model) > start + 0.1
    assert torch.equal(base_logits(model), before)
    # A deep copy has the weights too.
    assert likelihood(trainer.get_best_model()) == pytest.approx(trainer.best_fitness, rel=1e-5)
    # Adapters and checkpoints hold what was learnt.
    trainer.save(tmp_path / "run.pt")
    expected = trainer.step()
    trainer.load(tmp_path / "run.pt")
    assert trainer.step() == expected
    with quiet():
        [folder] = write_adapters(trainer.ask(), tmp_path, members=[1])
        base = copy.deepcopy(model).unload()
        loaded = peft.PeftModel.from_pretrained(base, folder).eval()
    # After its state_dict(), which PEFT takes, a layer of 4 bits computes something else on CPUs with bf16 products.
    tolerance = 1e-2 if "Linear4bit" in str(model) else 1e-5
    assert (logits(loaded) - logits(trainer.ask().member(1))).abs().max() < tolerance


def test_one_call_for_all_members(quantised: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, names = quantised
    trainer = trainer_of(model, learning_rate=0.5)
    trainer.train(1, verbose=False)
    layer = dict(model.named_modules())[f"base_model.model.{names[0]}.base_layer"]
    rows = []
    own: Any = type(layer).__mro__[2]
    forward = own.forward

    def counting(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self is layer:
            rows.append(tuple(x.shape))
        return forward(self, x)

    population = next(trainer.ask().chunks())
    members = [logits(population.member(i)) for i in range(3)]
    monkeypatch.setattr(own, "forward", counting)
    with torch.no_grad():
        out = population(input_ids=tokens(), use_cache=False).logits
    # Before the first adapter all members share their inputs: 2 sentences.
    assert rows and set(rows) <= {(2, 7, 64), (16 * 2 * 7, 64)}
    assert len(rows) <= 3, "one call, and those by which the memory of one and two members is measured"
    for i, expected in enumerate(members):
        assert (out[i] - expected).abs().max() < 1e-5


def test_inputs_that_are_rounded_by_row_run_alone() -> None:
    pytest.importorskip("torchao")
    with quiet():
        model = tiny_model("llama", hidden_size=64, intermediate_size=128)
        torchao_dynamic(model)
        batch_quantised_layers(model)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM")).eval()
    trainer = trainer_of(model)
    # A rounding error of the batched call may become a whole step of an input.
    with pytest.warns(RuntimeWarning, match="one member at a time.* is off by"):
        trainer.step()
    unchecked = trainer_of(model, coalesce="unchecked")
    unchecked.train(2, verbose=False)


def test_layers_that_mix_rows_are_refused() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.granularity import PerTensor

    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    with quiet():
        torchao_dynamic(model, granularity=PerTensor())
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj \(Linear\) computes a row differently"):
        batch_quantised_layers(model)


def test_quantised_weights_are_not_chosen_for_training(quantised: Any) -> None:
    model, names = quantised
    with pytest.raises(ValueError, match="o_proj.weight' is quantised and cannot be perturbed: train an adapter"):
        trainable_parameters(model, ["o_proj"])
    with pytest.raises(ValueError, match="is frozen"):
        trainer_of(model, params=[model.get_parameter(f"base_model.model.{names[3]}.weight")])


def test_layers_are_copied_and_pickled() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 8)
    assert batch_quantised_layers(model, [model[0]]) == ["0"] == batch_quantised_layers(model, [model[0]])
    assert isinstance(model[0], nn.Linear) and type(model[0]) is not nn.Linear and type(model[2]) is nn.Linear
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0])
        assert torch.equal(other(x), model(x))
    # Gradients, outside of a population, as ever.
    model(x).sum().backward()
    assert model[0].weight.grad is not None
    # In two maps, one in the other.
    nested = torch.vmap(torch.vmap(model))(torch.stack([x, 2 * x])[:, None])
    assert torch.allclose(nested[:, 0], torch.stack([model(x), model(2 * x)]), atol=1e-6)


def test_bad_arguments() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ValueError, match="no quantised layers"):
        batch_quantised_layers(model)
    with pytest.raises(ValueError, match="no quantised layers"):
        batch_quantised_layers(model, [])
    with pytest.raises(TypeError, match="layers must be modules, got str"):
        batch_quantised_layers(model, ["0"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"1 \(ReLU\) is not a linear layer"):
        batch_quantised_layers(model, [model[1]])
