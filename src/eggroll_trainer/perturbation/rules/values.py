"""Rules for reading a value, such as ``if x.sum() > 0``: allowed under ``torch.vmap`` if all members agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batching import common_value
from ..tensor import densify, rule


def _register(name: str) -> None:
    operation = getattr(torch.Tensor, name)

    @rule(operation, always=True)
    def read(input: Any) -> Any:
        input = densify(input)
        value = common_value(input)
        return NotImplemented if value is None or value is input else operation(value)


for _name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist"):
    _register(_name)


@rule(torch.equal, torch.Tensor.equal, always=True)
def _equal(input: Any, other: Any) -> Any:
    one, two = densify(input), densify(other)
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return NotImplemented
    a, b = common_value(one), common_value(two)
    if a is None or b is None or (a is one and b is two):
        return NotImplemented
    return torch.equal(a, b)
