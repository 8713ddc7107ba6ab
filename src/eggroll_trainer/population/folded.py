"""Folded evaluation: the user's own module, run on one batch with the rows of all members.

It serves code that loops over forwards and keeps state, such as ``generate()`` of a language model. Such code keeps a
batch of rows ``[N·Q, …]``, member after member. When it calls the module, the rows are unfolded to ``[N, Q, …]``, the
call is made for all members at once, and its results are folded again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..noise.keys import kept_rng
from .agreement import disagreement, precision
from .drawing import MemberDraws
from .interception import Interception
from .members import Members
from .module_state import ModuleState, NotBatchable, training_modes
from .object_calls import ObjectCallResult
from .rows import MemberCall, RowCall, Vectors
from .watched import unwatch, watch

# Caches of at least this many bytes are not kept in memory twice; then a failed call cannot be repeated.
_LARGE = 2**28


class Folded:
    """Runs a population's model on batches with rows of all members.

    Args:
        population: The ``N`` members.
        rows: ``Q``; the tensors of a call have ``N·Q·k`` rows for some ``k``.
        key: See :meth:`~eggroll_trainer.Population.folded`.
    """

    def __init__(self, population: Members, rows: int, key: Sequence[int | str] | None = None) -> None:
        self.population, self.model, self.rows = population, population.model, rows
        self._thread = threading.get_ident()
        self._interception = Interception(self.model, self._on_call)
        self._draws = MemberDraws(population, rows, key)
        named = dict(self.model.named_parameters(remove_duplicate=False))
        self._watched = {p: name for name in population.perturbations.draws if type(p := named[name]) is nn.Parameter}
        self._vectors = Vectors()
        # Modules that have been called for all members at once.
        self._called: set[nn.Module] = set()

    @contextlib.contextmanager
    def entered(self) -> Iterator[nn.Module]:
        """Yield the model. Inside the block, its calls are made for all members.

        Raises:
            ValueError: A call has changed a buffer of the model.
        """
        before = ModuleState(self.model)
        try:
            with training_modes(self.model, self.population.training), self._intercepted(), self._draws:
                yield self.model
        finally:
            changed = [text for text in before.restore() if text.startswith("buffer")]
        if changed:
            raise ValueError(
                f"the model's forward changes {' and '.join(changed)}, and the change would be lost after the block:"
                " pass it in and return it, or write the fitness function for one model"
            )

    @contextlib.contextmanager
    def _intercepted(self) -> Iterator[None]:
        self._interception.start()
        watch(self._watched, self)
        try:
            yield
        finally:
            unwatch(self._watched)
            self._interception.stop()

    @contextlib.contextmanager
    def _released(self) -> Iterator[None]:
        """Inside the block, the model is an ordinary module again."""
        unwatch(self._watched)
        self._interception.stop()
        try:
            with self._draws.suspended():
                yield
        finally:
            self._interception.start()
            watch(self._watched, self)

    def materialize(self, parameter: nn.Parameter) -> None:
        """Refuse the use of a parameter outside of a call, as it has another value for each member.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            f"the parameter {self._watched[parameter]!r} is used outside of a module's forward in population.folded(),"
            " where it has another value for each member: call the module that holds it instead"
        )

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "the model is called in another thread than the one that entered population.folded(): call it in that"
                " thread"
            )
        call = RowCall(module, args, kwargs, len(self.population), self.rows, self._vectors)
        # Before the call, as it changes the contents of objects.
        before = {i: call.of(i) for i in self._audited_members()}
        refused = self.population.forwards.refused
        key = "folded", module, str(call.spec)
        if key in refused:
            return self._one_by_one(module, call)
        try:
            result = call.folded(self._batched(module, call))
        except NotBatchable as error:
            if error.stateful:
                raise
            refused[key] = str(error)
            self.population.warn(f"in population.folded() the model runs for one member after the other: {error}")
            return self._one_by_one(module, call)
        for i, member_call in before.items():
            self._audit(module, call, result, i, member_call)
        return result

    def _batched(self, module: nn.Module, call: RowCall) -> ObjectCallResult:
        count = len(call.leaves)
        leaves, held = call.unfolded_leaves(), call.unfolded_held()
        batched = self.population.call_of(module, leaves, call.spec, call.dims[:count])
        spend = module in self._called and sum(tensor.nbytes for tensor in held) > _LARGE
        if spend:
            call.held.clear()
        with self._released():
            result = self.population.run_with_objects(batched, call.objects, held, call.dims[count:], spend=spend)
        self._called.add(module)
        return result

    def _one_by_one(self, module: nn.Module, call: RowCall) -> Any:
        """Make a call for one member after the other."""
        calls = [call.of(i) for i in range(len(self.population))]
        results = []
        for i, member in enumerate(calls):
            with self._released(), torch.no_grad(), self.population.holding(i):
                results.append(module(*member.args, **member.kwargs))
        return call.joined(calls, results)

    def _audited_members(self) -> list[int]:
        audit = self.population.audit
        return (
            [] if audit is None or audit.found is not None else [i for i in audit.members if i < len(self.population)]
        )

    def _audit(self, module: nn.Module, call: RowCall, result: Any, index: int, member_call: MemberCall) -> None:
        """Compare the rows of a member with a call of the module for this member alone."""
        audit = self.population.audit
        if audit is None or audit.found is not None:
            return
        audit.calls += 1

        def alone() -> list[Tensor]:
            args, kwargs = member_call.copied()
            with torch.no_grad():
                return call.row_tensors(module(*args, **kwargs))

        devices = {leaf.device for leaf in call.leaves if isinstance(leaf, Tensor)}
        with self._released(), kept_rng(devices), self.population.holding(index):
            off = disagreement(self.model, alone, call.row_tensors(result, index), precision(self.model, call.leaves))
        if off is not None:
            audit.found = (
                f"in call {audit.calls} of population.folded() in generation {self.population.generation + 1} the"
                f" output for member {self.population.first + index}, computed for all members at once, is not what the"
                f" model gives with that member's weights: {off}"
            )
