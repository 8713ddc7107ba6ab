"""Members take turns: a fitness function of one model runs for many members at the speed of batched inference.

Each member's call of the function runs in its own greenlet. When it calls the model, it waits. Once all members wait or
have finished, one batched forward serves those that wait for the same module with inputs of the same shape. Then each
member continues with its own result. A call that cannot be batched runs in the member's greenlet, as the user wrote it,
with the member's weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from ..._torch import global_forward_hooks, global_forward_pre_hooks, tree_leaves
from ..._utils.interrupts import delayed_interrupt
from ..._utils.warned import Warned
from ...population import Population
from ...population.containers import contents, is_container
from ...population.forward import PLAIN_TYPES
from ...population.interception import plain_call
from ...population.module_state import NotBatchable, ReturnsObject
from .. import thread_modes, turns
from ..compiled import eagerly
from ..findings import Findings
from ..randomness import Source, TorchSource, keyed, seed_all
from ..record import Record, copies, describe
from ..scores import Score
from . import workers
from .deadlock import Deadlock, DeadlockWatch
from .model import MemberState, SharedModel
from .serving import results_of
from .waiting import Group, Inputs

# Reasons why a call runs in the member's own greenlet, with its own weights.
_READS = "the fitness function, or a method of the model, reads them"
_CHANGED = "the fitness function changes the model"
_FOREIGN = (
    "the fitness function calls the model inside a block that cannot be left and entered again (torch.device,"
    " torch.func, an asyncio loop, …)"
)
_HOOKS = "the model has forward hooks"
_DIFFERENTIATES = "the fitness function differentiates"

# Reasons why members cannot take turns at all.
_THREAD = "it uses the model in another thread or greenlet"
DEADLOCK = "a member waits for something, such as a lock, that another one holds"
_WRITES = "it changes buffers or parameters of the model in place"
_NESTED = "it evaluates a population of its own"


class NotTogether(RuntimeError):
    """Members cannot take turns in the fitness function; the message says why."""


class MemberFailed(Exception):
    """The function raised for a member.

    Attributes:
        index: Index of the member in the population.
        error: The exception.
    """

    def __init__(self, index: int, error: BaseException) -> None:
        super().__init__(index, error)
        self.index, self.error = index, error


class _Blocked(Exception):
    """A member waits for something that another member holds."""


class _Restart(Exception):
    """The evaluation must be restarted, as new findings about the function change how it is run."""


def scores(
    population: Population,
    function: Callable[[nn.Module], Score],
    *,
    findings: Findings,
    warned: Warned,
    generators: Sequence[Source],
    records: Mapping[int, Record],
) -> list[Score]:
    """Return the fitness of every member, evaluated together.

    Args:
        population: The members.
        function: Takes a model and returns its fitness.
        findings: What is known about the function; updated in place.
        warned: The warnings that have been issued; each is issued once.
        generators: The global random generators.
        records: For some members, by their index, the records to fill with their calls.

    Raises:
        NotTogether: Members cannot take turns.
        MemberFailed: The function raised for one of them.
    """
    while True:
        for record in records.values():
            record.clear()
        evaluation = _Evaluation(population, function, findings, generators, records)
        try:
            with thread_modes.kept(), turns.young_garbage_only() as collect:
                # Members are freed in here, before garbage collection is on again and would traverse their objects.
                values = evaluation.run(collect)
        except _Restart:
            continue
        for kind, message in evaluation.reports:
            warned.once(message, kind)
        return values


def refuse_nested() -> None:
    """End a member's turn if there is one in this thread: evaluations cannot be nested while members take turns."""
    for evaluation in _running:
        if evaluation.thread == threading.get_ident():
            evaluation.refused = _NESTED
            raise greenlet.GreenletExit


_running: list[_Evaluation] = []


