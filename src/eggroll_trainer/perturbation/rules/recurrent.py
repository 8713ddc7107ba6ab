"""Rules for recurrent networks: ``lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu``, their cells, and packed sequences.

torch.vmap has no batching rule for any of them, so these rules also replace the operations on plain tensors. In this
file, a batch of sequences is always packed: ``x [rows, I]`` holds one step after the other. A step has one row for each
of the ``b ≤ S`` sequences that have not ended, longest first.

Shape letters of this file: ``S`` sequences, ``T`` steps, ``I`` inputs, ``H`` hidden features, ``G = gates·H``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import pack_padded_sequence, pad_packed_sequence, tree_leaves, tree_map
from ..tensor import PerturbedTensor, autocast_like_linear, densify, rule

State = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM
Weight = Tensor | tuple[Tensor, Tensor, Tensor]  # dense, or the factored form (W, A, B)
Cell = tuple[Weight, Weight, Tensor | None, Tensor | None, Weight | None]  # input, hidden, their biases, projection


def _lstm_step(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(x: Tensor, h: Tensor, state: State) -> State:
    (x_reset, x_update, x_new), (h_reset, h_update, h_new) = x.chunk(3, -1), h.chunk(3, -1)
    new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
    return (new + torch.sigmoid(x_update + h_update) * (state[0] - new),)


def _tanh_step(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.tanh(x + h),)


def _relu_step(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.relu(x + h),)


# (gates from the input [..., G], gates from the hidden state [..., G], state) → new state
_STEPS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _tanh_step,
    "rnn_relu": _relu_step,
}


class _Recurrence(torch.autograd.Function):
    """A recurrent network with a batching rule that runs each step once, for the rows of all members.

    Shapes, for one member: ``x [rows, I]``; each state ``[layers·directions, S, H]``; a dropout mask ``[rows,
    directions·H]`` for each layer but the last, or no masks; ``cells[layer][direction]``. Results: the output ``[rows,
    directions·H]`` and the last states.
    """

    @staticmethod
    def forward(
        kind: str, batch_sizes: tuple[int, ...], x: Tensor, state: State, masks: State, cells: list[list[Cell]]
    ) -> State:
        tensors = tree_map(lambda t: t[None] if isinstance(t, Tensor) else t, (x, state, masks, cells))
        return tuple(t[0] for t in _run(kind, batch_sizes, *tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing, as evolution strategies don't differentiate."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, kind: str, batch_sizes: tuple[int, ...], *tensors: Any
    ) -> tuple[State, tuple[int, ...]]:
        def members_first(t: Any, dim: int | None) -> Any:
            # A first dimension of 1 means that all members share the tensor.
            return t if not isinstance(t, Tensor) else t[None] if dim is None else t.movedim(dim, 0)

        results = _run(kind, batch_sizes, *tree_map(members_first, tensors, in_dims[2:]))
        return results, (0,) * len(results)


def _run(
    kind: str, batch_sizes: tuple[int, ...], x: Tensor, state: State, masks: State, cells: list[list[Cell]]
) -> State:
    """Run the network for ``N`` members; every tensor is ``[N, …]``, or ``[1, …]`` if they share it."""
    x, state, masks, cells = tree_map(
        lambda t: autocast_like_linear(t) if isinstance(t, Tensor) else t, (x, state, masks, cells)
    )
    N = max(t.shape[0] for t in tree_leaves((x, state, masks, cells)) if t is not None)
    state = tuple(s.expand(N, *s.shape[1:]) for s in state)
    last: list[State] = []
    for layer, directions in enumerate(cells):
        outputs = []
        for reverse, cell in enumerate(directions):
            initial = tuple(s[:, len(last)] for s in state)
            output, final = _run_layer(kind, batch_sizes, x, initial, cell, bool(reverse))
            outputs.append(output)
            last.append(final)
        x = torch.cat(outputs, -1)
        if masks and layer < len(cells) - 1:
            x = x * masks[layer]
    return x, *(torch.stack(parts, 1) for parts in zip(*last, strict=True))


def _run_layer(
    kind: str, batch_sizes: tuple[int, ...], x: Tensor, state: State, cell: Cell, reverse: bool
) -> tuple[Tensor, State]:
    """Run one layer in one direction: ``x [N, rows, I]``, states ``[N, S, H]`` → ``[N, rows, H]``, last states."""
    w_input, w_hidden, b_input, b_hidden, w_projection = cell
    if kind != "gru" and b_input is not None and b_hidden is not None:
        # All but the GRU add both sides, so the biases can be added beforehand.
        b_input, b_hidden = b_input + b_hidden, None
    from_hidden = _Product(w_hidden, b_hidden)
    project = None if w_projection is None else _Product(w_projection, None)
    gates = _Product(w_input, b_input)(x)
    S = state[0].shape[1]
    steps = list(zip(itertools.accumulate(batch_sizes, initial=0), batch_sizes, strict=False))
    outputs = []
    for start, b in reversed(steps) if reverse else steps:
        running = tuple(s[:, :b] for s in state)
        new = _STEPS[kind](gates[:, start : start + b], from_hidden(running[0]), running)
        if project is not None:
            new = (project(new[0]), *new[1:])
        outputs.append(new[0])
        state = new if b == S else tuple(torch.cat([n, s[:, b:]], 1) for n, s in zip(new, state, strict=True))
    return torch.cat(outputs[::-1] if reverse else outputs, 1), state


class _Product:
    """``x → x (W + A Bᵀ)ᵀ + b`` of every member, ``[N, rows, I] → [N, rows, O]``."""

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        self.W = weight[0] if isinstance(weight, tuple) else weight
        self.B = weight[2] if isinstance(weight, tuple) else None
        self.high = weight[1].mT if isinstance(weight, tuple) else None
        self.bias = bias
        if self.high is not None and bias is not None:
            # Add the bias in the same pass, as one more column of the low-rank product.
            N = max(self.high.shape[0], bias.shape[0])
            self.high = torch.cat([self.high.expand(N, -1, -1), bias[:, None].expand(N, -1, -1)], 1)

    def __call__(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.W[0]) if self.W.shape[0] == 1 else torch.matmul(x, self.W.mT)
        if self.high is None or self.B is None:
            return out if self.bias is None else out + self.bias[:, None]
        low = torch.matmul(x, self.B)
        if self.bias is not None:
            low = torch.cat([low, low.new_ones(()).expand(*low.shape[:2], 1)], -1)
        # Shared weights mean that a vmap inside the model is active, which forbids adding in place.
        in_place = out.shape[0] == self.high.shape[0] > 1
        if self.high.shape[1] == 1:
            # With few rows per member, a batched product with an inner dimension of 1 is many times slower.
            return out.addcmul_(low, self.high) if in_place else torch.addcmul(out, low, self.high)
        N = max(out.shape[0], low.shape[0], self.high.shape[0])
        out, low, high = (t.expand(N, -1, -1) for t in (out, low, self.high))
        return out.baddbmm_(low, high) if in_place else torch.baddbmm(out, low, high)


def _factors(weight: Any) -> Any:
    return (weight.centre, weight.A, weight.B) if isinstance(weight, PerturbedTensor) else weight


def _cells(weights: Sequence[Any], has_biases: bool, layers: int, directions: int) -> list[list[Cell]]:
    """Return ``cells[layer][direction]`` from the flat list in PyTorch's order."""
    each = len(weights) // (layers * directions)
    flat: list[Cell] = []
    for i in range(0, len(weights), each):
        w_input, w_hidden, *others = weights[i : i + each]
        b_input, b_hidden = (densify(b) for b in others[:2]) if has_biases else (None, None)
        projection = _factors(others[-1]) if len(others) % 2 else None
        flat.append((_factors(w_input), _factors(w_hidden), b_input, b_hidden, projection))
    return [flat[i : i + directions] for i in range(0, len(flat), directions)]


