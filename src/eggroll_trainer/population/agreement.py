"""Compares two results of a model up to rounding.

A batched forward adds in another order than a forward of one member, so its results differ in their last digits. How
much this matters depends on the model: a threshold can turn a last digit into a whole step. So if results differ by
more than a tolerance, we also run the model with its weights changed by about as much as rounding does. The batched
result must lie in the range of these results. A batched forward with other weights is far outside of that range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_flatten

# Largest number of runs with changed weights. If rounding can cross a threshold, about half of the runs do.
_TRIES = 10


def precision(model: nn.Module, leaves: Sequence[Any]) -> float:
    """Return the machine epsilon of the coarsest dtype in which a call computes."""
    tensors = [*model.parameters(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    devices = {t.device.type for t in tensors} or {"cpu"}
    dtypes |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)
    if "cuda" in devices and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        # TF32 products use 10 bits of the mantissa.
        eps = max(eps, 2.0**-10)
    return eps


def disagreement(model: nn.Module, call: Callable[[], Any], result: Any, eps: float) -> str | None:
    """Describe how ``result`` differs from the result of ``call`` by more than rounding, or return None.

    Args:
        model: The model, with the weights that should have been used.
        call: Calls the model. If two calls differ, as with random numbers, nothing is compared.
        result: Result of the batched forward.
        eps: See :func:`precision`.
    """
    tolerance = (256 if eps < 1e-5 else 4) * eps
    expected = call()
    difference = _difference(result, expected, tolerance)
    if difference is None or _difference(expected, call(), 0.0) is not None:
        return None
    size = (16 if eps < 1e-5 else 2) * eps
    return None if _rounding_explains(model, call, result, expected, size, tolerance) else difference


def _rounding_explains(
    model: nn.Module, call: Callable[[], Any], result: Any, expected: Any, size: float, tolerance: float
) -> bool:
    """Return whether a result lies in the range of those for weights with random relative changes of ``size``."""
    # Other tensor classes, such as quantised weights, cannot be multiplied.
    parameters = [p for p in model.parameters() if p.is_floating_point() and type(p) in (Tensor, nn.Parameter)]
    held = [p.data for p in parameters]
    noise = _RepeatedNoise(sum(p.numel() for p in parameters))
    tried = [expected]
    try:
        for _ in range(_TRIES):
            for p, value in zip(parameters, held, strict=True):
                p.data = (value * (1 + size * noise.take(value.shape).to(value.device))).to(value.dtype)
            torch.clear_autocast_cache()
            tried.append(call())
            if _within(result, tried, tolerance):
                return True
        return False
    finally:
        for p, value in zip(parameters, held, strict=True):
            p.data = value
        torch.clear_autocast_cache()


class _RepeatedNoise:
    """A cheap source of normal numbers: up to a million, the same again and again, each time from another place.

    Args:
        size: How many different ones are enough.
    """

    def __init__(self, size: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)
        # A prime number at the most, so that equal rows of a large matrix do not get equal noise.
        self._numbers = torch.randn(min(size, 1_000_003), generator=self._generator, device="cpu")

    def take(self, shape: torch.Size) -> Tensor:
        """Return numbers of this shape."""
        size, period = shape.numel(), len(self._numbers)
        start = int(torch.randint(max(1, period), (), generator=self._generator, device="cpu"))
        repeated = self._numbers.expand((start + size) // max(1, period) + 1, period).reshape(-1)
        return repeated[start : start + size].view(shape)


def _difference(result: Any, expected: Any, tolerance: float) -> str | None:
    """Describe how two results differ beyond a tolerance, relative to a tensor's largest number, or return None."""
    (ours, our_spec), (theirs, their_spec) = tree_flatten(result), tree_flatten(expected)
    if our_spec != their_spec:
        return "it has another structure"
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"it is {a.dtype} of shape {list(a.shape)} instead of {b.dtype} of shape {list(b.shape)}"
            off, scale = _distance(a.detach(), b.detach())
            if off > tolerance * scale:
                return f"it is off by {off:.2g}, where its largest number is {scale:.2g}"
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or not (a is b or a == b):
            return f"it has {_shown(a)} in the place of {_shown(b)}"
    return None


def _distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the largest difference and the largest finite magnitude; the difference may be infinite."""
    if a.numel() == 0:
        return 0.0, 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return (0.0 if torch.equal(a, b) else float("inf")), 1.0
    if a.device == b.device:
        wide = torch.float32 if a.dtype.itemsize < 4 else a.dtype
        one, other = a.to(wide), b.to(wide)
        quick = (one - other).abs().max().item(), other.abs().max().item()
        if all(map(math.isfinite, quick)):
            return quick
    # Some numbers are not finite.
    kind = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to("cpu", kind), b.to("cpu", kind)
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, torch.zeros((), dtype=torch.float64, device="cpu"), (a - b).abs())
    finite = b[b.isfinite()].abs()
    return float(off.nan_to_num(float("inf")).max()), float(finite.max()) if len(finite) else 0.0


def _within(result: Any, tried: Sequence[Any], tolerance: float) -> bool:
    """Return whether every number of a result lies in the range of the tried results, up to a tolerance."""
    leaves, spec = tree_flatten(result)
    columns = [tree_flatten(one) for one in tried]
    if any(other != spec for _, other in columns):
        return False
    for i, a in enumerate(leaves):
        values = [other[i] for other, _ in columns]
        if not isinstance(a, Tensor):
            if not any(a == value for value in values):
                return False
            continue
        if any(not isinstance(value, Tensor) or value.shape != a.shape for value in values):
            return False
        if a.numel() == 0:
            continue
        stacked = torch.stack([value.detach().to("cpu", torch.float64) for value in values])
        wide = a.detach().to("cpu", torch.float64)
        finite = stacked[stacked.isfinite()].abs()
        slack = tolerance * (float(finite.max()) if len(finite) else 0.0)
        inside = (wide >= stacked.amin(0) - slack) & (wide <= stacked.amax(0) + slack)
        if not (inside | (wide.isnan() & stacked.isnan().any(0))).all():
            return False
    return True


def _shown(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]
