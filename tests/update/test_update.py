"""The update: low-rank sums against the dense formula, and the estimate against known gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import randn
from scipy import stats
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, ESTrainer, Population, VanillaESTrainer, batched
from eggroll_trainer.fitness.shaping import SHAPERS
from eggroll_trainer.trainers.keyed import Keyed


class Everything(nn.Module):
    """A parameter of every kind: matrices large and small, kernels, vectors, a scalar, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 20)
        self.conv = nn.Conv2d(6, 12, 3)
        self.transposed = nn.ConvTranspose1d(12, 6, 5)
        self.embedding = nn.Embedding(30, 16)
        self.small = nn.Linear(2, 1)
        self.norm = nn.LayerNorm(7)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.ones(5, 5), requires_grad=False)


def model() -> Everything:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Everything().double()


def arbitrary_scores(population: Population) -> Tensor:
    return torch.tensor([math.sin(7.0 * i) for i in population.members])


KEYED = {
    "vanilla": VanillaESTrainer,
    "rank 1": EGGROLLTrainer,
    "rank 3": functools.partial(EGGROLLTrainer, rank=3),
    "rademacher": functools.partial(EGGROLLTrainer, rank=2, noise="rademacher"),
    "matrices only": functools.partial(EGGROLLTrainer, freeze_nonlora=True),
}


@pytest.mark.parametrize("make", KEYED.values(), ids=KEYED)
@pytest.mark.parametrize("reuse", [0, 2, 3])
@pytest.mark.parametrize("chunk_size", [None, 6])
class TestAgainstTheDenseFormula:
    def trainer(self, make: Any, reuse: int, chunk_size: int | None, **options: Any) -> ESTrainer:
        return make(
            model=model(),
            fitness_fn=batched(arbitrary_scores),
            population_size=24,
            learning_rate=0.5,
            sigma=0.3,
            seed=5,
            noise_reuse=reuse,
            chunk_size=chunk_size,
            **options,
        )

    @pytest.mark.parametrize("group_size", [0, 12])
    @pytest.mark.parametrize("shaping", [name for name in SHAPERS if name != "antithetic_sign"])
    def test_step(self, make: Any, reuse: int, chunk_size: int | None, shaping: str, group_size: int) -> None:
        trainer = self.trainer(make, reuse, chunk_size, shaping=shaping, group_size=group_size)
        before = trainer.current_params
        perturbations = trainer.sample_perturbations(24)
        fitnesses = torch.tensor([math.sin(7.0 * i) for i in range(24)])
        trainer.step()
        groups = [fitnesses.double()] if group_size == 0 else fitnesses.double().view(2, 12)
        weights = torch.cat([SHAPERS[shaping](group) for group in groups])
        step = sum(0.5 * math.sqrt(24) * w / 24 * p for w, p in zip(weights, perturbations, strict=True))
        difference = trainer.current_params - before - step
        assert difference.abs().max() <= 1e-10 * step.abs().max()

    def test_members_are_the_centre_and_their_perturbation(self, make: Any, reuse: int, chunk_size: int | None) -> None:
        trainer = self.trainer(make, reuse, chunk_size)
        population = Population(trainer.model, trainer._method.perturbations(0, 6))
        for i, perturbation in enumerate(trainer.sample_perturbations(24)[:6]):
            member = trainer._centre.flatten(population.member_parameters(i))
            difference = member - trainer.current_params - perturbation
            assert difference.abs().max() <= 1e-10 * perturbation.abs().max()

    def test_signs_alternate(self, make: Any, reuse: int, chunk_size: int | None) -> None:
        perturbations = self.trainer(make, reuse, chunk_size).sample_perturbations(24)
        for first in range(0, 24, max(1, reuse)):
            for use in range(1, reuse):
                assert torch.equal(perturbations[first + use], (-1) ** use * perturbations[first])
        distinct = perturbations[:: max(1, reuse)]
        assert not (distinct[1:] == distinct[:-1]).all(1).any()

    def test_scale(self, make: Any, reuse: int, chunk_size: int | None) -> None:
        trainer = self.trainer(make, reuse, chunk_size)
        deviation = trainer.sample_perturbations(24 * 30).square().mean().sqrt()
        # Mean of at least 720/3·2000 squares, rank-1 products correlated within rows: far within 5 %.
        assert abs(deviation / 0.3 - 1) < 0.05


