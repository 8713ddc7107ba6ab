"""Detects members that wait for each other.

All members run in one thread. If a member holds a lock while it waits for the model, the next member that takes the
lock blocks the thread forever.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

# Seconds without a turn and without computation that count as a deadlock: if all threads of the process wait for locks,
# and if only the main thread does (others may wait for something else, as in a notebook).
_PATIENCE, _LONG_PATIENCE = 3.0, 30.0
_LITTLE_PATIENCE = 0.3
_TICK = 0.1
# Seconds that the watching thread stays alive after the last block, to be reused.
_STAY = 1.0
# By default this signal is ignored, and Python does not use it.
_SIGNAL: signal.Signals | None = getattr(signal, "SIGURG", None)
_TASKS = "/proc/self/task"


class Deadlock(BaseException):
    """Raised in a fitness function that waits for something that another member holds."""


class DeadlockWatch:
    """Raises :class:`Deadlock` inside the block if members wait for each other. Works on Linux, in the main thread.

    Args:
        on: Whether to detect anything.

    Attributes:
        turns: A counter that the caller changes at each turn of a member.
        patience: Seconds without a turn after which threads are inspected.
    """

    def __init__(self, on: bool = True) -> None:
        self._on = on
        self.turns, self.patience = 0, _PATIENCE
        self._suspect = -1
        self._handler: Any = None

    def __enter__(self) -> DeadlockWatch:
        global _watched
        main = threading.current_thread() is threading.main_thread()
        if self._on and main and _SIGNAL is not None and os.path.isdir(_TASKS):
            self._handler = signal.getsignal(_SIGNAL)
            if self._handler in (signal.SIG_DFL, signal.SIG_IGN):
                signal.signal(_SIGNAL, self._raise)
                _watched = self
                _watcher.watch()
        return self

    def __exit__(self, *exception: object) -> None:
        global _watched
        if _watched is self:
            _watched = None
            assert _SIGNAL is not None
            signal.signal(_SIGNAL, self._handler)

    def shorten_patience(self) -> None:
        """Use less patience: after one deadlock, others are likely."""
        self.patience = _LITTLE_PATIENCE

    def suspect(self, turn: int) -> None:
        """Raise :class:`Deadlock` in the main thread, if the turn is still the same there."""
        self._suspect = turn
        assert _SIGNAL is not None
        signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if _watched is self and self._suspect == self.turns:
            raise Deadlock


class _Watcher:
    """A thread that inspects the active watch now and then. It ends when none was active for a while."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._awake, self._lock = threading.Event(), threading.Lock()

    def watch(self) -> None:
        """Start the thread, if necessary."""
        thread = self._thread
        if thread is not None and not thread.is_alive():
            # After a fork, the thread is gone, and its lock may never be released.
            self._thread, self._awake, self._lock = None, threading.Event(), threading.Lock()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="eggroll-deadlock", daemon=True)
                self._thread.start()
            self._awake.set()

    def _look(self) -> None:
        known: Any = None
        since = cpu = 0.0
        while True:
            watch = _watched
            if watch is None:
                self._awake.clear()
                if _watched is None and not self._awake.wait(_STAY) and self._over():
                    return
                continue
            now, used = time.monotonic(), time.process_time()
            # While any thread computes, members may be waiting for its result.
            if known != (watch, watch.turns) or used - cpu > 0.1 * (now - since):
                known, since, cpu = (watch, watch.turns), now, used
            elif now - since > watch.patience and (
                _all_wait() or (now - since > _LONG_PATIENCE and _waits(threading.main_thread().native_id))
            ):
                watch.suspect(known[1])
            del watch
            time.sleep(_TICK)

    def _over(self) -> bool:
        """Return whether the thread may end: nothing has woken it since."""
        with self._lock:
            if not self._awake.is_set():
                self._thread = None
            return self._thread is None


_watched: DeadlockWatch | None = None
_watcher = _Watcher()


def _all_wait() -> bool:
    """Return whether all threads of the process wait for locks."""
    return all(_waits(int(task)) for task in os.listdir(_TASKS) if int(task) != threading.get_native_id())


def _waits(task: int | None) -> bool:
    try:
        with open(f"{_TASKS}/{task}/wchan", encoding="ascii") as file:
            return "futex" in file.read()
    except OSError:
        # The thread has just ended.
        return True
