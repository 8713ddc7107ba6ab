"""Rules for attention: ``scaled_dot_product_attention`` and ``multi_head_attention_forward``.

Shape letters of this file: ``S`` images or sequences, ``H`` heads, ``L`` queries, ``K`` keys, ``E`` features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import nested_tensor_from_mask_left_aligned
from ..batching import apply
from ..tensor import densify, rule


class _Attention(torch.autograd.Function):
    """Scaled dot-product attention with a batching rule that folds members into the batch of one fused kernel.

    Shapes, for one member: ``q [..., H, L, E]``, ``k [..., H, K, E]``, ``v [..., H, K, F]``, ``mask`` broadcastable to
    ``[..., H, L, K]`` or None → ``[..., H, L, F]``.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
    ) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing, as evolution strategies don't differentiate."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> tuple[Tensor, int]:
        N = info.batch_size
        # Give all tensors the same number of dimensions, so that they broadcast with members in front.
        dims = max(t.ndim - (d is not None) for t, d in zip((q, k, v, mask), in_dims, strict=False) if t is not None)
        dims = max(dims, 3)

        def members_first(t: Tensor, dim: int | None) -> Tensor:
            t = t[None] if dim is None else t.movedim(dim, 0)
            return t.reshape(t.shape[0], *[1] * (dims + 1 - t.ndim), *t.shape[1:])

        q, k, v = (members_first(t, d) for t, d in zip((q, k, v), in_dims, strict=False))
        batch = torch.broadcast_shapes((N,), *(t.shape[:1] for t in (q, k, v)))
        batch += torch.broadcast_shapes(*(t.shape[1:-3] for t in (q, k, v)))
        if mask is not None:
            mask = members_first(mask, in_dims[3])
            if mask.shape[:-3].numel() == 1:
                mask = mask.reshape(mask.shape[-3:])
            else:
                mask = mask.expand(*batch, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
        q, k, v = (t.expand(*batch, *t.shape[-3:]).reshape(-1, *t.shape[-3:]) for t in (q, k, v))
        # Not forward: this vmap may be inside another one.
        out = apply(_Attention, q, k, v, mask, is_causal, scale, enable_gqa)
        return out.reshape(*batch, *out.shape[1:]), 0


@rule(F.scaled_dot_product_attention, always=True)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Return the scaled dot-product attention of one member."""
    query, key, value, attn_mask = (densify(t) for t in (query, key, value, attn_mask))
    if is_causal and attn_mask is not None:
        return NotImplemented  # PyTorch raises the error.
    if dropout_p > 0:
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        weights = attention_weights(query, key, attn_mask, scale)
        if attn_mask is not None:
            # A query with no allowed key gets zeros, as in the fused kernels.
            weights = torch.where((attn_mask == -torch.inf).all(-1, keepdim=True), 0, weights)
        # Not in the fused kernel: torch.vmap cannot draw its dropout for each member separately.
        return F.dropout(weights, dropout_p) @ value
    dims = query.ndim
    if dims == 2:
        query, key, value = query[None], key[None], value[None]
    out = apply(_Attention, query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return out[0] if dims == 2 else out


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Return ``softmax(scale · q kᵀ + mask)``, ``[..., L, K]``; ``scale`` is ``1/√E`` unless given."""
    scores = (q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)) @ k.mT
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


@rule(F.multi_head_attention_forward, always=True)
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Return one member's attention ``[L, S, E]``, and its weights if ``need_weights``.

    An unbatched query ``[L, E]`` gives results without ``S``. The arguments are those of
    :func:`torch.nn.functional.multi_head_attention_forward`.
    """
    E = query.shape[-1]
    usual = static_k is None and static_v is None and (bias_k is None) == (bias_v is None)
    # For invalid arguments, PyTorch raises its own error.
    allowed = embed_dim_to_check == E and E % num_heads == 0 and not (is_causal and attn_mask is None)
    if not usual or not allowed or not query.ndim == key.ndim == value.ndim in (2, 3):
        return NotImplemented
    batched = query.ndim == 3
    projections = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    q, k, v = _project(query, key, value, projections, in_proj_bias)
    if not batched:
        q, k, v = q[:, None], k[:, None], v[:, None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    L, S, _ = q.shape
    mask = _merge_masks(attn_mask, key_padding_mask, S, num_heads, q.dtype)
    # is_causal promises that attn_mask is the causal mask: the fused kernel then needs no mask.
    causal = is_causal and key_padding_mask is None and not need_weights
    if causal:
        mask = None
    if bias_k is not None:
        k = torch.cat([k, densify(bias_k).to(k.dtype).expand(1, S, E)])
        v = torch.cat([v, densify(bias_v).to(v.dtype).expand(1, S, E)])
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(1, S, E)]) for t in (k, v))
    added = (bias_k is not None) + add_zero_attn
    if mask is not None and added:
        mask = F.pad(mask, (0, added))
    q, k, v = (t.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for t in (q, k, v))  # [S, H, L or K, E/H]
    dropout_p = dropout_p if training else 0.0
    if need_weights:
        weights = attention_weights(q, k, mask)
        weights = F.dropout(weights, dropout_p) if dropout_p else weights
        out = weights @ v
    else:
        weights = None
        out = attention(q, k, v, mask, dropout_p, causal)
    out = F.linear(out.permute(2, 0, 1, 3).reshape(L, S, E), out_proj_weight, out_proj_bias)
    if weights is not None:
        weights = weights.mean(1) if average_attn_weights else weights
    if not batched:
        out, weights = out[:, 0], None if weights is None else weights[0]
    return out, weights


def _project(query: Tensor, key: Tensor, value: Tensor, weights: Any, bias: Any) -> tuple[Tensor, ...]:
    """Return queries, keys and values; ``weights`` is one matrix ``[3E, E]`` or three of them."""
    if not isinstance(weights, tuple):
        if query is key and key is value:
            return F.linear(query, weights, bias).chunk(3, -1)
        weights = weights.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(x, W, b) for x, W, b in zip((query, key, value), weights, biases, strict=True))


def _merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, S: int, H: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the sum of both masks, broadcastable to ``[S, H, L, K]``, to be added to the scores.

    ``attn_mask`` is ``[L, K]`` or ``[S·H, L, K]``, ``key_padding_mask`` ``[S, K]``; True in a boolean mask forbids.
    """
    total = None
    if attn_mask is not None:
        mask = _additive(attn_mask, dtype)
        total = mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (S, H))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, dtype)[:, None, None]
        total = padding if total is None else total + padding
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


@rule(nested_tensor_from_mask_left_aligned, always=True)
def _left_aligned(tensor: Tensor, mask: Tensor) -> bool:
    # Keeps nn.TransformerEncoder from using nested tensors, which torch.vmap does not support.
    return False
