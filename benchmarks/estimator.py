"""How good a direction a population gives: the angle between the update and the true gradient.

    OMP_NUM_THREADS=1 python -m benchmarks.estimator    # some minutes on one core; adds a dated file and the plot

The fitness is minus the mean squared error of a network 32-32-8 on 64 rows; its gradient is known by backpropagation.
The prediction is that of a linear fitness, with the second moments of the page docs/research/algorithm.md.
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, VanillaESTrainer, batched

from .measure import surroundings

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

POPULATIONS = [2**k for k in range(4, 14)]
SIGMAS = [0.001, 0.01, 0.03, 0.1, 0.2, 0.4]
REPEATS = 4
KINDS = {"rank 1": 1, "rank 4": 4, "full rank": None}


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)), x, torch.randn(64, 8)


def gradient() -> Tensor:
    """Return the gradient of the fitness, ``[D]``."""
    model, x, y = problem()
    (-(model(x) - y).square().mean()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def update(seed: int, members: int, sigma: float, rank: int | None, pairs: bool = True) -> Tensor:
    """Return the update of one generation, ``[D]``, up to its length."""
    model, x, y = problem()

    @batched(check=False)
    def fitness(population: Population) -> Tensor:
        return -(population(x) - y).square().mean((1, 2))

    options: dict[str, Any] = {} if rank is None else {"rank": rank}
    trainer = (VanillaESTrainer if rank is None else EGGROLLTrainer)(
        model=model, fitness_fn=fitness, population_size=members, sigma=sigma, learning_rate=1.0, seed=seed,
        noise_reuse=2 if pairs else 0, **options,
    )  # fmt: skip
    trainer.step()
    return trainer.current_params - trainer.initial_params


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def predicted(members: int, rank: int | None) -> float:
    """Return the expected cosine for a linear fitness; see above."""
    model, x, y = problem()
    (-(model(x) - y).square().mean()).backward()
    draws = members / 2
    squares = [float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None]
    total = sum(squares)
    # Of one draw: E|<g, e> e|² = Σ_j |g_j|² (second moment within block j) + Σ_{j≠k} |g_j|² size_k.
    sizes = [p.numel() for p in model.parameters()]
    moment = 0.0
    for p, square, size in zip(model.parameters(), squares, sizes, strict=True):
        if p.ndim == 2 and rank is not None:
            m, n = p.shape
            # Rank r: products of r independent pairs, divided by √r.
            own = ((m + 2) * (n + 2) + (rank - 1) * (m * n + 2)) / rank
        else:
            own = size + 2
        moment += square * (own + sum(sizes) - size)
    spread = (moment / total - 1) / draws
    return 1 / math.sqrt(1 + spread)


def measure() -> dict[str, Any]:
    g = gradient()
    found: dict[str, Any] = {"surroundings": surroundings(), "weights": len(g), "population": [], "sigma": []}
    for name, rank in KINDS.items():
        for members in POPULATIONS:
            cosines = [cosine(update(seed, members, 0.01, rank), g) for seed in range(REPEATS)]
            independent = [cosine(update(seed, members, 0.01, rank, pairs=False), g) for seed in range(REPEATS)]
            found["population"].append(
                {
                    "kind": name,
                    "members": members,
                    "cosine": sum(cosines) / REPEATS,
                    "independent": sum(independent) / REPEATS,
                    "predicted": predicted(members, rank),
                }
            )
            print(found["population"][-1], flush=True)
    for name, rank in KINDS.items():
        for sigma in SIGMAS:
            # The mean of many updates: what is left of the angle is bias.
            mean = sum(update(seed, 8192, sigma, rank) for seed in range(4 * REPEATS))
            assert isinstance(mean, Tensor)
            found["sigma"].append({"kind": name, "sigma": sigma, "cosine": cosine(mean, g)})
            print(found["sigma"][-1], flush=True)
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in KINDS:
        line = [entry for entry in found["population"] if entry["kind"] == name]
        (drawn,) = left.plot(
            [entry["members"] for entry in line], [entry["cosine"] for entry in line], "o", label=f"{name}, measured"
        )
        left.plot(
            [entry["members"] for entry in line], [entry["predicted"] for entry in line], color=drawn.get_color(),
            label=f"{name}, predicted",
        )  # fmt: skip
        biased = [entry for entry in found["sigma"] if entry["kind"] == name]
        right.plot([entry["sigma"] for entry in biased], [entry["cosine"] for entry in biased], marker="o", label=name)
    left.axvline(found["weights"], color="gray", linestyle=":", label="number of weights")
    left.set_xscale("log", base=2)
    left.set(
        xlabel="members, in antithetic pairs", ylabel="cosine with the gradient", title="one generation, sigma 0.01"
    )
    right.set_xscale("log")
    right.set(
        xlabel="sigma", ylabel="cosine with the gradient", title=f"mean of {4 * REPEATS} generations of 8,192 members"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    found = measure()
    stem = f"docs/research/results/{datetime.date.today().isoformat()}-estimator"
    Path(f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, Path("docs/images/estimator.png"))


if __name__ == "__main__":
    main()