def _recurrent(
    kind: str,
    x: Tensor,
    batch_sizes: tuple[int, ...],
    state: State,
    weights: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> State:
    cells = _cells(weights, has_biases, num_layers, 1 + bidirectional)
    masks: State = ()
    if train and dropout > 0:
        # Drawn outside of the batching rule, where torch.vmap draws them for each member separately.
        ones = state[0].new_ones(x.shape[0], len(cells[0]) * state[0].shape[-1])
        masks = tuple(F.dropout(ones, dropout) for _ in range(num_layers - 1))
    return _Recurrence.apply(kind, batch_sizes, x, state, masks, cells)


def _register(kind: str) -> None:
    @rule(getattr(torch, kind), always=True)
    def network(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 9:
            return NotImplemented
        # A packed sequence has its batch sizes between the rows and the state.
        packed = not isinstance(args[3], bool)
        state, settings = (args[2], args[3:]) if packed else (args[1], args[2:8])
        state = tuple(state) if kind == "lstm" else (state,)
        if packed:
            output, *last = _recurrent(kind, args[0], tuple(args[1].tolist()), state, *settings)
        else:
            batch_first = args[8]
            x = args[0].transpose(0, 1) if batch_first else args[0]
            T, S = x.shape[:2]
            output, *last = _recurrent(kind, x.flatten(0, 1), (S,) * T, state, *settings)
            output = output.unflatten(0, (T, S))
            output = output.transpose(0, 1) if batch_first else output
        return output, *last

    @rule(getattr(torch, f"{kind}_cell"), always=True)
    def cell(input: Tensor, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        state = tuple(hx) if kind == "lstm" else (hx,)
        new = _STEPS[kind](F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return new if kind == "lstm" else new[0]


for _kind in _STEPS:
    _register(_kind)


@rule(pack_padded_sequence, always=True)
def _pack(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    # Pack row indices instead of values, to find out where rows go. All members have the same lengths.
    x = input.transpose(0, 1) if batch_first else input
    places = torch.arange(x.shape[:2].numel(), device=x.device).view(x.shape[:2])
    rows, batch_sizes = pack_padded_sequence(places, lengths, False)
    return x.flatten(0, 1).index_select(0, rows), batch_sizes


@rule(pad_packed_sequence, always=True)
def _pad(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    places = torch.arange(1, data.shape[0] + 1, device=data.device)
    rows, lengths = pad_packed_sequence(places, batch_sizes, batch_first, 0, total_length)
    padding = data.new_full((1, *data.shape[1:]), padding_value)
    return torch.cat([padding, data]).index_select(0, rows.flatten()).unflatten(0, rows.shape), lengths
