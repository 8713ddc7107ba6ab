"""Perturbed parameters: tensor subclasses that take the place of a weight while the model runs for one member.

``PerturbedTensor`` represents ``W + A Bᵀ`` without forming it. Operations with a rule, in the folder ``rules``, use the
factors. Every other operation gets the dense sum. So any use of a parameter sees its perturbation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch import DisableTorchFunctionSubclass, tree_map
from . import batching

Rule = Callable[..., Any]

# Operation → its implementation for perturbed parameters. A rule returns NotImplemented for arguments that it does not
# cover; then the dense form is used.
RULES: dict[Any, Rule] = {}
# The rules that also replace the operation on plain tensors, as torch.vmap has no batching rule for it, or a slow one.
ALWAYS: dict[Any, Rule] = {}


def rule(*functions: Any, always: bool = False) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of ``functions``; with ``always``, for plain tensors too."""

    def register(implementation: Rule) -> Rule:
        for function in functions:
            RULES[function] = implementation
            if always:
                ALWAYS[function] = implementation
        return implementation

    return register


class PerturbedTensor(torch.Tensor):
    """The weight ``W + A Bᵀ`` of one member, in factored form.

    Attributes:
        centre: The unperturbed weight ``W``, of any shape ``[O, …]``; a kernel counts as the matrix ``[O, I]``.
        A: ``[O, R]``, scaled by sign, sigma and rank.
        B: ``[I, R]``.
    """

    centre: Tensor
    A: Tensor
    B: Tensor
    _dense: Tensor | None
    # Makes isinstance(…, nn.Parameter) true.
    _is_param = True

    @staticmethod
    def wrap(centre: Tensor, A: Tensor, B: Tensor) -> PerturbedTensor:
        """Return ``centre + A Bᵀ`` in factored form."""
        # The tensor's own storage is a single NaN. Code that bypasses __torch_function__ then computes NaN, instead of
        # using the unperturbed weight unnoticed.
        hollow = torch.full((), float("nan"), dtype=centre.dtype, device=centre.device).expand(centre.shape)
        tensor = hollow.as_subclass(PerturbedTensor)
        tensor.centre, tensor.A, tensor.B, tensor._dense = centre, A, B, None
        return tensor

    def dense(self) -> Tensor:
        """Return the sum ``W + A Bᵀ`` as an ordinary tensor of ``W``'s shape and dtype."""
        if self._dense is None:
            self._dense = dense_sum(self.centre, self.A, self.B)
        return self._dense

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _REQUIRES_GRAD:
            return True
        if func in METADATA:
            return func(args[0].centre, *args[1:], **kwargs)
        if func in _OWN_ATTRIBUTES:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        implementation = RULES.get(func)
        if implementation is not None:
            args, kwargs = _plain(args), _plain(kwargs)
            result = implementation(*args, **kwargs)
            if result is not NotImplemented:
                return result
        # Compiled code has run eagerly before, so it was checked then. Names of functions cannot be traced.
        if not torch.compiler.is_compiling() and _writes_into_perturbed(func, args, kwargs):
            raise RuntimeError(
                f"the model changes a perturbed parameter in place ({getattr(func, '__name__', func)}); the change"
                " would be lost after this member. Compute a new tensor instead."
            )
        return func(*tree_map(densify, args), **tree_map(densify, kwargs))


class DenseParameter(torch.Tensor):
    """A dense parameter of one member, for perturbations without factors, such as that of a bias.

    It is an ordinary tensor, except that ``isinstance(…, nn.Parameter)`` and ``requires_grad`` are True. Tensors under
    ``torch.vmap`` have neither.
    """

    _is_param = True
    _value: Tensor

    @staticmethod
    def wrap(value: Tensor) -> DenseParameter:
        """Return the parameter with the values of an ordinary tensor."""
        tensor = value.as_subclass(DenseParameter)
        tensor._value = value
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _REQUIRES_GRAD:
            return True
        if func in _OWN_ATTRIBUTES:
            with DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_plain(args), **_plain(kwargs or {}))


def _ordinary(value: Any) -> Any:
    return value._value if type(value) is DenseParameter else value


def _plain(values: Any) -> Any:
    """Return arguments with ordinary tensors in place of dense parameters."""
    return tree_map(_ordinary, values)


def densify(value: Any) -> Any:
    """Return the dense form of a perturbed tensor, and anything else as it is."""
    return value.dense() if isinstance(value, PerturbedTensor) else _ordinary(value)


def dense_sum(centre: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return ``centre + A Bᵀ`` in ``centre``'s shape and dtype, added in float32 or wider."""
    wide = torch.promote_types(centre.dtype, torch.float32)
    # Autocast would compute the product in low precision.
    with torch.autocast(centre.device.type, enabled=False):
        return (centre.to(wide) + (A.to(wide) @ B.to(wide).mT).reshape(centre.shape)).to(centre.dtype)


def autocast_like_linear(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in the dtype to which autocast, if it is on, casts the inputs of a linear layer."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class BatchingRules(TorchFunctionMode):
    """Inside the block, our rules compute the operations that torch.vmap cannot batch well.

    Args:
        factory_copies: Number of members, to give each member its own copy of tensors that the model makes, such as by
            ``torch.zeros``. The model can then write different values into them. If None, members share these tensors,
            which is cheaper.
    """

    def __init__(self, factory_copies: int | None = None) -> None:
        super().__init__()
        self._factory_copies = factory_copies

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        implementation = ALWAYS.get(func)
        if implementation is not None:
            args, kwargs = _plain(args), _plain(kwargs)
            result = implementation(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if self._factory_copies is not None and func in _FACTORIES:
            return batching.copy_per_member(func(*args, **kwargs), self._factory_copies)
        return func(*args, **kwargs)


def _writes_into_perturbed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if isinstance(kwargs.get("out"), PerturbedTensor):
        return True
    name = getattr(func, "__name__", "")
    in_place = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return in_place and bool(args) and isinstance(args[0], PerturbedTensor)


def _getters(*names: str) -> set[Any]:
    # Not every release of torch has all of these attributes.
    return {getattr(torch.Tensor, name).__get__ for name in names if hasattr(torch.Tensor, name)}


# These have the same result for the centre and for the sum.
METADATA = _getters(
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu",
    "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_leaf", "itemsize", "nbytes", "names", "grad_fn", "grad",
) | {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel, torch.Tensor.nelement,
    torch.Tensor.stride, torch.Tensor.is_contiguous, torch.Tensor.is_floating_point, torch.Tensor.is_complex,
    torch.Tensor.element_size, torch.Tensor.get_device, torch.Tensor.__len__, torch.Tensor.storage_offset,
    torch.Tensor.is_inference, torch.Tensor.is_signed, torch.numel, torch.is_floating_point, torch.is_complex,
    torch.is_tensor, torch.is_inference, torch.is_same_size,
}  # fmt: skip
# Functions that make a tensor from sizes.
_FACTORIES: set[Any] = {
    torch.zeros, torch.ones, torch.full, torch.empty, torch.zeros_like, torch.ones_like, torch.full_like,
    torch.empty_like, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full, torch.Tensor.new_empty,
}  # fmt: skip
_OWN_ATTRIBUTES: set[Any] = {torch.Tensor.__hash__}
_REQUIRES_GRAD: Any = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
