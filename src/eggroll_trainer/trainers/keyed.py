"""Keyed noise: what EGGROLLTrainer and VanillaESTrainer have in common."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._utils import validation
from .._utils.arguments import TRAINER_ALIASES, explain_unknown
from ..distributed import Engine
from ..fitness.evaluate import Coalesce
from ..fitness.scores import CheckedScores
from ..fitness.shaping import Shaper, get_shaper, shape, shaper_name
from ..noise.keys import Noise, NoiseKind, check_noise_kind
from ..perturbation.sample import ParameterSpec, Perturbations, effective_rank, sample
from ..update import LRSchedulerFactory, OptimizerFactory
from ..update.estimate import Estimate, weighted_sum
from .adaptation import Adaptation, Setting, facts_of, first_settings, first_state
from .base import ESTrainer
from .method import Method, Sampled


class Keyed(Method):
    """Perturbations as a function of (seed, generation, parameter name, member), and their weighted mean.

    The update is ``Δθ = √N · mean_i(w_i · perturbation_i)`` with ``w`` the shaped fitness: with z-scores, one weight
    moves by about ``learning_rate·σ`` a generation, whatever ``N`` and the rank are.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._member_bytes: dict[tuple[Any, ...], int] = {}
        self.restart()

    def restart(self) -> None:
        """Restart the noise streams from the trainer's seed."""
        self._noise = Noise(self.trainer.seed)
        # Perturbations that are kept for the update, by the first member of their chunk.
        self._kept: dict[int, Perturbations] = {}

    def begin_generation(self) -> None:
        """Discard kept perturbations: those of a generation that failed may have another sigma."""
        self._kept = {}
        self._noise.compile = self.trainer.compile

    def perturbations(self, first: int, count: int) -> Perturbations:
        """Return the perturbations of some members. Whole chunks are kept for the update if memory allows."""
        trainer = self.trainer
        size = trainer._evaluator.chunk_members()
        start = first // size * size
        kept = self._kept.get(start)
        if kept is not None and first + count <= start + len(kept):
            return kept if count == len(kept) else kept.part(first - start, count)
        perturbations = self.sample(first, count)
        # All chunks have the same size, but for the last one, which may be smaller.
        is_chunk = first == start and count == min(size, trainer.population_size - start)
        if is_chunk and (len(self._kept) + 1) * perturbations.nbytes <= trainer._budget.kept_bytes(trainer.device):
            self._kept[start] = perturbations
        return perturbations

    def whole_estimate(self, scores: CheckedScores) -> Estimate:
        """Return the negated update, and the statistics of its terms."""
        trainer = self.trainer
        # Negating the weights costs less than negating the update.
        weights = -shape(scores.values, trainer._shaper, trainer.group_size) / trainer.population_size**0.5
        total = weighted_sum(
            trainer._evaluator.chunks(), weights, self.perturbations, self.specs, self.unit, trainer.engine
        )
        self._kept = {}
        return total

    @property
    def unit(self) -> int:
        """Number of consecutive members that share a noise draw."""
        return max(1, self.trainer.noise_reuse)

    @property
    def bytes_per_member(self) -> int:
        """Memory of a member's perturbations, in bytes."""
        # Used many times a generation, so cached by all that it depends on.
        trainer = self.trainer
        key = self.unit, tuple(trainer._trained), *(trainer._rank(group) for group in trainer.param_groups)
        if key not in self._member_bytes:
            drawn = used = 0
            for spec in self.specs():
                drawn += 4 * spec.numel
                used += (4 if spec.rank is None else spec.centre.element_size()) * spec.numel
            self._member_bytes[key] = -(-drawn // self.unit) + used
        return self._member_bytes[key]

    def sample(self, first: int, count: int) -> Perturbations:
        """Draw the perturbations of some members."""
        with self.trainer._watch.timing("noise"):
            return sample(self._noise, self.specs(), self.trainer.generation, first, count, self.unit)

    def specs(self) -> list[ParameterSpec]:
        """Return how each parameter is perturbed, by the current options of its group."""
        trainer = self.trainer
        specs = []
        for group in trainer.param_groups:
            sigma = validation.check_real("sigma", group["sigma"], positive=True)
            rank = trainer._rank(group)
            for name, p in zip(group["names"], group["params"], strict=True):
                if name in trainer._trained:
                    rows = trainer._centre.fixed_rows.get(name, [])
                    effective = effective_rank(p.shape, rank)
                    specs.append(ParameterSpec(name, p.detach(), sigma, effective, trainer.noise, rows))
        return specs


class KeyedESTrainer(ESTrainer):
    """Base class of trainers with keyed noise. Its two dense methods are for small models and for study."""

    # State of the adaptation, if a setting is "auto".
    adaptation: dict[str, Any]

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
        noise_reuse: int = 0,
        group_size: int = 0,
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
        self.noise_reuse, self.group_size = noise_reuse, group_size
        self._adapted = (learning_rate == "auto", sigma == "auto")
        if (self._adapted[0] and lr_scheduler is not None) or (self._adapted[1] and sigma_scheduler is not None):
            raise ValueError(
                'a setting that is "auto" cannot have a scheduler as well: give learning_rate or sigma as a number, or'
                " leave out lr_scheduler or sigma_scheduler"
            )
        learning_rate, sigma = first_settings(learning_rate, sigma, optimizer)
        self.noise = check_noise_kind(noise)
        self.shaping, self.max_grad_norm = shaping, max_grad_norm
        super().__init__(
            params,
            model,
            fitness_fn,
            population_size,
            learning_rate,
            sigma,
            device,
            seed,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            sigma_scheduler=sigma_scheduler,
            anchor_decay=anchor_decay,
            chunk_size=chunk_size,
            coalesce=coalesce,
            compile=compile,
            memory_budget=memory_budget,
            evaluation_dtype=evaluation_dtype,
            engine=engine,
            maximize=maximize,
        )
        if any(self._adapted):
            self.register_state("adaptation", first_state())

    def _adapt(self, metrics: dict[str, Any], scores: CheckedScores) -> None:
        if not any(self._adapted) or "split_half_cosine" not in metrics:
            return
        facts = facts_of(metrics, scores, len(self._centre), pairs=self.noise_reuse == 2)
        factors = Adaptation(self.adaptation).after(facts, *self._adapted)
        for group in self.param_groups:
            group["lr"] *= factors[0]
            group["sigma"] *= factors[1]

    def sample_perturbations(self, population_size: int) -> Tensor:
        """Return the current generation's perturbations as dense vectors, for small models and for study.

        The trainer itself never forms them.

        Args:
            population_size: ``N``, a multiple of ``noise_reuse``.

        Returns:
            ``[N, D]``.

        Raises:
            TypeError: ``population_size`` is not an integer.
            ValueError: It is less than 1, or not a multiple of ``noise_reuse``.
        """
        validation.check_int("population_size", population_size, 1)
        validation.check_divides("noise_reuse", self.noise_reuse, "population_size", population_size)
        method = self._method if isinstance(self._method, Keyed) else Keyed(self)
        perturbations = method.sample(0, population_size)
        return torch.stack([self._centre.flatten(perturbations.dense(i)) for i in range(population_size)])

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        """Return ``√N · mean_i(w_i · perturbation_i)`` over dense perturbations, ``w`` the shaped fitness.

        Args:
            perturbations: ``[N, D]``.
            fitnesses: ``[N]``, or ``[N, K]`` for ``K`` tasks; higher is better.

        Returns:
            ``[D]``.
        """
        weights = shape(fitnesses, self._shaper, self.group_size).to(perturbations)
        return len(weights) ** 0.5 * (weights[:, None] * perturbations).mean(0)

    def _make_method(self) -> Method:
        cls = type(self)
        own_update = cls.compute_update is not KeyedESTrainer.compute_update
        # A user's subclass that overrides one of the dense methods gets the dense path.
        if own_update or cls.sample_perturbations is not KeyedESTrainer.sample_perturbations:
            return Sampled(self, takes_tasks=not own_update)
        return Keyed(self)

    def _rank(self, group: dict[str, Any]) -> int | None:
        """Return the rank of a group's perturbations; None for full rank."""
        return None

    def _check_sizes(self) -> None:
        super()._check_sizes()
        self.noise_reuse = validation.check_int("noise_reuse", self.noise_reuse, 0)
        self.group_size = validation.check_int("group_size", self.group_size, 0)
        if self._adapted[1] and self.noise_reuse != 2:
            raise ValueError(
                f'sigma="auto" compares the members of antithetic pairs: set noise_reuse=2, got {self.noise_reuse}'
            )
        if self.group_size == 1:
            raise ValueError(
                "group_size must be at least 2, as scores are compared in a group, or 0 for no groups; got 1"
            )
        if self.max_grad_norm is not None:
            self.max_grad_norm = validation.check_real("max_grad_norm", self.max_grad_norm, positive=True)
        validation.check_divides("noise_reuse", self.noise_reuse, "population_size", self.population_size)
        validation.check_divides("group_size", self.group_size, "population_size", self.population_size)
        if self.group_size:
            # A draw never straddles two groups, nor two chunks.
            validation.check_divides("noise_reuse", self.noise_reuse, "group_size", self.group_size)
        if self.chunk_size is not None:
            validation.check_divides("noise_reuse", self.noise_reuse, "chunk_size", self.chunk_size)
        self._shaper = get_shaper(self.shaping, self.noise_reuse)

    def _check_live(self) -> None:
        super()._check_live()
        if self.population_size == 1 and shaper_name(self.shaping) in ("zscore", "centered_ranks"):
            self._warn_once(
                "population_size=1 cannot learn: only the comparison with other members tells what to change. Take at"
                " least 2, such as an antithetic pair with noise_reuse=2"
            )

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "noise_reuse": self.noise_reuse,
            "group_size": self.group_size,
            "noise": self.noise,
            "shaping": shaper_name(self.shaping),
            "auto": " and ".join(itertools.compress(("learning_rate", "sigma"), self._adapted)),
            "max_grad_norm": self.max_grad_norm,
        }
