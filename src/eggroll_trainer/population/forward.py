"""How one call of a module is carried out for many members: batched, in tiles that bound memory, compiled if asked.

A call is batched by ``torch.vmap`` over the members' perturbations. Its members are split into tiles, so that the
tensors which the operations of one tile make fit in a budget; how much one member needs is found out by counting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import TreeSpec, is_compiled, tree_flatten, tree_map, tree_unflatten
from .._utils.graphs import Backend
from .._utils.memory import Budget, is_out_of_memory, live_bytes
from .._utils.recent import Recent
from ..noise.keys import kept_rng
from ..perturbation import BatchingRules, densify
from ..perturbation.sample import SharedDraws, members_of, perturb
from .containers import is_container
from .module_state import NotBatchable, ReturnsObject, Slot, swapped

# What a model may return or be called with besides tensors, and be batched all the same.
PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, slice, type(...))

# Kinds of calls that are compiled; a model with inputs of ever new shapes has no end of them.
_MAX_COMPILED = 16

# Values of the numbers that a model is called with for which it is compiled the first time that they come; a time or a
# temperature has no end of them, and none of its values comes back.
_MAX_VALUES = 3

# Kinds of calls of which something is remembered.
_MAX_KINDS = 256


class Kind(NamedTuple):
    """What calls have in common that differ in their tensors' values alone.

    Attributes:
        form: What they have in common whose numbers differ as well.
        numbers: The Python numbers that the module is called with, which compiled code has for constants.
    """

    form: Hashable
    numbers: tuple[Hashable, ...]


@dataclasses.dataclass
class Call:
    """A call of a module for ``n`` members.

    Attributes:
        module: The module.
        slots: Where it keeps perturbed parameters.
        centres: The unperturbed parameters by name.
        factors: For each of them the members' perturbations, with a leading dimension ``n``, or the draws that they
            share.
        leaves: The leaves of its ``(args, kwargs)``.
        spec: Their structure.
        dims: For each leaf its dimension of members, or None if they share it.
        size: ``n``.
        exact: Whether it is compiled for its very number of members, as one that is made over and over should be.
    """

    module: nn.Module
    slots: Sequence[Slot]
    centres: Mapping[str, Tensor]
    factors: Mapping[str, Any]
    leaves: Sequence[Any]
    spec: TreeSpec
    dims: Sequence[int | None]
    size: int
    exact: bool = False

    def kind(self) -> Kind:
        """Return what calls have in common that differ in the tensors' values alone, and, if not exact, in ``n``."""
        signature: list[Hashable] = []
        numbers: list[Hashable] = []
        for leaf, dim in zip(self.leaves, self.dims, strict=True):
            if isinstance(leaf, Tensor):
                shape = [size for i, size in enumerate(leaf.shape) if dim is None or i != dim % leaf.ndim]
                signature.append((tuple(shape), dim, leaf.dtype, leaf.device))
            elif type(leaf) in (int, float, complex):
                signature.append(type(leaf).__name__)
                # Not the number itself: 0.0 equals -0.0, and NaN does not equal itself.
                numbers.append(repr(leaf))
            else:
                signature.append((type(leaf), repr(leaf)))
        ranks = tuple(_rank(value) for value in self.factors.values())
        form = self.module, str(self.spec), tuple(signature), ranks, self.size if self.exact else None
        return Kind(form, tuple(numbers))

    def structure(self) -> Hashable:
        """Return what calls have in common that differ in the sizes of their tensors as well."""
        leaves = [
            (leaf.ndim, leaf.dtype, dim) if isinstance(leaf, Tensor) else type(leaf)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
        ]
        return self.module, str(self.spec), tuple(leaves), tuple(_rank(value) for value in self.factors.values())

    def numel(self) -> int:
        """Return how many numbers the inputs of one member have."""
        return sum(
            leaf.numel() // (1 if dim is None else self.size)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
            if isinstance(leaf, Tensor)
        )

    def parts(self, ranges: Sequence[tuple[int, int]]) -> list[Call]:
        """Return the calls for members ``start, …, stop - 1`` of each of the ranges."""
        if list(ranges) == [(0, self.size)]:
            return [self]
        own = dataclasses.replace(self, factors={name: members_of(value) for name, value in self.factors.items()})
        return [own._part(start, stop) for start, stop in ranges]

    def _part(self, start: int, stop: int) -> Call:
        leaves = [
            leaf if dim is None else leaf.narrow(dim, start, stop - start)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
        ]
        factors = {name: tree_map(lambda t: t[start:stop], value) for name, value in self.factors.items()}
        return dataclasses.replace(self, leaves=leaves, factors=factors, size=stop - start)

    def tensors(self) -> tuple[Any, ...]:
        """Return the arguments of the function that :func:`batched` returns."""
        pairs = list(zip(self.leaves, self.dims, strict=True))
        own = [leaf for leaf, dim in pairs if dim is not None]
        shared = [leaf for leaf, dim in pairs if dim is None and isinstance(leaf, Tensor)]
        # The unused counter gives vmap its size where a module has neither parameters nor inputs of each member.
        return torch.arange(self.size, device="cpu"), self.centres, self.factors, own, shared

    def devices(self) -> list[torch.device]:
        """Return the accelerators that its tensors are on."""
        tensors = [*self.centres.values(), *(leaf for leaf in self.leaves if isinstance(leaf, Tensor))]
        return sorted({tensor.device for tensor in tensors} - {torch.device("cpu")}, key=str)


