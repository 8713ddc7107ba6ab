"""``eggroll demo``: a network of on-off units, which has no gradient, learns to separate two spirals."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from .. import EGGROLLTrainer
from ..plotting import plot_runs
from ..plotting.runs import RunCurves

DESCRIPTION = """Train a network of on-off units, which has no gradient, to separate two spirals, and plot it.

Every hidden unit is either on or off. The fitness is minus the cross-entropy.

Examples:
  eggroll demo
  eggroll demo --generations 500 --out spirals.svg"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the network is trained."""

    generations: int = 250
    """Number of generations."""
    population_size: int = 256
    """Members in a generation."""
    hidden: int = 96
    """Number of on-off units in the first layer."""
    learning_rate: float = 0.03
    """Learning rate of Adam: about the step of a weight in a generation."""
    sigma: float = 0.1
    """Standard deviation of the perturbations."""
    seed: int = 0
    """Seed of the points, the initial weights, and the noise."""
    out: Path = Path("demo.png")
    """File of the plot."""


class Step(nn.Module):
    """A unit that is on above zero and off below. Its derivative is zero almost everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 1 for numbers above zero, and -1 for others."""
        return (x > 0).to(x.dtype) * 2 - 1


def spirals(points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return points on two spirals, ``[2·points, 2]``, and the spiral of each, ``[2·points]``."""
    radius = torch.linspace(0.1, 1, points)
    angle = 1.25 * 2 * math.pi * radius
    one = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    x = torch.cat([one, -one])
    return x + 0.02 * torch.randn(x.shape, generator=generator), torch.arange(2).repeat_interleave(points)


def main(arguments: list[str]) -> int:
    """Run the command and return the exit status."""
    settings = tyro.cli(Settings, args=arguments, prog="eggroll demo", description=DESCRIPTION)
    x, labels = spirals(100, torch.Generator().manual_seed(settings.seed))
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = nn.Sequential(
            *(nn.Linear(2, settings.hidden), Step(), nn.Linear(settings.hidden, settings.hidden // 2), Step()),
            nn.Linear(settings.hidden // 2, 2),
        )

    def fitness(model: nn.Module) -> float:
        return -nn.functional.cross_entropy(model(x), labels).item()

    began = time.perf_counter()
    try:
        trainer = EGGROLLTrainer(
            model=model,
            fitness_fn=fitness,
            population_size=settings.population_size,
            learning_rate=settings.learning_rate,
            sigma=settings.sigma,
            optimizer=torch.optim.Adam,
            noise_reuse=2,
            seed=settings.seed,
        )
        before = accuracy(model, x, labels)
        trainer.train(settings.generations)
    except ValueError as error:
        print(f"eggroll demo: {error}", file=sys.stderr)
        return 1
    print(f"right: {before:.0%} of the points before, {accuracy(model, x, labels):.0%} after", end="")
    print(f" {settings.generations} generations in {time.perf_counter() - began:.0f} s")
    try:
        _plot(trainer, x, labels, settings.out)
        print(f"plot: {settings.out}")
    except (ImportError, OSError, ValueError) as error:
        print(f"no plot: {error}", file=sys.stderr)
    print("next: eggroll train --help, for your own model and fitness function")
    return 0


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the share of points on the right side."""
    return (model(x).argmax(1) == labels).float().mean().item()


@torch.no_grad()
def _plot(trainer: EGGROLLTrainer, x: Tensor, labels: Tensor, path: Path) -> None:
    """Plot the run, and next to it the function that the network has learnt."""
    figure: Any = plot_runs([RunCurves.of_history("demo", trainer.history)], metrics=[])
    figure.set_size_inches(9, 4)
    figure.axes[0].set_title("fitness: minus the cross-entropy")
    lines = torch.linspace(-1.3, 1.3, 300)
    grid = torch.cartesian_prod(lines, lines)
    side = trainer.model(grid).softmax(1)[:, 1].view(300, 300).T.cpu().numpy()
    axes = figure.add_subplot(figure.axes[0].get_gridspec()[0, 2])
    figure.axes[0].set_subplotspec(figure.axes[0].get_gridspec()[0, :2])
    axes.imshow(side, origin="lower", extent=(-1.3, 1.3, -1.3, 1.3), cmap="PuOr", alpha=0.7, vmin=0, vmax=1)
    for label, marker in ((0, "o"), (1, "s")):
        points = x[labels == label].numpy()
        axes.scatter(
            *points.T, s=8, marker=marker, color="black" if label else "white", edgecolors="black", linewidths=0.4
        )
    axes.set(title="what it has learnt", xticks=[], yticks=[])
    figure.savefig(path, facecolor="white")
