"""Variations: models whose forward reaches their parameters through containers of their own."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trust_oracle import X, loss, of


def plain(model: Any) -> float:
    return loss(model(X))


class Registered(nn.Module):
    """Two layers, registered as usual; ``layers`` says how the forward reaches them."""

    held: Any

    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
        self.V, self.c = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(2))
        self.hold()

    def hold(self) -> None:
        raise NotImplementedError

    def layers(self) -> Any:
        return self.held

    def forward(self, x: Tensor) -> Tensor:
        (W, b), (V, c) = self.layers()
        return F.linear(torch.tanh(F.linear(x, W, b)), V, c)


class TuplesInAList(Registered):
    def hold(self) -> None:
        self.held = [(self.W, self.b), (self.V, self.c)]


class TupleOfTuples(Registered):
    def hold(self) -> None:
        self.held = ((self.W, self.b), (self.V, self.c))


class DictOfLists(Registered):
    def hold(self) -> None:
        self.held = {"first": [self.W, self.b], "second": [self.V, self.c]}

    def layers(self) -> Any:
        return self.held.values()


class DeeplyNested(Registered):
    def hold(self) -> None:
        self.held = {"net": [{"layers": ([self.W, (self.b,)], [self.V, (self.c,)])}]}

    def layers(self) -> Any:
        return [(W, b) for W, (b,) in self.held["net"][0]["layers"]]


@dataclasses.dataclass
class Layer:
    weight: Tensor
    bias: Tensor


class Dataclasses(Registered):
    def hold(self) -> None:
        self.held = [Layer(self.W, self.b), Layer(self.V, self.c)]

    def layers(self) -> Any:
        return [(layer.weight, layer.bias) for layer in self.held]


class FrozenDataclasses(Registered):
    @dataclasses.dataclass(frozen=True)
    class Layer:
        weight: Tensor
        bias: Tensor

    def hold(self) -> None:
        self.held = {"first": self.Layer(self.W, self.b), "second": self.Layer(self.V, self.c)}

    def layers(self) -> Any:
        return [(layer.weight, layer.bias) for layer in self.held.values()]


class Pair(collections.namedtuple("Pair", ["weight", "bias"])):
    pass


class NamedTuples(Registered):
    def hold(self) -> None:
        self.held = [Pair(self.W, self.b), Pair(self.V, self.c)]


class Slots:
    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias


class ObjectsWithSlots(Registered):
    def hold(self) -> None:
        self.held = [Slots(self.W, self.b), Slots(self.V, self.c)]

    def layers(self) -> Any:
        return [(layer.weight, layer.bias) for layer in self.held]


class Namespace(Registered):
    def hold(self) -> None:
        self.held = types.SimpleNamespace(first=(self.W, self.b), second=(self.V, self.c))

    def layers(self) -> Any:
        return self.held.first, self.held.second


class Deque(Registered):
    def hold(self) -> None:
        self.held = collections.deque([(self.W, self.b), (self.V, self.c)], maxlen=2)


class WeakReferences(Registered):
    def hold(self) -> None:
        self.held = [(weakref.ref(self.W), weakref.ref(self.b)), (weakref.ref(self.V), weakref.ref(self.c))]

    def layers(self) -> Any:
        return [(W(), b()) for W, b in self.held]


class Closures(Registered):
    def hold(self) -> None:
        W, b, V, c = self.parameters()
        self.held = lambda: ((W, b), (V, c))

    def layers(self) -> Any:
        return self.held()


class ClosureOverSelf(Registered):
    def hold(self) -> None:
        self.held = lambda: ((self.W, self.b), (self.V, self.c))

    def layers(self) -> Any:
        return self.held()


class Partials(Registered):
    def hold(self) -> None:
        self.first = functools.partial(F.linear, weight=self.W, bias=self.b)
        self.second = functools.partial(F.linear, weight=self.V, bias=self.c)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Property(Registered):
    def hold(self) -> None:
        self.held = [self.W, self.b, self.V, self.c]

    @property
    def pairs(self) -> Any:
        return self.held[:2], self.held[2:]

    def layers(self) -> Any:
        return self.pairs


class ModulesInAList(nn.Module):
    """Modules in a list of tuples, with their names, besides being registered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.steps: list[tuple[str, Any]] = [("first", self.first), ("act", torch.tanh), ("second", self.second)]

    def forward(self, x: Tensor) -> Tensor:
        for _, step in self.steps:
            x = step(x)
        return x


class ReplacedForward(nn.Sequential):
    """A forward that was replaced by a closure, as tools for mixed precision do."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        before = self.forward
        self.forward = lambda x: 2 * before(x)  # type: ignore[method-assign]


class FrozenHalf(nn.Sequential):
    """Parameters that are not trained, and one that has no elements."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        self[0].requires_grad_(False)
        self.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


HELD: list[Callable[[], nn.Module]] = [
    TuplesInAList, TupleOfTuples, DictOfLists, DeeplyNested, Dataclasses, FrozenDataclasses, NamedTuples,
    ObjectsWithSlots, Namespace, Deque, WeakReferences, Closures, ClosureOverSelf, Partials, Property,
    ModulesInAList, ReplacedForward, FrozenHalf, Tied,
]  # fmt: skip

VARIATIONS = {make.__name__: of(plain, make=make) for make in HELD}
