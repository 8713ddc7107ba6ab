"""Variations: models with a state, and evaluations that change the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trust_oracle import Fitness, Kind, X, loss, of


def twice(model: Any) -> float:
    return loss(model(X)) + loss(model(2 * X))


class Net(nn.Module):
    """Has a method of its own besides the forward."""

    temperature = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))) / self.temperature


class Remembering(Net):
    """A recurrent net that keeps its hidden state in an attribute."""

    hidden: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)

    def forget(self) -> None:
        self.hidden = None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.cell(x, self.hidden)
        return self.head(self.hidden)


class RememberingInABuffer(Remembering):
    """The same with a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(6, 6), persistent=False)

    def forget(self) -> None:
        self.state = torch.zeros(6, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.cell(x, self.state)
        return self.head(self.state)


class RememberingInADict(Remembering):
    """The same with a dict, as caches of keys and values are."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def forget(self) -> None:
        self.cache.clear()

    def forward(self, x: Tensor) -> Tensor:
        self.cache["h"] = self.cell(x, self.cache.get("h"))
        return self.head(self.cache["h"])


class RunningNorm(Net):
    """Normalises by a running mean of the user's own, kept in buffers."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.mean += (x.mean(0) - self.mean) / self.count
        return super().forward(x - self.mean)


class RunningNormOfOutputs(RunningNorm):
    """The same of what differs from member to member, with buffers that are replaced."""

    def forward(self, x: Tensor) -> Tensor:
        output = Net.forward(self, x)
        self.mean = 0.9 * self.mean + 0.1 * output.detach().mean()
        return output - self.mean[:2]


class Counting(Net):
    """Counts its calls, in an attribute."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Listing(Net):
    """Keeps its inputs in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x) / len(self.seen)


class CachedWeights(Net):
    """Computes something from its weights once, and keeps it until it is told that they have changed."""

    scale: Tensor | None = None

    def forget(self) -> None:
        self.scale = None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = self.body.weight.norm()
        return super().forward(x) / self.scale


class CachedTable(Net):
    """Keeps a table of positions, which doesn't depend on weights; a longer input gets a longer one."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(0, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) < len(x):
            self.table = torch.arange(len(x), dtype=x.dtype)[:, None] / 10
        return super().forward(x + self.table[: len(x)])


def episode(model: Any) -> float:
    """The state is forgotten first."""
    model.forget()
    return sum(loss(model(X * t)) for t in range(1, 4))


def unending_episode(model: Any) -> float:
    """It is not."""
    return sum(loss(model(X * t)) for t in range(1, 4))


def forgets_at_the_end(model: Any) -> float:
    score = unending_episode(model)
    model.forget()
    return score


def temperature_by_output(model: Any) -> float:
    """An attribute that the forward reads, of every member's own."""
    model.temperature = 1.0
    model.temperature = 2.0 + float(model(X).detach().mean().tanh())
    return twice(model) + model.temperature


def attribute_of_a_child(model: Any) -> float:
    model.head.scale = float(model(X).detach().mean())
    return loss(model(2 * X)) * model.head.scale


def replaced_layer(model: Any) -> float:
    head = model.head
    model.head = nn.Sequential(head, nn.Tanh())
    try:
        return twice(model)
    finally:
        model.head = head


def bias_taken_away(model: Any) -> float:
    with torch.no_grad():
        model.head.bias.zero_()
    return twice(model)


class WithDropout(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2))


class WithBatchNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def evaluation_mode(model: Any) -> float:
    model.eval()
    return twice(model) + model.training


def modes_in_turns(model: Any) -> float:
    """Training and evaluation mode by the member's own output."""
    model.eval()
    assert not model.training
    score = loss(model(X))
    model.train(int(-1000 * score) % 2 == 0)
    score += 10 * model.training
    model.eval()
    return score + loss(model(2 * X))


def only_children_in_evaluation_mode(model: Any) -> float:
    model.train()
    for child in model.children():
        child.eval()
    return twice(model) + model.training


def buffers_read(model: Any) -> float:
    """Reads the buffer that its calls have changed."""
    model.train()
    return twice(model) + model.count.item() + model.mean.sum().item()


def buffers_reset(model: Any) -> float:
    model.count.zero_()
    model.mean.zero_()
    return twice(model)


class PaddedTransformer(nn.Module):
    """Attends to places that are not padded; torch's fast path, without gradients, gives zeros at those that are."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(4, 2)
        self.padded = torch.tensor([[False, False, False], [False, False, True]])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.view(2, 3, 4), src_key_padding_mask=self.padded)).view(6, 2)


@torch.no_grad()
def without_gradients(model: Any) -> float:
    model.eval()
    return twice(model)


STATES: dict[str, tuple[Fitness, Kind, Callable[[], nn.Module]]] = {
    **{f"{make.__name__}-episode": (episode, Kind.MEMBER, make)
       for make in (Remembering, RememberingInABuffer, RememberingInADict, CachedWeights)},
    "Remembering-forgets_at_the_end": (forgets_at_the_end, Kind.MEMBER, Remembering),
    "Remembering-unending_episode": (unending_episode, Kind.HISTORY, Remembering),
    "RememberingInADict-unending_episode": (unending_episode, Kind.HISTORY, RememberingInADict),
    "RememberingInABuffer-unending_episode": (unending_episode, Kind.BUFFERS, RememberingInABuffer),
    "CachedWeights-unending_episode": (unending_episode, Kind.HISTORY, CachedWeights),
    "PaddedTransformer": (without_gradients, Kind.MEMBER, PaddedTransformer),
    "CachedTable": (twice, Kind.MEMBER, CachedTable),
    "Counting": (twice, Kind.HISTORY, Counting),
    "Listing": (twice, Kind.HISTORY, Listing),
    "RunningNorm": (twice, Kind.BUFFERS, RunningNorm),
    "RunningNorm-buffers_read": (buffers_read, Kind.BUFFERS, RunningNorm),
    "RunningNorm-buffers_reset": (buffers_reset, Kind.MEMBER, RunningNorm),
    "RunningNorm-evaluation_mode": (evaluation_mode, Kind.MEMBER, RunningNorm),
    "RunningNormOfOutputs": (twice, Kind.BUFFERS, RunningNormOfOutputs),
    **{use.__name__: (use, Kind.MEMBER, Net)
       for use in (temperature_by_output, attribute_of_a_child, replaced_layer, bias_taken_away)},
    **{f"WithDropout-{use.__name__}": (use, Kind.MEMBER, WithDropout)
       for use in (evaluation_mode, modes_in_turns, only_children_in_evaluation_mode)},
    **{f"WithBatchNorm-{use.__name__}": (use, Kind.MEMBER, WithBatchNorm)
       for use in (evaluation_mode, modes_in_turns)},
}  # fmt: skip

VARIATIONS = {name: of(fitness, kind, make) for name, (fitness, kind, make) in STATES.items()}
