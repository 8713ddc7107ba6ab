"""Matrix products of tensors with different dtypes, computed in the widest one.

torch promotes dtypes in sums, but raises an error for products. A custom trainer gets its fitnesses in float64, and its
perturbations in the dtype in which it has sampled them. So ``fitnesses @ perturbations`` would fail.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch import tree_leaves, tree_map

_PRODUCTS = {
    *(torch.matmul, torch.mm, torch.mv, torch.bmm, torch.dot, torch.inner, torch.vdot, torch.tensordot, torch.einsum),
    *(torch.ger, torch.outer, torch.addmm, torch.addmv, torch.baddbmm, torch.addbmm, torch.addr, torch.chain_matmul),
    *(torch.linalg.multi_dot, torch.linalg.vecdot, torch.nn.functional.linear),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.Tensor.mm, torch.Tensor.mv),
    *(torch.Tensor.bmm, torch.Tensor.dot, torch.Tensor.inner, torch.Tensor.vdot, torch.Tensor.outer, torch.Tensor.ger),
    *(torch.Tensor.addmm, torch.Tensor.addmv, torch.Tensor.baddbmm, torch.Tensor.addbmm, torch.Tensor.addr),
}


class _Promoted(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            dtypes = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            if len(dtypes) > 1:
                widest = functools.reduce(torch.promote_types, dtypes)
                args, kwargs = tree_map(lambda x: x.to(widest) if isinstance(x, Tensor) else x, (args, kwargs))
        return func(*args, **kwargs)


def promoted_products() -> contextlib.AbstractContextManager[Any]:
    """Inside the block, compute products of tensors with different dtypes in the widest one.

    Example:
        >>> with promoted_products():
        ...     (torch.ones(2, dtype=torch.float64) @ torch.ones(2, 3)).dtype
        torch.float64
    """
    return _Promoted()
