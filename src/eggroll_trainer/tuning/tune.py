"""A search for sigma and the learning rate on the user's own trainer: a range test, then a race.

*Sigma.* Members come in antithetic pairs, ``f₊`` and ``f₋``. With ``o = (f₊ - f₋)/2`` and ``e = (f₊ + f₋)/2``, the
*linear share* is ``Var(o)/(Var(o) + Var(e))``. It is near 1 if the fitness is linear over a distance of sigma, less if
it is curved (sigma is too large), and about a half if it is noise or too coarse (sigma is too small). It takes one
generation to measure, whatever the number of weights is. We take the largest sigma that is nearly as linear as the
best: with 0.85 of its linear share if the fitness is smooth, and with 0.6 if scores tie. A fitness that ties, such as
an accuracy, is piecewise constant, so it has no slope at a point. With a small sigma, only the few examples at the
margin change the score; later in the run, none may. If no share is above that of noise, but the mean fitness falls with
sigma, then every sigma was too large, and we try smaller ones.

*Learning rate.* Several rates, which move a weight by a hundredth of sigma to three sigmas a generation, start from the
same weights with the same perturbations. The better half of them continues, again and again (successive halving,
Jamieson and Talwalkar, 2016). A short race favours long steps. So if the winner's last estimates point back along its
steps, we take the next lower rate.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .._utils import validation
from .._utils.warned import Warned
from ..diagnostics import LearningWarning
from ..diagnostics.agreement import random_cosine
from ..diagnostics.spread import linear_share, tie_probability
from ..trainers.base import ESTrainer
from ..trainers.keyed import KeyedESTrainer
from .result import RateTrial, SigmaTrial, Tuning

# Sigmas to try, as powers of the square root of ten relative to the trainer's sigma.
_SIGMAS = range(-4, 5)
# Learning rates to try, as the step of a weight in a generation, in units of sigma. A small budget has the first of
# them only, with three generations each: the first generation shows nothing of a rate.
_STEPS, _SHORTEST = (0.3, 0.1, 1.0, 0.03, 3.0, 0.01), 3
# Generations that smaller sigmas leave for the rates.
_FOR_RATES = 7
# A sigma is acceptable from these fractions of the best linear share on, for a smooth and a piecewise constant fitness.
_NEARLY, _NEARLY_COARSE = 0.85, 0.6
# Above the first tie probability, a fitness is piecewise constant. Above the second, sigma is too small.
_COARSE, _TIES = 0.001, 0.3


def tune(
    trainer: ESTrainer,
    budget: int = 50,
    *,
    sigma: bool = True,
    learning_rate: bool = True,
    apply: bool = True,
    verbose: bool = True,
) -> Tuning:
    """Find a sigma and a learning rate with which a trainer learns, starting from its current state.

    The trainer is run with various settings, and restored after each trial: weights, history, optimizer and random
    streams do not change. If parameter groups have different settings, their ratios are kept.

    Args:
        trainer: The trainer to tune, with its fitness function, population and optimizer. The search for sigma uses
            antithetic pairs if possible, even if the trainer does not.
        budget: Largest number of generations for the search, at least 20. A fifth of those you plan to train is a
            fair share.
        sigma: Whether to search for sigma. A custom :class:`~eggroll_trainer.ESTrainer` always keeps its own.
        learning_rate: Whether to search for the learning rate.
        apply: Whether to set the settings that were found. If False, the trainer keeps its own.
        verbose: Whether to show a progress bar.

    Returns:
        The settings that were found, and all trials. Print it to get a table, or use :meth:`Tuning.plot`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``budget`` is less than 20, a setting of the trainer is "auto", or all members have the same
            fitness with every sigma.

    Example:
        >>> import torch
        >>> from eggroll_trainer import EGGROLLTrainer, tune
        >>> x = torch.randn(64, 2)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> trainer = EGGROLLTrainer(
        ...     model=model,
        ...     fitness_fn=lambda m: -(m(x) - x.prod(1, keepdim=True)).square().mean(),
        ...     population_size=64,
        ...     sigma=10.0,
        ...     learning_rate=1e-6,
        ...     seed=0,
        ... )
        >>> found = tune(trainer, budget=30, verbose=False)
        >>> trainer.sigma == found.sigma < 3.0, trainer.learning_rate == found.learning_rate > 1e-3
        (True, True)
        >>> trainer.generation
        0
    """
    if not isinstance(trainer, ESTrainer):
        raise TypeError(f"tune takes a trainer, got {type(trainer).__name__}")
    if hasattr(trainer, "adaptation"):
        raise ValueError(
            'settings that are "auto" adapt themselves: give learning_rate and sigma as numbers to tune them'
        )
    budget = validation.check_int("budget", budget, 20)
    with tqdm(total=budget, unit="gen", disable=not (verbose and trainer.is_main)) as bar:
        search = _Search(trainer, budget, bar)
        with search.restored():
            sigmas = search.sigmas() if sigma and isinstance(trainer, KeyedESTrainer) else []
            best_sigma = _chosen(sigmas) if sigmas else trainer.sigma
            search.set(sigma=best_sigma)
            rates = search.rates() if learning_rate else []
            best_rate = search.winner(rates) if rates else trainer.learning_rate
    if apply:
        search.set(sigma=best_sigma, learning_rate=best_rate)
    return Tuning(best_sigma, best_rate, search.generations, sigmas, rates)


class _Search:
    """Runs a trainer with various settings.

    Args:
        trainer: The trainer.
        budget: Largest number of generations.
        bar: The progress bar.
    """

    def __init__(self, trainer: ESTrainer, budget: int, bar: Any) -> None:
        self.trainer, self.budget, self.bar = trainer, budget, bar
        self.generations = 0
        # Inside the search, higher is better.
        self._sign = 1.0 if trainer.maximize else -1.0
        self._start = trainer.state_dict()
        groups = trainer.param_groups
        first = groups[0]
        self._sigmas = [group["sigma"] / first["sigma"] for group in groups]
        # Without ratios if the first rate is zero.
        self._rates = [group["lr"] / first["lr"] if first["lr"] else 1.0 for group in groups]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the trainer at the end of the block."""
        trainer = self.trainer
        warned, planned = trainer._warned, trainer._watch.planned
        # Warnings about settings on trial are not for the user.
        trainer._warned = Warned()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LearningWarning)
                yield
        finally:
            trainer.load_state_dict(self._start)
            trainer._warned, trainer._watch.planned = warned, planned

    def set(self, sigma: float | None = None, learning_rate: float | None = None) -> None:
        """Set the values of the first parameter group, and those of the others in proportion."""
        groups = self.trainer.param_groups
        for group, sigma_ratio, rate_ratio in zip(groups, self._sigmas, self._rates, strict=True):
            if sigma is not None:
                group["sigma"] = sigma * sigma_ratio
            if learning_rate is not None:
                group["lr"] = learning_rate * rate_ratio

    def _step(self) -> dict[str, Any]:
        self.generations += 1
        self.bar.update()
        return self.trainer.step()

    def sigmas(self) -> list[SigmaTrial]:
        """Run one generation with each of several sigmas."""
        trainer, centre = self.trainer, self.trainer.sigma
        assert isinstance(trainer, KeyedESTrainer)
        # Pairs need even sizes of the population, groups and chunks.
        pairs = not any(size % 2 for size in (trainer.population_size, trainer.group_size, trainer.chunk_size or 0))
        trials = [self._sigma_trial(centre * 10 ** (power / 2), pairs) for power in _SIGMAS]
        while self._all_too_large(trials) and self.budget - self.generations > _FOR_RATES:
            trials.insert(0, self._sigma_trial(trials[0].sigma / math.sqrt(10), pairs))
        if not any(trial.ties < 1 for trial in trials):
            raise ValueError(
                f"all members have the same fitness with every sigma from {trials[0].sigma:.2g} to"
                f" {trials[-1].sigma:.2g}: check that the fitness function uses the model that it gets"
            )
        return trials

    def _all_too_large(self, trials: list[SigmaTrial]) -> bool:
        """Return whether no linear share is above that of noise, and the mean fitness falls from the smallest sigma on.

        The share of noise is 0.5 with a standard deviation of about ``1/√(2N)``. Two of these, and two standard errors
        of the means, must be exceeded.
        """
        highest = 0.5 + math.sqrt(2 / self.trainer.population_size)
        if any(trial.linear_share > highest for trial in trials if trial.ties < _TIES):
            return False
        smallest, larger = trials[0], trials[2]
        fallen = self._sign * (smallest.mean_fitness - larger.mean_fitness)
        return fallen > 2 * math.hypot(smallest.std_error, larger.std_error)

    def _sigma_trial(self, sigma: float, pairs: bool) -> SigmaTrial:
        """Run one generation with a sigma, in antithetic pairs if ``pairs``."""
        trainer = self.trainer
        assert isinstance(trainer, KeyedESTrainer)
        reuse = trainer.noise_reuse
        self.set(sigma=sigma)
        trainer.noise_reuse = 2 if pairs else reuse
        try:
            return self._measured(sigma, pairs)
        finally:
            trainer.noise_reuse = reuse
            trainer.load_state_dict(self._start)

    def _measured(self, sigma: float, pairs: bool) -> SigmaTrial:
        trainer = self.trainer
        try:
            mean = self._step()["mean_fitness"]
        except ValueError:
            # No score is finite, or the weights after the step are not.
            return SigmaTrial(sigma, 0.0, 1.0, math.nan)
        assert trainer.last_generation is not None
        scores = np.asarray(trainer.last_generation.scores, float).reshape(trainer.population_size, -1)
        fitness = self._sign * np.where(np.isfinite(scores), scores, np.nan).mean(1)
        fitness = np.where(np.isnan(fitness), np.nanmin(fitness), fitness)
        ties = tie_probability(fitness)
        share = linear_share(fitness) if pairs else 1 - ties
        return SigmaTrial(sigma, share, ties, mean, float(fitness.std()) / math.sqrt(len(fitness)))

    def rates(self) -> list[RateTrial]:
        """Compare learning rates by successive halving."""
        trainer = self.trainer
        state = trainer.state_dict()
        unit = trainer.learning_rate or 1.0
        self.set(learning_rate=unit)
        moved = self._step()["update_norm"] / math.sqrt(max(1, len(trainer.current_params)))
        trainer.load_state_dict(state)
        if not moved > 0:
            # All members tie, so rates cannot be compared.
            return []
        left = self.budget - self.generations
        whole = left >= 2 * len(_STEPS)
        steps = _STEPS if whole else _STEPS[: max(2, left // _SHORTEST)]
        trials = [RateTrial(unit * step * trainer.sigma / moved) for step in sorted(steps)]
        states: dict[float, dict[str, Any]] = {}
        running = trials
        rounds = math.ceil(math.log2(len(trials))) if whole else 1
        for round in range(rounds):
            length = max(2, left // ((rounds - round) * len(running)))
            for trial in running:
                trainer.load_state_dict(states.get(trial.learning_rate, state))
                self.set(learning_rate=trial.learning_rate)
                self._run(trial, min(length, left // len(running) or 1))
                states[trial.learning_rate] = trainer.state_dict()
            left = self.budget - self.generations
            running = sorted(running, key=self._standing, reverse=True)[: (len(running) + 1) // 2]
            states = {trial.learning_rate: states[trial.learning_rate] for trial in running}
            if left < len(running):
                break
        return trials

    def _run(self, trial: RateTrial, generations: int) -> None:
        for _ in range(generations):
            try:
                metrics = self._step()
                trial.fitness.append(metrics["mean_fitness"])
                trial.agreement.append(metrics["agreement"])
            except ValueError:
                # Scores or weights are not finite: rank this rate last.
                trial.fitness.append(-self._sign * math.inf)
                return

    def _standing(self, trial: RateTrial) -> float:
        """Return the mean fitness of the last two generations of a rate, higher is better."""
        return self._sign * float(np.mean(trial.fitness[-2:]))

    def winner(self, trials: list[RateTrial]) -> float:
        """Return the best of the rates that ran longest, or a lower one if its steps went too far."""
        longest = max(len(trial.fitness) for trial in trials)
        best = max((trial for trial in trials if len(trial.fitness) == longest), key=self._standing)
        for trial in reversed(trials[: trials.index(best) + 1]):
            if not self._overshoots(trial):
                return trial.learning_rate
        return trials[0].learning_rate

    def _overshoots(self, trial: RateTrial) -> bool:
        """Return whether the last estimates point back along the steps, by more than chance."""
        lately = trial.agreement[len(trial.agreement) // 2 :]
        if not lately:
            return False
        return float(np.mean(lately)) < -random_cosine(len(self.trainer.current_params)) / math.sqrt(len(lately))


def _chosen(trials: list[SigmaTrial]) -> float:
    """Return the largest sigma that is nearly as linear as the best, of those with few ties if there are any."""
    usable = [trial for trial in trials if trial.ties < _TIES] or [min(trials, key=lambda trial: trial.ties)]
    best = max(usable, key=lambda trial: trial.linear_share)
    nearly = _NEARLY_COARSE if best.ties > _COARSE else _NEARLY
    return max(trial.sigma for trial in usable if trial.linear_share >= nearly * best.linear_share)
