"""Oracle tests of the rules for recurrent networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_oracle import (
    KINDS,
    Arguments,
    N,
    assert_same,
    batched,
    cases,
    check,
    draw,
    every_kind,
    every_rank,
    floats,
    no_dense,
    one_by_one,
    shared_or_own,
)
from rule_oracle import float64 as float64
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

pytestmark = pytest.mark.filterwarnings("error")


class GivenState(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        return self.network(x, state if len(state) > 1 else state[0])


class Packed(nn.Module):
    """A recurrent network over sequences of several lengths, ``x [T, S, I]``, or ``[S, T, I]`` if batch first."""

    def __init__(self, network: nn.Module, lengths: list[int], batch_first: bool = False) -> None:
        super().__init__()
        self.network, self.lengths, self.batch_first = network, lengths, batch_first

    def forward(self, x: Tensor) -> Any:
        packed = pack_padded_sequence(x, torch.tensor(self.lengths), self.batch_first, enforce_sorted=False)
        output, last = self.network(packed)
        padded, _ = pad_packed_sequence(output, self.batch_first, padding_value=-1.0, total_length=6)
        return padded, last


@every_rank
@shared_or_own
@every_kind
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"batch_first": True, "bidirectional": True},
        {"num_layers": 2},
        {"num_layers": 2, "bidirectional": True, "bias": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_recurrent_networks(
    kind: str, options: dict[str, Any], rank: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = KINDS[kind]
    check(make(3, 4, **options), floats((5, 2, 3)), rank, shared, monkeypatch)
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    states = [(layers, 5 if options.get("batch_first") else 2, 4)] * (2 if kind == "lstm" else 1)
    check(GivenState(make(3, 4, **options)), floats((5, 2, 3), *states), rank, shared, monkeypatch)
    check(make(3, 4, **options), floats((5, 3)), rank, shared, monkeypatch)
    packed = Packed(make(3, 4, **options), [3, 5, 2], options.get("batch_first", False))
    check(packed, floats((3, 5, 3) if packed.batch_first else (5, 3, 3)), rank, shared, monkeypatch)


@every_rank
@shared_or_own
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_lstm_with_projection(
    options: dict[str, Any], rank: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(nn.LSTM(3, 4, proj_size=2, **options), floats((5, 2, 3)), rank, shared, monkeypatch)
    check(Packed(nn.LSTM(3, 4, proj_size=2, **options), [5, 3]), floats((5, 2, 3)), rank, shared, monkeypatch)


class Mapped(nn.Module):
    """A network under a vmap of the user's own, over the first dimension of its input, or in a loop."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.loop = network, False

    def output(self, x: Tensor) -> Tensor:
        return self.network(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.output(part) for part in x]) if self.loop else torch.vmap(self.output)(x)


@every_rank
@shared_or_own
@every_kind
def test_recurrent_networks_under_a_vmap_of_the_users(
    kind: str, rank: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Mapped(KINDS[kind](3, 4, num_layers=2, bidirectional=True))
    x, factors = torch.randn(7, 5, 2, 3) if shared else torch.randn(N, 7, 5, 2, 3), draw(module, rank)
    with no_dense(monkeypatch):
        actual = batched(module, factors, (x,), shared)
    module.loop = True
    assert_same(actual, one_by_one(module, factors, (x,), shared))


@every_rank
@shared_or_own
@cases(
    lstm=(lambda: GivenState(nn.LSTMCell(3, 4)), floats((2, 3), (2, 4), (2, 4))),
    lstm_start=(lambda: nn.LSTMCell(3, 4, bias=False), floats((2, 3))),
    lstm_unbatched=(lambda: GivenState(nn.LSTMCell(3, 4)), floats((3,), (4,), (4,))),
    gru=(lambda: GivenState(nn.GRUCell(3, 4)), floats((2, 3), (2, 4))),
    gru_start=(lambda: nn.GRUCell(3, 4, bias=False), floats((2, 3))),
    rnn_tanh=(lambda: GivenState(nn.RNNCell(3, 4)), floats((2, 3), (2, 4))),
    rnn_relu=(lambda: GivenState(nn.RNNCell(3, 4, nonlinearity="relu")), floats((2, 3), (2, 4))),
)
def test_recurrent_cells(
    make: Callable[[], nn.Module], arguments: Arguments, rank: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(make(), arguments, rank, shared, monkeypatch)
