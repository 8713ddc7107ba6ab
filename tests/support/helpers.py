"""What several test modules share: a small regression, a custom trainer, and bitwise comparison of states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from forking import Forked
from launching import environment
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, ESTrainer, Population, batched

ADAM = torch.optim.Adam
# In 2.6 torch.compile does not trace what makes a subclass of Tensor, and models run eagerly; 2.7 was not tried.
COMPILES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
NEEDS_COMPILER = pytest.mark.skipif(not COMPILES, reason="this release of torch compiles no perturbed models")
NAN, INF = float("nan"), float("inf")
POPULATION = 8


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(torch.get_default_device())


X = randn(24, 4)
Y = torch.stack([X[:, 0] * X[:, 1], X[:, 2].sin()], 1)


def network(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Sequential:
    """A small regression model, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))
    return model.to(dtype)


def regression(dtype: torch.dtype = torch.float32) -> Callable[[nn.Module], float]:
    """The negative mean squared error of a model of this dtype."""
    x, y = X.to(dtype), Y.double()

    def fitness(model: nn.Module) -> float:
        return -(model(x).double() - y).square().mean().item()

    return fitness


def population_regression(dtype: torch.dtype = torch.float32) -> Callable[[Population], Tensor]:
    """The same, written for a population."""
    x, y = X.to(dtype), Y.double()

    @batched
    def fitness(population: Population) -> Tensor:
        return -(population(x).double() - y).square().mean((1, 2))

    return fitness


fitness = regression()
population_fitness = population_regression()


class Custom(ESTrainer):
    """The example of the documents."""

    def sample_perturbations(self, population_size: int) -> Tensor:
        return torch.randn(population_size, self.current_params.shape[0], device=self.device) * self.sigma

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        weights = (fitnesses - fitnesses.mean()) / (fitnesses.std() + 1e-8)
        return (weights[:, None] * perturbations).mean(dim=0)


def make(cls: Callable[..., ESTrainer] = EGGROLLTrainer, **options: Any) -> Any:
    """A trainer of the small regression, with an optimizer that has a state of its own."""
    defaults = {
        "fitness_fn": fitness,
        "population_size": POPULATION,
        "learning_rate": 0.1,
        "seed": 1,
        "optimizer": ADAM,
    }
    if "model" not in options:
        options["model"] = network()
    return cls(**{**defaults, **options})


def goes_on(trainer: ESTrainer, twin: ESTrainer) -> None:
    """Assert that two trainers do the same from here on, to the bit: say, one that failed and one that never did."""
    for _ in range(2):
        assert trainer.step() == twin.step()
    assert_same(trainer.state_dict(), twin.state_dict())


def assert_same(a: Any, b: Any, at: str = "") -> None:
    """Assert that two nested states are equal, tensors to the bit."""
    assert type(a) is type(b), f"{at}: {type(a)}, {type(b)}"
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{at} differs"
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys(), f"{at}: {list(a)}, {list(b)}"
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, Sequence) and not isinstance(a, str):
        assert len(a) == len(b), f"{at}: {len(a)}, {len(b)}"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}[{i}]")
    else:
        assert a == b, f"{at}: {a}, {b}"


@contextlib.contextmanager
def global_generator_untouched() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "torch's global generator was used"


def start_python(call: str, *arguments: object) -> Forked:
    """Start a process that imports a module of the tests and calls ``module.function`` with strings."""
    module, _, _ = call.partition(".")
    code = f"import sys, {module}; {call}(*sys.argv[1:])"
    return Forked("-W", "error", "-c", code, *arguments, environment=environment(torch.get_num_threads()))
