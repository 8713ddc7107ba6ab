"""How the settings of a run decide what it reaches: handwritten digits, by the cross-entropy of a batch.

    OMP_NUM_THREADS=1 python -m benchmarks.settings                # a quarter of an hour on a core; a file, a plot
    OMP_NUM_THREADS=1 python -m benchmarks.settings populations    # one part of it

A network 64-32-10 (2,410 weights), 256 images a generation, the same for all members; test accuracy of the centre.
"""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, VanillaESTrainer, batched
from eggroll_trainer.callbacks import Callback, WeightAverage

from .measure import surroundings

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SIGMAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
POPULATIONS = (16, 64, 256, 1024)
GENERATIONS = 100
MEMBERS = 256
SEEDS = (0, 1, 2)
RATES = (0.1, 0.3)
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "independent members": {"noise_reuse": 0},
    "rank 4": {"rank": 4},
    "full rank": {"rank": None},
    "rademacher": {"noise": "rademacher"},
    "centered ranks, 3.5 × the rate": {"shaping": "centered_ranks", "learning_rate": 1.05},
    "Adam, 0.03": {"optimizer": torch.optim.Adam, "learning_rate": 0.03},
}
BATCH = 256
BATCHES, AVERAGED_RATES, DECAYS = (16, 256), (0.3, 1.0), (0.8, 0.9, 0.95)
IMAGES = Path("docs/images")


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels / 16, labels, test_size=0.2, random_state=seed, stratify=labels
    )
    return (
        torch.tensor(train_x, dtype=torch.float32),
        torch.tensor(train_y),
        torch.tensor(test_x, dtype=torch.float32),
        torch.tensor(test_y),
    )


def trained(
    generations: int,
    seed: int,
    *,
    rank: int | None = 1,
    hidden: int = 32,
    batch: int = BATCH,
    callback: Sequence[Callback] = (),
    **options: Any,
) -> nn.Module | None:
    """Return a trained network; None if the weights or the scores were no longer finite."""
    images, labels, _, _ = data(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))

    @batched(check=False)
    def fitness(population: Population) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=torch.Generator().manual_seed(population.generation))
        outputs = population(images[rows])
        # With the classes before the rows it takes a sixth of the time.
        return -F.cross_entropy(outputs.mT, labels[rows].expand(len(population), -1), reduction="none").mean(1)

    if rank is not None:
        options["rank"] = rank
    trainer = (VanillaESTrainer if rank is None else EGGROLLTrainer)(
        model=model, fitness_fn=fitness, seed=seed, **{"noise_reuse": 2, **options}
    )
    try:
        trainer.train(generations, verbose=False, callback=list(callback))
    except ValueError:
        return None
    return model


def accuracy_after(generations: int, seed: int, **options: Any) -> float:
    """Train a network and return its test accuracy."""
    return accuracies_after(generations, seed, (), **options)[0]


def accuracies_after(generations: int, seed: int, decays: Sequence[float], **options: Any) -> list[float]:
    """Train a network and return its test accuracy, and those of averages of its weights."""
    _, _, images, labels = data(seed)
    averages = [WeightAverage(decay) for decay in decays]
    model = trained(generations, seed, callback=averages, **options)
    if model is None:
        return [0.1] * (1 + len(decays))
    with torch.no_grad():
        models = [model, *(average.model for average in averages)]
        return [(one(images).argmax(1) == labels).float().mean().item() for one in models]


def over_seeds(generations: int, **options: Any) -> list[float]:
    return [accuracy_after(generations, seed, **options) for seed in SEEDS]


def grid() -> list[dict[str, Any]]:
    found = []
    for sigma, learning_rate in itertools.product(SIGMAS, LEARNING_RATES):
        # One seed each, as there are many.
        accuracy = accuracy_after(
            GENERATIONS, 0, population_size=MEMBERS, sigma=sigma, learning_rate=learning_rate, shaping="zscore"
        )
        found.append({"sigma": sigma, "learning_rate": learning_rate, "accuracy": accuracy})
        print(found[-1], flush=True)
    return found


