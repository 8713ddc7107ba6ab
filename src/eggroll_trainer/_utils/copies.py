"""Copies of what is kept, of plain types that load without running code."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
from torch import Tensor

_UNCHANGING = {bool, float, int, str, type(None)}


def plain_copy(value: Any) -> Any:
    """Return a deep copy in which NumPy's numbers, which only code could load again, are Python's.

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
            # Histories are long.
            return value[:] if type(value) is list else value
        return type(value)(plain_copy(v) for v in value)
    return copy.deepcopy(value)
