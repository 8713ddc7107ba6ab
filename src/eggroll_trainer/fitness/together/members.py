"""Coalescing: a fitness function of one model, run for many members at the speed of batched inference.

Every member's call of the function runs in a greenlet of its own. Where it calls the model it waits; when all members
wait or have finished, one batched forward serves those that wait at the same place with inputs of the same shape, and
each goes on with its own result. What cannot be batched runs in the member's greenlet as the user wrote it, on a view
of the model that shows that member's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..forward import PLAIN_TYPES
from ..module_state import NotBatchable
from ..population import Population
from ..warned import Warned
from . import thread_modes, turns, workers
from .member_state import Differentiated, MemberState, Origin
from .randomness import RandomStates
from .view import Blueprint, natural_call, release, view_of
from .waiting import Group, Inputs

# Why a call runs in the member's own greenlet, on its own weights.
_READS = "the fitness function, or a method of the model, reads them"
_CHANGED = "the fitness function changes the model"
_FOREIGN = (
    "the fitness function calls the model inside a block that cannot be left and entered again (torch.device,"
    " torch.func, an asyncio loop, …)"
)
_THREAD = "the fitness function calls the model in another thread or after it has returned"
_HOOKS = "the model has forward hooks"
_DIFFERENTIATES = "the fitness function differentiates"


class _Member(MemberState):
    """One member's run of the fitness function."""

    # What the function returned or raised, if it has ended.
    value: Any = None
    failure: BaseException | None = None
    ended = False
    # How its last request was served: a result, an error to raise, or the reason why it was not.
    result: Any = None
    error: BaseException | None = None
    refusal: str | None = None
    # The modes under which it waits, and what is to be put in force when it goes on.
    waiting_modes: thread_modes.Modes | None = None
    suspended: thread_modes.Suspended | None = None
    # Where it runs, once it has begun.
    greenlet: greenlet.greenlet | None = None
    _why: str | None = _READS

    def __init__(self, scheduler: Coalescer, index: int) -> None:
        super().__init__(scheduler.origin, index)
        self.scheduler = scheduler
        self.random: dict[Any, Any] = {}

    def go_on(self) -> None:
        """Run the function until it waits or ends."""
        if self.greenlet is None:
            workers.start(self._run, self.scheduler.hub)
        else:
            self.greenlet.switch()

    def abandon(self) -> None:
        """End the function where it waits."""
        if self.greenlet is not None:
            self.greenlet.throw()

    def _run(self) -> None:
        self.greenlet = greenlet.getcurrent()
        try:
            # No variable refers to the view: whether the function keeps it shows by its being alive afterwards.
            self.value = self.scheduler.function(self.view(self.origin.population.model))
            self._why = "the fitness function keeps a reference to its model"
            release(self)
        except greenlet.GreenletExit:
            pass
        except BaseException as error:
            self.failure = error
        self.greenlet, self.ended = None, True

    def view(self, base: nn.Module) -> nn.Module:
        return view_of(self, base)

    def blueprint(self, base: nn.Module) -> Blueprint:
        return self.scheduler.blueprint(base)

    def report_dense(self) -> None:
        if self._why is not None:
            self.scheduler.report("dense", f"the weights of each member are formed in full, which is slow: {self._why}")

    def call(self, view: nn.Module, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the member's form of ``base``: together with the other members if that is possible."""
        why: str | None = _THREAD
        refusal = None
        if greenlet.getcurrent() is self.greenlet:
            if self.scheduler.aborted:
                raise greenlet.GreenletExit
            why, refusal = self._join(base, args, kwargs)
            if why is None and refusal is None:
                self.scheduler.hub.switch()
                result, self.result = self.result, None
                if self.error is None and self.refusal is None:
                    return result
                error, refusal = self.error, self.refusal
                self.error = self.refusal = None
                if error is not None:
                    raise error
        before, self._why = self._why, why
        try:
            result = natural_call(view, args, kwargs)
        finally:
            self._why = before
        if refusal is not None:
            self.scheduler.report_refusal(base, refusal)
        return result

    def _join(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, str | None]:
        """Wait with others of the same kind, or return why not: a reason of the function's, or of the model's."""
        scheduler = self.scheduler
        blueprint = scheduler.blueprint(base)
        if self._formed or self._watched:
            self.notice_changes()
        if self.touched and not self.touched.isdisjoint(blueprint.subtree):
            return _CHANGED, None
        if blueprint.has_hooks or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return _HOOKS, None
        if thread_modes.foreign_context() != scheduler.foreign:
            return _FOREIGN, None
        modes = thread_modes.current()
        leaves: Sequence[Any] = args
        spec: Any = len(args)
        if kwargs or not all(type(arg) is Tensor for arg in args):
            leaves, spec = tree_flatten((args, kwargs))
        key: list[Any] = [base, spec, modes[2:], scheduler.interned(self.modes) if self.modes else None]
        held: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.requires_grad and modes[1]:
                    return _DIFFERENTIATES, None
                if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout is not torch.strided:
                    return f"it is called with a {type(leaf).__name__} of layout {leaf.layout}", None
                held.append(scheduler.inputs.hold(leaf))
                key += (leaf.shape, leaf.dtype, leaf.device)
            elif isinstance(leaf, PLAIN_TYPES):
                held.append(leaf)
                key += (type(leaf), (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else leaf)
            else:
                return f"it is called with a {type(leaf).__name__}", None
        refusal = scheduler.join(self, tuple(key), held, modes)
        if refusal is None:
            self.waiting_modes = modes
            if modes[1]:
                self.outputs.differentiable = True
        return None, refusal


class Coalescer:
    """Runs a fitness function for all members of a population (or chunk) together.

    Args:
        population: The members.
        function: From a model to its fitness, in any form.
        warned: The warnings already given; each is given once.
        seeds: Whether the function may seed the generators of NumPy or Python.
    """

    def __init__(
        self, population: Population, function: Callable[[nn.Module], Any], warned: Warned, *, seeds: bool = False
    ) -> None:
        self.population, self.function, self.warned = population, function, warned
        self.origin = Origin(population)
        self.aborted = False
        self.hub = greenlet.getcurrent()
        self._random = RandomStates(seeds)
        # Calls that could not be batched, with the reason.
        self._refused = population.forwards.refused
        self._groups: dict[Any, Group] = {}
        self._blueprints: dict[nn.Module, Blueprint] = {}
        self._interned: dict[Any, Any] = {}
        self.inputs = Inputs()
        self._reports: list[tuple[str, str]] = []
        # Numbers in the largest tensor that a member was last given; None before the first.
        self._largest: int | None = None

    def scores(self, on_error: Callable[[BaseException, int], None]) -> list[Any]:
        """Return what the function returned for each member.

        Args:
            on_error: Called with an exception of the function and the member that it came from, before it is raised.

        Raises:
            Differentiated: The function wants gradients of what came from a batched forward.
        """
        with thread_modes.kept(), turns.young_garbage_only() as collect:
            # The members are gone when garbage is collected again, which would go through all that they hold.
            values = self._play(on_error, collect)
        for kind, message in self._reports:
            self.warned.once(message, kind)
        return values

    def _play(self, on_error: Callable[[BaseException, int], None], collect: Callable[[], None]) -> list[Any]:
        """Let the members take turns until all have ended, and return what the function returned for each."""
        members = [_Member(self, i) for i in range(len(self.population))]
        self.stage, self.foreign = thread_modes.Stage(), thread_modes.foreign_context()
        try:
            active = members
            while active:
                with turns.threads_for(self._largest):
                    waiting = [member for i, member in enumerate(active) if self._go_on(member, i == 0, on_error)]
                collect()
                self._serve()
                active = waiting
        except BaseException:
            self._abort(members)
            raise
        return [member.value for member in members]

    def blueprint(self, base: nn.Module) -> Blueprint:
        """Return the blueprint of the views of ``base``."""
        known = self._blueprints.get(base)
        if known is None:
            known = self._blueprints[base] = Blueprint(base)
        return known

    def report(self, kind: str, message: str) -> None:
        """Keep a warning until the members have finished, who may have filters of their own in force."""
        if kind not in self.warned and all(kind != other for other, _ in self._reports):
            self._reports.append((kind, message))

    def report_refusal(self, base: nn.Module, reason: str) -> None:
        """Warn of a module that the members had to run one by one."""
        name = next((name for name, module in self.population.model.named_modules() if module is base), "")
        together = ", its submodules together" if len(self.blueprint(base).subtree) > 1 else ""
        self.report(
            "refused",
            f"{name or 'the model'} ({type(base).__name__}) runs for each member on its own{together}: {reason}",
        )

    def interned(self, modes: dict[nn.Module, bool]) -> Any:
        """Return one and the same object for equal training modes."""
        key = frozenset(modes.items())
        return self._interned.setdefault(key, key)

    def join(self, member: _Member, key: Any, leaves: list[Any], modes: thread_modes.Modes) -> str | None:
        """Add a member to the group that waits for the same, or return why there can be none."""
        group = self._groups.get(key)
        if group is None:
            if key in self._refused:
                return self._refused[key]
            group = self._groups[key] = Group(key[0], key[1], modes, member.modes, len(leaves))
        group.members.append(member)
        for column, leaf in zip(group.columns, leaves, strict=True):
            column.append(leaf)
        return None

    def _go_on(self, member: _Member, first: bool, on_error: Callable[[BaseException, int], None]) -> bool:
        """Run a member until it waits or has finished, and return whether it waits."""
        if first or member.random or self._random.divided:
            self._random.enter(member.random, first)
        if member.suspended is not None:
            member.suspended.resume()
        try:
            member.go_on()
            if member.failure is not None:
                raise member.failure
        except Differentiated:
            raise
        except BaseException as error:
            if isinstance(error, RuntimeError) and member.outputs.differentiable and "grad" in str(error):
                # Such as "element 0 of tensors does not require grad".
                raise Differentiated from error
            on_error(error, member.index)
            raise
        finally:
            modes, member.waiting_modes = member.waiting_modes, None
            member.suspended = self.stage.clear(thread_modes.current() if modes is None else modes)
            self._random.leave(member.random)
        return not member.ended

    def _serve(self) -> None:
        groups, self._groups = self._groups, {}
        self.inputs.clear()
        self._largest = 0
        for key, group in groups.items():
            try:
                # Ordinary tensors, whatever the caller's modes are: they count their versions.
                with torch.inference_mode(False), torch.no_grad():
                    self._run(group)
            except NotBatchable as error:
                self._refused[key] = str(error)
                for member in group.members:
                    member.refusal = str(error)
            except ValueError as error:
                for member in group.members:
                    # Each raises its own: they collect tracebacks.
                    member.error = copy.copy(error)

    def _run(self, group: Group) -> None:
        leaves: list[Any] = []
        dims: list[int | None] = []
        for column in group.columns:
            shared = all(leaf is column[0] for leaf in column) or not isinstance(column[0], Tensor)
            leaf = column[0] if shared else torch.stack(column)
            leaves.append(leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf)
            dims.append(None if shared else 0)
        versions = [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
        args, kwargs = (leaves, {}) if isinstance(group.spec, int) else tree_unflatten(leaves, group.spec)
        state = self._random.state() if self._random.seeded else None
        with thread_modes.autocast(group.modes):
            members = [member.index for member in group.members]
            result = self.population.run(group.base, tuple(args), kwargs, dims, members, group.training)
        if versions != [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]:
            raise NotBatchable("the model's forward changes its input in place")
        if state is not None and state != self._random.state():
            raise NotBatchable("the model's forward draws random numbers from a generator that the function has seeded")
        results, spec = ([result], None) if isinstance(result, Tensor) else tree_flatten(result)
        sizes = [leaf.numel() // len(group.members) for leaf in results if isinstance(leaf, Tensor) and leaf.is_cpu]
        self._largest = max(self._largest or 0, *sizes, 0)
        # Like fresh outputs, slices taken by `data` don't share a version counter.
        columns = [
            [own.data for own in leaf.unbind(0)] if isinstance(leaf, Tensor) else [leaf] * len(group.members)
            for leaf in results
        ]
        if spec is None:
            for member, own in zip(group.members, columns[0], strict=True):
                member.result = own
        else:
            for i, member in enumerate(group.members):
                member.result = tree_unflatten([column[i] for column in columns], spec)

    def _abort(self, members: Sequence[_Member]) -> None:
        """End the functions that still wait, so that their ``with`` and ``finally`` blocks run."""
        self.aborted = True
        for member in members:
            if member.greenlet is not None:
                self._random.enter(member.random, False)
                if member.suspended is not None:
                    member.suspended.resume()
                try:
                    member.abandon()
                finally:
                    self.stage.clear(thread_modes.current())
                    self._random.leave(member.random)
                if member.failure is not None:
                    self.warned.once(f"a fitness function raised while it was abandoned: {member.failure!r}")
            member.end()
