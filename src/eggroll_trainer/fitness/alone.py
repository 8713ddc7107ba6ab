"""Evaluates one member alone. This defines what a fitness is; faster evaluations are compared with it.

The member's weights are put into the user's own model object, the function is called, and everything is restored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from torch import nn

from ..population import Population
from ..population.interception import Interception
from . import thread_modes
from .randomness import Source, keyed
from .scores import Score


def score(
    population: Population,
    function: Callable[[nn.Module], Score],
    index: int,
    generators: Sequence[Source],
    interception: Interception | None = None,
) -> tuple[Score, list[str]]:
    """Return the fitness of one member, and descriptions of what its evaluation has changed in the model.

    The changes are undone.

    Args:
        population: The members.
        function: Takes a model and returns its fitness.
        index: Index of the member in the population.
        generators: The global generators, which are seeded from the seed, the generation and the member.
        interception: An interception of the model's calls to switch on during the evaluation, or None.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(keyed(generators, *population.member_key(index)))
        stack.enter_context(thread_modes.kept())
        changed = stack.enter_context(population.holding(index))
        if interception is not None:
            stack.enter_context(interception)
        value = function(population.model)
    return value, changed
