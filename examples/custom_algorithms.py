"""Two algorithms of your own, written with ``ESTrainer``: PEPG and a diagonal CMA-ES.

    python examples/custom_algorithms.py

Both adapt a deviation for each weight, the trainer's own state. They find the minimum of an ellipsoid whose axes differ
by a factor of 1,000, beside plain evolution strategies with one sigma for all weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib
import torch
import tyro
from torch import Tensor, nn

from eggroll_trainer import ESTrainer, Population, VanillaESTrainer, batched

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclasses.dataclass
class Args:
    generations: int = 200
    population_size: int = 64
    dimensions: int = 20
    sigma: float = 0.3
    seed: int = 0
    plot: Path = Path("custom_algorithms.png")
    smoke: bool = False
    """Run for a moment, to see that everything works."""


class PEPG(ESTrainer):
    """Parameter-exploring policy gradients (Sehnke et al., 2010), with ranks as weights.

    Members are ``θ ± s·ε``. ``θ`` follows the difference of each pair, the deviations ``s`` their mean: where a pair is
    better than the others and its perturbation of a weight is larger than usual, the weight's deviation grows.
    """

    deviations: Tensor

    def __init__(self, *, deviation_rate: float = 0.2, **options: Any) -> None:
        super().__init__(**options)
        self.deviation_rate = deviation_rate
        self.register_state("deviations", torch.full_like(self.current_params, self.sigma))

    def sample_perturbations(self, population_size: int) -> Tensor:
        """Return antithetic perturbations, ``[N, D]``: the second half is the first with the other sign."""
        half = torch.randn(population_size // 2, len(self.deviations)) * self.deviations
        return torch.cat([half, -half])

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        """Adapt the deviations, and return the update of the mean, ``[D]``."""
        ranks = fitnesses.argsort().argsort().double() / (len(fitnesses) - 1) - 0.5
        half, (plus, minus) = perturbations[: len(ranks) // 2], ranks.view(2, -1)
        excess = (half / self.deviations).square() - 1
        growth = self.deviation_rate * ((plus + minus)[:, None] * excess).mean(0).float()
        self.deviations = self.deviations * growth.clamp(-0.3, 0.3).exp()
        return ((plus - minus)[:, None] * half).mean(0)


class DiagonalCMAES(ESTrainer):
    """CMA-ES with a diagonal covariance (Ros and Hansen, 2008): "separable" CMA-ES.

    The better half of the members are averaged, the best with the largest weights. Two paths gather the steps of the
    mean: the length of one adapts sigma, the other one the variances.
    """

    variances: Tensor
    path: Tensor
    length_path: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        n, count = len(self.current_params), self.population_size
        weights = (torch.tensor((count + 1) / 2).log() - torch.arange(1, count // 2 + 1).log()).double()
        self.weights = weights / weights.sum()
        self.mass = float(1 / self.weights.square().sum())
        # The rates are those of the paper; that of the variances may be larger, as there are only n of them.
        self.path_rate = (4 + self.mass / n) / (n + 4 + 2 * self.mass / n)
        self.length_rate = (self.mass + 2) / (n + self.mass + 5)
        self.damping = 1 + 2 * max(0.0, ((self.mass - 1) / (n + 1)) ** 0.5 - 1) + self.length_rate
        scale = (n + 2) / 3
        self.one_rate = min(1.0, scale * 2 / ((n + 1.3) ** 2 + self.mass))
        many = scale * 2 * (self.mass - 2 + 1 / self.mass) / ((n + 2) ** 2 + self.mass)
        self.many_rate = min(1 - self.one_rate, many)
        self.expected_length = n**0.5 * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        zeros = torch.zeros_like(self.current_params)
        self.register_state("variances", torch.ones_like(zeros))
        self.register_state("path", zeros.clone())
        self.register_state("length_path", zeros.clone())

    def sample_perturbations(self, population_size: int) -> Tensor:
        """Return ``sigma · s · ε``, ``[N, D]``."""
        return self.sigma * self.variances.sqrt() * torch.randn(population_size, len(self.variances))

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        """Adapt sigma and the variances, and return the step of the mean, ``[D]``."""
        best = perturbations[fitnesses.argsort(descending=True)[: len(self.weights)]] / self.sigma
        step = (self.weights[:, None] * best).sum(0).float()
        a, b = self.length_rate, self.path_rate
        self.length_path = (1 - a) * self.length_path + (a * (2 - a) * self.mass) ** 0.5 * step / self.variances.sqrt()
        self.path = (1 - b) * self.path + (b * (2 - b) * self.mass) ** 0.5 * step
        many = (self.weights[:, None] * best.square()).sum(0).float()
        kept = 1 - self.one_rate - self.many_rate
        self.variances = kept * self.variances + self.one_rate * self.path.square() + self.many_rate * many
        update = self.sigma * step
        self.sigma *= float((a / self.damping * (self.length_path.norm() / self.expected_length - 1)).exp())
        return update


class Point(nn.Module):
    """A point of the search space: a model without inputs."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.ones(dimensions))

    def forward(self) -> Tensor:
        return self.place


def main(args: Args) -> dict[str, list[float]]:
    if args.smoke:
        args = dataclasses.replace(args, generations=20)
    axes_lengths = torch.logspace(0, 3, args.dimensions)

    @batched
    def fitness(population: Population) -> Tensor:
        return -(axes_lengths * population()).square().sum(-1)

    options: dict[str, Any] = {
        "fitness_fn": fitness, "population_size": args.population_size, "seed": args.seed,
    }  # fmt: skip
    trainers: dict[str, ESTrainer] = {
        "one sigma": VanillaESTrainer(
            model=Point(args.dimensions), sigma=0.01, learning_rate=0.1, noise_reuse=2, **options
        ),
        "PEPG": PEPG(model=Point(args.dimensions), sigma=args.sigma, learning_rate=1.0, **options),
        "diagonal CMA-ES": DiagonalCMAES(model=Point(args.dimensions), sigma=args.sigma, learning_rate=1.0, **options),
    }
    curves: dict[str, list[float]] = {}
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, trainer in trainers.items():
        curves[name] = []
        for _ in range(args.generations):
            trainer.step()
            curves[name].append(-trainer.evaluate_fitness(trainer.model))
        ax.plot(curves[name], label=name)
        print(f"{name}: {curves[name][-1]:.3g}")
    ax.set_yscale("log")
    ax.set(
        xlabel=f"generation of {args.population_size} members", ylabel="value of the centre",
        title=f"an ellipsoid in {args.dimensions} dimensions, axes 1 to 1,000",
    )  # fmt: skip
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(args.plot, dpi=110)
    plt.close(figure)
    return curves


if __name__ == "__main__":
    main(tyro.cli(Args))
