"""max_grad_norm: estimates that are too long are scaled down before the optimizer gets them."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from helpers import fitness, make, network, population_fitness

from eggroll_trainer import EGGROLLTrainer, VanillaESTrainer
from eggroll_trainer.fitness.scores import check_scores

raw = functools.partial(make, optimizer=None, shaping="raw", noise_reuse=2, fitness_fn=population_fitness)


def step_of(trainer: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    before = trainer.current_params
    metrics = trainer.step()
    return trainer.current_params - before, metrics


@pytest.mark.parametrize("cls", [EGGROLLTrainer, VanillaESTrainer])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_long_estimate_keeps_its_direction(cls: Any, chunk_size: int | None) -> None:
    free, told = step_of(raw(cls, chunk_size=chunk_size))
    length = free.norm().item() / 0.1
    assert told["grad_norm"] == pytest.approx(length, rel=1e-5)
    clipped, metrics = step_of(raw(cls, chunk_size=chunk_size, max_grad_norm=length / 3))
    torch.testing.assert_close(clipped, free / 3, rtol=1e-5, atol=1e-8)
    # What is told is the length before; the rest of the diagnosis is of the direction.
    for key in ("grad_norm", "split_half_cosine", "explained_share"):
        assert metrics[key] == pytest.approx(told[key], rel=1e-5), key
    assert metrics["update_norm"] == pytest.approx(0.1 * length / 3, rel=1e-5)


def test_a_short_estimate_stays_to_the_bit() -> None:
    free, clipped = raw(), raw(max_grad_norm=1e6)
    for _ in range(3):
        assert free.step() == clipped.step()
    assert torch.equal(free.current_params, clipped.current_params)


def test_the_optimizer_gets_what_torch_would_have_clipped() -> None:
    got: list[dict[str, torch.Tensor]] = []

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            got.append({str(i): p.grad.clone() for i, p in enumerate(self.param_groups[0]["params"])})
            return super().step(closure)

    # One norm over all parameters, as torch's function takes it. Constructed, a trainer tries its optimizer.
    most = 0.02
    raw(optimizer=Noting).step()
    whole = got[-1]
    parameters = [torch.nn.Parameter(torch.zeros_like(value)) for value in whole.values()]
    for parameter, gradient in zip(parameters, whole.values(), strict=True):
        parameter.grad = gradient
    before = torch.nn.utils.clip_grad_norm_(parameters, most)
    assert before > most
    raw(optimizer=Noting, max_grad_norm=most).step()
    for parameter, gradient in zip(parameters, got[-1].values(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-9)


def test_a_subclass_with_an_update_of_its_own() -> None:
    class Doubled(EGGROLLTrainer):
        def compute_update(self, perturbations: torch.Tensor, fitnesses: torch.Tensor) -> torch.Tensor:
            return 2 * super().compute_update(perturbations, fitnesses)

    trainer = raw(Doubled, max_grad_norm=0.01)
    assert trainer.step()["update_norm"] == pytest.approx(0.1 * 0.01, rel=1e-5)


def test_what_is_not_finite_is_refused_as_without_it() -> None:
    # Their sum overflows.
    trainer = raw(fitness_fn=lambda model: 1e300 * fitness(model), max_grad_norm=1.0)
    before = trainer.current_params
    with pytest.raises(ValueError, match="the update is not finite"):
        trainer.step()
    assert torch.equal(trainer.current_params, before)


def test_a_constant_fitness_has_no_length() -> None:
    trainer = make(fitness_fn=lambda model: 1.0, optimizer=None, max_grad_norm=1.0)
    metrics = trainer.step()
    assert metrics["grad_norm"] == metrics["update_norm"] == 0.0


def test_it_holds_from_the_next_generation_on_and_is_a_setting_of_the_run() -> None:
    trainer = raw()
    trainer.step()
    trainer.max_grad_norm = 0.01
    assert trainer.step()["update_norm"] == pytest.approx(0.001, rel=1e-4)
    assert trainer.settings().max_grad_norm == 0.01
    other = raw()
    with pytest.warns(RuntimeWarning, match=r"going on with max_grad_norm=None \(was 0.01\)"):
        other.load_state_dict(trainer.state_dict())
    # A logged generation brings its own along.
    free, twin = raw(), raw(max_grad_norm=0.01)
    twin.step()
    free.repeat(twin.last_generation)
    assert free.max_grad_norm == 0.01 and torch.equal(free.current_params, twin.current_params)
    trainer.max_grad_norm = -1.0
    with pytest.raises(ValueError, match="max_grad_norm must be a finite number above 0, got -1"):
        trainer.step()


def test_the_terms_are_those_of_smaller_weights() -> None:
    trainer = raw()
    population = trainer.ask()
    scores = population_fitness(population)
    whole = trainer._method.whole_estimate(check_scores(scores, 1))
    halves = trainer._method.whole_estimate(check_scores(scores / 2, 1))
    length = math.sqrt(sum(value.square().sum().item() for value in whole.gradient.values()))
    clipped = whole.clipped(length / 2)
    assert clipped.scale == pytest.approx(0.5)
    for name in whole.gradient:
        torch.testing.assert_close(clipped.gradient[name], halves.gradient[name])
        torch.testing.assert_close(clipped.terms.squares[name], halves.terms.squares[name])
    torch.testing.assert_close(clipped.terms.weights, halves.terms.weights)
    assert whole.clipped(None) is whole.clipped(2 * length) is whole


def test_frozen_and_padded_weights_do_not_move() -> None:
    model = network()
    model.get_submodule("0").requires_grad_(False)
    before = model.get_parameter("0.weight").clone()
    raw(model=model, max_grad_norm=0.01).step()
    assert torch.equal(model.get_parameter("0.weight"), before)
