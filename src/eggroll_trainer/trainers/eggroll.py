"""EGGROLLTrainer: low-rank evolution strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .._utils import validation
from ..fitness.shaping import Shaper
from ..noise.keys import NoiseKind
from ..perturbation.sample import matrix_shape
from .keyed import KeyedESTrainer


class EGGROLLTrainer(KeyedESTrainer):
    """Evolution strategies with low-rank perturbations of every weight matrix (EGGROLL).

    Member ``i`` sees ``W + s·σ·A_i B_iᵀ/√R`` in the place of a matrix ``W [O, I]``, with ``A_i [O, R]`` and
    ``B_i [I, R]`` of independent entries of zero mean and unit variance, ``s = ±1``; any other parameter is perturbed
    by ``s·σ·ε``, ``ε ~ N(0, 1)``. A kernel counts as ``[O, I·kh·kw]``. Where ``R(O + I) ≥ O·I`` the full-rank
    perturbation is smaller and is used instead. The update is ``θ ← θ + learning_rate·Δθ`` with
    ``Δθ = √N · mean_i(w_i · perturbation_i)``, of full rank, and ``w`` the shaped fitness.

    Args:
        params: See :class:`~eggroll_trainer.ESTrainer`; groups may have their own ``lr``, ``sigma`` and ``rank``.
        model: The module to train.
        fitness_fn: From a module to its fitness, or marked with :func:`eggroll_trainer.batched`.
        population_size: ``N``, how many models are evaluated in a generation; divisible by ``noise_reuse`` and
            ``group_size``.
        learning_rate: With z-scores, a weight moves by about ``learning_rate·sigma`` a generation.
        sigma: Standard deviation of the perturbations.
        device: Where to train.
        seed: Seed of the run.
        rank: ``R``. Matrices that are smaller than their factors would be are perturbed at full rank, and so are those
            that cannot have this rank.
        noise_reuse: How many evaluations each noise draw serves, with signs ``+ - + - …``: 2 is antithetic sampling,
            0 and 1 mean no reuse.
        group_size: Scores are shaped within consecutive groups of so many members; 0 for all together.
        freeze_nonlora: Perturb and update matrices only; biases and other vectors stay as they are.
        shaping: ``"zscore"``, ``"centered_ranks"``, ``"antithetic_sign"``, ``"raw"``, or a callable from the scores
            of a group, ``[n]`` in float64, to their weights.
        noise: Distribution of the factors, ``"gaussian"`` or ``"rademacher"`` (±1).
        options: ``optimizer``, ``lr_scheduler``, ``sigma_scheduler``, ``chunk_size`` and ``coalesce`` of
            :class:`~eggroll_trainer.ESTrainer`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or there is nothing to train.

    References:
        "Evolution Strategies at the Hyperscale", arXiv 2511.16652.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
        >>> x = torch.randn(64, 2)
        >>> def fitness(model):
        ...     with torch.no_grad():
        ...         return -(model(x) - x.prod(1, keepdim=True)).square().mean().item()
        >>> trainer = EGGROLLTrainer(
        ...     model.parameters(),
        ...     model=model,
        ...     fitness_fn=fitness,
        ...     population_size=256,
        ...     learning_rate=0.1,
        ...     seed=0,
        ... )
        >>> before = trainer.evaluate_fitness(model)
        >>> trainer.train(30, verbose=False)["generation"]
        30
        >>> trainer.evaluate_fitness(model) > before
        True
    """

    def __init__(
        self,
        params: Iterable[Any] | None = None,
        model: nn.Module | None = None,
        fitness_fn: Callable[..., Any] | None = None,
        population_size: int = 50,
        learning_rate: float = 0.01,
        sigma: float = 0.1,
        device: torch.device | str | None = None,
        seed: int | None = None,
        rank: int = 1,
        noise_reuse: int = 0,
        group_size: int = 0,
        freeze_nonlora: bool = False,
        *,
        shaping: str | Shaper = "zscore",
        noise: NoiseKind = "gaussian",
        **options: Any,
    ) -> None:
        self._default_rank = validation.check_int("rank", rank, 1)
        self.freeze_nonlora = bool(freeze_nonlora)
        if isinstance(model, nn.Module):
            groups = validation.parameter_groups(params, model)
            for group in groups:
                validation.check_int("rank", group.get("rank", rank), 1)
            params = groups
            if self.freeze_nonlora:
                params = _matrices_of(groups)
        super().__init__(
            params,
            model,
            fitness_fn,
            population_size,
            learning_rate,
            sigma,
            device,
            seed,
            noise_reuse,
            group_size,
            shaping=shaping,
            noise=noise,
            **options,
        )

    @property
    def rank(self) -> int:
        """Rank of the perturbations in the first parameter group; setting it sets all groups."""
        return int(self.param_groups[0]["rank"])

    @rank.setter
    def rank(self, value: int) -> None:
        value = validation.check_int("rank", value, 1)
        for group in self.param_groups:
            group["rank"] = value

    def _group_defaults(self) -> dict[str, Any]:
        return {"rank": self._default_rank}

    def _rank(self, group: dict[str, Any]) -> int | None:
        return validation.check_int("rank", group["rank"], 1)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "freeze_nonlora": self.freeze_nonlora}


def _matrices_of(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = []
    for group in groups:
        matrices = [p for p in group["params"] if matrix_shape(p.shape) is not None]
        if matrices:
            kept.append({**{k: v for k, v in group.items() if k != "names"}, "params": matrices})
    if not kept:
        raise ValueError("freeze_nonlora=True leaves nothing to train: no parameter is a matrix")
    return kept
