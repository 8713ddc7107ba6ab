"""The user's own model while members take turns with it.

All members see one and the same object. Where a member calls it or one of its modules, the call is intercepted. Its
parameters are the centre's until the member does something with the values of one: then that parameter holds the
member's, as long as it is the member's turn. What a member sets in the modules, such as training modes, goes with it.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...module_state import NotBatchable
from ...perturbation.tensor import METADATA
from ...population import Population
from ...snapshot import Snapshot, is_immutable
from .. import thread_modes
from ..interception import Handler, Interception

# The dictionaries of a module that calls, or the function, may change.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


class Holding:
    """What one member has changed in the model: weights that it holds, training modes, and attributes.

    Attributes:
        weights: For each parameter that it has used, its data, and a copy of what it was.
        training: The training modes of all modules, if it has had a turn.
        changes: By their index, dictionaries of modules that differ from the model's.
    """

    __slots__ = ("changes", "training", "weights")

    def __init__(self) -> None:
        self.weights: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self.training: tuple[Any, ...] | None = None
        self.changes: dict[int, dict[str, Any]] = {}


class SharedModel:
    """The model of a population whose members take turns.

    Args:
        population: The members.
        call: What to do for a call of one of the model's modules.
        isolate: Whether attributes that a member sets are its own, which takes a look at all modules at each turn.

    Attributes:
        current: Index and holding of the member whose turn it is, or None.
        serving: Whether a batched forward is under way.
        formed: Called when a weight of a member is formed in full.
    """

    def __init__(self, population: Population, call: Handler, *, isolate: bool) -> None:
        self.population, self.isolate = population, isolate
        model = population.model
        self.interception = Interception(model, call)
        self.modules = list(model.modules())
        self._attributes = [module.__dict__ for module in self.modules]
        self.subtrees: dict[nn.Module, frozenset[nn.Module]] = {}
        self.hooked = {m for m in self.modules if m._forward_hooks or m._forward_pre_hooks}
        named = dict(model.named_parameters(remove_duplicate=False))
        self._names = {named[name]: name for name in population.perturbations.draws}
        self._centres = {p: p.data for p in self._names if type(p) is nn.Parameter}
        self.current: tuple[int, Holding] | None = None
        self.serving = False
        self.formed: Callable[[], None] = lambda: None
        # Before calls are intercepted, which changes attributes.
        self._training = self._current_training = self._read_training()
        self._watched = [
            Snapshot(value, restorable=False)
            for attributes in self._attributes
            for key, value in attributes.items()
            if key not in _MODULE_ATTRIBUTES and not is_immutable(value) and not isinstance(value, Tensor)
        ]
        self._tensors = [t for t in (*model.buffers(), *model.parameters()) if not t.is_inference()]
        self._versions = [t._version for t in self._tensors]
        self.start()
        self._places = [
            place
            for attributes in self._attributes
            for place in (attributes, *(attributes[name] for name in _REGISTRIES))
        ]
        self._before = [dict(place) for place in self._places]
        self._values = [tuple(place.values()) for place in self._places]

    def start(self) -> None:
        """Intercept calls, and uses of the parameters."""
        self.interception.start()
        for p in self._centres:
            _shared[id(p)] = weakref.ref(self)
            p.__class__ = _SharedParameter  # type: ignore[assignment]

    def stop(self) -> None:
        """Be the user's own again."""
        self.interception.stop()
        for p in self._centres:
            _shared.pop(id(p), None)
            p.__class__ = nn.Parameter  # type: ignore[assignment]

    def subtree(self, module: nn.Module) -> frozenset[nn.Module]:
        """Return a module and all below it."""
        known = self.subtrees.get(module)
        if known is None:
            known = self.subtrees[module] = frozenset(module.modules())
        return known

    def enter(self, index: int, holding: Holding) -> None:
        """Begin a member's turn."""
        self.current = index, holding
        self._set_training(self._training if holding.training is None else holding.training)
        for p, (data, _) in holding.weights.items():
            _set_data(p, data)
        for place, contents in holding.changes.items():
            self._places[place].clear()
            self._places[place].update(contents)

    def leave(self, holding: Holding) -> None:
        """End a member's turn."""
        self.current = None
        holding.training = self._current_training = self._read_training()
        for p, (_, copied) in holding.weights.items():
            holding.weights[p] = _data(p), copied
            _set_data(p, self._centres[p])
        if self.isolate:
            self._set_training(self._training)
            holding.changes = self.differences()
            for place in holding.changes:
                self._places[place].clear()
                self._places[place].update(self._before[place])

    def differences(self) -> dict[int, dict[str, Any]]:
        """Return the dictionaries of modules that are not as they were, by their index."""
        found = {}
        for i, (place, values) in enumerate(zip(self._places, self._values, strict=True)):
            if len(place) == len(values) and all(map(operator.is_, place.values(), values)):
                continue
            before = self._before[i]
            if place.keys() != before.keys() or any(place[k] is not v for k, v in before.items() if k != "training"):
                found[i] = dict(place)
        return found

    def changed_modules(self, holding: Holding) -> set[nn.Module]:
        """Return the modules that do not do what they do for the others, in the turn of the holder."""
        changed = {self.modules[i // (1 + len(_REGISTRIES))] for i in self.differences()} if self.isolate else set()
        for p, (_, copied) in holding.weights.items():
            if not torch.equal(_data(p), copied):
                changed |= {m for m in self.modules if any(p is own for own in m._parameters.values())} or {
                    self.population.model
                }
        return changed

    def changed(self) -> bool:
        """Return whether attributes of modules have changed, outside of a turn."""
        return bool(self.differences())

    def changed_in_place(self) -> bool:
        """Return whether buffers, parameters or containers were changed in place, outside of a turn."""
        versions = any(t._version != version for t, version in zip(self._tensors, self._versions, strict=True))
        return versions or any(snapshot.changed() for snapshot in self._watched)

    def training_modes(self, training: tuple[Any, ...]) -> dict[nn.Module, bool]:
        """Return the modules of which the training mode differs from the model's, with the mode."""
        pairs = zip(self.modules, training, self._training, strict=True)
        return {module: mode for module, mode, before in pairs if mode != before}

    def read_training(self) -> tuple[Any, ...]:
        """Return the training modes of all modules, in a member's turn."""
        return self._read_training()

    def reset(self) -> None:
        """Put the model in its own state, for a batched forward or at the end."""
        self._set_training(self._training)

    def restore(self) -> None:
        """Put back all that members may have left."""
        self.stop()
        self.current = None
        for p, data in self._centres.items():
            p.data = data
        for place, before in zip(self._places, self._before, strict=True):
            contents = {key: value for key, value in before.items() if key != "_compiled_call_impl"}
            if "_compiled_call_impl" in place:
                contents["_compiled_call_impl"] = place["_compiled_call_impl"]
            if place.keys() != contents.keys() or any(place[k] is not v for k, v in contents.items()):
                place.clear()
                place.update(contents)

    def form(self, parameter: nn.Parameter) -> None:
        """Have a parameter hold what it is for the member whose turn it is."""
        if self.current is None or _pid != os.getpid():
            if self.serving:
                raise NotBatchable(f"the model uses its parameter {self._names[parameter]!r} from where it is not looked for")
            return
        index, holding = self.current
        if parameter in holding.weights:
            return
        self.formed()
        name = self._names[parameter]
        with thread_modes.neutral():
            value = self.population.member_parameters(index, [name])[name]
        holding.weights[parameter] = value, value.clone()
        _set_data(parameter, value)

    def _read_training(self) -> tuple[Any, ...]:
        return tuple([attributes.get("training") for attributes in self._attributes])

    def _set_training(self, training: tuple[Any, ...]) -> None:
        if training != self._current_training:
            for attributes, mode in zip(self._attributes, training, strict=True):
                attributes["training"] = mode
            self._current_training = training


_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)

# The models whose parameters are shared, by the parameters' id.
_shared: dict[int, weakref.ref[SharedModel]] = {}
_pid = os.getpid()


class _SharedParameter(nn.Parameter):
    """What the parameters of a shared model are meanwhile: looked at for their values, they hold the member's."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in METADATA:
            for leaf in tree_leaves((args, kwargs)):
                if type(leaf) is _SharedParameter:
                    _form(leaf)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        _form(self)
        memo[id(self)] = clone = nn.Parameter(_data(self).clone(), self.requires_grad)
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        _form(self)
        return nn.Parameter(_data(self), self.requires_grad).__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        _form(self)
        return repr(nn.Parameter(_data(self), self.requires_grad))


def _form(parameter: nn.Parameter) -> None:
    reference = _shared.get(id(parameter))
    model = None if reference is None else reference()
    if model is not None:
        model.form(parameter)


def _data(parameter: nn.Parameter) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.data


def _set_data(parameter: nn.Parameter, value: Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        parameter.data = value


def _leave_to_the_parent() -> None:
    """In a forked process: let every shared model be that of the member whose turn it was."""
    global _pid
    _pid = os.getpid()
    models = {id(model): model for reference in _shared.values() if (model := reference()) is not None}
    for model in models.values():
        if model.current is not None:
            for parameter in model._centres:
                model.form(parameter)
        model.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
