"""The model as one member's fitness function sees it.

A view is a module tree of its own, in which every class is a subclass, made on the fly, of the model's class. Its calls
go to the member, who may wait until one batched forward serves all; its parameters are that member's dense ones when
somebody reads them; what a function assigns to it stays with the member. Everything comes into being when it is used.
"""

from __future__ import annotations

import copyreg
import functools
import itertools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..snapshot import is_immutable
from .member_state import MemberState

_LINK = "_eggroll_link"
_REGISTRIES = ("_parameters", "_buffers", "_modules")
# The other attributes that every module has.
_INTERNALS = frozenset(nn.Module().__dict__) - set(_REGISTRIES)


class Blueprint:
    """What the views of one module have in common, found out once an evaluation.

    Attributes:
        base: The module.
        cls: The views' class.
        subtree: The module and all below it.
        has_hooks: Whether forward hooks are registered in it: what they do outside the model is each member's own.
        plain_train: Whether every module of it has the ``train()`` of ``nn.Module``.
        changes: For each training mode, the modules of the subtree that are in the other one.
        shared: Attributes that the views take as they are.
        deferred: Names of the others, which the views get when they are first used.
        early: Those of them that they get at once, because the class has an attribute of that name too.
    """

    def __init__(self, base: nn.Module) -> None:
        # A function may train its model, a view, with a trainer of its own.
        load_all(base)
        self.base, self.cls = base, view_class(base.__class__)
        self.subtree = frozenset(base.modules())
        self.has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in self.subtree)
        self.plain_train = all(module.__class__.train is nn.Module.train for module in self.subtree)
        self.changes = {
            mode: {module: mode for module in base.modules() if module.training != mode} for mode in (False, True)
        }
        attributes = {k: v for k, v in base.__dict__.items() if k not in _dropped(base)}
        # Empty registries of hooks are shared until the view gets one; of others a function may remove some.
        self.deferred = frozenset(
            key for key, value in attributes.items() if not is_immutable(value) and (key not in _INTERNALS or value)
        )
        self.early = [key for key in self.deferred if key in _INTERNALS or hasattr(self.cls, key)]
        self.shared = {key: value for key, value in attributes.items() if key not in self.deferred}

    @functools.cached_property
    def kinds(self) -> set[tuple[torch.dtype, torch.device]]:
        """Return the dtypes and devices of the subtree's tensors."""
        return {(t.dtype, t.device) for t in itertools.chain(self.base.parameters(), self.base.buffers())}


def _dropped(base: nn.Module) -> set[str]:
    """Return the attributes that views don't have: what torch.compile made runs the module that it was made from."""
    compiled = {"_compiled_call_impl", _LINK}
    return compiled | {"forward", "dynamo_ctx"} if "dynamo_ctx" in base.__dict__ else compiled


class Link:
    """Binds a view to its member and to the module that it is a view of."""

    __slots__ = ("base", "blueprint", "member", "natural", "pending")

    def __init__(self, member: MemberState, blueprint: Blueprint) -> None:
        self.member, self.base, self.blueprint = member, blueprint.base, blueprint
        # Attributes that the view does not have yet.
        self.pending = set(blueprint.deferred)
        # Whether the next call of forward() comes from the module's own __call__.
        self.natural = False

    def touch(self) -> None:
        """Note that the view may no longer do what the batched forward does."""
        self.member.touched.add(self.base)

    def load(self, view: nn.Module, name: str) -> Any:
        """Give the view its own of a deferred attribute."""
        value = self.base.__dict__[name]
        with self.member.origin.lock:
            if name not in self.pending:
                return view.__dict__[name]
            if name in _REGISTRIES:
                own = view.__dict__[name] = _LAZY[name](value, self)
                self.pending.remove(name)
                return own
            own = self.member.copy(value)
            if not isinstance(value, types.MethodType) or name in self.blueprint.early:
                # A method that refers back to the view would keep it alive.
                view.__dict__[name] = own
                self.pending.remove(name)
                self.member.watch(self.base, own)
        return own

    def load_registries(self, view: nn.Module) -> None:
        """Give the view what ``nn.Module`` takes from its ``__dict__``, where no look at an attribute is noticed."""
        for name in _REGISTRIES:
            if name in self.pending:
                self.load(view, name)


