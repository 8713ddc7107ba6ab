"""Warnings, each given once, and by the first of the processes that share a run."""

from __future__ import annotations

import warnings


class Warned:
    """The warnings that have been given.

    Attributes:
        quiet: Whether to keep them for another process to give.
    """

    def __init__(self) -> None:
        self.quiet = False
        self._kinds: set[str] = set()
        self._kept: list[tuple[str, str]] = []

    def once(self, message: str, kind: str | None = None, category: type[RuntimeWarning] = RuntimeWarning) -> None:
        """Warn, unless the same, or something of the same kind, was said before."""
        kind = message if kind is None else kind
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        if self.quiet:
            self._kept.append((message, kind))
        else:
            warnings.warn(message, category, stacklevel=2)

    def take(self) -> tuple[tuple[str, str], ...]:
        """Return messages and kinds of the warnings that were kept, which are then forgotten."""
        kept, self._kept = tuple(self._kept), []
        return kept
