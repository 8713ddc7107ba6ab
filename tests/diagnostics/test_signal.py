"""Signal and noise of an estimate, against what is known: the gradient of a function that has one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import network
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, VanillaESTrainer
from eggroll_trainer.diagnostics import Signal, signal_of
from eggroll_trainer.fitness.scores import check_scores
from eggroll_trainer.update.estimate import Estimate, Terms


def terms_of(terms: Tensor, sigma: float = 1.0) -> Estimate:
    """Return the estimate that is the sum of terms ``[n, D]``."""
    squares = {"w": terms.double().square().sum()}
    return Estimate({"w": terms.sum(0)}, Terms(squares, len(terms), torch.ones(len(terms)), {"w": sigma}))


def found(estimate: Estimate) -> Signal:
    signal = signal_of(estimate)
    assert signal is not None
    return signal


@pytest.mark.parametrize("draws", [2, 6])
def test_the_split_half_cosine_is_the_average_over_all_ways_to_halve(draws: int) -> None:
    from itertools import combinations

    terms = torch.randn(draws, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3
    products, lengths = [], []
    for half in combinations(range(draws), draws // 2):
        chosen = torch.zeros(draws, dtype=torch.bool)
        chosen[list(half)] = True
        one, other = terms[chosen].sum(0), terms[~chosen].sum(0)
        products.append(one @ other)
        lengths.append(one @ one + other @ other)
    expected = 2 * torch.stack(products).mean() / torch.stack(lengths).mean()
    assert found(terms_of(terms)).split_half_cosine == pytest.approx(expected.item(), rel=1e-9)


def test_random_scores_have_no_signal_within_the_stated_error() -> None:
    # 300 estimates of 400 weights: the mean's standard error is 1/√300 of one's; six of them are exceeded with a
    # probability below 1e-8. The spread of 300 normal numbers is off by more than a quarter with one below 1e-9.
    generator = torch.Generator().manual_seed(1)
    signals = [found(terms_of(torch.randn(32, 400, generator=generator))) for _ in range(300)]
    cosines = torch.tensor([signal.split_half_cosine for signal in signals])
    error = signals[0].split_half_error
    assert abs(cosines.mean()) < 6 * error / math.sqrt(300)
    assert cosines.std().item() == pytest.approx(error, rel=0.25)


@pytest.mark.parametrize("trainer", [EGGROLLTrainer, VanillaESTrainer])
@pytest.mark.parametrize("members, noise_reuse, chunk_size", [(64, 0, None), (512, 2, None), (512, 0, 256)])
def test_the_estimated_cosine_is_the_one_with_the_gradient(
    trainer: type[EGGROLLTrainer | VanillaESTrainer], members: int, noise_reuse: int, chunk_size: int | None
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 2)).double()
    x, y = torch.randn(64, 6).double(), torch.randn(64, 2).double()

    def fitness(model: nn.Module) -> Tensor:
        return -(model(x) - y).square().mean()

    # A small sigma, so that the function is as good as linear.
    made = trainer(
        model=model, fitness_fn=fitness, population_size=members, sigma=1e-4, learning_rate=0.0, seed=3,
        noise_reuse=noise_reuse, chunk_size=chunk_size,
    )  # fmt: skip
    fitness(model).backward()
    true = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    squares, estimated, shares = [], [], []
    for _ in range(20):
        population = made.ask()
        scores = -(population(x) - y).square().mean((1, 2))
        estimate = made._method.estimate(check_scores(scores, 1))
        flat = torch.cat([-estimate.gradient[name].flatten() for name, _ in model.named_parameters()])
        squares.append(float(flat @ true / flat.norm() / true.norm()) ** 2)
        signal = found(estimate)
        estimated.append(signal.squared_cosine)
        shares.append(signal.explained_share)
        made.tell(scores)
    # A squared cosine has an error of √(2/D) at most; the mean of 20 is off by six of its own with a probability below
    # 1e-8. That of the share is √(2D)/N.
    count = len(true)
    assert sum(estimated) / 20 == pytest.approx(sum(squares) / 20, abs=6 * math.sqrt(2 / count / 20))
    draws = members // max(1, noise_reuse)
    assert sum(shares) / 20 == pytest.approx(1.0, abs=6 * math.sqrt(2 * count / 20) / draws + 0.02)


def test_numbers_of_a_custom_trainers_estimate_are_not_known() -> None:
    assert signal_of(Estimate({"w": torch.ones(3)})) is None


def test_the_metrics_have_them() -> None:
    x = torch.randn(16, 4)
    trainer = EGGROLLTrainer(model=network(), fitness_fn=lambda m: -m(x).square().mean(), population_size=64, seed=0)
    metrics = trainer.step()
    assert 0 < metrics["split_half_cosine"] < 1
    assert metrics["agreement"] == 0.0
    metrics = trainer.step()
    assert metrics["agreement"] > 0
    assert metrics["relative_update"] == pytest.approx(
        metrics["update_norm"] / (trainer.current_params.norm().item()), rel=0.05
    )


def test_the_traffic_light() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    trainer = EGGROLLTrainer(
        model=network(), fitness_fn=lambda m: -(m(x) - x[:, :2]).square().mean(), population_size=128, seed=0,
        learning_rate=0.1, noise_reuse=2,
    )  # fmt: skip
    assert trainer.status is None
    trainer.train(10, verbose=False)
    assert trainer.status == "green"
    constant = EGGROLLTrainer(model=network(), fitness_fn=lambda m: 1.0, seed=0)
    with pytest.warns(RuntimeWarning, match="the same fitness"):
        lights = [(constant.step(), constant.status)[1] for _ in range(4)]
    assert lights == ["yellow", "yellow", "red", "red"]


def test_steps_are_compared_after_a_parameter_was_frozen() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    model = network()
    trainer = EGGROLLTrainer(
        model=model, fitness_fn=lambda m: -(m(x) - x[:, :2]).square().mean(), population_size=256, seed=0,
        learning_rate=0.1, noise_reuse=2,
    )  # fmt: skip
    trainer.train(2, verbose=False)
    next(model.parameters()).requires_grad_(False)
    # The step before had more parameters.
    assert trainer.step()["agreement"] == 0.0
    assert trainer.step()["agreement"] > 0.1
