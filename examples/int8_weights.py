"""Weights that are int8 at every moment: perturbed by whole numbers, updated by whole numbers.

    python examples/int8_weights.py

Handwritten digits, 64-32-10. A weight is a whole number from -127 to 127, times one fixed scale for each layer. Members
differ from the centre by whole numbers, and the step is rounded at random to whole numbers, so that nothing but
int8 has to be stored. There is no float copy of the weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from eggroll_trainer import ESTrainer, Population, batched

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclasses.dataclass
class Args:
    generations: int = 400
    population_size: int = 256
    batch_size: int = 256
    """Images in a generation, the same for all members."""
    sigma: float = 4.0
    """Standard deviation of the perturbations, in steps of int8."""
    learning_rate: float = 0.3
    """A weight moves by about ``learning_rate · sigma`` steps."""
    seed: int = 0
    plot: Path = Path("int8_weights.png")
    smoke: bool = False
    """Run for a moment, to see that everything works."""


class IntegerES(ESTrainer):
    """Evolution strategies over whole numbers: the centre, the perturbations and the update are whole.

    Args:
        rate: Step size before rounding. (The trainer's own ``learning_rate`` is 1: the update is taken as it is.)
    """

    def __init__(self, *, rate: float, **options: Any) -> None:
        super().__init__(learning_rate=1.0, **options)
        self.rate = rate

    def sample_perturbations(self, population_size: int) -> Tensor:
        """Return whole numbers in antithetic pairs, ``[N, D]``."""
        half = (self.sigma * torch.randn(population_size // 2, len(self.current_params))).round()
        return torch.cat([half, -half])

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        """Return the update, rounded at random to whole numbers, so that it is right on average."""
        weights = (fitnesses - fitnesses.mean()) / (fitnesses.std() + 1e-8)
        update = self.rate * len(weights) ** 0.5 * (weights[:, None] * perturbations).mean(0)
        update = (update + torch.rand(len(update))).floor().float()
        centre = self.current_params
        return (centre + update).clamp(-127, 127) - centre


class Int8Linear(nn.Module):
    """A linear layer whose weights are whole numbers from -127 to 127, times a scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.scale = 0.02
        self.weight = nn.Parameter((torch.randn(outputs, inputs) * inputs**-0.5 / self.scale).round().clamp(-127, 127))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * self.scale


def main(args: Args) -> list[float]:
    if args.smoke:
        args = dataclasses.replace(args, generations=5, population_size=32)
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=0.2, random_state=args.seed, stratify=labels)
    x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    y, test_y = (torch.tensor(part) for part in parts[2:])
    torch.manual_seed(args.seed)
    model = nn.Sequential(Int8Linear(64, 32), nn.ReLU(), Int8Linear(32, 10))

    @batched
    def fitness(population: Population) -> Tensor:
        generator = torch.Generator().manual_seed(population.generation)
        rows = torch.randint(len(x), (args.batch_size,), generator=generator)
        outputs = population(x[rows])
        losses = F.cross_entropy(outputs.flatten(0, 1), y[rows].repeat(len(population)), reduction="none")
        return -losses.view(len(population), -1).mean(1)

    trainer = IntegerES(
        model=model, fitness_fn=fitness, population_size=args.population_size, sigma=args.sigma,
        rate=args.learning_rate, seed=args.seed,
    )  # fmt: skip
    accuracies: list[float] = []

    def record(*_: Any) -> None:
        with torch.no_grad():
            accuracies.append((model(test_x).argmax(1) == test_y).float().mean().item())
        assert torch.equal(trainer.current_params.to(torch.int8).float(), trainer.current_params)

    trainer.train(args.generations, callback=record)
    numbers = trainer.current_params.to(torch.int8)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(accuracies)
    left.set(xlabel="generation", ylabel="test accuracy", title=f"int8 weights: {accuracies[-1]:.1%}", ylim=(0, 1))
    left.grid(alpha=0.3)
    right.hist(numbers.numpy(), bins=range(-128, 129, 4))
    right.set(xlabel="weight, a whole number", ylabel="weights", title=f"{len(numbers):,} bytes in all")
    figure.savefig(args.plot, dpi=110)
    plt.close(figure)
    print(f"test accuracy {accuracies[-1]:.2%}, {len(numbers):,} bytes of weights, {args.plot}")
    return accuracies


if __name__ == "__main__":
    main(tyro.cli(Args))
