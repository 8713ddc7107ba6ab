"""Signals at a bad moment: Ctrl-C, a scheduler's SIGTERM, and an alarm of our own."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Handler = Callable[[int, "FrameType | None"], Any]


class TimeLimitExceeded(BaseException):
    """A block took longer than its limit. No ``Exception``, so that a fitness function's own ``except`` misses it."""


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[None]:
    """Let a Ctrl-C, or a SIGTERM that somebody handles, during the block take effect after it, also if it raises.

    A second one takes effect at once.
    """
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread receives signals.
        yield
        return
    handlers: dict[int, Any] = {int(n): signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    # One that C code handles, or that ends the process, stays as it is.
    handlers = {
        number: handler
        for number, handler in handlers.items()
        if handler is not None and (number == signal.SIGINT or callable(handler))
    }
    arrived: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number in arrived:
            signal.signal(number, handlers[number])
            signal.raise_signal(number)
        arrived.append(number)

    for number in handlers:
        signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let a SIGTERM, as schedulers send it, raise ``SystemExit(143)`` in the block, so that what must be done is done.

    Where somebody handles the signal already, or in a thread other than the main one, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def time_limit(seconds: float | None, *, exit_when_stuck: bool = False) -> Iterator[None]:
    """Raise :class:`TimeLimitExceeded` in the block when it has taken ``seconds``.

    Native code that does not return to Python cannot be interrupted. It takes the main thread, and a system with
    alarms; elsewhere there is no limit.

    Args:
        seconds: The limit, or None.
        exit_when_stuck: Whether to end the process, with a traceback, where the block goes on for as long again.
    """
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "setitimer"):
        yield
        return
    running = True

    def stop(number: int, frame: FrameType | None) -> None:
        if running:
            raise TimeLimitExceeded

    before = signal.signal(signal.SIGALRM, stop)
    if exit_when_stuck:
        faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if exit_when_stuck:
            faulthandler.cancel_dump_traceback_later()
