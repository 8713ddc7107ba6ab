"""Calls of a model's modules, led past the modules to a function of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# torch.nn.Module looks for this attribute at every call, and calls it instead of forward() and hooks: it is where
# Module.compile() puts what it has compiled. Without it only a subclass of each module's class could do the same, and
# type(module) would be another one. In a release that lacks it no call would be noticed, which tests would show.
_ATTRIBUTE = "_compiled_call_impl"

Handler = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class Interception:
    """Hands the calls of a model and of all modules below it to a handler, while it is on.

    Args:
        model: The model.
        handler: From a module and the arguments of its call to the result.
    """

    def __init__(self, model: nn.Module, handler: Handler) -> None:
        self._places = [(module.__dict__, _caller(module, handler)) for module in model.modules()]
        self._before: list[Any] = []
        self.on = False

    def start(self) -> None:
        """Begin."""
        self.on = True
        self._before = [attributes.get(_ATTRIBUTE) for attributes, _ in self._places]
        for attributes, call in self._places:
            attributes[_ATTRIBUTE] = call

    def stop(self) -> None:
        """End."""
        if self.on:
            self.on = False
            for (attributes, _), before in zip(self._places, self._before, strict=True):
                if before is None:
                    attributes.pop(_ATTRIBUTE, None)
                else:
                    attributes[_ATTRIBUTE] = before

    def __enter__(self) -> Interception:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _caller(module: nn.Module, handler: Handler) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return handler(module, args, kwargs)

    return call


def plain_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module's own hooks and forward; the calls of its children are intercepted again."""
    return module._call_impl(*args, **kwargs)
