"""Rules for looking at a value: a branch that all members take alike is no reason to run them one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batching import unanimous
from ..tensor import densify, rule


def _look(name: str) -> None:
    operation = getattr(torch.Tensor, name)

    @rule(operation, always=True)
    def look(input: Any) -> Any:
        input = densify(input)
        value = unanimous(input)
        return NotImplemented if value is None or value is input else operation(value)


for _name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist"):
    _look(_name)


@rule(torch.equal, torch.Tensor.equal, always=True)
def _equal(input: Any, other: Any) -> Any:
    one, two = densify(input), densify(other)
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return NotImplemented
    a, b = unanimous(one), unanimous(two)
    if a is None or b is None or (a is one and b is two):
        return NotImplemented
    return torch.equal(a, b)
