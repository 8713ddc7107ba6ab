"""Coalescing: a fitness function of one model, run for many members at the speed of batched inference.

Every member's call of the function runs in a greenlet of its own. Where it calls the model it waits; when all members
wait or have finished, one batched forward serves those that wait at the same place with inputs of the same shape, and
each goes on with its own result. What cannot be batched runs in the member's greenlet as the user wrote it, on a view
of the model that shows that member's weights.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..module_state import NotBatchable
from ..population import PLAIN_TYPES, Population, warn_once
from . import thread_modes
from .view import Blueprint, natural_call, notice_changes, training_changes, view_of


class Interference(Exception):
    """The members' calls changed something that they share, so they cannot take turns."""


@dataclasses.dataclass(slots=True)
class _Request:
    """A call of the model that waits to be served."""

    member: _Member
    base: nn.Module
    spec: Any
    leaves: Sequence[Any]
    versions: Sequence[int | None]
    key: Any
    training: dict[nn.Module, bool]
    # Filled in when served.
    result: Any = None
    error: BaseException | None = None
    refused: bool = False


class _Member:
    """One member's run of the fitness function."""

    def __init__(self, scheduler: Coalescer, index: int, function: Callable[[nn.Module], Any]) -> None:
        self.scheduler, self.index = scheduler, index
        self.views: dict[nn.Module, nn.Module] = {}
        self.touched: set[nn.Module] = set()
        self.value: Any = None
        self._shared_parameters: dict[int, nn.Parameter] = {}
        self._why_dense = "the fitness function reads or changes the weights"
        self.greenlet = greenlet.greenlet(self._run)
        self.greenlet.gr_context = contextvars.copy_context()
        self._function = function

    def blueprint(self, base: nn.Module) -> Blueprint:
        """Return the blueprint of the views of ``base``."""
        return self.scheduler.blueprint(base)

    def _run(self) -> None:
        self.value = self._function(view_of(self, self.scheduler.population.model))

    def call(self, view: nn.Module, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the member's form of ``base``: together with the other members if that is possible."""
        request = self._request(base, args, kwargs)
        if request is not None:
            self._wait(request)
            if request.error is not None:
                raise request.error
            if not request.refused:
                return request.result
            self._why_dense = self.scheduler.refused[base]
        return natural_call(view, args, kwargs)

    def parameters_of(self, base: nn.Module) -> dict[str, nn.Parameter | None]:
        """Return the member's dense parameters of ``base`` itself; tied ones are the same object everywhere."""
        scheduler = self.scheduler
        warn_once(
            scheduler.warned,
            f"a fitness function is served from dense weights of each member, which is slow: {self._why_dense}",
        )
        dense: dict[str, nn.Parameter | None] = {}
        for key, parameter in base._parameters.items():
            if parameter is None:
                dense[key] = None
                continue
            own = self._shared_parameters.get(id(parameter))
            if own is None:
                name = scheduler.names.get(id(parameter))
                if name is None:
                    value = parameter.detach().clone()
                else:
                    value = scheduler.population.member_parameters(self.index, [name])[name]
                own = nn.Parameter(value, requires_grad=parameter.requires_grad)
                self._shared_parameters[id(parameter)] = own
                # Whoever else holds it no longer matches the batched forward either.
                self.touched.update(scheduler.owners[id(parameter)])
            dense[key] = own
        return dense

    def _request(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Request | None:
        """Return the request to batch this call, or None if it is to run on its own."""
        scheduler = self.scheduler
        if greenlet.getcurrent() is not self.greenlet or scheduler.aborted or base in scheduler.refused:
            if scheduler.aborted and greenlet.getcurrent() is self.greenlet:
                raise greenlet.GreenletExit
            return None
        if scheduler.watches:
            notice_changes(self)
        if self.touched and not self.touched.isdisjoint(scheduler.blueprint(base).subtree):
            return None
        if thread_modes.foreign_context() != scheduler.foreign:
            return None
        spec: Any
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):
            leaves, spec = tree_flatten((args, kwargs))
        else:
            leaves, spec = list(args), len(args)
        grad = torch.is_grad_enabled()
        keys: list[Any] = [base, spec, thread_modes.autocast_state()]
        versions: list[int | None] = []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if grad and leaf.requires_grad:
                    # The function wants to differentiate.
                    return None
                leaves[i], version = scheduler.hold(leaf)
                versions.append(version)
                keys += (leaf.shape, leaf.dtype, leaf.device)
            elif isinstance(leaf, PLAIN_TYPES):
                versions.append(None)
                keys += (type(leaf), leaf)
            else:
                return None
        training = training_changes(self)
        keys += training.items()
        return _Request(self, base, spec, leaves, versions, tuple(keys), training)

    def _wait(self, request: _Request) -> None:
        own = thread_modes.current()
        suspended = None
        if own != self.scheduler.modes:
            suspended = thread_modes.Suspended(own, self.scheduler.modes)
        try:
            self.scheduler.hub.switch(request)
        finally:
            if suspended is not None:
                suspended.resume()


class Coalescer:
    """Runs a fitness function for all members of a population (or chunk) together.

    Args:
        population: The members.
        function: From a model to its fitness, in any form.
        warned: The warnings already given; each is given once.
    """

    def __init__(self, population: Population, function: Callable[[nn.Module], Any], warned: set[str]) -> None:
        self.population, self.function, self.warned = population, function, warned
        # Modules that could not be batched, with the reason.
        self.refused: dict[nn.Module, str] = {}
        self.aborted = False
        self.hub = greenlet.getcurrent()
        model = population.model
        self.names = {id(model.get_parameter(name)): name for name in population.perturbations.draws}
        self.owners: dict[int, set[nn.Module]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                self.owners.setdefault(id(parameter), set()).add(module)
        self._blueprints: dict[nn.Module, Blueprint] = {}
        self.watches = any(self.blueprint(module).mutable for module in model.modules())
        self._held: dict[Any, tuple[Tensor, Tensor]] = {}

    def scores(self, on_error: Callable[[BaseException, int], None]) -> list[Any]:
        """Return what the function returned for each member.

        Args:
            on_error: Called with an exception of the function and the member that it came from, before it is raised.

        Raises:
            Interference: A member changed an input that another one was waiting with.
        """
        members = [_Member(self, i, self.function) for i in range(len(self.population))]
        with thread_modes.kept() as self.modes:
            self.foreign = thread_modes.foreign_context()
            try:
                waiting = [request for member in members if (request := self._go_on(member, on_error)) is not None]
                while waiting:
                    self._serve(waiting)
                    waiting = [
                        request for served in waiting if (request := self._go_on(served.member, on_error)) is not None
                    ]
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

    def hold(self, tensor: Tensor) -> tuple[Tensor, int | None]:
        """Return the tensor to serve an input from, one object for equal inputs, and its version.

        Memory that torch's version counter does not see all writes to (NumPy's, inference tensors) is copied at
        once, with the version None: another member may fill the same buffer before this one is served.
        """
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        known = self._held.get(key)
        if known is not None and known[0] is tensor is known[1]:
            return tensor, tensor._version
        if tensor.is_inference() or not tensor.untyped_storage().resizable():
            if known is None or known[1] is known[0] or not torch.equal(known[1], tensor):
                known = self._held[key] = (tensor, tensor.detach().clone())
            return known[1], None
        if known is not None and known[0] is known[1] and known[0]._version == tensor._version:
            return known[0], tensor._version
        # The first to come is kept alive until it is served, so that its memory means nothing else meanwhile.
        self._held[key] = (tensor, tensor)
        return tensor, tensor._version

    def _go_on(self, member: _Member, on_error: Callable[[BaseException, int], None]) -> _Request | None:
        try:
            request: _Request | None = member.greenlet.switch()
        except BaseException as error:
            on_error(error, member.index)
            raise
        if member.greenlet.dead:
            if thread_modes.current() != self.modes:
                thread_modes.apply(self.modes)
            return None
        return request

    def _serve(self, waiting: Sequence[_Request]) -> None:
        self._held.clear()
        groups: dict[Any, list[_Request]] = {}
        for request in waiting:
            groups.setdefault(request.key, []).append(request)
        for group in groups.values():
            try:
                self._run(group)
            except NotBatchable as error:
                base = group[0].base
                self.refused[base] = str(error)
                name = next((name for name, module in self.population.model.named_modules() if module is base), "")
                warn_once(
                    self.warned,
                    f"{name or 'the model'} ({type(base).__name__}) runs for each member on its own, its submodules"
                    f" together: {error}",
                )
                for request in group:
                    request.refused = True
            except ValueError as error:
                for request in group:
                    request.error = error

    def _run(self, group: Sequence[_Request]) -> None:
        first = group[0]
        leaves: list[Any] = []
        dims: list[int | None] = []
        for i, leaf in enumerate(first.leaves):
            column = [request.leaves[i] for request in group]
            if isinstance(leaf, Tensor) and not all(other is leaf for other in column):
                leaves.append(torch.stack(column))
                dims.append(0)
            else:
                leaves.append(leaf)
                dims.append(None)
            for request in group:
                version = request.versions[i]
                if version is not None and request.leaves[i]._version != version:
                    raise Interference("a member changes a tensor in place that another one has called the model with")
        args, kwargs = (leaves, {}) if isinstance(first.spec, int) else tree_unflatten(leaves, first.spec)
        with thread_modes.autocast(first.key[2]):
            result = self.population.run(
                first.base,
                tuple(args),
                kwargs,
                dims,
                [request.member.index for request in group],
                first.training,
            )
        if isinstance(result, Tensor):
            for request, own in zip(group, result.unbind(0), strict=True):
                # As fresh outputs would: slices don't share a version counter.
                request.result = own.data
            return
        results, spec = tree_flatten(result)
        columns = [
            [own.data for own in leaf.unbind(0)] if isinstance(leaf, Tensor) else [leaf] * len(group)
            for leaf in results
        ]
        for request, own_leaves in zip(group, zip(*columns, strict=True), strict=True):
            request.result = tree_unflatten(list(own_leaves), spec)

    def _abort(self, members: Sequence[_Member]) -> None:
        """End the functions that still wait, so that their ``with`` and ``finally`` blocks run."""
        self.aborted = True
        for member in members:
            if member.greenlet:
                try:
                    member.greenlet.throw()
                except Exception as error:
                    warn_once(self.warned, f"a fitness function raised while it was abandoned: {error!r}")
