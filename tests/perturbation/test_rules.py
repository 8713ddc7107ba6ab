"""Oracle tests of the rules for products, lookups and convolutions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rule_oracle import Arguments, Op, cases, check, every_rank, floats, integers, shared_or_own
from rule_oracle import float64 as float64
from torch import Tensor, nn

from eggroll_trainer.perturbation.rules import conv

pytestmark = pytest.mark.filterwarnings("error")


# Products


@every_rank
@shared_or_own
@cases(
    linear_1d=(lambda: nn.Linear(5, 4), floats((5,))),
    linear_2d=(lambda: nn.Linear(5, 4), floats((7, 5))),
    linear_3d=(lambda: nn.Linear(5, 4, bias=False), floats((2, 7, 5))),
    matmul_right=(lambda: Op(torch.matmul, 5, 4), floats((2, 7, 5))),
    matmul_right_vector=(lambda: Op(torch.matmul, 5, 4), floats((5,))),
    matmul_left=(lambda: Op(lambda x, W: W @ x, 5, 4), floats((4, 7))),
    matmul_left_vector=(lambda: Op(lambda x, W: W @ x, 5, 4), floats((4,))),
    mm=(lambda: Op(torch.mm, 5, 4), floats((7, 5))),
    mv=(lambda: Op(lambda x, W: W.mv(x), 5, 4), floats((4,))),
    addmm=(lambda: Op(torch.addmm, 5, 4), floats((4,), (7, 5))),
    addmm_scaled=(lambda: Op(lambda b, x, W: torch.addmm(b, x, W, beta=2, alpha=0.5), 5, 4), floats((7, 4), (7, 5))),
    transposed=(lambda: Op(lambda x, W: x @ W.T, 4, 5), floats((7, 5))),
    transposed_twice=(lambda: Op(lambda x, W: F.linear(x, W.t().transpose(0, 1)), 4, 5), floats((7, 5))),
    chunk=(lambda: Op(lambda x, W: [F.linear(x, part) for part in W.chunk(3)], 7, 5), floats((2, 5))),
    split=(lambda: Op(lambda x, W: [F.linear(x, part) for part in W.split([1, 4, 2])], 7, 5), floats((2, 5))),
    split_evenly=(lambda: Op(lambda x, W: [part @ x for part in torch.split(W, 3)], 7, 5), floats((5, 2))),
    user_vmap=(lambda: Op(lambda x, W: torch.vmap(lambda row: F.linear(row, W))(x), 4, 5), floats((7, 5))),
    inside_user_vmap=(
        lambda: Op(lambda x, W: torch.vmap(lambda row: row + F.linear(x, W))(x[:, :4]), 4, 5),
        floats((7, 5)),
    ),
)
def test_products(
    make: Callable[[], nn.Module], arguments: Arguments, rank: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(make(), arguments, rank, shared, monkeypatch)


@every_rank
@shared_or_own
@cases(
    einsum=(lambda: Op(lambda x, W: torch.einsum("bi,oi->bo", x, W), 4, 5), floats((7, 5))),
    bilinear=(lambda: nn.Bilinear(3, 4, 2), floats((7, 3), (7, 4))),
    sum=(lambda: Op(lambda x, W: x * W.sum(), 4, 5), floats((7,))),
    scaled=(lambda: Op(lambda x, W: F.linear(x, W * 2), 4, 5), floats((7, 5))),
    concatenated=(lambda: Op(lambda x, W: F.linear(x, torch.cat([W, W])), 4, 5), floats((7, 5))),
    element=(lambda: Op(lambda x, W: x * W[1, 2] + W[:, 1].sum() + W[[0, 2]].sum(), 4, 5), floats((7,))),
    masked=(lambda: Op(lambda x, W: x * W[torch.tensor([True, False, True])].sum(), 3, 5), floats((7,))),
    weight_norm=(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), floats((7, 5))),
    renormalised=(lambda: Op(lambda i, W: F.embedding(i, W / W.norm(dim=1, keepdim=True)), 4, 5), integers(4, (6,))),
)
def test_operations_without_a_rule_get_the_dense_sum(
    make: Callable[[], nn.Module], arguments: Arguments, rank: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(make(), arguments, rank, shared, monkeypatch, dense=True)


# Lookups


@every_rank
@shared_or_own
@cases(
    embedding=(lambda: nn.Embedding(9, 4), integers(9, (2, 6))),
    embedding_1d=(lambda: nn.Embedding(9, 4, padding_idx=0), integers(9, (6,))),
    embedding_scalar=(lambda: nn.Embedding(9, 4), integers(9, ())),
    torch_embedding=(lambda: Op(lambda i, W: torch.embedding(W, i), 9, 4), integers(9, (6,))),
    index=(lambda: Op(lambda i, W: W[i - 5], 9, 4), integers(9, (2, 6))),
    index_scalar=(lambda: Op(lambda i, W: W[i], 9, 4), integers(9, ())),
    index_int=(lambda: Op(lambda x, W: x + W[-2], 9, 4), floats((4,))),
    index_kernel=(lambda: Op(lambda i, W: W[i], 9, 4, 3), integers(9, (2,))),
    index_int_kernel=(lambda: Op(lambda x, W: x + W[3], 9, 4, 3), floats((4, 3))),
    index_select=(lambda: Op(lambda i, W: W.index_select(0, i), 9, 4, 3), integers(9, (6,))),
    slice=(lambda: Op(lambda x, W: F.linear(x, W[2:-1]), 9, 4), floats((7, 4))),
    user_vmap=(lambda: Op(lambda i, W: torch.vmap(lambda j: F.embedding(j, W))(i), 9, 4), integers(9, (2, 6))),
)
def test_lookups(
    make: Callable[[], nn.Module], arguments: Arguments, rank: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(make(), arguments, rank, shared, monkeypatch)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@shared_or_own
def test_embedding_bag(mode: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bag = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=0)
    check(bag, integers(9, (5, 6)), 2, shared, monkeypatch)
    offsets = torch.tensor([0, 2, 2, 7])
    check(bag, lambda: (torch.randint(9, (11,)), offsets), 2, shared, monkeypatch)
    last = nn.EmbeddingBag(9, 4, mode=mode, include_last_offset=True)
    check(last, lambda: (torch.randint(9, (7,)), offsets), 2, shared, monkeypatch)
    if mode == "sum":
        weighted = Op(lambda i, w, W: F.embedding_bag(i, W, mode="sum", per_sample_weights=w), 9, 4)
        check(weighted, lambda: (torch.randint(9, (5, 6)), torch.randn(5, 6)), 2, shared, monkeypatch)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(index)))


@every_rank
@shared_or_own
def test_tied_weights(rank: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Tied(), integers(9, (2, 6)), rank, shared, monkeypatch)


# Convolutions


@every_rank
@shared_or_own
@pytest.mark.parametrize("loop", [True, False], ids=["loop", "at_once"])
@cases(
    conv1d=(lambda: nn.Conv1d(2, 3, 3), floats((2, 2, 8))),
    conv1d_unbatched=(lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), floats((2, 8))),
    conv1d_same=(lambda: nn.Conv1d(2, 3, 3, padding="same", dilation=2, bias=False), floats((2, 2, 8))),
    conv2d=(lambda: nn.Conv2d(2, 3, 3), floats((2, 2, 6, 5))),
    conv2d_strided=(lambda: nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0), (1, 2)), floats((2, 2, 7, 6))),
    conv2d_grouped=(lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), floats((2, 4, 5, 5))),
    conv2d_depthwise=(lambda: nn.Conv2d(4, 8, 3, groups=4), floats((2, 4, 5, 5))),
    conv2d_circular=(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), floats((2, 2, 5, 5))),
    conv2d_pointwise_valid=(lambda: nn.Conv2d(4, 3, 1, padding="valid"), floats((4, 5, 5))),
    conv3d=(lambda: nn.Conv3d(2, 3, 2, padding=1), floats((2, 2, 3, 4, 3))),
    conv3d_grouped=(lambda: nn.Conv3d(4, 2, 2, groups=2), floats((4, 3, 4, 3))),
    transposed1d=(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), floats((2, 2, 5))),
    transposed1d_unbatched=(lambda: nn.ConvTranspose1d(2, 3, 3), floats((2, 5))),
    transposed2d=(lambda: nn.ConvTranspose2d(4, 3, 3, padding=1, bias=False), floats((2, 4, 4, 5))),
    transposed2d_grouped=(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), floats((2, 4, 4, 4))),
    transposed3d=(lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), floats((2, 2, 2, 3, 2))),
    user_vmap=(lambda: Op(lambda x, W: torch.vmap(lambda i: F.conv1d(i, W))(x), 3, 2, 3), floats((2, 2, 8))),
)
def test_convolutions(
    make: Callable[[], nn.Module],
    arguments: Arguments,
    rank: int,
    shared: bool,
    loop: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if loop:
        monkeypatch.setattr(conv, "_LOOP_ACTIVATIONS", 0)
        monkeypatch.setattr(conv, "_LOOP_KERNEL", torch.inf)
    check(make(), arguments, rank, shared, monkeypatch)
