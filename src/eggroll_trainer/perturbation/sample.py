"""Perturbations of the members of a chunk, in factored form, and sums over them.

Member ``i`` uses draw ``i // reuse`` with the sign ``s = +1, -1, +1, …``. It differs from the centre by

- ``s·σ·A Bᵀ/√R`` in a matrix parameter, ``A [O, R]`` and ``B [I, R]`` of unit variance (the paper's equation 8);
- ``s·σ·ε`` in any other, ``ε ~ N(0, 1)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise.keys import LARGEST_NORMAL, Noise, NoiseKind, Stream
from .tensor import DenseParameter, PerturbedTensor


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """How one parameter is perturbed.

    Attributes:
        name: The parameter's name in its model; part of the noise's key.
        centre: The unperturbed parameter.
        sigma: Standard deviation of the perturbation.
        rank: Rank of the low-rank perturbation, or None for a full-rank one.
        kind: Distribution of the low-rank factors.
        fixed_rows: Indices in the first dimension that are not perturbed, such as an embedding's padding.
    """

    name: str
    centre: Tensor
    sigma: float
    rank: int | None = None
    kind: NoiseKind = "gaussian"
    fixed_rows: Sequence[int] = ()

    @property
    def numel(self) -> int:
        """Number of random numbers in one draw."""
        return self.centre.numel() if self.rank is None else self.rank * LowRankDraws.sides(self.centre.shape)

    @property
    def largest(self) -> float:
        """Upper bound of the magnitude of an entry of a perturbation."""
        if self.rank is None:
            return self.sigma * LARGEST_NORMAL
        return self.sigma * math.sqrt(self.rank) * (LARGEST_NORMAL**2 if self.kind == "gaussian" else 1.0)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """Return ``(O, I)`` of a matrix, ``(O, I·kh·kw)`` of a kernel, and None for parameters of fewer dimensions."""
    return (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else None


def effective_rank(shape: Sequence[int], rank: int | None) -> int | None:
    """Return the rank of the perturbation, or None if a full-rank perturbation takes no more numbers than factors."""
    matrix = matrix_shape(shape)
    if matrix is None or rank is None or rank * sum(matrix) >= math.prod(matrix):
        return None
    return rank


def _split(factors: Tensor, O: int) -> tuple[Tensor, Tensor]:
    """Return ``A [..., O]`` and ``B [..., I]`` of factors ``[..., O + I]``."""
    return factors[..., :O], factors[..., O:]


class SharedDraws(NamedTuple):
    """The draws of one parameter, with one entry for all members that share a draw.

    Attributes:
        noise: Factors ``[d, R, O + I]``, or full-rank values ``[d, *shape]``.
        scales: ``[reuse]``, the factor of the noise for each of the members that share a draw.
        rows: ``O``, or None for full-rank values.
    """

    noise: Tensor
    scales: Tensor
    rows: int | None

    def members(self) -> tuple[Tensor, Tensor] | Tensor:
        """Return the scaled ``A [n, O, R]`` and ``B [n, I, R]`` of all members, or scaled values ``[n, *shape]``."""
        scales = self.scales.view(-1, *[1] * (self.noise.ndim - 1))
        if self.rows is None:
            return (self.noise[:, None] * scales).flatten(0, 1)
        A, B = _split(self.noise, self.rows)
        B = B[:, None].expand(-1, len(self.scales), -1, -1).flatten(0, 1)
        return (A[:, None] * scales).flatten(0, 1).mT, B.mT


class LowRankDraws:
    """``d`` draws of the factors of one matrix.

    Args:
        factors: Unit-variance noise ``[d, R, O + I]``.
        spec: The parameter.
        signs: ``[reuse]``, the signs with which each draw is used.
    """

    def __init__(self, factors: Tensor, spec: ParameterSpec, signs: Tensor) -> None:
        self.factors, self.spec, self.signs = factors, spec, signs
        self.scale = spec.sigma / math.sqrt(factors.shape[1])

    @property
    def noise(self) -> Tensor:
        """The random numbers."""
        return self.factors

    def part(self, draws: slice) -> LowRankDraws:
        """Return some of the draws."""
        return LowRankDraws(self.factors[draws], self.spec, self.signs)

    @staticmethod
    def sides(shape: Sequence[int]) -> int:
        """Return ``O + I``, the number of random numbers in a draw of rank 1."""
        return shape[0] + math.prod(shape[1:])

    def shared(self) -> SharedDraws:
        """Return the factors in the parameter's dtype, with the scales of sign, sigma and rank."""
        factors = self.factors.to(self.spec.centre.dtype)
        return SharedDraws(factors, self.scale * self.signs.to(factors.dtype), self.spec.centre.shape[0])

    def dense(self, draw: int) -> Tensor:
        """Return the perturbation of a draw's first member as an array of the parameter's shape."""
        A, B = _split(self.factors[draw].to(wide_dtype(self.spec.centre)), self.spec.centre.shape[0])
        return (self.scale * A.mT @ B).view(self.spec.centre.shape)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return ``Σ_d c_d · perturbation_d`` as one product over all draws; ``coefficients [d]``."""
        wide = wide_dtype(self.spec.centre)
        A, B = _split(self.factors.to(wide).flatten(0, 1), self.spec.centre.shape[0])
        weights = (self.scale * coefficients).to(A).repeat_interleave(self.factors.shape[1])
        return (A.mT @ (weights[:, None] * B)).view(self.spec.centre.shape)

    def squares(self) -> Tensor:
        """Return the squared Euclidean length of each perturbation, ``[d]``: of ``A Bᵀ`` it is ``tr(AᵀA · BᵀB)``."""
        A, B = _split(self.factors.to(wide_dtype(self.spec.centre)), self.spec.centre.shape[0])
        return self.scale**2 * ((A @ A.mT) * (B @ B.mT)).sum((1, 2))


class FullRankDraws:
    """``d`` draws of a full-rank perturbation.

    Args:
        values: Unit-variance noise ``[d, *shape]``.
        spec: The parameter.
        signs: ``[reuse]``, the signs with which each draw is used.
    """

    def __init__(self, values: Tensor, spec: ParameterSpec, signs: Tensor) -> None:
        self.values, self.spec, self.signs = values, spec, signs

    @property
    def noise(self) -> Tensor:
        """The random numbers."""
        return self.values

    def part(self, draws: slice) -> FullRankDraws:
        """Return some of the draws."""
        return FullRankDraws(self.values[draws], self.spec, self.signs)

    def shared(self) -> SharedDraws:
        """Return the values, in float32 or wider, with the scales of sign and sigma."""
        values = self.values.to(wide_dtype(self.spec.centre))
        return SharedDraws(values, self.spec.sigma * self.signs.to(values.dtype), None)

    def dense(self, draw: int) -> Tensor:
        """Return the perturbation of a draw's first member as an array of the parameter's shape."""
        return self.spec.sigma * self.values[draw].to(wide_dtype(self.spec.centre))

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return ``Σ_d c_d · perturbation_d``; ``coefficients [d]``."""
        values = self.values.to(wide_dtype(self.spec.centre))
        return ((self.spec.sigma * coefficients).to(values) @ values.view(len(values), -1)).view(self.spec.centre.shape)

    def squares(self) -> Tensor:
        """Return the squared Euclidean length of each perturbation, ``[d]``."""
        values = self.values.to(wide_dtype(self.spec.centre)).reshape(len(self.values), -1)
        return self.spec.sigma**2 * torch.linalg.vector_norm(values, dim=1).square()


