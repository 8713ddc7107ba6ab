"""Intercepts the calls of a model's modules and passes them to a handler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# If this attribute is set, torch.nn.Module calls it instead of forward() and hooks.
ATTRIBUTE = "_compiled_call_impl"

Handler = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class Interception:
    """While it is on, passes the calls of a model and of its submodules to a handler.

    Args:
        model: The model.
        handler: Takes a module, and the positional and keyword arguments of its call. It returns the result.
    """

    def __init__(self, model: nn.Module, handler: Handler) -> None:
        self._places = [(module.__dict__, _Caller(module, handler)) for module in model.modules()]
        self._before: list[Any] = []
        self.on = False

    def start(self) -> None:
        """Begin to intercept calls."""
        self._before = [attributes.get(ATTRIBUTE) for attributes, _ in self._places]
        self.on = True
        for attributes, caller in self._places:
            attributes[ATTRIBUTE] = caller

    def stop(self) -> None:
        """Stop intercepting calls."""
        if self.on:
            for (attributes, _), before in zip(self._places, self._before, strict=True):
                if before is None:
                    attributes.pop(ATTRIBUTE, None)
                else:
                    attributes[ATTRIBUTE] = before
            self.on = False

    def __enter__(self) -> Interception:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


class _Caller:
    """The attribute that intercepts the calls of one module. It is not copied with the module."""

    __slots__ = ("_handler", "_module")

    def __init__(self, module: nn.Module, handler: Handler) -> None:
        self._module, self._handler = module, handler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handler(self._module, args, kwargs)

    def __copy__(self) -> None:
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def plain_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module's own hooks and forward. Calls of its children are still intercepted."""
    return module._call_impl(*args, **kwargs)
