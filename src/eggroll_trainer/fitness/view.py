"""The model as one member's fitness function sees it.

A view is a module tree of its own, in which every class is a subclass, made on the fly, of the model's class. Its calls
go to the member, who may wait until one batched forward serves all; its parameters are that member's dense ones when
somebody reads them; what a function assigns to it stays with the member. Children come into being when they are used.
"""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from ..module_state import parameter_lists

_LINK = "_eggroll_link"


class Blueprint:
    """What the views of one module have in common, found out once an evaluation.

    Attributes:
        subtree: The module and all below it.
        mutable: Names of attributes that a function could change without assigning to them.
        plain_train: Whether every module of the subtree has the ``train()`` of ``nn.Module``.
        has_aliases: Whether the module holds parameters outside its dictionary of parameters too.
        changes: For each training mode, the modules of the subtree that are in the other one.
    """

    def __init__(self, base: nn.Module) -> None:
        self.cls = view_class(type(base))
        self.subtree = frozenset(base.modules())
        self.mutable = [
            name
            for name, value in base.__dict__.items()
            if isinstance(value, _MUTABLE) and name not in _INTERNALS and not isinstance(value, nn.Parameter)
        ]
        self.plain_train = all(type(module).train is nn.Module.train for module in self.subtree)
        # nn.RNNBase has them, but reads them in its forward alone; see natural_call.
        self.has_aliases = not isinstance(base, nn.RNNBase) and (
            bool(parameter_lists(base)) or any(isinstance(v, nn.Parameter) for v in base.__dict__.values())
        )
        self.changes = {
            mode: {module: mode for module in base.modules() if module.training != mode} for mode in (False, True)
        }


