"""The history of a run in a checkpoint: compressed columns instead of millions of Python numbers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Types of compressed columns and their formats. Booleans and integers beyond 64 bits are stored as they are.
_KINDS: dict[type, np.dtype[Any]] = {float: np.dtype("<f8"), int: np.dtype("<i8")}


def pack(history: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return a history for a file: each list of numbers as compressed bytes, other lists unchanged.

    Numbers are stored in single precision if that is exact. Bytes of equal significance are stored next to each other:
    high bytes change little, so they compress well.

    Args:
        history: A list for each metric, with one entry for each generation. An entry may be None.

    Example:
        >>> history = {"generation": list(range(1, 1001)), "sigma": [0.1] * 1000, "note": [None, "new"]}
        >>> packed = pack(history)
        >>> packed["generation"]["data"].numel() + packed["sigma"]["data"].numel() < 200
        True
        >>> unpack(packed) == history
        True
    """
    return {key: _pack(values) for key, values in history.items()}


def unpack(history: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the history that :func:`pack` was given. Lists, as in older files, stay unchanged."""
    return {key: _unpack(values) if isinstance(values, dict) else list(values) for key, values in history.items()}


def _pack(values: list[Any]) -> Any:
    kinds = set(map(type, values))
    missing = type(None) in kinds
    kind = next(iter(kinds - {type(None)}), None)
    if kind not in _KINDS or len(kinds) - missing != 1:
        return list(values)
    known = np.array([value is not None for value in values]) if missing else None
    try:
        numbers = np.array([value for value in values if value is not None] if missing else values, _KINDS[kind])
    except OverflowError:
        return list(values)
    column = {"length": len(values), "dtype": numbers.dtype.str}
    if kind is float:
        with np.errstate(over="ignore"):
            narrow = numbers.astype("<f4")
        if narrow.astype("<f8").tobytes() == numbers.tobytes():
            numbers, column["dtype"] = narrow, narrow.dtype.str
    else:
        # Store differences: counters rise by one, and most other integers are constant.
        numbers = np.diff(numbers, prepend=np.zeros(1, numbers.dtype))
    column["data"] = _compressed(numbers)
    return column if known is None else {**column, "known": _compressed(np.packbits(known))}


def _unpack(column: Mapping[str, Any]) -> list[Any]:
    dtype = np.dtype(column["dtype"])
    numbers = _decompressed(column["data"], dtype)
    if dtype.kind == "i":
        numbers = np.cumsum(numbers, dtype=dtype)
    values = numbers.tolist()
    if "known" not in column:
        return list(values)
    known = np.unpackbits(_decompressed(column["known"], np.dtype("u1")), count=column["length"])
    rest = iter(values)
    return [next(rest) if here else None for here in known.tolist()]


def _compressed(numbers: np.ndarray[Any, Any]) -> Tensor:
    # Transpose bytes from [index, significance] to [significance, index].
    planes = numbers.view(np.uint8).reshape(len(numbers), -1).T
    return torch.frombuffer(bytearray(zlib.compress(planes.tobytes(), 2)), dtype=torch.uint8)


def _decompressed(data: Tensor, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    planes = np.frombuffer(zlib.decompress(data.numpy().tobytes()), np.uint8)
    return np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).view(dtype).ravel()