def _rank(value: Any) -> int | None:
    """Return the rank of a parameter's perturbations, or None where they are full-rank ones."""
    if isinstance(value, SharedDraws):
        return None if value.rows is None else value.noise.shape[1]
    return value[0].shape[-1] if isinstance(value, tuple) else None


# What a batched call returns: the tensors among the leaves of the result, the others by their index, the structure.
Result = tuple[list[Tensor], dict[int, Any], TreeSpec]


def batched(call: Call) -> Callable[..., Result]:
    """Return a function of tensors that makes calls of the kind of ``call`` for any number of members."""
    module, slots, spec, count = call.module, call.slots, call.spec, len(call.leaves)
    own_at = [i for i, dim in enumerate(call.dims) if dim is not None]
    in_dims = (0, 0, [call.dims[i] for i in own_at])
    is_shared = [dim is None and isinstance(leaf, Tensor) for leaf, dim in zip(call.leaves, call.dims, strict=True)]
    shared_at = [i for i in range(count) if is_shared[i]]
    constants = {i: call.leaves[i] for i in range(count) if i not in own_at and i not in shared_at}

    def forward(
        counter: Tensor, centres: dict[str, Tensor], factors: dict[str, Any], own: list[Tensor], shared: list[Tensor]
    ) -> Result:
        structure: list[tuple[dict[int, Any], TreeSpec]] = []

        def member(_: Tensor, factors: dict[str, Any], own: list[Tensor]) -> list[Tensor]:
            leaves = dict(constants)
            leaves.update(zip(own_at, own, strict=True))
            leaves.update(zip(shared_at, shared, strict=True))
            results, result_spec = for_one(module, slots, centres, factors, [leaves[i] for i in range(count)], spec)
            others = {i: leaf for i, leaf in enumerate(results) if not isinstance(leaf, Tensor)}
            for leaf in others.values():
                if not isinstance(leaf, PLAIN_TYPES):
                    error = ReturnsObject if is_container(leaf) else NotBatchable
                    raise error(f"the model returns a {type(leaf).__name__}")
            structure.append((others, result_spec))
            return [leaf for leaf in results if isinstance(leaf, Tensor)]

        factors = {name: members_of(value) for name, value in factors.items()}
        with BatchingRules():
            tensors = torch.vmap(member, in_dims, randomness="different")(counter, factors, own)
        return tensors, *structure[0]

    return forward


def for_one(
    module: nn.Module,
    slots: Sequence[Slot],
    centres: Mapping[str, Tensor],
    factors: Mapping[str, Any],
    leaves: Sequence[Any],
    spec: TreeSpec,
) -> tuple[list[Any], TreeSpec]:
    """Call a module with the weights of one member, under ``torch.vmap``, and return its result's leaves and spec."""
    args, kwargs = tree_unflatten(list(leaves), spec)
    parameters = {name: perturb(centres[name], value) for name, value in factors.items()}
    with swapped(slots, parameters):
        result = module(*args, **kwargs)
    return tree_flatten(tree_map(densify, result))


