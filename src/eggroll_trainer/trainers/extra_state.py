"""State that a subclass adds to a trainer: saved with the run if it is registered, else changes cause a warning."""

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

# Larger arrays are compared by identity only, as a checksum takes time.
_MOST_BYTES = 2**24


class ExtraState:
    """The attributes of a trainer that its subclass has registered.

    Args:
        reserved: Names of the attributes of every trainer.

    Attributes:
        initial: First values by name, which ``reset`` restores.
        temporary: Names of attributes that are registered but not saved.
        unsent: Names of attributes that copies of the trainer in other processes do not get, as evaluations do not
            depend on them.
    """

    def __init__(self, reserved: Collection[str]) -> None:
        self.initial: dict[str, Any] = {}
        self.temporary: set[str] = set()
        self.unsent: set[str] = set()
        self._reserved = frozenset(reserved)
        # Fingerprints of unregistered attributes at the first generation.
        self._noted: dict[str, list[tuple[Any, int]]] | None = None

    def register(self, trainer: Any, name: str, value: Any, *, persistent: bool) -> None:
        """Register an attribute; see :meth:`~eggroll_trainer.ESTrainer.register_state`.

        Raises:
            TypeError: The name is not an identifier, or a checkpoint cannot hold the value.
            ValueError: The name is taken.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise TypeError(f"name must be the name of an attribute, got {name!r}")
        if name in self.initial or name in self.temporary:
            raise ValueError(f"{name!r} is registered already: assign to self.{name}")
        if name in self._reserved or hasattr(type(trainer), name):
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
            TypeError: A checkpoint cannot hold one of them.
        """
        values = {name: getattr(trainer, name) for name in self.initial}
        for name, value in values.items():
            check_plain(name, value)
        return values

    def sent(self, trainer: Any) -> dict[str, Any]:
        """Return copies of the values for the copies of the trainer in other processes."""
        return {name: plain_copy(value) for name, value in self.values(trainer).items() if name not in self.unsent}

    def restore(self, trainer: Any, values: Mapping[str, Any], initial: Mapping[str, Any] | None = None) -> None:
        """Give the trainer copies of values, and register new names.

        Args:
            trainer: The trainer.
            values: Values by name.
            initial: Values that ``reset`` restores; unchanged if None.

        Raises:
            ValueError: A tensor and the trainer's own have different shapes.
        """
        for name, value in values.items():
            current = getattr(trainer, name, None)
            if isinstance(current, Tensor) and isinstance(value, Tensor) and current.shape != value.shape:
                raise ValueError(
                    f"{name} has shape {list(value.shape)} in the state and {list(current.shape)} in the trainer"
                )
        for name, value in values.items():
            current = getattr(trainer, name, None)
            device = current.device if isinstance(current, Tensor) else trainer.device
            setattr(trainer, name, _moved(plain_copy(value), device))
            if initial is not None:
                self.initial[name] = _moved(plain_copy(initial[name]), device)

    @contextlib.contextmanager
    def kept(self, trainer: Any) -> Iterator[None]:
        """Restore the values if the block raises."""
        before = plain_copy(self.values(trainer))
        try:
            yield
        except BaseException:
            self.restore(trainer, before)
            raise

    def note(self, trainer: Any) -> None:
        """Record fingerprints of unregistered attributes, at the first generation."""
        if self._noted is None:
            self._noted = {name: _fingerprint(values) for name, values in self._unregistered(trainer)}

    def unregistered_changes(self, trainer: Any) -> list[str]:
        """Return the names of unregistered attributes whose tensors or arrays have changed since then."""
        if self._noted is None:
            return []
        return [
            name
            for name, values in self._unregistered(trainer)
            if not _same(self._noted.get(name), _fingerprint(values))
        ]

    def _unregistered(self, trainer: Any) -> Iterator[tuple[str, list[Any]]]:
        known = {*self._reserved, *self.initial, *self.temporary}
        for name, value in vars(trainer).items():
            values = [] if name in known else list(_arrays(value))
            if values:
                yield name, values

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a copy, without fingerprints: a copy makes its own."""
        return {**self.__dict__, "_noted": None}


def unregistered_warning(cls: str, names: Collection[str]) -> str:
    """Return the warning about changed attributes that are not registered."""
    return (
        f"{cls} has changed {', '.join(names)} during training, but checkpoints and reset() do not include it: register"
        f" it in __init__ with self.register_state({next(iter(names))!r}, value), or with persistent=False if it need"
        " not be saved"
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
        # Inference tensors have no version counter.
        return 0 if value.is_inference() else value._version
    return zlib.crc32(value.tobytes()) if value.nbytes <= _MOST_BYTES and value.dtype != object else 0


def _same(one: list[tuple[Any, int]] | None, other: list[tuple[Any, int]]) -> bool:
    if one is None or len(one) != len(other):
        return False
    return all(a() is b() and m == n for (a, m), (b, n) in zip(one, other, strict=True))
