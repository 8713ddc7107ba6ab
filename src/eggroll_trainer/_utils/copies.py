"""Deep copies of plain types, which can be loaded without running code."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
from torch import Tensor

_UNCHANGING = {bool, float, int, str, type(None)}


def plain_copy(value: Any) -> Any:
    """Return a deep copy with NumPy scalars as Python numbers, as loading the former would run code.

    Example:
        >>> plain_copy({"lr": [np.float64(0.5)]})
        {'lr': [0.5]}
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (dict, OrderedDict, Counter):
        return type(value)({plain_copy(k): plain_copy(v) for k, v in value.items()})
    if type(value) in (list, tuple):
        if set(map(type, value)) <= _UNCHANGING:
            # A fast path for histories, which are long.
            return value[:] if type(value) is list else value
        return type(value)(plain_copy(v) for v in value)
    return copy.deepcopy(value)