Draws = LowRankDraws | FullRankDraws


class Perturbations:
    """The perturbations of ``n`` consecutive members.

    Args:
        draws: For each perturbed parameter, its draws.
        signs: ``[reuse]``, the signs with which each draw is used.
        count: ``n``, a multiple of ``reuse``.
    """

    def __init__(self, draws: Mapping[str, Draws], signs: Tensor, count: int) -> None:
        self.draws, self.signs, self.count = draws, signs, count

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """Bytes of the draws."""
        return sum(draws.noise.nbytes for draws in self.draws.values())

    def part(self, first: int, count: int) -> Perturbations:
        """Return the perturbations of members ``first, …, first + count - 1``, which share no draw with others."""
        reuse = len(self.signs)
        draws = slice(first // reuse, (first + count) // reuse)
        return Perturbations({name: drawn.part(draws) for name, drawn in self.draws.items()}, self.signs, count)

    def members(self) -> dict[str, tuple[Tensor, Tensor] | Tensor]:
        """Return, for each parameter, ``(A [n, O, R], B [n, I, R])`` or the full-rank ``[n, *shape]``."""
        return {name: draws.shared().members() for name, draws in self.draws.items()}

    def dense(self, member: int) -> dict[str, Tensor]:
        """Return one member's perturbations as dense tensors, in float32 or wider."""
        draw, use = divmod(member, len(self.signs))
        return {name: draws.dense(draw) * float(self.signs[use]) for name, draws in self.draws.items()}

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """Return ``Σ_i w_i · perturbation_i`` of every parameter, in float32 or wider.

        Members that share a draw also share its product. With antithetic pairs, the sum is over ``n/2`` draws.

        Args:
            weights: ``[n]``.
        """
        coefficients = self._coefficients(weights)
        return {name: draws.combine(coefficients) for name, draws in self.draws.items()}

    def weighted_squares(self, weights: Tensor) -> dict[str, Tensor]:
        """Return ``Σ_d ‖c_d · perturbation_d‖²`` of every parameter, 0-d: the terms of :meth:`weighted_sum`, squared.

        Args:
            weights: ``[n]``.
        """
        coefficients = self._coefficients(weights).square()
        squares = {name: draws.squares() for name, draws in self.draws.items()}
        return {name: coefficients.to(square) @ square for name, square in squares.items()}

    def _coefficients(self, weights: Tensor) -> Tensor:
        """Return the weight ``c_d`` of each draw, ``[d]``."""
        return (weights.view(-1, len(self.signs)) * self.signs.to(weights)).sum(1)


def sample(
    noise: Noise, specs: Sequence[ParameterSpec], generation: int, first: int, count: int, reuse: int = 1
) -> Perturbations:
    """Return the perturbations of members ``first, …, first + count - 1``.

    Args:
        noise: The run's random streams.
        specs: The parameters to perturb.
        generation: Index of the generation.
        first: Index of the first member, a multiple of ``reuse``.
        count: Number of members, a multiple of ``reuse``.
        reuse: Number of members that share a draw, with alternating signs.
    """
    assert first % reuse == 0 and count % reuse == 0, "a noise draw never straddles two chunks"
    signs = torch.tensor([1.0, -1.0], device="cpu").repeat(reuse)[:reuse]
    streams = [
        Stream(spec.name, spec.numel, "gaussian" if spec.rank is None else spec.kind, spec.centre.device)
        for spec in specs
    ]
    draws: dict[str, Draws] = {}
    values = noise.draw(generation, first // reuse, count // reuse, streams)
    for spec, value in zip(specs, values, strict=True):
        shape, own_signs = spec.centre.shape, signs.to(spec.centre.device)
        if spec.rank is None:
            value = value.view(count // reuse, *shape)
            if spec.fixed_rows:
                value[:, list(spec.fixed_rows)] = 0
            draws[spec.name] = FullRankDraws(value, spec, own_signs)
        else:
            factors = value.view(-1, spec.rank, LowRankDraws.sides(shape))
            if spec.fixed_rows:
                # The first O entries are A. A row of A Bᵀ is zero if that row of A is.
                factors[..., list(spec.fixed_rows)] = 0
            draws[spec.name] = LowRankDraws(factors, spec, own_signs)
    return Perturbations(draws, signs, count)


def members_of(value: SharedDraws | tuple[Tensor, Tensor] | Tensor) -> tuple[Tensor, Tensor] | Tensor:
    """Return the perturbations of a parameter with a leading dimension of members."""
    return value.members() if isinstance(value, SharedDraws) else value


def perturb(centre: Tensor, member: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    """Return the parameter of one member: factored, or the dense sum for a full-rank perturbation."""
    if isinstance(member, tuple):
        return PerturbedTensor.wrap(centre, *member)
    wide = torch.promote_types(centre.dtype, member.dtype)
    return DenseParameter.wrap((centre.to(wide) + member).to(centre.dtype))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype for sums over a tensor: float32, or its own dtype if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
