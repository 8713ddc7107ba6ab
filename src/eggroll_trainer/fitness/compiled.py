"""Compiled code of a fitness function, such as a compiled loss.

While members take turns it runs eagerly, as compiled code cannot be suspended. It rounds differently then, so a check
runs it eagerly too.
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
    # Without this module, nothing is compiled; importing it takes a second.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def restored(state: Any) -> Iterator[None]:
    """Inside the block, run compiled code as it was when ``compiler_state()`` returned ``state``."""
    inside = compiler_state()
    set_compiler_state(state)
    try:
        yield
    finally:
        set_compiler_state(inside)
