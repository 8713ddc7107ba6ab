"""Oracle tests of the rules for attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_oracle import (
    CAUSAL,
    PADDING,
    Arguments,
    Attention,
    N,
    Op,
    assert_same,
    attend,
    batched,
    cases,
    check,
    draw,
    encoder_layer,
    every_rank,
    floats,
    one_by_one,
    shared_or_own,
)
from rule_oracle import float64 as float64
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("error")


def masked(x: Tensor, mask: Tensor, W: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (2, 3)).transpose(-2, -3) for t in F.linear(x, W).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, mask)


@every_rank
@shared_or_own
@cases(
    plain=(attend(), floats((2, 5, 6))),
    no_batch=(attend(), floats((5, 6))),
    two_batches=(attend(), floats((2, 2, 5, 6))),
    causal_scaled=(attend(is_causal=True, scale=0.3), floats((2, 5, 6))),
    grouped_queries=(attend(enable_gqa=True), floats((2, 5, 6))),
    shared_mask=(attend(attn_mask=~CAUSAL), floats((2, 5, 6))),
    shared_mask_each=(attend(attn_mask=~PADDING[:, None, None]), floats((2, 5, 6))),
    mask_2d=(lambda: Op(masked, 18, 6), floats((2, 5, 6), (5, 5))),
    mask_heads=(lambda: Op(masked, 18, 6), floats((2, 5, 6), (2, 5, 5))),
    mask_4d=(lambda: Op(masked, 18, 6), floats((2, 5, 6), (2, 1, 1, 5))),
    single_head=(lambda: Op(lambda x, W: F.scaled_dot_product_attention(x, x @ W, x), 6, 6), floats((5, 6))),
    cross=(
        lambda: Op(lambda q, k, W: F.scaled_dot_product_attention(q, F.linear(k, W), F.linear(k, W)), 6, 4),
        floats((2, 1, 3, 6), (2, 5, 4)),
    ),
)
def test_scaled_dot_product_attention(
    make: Callable[[], nn.Module], arguments: Arguments, rank: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(make(), arguments, rank, shared, monkeypatch)


@every_rank
@shared_or_own
def test_scaled_dot_product_attention_under_a_vmap_of_the_users(rank: int, shared: bool) -> None:
    plain = attend(is_causal=True)()
    mapped = Op(lambda x, W: torch.vmap(plain.function, (0, None))(x, W), 36, 6)
    mapped.weight = plain.weight
    x, factors = torch.randn(2, 2, 5, 6) if shared else torch.randn(N, 2, 2, 5, 6), draw(plain, rank)
    assert_same(batched(mapped, factors, (x,), shared), one_by_one(plain, factors, (x,), shared))


@every_rank
@shared_or_own
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@cases(
    plain=(Attention, floats((5, 2, 6))),
    batch_first=(lambda: Attention(batch_first=True), floats((2, 5, 6))),
    unbatched=(lambda: Attention(batch_first=True), floats((5, 6))),
    unbatched_masks=(lambda: Attention(call={"key_padding_mask": PADDING[1]}), floats((5, 6))),
    no_weights=(lambda: Attention(batch_first=True, call={"need_weights": False}), floats((2, 5, 6))),
    each_head=(lambda: Attention(call={"average_attn_weights": False}), floats((5, 2, 6))),
    no_bias=(lambda: Attention(bias=False), floats((5, 2, 6))),
    cross=(lambda: Attention(batch_first=True), floats((2, 5, 6), (2, 4, 6))),
    other_sizes=(lambda: Attention(kdim=3, vdim=4), floats((5, 2, 6), (4, 2, 3), (4, 2, 4))),
    masks=(
        lambda: Attention(batch_first=True, call={"key_padding_mask": PADDING, "attn_mask": CAUSAL}),
        floats((2, 5, 6)),
    ),
    causal=(
        lambda: Attention(call={"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
        floats((5, 2, 6)),
    ),
    float_mask=(lambda: Attention(call={"attn_mask": CAUSAL.double() * -3}), floats((5, 2, 6))),
    mask_of_heads=(
        lambda: Attention(call={"attn_mask": CAUSAL.expand(4, 5, 5), "need_weights": False}),
        floats((5, 2, 6)),
    ),
    zero_attention=(lambda: Attention(add_zero_attn=True, call={"attn_mask": CAUSAL}), floats((5, 2, 6))),
)
def test_multihead_attention(
    make: Callable[[], nn.Module],
    arguments: Arguments,
    rank: int,
    shared: bool,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(make().train(training), arguments, rank, shared, monkeypatch)


def test_multihead_attention_with_key_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Attention(add_bias_kv=True, call={"key_padding_mask": PADDING})
    check(module, floats((5, 2, 6)), 1, False, monkeypatch, dense=True)


def test_multihead_attention_leaves_errors_to_pytorch() -> None:
    module = Attention(call={"is_causal": True})
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        batched(module, draw(module, 1), (torch.randn(5, 2, 6),), shared=True)


class Options(nn.Module):
    """A module with keyword arguments fixed."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options

    def forward(self, *args: Any) -> Any:
        return self.module(*args, **self.options)


@shared_or_own
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@cases(
    encoder_layer=(lambda: encoder_layer(batch_first=True), floats((2, 5, 6))),
    encoder_layer_gelu=(lambda: encoder_layer(activation="gelu", norm_first=True), floats((5, 2, 6))),
    encoder=(lambda: nn.TransformerEncoder(encoder_layer(batch_first=True), 2), floats((2, 5, 6))),
    encoder_padding=(
        lambda: Options(nn.TransformerEncoder(encoder_layer(batch_first=True), 2), src_key_padding_mask=PADDING),
        floats((2, 5, 6)),
    ),
    encoder_causal=(
        lambda: Options(
            nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False), mask=CAUSAL, is_causal=True
        ),
        floats((5, 2, 6)),
    ),
    decoder=(
        lambda: Options(
            nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 8, dropout=0.0, batch_first=True), 2),
            tgt_mask=CAUSAL,
            memory_key_padding_mask=PADDING,
        ),
        floats((2, 5, 6), (2, 5, 6)),
    ),
    transformer=(
        lambda: nn.Transformer(6, 2, 1, 1, 8, dropout=0.0, batch_first=True),
        floats((2, 5, 6), (2, 4, 6)),
    ),
)
def test_transformers(
    make: Callable[[], nn.Module],
    arguments: Arguments,
    shared: bool,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(make().train(training), arguments, 1, shared, monkeypatch)