class Forwards:
    """Carries out the calls of one model, and remembers between generations what it found out about them.

    Args:
        compile: Whether to compile them with ``torch.compile``.
        budget: What the tensors of a call may take.

    Attributes:
        backend: What compiles them.
        reports: What the user should be warned of.
        one_by_one: Whether the model as a whole was found not to be batchable.
        opening: Modules that return objects, such as caches.
        refused: Calls of coalesced fitness functions that were found not to be, with the reason.
    """

    def __init__(self, *, compile: bool = False, budget: Budget | None = None) -> None:
        self.compile = compile
        self.budget = Budget() if budget is None else budget
        self.backend = Backend()
        self.reports: list[str] = []
        self.one_by_one = False
        self.opening: set[nn.Module] = set()
        self.refused: Recent[Hashable, str] = Recent(_MAX_KINDS)
        # By forms of calls.
        self._rooms: Recent[Hashable, _Room] = Recent(_MAX_KINDS)
        # By structure of calls, numbers in the inputs of one that was measured, and how many members would have fitted.
        self._measured: Recent[Hashable, tuple[int, int]] = Recent(_MAX_KINDS)
        self._values: Recent[Hashable, _Values] = Recent(_MAX_KINDS)
        self._compiled: dict[Kind, _Compiled] = {}
        # Kinds that cannot be compiled.
        self._eager: Recent[Kind, None] = Recent(_MAX_KINDS)

    def run(self, call: Call) -> Any:
        """Return what the module returns, each tensor with a leading dimension ``n``.

        Raises:
            Exception: Whatever the module raises, or torch.vmap where it cannot be batched.
        """
        kind = call.kind()
        while True:
            tile = self._tile(call, kind)
            try:
                together = self.compile and call.size > 1
                return self._run_compiled(call, kind, tile) if together else self._run_eagerly(call, tile)
            except Exception as error:
                if not is_out_of_memory(error) or tile == 1:
                    raise
            # Not while the exception is handled, which holds on to tensors.
            self._rooms[kind.form].most = tile // 2
            self._compiled.pop(kind, None)

    def _run_compiled(self, call: Call, kind: Kind, tile: int) -> Any:
        compiled = self._compiled_for(call, kind, tile)
        if compiled is None or call.size < compiled.size:
            return self._run_eagerly(call, tile)
        size = compiled.size
        # Parts of one size, for which it is compiled once: the last one begins among the members of the one before.
        starts = [*range(0, call.size - size, size), call.size - size]
        try:
            with warnings.catch_warnings():
                # What torch warns of while it compiles is for its own authors.
                warnings.simplefilter("ignore")
                parts = call.parts([(i, i + size) for i in starts])
                return _joined([compiled.function(*part.tensors()) for part in parts], call.size)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            del self._compiled[kind]
            self._eager[kind] = None
            result = self._run_eagerly(call, tile)
            # It was not the model's own error, which would have come up again.
            self.reports.append(f"{type(call.module).__name__} is not compiled and runs eagerly: {_reason(error)}")
            return result

    def _compiled_for(self, call: Call, kind: Kind, tile: int) -> _Compiled | None:
        """Return the compiled code for a kind of call, made now if need be, or None where it is to run eagerly."""
        if kind.numbers:
            if kind.form not in self._values:
                self._values[kind.form] = _Values()
            came_back = self._values[kind.form].came_back(kind.numbers)
        compiled = self._compiled.get(kind)
        if compiled is not None:
            # The first to call may have been few. Each time it takes twice as large a factor, so that it ends.
            if tile < compiled.size << compiled.times:
                return compiled
            compiled = _Compiled(self._compile(call), tile, compiled.times + 1)
        elif kind in self._eager:
            return None
        elif len(self._compiled) >= _MAX_COMPILED:
            self.reports.append(
                f"the model is called in more than {_MAX_COMPILED} ways (other shapes of inputs, other values of"
                " numbers that it is called with); the further ones are not compiled"
            )
            return None
        elif kind.numbers and not came_back and self._values_compiled(kind) >= _MAX_VALUES:
            self.reports.append(
                f"the model is called with numbers that change: it is compiled for their first {_MAX_VALUES} values and"
                " for those that come back, and runs eagerly for others. Pass a number as a tensor,"
                " torch.tensor(number), to have it compiled once for all values"
            )
            return None
        else:
            compiled = _Compiled(self._compile(call), tile, 1)
        self._compiled[kind] = compiled
        return compiled

    def _values_compiled(self, kind: Kind) -> int:
        return sum(other.form == kind.form for other in self._compiled)

    def _compile(self, call: Call) -> Callable[..., Result]:
        function = _with_own_cache(batched(call))
        return torch.compile(function, fullgraph=True, dynamic=False, backend=self.backend)

    def _run_eagerly(self, call: Call, tile: int) -> Any:
        function = batched(call)
        with _uncompiled(call.module):
            parts = call.parts([(i, min(i + tile, call.size)) for i in range(0, call.size, tile)])
            return _joined([function(*part.tensors()) for part in parts], call.size)

    def _tile(self, call: Call, kind: Kind) -> int:
        """Return how many members to call at a time: a power of two, or all."""
        if call.size == 1:
            return 1
        if kind.form not in self._rooms:
            self._rooms[kind.form] = _Room()
        room = self._rooms[kind.form]
        fitting = room.fitting(kind.numbers)
        if fitting is None:
            fitting = self._fitting_by_growth(call, kind)
        if fitting is None:
            device = next(iter(call.devices()), torch.device("cpu"))
            function = batched(call)
            # Dropout draws in it; who draws after it must not notice.
            with _uncompiled(call.module), kept_rng(call.devices()):
                one, two = (
                    live_bytes(lambda part=part: function(*part.tensors()))  # type: ignore[misc]
                    for part in call.parts([(0, 1), (0, 2)])
                )
            number = max(1, (self.budget.call_bytes(device) - one) // max(1, two - one))
            fitting = 1 << (number.bit_length() - 1)
            room.note(kind.numbers, (one, two), fitting)
            self._measured[call.structure(), kind.numbers] = call.numel(), number
        return min(fitting, call.size) if room.most is None else min(fitting, room.most, call.size)

    def _fitting_by_growth(self, call: Call, kind: Kind) -> int | None:
        """Return how many members fit if all do, going by a call with shorter sequences, say; None if it is unclear.

        Code that makes its sequence longer step by step would otherwise be measured at each length.
        """
        known = self._measured.get((call.structure(), kind.numbers))
        if known is None:
            return None
        numel, number = known
        # No less than quadratic, as attention is.
        growth = max(1.0, call.numel() / max(1, numel)) ** 2
        return call.size if number / growth >= call.size else None


class _Compiled(NamedTuple):
    """Compiled code.

    Attributes:
        function: What computes a call.
        size: The number of members that it is for.
        times: How many times it has been compiled for ever larger numbers.
    """

    function: Callable[..., Result]
    size: int
    times: int


class _Room:
    """How many members calls of one form can be made for at a time.

    Their numbers may say how large a tensor is, but mostly they don't: once another value has needed as much memory as
    the one before, no further ones are measured.

    Attributes:
        most: What has turned out to fit, where something did not.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self._fitting: Recent[Hashable, int] = Recent(_MAX_KINDS)
        self._last_need: Any = None
        self._for_all: int | None = None

    def fitting(self, numbers: Hashable) -> int | None:
        """Return how many members fit, or None where it is to be measured."""
        return self._fitting.get(numbers, self._for_all)

    def note(self, numbers: Hashable, need: Any, fitting: int) -> None:
        """Take down what was measured."""
        if need == self._last_need:
            self._for_all = fitting
        self._last_need = need
        self._fitting[numbers] = fitting


class _Values:
    """The values of the numbers that calls of one form were made with of late."""

    def __init__(self) -> None:
        self._met: Recent[Hashable, None] = Recent(_MAX_COMPILED)
        self._last: Hashable = None

    def came_back(self, numbers: Hashable) -> bool:
        """Take down the values of a call, and return whether they have come back after others."""
        came_back = numbers != self._last and numbers in self._met
        self._met[numbers], self._last = None, numbers
        return came_back


def _joined(parts: Sequence[Result], size: int) -> Any:
    """Return the result for all members, of which the last part may repeat some of the one before."""
    tensors, others, spec = parts[0]
    if any(repr(part[1:]) != repr((others, spec)) for part in parts[1:]):
        raise NotBatchable("the model returns other values for some members")
    if len(parts) > 1:
        *_, last = parts
        count = len(parts[0][0][0]) if tensors else 0
        done = count * (len(parts) - 1)
        rest = [t[t.shape[0] - (size - done) :] for t in last[0]]
        tensors = [torch.cat(column) for column in zip(*(part[0] for part in parts[:-1]), rest, strict=True)]
    else:
        # What is the same for all members comes expanded; each gets its own, to change in place.
        tensors = [t.clone(memory_format=torch.contiguous_format) if _is_shared(t) else t for t in tensors]
    values = iter(tensors)
    return tree_unflatten([others[i] if i in others else next(values) for i in range(len(others) + len(tensors))], spec)


def _is_shared(output: Tensor) -> bool:
    return output.stride(0) == 0 or output.shape[0] == 1


def _with_own_cache(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return the function with a code object of its own: torch.compile counts recompilations by code object."""
    code = function.__code__.replace(co_name=f"{function.__name__}_")
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


def _uncompiled(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Run what torch.compile has made of parts of a module as it was written: it knows nothing of members."""
    if any(is_compiled(m) for m in module.modules()):
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
