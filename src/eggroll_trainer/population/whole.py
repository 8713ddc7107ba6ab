"""All members of a generation, made in chunks when they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_flatten, tree_unflatten
from ..perturbation.sample import LowRankDraws, Perturbations
from .arguments import dims_of
from .population import Population


class WholePopulation(Population):
    """All ``N`` members of a generation. Perturbations are drawn when they are needed.

    :meth:`~eggroll_trainer.ESTrainer.ask` returns it. It is a :class:`~eggroll_trainer.Population` that is called chunk
    by chunk.

    Args:
        model: The centre.
        make: Takes the first member and a number of members, and returns their population.
        chunks: First member and size of each chunk, in order.
        unit: Number of members that share a draw. They are drawn together.

    Attributes:
        names: Names of the perturbed parameters.

    Example:
        >>> import eggroll_trainer
        >>> trainer = eggroll_trainer.EGGROLLTrainer(
        ...     model=nn.Linear(3, 2), fitness_fn=lambda model: 0.0, population_size=8, seed=0
        ... )
        >>> population = trainer.ask()
        >>> population(torch.ones(5, 3)).shape  # all members
        torch.Size([8, 5, 2])
        >>> population.member(3)(torch.ones(5, 3)).shape  # one, as a module
        torch.Size([5, 2])
    """

    def __init__(
        self, model: nn.Module, make: Callable[[int, int], Population], chunks: Sequence[tuple[int, int]], unit: int
    ) -> None:
        self.model = model
        self._make, self._chunks, self._unit = make, list(chunks), unit
        self._size = sum(size for _, size in chunks)
        self.first = 0
        one = make(0, min(unit, self._size))
        self.generation, self.seed = one.generation, one.seed
        self.names = tuple(one.perturbations.draws)

    def __len__(self) -> int:
        """Return the number of members, ``N``."""
        return self._size

    def __reduce__(self) -> Any:
        """Refuse to be pickled, as the members are drawn by the trainer."""
        raise TypeError(
            "the population of a whole generation cannot be pickled, as its trainer draws the members: send its"
            " chunks(), or population.member(i)"
        )

    def chunks(self) -> Iterator[Population]:
        """Yield the chunks that a trainer evaluates, each as a population.

        Example:
            >>> import eggroll_trainer
            >>> trainer = eggroll_trainer.EGGROLLTrainer(
            ...     model=nn.Linear(3, 1), fitness_fn=lambda model: 0.0, population_size=8, chunk_size=4, seed=0
            ... )
            >>> [list(chunk.members) for chunk in trainer.ask().chunks()]
            [[0, 1, 2, 3], [4, 5, 6, 7]]
        """
        for first, size in self._chunks:
            yield self._make(first, size)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call every member with the same arguments; see :class:`~eggroll_trainer.Population`."""
        return _joined([chunk(*args, **kwargs) for chunk in self._prepared()])

    def each(self, *args: Any, in_dims: int | Sequence[int | None] = 0, **kwargs: Any) -> Any:
        """Call every member with its own arguments; see :meth:`~eggroll_trainer.Population.each`."""
        dims = dims_of(args, kwargs, in_dims, len(self))
        leaves, spec = tree_flatten((args, kwargs))
        results = []
        for chunk in self._prepared():
            chunk_leaves = [
                leaf if dim is None else leaf.narrow(dim, chunk.first, len(chunk))
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            chunk_args, chunk_kwargs = tree_unflatten(chunk_leaves, spec)
            results.append(chunk._call(chunk_args, chunk_kwargs, dims))
        return _joined(results)

    def train(self, mode: bool = True) -> Population:
        """Run the members in training mode (or evaluation mode, if False), and return ``self``.

        The mode of the model itself does not matter, and does not change.
        """
        self._mode = mode
        return self

    def member(self, index: int) -> nn.Module:
        """Return a dense copy of one member: an ordinary module that shares nothing with the model.

        Raises:
            IndexError: ``index`` is not below ``len(population)``.
        """
        population, position = self._of(index)
        return population.member(position)

    def member_parameters(self, index: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the perturbed parameters of one member as dense tensors; only those in ``names`` if given."""
        population, position = self._of(index)
        return population.member_parameters(position, names)

    def lora(self, index: int) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Return one member as low-rank adapters ``{name: (A, B, scale)}``, for weights ``W + scale·A Bᵀ``.

        ``A`` is ``[O, R]`` and ``B`` is ``[I, R]``, where a kernel counts as the matrix ``[O, I·kh·kw]``. ``scale``
        contains the sign, sigma and ``1/√R``. Parameters that are perturbed at full rank, such as biases, are not
        included: get them from :meth:`member_parameters`, or train with ``freeze_nonlora=True``.

        Raises:
            IndexError: ``index`` is not below ``len(population)``.
        """
        population, position = self._of(index)
        return adapters(population.perturbations, position)

    @contextlib.contextmanager
    def holding(self, index: int) -> Iterator[list[str]]:
        """Inside the block, put one member's weights into the user's own model."""
        population, position = self._of(index)
        with population.holding(position) as changed:
            yield changed

    def repeated(self) -> Any:
        """Refuse: calls are repeated in a chunk.

        Raises:
            TypeError: Always.
        """
        raise TypeError("use repeated() of a chunk: for chunk in population.chunks(): …")

    def folded(self, rows: int, *, key: Sequence[int | str] | None = None) -> Any:
        """Refuse: a chunk's rows are folded, not those of the whole population.

        Raises:
            TypeError: Always.
        """
        raise TypeError("use folded() of a chunk: for chunk in population.chunks(): …")

    _mode: bool | None = None

    def _prepared(self) -> Iterator[Population]:
        for chunk in self.chunks():
            yield chunk if self._mode is None else chunk.train(self._mode)
            chunk.close()

    def _of(self, index: int) -> tuple[Population, int]:
        """Return a small population that contains a member, and its index there."""
        if not 0 <= index < self._size:
            raise IndexError(f"member {index} of a population of {self._size}")
        first = index // self._unit * self._unit
        population = self._make(first, min(self._unit, self._size - first))
        return (population if self._mode is None else population.train(self._mode)), index - first


def adapters(perturbations: Perturbations, member: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return the low-rank perturbations of one member as ``{name: (A [O, R], B [I, R], scale)}``."""
    draw, use = divmod(member, len(perturbations.signs))
    sign = float(perturbations.signs[use])
    found = {}
    for name, draws in perturbations.draws.items():
        if isinstance(draws, LowRankDraws):
            rows = draws.spec.centre.shape[0]
            factors = draws.factors[draw].to(draws.spec.centre.dtype)
            found[name] = factors[:, :rows].mT.clone(), factors[:, rows:].mT.clone(), sign * draws.scale
    return found


def _joined(results: Sequence[Any]) -> Any:
    leaves = [tree_flatten(result) for result in results]
    columns = zip(*(values for values, _ in leaves), strict=True)
    joined = [torch.cat(list(column)) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return tree_unflatten(joined, leaves[0][1])