class _Member:
    """One member's run of the fitness function."""

    # The function's result or exception, once it has ended.
    value: Any = None
    failure: BaseException | None = None
    ended = False
    # The result of its last call, or the reason why the call was not batched.
    result: Any = None
    refusal: str | None = None
    # The modes in which it waits, and those to restore when it continues.
    waiting_modes: thread_modes.Modes | None = None
    suspended: thread_modes.Suspended | None = None
    # Its greenlet, from its start to its end.
    greenlet: greenlet.greenlet | None = None
    # Its own states of generators that differ between members.
    random: dict[int, Any] | None = None
    # The reason to report if its weights are materialized; None to report nothing.
    why: str | None = _READS

    def __init__(self, index: int, record: Record | None) -> None:
        self.index, self.record = index, record
        self.state = MemberState()


class _Evaluation:
    """One evaluation of all members of a population (or chunk)."""

    def __init__(
        self,
        population: Population,
        function: Callable[[nn.Module], Score],
        findings: Findings,
        generators: Sequence[Source],
        records: Mapping[int, Record],
    ) -> None:
        self.population, self.function, self.findings = population, function, findings
        self.hub, self.thread = greenlet.getcurrent(), threading.get_ident()
        self.refused: str | None = None
        self.reports: list[tuple[str, str]] = []
        self._generators = generators
        self._shared = [i for i in range(len(generators)) if i not in findings.divided]
        self._records = bool(records)
        self._members = [_Member(i, records.get(i)) for i in range(len(population))]
        self._current: _Member | None = None
        self._aborted = self._finishing = False
        # Kinds of calls that cannot be batched, with the reason.
        self._refusals = population.forwards.refused
        self._groups: dict[Any, Group] = {}
        self._inputs = Inputs()
        # Size of the largest tensor in the last results; None before the first.
        self._largest: int | None = None

    def run(self, collect: Callable[[], None]) -> list[Score]:
        """Let the members take turns until all have ended, and return their scores."""
        population = self.population
        with keyed(self._generators, population.seed, population.generation, "evaluation", population.first):
            self._hub_context, self._foreign = thread_modes.HubContext(), thread_modes.foreign_context()
            self._model = SharedModel(population, self._call, isolate=self.findings.isolate)
            self._model.on_materialized, self._model.on_foreign_use = (
                self._report_materialized,
                self._refuse_foreign_use,
            )
            _running.append(self)
            try:
                with DeadlockWatch() as self._watch:
                    try:
                        self._take_turns(collect)
                    except _Blocked:
                        self._finish()
                        raise NotTogether(DEADLOCK) from None
            except BaseException:
                with delayed_interrupt():
                    self._abort()
                raise
            finally:
                _running.remove(self)
                with delayed_interrupt():
                    self._model.restore()
        return [member.value for member in self._members]

    def _take_turns(self, collect: Callable[[], None]) -> None:
        self._note_generators()
        active = self._members
        while active:
            with turns.threads_for(self._largest), eagerly():
                for member in active:
                    self._take_turn(member)
                active = [member for member in active if not member.ended]
            collect()
            self._check_shared_state()
            if active:
                began = time.perf_counter()
                self._serve()
                self.findings.model_seconds += time.perf_counter() - began
                self._note_generators()

    def _take_turn(self, member: _Member) -> None:
        """Run a member until it waits or ends."""
        self._watch.turns += 1
        self._current = member
        self._model.enter(member.index, member.state)
        if self.findings.divided:
            self._enter_generators(member)
        if member.suspended is not None:
            member.suspended.resume()
        try:
            if member.greenlet is None:
                workers.start(lambda: self._evaluate(member), self.hub)
            else:
                member.greenlet.switch()
        finally:
            modes, member.waiting_modes = member.waiting_modes, None
            member.suspended = self._hub_context.restore(thread_modes.current() if modes is None else modes)
            if self.findings.divided:
                self._leave_generators(member)
            self._model.leave(member.state)
            self._current = None
        if self._finishing:
            return
        if isinstance(member.failure, Deadlock):
            raise _Blocked
        if self.refused is not None:
            raise NotTogether(self.refused)
        if member.failure is not None:
            raise MemberFailed(member.index, member.failure)

    def _evaluate(self, member: _Member) -> None:
        member.greenlet = greenlet.getcurrent()
        if member.record is not None:
            member.record.threads = torch.get_num_threads()
        try:
            member.value = self.function(self.population.model)
        except greenlet.GreenletExit:
            pass
        except BaseException as error:
            member.failure = error
        member.greenlet, member.ended = None, True
        if member.record is not None:
            member.record.score = member.value

    # Calls of the model.

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module of the model, together with other members if possible."""
        member = self._current
        if member is None or greenlet.getcurrent() is not member.greenlet:
            self.refused = _THREAD
            raise NotTogether(_THREAD)
        if self._aborted:
            raise greenlet.GreenletExit
        leaves, spec = describe(args, kwargs)
        if self._finishing:
            return plain_call(module, args, kwargs)
        why, refusal = self._enqueue(member, module, leaves, spec)
        recorded = None
        if member.record is not None and not thread_modes.in_transform():
            recorded = member.record.begin(module, copies(leaves), spec)
        if why is None and refusal is None:
            self.hub.switch()
            result, member.result = member.result, None
            refusal, member.refusal = member.refusal, None
            if refusal is None:
                if member.record is not None and recorded is not None:
                    member.record.end(recorded, result)
                return result
        before, member.why = member.why, why
        try:
            result = plain_call(module, args, kwargs)
        finally:
            member.why = before
        if refusal is not None:
            self._report_refusal(module, refusal)
        return result

    def _enqueue(
        self, member: _Member, module: nn.Module, leaves: list[Any], spec: Any
    ) -> tuple[str | None, str | None]:
        """Add a member's call to its group. If that is impossible, return why: due to the function, or to the model."""
        model = self._model
        if member.state.weights and model.wrote_weights(member.state):
            self.refused = _WRITES
            raise greenlet.GreenletExit
        changed = model.changed_modules()
        if changed and not changed.isdisjoint(model.subtree(module)):
            return _CHANGED, None
        if model.has_hooks(module) or global_forward_hooks or global_forward_pre_hooks:
            return _HOOKS, None
        if thread_modes.foreign_context() != self._foreign:
            return _FOREIGN, None
        modes, training = thread_modes.current(), model.training_now()
        # As text, because older releases of torch cannot hash a TreeSpec.
        key: list[Any] = [module, spec if isinstance(spec, int) else str(spec), modes[2:], training]
        held: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.requires_grad and modes[1]:
                    return _DIFFERENTIATES, None
                if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout is not torch.strided:
                    return None, f"it is called with a {type(leaf).__name__} of layout {leaf.layout}"
                held.append(self._inputs.copy_of(leaf))
                key += (leaf.shape, leaf.dtype, leaf.device)
            elif isinstance(leaf, PLAIN_TYPES):
                held.append(leaf)
                key += (type(leaf), (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else leaf)
            elif is_container(leaf):
                try:
                    key += (type(leaf), contents([leaf]).signature())
                except TypeError as error:
                    return None, f"it is called with a {type(leaf).__name__} that {error}"
                held.append(leaf)
            else:
                return None, f"it is called with a {type(leaf).__name__}"
        kind = tuple(key)
        group = self._groups.get(kind)
        if group is None:
            if kind in self._refusals:
                return None, self._refusals[kind]
            group = self._groups[kind] = Group(module, spec, modes, model.training_modes(training), len(held))
            group.has_objects = module in self.population.forwards.returning_objects or any(map(is_container, held))
        if not group.take_objects(held):
            return None, "members call it with one and the same object, which it changes"
        group.members.append(member)
        for column, leaf in zip(group.columns, held, strict=True):
            column.append(leaf)
        member.waiting_modes = modes
        return None, None

    def _serve(self) -> None:
        """Make the calls that members wait for."""
        groups, self._groups = self._groups, {}
        self._inputs.clear()
        self._largest = 0
        with self._model.released():
            for kind, group in groups.items():
                try:
                    # Outside of inference mode, as inference tensors have no version counter.
                    with torch.inference_mode(False), torch.no_grad():
                        self._run(group)
                except (NotBatchable, ValueError) as error:
                    self._refusals[kind] = str(error)
                    for member in group.members:
                        member.refusal = str(error)

    def _run(self, group: Group) -> None:
        states = [source.get() for source in self._generators]
        try:
            results = results_of(self.population, group)
        except NotBatchable as error:
            # Calls with objects may also write values of members into tensors that the module has made.
            if group.has_objects or not (isinstance(error, ReturnsObject) or "vmap: inplace" in str(error)):
                raise
            self.population.forwards.returning_objects.add(group.module)
            group.has_objects = True
            results = results_of(self.population, group)
        self._check_drawing(states)
        sizes = [leaf.numel() for leaf in tree_leaves(results[0]) if isinstance(leaf, Tensor) and leaf.is_cpu]
        self._largest = max(self._largest or 0, *sizes, 0)
        for member, result in zip(group.members, results, strict=True):
            member.result = result

    # State that members share.

    def _check_shared_state(self) -> None:
        """Check whether the members of this round have changed shared state."""
        if self.refused is not None:
            raise NotTogether(self.refused)
        if self._model.changed_in_place():
            raise NotTogether(_WRITES)
        if not self._model.isolate and self._model.changed():
            self.findings.isolate = True
            raise _Restart
        moved = {
            i
            for i, before in zip(self._shared, self._noted, strict=True)
            if not self._generators[i].same(self._generators[i].get(), before)
        }
        if moved:
            self.findings.divided |= moved
            raise _Restart

    def _note_generators(self) -> None:
        self._noted = [self._generators[i].get() for i in self._shared]

    def _enter_generators(self, member: _Member) -> None:
        for i in self.findings.divided:
            if member.random is None:
                seed_all([self._generators[i]], *self.population.member_key(member.index))
            else:
                self._generators[i].set(member.random[i])

    def _leave_generators(self, member: _Member) -> None:
        member.random = {i: self._generators[i].get() for i in self.findings.divided}

    def _check_drawing(self, states: Sequence[Any]) -> None:
        """Raise if a batched forward has used a generator of which each member has its own state."""
        for i, (source, state) in enumerate(zip(self._generators, states, strict=True)):
            # torch.vmap draws separate numbers for each member.
            allowed = isinstance(source, TorchSource) and i not in self.findings.divided
            if allowed and (self.findings.draws or not self._records):
                continue
            if source.same(source.get(), state):
                continue
            self.findings.draws = True
            if not allowed:
                source.set(state)
                raise NotBatchable("the model's forward draws from a generator of which each member has its own state")

    # Reports and the end.

    def _refuse_foreign_use(self) -> None:
        self.refused = _THREAD

    def _report(self, kind: str, message: str) -> None:
        """Keep a warning until the members have ended, as they may have set their own warning filters."""
        if all(kind != other for other, _ in self.reports):
            self.reports.append((kind, message))

    def _report_materialized(self) -> None:
        why = None if self._current is None else self._current.why
        if why is not None:
            self._report("dense", f"the weights of each member are formed in full, which is slow: {why}")

    def _report_refusal(self, module: nn.Module, reason: str) -> None:
        """Report a module that had to run for one member after the other."""
        name = next((name for name, other in self.population.model.named_modules() if other is module), "")
        together = ", its submodules together" if len(self._model.subtree(module)) > 1 else ""
        self._report(
            "refused",
            f"{name or 'the model'} ({type(module).__name__}) runs for each member on its own{together}: {reason}",
        )

    def _finish(self) -> None:
        """Run the functions that have begun to their end, one after the other, so that they release their locks."""
        self._finishing = True
        self._watch.shorten_patience()
        for member in self._members:
            if member.greenlet is not None:
                member.refusal = DEADLOCK
                self._take_turn(member)

    def _abort(self) -> None:
        """End the functions that still wait, and run their ``with`` and ``finally`` blocks."""
        self._aborted = True
        for member in self._members:
            if member.greenlet is None:
                continue
            self._current = member
            self._model.enter(member.index, member.state)
            if self.findings.divided and member.random is not None and member.random.keys() == self.findings.divided:
                self._enter_generators(member)
            if member.suspended is not None:
                member.suspended.resume()
            try:
                member.greenlet.throw()
            finally:
                self._hub_context.restore(thread_modes.current())
                self._model.leave(member.state)
                self._current = None
