"""What a module holds besides its weights: swapping parameters in, training modes, and guarding the rest."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .snapshot import Snapshot, is_immutable


class NotBatchable(RuntimeError):
    """A call that cannot be made for all members at once; the message says why.

    Attributes:
        stateful: Whether the reason is that the call changes the module.
    """

    def __init__(self, message: str, stateful: bool = False) -> None:
        super().__init__(message)
        self.stateful = stateful


Slot = tuple[Any, Any, str]

# The attributes that every module has, among them the dictionaries of its parameters, buffers, submodules and hooks.
_INTERNALS = frozenset(nn.Module().__dict__)


def parameter_slots(model: nn.Module, by_identity: Mapping[int, str]) -> list[Slot]:
    """Return every place ``container[key]`` where a module keeps a parameter of interest, with the parameter's name.

    A tied parameter has several.

    Args:
        model: Looked at with all modules below it.
        by_identity: Names of the parameters of interest by their ``id``.
    """
    slots: list[Slot] = []
    for module in model.modules():
        # Besides the parameters proper: attributes and lists that hold one as well, as nn.LSTM's flat weights do.
        containers = [module._parameters, module.__dict__, *parameter_lists(module)]
        for container in containers:
            items = container.items() if isinstance(container, dict) else enumerate(container)
            slots += [(container, key, by_identity[id(value)]) for key, value in items if id(value) in by_identity]
        # By these nn.RNNBase notices that its weights have changed, and would flatten them anew for cuDNN.
        references = getattr(module, "_flat_weight_refs", [])
        slots += [
            (references, i, by_identity[id(reference())])
            for i, reference in enumerate(references)
            if reference is not None and id(reference()) in by_identity
        ]
    return slots


def parameter_lists(module: nn.Module) -> list[Any]:
    """Return the lists and dictionaries among a module's attributes that hold parameters."""
    return [
        container
        for key, container in module.__dict__.items()
        if type(container) in (list, dict) and key not in _INTERNALS
        for values in [container.values() if isinstance(container, dict) else container]
        if any(isinstance(value, nn.Parameter) for value in values)
    ]


@contextlib.contextmanager
def swapped(slots: Sequence[Slot], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put ``values`` in the place of the parameters inside the block.

    Raises:
        NotBatchable: The block replaced one of them; ``stateful`` is true.
    """
    originals = [container[key] for container, key, _ in slots]
    try:
        for container, key, name in slots:
            container[key] = weakref.ref(values[name]) if isinstance(container[key], weakref.ref) else values[name]
        yield
        for container, key, name in slots:
            if isinstance(container, dict) and container.get(key) is not values[name]:
                raise NotBatchable(f"the model's forward replaces its parameter {key}", stateful=True)
    finally:
        for (container, key, _), original in zip(slots, originals, strict=True):
            container[key] = original


@contextlib.contextmanager
def training_modes(module: nn.Module, modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Set training modes inside the block, and refuse those that would mix the members' statistics.

    Raises:
        ValueError: A BatchNorm layer of ``module`` would update its running statistics.
    """
    before = {m: m.training for m in modes}
    try:
        for m, mode in modes.items():
            m.training = mode
        for name, m in module.named_modules():
            if isinstance(m, _NormBase) and m.training and m.running_mean is not None:
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
def unchanged_state(module: nn.Module) -> Iterator[None]:
    """Put back whatever a call changes in the module besides its result, and say so.

    Raises:
        NotBatchable: Attributes, buffers or submodules were changed; ``stateful`` is true.
    """
    seen: set[int] = set()
    before = [_State(name, m, seen) for name, m in module.named_modules()]
    changed: list[str] = []
    try:
        yield
    finally:
        for state in before:
            changed += state.restore()
    if changed:
        raise NotBatchable(f"the model's forward changes {' and '.join(changed)}", stateful=True)


class _State:
    """What one module holds besides its parameters."""

    def __init__(self, name: str, module: nn.Module, seen: set[int]) -> None:
        self.module, self.name = module, name
        self.attributes = dict(module.__dict__)
        # Of the attributes that every module has, these may change in a forward.
        self.registered = {key: dict(self.attributes[key]) for key in ("_parameters", "_buffers", "_modules")}
        self.snapshots = {
            key: Snapshot(value, seen)
            for key, value in (*self.registered["_buffers"].items(), *self.attributes.items())
            if key not in _INTERNALS and not is_immutable(value)
        }

    def restore(self) -> list[str]:
        """Put everything back and return what differed."""
        missing = object()
        now = self.module.__dict__
        changed = {k for k, v in self.attributes.items() if now.get(k, missing) is not v}
        changed |= now.keys() - self.attributes.keys()
        if changed:
            now.clear()
            now.update(self.attributes)
        for key, entries in self.registered.items():
            container = self.attributes[key]
            differing = {k for k, v in entries.items() if container.get(k, missing) is not v}
            differing |= container.keys() - entries.keys()
            if differing:
                container.clear()
                container.update(entries)
                changed |= differing
        for key, snapshot in self.snapshots.items():
            if snapshot.changed():
                snapshot.restore()
                changed.add(key)
        buffers = sorted(changed & self.registered["_buffers"].keys())
        others = sorted(changed - self.registered["_buffers"].keys())
        at = f"{self.name}." if self.name else ""
        return [f"buffer {at}{name}" for name in buffers] + (
            [f"{', '.join(others)} of {self.name or type(self.module).__name__}"] if others else []
        )
