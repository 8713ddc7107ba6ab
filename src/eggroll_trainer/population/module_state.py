"""The state of modules: swapping parameters, setting training modes, and restoring everything else."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import NormBase, is_functorch_wrapped_tensor, tree_leaves
from .._utils.interrupts import delayed_interrupt
from .._utils.memory import is_out_of_memory
from ..perturbation import DenseParameter, PerturbedTensor
from .snapshot import Snapshot, is_immutable


class NotBatchable(RuntimeError):
    """A call cannot be made for all members at once; the message says why.

    Attributes:
        stateful: Whether the reason is that the call changes the module.
    """

    def __init__(self, message: str, stateful: bool = False) -> None:
        super().__init__(message)
        self.stateful = stateful

    @classmethod
    def for_changes(cls, changed: Sequence[str]) -> NotBatchable:
        """Return the exception for a forward that has changed the model."""
        return cls(f"the model's forward changes {' and '.join(changed)}", stateful=True)

    def for_user(self) -> ValueError:
        """Return the error for a batched fitness function whose model changes in a call."""
        return ValueError(
            f"{self}: it would be lost between calls. Pass it in and return it, or write the fitness function for one"
            " model, without @batched."
        )


class ReturnsObject(NotBatchable):
    """A call returns an object, whose tensors have to be batched; see :mod:`.object_calls`."""


class Slot(NamedTuple):
    """A place ``container[key]`` that holds a parameter, or an immutable value with parameters in it.

    Attributes:
        container: A list or dictionary.
        key: Index or key.
        names: Names of the parameters.
        build: Takes the parameters' values by name, and returns the new value of the place.
    """

    container: Any
    key: Any
    names: tuple[str, ...]
    build: Callable[[Mapping[str, Any]], Any]


# Attributes that every module has, such as the dictionaries of its parameters, buffers, submodules and hooks.
_INTERNALS = frozenset(nn.Module().__dict__)

# Largest number of containers that are searched, so that we don't follow references to the whole program.
_LIMIT = 10_000


def parameter_slots(model: nn.Module, by_identity: Mapping[int, str]) -> list[Slot]:
    """Return every place in a model where one of some parameters is stored.

    A tied parameter has several. Attributes that hold a parameter are also included, such as the flat weights of
    ``nn.LSTM``, at any depth of lists, dictionaries, tuples and objects.

    Args:
        model: The model, which is searched with all its submodules.
        by_identity: Names of the parameters to search for, by their ``id``.
    """
    finder = _Finder(by_identity)
    for module in model.modules():
        finder.look_into(module._parameters)
        finder.look_into({key: value for key, value in module.__dict__.items() if key not in _INTERNALS}, module)
    return finder.slots


class _Finder:
    """Searches containers and objects for parameters."""

    def __init__(self, by_identity: Mapping[int, str]) -> None:
        self.by_identity = by_identity
        self.slots: list[Slot] = []
        self._seen: set[int] = set()

    def look_into(self, contents: Any, owner: Any = None) -> None:
        """Collect the places in a list or dictionary, or in the attributes ``contents`` of ``owner``."""
        if id(contents) in self._seen or len(self._seen) > _LIMIT:
            return
        container = contents
        if owner is not None:
            container = owner.__dict__
        self._seen.add(id(container))
        items = contents.items() if isinstance(contents, dict) else enumerate(contents)
        for key, value in list(items):
            found = self._found(value)
            if found is not None:
                self.slots.append(Slot(container, key, *found))

    def _found(self, value: Any) -> tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Any]] | None:
        """Return the names and the builder of a value that must be replaced. Search other values for places."""
        name = self.by_identity.get(id(value))
        if name is not None:
            return (name,), lambda values: values[name]
        if isinstance(value, weakref.ref):
            # nn.RNNBase compares these with its weights, and would flatten them again for cuDNN if they differ.
            name = self.by_identity.get(id(value()))
            return None if name is None else ((name,), lambda values: weakref.ref(values[name]))
        if isinstance(value, tuple):
            return self._in_tuple(value)
        if isinstance(value, (list, dict)):
            self.look_into(value)
        elif not isinstance(value, (nn.Module, Tensor, type)) and not is_immutable(value):
            attributes = getattr(value, "__dict__", None)
            if type(attributes) is dict and id(attributes) not in self._seen:
                self.look_into(attributes, value)
        return None

    def _in_tuple(self, value: tuple[Any, ...]) -> tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Any]] | None:
        parts = [self._found(part) for part in value]
        if all(part is None for part in parts):
            return None

        def build(values: Mapping[str, Any]) -> Any:
            new = [x if part is None else part[1](values) for x, part in zip(value, parts, strict=True)]
            return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)

        return tuple(name for part in parts if part is not None for name in part[0]), build


@contextlib.contextmanager
def swapped(slots: Sequence[Slot], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, replace the parameters by ``values``.

    Raises:
        NotBatchable: The block has replaced one of them; ``stateful`` is True.
    """
    originals = [container[key] for container, key, _, _ in slots]
    placed = [build(values) for _, _, _, build in slots]
    try:
        for (container, key, _, _), value in zip(slots, placed, strict=True):
            container[key] = value
        yield
        for (container, key, _, _), value in zip(slots, placed, strict=True):
            if isinstance(container, dict) and container.get(key) is not value:
                raise NotBatchable(f"the model's forward replaces its parameter {key}", stateful=True)
    finally:
        for (container, key, _, _), original in zip(slots, originals, strict=True):
            container[key] = original


