"""Rules for convolutions and transposed convolutions in one, two and three dimensions.

A kernel counts as the matrix of its first dimension by all others. With ``g`` groups, and ``k`` standing for the
kernel's spatial dimensions, that is ``[O, C/g·k]`` for a convolution of ``C`` channels to ``O``, and ``[C, O/g·k]``
for a transposed one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batching import apply
from ..tensor import PerturbedTensor, dense_sum, rule

# (x, W, b, groups=g) → y, with stride, padding and dilation filled in.
Convolve = Callable[..., Tensor]

# On a CPU, one call per member is faster than one call for all if a member has many activations (input and output
# elements) and its kernel is not much larger than these. Measured with 256 members: up to 4 times faster within these
# bounds, up to 3 times slower outside.
_LOOP_ACTIVATIONS = 20_000
_LOOP_KERNEL = 4  # kernel's elements per activation


class _PerturbedConvolution(torch.autograd.Function):
    """Convolution with the kernel ``W + A Bᵀ``, in the fastest of several forms.

    - If all members share the input: one convolution with the centre, and one with the ``R`` kernels in ``B`` of each
      member, whose results are mixed by ``A``.
    - On a CPU, if members have much work: a loop over members, with dense kernels.
    - With several groups: one convolution with the dense kernels of all members as further groups. In a depthwise
      convolution, the low-rank part would cost as much as the whole.
    - Otherwise: one convolution of all members' images with the centre, and one for the low-rank part, with a group for
      each member.

    Shapes, for one member: ``x [images, C, …]``, ``W [O, C/g, …]`` (transposed: ``[C, O/g, …]``), ``A`` and ``B`` of
    the matrix that the kernel counts as, ``b [O]`` or None.
    """

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor | None, convolve: Convolve, transposed: bool, groups: int
    ) -> Tensor:
        if groups > 1:
            return convolve(x, dense_sum(W, A, B), b, groups=groups)
        factored = _factored_transposed if transposed else _factored
        return factored(x[None], W, A[None], B[None], None if b is None else b[None], convolve)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing, as evolution strategies don't differentiate."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        x: Tensor,
        W: Tensor,
        A: Tensor,
        B: Tensor,
        b: Tensor | None,
        convolve: Convolve,
        transposed: bool,
        groups: int,
    ) -> tuple[Tensor, int]:
        if in_dims[1] is not None or in_dims[2] is None or in_dims[3] is None:
            # This is the user's own vmap inside the model: it does not map over members.
            forward = functools.partial(
                _PerturbedConvolution.forward, convolve=convolve, transposed=transposed, groups=groups
            )
            return torch.vmap(forward, in_dims[:5])(x, W, A, B, b), 0
        N = info.batch_size
        A, B = A.movedim(in_dims[2], 0), B.movedim(in_dims[3], 0)
        own_bias = b is not None and in_dims[4] is not None
        biases = None if b is None else b.movedim(in_dims[4], 0) if own_bias else b.expand(N, -1)
        if in_dims[0] is None and groups == 1 and not transposed:
            return _shared_input(x, W, A, B, biases, convolve), 0
        x = x.expand(N, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        if _worth_a_loop(x, W, convolve, transposed, groups):
            return _member_by_member(x, W, A, B, biases, convolve, groups), 0
        if groups > 1:
            kernels = dense_sum(W.expand(N, *W.shape), A, B)
            return _one_group_each(x, kernels, biases, convolve, groups), 0
        factored = _factored_transposed if transposed else _factored
        return factored(x, W, A, B, biases, convolve), 0


def _shared_input(x: Tensor, W: Tensor, A: Tensor, B: Tensor, biases: Tensor | None, convolve: Convolve) -> Tensor:
    N, R = A.shape[0], A.shape[2]
    centre = convolve(x, W, None)  # [images, O, …]
    low = convolve(x, B.mT.reshape(N * R, *W.shape[1:]), None)
    low = low.reshape(x.shape[0], N, R, -1).transpose(0, 1)
    low, A = _with_biases(low, A, biases)
    return torch.matmul(A[:, None], low).add_(centre.flatten(2)).reshape(N, *centre.shape)


def _factored(x: Tensor, W: Tensor, A: Tensor, B: Tensor, biases: Tensor | None, convolve: Convolve) -> Tensor:
    N, images = x.shape[:2]
    R = A.shape[2]
    centre = convolve(x.flatten(0, 1), W, None)  # [N·images, O, …]
    low = _one_group_each(x, B.mT.reshape(N, R, *W.shape[1:]), None, convolve)  # [N, images, R, …]
    low, A = _with_biases(low.flatten(3), A, biases)
    A = A[:, None].expand(N, images, *A.shape[1:])
    out = torch.baddbmm(centre.flatten(2), A.flatten(0, 1).to(centre.dtype), low.flatten(0, 1))
    return out.reshape(N, images, *centre.shape[1:])


def _factored_transposed(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, biases: Tensor | None, convolve: Convolve
) -> Tensor:
    N, images = x.shape[:2]
    R = A.shape[2]
    centre = convolve(x.flatten(0, 1), W, None)
    mixed = torch.matmul(A.mT[:, None], x.flatten(3)).reshape(N, images, R, *x.shape[3:])
    low = _one_group_each(mixed, B.mT.reshape(N, R, *W.shape[1:]), biases, convolve)
    return low + centre.reshape(low.shape)


def _one_group_each(x: Tensor, kernels: Tensor, biases: Tensor | None, convolve: Convolve, groups: int = 1) -> Tensor:
    """Convolve each member's images ``[N, images, C, …]`` with its own kernel, as groups of one convolution."""
    N, images, C = x.shape[:3]
    folded = x.transpose(0, 1).reshape(images, N * C, *x.shape[3:])
    bias = None if biases is None else biases.reshape(-1)
    out = convolve(folded, kernels.flatten(0, 1), bias, groups=N * groups)
    return out.reshape(images, N, -1, *out.shape[2:]).transpose(0, 1)


