"""Rules for looking up rows: ``embedding``, ``embedding_bag``, and indexing the first dimension of a weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batching import apply
from ..tensor import PerturbedTensor, rule
from .linear import rows_of


class _PerturbedRows(torch.autograd.Function):
    """``W[index] + A[index] Bᵀ`` with a batching rule that computes and adds the low-rank part in one pass.

    Shapes, for one member: ``index [...]``, ``W [O, I]``, ``A [O, R]``, ``B [I, R]`` → ``[..., I]``.
    """

    @staticmethod
    def forward(index: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.embedding(index, W) + F.linear(F.embedding(index, A), B)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing, as evolution strategies don't differentiate."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, index: Tensor, W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, int]:
        if in_dims[1] is not None or in_dims[2] is None or in_dims[3] is None:
            # This is the user's own vmap inside the model: it does not map over members.
            return torch.vmap(_PerturbedRows.forward, in_dims)(index, W, A, B), 0
        if torch.is_autocast_enabled(W.device.type):
            # Under autocast a lookup keeps the weight's dtype, but the product below would not.
            with torch.autocast(W.device.type, enabled=False):
                return _PerturbedRows.vmap(info, in_dims, index, W, A, B)
        N = info.batch_size
        A, B = A.movedim(in_dims[2], 0), B.movedim(in_dims[3], 0)
        if in_dims[0] is None:
            flat = index.reshape(-1)
            centre = F.embedding(flat, W)
            out = torch.baddbmm(centre.expand(N, *centre.shape), A.index_select(1, flat), B.mT)
            return out.reshape(N, *index.shape, -1), 0
        index = index.movedim(in_dims[0], 0)
        flat = index.reshape(N, -1)
        centre = F.embedding(flat, W)
        low = A.mT.gather(2, flat[:, None].expand(N, A.shape[2], -1))  # [N, R, rows]
        out = centre.baddbmm_(low.mT, B.mT)
        return out.reshape(*index.shape, -1), 0


def perturbed_rows(W: PerturbedTensor, index: Tensor) -> Tensor:
    """Return ``(W + A Bᵀ)[index]`` of one member; ``index [...] → [..., *W.shape[1:]]``."""
    rows = apply(_PerturbedRows, index, W.centre.flatten(1), W.A, W.B)
    return rows.reshape(*index.shape, *W.shape[1:])


@rule(F.embedding)
def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not isinstance(weight, PerturbedTensor) or weight.ndim != 2 or max_norm is not None or sparse:
        return NotImplemented
    return perturbed_rows(weight, input)


@rule(torch.embedding)
def _torch_embedding(
    weight: Any, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    return _embedding(indices, weight, sparse=sparse)


@rule(torch.Tensor.__getitem__)
def _getitem(input: PerturbedTensor, index: Any) -> Any:
    if isinstance(index, int) and not isinstance(index, bool):
        return (input.centre[index].flatten() + F.linear(input.A[index], input.B)).reshape(input.shape[1:])
    if isinstance(index, slice):
        return rows_of(input, index)
    if type(index) is Tensor and index.dtype in (torch.int64, torch.int32):
        return perturbed_rows(input, torch.where(index < 0, index + input.shape[0], index))
    return NotImplemented


@rule(torch.index_select, torch.Tensor.index_select)
def _index_select(input: Any, dim: int, index: Any, *, out: None = None) -> Any:
    if not isinstance(input, PerturbedTensor) or dim % input.ndim != 0 or index.ndim != 1 or out is not None:
        return NotImplemented
    return perturbed_rows(input, index)


@rule(F.embedding_bag, always=True)
def _embedding_bag(
    input: Tensor,
    weight: Any,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    # torch.vmap has no batching rule for embedding_bag. We look up rows and reduce over each bag.
    if max_norm is not None or sparse or weight.ndim != 2 or weight.dtype in (torch.int64, torch.int32):
        return NotImplemented
    if input.ndim == 2:
        bags = input.shape[0]
        bag = torch.arange(bags, device=input.device).repeat_interleave(input.shape[1])
    elif offsets is not None:
        bags = offsets.shape[0] - include_last_offset
        places = torch.arange(input.shape[0], device=input.device)
        bag = (places[:, None] >= offsets[:bags]).sum(1) - 1
    else:
        return NotImplemented
    index = input.reshape(-1)
    rows = F.embedding(index, weight)
    counted = torch.ones_like(index) if padding_idx is None else index.ne(padding_idx % weight.shape[0]).long()
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    if mode == "max":
        rows = rows.masked_fill(~counted.bool()[:, None], -torch.inf)
        largest = rows.new_full((bags, rows.shape[1]), -torch.inf)
        largest = largest.scatter_reduce(0, bag[:, None].expand(rows.shape), rows, "amax")
        return largest.masked_fill(largest == -torch.inf, 0)
    total = rows.new_zeros(bags, rows.shape[1]).index_add(0, bag, rows * counted[:, None].to(rows.dtype))
    if mode == "sum":
        return total
    members = counted.new_zeros(bags).index_add(0, bag, counted)
    return total / members.clamp(min=1)[:, None].to(rows.dtype)
