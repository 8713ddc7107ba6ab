"""The check of members that are evaluated together: a member is also evaluated alone, and compared.

It is evaluated alone *on the recorded outputs* of its calls, so that rounding cannot make two evaluations diverge. Then
all inputs to the model, the order of calls and the score must be bitwise equal. Each output must equal that of the
model with the member's weights, within the tolerance of its dtype.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import compiler_state, tree_leaves, tree_map
from ..noise.keys import kept_rng
from ..population import Population
from ..population.agreement import disagreement, precision
from ..population.containers import contents, copy_with, is_container
from ..population.forward import PLAIN_TYPES
from ..population.interception import Interception, plain_call
from ..population.object_calls import objects_in
from ..population.snapshot import same_bits
from . import alone, thread_modes
from .compiled import eagerly, restored
from .randomness import Source
from .record import Record, aligned_copy, copies, describe
from .scores import Score, described
from .tensor_history import TensorHistory

Function = Callable[[nn.Module], Score]

SHARED = "the function seems to share something, such as a simulator or a random generator, between calls"


class DiffersFromItself(Exception):
    """Two evaluations of a member alone differ, so the function cannot be checked."""


def difference(
    population: Population, function: Function, index: int, record: Record, generators: Sequence[Source]
) -> str | None:
    """Describe how a member's evaluation together with others differs from its evaluation alone, or return None.

    Args:
        population: The members.
        function: Takes a model and returns its fitness.
        index: Index of the member in the population.
        record: The record of its evaluation together with others.
        generators: The global generators.

    Raises:
        DiffersFromItself: Two evaluations of the member alone differ.
        Exception: The function raised when the member was evaluated alone.
    """
    try:
        found = _Replay(population, record).run(function, index, generators)
    except Exception as error:
        # For example, outputs of the model may require gradients when it is evaluated alone.
        found = f"it raised {type(error).__name__} when evaluated alone: {error}"
    if found is None:
        return None
    recording = _Recording(population)
    recording.run(function, index, generators)
    try:
        if _Replay(population, recording.record).run(function, index, generators) is not None:
            raise DiffersFromItself
    except Exception as error:
        raise DiffersFromItself from error
    return found.replace("{member}", str(population.first + index))


class _Intercepted(ABC):
    """An evaluation of a member alone, in which :meth:`call` handles each call of the model."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self._thread = threading.get_ident()
        self._interception = Interception(population.model, self._on_call)

    def score(self, function: Function, index: int, generators: Sequence[Source]) -> tuple[Score, list[str]]:
        return alone.score(self.population, function, index, generators, self._interception)

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread or thread_modes.in_transform():
            # We cannot compare calls in other threads, nor tensors without values.
            return plain_call(module, args, kwargs)
        return self.call(module, args, kwargs)

    @abstractmethod
    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a call of the model."""

    def plain(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module without intercepting the call or those of its submodules."""
        self._interception.stop()
        try:
            return module(*args, **kwargs)
        finally:
            self._interception.start()


def evaluate_observed(
    population: Population,
    function: Function,
    index: int,
    generators: Sequence[Source],
    note: Callable[[tuple[Any, ...], dict[str, Any]], None],
) -> tuple[Score, list[str]]:
    """Evaluate a member alone as :func:`.alone.score` does; pass the arguments of calls of the model to ``note``."""
    return _CallObserver(population, note).score(function, index, generators)


