"""The oracle of the rules: one batched forward of all members against a loop over dense members."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from eggroll_trainer.perturbation import BatchingRules, PerturbedTensor, dense_sum

N = 3
Factors = dict[str, Any]
Arguments = Callable[[], tuple[Any, ...]]


class Op(nn.Module):
    """A module of one weight and one operation on it."""

    def __init__(self, function: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, *args: Any) -> Any:
        return self.function(*args, self.weight)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw(module: nn.Module, rank: int, scale: float = 0.3) -> Factors:
    """Return factors ``A, B`` of every matrix and a full-rank perturbation of every other parameter, for N members."""
    factors: Factors = {}
    for name, p in module.named_parameters():
        if p.ndim >= 2:
            A, B = torch.randn(N, p.shape[0], rank), torch.randn(N, p[0].numel(), rank)
            factors[name] = (scale * A.to(p.dtype), B.to(p.dtype))
        else:
            factors[name] = scale * torch.randn(N, *p.shape).to(p.dtype)
    return factors


def batched(module: nn.Module, factors: Factors, args: tuple[Any, ...], shared: bool) -> list[Tensor]:
    """Return the outputs of all members from one vmapped forward."""
    centres = dict(module.named_parameters())

    def forward(factors: Factors, *args: Any) -> list[Tensor]:
        parameters = {
            name: PerturbedTensor.wrap(centres[name], *f) if isinstance(f, tuple) else centres[name] + f
            for name, f in factors.items()
        }
        return tree_flatten(functional_call(module, parameters, args))[0]

    dims = tuple(0 if isinstance(a, Tensor) and not shared else None for a in args)
    with torch.no_grad(), BatchingRules():
        return torch.vmap(forward, in_dims=(0, *dims), randomness="different")(factors, *args)


def one_by_one(module: nn.Module, factors: Factors, args: tuple[Any, ...], shared: bool) -> list[Tensor]:
    """Return the outputs of all members from a loop over dense members."""
    centres = dict(module.named_parameters())
    members = []
    with torch.no_grad():
        for i in range(N):
            parameters = {
                name: dense_sum(centres[name], f[0][i], f[1][i]) if isinstance(f, tuple) else centres[name] + f[i]
                for name, f in factors.items()
            }
            own = args if shared else tree_map(lambda a: a[i] if isinstance(a, Tensor) else a, args)  # noqa: B023
            members.append(tree_flatten(functional_call(module, parameters, own))[0])
    return [torch.stack(outputs) for outputs in zip(*members, strict=True)]


@contextlib.contextmanager
def no_dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def dense(self: PerturbedTensor) -> Tensor:
        raise AssertionError("a rule exists, but the dense sum was formed")

    with monkeypatch.context() as patch:
        patch.setattr(PerturbedTensor, "dense", dense)
        yield


@contextlib.contextmanager
def reference_attention() -> Iterator[None]:
    """Keep PyTorch's own modules off their fast path, which returns zeros at padded places and warns."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert not a.isnan().any()
        assert (a - e).abs().max() <= tolerance * e.abs().max()


def check(
    module: nn.Module,
    arguments: Arguments,
    rank: int,
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
    dense: bool = False,
) -> None:
    """Compare the batched forward with the loop; unless ``dense``, rules must have served every operation."""
    factors = draw(module, rank)
    args = arguments() if shared else tree_map(lambda *a: stack(a), arguments(), *(arguments() for _ in range(N - 1)))
    with contextlib.nullcontext() if dense else no_dense(monkeypatch):
        actual = batched(module, factors, args, shared)
    with reference_attention():
        expected = one_by_one(module, factors, args, shared)
    assert_same(actual, expected)


def stack(values: tuple[Any, ...]) -> Any:
    return torch.stack(values) if isinstance(values[0], Tensor) else values[0]


def floats(*shapes: tuple[int, ...]) -> Arguments:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def integers(high: int, *shapes: tuple[int, ...]) -> Arguments:
    return lambda: tuple(torch.randint(high, shape) for shape in shapes)


every_rank = pytest.mark.parametrize("rank", [1, 3])
shared_or_own = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])


def cases(**table: tuple[Callable[[], nn.Module], Arguments]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("make", "arguments"), list(table.values()), ids=list(table))


# Modules

CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])


def attend(**settings: Any) -> Callable[[], Op]:
    """Return a maker of a self-attention with perturbed projections that sets ``settings``."""

    def function(x: Tensor, W: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 3)).transpose(-2, -3) for t in F.linear(x, W).chunk(3, -1))
        if settings.get("enable_gqa"):
            k, v = k[..., :2, :, :], v[..., :2, :, :]
        return F.scaled_dot_product_attention(q, k, v, **settings)

    return lambda: Op(function, 36, 6)


class Attention(nn.Module):
    """nn.MultiheadAttention with the options of its call fixed."""

    def __init__(self, *, self_attention: bool = True, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, **options)
        for p in self.attention.parameters():  # the biases start at zero
            nn.init.normal_(p, std=0.5)
        self.self_attention, self.call = self_attention, call or {}

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Any:
        keys = (query, query) if key is None else (key, key if value is None else value)
        output, weights = self.attention(query, *keys, **self.call)
        return output if weights is None else (output, weights)


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, **options)


KINDS: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
