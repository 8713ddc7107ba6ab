"""What is known about a fitness function from its evaluations: how members may be run, and when that is checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from .._torch import tree_flatten, tree_unflatten
from ..noise.keys import derive_seed
from .record import copies

# Largest size of a sample call.
_MOST_BYTES = 2**24


@dataclasses.dataclass
class Findings:
    """What is known about a trainer's fitness function.

    Attributes:
        alone: The reason why members are evaluated alone, or None if they are evaluated together.
        reason: A reason to evaluate them alone that this process has found, until all processes know it.
        isolate: Whether members set attributes of the model. These are then kept separately for each member.
        divided: Indices of the global generators that the function uses. Each member then has its own state of them.
        sample: Positional and keyword arguments of a call of the model; None if they are large.
        nondeterministic: Whether two evaluations with the same weights differ, so that checks are impossible.
        model_seconds: Seconds that this process has spent in batched forwards for waiting members.
        check_seconds: Seconds that this process has spent in evaluations of single members, for checks.
        draws: Whether the function, or the model, draws random numbers.
        differs: Whether any process has found that evaluations of the same weights may differ.
    """

    alone: str | None = None
    reason: str | None = None
    isolate: bool = False
    divided: set[int] = dataclasses.field(default_factory=set)
    sample: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    nondeterministic: bool = False
    model_seconds: float = 0.0
    check_seconds: float = 0.0
    draws: bool = False
    differs: bool = False
    # Number of generations that this process has evaluated since checks began, and the last of them.
    _evaluated: int = 0
    _generation: int | None = None
    _kind: Hashable = None
    _structure: Hashable = None
    _first_chunk: bool = True

    def __reduce__(self) -> Any:
        # Everything else is about this process.
        return _findings, (self.alone, self.differs)

    def begin_generation(self, generation: int, fitness_fn: Callable[..., Any], model: nn.Module) -> None:
        """Note that a generation begins. Checks start again if the function or the structure of the model is new."""
        kind, structure = _kind_of(fitness_fn), _structure_of(model)
        if kind != self._kind or structure != self._structure:
            if self._kind is not None and kind != self._kind:
                self.alone, self.reason, self.isolate, self.divided, self.nondeterministic = (
                    None,
                    None,
                    False,
                    set(),
                    False,
                )
                self.draws = self.differs = False
            self._kind, self._structure = kind, structure
            self._evaluated, self._generation, self._first_chunk = 0, None, True
        if generation != self._generation:
            self._generation = generation
            self._evaluated += 1

    @property
    def noise(self) -> bool:
        """Whether this process has found that evaluations of the same weights may differ."""
        return self.nondeterministic or self.draws or bool(self.divided)

    def noisy(self, fitness_fn: Callable[..., Any]) -> bool:
        """Return whether the fitness is noisy: the function's attribute ``noisy``, or ``differs`` without one."""
        while isinstance(fitness_fn, functools.partial) and not hasattr(fitness_fn, "noisy"):
            fitness_fn = fitness_fn.func
        return bool(getattr(fitness_fn, "noisy", self.differs))

    def decide(self, alone: str | None) -> None:
        """Set, in every process, the reason why members are evaluated alone, or None."""
        self.alone = alone
        if alone is not None:
            self.reason = None

    def note_sample(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of a call of the model as the sample, if there is none yet."""
        if self.sample is None:
            leaves, spec = tree_flatten((args, kwargs))
            if sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)) <= _MOST_BYTES:
                self.sample = tree_unflatten(copies(leaves), spec)

    def to_check(self, seed: int, first: int, size: int, population_size: int) -> list[int]:
        """Return the members of a chunk to check, by their indices in it.

        In the first generation, these are the first member, the last, and one drawn from the seed. In generations 2, 4,
        8, … it is one drawn from the seed. If the first chunk of a process contains none of them, its first member is
        checked. For batched functions of large models, :meth:`.Population.remember` limits their number.

        Args:
            seed: Seed of the run.
            first: Index of the chunk's first member.
            size: Number of members in the chunk.
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
    """Return a key that is equal for functions with the same code, such as closures over different data."""
    while isinstance(fitness_fn, functools.partial):
        fitness_fn = fitness_fn.func
    function = getattr(fitness_fn, "__func__", fitness_fn)
    code = getattr(function, "__code__", None)
    return id(fitness_fn) if code is None else code


def _structure_of(model: nn.Module) -> Hashable:
    return tuple((id(module), module.training) for module in model.modules())
