"""Train a classifier of handwritten digits without gradients, beside the same network trained by backpropagation.

    python examples/digits.py            # fitness: minus the cross-entropy
    python examples/digits.py accuracy   # fitness: the share of right answers, which has no gradient

The same on several processes, or on Ray's workers, with the same result:

    torchrun --nproc-per-node 2 examples/digits.py
    python examples/digits.py --engine ray

The 1,797 images of 8×8 pixels ship with scikit-learn; a fifth is held out for the test.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Literal

import matplotlib
import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from eggroll_trainer import EGGROLLTrainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclasses.dataclass
class Args:
    fitness: Literal["cross_entropy", "accuracy"] = "cross_entropy"
    """What a member is scored by, on a batch of training images."""
    generations: int = 240
    population_size: int = 1024
    """Members in a generation."""
    batch_size: int = 400
    """Images in a generation's batch, the same for all members."""
    sigma: float = 0.05
    """Standard deviation of the perturbations."""
    final_sigma: float | None = None
    """What sigma falls to, linearly; it stays as it is if None."""
    head_sigma: float | None = None
    """Sigma of the last layer, which falls likewise; that of the others if None."""
    chunk_size: int = 128
    """Members evaluated at a time: the activations of so many stay in the processor's cache."""
    learning_rate: float = 0.03
    """Of Adam; falls to zero along a cosine."""
    rank: int = 1
    seed: int = 0
    engine: Literal["local", "torch", "ray"] | None = None
    """Who evaluates the population; what torchrun has started, else this process, if None."""
    plot: Path = Path("digits.png")
    """Where the plot goes."""


SETTINGS = {
    "cross_entropy": Args(),
    # A class that no member predicts adds nothing to accuracy, and has no slope to follow. The last layer is perturbed
    # more, so that every class wins somewhere.
    "accuracy": Args(
        fitness="accuracy",
        generations=400,
        population_size=4096,
        batch_size=256,
        sigma=0.1,
        final_sigma=0.03,
        head_sigma=0.5,
    ),
}


@dataclasses.dataclass
class Digits:
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, seed: int) -> Digits:
        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(pixels / 16, labels, test_size=0.2, random_state=seed, stratify=labels)
        train_images, test_images = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
        train_labels, test_labels = (torch.tensor(part) for part in parts[2:])
        return cls(train_images, train_labels, test_images, test_labels)


def make_network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def batches(count: int, args: Args) -> Tensor:
    """Indices of the images of every generation's batch, ``[generations, batch_size]``."""
    generator = torch.Generator().manual_seed(args.seed)
    epochs = -(-args.generations * args.batch_size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: args.generations * args.batch_size].view(args.generations, args.batch_size)


def train_by_evolution(digits: Digits, args: Args) -> tuple[EGGROLLTrainer, dict[str, list[float]]]:
    model = make_network(args.seed)
    index = batches(len(digits.train_images), args)
    data = [(digits.train_images[batch], digits.train_labels[batch]) for batch in index]

    # One model in, one number out; the trainer runs it for the whole population at once.
    def fitness(model: nn.Module) -> float:
        images, labels = data[trainer.generation]
        outputs = model(images)
        if args.fitness == "accuracy":
            return (outputs.argmax(1) == labels).float().mean().item()
        return -F.cross_entropy(outputs, labels).item()

    *body, head = model.children()
    trainer = EGGROLLTrainer(
        [
            {"params": [p for layer in body for p in layer.parameters()]},
            {"params": head.parameters(), "sigma": args.head_sigma or args.sigma},
        ],
        model=model,
        fitness_fn=fitness,
        population_size=args.population_size,
        learning_rate=args.learning_rate,
        sigma=args.sigma,
        rank=args.rank,
        noise_reuse=2,
        chunk_size=args.chunk_size,
        seed=args.seed,
        optimizer=torch.optim.Adam,
        lr_scheduler=functools.partial(CosineAnnealingLR, T_max=args.generations),
        sigma_scheduler=functools.partial(
            LinearLR,
            start_factor=1.0,
            end_factor=(args.final_sigma or args.sigma) / args.sigma,
            total_iters=args.generations,
        ),
        engine=args.engine,
    )
    curves: dict[str, list[float]] = {"train": [], "test": []}

    def record(generation: int, fitness_history: list[float]) -> None:
        curves["train"].append(accuracy(model, digits.train_images, digits.train_labels))
        curves["test"].append(accuracy(model, digits.test_images, digits.test_labels))

    trainer.train(args.generations, callback=record)
    return trainer, {**trainer.history, **curves}


def train_by_backpropagation(digits: Digits, args: Args) -> nn.Module:
    model = make_network(args.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    schedule = CosineAnnealingLR(optimizer, T_max=args.generations)
    for batch in batches(len(digits.train_images), args):
        optimizer.zero_grad()
        F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return model


def plot(history: dict[str, list[float]], reference: float, args: Args) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(history["generation"], history["fitness"], label="best member", alpha=0.5)
    left.plot(history["generation"], history["mean_fitness"], label="mean of the population")
    left.set(title=f"fitness: {args.fitness.replace('_', '-')}", xlabel="generation")
    for name in ("train", "test"):
        right.plot(history["generation"], history[name], label=f"{name} images")
    right.axhline(reference, color="black", linestyle=":", label="backpropagation, test images")
    right.set(title="accuracy of the centre", xlabel="generation", ylim=(0.8, 1.005))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(args.plot, dpi=120)
    plt.close(figure)


def main(args: Args) -> None:
    digits = Digits.load(args.seed)
    start = time.perf_counter()
    trainer, history = train_by_evolution(digits, args)
    seconds = time.perf_counter() - start
    if not trainer.is_main:
        return
    reference = accuracy(train_by_backpropagation(digits, args), digits.test_images, digits.test_labels)
    score = accuracy(trainer.model, digits.test_images, digits.test_labels)
    plot(history, reference, args)
    print(f"network:          {sum(p.numel() for p in trainer.model.parameters()):,} weights")
    print(f"test accuracy:    {score:.2%} by evolution ({args.fitness.replace('_', '-')}), in {seconds:.0f} s")
    print(f"                  {reference:.2%} by backpropagation, as many batches")
    print(f"plot:             {args.plot}")
    print("next:             python examples/digits.py accuracy, without a gradient; for your own model: README.md")


if __name__ == "__main__":
    preset = sys.argv.pop(1) if sys.argv[1:2] in (["accuracy"], ["cross_entropy"]) else "cross_entropy"
    main(tyro.cli(Args, default=SETTINGS[preset]))
