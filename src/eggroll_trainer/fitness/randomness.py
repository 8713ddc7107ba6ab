"""The global random generators: seeded for each evaluation, and restored after it.

A fitness function that draws from torch's, NumPy's or Python's global generator gets numbers that depend only on the
seed of the run, the generation and the member.
"""

from __future__ import annotations

import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..noise.keys import derive_seed, keyed_generator

Key = tuple[int | str, ...]


class Source(ABC):
    """A global random generator."""

    @abstractmethod
    def get(self) -> Any:
        """Return its state."""

    @abstractmethod
    def set(self, state: Any) -> None:
        """Set its state."""

    @abstractmethod
    def seed(self, key: Key) -> None:
        """Seed it from the key."""

    def same(self, one: Any, other: Any) -> bool:
        """Return whether two states are equal."""
        return bool(one == other)


class TorchSource(Source):
    """torch's global generator of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
        self._where = () if device.type == "cpu" else (device,)

    def get(self) -> Any:
        """Return its state."""
        return self._module.get_rng_state(*self._where)

    def set(self, state: Any) -> None:
        """Set its state."""
        self._module.set_rng_state(state, *self._where)

    def seed(self, key: Key) -> None:
        """Seed it from the key."""
        self.set(keyed_generator(*key, device=self._device).get_state())

    def same(self, one: Any, other: Any) -> bool:
        """Return whether two states are equal."""
        return torch.equal(one, other)


class NumPySource(Source):
    """NumPy's global generator."""

    def get(self) -> Any:
        """Return its state."""
        return np.random.get_state()

    def set(self, state: Any) -> None:
        """Set its state."""
        np.random.set_state(state)

    def seed(self, key: Key) -> None:
        """Seed it from the key."""
        seed = derive_seed("numpy", *key)
        np.random.seed([seed % 2**32, seed >> 32])

    def same(self, one: Any, other: Any) -> bool:
        """Return whether two states are equal."""
        return one[2:] == other[2:] and np.array_equal(one[1], other[1])


class PythonSource(Source):
    """Python's global generator."""

    def get(self) -> Any:
        """Return its state."""
        return random.getstate()

    def set(self, state: Any) -> None:
        """Set its state."""
        random.setstate(state)

    def seed(self, key: Key) -> None:
        """Seed it from the key."""
        random.seed(derive_seed("python", *key))


def sources(device: torch.device) -> list[Source]:
    """Return the global generators that a fitness function may use, torch's first."""
    of_device = [] if device.type in ("cpu", "meta") else [TorchSource(device)]
    return [TorchSource(torch.device("cpu")), *of_device, NumPySource(), PythonSource()]


@contextlib.contextmanager
def keyed(generators: Sequence[Source], *key: int | str) -> Iterator[None]:
    """Seed global generators from ``key`` inside the block, and restore them after it."""
    before = [source.get() for source in generators]
    try:
        seed_all(generators, *key)
        yield
    finally:
        for source, state in zip(generators, before, strict=True):
            source.set(state)


def seed_all(generators: Sequence[Source], *key: int | str) -> None:
    """Seed global generators from ``key``."""
    for source in generators:
        source.seed(key)