class Member(Protocol):
    """The owner of a tree of views."""

    views: dict[nn.Module, nn.Module]
    touched: set[nn.Module]

    def blueprint(self, base: nn.Module) -> Blueprint:
        """Return the blueprint of the views of ``base``."""

    def call(self, view: nn.Module, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the member's form of ``base``."""

    def parameters_of(self, base: nn.Module) -> dict[str, nn.Parameter | None]:
        """Return the member's dense parameters of ``base`` itself."""


class Link:
    """Binds a view to its member and to the module that it is a view of."""

    def __init__(self, member: Member, base: nn.Module, blueprint: Blueprint) -> None:
        self.member, self.base, self.blueprint = member, base, blueprint
        # Training mode for children that don't exist yet; None: each its own.
        self.mode: bool | None = None
        self.watched: list[tuple[Any, Any]] = []

    def touch(self) -> None:
        """Note that the view may no longer do what the batched forward does."""
        self.member.touched.add(self.base)


def view_of(member: Member, base: nn.Module) -> nn.Module:
    """Return the member's view of ``base``, the model or one of its submodules; always the same one."""
    view = member.views.get(base)
    if view is None:
        blueprint = member.blueprint(base)
        view = blueprint.cls.__new__(blueprint.cls)
        link = Link(member, base, blueprint)
        attributes = view.__dict__
        attributes.update(base.__dict__)
        attributes[_LINK] = link
        attributes["_parameters"] = _Parameters(base._parameters, link, view)
        attributes["_buffers"] = _Buffers(base._buffers, link, view)
        attributes["_modules"] = _Modules(base._modules, link, view)
        for name in blueprint.mutable:
            value = attributes[name]
            attributes[name] = own = value.clone() if isinstance(value, Tensor) else copy.copy(value)
            link.watched.append((own, _fingerprint(own)))
        member.views[base] = view
        if blueprint.has_aliases:
            attributes["_parameters"].load()
    return view


def link_of(view: nn.Module) -> Link | None:
    """Return what binds a view, or None for an ordinary module."""
    link: Link | None = view.__dict__.get(_LINK)
    return link


def natural_call(view: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the module's own forward (and hooks) on the view; calls of its children go to the member again."""
    if isinstance(view, nn.RNNBase):
        view._parameters.load()  # type: ignore[attr-defined]
    return super(_ViewMixin, view).__call__(*args, **kwargs)  # type: ignore[misc]


def notice_changes(member: Member) -> None:
    """Note the views whose own containers or arrays were changed in place."""
    for view in member.views.values():
        link = link_of(view)
        if link is not None and any(_fingerprint(value) != before for value, before in link.watched):
            link.touch()


class _ViewMixin(nn.Module):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        link = link_of(self)
        # Without a link: built by user code from a view, such as a slice of an nn.Sequential.
        if link is None:
            return super().__call__(*args, **kwargs)
        return link.member.call(self, link.base, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        link = link_of(self)
        if link is not None and name != "training":
            link.touch()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        link = link_of(self)
        if link is not None:
            link.touch()
        super().__delattr__(name)

    def train(self, mode: bool = True) -> Any:
        link = link_of(self)
        if link is None or len(link.member.views) > 1 or not link.blueprint.plain_train:
            return super().train(mode)
        # No child has been looked at yet: each takes the mode over when it comes into being.
        self.__dict__["training"] = mode
        link.mode = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return detached_copy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickled, for another process say, a view becomes an ordinary module as well.
        return detached_copy(self, {}).__reduce_ex__(protocol)


def detached_copy(view: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return an ordinary module of the user's class with the member's dense weights."""
    link = link_of(view)
    if link is None:
        cls: type[nn.Module] = type(view)._viewed  # type: ignore[attr-defined]
        clone = cls.__new__(cls)
        memo[id(view)] = clone
        clone.__dict__.update({k: copy.deepcopy(v, memo) for k, v in view.__dict__.items()})
        return clone
    clone = type(link.base).__new__(type(link.base))
    memo[id(view)] = clone
    for key, value in view.__dict__.items():
        if key == _LINK:
            continue
        if isinstance(value, _Lazy):
            value.load()
            value = dict(value)
        clone.__dict__[key] = copy.deepcopy(value, memo)
    if isinstance(clone, nn.RNNBase):
        clone._init_flat_weights()
    return clone


def _hook_registration(name: str) -> Callable[..., Any]:
    original = getattr(nn.Module, name)

    @functools.wraps(original)
    def register(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        link = link_of(self)
        if link is not None:
            link.touch()
            for key, hooks in link.base.__dict__.items():
                if "_hooks" in key and hooks is not None and hooks is self.__dict__[key]:
                    self.__dict__[key] = hooks.copy()
        return original(self, *args, **kwargs)

    return register


for _name in dir(nn.Module):
    if _name.startswith(("register_", "_register_")) and _name.endswith("_hook"):
        setattr(_ViewMixin, _name, _hook_registration(_name))


_view_classes: dict[type[nn.Module], type[nn.Module]] = {}


def view_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``cls`` that views have.

    Raises:
        TypeError: ``cls`` cannot be subclassed like this.
    """
    known = _view_classes.get(cls)
    if known is None:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_viewed": cls}
        known = _view_classes[cls] = type(cls.__name__, (_ViewMixin, cls), names)
    return known


class _Lazy(dict[str, Any]):
    """A module's dictionary of parameters, buffers or children, replaced by the member's own at the first look."""

    def __init__(self, base: dict[str, Any], link: Link, view: nn.Module) -> None:
        super().__init__(base)
        self._link, self._view, self._loaded = link, view, False

    def load(self) -> None:
        """Replace the centre's entries by the member's."""
        if not self._loaded:
            self._loaded = True
            self._replace()

    def _replace(self) -> None:
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.load()
        return dict, (dict(self),)


def _loading(name: str) -> Callable[..., Any]:
    original = getattr(dict, name)

    @functools.wraps(original)
    def method(self: _Lazy, *args: Any, **kwargs: Any) -> Any:
        self.load()
        return original(self, *args, **kwargs)

    return method


# Everything that hands out or changes a value; keys, membership and length are known without.
_READS = ("__getitem__", "__iter__", "__reversed__", "__eq__", "__or__", "get", "items", "values", "copy")
_WRITES = ("__setitem__", "__delitem__", "__ior__", "pop", "popitem", "setdefault", "update", "clear")
for _name in _READS + _WRITES:
    setattr(_Lazy, _name, _loading(_name))


class _Parameters(_Lazy):
    def _replace(self) -> None:
        link = self._link
        link.touch()
        aliases = {id(value): key for key, value in link.base._parameters.items() if value is not None}
        dict.update(self, link.member.parameters_of(link.base))
        attributes = self._view.__dict__
        for key, value in link.base.__dict__.items():
            if id(value) in aliases:
                attributes[key] = dict.__getitem__(self, aliases[id(value)])
            elif type(value) is list and any(id(item) in aliases for item in value):
                attributes[key] = [
                    dict.__getitem__(self, aliases[id(item)]) if id(item) in aliases else item for item in value
                ]


class _Buffers(_Lazy):
    def _replace(self) -> None:
        self._link.touch()
        dict.update(self, {k: v.clone() for k, v in self._link.base._buffers.items() if v is not None})


class _Modules(_Lazy):
    def _replace(self) -> None:
        link = self._link
        for name, child in link.base._modules.items():
            if child is None:
                continue
            view = view_of(link.member, child)
            dict.__setitem__(self, name, view)
            if link.mode is not None:
                view.__dict__["training"] = view.__dict__[_LINK].mode = link.mode
        link.mode = None


def training_changes(member: Member) -> dict[nn.Module, bool]:
    """Return the modules whose training mode the member's function has changed, with the mode it set."""
    changes: dict[nn.Module, bool] = {}
    for base, view in member.views.items():
        link: Link = view.__dict__[_LINK]
        if link.mode is not None:
            changes.update(link.blueprint.changes[link.mode])
        elif view.__dict__["training"] != base.training:
            changes[base] = view.training
    return changes


_MUTABLE = (list, dict, set, collections.deque, bytearray, np.ndarray, Tensor)
_INTERNALS = frozenset(nn.Module().__dict__)


def _fingerprint(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value._version
    if isinstance(value, (np.ndarray, bytearray)):
        return bytes(value)
    return [id(x) for pair in value.items() for x in pair] if isinstance(value, dict) else [id(x) for x in value]
