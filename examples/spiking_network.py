"""A spiking network of snnTorch, trained by how often its output neurons fire.

    python examples/spiking_network.py

Handwritten digits, 64-64-10, leaky integrate-and-fire neurons. A neuron adds up its input and fires when the sum passes
a threshold, which has no gradient. Evolution trains the network as it is. Beside it, the usual way: backpropagation
through time with a surrogate gradient, which replaces the threshold's derivative by that of an arctangent.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib
import snntorch
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
    batch_size: int = 128
    """Images in a generation, the same for all members."""
    steps: int = 10
    """Time steps for which the network sees an image."""
    decay: float = 0.8
    """Share of a neuron's potential that is left after a step."""
    gain: float = 2.0
    """Logit of a neuron that fires at every step. Where it is large, wrong answers cost more than silence."""
    sigma: float = 0.05
    learning_rate: float = 0.05
    """Of Adam. Backpropagation takes a fifth of it."""
    seed: int = 0
    plot: Path = Path("spiking_network.png")
    smoke: bool = False
    """Run for a moment, to see that everything works."""


class Leaky(snntorch.Leaky):
    """Neurons that keep no state: snnTorch's leave their potential in a buffer, which members cannot share."""

    mem: Tensor

    def __init__(self, decay: float, surrogate: bool) -> None:
        super().__init__(beta=decay, surrogate_disable=not surrogate)
        self.reset = None

    def forward(self, current: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
        initial = self.mem
        fired, potential = super().forward(current, potential)
        self.mem, self.reset = initial, None
        return fired, potential


class SpikingNetwork(nn.Module):
    """Two layers of leaky integrate-and-fire neurons. The pixels are a current that flows at every step."""

    def __init__(self, args: Args, surrogate: bool) -> None:
        super().__init__()
        self.steps = args.steps
        self.hidden, self.output = nn.Linear(64, 64), nn.Linear(64, 10)
        self.hidden_neurons, self.output_neurons = Leaky(args.decay, surrogate), Leaky(args.decay, surrogate)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return how often the output neurons fire, in a step, [rows, 10], and hidden spikes, [steps, rows, 64]."""
        current = self.hidden(x)
        hidden, output = torch.zeros_like(current), current.new_zeros(*current.shape[:-1], 10)
        counts, spikes = output, []
        for _ in range(self.steps):
            fired, hidden = self.hidden_neurons(current, hidden)
            answer, output = self.output_neurons(self.output(fired), output)
            counts = counts + answer
            spikes.append(fired)
        return counts / self.steps, torch.stack(spikes)


def make_network(args: Args, surrogate: bool) -> SpikingNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        return SpikingNetwork(args, surrogate)


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
        return (model(test_x)[0].argmax(1) == test_y).float().mean().item()

    @batched
    def fitness(population: Population) -> Tensor:
        rows = batch(population.generation)
        rates, _ = population(x[rows])  # [N, rows, 10]
        losses = F.cross_entropy(args.gain * rates.flatten(0, 1), y[rows].repeat(len(population)), reduction="none")
        return -losses.view(len(population), -1).mean(1)

    network = make_network(args, surrogate=False)
    trainer = EGGROLLTrainer(
        model=network, fitness_fn=fitness, population_size=args.population_size, sigma=args.sigma,
        learning_rate=args.learning_rate, noise_reuse=2, optimizer=torch.optim.Adam, seed=args.seed,
    )  # fmt: skip
    curves: dict[str, list[float]] = {"evolution": [], "surrogate gradient": []}
    trainer.train(args.generations, callback=lambda *_: curves["evolution"].append(accuracy(network)))

    rival = make_network(args, surrogate=True)
    optimizer = torch.optim.Adam(rival.parameters(), lr=args.learning_rate / 5)
    for generation in range(args.generations):
        rows = batch(generation)
        optimizer.zero_grad()
        F.cross_entropy(args.gain * rival(x[rows])[0], y[rows]).backward()
        optimizer.step()
        curves["surrogate gradient"].append(accuracy(rival))

    with torch.no_grad():
        rates, spikes = network(test_x[:1])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for name, values in curves.items():
        left.plot(values, label=f"{name}: {values[-1]:.1%}")
    left.set(xlabel="generation, or step", ylabel="test accuracy", ylim=(0.5, 1), title="digits by firing rates")
    left.legend()
    left.grid(alpha=0.3)
    right.imshow(spikes[:, 0].T.numpy(), aspect="auto", cmap="gray_r", interpolation="nearest")
    answer = int(rates.argmax())
    right.set(xlabel="time step", ylabel="hidden neuron", title=f"spikes for a {int(test_y[0])}, answer {answer}")
    figure.savefig(args.plot, dpi=110)
    plt.close(figure)
    print({name: round(values[-1], 4) for name, values in curves.items()}, f"{spikes.mean():.3f} spikes", args.plot)
    return curves


if __name__ == "__main__":
    main(tyro.cli(Args))