class _Compared(_Intercepted):
    """An evaluation to compare. The user's compiled code runs eagerly, as it does while members take turns."""

    def score(self, function: Function, index: int, generators: Sequence[Source]) -> tuple[Score, list[str]]:
        self._compiler = compiler_state()
        with eagerly():
            return super().score(function, index, generators)

    def plain(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module as it is, compiled or not."""
        with restored(self._compiler):
            return super().plain(module, args, kwargs)


class _Recording(_Compared):
    """Records an evaluation alone."""

    def __init__(self, population: Population) -> None:
        super().__init__(population)
        self.record = Record()

    def run(self, function: Function, index: int, generators: Sequence[Source]) -> None:
        """Evaluate the member."""
        self.record.score, _ = self.score(function, index, generators)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call, and record it."""
        leaves, spec = describe(args, kwargs)
        recorded = self.record.begin(module, copies(leaves), spec)
        result = self.plain(module, args, kwargs)
        self.record.end(recorded, result)
        return result


class _CallObserver(_Intercepted):
    """Evaluates a member alone, and passes the arguments of calls of the model to a function."""

    def __init__(self, population: Population, note: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__(population)
        self._note = note

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call, and pass on its arguments if it is a call of the whole model."""
        if module is self.population.model:
            self._note(args, kwargs)
        return self.plain(module, args, kwargs)


class _Difference(BaseException):
    """Ends an evaluation at the first difference; the message describes it."""


class _Replay(_Compared):
    """Evaluates a member alone on recorded outputs."""

    def __init__(self, population: Population, record: Record) -> None:
        super().__init__(population)
        self._record, self._at = record, 0
        self._history = TensorHistory()

    def run(self, function: Function, index: int, generators: Sequence[Source]) -> str | None:
        """Describe how the evaluation differs from the recorded one, or return None."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self._record.threads)
        try:
            score, _ = self.score(function, index, generators)
        except _Difference as found:
            return str(found)
        finally:
            torch.set_num_threads(threads)
        if self._at < len(self._record.calls):
            return f"member {{member}} called the model more often than when it is evaluated alone: {SHARED}"
        earned = _earned(self._record.score, score)
        if earned is not None:
            outputs = "from the same outputs of the model"
            return f"member {{member}} {earned} when it is evaluated alone, {outputs}: {SHARED}"
        return None

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compare a call with the recorded one, and return the recorded output."""
        number, self._at = self._at, self._at + 1
        where = f"in its {_ordinal(number + 1)} call member {{member}}"
        if number == len(self._record.calls):
            raise _Difference(
                f"member {{member}} called the model less often than when it is evaluated alone: {SHARED}"
            )
        recorded = self._record.calls[number]
        if recorded.module is not module:
            raise _Difference(f"{where} called another module than when it is evaluated alone: {SHARED}")
        leaves, spec = describe(args, kwargs)
        objects = objects_in(leaves)
        given, held = self._history.replay(recorded.given), contents(objects).tensors()
        same = spec == recorded.spec and all(map(_same, leaves, recorded.leaves)) and len(given) == len(held)
        if not same or not all(map(same_bits, given, held)):
            raise _Difference(f"{where} was given another input than when it is evaluated alone: {SHARED}")
        if not recorded.batched:
            return plain_call(module, args, kwargs)

        outputs: list[Any] = []
        # A call changes objects such as caches, so further calls get copies.
        spare = copy_with(objects, Tensor.clone)
        left = self._history.replay(recorded.left)

        def call() -> Any:
            given = objects if not outputs else copy_with(spare, Tensor.clone)
            copies = dict(zip(map(id, objects), given, strict=True))
            own_args, own_kwargs = tree_map(lambda leaf: copies.get(id(leaf), leaf), (args, kwargs))
            outputs.append(self.plain(module, own_args, own_kwargs))
            return _compared(outputs[-1]), contents(objects_in([*given, *tree_leaves(outputs[-1])])).tensors()

        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
        with kept_rng(devices):
            eps = precision(self.population.model, leaves)
            off = disagreement(self.population.model, call, (_compared(recorded.result), left), eps)
        if off is not None:
            raise _Difference(
                f"{where} got an output, computed for several members at once, that is not what the model gives with"
                f" its weights: {off}"
            )
        torch.set_num_threads(recorded.threads)
        after = contents(objects_in([*objects, *tree_leaves(outputs[0])]))
        after.exchange([aligned_copy(tensor) for tensor in left])
        return tree_map(_handed_back, recorded.result, outputs[0])


def _handed_back(recorded: Any, output: Any) -> Any:
    return output if is_container(recorded) else _Differentiable.of(recorded, output)


class _Differentiable(torch.autograd.Function):
    """Makes a recorded output require gradients like the true output. It propagates none."""

    @staticmethod
    def of(recorded: Any, output: Any) -> Any:
        """Return the recorded leaf, which requires gradients if the output does."""
        if isinstance(output, Tensor) and output.requires_grad:
            return _Differentiable.apply(torch.empty(0, requires_grad=True, device="cpu"), recorded)
        return recorded

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, recorded: Tensor) -> Tensor:
        return aligned_copy(recorded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _earned(score: Score | None, alone: Score) -> str | None:
    """Describe the scores of a member together with others, and alone, if they differ."""
    scores, scores_alone = (value if isinstance(value, tuple) else (value,) for value in (score, alone))
    if isinstance(score, tuple) != isinstance(alone, tuple) or len(scores) != len(scores_alone):
        counts = [[len(value)] if isinstance(value, tuple) else [] for value in (score, alone)]
        return f"earned {described(counts[0])}, and {described(counts[1])}"
    for task, (one, other) in enumerate(zip(scores, scores_alone, strict=True)):
        # NaN counts as equal to NaN.
        if one != other and not (one != one and other != other):
            where = f" in task {task}" if len(scores_alone) > 1 else ""
            return f"earned {one!r}{where}, and {other!r}"
    return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and same_bits(one.detach(), other.detach())
    if isinstance(one, PLAIN_TYPES):
        return type(one) is type(other) and (one == other or one != one)
    # Other objects may be created anew in each evaluation; their tensors are compared elsewhere.
    return True


def _compared(result: Any) -> Any:
    """Return a result without its objects, whose tensors are compared separately."""
    return tree_map(lambda leaf: None if is_container(leaf) else leaf, result)


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
