"""Rules for matrix products: ``linear``, ``matmul``, ``addmm``, and the views of a matrix that keep its factors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batching import apply
from ..tensor import PerturbedTensor, autocast_like_linear, rule


class _PerturbedLinear(torch.autograd.Function):
    """``x Wᵀ + (x B) Aᵀ + b`` with a batching rule that computes ``x Wᵀ`` of all members in one large product.

    Shapes, for one member: ``x [..., I]``, ``W [O, I]``, ``A [O, R]``, ``B [I, R]``, ``b [O]`` or None.
    """

    @staticmethod
    def forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, W, b) + F.linear(x @ B, A)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing, as evolution strategies don't differentiate."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor | None
    ) -> tuple[Tensor, int]:
        if in_dims[1] is not None or in_dims[2] is None or in_dims[3] is None:
            # This is the user's own vmap inside the model: it does not map over members.
            return torch.vmap(_PerturbedLinear.forward, in_dims)(x, W, A, B, b), 0
        # Autocast does not cover the in-place product below.
        x, A, B = autocast_like_linear(x), autocast_like_linear(A), autocast_like_linear(B)
        N, O = info.batch_size, W.shape[0]
        A, B = A.movedim(in_dims[2], 0), B.movedim(in_dims[3], 0)
        shared = in_dims[0] is None
        rows = x if shared else x.movedim(in_dims[0], 0)
        leading = rows.shape[:-1] if shared else rows.shape[1:-1]
        rows = rows.reshape((-1, W.shape[1]) if shared else (N, -1, W.shape[1]))
        own_bias = b is not None and in_dims[4] is not None
        base = F.linear(rows, W, None if own_bias else b)
        # Transposed: a product with few rows takes half the time of one with few columns.
        low = torch.matmul(B.mT, rows.mT)  # [N, R, rows]
        high = A.mT  # [N, R, O]
        if own_bias:
            assert b is not None
            # Add the members' biases in the same pass, as one more rank of the low-rank product.
            low = torch.cat([low, low.new_ones(1).expand(N, 1, low.shape[-1])], 1)
            high = torch.cat([high, b.movedim(in_dims[4], 0).to(high.dtype)[:, None]], 1)
        if shared:
            out = torch.baddbmm(base.expand(N, *base.shape), low.mT, high)
        else:
            out = base.baddbmm_(low.mT, high)
        return out.reshape(N, *leading, O), 0


def perturbed_linear(x: Tensor, W: PerturbedTensor, b: Tensor | None = None) -> Tensor:
    """Return ``x (W + A Bᵀ)ᵀ + b`` of one member; ``x [..., I] → [..., O]``."""
    return apply(_PerturbedLinear, x, W.centre, W.A, W.B, b)


def _plain(*tensors: Any) -> bool:
    return not any(isinstance(tensor, PerturbedTensor) for tensor in tensors)


@rule(F.linear)
def _linear(input: Tensor, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, PerturbedTensor) or weight.ndim != 2 or not _plain(input, bias):
        return NotImplemented
    return perturbed_linear(input, weight, bias)


@rule(
    torch.matmul,
    torch.mm,
    torch.mv,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.mm,
    torch.Tensor.mv,
)
def _matmul(input: Any, other: Any, *, out: None = None) -> Any:
    if out is not None:
        return NotImplemented
    if isinstance(other, PerturbedTensor) and other.ndim == 2 and _plain(input):
        return perturbed_linear(input, _transpose(other))
    if isinstance(input, PerturbedTensor) and input.ndim == 2 and _plain(other) and other.ndim <= 2:
        # W y = (yᵀ Wᵀ)ᵀ
        return perturbed_linear(other, input) if other.ndim == 1 else perturbed_linear(other.mT, input).mT
    return NotImplemented


@rule(torch.Tensor.__rmatmul__)
def _rmatmul(input: Any, other: Any) -> Any:
    return _matmul(other, input)


@rule(torch.addmm, torch.Tensor.addmm)
def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, out: None = None) -> Any:
    if out is not None or not _plain(input):
        return NotImplemented
    if beta == 1 and alpha == 1 and isinstance(mat2, PerturbedTensor) and _plain(mat1) and input.ndim == 1:
        return perturbed_linear(mat1, _transpose(mat2), input)
    product = _matmul(mat1, mat2)
    return product if product is NotImplemented else beta * input + alpha * product


def _transpose(W: PerturbedTensor) -> PerturbedTensor:
    return PerturbedTensor.wrap(W.centre.mT, W.B, W.A)


@rule(torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
def _t(input: PerturbedTensor) -> Any:
    return _transpose(input) if input.ndim == 2 else NotImplemented


@rule(torch.transpose, torch.Tensor.transpose, torch.swapaxes, torch.Tensor.swapaxes)
def _swap(input: PerturbedTensor, dim0: int, dim1: int) -> Any:
    if input.ndim != 2 or not all(isinstance(dim, int) for dim in (dim0, dim1)):
        return NotImplemented
    return input if dim0 % 2 == dim1 % 2 else _transpose(input)


def rows_of(W: PerturbedTensor, rows: slice) -> PerturbedTensor:
    """Return ``W[rows]`` in factored form."""
    return PerturbedTensor.wrap(W.centre[rows], W.A[rows], W.B)


@rule(torch.chunk, torch.Tensor.chunk)
def _chunk(input: PerturbedTensor, chunks: int, dim: int = 0) -> Any:
    return _split(input, -(-input.shape[0] // chunks), dim)


@rule(torch.split, torch.Tensor.split)
def _split(input: PerturbedTensor, split_size_or_sections: int | list[int], dim: int = 0) -> Any:
    if dim % input.ndim != 0:
        return NotImplemented
    centres = torch.split(input.centre, split_size_or_sections)
    starts = [0]
    for part in centres:
        starts.append(starts[-1] + part.shape[0])
    return tuple(rows_of(input, slice(a, b)) for a, b in zip(starts, starts[1:], strict=False))


@rule(torch.Tensor.detach, torch.detach, torch.Tensor.contiguous, torch.Tensor.requires_grad_)
def _same(input: PerturbedTensor, *args: Any, **kwargs: Any) -> Any:
    return input
