"""The global generators of random numbers, where a fitness function seeds them.

A function that calls ``torch.manual_seed(0)`` expects the same numbers from there on, whoever else draws while it
waits. So the states of the generators that it seeds are handed over with it. Functions that only draw share one stream.
"""

from __future__ import annotations

import pickle
import random
from typing import Any, Protocol

import numpy as np
import torch


class Source(Protocol):
    """One of the global sources of random numbers."""

    def get(self) -> Any:
        """Return its state."""

    def set(self, state: Any) -> None:
        """Put a state back."""

    def branch(self) -> Any:
        """Go on with independent numbers, and return the state to put back afterwards."""


class _Torch:
    def __init__(self) -> None:
        self.generators = [torch.default_generator]
        if torch.cuda.is_initialized():
            self.generators += torch.cuda.default_generators

    def get(self) -> Any:
        return [generator.get_state() for generator in self.generators]

    def set(self, state: Any) -> None:
        for generator, own in zip(self.generators, state, strict=True):
            generator.set_state(own)

    def branch(self) -> Any:
        raise AssertionError("members take torch's generator over where they seed it")


class _NumPy:
    def get(self) -> Any:
        return np.random.get_state()

    def set(self, state: Any) -> None:
        np.random.set_state(state)

    def branch(self) -> Any:
        seed = np.random.randint(2**32, size=4, dtype=np.uint32)
        state = self.get()
        np.random.seed(seed)
        return state


class _Python:
    def get(self) -> Any:
        return random.getstate()

    def set(self, state: Any) -> None:
        random.setstate(state)

    def branch(self) -> Any:
        seed = random.getrandbits(128)
        state = self.get()
        random.seed(seed)
        return state


# Asked at every turn: without the way through its module.
_initial_seed = torch.default_generator.initial_seed

# A seed that nobody else uses, to see that somebody has seeded.
_MARK = 0x6567_6772_6F6C_6C00


class RandomStates:
    """Hands the states of the global generators over between the members that take turns.

    Args:
        seeds: Whether the fitness function may seed NumPy's or Python's generator. Whether it seeds torch's shows by
            itself.

    Attributes:
        seeded: Whether a member has seeded torch's generator.
        divided: The other sources that the members use, of which each has a state of its own.
    """

    def __init__(self, seeds: bool) -> None:
        self.seeded = False
        self._torch = _Torch()
        self._seed = _MARK
        # A state begins with the seed that it came from; another one there changes no number that is drawn.
        state = torch.get_rng_state()
        state[:8].view(torch.int64).fill_(self._seed)
        torch.set_rng_state(state)
        self._suspects: list[Source] = [_NumPy(), _Python()] if seeds else []
        self.divided: list[Source] = []
        self._shared: dict[Source, Any] = {}
        self._before: list[bytes] = []

    def enter(self, own: dict[Source, Any], first: bool) -> None:
        """Put a member's states in force.

        Args:
            own: Its states.
            first: Whether it is the first to run in this round: it shows which generators are used.
        """
        for source, state in own.items():
            self._shared[source] = source.get()
            source.set(state)
        for source in self.divided:
            if source not in own:
                self._shared[source] = source.branch()
                own[source] = None
        if first:
            self._before = [pickle.dumps(source.get()) for source in self._suspects]

    def leave(self, own: dict[Source, Any]) -> None:
        """Take a member's states away again, to be put in force when it goes on."""
        if self._before:
            self._divide_used(own)
        if _initial_seed() != self._seed and self._torch not in own:
            # The shared stream is lost; it goes on with another seed.
            own[self._torch] = self._torch.get()
            self.seeded = True
            self._seed += 1
            for generator in self._torch.generators:
                generator.manual_seed(self._seed)
            self._shared[self._torch] = self._torch.get()
        elif own:
            for source in own:
                own[source] = source.get()
        for source in own:
            source.set(self._shared[source])

    def _divide_used(self, own: dict[Source, Any]) -> None:
        """Give the members states of their own of the generators that the first one has used."""
        for source, before in zip([*self._suspects], self._before, strict=True):
            if pickle.dumps(source.get()) != before:
                self._suspects.remove(source)
                self.divided.append(source)
                used = source.get()
                source.set(pickle.loads(before))
                self._shared[source] = source.branch()
                source.set(used)
                own[source] = None
        self._before = []

    def state(self) -> Any:
        """Return the state of torch's generators, to be compared."""
        return [state.tolist() for state in self._torch.get()]
