"""Parameters that tell when somebody looks at their values, while a model stands for several members."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._torch import DisableTorchFunctionSubclass, has_compatible_shallow_copy_type, tree_leaves
from ..perturbation.tensor import METADATA


class Watcher(Protocol):
    """What is told."""

    def form(self, parameter: nn.Parameter) -> None:
        """Be told that a parameter's values are about to be used; it may set them, or raise."""


# Those that are told, by the parameters' id.
_watchers: dict[int, weakref.ref[Any]] = {}

# What neither looks at values nor changes any.
_TENSOR: Any = torch.Tensor
_HARMLESS: set[Any] = METADATA | {
    _TENSOR.requires_grad_, _TENSOR.requires_grad.__set__, _TENSOR.grad.__set__,
    torch.Tensor.is_shared, torch.Tensor.__hash__, has_compatible_shallow_copy_type,
}  # fmt: skip
# What returns the tensor itself where it is of the right kind already.
_CONVERSIONS: set[Any] = {
    torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.float, torch.Tensor.double, torch.Tensor.half,
    torch.Tensor.bfloat16, torch.Tensor.type, torch.Tensor.contiguous,
}  # fmt: skip
_SET_DATA: Any = _TENSOR.data.__set__


def watch(parameters: Iterable[nn.Parameter], watcher: Watcher) -> None:
    """Have ``watcher`` told when the values of one of the parameters, of class ``nn.Parameter``, are used."""
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
    """Return those that are told of some parameter, each once."""
    found = (reference() for reference in _watchers.values())
    return list({id(watcher): watcher for watcher in found if watcher is not None}.values())


class WatchedParameter(nn.Parameter):
    """What watched parameters are meanwhile."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with DisableTorchFunctionSubclass():
            if func in _HARMLESS:
                return func(*args, **kwargs)
            if func in _CONVERSIONS:
                # Moving a model to where it is already is common, and changes nothing.
                result = func(*args, **kwargs)
                if result is args[0]:
                    return result
            elif func is _SET_DATA and args[0] is args[1]:
                return None
            for leaf in tree_leaves((args, kwargs)):
                if type(leaf) is WatchedParameter:
                    _form(leaf)
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        _form(self)
        memo[id(self)] = clone = nn.Parameter(data_of(self).clone(), self.requires_grad)
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        _form(self)
        return nn.Parameter(data_of(self), self.requires_grad).__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        _form(self)
        return repr(nn.Parameter(data_of(self), self.requires_grad))


def _form(parameter: nn.Parameter) -> None:
    reference = _watchers.get(id(parameter))
    watcher = None if reference is None else reference()
    if watcher is not None:
        watcher.form(parameter)


def data_of(parameter: nn.Parameter) -> Tensor:
    """Return what a watched parameter holds, without telling anybody."""
    with DisableTorchFunctionSubclass():
        return parameter.data


def set_data(parameter: nn.Parameter, value: Tensor) -> None:
    """Have a watched parameter hold ``value``."""
    with DisableTorchFunctionSubclass():
        parameter.data = value
