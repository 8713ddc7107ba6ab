"""What VanillaESTrainer and EGGROLLTrainer share: keyed noise, shaping, and the estimate of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._utils import validation
from ..distributed import Chunk
from ..fitness.shaping import Shaper, get_shaper, shape, shaper_name
from ..noise.keys import Noise, NoiseKind, check_noise_kind
from ..perturbation.sample import ParameterSpec, Perturbations, effective_rank, sample
from ..update.exact_sum import ExactSum
from .base import ESTrainer

# What it takes to draw a number and to sum it up, about: on an accelerator, and on one core.
_SECONDS_PER_NUMBER = (1e-10, 5e-9)


class KeyedESTrainer(ESTrainer):
    """A trainer whose perturbations are a function of (seed, generation, parameter name, member).

    Its update is ``Δθ = √N · mean_i(w_i · perturbation_i)`` with ``w`` the shaped fitness: with z-scores, one weight
    moves by about ``learning_rate·σ`` a generation, whatever ``N`` and the rank are.
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
        noise_reuse: int = 0,
        group_size: int = 0,
        *,
        shaping: str | Shaper = "zscore",
        noise: NoiseKind = "gaussian",
        **options: Any,
    ) -> None:
        self.noise_reuse, self.group_size = noise_reuse, group_size
        self.noise = check_noise_kind(noise)
        self.shaping = shaping
        self._member_bytes: dict[tuple[Any, ...], int] = {}
        super().__init__(params, model, fitness_fn, population_size, learning_rate, sigma, device, seed, **options)

    def _check_sizes(self) -> None:
        super()._check_sizes()
        self.noise_reuse = validation.check_int("noise_reuse", self.noise_reuse, 0)
        self.group_size = validation.check_int("group_size", self.group_size, 0)
        if self.group_size == 1:
            raise ValueError(
                "group_size must be at least 2, as scores are compared in a group, or 0 for no groups; got 1"
            )
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
                "population_size=1 cannot learn: a member's fitness counts by how it compares with the others'. Take at"
                " least 2, such as an antithetic pair by noise_reuse=2"
            )

    def sample_perturbations(self, population_size: int) -> Tensor:
        """Return the current generation's perturbations in full, ``[N, D]``: for small models and for study.

        A generation never forms them.
        """
        validation.check_int("population_size", population_size, 1)
        validation.check_divides("noise_reuse", self.noise_reuse, "population_size", population_size)
        perturbations = self._sample(0, population_size)
        return torch.stack([self._centre.flatten(perturbations.dense(i)) for i in range(population_size)])

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        """Return ``√N · mean_i(w_i · perturbation_i)`` over perturbations in full.

        Args:
            perturbations: ``[N, D]``.
            fitnesses: ``[N]``.

        Returns:
            ``[D]``.
        """
        weights = shape(fitnesses, self._shaper, self.group_size).to(perturbations)
        return len(weights) ** 0.5 * (weights[:, None] * perturbations).mean(0)

    def _specs(self) -> list[ParameterSpec]:
        """Return how each parameter is perturbed now: the options of groups may change at any time."""
        specs = []
        for group in self.param_groups:
            sigma = validation.check_real("sigma", group["sigma"], positive=True)
            rank = self._rank(group)
            for name, p in zip(group["names"], group["params"], strict=True):
                if name in self._trained:
                    rows = self._centre.fixed_rows.get(name, [])
                    specs.append(
                        ParameterSpec(name, p.detach(), sigma, effective_rank(p.shape, rank), self.noise, rows)
                    )
        return specs

    def _rank(self, group: dict[str, Any]) -> int | None:
        """Return the rank of a group's perturbations; None for full rank."""
        return None

    def _sample(self, first: int, count: int) -> Perturbations:
        return sample(self._noise, self._specs(), self.generation, first, count, self._chunk_unit())

    # The stations of a generation. A user's subclass that overrides one of the dense methods gets the dense path.

    def _is_dense(self) -> bool:
        cls = type(self)
        return (
            cls.sample_perturbations is not KeyedESTrainer.sample_perturbations
            or cls.compute_update is not KeyedESTrainer.compute_update
        )

    def _restart_noise(self) -> None:
        super()._restart_noise()
        self._noise = Noise(self.seed)
        # By the first member of a chunk.
        self._kept: dict[int, Perturbations] = {}

    def _begin_generation(self) -> None:
        # What is kept of a generation that failed may be of another sigma.
        self._kept = {}
        self._noise.compile = self.compile
        if self._is_dense():
            super()._begin_generation()

    def _perturbations(self, first: int, count: int) -> Perturbations:
        if self._is_dense():
            return super()._perturbations(first, count)
        size = self._chunk_members()
        start = first // size * size
        kept = self._kept.get(start)
        if kept is not None and first + count <= start + len(kept):
            return kept if count == len(kept) else kept.part(first - start, count)
        perturbations = self._sample(first, count)
        # Chunks at hand for the update need not be drawn again. None is larger than the first.
        is_chunk = first == start and count == min(size, self.population_size - start)
        if is_chunk and (len(self._kept) + 1) * perturbations.nbytes <= self._budget.kept_bytes(self.device):
            self._kept[start] = perturbations
        return perturbations

    def _gradient(self, scores: Tensor) -> dict[str, Tensor]:
        if self._is_dense():
            return super()._gradient(scores)
        # Negated here, where it costs nothing.
        weights = -shape(scores, self._shaper, self.group_size) / self.population_size**0.5
        chunks = self._chunks()
        if len(chunks) == 1:
            # Nothing to add, so nothing to round.
            total = self._contribution(chunks[0], weights)
        else:
            total = self._exact_sum(chunks, weights)
        self._kept = {}
        return total

    def _contribution(self, chunk: Chunk, weights: Tensor) -> dict[str, Tensor]:
        return self._perturbations(*chunk).weighted_sum(weights[chunk.first : chunk.first + chunk.size])

    def _exact_sum(self, chunks: list[Chunk], weights: Tensor) -> dict[str, Tensor]:
        """Return the sum of the chunks' contributions, taken by as many processes as there are."""
        specs = self._specs()
        signs = torch.tensor([1.0, -1.0], dtype=weights.dtype, device=weights.device)
        signs = signs.repeat(self._chunk_unit())[: self._chunk_unit()]
        largest = float((weights.view(-1, len(signs)) @ signs).abs().sum())
        try:
            total = ExactSum(
                {spec.name: spec.centre for spec in specs}, {spec.name: largest * spec.largest for spec in specs}
            )
        except ValueError:
            # Not finite: neither is the update, as whoever takes the step will say.
            return {spec.name: torch.full_like(spec.centre, torch.inf) for spec in specs}
        # What it takes to draw the noise of all members again, and to sum it up.
        numbers = sum(spec.numel for spec in specs) * self.population_size // len(signs)
        seconds = numbers * _SECONDS_PER_NUMBER[self.device.type == "cpu"]
        for chunk in self.engine.own_part(chunks, 8 * len(self._centre), seconds):
            total.add(self._contribution(chunk, weights))
        self.engine.add_up(total.totals)
        return total.values()

    def _chunk_unit(self) -> int:
        return max(1, self.noise_reuse)

    def _bytes_per_member(self) -> int:
        # Asked many times a generation, and the same as long as the ranks and the trained parameters are.
        key = self._chunk_unit(), tuple(self._trained), *(self._rank(group) for group in self.param_groups)
        if key not in self._member_bytes:
            drawn = used = 0
            for spec in self._specs():
                drawn += 4 * spec.numel
                used += (4 if spec.rank is None else spec.centre.element_size()) * spec.numel
            self._member_bytes[key] = -(-drawn // self._chunk_unit()) + used
        return self._member_bytes[key]

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "noise_reuse": self.noise_reuse,
            "group_size": self.group_size,
            "noise": self.noise,
            "shaping": shaper_name(self.shaping),
        }
