"""What one member has of its own: weights, buffers and attributes, made when its fitness function first uses them."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..module_state import parameter_lists
from ..population import Population
from ..snapshot import Snapshot, is_immutable
from . import thread_modes

_LOCK = type(threading.Lock())


class Differentiated(BaseException):
    """A fitness function wants gradients of outputs that come from a batched forward."""


class Origin:
    """The model that the members' views are made of, and where it keeps its parameters."""

    def __init__(self, population: Population) -> None:
        self.population = population
        model = population.model
        self.modules = {id(module): module for module in model.modules()}
        self.parameters = {id(parameter): parameter for parameter in model.parameters()}
        named = dict(model.named_parameters(remove_duplicate=False))
        self.names = {id(named[name]): name for name in population.perturbations.draws}
        # For each parameter the modules of which the result may depend on it, besides those above them.
        self.owners: dict[int, set[nn.Module]] = {key: set() for key in self.parameters}
        for module in self.modules.values():
            for container in (module._parameters, module.__dict__, *parameter_lists(module)):
                for value in container.values() if isinstance(container, dict) else container:
                    if id(value) in self.owners:
                        self.owners[id(value)].add(module)
        # A function may use its model in several threads.
        self.lock = threading.RLock()


class MemberParameter(nn.Parameter):
    """A member's own parameter, which tells when its data can be changed without leaving a trace."""

    _exposed: Callable[[], None]

    @property
    def data(self) -> Tensor:
        """The data, as of any tensor."""
        self._exposed()
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        self._exposed()
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def release(self) -> None:
        """Become an ordinary parameter."""
        del self._exposed
        self._backward_hooks = None
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def plain(self) -> nn.Parameter:
        """Return an ordinary parameter with the same data."""
        return nn.Parameter(self.detach(), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        memo[id(self)] = clone = nn.Parameter(self.detach().clone(), self.requires_grad)
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.plain())


