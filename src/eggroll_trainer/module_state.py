"""What a module holds besides its weights: swapping parameters in, training modes, and guarding the rest."""

from __future__ import annotations

import collections
import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class NotBatchable(RuntimeError):
    """A call that cannot be made for all members at once; the message says why.

    Attributes:
        stateful: Whether the reason is that the call changes the module.
    """

    def __init__(self, message: str, stateful: bool = False) -> None:
        super().__init__(message)
        self.stateful = stateful


Slot = tuple[Any, Any, str]

_CONTAINERS = (list, dict, set, collections.deque)
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
    """Put ``values`` in the place of the parameters inside the block."""
    originals = [container[key] for container, key, _ in slots]
    try:
        for container, key, name in slots:
            container[key] = weakref.ref(values[name]) if isinstance(container[key], weakref.ref) else values[name]
        yield
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


# Modules of which one call has been seen to leave the buffers as they were: theirs are no longer copied before a call.
_keeps_buffers: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextlib.contextmanager
def unchanged_state(module: nn.Module) -> Iterator[None]:
    """Put back whatever a call changes in the module besides its result, and say so.

    Raises:
        NotBatchable: Attributes or buffers were changed; ``stateful`` is true.
    """
    before = [(name, m, dict(m.__dict__), _contents(m)) for name, m in module.named_modules()]
    buffers = list(module.named_buffers())
    trusted = module in _keeps_buffers
    versions = [_version(buffer) for _, buffer in buffers]
    saved = [None if trusted else buffer.clone() for _, buffer in buffers]
    changed: list[str] = []
    try:
        yield
    finally:
        for name, m, attributes, contents in before:
            keys = _restore(m, attributes, contents)
            if keys:
                changed.append(f"{', '.join(keys)} of {name or type(m).__name__}")
        for (name, buffer), version, value in zip(buffers, versions, saved, strict=True):
            if _version(buffer) != version:
                changed.append(f"buffer {name}")
                if value is not None:
                    with torch.no_grad():
                        buffer.copy_(value)
    if changed:
        _keeps_buffers.discard(module)
        raise NotBatchable(f"the model's forward changes {' and '.join(changed)}", stateful=True)
    _keeps_buffers.add(module)


def _restore(module: nn.Module, attributes: dict[str, Any], contents: dict[str, list[Any]]) -> list[str]:
    """Set a module's attributes and the containers among them back, and return the names of those that differed."""
    missing = object()
    now = module.__dict__
    keys = {k for k in attributes.keys() | now.keys() if attributes.get(k, missing) is not now.get(k, missing)}
    if keys:
        now.clear()
        now.update(attributes)
    for k, items in contents.items():
        container = attributes[k]
        present = _items(container)
        if len(present) != len(items) or any(a is not b for a, b in zip(present, items, strict=True)):
            keys.add(k)
            container.clear()
            if isinstance(container, dict):
                container.update(zip(items[::2], items[1::2], strict=True))
            elif isinstance(container, set):
                container.update(items)
            else:
                container.extend(items)
    return sorted(keys)


def own_containers(module: nn.Module) -> dict[str, Any]:
    """Return the built-in containers among the attributes that the module's author gave it."""
    return {k: v for k, v in module.__dict__.items() if type(v) in _CONTAINERS and k not in _INTERNALS}


def _contents(module: nn.Module) -> dict[str, list[Any]]:
    return {k: _items(v) for k, v in own_containers(module).items()}


def _items(container: Any) -> list[Any]:
    return [x for pair in container.items() for x in pair] if isinstance(container, dict) else list(container)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
