"""Makes one call of a module for many members: batched, in tiles that bound memory, and compiled on request.

A call is batched by ``torch.vmap`` over the members' perturbations. Its members are split into tiles, so that the
intermediate tensors of one tile fit in a memory budget. We measure how much memory a member needs.
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

# Types of arguments and results, besides tensors, that batched calls support.
PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, slice, type(...))

# Largest number of kinds of calls that are compiled, as the shapes of inputs may change all the time.
_MAX_COMPILED = 16

# The model is compiled at once for this many values of its number arguments, and for others when they recur. A number
# such as a time or a temperature may have a new value in every call.
_MAX_VALUES = 3

# Largest number of kinds of calls about which something is remembered.
_MAX_KINDS = 256


class Kind(NamedTuple):
    """A key that is equal for calls that differ only in the values of tensors.

    Attributes:
        form: A key that is also equal for calls that differ in ``numbers``.
        numbers: The Python numbers among the arguments, which are constants in compiled code.
    """

    form: Hashable
    numbers: tuple[Hashable, ...]


@dataclasses.dataclass
class Call:
    """A call of a module for ``n`` members.

    Attributes:
        module: The module.
        slots: The places of its perturbed parameters.
        centres: The unperturbed parameters by name.
        factors: For each of them, the members' perturbations with a leading dimension ``n``, or the draws that they
            share.
        leaves: The leaves of its ``(args, kwargs)``.
        spec: Their structure.
        dims: For each leaf its dimension of members, or None if members share it.
        size: ``n``.
        exact: Whether to compile for exactly this number of members, as for calls that are repeated often.
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
        """Return a key that is equal for calls that differ only in values of tensors, and in ``n`` if not exact."""
        signature: list[Hashable] = []
        numbers: list[Hashable] = []
        for leaf, dim in zip(self.leaves, self.dims, strict=True):
            if isinstance(leaf, Tensor):
                shape = [size for i, size in enumerate(leaf.shape) if dim is None or i != dim % leaf.ndim]
                signature.append((tuple(shape), dim, leaf.dtype, leaf.device))
            elif type(leaf) in (int, float, complex):
                signature.append(type(leaf).__name__)
                # As text, because 0.0 equals -0.0, and NaN does not equal itself.
                numbers.append(repr(leaf))
            else:
                signature.append((type(leaf), repr(leaf)))
        ranks = tuple(_rank(value) for value in self.factors.values())
        form = self.module, str(self.spec), tuple(signature), ranks, self.size if self.exact else None
        return Kind(form, tuple(numbers))

    def structure(self) -> Hashable:
        """Return a key that is equal for calls that differ only in the values and sizes of tensors."""
        leaves = [
            (leaf.ndim, leaf.dtype, dim) if isinstance(leaf, Tensor) else type(leaf)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
        ]
        return self.module, str(self.spec), tuple(leaves), tuple(_rank(value) for value in self.factors.values())

    def numel(self) -> int:
        """Return the number of entries in the input tensors of one member."""
        return sum(
            leaf.numel() // (1 if dim is None else self.size)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
            if isinstance(leaf, Tensor)
        )

    def parts(self, ranges: Sequence[tuple[int, int]]) -> list[Call]:
        """Return the calls for members ``start, …, stop - 1`` of each of the ranges."""
        if list(ranges) == [(0, self.size)]:
            return [self]
        unshared = dataclasses.replace(self, factors={name: members_of(value) for name, value in self.factors.items()})
        return [unshared._part(start, stop) for start, stop in ranges]

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
        inputs = [leaf for leaf, dim in pairs if dim is not None]
        shared = [leaf for leaf, dim in pairs if dim is None and isinstance(leaf, Tensor)]
        # The counter tells vmap the number of members, if a module has neither parameters nor inputs for each member.
        return torch.arange(self.size, device="cpu"), self.centres, self.factors, inputs, shared

    def devices(self) -> list[torch.device]:
        """Return the accelerators that its tensors are on."""
        tensors = [*self.centres.values(), *(leaf for leaf in self.leaves if isinstance(leaf, Tensor))]
        return sorted({tensor.device for tensor in tensors} - {torch.device("cpu")}, key=str)


def _rank(value: Any) -> int | None:
    """Return the rank of a parameter's perturbations, or None for full-rank perturbations."""
    if isinstance(value, SharedDraws):
        return None if value.rows is None else value.noise.shape[1]
    return value[0].shape[-1] if isinstance(value, tuple) else None


# The result of a batched call: tensors among its leaves, other leaves by their index, and its structure.
Result = tuple[list[Tensor], dict[int, Any], TreeSpec]


