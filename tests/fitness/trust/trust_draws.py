"""Variations: fitness functions that use the global generators of torch, NumPy and Python."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trust_oracle import Build, Fitness, Kind, Variation, X, Y, loss, of


def torch_noise() -> Tensor:
    return X + torch.randn(6, 4, dtype=torch.float64)


def numpy_noise() -> Tensor:
    return X + torch.from_numpy(np.random.normal(size=(6, 4)))


def python_noise() -> Tensor:
    return X * random.random()


NOISES: dict[str, tuple[Callable[[], Tensor], Callable[[int], Any]]] = {
    "torch": (torch_noise, torch.manual_seed),
    "numpy": (numpy_noise, np.random.seed),
    "python": (python_noise, random.seed),
}


def noisy(model: Any, noise: Callable[[], Tensor]) -> float:
    return sum(loss(model(noise())) for _ in range(3))


def seeds(noise: Callable[[], Tensor], seed: Callable[[int], Any]) -> Fitness:
    def fitness(model: Any) -> float:
        seed(0)
        return noisy(model, noise)

    return fitness


def seeds_in_between(noise: Callable[[], Tensor], seed: Callable[[int], Any]) -> Fitness:
    """Seeds after a first call of the model, as an environment's reset might."""

    def fitness(model: Any) -> float:
        score = 0.0
        for episode in range(2):
            score += loss(model(X))
            seed(episode)
            score += noisy(model, noise)
        return score

    return fitness


def draws(noise: Callable[[], Tensor], seed: Callable[[int], Any]) -> Fitness:
    return functools.partial(noisy, noise=noise)


def seeds_by_a_counter(noise: Callable[[], Tensor], seed: Callable[[int], Any]) -> Build:
    """Another seed in every call."""

    def build(model: nn.Module) -> Fitness:
        counter = itertools.count()

        def fitness(model: Any) -> float:
            seed(next(counter))
            return noisy(model, noise)

        return fitness

    return build


def forked(model: Any) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return noisy(model, torch_noise)


def state_put_back(model: Any) -> float:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    score = noisy(model, torch_noise)
    torch.set_rng_state(state)
    return score + 2 * noisy(model, torch_noise)


def shuffled(model: Any) -> float:
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True)
    return -sum((1 + i) * F.mse_loss(model(x), y).item() for i, (x, y) in enumerate(loader))


def sampled_actions(model: Any) -> float:
    score, x = 0.0, X
    for _ in range(3):
        action = torch.multinomial(model(x).softmax(1), 1).double()
        score += loss(model(x)) + action.mean().item()
        x = X + action
    return score


def dropout_of_the_input(model: Any) -> float:
    return sum(loss(model(F.dropout(X, 0.5))) for _ in range(3))


def all_generators(model: Any) -> float:
    return sum(noisy(model, noise) for noise, _ in NOISES.values())


def unseeded(model: Any) -> float:
    """A generator that is seeded by the system: two runs differ."""
    generator = np.random.default_rng()
    return loss(model(X + torch.from_numpy(generator.normal(size=(6, 4)))))


VARIATIONS = {
    **{f"{name}-seeds": of(seeds(*own)) for name, own in NOISES.items()},
    **{f"{name}-seeds_in_between": of(seeds_in_between(*own)) for name, own in NOISES.items()},
    **{f"{name}-draws": of(draws(*own), Kind.DRAWN) for name, own in NOISES.items()},
    **{f"{name}-seeds_by_a_counter": Variation(seeds_by_a_counter(*own), Kind.HISTORY) for name, own in NOISES.items()},
    "forked": of(forked),
    "state_put_back": of(state_put_back),
    **{use.__name__: of(use, Kind.DRAWN) for use in (shuffled, sampled_actions, dropout_of_the_input, all_generators)},
    "unseeded": of(unseeded, Kind.HISTORY),
}
