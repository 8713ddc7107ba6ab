"""What holds for every rule: precision, dropout, and that nothing goes unperturbed unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_oracle import (
    CAUSAL,
    Arguments,
    Attention,
    N,
    Op,
    assert_same,
    attend,
    batched,
    cases,
    draw,
    encoder_layer,
    floats,
    one_by_one,
    reference_attention,
    shared_or_own,
)
from rule_oracle import float64 as float64
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from eggroll_trainer.perturbation import BatchingRules

pytestmark = pytest.mark.filterwarnings("error")


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (2, 5, 6)),
    "conv": (lambda: nn.Conv1d(5, 4, 3), (2, 5, 6)),
    "transposed_conv": (lambda: nn.ConvTranspose1d(5, 4, 3), (2, 5, 6)),
    "grouped_conv": (lambda: nn.Conv1d(6, 6, 3, groups=3), (2, 6, 6)),
    "attention": (lambda: Attention(batch_first=True, call={"need_weights": False}), (2, 5, 6)),
    "encoder_layer": (lambda: encoder_layer(batch_first=True), (2, 5, 6)),
    "lstm": (lambda: nn.LSTM(6, 4), (5, 2, 6)),
    "gru": (lambda: nn.GRU(6, 4), (5, 2, 6)),
}
every_module = pytest.mark.parametrize("name", MODULES)


@every_module
def test_frozen_weights_with_each_members_own_input(name: str) -> None:
    make, shape = MODULES[name]
    module, x = make(), torch.randn(N, *shape)
    with torch.no_grad(), reference_attention():
        expected = [torch.stack(t) for t in zip(*(tree_flatten(module(own))[0] for own in x), strict=True)]
    with torch.no_grad(), BatchingRules():
        assert_same(torch.vmap(lambda own: tree_flatten(module(own))[0])(x), expected)
        assert_same(tree_flatten(module(x[0]))[0], [t[0] for t in expected])


@every_module
@shared_or_own
def test_full_rank_perturbations(name: str, shared: bool) -> None:
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape if shared else (N, *shape))
    factors = {key: torch.randn(N, *p.shape) for key, p in module.named_parameters()}
    assert_same(batched(module, factors, (x,), shared), one_by_one(module, factors, (x,), shared))


@every_module
@shared_or_own
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_other_dtypes(name: str, shared: bool, dtype: torch.dtype, tolerance: float) -> None:
    make, shape = MODULES[name]
    module = make()
    x, factors = torch.randn(shape if shared else (N, *shape)), draw(module, 2, 0.1)
    expected = one_by_one(module, factors, (x,), shared)
    factors = tree_map(lambda t: t.to(dtype), factors)
    actual = batched(module.to(dtype), factors, (x.to(dtype),), shared)
    assert all(t.dtype == dtype for t in actual)
    assert_same([t.double() for t in actual], expected, tolerance)


@every_module
@shared_or_own
def test_autocast(name: str, shared: bool) -> None:
    torch.set_default_dtype(torch.float32)
    make, shape = MODULES[name]
    module = make()
    x, factors = torch.randn(shape if shared else (N, *shape)), draw(module, 2, 0.1)
    expected = one_by_one(module, factors, (x,), shared)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = batched(module, factors, (x,), shared)
    assert name == "encoder_layer" or all(t.dtype == torch.bfloat16 for t in actual)
    assert_same([t.float() for t in actual], expected, 0.05)


def test_autocast_keeps_an_embedding_in_its_own_dtype() -> None:
    torch.set_default_dtype(torch.float32)
    module, index = nn.Embedding(9, 4), torch.randint(9, (2, 6))
    factors = draw(module, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = batched(module, factors, (index,), True)
    assert_same(actual, one_by_one(module, factors, (index,), True), 1e-5)


@pytest.mark.parametrize("perturbed", [True, False], ids=["perturbed", "frozen"])
@cases(
    sdpa=(attend(dropout_p=0.5), floats((2, 5, 6))),
    causal=(attend(dropout_p=0.5, is_causal=True), floats((2, 5, 6))),
    grouped_queries=(attend(dropout_p=0.5, enable_gqa=True, attn_mask=~CAUSAL), floats((2, 5, 6))),
    attention=(lambda: Attention(dropout=0.5), floats((5, 2, 6))),
    attention_no_weights=(lambda: Attention(dropout=0.5, call={"need_weights": False}), floats((5, 2, 6))),
    encoder_layer=(lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5), floats((5, 2, 6))),
    lstm=(lambda: nn.LSTM(3, 4, 2, dropout=0.5), floats((5, 2, 3))),
    gru=(lambda: nn.GRU(3, 4, 3, dropout=0.5, bidirectional=True), floats((5, 2, 3))),
)
def test_dropout_is_each_members_own(make: Callable[[], nn.Module], arguments: Arguments, perturbed: bool) -> None:
    module, args = make(), arguments()
    # Members that differ by nothing but their dropout.
    factors = tree_map(torch.zeros_like, draw(module, 1))
    if not perturbed:
        factors = {key: value for key, value in factors.items() if not isinstance(value, tuple)} or factors
    torch.manual_seed(1)
    first = batched(module, factors, args, True)[0]
    assert all((first[i] != first[j]).any() for i, j in [(0, 1), (0, 2), (1, 2)])
    torch.manual_seed(1)
    assert torch.equal(first, batched(module, factors, args, True)[0])
    torch.manual_seed(2)
    assert not torch.equal(first, batched(module, factors, args, True)[0])


def test_dropout_of_attention_keeps_the_mean() -> None:
    q, k, v = torch.randn(3, 1, 4, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with BatchingRules():
        draws = torch.vmap(
            lambda _: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True), randomness="different"
        )(torch.zeros(4000))
    # An output's standard deviation is at most |v| with p = 0.5: 6 of those of the mean of 4000 draws.
    assert (draws.mean(0) - expected).abs().max() < 6 * v.abs().max() / 4000**0.5


def test_a_query_that_may_attend_to_nothing_gets_zeros() -> None:
    q = torch.randn(N, 1, 2, 4)
    mask = torch.tensor([[True, False], [False, False]])
    with BatchingRules():
        for p in (0.0, 0.5):
            out = torch.vmap(
                lambda q, p=p: F.scaled_dot_product_attention(q, q, q, mask, dropout_p=p), randomness="different"
            )(q)
            assert torch.equal(out[:, :, 1], torch.zeros(N, 1, 4))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, W: W.mul_(2),
        lambda x, W: W.__iadd__(1),
        lambda x, W: W.__setitem__(0, 0.0),
        lambda x, W: torch.mul(W, 2, out=W),
        lambda x, W: nn.init.zeros_(W),
    ],
)
def test_changing_a_perturbed_parameter_in_place_is_an_error(change: Callable[..., Any]) -> None:
    module = Op(change, 4, 5)
    with pytest.raises(RuntimeError, match="changes a perturbed parameter in place"):
        batched(module, draw(module, 1), (torch.randn(2),), shared=True)


def test_getting_past_torch_function_shows_as_nan() -> None:
    def past(x: Tensor, W: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(x, W)

    module = Op(past, 4, 5)
    (out,) = batched(module, draw(module, 1), (torch.randn(2, 5),), shared=True)
    assert out.isnan().all()