def batched(call: Call) -> Callable[..., Result]:
    """Return a function of :meth:`Call.tensors` that makes calls of the kind of ``call``, for any number of members."""
    module, slots, spec, count = call.module, call.slots, call.spec, len(call.leaves)
    batched_at = [i for i, dim in enumerate(call.dims) if dim is not None]
    in_dims = (0, 0, [call.dims[i] for i in batched_at])
    is_shared = [dim is None and isinstance(leaf, Tensor) for leaf, dim in zip(call.leaves, call.dims, strict=True)]
    shared_at = [i for i in range(count) if is_shared[i]]
    constants = {i: call.leaves[i] for i in range(count) if i not in batched_at and i not in shared_at}

    def forward(
        counter: Tensor, centres: dict[str, Tensor], factors: dict[str, Any], inputs: list[Tensor], shared: list[Tensor]
    ) -> Result:
        structure: list[tuple[dict[int, Any], TreeSpec]] = []

        def member(_: Tensor, factors: dict[str, Any], inputs: list[Tensor]) -> list[Tensor]:
            leaves = dict(constants)
            leaves.update(zip(batched_at, inputs, strict=True))
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
            tensors = torch.vmap(member, in_dims, randomness="different")(counter, factors, inputs)
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
    """Call a module with one member's weights, under ``torch.vmap``; return the leaves and structure of the result."""
    args, kwargs = tree_unflatten(list(leaves), spec)
    parameters = {name: perturb(centres[name], value) for name, value in factors.items()}
    with swapped(slots, parameters):
        result = module(*args, **kwargs)
    return tree_flatten(tree_map(densify, result))


