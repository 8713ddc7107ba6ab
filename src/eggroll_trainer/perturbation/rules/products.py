"""Rules for bilinear forms and weight normalisation, which torch.vmap would run in a loop over members."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import weight_norm
from ..tensor import densify, rule


@rule(F.bilinear, torch.bilinear, always=True)
def _bilinear(input1: Tensor, input2: Tensor, weight: Any, bias: Any = None) -> Tensor:
    out = torch.einsum("...i,kij,...j->...k", densify(input1), densify(weight), densify(input2))
    return out if bias is None else out + densify(bias)


@rule(weight_norm, always=True)
def _weight_norm(v: Any, g: Any, dim: int = 0) -> Tensor:
    v, g = densify(v), densify(g)
    others = [i for i in range(v.ndim) if dim == -1 or i != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))
