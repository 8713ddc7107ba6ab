"""Speeds up the turns of many members: one thread for small tensors, and fewer garbage collections."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch

# torch uses several threads for elementwise operations from this many numbers on.
_GRAIN = 32768
# Number of new objects after which we collect young garbage, such as cycles that hold tensors.
_YOUNG = 100_000


@contextlib.contextmanager
def threads_for(numbers: int | None) -> Iterator[None]:
    """Run the block with one intra-op thread if its tensors are small.

    Members work one after the other on their own results. For small tensors a second thread is no gain, but torch waits
    for it: for milliseconds, if another process is using its core.

    Args:
        numbers: Size of the largest tensor in the block, or None if unknown.
    """
    with contextlib.nullcontext() if numbers is None or numbers >= _GRAIN else one_thread():
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run the block with one intra-op thread, unless the block sets another number itself."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() == 1:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def young_garbage_only() -> Iterator[Callable[[], None]]:
    """Pause automatic garbage collection inside the block, and yield a function to call now and then instead.

    The live objects of many members would trigger full collections of the process. These would find almost nothing, as
    members leave few cycles behind.
    """
    if not gc.isenabled():
        yield lambda: None
        return
    gc.disable()
    try:
        yield _collect
    finally:
        gc.enable()


def _collect() -> None:
    """Collect the young generations, if there are many new objects."""
    if gc.get_count()[0] > _YOUNG:
        gc.collect(1)
