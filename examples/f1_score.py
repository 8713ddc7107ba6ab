"""Train for the F1 score itself, which counts right and wrong answers and has no gradient.

    python examples/f1_score.py

Breast cancer data (569 patients, 30 features), of which only some of the malignant cases are kept, so that they are
rare. Each of several splits compares a network that evolution trains for the F1 score of the malignant class with the
same network trained by backpropagation on the cross-entropy. Both answer "malignant" where the output is above 0.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclasses.dataclass
class Args:
    generations: int = 150
    population_size: int = 256
    sigma: float = 0.1
    learning_rate: float = 0.1
    keep: float = 0.2
    """Share of the malignant cases that is kept."""
    splits: int = 10
    """Splits into training and test data, with seeds 0, 1, …"""
    plot: Path = Path("f1_score.png")
    smoke: bool = False
    """Run for a moment, to see that everything works."""


def load(keep: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, benign = load_breast_cancer(return_X_y=True)
    malignant = 1 - benign
    random = np.random.default_rng(seed)
    kept = (malignant == 0) | (random.random(len(malignant)) < keep)
    train_x, test_x, train_y, test_y = train_test_split(
        features[kept], malignant[kept], test_size=0.5, random_state=seed, stratify=malignant[kept]
    )
    scaler = StandardScaler().fit(train_x)
    x, test = (torch.tensor(scaler.transform(part), dtype=torch.float32) for part in (train_x, test_x))
    return x, torch.tensor(train_y), test, torch.tensor(test_y)


def make_network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 1))


def by_evolution(x: Tensor, y: Tensor, seed: int, args: Args) -> nn.Module:
    network = make_network(seed)

    @batched
    def fitness(population: Population) -> Tensor:
        says = population(x).squeeze(-1) > 0  # [N, rows]
        hits = (says & (y == 1)).sum(1)
        return 2 * hits / (says.sum(1) + (y == 1).sum()).clamp(min=1)  # the F1 score

    EGGROLLTrainer(
        model=network, fitness_fn=fitness, population_size=args.population_size, sigma=args.sigma,
        learning_rate=args.learning_rate, noise_reuse=2, seed=seed,
    ).train(args.generations, verbose=False)  # fmt: skip
    return network


def by_backpropagation(x: Tensor, y: Tensor, seed: int, args: Args) -> nn.Module:
    network = make_network(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(args.generations):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(network(x).squeeze(-1), y.float()).backward()
        optimizer.step()
    return network


def main(args: Args) -> dict[str, list[float]]:
    if args.smoke:
        args = dataclasses.replace(args, generations=5, population_size=32, splits=1)
    scores: dict[str, list[float]] = {"evolution, for F1": [], "backpropagation, for cross-entropy": []}
    for seed in range(args.splits):
        x, y, test_x, test_y = load(args.keep, seed)
        for values, train in zip(scores.values(), (by_evolution, by_backpropagation), strict=True):
            network = train(x, y, seed, args)
            with torch.no_grad():
                says = network(test_x).squeeze(-1) > 0
            values.append(float(f1_score(test_y, says)))
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for position, (name, values) in enumerate(scores.items()):
        axes.plot([position] * len(values), values, "o", alpha=0.6)
        axes.plot([position - 0.2, position + 0.2], [np.mean(values)] * 2, color="black")
        print(f"{name}: {np.mean(values):.3f} ± {np.std(values):.3f}")
    axes.set_xticks(range(len(scores)), scores)
    axes.set(xlim=(-0.6, 1.6), ylabel="F1 of malignant, held out", title=f"{args.splits} splits, and the mean")
    axes.grid(alpha=0.3)
    figure.savefig(args.plot, dpi=110)
    plt.close(figure)
    return scores


if __name__ == "__main__":
    main(tyro.cli(Args))
