"""EGGROLL, full-rank evolution strategies and Adam by backpropagation, on an MLP, a CNN and a transformer.

    python examples/compare.py

Handwritten digits of 8×8 pixels, by the cross-entropy of a batch. All take as many steps, on the same batches, by
Adam; evolution evaluates a population for each step, backpropagation one forward and one backward pass.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, VanillaESTrainer, batched

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclasses.dataclass
class Args:
    steps: int = 250
    population_size: int = 128
    batch_size: int = 128
    sigma: float = 0.1
    learning_rate: float = 0.02
    """Of Adam, for evolution; backpropagation takes a fifth of it."""
    seed: int = 0
    plot: Path = Path("compare.png")
    smoke: bool = False
    """Run for a moment, to see that everything works."""


class Transformer(nn.Module):
    """A transformer of one layer, whose tokens are the rows of the image."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.positions = nn.Parameter(0.1 * torch.randn(8, width))
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.hidden, self.out, self.head = nn.Linear(width, 48), nn.Linear(48, width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images.squeeze(1)) + self.positions
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        tokens = tokens + self.out(F.gelu(self.hidden(tokens)))
        return self.head(self.last_norm(tokens).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(144, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"MLP": mlp, "CNN": cnn, "transformer": Transformer}


def main(args: Args) -> dict[str, dict[str, list[float]]]:
    if args.smoke:
        args = dataclasses.replace(args, steps=2, population_size=8, batch_size=16)
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=0.2, random_state=args.seed, stratify=labels)
    x, test_x = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    y, test_y = (torch.tensor(part) for part in parts[2:])

    def batch(step: int) -> Tensor:
        return torch.randint(len(x), (args.batch_size,), generator=torch.Generator().manual_seed(step))

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return (model(test_x).argmax(1) == test_y).float().mean().item()

    @batched
    def fitness(population: Population) -> Tensor:
        rows = batch(population.generation)
        outputs = population(x[rows])
        losses = F.cross_entropy(outputs.flatten(0, 1), y[rows].repeat(len(population)), reduction="none")
        return -losses.view(len(population), -1).mean(1)

    def by_evolution(trainer_class: Any, model: nn.Module) -> list[float]:
        trainer = trainer_class(
            model=model, fitness_fn=fitness, population_size=args.population_size, sigma=args.sigma,
            learning_rate=args.learning_rate, noise_reuse=2, optimizer=torch.optim.Adam, seed=args.seed,
        )  # fmt: skip
        accuracies = []
        for _ in range(args.steps):
            trainer.step()
            accuracies.append(accuracy(model))
        return accuracies

    def by_backpropagation(model: nn.Module) -> list[float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate / 5)
        accuracies = []
        for step in range(args.steps):
            rows = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            accuracies.append(accuracy(model))
        return accuracies

    methods: dict[str, Callable[[nn.Module], list[float]]] = {
        "EGGROLL, rank 1": lambda model: by_evolution(EGGROLLTrainer, model),
        "full-rank ES": lambda model: by_evolution(VanillaESTrainer, model),
        "Adam, backpropagation": by_backpropagation,
    }
    curves: dict[str, dict[str, list[float]]] = {}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
    for (name, make), ax in zip(MODELS.items(), axes, strict=True):
        curves[name] = {}
        for method, train in methods.items():
            torch.manual_seed(args.seed)
            model = make()
            start = time.process_time()
            curves[name][method] = values = train(model)
            print(
                f"{name}, {method}: {values[-1]:.1%}, {time.process_time() - start:.0f} processor seconds", flush=True
            )
            ax.plot(values, label=f"{method}: {values[-1]:.1%}")
        ax.set(xlabel="step", title=f"{name}, {sum(p.numel() for p in model.parameters()):,} weights", ylim=(0, 1))
        ax.grid(alpha=0.3)
        ax.legend(loc="lower right", fontsize=8)
    axes[0].set_ylabel("test accuracy")
    figure.savefig(args.plot, dpi=110)
    plt.close(figure)
    return curves


if __name__ == "__main__":
    main(tyro.cli(Args))
