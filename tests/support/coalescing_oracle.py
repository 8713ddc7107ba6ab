"""The oracle of coalescing: the same fitness function, called with one dense copy of the model per member.

Everything is compared in float64, to a relative 1e-10: the batched forward adds up in another order than a copy does,
and nothing else may differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from helpers import randn
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population

N = 16
# Two chunks a generation, the second one smaller.
CHUNK = 10
X = randn(12, 4, dtype=torch.float64)
Y = torch.stack([X[:, 0] * X[:, 1], X[:, 2].sin()], 1)

Fitness = Callable[[Any], Any]

# What is said where evaluations write into buffers.
UNDONE = "the changes are undone after each member"


class Net(nn.Module):
    """A small model with a buffer and a method of its own."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 2)
        self.register_buffer("offset", torch.full((2,), 0.5))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.act(x) * scale

    def act(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) + self.offset


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a model in float64, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def loss(output: Tensor) -> float:
    """Return a score of a model's output for ``X``."""
    return -(output - Y).square().mean().item()


class Run:
    """Two generations of a fitness function.

    Attributes:
        scores: ``[generations · N]``.
        parameters: Those of the model afterwards, ``[D]``.
        messages: The warnings.
        forwards: How many members each batched forward served, with the type of the module.
    """

    def __init__(self, make: Callable[[], nn.Module], fitness: Fitness, *, coalesce: bool, **options: Any) -> None:
        self.model = made(make)
        collected: list[Tensor] = []
        self.forwards: list[tuple[str, int]] = []

        def shaping(scores: Tensor) -> Tensor:
            collected.append(scores)
            return scores - scores.mean()

        served = Population.run

        def run(population: Population, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = served(population, module, *args, **kwargs)
            self.forwards.append((type(module).__name__, len(args[3])))
            return result

        settings = {"population_size": N, "chunk_size": CHUNK, "sigma": 0.3, "noise_reuse": 2, "seed": 5, **options}
        self.trainer = EGGROLLTrainer(
            model=self.model, fitness_fn=fitness, shaping=shaping, coalesce=coalesce, **settings
        )
        with (
            untouched(self.model),
            mock.patch.object(Population, "run", run),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            self.trainer.train(2, verbose=False)
        self.messages = [str(warning.message) for warning in caught]
        self.scores = torch.cat(collected)
        self.parameters = self.trainer.current_params


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Assert that the model keeps everything besides the values of its parameters, and that no mode is left on."""
    before, modes = _inventory(model), _modes()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    assert _inventory(model) == before
    assert _modes() == modes
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def _inventory(model: nn.Module) -> list[Any]:
    return [
        (name, type(module), module.training, list(module.__dict__), _identities(module.__dict__))
        for name, module in model.named_modules()
    ]


def _identities(attributes: dict[str, Any]) -> list[Any]:
    held = []
    for key, value in attributes.items():
        contents = list(value.items()) if isinstance(value, dict) else list(value) if isinstance(value, list) else ()
        held.append((key, id(value), [id(x) for pair in contents for x in (pair if type(pair) is tuple else (pair,))]))
    return held


def _modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        torch.autocast_increment_nesting() - 1 - (torch.autocast_decrement_nesting() * 0),
    )


def compare(make: Callable[[], nn.Module], fitness: Fitness, nested: bool = False, **options: Any) -> Run:
    """Assert that coalesced and one by one the scores and the trained parameters are the same; return the former."""
    together, alone = (Run(make, fitness, coalesce=coalesce, **options) for coalesce in (True, False))
    torch.testing.assert_close(together.scores, alone.scores, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(together.parameters, alone.parameters, rtol=1e-10, atol=1e-12)
    assert len(together.scores.unique()) > N // 2, "a fitness that tells members apart is a better test"
    assert nested or (not alone.forwards and all(UNDONE in message for message in alone.messages))
    return together


def assert_coalesced(run: Run, calls: int, module: str | None = None) -> None:
    """Assert that each of the calls was one batched forward for all members of a chunk, and that nothing was said."""
    assert run.messages == []
    name = module or type(run.model).__name__
    assert run.forwards == [(name, members) for _ in range(2) for members in (CHUNK, N - CHUNK) for _ in range(calls)]


def plain(model: Any) -> float:
    return loss(model(X))


def own_method(model: Any) -> float:
    return loss(model.act(X))
