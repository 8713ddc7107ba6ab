"""The part in which algorithms differ: how members are perturbed, and how the update follows from their fitness."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .._utils import validation
from ..fitness.scores import CheckedScores
from ..noise.keys import forked_rng
from ..perturbation.sample import Draws, FullRankDraws, ParameterSpec, Perturbations, wide_dtype
from ..update.estimate import Estimate
from ..update.products import promoted_products


class Method(ABC):
    """Perturbs the members of a trainer, and computes the update from their fitness.

    Args:
        trainer: The trainer that holds it. (Of type Any, as its module imports this one.)
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @abstractmethod
    def restart(self) -> None:
        """Reset random streams, after the seed or the state of the trainer has changed."""

    @abstractmethod
    def begin_generation(self) -> None:
        """Get ready to perturb the members of the current generation."""

    @abstractmethod
    def perturbations(self, first: int, count: int) -> Perturbations:
        """Return the perturbations of members ``first, …, first + count - 1``."""

    def estimate(self, scores: CheckedScores) -> Estimate:
        """Return ``-Δθ`` for every trained parameter, in new tensors, clipped to ``max_grad_norm``."""
        return self.whole_estimate(scores).clipped(getattr(self.trainer, "max_grad_norm", None))

    @abstractmethod
    def whole_estimate(self, scores: CheckedScores) -> Estimate:
        """Return the estimate before clipping, in new tensors."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Consecutive members that share a noise draw; chunk sizes are multiples of it."""

    @property
    @abstractmethod
    def bytes_per_member(self) -> int:
        """Memory of a member's perturbations, in bytes."""


class Sampled(Method):
    """The two methods over flat tensors that a subclass of :class:`~eggroll_trainer.ESTrainer` writes.

    Args:
        trainer: The trainer that holds it.
        takes_tasks: Whether ``compute_update`` takes scores ``[N, K]`` of several tasks; else it gets their mean.
    """

    def __init__(self, trainer: Any, takes_tasks: bool = False) -> None:
        super().__init__(trainer)
        self._takes_tasks = takes_tasks
        self._sampled: Tensor | None = None

    def restart(self) -> None:
        """Discard the sampled perturbations."""
        self._sampled = None

    def begin_generation(self) -> None:
        """Sample the perturbations of all members."""
        trainer = self.trainer
        with (
            trainer._watch.timing("noise"),
            forked_rng(trainer.seed, trainer.generation, "sample_perturbations", device=trainer.device),
        ):
            sampled = trainer.sample_perturbations(trainer.population_size)
        validation.check_flat("sample_perturbations", sampled, (trainer.population_size, len(trainer._centre)))
        self._sampled = sampled

    def perturbations(self, first: int, count: int) -> Perturbations:
        """Return the perturbations of some members."""
        assert self._sampled is not None
        centre = self.trainer._centre
        one = torch.ones(1, device="cpu")
        draws: dict[str, Draws] = {}
        sampled = centre.unflatten(self._sampled[first : first + count])
        for name in self.trainer._trained:
            parameter, values = centre.parameters[name], sampled[name]
            if name in centre.fixed_rows:
                values = values.clone()
                values[:, centre.fixed_rows[name]] = 0
            spec = ParameterSpec(name, parameter.detach(), 1.0)
            draws[name] = FullRankDraws(values, spec, one.to(parameter.device))
        return Perturbations(draws, one, count)

    def whole_estimate(self, scores: CheckedScores) -> Estimate:
        """Return the negated update."""
        assert self._sampled is not None
        trainer = self.trainer
        sampled, self._sampled = self._sampled, None
        # Not every device has float64.
        dtype = torch.float32 if sampled.device.type == "mps" else torch.float64
        fitnesses = (scores.values if self._takes_tasks else scores.means).to(sampled.device, dtype)
        with (
            forked_rng(trainer.seed, trainer.generation, "compute_update", device=trainer.device),
            promoted_products(),
        ):
            update = trainer.compute_update(sampled, fitnesses)
        validation.check_flat("compute_update", update, (len(trainer._centre),))
        gradient = trainer._centre.unflatten(-update)
        return Estimate({name: gradient[name] for name in trainer._trained})

    @property
    def unit(self) -> int:
        """``noise_reuse`` if the trainer has it, else 1."""
        return max(1, getattr(self.trainer, "noise_reuse", 0))

    @property
    def bytes_per_member(self) -> int:
        """Memory of a member's perturbations, in bytes."""
        trained = (self.trainer._centre.parameters[name] for name in self.trainer._trained)
        return sum(p.numel() * wide_dtype(p).itemsize for p in trained)