def test_sign_shaping_with_pairs() -> None:
    trainer = EGGROLLTrainer(
        model=model(),
        fitness_fn=batched(arbitrary_scores),
        population_size=8,
        noise_reuse=2,
        shaping="antithetic_sign",
        seed=1,
    )
    before, perturbations = trainer.current_params, trainer.sample_perturbations(8)
    f = arbitrary_scores(Population(trainer.model, trainer._method.perturbations(0, 8)))
    trainer.step()
    step = 0.01 / math.sqrt(8) * sum(2 * (f[2 * k] - f[2 * k + 1]).sign() * perturbations[2 * k] for k in range(4))
    torch.testing.assert_close(trainer.current_params - before, step, rtol=1e-10, atol=1e-14)


def test_ranks_above_what_a_matrix_can_use_are_full() -> None:
    trainer = EGGROLLTrainer(model=model(), fitness_fn=batched(arbitrary_scores), rank=4, seed=1)
    assert isinstance(trainer._method, Keyed)
    ranks = {spec.name: spec.rank for spec in trainer._method.specs()}
    assert ranks["linear.weight"] == 4 and ranks["conv.weight"] == 4
    assert ranks["small.weight"] is None and ranks["linear.bias"] is None and ranks["scale"] is None
    assert "frozen" not in ranks


def test_groups_have_their_own_options() -> None:
    net = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30)).double()
    groups = [
        {"params": net[0].parameters(), "lr": 0.0},
        {"params": net[1].parameters(), "sigma": 0.5, "rank": 2},
    ]
    trainer = EGGROLLTrainer(
        groups, model=net, fitness_fn=batched(arbitrary_scores), population_size=400, sigma=0.1, seed=0
    )
    first = [p.clone() for p in net[0].parameters()]
    second = [p.clone() for p in net[1].parameters()]
    perturbations = trainer.sample_perturbations(400)
    assert torch.linalg.matrix_rank(perturbations[0, 930:1830].view(30, 30)) == 2
    assert torch.linalg.matrix_rank(perturbations[0, :900].view(30, 30)) == 1
    assert abs(perturbations[:, 930:].std() / 0.5 - 1) < 0.05 and abs(perturbations[:, :930].std() / 0.1 - 1) < 0.05
    trainer.step()
    assert all(map(torch.equal, first, net[0].parameters()))
    assert not any(map(torch.equal, second, net[1].parameters()))


# The estimate of a gradient. A bias-free linear layer W [O, I] at W = 0 with fitness ⟨G, W⟩: with antithetic pairs and
# raw scores the update divided by √N·σ² is ĝ = mean_k ⟨G, E_k⟩ E_k over n = N/2 draws E_k of unit variance, as it is
# for every quadratic with gradient G there, whose even part cancels in a pair.

O, I = 10, 14


def estimate(make: Callable[..., ESTrainer], G: Tensor, draws: int, seed: int, quadratic: bool = False) -> Tensor:
    layer = nn.Linear(I, O, bias=False).double()
    nn.init.zeros_(layer.weight)
    eye = torch.eye(I, dtype=torch.float64)

    @batched
    def fitness(population: Population) -> Tensor:
        weights = population(eye).mT  # [N, O, I]
        value = (G * weights).sum((1, 2))
        return value - 3 * weights.square().sum((1, 2)) if quadratic else value

    trainer = make(
        model=layer,
        fitness_fn=fitness,
        population_size=2 * draws,
        noise_reuse=2,
        learning_rate=1.0,
        sigma=0.1,
        shaping="raw",
        seed=seed,
    )
    trainer.step()
    return layer.weight.detach() / (math.sqrt(2 * draws) * 0.1**2)


def gradient() -> Tensor:
    return randn(O, I, seed=1, dtype=torch.float64)


@pytest.mark.parametrize("draws", [50, 400, 3200])
def test_cosine_with_the_gradient_at_full_rank(draws: int) -> None:
    # With Gaussian draws the part of ĝ along G is ‖G‖·m, n·m ~ χ²_n, and given m its square across is
    # ‖G‖²·m/n·χ²_{D-1}: n·tan²/(D-1) follows the F distribution with D-1 and n degrees of freedom, exactly.
    G, D = gradient(), O * I
    for seed in range(3):
        g = estimate(VanillaESTrainer, G, draws, seed, quadratic=True)
        cosine = float((g * G).sum() / g.norm() / G.norm())
        statistic = draws * (1 / cosine**2 - 1) / (D - 1)
        low, high = stats.f.ppf([1e-7, 1 - 1e-7], D - 1, draws)
        assert low < statistic < high, (cosine, statistic)