@contextlib.contextmanager
def training_modes(module: nn.Module, modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Set training modes inside the block, and check that no layer would mix statistics of members.

    Raises:
        ValueError: A BatchNorm layer of ``module`` would update its running statistics.
    """
    before = {m: m.training for m in modes}
    try:
        for m, mode in modes.items():
            m.training = mode
        for name, m in module.named_modules():
            if isinstance(m, NormBase) and m.training and m.running_mean is not None:
                raise ValueError(
                    f"{type(m).__name__} {name!r} is in training mode and would update its running statistics from"
                    " perturbed members. Call model.eval() in the fitness function or before training, or set"
                    " track_running_stats=False."
                )
        yield
    finally:
        for m, mode in before.items():
            m.training = mode


@contextlib.contextmanager
def batching(module: nn.Module, modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Set up for a batched call of a module inside the block, and convert its errors.

    Raises:
        NotBatchable: The call failed.
        ValueError: A BatchNorm layer of ``module`` would update its running statistics.
    """
    # An interrupted vmap would leave its transform active, and its weights in the model.
    with delayed_interrupt(), training_modes(module, modes):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                # vmap warns about operations that it runs member by member. They are slow but correct.
                warnings.filterwarnings("ignore", "There is a performance drop")
                yield
        except NotBatchable:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise NotBatchable(f"{type(error).__name__}: {error}") from error


class ModuleState:
    """The state of a module and its submodules, except for the values of parameters."""

    def __init__(self, module: nn.Module) -> None:
        seen: set[int] = set()
        self._states = [_State(name, m, seen) for name, m in module.named_modules()]

    def differs(self) -> bool:
        """Return whether anything has changed."""
        return any(state.changed() for state in self._states)

    def differs_in_place(self) -> bool:
        """Return whether buffers, or objects that attributes refer to, have been changed in place."""
        return any(snapshot.changed() for state in self._states for snapshot in state.snapshots.values())

    def restore(self) -> list[str]:
        """Restore everything and return descriptions of what had changed."""
        return [text for state in self._states for text in state.restore()]

    def differs_by_member(self) -> bool:
        """Return whether a changed value differs, or may differ, between the members of a batched call."""
        return any(
            isinstance(value, (DenseParameter, PerturbedTensor))
            or (isinstance(value, Tensor) and is_functorch_wrapped_tensor(value))
            for state in self._states
            for value in state.new_values()
        )


class _State:
    """The state of one module, except for its parameters."""

    def __init__(self, name: str, module: nn.Module, seen: set[int]) -> None:
        self.module, self.name = module, name
        self.attributes = dict(module.__dict__)
        # Dictionaries that every module has and a forward may change.
        self.registered = {key: dict(self.attributes[key]) for key in ("_parameters", "_buffers", "_modules")}
        self.snapshots = {
            key: Snapshot(value, seen)
            for key, value in (*self.registered["_buffers"].items(), *self.attributes.items())
            if key not in _INTERNALS and not is_immutable(value)
        }

    def changed(self) -> set[str]:
        """Return the names of attributes, buffers and the like that have changed."""
        now = self.module.__dict__
        changed = _differing(now, self.attributes)
        for key, entries in self.registered.items():
            changed |= _differing(self.attributes[key], entries)
        return changed | {key for key, snapshot in self.snapshots.items() if snapshot.changed()}

    def new_values(self) -> Iterator[Any]:
        """Yield the leaves of all values that attributes and buffers have now but did not have before."""
        places = [(self.module.__dict__, self.attributes)]
        places += [(self.attributes[key], entries) for key, entries in self.registered.items()]
        for now, before in places:
            for key in _differing(now, before) & now.keys():
                yield from tree_leaves(now[key])

    def restore(self) -> list[str]:
        """Restore everything and return descriptions of what had changed."""
        changed = self.changed()
        if not changed:
            return []
        for place, entries in [
            (self.module.__dict__, self.attributes),
            *((self.attributes[key], entries) for key, entries in self.registered.items()),
        ]:
            if _differing(place, entries):
                place.clear()
                place.update(entries)
        for snapshot in self.snapshots.values():
            snapshot.restore()
        buffers = sorted(changed & self.registered["_buffers"].keys())
        # Training modes are restored too, but not reported.
        others = sorted(changed - self.registered["_buffers"].keys() - {"training"})
        at = f"{self.name}." if self.name else ""
        unsaved = self.module._non_persistent_buffers_set
        return [f"{'unsaved ' if name in unsaved else ''}buffer {at}{name}" for name in buffers] + (
            [f"{', '.join(others)} of {self.name or type(self.module).__name__}"] if others else []
        )


def _differing(now: Mapping[str, Any], before: Mapping[str, Any]) -> set[str]:
    # The mappings of TorchScript modules are not dictionaries.
    return {k for k, v in before.items() if k not in now or now[k] is not v} | (set(now.keys()) - before.keys())
