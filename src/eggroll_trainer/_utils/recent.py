"""A dictionary of limited size."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(dict[K, V]):
    """A dictionary that keeps the ``most`` entries that were used last, by ``[]`` or ``get``: an LRU cache.

    Example:
        >>> recent = Recent(2)
        >>> recent["a"], recent["b"] = 1, 2
        >>> recent["a"]
        1
        >>> recent["c"] = 3
        >>> list(recent)
        ['a', 'c']
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __getitem__(self, key: K) -> V:
        value = super().__getitem__(key)
        super().__setitem__(key, self.pop(key, value))
        return value

    def __setitem__(self, key: K, value: V) -> None:
        self.pop(key, None)
        super().__setitem__(key, value)
        while len(self) > self.most:
            del self[next(iter(self))]

    def get(self, key: K, default: V | None = None) -> V | None:  # type: ignore[override]
        """Return the value of a key, or ``default`` if there is none."""
        if key not in self:
            return default
        return self[key]
