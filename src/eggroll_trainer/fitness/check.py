"""The check of members that are evaluated together: a member is evaluated alone as well, and compared.

It is evaluated alone *on the recorded outputs* of its calls, so that rounding cannot drive two evaluations apart. Then
every input to the model, the order of calls and the score must be the same to the bit, and every output must be what
the model gives with that member's weights, to the tolerance of its dtype.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_leaves, tree_map
from ..noise.keys import kept_rng
from ..population import Population
from ..population.agreement import disagreement, precision
from ..population.containers import contents, copy_with, is_container
from ..population.forward import PLAIN_TYPES
from ..population.interception import Interception, plain_call
from ..population.object_calls import objects_in
from ..population.snapshot import same_bits
from . import alone, thread_modes
from .held import History
from .randomness import Source
from .record import Record, aligned_copy, copies, describe
from .scores import Score, described

Function = Callable[[nn.Module], Score]

SHARED = "the function seems to share something, such as a simulator or a random generator, between calls"


class DiffersFromItself(Exception):
    """The function, run alone twice, does not do the same: nothing can be said about it."""


def difference(
    population: Population, function: Function, index: int, record: Record, generators: Sequence[Source]
) -> str | None:
    """Return how a member's evaluation together with others differs from the one alone, or None.

    Args:
        population: The members.
        function: From a model to its fitness.
        index: Of the member in the population.
        record: What it did together with the others.
        generators: The global generators.

    Raises:
        DiffersFromItself: Run alone twice, the function does not do the same.
        Exception: The function raised, run alone.
    """
    try:
        found = _Replay(population, record).run(function, index, generators)
    except Exception as error:
        # Alone, the model's outputs may want gradients.
        found = f"it raised {type(error).__name__} when evaluated by itself: {error}"
    if found is None:
        return None
    own = _Recording(population)
    own.run(function, index, generators)
    try:
        if _Replay(population, own.record).run(function, index, generators) is not None:
            raise DiffersFromItself
    except Exception as error:
        raise DiffersFromItself from error
    return found.replace("{member}", str(population.first + index))


class _Alone(ABC):
    """One evaluation of a member alone, in which each call of the model is led to :meth:`call`."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self._thread = threading.get_ident()
        self._interception = Interception(population.model, self._on_call)

    def score(self, function: Function, index: int, generators: Sequence[Source]) -> tuple[Score, list[str]]:
        return alone.score(self.population, function, index, generators, self._interception)

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread or thread_modes.in_transform():
            # In another thread, or of tensors that have no values yet.
            return plain_call(module, args, kwargs)
        return self.call(module, args, kwargs)

    @abstractmethod
    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a call of the model returns."""

    def plain(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, and those inside it, as if nothing were intercepted."""
        self._interception.stop()
        try:
            return module(*args, **kwargs)
        finally:
            self._interception.start()


def evaluate_noting(
    population: Population,
    function: Function,
    index: int,
    generators: Sequence[Source],
    note: Callable[[tuple[Any, ...], dict[str, Any]], None],
) -> tuple[Score, list[str]]:
    """Evaluate a member alone as :func:`.alone.score` does, and note the arguments of calls of the model."""
    return _Noting(population, note).score(function, index, generators)


class _Recording(_Alone):
    """Records an evaluation alone."""

    def __init__(self, population: Population) -> None:
        super().__init__(population)
        self.record = Record()

    def run(self, function: Function, index: int, generators: Sequence[Source]) -> None:
        """Evaluate the member."""
        self.record.score, _ = self.score(function, index, generators)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call, and note it."""
        leaves, spec = describe(args, kwargs)
        recorded = self.record.begin(module, copies(leaves), spec)
        result = self.plain(module, args, kwargs)
        self.record.end(recorded, result)
        return result


class _Noting(_Alone):
    """Evaluates a member alone and notes the arguments of calls of the model."""

    def __init__(self, population: Population, note: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__(population)
        self._note = note

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call, and note its arguments if it is one of the whole model."""
        if module is self.population.model:
            self._note(args, kwargs)
        return self.plain(module, args, kwargs)