def _member_by_member(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, biases: Tensor | None, convolve: Convolve, groups: int
) -> Tensor:
    matrix = W.flatten(1)
    out = None
    for n in range(x.shape[0]):
        kernel = torch.addmm(matrix, A[n], B[n].mT).view(W.shape)
        y = convolve(x[n], kernel, None if biases is None else biases[n], groups=groups)
        out = y.new_empty(x.shape[0], *y.shape) if out is None else out
        out[n] = y
    assert out is not None
    return out


def _with_biases(low: Tensor, A: Tensor, biases: Tensor | None) -> tuple[Tensor, Tensor]:
    """Append the biases to ``A [N, O, R]`` as one more column, and ones to ``low [N, images, R, positions]``."""
    if biases is None:
        return low, A
    ones = low.new_ones(()).expand(*low.shape[:2], 1, low.shape[3])
    return torch.cat([low, ones], 2), torch.cat([A, biases[..., None].to(A.dtype)], 2)


def _worth_a_loop(x: Tensor, W: Tensor, convolve: Convolve, transposed: bool, groups: int) -> bool:
    # In low precision, a dense kernel would round small perturbations away.
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or W.dtype not in (torch.float32, torch.float64):
        return False
    stride = convolve.keywords["stride"]  # type: ignore[attr-defined]
    step = stride ** (x.ndim - 3) if isinstance(stride, int) else math.prod(stride)
    per_channel = x.shape[1] * math.prod(x.shape[3:])
    outputs = per_channel * step * W.shape[1] * groups if transposed else per_channel / step * W.shape[0]
    activations = per_channel * x.shape[2] + outputs
    return activations >= _LOOP_ACTIVATIONS and W.numel() <= _LOOP_KERNEL * activations


def _convolution(function: Any, x: Any, W: Any, b: Any, groups: int, transposed: bool, **settings: Any) -> Any:
    """Return the convolution of ``x [images, C, …]`` or ``[C, …]`` with a perturbed kernel."""
    if not isinstance(W, PerturbedTensor) or isinstance(x, PerturbedTensor) or isinstance(b, PerturbedTensor):
        return NotImplemented
    images = x if x.ndim == W.ndim else x[None]
    convolve = functools.partial(function, **settings)
    out = apply(_PerturbedConvolution, images, W.centre, W.A, W.B, b, convolve, transposed, groups)
    return out if x.ndim == W.ndim else out[0]


def _register(function: Any) -> None:
    @rule(function)
    def convolution(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        settings = {"stride": stride, "padding": padding, "dilation": dilation}
        return _convolution(function, input, weight, bias, groups, False, **settings)


def _register_transposed(function: Any) -> None:
    @rule(function)
    def transposed_convolution(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        settings = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
        return _convolution(function, input, weight, bias, groups, True, **settings)


for _spatial in (1, 2, 3):
    _register(getattr(F, f"conv{_spatial}d"))
    _register_transposed(getattr(F, f"conv_transpose{_spatial}d"))
