"""What makes a thousand members' turns quick: one thread for small work, and no search for old garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch

# torch does not share elementwise work of fewer numbers than this among threads.
_GRAIN = 32768
# Objects after which garbage of the functions' own making is looked for, cycles that hold tensors say.
_YOUNG = 100_000


@contextlib.contextmanager
def threads_for(numbers: int | None) -> Iterator[None]:
    """Run the block with one intra-op thread if what it works on is small.

    The members work one after the other on their own results. On small tensors a second thread gains nothing and is
    waited for all the same, for milliseconds where another process is on its core.

    Args:
        numbers: Size of the largest tensor that is worked on, or None if it is not known.
    """
    with contextlib.nullcontext() if numbers is None or numbers >= _GRAIN else one_thread():
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run the block with one intra-op thread, unless it sets another number itself."""
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
    """Pause automatic garbage collection inside the block, and yield a function to be called now and then instead.

    So many live objects at once would set off collections of everything in the process, for nothing: members leave
    hardly a cycle behind.
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
    """Look for cycles among the objects made since the last time, if there are many."""
    if gc.get_count()[0] > _YOUNG:
        gc.collect(1)
