"""One member, evaluated alone: what a fitness *is*, by definition, and what everything else is compared with.

The user's own model object holds the member's weights, the function is called, and everything is put back.
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
    """Return the fitness of one member, and what its evaluation has changed in the model, which is undone.

    Args:
        population: The members.
        function: From a model to its fitness.
        index: Of the member in the population.
        generators: The global generators, which are seeded from the seed, the generation and the member.
        interception: Is on meanwhile, if given.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(keyed(generators, *population.member_key(index)))
        stack.enter_context(thread_modes.kept())
        changed = stack.enter_context(population.holding(index))
        if interception is not None:
            stack.enter_context(interception)
        value = function(population.model)
    return value, changed
