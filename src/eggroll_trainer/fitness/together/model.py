"""The user's own model while members take turns with it.

All members use the same object. Calls of the model and its modules are intercepted. Its parameters have the values of
the centre until a member reads one: then this parameter is materialized, with the member's values, for the rest of the
member's turn. What a member sets in modules, such as training modes, is switched with the member.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import DisableTorchFunctionSubclass
from ...population import Population
from ...population.interception import ATTRIBUTE, Handler, Interception
from ...population.module_state import ModuleState
from ...population.watched import data_of, set_data, unwatch, watch, watchers
from .. import thread_modes

# Dictionaries of a module that the fitness function, or calls, may change.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


class MemberState:
    """The state of the model that belongs to one member: materialized weights, training modes, and attributes.

    Attributes:
        weights: For each materialized parameter, its data and a copy of its original values.
        training: The training modes of all modules; None before the first turn.
        changes: Dictionaries of modules that the member has changed, by their index.
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
        call: Handles a call of one of the model's modules.
        isolate: Whether to keep attributes that a member sets separately. This inspects all modules at each turn.

    Attributes:
        on_materialized: Called when a member's weight is materialized.
        on_foreign_use: Called when a weight is read outside of a member's turn.
    """

    def __init__(self, population: Population, call: Handler, *, isolate: bool) -> None:
        self.population, self.isolate = population, isolate
        self.on_materialized: Callable[[], None] = lambda: None
        self.on_foreign_use: Callable[[], None] = lambda: None
        model = population.model
        self._interception = Interception(model, call)
        self._modules = list(model.modules())
        self._attributes = [module.__dict__ for module in self._modules]
        self._subtrees: dict[nn.Module, tuple[frozenset[nn.Module], bool]] = {}
        named = dict(model.named_parameters(remove_duplicate=False))
        self._names = {named[name]: name for name in population.perturbations.draws}
        self._centres = {p: p.data for p in self._names if type(p) is nn.Parameter}
        self._gradients = {p: (p.requires_grad, p.grad) for p in self._centres}
        self._turn: tuple[int, MemberState] | None = None
        self._thread = threading.get_ident()
        self._training = self._training_now = self._read_training()
        self._note()
        self._start()

    def _note(self) -> None:
        """Record the state of the modules. It must not change outside of turns."""
        self._places = [
            place
            for attributes in self._attributes
            for place in (attributes, *(attributes[name] for name in _REGISTRIES))
        ]
        self._before = [dict(place) for place in self._places]
        self._state = ModuleState(self.population.model)
        self._parameters = [p for p in self.population.model.parameters() if not p.is_inference()]
        self._versions = [p._version for p in self._parameters]

    def _start(self) -> None:
        self._interception.start()
        for attributes, before in zip(self._attributes, self._before[:: 1 + len(_REGISTRIES)], strict=True):
            before[ATTRIBUTE] = attributes[ATTRIBUTE]
        self._values = [tuple(before.values()) for before in self._before]
        watch(self._centres, self)

    def _stop(self) -> None:
        self._interception.stop()
        unwatch(self._centres)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Inside the block, the model is an ordinary module again, with the centre's weights."""
        self._set_training(self._training)
        self._stop()
        caches = self.population.caches
        try:
            yield
        finally:
            if caches != self.population.caches:
                self._note()
            self._start()

    def restore(self) -> None:
        """Undo all changes by members, at the end of the evaluation."""
        self._stop()
        self._turn = None
        for p, data in self._centres.items():
            trained, p.grad = self._gradients[p]
            p.data = data
            p.requires_grad_(trained)
        self._state.restore()

    def enter(self, index: int, state: MemberState) -> None:
        """Begin a member's turn."""
        self._turn = index, state
        self._set_training(self._training if state.training is None else state.training)
        if state.weights:
            for p, (data, _) in state.weights.items():
                set_data(p, data)
            torch.clear_autocast_cache()
        for place, contents in state.changes.items():
            self._places[place].clear()
            self._places[place].update(contents)

    def leave(self, state: MemberState) -> None:
        """End a member's turn."""
        self._turn = None
        state.training = self._training_now = self._read_training()
        if state.weights:
            for p, (_, copied) in state.weights.items():
                state.weights[p] = data_of(p), copied
                set_data(p, self._centres[p])
            torch.clear_autocast_cache()
        if self.isolate:
            self._set_training(self._training)
            state.changes = self._differences()
            for place in state.changes:
                self._places[place].clear()
                self._places[place].update(self._before[place])

    def subtree(self, module: nn.Module) -> frozenset[nn.Module]:
        """Return a module and all its submodules."""
        return self._subtree(module)[0]

    def has_hooks(self, module: nn.Module) -> bool:
        """Return whether a module, or one of its submodules, has forward hooks."""
        return self._subtree(module)[1]

    def _subtree(self, module: nn.Module) -> tuple[frozenset[nn.Module], bool]:
        known = self._subtrees.get(module)
        if known is None:
            modules = frozenset(module.modules())
            hooks = any(m._forward_hooks or m._forward_pre_hooks for m in modules)
            known = self._subtrees[module] = modules, hooks
        return known

    def training_now(self) -> tuple[Any, ...] | None:
        """Return the training modes of all modules in a member's turn, or None if they are those of the model."""
        training = self._read_training()
        return None if training == self._training else training

    def training_modes(self, training: tuple[Any, ...] | None) -> dict[nn.Module, bool]:
        """Return the training modes that differ from those of the model, by module."""
        if training is None:
            return {}
        pairs = zip(self._modules, training, self._training, strict=True)
        return {module: mode for module, mode, before in pairs if mode != before}

    def changed_modules(self) -> set[nn.Module]:
        """Return the modules whose attributes the current member has changed, if these are kept separately."""
        if not self.isolate:
            return set()
        return {self._modules[i // (1 + len(_REGISTRIES))] for i in self._differences()}

    def wrote_weights(self, state: MemberState) -> bool:
        """Return whether a member, in its turn, has changed its materialized weights in place."""
        return any(not torch.equal(data_of(p), copied) for p, (_, copied) in state.weights.items())

    def changed(self) -> bool:
        """Return whether attributes of modules have changed, outside of a turn."""
        return bool(self._differences())

    def changed_in_place(self) -> bool:
        """Return whether buffers, parameters or containers were changed in place, outside of a turn."""
        with DisableTorchFunctionSubclass():
            written = any(p._version != version for p, version in zip(self._parameters, self._versions, strict=True))
        return written or self._state.differs_in_place()

    def materialize(self, parameter: nn.Parameter) -> None:
        """Give a parameter its values for the current member."""
        if self._turn is None or threading.get_ident() != self._thread:
            self.on_foreign_use()
            return
        index, state = self._turn
        if parameter in state.weights:
            return
        self.on_materialized()
        name = self._names[parameter]
        with thread_modes.neutral():
            value = self.population.member_parameters(index, [name])[name]
            state.weights[parameter] = value, value.clone()
        set_data(parameter, value)

    def detach_in_child(self) -> None:
        """In a forked process, become an ordinary model with the weights of the current member."""
        self._thread = threading.get_ident()
        if self._turn is None:
            self._stop()
        else:
            # Weights are still materialized on use: few processes read any, and torch's threads end in a fork.
            self._interception.stop()

    def _differences(self) -> dict[int, dict[str, Any]]:
        """Return the dictionaries of modules that have changed, by their index."""
        found = {}
        for i, (place, values) in enumerate(zip(self._places, self._values, strict=True)):
            if len(place) == len(values) and all(map(operator.is_, place.values(), values)):
                continue
            before = self._before[i]
            if place.keys() != before.keys() or any(place[k] is not v for k, v in before.items() if k != "training"):
                found[i] = dict(place)
        return found

    def _read_training(self) -> tuple[Any, ...]:
        return tuple([attributes.get("training") for attributes in self._attributes])

    def _set_training(self, training: tuple[Any, ...]) -> None:
        if training != self._training_now:
            for attributes, mode in zip(self._attributes, training, strict=True):
                attributes["training"] = mode
            self._training_now = training


def _leave_to_the_parent() -> None:
    """In a forked process, leave the turns to the parent."""
    for model in watchers():
        if isinstance(model, SharedModel):
            model.detach_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
