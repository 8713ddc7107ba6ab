"""The user's own model while members take turns with it.

All members see one and the same object. Where a member calls it or one of its modules, the call is intercepted. Its
parameters are the centre's until the member does something with the values of one: then that parameter holds the
member's, as long as it is the member's turn. What a member sets in the modules, such as training modes, goes with it.
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
        formed: Called when a weight of a member is formed in full.
        refuse: Called when a weight is looked at where it is nobody's turn.
    """

    def __init__(self, population: Population, call: Handler, *, isolate: bool) -> None:
        self.population, self.isolate = population, isolate
        self.formed: Callable[[], None] = lambda: None
        self.refuse: Callable[[], None] = lambda: None
        model = population.model
        self._interception = Interception(model, call)
        self._modules = list(model.modules())
        self._attributes = [module.__dict__ for module in self._modules]
        self._subtrees: dict[nn.Module, tuple[frozenset[nn.Module], bool]] = {}
        named = dict(model.named_parameters(remove_duplicate=False))
        self._names = {named[name]: name for name in population.perturbations.draws}
        self._centres = {p: p.data for p in self._names if type(p) is nn.Parameter}
        self._gradients = {p: (p.requires_grad, p.grad) for p in self._centres}
        self._turn: tuple[int, Holding] | None = None
        self._thread = threading.get_ident()
        self._training = self._training_now = self._read_training()
        self._note()
        self._start()

    def _note(self) -> None:
        """Note what the modules hold: outside of turns, it must not change."""
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
        """Let the model be the user's own in the block, with the centre's weights."""
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
        """Put back all that members may have left, for good."""
        self._stop()
        self._turn = None
        for p, data in self._centres.items():
            trained, p.grad = self._gradients[p]
            p.data = data
            p.requires_grad_(trained)
        self._state.restore()

    def enter(self, index: int, holding: Holding) -> None:
        """Begin a member's turn."""
        self._turn = index, holding
        self._set_training(self._training if holding.training is None else holding.training)
        if holding.weights:
            for p, (data, _) in holding.weights.items():
                set_data(p, data)
            torch.clear_autocast_cache()
        for place, contents in holding.changes.items():
            self._places[place].clear()
            self._places[place].update(contents)

    def leave(self, holding: Holding) -> None:
        """End a member's turn."""
        self._turn = None
        holding.training = self._training_now = self._read_training()
        if holding.weights:
            for p, (_, copied) in holding.weights.items():
                holding.weights[p] = data_of(p), copied
                set_data(p, self._centres[p])
            torch.clear_autocast_cache()
        if self.isolate:
            self._set_training(self._training)
            holding.changes = self._differences()
            for place in holding.changes:
                self._places[place].clear()
                self._places[place].update(self._before[place])

    def subtree(self, module: nn.Module) -> frozenset[nn.Module]:
        """Return a module and all below it."""
        return self._subtree(module)[0]

    def has_hooks(self, module: nn.Module) -> bool:
        """Return whether a module, or one below it, has forward hooks."""
        return self._subtree(module)[1]

    def _subtree(self, module: nn.Module) -> tuple[frozenset[nn.Module], bool]:
        known = self._subtrees.get(module)
        if known is None:
            modules = frozenset(module.modules())
            hooks = any(m._forward_hooks or m._forward_pre_hooks for m in modules)
            known = self._subtrees[module] = modules, hooks
        return known

    def training_now(self) -> tuple[Any, ...] | None:
        """Return the training modes of all modules, in a member's turn, or None if they are the model's."""
        training = self._read_training()
        return None if training == self._training else training

    def training_modes(self, training: tuple[Any, ...] | None) -> dict[nn.Module, bool]:
        """Return the modules whose mode differs from the model's, with the mode."""
        if training is None:
            return {}
        pairs = zip(self._modules, training, self._training, strict=True)
        return {module: mode for module, mode, before in pairs if mode != before}

    def changed_modules(self) -> set[nn.Module]:
        """Return the modules of which the member whose turn it is has changed attributes, if these are kept apart."""
        if not self.isolate:
            return set()
        return {self._modules[i // (1 + len(_REGISTRIES))] for i in self._differences()}

    def wrote_weights(self, holding: Holding) -> bool:
        """Return whether a member, in its turn, has changed the weights that it holds."""
        return any(not torch.equal(data_of(p), copied) for p, (_, copied) in holding.weights.items())

    def changed(self) -> bool:
        """Return whether attributes of modules have changed, outside of a turn."""
        return bool(self._differences())

    def changed_in_place(self) -> bool:
        """Return whether buffers, parameters or containers were changed in place, outside of a turn."""
        with DisableTorchFunctionSubclass():
            written = any(p._version != version for p, version in zip(self._parameters, self._versions, strict=True))
        return written or self._state.differs_in_place()

    def materialize(self, parameter: nn.Parameter) -> None:
        """Have a parameter hold what it is for the member whose turn it is."""
        if self._turn is None or threading.get_ident() != self._thread:
            self.refuse()
            return
        index, holding = self._turn
        if parameter in holding.weights:
            return
        self.formed()
        name = self._names[parameter]
        with thread_modes.neutral():
            value = self.population.member_parameters(index, [name])[name]
            holding.weights[parameter] = value, value.clone()
        set_data(parameter, value)

    def leave_to_child(self) -> None:
        """In a forked process: be the model of the member whose turn it was, by itself."""
        self._thread = threading.get_ident()
        if self._turn is None:
            self._stop()
        else:
            # Weights are still formed when they are looked at: few processes do, and torch's threads are not here.
            self._interception.stop()

    def _differences(self) -> dict[int, dict[str, Any]]:
        """Return the dictionaries of modules that are not as they were, by their index."""
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
    """In a forked process: take no part in the turns."""
    for model in watchers():
        if isinstance(model, SharedModel):
            model.leave_to_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
