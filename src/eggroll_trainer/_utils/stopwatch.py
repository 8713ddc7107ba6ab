"""Where the time of a generation goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence


class Stopwatch:
    """Seconds by the name of what they were spent on; those of a block inside another one count there alone.

    Args:
        names: Of what can be timed.

    Attributes:
        seconds: By name, since it was made or restarted.

    Example:
        >>> watch = Stopwatch(["outside", "inside"])
        >>> with watch.timing("outside"), watch.timing("inside"):
        ...     time.sleep(0.01)
        >>> watch.seconds["outside"] < 0.01 <= watch.seconds["inside"]
        True
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        # What is timed now, the innermost last, and since when.
        self._running: list[str] = []
        self._since = 0.0

    def restart(self) -> None:
        """Begin again at zero."""
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
        """Count seconds, which were counted or are being counted under ``origin``, under another name instead."""
        self.seconds[origin] -= seconds
        self.seconds[name] += seconds

    def _count(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
