"""Quantised base models: quantised layers are not trained, and are called once for the rows of all members.

The trained parameters are in PEFT adapters on top: ``base(x) + (x Aᵀ) Bᵀ``. ``A`` and ``B`` are in floating point, and
perturbed like any other parameter. The quantised product has no perturbed operand, so one call serves all members.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import peek_interpreter_stack
from ..perturbation.batching import apply


def batch_quantised_layers(model: nn.Module, layers: Iterable[nn.Module] | None = None) -> list[str]:
    """Let each quantised layer of a model be called once for all members of a population.

    Quantised products are written for one batch of rows. Under ``torch.vmap``, which runs a population, some fail, so
    that members run one after the other (bitsandbytes in 8 bits). Others run in a loop (in 4 bits). After this call, a
    layer gets the rows of all members in one batch, ``[N·B, I]``. Call it before or after ``peft.get_peft_model``, once
    the weights are on their device. It replaces the class of each layer by a subclass.

    Args:
        model: The model.
        layers: The layers, which map rows ``[..., I]`` to rows ``[..., O]``. If None, all layers with a parameter of
            another tensor class, such as those of torchao and bitsandbytes.

    Returns:
        The names of the layers.

    Raises:
        TypeError: An entry of ``layers`` is not a module.
        ValueError: There are none, or the result of a row depends on other rows in the batch, for example because
            inputs are quantised with one scale for the whole batch. Members would then depend on each other.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> batch_quantised_layers(model, layers=[model[0]])  # as if this one were quantised
        ['0']
    """
    names = {id(module): name for name, module in model.named_modules()}
    if layers is None:
        layers = [m for m in model.modules() if any(map(is_quantised, m.parameters(recurse=False)))]
    chosen = list(layers)
    if not chosen:
        raise ValueError(
            "the model has no quantised layers: no parameter has a tensor class of its own. Pass layers= if the layers"
            " store their weights in another way"
        )
    for layer in chosen:
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layers must be modules, got {type(layer).__name__}")
    for layer in chosen:
        _check_rows(layer, names.get(id(layer), type(layer).__name__))
    for layer in chosen:
        if not isinstance(layer, _RowsTogether):
            cls: Any = type(layer)
            layer.__class__ = _subclass(cls)
    return [names.get(id(layer), type(layer).__name__) for layer in chosen]


def is_quantised(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has another tensor class than ``nn.Parameter``, as quantised weights have."""
    return type(parameter) is not nn.Parameter


class _RowsTogether(nn.Module):
    """A mixin in front of a layer's class, which calls the layer's forward once for all members under a vmap."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward = functools.partial(super().forward, *args, **kwargs) if args or kwargs else super().forward
        return forward(x) if torch.compiler.is_compiling() else _once(x, forward)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles cannot import the subclass, as it is created at run time.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_rebuilt, (type(self).__mro__[2],), *reduced[2:])


class _Once(torch.autograd.Function):
    """A function of rows ``[B, I]``, with a batching rule that makes one call for the rows of all members."""

    @staticmethod
    def forward(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing, as evolution strategies don't differentiate."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        rows = x.movedim(in_dims[0], 0)
        out = _once(rows.reshape(-1, rows.shape[-1]), function)
        return out.reshape(*rows.shape[:-1], out.shape[-1]), 0


def _once(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    # Outside of transforms, call the layer directly, which keeps its gradients.
    result: Tensor = function(x) if peek_interpreter_stack() is None else apply(_Once, x, function)
    return result


@functools.cache
def _subclass(cls: Any) -> Any:
    return type(cls.__name__, (_RowsTogether, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _rebuilt(cls: Any) -> nn.Module:
    """Return an empty layer, to which a copy or pickle then adds its state."""
    subclass = _subclass(cls)
    layer: nn.Module = subclass.__new__(subclass)
    return layer


@torch.no_grad()
def _check_rows(layer: nn.Module, name: str) -> None:
    """Raise ``ValueError`` if the result of a row changes when another row in the batch is a hundred times as large."""
    size = getattr(layer, "in_features", None)
    if not isinstance(size, int):
        raise ValueError(f"{name} ({type(layer).__name__}) is not a linear layer: it has no attribute in_features")
    weight = next(iter([*layer.parameters(), *layer.buffers()]))
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(3, size, generator=generator, device="cpu").to(weight.device, dtype)
    beside = torch.cat([100 * rows[:1], rows[1:]])
    training = layer.training
    try:
        # In evaluation mode: some libraries convert weights to their final form in the first such call.
        layer.eval()
        alone, together = (layer(x).double() for x in (rows[1:], beside))
    finally:
        layer.train(training)
    difference = torch.linalg.vector_norm(together[1:] - alone) / torch.linalg.vector_norm(alone)
    # Tolerance for rounding with another number of rows. One scale for all rows makes differences near 1.
    if not difference <= max(1e-4, torch.finfo(dtype).eps / 4):
        raise ValueError(
            f"{name} ({type(layer).__name__}) computes a row differently if other rows in the batch change (by"
            f" {difference.item():.1%}): members in one batch would depend on each other. Quantise only weights, or"
            " quantise inputs by row"
        )
