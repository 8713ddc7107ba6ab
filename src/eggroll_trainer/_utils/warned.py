"""Warnings that are issued once, in the first of the processes that share a run."""

from __future__ import annotations

import warnings


class Warned:
    """Issues each warning once.

    Attributes:
        quiet: Whether to keep warnings for another process, instead of issuing them.
    """

    def __init__(self) -> None:
        self.quiet = False
        self._kinds: set[str] = set()
        self._kept: list[tuple[str, str]] = []

    def once(self, message: str, kind: str | None = None, category: type[RuntimeWarning] = RuntimeWarning) -> None:
        """Issue a warning, unless one of the same kind (by default, the same message) was issued before."""
        kind = message if kind is None else kind
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        if self.quiet:
            self._kept.append((message, kind))
        else:
            warnings.warn(message, category, stacklevel=2)

    def take(self) -> tuple[tuple[str, str], ...]:
        """Return the messages and kinds of the warnings that were kept, and clear them."""
        kept, self._kept = tuple(self._kept), []
        return kept
