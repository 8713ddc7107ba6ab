"""A cellular automaton that finds the majority of its cells, though no cell sees more than its neighbours.

    python examples/cellular_automaton.py

Cells on a ring are 0 or 1. The same small network tells each cell its next state, from the three cells to either side
and its own. After as many steps as there are cells, all should be what most of them were at first. States are hard, and
the score counts cells: there is nothing to differentiate, and nothing to remember of the steps.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib
import torch
import tyro
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclasses.dataclass
class Args:
    generations: int = 300
    population_size: int = 128
    cells: int = 25
    starts: int = 48
    """First states in a generation, the same for all members."""
    sigma: float = 0.2
    learning_rate: float = 0.3
    seed: int = 0
    plot: Path = Path("cellular_automaton.png")
    smoke: bool = False
    """Run for a moment, to see that everything works."""


class Rule(nn.Module):
    """The next state of every cell: ``[rows, cells] → [rows, cells]``, of 0 and 1."""

    def __init__(self, reach: int = 3, hidden: int = 16) -> None:
        super().__init__()
        self.reach = reach
        self.network = nn.Sequential(nn.Linear(2 * reach + 1, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, states: Tensor) -> Tensor:
        shifts = range(-self.reach, self.reach + 1)
        seen = torch.stack([states.roll(shift, -1) for shift in shifts], -1)  # [rows, cells, 7]
        return (self.network(2 * seen - 1).squeeze(-1) > 0).float()


def starts(count: int, cells: int, seed: int) -> Tensor:
    """Return first states of all densities, ``[count, cells]``; with an odd number of cells there is no tie."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(count, 1, generator=generator)
    return (torch.rand(count, cells, generator=generator) < density).float()


def majority(states: Tensor) -> Tensor:
    return (states.mean(-1, keepdim=True) > 0.5).float()


@torch.no_grad()
def history(rule: nn.Module, states: Tensor) -> Tensor:
    """Return the states over time, ``[steps + 1, rows, cells]``."""
    seen = [states]
    for _ in range(states.shape[-1]):
        seen.append(rule(seen[-1]))
    return torch.stack(seen)


def main(args: Args) -> list[float]:
    if args.smoke:
        args = dataclasses.replace(args, generations=3, population_size=16, starts=8)
    torch.manual_seed(args.seed)
    rule = Rule()

    @batched
    def fitness(population: Population) -> Tensor:
        states = starts(args.starts, args.cells, population.generation)
        goal = majority(states)
        own = states.expand(len(population), *states.shape)
        for _ in range(args.cells):
            own = population.each(own)
        return (own == goal).float().mean((1, 2))

    trainer = EGGROLLTrainer(
        model=rule, fitness_fn=fitness, population_size=args.population_size, sigma=args.sigma,
        learning_rate=args.learning_rate, noise_reuse=2, seed=args.seed,
    )  # fmt: skip
    held_out = starts(1000, args.cells, 10**6)
    scores: list[float] = []

    def record(*_: Any) -> None:
        scores.append((history(rule, held_out)[-1] == majority(held_out)).float().mean().item())

    trainer.train(args.generations, callback=record)
    solved = (history(rule, held_out)[-1] == majority(held_out)).all(-1).float().mean().item()
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
    axes[0].plot(scores)
    axes[0].set(xlabel="generation", ylabel="right cells, held out", title=f"{solved:.0%} of starts solved")
    axes[0].grid(alpha=0.3)
    for axis, density in zip(axes[1:], (0.3, 0.45, 0.65), strict=True):
        generator = torch.Generator().manual_seed(1)
        state = (torch.rand(1, args.cells, generator=generator) < density).float()
        axis.imshow(history(rule, state)[:, 0].numpy(), cmap="binary", interpolation="nearest")
        axis.set(title=f"{int(state.sum())} of {args.cells} on", xlabel="cell", ylabel="step")
    figure.savefig(args.plot, dpi=110)
    plt.close(figure)
    print(f"right cells {scores[-1]:.2%}, starts solved {solved:.2%}, {args.plot}")
    return scores


if __name__ == "__main__":
    main(tyro.cli(Args))
