"""Measures what the time of a generation is spent on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence


class Stopwatch:
    """Adds up the seconds of blocks by name. The time of an inner block does not count for the outer one.

    Args:
        names: The names to count under.

    Attributes:
        seconds: Seconds by name since the stopwatch was made or restarted.

    Example:
        >>> watch = Stopwatch(["outside", "inside"])
        >>> with watch.timing("outside"), watch.timing("inside"):
        ...     time.sleep(0.01)
        >>> watch.seconds["outside"] < 0.01 <= watch.seconds["inside"]
        True
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        # The names of the open blocks, the innermost last, and the time up to which seconds have been counted.
        self._running: list[str] = []
        self._since = 0.0

    def restart(self) -> None:
        """Set all seconds to zero."""
        self._running = []
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Count the block's time under a name."""
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def move(self, seconds: float, origin: str, name: str) -> None:
        """Move seconds that count under ``origin`` to another name. A block under ``origin`` may still be open."""
        self.seconds[origin] -= seconds
        self.seconds[name] += seconds

    def _count(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