class MemberState:
    """A member's own parameters, tensors and attributes, and what has become of them.

    Attributes:
        views: Its views by the modules that they are views of.
        modes: The modules of which the function has changed the training mode, with the mode.
        touched: The modules that may no longer do what the batched forward does.
    """

    def __init__(self, origin: Origin, index: int) -> None:
        self.origin, self.index = origin, index
        self.views: dict[nn.Module, nn.Module] = {}
        self.modes: dict[nn.Module, bool] = {}
        self.touched: set[nn.Module] = set()
        self.outputs = Outputs()
        self._parameters: dict[int, MemberParameter] = {}
        self._formed: list[tuple[MemberParameter, Any]] = []
        self._watched: list[tuple[nn.Module, Snapshot]] = []
        self._own_memo: _Memo | None = None

    @property
    def _memo(self) -> _Memo:
        if self._own_memo is None:
            self._own_memo = _Memo(self)
        return self._own_memo

    def view(self, base: nn.Module) -> nn.Module:
        """Return the view of one of the model's modules."""
        raise NotImplementedError

    def blueprint(self, base: nn.Module) -> Any:
        """Return the blueprint of the views of ``base``."""
        raise NotImplementedError

    def report_dense(self) -> None:
        """Be told that a parameter is formed in full."""
        raise NotImplementedError

    def call(self, view: nn.Module, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the member's form of ``base``."""
        raise NotImplementedError

    def parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the member's own of one of the model's parameters, in full; tied ones are the same everywhere."""
        key, origin = id(parameter), self.origin
        with origin.lock:
            own = self._parameters.get(key)
            if own is None:
                self.report_dense()
                name = origin.names.get(key)
                with thread_modes.neutral():
                    if name is None:
                        value = parameter.detach().clone()
                    else:
                        value = origin.population.member_parameters(self.index, [name])[name]
                    own = MemberParameter(value, parameter.requires_grad)
                # Whoever holds it depends on it. Only the sets are referred to: a parameter may outlive its member.
                own._exposed = functools.partial(self.touched.update, origin.owners[key])
                if own.requires_grad:
                    own.register_hook(self.outputs.refuse_gradients)
                self._parameters[key] = own
                self._formed.append((own, _fingerprint(own)))
        return own

    def tensor(self, tensor: Tensor) -> Tensor:
        """Return the member's own copy of a buffer or another tensor that a module holds."""
        own: Tensor | None = self._memo.get(id(tensor))
        if own is None:
            with thread_modes.neutral():
                own = tensor.detach().clone()
                if tensor.requires_grad:
                    own.requires_grad_()
            self._memo[id(tensor)] = own
        return own

    def copy(self, value: Any) -> Any:
        """Return the member's own copy of a module's attribute, referring to the member's own views and parameters."""
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return self.tensor(value)
        if isinstance(value, _LOCK):
            # One for all would never be free for a second member.
            return threading.Lock()
        try:
            with thread_modes.neutral():
                return copy.deepcopy(value, self._memo)
        except Exception:
            # Such as an open file: there is but one.
            return value

    def watch(self, base: nn.Module, value: Any) -> None:
        """Notice from now on if something that belongs to the view of ``base`` changes."""
        if not is_immutable(value):
            with thread_modes.neutral():
                snapshot = Snapshot(value, restorable=False)
            if snapshot.opaque:
                self.touched.add(base)
            self._watched.append((base, snapshot))

    def notice_changes(self) -> None:
        """Note the modules of which the member's own state has changed since it was made."""
        for own, state in self._formed:
            if _fingerprint(own) != state:
                own._exposed()
        for base, snapshot in self._watched:
            if base not in self.touched and snapshot.changed():
                self.touched.add(base)

    def set_mode(self, base: nn.Module, mode: bool) -> None:
        """Note the training mode of one module."""
        self.set_modes({base}, {} if mode == base.training else {base: mode})

    def set_modes(
        self, modules: Collection[nn.Module], changes: dict[nn.Module, bool], mode: bool | None = None
    ) -> None:
        """Note the training modes of some modules.

        Args:
            modules: The modules.
            changes: Those of them of which the mode differs from the model's, with the mode.
            mode: What to tell the views of them.
        """
        self.modes = {module: own for module, own in self.modes.items() if module not in modules} | changes
        if mode is not None:
            for base, view in self.views.items():
                if base in modules:
                    view.__dict__["training"] = mode

    def forget(self) -> None:
        """Drop all that refers to views."""
        self.views = {}
        self._watched, self._own_memo = [], None

    def end(self) -> None:
        """Drop everything, and make ordinary parameters of those that somebody has."""
        for own in self._parameters.values():
            own.release()
        self.forget()
        self._formed, self._parameters = [], {}


class Outputs:
    """What a member got from batched forwards, as far as gradients are concerned.

    Attributes:
        differentiable: Whether the function may take them for differentiable: gradients were on.
    """

    def __init__(self) -> None:
        self.differentiable = False

    def refuse_gradients(self, gradient: Tensor) -> None:
        """Be a hook on the member's parameters."""
        if self.differentiable:
            raise Differentiated


class _Memo(dict[int, Any]):
    """The memo of ``copy.deepcopy`` that knows a member's views, parameters and tensors."""

    def __init__(self, member: MemberState) -> None:
        super().__init__()
        self._member = weakref.ref(member)

    def get(self, key: int, default: Any = None) -> Any:
        if key in self:
            return self[key]
        member = self._member()
        if member is not None:
            if key in member.origin.modules:
                return member.view(member.origin.modules[key])
            if key in member.origin.parameters:
                return member.parameter(member.origin.parameters[key])
        return default


def _fingerprint(parameter: Tensor) -> tuple[Any, ...]:
    # NumPy's writes are not counted as versions, but memory that NumPy shares can no longer be resized.
    return parameter.data_ptr(), parameter._version, parameter.untyped_storage().resizable()
