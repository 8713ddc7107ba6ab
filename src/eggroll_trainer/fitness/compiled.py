"""Runs compiled code of a fitness function, such as a compiled loss, eagerly.

Compiled code cannot be suspended, so it runs eagerly while members take turns. As eager code rounds differently, a
check runs it eagerly too.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from .._torch import compiler_state, set_compiler_state


def eagerly() -> contextlib.AbstractContextManager[Any]:
    """Inside the block, run compiled code eagerly."""
    # If this module is not imported, nothing is compiled. Importing it would take a second.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def restored(state: Any) -> Iterator[None]:
    """Inside the block, restore a ``state`` of the compiler that ``compiler_state()`` returned."""
    inside = compiler_state()
    set_compiler_state(state)
    try:
        yield
    finally:
        set_compiler_state(inside)
