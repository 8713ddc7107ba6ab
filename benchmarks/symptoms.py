"""What runs look like that don't learn, each beside the same run as it should be: handwritten digits.

    OMP_NUM_THREADS=1 python -m benchmarks.symptoms    # some minutes on one core; adds a dated file and the plot

A network 64-32-10, 256 images a generation, 256 members; the fitness is the accuracy, so that members can tie.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched

from .measure import surroundings
from .settings import data

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

GENERATIONS = 80
BATCH = 256
HEALTHY: dict[str, Any] = {"sigma": 0.1, "learning_rate": 0.3, "population_size": 256}
SICK: dict[str, dict[str, Any]] = {
    "sigma too small (0.0001)": {"sigma": 1e-4},
    "sigma too large (3)": {"sigma": 3.0},
    "learning_rate too small (0.003)": {"learning_rate": 0.003},
    "learning_rate too large (30)": {"learning_rate": 30.0},
    "population too small (8)": {"population_size": 8},
    "16 images of its own for each member": {"own_images": True},
}


def run(own_images: bool = False, **options: Any) -> dict[str, list[float]]:
    images, labels, test_images, test_labels = data(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    @batched(check=False)
    def fitness(population: Population) -> Tensor:
        generator = torch.Generator().manual_seed(population.generation)
        if own_images:
            rows = torch.randint(len(images), (len(population), 16), generator=generator)
            return (population.each(images[rows]).argmax(-1) == labels[rows]).double().mean(1)
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        return (population(images[rows]).argmax(-1) == labels[rows]).double().mean(1)

    trainer = EGGROLLTrainer(model=model, fitness_fn=fitness, noise_reuse=2, seed=0, **{**HEALTHY, **options})
    accuracies = []
    for _ in range(GENERATIONS):
        trainer.step()
        with torch.no_grad():
            accuracies.append((model(test_images).argmax(1) == test_labels).float().mean().item())
    keys = ("mean_fitness", "std_fitness", "num_tied", "update_norm")
    return {"accuracy": accuracies, **{key: trainer.history[key] for key in keys}}


def main() -> None:
    found: dict[str, Any] = {"surroundings": surroundings(), "healthy": run(), "sick": {}}
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.5), sharex=True, sharey=True, layout="constrained")
    for (name, options), ax in zip(SICK.items(), axes.flat, strict=True):
        found["sick"][name] = curves = run(**options)
        print(name, {key: [values[0], values[-1]] for key, values in curves.items()}, flush=True)
        ax.plot(found["healthy"]["accuracy"], color="tab:green", label="as it should be")
        ax.plot(curves["accuracy"], color="tab:red", label="this")
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3)
    print("healthy", {key: [values[0], values[-1]] for key, values in found["healthy"].items()})
    axes[0, 0].legend()
    figure.supxlabel("generation")
    figure.supylabel("test accuracy of the centre")
    figure.savefig("docs/images/symptoms.png", dpi=110)
    plt.close(figure)
    stem = f"docs/research/results/{datetime.date.today().isoformat()}-symptoms"
    Path(f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
