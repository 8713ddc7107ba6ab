"""Sums that do not depend on the order of their terms."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..perturbation.sample import wide_dtype

# An int64 has 63 bits besides its sign. One is a reserve for the rounding of the terms.
_BITS = 62


class ExactSum:
    """A sum of tensors for each parameter, bitwise the same for any order of the terms and any split among processes.

    Terms are rounded to integer multiples of ``2⁻ᵉ`` and added in int64, where addition is associative. ``e`` is the
    largest exponent with which ``bound·2ᵉ ≤ 2⁶²``, so that no partial sum overflows.

    Args:
        like: For each name, a tensor of the shape and dtype of the sum.
        bounds: For each name, an upper bound of the sum of the terms' magnitudes, in every entry.

    Attributes:
        totals: The integer sums. Those of several processes may be added.

    Raises:
        ValueError: A bound is larger than the largest number of the sum's dtype, or NaN.

    Example:
        >>> total = ExactSum({"w": torch.zeros(1, dtype=torch.float64)}, {"w": 3.0})
        >>> for value in (1.0, 2.0**-40, -1.0):
        ...     total.add({"w": torch.tensor([value], dtype=torch.float64)})
        >>> total.values()["w"].item() == 2.0**-40
        True
    """

    def __init__(self, like: Mapping[str, Tensor], bounds: Mapping[str, float]) -> None:
        self._like = like
        self._exponents = {name: _exponent(bounds[name], wide_dtype(x)) for name, x in like.items()}
        self.totals = {name: torch.zeros_like(_with_float64(x), dtype=torch.int64) for name, x in like.items()}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add a term to each sum."""
        for name, term in terms.items():
            # A power of two scales a float without rounding it.
            scaled = _with_float64(term).double().mul_(2.0 ** self._exponents[name])
            self.totals[name] += scaled.round_().to(torch.int64)

    def values(self) -> dict[str, Tensor]:
        """Return the sums, in float32 or wider."""
        return {
            name: (total.double() * 2.0 ** -self._exponents[name]).to(wide_dtype(self._like[name]))
            for name, total in self.totals.items()
        }


def _exponent(bound: float, dtype: torch.dtype) -> int:
    if not bound <= torch.finfo(dtype).max:
        raise ValueError(f"a sum with bound {bound} may overflow in {dtype}")
    # The largest power of two in float64 is 2**1023.
    return min(1000, _BITS - math.frexp(bound)[1]) if bound > 0 else 0


def _with_float64(tensor: Tensor) -> Tensor:
    return tensor.cpu() if tensor.device.type == "mps" else tensor
