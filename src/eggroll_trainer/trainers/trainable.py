"""Which parameters of a model are trained: those that are not frozen, without the padding rows of embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .._utils import validation
from ..distributed import local_device


def parameter_groups(
    params: Iterable[Any] | None, model: nn.Module, defaults: Mapping[str, Any], device: torch.device | str | None
) -> list[dict[str, Any]]:
    """Move a model to a device, and return its parameter groups with their options checked.

    Args:
        params: Parameters or groups, as a trainer takes them; all parameters of the model if None.
        model: The model.
        defaults: Options for groups that do not set them, including ``lr``, ``sigma`` and ``anchor_decay``.
        device: Where to move the model; it stays where it is if None.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An option is out of range, or the parameters are not the model's.
    """
    groups = validation.parameter_groups(params, model)
    for group in groups:
        validation.check_options(group, defaults)
        group["lr"] = validation.check_real("learning_rate", group.get("lr", defaults["lr"]), positive=False)
        group["sigma"] = validation.check_real("sigma", group.get("sigma", defaults["sigma"]), positive=True)
        decay = group.get("anchor_decay", defaults["anchor_decay"])
        group["anchor_decay"] = validation.check_anchor_decay(decay, group["lr"])
    if device is not None:
        model.to(local_device(validation.check_device(device)))
        # Between some device types, ``Module.to`` replaces parameters instead of moving them.
        moved = dict(model.named_parameters(remove_duplicate=False))
        for group in groups:
            group["params"] = [moved[name] for name in group["names"]]
    return groups


def padding_rows(model: nn.Module) -> dict[int, list[int]]:
    """Return the ``padding_idx`` rows of embeddings by the ``id`` of the weight, which modules may share."""
    rows: dict[int, set[int]] = {}
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            # A weight with a parametrization is not a parameter.
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            rows.setdefault(id(weight), set()).add(module.padding_idx)
    return {key: sorted(values) for key, values in rows.items()}


def set_frozen(parameters: Mapping[str, nn.Parameter], frozen: Collection[str]) -> None:
    """Set ``requires_grad`` of every parameter: False for those named in ``frozen``."""
    names = set(frozen)
    for name, parameter in parameters.items():
        if parameter.requires_grad == (name in names):
            parameter.requires_grad_(name not in names)


@contextlib.contextmanager
def kept_frozen(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Restore ``requires_grad`` after the block, in which a fitness function may change it."""
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    try:
        yield
    finally:
        set_frozen(parameters, frozen)
