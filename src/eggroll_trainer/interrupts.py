"""Ctrl-C at a bad moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[None]:
    """Let a Ctrl-C during the block take effect after it, also if the block raises; a second one, at once."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():
        # Somebody else handles it, or it is another thread's: only the main thread receives signals.
        yield
        return
    arrived = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        if arrived:
            signal.signal(signal.SIGINT, handler)
            signal.raise_signal(signal.SIGINT)
        arrived = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if arrived:
            signal.raise_signal(signal.SIGINT)