@pytest.mark.parametrize(
    ("rank", "noise"), [(1, "gaussian"), (2, "gaussian"), (5, "gaussian"), (1, "rademacher"), (2, "rademacher")]
)
def test_error_of_the_low_rank_estimate(rank: int, noise: Any) -> None:
    # E‖ĝ - G‖² = (E[⟨G,E⟩²‖E‖²] - ‖G‖²)/n. For E = Σ_r a_r b_rᵀ/√R with Gaussian entries the expectation is
    # ‖G‖²·((O+2)(I+2) + (R-1)(OI+2))/R; with signs ‖a‖² = O and ‖b‖² = I always, and (O+2)(I+2) becomes OI.
    G, draws, runs = gradient(), 100, 40
    own = O * I if noise == "rademacher" else (O + 2) * (I + 2)
    expected = ((own + (rank - 1) * (O * I + 2)) / rank - 1) / draws
    make = functools.partial(EGGROLLTrainer, rank=rank, noise=noise)
    errors = torch.stack(
        [(estimate(make, G, draws, seed) - G).square().sum() / G.square().sum() for seed in range(runs)]
    )
    # The mean of 40 runs; its deviation is estimated from them (t distribution, 39 degrees of freedom: 7 deviations
    # are exceeded with probability 2e-8).
    assert abs(errors.mean() - expected) < 7 * errors.std() / math.sqrt(runs), (errors.mean(), expected)


def test_error_falls_with_the_population() -> None:
    G = gradient()

    def mean_error(draws: int) -> Tensor:
        return torch.stack([(estimate(EGGROLLTrainer, G, draws, seed) - G).square().sum() for seed in range(12)]).mean()

    # Expected 16; each mean has a relative deviation of about 0.12 (12 runs of deviation 0.4): within [8, 32] with a
    # failure probability below 1e-4.
    assert 8 < mean_error(64) / mean_error(1024) < 32


@pytest.mark.parametrize("t", [1.0, 1.5])
def test_bias_of_low_rank_falls_as_one_over_the_rank(t: float) -> None:
    # Fitness sin(t·z), z = uᵀ W v with unit u, v, is bounded and far from quadratic at σ = 1. The estimate along u vᵀ
    # is E[z sin(t z)] = -φ'(t). At rank R, z = Σ_r p_r q_r/√R is a sum of products of normals with characteristic
    # function φ(t) = (1 + t²/R)^(-R/2); at full rank it is exp(-t²/2). So the bias is
    #     t·((1 + t²/R)^(-R/2-1) - exp(-t²/2)) = t·exp(-t²/2)·(t⁴/4 - t²)/R + O(1/R²).
    size, members = 40, 2**16
    v = torch.zeros(size)
    v[3] = 1.0

    @batched
    def fitness(population: Population) -> Tensor:
        return (t * population(v)[:, 5]).sin()

    def measured(rank: int) -> float:
        layer = nn.Linear(size, size, bias=False)
        nn.init.zeros_(layer.weight)
        EGGROLLTrainer(
            model=layer,
            fitness_fn=fitness,
            population_size=members,
            noise_reuse=2,
            learning_rate=1.0,
            sigma=1.0,
            rank=rank,
            shaping="raw",
            seed=0,
            chunk_size=4096,
        ).step()
        return layer.weight[5, 3].item() / math.sqrt(members)

    full = t * math.exp(-(t**2) / 2)
    bias = {}
    for rank in (1, 2, 4, 8, 16):
        exact = t * (1 + t**2 / rank) ** (-rank / 2 - 1)
        # z·sin(t z) has deviation below 1 (|z sin| ≤ |z|, E z² = 1): 6 of the mean over 2^15 draws, 2e-9.
        tolerance = 6 / math.sqrt(members / 2)
        bias[rank] = measured(rank) - full
        assert abs(bias[rank] - (exact - full)) < tolerance
    # From rank 1 to 16 the exact biases fall by 9 (t = 1) and 12 (t = 1.5), on the way to 16; tolerance as above.
    assert abs(bias[16]) < abs(bias[1]) / 4


def test_step_of_a_weight_is_learning_rate_times_sigma() -> None:
    for make in (VanillaESTrainer, EGGROLLTrainer, functools.partial(EGGROLLTrainer, rank=4)):
        for size in (64, 1024):
            net = nn.Linear(50, 50)
            trainer = make(
                model=net,
                fitness_fn=batched(arbitrary_scores),
                population_size=size,
                learning_rate=0.1,
                sigma=0.2,
                seed=0,
            )
            before = trainer.current_params
            trainer.step()
            step = (trainer.current_params - before).square().mean().sqrt()
            assert abs(step / (0.1 * 0.2) - 1) < 0.3
