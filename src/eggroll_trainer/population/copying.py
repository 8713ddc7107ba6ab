"""Deep copies of modules in which closures refer to the copy.

``copy.deepcopy`` does not copy functions. If a module has a lambda over ``self``, or a ``forward`` that was replaced by
a closure, its copy would compute with the original's weights. It also refuses tensors that were computed from
parameters, such as a pruned weight or an activation that the module keeps.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

from torch import Tensor, nn

from .._torch import tree_leaves


def copy_of(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module. Closures over the module and its parts are bound to the copy."""
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in tree_leaves(vars(part))
        if isinstance(value, Tensor) and not value.is_leaf
    }
    clone = copy.deepcopy(module, memo)
    parts = {id(value) for value in (*module.modules(), *module.parameters(), *module.buffers())}
    binder = _Binder(memo, parts)
    for part in clone.modules():
        binder.bind_in(part.__dict__)
    return clone


class _Binder:
    """Binds functions that refer to parts of a module to the copies of these.

    Args:
        memo: The memo of ``copy.deepcopy``: copies by the originals' ``id``.
        parts: The ``id`` of each module, parameter and buffer that was copied.
    """

    def __init__(self, memo: dict[int, Any], parts: set[int]) -> None:
        self._memo, self._parts = memo, parts
        self._bound: dict[int, Any] = {}
        self._seen: set[int] = set()

    def bind_in(self, container: Any) -> None:
        """Bind the functions among the values of a list or dictionary."""
        if id(container) in self._seen:
            return
        self._seen.add(id(container))
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(items):
            if isinstance(value, (list, dict)):
                self.bind_in(value)
            elif not isinstance(value, (nn.Module, Tensor)):
                bound = self._bind(value)
                if bound is not value:
                    container[key] = bound

    def _bind(self, value: Any) -> Any:
        """Return the value with references to originals replaced by their copies."""
        if id(value) in self._parts:
            return self._memo.get(id(value), value)
        if isinstance(value, types.FunctionType):
            return self._bind_function(value)
        if isinstance(value, types.MethodType):
            owner = self._bind(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            parts = [self._bind(part) for part in (value.func, *value.args, *value.keywords.values())]
            if all(a is b for a, b in zip(parts, (value.func, *value.args, *value.keywords.values()), strict=True)):
                return value
            count = 1 + len(value.args)
            return functools.partial(parts[0], *parts[1:count], **dict(zip(value.keywords, parts[count:], strict=True)))
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            parts = [self._bind(part) for part in value]
            return value if all(a is b for a, b in zip(parts, value, strict=True)) else tuple(parts)
        return value

    def _bind_function(self, function: types.FunctionType) -> types.FunctionType:
        if id(function) in self._bound:
            bound: types.FunctionType = self._bound[id(function)]
            return bound
        self._bound[id(function)] = function
        cells, changed = [], False
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:
                # An empty cell.
                cells.append(cell)
                continue
            new = self._bind(content)
            changed |= new is not content
            cells.append(cell if new is content else types.CellType(new))
        defaults = tuple(self._bind(value) for value in function.__defaults__ or ())
        changed |= any(a is not b for a, b in zip(defaults, function.__defaults__ or (), strict=True))
        if not changed:
            return function
        bound = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, defaults or None, tuple(cells)
        )
        bound.__kwdefaults__, bound.__qualname__ = function.__kwdefaults__, function.__qualname__
        bound.__dict__.update(function.__dict__)
        self._bound[id(function)] = bound
        return bound
