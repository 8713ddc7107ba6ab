"""EGGROLLTrainer: low-rank evolution strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .._utils import validation
from .._utils.arguments import TRAINER_ALIASES, explain_unknown
from ..distributed import Engine
from ..fitness.evaluate import Coalesce
from ..fitness.shaping import Shaper
from ..noise.keys import NoiseKind
from ..perturbation.sample import matrix_shape
from ..update import LRSchedulerFactory, OptimizerFactory
from .adaptation import Setting
from .keyed import KeyedESTrainer


class EGGROLLTrainer(KeyedESTrainer):
    """Evolution strategies with low-rank perturbations of every weight matrix (EGGROLL).

    Member ``i`` sees ``W + s·σ·A_i B_iᵀ/√R`` in the place of a matrix ``W [O, I]``, with ``A_i [O, R]`` and
    ``B_i [I, R]`` of independent entries of zero mean and unit variance, ``s = ±1``; any other parameter is perturbed
    by ``s·σ·ε``, ``ε ~ N(0, 1)``. A kernel counts as ``[O, I·kh·kw]``. Where ``R(O + I) ≥ O·I`` the full-rank
    perturbation is smaller and is used instead. The update is ``θ ← θ + learning_rate·Δθ`` with
    ``Δθ = √N · mean_i(w_i · perturbation_i)``, of full rank, and ``w`` the shaped fitness.

    Args:
        params: Parameters to train, as ``torch.optim`` takes them: ``model.parameters()``, or groups with their own
            ``lr``, ``sigma`` and ``rank``. All parameters of the model if None. Parameters that are left out stay
            frozen.
        model: The module to train.
        fitness_fn: Takes a module and returns its fitness, higher is better: a float, a 0-d tensor or a NumPy scalar;
            or a tensor or array ``[K]``, ``K ≥ 2``, with a score for each of several tasks, such as prompts or
            episodes. If it is marked with :func:`eggroll_trainer.batched`, it takes a
            :class:`~eggroll_trainer.Population` and returns ``[N]`` or ``[N, K]``. Return one score a task, rather
            than their mean, if shaping is by rank or sign, or if a task may fail: members are then compared on each
            task separately.
        population_size: ``N``, the number of models evaluated in a generation; divisible by ``noise_reuse`` and
            ``group_size``. Take as many as you can afford: the direction's error falls like ``1/√N`` until ``N``
            reaches the number of weights. 256 is a fair start for small networks.
        learning_rate: With z-scores, a weight moves by about ``learning_rate·sigma`` a generation. 0.1 with sigma 0.1
            is a fair start for the plain step; with ``torch.optim.Adam`` it is Adam's own, 0.01 to 0.05. ``"auto"``
            adapts it after every generation, by whether each estimate agrees with the step before.
        sigma: Standard deviation of the perturbations. If it is too small, members tie; if it is too large, most of
            them fail. Most models learn with about the spread of their weights, 0.02 to 0.3. ``"auto"`` adapts it
            after every generation; it needs ``noise_reuse=2``.
        device: Device to train on; the model is moved there. If None, the model's own device.
        seed: Seed of the run. If None, it is drawn from the operating system; read it as ``trainer.seed``.
        rank: ``R``. 1 is the cheapest, and a good first choice; a higher rank makes perturbations more like full-rank
            ones. A matrix is perturbed at full rank if it is smaller than its factors would be, or cannot have this
            rank.
        noise_reuse: How many evaluations each noise draw serves, with signs ``+ - + - …``: 2 is antithetic sampling,
            which helps most runs; 0 and 1 mean no reuse.
        group_size: Number of consecutive members within which scores are shaped; 0 for all members together.
        freeze_nonlora: Perturb and update matrices only; biases and other vectors stay as they are.
        shaping: ``"zscore"``; ``"centered_ranks"`` if scores have outliers; ``"antithetic_sign"``, with
            ``noise_reuse=2``, which only looks at the better one of a pair; ``"raw"``; or a callable from the scores
            of a group, ``[n]`` in float64, to their weights. Tasks are shaped one by one, and their weights averaged;
            z-scores share one standard deviation.
        noise: Distribution of the factors, ``"gaussian"`` or ``"rademacher"`` (±1), which is quicker to draw.
        optimizer: Optimizer that takes the step: a ``torch.optim`` class or another factory ``(params, lr=…)`` of a
            ``torch.optim.Optimizer``. It gets ``-Δθ`` as gradient. ``torch.optim.SGD`` if None.
        lr_scheduler: Factory of a ``torch.optim.lr_scheduler`` from the trainer, stepped after every generation.
        sigma_scheduler: Factory of a ``torch.optim.lr_scheduler`` that drives ``sigma`` instead.
        anchor_decay: Pulls the weights back to the initial ones ``θ₀``, as weight decay pulls them to zero: before each
            step ``θ ← θ - learning_rate·anchor_decay·(θ - θ₀)``. Use it for fine-tuning that should stay close to
            ``θ₀``. Each generation undoes the share ``learning_rate·anchor_decay`` of what was learnt.
        max_grad_norm: Largest Euclidean norm of the estimate ``Δθ``. A longer one is scaled down to it before the
            optimizer gets it; ``grad_norm`` in the history is the norm before. With z-scores the norm is about ``σ√D``
            for ``D`` weights if the estimate is noise, and up to ``σ√(N + D)`` if it is signal, whatever the fitness
            is. Use it with ``shaping="raw"`` or a shaping of your own. No limit if None.
        chunk_size: Number of members evaluated at a time. It bounds memory, and chunks are what an engine distributes.
            If None, as many as fit in ``memory_budget``, up to 1024 on a CPU.
        coalesce: Whether to evaluate the members of a chunk together if ``fitness_fn`` is a plain function. True checks
            now and then that this gives the same scores; ``"unchecked"`` skips the checks. False evaluates one member
            after the other.
        compile: Whether to run the model's batched forwards with ``torch.compile``. Use it for runs that take minutes.
        memory_budget: Bytes that an evaluation may use in addition to the model. If None, a share of the device's
            memory.
        evaluation_dtype: ``torch.bfloat16`` or ``torch.float16`` to run the fitness function under ``torch.autocast``
            to that type. It is faster only on processors with instructions for the type.
        engine: What evaluates the chunks of a population: ``"local"``, ``"torch"`` for the processes of
            ``torch.distributed``, ``"ray"`` for a Ray cluster, or an
            :class:`~eggroll_trainer.distributed.Engine`. If None, ``"torch"`` under ``torchrun``, else ``"local"``.
        maximize: Whether higher fitness is better. Pass False if ``fitness_fn`` returns a loss: ``history`` and
            ``best_fitness`` are then losses too.

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

    @explain_unknown(TRAINER_ALIASES)
    def __init__(
        self,
        params: Iterable[Any] | None = None,
        model: nn.Module | None = None,
        fitness_fn: Callable[..., Any] | None = None,
        population_size: int = 50,
        learning_rate: Setting = 0.01,
        sigma: Setting = 0.1,
        device: torch.device | str | None = None,
        seed: int | None = None,
        rank: int = 1,
        noise_reuse: int = 0,
        group_size: int = 0,
        freeze_nonlora: bool = False,
        *,
        shaping: str | Shaper = "zscore",
        noise: NoiseKind = "gaussian",
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: LRSchedulerFactory | None = None,
        sigma_scheduler: LRSchedulerFactory | None = None,
        anchor_decay: float = 0.0,
        max_grad_norm: float | None = None,
        chunk_size: int | None = None,
        coalesce: Coalesce = True,
        compile: bool = False,
        memory_budget: int | None = None,
        evaluation_dtype: torch.dtype | None = None,
        engine: str | Engine | None = None,
        maximize: bool = True,
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
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            sigma_scheduler=sigma_scheduler,
            anchor_decay=anchor_decay,
            max_grad_norm=max_grad_norm,
            chunk_size=chunk_size,
            coalesce=coalesce,
            compile=compile,
            memory_budget=memory_budget,
            evaluation_dtype=evaluation_dtype,
            engine=engine,
            maximize=maximize,
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
        raise ValueError(
            "freeze_nonlora=True leaves nothing to train: no parameter is a matrix; pass freeze_nonlora=False"
        )
    return kept