def view_of(member: MemberState, base: nn.Module) -> nn.Module:
    """Return the member's view of ``base``, the model or one of its submodules; always the same one."""
    view = member.views.get(base)
    if view is not None:
        return view
    with member.origin.lock:
        blueprint = member.blueprint(base)
        link = Link(member, blueprint)
        view = object.__new__(blueprint.cls)
        attributes = view.__dict__
        attributes.update(blueprint.shared)
        attributes[_LINK] = link
        if base in member.modes:
            attributes["training"] = member.modes[base]
        view = member.views.setdefault(base, view)
        for name in blueprint.early:
            link.load(view, name)
    return view


def link_of(view: nn.Module) -> Link | None:
    """Return what binds a view, or None for an ordinary module."""
    link: Link | None = view.__dict__.get(_LINK)
    return link


def natural_call(view: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the module's own forward (and hooks) on the view; calls of its children go to the member again."""
    link: Link = view.__dict__[_LINK]
    link.natural = True
    try:
        return super(_ViewMixin, view).__call__(*args, **kwargs)  # type: ignore[misc]
    finally:
        link.natural = False


def load_all(view: nn.Module) -> None:
    """Give a view everything that it would otherwise get when it is used."""
    link = link_of(view)
    if link is not None:
        for name in list(link.pending):
            link.load(view, name)
        for key in _REGISTRIES:
            view.__dict__[key].load()


def release(member: MemberState) -> None:
    """End a member's views: those that the fitness function has kept become ordinary modules with its weights."""
    references = [weakref.ref(view) for view in member.views.values()]
    member.forget()
    kept = [view for reference in references if (view := reference()) is not None]
    if not kept:
        member.end()
        return
    member.views = {link.base: view for view in kept if (link := link_of(view)) is not None}
    settled: set[nn.Module] = set()
    while todo := member.views.keys() - settled:
        for base in todo:
            load_all(member.views[base])
        settled |= todo
    for base in settled:
        view = member.views[base]
        _own_internals(view)
        attributes = view.__dict__
        del attributes[_LINK]
        attributes.update({key: dict(attributes[key]) for key in _REGISTRIES})
        _set_class(view, view.__class__)
    member.end()


def _own_internals(view: nn.Module) -> None:
    """Give a view registries of its own, those of hooks too."""
    link = link_of(view)
    if link is not None:
        link.load_registries(view)
        shared, attributes = link.blueprint.shared, view.__dict__
        for key in _INTERNALS & shared.keys():
            if attributes[key] is shared[key] and isinstance(shared[key], (dict, set)):
                attributes[key] = shared[key].copy()


_set_class: Callable[[Any, type], None] = object.__dict__["__class__"].__set__


class _ViewMixin(nn.Module):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the registration of subclasses, that the user's class may do, from noticing the view's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        link = self.__dict__.get(_LINK)
        if link is None:
            return super().__call__(*args, **kwargs)
        return link.member.call(self, link.base, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        link = self.__dict__.get(_LINK)
        if link is not None:
            if name in link.pending:
                return link.load(self, name)
            link.load_registries(self)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        link = link_of(self)
        if link is not None:
            if name == "training":
                link.member.set_mode(link.base, value)
                self.__dict__[name] = value
                return
            link.touch()
            _own_internals(self)
            if name in link.pending:
                link.load(self, name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        link = link_of(self)
        if link is not None:
            link.touch()
            _own_internals(self)
            if name in link.pending:
                link.load(self, name)
        super().__delattr__(name)

    def __dir__(self) -> list[str]:
        link = link_of(self)
        return [*super().__dir__(), *(() if link is None else link.pending)]

    def train(self, mode: bool = True) -> Any:
        link = link_of(self)
        if link is None or link.member.touched or not link.blueprint.plain_train or not isinstance(mode, bool):
            return super().train(mode)
        link.member.set_modes(link.blueprint.subtree, link.blueprint.changes[mode], mode)
        return self

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        link = link_of(self)
        # Moving a model to where it is already is common, and changes nothing.
        if link is not None and not link.member.touched and all(_keeps(fn, *kind) for kind in link.blueprint.kinds):
            return self
        return super()._apply(fn, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copied or pickled, a view becomes an ordinary module.
        load_all(self)
        cls = self.__class__
        if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
            custom = cls.__reduce_ex__ is not object.__reduce_ex__
            return super().__reduce_ex__(protocol) if custom else super().__reduce__()
        own: Any = getattr(cls, "__getstate__", None)
        custom = own is not None and own is not getattr(object, "__getstate__", None)
        state: Any = own(self) if custom else self.__dict__
        if isinstance(state, dict):
            state = {k: dict(v) if isinstance(v, _Lazy) else v for k, v in state.items() if k != _LINK}
        return copyreg.__newobj__, (cls,), state  # type: ignore[attr-defined]


def _keeps(fn: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> bool:
    probe = torch.empty(0, dtype=dtype, device=device)
    return fn(probe) is probe and (probe.is_cuda or not probe.is_shared())


def _registration(name: str) -> Callable[..., Any]:
    original = getattr(nn.Module, name)

    @functools.wraps(original)
    def register(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        link = link_of(self)
        if link is not None:
            link.touch()
            _own_internals(self)
        return getattr(super(_ViewMixin, self), name)(*args, **kwargs)

    return register


for _name in dir(nn.Module):
    if _name.startswith(("register_", "_register_")):
        setattr(_ViewMixin, _name, _registration(_name))


class _ViewType(type):
    """The class of views' classes: each is equal to the user's, for ``type(module) == nn.Linear``."""

    _viewed: type[nn.Module]

    def __eq__(cls, other: object) -> bool:
        return cls._viewed is getattr(other, "_viewed", other)

    def __hash__(cls) -> int:
        return hash(cls._viewed)


_view_classes: dict[type[nn.Module], type[nn.Module]] = {}


def view_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``cls`` that views have.

    Raises:
        TypeError: ``cls`` cannot be subclassed like this.
    """
    known = _view_classes.get(cls)
    if known is None:
        metaclass = _ViewType if type(cls) is type else type("_ViewType", (_ViewType, type(cls)), {})
        names: dict[str, Any] = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "_viewed": cls,
            "__class__": property(lambda self: cls, _change_class),
            "forward": _forward(cls),
        }
        if hasattr(cls, "__deepcopy__"):
            names["__deepcopy__"] = _deepcopy
        # Past a metaclass of the user's, which may keep a register.
        known = _view_classes[cls] = type.__new__(metaclass, cls.__name__, (_ViewMixin, cls), names)
    return known


def _forward(cls: type[nn.Module]) -> Callable[..., Any]:
    own = cls.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        link = link_of(self)
        if link is not None and not link.natural:
            return link.member.call(self, link.base, args, kwargs)
        if link is not None:
            link.natural = False
            if "dynamo_ctx" in link.base.__dict__:
                return self._orig_mod(*args, **kwargs)
        return own(self, *args, **kwargs)

    return forward


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    load_all(self)
    return type(self)._viewed.__deepcopy__(self, memo)


def _change_class(self: nn.Module, cls: type) -> None:
    # As parametrizations do: from here on the module is an ordinary one in the tree of views.
    load_all(self)
    _set_class(self, cls)


class _Lazy(dict[str, Any]):
    """A module's dictionary of parameters, buffers or children, replaced by the member's own at the first look."""

    __slots__ = ("_link", "_loaded")

    def __init__(self, base: dict[str, Any], link: Link) -> None:
        super().__init__(base)
        self._link, self._loaded = link, False

    def load(self) -> None:
        """Replace the centre's entries by the member's."""
        if not self._loaded:
            with self._link.member.origin.lock:
                if not self._loaded:
                    dict.update(self, {k: self._own(v) for k, v in dict.items(self) if v is not None})
                    self._loaded = True

    def _own(self, value: Any) -> Any:
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.load()
        return dict, (dict(self),)


class _Parameters(_Lazy):
    def _own(self, value: Any) -> Any:
        return self._link.member.parameter(value)


class _Buffers(_Lazy):
    def _own(self, value: Any) -> Any:
        own = self._link.member.tensor(value)
        self._link.member.watch(self._link.base, own)
        return own


class _Modules(_Lazy):
    def _own(self, value: Any) -> Any:
        return self._link.member.view(value)


def _loading(name: str, writes: bool) -> Callable[..., Any]:
    original = getattr(dict, name)

    @functools.wraps(original)
    def method(self: _Lazy, *args: Any, **kwargs: Any) -> Any:
        self.load()
        if writes:
            self._link.touch()
        return original(self, *args, **kwargs)

    return method


_LAZY: dict[str, type[_Lazy]] = {"_parameters": _Parameters, "_buffers": _Buffers, "_modules": _Modules}

# Everything that hands out or changes a value; keys, membership and length are known without.
_READS = ("__getitem__", "__iter__", "__reversed__", "__eq__", "__or__", "__ror__", "get", "items", "values", "copy")
_WRITES = ("__setitem__", "__delitem__", "__ior__", "pop", "popitem", "setdefault", "update", "clear")
for _name in (*_READS, *_WRITES):
    setattr(_Lazy, _name, _loading(_name, _name in _WRITES))