class Forwards:
    """Makes the batched calls of one model. It keeps compiled code, tile sizes and failures between generations.

    Args:
        compile: Whether to use ``torch.compile``.
        budget: Memory budget of the tensors of a call.

    Attributes:
        backend: The backend of ``torch.compile``.
        reports: Warnings for the user that have not been issued yet.
        one_by_one: Whether calls of the whole model cannot be batched.
        returning_objects: Modules that return objects, such as caches.
        refused: Calls in plain fitness functions that cannot be batched, with the reason.
    """

    def __init__(self, *, compile: bool = False, budget: Budget | None = None) -> None:
        self.compile = compile
        self.budget = Budget() if budget is None else budget
        self.backend = Backend()
        self.reports: list[str] = []
        self.one_by_one = False
        self.returning_objects: set[nn.Module] = set()
        self.refused: Recent[Hashable, str] = Recent(_MAX_KINDS)
        # By the form of calls.
        self._tile_limits: Recent[Hashable, _TileLimit] = Recent(_MAX_KINDS)
        # By the structure of calls, for a measured call: the size of a member's inputs, and how many members would fit.
        self._measured: Recent[Hashable, tuple[int, int]] = Recent(_MAX_KINDS)
        self._values: Recent[Hashable, _Values] = Recent(_MAX_KINDS)
        self._compiled: dict[Kind, _Compiled] = {}
        # Kinds that cannot be compiled.
        self._eager: Recent[Kind, None] = Recent(_MAX_KINDS)

    def run(self, call: Call) -> Any:
        """Return the result of the module, each tensor with a leading dimension ``n``.

        Raises:
            Exception: Any exception of the module, or of torch.vmap if the call cannot be batched.
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
            # Outside of the except block, as the exception keeps tensors alive.
            self._tile_limits[kind.form].most = tile // 2
            self._compiled.pop(kind, None)

    def _run_compiled(self, call: Call, kind: Kind, tile: int) -> Any:
        compiled = self._compiled_for(call, kind, tile)
        if compiled is None or call.size < compiled.size:
            return self._run_eagerly(call, tile)
        size = compiled.size
        # All parts have the compiled size, so the last one may repeat members of the one before.
        starts = [*range(0, call.size - size, size), call.size - size]
        try:
            with warnings.catch_warnings():
                # Warnings of torch's compiler say nothing to users.
                warnings.simplefilter("ignore")
                parts = call.parts([(i, i + size) for i in starts])
                return _joined([compiled.function(*part.tensors()) for part in parts], call.size)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            del self._compiled[kind]
            self._eager[kind] = None
            result = self._run_eagerly(call, tile)
            # The model runs eagerly, so the error came from the compiler.
            self.reports.append(f"{type(call.module).__name__} is not compiled and runs eagerly: {_reason(error)}")
            return result

    def _compiled_for(self, call: Call, kind: Kind, tile: int) -> _Compiled | None:
        """Return the compiled code for a kind of call, compiled now if necessary, or None to run it eagerly."""
        if kind.numbers:
            if kind.form not in self._values:
                self._values[kind.form] = _Values()
            recurs = self._values[kind.form].recurs(kind.numbers)
        compiled = self._compiled.get(kind)
        if compiled is not None:
            # Recompile if many more members are called than before. The factor doubles each time, so that this ends.
            if tile < compiled.size << compiled.times:
                return compiled
            compiled = _Compiled(self._compile(call), tile, compiled.times + 1)
        elif kind in self._eager:
            return None
        elif len(self._compiled) >= _MAX_COMPILED:
            self.reports.append(
                f"the model is called in more than {_MAX_COMPILED} ways (shapes of inputs, values of number arguments)."
                " Further ones are not compiled: pad inputs to a few shapes, and pass numbers as tensors"
            )
            return None
        elif kind.numbers and not recurs and self._values_compiled(kind) >= _MAX_VALUES:
            self.reports.append(
                f"the model is called with numbers that change: it is compiled for their first {_MAX_VALUES} values and"
                " for those that recur, and runs eagerly for others. Pass a number as a tensor, torch.tensor(number),"
                " to compile once for all values"
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
        """Return the tile size: how many members to call at a time, a power of two or all."""
        if call.size == 1:
            return 1
        if kind.form not in self._tile_limits:
            self._tile_limits[kind.form] = _TileLimit()
        limit = self._tile_limits[kind.form]
        fitting = limit.fitting(kind.numbers)
        if fitting is None:
            fitting = self._fitting_by_growth(call, kind)
        if fitting is None:
            device = next(iter(call.devices()), torch.device("cpu"))
            function = batched(call)
            # The measurement may draw random numbers, as for dropout: restore the generators.
            with _uncompiled(call.module), kept_rng(call.devices()):
                one, two = (
                    live_bytes(lambda part=part: function(*part.tensors()))  # type: ignore[misc]
                    for part in call.parts([(0, 1), (0, 2)])
                )
            number = max(1, (self.budget.call_bytes(device) - one) // max(1, two - one))
            fitting = 1 << (number.bit_length() - 1)
            limit.note(kind.numbers, (one, two), fitting)
            self._measured[call.structure(), kind.numbers] = call.numel(), number
        return min(fitting, call.size) if limit.most is None else min(fitting, limit.most, call.size)

    def _fitting_by_growth(self, call: Call, kind: Kind) -> int | None:
        """Return the number of members if a smaller measured call implies that all fit, else None.

        Otherwise, code whose sequences grow step by step would be measured at each length.
        """
        known = self._measured.get((call.structure(), kind.numbers))
        if known is None:
            return None
        numel, number = known
        # Assume that memory grows quadratically, as with attention.
        growth = max(1.0, call.numel() / max(1, numel)) ** 2
        return call.size if number / growth >= call.size else None


class _Compiled(NamedTuple):
    """Compiled code for a kind of call.

    Attributes:
        function: The compiled function of :meth:`Call.tensors`.
        size: Number of members that it was compiled for.
        times: How many times this kind was compiled, each time for more members.
    """

    function: Callable[..., Result]
    size: int
    times: int


class _TileLimit:
    """The tile size for calls of one form.

    A number argument may set the size of a tensor, but most don't. Once two values have needed the same memory, further
    values are not measured.

    Attributes:
        most: Upper bound of the tile size after memory has run out; None before.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self._fitting: Recent[Hashable, int] = Recent(_MAX_KINDS)
        self._last_need: Any = None
        self._for_all: int | None = None

    def fitting(self, numbers: Hashable) -> int | None:
        """Return how many members fit, or None if it has to be measured."""
        return self._fitting.get(numbers, self._for_all)

    def note(self, numbers: Hashable, need: Any, fitting: int) -> None:
        """Record a measurement."""
        if need == self._last_need:
            self._for_all = fitting
        self._last_need = need
        self._fitting[numbers] = fitting


class _Values:
    """The recent values of number arguments in calls of one form."""

    def __init__(self) -> None:
        self._met: Recent[Hashable, None] = Recent(_MAX_COMPILED)
        self._last: Hashable = None

    def recurs(self, numbers: Hashable) -> bool:
        """Record the values of a call, and return whether they have recurred after others."""
        recurs = numbers != self._last and numbers in self._met
        self._met[numbers], self._last = None, numbers
        return recurs


def _joined(parts: Sequence[Result], size: int) -> Any:
    """Join the results of parts to one for all members. The last part may repeat members of the one before."""
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
        # A result that is the same for all members is an expanded tensor: copy it, so that users may write into it.
        tensors = [t.clone(memory_format=torch.contiguous_format) if _is_shared(t) else t for t in tensors]
    values = iter(tensors)
    return tree_unflatten([others[i] if i in others else next(values) for i in range(len(others) + len(tensors))], spec)


def _is_shared(output: Tensor) -> bool:
    return output.stride(0) == 0 or output.shape[0] == 1


def _with_own_cache(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return the function with a new code object, as torch.compile limits recompilations by code object."""
    code = function.__code__.replace(co_name=f"{function.__name__}_")
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


def _uncompiled(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Inside the block, run compiled parts of a module eagerly, as their compiled code cannot be batched."""
    if any(is_compiled(m) for m in module.modules()):
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