class _Found(BaseException):
    """Ends an evaluation that has turned out to differ; the message says how."""


class _Replay(_Alone):
    """Evaluates a member alone on recorded outputs."""

    def __init__(self, population: Population, record: Record) -> None:
        super().__init__(population)
        self._record, self._at = record, 0
        self._held = History()

    def run(self, function: Function, index: int, generators: Sequence[Source]) -> str | None:
        """Return how the evaluation differs from the recorded one, or None."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self._record.threads)
        try:
            score, _ = self.score(function, index, generators)
        except _Found as found:
            return str(found)
        finally:
            torch.set_num_threads(threads)
        if self._at < len(self._record.calls):
            return f"member {{member}} called the model more often than when it is evaluated by itself: {SHARED}"
        earned = _earned(self._record.score, score)
        if earned is not None:
            outputs = "from the same outputs of the model"
            return f"member {{member}} {earned} when it is evaluated by itself, {outputs}: {SHARED}"
        return None

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compare a call with the recorded one, and return the recorded output."""
        number, self._at = self._at, self._at + 1
        where = f"in its {_ordinal(number + 1)} call member {{member}}"
        if number == len(self._record.calls):
            raise _Found(f"member {{member}} called the model less often than when it is evaluated by itself: {SHARED}")
        recorded = self._record.calls[number]
        if recorded.module is not module:
            raise _Found(f"{where} called another module than when it is evaluated by itself: {SHARED}")
        leaves, spec = describe(args, kwargs)
        objects = objects_in(leaves)
        given, held = self._held.follow(recorded.given), contents(objects).tensors()
        same = spec == recorded.spec and all(map(_same, leaves, recorded.leaves)) and len(given) == len(held)
        if not same or not all(map(same_bits, given, held)):
            raise _Found(f"{where} was given another input than when it is evaluated by itself: {SHARED}")
        if not recorded.batched:
            return plain_call(module, args, kwargs)

        outputs: list[Any] = []
        # A call changes the objects that it is given, such as caches: further ones are made with copies.
        spare = copy_with(objects, Tensor.clone)
        left = self._held.follow(recorded.left)

        def call() -> Any:
            given = objects if not outputs else copy_with(spare, Tensor.clone)
            own = dict(zip(map(id, objects), given, strict=True))
            own_args, own_kwargs = tree_map(lambda leaf: own.get(id(leaf), leaf), (args, kwargs))
            outputs.append(self.plain(module, own_args, own_kwargs))
            return _compared(outputs[-1]), contents(objects_in([*given, *tree_leaves(outputs[-1])])).tensors()

        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
        with kept_rng(devices):
            eps = precision(self.population.model, leaves)
            off = disagreement(self.population.model, call, (_compared(recorded.result), left), eps)
        if off is not None:
            raise _Found(
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
    """A recorded output that asks for gradients as the true one does, and would get none."""

    @staticmethod
    def of(recorded: Any, output: Any) -> Any:
        """Return the recorded leaf, which asks for gradients if the output does."""
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
    """Return what a member earned together with others, and alone, if these differ."""
    scores, own = (value if isinstance(value, tuple) else (value,) for value in (score, alone))
    if isinstance(score, tuple) != isinstance(alone, tuple) or len(scores) != len(own):
        counts = [[len(value)] if isinstance(value, tuple) else [] for value in (score, alone)]
        return f"earned {described(counts[0])}, and {described(counts[1])}"
    for task, (one, other) in enumerate(zip(scores, own, strict=True)):
        # NaN is the same as NaN.
        if one != other and not (one != one and other != other):
            where = f" in task {task}" if len(own) > 1 else ""
            return f"earned {one!r}{where}, and {other!r}"
    return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and same_bits(one.detach(), other.detach())
    if isinstance(one, PLAIN_TYPES):
        return type(one) is type(other) and (one == other or one != one)
    # Objects of the user's own may be other ones each time.
    return True


def _compared(result: Any) -> Any:
    """Return a result without its objects, of which the tensors are compared."""
    return tree_map(lambda leaf: None if is_container(leaf) else leaf, result)


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
