"""What is measured: the models, their data, their fitness in both forms, and naive evolution strategies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched


@dataclasses.dataclass
class Workload:
    """A model and its task.

    Attributes:
        name: What it is called.
        make: Makes the model, the same every time.
        inputs: What every member is called with; with a leading dimension of members if ``own``.
        own: Whether each member has inputs of its own.
        score: From the outputs of ``n`` members, ``[n, …]``, to their fitness, ``[n]``.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Tensor
    own: bool
    score: Callable[[Tensor], Tensor]

    def call(self, population: Population) -> Any:
        """Run the model for every member of a population, or of a chunk of it."""
        if not self.own:
            return population(self.inputs)
        members = population.members
        return population.each(self.inputs[members.start : members.stop])

    def batched(self) -> Callable[[Population], Tensor]:
        """Return the fitness function for a population."""

        @batched
        def fitness(population: Population) -> Tensor:
            return self.score(self.call(population))

        return fitness

    def trainer(self, size: int, **options: Any) -> EGGROLLTrainer:
        defaults: dict[str, Any] = {"fitness_fn": self.batched(), "noise_reuse": 2, "seed": 0}
        return EGGROLLTrainer(model=self.make(), population_size=size, **{**defaults, **options})

    def rows(self, size: int) -> Tensor:
        """Return the inputs of all members as one batch, for the unperturbed model."""
        if self.own:
            return self.inputs.flatten(0, 1) if self.inputs.ndim > 2 else self.inputs
        return self.inputs.repeat(size, *[1] * (self.inputs.ndim - 1))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MLP_SIZES = [32, 256, 256, 256, 8]
MLP_ROWS = 16
MLP_INPUTS = torch.randn(MLP_ROWS, MLP_SIZES[0], generator=generator(0))
MLP_LABELS = torch.randint(0, MLP_SIZES[-1], (MLP_ROWS,), generator=generator(1))


def _mlp() -> nn.Module:
    layers = [layer for a, b in zip(MLP_SIZES, MLP_SIZES[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _cross_entropy(logits: Tensor) -> Tensor:
    # With the classes before the rows it takes a sixth of the time.
    return -F.cross_entropy(logits.mT, MLP_LABELS.expand(len(logits), -1), reduction="none").mean(1)


def mlp() -> Workload:
    """Return W1: an MLP 32-256-256-256-8 on 16 rows that all members share."""
    return Workload("W1", lambda: seeded(_mlp), MLP_INPUTS, False, _cross_entropy)


def mlp_fitness(model: nn.Module) -> float:
    """The fitness of W1 as one writes it for one model."""
    with torch.no_grad():
        return -F.cross_entropy(model(MLP_INPUTS), MLP_LABELS).item()


def linear(width: int, size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Workload:
    """Return W2, the paper's own measure: a linear layer without bias, one row for each member."""
    inputs = torch.randn(size, width, generator=generator(0)).to(device, dtype)
    return Workload(
        "W2",
        lambda: seeded(lambda: nn.Linear(width, width, bias=False)).to(device, dtype),
        inputs,
        True,
        lambda outputs: -outputs.float().square().mean(1),
    )


class Transformer(nn.Module):
    """A decoder: 4 layers, width 256, 4 heads, 64 tokens."""

    def __init__(self, vocabulary: int = 256, width: int = 256, depth: int = 4, tokens: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens) + self.positions.weight[: tokens.shape[-1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        *leading, width = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(*leading, 3, self.heads, width // self.heads).movedim(-3, 0)
        q, k, v = q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attended.transpose(-3, -2).reshape(*leading, width))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


def transformer(size: int, rows: int = 4) -> Workload:
    """Return W3: a decoder-only transformer on 4 rows of 64 tokens of each member's own."""
    inputs = torch.randint(0, 256, (size, rows, 64), generator=generator(0))
    return Workload("W3", lambda: seeded(Transformer), inputs, True, lambda outputs: -outputs.square().mean((1, 2, 3)))


class ConvNet(nn.Module):
    """Two convolutions and two linear layers for images of 28×28."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden, self.out = nn.Linear(32 * 7 * 7, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv1(x)), 2)
        h = F.max_pool2d(F.relu(self.conv2(h)), 2)
        return self.out(F.relu(self.hidden(h.flatten(-3))))


def conv_net(rows: int = 16) -> Workload:
    """Return a convolutional network on images of 28×28 that all members share."""
    inputs = torch.randn(rows, 1, 28, 28, generator=generator(0))
    return Workload("conv", lambda: seeded(ConvNet), inputs, False, lambda outputs: -outputs.square().mean((1, 2)))


class Naive:
    """Full-rank evolution strategies by hand: perturb, score, put back, one member after the other."""

    def __init__(
        self, model: nn.Module, fitness: Callable[[nn.Module, int], float], size: int, sigma: float = 0.1
    ) -> None:
        self.model, self.fitness, self.size, self.sigma, self.learning_rate = model, fitness, size, sigma, 0.01
        self.generator = generator(0)

    @torch.no_grad()
    def step(self) -> None:
        parameters = list(self.model.parameters())
        centre = [p.clone() for p in parameters]
        scores, states = [], []
        for i in range(self.size):
            states.append(self.generator.get_state())
            for p, c in zip(parameters, centre, strict=True):
                p.copy_(c + self.sigma * torch.randn(p.shape, generator=self.generator))
            scores.append(self.fitness(self.model, i))
        for p, c in zip(parameters, centre, strict=True):
            p.copy_(c)
        weights = torch.tensor(scores)
        weights = (weights - weights.mean()) / weights.std()
        for state, weight in zip(states, weights.tolist(), strict=True):
            self.generator.set_state(state)
            for p in parameters:
                p.add_(torch.randn(p.shape, generator=self.generator), alpha=self.learning_rate * weight / self.size)