def populations() -> list[dict[str, Any]]:
    found = []
    for members, learning_rate in itertools.product(POPULATIONS, RATES):
        generations = GENERATIONS * MEMBERS // members
        accuracies = over_seeds(generations, population_size=members, sigma=0.1, learning_rate=learning_rate)
        found.append({"members": members, "learning_rate": learning_rate, "accuracies": accuracies})
        print(found[-1], flush=True)
    return found


def variants() -> list[dict[str, Any]]:
    found = []
    for name, options in VARIANTS.items():
        defaults = {"population_size": MEMBERS, "sigma": 0.1, "learning_rate": 0.3}
        found.append({"name": name, "accuracies": over_seeds(GENERATIONS, **{**defaults, **options})})
        print(found[-1], flush=True)
    return found


def averages() -> list[dict[str, Any]]:
    found = []
    for batch, learning_rate in itertools.product(BATCHES, AVERAGED_RATES):
        runs = [
            accuracies_after(
                GENERATIONS, seed, DECAYS, batch=batch, population_size=MEMBERS, sigma=0.1, learning_rate=learning_rate
            )
            for seed in SEEDS
        ]
        found.append({"batch": batch, "learning_rate": learning_rate, "decays": [0.0, *DECAYS], "accuracies": runs})
        print(found[-1], flush=True)
    return found


PARTS = {"grid": grid, "populations": populations, "variants": variants, "averages": averages}


def plot_grid(cells: list[dict[str, Any]], path: Path) -> None:
    figure, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
    values = torch.tensor([cell["accuracy"] for cell in cells]).view(len(SIGMAS), len(LEARNING_RATES))
    ax.imshow(values, origin="lower", vmin=0.1, vmax=1.0, cmap="viridis", aspect="auto")
    for row, column in itertools.product(range(len(SIGMAS)), range(len(LEARNING_RATES))):
        value = float(values[row, column])
        ax.text(column, row, f"{value:.0%}", ha="center", va="center", color="black" if value > 0.6 else "white")
    ax.set_xticks(range(len(LEARNING_RATES)), [f"{rate:g}" for rate in LEARNING_RATES])
    ax.set_yticks(range(len(SIGMAS)), [f"{sigma:g}" for sigma in SIGMAS])
    ax.set(xlabel="learning_rate", ylabel="sigma", title=f"test accuracy, {GENERATIONS} generations, {MEMBERS} members")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_populations(entries: list[dict[str, Any]], path: Path) -> None:
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for learning_rate in RATES:
        line = [entry for entry in entries if entry["learning_rate"] == learning_rate]
        for entry in line:
            ax.plot([entry["members"]] * len(SEEDS), entry["accuracies"], ".", color="gray", alpha=0.5)
        means = [sum(entry["accuracies"]) / len(entry["accuracies"]) for entry in line]
        ax.plot([entry["members"] for entry in line], means, marker="o", label=f"learning_rate {learning_rate:g}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(POPULATIONS, [str(members) for members in POPULATIONS])
    ax.set(xlabel="population_size", ylabel="test accuracy", title=f"{GENERATIONS * MEMBERS:,} evaluations, sigma 0.1")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


PLOTS = {"grid": plot_grid, "populations": plot_populations}


def main(parts: list[str]) -> None:
    path = Path(f"docs/research/results/{datetime.date.today().isoformat()}-settings.json")
    found = json.loads(path.read_text()) if path.exists() else {}
    for part in parts or PARTS:
        found[part] = {"surroundings": surroundings(), "results": PARTS[part]()}
        path.write_text(json.dumps(found, indent=1) + "\n")
        if part in PLOTS:
            PLOTS[part](found[part]["results"], IMAGES / f"settings-{part}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
