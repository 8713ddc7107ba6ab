"""What of a model a generation trains: parameters that are not frozen, without the rows that stand for padding."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

from torch import nn


def padding_rows(model: nn.Module) -> dict[int, list[int]]:
    """Return the rows of embeddings' ``padding_idx``, by the ``id`` of the weight, which other modules may share."""
    rows: dict[int, set[int]] = {}
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            # A parametrised weight is no parameter.
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
    """Put ``requires_grad`` back after the block, in which a fitness function may set it for its own purposes."""
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    try:
        yield
    finally:
        set_frozen(parameters, frozen)
