"""What evaluations have shown about a fitness function: how its members may be run, and when that is checked again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from .._torch import tree_flatten, tree_unflatten
from ..noise.keys import derive_seed
from .record import copies

# Of the sample.
_MOST_BYTES = 2**24


@dataclasses.dataclass
class Findings:
    """What is known about a trainer's fitness function.

    Attributes:
        alone: Why members are evaluated alone, or None while nothing speaks against running them together.
        reason: Why they will have to be, found out in this process, before all processes have been told.
        isolate: Whether members set attributes of the model, which are then kept apart.
        divided: Indices of the global generators that the function draws from: each member has a state of its own.
        sample: Arguments and keyword arguments of a call of the model, unless they are large.
        unjudgeable: Whether the function differs from itself, so that no check can say anything.
        model_seconds: What forwards that members waited for have taken in this process.
        draws: Whether it draws random numbers, or the model does.
        differs: Whether some process has found one of these: with other random numbers the same weights earn something
            else.
    """

    alone: str | None = None
    reason: str | None = None
    isolate: bool = False
    divided: set[int] = dataclasses.field(default_factory=set)
    sample: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    unjudgeable: bool = False
    model_seconds: float = 0.0
    draws: bool = False
    differs: bool = False
    # Generations that this process has taken part in since the checks began, and the last one of them.
    _evaluated: int = 0
    _generation: int | None = None
    _kind: Hashable = None
    _structure: Hashable = None
    _first_chunk: bool = True

    def __reduce__(self) -> Any:
        # The rest holds for this process.
        return _findings, (self.alone, self.differs)

    def begin_generation(self, generation: int, fitness_fn: Callable[..., Any], model: nn.Module) -> None:
        """Note that a generation begins; another function or another structure of the model begins checks anew."""
        kind, structure = _kind_of(fitness_fn), _structure_of(model)
        if kind != self._kind or structure != self._structure:
            if self._kind is not None and kind != self._kind:
                self.alone, self.reason, self.isolate, self.divided, self.unjudgeable = None, None, False, set(), False
                self.draws = self.differs = False
            self._kind, self._structure = kind, structure
            self._evaluated, self._generation, self._first_chunk = 0, None, True
        if generation != self._generation:
            self._generation = generation
            self._evaluated += 1

    @property
    def noise(self) -> bool:
        """Whether this process has found that the same weights do not always earn the same."""
        return self.unjudgeable or self.draws or bool(self.divided)

    def noisy(self, fitness_fn: Callable[..., Any]) -> bool:
        """Return whether a fitness may be luck: as the function's attribute ``noisy`` says, or was found."""
        while isinstance(fitness_fn, functools.partial) and not hasattr(fitness_fn, "noisy"):
            fitness_fn = fitness_fn.func
        return bool(getattr(fitness_fn, "noisy", self.differs))

    def decide(self, alone: str | None) -> None:
        """Note what all processes have been told: why members are evaluated alone, or None."""
        self.alone = alone
        if alone is not None:
            self.reason = None

    def note_sample(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call of the model, if there is none yet, with copies of its tensors."""
        if self.sample is None:
            leaves, spec = tree_flatten((args, kwargs))
            if sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)) <= _MOST_BYTES:
                self.sample = tree_unflatten(copies(leaves), spec)

    def to_check(self, seed: int, first: int, size: int, population_size: int) -> list[int]:
        """Return which members of a chunk are to be checked, by their indices in it.

        In the first generation these are the first, the last and one drawn from the seed, in generations 2, 4, 8, …
        after it one. A process whose first chunk has none of them checks its first member.

        Args:
            seed: Of the run.
            first: Index of the chunk's first member.
            size: How many members it has.
            population_size: ``N``.
        """
        at_first, self._first_chunk = self._first_chunk, False
        if self._evaluated & (self._evaluated - 1):
            return []
        chosen = {derive_seed(seed, self._generation or 0, "check") % population_size}
        if self._evaluated == 1:
            chosen |= {0, population_size - 1}
        here = sorted(i - first for i in chosen if first <= i < first + size)
        return here or ([0] if at_first and self._evaluated == 1 else [])


def _findings(alone: str | None, differs: bool) -> Findings:
    return Findings(alone, differs=differs)


def _kind_of(fitness_fn: Callable[..., Any]) -> Hashable:
    """Return what functions have in common that do the same with other data."""
    while isinstance(fitness_fn, functools.partial):
        fitness_fn = fitness_fn.func
    function = getattr(fitness_fn, "__func__", fitness_fn)
    code = getattr(function, "__code__", None)
    return id(fitness_fn) if code is None else code


def _structure_of(model: nn.Module) -> Hashable:
    return tuple((id(module), module.training) for module in model.modules())
