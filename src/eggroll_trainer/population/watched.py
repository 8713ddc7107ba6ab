"""Parameters that notify a watcher before their values are used, while a model represents several members."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._torch import DisableTorchFunctionSubclass, has_compatible_shallow_copy_type, tree_leaves
from ..perturbation.tensor import METADATA


class Watcher(Protocol):
    """Is notified when values of watched parameters are used."""

    def materialize(self, parameter: nn.Parameter) -> None:
        """Called before a parameter's values are used; may set them, or raise."""


# Watchers by the id of the parameter.
_watchers: dict[int, weakref.ref[Any]] = {}

# Operations that neither read nor change values.
_TENSOR: Any = torch.Tensor
_HARMLESS: set[Any] = METADATA | {
    _TENSOR.requires_grad_, _TENSOR.requires_grad.__set__, _TENSOR.grad.__set__,
    torch.Tensor.is_shared, torch.Tensor.__hash__, has_compatible_shallow_copy_type,
}  # fmt: skip
# Operations that return the tensor itself if it has the right dtype, device or layout already.
_CONVERSIONS: set[Any] = {
    torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.float, torch.Tensor.double, torch.Tensor.half,
    torch.Tensor.bfloat16, torch.Tensor.type, torch.Tensor.contiguous,
}  # fmt: skip
_SET_DATA: Any = _TENSOR.data.__set__


def watch(parameters: Iterable[nn.Parameter], watcher: Watcher) -> None:
    """Notify ``watcher`` before the values of these parameters, of class ``nn.Parameter``, are used."""
    reference = weakref.ref(watcher)
    for p in parameters:
        _watchers[id(p)] = reference
        p.__class__ = WatchedParameter


def unwatch(parameters: Iterable[nn.Parameter]) -> None:
    """Make them ordinary parameters again."""
    for p in parameters:
        _watchers.pop(id(p), None)
        p.__class__ = nn.Parameter


def watchers() -> list[Any]:
    """Return all watchers, each once."""
    found = (reference() for reference in _watchers.values())
    return list({id(watcher): watcher for watcher in found if watcher is not None}.values())


class WatchedParameter(nn.Parameter):
    """The class of parameters while they are watched."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with DisableTorchFunctionSubclass():
            if func in _HARMLESS:
                return func(*args, **kwargs)
            if func in _CONVERSIONS:
                # Moving a model to its own device is common, and uses no values.
                result = func(*args, **kwargs)
                if result is args[0]:
                    return result
            elif func is _SET_DATA and args[0] is args[1]:
                return None
            for leaf in tree_leaves((args, kwargs)):
                if type(leaf) is WatchedParameter:
                    _materialize(leaf)
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        _materialize(self)
        memo[id(self)] = clone = nn.Parameter(data_of(self).clone(), self.requires_grad)
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        _materialize(self)
        return nn.Parameter(data_of(self), self.requires_grad).__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        _materialize(self)
        return repr(nn.Parameter(data_of(self), self.requires_grad))


def _materialize(parameter: nn.Parameter) -> None:
    reference = _watchers.get(id(parameter))
    watcher = None if reference is None else reference()
    if watcher is not None:
        watcher.materialize(parameter)


def data_of(parameter: nn.Parameter) -> Tensor:
    """Return the current data of a watched parameter, without notifying its watcher."""
    with DisableTorchFunctionSubclass():
        return parameter.data


def set_data(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the data of a watched parameter, without notifying its watcher."""
    with DisableTorchFunctionSubclass():
        parameter.data = value
