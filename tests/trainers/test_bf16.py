"""Models in bf16 and fp16: parameters are rounded copies of float32 masters, so nothing drifts and nothing is lost."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import Custom, assert_same, network, population_regression, regression
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, ESTrainer, VanillaESTrainer

# Settings of these tests are not meant to learn fast.
pytestmark = pytest.mark.filterwarnings("ignore::eggroll_trainer.diagnostics.LearningWarning")

HALF = [torch.bfloat16, torch.float16]
# Distance of 1 from the next number below it, half of which is the smallest step that rounding lets through.
RESOLUTION = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make(dtype: torch.dtype, cls: Callable[..., ESTrainer] = EGGROLLTrainer, **options: Any) -> ESTrainer:
    defaults = {"model": network(dtype), "fitness_fn": regression(dtype), "learning_rate": 0.01, "optimizer": None}
    return helpers.make(cls, **{**defaults, **options})


def twin_of(model: nn.Module) -> nn.Module:
    """A float32 model with exactly the weights of a model in half precision."""
    twin = network()
    twin.load_state_dict(model.state_dict())
    return twin


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("cls", [EGGROLLTrainer, VanillaESTrainer, Custom])
@pytest.mark.parametrize("dtype", HALF)
def test_nothing_drifts(dtype: torch.dtype, cls: type[ESTrainer]) -> None:
    trainer = make(dtype, cls, learning_rate=0.0)
    before, flat = weights(trainer.model), trainer.current_params
    trainer.train(100, verbose=False)
    trainer.coalesce = False
    trainer.train(3, verbose=False)
    assert_same(weights(trainer.model), before)
    assert torch.equal(trainer.current_params, flat)


class Upwards(Custom):
    """Always the same step, whatever the fitness."""

    def evaluate_fitness(self, model: nn.Module) -> float:
        return 0.0

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        return torch.ones(len(self.current_params))


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("dtype", HALF)
def test_steps_below_the_resolution_add_up(dtype: torch.dtype, optimizer: Any) -> None:
    model = network(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    step = RESOLUTION[dtype] / 16
    trainer = make(dtype, Upwards, model=model, learning_rate=step, optimizer=optimizer)
    twin = make(torch.float32, Upwards, model=twin_of(model), learning_rate=step, optimizer=optimizer)
    trainer.step()
    twin.step()
    assert all((p == 1).all() for p in model.parameters()), "one step is lost in rounding, or the test tests nothing"
    for _ in range(199):
        trainer.step()
        twin.step()
    # The same arithmetic in float32, to the bit; what the model has is that, rounded.
    assert torch.equal(trainer.current_params, twin.current_params)
    assert_same(weights(model), weights(twin_of(twin.model).to(dtype)))
    assert all((p == 1 + 200 * step).all() for p in model.parameters()) or optimizer is not None
    # A resumed run has the masters, not their roundings.
    again = make(dtype, Upwards, learning_rate=step, optimizer=optimizer)
    again.load_state_dict(trainer.state_dict())
    assert torch.equal(again.current_params, trainer.current_params)


def errors_after(dtype: torch.dtype, generations: int, seeds: range) -> list[float]:
    """The final errors of one run for each seed, computed in float64."""
    judge = regression(torch.float64)
    found = []
    for seed in seeds:
        fitness = population_regression(dtype)
        trainer = make(dtype, fitness_fn=fitness, population_size=32, learning_rate=0.2, noise_reuse=2, seed=seed)
        trainer.train(generations, verbose=False)
        found.append(-judge(trainer.model.double()))
    return found


@functools.cache
def float32_errors() -> list[float]:
    return errors_after(torch.float32, 80, range(10))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_learns_as_well_as_in_float32(dtype: torch.dtype) -> None:
    full, half = float32_errors(), errors_after(dtype, 80, range(10))
    differences = [b - a for a, b in zip(full, half, strict=True)]
    # Were both as good, the mean of 10 differences over its standard error would follow Student's t with 9 degrees of
    # freedom, which exceeds 6 with a probability of 1e-4.
    tolerance = 6 * statistics.stdev(differences) / math.sqrt(len(differences))
    assert statistics.mean(differences) < tolerance
    # Which means something: the tolerance is a small part of what is learned.
    start = -regression(torch.float64)(network(torch.float64))
    assert tolerance < 0.01 * (start - statistics.mean(full))


@pytest.mark.parametrize("dtype", HALF)
def test_follows_what_others_write_into_the_model(dtype: torch.dtype) -> None:
    trainer = make(dtype)
    trainer.train(5, verbose=False)
    other = {name: value + 0.25 for name, value in network(dtype).state_dict().items()}
    trainer.model.load_state_dict(other)
    expected = torch.cat([value.float().flatten() for value in other.values()])
    assert torch.equal(trainer.current_params, expected)
    # The next step starts there: as that of a trainer that was made there.
    fresh = make(dtype)
    fresh.model.load_state_dict(other)
    fresh.generation = 5
    trainer.step()
    fresh.step()
    assert torch.equal(trainer.current_params, fresh.current_params)


@pytest.mark.parametrize("dtype", HALF)
def test_follows_writes_that_torch_does_not_count(dtype: torch.dtype) -> None:
    trainer = make(dtype)
    trainer.train(5, verbose=False)
    masters = trainer.current_params
    assert not torch.equal(masters, masters.to(dtype).float())
    first = next(trainer.model.parameters())
    mask = torch.arange(first.numel()).view_as(first) % 2 == 0
    first.data.masked_fill_(mask, 0.5)
    # Those weights are the model's, the others keep their digits below its resolution.
    expected = masters.clone()
    expected[: first.numel()][mask.flatten()] = 0.5
    assert torch.equal(trainer.current_params, expected)
    state = trainer.state_dict()
    assert torch.equal(torch.cat([v.flatten() for v in state["centre"]["parameters"].values()]), expected)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_masters_are_float32_or_wider(dtype: torch.dtype) -> None:
    trainer = make(dtype, optimizer=torch.optim.Adam)
    trainer.step()
    wide = torch.promote_types(dtype, torch.float32)
    assert trainer.current_params.dtype == trainer.initial_params.dtype == wide
    assert all(p.dtype == dtype for p in trainer.model.parameters())
    assert all(p.dtype == dtype for p in trainer.get_best_model().parameters())
    optimizer = trainer.state_dict()["centre"]["optimizer"]
    assert all(state["exp_avg"].dtype == wide for state in optimizer["state"].values())


@pytest.mark.parametrize("dtype", HALF)
def test_weights_to_go_back_to_are_kept_as_the_model_stores_them(dtype: torch.dtype, tmp_path: Path) -> None:
    trainer = make(dtype)
    before = weights(trainer.model)
    trainer.train(3, verbose=False)
    saved = trainer.state_dict()
    assert saved["initial_params"].dtype == saved["best_params"].dtype == dtype
    trainer.save(tmp_path / "run.pt")
    other = make(dtype)
    other.load(tmp_path / "run.pt")
    best = weights(trainer.get_best_model())
    assert torch.equal(torch.cat([value.flatten() for value in best]), saved["best_params"])
    assert all(map(torch.equal, best, weights(other.get_best_model())))
    for run in (trainer, other):
        run.reset()
        assert all(map(torch.equal, run.model.parameters(), before))
        assert torch.equal(run.current_params, run.initial_params)


def test_a_model_of_several_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 8, dtype=torch.bfloat16), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.bfloat16()).float())

    model = Mixed()
    trainer = make(torch.float32, model=model, learning_rate=0.05)
    before = trainer.evaluate_fitness(model)
    trainer.train(30, verbose=False)
    assert trainer.evaluate_fitness(model) > before
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    again = make(torch.float32, model=Mixed(), learning_rate=0.05)
    again.load_state_dict(trainer.state_dict())
    assert again.step() == trainer.step()
