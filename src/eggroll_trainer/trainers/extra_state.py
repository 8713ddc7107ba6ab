"""State that a subclass of a trainer adds: kept with the run if it is registered, and noticed if it is not."""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._utils.copies import plain_copy

# Of larger arrays only the identity is compared, as a checksum takes time.
_MOST_BYTES = 2**24


class ExtraState:
    """The attributes of a trainer that its subclass has registered.

    Args:
        own: Names of the attributes that the trainer keeps itself.

    Attributes:
        initial: What each of them goes back to by ``reset``, by name.
        temporary: Names of those that need not be kept.
    """

    def __init__(self, own: Collection[str]) -> None:
        self.initial: dict[str, Any] = {}
        self.temporary: set[str] = set()
        self._own = frozenset(own)
        # What tells whether another attribute has changed since the first generation.
        self._noted: dict[str, list[tuple[Any, int]]] | None = None

    def register(self, trainer: Any, name: str, value: Any, *, persistent: bool) -> None:
        """Set an attribute of the trainer, and keep it; see :meth:`~eggroll_trainer.ESTrainer.register_state`."""
        if not isinstance(name, str) or not name.isidentifier():
            raise TypeError(f"name must be the name of an attribute, got {name!r}")
        if name in self.initial or name in self.temporary:
            raise ValueError(f"{name!r} is registered already: assign to self.{name}")
        if name in self._own or hasattr(type(trainer), name):
            raise ValueError(f"{name!r} is an attribute of every trainer: take another name")
        if persistent:
            check_plain(name, value)
            self.initial[name] = plain_copy(value)
        else:
            self.temporary.add(name)
        setattr(trainer, name, value)

    def values(self, trainer: Any) -> dict[str, Any]:
        """Return the present values, not copied.

        Raises:
            TypeError: One of them has become something that cannot be kept.
        """
        values = {name: getattr(trainer, name) for name in self.initial}
        for name, value in values.items():
            check_plain(name, value)
        return values

    def restore(self, trainer: Any, values: Mapping[str, Any], initial: Mapping[str, Any] | None = None) -> None:
        """Give the trainer copies of values; those that are not registered yet are.

        Args:
            trainer: The trainer.
            values: By name.
            initial: What they go back to by ``reset``; as it was if None.

        Raises:
            ValueError: A tensor is of another shape than the trainer's own.
        """
        for name, value in values.items():
            own = getattr(trainer, name, None)
            if isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape != value.shape:
                raise ValueError(f"{name} has shape {list(value.shape)} there and {list(own.shape)} here")
        for name, value in values.items():
            own = getattr(trainer, name, None)
            device = own.device if isinstance(own, Tensor) else trainer.device
            setattr(trainer, name, _moved(plain_copy(value), device))
            if initial is not None:
                self.initial[name] = _moved(plain_copy(initial[name]), device)

    @contextlib.contextmanager
    def kept(self, trainer: Any) -> Iterator[None]:
        """Put the values back if the block raises."""
        before = plain_copy(self.values(trainer))
        try:
            yield
        except BaseException:
            self.restore(trainer, before)
            raise

    def note(self, trainer: Any) -> None:
        """Note, at the first generation, what tells whether unregistered attributes change."""
        if self._noted is None:
            self._noted = {name: _fingerprint(values) for name, values in self._unregistered(trainer)}

    def lost(self, trainer: Any) -> list[str]:
        """Return the names of attributes with tensors that have changed since, and are not registered."""
        if self._noted is None:
            return []
        return [
            name
            for name, values in self._unregistered(trainer)
            if not _same(self._noted.get(name), _fingerprint(values))
        ]

    def _unregistered(self, trainer: Any) -> Iterator[tuple[str, list[Any]]]:
        known = {*self._own, *self.initial, *self.temporary}
        for name, value in vars(trainer).items():
            values = [] if name in known else list(_arrays(value))
            if values:
                yield name, values

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a copy, which notes by itself what changes."""
        return {**self.__dict__, "_noted": None}


def lost_warning(cls: str, names: Collection[str]) -> str:
    """Return what a user is told whose attributes are lost."""
    return (
        f"{cls} has changed {', '.join(names)} during training, which checkpoints and reset() know nothing of: register"
        f" it in __init__ by self.register_state({next(iter(names))!r}, value), or with persistent=False if it need not"
        " be kept"
    )


def check_plain(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless a value is of types that a checkpoint can hold."""
    if isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a NumPy array, which checkpoints cannot hold: keep it as torch.from_numpy(array)")
    if isinstance(value, Mapping):
        parts: Iterable[Any] = [*value.keys(), *value.values()]
    elif type(value) in (list, tuple):
        parts = value
    elif isinstance(value, (Tensor, bool, int, float, str, type(None), np.generic)):
        return
    else:
        raise TypeError(
            f"{name} is a {type(value).__name__}, which checkpoints cannot hold: keep tensors, numbers, strings, and"
            " lists and dictionaries of them"
        )
    for part in parts:
        check_plain(name, part)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return type(value)({key: _moved(part, device) for key, part in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_moved(part, device) for part in value)
    return value


def _arrays(value: Any) -> Iterator[Any]:
    if isinstance(value, (Tensor, np.ndarray)):
        yield value
    elif isinstance(value, dict):
        yield from (part for part in value.values() if isinstance(part, (Tensor, np.ndarray)))
    elif type(value) in (list, tuple):
        yield from (part for part in value if isinstance(part, (Tensor, np.ndarray)))


def _fingerprint(values: list[Any]) -> list[tuple[Any, int]]:
    return [(weakref.ref(value), _version(value)) for value in values]


def _version(value: Any) -> int:
    if isinstance(value, Tensor):
        # Those made in inference mode do not count their changes.
        return 0 if value.is_inference() else value._version
    return zlib.crc32(value.tobytes()) if value.nbytes <= _MOST_BYTES and value.dtype != object else 0


def _same(one: list[tuple[Any, int]] | None, other: list[tuple[Any, int]]) -> bool:
    if one is None or len(one) != len(other):
        return False
    return all(a() is b() and m == n for (a, m), (b, n) in zip(one, other, strict=True))
