"""A network whose neurons are on or off: hard thresholds have no gradient, and a score needs none.

    python examples/binary_activations.py

Handwritten digits, 64-64-10, hidden activations of ±1. Beside evolution: backpropagation, for which the threshold's
gradient is zero, so that only the last layer learns; and the straight-through estimator, which pretends that the
threshold were the identity.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclasses.dataclass
class Args:
    generations: int = 400
    population_size: int = 512
    batch_size: int = 256
    """Images in a generation, the same for all members."""
    sigma: float = 0.1
    learning_rate: float = 0.03
    """Of Adam, here and in backpropagation."""
    seed: int = 0
    plot: Path = Path("binary_activations.png")
    smoke: bool = False
    """Run for a moment, to see that everything works."""


class Threshold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, 1.0, -1.0)


class StraightThrough(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (torch.where(x > 0, 1.0, -1.0) - x).detach()


def make_network(activation: nn.Module, seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), activation, nn.Linear(64, 10))


def main(args: Args) -> dict[str, list[float]]:
    if args.smoke:
        args = dataclasses.replace(args, generations=5, population_size=32)
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=0.2, random_state=args.seed, stratify=labels)
    x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    y, test_y = (torch.tensor(part) for part in parts[2:])

    def batch(generation: int) -> Tensor:
        return torch.randint(len(x), (args.batch_size,), generator=torch.Generator().manual_seed(generation))

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return (model(test_x).argmax(1) == test_y).float().mean().item()

    @batched
    def fitness(population: Population) -> Tensor:
        rows = batch(population.generation)
        outputs = population(x[rows])  # [N, rows, 10]
        losses = F.cross_entropy(outputs.flatten(0, 1), y[rows].repeat(len(population)), reduction="none")
        return -losses.view(len(population), -1).mean(1)

    network = make_network(Threshold(), args.seed)
    trainer = EGGROLLTrainer(
        model=network, fitness_fn=fitness, population_size=args.population_size, sigma=args.sigma,
        learning_rate=args.learning_rate, noise_reuse=2, optimizer=torch.optim.Adam, seed=args.seed,
    )  # fmt: skip
    curves: dict[str, list[float]] = {"evolution": []}
    trainer.train(args.generations, callback=lambda *_: curves["evolution"].append(accuracy(network)))

    for name, activation in {"backpropagation": Threshold(), "straight-through": StraightThrough()}.items():
        network = make_network(activation, args.seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate / 3)
        curves[name] = []
        for generation in range(args.generations):
            rows = batch(generation)
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
            curves[name].append(accuracy(network))

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, values in curves.items():
        axes.plot(values, label=f"{name}: {values[-1]:.1%}")
    axes.set(xlabel="generation, or step", ylabel="test accuracy", title="hidden activations of ±1", ylim=(0.5, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(args.plot, dpi=110)
    plt.close(figure)
    print({name: round(values[-1], 4) for name, values in curves.items()}, args.plot)
    return curves


if __name__ == "__main__":
    main(tyro.cli(Args))
